"Seeds, generators, devices, nested batches."
import random
from collections import OrderedDict, namedtuple
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from miniai.core import batch_size, default_device, did_you_mean, generator, map_tensors, set_seed, to_device

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
