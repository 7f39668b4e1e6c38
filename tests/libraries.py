"""The field's libraries on our engine: tiny transformers and timm nets, unmodified; ours inside theirs, theirs inside ours, and ours in ONNX.

    make libraries                      all of it; writes bench/results/libraries.md
    python tests/libraries.py WORD ...  (after that) only what has one of these words in its name

PyTorch's autograd is the judge: the same model, the same batch, the same seed, in training mode with its dropout.
timm wants torchvision, which it needs for pictures only: an empty one stands in while it is imported."""
import copy, itertools, json, logging, os, sys, tempfile, warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import MagicMock
import torch
from torch.nn.functional import cross_entropy
from miniai import nn, optim
from miniai.autograd import Tape, engine
from miniai.vision import cnn, conv, mlp

ROOT = Path(__file__).resolve().parent.parent
TOL = {torch.float64: 1e-10, torch.float32: 1e-5}
INSIDE = {'DeBERTa', 'Mamba2'}                      # float64 outside, but they compute in float32 inside: the tolerance of that
SINGLE = {'Mixtral'}                                # PyTorch has no grouped product in float64

# ---- two outcomes compared

def worst(want, got):
    "The largest difference of two lists of tensors: of a tensor's largest entry, or of a thousandth of the largest of all where that is more"
    if [a is None for a in want] != [b is None for b in got]: raise AssertionError('other tensors are None')
    pairs = [(a.double(), b.double()) for a,b in zip(want, got, strict=True) if a is not None and a.numel()]
    most = max([float(a.abs().max()) for a,_ in pairs], default=0.)
    return max([float((a-b).abs().max()) / (max(float(a.abs().max()), most/1000) or 1.) for a,b in pairs], default=0.)

def seed(n=0):
    import transformers
    transformers.set_seed(n)                        # Python's, NumPy's and PyTorch's chance

def outcome(model, run, on=nullcontext):
    "Loss, gradients and buffers of a copy of the model after one pass of `run`, which gives the loss"
    model = copy.deepcopy(model)
    seed()
    with on():
        loss = run(model)
        loss.backward()
    return [loss.detach()],[p.grad for p in model.parameters()],[b for b in model.buffers() if b.is_floating_point()]

def counted(gs): return f'{sum(g is not None and bool(g.any()) for g in gs)} of {len(gs)}'

def gradients(make, dtype):
    "Does the tape give what PyTorch's autograd does?"
    model,run = make(dtype)
    want,got = outcome(model, run),outcome(model, run, Tape)
    return f'gradients of the tape, {str(dtype)[6:]}',counted(want[1]),max(map(worst, want, got))

# ---- transformers

D = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
GROUPED = dict(D, num_key_value_heads=2)
SHORT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2)
EMBED = dict(D, embedding_size=16)
LOOK = dict(image_size=32, patch_size=8, num_labels=5)
APART = dict(D, relative_attention=True, pos_att_type=['c2p', 'p2c'])
BOTH = dict(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
SOUND = dict(D, vocab_size=20, conv_dim=[16]*3, conv_stride=[4, 2, 2], conv_kernel=[8, 3, 3], num_feat_extract_layers=3,
             num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_length=2)
SEEN = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8, projection_dim=16)

