"""The bridge from Hugging Face's data sets to batches"""
import os, subprocess, sys, threading
from pathlib import Path
import numpy as np, pytest, torch
import PIL.Image, PIL.ImageOps
import datasets as hf
from torch.utils import data as torch_data
from miniai import datasets as m
from miniai.core import Draw
from miniai.data import Padded, pad_collate
from miniai.fashion import FASHION, SAMPLE, _from_parquet
from miniai.loader import DataLoader
from miniai.transform import Compose, Flip, Mixup, Normalize, RandomCrop

hf.disable_progress_bars()          # what they write to stderr is not ours

@pytest.fixture(scope='module')
def sample(): return _from_parquet(SAMPLE)

@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    "A cache folder for each test"
    monkeypatch.setenv('MINIAI_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'/'columns'

def kept(cache): return sorted(cache.iterdir()) if cache.exists() else []
def pixels(ds): return np.stack([np.asarray(o) for o in ds['image']])

def dataset(**columns):
    "Columns as `name=(feature, cells)`"
    return hf.Dataset.from_dict({k: list(v) for k,(_,v) in columns.items()}, features=hf.Features({k: f for k,(f,_) in columns.items()}))

def images(*shapes): return [np.random.default_rng(i).integers(0, 256, s, dtype=np.uint8) for i,s in enumerate(shapes)]
def pair(**columns): return hf.DatasetDict(train=dataset(**columns), test=dataset(**columns))

@m.inplace
def scale(batch): batch['image'] = [torch.from_numpy(np.array(o))[None]/255 for o in batch['image']]

def test_inplace():
    @m.inplace
    def add(x, item, *, twice=False): x.extend([item]*(1 + twice))
    x = []
    assert add(x, 1) is x and add(x, 2, twice=True) is x and x == [1, 2, 2] and add.__name__ == 'add'

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('loader', [DataLoader, torch_data.DataLoader])
def test_collate_dict_in_both_loaders(sample, loader, workers):
    ds = sample['test'].select(range(50)).with_transform(scale)
    kwargs = dict(bs=16) if loader is DataLoader else dict(batch_size=16)
    got = list(loader(ds, collate_fn=m.collate_dict('label', 'image'), num_workers=workers, **kwargs))
    assert [len(y) for y,_ in got] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([x for _,x in got]), torch.stack([o['image'] for o in ds]))
    assert torch.cat([y for y,_ in got]).tolist() == list(sample['test']['label'][:50])

def test_collate_dict_there_and_back():
    items = [dict(a=i, b=torch.full((2,), float(i)), c=dict(d=i)) for i in range(3)]
    xy = m.collate_dict('b', 'a', 'c')
    batch = xy(items)
    assert batch[0].shape == (3, 2) and batch[1].tolist() == [0, 1, 2] and batch[2]['d'].tolist() == [0, 1, 2]
    assert list(xy.named(batch)) == ['b', 'a', 'c'] and xy.named(batch)['a'] is batch[1]
    with pytest.raises(ValueError): xy.named(batch[:2])
    with pytest.raises(ValueError, match='no column bb; did you mean b?'): m.collate_dict('bb')(items)
    with pytest.raises(TypeError, match='column t holds str, which is no tensor'): m.collate_dict('t')([dict(t='x')])

def test_in_memory_types():
    ds = dataset(image=(hf.Image(), images((4, 5), (4, 5), (4, 5))), label=(hf.ClassLabel(names=['a', 'b']), [0, 1, 1]),
                 small=(hf.Value('uint8'), [1, 2, 255]), f=(hf.Value('float64'), [.5, 1, 2]), b=(hf.Value('bool'), [True, False, True]),
                 v=(hf.List(hf.Value('float32'), length=2), [[1, 2]]*3))
    rows = m.in_memory(ds)
    assert isinstance(rows, m.Table)
    assert {k: (c.dtype, tuple(c.shape)) for k,c in rows.columns.items()} == dict(
        image=(torch.uint8, (3, 1, 4, 5)), label=(torch.int64, (3,)), small=(torch.uint8, (3,)), f=(torch.float32, (3,)),
        b=(torch.bool, (3,)), v=(torch.float32, (3, 2)))
    assert np.array_equal(rows.columns['image'][:,0].numpy(), np.stack(images((4, 5), (4, 5), (4, 5))))
    assert rows.columns['small'].tolist() == [1, 2, 255]

def test_in_memory_follows_rows_that_were_chosen(sample):
    ds = sample['test'].shuffle(seed=1).select(range(20))
    rows = m.in_memory(ds)
    assert np.array_equal(rows.columns['image'][:,0].numpy(), pixels(ds)) and rows.columns['label'].tolist() == list(ds['label'])

