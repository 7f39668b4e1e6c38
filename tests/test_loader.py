"The loader: the same batches for any number of workers and from any position; PyTorch's loader side by side."
import copy, gc, json, multiprocessing as mp, os, random, signal, sys, time, warnings
from itertools import islice
import datasets as hf, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import shared_memory
from miniai.core import batch_size
from miniai.data import ConcatDataset, Dataset, MapDataset, Subset, pad_collate
from miniai.loader import DataLoader, Stream, is_stream
from miniai.sampler import BatchSampler, Bootstrap, BucketSampler, Sampler, Shard, StratifiedSampler, WeightedSampler
from torch.utils import data as torch_data

def rows(n): return Dataset(torch.arange(n*2.).view(n, 2), torch.arange(n))
def same(a, b): torch.testing.assert_close(a, b, rtol=0, atol=0)
def all_same(a, b):
    assert len(a) == len(b)
    for u,v in zip(a, b, strict=True): same(u, v)
def children(): return [p for p in mp.active_children() if p.is_alive()]
def files(): return set(os.listdir('/proc/self/fd')) if sys.platform == 'linux' else set()

@pytest.fixture(autouse=True)
def nothing_is_left():
    before = files()
    yield
    def left(): return children(), files() - before
    if any(left()): gc.collect()
    assert not any(left()), left()

class Items:
    "One row at a time; some rows are special"
    def __init__(self, n, bad=None, kill=None): self.n, self.bad, self.kill = n, bad, kill
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i == self.bad: raise ValueError(f'row {i} cannot be read')
        if i == self.kill: os.kill(os.getpid(), signal.SIGKILL)
        return dict(x=torch.full((2,), i), y=i)

class Dice(Items):
    "Rows that draw from all three generators"
    def __getitem__(self, i): return dict(y=i, a=random.random(), b=np.random.rand(2), c=torch.randn(3))  # noqa: NPY002

class Lists(Dice):
    def __getitems__(self, idxs): return [self[i] for i in idxs]

def in_epoch(dl, epoch=0): dl.set_epoch(epoch); return list(dl)

# every row once

@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 9))
def test_every_row_once_an_epoch(n, bs, shuffle, one_by_one, epoch):
    ds = Items(n) if one_by_one else Dataset(y=torch.arange(n))
    dl = DataLoader(ds, bs, shuffle)
    ys = [b['y'] for b in in_epoch(dl, epoch)]
    assert len(ys) == len(dl) and torch.equal(torch.cat(ys).sort().values, torch.arange(n)) and dl.epoch == epoch+1
    if n > 20 and shuffle: assert not torch.equal(torch.cat(ys), torch.cat([b['y'] for b in dl]))

@settings(max_examples=12, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_every_row_once_over_ranks_and_workers(n, bs, workers, world):
    world = min(world, n)
    shards = [DataLoader(Items(n), bs, sampler=Shard(Sampler(n, True), r, world), num_workers=workers, context='fork') for r in range(world)]
    assert sorted(i for dl in shards for b in dl for i in b['y'].tolist()) == list(range(n))

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.booleans())
def test_batches_equal_pytorchs(n, bs, drop_last):
    if drop_last and bs > n: return
    ours, theirs = DataLoader(rows(n), bs, drop_last=drop_last), torch_data.DataLoader(rows(n), bs, drop_last=drop_last)
    assert len(ours) == len(theirs)
    for a,b in zip(ours, theirs, strict=True): same(a, tuple(b))