TRANSFORMERS = {    # name: what for, the configuration's type, its sizes
    'BERT':       ('MaskedLM', 'bert', D),
    'RoBERTa':    ('MaskedLM', 'roberta', D),
    'DistilBERT': ('MaskedLM', 'distilbert', dict(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48)),
    'ALBERT':     ('MaskedLM', 'albert', EMBED),
    'ELECTRA':    ('MaskedLM', 'electra', EMBED),
    'DeBERTa':    ('MaskedLM', 'deberta', APART),
    'DeBERTa-v2': ('MaskedLM', 'deberta-v2', dict(APART, position_buckets=8, norm_rel_ebd='layer_norm', share_att_key=True)),
    'ModernBERT': ('MaskedLM', 'modernbert', dict(D, pad_token_id=0, local_attention=4)),
    'GPT-2':      ('CausalLM', 'gpt2', dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    'GPT-NeoX':   ('CausalLM', 'gpt_neox', D),
    'OPT':        ('CausalLM', 'opt', dict(SHORT, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)),
    'Bloom':      ('CausalLM', 'bloom', dict(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
    'Llama':      ('CausalLM', 'llama', GROUPED),
    'Mistral':    ('CausalLM', 'mistral', dict(GROUPED, sliding_window=5)),
    'Mixtral':    ('CausalLM', 'mixtral', dict(GROUPED, num_local_experts=4, output_router_logits=True)),
    'Qwen2':      ('CausalLM', 'qwen2', GROUPED),
    'Qwen3':      ('CausalLM', 'qwen3', dict(GROUPED, head_dim=8)),
    'Gemma':      ('CausalLM', 'gemma', dict(GROUPED, head_dim=8)),
    'Gemma 2':    ('CausalLM', 'gemma2', dict(GROUPED, head_dim=8, sliding_window=5)),
    'Phi':        ('CausalLM', 'phi', D),
    'Falcon':     ('CausalLM', 'falcon', dict(SHORT, num_attention_heads=4)),
    'Mamba':      ('CausalLM', 'mamba', dict(SHORT, state_size=4)),
    'Mamba2':     ('CausalLM', 'mamba2', dict(SHORT, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4)),
    'RWKV':       ('CausalLM', 'rwkv', dict(SHORT, attention_hidden_size=32, context_length=16)),
    'T5':         ('Seq2SeqLM', 't5', dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)),
    'BART':       ('Seq2SeqLM', 'bart', BOTH),
    'ViT':        ('ImageClassification', 'vit', dict(D, **LOOK)),
    'DINOv2':     ('ImageClassification', 'dinov2', dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **LOOK)),
    'Swin':       ('ImageClassification', 'swin', dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
                                                       num_labels=5)),
    'ConvNeXt':   ('ImageClassification', 'convnext', dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)),
    'SegFormer':  ('ImageClassification', 'segformer', dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)),
    'Wav2Vec2':   ('CTC', 'wav2vec2', SOUND),
    'HuBERT':     ('CTC', 'hubert', SOUND),
    'Whisper':    ('SpeechSeq2Seq', 'whisper', dict(BOTH, num_mel_bins=16, max_source_positions=20, max_target_positions=20, pad_token_id=0,
                                                    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
    'CLIP':       ('', 'clip', dict(text_config=dict(D, projection_dim=16), vision_config=SEEN, projection_dim=16))}

def batch(task, dtype):
    "Words, pictures or sound, two of each, and what is to be learnt"
    gen = torch.Generator().manual_seed(0)
    def noise(*shape): return torch.randn(*shape, generator=gen).to(dtype)
    ids = torch.randint(3, 90, (2, 12), generator=gen)
    words = dict(input_ids=ids, attention_mask=torch.tensor([[1]*12, [1]*8 + [0]*4]))
    if task == 'ImageClassification': return dict(pixel_values=noise(2, 3, 32, 32), labels=torch.tensor([1, 4]))
    if task == 'CTC': return dict(input_values=noise(2, 640), labels=ids[:, :5]%19 + 1)
    if task == 'SpeechSeq2Seq': return dict(input_features=noise(2, 16, 40), labels=ids)
    return dict(words, labels=ids) if task else dict(words, pixel_values=noise(2, 3, 32, 32), return_loss=True)

def transformer(name, dtype):
    "A model of that family with random weights, and what gives its loss"
    import transformers
    task,kind,sizes = TRANSFORMERS[name]
    seed()
    config = transformers.AutoConfig.for_model(kind, **sizes)
    home = getattr(transformers, f'AutoModelFor{task}' if task else 'AutoModel')
    xs = batch(task, dtype)
    return started(home.from_config(config).to(dtype)),lambda model: model(**xs).loss

@torch.no_grad()
def started(model):
    "Parameters that begin as zeros as small numbers instead: behind zeros there are no gradients to compare"
    for p in model.parameters():
        if not p.any(): p.normal_(std=.05)
    return model.train()

# ---- timm

NETS = {    # name: arguments; pictures of 64×64 but where said otherwise
    **{name: {} for name in ('resnet18', 'resnetv2_50', 'resnext26ts', 'seresnet18', 'skresnet18', 'res2net50_14w_8s', 'densenet121', 'dpn68',
       'dla46_c', 'hrnet_w18_small', 'efficientnet_b0', 'mobilenetv2_050', 'mobilenetv3_small_050', 'mobilenetv4_conv_small_035', 'ghostnet_050',
       'regnetx_002', 'regnety_002', 'repvgg_a0', 'test_nfnet', 'starnet_s050', 'convnext_atto', 'convnextv2_atto', 'mambaout_femto')},
    'inception_v3': dict(img_size=96),
    **{f'{name}_224': dict(img_size=64) for name in ('vit_tiny_patch16', 'deit3_small_patch16', 'cait_xxs24', 'xcit_nano_12_p16')},
    'swin_tiny_patch4_window7_224': dict(img_size=56), 'swinv2_tiny_window8_256': dict(img_size=64), 'eva02_tiny_patch14_224': dict(img_size=56),
    **{f'{name}_224': dict(img_size=64) for name in ('mixer_s32', 'gmlp_ti16', 'resmlp_12')},
    **{name: {} for name in ('sequencer2d_s', 'poolformer_s12', 'pvt_v2_b0', 'levit_128s', 'maxvit_rmlp_pico_rw_256', 'mobilevit_xxs',
       'edgenext_xx_small', 'efficientvit_b0', 'fastvit_t8', 'repvit_m0_9')}}
SIZED = ('vit', 'deit', 'cait', 'xcit', 'swin', 'eva', 'mixer', 'gmlp', 'resmlp', 'levit', 'maxvit')      # who has to be told the size

@contextmanager
def no_torchvision():
    "An empty torchvision, as long as timm is being imported"
    empty = MagicMock()
    empty.ops.misc.FrozenBatchNorm2d = type('FrozenBatchNorm2d', (torch.nn.Module,), {})
    names = {'torchvision': empty, 'torchvision.ops.misc': empty.ops.misc, 'torchvision.datasets': empty.datasets,
             'torchvision.transforms': empty.transforms, 'torchvision.transforms.functional': empty.transforms.functional}
    sys.modules.update(names)
    try: yield
    finally:
        for name in names: del sys.modules[name]

def timm_net(name, dtype=torch.float64, n=4, size=64, **kwargs):
    "A net of timm's with random weights, and what gives its loss on pictures of noise"
    with nullcontext() if 'timm' in sys.modules else no_torchvision(): import timm
    size = kwargs.get('img_size', size)
    if name.startswith(SIZED): kwargs['img_size'] = size
    else: kwargs.pop('img_size', None)
    seed()
    model = started(timm.create_model(name, num_classes=5, **kwargs).to(dtype))
    x,targ = torch.randn(n, 3, size, size, dtype=dtype),torch.arange(n)%5
    return model,lambda model: cross_entropy(first(model(x)), targ)

def first(y): return y[0] if isinstance(y, tuple) else y

# ---- ours inside theirs

OURS = {    # a layer of theirs: one like it of ours
    torch.nn.Linear:      lambda m: nn.Linear(m.in_features, m.out_features, m.bias is not None),
    torch.nn.Conv2d:      lambda m: nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups,
                                              m.bias is not None),
    torch.nn.BatchNorm2d: lambda m: nn.BatchNorm2d(m.num_features, m.eps, m.momentum),
    torch.nn.LayerNorm:   lambda m: nn.LayerNorm(m.normalized_shape, m.eps),
    torch.nn.Embedding:   lambda m: nn.Embedding(m.num_embeddings, m.embedding_dim, m.padding_idx),
    torch.nn.Dropout:     lambda m: nn.Dropout(m.p),
    torch.nn.MaxPool2d:   lambda m: nn.MaxPool2d(m.kernel_size, m.stride, m.padding),
    torch.nn.ReLU:        lambda m: nn.ReLU(m.inplace),
    torch.nn.GELU:        lambda m: nn.GELU(m.approximate)}