def test_in_memory_modes(tmp_path):
    grey, colour = images((4, 6), (4, 6, 3))
    def shape(*ims, feature=None):
        x = m.in_memory(dataset(image=(feature or hf.Image(), ims))).columns['image']
        assert x.is_contiguous()
        return x
    assert np.array_equal(shape(colour)[0].movedim(0, -1).numpy(), colour)
    both = shape(grey, colour, grey)
    assert both.shape == (3, 3, 4, 6) and np.array_equal(both[2,1].numpy(), grey) and np.array_equal(both[1].movedim(0, -1).numpy(), colour)
    assert shape(colour, grey).shape == (2, 3, 4, 6)
    assert shape(PIL.Image.fromarray(colour).quantize(4)).shape == (1, 3, 4, 6)
    assert shape(PIL.Image.fromarray(grey > 127)).unique().tolist() == [0, 255]
    assert shape(colour, grey, feature=hf.Image(mode='L')).shape == (2, 1, 4, 6)
    assert shape(colour, feature=hf.Image(mode='RGBA')).shape == (1, 4, 4, 6)
    PIL.Image.fromarray(grey).save(tmp_path/'x.png')
    assert np.array_equal(shape(str(tmp_path/'x.png'))[0,0].numpy(), grey)         # files, not bytes
    with pytest.raises(TypeError, match='image: row 0 has more than 8 bits a pixel .mode I;16'): shape(grey.astype(np.uint16)*256)

def test_mixed_sizes_and_their_mend():
    dd = pair(image=(hf.Image(), images((8, 8), (9, 7), (8, 8), (9, 7), (8, 8), (5, 5))))
    some = r'8×8 \(rows: 3, first 0\), 9×7 \(rows: 2, first 1\), 5×5 \(rows: 1, first 5\)'
    with pytest.raises(ValueError, match=f'split train, image: 3 sizes .*{some}') as e: m.DataLoaders.from_dd(dd)
    mend = str(e.value).split('give them one with ')[1]
    assert m.DataLoaders.from_dd(eval(mend, dict(dd=dd))).train.ds.columns['image'].shape == (6, 1, 8, 8)

def test_bad_labels_and_their_mend():
    dd = pair(label=(hf.ClassLabel(names=['a', 'b', 'c']), [0, 2, -1, 1, -1]))
    with pytest.raises(ValueError, match='label: -1 in row 2 is no class: there are names for 0 to 2 .2 such rows; -1 marks') as e:
        m.DataLoaders.from_dd(dd)
    assert len(m.DataLoaders.from_dd(eval(str(e.value).split('leave them out with ')[1], dict(dd=dd))).train.ds) == 3
    import pyarrow as pa
    ds = hf.Dataset(pa.table({'y': [0, 3]}))
    ds.info.features = hf.Features(y=hf.ClassLabel(names=['a', 'b', 'c']))
    with pytest.raises(ValueError, match='y: 3 in row 1 is no class'): m.in_memory(ds)

def test_missing_cells_and_their_mend():
    dd = pair(image=(hf.Image(), [images((3, 3))[0], None]), label=(hf.Value('int64'), [None, 1]))
    with pytest.raises(ValueError, match='image: nothing in 1 of 2 rows, first in row 1') as e: m.in_memory(dd['train'])
    dd = eval(str(e.value).split('leave them out with ')[1], dict(dd=dd))
    with pytest.raises(ValueError, match='label: nothing in 1 of 1 rows, first in row 0'): m.in_memory(dd['train'])

def test_columns_that_are_no_tensors():
    import datetime
    day = datetime.date(2020, 1, 2)
    dd = pair(day=(hf.Value('date32'), [day, day]), y=(hf.Value('int8'), [1, 2]))
    with pytest.raises(TypeError, match="day: Value.'date32'. cannot be one tensor; leave it out with dd.remove_columns") as e:
        m.DataLoaders.from_dd(dd)
    mend = str(e.value).split('leave it out with ')[1].split(',')[0]
    assert list(m.DataLoaders.from_dd(eval(mend, dict(dd=dd))).train.ds.columns) == ['y']
    ragged = dataset(ragged=(hf.List(hf.Value('int64')), [[1], [1, 2, 3]]))
    with pytest.raises(TypeError, match=r"ragged: List.* cannot be one tensor: its rows have 1 to 3 entries; pad=0 fills .* .pad=.'ragged': 0. only"): m.in_memory(ragged)
    with pytest.raises(ValueError, match='pad: no column raged; did you mean ragged?'): m.in_memory(ragged, pad=dict(raged=0))
    deep = dataset(deep=(hf.List(hf.List(hf.Value('int64'))), [[[1], [1, 2]], [[1]]]))
    with pytest.raises(TypeError, match='deep: List.* cannot be one tensor'): m.in_memory(deep, pad=0)
    nested = dataset(o=(dict(a=hf.Value('int64')), [dict(a=1)]))
    with pytest.raises(TypeError, match='o: .* cannot be one tensor'): m.in_memory(nested)
    words = dataset(words=(hf.List(hf.Value('string'), length=1), [['a']]))
    with pytest.raises(TypeError, match='words: List.* cannot be one tensor'): m.in_memory(words)
    hole = dataset(hole=(hf.List(hf.Value('int64'), length=2), [[1, 2], [None, 3]]))
    with pytest.raises(ValueError, match='hole: there is nothing in 1 places within its lists'): m.in_memory(hole)
    broken = dataset(image=(hf.Image(), [dict(bytes=b'GIF89a no picture', path=None)]))
    with pytest.raises(ValueError, match='image: row 0 is no image that can be read'): m.in_memory(broken)

