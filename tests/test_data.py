"Rows and batches: data sets made of data sets, splits, collation, fetching; PyTorch's side by side."
import warnings
from collections import OrderedDict, UserDict, namedtuple
import numpy as np, PIL.Image, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from miniai.core import generator, to_device
from miniai.data import ConcatDataset, Dataset, MapDataset, Padded, Subset, collate, each, fetch, join, pad_collate, split, stratified, whole
from torch.utils import data as torch_data

XY = namedtuple('XY', 'x y')

def rows(n, start=0): return Dataset(torch.arange(n*2.).view(n, 2) + start, torch.arange(n) + start)
def same(a, b): torch.testing.assert_close(a, b, rtol=0, atol=0)

class OneByOne:
    "Rows, one at a time"
    def __init__(self, n, start=0): self.n, self.start = n, start
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return torch.full((2,), i + self.start), i + self.start

class Lists(OneByOne):
    "Rows, many at a time, as a list"
    def __init__(self, *args): super().__init__(*args); self.asked = []
    def __getitems__(self, idxs): self.asked.append(list(idxs)); return [self[i] for i in idxs]

# data sets

def test_dataset_by_name_and_by_position():
    ds = Dataset(x=torch.arange(6).view(3, 2), y=torch.arange(3))
    assert ds[1]['y'] == 1 and ds[1:]['x'].shape == (2, 2) and ds[torch.tensor([2, 0])]['y'].tolist() == [2, 0]
    assert repr(ds) == 'Dataset(n=3, x: i64[2], y: i64[])'

@settings(deadline=None)
@given(st.data(), st.integers(1, 40))
def test_a_subset_is_these_rows_in_this_order(data, n):
    idxs = data.draw(st.lists(st.integers(0, n-1), min_size=1, max_size=50))
    at = torch.tensor(data.draw(st.lists(st.integers(0, len(idxs)-1), min_size=1)))
    want = rows(n)[torch.tensor(idxs)[at]]
    for ds in (rows(n), torch_data.TensorDataset(*rows(n).columns)):
        sub = Subset(ds, idxs)
        assert len(sub) == len(idxs)
        same(fetch(sub, None, at), want)
        same(collate(list(each(sub, at.tolist()))), want)
        same(sub[0][1], rows(n)[idxs[0]][1])
    same(fetch(Subset(OneByOne(n), idxs), None, at)[1], want[1])

@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_concatenated_rows_gathered_listed_or_one_by_one_are_pytorchs(sizes, data):
    starts = [100*k for k in range(len(sizes))]
    idxs = data.draw(st.lists(st.integers(0, sum(sizes)-1), min_size=1, max_size=60))
    theirs = torch_data.ConcatDataset([OneByOne(n, s) for n,s in zip(sizes, starts, strict=True)])
    want = torch.tensor([theirs[i][1] for i in idxs])
    for make in (rows, OneByOne, Lists):
        ours = ConcatDataset(*(make(n, s) for n,s in zip(sizes, starts, strict=True)))
        assert len(ours) == len(theirs) and hasattr(ours, 'gather') == (make is rows)
        same(fetch(ours, None, torch.tensor(idxs))[1], want)
        assert [int(ours[i][1]) for i in idxs] == want.tolist() and int(ours[-1][1]) == theirs[-1][1]

def test_lists_are_asked_once_a_part():
    a, b = Lists(5), Lists(5, 10)
    assert [y for _,y in ConcatDataset(a, b).each([7, 1, 8, 0])] == [12, 1, 13, 0]
    assert a.asked == [[1, 0]] and b.asked == [[2, 3]]
    fetch(MapDataset(Subset(a, [4, 3, 2]), lambda row: row), None, torch.tensor([0, 2]))
    assert a.asked[-1] == [4, 2]

