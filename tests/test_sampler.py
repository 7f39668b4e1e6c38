"Orders and batches: properties for any size; PyTorch's samplers side by side."
import json
import pytest, torch
from hypothesis import given, strategies as st
from miniai.core import generator
from miniai.sampler import (BatchSampler, Batches, Bootstrap, BucketSampler, Hardest, Order, Sampler, Shard, StratifiedSampler, WeightedSampler,
                            batches_of, order_of, repeats)
from torch.utils import data as torch_data

sizes, seeds, epochs = st.integers(1, 200), st.integers(0, 10**6), st.integers(0, 50)

def kinds(n, seed=0, bs=4):
    g = generator(n, 7)
    return dict(plain=Sampler(n), shuffled=Sampler(n, True, seed), weighted=WeightedSampler(torch.rand(n, generator=g)+.1, seed=seed),
                without=WeightedSampler(torch.rand(n, generator=g)+.1, replacement=False, seed=seed), bootstrap=Bootstrap(n, seed=seed),
                stratified=StratifiedSampler(torch.arange(n) % 3, seed), bucket=BucketSampler(torch.randint(9, (n,), generator=g), bs, 3, seed))
ONCE = 'plain', 'shuffled', 'without', 'stratified', 'bucket'

@pytest.mark.parametrize('kind', kinds(3))
@given(n=sizes, seed=seeds, epoch=epochs)
def test_any_order_by_itself_and_again(kind, n, seed, epoch):
    s, other = (kinds(n, seed)[kind] for _ in range(2))
    order = s.order(epoch)
    assert len(order) == len(s) == n and order.dtype == torch.int64 and 0 <= order.min() and order.max() < n
    if kind in ONCE: assert torch.equal(order.sort().values, torch.arange(n))
    for _ in range(min(epoch, 3)): list(other)
    assert torch.equal(other.order(epoch), order) and other.epoch == min(epoch, 3)
    s.set_epoch(epoch)
    assert list(s) == order.tolist() and s.epoch == epoch+1

@pytest.mark.parametrize('kind', [k for k in kinds(3) if k != 'plain'])
def test_seeds_and_epochs_give_different_orders(kind):
    orders = {tuple(kinds(50, seed)[kind].order(epoch).tolist()) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64

@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=20).filter(any), seeds)
def test_rows_without_weight_are_never_drawn(weights, seed):
    drawn = WeightedSampler(weights, 500, seed=seed).order(0)
    assert (torch.tensor(weights)[drawn] > 0).all()

def test_weights_are_chances_as_in_pytorch():
    w = torch.tensor([1., 2, 0, 5])
    theirs = torch.tensor(list(torch_data.WeightedRandomSampler(w, 40_000, generator=generator(0)))).bincount(minlength=4) / 40_000
    ours = WeightedSampler(w, 40_000).order(0).bincount(minlength=4) / 40_000
    assert (ours - w/8).abs().max() < .01 and (ours - theirs).abs().max() < .015
    pairs = torch.stack([WeightedSampler(w, 2, replacement=False, seed=s).order(0) for s in range(4000)])
    first, second = (pairs[:, k].bincount(minlength=4)/4000 for k in range(2))
    want = torch.tensor([sum(w[j]/8 * w[i]/(8-w[j]) for j in range(4) if j != i) for i in range(4)])      # drawn from those that are left
    assert (first - w/8).abs().max() < .03 and (second - want).abs().max() < .03

def test_bootstrap_draws_as_many_as_asked():
    assert len(Bootstrap(5, 100).order(0)) == 100 and Bootstrap(range(5)).order(0).max() < 5

@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), seeds, st.integers(1, 20))
def test_every_batch_has_its_share_of_every_class(counts, seed, bs):
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for b in BatchSampler(StratifiedSampler(y, seed), bs).batches(3):
        for k,c in enumerate(counts): assert abs((y[b] == k).sum().item() - c*len(b)/len(y)) <= 2.5

@given(sizes, st.integers(1, 9), st.integers(1, 9), seeds)
def test_buckets_hold_like_lengths(n, bs, pool, seed):
    lengths = torch.randint(1000, (n,), generator=generator(seed))
    order = BucketSampler(lengths, bs, pool, seed).order(0)
    spans = [(lengths[b].max() - lengths[b].min()).item() for b in Batches(order, bs)]
    if pool*bs >= n and n >= 2*bs:      # one pool: sorted before it was cut, so no batch reaches into another
        ranges = sorted((lengths[b].min().item(), lengths[b].max().item()) for b in Batches(order, bs))
        assert all(a[1] <= b[0] for a,b in zip(ranges, ranges[1:], strict=False))
    assert all(s <= 1000 for s in spans)