def test_splits(sample):
    one = sample['test'].select(range(10))
    def used(**splits):
        dls = m.DataLoaders.from_dd(hf.DatasetDict(splits))
        return len(dls.train.ds), len(dls.valid.ds)
    few, more, most = (sample['test'].select(range(n)) for n in (2, 3, 4))
    assert used(test=few, train=one, validation=more) == (10, 3)
    assert used(test=few, valid=most, train=one) == (10, 4)
    assert used(test=few, train=one, extra=more) == (10, 2)
    assert used(train=one, dev=more, extra=few) == (10, 3)
    with pytest.raises(TypeError, match='Dataset has no splits; .train_test_split'): m.DataLoaders.from_dd(one)
    with pytest.raises(ValueError, match='train is the only split; dd..train...train_test_split'): used(train=one)
    with pytest.raises(ValueError, match='no split train; there are test, validation'): used(test=one, validation=one)
    with pytest.raises(ValueError, match='split test has no rows'): used(train=one, test=one.select([]))
    with pytest.raises(ValueError, match='split train has no rows'): used(train=one.select([]), test=one)
    colour = dataset(image=(hf.Image(), images((28, 28, 3))), label=(hf.Value('int64'), [1]))
    with pytest.raises(ValueError, match='the splits differ'): used(train=one, test=colour)
    with pytest.raises(ValueError, match='the splits differ'): used(train=one, test=one.remove_columns('label'))

def test_batch_sizes(sample):
    with pytest.raises(ValueError, match='bs is 0'): m.DataLoaders.from_dd(sample, bs=0)
    few = hf.DatasetDict({k: v.select(range(100)) for k,v in sample.items()})
    dls = m.DataLoaders.from_dd(few, bs=1000)
    assert [len(x) for x,_ in dls.train] == [100] and [len(x) for x,_ in dls.valid] == [100]
    dls = m.DataLoaders.from_dd(few, bs=64, drop_last=True)
    assert [len(x) for x,_ in dls.train] == [64] and [len(x) for x,_ in dls.valid] == [64, 36]

@pytest.mark.parametrize('as_tuple', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('own', [False, True])
def test_ours_and_pytorchs_give_the_same_batches(sample, as_tuple, workers, own):
    dd = hf.DatasetDict({k: v.select(range(100)) for k,v in sample.items()})
    if own: dd = dd.with_transform(scale)
    kwargs = dict(bs=32, as_tuple=as_tuple, transform=twice, seed=3)
    ours = m.DataLoaders.from_dd(dd, **kwargs)
    theirs = m.DataLoaders.from_dd(dd, loader=torch_data.DataLoader, num_workers=workers, **kwargs)
    for _ in range(2):
        for a, b in zip(ours, theirs, strict=True):
            a, b = list(a), list(b)
            assert len(a) == len(b) == len(ours.train) == 4
            for u, v in zip(a, b, strict=True):
                if not as_tuple: assert list(u) == list(v) == ['image', 'label']; u, v = u.values(), v.values()
                for s, t in zip(u, v, strict=True): assert s.equal(t) and s.dtype == t.dtype
    first, second = (torch.cat([(o if as_tuple else tuple(o.values()))[1] for o in ours.train]) for _ in range(2))
    assert not first.equal(second) and first.sort()[0].equal(second.sort()[0])     # shuffled anew, nothing lost

def twice(batch):
    if isinstance(batch, dict): return {**batch, 'label': batch['label']*2}
    return batch[0], batch[1]*2

def test_a_batch_is_what_the_rows_are(sample):
    dls = m.DataLoaders.from_dd(sample, bs=100)
    x, y = next(iter(dls.valid))
    want = (torch.from_numpy(pixels(sample['test'].select(range(100))))[:,None]/255 - dls.mean)/dls.std
    torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)
    assert y.tolist() == list(sample['test']['label'][:100]) and dls.names == FASHION
    torch.testing.assert_close(dls.mean, torch.tensor([pixels(sample['train']).mean()/255], dtype=torch.float32))
    torch.testing.assert_close(dls.std, torch.tensor([pixels(sample['train']).std()/255], dtype=torch.float32))
    train, valid = dls
    assert train is dls.train and valid is dls.valid
    assert 'Ankle boot' in repr(dls)
    assert repr(m.DataLoaders([1, 2], [3])) == 'DataLoaders\n  train: 2 batches\n  valid: 1 batches'

def test_norm_of_ones_own(sample):
    few = hf.DatasetDict({k: v.select(range(10)) for k,v in sample.items()})
    given = Normalize(0.5, 0.25)
    dls = m.DataLoaders.from_dd(few, norm=given)
    raw = m.DataLoaders.from_dd(few, norm=False)
    x, bytes_ = next(iter(dls.valid))[0], next(iter(raw.valid))[0]
    assert dls.norm is given and raw.mean is None and bytes_.dtype == torch.uint8
    torch.testing.assert_close(x, (bytes_/255 - 0.5)/0.25)

def test_own_transform_is_left_alone(sample):
    dd = hf.DatasetDict({k: v.select(range(10)) for k,v in sample.items()})
    def renamed(b): return dict(x=[torch.ones(3)]*len(b['label']), y=b['label'])
    dls = m.DataLoaders.from_dd(dd.with_transform(renamed), bs=4)
    x, y = next(iter(dls.valid))
    assert x.shape == (4, 3) and y.tolist() == list(dd['test']['label'][:4]) and dls.norm is None and dls.names == FASHION
    x, y = next(iter(m.DataLoaders.from_dd(dd.with_format('torch'), bs=4).valid))
    assert x.dtype == torch.uint8 and x.shape[0] == 4 and y.dtype == torch.int64
    x, y = next(iter(m.DataLoaders.from_dd(dd.with_transform(lambda b: b), bs=4).valid))       # pictures become bytes
    assert x.dtype == torch.uint8 and np.array_equal(x[:,0].numpy(), pixels(dd['test'].select(range(4))))


