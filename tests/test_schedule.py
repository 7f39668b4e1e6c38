"Schedules against their definitions and against torch.optim.lr_scheduler; knobs are turned where they are."
import pytest, torch
from hypothesis import given, strategies as st
from torch.optim import lr_scheduler as theirs
from miniai.optim import SGD
from miniai.schedule import constant, cosine, exponential, follow, linear, one_cycle, one_cycle_momentum, steps, turn, warmup, wsd

N = 40

def seen(make, **kw):
    "The settings that PyTorch's scheduler makes, step by step"
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=.5, momentum=.9)
    sched, out = make(opt), []
    for _ in range(N):
        out.append((opt.param_groups[0]['lr'], opt.param_groups[0]['momentum']))
        opt.step(); sched.step()
    return out

def cosine_after_warmup(opt):
    up, down = theirs.LinearLR(opt, 1e-3, 1., total_iters=8), theirs.CosineAnnealingLR(opt, N-8)
    return theirs.SequentialLR(opt, [up, down], [8])

@pytest.mark.parametrize('make, ours', [
    (lambda o: theirs.ConstantLR(o, factor=1.), constant(.5)),
    (lambda o: theirs.LinearLR(o, 1., .1, total_iters=N), linear(.5, .05)),
    (lambda o: theirs.CosineAnnealingLR(o, N, eta_min=.01), cosine(.5, .01)),
    (lambda o: theirs.ExponentialLR(o, .9), exponential(.5, .5*.9**N)),
    (lambda o: theirs.MultiStepLR(o, [10, 30], .2), steps(.5, (10/N, 30/N), .2)),
    (lambda o: theirs.StepLR(o, 10, .5), steps(.5, (.25, .5, .75), .5)),
    (cosine_after_warmup, warmup(cosine(.5, 0), 8/N, 1e-3)),
    (lambda o: theirs.OneCycleLR(o, .5, total_steps=N+1, pct_start=11/(N+1), div_factor=25, final_div_factor=400), one_cycle(.5, 10/N)),
    (lambda o: theirs.LambdaLR(o, lambda i: min(1., i/4, (N-i)/10)), wsd(.5, 4/N, 10/N)),
], ids=['constant', 'linear', 'cosine', 'exponential', 'steps', 'equal steps', 'warm-up, cosine', 'one-cycle', 'warm-up, stable, decay'])
def test_the_values_are_pytorchs(make, ours):
    assert [lr for lr,_ in seen(make)] == pytest.approx([ours(i/N) for i in range(N)], rel=1e-10)

def test_one_cycle_of_momentum_is_pytorchs():
    both = seen(lambda o: theirs.OneCycleLR(o, .5, total_steps=N+1, pct_start=11/(N+1)))
    assert [m for _,m in both] == pytest.approx([one_cycle_momentum(warm=10/N)(i/N) for i in range(N)], rel=1e-10)

@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_from_end_to_end_and_never_outside(a, b, t):
    for s in (linear(a, b), cosine(a, b)):
        assert s(0) == pytest.approx(a) and s(1) == pytest.approx(b)
        assert min(a, b)-1e-9 <= s(t) <= max(a, b)+1e-9

@given(st.floats(1e-4, 10), st.floats(.05, .95))
def test_one_cycle_rises_to_its_peak_and_falls(peak, warm):
    s = one_cycle(peak, warm)
    up, down = [s(warm*i/20) for i in range(20)], [s(warm + (1-warm)*i/20) for i in range(21)]
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert down[0] == pytest.approx(peak) and up[0] == pytest.approx(peak/25) and down[-1] == pytest.approx(peak*1e-4)

@given(st.lists(st.floats(.01, 1), min_size=1, max_size=6), st.floats(0, 1))
def test_each_has_its_share_and_sees_all_of_its_own_time(shares, t):
    shares = [s/sum(shares) for s in shares]
    s = follow(*[(share, lambda u, i=i: (i, u)) for i,share in enumerate(shares)])
    i, u = s(t)
    assert 0 <= u <= 1 and sum(shares[:i]) + u*shares[i] == pytest.approx(t, abs=1e-9)
    assert s(1.)[0] == len(shares)-1 and s(1.)[1] == pytest.approx(1) and s(0.) == (0, 0)

def test_a_share_of_nothing_is_left_out(): assert wsd(1., warm=0.)(0.) == 1. and wsd(1., cool=0.)(1.) == 1. and one_cycle(1., warm=0.)(0.) == 1.

def two_groups(): return SGD([dict(params=[torch.zeros(1)]), dict(params=[torch.zeros(1)])], lr=.1)

def test_any_setting_of_any_group():
    for opt in (two_groups(), torch.optim.SGD([dict(params=[torch.zeros(1)]), dict(params=[torch.zeros(1)])], lr=.1)):
        turn(opt, .5, lr=[linear(0, 1), linear(0, 2)], momentum=linear(1, 0), weight_decay=constant(.3))
        assert [g['lr'] for g in opt.param_groups] == [.5, 1.] and all(g['momentum'] == .5 and g['weight_decay'] == .3 for g in opt.param_groups)

@pytest.mark.parametrize('make, said', [
    (lambda: turn(two_groups(), 0, beta=constant(1)), 'SGD has no setting beta; it has lr, momentum'),
    (lambda: turn(two_groups(), 0, lr=[constant(1)]), 'lr: 1 schedules for 2 groups'),
    (lambda: exponential(1, 0), 'no factor leads from 1 to 0'),
    (lambda: follow((.5, constant(1)), (.6, constant(1))), 'add up to 1, 0.5 [+] 0.6 is 1.1'),
    (lambda: warmup(constant(1), 1.5), 'add up to 1'),
])
def test_errors_show_the_next_move(make, said):
    with pytest.raises(ValueError, match=said): make()