def replaced(model):
    "The model with our layers for theirs, wherever we can, on the same parameters; and how many of each kind"
    count,theirs = Counter(),[(path, m) for path,m in model.named_modules() if type(m) in OURS]
    for path,m in theirs:
        new = OURS[type(m)](m).train(m.training)
        for k,t in [*m.named_parameters(), *m.named_buffers()]: setattr(new, k, t)
        model.set_submodule(path, new)
        count[type(m).__name__] += 1
    return model,count

def ours_inside(make):
    "Their model with our layers, on either engine, against their own on PyTorch's"
    model,run = make(torch.float64)
    want = outcome(model, run)
    model,count = replaced(model)
    off = max(worst(*pair) for name in ('torch', 'tape') for pair in zip(want, outcome(model, run, partial(engine, name)), strict=True))
    return 'with ours for each ' + ', '.join(f'{k} ({n})' for k,n in sorted(count.items())) + ': gradients on both engines',counted(want[1]),off

# ---- theirs inside ours

def steps(engine_name, optimizer, make, n=10):
    "Losses of n steps of a net of timm's between layers of ours, and the weights afterwards"
    seed()
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), make()[0], nn.Tanh(), nn.Linear(5, 4)).double()
    x,targ,losses = torch.randn(8, 1, 32, 32).double(),torch.arange(8)%4,[]
    opt = optimizer(model.parameters())
    for _ in range(n):
        with engine(engine_name):
            loss = nn.cross_entropy(model(x), targ)
            loss.backward(); opt.step(); opt.zero_grad()
        losses.append(loss.detach())
    return [torch.stack(losses)],[p.detach() for p in model.parameters()]