# numbers and their memory

CELLS = [
    (hf.Value('uint8'), torch.uint8, lambda r, n: r.integers(0, 256, n)),
    (hf.Value('int8'), torch.int64, lambda r, n: r.integers(-128, 128, n)),
    (hf.Value('int64'), torch.int64, lambda r, n: r.integers(-2**60, 2**60, n)),
    (hf.Value('uint32'), torch.int64, lambda r, n: r.integers(0, 2**32, n)),
    (hf.Value('bool'), torch.bool, lambda r, n: r.integers(0, 2, n).astype(bool)),
    (hf.Value('float16'), torch.float32, lambda r, n: r.standard_normal(n).astype(np.float16)),
    (hf.Value('float32'), torch.float32, lambda r, n: r.standard_normal(n).astype(np.float32)),
    (hf.Value('float64'), torch.float32, lambda r, n: r.standard_normal(n)),
    (hf.ClassLabel(names=['a', 'b', 'c']), torch.int64, lambda r, n: r.integers(0, 3, n)),
    (hf.List(hf.Value('float32'), length=3), torch.float32, lambda r, n: r.standard_normal((n, 3)).astype(np.float32)),
    (hf.List(hf.Value('uint8')), torch.uint8, lambda r, n: r.integers(0, 256, (n, 4))),
    (hf.List(hf.List(hf.Value('bool')), length=2), torch.bool, lambda r, n: r.integers(0, 2, (n, 2, 5)).astype(bool)),
    (hf.Array2D((3, 4), 'uint8'), torch.uint8, lambda r, n: r.integers(0, 256, (n, 3, 4))),
    (hf.Array2D((None, 4), 'int32'), torch.int64, lambda r, n: r.integers(0, 256, (n, 2, 4))),
    (hf.Array3D((2, 3, 4), 'float32'), torch.float32, lambda r, n: r.standard_normal((n, 2, 3, 4)).astype(np.float32)),
    (hf.Array5D((1, 2, 1, 2, 3), 'int64'), torch.int64, lambda r, n: r.integers(0, 9, (n, 1, 2, 1, 2, 3)))]

def in_pieces(ds): return hf.concatenate_datasets([ds.select(range(i, min(i+7, len(ds)))) for i in range(0, len(ds), 7)])
LAYOUTS = dict(whole=lambda ds: ds, part=lambda ds: ds.select(range(3, 17)), pieces=in_pieces, chosen=lambda ds: ds.select([5, 1, 1, 9, 18]),
               shuffled=lambda ds: in_pieces(ds).shuffle(seed=1), sorted=lambda ds: ds.filter(lambda _, i: i % 2, with_indices=True))

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('feature, dtype, make', CELLS, ids=lambda o: str(o) if isinstance(o, torch.dtype) else None)
def test_numbers_of_every_kind(feature, dtype, make, layout, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 4)
    cells = make(np.random.default_rng(0), 20)
    ds = LAYOUTS[layout](dataset(x=(feature, cells.tolist()), i=(hf.Value('int64'), range(20))))
    got = m.in_memory(ds).columns['x']
    want = torch.from_numpy(cells[np.array(ds['i'])]).to(dtype)
    assert got.dtype == dtype and got.is_contiguous() and got.equal(want)

def addresses(array):
    "Where the buffers of an Arrow array begin and end"
    array = getattr(array, 'storage', array)
    found = [(o.address, o.address + o.size) for o in array.buffers() if o]
    return found

def lies_within(x, ds, name):
    spans = [span for cells in ds.data.column(name).chunks for span in addresses(cells)]
    return any(a <= x.data_ptr() and x.data_ptr() + x.nbytes <= b for a,b in spans)

@pytest.mark.parametrize('feature, dtype, make', CELLS, ids=lambda o: str(o) if isinstance(o, torch.dtype) else None)
def test_memory_is_shared_with_arrow_where_the_type_stays(feature, dtype, make):
    cells = make(np.random.default_rng(0), 20)
    ds = dataset(x=(feature, cells.tolist()))
    inner = str(feature.dtype if not isinstance(feature, hf.List) else feature.feature)
    stays = any(o in inner for o in ("uint8", "int64", "float32"))
    assert lies_within(m.in_memory(ds).columns['x'], ds, 'x') == stays
    part = ds.select(range(5, 15))
    assert lies_within(m.in_memory(part).columns['x'], ds, 'x') == stays
    assert not lies_within(m.in_memory(in_pieces(ds)).columns['x'], ds, 'x')       # several pieces have to be joined

def test_memory_is_shared_with_a_mapped_file(tmp_path):
    dataset(x=(hf.Array2D((3, 4), 'uint8'), np.arange(240).reshape(20, 3, 4).tolist())).save_to_disk(tmp_path/'ds')
    ds = hf.load_from_disk(tmp_path/'ds')
    x = m.in_memory(ds).columns['x']
    assert lies_within(x, ds, 'x') and x.flatten().tolist() == list(range(240))