def test_a_mapped_data_set_is_lazy_and_works_in_pytorchs_loader():
    called = []
    ds = MapDataset(Lists(6), lambda row: called.append(row[1]) or row[1]*10)
    it = each(ds, [3, 5])
    assert not called and next(it) == 30 and called == [3]
    assert [b.tolist() for b in torch_data.DataLoader(ds, 4)] == [[0, 10, 20, 30], [40, 50]]
    assert list(MapDataset(iter([1, 2]), str)) == ['1', '2'] and len(ds) == 6 and ds[2] == 20

def test_nested_columns_are_joined():
    a, b = dict(x=(torch.ones(2, 3), torch.zeros(2))), dict(x=(torch.ones(1, 3), torch.ones(1)))
    same(join([a, b])['x'][1], torch.tensor([0., 0, 1]))
    named = ConcatDataset(Dataset(x=torch.arange(3)), Dataset(x=torch.arange(3)+10))
    assert named.gather(torch.tensor([5, 0, 3]))['x'].tolist() == [12, 0, 10]

@pytest.mark.parametrize('ds', [rows(9), torch_data.TensorDataset(*rows(9).columns), OneByOne(9), Lists(9), list(OneByOne(9)),
                                torch_data.Subset(OneByOne(9), range(9))], ids=lambda o: type(o).__name__)
def test_every_kind_of_data_set_gives_the_same_batch(ds):
    idxs = torch.tensor([3, 1, 4, 1])
    assert fetch(ds, None, idxs)[1].tolist() == fetch(ds, None, [3, 1, 4, 1])[1].tolist() == [3, 1, 4, 1]
    assert [int(y) for _,y in fetch(ds, list, idxs)] == [3, 1, 4, 1]                  # a collate_fn of one's own sees rows

def test_tensors_and_arrays_are_data_sets(tmp_path):
    x = np.lib.format.open_memmap(tmp_path/'x.npy', 'w+', np.float32, (5, 2))
    x[:] = np.arange(10).reshape(5, 2)
    for ds in (x, torch.from_numpy(np.array(x))): same(fetch(ds, None, torch.tensor([4, 0])), torch.tensor([[8., 9], [0, 1]]))
    assert whole([1]) is None and whole('text') is None

# split

@given(st.integers(1, 300), st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_fractions_are_shared_like_pytorchs_to_a_row_and_nothing_is_lost(n, parts, seed):
    sizes = [p/sum(parts) for p in parts]
    assume(sum(sizes) <= 1)                           # PyTorch refuses a rounding error above 1
    ours = split(range(n), sizes, seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')           # PyTorch warns of empty parts
        theirs = torch_data.random_split(range(n), sizes)
    assert sorted(i for p in ours for i in p.rows.tolist()) == list(range(n))
    assert all(abs(len(a) - n*s) < 1 and abs(len(a) - len(b)) <= 1 for a,b,s in zip(ours, theirs, sizes, strict=True))
    again = split(range(n), [len(p) for p in ours], seed)
    assert all(torch.equal(a.rows, b.rows) for a,b in zip(ours, again, strict=True))

@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 99), st.floats(.1, .9))
def test_every_part_has_its_share_of_every_class(counts, seed, cut):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)) * 7 - 3
    labels = labels[torch.randperm(len(labels), generator=generator(seed, 1))]
    for part in split(range(len(labels)), (cut, 1-cut), seed, stratify=labels):
        for k,c in enumerate(counts):
            assert abs((labels[part.rows] == 7*k-3).sum().item() - c*len(part)/len(labels)) <= 2
    a, b = (stratified(labels, generator(s)) for s in (seed, seed+1))
    assert torch.equal(a.sort().values, torch.arange(len(labels))) and (len(a) < 9 or not torch.equal(a, b))

def test_classes_of_one_row_go_to_any_part():
    first = [split(range(10), (5, 5), s, stratify=[0]*9 + [1])[0].rows for s in range(60)]
    assert 15 < sum(9 in f.tolist() for f in first) < 45

# collate

