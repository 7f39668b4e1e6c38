"Seeds, generators, devices, nested batches."
import random
from collections import OrderedDict, namedtuple
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from miniai.core import Draw, _two, batch_size, default_device, did_you_mean, generator, map_tensors, scramble, set_seed, to_device

def draws(): return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

@given(st.integers(0, 2**63))
def test_one_seed_seeds_all_three(seed):
    set_seed(seed % 2**63)
    first = draws()
    set_seed(seed % 2**63)
    assert draws() == first

def test_generators_with_neighbouring_keys_have_nothing_in_common():
    firsts = {torch.randint(2**62, (1,), generator=generator(a, b)).item() for a in range(30) for b in range(30)}
    assert len(firsts) == 900
    x = torch.stack([torch.randn(2000, generator=generator(0, e)) for e in range(6)])
    assert (torch.corrcoef(x) - torch.eye(6)).abs().max() < .1

def test_a_generator_ignores_the_global_state():
    a = torch.rand(3, generator=generator(1, 2))
    torch.rand(100)
    assert torch.equal(a, torch.rand(3, generator=generator(1, 2)))
    with pytest.raises(ValueError, match='from 0 up, -2 is not'): generator(1, -2)

def test_map_tensors_keeps_every_nesting():
    P = namedtuple('P', 'x y')
    batch = dict(a=P(torch.ones(2), [torch.ones(2), 'text']), b=OrderedDict(c=(torch.ones(2), None)))
    out = map_tensors(lambda t: t*2, batch)
    assert type(out['a']) is P and type(out['b']) is OrderedDict and out['a'].y[1] == 'text' and out['b']['c'][1] is None
    assert out['a'].x.tolist() == out['a'].y[0].tolist() == out['b']['c'][0].tolist() == [2, 2]

def test_to_device_and_size():
    batch = (torch.ones(3, 2), {'y': torch.ones(3)})
    assert to_device(batch, 'meta')[1]['y'].device.type == 'meta'
    assert batch_size(batch) == 3 and batch_size({'a': ['x'], 'b': torch.ones(5)}) == 5 and batch_size(torch.tensor(1.)) == 0
    assert default_device().type in ('cpu', 'cuda', 'mps')

def test_did_you_mean():
    assert did_you_mean('cn', ['mlp', 'cnn']) == '; did you mean cnn?' and did_you_mean('zzz', ['mlp', 'cnn']) == '; there are mlp, cnn'

N = 20_000

def splitmix(z):
    "The mixing function in plain whole numbers"
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31

@given(st.lists(st.integers(-2**63, 2**63-1), min_size=1, max_size=20))
def test_scramble_is_splitmix64_on_all_of_int64(zs):
    assert [z % 2**64 for z in scramble(torch.tensor(zs)).tolist()] == [splitmix(z % 2**64) for z in zs]

KINDS = dict(bits=lambda d: d.bits(2), uniform=lambda d: d.uniform(3, 2), integers=lambda d: d.integers(-5, 9, 4), normal=lambda d: d.normal(2),
             bernoulli=lambda d: d.bernoulli(.3), beta=lambda d: d.beta(.4))

@pytest.mark.parametrize('kind', KINDS)
@given(rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=30), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000), at=st.integers(0, 29), calls=st.integers(0, 3))
def test_a_rows_numbers_are_the_same_in_any_batch(kind, rows, seed, epoch, at, calls):
    batch, alone = Draw(seed, epoch, rows), Draw(seed, epoch, [rows[at := at % len(rows)]])
    for d in (batch, alone):
        for _ in range(calls): d.uniform(7)              # how much an earlier call asked for does not matter
    assert torch.equal(KINDS[kind](batch)[at], KINDS[kind](alone)[0])

def chi2(counts): return ((counts - counts.mean())**2 / counts.mean()).sum().item() / (len(counts)-1)

