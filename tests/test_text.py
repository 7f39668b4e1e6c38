"Words, vocabularies, and models of texts beside PyTorch's"
import datasets as hf, pytest, torch
from miniai import text as m
from miniai.data import Padded
from miniai.datasets import DataLoaders

def padded(*rows): return Padded(torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True), torch.tensor([len(r) for r in rows]))

@pytest.mark.parametrize('text, words', [
    ('Hello, World!', ['hello', ',', 'world', '!']), ("it's o’clock", ["it's", 'o’clock']), ('', []), (' \n\t ', []), ('a_b 3.5 x2', ['a_b', '3', '.', '5', 'x2']),
    ("'quoted' end'", ["'", 'quoted', "'", 'end', "'"]), ('ÜBER ñandú', ['über', 'ñandú']), ('😀😀', ['😀', '😀'])])
def test_words(text, words): assert m.split_words(text) == words

def test_numbers_depend_on_the_texts_alone():
    texts = ['b a', 'a b', 'c c d', 'd', 'e']
    one,two = m.Vocab.of(texts),m.Vocab.of(reversed(texts))
    assert one == two and one.words == ['a', 'b', 'c', 'd'] and one != m.Vocab(['b', 'a', 'c', 'd'])
    assert m.Vocab.of(texts, most=2).words == ['a', 'b'] and 'e' in m.Vocab.of(texts, least=1).words
    assert one('d e a') == [5, m.UNKNOWN, 2] and one('  ') == [m.UNKNOWN] and one('a b c d', 2) == [2, 3]

def test_a_vocabulary_is_the_same_after_a_file(tmp_path):
    vocab = m.Vocab(['naïve', '"', '\\', '😀', '你好'])
    m.save_vocab(vocab, tmp_path/'v.json')
    assert m.load_vocab(tmp_path/'v.json') == vocab
    for content,said in (('[1]', 'is no vocabulary'), ('[', 'is no JSON')):
        (tmp_path/'v.json').write_text(content)
        with pytest.raises(ValueError, match=said): m.load_vocab(tmp_path/'v.json')
    with pytest.raises(ValueError, match='there is no vocabulary'): m.load_vocab(tmp_path/'w.json')

def test_ids_keep_labels_and_order_and_say_what_is_missing():
    features = hf.Features(text=hf.Value('string'), label=hf.ClassLabel(names=['x', 'y']))
    dd = hf.DatasetDict({k: hf.Dataset.from_dict(dict(text=['a b', '', 'b b b a'], label=[1, 0, 1]), features=features) for k in ('train', 'test')})
    vocab = m.Vocab.of(dd['train']['text'], least=1)
    dls = DataLoaders.from_dd(m.as_ids(dd, vocab, length=3), bs=3, pad=m.PAD)
    x,y = next(iter(dls.valid))
    assert x.x.tolist() == [[3, 2, 0], [1, 0, 0], [2, 2, 2]] and x.lengths.tolist() == [2, 1, 3] and y.tolist() == [1, 0, 1] and dls.names == ['x', 'y']
    hole = hf.DatasetDict(train=hf.Dataset.from_dict(dict(text=['a', None], label=[0, 1]), features=features))
    with pytest.raises(ValueError, match='text: nothing in 1 of 2 rows, first in row 1'): m.as_ids(hole, vocab)

def test_the_bag_is_pytorchs_embedding_bag():
    torch.manual_seed(0)
    ours,rows = m.bag(20, 3).eval(),([4, 5, 6], [7], [1, 2, 3, 4, 5])
    theirs = torch.nn.EmbeddingBag(20, 64, mode='mean', _weight=ours.emb.weight.detach().clone().requires_grad_())
    out = torch.nn.functional.linear(theirs(torch.tensor(sum(rows, [])), torch.tensor([0, 3, 4])), ours.out.weight, ours.out.bias)
    torch.testing.assert_close(ours(padded(*rows)), out)
    ours(padded(*rows)).square().sum().backward(); out.square().sum().backward()
    torch.testing.assert_close(ours.emb.weight.grad, theirs.weight.grad)

def test_the_transformer_is_pytorchs():
    torch.manual_seed(0)
    ours = m.transformer(20, 3, length=9).eval()
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, .1, batch_first=True, norm_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    theirs.load_state_dict({f'layers.{k}': v for k,v in ours.blocks.state_dict().items()})
    x = padded([4, 5, 6], [7], [1, 2, 3, 4, 5])
    h = theirs(ours.emb(x.x) + ours.places[:5], src_key_padding_mask=~x.mask)
    out = ours.out(torch.stack([o[:n].mean(0) for o,n in zip(ours.norm(h), x.lengths, strict=True)]))
    torch.testing.assert_close(ours(x), out)

@pytest.mark.parametrize('name', m.MODELS)
def test_filling_counts_for_nothing(name):
    torch.manual_seed(0)
    model,rows = m.build(name, words=20, c=3, length=40).eval(),([4, 5, 6], [7])
    alone = torch.cat([model(padded(r)) for r in rows])
    torch.testing.assert_close(model(padded(*rows)), alone)
    torch.testing.assert_close(model(padded(*rows, [1]*40))[:2], alone)
    torch.testing.assert_close(model(padded(*rows).x), alone)