@pytest.mark.parametrize('ds', [torch_data.TensorDataset(torch.rand(20, 3), torch.arange(20)), torch.rand(20, 2), np.random.default_rng(0).random((20, 2)),
    list(range(20)), [dict(a=i, b='x'*i) for i in range(20)], Subset(rows(30), range(5, 25)), ConcatDataset(rows(9), rows(11)), range(20), 'abcdefghijklmnopqrst',
    torch_data.Subset(torch_data.TensorDataset(torch.rand(30)), range(20)), torch_data.ConcatDataset([Items(9), Items(11)]), torch_data.StackDataset(list(range(20)), torch.rand(20))],
    ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('workers', [0, 2])
def test_every_kind_of_data_set_gives_pytorchs_batches(ds, workers):
    ours = list(DataLoader(ds, 6, num_workers=workers, context='fork'))
    theirs = list(torch_data.DataLoader(ds, 6))
    assert len(ours) == len(theirs) == 4
    for a,b in zip(ours, theirs, strict=True):
        if isinstance(a, dict): a,b = tuple(a.values()), tuple(b.values())
        for u,v in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
            if isinstance(u, torch.Tensor): same(u, v)
            else: assert u == v

def test_a_data_set_is_asked_as_few_times_as_it_allows():
    calls = []
    class Many(Items):
        def __getitems__(self, idxs): calls.append(idxs); return [self[i] for i in idxs]
    list(DataLoader(Many(10), 4))
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    got = list(DataLoader(rows(10), 4, collate_fn=lambda items: items))       # a collate_fn of one's own sees items
    assert [len(b) for b in got] == [4, 4, 2] and got[0][0][1] == 0

# the same for any number of workers

@pytest.mark.parametrize('make', [lambda: rows(50), lambda: Items(50), lambda: Dice(50), lambda: Lists(50), lambda: MapDataset(Subset(Dice(60), range(50)), dict)])
@pytest.mark.parametrize('batches', [dict(bs=8, shuffle=True), dict(bs=7, drop_last=True), dict(bs=64), dict(bs=8, sampler=WeightedSampler(torch.arange(50.), seed=1))], ids=str)
def test_workers_change_nothing(make, batches):
    alone = DataLoader(make(), **batches)
    want = [in_epoch(alone, e) for e in range(2)]
    for workers in (1, 2, 4):
        dl = DataLoader(make(), **batches, num_workers=workers, context='fork', persistent=workers == 2)
        for e in range(2): all_same(in_epoch(dl, e), want[e])
    if type(make()) in (Dataset, Items): all_same(in_epoch(DataLoader(make(), **batches, num_workers=3, context='thread')), want[0])

def test_a_rows_dice_depend_on_seed_epoch_and_row_only():
    def drawn(epoch=0, **kw): return {int(y): (a, b, c) for batch in in_epoch(DataLoader(Dice(40), **kw), epoch)
                                      for y,a,b,c in zip(batch['y'], batch['a'], batch['b'], batch['c'], strict=True)}
    one, other = drawn(bs=8, shuffle=True), drawn(bs=5, sampler=[7, 3, 39])
    for k,v in other.items(): all_same(v, one[k])
    assert len({float(v[0]) for v in one.values()}) == len({float(v[2][0]) for v in one.values()}) == 40
    for different in (drawn(1, bs=8), drawn(bs=8, seed=1)): assert not any(float(different[k][0]) == float(one[k][0]) for k in range(40))

def test_the_main_process_keeps_its_own_chance():
    torch.manual_seed(1); random.seed(1); np.random.seed(1)  # noqa: NPY002
    want = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1); random.seed(1); np.random.seed(1)  # noqa: NPY002
    list(DataLoader(Dice(20), 4))
    with pytest.raises(ValueError, match='row 5 cannot'): list(DataLoader(Items(20, bad=5), 4))
    got = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(got[0], want[0]) and got[1:] == want[1:]

def test_rows_need_not_be_seeded():
    torch.manual_seed(1); a = torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(next(iter(DataLoader(Dice(4), 1, seed_rows=False)))['c'][0], a)

def test_a_random_collate_fn_is_the_same_too():
    def jitter(items): return torch.tensor([i['y'] for i in items]) + torch.rand(())
    all_same(*(list(DataLoader(Items(20), 4, collate_fn=jitter, num_workers=w, context='fork')) for w in (0, 2)))

# processes

def test_an_abandoned_iterator_leaves_no_process():
    for persistent in (False, True):
        dl = DataLoader(Items(1000), 4, num_workers=2, context='fork', persistent=persistent)
        it = iter(dl)
        next(it)
        assert len(children()) == 2
        del it
        gc.collect()
        assert len(children()) == 2*persistent
        del dl
        gc.collect()
        assert not children()