ITEMS = [[torch.ones(2), torch.zeros(2)], [1, 2], [1., 2.], [True, False], [np.ones((2, 3)), np.zeros((2, 3))],
    [np.float32(1), np.float32(2)], [np.int16([1]), np.int16([2])], [(torch.ones(2), 1), (torch.zeros(2), 2)],
    [dict(a=1, b=(2., 'x')), dict(a=3, b=(4., 'y'))], [OrderedDict(a=1), OrderedDict(a=2)], [XY(1, torch.ones(1)), XY(2, torch.ones(1))],
    [[1, 2], [3, 4]], ['a', 'b'], [b'a', b'b'], [{'a': {'b': [torch.ones(1), 2]}}]*3]

@pytest.mark.parametrize('items', ITEMS, ids=str)
def test_collate_agrees_with_pytorchs(items):
    ours, theirs = collate(items), torch_data.default_collate(items)
    def flat(b):
        if isinstance(b, dict): return [x for k in b for x in flat(b[k])]
        if isinstance(b, (list, tuple)): return [x for o in b for x in flat(o)]
        return [b]
    for a,b in zip(flat(ours), flat(theirs), strict=True):
        if not isinstance(a, torch.Tensor): assert a == b
        elif isinstance(items[0], float): same(a.double(), b)               # numbers of Python are float32, as everywhere in PyTorch but there
        else: same(a.to(b.dtype), b)
    assert type(ours) is type(theirs) or isinstance(items[0], (tuple, list, dict))
    if isinstance(items[0], XY): assert type(ours) is XY

def test_collate_keeps_pytorchs_dtypes_for_whole_numbers_and_arrays():
    assert collate([1, 2]).dtype == torch.int64 and collate([np.float64(1)]).dtype == torch.float64 and collate([True]).dtype == torch.bool
    assert collate([np.uint8([1])]).dtype == torch.uint8 and collate([np.bool_(True)]).dtype == torch.bool
    assert collate([None, None]) == [None, None] and collate([1j]).dtype == torch.complex64 and collate([UserDict(a=1)])['a'].tolist() == [1]

@pytest.mark.parametrize('mode, c', [('L', 1), ('LA', 2), ('RGB', 3), ('RGBA', 4)])
def test_images_become_bytes(mode, c):
    x = torch.randint(0, 256, (5, 4, 3, c), dtype=torch.uint8, generator=generator(0))
    ims = [PIL.Image.fromarray(o.squeeze(-1).numpy(), mode) for o in x]
    batch = collate([dict(im=im, y=k) for k,im in enumerate(ims)])['im']
    assert batch.is_contiguous() and batch.dtype == torch.uint8
    same(batch, x.movedim(-1, 1))

@pytest.mark.parametrize('items, error, said', [
    ([torch.ones(2), torch.ones(3)], ValueError, r'different shapes cannot be stacked: \[\(2,\), \(3,\)\].*pad_collate'),
    ([torch.ones(2), None], TypeError, 'a batch of tensors has None'),
    ([(1, 2), (1,)], ValueError, 'row 1 of the batch is a tuple of 1, row 0 is a tuple of 2'),
    ([dict(a=1), dict(a=1, b=2)], ValueError, r"row 1 of the batch is a dictionary of \['a', 'b'\]"),
    ([(1,), [1]], ValueError, 'row 1 of the batch is a list of 1'),
    ([dict(a=1), 3], ValueError, 'row 1 of the batch is a int'),
    ([PIL.Image.new('RGB', (2, 3)), PIL.Image.new('RGB', (3, 3))], ValueError, r'\(3, 3, 2\), \(3, 3, 3\)'),
    ([PIL.Image.new('L', (2, 2)), PIL.Image.new('RGB', (2, 2))], ValueError, r'\(1, 2, 2\), \(3, 2, 2\)'),
    ([PIL.Image.new('P', (2, 2))], TypeError, 'mode P has no bytes of colour'),
    ([PIL.Image.new('I;16', (2, 2))], TypeError, 'mode I;16 has no bytes of colour')])