def test_buckets_save_padding():
    lengths = torch.randint(1, 500, (4000,), generator=generator(0))
    def spent(s): return sum(len(b)*lengths[b].max().item() for b in BatchSampler(s, 32).batches(0)) / lengths.sum().item()
    assert spent(BucketSampler(lengths, 32)) < 1.06 < 1.8 < spent(Sampler(4000, True))

@given(sizes, st.integers(1, 9), st.booleans(), epochs, seeds)
def test_ranks_share_every_row_once_and_fairly(n, world, even, epoch, seed):
    whole = Sampler(n, True, seed)
    shards = [Shard(Sampler(n, True, seed), r, world, even) for r in range(world)]
    parts = [s.order(epoch) for s in shards]
    assert [len(p) for p in parts] == [len(s) for s in shards] and max(map(len, parts)) - min(map(len, parts)) <= (not even)
    got = torch.cat(parts).sort().values
    if not even: assert torch.equal(got, torch.arange(n))
    else: assert len(got) == n//world*world == len(got.unique())
    together = torch.stack([p[:n//world] for p in parts], 1).flatten()          # side by side they are the order of one process
    assert torch.equal(together, whole.order(epoch)[:len(together)])

def test_shards_are_pytorchs_where_nothing_is_left_over():
    theirs = [list(torch_data.DistributedSampler(range(12), 3, r, shuffle=False)) for r in range(3)]
    assert [Shard(Sampler(12), r, 3).order(0).tolist() for r in range(3)] == theirs
    shard = Shard(Sampler(10, True), 3, 4)
    assert repr(shard).endswith('rank 3 of 4: 2 of 10 rows, ranks up to 1 have 3, the others 2)')
    first = list(shard)
    assert shard.epoch == shard.sampler.epoch == 1 and first != list(shard)
    assert shard.facts() == dict(sampler='Sampler', n=10, shuffle=True, seed=42, rank=3, world=4, even=False)

@given(sizes, st.floats(.01, 1), st.integers(1, 5), epochs, seeds)
def test_the_hardest_are_a_part_of_the_order_and_none_left_out_is_harder(n, share, kinds, epoch, seed):
    losses = torch.randint(kinds, (n,), generator=generator(seed)).float()      # with many that are equal
    losses[::7] = torch.inf
    hard,whole = Hardest(Sampler(n, True, seed), share, losses),Sampler(n, True, seed).order(epoch)
    got = hard.order(epoch)
    assert len(got) == len(hard) == max(1, round(share*n)) and got.equal(hard.order(epoch))
    taken = torch.zeros(n, dtype=torch.bool)
    taken[got] = True
    assert got.equal(whole[taken[whole]])
    assert taken.all() or losses[~taken].max() <= losses[taken].min()

def test_the_hardest_go_with_any_sampler():
    losses = torch.arange(12.)
    for s in (Shard(Sampler(12, True), 1, 2), BucketSampler(range(12), 3), StratifiedSampler([0, 1]*6)):
        got = Hardest(s, .5, losses).order(2)
        assert sorted(losses[got].tolist()) == sorted(losses[s.order(2)].tolist())[-len(got):] and len(got) == round(len(s)/2)
    hard = Hardest(Sampler(12, True), .25, losses)
    assert list(hard) and hard.epoch == hard.sampler.epoch == 1
    assert hard.facts() == dict(sampler='Sampler', n=12, shuffle=True, seed=42, share=.25)
    assert len(Hardest(Sampler(12, True), .25)) == 3 and len(Hardest(Sampler(12, True), .25).order(0)) == 3   # nothing is known yet

# batches

@given(sizes, st.integers(1, 70), st.booleans(), epochs)
def test_batches_are_the_order_cut_in_pieces(n, bs, drop_last, epoch):
    if drop_last and bs > n: return
    b = BatchSampler(Sampler(n, True), bs, drop_last)
    got = b.batches(epoch)
    assert len(got) == len(b) == len(list(got)) and all(len(g) == bs for g in list(got)[:-1])
    assert torch.equal(torch.cat(list(got)), Sampler(n, True).order(epoch)[:n//bs*bs if drop_last else n])
    theirs = torch_data.BatchSampler(Sampler(n, True).order(epoch).tolist(), bs, drop_last)
    assert [g.tolist() for g in got] == list(theirs)
    for k in range(0, len(b), 7): assert torch.equal(next(batches_of(b, epoch, k)), got[k])

def test_entering_an_epoch_looks_at_no_batch_before():
    class Counting(Batches):
        asked = []
        def __getitem__(self, k): self.asked.append(k); return super().__getitem__(k)
    class Source:
        def batches(self, epoch): return Counting(torch.arange(100), 10)
    assert next(batches_of(Source(), 0, 7)).tolist() == list(range(70, 80)) and Counting.asked == [7]

def test_a_window_costs_the_same_anywhere():
    b = Batches(torch.arange(10**6), 3)
    assert b[0].data_ptr() == b.order.data_ptr() and b[333_333].tolist() == [999_999] and b[5].untyped_storage().data_ptr() == b.order.untyped_storage().data_ptr()

def test_epochs_count_when_the_first_number_is_asked_for():
    b = BatchSampler(Sampler(10, True), 4)
    iter(b); a = list(b)
    assert b.epoch == 1 and torch.equal(a[0], b.batches(0)[0])
    b.set_epoch(5)
    assert b.epoch == b.sampler.epoch == 5

# others' samplers

def test_pytorchs_samplers_serve():
    assert [b.tolist() for b in BatchSampler(torch_data.SequentialSampler(range(5)), 2)] == [[0, 1], [2, 3], [4]]
    assert [b.tolist() for b in BatchSampler(torch.tensor([3, 1, 2]), 2)] == [[3, 1], [2]]
    told = torch_data.DistributedSampler(range(50), 2, 1)
    b = BatchSampler(told, 8)
    orders = [torch.cat(list(b)) for _ in range(3)]
    told.set_epoch(2)
    assert told.epoch == 2 and torch.equal(orders[2], torch.tensor(list(told))) and torch.equal(order_of(told, 1), orders[1]) and told.epoch == 2
    inner = torch_data.BatchSampler(torch_data.DistributedSampler(range(20), 2, 0), 4, False)
    assert not torch.equal(next(batches_of(inner, 0)), next(batches_of(inner, 1))) and torch.equal(next(batches_of(inner, 0)), next(batches_of(inner, 0)))

def test_who_would_say_the_same_again():
    chancy, fixed = torch_data.RandomSampler(range(9)), torch_data.SequentialSampler(range(9))
    for s in (fixed, [1, 2], torch.arange(3), range(3), Sampler(3), torch_data.DistributedSampler(range(4), 1, 0), Shard(Sampler(3), 0, 2)):
        assert repeats(s) and repeats(BatchSampler(s, 2)) and repeats(torch_data.BatchSampler(s, 2, False))
    for s in (chancy, torch_data.WeightedRandomSampler([1, 1], 2), torch_data.SubsetRandomSampler([1]), iter([1])):
        assert not repeats(s)
    assert not repeats(BatchSampler(chancy, 2)) and not repeats(torch_data.BatchSampler(chancy, 2, False))

def test_facts_are_plain_and_tell_columns_apart():
    for s in kinds(9).values():
        facts = BatchSampler(s, 4).facts()
        assert json.loads(json.dumps(facts)) == facts and facts['bs'] == 4
    assert WeightedSampler([1, 2]).facts() != WeightedSampler([2, 1]).facts() and BucketSampler([1, 2], 2).facts() != BucketSampler([2, 1], 2).facts()
    assert BatchSampler([3, 1], 2).facts() == dict(sampler='list', n=2, bs=2, drop_last=False)
    assert repr(Sampler(3, seed=1)) == 'Sampler(n=3, shuffle=False, seed=1, epoch=0)'

@pytest.mark.parametrize('make, error, said', [
    (lambda: Sampler(3, True, seed=-1).order(0), ValueError, 'from 0 up'),
    (lambda: BatchSampler(Sampler(3), 0), ValueError, 'at least 1 row, bs is 0'),
    (lambda: BatchSampler(Sampler(3), 4, drop_last=True), ValueError, '3 rows give no batch of 4'),
    (lambda: BatchSampler(BucketSampler([1, 2, 3], 2), 3), ValueError, 'made for batches of 2, bs is 3'),
    (lambda: WeightedSampler([0., 0.]), ValueError, 'not all 0'), (lambda: WeightedSampler([1., -1.]), ValueError, 'from 0 up'),
    (lambda: WeightedSampler([1., float('inf')]), ValueError, 'finite'),
    (lambda: WeightedSampler([1., 0.], replacement=False), ValueError, '2 rows without replacement, but 1'),
    (lambda: Shard(Sampler(3), -1, 2), ValueError, 'rank -1 of 2 processes'), (lambda: Batches(torch.arange(3), 2)[-1], IndexError, 'batch -1 of 2'),
    (lambda: type('Mine', (Order,), {})().order(0), NotImplementedError, r'Mine needs a method order\(epoch\)'),
])
def test_errors_show_the_next_move(make, error, said):
    with pytest.raises(error, match=said): make()

@pytest.mark.parametrize('workers', [0, 2])
def test_pytorchs_loader_sees_every_epoch_of_ours(workers):
    theirs = torch_data.DataLoader(torch.arange(20), sampler=BatchSampler(Sampler(20, True), 8), batch_size=None, num_workers=workers)
    for epoch in range(3): assert torch.equal(torch.cat(list(theirs)), Sampler(20, True).order(epoch))