def test_persistent_workers_are_kept_and_closed():
    with_pid = MapDataset(Items(8), lambda row: os.getpid())
    dl = DataLoader(with_pid, 1, num_workers=2, context='fork', persistent=True)
    first, second = ({int(b) for b in dl} for _ in range(2))
    assert first <= second | first and len(first | second) == 2 and os.getpid() not in first
    assert len(children()) == 2 and copy.deepcopy(dl)._pool is None
    dl.close()
    assert not children() and len(list(dl)) == 8
    fresh = DataLoader(with_pid, 1, num_workers=2, context='fork')
    assert not {int(b) for b in fresh} & {int(b) for b in fresh}

def test_two_iterators_at_once():
    for persistent in (False, True):
        dl = DataLoader(Items(30), 4, shuffle=True, num_workers=2, context='fork', persistent=persistent)
        pairs = list(zip(dl, dl, strict=True))
        all_same([a for a,_ in pairs], in_epoch(dl, 0)); all_same([b for _,b in pairs], in_epoch(dl, 1))

def test_an_error_in_a_worker_arrives_with_its_traceback():
    with pytest.raises(ValueError, match='row 5 cannot be read') as e: list(DataLoader(Items(20, bad=5), 4, num_workers=2, context='fork'))
    assert '__getitem__' in str(e.value.__cause__) and 'rows [4, 5, 6, 7] of epoch 0' in str(e.value.__cause__) and not children()

@pytest.mark.parametrize('persistent', [False, True])
def test_a_killed_worker_is_an_error_not_a_wait_and_the_next_epoch_has_new_ones(persistent):
    dl, started = DataLoader(Items(100, kill=50), 4, num_workers=2, context='fork', persistent=persistent), time.perf_counter()
    with pytest.raises(RuntimeError, match=r'was killed by SIGKILL while it had rows \[48, 49, 50, 51\] of epoch 0'): list(dl)
    assert time.perf_counter() - started < 5 and not children()
    assert len(list(islice(dl, 3))) == 3

def test_spawned_workers_give_the_same():
    ds = MapDataset([float(i) for i in range(30)], abs)
    try: all_same(*(list(DataLoader(ds, 4, shuffle=True, num_workers=w, context='spawn')) for w in (0, 1)))
    finally: mp.resource_tracker._resource_tracker._stop()
    with pytest.raises(TypeError, match='define classes and functions in a module'): list(DataLoader([lambda: 0], num_workers=1, context='spawn'))

def test_memory_and_handles_stay_flat_over_epochs():
    dl = DataLoader(Items(64), 4, shuffle=True, num_workers=2, context='fork')
    def epochs(k):
        for _ in range(k): list(dl)
        gc.collect()
        return int(open('/proc/self/statm').read().split()[1]), len(os.listdir('/proc/self/fd')), len(shared_memory())
    before = epochs(5)
    after = epochs(15)
    assert after[0] < before[0]*1.02 and after[1:] == before[1:]

def test_no_more_than_asked_is_fetched_ahead():
    for context in ('fork', 'thread'):
        batches = Asked(Sampler(400), 4)
        it = iter(DataLoader(rows(400), batch_sampler=batches, num_workers=2, prefetch=2, context=context))
        next(it)
        assert 4 <= len(batches.asked) <= 6
        it.close()

# position

