"Initialisations against PyTorch's: one seed, the same numbers."
import pytest, torch
from miniai import init, nn

FILLS = {'uniform_': dict(a=-1., b=3.), 'normal_': dict(mean=2., std=.1), 'trunc_normal_': dict(mean=.3, std=.5, a=-1., b=1.), 'xavier_uniform_': dict(gain=2.), 'xavier_normal_': {},
         'kaiming_uniform_': dict(a=5**.5), 'kaiming_normal_': dict(mode='fan_out', nonlinearity='relu'), 'orthogonal_': dict(gain=.5)}

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(20, 30), (30, 20), (8, 4, 3, 3), (6, 2, 5), (1, 7)], ids=str)
@pytest.mark.parametrize('name', FILLS)
def test_one_seed_gives_pytorchs_numbers(name, shape, dtype):
    found = []
    for home in (init, torch.nn.init):
        w = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
        torch.manual_seed(3)
        assert getattr(home, name)(w, **FILLS[name]) is w and w.is_leaf
        getattr(home, name)(other := torch.empty(shape, dtype=dtype), **FILLS[name], generator=torch.Generator().manual_seed(4))
        found.append((w, other, torch.rand(1)))          # the generator is left where PyTorch leaves it
    torch.testing.assert_close(*found, rtol=0, atol=0)

def test_constants():
    w = torch.empty(3, 2)
    assert init.constant_(w, 2.).eq(2).all() and init.zeros_(w).eq(0).all() and init.ones_(w).eq(1).all()

@pytest.mark.parametrize('name', ['linear', 'conv2d', 'sigmoid', 'tanh', 'relu', 'selu', 'leaky_relu'])
def test_gains(name):
    assert init.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    assert init.calculate_gain('leaky_relu', .2) == torch.nn.init.calculate_gain('leaky_relu', .2)

@pytest.mark.parametrize('home', [nn, torch.nn], ids=['ours', 'theirs'])
def test_lsuv_brings_every_layer_to_deviation_one_and_leaves_no_trace(home):
    torch.manual_seed(0)
    m = home.Sequential(home.Conv2d(3, 8, 3), home.ReLU(), home.BatchNorm2d(8), home.Conv2d(8, 8, 3), home.Mish(), home.Flatten(), home.Linear(8*36, 20), home.Dropout(.5), home.Linear(20, 4))
    m[2].eval()
    buffers = [b.clone() for b in m.buffers()]
    x = torch.randn(64, 3, 10, 10)*3
    assert list(init.lsuv(m, x)) == ['0', '3', '6', '8']
    assert [k.training for k in m] == [True]*2 + [False] + [True]*6 and not any(k._forward_hooks for k in m)
    torch.testing.assert_close(list(m.buffers()), buffers)
    m.eval()
    for layer in m:
        x = layer(x)
        if isinstance(layer, (home.Conv2d, home.Linear)): assert abs(x.std().item()-1) < .1

@pytest.mark.parametrize('call, said', [
    (lambda: init.fans(torch.empty(3)),                                'has no inputs and outputs'),
    (lambda: init.orthogonal_(torch.empty(3)),                         'two dimensions or more'),
    (lambda: init.kaiming_normal_(torch.empty(3, 2), mode='fan_on'),   "mode is 'fan_on'"),
    (lambda: init.calculate_gain('rleu'),                              'did you mean relu'),
    (lambda: init.trunc_normal_(torch.empty(3), mean=9.),              'only 0% of a normal distribution'),
])
def test_errors_show_the_next_move(call, said):
    with pytest.raises(ValueError, match=said): call()