def test_a_column_outlives_its_data_set():
    import gc
    x = m.in_memory(dataset(x=(hf.Value('int64'), range(100_000)))).columns['x']
    gc.collect()
    junk = [np.full(100_000, 7) for _ in range(20)]
    assert x.sum() == 100_000*99_999//2 and len(junk) == 20


# strings, and lists of any length

def test_strings():
    words = ['', 'a', 'bc', 'ü']*5
    for make in LAYOUTS.values():
        ds = make(dataset(t=(hf.Value('string'), words)))
        t = m.in_memory(ds).columns['t']
        assert len(t) == len(ds) and t[2] == ds[2]['t'] and t[:3] == ds[:3]['t'] and t[[1, 0]] == [ds[1]['t'], ds[0]['t']]
    assert list(m.DataLoaders.from_dd(pair(t=(hf.Value('string'), words), y=(hf.Value('int64'), range(20))), bs=7).valid)[0][0] == words[:7]

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('inner', [(), (2,)])
def test_ragged_rows_are_filled_up_like_pad_collate_does(layout, inner):
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 9, (k, *inner)).tolist() for k in rng.integers(0, 6, 20)]
    feature = hf.List(hf.List(hf.Value('int64'), length=2) if inner else hf.Value('int64'))
    ds = LAYOUTS[layout](dataset(x=(feature, rows)))
    column = m.in_memory(ds, pad=-1).columns['x']
    own = [torch.tensor(o).reshape(-1, *inner) for o in ds['x']]
    assert len(column) == len(ds) and all(column[i].equal(own[i]) for i in range(len(ds)))
    for idxs in ([0], [3, 1, 4], list(range(len(ds)))):
        got, want = column.index_select(0, torch.tensor(idxs)), pad_collate([own[i] for i in idxs], -1)
        assert isinstance(got, Padded) and got.x.equal(want.x) and got.lengths.equal(want.lengths)

def test_ragged_batches_by_both_roads():
    dd = pair(ids=(hf.List(hf.Value('int64')), [[1]*k for k in (2, 5, 1, 3, 0, 4)]), y=(hf.Value('int64'), range(6)))
    memory, road = (list(m.DataLoaders.from_dd(o, bs=4, pad=dict(ids=9), seed=3).train) for o in (dd, dd.with_transform(tensors)))
    for (a, ya), (b, yb) in zip(memory, road, strict=True): assert a.x.equal(b.x) and a.lengths.equal(b.lengths) and ya.equal(yb)

def tensors(batch): return dict(ids=[torch.tensor(o, dtype=torch.int64) for o in batch['ids']], y=batch['y'])

def test_ragged_sizes_in_one_repr():
    dls = m.DataLoaders.from_dd(pair(ids=(hf.List(hf.Value('int64')), [[1], [1, 2]]), t=(hf.Value('string'), ['a', 'b'])), pad=0)
    assert 'ids i64[*], t str[]; ' in repr(dls)


# more than the memory holds

def big(n=30, seed=0): return hf.DatasetDict({k: dataset(image=(hf.Image(), images(*[(9, 8)]*n)), y=(hf.Value('int64'), range(n))) for k in ('train', 'test')})

def forbid(*args, **kwargs): raise AssertionError('decoded again')

def test_a_large_column_goes_to_a_file_and_is_found_again(cache, monkeypatch, capsys):
    monkeypatch.setattr(m, '_STEP', 7)
    ds = big()['train']
    want = m.in_memory(ds)
    assert not kept(cache)
    got = m.in_memory(ds, limit=1000)
    assert got.columns['image'].equal(want.columns['image']) and got.columns['y'].equal(want.columns['y'])
    assert len(kept(cache)) == 1 and f'a column of 2.16 kB is more than the limit of 1 kB: it is kept in {kept(cache)[0]}' in capsys.readouterr().err
    monkeypatch.setattr(m, '_decode', forbid)
    assert m.in_memory(ds, limit=1000).columns['image'].equal(want.columns['image'])
    with pytest.raises(AssertionError): m.in_memory(ds, limit=10**6)               # it fits: memory it is

def test_half_of_the_free_memory_is_the_limit(cache, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 7)
    monkeypatch.setattr(m, 'free_memory', lambda: 4000)
    m.in_memory(big()['train'])
    assert len(kept(cache)) == 1
    monkeypatch.setattr(m, 'free_memory', lambda: 4400)
    m.in_memory(big()['train'].select(range(29)))
    assert len(kept(cache)) == 1

@pytest.mark.parametrize('feature, dtype, make', CELLS, ids=lambda o: str(o) if isinstance(o, torch.dtype) else None)
def test_numbers_of_every_kind_in_files(feature, dtype, make, monkeypatch, cache):
    monkeypatch.setattr(m, '_STEP', 3)
    ds = in_pieces(dataset(x=(feature, make(np.random.default_rng(0), 20).tolist())))
    want = m.in_memory(ds).columns['x']
    got = [m.in_memory(ds, limit=10).columns['x'] for _ in range(2)]
    assert all(o.dtype == dtype and o.equal(want) for o in got) and len(kept(cache)) == 1