SAMPLERS = dict(plain=lambda n: dict(shuffle=True, seed=5), weighted=lambda n: dict(sampler=WeightedSampler(torch.arange(n)+1.)), boot=lambda n: dict(sampler=Bootstrap(n)),
    strata=lambda n: dict(sampler=StratifiedSampler(torch.arange(n) % 3)), bucket=lambda n: dict(sampler=BucketSampler(torch.arange(n) % 11, 4), bs=4),
    shard=lambda n: dict(sampler=Shard(Sampler(n, True), 1, 2)), told=lambda n: dict(sampler=torch_data.DistributedSampler(range(n), 2, 1)),
    list=lambda n: dict(sampler=list(range(n))[::-1]), batches=lambda n: dict(batch_sampler=[[k, k//2] for k in range(n)], bs=None))

@pytest.mark.parametrize('kind', SAMPLERS)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 60), epoch=st.integers(0, 5), data=st.data())
def test_to_seek_is_to_iterate(kind, n, epoch, data):
    def make(): return DataLoader(Dice(n), **dict(dict(bs=4), **SAMPLERS[kind](n)))
    dl = make()
    epochs = [list(dl) for _ in range(epoch+2)]
    k = data.draw(st.integers(0, len(dl)))
    for fresh in (make(), dl):
        fresh.seek(epoch, k)
        all_same(list(fresh), epochs[epoch][k:])
        all_same(list(fresh), epochs[epoch+1])

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 30), st.sampled_from([0, 0, 0, 2]))
def test_a_saved_state_goes_on_where_it_was(n, bs, steps, workers):
    def make(w=0): return DataLoader(Dice(n), bs, shuffle=True, num_workers=w, context='fork')
    def batches(dl):
        while True: yield from dl
    want = list(islice(batches(make()), steps + 5))
    dl = make(workers)
    it = batches(dl)
    seen = list(islice(it, steps))
    state = json.loads(json.dumps(dl.state_dict()))
    it.close()
    again = make()
    again.load_state_dict(state)
    all_same(seen + list(islice(batches(again), 5)), want)

def test_a_state_says_what_comes_next():
    dl = DataLoader(rows(10), 4)
    def at(): return dl.state_dict()['epoch'], dl.state_dict()['batch']
    places = [at()]
    for _ in dl: places.append(at())
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0)] and at() == (1, 0)
    for _ in dl: break
    assert at() == (1, 1) and dl.epoch == 2
    dl.set_epoch(7)
    assert at() == (7, 0)

def test_a_training_loop_that_tells_the_epoch_does_not_undo_a_loaded_state():
    dl = DataLoader(rows(20), 4, shuffle=True)
    want = in_epoch(dl, 3)
    dl.seek(3, 2)
    dl.set_epoch(3)
    all_same(list(dl), want[2:])
    dl.seek(3, 2)
    dl.set_epoch(4); dl.set_epoch(3)
    all_same(list(dl), want)

class Asked(BatchSampler):
    "Batches that remember which of them were asked for"
    def batches(self, epoch): return self
    def __getitem__(self, k): self.__dict__.setdefault('asked', []).append(k); return super().batches(0)[k]

def test_to_seek_looks_at_nothing_that_comes_before():
    dl = DataLoader(Items(10_000), batch_sampler=Asked(Sampler(10_000, True), 1))
    dl.seek(0, 9_990)
    assert len(list(dl)) == 10 and dl.batch_sampler.asked == list(range(9_990, 10_000))

def test_a_state_of_another_order_is_refused_with_the_facts():
    state = DataLoader(rows(20), 4, shuffle=True).state_dict()
    for other, said in [(DataLoader(rows(20), 4, shuffle=True, seed=1), 'seed is 42 there and 1 here'), (DataLoader(rows(21), 4, shuffle=True), 'n is 20 there and 21 here'),
                        (DataLoader(rows(20), 5, shuffle=True), 'bs is 4 there and 5 here'), (DataLoader(rows(20), 4), 'shuffle is True there and False here'),
                        (DataLoader(iter([1])), "sampler is 'Sampler' there and 'Stream' here"),
                        (DataLoader(rows(20), 4, sampler=WeightedSampler(torch.ones(20))), "sampler is 'Sampler' there and 'WeightedSampler' here")]:
        with pytest.raises(ValueError, match=f'belongs to another order.*{said}'): other.load_state_dict(state)

# samplers of others