def trained(make, name, **kwargs):
    "Both engines and both optimizers: one curve, one set of weights"
    owners = {home: partial(getattr(home, name), **kwargs) for home in (torch.optim, optim)}
    found = {(e, home): steps(e, opt, make) for e,(home, opt) in itertools.product(('torch', 'tape'), owners.items())}
    want = found['torch', torch.optim]
    assert want[0][0][-1] < want[0][0][0]*.7, 'it learns nothing'
    off = max(worst(*pair) for got in found.values() for pair in zip(want, got, strict=True))
    return f'10 steps of {name}, either engine and optimizer: losses, weights',f'{len(want[1])} weights',off

def checkpointed(name):
    "With the library's own gradient checkpointing"
    def make(dtype):
        model,run = transformer(name, dtype)
        model.gradient_checkpointing_enable()
        return model,run
    return make

# ---- theirs on our command line

def asked(*argv):
    "What `miniai` says on standard output; it has to end well"
    from miniai.cli import main
    with redirect_stdout(StringIO()) as out: code = main([str(o) for o in argv])
    if code: raise AssertionError(f'miniai {" ".join(map(str, argv))}: {code}')
    return out.getvalue()

def painted(folder, n, mode, size):
    "Pictures of two classes, sorted into folders"
    from PIL import Image
    for i,(name,shade) in itertools.product(range(n), dict(dark=40, light=200).items()):
        (folder/name).mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, shade+i if mode == 'L' else (shade+i, shade, shade)).save(folder/name/f'{i}.png')
    return folder

def command(name, mode, size, lr):
    "Trained, read back, evaluated; what its log says against what `miniai eval` says of it"
    with nullcontext() if 'timm' in sys.modules else no_torchvision(): import timm  # noqa: F401  so that ours finds it without torchvision
    with tempfile.TemporaryDirectory() as tmp, redirect_stderr(StringIO()):
        data = painted(Path(tmp)/'data', 20, mode, (size, size))
        said = json.loads(asked('train', '--data', data, '--model', f'timm:{name}', '--epochs', 2, '--bs', 8, '--lr', lr, '--fast', 'exact', '--out', f'{tmp}/run', '--json'))
        again = json.loads(asked('eval', f'{tmp}/run', '--json'))
        assert 'light' in asked('predict', f'{tmp}/run', data/'light'/'0.png')
    return f'{mode} of {size}×{size}: trained by `miniai train --fast exact`, read back by `miniai eval`: loss','',abs(again['valid_loss']/said['epochs'][-1]['valid_loss']-1)

# ---- ours in ONNX

def residual():
    return nn.Sequential(conv(3, 16, stride=1), nn.Residual(conv(16, 32), nn.Conv2d(32, 32, 3, padding=1), skip=nn.Conv2d(16, 32, 1, 2)),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

def block(norm_first=False): return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
def words(): return nn.Sequential(nn.Embedding(20, 16), block(norm_first=True), nn.LayerNorm(16), nn.Linear(16, 20))

def noise(*shape): return lambda n: torch.randn(n, *shape)
ONNX = {    # name: model, a batch of n
    'mlp':               (mlp, noise(1, 28, 28)),
    'cnn':               (cnn, noise(1, 28, 28)),
    'residual net':      (residual, noise(3, 16, 16)),
    'transformer block': (block, noise(7, 16)),
    'language model':    (words, lambda n: torch.randint(0, 20, (n, 7))),
    'LSTM':              (lambda: nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True), noise(5, 8))}