def test_collate_says_what_does_not_fit(items, error, said):
    with pytest.raises(error, match=said): collate(items)

# padding

@given(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(max), st.integers(1, 5), st.booleans())
def test_padding_loses_nothing_and_agrees_with_pytorchs(lengths, multiple, deep):
    seqs = [torch.rand(k, *[3]*deep, generator=generator(k)) for k in lengths]
    got = pad_collate(seqs, -1., multiple)
    assert got.lengths.tolist() == lengths and got.x.shape[1] % multiple == 0 and got.x.shape[1] - max(lengths) < multiple
    same(got.x[:, :max(lengths)], torch.nn.utils.rnn.pad_sequence(seqs, True, -1.))
    same(got.x[got.mask], torch.cat(seqs))
    assert (got.x[~got.mask] == -1).all()

def test_padding_by_column():
    items = [dict(ids=[1]*k, target=np.full(k, 2), label=k, name='x') for k in (2, 3)]
    every, some = pad_collate(items), pad_collate(items, dict(ids=0, target=-100))
    assert every['ids'].x.tolist() == [[1, 1, 0], [1, 1, 1]] and every['label'].tolist() == [2, 3] and every['name'] == ['x', 'x']
    assert some['target'].x.tolist() == [[2, 2, -100], [2, 2, 2]] and type(some['ids']) is Padded
    pair = pad_collate([(torch.ones(2), 1), (torch.ones(1), 2)], {0: 9})
    assert pair[0].x.tolist() == [[1, 1], [1, 9]] and type(pair) is tuple
    assert to_device(every, 'meta')['ids'].mask.device.type == 'meta'
    xy = pad_collate([XY(torch.ones(1), torch.ones(2)), XY(torch.ones(2), torch.ones(2))])
    assert type(xy) is XY and xy.y.lengths.tolist() == [2, 2]              # padded whether or not this batch needs it

@pytest.mark.parametrize('make, error, said', [
    (lambda: Dataset(torch.ones(3), torch.ones(4)), ValueError, r'columns differ in length: \{0: 3, 1: 4\}'),
    (lambda: Dataset(), TypeError, 'by position for tuples, or by name'),
    (lambda: Subset(rows(3), [0, -1]), IndexError, 'row -1 of a data set of 3 rows; rows go from 0 to 2'),
    (lambda: ConcatDataset(), TypeError, 'one or more'),
    (lambda: ConcatDataset(rows(3))[3], IndexError, 'row 3 of 3 rows'),
    (lambda: ConcatDataset(rows(3)).gather(torch.tensor([0, 5])), IndexError, 'row 5 of 3 rows'),
    (lambda: split(range(9), (.5, .6)), ValueError, 'add up to 1.1; they should be'),
    (lambda: split(range(9), (3, 3)), ValueError, 'add up to 6; they should be counts that add up to 9'),
    (lambda: split(range(9), (5, 4), stratify=[1, 2]), ValueError, '2 labels for 9 rows'),
    (lambda: pad_collate([torch.ones(2, 3), torch.ones(1, 2)]), ValueError, r'first dimension only; the others are \[\(2,\), \(3,\)\]'),
    (lambda: pad_collate([dict(a=[1])], dict(b=0)), ValueError, r"no column 'b' to pad in a dictionary of \['a'\]"),
])
def test_errors_show_the_next_move(make, error, said):
    with pytest.raises(error, match=said): make()

@settings(max_examples=30)
@given(st.integers(2, 50), st.integers(0, 5))
def test_wrappers_can_be_stacked(n, seed):
    ds = MapDataset(Subset(ConcatDataset(*split(rows(n), (.5, .5), seed)), range(n)), lambda row: dict(y=row[1]))
    assert fetch(ds, None, torch.arange(n))['y'].sort().values.tolist() == list(range(n))