@pytest.mark.parametrize('damage', [lambda raw: raw[:-1], lambda raw: raw + b'!', lambda raw: b'', lambda raw: b'<html>', lambda raw: raw[:40],
                                    lambda raw: bytes(len(raw))], ids=['cut', 'longer', 'empty', 'text', 'in the header', 'zeros'])
def test_a_torn_file_is_never_used(cache, monkeypatch, damage):
    monkeypatch.setattr(m, '_STEP', 7)
    ds = big()['train']
    want = m.in_memory(ds, limit=1000).columns['image']
    file, = kept(cache)
    whole = file.read_bytes()
    want = want.clone()
    file.unlink()
    file.write_bytes(damage(whole))
    assert m.in_memory(ds, limit=1000).columns['image'].equal(want)
    assert kept(cache) == [file] and file.read_bytes() == whole

def test_another_data_set_has_another_file(cache, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 7)
    ds = big()['train']
    def invert(row): return dict(image=PIL.ImageOps.invert(row['image']))
    others = [ds, ds.map(invert), ds.select(range(29)), ds.shuffle(seed=1), ds.cast_column('image', hf.Image(mode='RGB')), ds.rename_column('image', 'x')]
    for k,o in enumerate(others, 1):
        name = 'x' if 'x' in o.features else 'image'
        for _ in range(2): assert m.in_memory(o, limit=1000).columns[name].equal(m.in_memory(o).columns[name])
        assert len(kept(cache)) == k

