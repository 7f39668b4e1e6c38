"SGD against torch.optim.SGD to the last bit; schedules against their definitions."
import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from miniai.optim import SGD, cosine, one_cycle

def start(dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=gen, dtype=dtype).requires_grad_() for s in [(4, 3), (3,), ()]]

def rosenbrock(ps): return sum(((1-p)**2 + .1*(p.roll(1, 0) - p**2 if p.ndim else p)**2).sum() for p in ps)
def bowl(ps): return sum(((p-i)**2).sum()*10**i for i,p in enumerate(ps))

def run(opt, ps, objective, steps):
    for _ in range(steps):
        objective(ps).backward()
        opt.step()
        opt.zero_grad()

def same(a, b):
    for x,y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)

@settings(max_examples=40, deadline=None)
@given(st.sampled_from([rosenbrock, bowl]), st.sampled_from([torch.float64, torch.float32]), st.floats(0, .02),
       st.sampled_from([0., .5, .9]), st.sampled_from([0., .01, .3]))
def test_a_hundred_steps_equal_pytorchs_to_the_bit(objective, dtype, lr, momentum, weight_decay):
    ours, theirs, kw = start(dtype), start(dtype), dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
    run(SGD(ours, **kw), ours, objective, 100)
    run(torch.optim.SGD(theirs, **kw), theirs, objective, 100)
    same(ours, theirs)

def test_groups_with_settings_of_their_own_and_groups_added_later():
    results = []
    for cls in (SGD, torch.optim.SGD):
        ps = start()
        opt = cls([dict(params=ps[:1], lr=.003), dict(params=ps[1:2], weight_decay=.1)], lr=.01, momentum=.9)
        run(opt, ps, bowl, 5)
        opt.add_param_group(dict(params=ps[2:], momentum=0.))
        run(opt, ps, bowl, 5)
        results.append(ps)
    same(*results)

def test_a_parameter_without_gradient_is_left_alone_and_nan_is_not_hidden():
    results = []
    for cls in (SGD, torch.optim.SGD):
        ps = start()
        opt = cls(ps, lr=.1, momentum=.9)
        ps[0].grad, ps[1].grad = torch.zeros_like(ps[0]), torch.full_like(ps[1], float('nan'))
        opt.step()
        results.append(ps)
    same(*results)
    same(results[0][:1], start()[:1])
    same(results[0][2:], start()[2:])
    assert results[0][1].isnan().all()

@pytest.mark.parametrize('first, second', [(SGD, SGD), (SGD, torch.optim.SGD), (torch.optim.SGD, SGD)])
def test_a_run_goes_on_from_a_saved_state_to_the_bit(first, second):
    straight = start()
    run(torch.optim.SGD(straight, lr=.01, momentum=.9), straight, bowl, 10)
    ps = start()
    run(one := first(ps, lr=.01, momentum=.9), ps, bowl, 4)
    saved = copy.deepcopy(one.state_dict())
    two = second(ps, lr=.01, momentum=.9)
    saved['param_groups'] = two.state_dict()['param_groups']
    two.load_state_dict(saved)
    run(two, ps, bowl, 6)
    same(ps, straight)

def test_loading_takes_settings_over_and_copies_the_memory():
    ps = start()
    run(one := SGD(ps, lr=.01, momentum=.9), ps, bowl, 2)
    two = SGD(ps, lr=1.)
    two.load_state_dict(one.state_dict())
    assert two.param_groups[0]['lr'] == .01 and two.param_groups[0]['momentum'] == .9
    assert two.state[ps[0]]['momentum_buffer'] is not one.state[ps[0]]['momentum_buffer']

def test_zero_grad_forgets():
    ps = start()
    bowl(ps).backward()
    SGD(ps, lr=.1).zero_grad()
    assert all(p.grad is None for p in ps)

@pytest.mark.parametrize('make, said', [
    (lambda ps: SGD([], lr=.1), 'no parameters were given'),
    (lambda ps: SGD(ps, lr=-.1), 'from 0 up, it is -0.1'),
    (lambda ps: SGD([*ps, ps[0]], lr=.1), 'given twice'),
    (lambda ps: SGD([dict(params=ps, momentun=.9)], lr=.1), 'no setting momentun; there are lr, momentum, weight_decay'),
    (lambda ps: SGD(ps, lr=.1).load_state_dict(SGD(ps[:1], lr=.1).state_dict()), r'the saved groups have \[1\] parameters, these have \[3\]'),
])
def test_errors_show_the_next_move(make, said):
    with pytest.raises(ValueError, match=said): make(start())

def test_repr(): assert repr(SGD(start(), lr=.1)) == 'SGD(16 params in 3 tensors: lr=0.1, momentum=0, weight_decay=0)'

@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_cosine_stays_between_its_ends(a, b, t):
    s = cosine(a, b)
    assert s(0) == pytest.approx(a) and s(1) == pytest.approx(b)
    assert min(a, b)-1e-9 <= s(t) <= max(a, b)+1e-9

@given(st.floats(1e-4, 10), st.floats(.05, .95))
def test_one_cycle_rises_to_its_peak_and_falls(peak, warm):
    s = one_cycle(peak, warm)
    up, down = [s(warm*i/20) for i in range(21)], [s(warm + (1-warm)*i/20) for i in range(21)]
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert up[-1] == pytest.approx(peak) and up[0] == pytest.approx(peak/25) and down[-1] == pytest.approx(peak*1e-4)