@torch.no_grad()
def onnx(make, batch):
    "Exported once; run by onnxruntime on batches of three sizes"
    import onnxruntime
    seed()
    model,x = make(),batch(4)
    model.train()(x), model.eval()                  # averages of a batch norm that are not those of its beginning
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim('n')},), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])
    def there(x): return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    off = max(worst([first(model(x))], [there(x)]) for x in map(batch, (1, 4, 9)))
    return 'outputs of onnxruntime, float32, batches of 1, 4, 9',f'{len(program.model_proto.graph.node)} nodes',off

# ---- all of it

def checks():
    "Names, the work, the tolerance"
    double,single = torch.float64,torch.float32
    for name in TRANSFORMERS:
        dtype = single if name in SINGLE else double
        yield f'transformers {name}',partial(gradients, partial(transformer, name), dtype),TOL[single if name in INSIDE else dtype]
    for name,kwargs in NETS.items():
        yield f'timm {name}',partial(gradients, partial(timm_net, name, **kwargs), double),TOL[double]
    for name in ('Llama', 'T5'):
        yield f'transformers {name}, checkpointed',partial(gradients, checkpointed(name), double),TOL[double]
    for name in ('BERT', 'Llama', 'BART', 'ViT', 'Wav2Vec2'):
        yield f'transformers {name}',partial(ours_inside, partial(transformer, name)),TOL[double]
    for name in ('resnet18', 'vit_tiny_patch16_224', 'mixer_s32_224'):
        yield f'timm {name}',partial(ours_inside, partial(timm_net, name)),TOL[double]
    for name,kwargs in dict(SGD=dict(lr=.1, momentum=.9), AdamW=dict(lr=3e-3, weight_decay=.1)).items():
        yield 'timm resnet10t in our Sequential',partial(trained, partial(timm_net, 'resnet10t'), name, **kwargs),TOL[double]*100
    for name,mode,size in (('resnet10t', 'RGB', 40), ('vit_tiny_patch16_224', 'L', 32), ('mobilenetv3_small_050', 'L', 33)):
        yield f'timm:{name} on the command line',partial(command, name, mode, size, 1e-3),TOL[single]
    for name,(make, batch) in ONNX.items(): yield f'ONNX {name}',partial(onnx, make, batch),TOL[single]

def row(name, work, tol):
    "A line of the table, and whether all is well"
    try: what,count,off = work()
    except Exception as e: return (name, f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'.replace('|', '/'), '', 'FAILED', f'{tol:.0e}'),False
    well = off <= tol
    return (name, what, count, f'{off:.1e}' + ('' if well else ' DIFFERS'), f'{tol:.0e}'),well

def main(words):
    from report import write
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    found = []
    for name,work,tol in checks():
        if words and not any(w in name for w in words): continue
        found.append(row(name, work, tol))
        print(' | '.join(found[-1][0]), flush=True)
    well = sum(ok for _,ok in found)
    note = (f'{well} of {len(found)} agree. Difference: the largest in a tensor, as a share of its largest entry (or of a thousandth of the '
            'largest of all gradients, where that is more); of loss, gradients and buffers the worst counts. '
            f'{", ".join(sorted(INSIDE))} compute in float32 inside; {", ".join(sorted(SINGLE))} has a product that PyTorch has in float32 only. '
            'Middle column: the tensors of parameters whose gradient is not all zeros.')
    if not words: write('libraries', 'Inside the field\'s libraries', ('model', 'compared', 'tensors', 'worst difference', 'allowed'),
                        [r for r,_ in found], note, timed=False, packages=('transformers', 'timm', 'onnx', 'onnxscript', 'onnxruntime'))
    return 0 if well == len(found) > 0 else 1

if __name__ == '__main__':
    os.environ['HF_HUB_OFFLINE'] = '1'
    sys.path += [str(ROOT/'.libraries'), str(ROOT/'bench')]
    if not (ROOT/'.libraries').exists(): sys.exit('the libraries are not there: make libraries')
    sys.exit(main(sys.argv[1:]))