def test_images_that_changed_on_disk_are_read_again(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(m, '_STEP', 2)
    files = [str(tmp_path/f'{i}.png') for i in range(5)]
    def write(value):
        for i,f in enumerate(files): PIL.Image.new('L', (6, 5), value+i).save(f)
    write(10)
    ds = hf.Dataset.from_dict(dict(image=files)).cast_column('image', hf.Image())
    assert m.in_memory(ds, limit=10).columns['image'].amax((1, 2, 3)).tolist() == [10, 11, 12, 13, 14]
    write(100)
    assert m.in_memory(ds, limit=10).columns['image'].amax((1, 2, 3)).tolist() == [100, 101, 102, 103, 104]

def test_nothing_half_written_is_left(cache, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 7)
    dd = big()
    decode, n = m._decode, iter(range(1000))
    def fail(*args):
        if next(n) == 20: raise KeyboardInterrupt
        return decode(*args)
    monkeypatch.setattr(m, '_decode', fail)
    with pytest.raises(KeyboardInterrupt): m.in_memory(dd['train'], limit=1000)
    assert kept(cache) == []
    sizes = images(*[(9, 8)]*20, (8, 8), (9, 8))
    with pytest.raises(ValueError, match='2 sizes'): m.in_memory(dataset(image=(hf.Image(), sizes)), limit=1000)
    assert kept(cache) == []

def test_a_killed_writer_leaves_nothing_that_is_used(cache):
    code = """if True:
        import os, sys, numpy as np, datasets as hf
        from miniai import datasets as m
        m._STEP, decode, n = 7, m._decode, iter(range(1000))
        def die(*args): return os.kill(os.getpid(), 9) if next(n) == int(sys.argv[1]) else decode(*args)
        m._decode = die
        ds = hf.Dataset.from_dict(dict(image=[np.full((9, 8), i, np.uint8) for i in range(30)]), features=hf.Features(image=hf.Image()))
        print(m.in_memory(ds, limit=1000).columns['image'].amax((1, 2, 3)).tolist())"""
    def run(die_at): return subprocess.run([sys.executable, '-c', code, str(die_at)], capture_output=True, text=True)
    assert run(20).returncode == -9
    assert [o.suffix for o in kept(cache)] == ['.tmp']
    done = run(999)
    assert done.stdout == f'{list(range(30))}\n', done.stderr
    again = run(7)                                                     # the first seven are looked at again only if the file does not count
    assert again.returncode == 0 and again.stdout == done.stdout

def test_two_at_once_write_the_same_file(cache, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 2)
    ds, found = big(60)['train'], []
    threads = [threading.Thread(target=lambda: found.append(m.in_memory(ds, limit=1000).columns['image'])) for _ in range(4)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert len(found) == 4 and all(o.equal(found[0]) for o in found) and len(kept(cache)) == 1

def test_the_file_is_synced_and_renamed(cache, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 7)
    said, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (said.append(('fsync', os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (said.append(('replace', Path(a).suffix, Path(b).suffix)), replace(a, b)))
    m.in_memory(big()['train'], limit=1000)
    assert said == [('fsync', kept(cache)[0].stat().st_size), ('replace', '.tmp', '.npy')]

def test_a_full_disk_is_told(cache, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 7)
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device.*MINIAI_CACHE'): m.in_memory(big()['train'], limit=1000)
    assert kept(cache) == []

def test_batches_from_a_file_are_those_from_memory(cache, monkeypatch):
    monkeypatch.setattr(m, '_STEP', 7)
    dd = big()
    a, b = (m.DataLoaders.from_dd(dd, bs=8, limit=limit) for limit in (10**6, 1000))
    for (xa, ya), (xb, yb) in zip(a.train, b.train, strict=True): assert xa.equal(xb) and ya.equal(yb)

def test_free_memory():
    assert 10**6 < m.free_memory() < 10**15


# augmenting, devices

def few(sample, n=100): return hf.DatasetDict({k: v.select(range(n)) for k,v in sample.items()})

def test_augment_changes_training_bytes_only(sample):
    seen = []
    def spy(batch):
        seen.append(batch['image'].dtype)
        return batch
    dd = few(sample)
    plain, noisy = (m.DataLoaders.from_dd(dd, bs=32, augment=o) for o in (None, Compose(spy, RandomCrop(4), Flip())))
    for (a, ya), (b, yb) in zip(plain.train, noisy.train, strict=True): assert not a.equal(b) and ya.equal(yb) and b.dtype == torch.float32
    assert seen == [torch.uint8]*4
    for (a, _), (b, _) in zip(plain.valid, noisy.valid, strict=True): assert a.equal(b)

@pytest.mark.parametrize('augment', [RandomCrop(4), Compose(RandomCrop(3, 'reflect'), Flip())], ids=repr)
def test_a_rows_augmentation_depends_on_seed_epoch_and_row_alone(sample, augment):
    dd = few(sample)
    plain = m.in_memory(dd['train']).columns['image']
    norm = Normalize.measure(plain)
    for bs, workers in ((32, 0), (32, 2), (17, 0), (100, 2)):
        dls = m.DataLoaders.from_dd(dd, bs=bs, augment=augment, num_workers=workers, seed=5, norm=norm)
        for epoch in range(2):
            order = dls.train.batch_sampler.sampler.order(epoch)
            got = torch.cat([x for x,_ in dls.train])
            assert got.equal(norm(augment(plain[order], Draw(5, epoch, order))))

def test_mixed_labels_from_the_bridge(sample):
    x, y = next(iter(m.DataLoaders.from_dd(few(sample), bs=32, augment=Mixup(10)).train))
    assert x.dtype == torch.float32 and y.shape == (32, 10) and y.sum(1).allclose(torch.ones(32))

def test_bytes_go_to_the_device_and_are_normalised_there(sample):
    dls = m.DataLoaders.from_dd(few(sample), bs=32, device='meta', augment=lambda b: sent.append(b['image']) or b)
    sent = []
    x, y = next(iter(dls.train))
    assert (x.device.type, x.dtype, y.device.type) == ('meta', torch.float32, 'meta')
    assert (sent[0].device.type, sent[0].dtype) == ('meta', torch.uint8)

def test_what_pytorchs_loader_cannot_do(sample):
    for kw in (dict(device='cpu'), dict(augment=Flip())):
        with pytest.raises(ValueError, match='only our loader'): m.DataLoaders.from_dd(few(sample), loader=torch_data.DataLoader, **kw)


# streams

def streams(sample, n=100): return hf.IterableDatasetDict({k: v.select(range(n)).to_iterable_dataset() for k,v in sample.items()})

@pytest.mark.parametrize('workers', [0, 2])
def test_streams(sample, workers):
    want = m.DataLoaders.from_dd(few(sample), bs=32, norm=Normalize(.3, .3))
    got = m.DataLoaders.from_dd(streams(sample), bs=32, norm=want.norm, num_workers=workers)
    for (a, ya), (b, yb) in zip(got.valid, want.valid, strict=True): assert a.equal(b) and ya.equal(yb)
    assert got.names == FASHION and 'stream' in repr(got)
    ys = [torch.cat([y for _,y in got.train]) for _ in range(2)]
    assert not ys[0].equal(ys[1]) and ys[0].sort()[0].equal(ys[1].sort()[0]) and len(ys[0]) == 100   # shuffled anew, nothing lost

def test_streams_through_pytorchs_loader(sample):
    got = list(m.DataLoaders.from_dd(streams(sample), bs=32, norm=Normalize(.3, .3), loader=torch_data.DataLoader).valid)
    want = list(m.DataLoaders.from_dd(few(sample), bs=32, norm=Normalize(.3, .3)).valid)
    for (a, ya), (b, yb) in zip(got, want, strict=True): assert a.equal(b) and ya.equal(yb)

def test_streams_without_features(sample):
    def rows():
        for i in range(10): yield dict(x=[i, i+1], y=i)
    dd = hf.IterableDatasetDict({k: hf.IterableDataset.from_generator(rows) for k in ('train', 'test')})
    dls = m.DataLoaders.from_dd(dd, bs=4)
    assert [o.shape[0] for _,o in dls.valid] == [4, 4, 2] and dls.names is None


# folders and files

def write_folders(root, sample, n=12):
    for split, name in (('train', 'train'), ('test', 'validation')):
        for i, row in enumerate(sample[split].select(range(n))):
            folder = root/name/f"class {row['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row['image'].save(folder/f'{i}.png')

def test_image_folders(sample, tmp_path):
    write_folders(tmp_path/'data', sample)
    dd = hf.load_dataset('imagefolder', data_dir=str(tmp_path/'data'), cache_dir=str(tmp_path/'hf'))
    dls = m.DataLoaders.from_dd(dd, bs=5)
    assert dls.names == sorted({f"class {o}" for o in [*sample['train'][:12]['label'], *sample['test'][:12]['label']]})
    got = {(tuple(x.flatten().tolist()), dls.names[y]) for x,y in zip(*m.in_memory(dd['validation'])[:].values(), strict=True)}
    want = {(tuple(np.asarray(o['image']).flatten().tolist()), f"class {o['label']}") for o in sample['test'].select(range(12))}
    assert got == want and [len(x) for x,_ in dls.valid] == [5, 5, 2]

def test_csv(tmp_path):
    for split, n in (('train', 20), ('test', 6)):
        (tmp_path/f'{split}.csv').write_text('a,b,t\n' + ''.join(f'{i},{i/4},w{i}\n' for i in range(n)))
    dd = hf.load_dataset('csv', data_files={o: str(tmp_path/f'{o}.csv') for o in ('train', 'test')}, cache_dir=str(tmp_path/'hf'))
    a, b, t = next(iter(m.DataLoaders.from_dd(dd, bs=6).valid))
    assert a.tolist() == list(range(6)) and b.tolist() == [i/4 for i in range(6)] and b.dtype == torch.float32 and t == [f'w{i}' for i in range(6)]

def test_parquet(sample, tmp_path):
    dd = hf.load_dataset('parquet', data_files={o: str(SAMPLE/f'{o}.parquet') for o in ('train', 'test')}, cache_dir=str(tmp_path/'hf'))
    a, b = (m.DataLoaders.from_dd(o, bs=500) for o in (dd, sample))
    for (xa, ya), (xb, yb) in zip(a.train, b.train, strict=True): assert xa.equal(xb) and ya.equal(yb)


# to be looked at

def test_show_batch_of_images(sample):
    dls = m.DataLoaders.from_dd(few(sample), bs=32)
    x, y = dls.train.ds.columns.values()
    order = dls.train.batch_sampler.sampler.order(0)[:5]
    axs = dls.show_batch(5)
    shown = [ax for ax in axs.flat if ax.images]
    assert [ax.get_title() for ax in shown] == [FASHION[i] for i in y[order]]
    for ax, i in zip(shown, order, strict=True): np.testing.assert_allclose(ax.images[0].get_array(), x[i,0]/255, atol=1e-5)

def test_looking_does_not_count_as_an_epoch(sample):
    looked, not_looked = (m.DataLoaders.from_dd(few(sample), bs=32) for _ in range(2))
    looked.show_batch()
    for _ in range(2):
        for (a, _), (b, _) in zip(looked.train, not_looked.train, strict=True): assert a.equal(b)
        looked.show_batch(2)

def test_show_batch_of_mixed_labels(sample):
    dls = m.DataLoaders.from_dd(few(sample), bs=32, augment=Mixup(10))
    _, y = next(iter(m.DataLoaders.from_dd(few(sample), bs=32, augment=Mixup(10)).train))
    titles = [ax.get_title() for ax in dls.show_batch(4).flat if ax.images]
    assert titles == [f'{FASHION[o.argmax()]} {o.max():.0%}' for o in y[:4]]

def texts(ax): return [[ax.tables[0].get_celld()[i, j].get_text().get_text() for j in range(4)] for i in range(4)]

@pytest.mark.parametrize('as_tuple', [True, False])
def test_show_batch_of_a_table(as_tuple):
    dd = pair(t=(hf.Value('string'), ['one', 'two', 'x'*100]), f=(hf.Value('float32'), [.25, 1, 1e6]),
              y=(hf.ClassLabel(names=['no', 'yes']), [1, 0, 1]), v=(hf.List(hf.Value('int64')), [[1, 2], list(range(9)), []]))
    dls = m.DataLoaders(None, None)
    dls = m.DataLoaders.from_dd(dd, pad=0, as_tuple=as_tuple)
    dls.train = dls.valid                              # in order
    assert texts(dls.show_batch()) == [['t', 'f', 'y', 'v'], ['one', '0.25', 'yes', '1 2'], ['two', '1', 'no', '0 1 2 3 4 5 ...'],
                                       ['[...]', '1e+06', 'yes', '']]

def test_show_batch_of_hand_made_loaders():
    dl = DataLoader(m.Table(dict(a=torch.arange(3), b=torch.zeros(3, 2))), 2)
    ax = m.DataLoaders(dl, dl).show_batch()
    assert [ax.tables[0].get_celld()[i, j].get_text().get_text() for i in range(3) for j in range(2)] == ['a', 'b', '0', '0 0', '1', '0 0']

def test_repr(sample):
    assert repr(m.DataLoaders.from_dd(sample)).split('\n')[1] == (
        '  train: 63 batches of 4,000 rows: image u8[1,28,28], label i64[] of 10 classes; 3.17 MB')
    own = repr(m.DataLoaders.from_dd(few(sample).with_transform(scale)))
    assert '2 batches of 100 rows, read row by row in every epoch: a hundred times' in own


# the cache folder

def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv('MINIAI_CACHE', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert m.cache_folder() == tmp_path/'.cache'/'miniai'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert m.cache_folder() == tmp_path/'xdg'/'miniai'
    monkeypatch.setenv('MINIAI_CACHE', '~/mine')
    assert m.cache_folder() == tmp_path/'mine'


# the module

def test_import_is_cheap():
    code = "import sys, miniai.datasets; print({'datasets', 'PIL', 'pyarrow', 'huggingface_hub', 'pandas', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'set()\n'