def test_pytorchs_samplers_drive_ours():
    weights = torch_data.WeightedRandomSampler([0., 1., 0.], 9)
    assert [yb.tolist() for _,yb in DataLoader(rows(3), 4, sampler=weights)] == [[1]*4, [1]*4, [1]]
    dl = DataLoader(rows(30), 4, sampler=torch_data.RandomSampler(range(30)))
    assert sorted(torch.cat([y for _,y in dl]).tolist()) == list(range(30)) and dl.epoch == 1
    told = torch_data.DistributedSampler(range(30), 2, 0, seed=3)
    dl, theirs = DataLoader(rows(30), 4, sampler=told), torch_data.DataLoader(rows(30), 4, sampler=torch_data.DistributedSampler(range(30), 2, 0, seed=3))
    for epoch in (0, 1, 5):
        theirs.sampler.set_epoch(epoch)
        all_same(in_epoch(dl, epoch), [tuple(b) for b in theirs])
    a, b = list(dl), list(dl)                                                  # and it goes on by itself
    assert not torch.equal(a[0][1], b[0][1])
    for batches in ([[0, 2], [1]], torch_data.BatchSampler([0, 2, 1], 2, False), [torch.tensor([0, 2]), torch.tensor([1])]):
        assert [y.tolist() for _,y in DataLoader(rows(3), batch_sampler=batches)] == [[0, 2], [1]]

def test_our_samplers_drive_pytorchs_loader():
    ours = DataLoader(rows(50), 8, shuffle=True, seed=7)
    batches = BatchSampler(Sampler(50, True, 7), 8)
    for theirs in (torch_data.DataLoader(rows(50), batch_sampler=[b.tolist() for b in batches]), torch_data.DataLoader(rows(50), 8, sampler=Sampler(50, True, 7)),
                   torch_data.DataLoader(rows(50), sampler=BatchSampler(Sampler(50, True, 7), 8), batch_size=None)):
        all_same(in_epoch(ours), [tuple(b) for b in theirs])

# batches one's own way

def test_transform_sees_the_finished_batch():
    assert [b for b in DataLoader(rows(5), 4, transform=lambda b: len(b[0]))] == [4, 1]
    named = Dataset(image=torch.arange(6).view(3, 2), label=torch.arange(3))
    seen = next(iter(DataLoader(named, 2, as_tuple=True, device='meta', transform=lambda b: b)))
    assert type(seen) is tuple and seen[0].shape == (2, 2) and seen[1].device.type == 'meta'
    assert type(next(iter(DataLoader(named, 2)))) is dict

class Shake:
    takes_draw = True
    def __call__(self, batch, draw): return dict(y=batch['y'], u=draw.uniform(3), partner=draw.partner(), device=draw.keys.device.type)

def test_a_draw_belongs_to_the_rows():
    def drawn(epoch=0, **kw): return {int(y): u for b in in_epoch(DataLoader(Items(40), transform=Shake(), **kw), epoch) for y,u in zip(b['y'], b['u'], strict=True)}
    one = drawn(bs=8, shuffle=True)
    for other in (drawn(bs=3), drawn(bs=8, shuffle=True, num_workers=2, context='fork'), drawn(bs=5, num_workers=2, context='thread')):
        for k in range(40): same(one[k], other[k])
    assert not torch.equal(one[0], drawn(1, bs=8)[0]) and not torch.equal(one[0], drawn(bs=8, seed=1)[0])
    assert next(iter(DataLoader(Items(4), transform=Shake(), device='meta')))['device'] == 'meta'

def test_pinning_without_a_gpu_does_nothing():
    xb, _ = next(iter(DataLoader(rows(4), pin_memory=True)))
    assert xb.is_pinned() == torch.cuda.is_available()

def test_ragged_rows():
    words = [torch.arange(k) for k in (3, 1, 2)]
    for workers in (0, 1):
        batch, = DataLoader(words, 3, collate_fn=pad_collate, num_workers=workers, context='fork')
        assert batch.lengths.tolist() == [3, 1, 2] and batch.mask.sum() == 6 and batch_size(batch) == 3

# streams

class Numbers(torch_data.IterableDataset):
    def __init__(self, n): self.n = n
    def __iter__(self): return iter(range(self.n))

