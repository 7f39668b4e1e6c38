"The hand-made backward passes against PyTorch's, and against differences."
import pytest, torch
from hypothesis import given, settings, strategies as st
from miniai.backprop import CrossEntropy, Lin, Module, Net, Relu, add_grad, numerical_grad
from miniai.data import Dataset
from miniai.loader import DataLoader
from miniai.optim import SGD

def gen(seed=0): return torch.Generator().manual_seed(seed)
def normal(*size, seed=0): return torch.randn(*size, generator=gen(seed), dtype=torch.float64)

def new_net(*sizes):
    layers = []
    for i,(d_in,d_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [Lin(normal(d_out, d_in, seed=i), normal(d_out, seed=100+i)), Relu()]
    return Net(*layers[:-1], loss=CrossEntropy())

def torch_loss(net, x, targ, params):
    "The same network in PyTorch's words, a function of its parameters"
    params = iter(params)
    for layer in net.layers: x = x.relu() if isinstance(layer, Relu) else torch.nn.functional.linear(x, next(params), next(params))
    return torch.nn.functional.cross_entropy(x, targ)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 12), st.integers(0, 1000))
def test_any_chain_has_pytorchs_gradients(sizes, n, seed):
    net, x = new_net(*sizes), normal(n, sizes[0], seed=seed)
    targ = torch.randint(sizes[-1], (n,), generator=gen(seed))
    xs = [t.clone().requires_grad_() for t in [x, *net.parameters()]]
    loss = torch_loss(net, xs[0], targ, xs[1:])
    torch.testing.assert_close(net(x, targ), loss.detach(), rtol=1e-12, atol=1e-12)
    gx = net.backward()
    for ours, theirs in zip([gx, *(p.grad for p in net.parameters())], torch.autograd.grad(loss, xs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

def test_nothing_of_torch_autograd_is_needed():
    net, x = new_net(4, 5, 3), normal(6, 4)
    with torch.inference_mode():
        assert net(x.clone(), torch.tensor([0, 1, 2]*2)) > 0
        net.backward()
    assert all(p.grad is not None and not p.requires_grad for p in net.parameters())

def test_gradients_add_over_calls():
    net, x, targ = new_net(4, 5, 3), normal(6, 4), torch.tensor([0, 1, 2]*2)
    net(x, targ); net.backward()
    once = [p.grad.clone() for p in net.parameters()]
    net(x, targ); net.backward()
    for p, g in zip(net.parameters(), once, strict=True): torch.testing.assert_close(p.grad, 2*g)

def test_a_gradient_from_above_scales_all():
    net, x, targ = new_net(4, 5, 3), normal(6, 4), torch.tensor([0, 1, 2]*2)
    net(x, targ); one = net.backward()
    net(x, targ); torch.testing.assert_close(net.backward(torch.tensor(3.).double()), 3*one)

@pytest.mark.parametrize('misuse', ['before any call', 'twice'])
def test_going_back_without_a_call_is_refused(misuse):
    net = new_net(4, 3)
    if misuse == 'twice': net(normal(2, 4), torch.tensor([0, 1])); net.backward()
    with pytest.raises(RuntimeError, match='Net: nothing to go back through'): net.backward()

def test_a_layer_used_twice_in_one_pass_is_refused_not_wrong():
    relu = Relu()
    net = Net(relu, Lin(normal(4, 4), normal(4)), relu, loss=CrossEntropy())
    net(normal(2, 4), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match='Relu: nothing to go back through'): net.backward()

def test_cross_entropy_at_the_ends_of_float32():
    x = torch.tensor([[1e30, 0., -1e30], [-80., 80., 0.]])
    loss = CrossEntropy()
    torch.testing.assert_close(loss(x, torch.tensor([0, 1])), torch.tensor(0.), rtol=0, atol=1e-6)
    assert loss.backward().isfinite().all()

def test_the_judge_catches_a_rule_that_is_wrong_by_a_thousandth():
    class Wrong(Relu):
        def bwd(self, g, y, x): return super().bwd(g, y, x) * 1.001
    def error(layer, x=normal(3, 4)):
        layer(x)
        ours = layer.backward(torch.ones(3, 4).double())
        return (ours - numerical_grad(lambda x: x.relu().sum(), x)).abs().max()
    assert error(Relu()) < 1e-8 < 1e-4 < error(Wrong())

def test_numerical_grad_restores_its_argument():
    x = normal(3, 4)
    before = x.clone()
    torch.testing.assert_close(numerical_grad(lambda x: x.sin().sum(), x), x.cos(), rtol=1e-7, atol=1e-9)
    assert torch.equal(x, before)

def test_module_is_a_contract():
    class Square(Module):
        def forward(self, x): return x**2
        def bwd(self, g, y, x): return g*2*x
    f = Square()
    f(torch.tensor([3.]))
    assert f.backward().item() == 6 and f.parameters() == []

def test_add_grad_makes_then_adds():
    p = torch.zeros(2)
    add_grad(p, g := torch.ones(2)); add_grad(p, g)
    assert p.grad.tolist() == [2, 2] and g.tolist() == [1, 1]

def test_trains_with_our_loader_and_optimizer_as_pytorch_does():
    x, targ = normal(60, 4), torch.randint(3, (60,), generator=gen())
    dl = DataLoader(Dataset(x, targ), 16, shuffle=True)
    net = new_net(4, 8, 3)
    params = [p.clone().requires_grad_() for p in net.parameters()]
    opt, theirs = SGD(net.parameters(), lr=.1, momentum=.9), torch.optim.SGD(params, lr=.1, momentum=.9)
    for xb, yb in dl:
        ours = net(xb, yb); net.backward(); opt.step(); opt.zero_grad()
        loss = torch_loss(net, xb, yb, params); loss.backward(); theirs.step(); theirs.zero_grad()
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-12, atol=0)
