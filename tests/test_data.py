"Order, batches and workers: properties for any size, and PyTorch's loader side by side."
import gc, os, signal, time
from collections import namedtuple
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from miniai.data import BatchSampler, DataLoader, Dataset, Sampler, collate
from torch.utils import data as torch_data

XY = namedtuple('XY', 'x y')

def rows(n): return Dataset(torch.arange(n*2.).view(n, 2), torch.arange(n))

class Items:
    "A data set that gives one row at a time; some rows are special"
    def __init__(self, n, bad=None, kill=None): self.n, self.bad, self.kill = n, bad, kill
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i == self.bad: raise ValueError(f'row {i} cannot be read')
        if i == self.kill: os.kill(os.getpid(), signal.SIGKILL)
        return dict(x=torch.full((2,), i), y=i)

sizes = st.integers(1, 200)

@given(sizes, st.integers(0, 10**6), st.integers(0, 50))
def test_every_row_once_and_any_epoch_by_itself(n, seed, epoch):
    s = Sampler(n, shuffle=True, seed=seed)
    assert sorted(s.order(epoch).tolist()) == list(range(n))
    other = Sampler(n, shuffle=True, seed=seed)
    for _ in range(min(epoch, 3)): list(other)
    assert torch.equal(other.order(epoch), s.order(epoch))

@given(sizes, st.integers(1, 70), st.booleans())
def test_batches_are_the_order_cut_in_pieces(n, bs, shuffle):
    b = BatchSampler(Sampler(n, shuffle), bs)
    got = list(b)
    assert len(got) == len(b) and all(len(g) == bs for g in got[:-1])
    assert torch.equal(torch.cat(got), Sampler(n, shuffle).order(0))

@given(sizes, st.integers(1, 70))
def test_drop_last_leaves_only_full_batches(n, bs):
    if bs > n: return
    b = BatchSampler(Sampler(n), bs, drop_last=True)
    assert [len(g) for g in b] == [bs]*len(b) and len(b) == n//bs

def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(Sampler(50, True, seed).order(epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100

def test_a_loop_by_hand_gets_a_new_order_each_time_and_set_epoch_goes_back():
    dl = DataLoader(rows(40), 16, shuffle=True)
    first, second = ([yb for _,yb in dl] for _ in range(2))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    dl.set_epoch(0)
    assert torch.equal(torch.cat([yb for _,yb in dl]), torch.cat(first))

@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(1, 70), st.booleans())
def test_batches_equal_pytorchs(n, bs, drop_last):
    if drop_last and bs > n: return
    ours, theirs = DataLoader(rows(n), bs, drop_last=drop_last), torch_data.DataLoader(rows(n), bs, drop_last=drop_last)
    assert len(ours) == len(theirs)
    for a,b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, tuple(b), rtol=0, atol=0)

@pytest.mark.parametrize('items', [
    [torch.ones(2), torch.zeros(2)], [1, 2], [1., 2.], [True, False], [np.ones((2, 3)), np.zeros((2, 3))], [np.float32(1), np.float32(2)],
    [(torch.ones(2), 1), (torch.zeros(2), 2)], [dict(a=1, b=(2., 'x')), dict(a=3, b=(4., 'y'))], [XY(1, torch.ones(1)), XY(2, torch.ones(1))],
    [[1, 2], [3, 4]], ['a', 'b']], ids=str)
def test_collate_agrees_with_pytorchs(items):
    ours, theirs = collate(items), torch_data.default_collate(items)
    def flat(b):
        if isinstance(b, dict): return [x for k in b for x in flat(b[k])]
        if isinstance(b, (list, tuple)): return [x for o in b for x in flat(o)]
        return [b]
    for a,b in zip(flat(ours), flat(theirs), strict=True):
        if not isinstance(a, torch.Tensor): assert a == b
        else: torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=0)
    assert type(ours) is type(theirs) or isinstance(items[0], (tuple, list))

def test_collate_keeps_pytorchs_dtypes_for_whole_numbers_and_arrays():
    assert collate([1, 2]).dtype == torch.int64 and collate([np.float64(1)]).dtype == torch.float64 and collate([True]).dtype == torch.bool

@pytest.mark.parametrize('workers', [1, 2, 4])
def test_workers_change_nothing(workers):
    for ds in (rows(50), Items(50)):
        alone, helped = (DataLoader(ds, 8, shuffle=True, num_workers=w) for w in (0, workers))
        for _ in range(2):
            for a,b in zip(alone, helped, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=0)

