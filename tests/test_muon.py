"MuonAdamW against PyTorch's Muon and AdamW, each on its part; either layout; fused and not; saved and taken up again"
import copy, warnings
import pytest, torch
from miniai import muon, nn
from miniai.compile import CompileNote, compile_step
from miniai.muon import MuonAdamW, as_kernel, as_matrix
from miniai.schedule import turn

def net(layout=torch.contiguous_format):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 4, 1),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).to(memory_format=layout)

def batches(n=8):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 1, 7, 7, generator=g), torch.randint(0, 3, (12,), generator=g)) for _ in range(n)]

def train(model, opt, data):
    for x,y in data:
        nn.cross_entropy(model(x), y).backward()
        opt.step()
        model.zero_grad()
    return model

def kernels(model): return [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1]
def same(a, b, **tol):
    for p,q in zip(a.parameters(), b.parameters(), strict=True): torch.testing.assert_close(p.contiguous(), q.contiguous(), **tol)

@pytest.mark.parametrize('shape', [(3, 4), (3, 4, 2), (3, 4, 2, 5), (3, 4, 1, 1), (2, 3, 2, 2, 2)])
def test_to_a_matrix_and_back(shape):
    x = torch.randn(shape)
    assert as_matrix(x).shape == (shape[0], x[0].numel()) and as_kernel(as_matrix(x), x).equal(x)

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('wd', [0., .1])
def test_each_part_steps_as_pytorchs(layout, fused, wd):
    ours, theirs, data = net(layout), net(), batches()
    train(ours, MuonAdamW(ours.parameters(), .05, .01, weight_decay=wd, fused=fused), data)
    ks = kernels(theirs)
    matrices = [torch.nn.Parameter(as_matrix(p.detach()).clone()) for p in ks]
    one = torch.optim.Muon(matrices, lr=.05, weight_decay=wd, momentum=.6, ns_steps=3)
    two = torch.optim.AdamW([p for p in theirs.parameters() if not any(p is k for k in ks)], lr=.01, betas=(.9, .99), weight_decay=wd)
    class Both:
        def step(self):
            for p,m in zip(ks, matrices, strict=True): m.grad = as_matrix(p.grad)
            one.step(), two.step()
            for p,m in zip(ks, matrices, strict=True): p.data.copy_(as_kernel(m.data, p))
    train(theirs, Both(), data)
    same(ours, theirs, rtol=8e-3, atol=8e-3)                      # directions are made in bfloat16, from sums in another order
    with pytest.raises(AssertionError): same(ours, net(), rtol=8e-3, atol=8e-3)

def test_fused_is_the_same_to_rounding():
    one, two, data = net(), net(), batches(3)
    train(one, MuonAdamW(one.parameters()), data)
    train(two, MuonAdamW(two.parameters(), fused=True), data)
    same(one, two, rtol=1e-2, atol=1e-2)

@pytest.mark.parametrize('fused', [False, True])
def test_saved_and_taken_up_again(fused):
    data, straight, broken = batches(), net(), net()
    opt = MuonAdamW(straight.parameters(), fused=fused)
    train(straight, opt, data)
    opt = MuonAdamW(broken.parameters(), fused=fused)
    train(broken, opt, data[:5])
    saved, weights, again = copy.deepcopy(opt.state_dict()), copy.deepcopy(broken.state_dict()), net()
    again.load_state_dict(weights)
    opt = MuonAdamW(again.parameters(), lr=9., adam_lr=9., fused=fused)
    opt.load_state_dict(saved)
    assert [g['lr'] for g in opt.param_groups] == [.1, 4e-3]
    train(again, opt, data[5:])
    same(again, straight, rtol=0, atol=0)

def test_a_rate_for_each_part():
    model = net()
    opt = MuonAdamW(model.parameters())
    turn(opt, .5, lr=[lambda t: 0., lambda t: t])
    before = copy.deepcopy(model)
    train(model, opt, batches(1))
    moved = [not p.equal(q) for p,q in zip(model.parameters(), before.parameters(), strict=True)]
    assert moved == [not (p.ndim == 4 and p.shape[1] > 1) for p in model.parameters()]

def test_a_step_does_not_depend_on_the_size_of_the_gradient():
    p, g = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    group = dict(ns_coefficients=(3.4445, -4.7750, 2.0315), ns_steps=3)
    torch.testing.assert_close(muon.orthogonal_kernel(g, p, {}, group), muon.orthogonal_kernel(1024*g, p, {}, group), rtol=.02, atol=.02)

def test_a_missing_gradient_is_passed_over():
    model = net()
    for fused in (False, True):
        opt = MuonAdamW(model.parameters(), fused=fused)
        kernels(model)[0].grad = torch.ones_like(kernels(model)[0])
        before = copy.deepcopy(model)
        opt.step()
        assert sum(not p.equal(q) for p,q in zip(model.parameters(), before.parameters(), strict=True)) == 1

def test_for_nets_that_have_both():
    with pytest.raises(ValueError, match='0 kernels and 2 other'): MuonAdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match='1 kernels and 0 other'): MuonAdamW(nn.Conv2d(2, 2, 3, bias=False).parameters())

def test_a_step_that_is_replayed_is_the_same_step():
    ends = []
    for make in (None, compile_step):
        model = net()
        opt = MuonAdamW(model.parameters(), fused=True)
        if make is None: train(model, opt, batches())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter('error', CompileNote)                  # that it could not be recorded
                step = make(model, torch.nn.functional.cross_entropy, opt, 'replay')
                for x,y in batches(): step(x, y)
            assert 'the whole step, for 1 kind of batch' in repr(step)
        ends.append(model)
    same(*ends, rtol=1e-2, atol=1e-2)
    with pytest.raises(AssertionError): same(ends[1], net(), rtol=1e-2, atol=1e-2)