@pytest.mark.parametrize('seed, epoch', [(0, 0), (42, 0), (42, 7), (10**12, 1)])
def test_draws_are_uniform(seed, epoch):
    d = Draw(seed, epoch, range(N))
    u = d.uniform(4)
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1
    assert chi2(torch.histc(u, 100, 0, 1)) < 1.7                       # about 1 when even; 1.7 for 99 degrees is beyond five sigma
    assert chi2(torch.bincount(d.integers(0, 7, 4).view(-1), minlength=7).float()) < 5
    bits = torch.stack([(d.bits() >> k) & 1 for k in range(64)]).double()
    assert (bits.mean(1) - .5).abs().max() < 5*.5/N**.5                # each of the 64 bits is a fair coin,
    assert (torch.corrcoef(bits) - torch.eye(64)).abs().max() < 6/N**.5 # and none knows another

def test_draws_of_neighbouring_seeds_epochs_calls_rows_and_places_have_nothing_in_common():
    d = Draw(0, 0, range(N))
    xs = [d.uniform(), d.uniform(), *d.uniform(3).T, *(Draw(s, e, range(N)).uniform() for s in range(4) for e in range(4) if s or e)]
    xs += [xs[0].roll(k) for k in (1, 2, 3, 64, 256)]                  # a row and its neighbours
    assert (torch.corrcoef(torch.stack(xs)) - torch.eye(len(xs))).abs().max() < 5/N**.5
    assert len(torch.cat([Draw(s, e, range(N)).bits() for s in range(5) for e in range(5)]).unique()) == 25*N

def ks(x, y):
    "The largest distance between two empirical distributions, in units of its expected size"
    both = torch.cat([x, y]).sort().values
    cdf = lambda t: torch.searchsorted(t.sort().values, both, right=True) / len(t)
    return (cdf(x) - cdf(y)).abs().max().item() * (len(x)*len(y)/(len(x)+len(y)))**.5

@pytest.mark.parametrize('a', [.02, .1, .2, .4, 1, 2, 8])
def test_beta_and_normal_are_distributed_like_numpys(a):
    d, g = Draw(3, 1, range(N)), np.random.default_rng(0)
    beta = d.beta(a)
    assert not beta.isnan().any() and 0 <= beta.min() and beta.max() <= 1
    theirs = torch.from_numpy(g.beta(a, a, N)).float()
    assert ks(beta.round(decimals=5), theirs.round(decimals=5)) < 2    # beyond 2 once in 1500 times; float32 near 0 is half minus half
    assert ks(d.normal(), torch.from_numpy(g.standard_normal(N)).float()) < 2
    assert abs(d.bernoulli(.25).float().mean() - .25) < .02

@given(st.integers(1, 300), st.integers(0, 9))
def test_partner_is_a_permutation(n, epoch):
    assert Draw(0, epoch, range(n)).partner().sort().values.tolist() == list(range(n))

def test_the_two_uniforms_of_a_normal_share_no_bit():
    bits = Draw(0, 0, range(N)).bits()
    u, v = (o.double()*2**24 for o in _two(bits))
    assert torch.equal(u.long() << 24 | v.long(), bits >> 16 & 2**48-1)

def test_partners_are_any_order_equally_often():
    orders = [tuple(Draw(0, e, range(4)).partner().tolist()) for e in range(4800)]
    counts = torch.tensor([orders.count(o) for o in set(orders)]).float()
    assert len(counts) == 24 and chi2(counts) < 2.3

def test_a_draw_moves_and_goes_on_counting():
    here, there = (Draw(1, 2, range(5)) for _ in range(2))
    first = there.uniform(), there.to('cpu').uniform()
    assert torch.equal(first[0], here.uniform()) and torch.equal(first[1], here.uniform()) and not torch.equal(*first)
    assert Draw(1, 2, range(5)).to('meta').normal(3).device.type == 'meta'
    for call in (lambda: here.integers(2, 2), lambda: here.beta(0), lambda: Draw(-1, 0, [0])):
        with pytest.raises(ValueError, match='from .* up|above 0'): call()