def children(): return [p for p in torch.multiprocessing.active_children() if p.is_alive()]

def test_an_abandoned_iterator_leaves_no_process():
    it = iter(DataLoader(Items(1000), 4, num_workers=2))
    next(it)
    assert len(children()) == 2
    del it
    gc.collect()
    assert not children()

def test_an_error_in_a_worker_arrives_with_its_traceback():
    with pytest.raises(ValueError, match='row 5 cannot be read') as e: list(DataLoader(Items(20, bad=5), 4, num_workers=2))
    assert '__getitem__' in str(e.value.__cause__) and not children()

def test_a_killed_worker_is_an_error_not_a_wait():
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match='a worker process died'): list(DataLoader(Items(100, kill=50), 4, num_workers=2))
    assert time.perf_counter() - started < 5 and not children()

def test_no_more_than_asked_is_fetched_ahead():
    asked = []
    class Counting(BatchSampler):
        def __iter__(self):
            for b in super().__iter__(): asked.append(b); yield b
    it = iter(DataLoader(rows(400), batch_sampler=Counting(Sampler(400), 4), num_workers=2, prefetch=2))
    next(it)
    assert len(asked) == 5

def test_a_data_set_is_asked_as_few_times_as_it_allows():
    calls = []
    class Many(Items):
        def __getitems__(self, idxs): calls.append(len(idxs)); return [self[i] for i in idxs]
    list(DataLoader(Many(10), 4))
    assert calls == [4, 4, 2]
    got = list(DataLoader(rows(10), 4, collate_fn=lambda items: items))       # a collate_fn of one's own sees items
    assert [len(b) for b in got] == [4, 4, 2] and got[0][0][1] == 0

def test_our_samplers_drive_pytorchs_loader():
    ours = DataLoader(rows(50), 8, shuffle=True, seed=7)
    batches = BatchSampler(Sampler(50, True, 7), 8)
    for theirs in (torch_data.DataLoader(rows(50), batch_sampler=[b.tolist() for b in batches]),
                   torch_data.DataLoader(rows(50), sampler=BatchSampler(Sampler(50, True, 7), 8), batch_size=None)):
        ours.set_epoch(0)
        for a,b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, tuple(b), rtol=0, atol=0)

def test_pytorchs_samplers_drive_ours():
    weights = torch_data.WeightedRandomSampler([0., 1., 0.], 9)
    assert [yb.tolist() for _,yb in DataLoader(rows(3), 4, sampler=weights)] == [[1]*4, [1]*4, [1]]

def test_transform_sees_the_finished_batch():
    assert [b for b in DataLoader(rows(5), 4, transform=lambda b: len(b[0]))] == [4, 1]

def test_dataset_by_name_and_by_position():
    ds = Dataset(x=torch.arange(6).view(3, 2), y=torch.arange(3))
    assert ds[1]['y'] == 1 and ds[1:]['x'].shape == (2, 2) and ds[torch.tensor([2, 0])]['y'].tolist() == [2, 0]
    assert repr(ds) == 'Dataset(n=3, x: i64[2], y: i64[])'

@pytest.mark.parametrize('make, said', [
    (lambda: Dataset(torch.ones(3), torch.ones(4)), r'columns differ in length: \{0: 3, 1: 4\}'),
    (lambda: DataLoader(Dataset(torch.ones(0))), 'the data set is empty'),
    (lambda: DataLoader(rows(3), 0), 'at least 1 row, bs is 0'),
    (lambda: DataLoader(rows(3), 4, drop_last=True), '3 rows give no batch of 4'),
    (lambda: DataLoader(rows(3), num_workers=-1), 'from 0 up'),
    (lambda: DataLoader(rows(3), shuffle=True, sampler=Sampler(3)), 'a sampler has its own order; leave shuffle out'),
    (lambda: DataLoader(rows(3), drop_last=True, batch_sampler=BatchSampler(Sampler(3), 2)), 'leave shuffle, sampler and drop_last out'),
    (lambda: list(DataLoader([torch.ones(2), torch.ones(3)])), r'different shapes cannot be stacked: \[\(2,\), \(3,\)\]'),
    (lambda: Sampler(3, True, seed=-1).order(0), 'from 0 up'),
])
def test_errors_show_the_next_move(make, said):
    with pytest.raises(ValueError, match=said): make()