class Sized(Numbers):
    def __len__(self): return self.n

class Saved(Numbers):
    "Saves its place and counts what it reads"
    at,read,epoch = 0,0,0
    def set_epoch(self, epoch): self.epoch = epoch
    def state_dict(self): return dict(at=self.at, epoch=self.epoch)
    def load_state_dict(self, state): assert state['epoch'] == self.epoch; self.at = state['at']
    def __iter__(self):
        self.read = 0
        while self.at < self.n:
            self.at += 1; self.read += 1
            yield self.at-1 + 1000*self.epoch
        self.at = 0

def noisy(i): return i + torch.rand(())

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 80), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(1, 40))
def test_streams_every_item_once_and_pytorchs_batches(n, bs, drop_last, shuffle, buffer):
    dl = DataLoader(Numbers(n), bs, shuffle, drop_last=drop_last, buffer=buffer)
    epochs = [list(dl) for _ in range(2)]
    if not shuffle: all_same(epochs[0], list(torch_data.DataLoader(Numbers(n), bs, drop_last=drop_last)))
    for e in epochs:
        got = torch.cat(e).tolist() if e else []
        assert len(set(got)) == len(got) == (n//bs*bs if drop_last else n) and all(len(b) == bs for b in e[:-1])
        block = max(1, buffer//bs)*bs
        if not drop_last and shuffle: assert all(i//block == k//block for k,i in enumerate(got))
    if shuffle and n > 30 and buffer > 20: assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))

@pytest.mark.parametrize('make', [Numbers, Saved, lambda n: MapDataset(MapDataset(Numbers(n), noisy), noisy), lambda n: hf.Dataset.from_dict(dict(a=list(range(n)))).to_iterable_dataset(3)])
@pytest.mark.parametrize('shuffle', [False, True])
def test_streams_are_the_same_for_any_number_of_workers_and_from_any_place(make, shuffle):
    def loader(**kw): return DataLoader(make(50), 4, shuffle, buffer=12, context='fork', transform=lambda b: b['a'] if isinstance(b, dict) else b, **kw)
    first = loader()
    want = list(first) + list(first)
    for workers in (1, 2):
        dl = loader(num_workers=workers)
        all_same(list(dl) + list(dl), want)
    for k in range(0, 13, 2):
        dl = loader(num_workers=2*(k % 4 == 0))
        it = iter(dl)
        for _ in range(k): next(it)
        state = json.loads(json.dumps(dl.state_dict()))
        del it
        again = loader()
        again.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            all_same(list(again) + list(again), want[k:])
            again.seek(0)
            all_same(list(again), want[:13])                    # and the beginning is still where it was

def test_a_stream_that_saves_its_place_is_not_read_again_and_another_says_so():
    dl = DataLoader(Saved(100), 5, True, buffer=20)
    for _ in islice(dl, 10): pass
    again = DataLoader(Saved(100), 5, True, buffer=20)
    again.load_state_dict(dl.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        list(again)
    assert again.ds.at == 0 and dl.state_dict()['stream'] == dict(at=40, epoch=0)       # batches 8 to 11 are one block
    plain = DataLoader(Numbers(100), 5)
    plain.seek(0, 10)
    with pytest.warns(UserWarning, match='Numbers cannot be brought to a place in its middle: 50 items are read again'): assert next(iter(plain))[0] == 50

def test_a_hugging_face_stream_with_a_buffer_of_its_own_loses_nothing():
    def make(): return DataLoader(hf.Dataset.from_dict(dict(a=list(range(60)))).to_iterable_dataset().shuffle(3, buffer_size=20), 4)
    dl = make()
    want = [b['a'] for b in dl]
    dl = make()
    seen = [b['a'] for b in islice(dl, 5)]
    again = make()
    again.load_state_dict(dl.state_dict())
    with pytest.warns(UserWarning, match='20 items are read again'): all_same(seen + [b['a'] for b in again], want)
    assert sorted(torch.cat(want).tolist()) == list(range(60)) and not torch.equal(torch.cat(want), torch.cat([b['a'] for b in again]))

def test_streams_without_end_and_with_a_length():
    from itertools import count
    class Endless(torch_data.IterableDataset):
        def __iter__(self): return count()
    for workers in (0, 2):
        got = list(islice(DataLoader(Endless(), 3, num_workers=workers, context='fork'), 4))
        assert torch.cat(got).tolist() == list(range(12))
    assert len(DataLoader(Sized(10), 4)) == 3 and len(DataLoader(Sized(10), 4, drop_last=True)) == 2
    with pytest.raises(TypeError, match='len'): len(DataLoader(Numbers(10)))
    assert repr(DataLoader(Numbers(3))).startswith('DataLoader(<') and is_stream(Sized(3)) and not is_stream(rows(3))
    assert 'Stream(stream=Numbers, bs=4' in repr(Stream(Numbers(3), 4))

def test_a_generator_is_read_once():
    dl = DataLoader((i for i in range(6)), 4)
    assert [b.tolist() for b in dl] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(RuntimeError, match='can be read once only'): list(dl)

def test_a_broken_stream_or_item_stops_the_workers():
    def lines():
        yield from range(10)
        raise OSError('the line is dead')
    with pytest.raises(OSError, match='the line is dead'): list(DataLoader(lines(), 2, num_workers=2, context='fork'))
    with pytest.raises(TypeError, match='rows|NoneType|unsupported'): list(DataLoader(MapDataset(Numbers(9), lambda i: i + None), 2, num_workers=2, context='fork'))

# what cannot be

@pytest.mark.parametrize('make, error, said', [
    (lambda: DataLoader(Dataset(torch.ones(0))), ValueError, 'the data set is empty'),
    (lambda: DataLoader(rows(3), 0), ValueError, 'at least 1 row, bs is 0'), (lambda: DataLoader(Numbers(3), 0), ValueError, 'at least 1 row, bs is 0'),
    (lambda: DataLoader(rows(3), 4, drop_last=True), ValueError, '3 rows give no batch of 4'),
    (lambda: DataLoader(rows(3), num_workers=-1), ValueError, 'from 0 up'), (lambda: DataLoader(rows(3), prefetch=0), ValueError, 'prefetch is 0'),
    (lambda: DataLoader(rows(3), shuffle=True, sampler=Sampler(3)), ValueError, 'a sampler has its own order; leave shuffle out'),
    (lambda: DataLoader(rows(3), drop_last=True, batch_sampler=BatchSampler(Sampler(3), 2)), ValueError, 'leave shuffle, sampler and drop_last out'),
    (lambda: DataLoader(Numbers(3), sampler=Sampler(3)), ValueError, 'a stream has no row numbers'),
    (lambda: DataLoader(object()), TypeError, 'object has neither rows nor items'),
    (lambda: DataLoader(rows(3), context='threads'), ValueError, 'did you mean thread?'),
    (lambda: DataLoader(rows(3), context='thread', seed_rows=True), ValueError, 'threads share the global generators'),
    (lambda: list(DataLoader([torch.ones(2), torch.ones(3)])), ValueError, r'different shapes cannot be stacked: \[\(2,\), \(3,\)\]'),
    (lambda: DataLoader(rows(9), 4).seek(0, 4), ValueError, 'no batch 4 in epoch 0: an epoch has 3 batches'), (lambda: DataLoader(rows(9), 4).seek(-1), ValueError, 'epoch -1'),
    (lambda: DataLoader(rows(9), 4, sampler=torch_data.RandomSampler(range(9))).seek(0, 1), ValueError, 'its order cannot be had again; miniai.sampler has'),
    (lambda: next(iter(DataLoader(Many(3)))), ValueError, r'Many.__getitems__ was asked for 3 rows and gave 1'),
])
def test_errors_show_the_next_move(make, error, said):
    with pytest.raises(error, match=said): make()

class Many(Items):
    def __getitems__(self, idxs): return [self[0]]                              # fewer rows than asked for
