"Optimizers against torch.optim to the last bit, or against their definition; fused against one by one; saved here and loaded there."
import copy, io, itertools, pickle
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch.testing._internal.common_optimizers import optim_db
from miniai import nn, optim
from miniai.optim import SGD, Adam, AdamW, Lion, Muon, ScheduleFreeAdamW, clip_grad_norm_, clip_grad_value_

TORCHS = 'SGD', 'RMSprop', 'Adam', 'AdamW', 'Adagrad', 'Muon'
FUSED = {'SGD': dict(momentum=.9), 'Adam': {}, 'AdamW': dict(amsgrad=True), 'Adagrad': dict(initial_accumulator_value=.1)}

def start(dtype=torch.float64, shapes=((4, 3), (3,), ())):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]

def rosenbrock(ps): return sum(((1-p)**2 + .1*(p.roll(1, 0) - p**2 if p.ndim else p)**2).sum() for p in ps)
def bowl(ps): return sum(((p-i)**2).sum()*10**i for i,p in enumerate(ps))
OBJECTIVES = pytest.mark.parametrize('objective', [rosenbrock, bowl], ids=lambda f: f.__name__)
DTYPES = pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['float64', 'float32'])

def run(opt, ps, objective, steps):
    for _ in range(steps):
        objective(ps).backward()
        opt.step()
        opt.zero_grad()
    return ps

def close(a, b, tol=0.):
    for x,y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=tol, atol=tol, equal_nan=True)

def pair(name): return getattr(optim, name), getattr(torch.optim, name)

# -- PyTorch's own test material, a hundred steps

SETTINGS = [(info.optim_cls.__name__, i.kwargs) for info in optim_db if info.optim_cls.__name__ in TORCHS for i in info.optim_inputs_func(device='cpu')]
MORE = [('SGD', dict(lr=.01, momentum=.9, nesterov=True, maximize=True)), ('SGD', dict(lr=0., momentum=.9)), ('AdamW', dict(lr=0.)),
        ('Adam', dict(betas=(0., .9), eps=1e-3)), ('RMSprop', dict(momentum=.9, centered=True)), ('Adagrad', dict(lr_decay=.1, maximize=True)),
        ('Muon', dict(nesterov=False, adjust_lr_fn='match_rms_adamw')), ('Muon', dict(adjust_lr_fn='original'))]

def test_every_optimizer_is_in_the_material(): assert {name for name,_ in SETTINGS} == set(TORCHS)

@DTYPES
@OBJECTIVES
@pytest.mark.parametrize('name, kw', SETTINGS+MORE, ids=lambda v: v if isinstance(v, str) else ','.join(map(str, v)) or 'default')
def test_a_hundred_steps_equal_pytorchs(name, kw, objective, dtype, tol):
    ours, theirs = pair(name)
    shapes = ((4, 3), (6, 6)) if name == 'Muon' else ((4, 3), (3,), ())
    if name == 'Muon': kw = {k: v.item() if isinstance(v, torch.Tensor) else v for k,v in kw.items()}     # PyTorch's would compute with it in float32
    a, b = start(dtype, shapes), start(dtype, shapes)
    climb = (lambda ps: -objective(ps)) if kw.get('maximize') else objective
    close(run(ours(a, **kw), a, climb, 100), run(theirs(b, foreach=False, **kw) if name != 'Muon' else theirs(b, **kw), b, climb, 100))
    assert all(p.isfinite().all() for p in a) or kw.get('lr') == .01       # a bowl of 100 is too steep for that
    if name in FUSED:
        fused = start(dtype, shapes)
        if all(p.isfinite().all() for p in a): close(run(ours(fused, fused=True, **kw), fused, climb, 100), b, tol)

@settings(max_examples=40, deadline=None)
@given(st.sampled_from([rosenbrock, bowl]), st.sampled_from([torch.float64, torch.float32]), st.floats(0, .02),
       st.sampled_from([0., .5, .9]), st.sampled_from([0., .01, .3]))
def test_sgd_equals_pytorchs_to_the_bit_whatever_its_settings(objective, dtype, lr, momentum, weight_decay):
    ours, theirs, kw = start(dtype), start(dtype), dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
    close(run(SGD(ours, **kw), ours, objective, 100), run(torch.optim.SGD(theirs, **kw), theirs, objective, 100))

@pytest.mark.parametrize('name, kw', FUSED.items())
def test_bfloat16_fused_is_plain_to_the_bit(name, kw):
    plain, fused = start(torch.bfloat16), start(torch.bfloat16)
    run(getattr(optim, name)(plain, lr=.001, **kw), plain, bowl, 5)
    run(getattr(optim, name)(fused, lr=.001, fused=True, **kw), fused, bowl, 5)
    close(plain, fused)
    assert any((p != q).any() for p,q in zip(plain, start(torch.bfloat16), strict=True))

# -- what PyTorch lacks: the definitions, written out entry by entry in Python numbers

def lists(ps): return [p.detach().flatten().tolist() for p in ps]

def by_definition(rule, ps, objective, steps):
    memory = [rule(p.detach().flatten().tolist()) for p in ps]
    for p in ps: p.requires_grad_()
    for t in range(1, steps+1):
        gs = torch.autograd.grad(objective(ps), ps)
        for p,g,m in zip(ps, gs, memory, strict=True): p.data = torch.tensor(m(g.flatten().tolist(), t), dtype=p.dtype).view_as(p)
    return ps

def lion(w, lr=.01, b1=.9, b2=.99, wd=.1):
    m = [0.]*len(w)
    def step(g, t):
        for i in range(len(w)):
            c = b1*m[i] + (1-b1)*g[i]
            w[i] -= lr*((c > 0) - (c < 0) + wd*w[i])
            m[i] = b2*m[i] + (1-b2)*g[i]
        return w
    return step

def lamb(w, lr=.01, b1=.9, b2=.999, eps=1e-6, wd=.1):
    m, v = [0.]*len(w), [0.]*len(w)
    def step(g, t):
        r = []
        for i in range(len(w)):
            m[i], v[i] = b1*m[i] + (1-b1)*g[i], b2*v[i] + (1-b2)*g[i]**2
            r.append(m[i]/(1-b1**t) / ((v[i]/(1-b2**t))**.5 + eps) + wd*w[i])
        length, size = sum(x*x for x in w)**.5, sum(x*x for x in r)**.5
        ratio = length/size if length and size else 1.
        for i in range(len(w)): w[i] -= lr*ratio*r[i]
        return w
    return step

def schedule_free(w, lr=.01, b1=.9, b2=.999, eps=1e-8, wd=.1):
    x, y, z, v, total = list(w), list(w), list(w), [0.]*len(w), [0.]
    def step(g, t):
        total[0] += lr**2
        c = lr**2/total[0]
        for i in range(len(w)):
            v[i] = b2*v[i] + (1-b2)*g[i]**2
            z[i] -= lr*(g[i]/((v[i]/(1-b2**t))**.5 + eps) + wd*y[i])
            x[i] = (1-c)*x[i] + c*z[i]
            y[i] = (1-b1)*z[i] + b1*x[i]
        step.average = x
        return y
    return step

@OBJECTIVES
@pytest.mark.parametrize('name, rule', [('Lion', lion), ('LAMB', lamb), ('ScheduleFreeAdamW', schedule_free)], ids=lambda v: v if isinstance(v, str) else '')
def test_a_hundred_steps_equal_the_definition(name, rule, objective):
    ours = start()
    run(getattr(optim, name)(ours, lr=.01, weight_decay=.1), ours, objective, 100)
    close(ours, by_definition(rule, start(), objective, 100), 1e-10)

def test_lamb_with_weights_or_gradients_of_zero():
    p, q = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    opt = optim.LAMB([p, q], lr=.1)
    p.grad, q.grad = torch.ones(3), torch.zeros(3)
    opt.step()
    close([p, q], [torch.full((3,), -.1), torch.ones(3)], 1e-4)

def test_schedule_free_shows_its_average_and_goes_on_as_if_nothing_had_been():
    ps, straight = start(), start()
    rules = [schedule_free(w) for w in lists(ps)]
    opt = ScheduleFreeAdamW(ps, lr=.01, weight_decay=.1)
    for t in range(1, 11):
        bowl(ps).backward()
        for rule,p in zip(rules, ps, strict=True): rule(p.grad.flatten().tolist(), t)
        opt.step(); opt.zero_grad()
        opt.eval(); opt.eval()
        close([p.flatten() for p in ps], [torch.tensor(r.average, dtype=torch.float64) for r in rules], 1e-12)
        if t == 5: opt.load_state_dict(copy.deepcopy(opt.state_dict()))         # saved while it is being evaluated
        with pytest.raises(RuntimeError, match=r'call opt.train\(\) before'): opt.step()
        opt.train()
    run(ScheduleFreeAdamW(straight, lr=.01, weight_decay=.1), straight, bowl, 10)
    close(ps, straight)

def test_orthogonalised_means_near_one():
    s = torch.linalg.svdvals(optim.newton_schulz(torch.randn(20, 50, generator=torch.Generator().manual_seed(0))).float())
    assert .6 < s.min() and s.max() < 1.3

# -- groups, missing, zero and NaN gradients, closures

BOTH = pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
EACH = pytest.mark.parametrize('name, fused', [(n, f) for n in TORCHS for f in (False, True) if n != 'Muon' and (n in FUSED or not f)])

def kinds(fused): return (dict(fused=True), dict(fused=True)) if fused else ({}, dict(foreach=False))      # ours, PyTorch's

@EACH
def test_groups_with_settings_of_their_own_and_groups_added_later(name, fused):
    results = []
    for cls, kw in zip(pair(name), kinds(fused), strict=True):
        ps = start()
        opt = cls([dict(params=ps[:1], lr=.003), dict(params=ps[1:2], weight_decay=.1)], lr=.01, **kw)
        run(opt, ps, bowl, 5)
        opt.add_param_group(dict(params=ps[2], weight_decay=.2))
        results.append(run(opt, ps, bowl, 5))
    close(*results)

@EACH
def test_parameters_come_and_go_as_their_gradients_do(name, fused):
    results = []
    for cls, kw in zip(pair(name), kinds(fused), strict=True):
        ps = start(shapes=((4, 3), (3,), (), (2, 2), (5,)))
        opt = cls(ps, lr=.01, **kw)
        for step in range(12):
            rosenbrock(ps).backward()
            for i,p in enumerate(ps):      # one never has any, one not at first, one sometimes not, one not any more
                if i == 0 or (i == 1 and step < 3) or (i == 2 and step % 4 == 2) or (i == 3 and step > 6): p.grad = None
            opt.step(); opt.zero_grad()
        results.append((ps, [opt.state[p]['step'].item() for p in ps if opt.state.get(p, {}).get('step', 0) > 0]))
    (a, steps), (b, want) = results
    close(a, b)
    assert steps == want
    close(a[:1], start()[:1])

@EACH
def test_zero_gradients_and_nan_are_not_hidden(name, fused):
    results = []
    for cls, kw in zip(pair(name), kinds(fused), strict=True):
        ps = start()
        opt = cls(ps, lr=.1, **kw)
        for _ in range(2):
            ps[0].grad, ps[1].grad = torch.zeros_like(ps[0]), torch.full_like(ps[1], float('nan'))
            opt.step()
        results.append(ps)
    close(*results)
    assert results[0][1].isnan().all() and results[0][0].isfinite().all()
    close(results[0][2:], start()[2:])

@BOTH
def test_a_closure_is_called_with_gradients_on_and_its_loss_comes_back(fused):
    ps, opt = start(), None
    opt = SGD(ps, lr=.01, fused=fused)
    def closure():
        opt.zero_grad()
        loss = bowl(ps)
        loss.backward()
        return loss
    before = bowl(ps).item()
    assert opt.step(closure).item() == before and bowl(ps) < before

@BOTH
def test_zero_grad_forgets_or_fills(fused):
    ps = start()
    opt = SGD(ps, lr=.1, fused=fused)
    bowl(ps).backward()
    opt.step()
    kept = [p.grad for p in ps]
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p,g in zip(ps, kept, strict=True))
    opt.zero_grad()
    assert all(p.grad is None for p in ps)

# -- saved here, loaded there

def net(mod=torch.nn):
    torch.manual_seed(0)
    return mod.Sequential(mod.Linear(6, 8), mod.ReLU(), mod.Linear(8, 3))

def batches(n, seed):
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 6, generator=gen), torch.randint(0, 3, (16,), generator=gen)) for _ in range(n)]

def train(model, opt, seed, n=5):
    for xb,yb in batches(n, seed):
        torch.nn.functional.cross_entropy(model(xb), yb).backward()
        opt.step(); opt.zero_grad()

def through_a_file(o):
    file = io.BytesIO()
    torch.save(o, file)
    file.seek(0)
    return torch.load(file)

HANDOVER = {'SGD': dict(momentum=.9, nesterov=True, weight_decay=.01), 'RMSprop': dict(momentum=.5, centered=True), 'Adam': dict(amsgrad=True), 'AdamW': {}, 'Adagrad': dict(lr_decay=.1), 'Muon': {}}

@pytest.mark.parametrize('name', HANDOVER)
@pytest.mark.parametrize('owners', ['oto', 'tot', 'oot', 'oo'])
def test_saved_with_ours_trained_in_pytorch_and_back_lands_on_the_same_numbers(name, owners):
    ours, torchs = pair(name)
    def params(model): return [p for p in model.parameters() if p.ndim == 2 or name != 'Muon']
    straight = net()
    opt = torchs(params(straight), lr=.02, **HANDOVER[name])
    for leg in range(len(owners)): train(straight, opt, leg)
    saved = None
    for leg,owner in enumerate(owners):
        model = net(nn if owner == 'o' else torch.nn)          # the module is handed over as well
        opt = (ours if owner == 'o' else torchs)(params(model), lr=9.)
        if saved:
            model.load_state_dict(saved['model'])
            opt.load_state_dict(saved['opt'])
        else: opt = (ours if owner == 'o' else torchs)(params(model), lr=.02, **HANDOVER[name])
        train(model, opt, leg)
        saved = through_a_file(dict(model=dict(model.state_dict()), opt=opt.state_dict()))
    close(list(model.parameters()), list(straight.parameters()))

@pytest.mark.parametrize('name', FUSED)
def test_fused_goes_on_from_pytorchs_fused_and_back(name):
    ours, torchs = pair(name)
    straight, model = net(), net()
    opt = torchs(straight.parameters(), lr=.02, fused=True)
    for leg in range(4): train(straight, opt, leg)
    one = ours(model.parameters(), lr=.02, fused=True)
    train(model, one, 0)
    two = torchs(model.parameters(), lr=.02, fused=True)
    two.load_state_dict({**through_a_file(one.state_dict()), 'param_groups': two.state_dict()['param_groups']})
    train(model, two, 1)
    three = ours(model.parameters(), lr=.02)            # plain takes over from fused ...
    three.load_state_dict(two.state_dict())
    train(model, three, 2)
    one.load_state_dict(three.state_dict())             # ... and fused from plain
    train(model, one, 3)
    close(list(model.parameters()), list(straight.parameters()), 1e-6 if name != 'Adagrad' else 1e-3)

def test_loading_takes_settings_over_and_copies_the_memory():
    ps = start()
    run(one := SGD(ps, lr=.01, momentum=.9), ps, bowl, 2)
    two = SGD(ps, lr=1.)
    two.load_state_dict(one.state_dict())
    assert two.param_groups[0]['lr'] == .01 and two.param_groups[0]['momentum'] == .9
    assert two.state[ps[0]]['momentum_buffer'] is not one.state[ps[0]]['momentum_buffer']

@BOTH
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
def test_a_copy_of_model_and_optimizer_goes_its_own_way(copied, fused):
    model = net()
    opt = AdamW(model.parameters(), lr=.02, fused=fused)
    train(model, opt, 0)
    twin, twin_opt = copied((model, opt))
    before = copy.deepcopy(model.state_dict())
    train(twin, twin_opt, 1)
    close(model.state_dict().values(), before.values())
    train(model, opt, 1)
    close(list(model.parameters()), list(twin.parameters()), 1e-7)

# -- fused: nobody notices

def fused_pair(make, steps=3, cls=AdamW, **kw):
    "The same model trained plain and fused, so far"
    out = []
    for fused in (False, True):
        model = make()
        opt = cls(model.parameters(), lr=.02, fused=fused, **kw)
        for i in range(steps): train(model, opt, i, 1)
        out.append((model, opt))
    return out

def together(pairs, seed, tol=1e-6):
    for model,opt in pairs: train(model, opt, seed, 2)
    close([p.contiguous() for p in pairs[0][0].parameters()], [p.contiguous() for p in pairs[1][0].parameters()], tol)

def prepared(opt): return [o for plan in opt._plans.values() for o in plan.lists]

def test_lists_are_made_once_and_again_when_something_has_changed():
    (model, opt), = fused_pair(net)[1:]
    before = prepared(opt)
    train(model, opt, 4)
    assert all(a is b for a,b in zip(prepared(opt), before, strict=True)) and len(before) == 1
    assert len(opt.state) == 4                                         # who has seen it may change it, but has not
    train(model, opt, 5)
    assert prepared(opt)[0] is before[0]
    opt.state[model[0].bias]['exp_avg'] = torch.zeros(8)
    train(model, opt, 6)
    assert prepared(opt)[0] is not before[0]

def test_parameters_stay_where_they_lie_and_gradients_what_they_are():
    model = net()
    places, shapes = [(id(p), p.data_ptr()) for p in model.parameters()], {k: v.shape for k,v in model.state_dict().items()}
    train(model, AdamW(model.parameters(), fused=True), 0)
    assert places == [(id(p), p.data_ptr()) for p in model.parameters()] and shapes == {k: v.shape for k,v in model.state_dict().items()}
    assert all(p.is_leaf and p.requires_grad and p.grad is None and p.is_contiguous() for p in model.parameters())

@pytest.mark.parametrize('name, kw', FUSED.items())
def test_large_and_small_parameters_are_stepped_with_all_threads_and_with_one(name, kw, monkeypatch):
    cls, seen, threads = getattr(optim, name), [], torch.get_num_threads()
    monkeypatch.setattr(cls, 'kernel', staticmethod(lambda these, *args, kernel=cls.kernel: (seen.append((len(these.ps), torch.get_num_threads())), kernel(these, *args))))
    torch.set_num_threads(3)
    try:
        a, b = (start(torch.float32, ((4, 3), (optim._SMALL,), (optim._SMALL+1,), ())) for _ in range(2))
        run(cls(a, lr=.01, fused=True, **kw), a, rosenbrock, 3)
        assert seen == [(3, 1), (1, 3)]*3 and torch.get_num_threads() == 3
        close(a, run(getattr(torch.optim, name)(b, lr=.01, fused=True, **kw), b, rosenbrock, 3))
        def fails(*args): raise ZeroDivisionError
        monkeypatch.setattr(cls, 'kernel', staticmethod(fails))
        with pytest.raises(ZeroDivisionError): run(cls(a, fused=True), a, bowl, 1)
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(threads)

def test_there_is_nothing_fused_without_a_kernel():
    class Own(optim.Optimizer): pieces = optim.descend,
    with pytest.raises(ValueError, match='Own: there is no kernel for it; leave out fused=True'): Own(start(), fused=True, lr=.1)

def test_a_checkpoint_holds_what_it_held(tmp_path):
    sizes = []
    for _,opt in fused_pair(net):
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        sizes.append(file.tell())
        save_file({f'{i}.{k}': v for i,s in opt.state_dict()['state'].items() for k,v in s.items() if k != 'step'}, tmp_path/'opt.safetensors')
        sizes.append((tmp_path/'opt.safetensors').stat().st_size)
    assert sizes[2] <= sizes[0] and sizes[3] == sizes[1]

def test_a_checkpoint_loaded_into_a_model_is_what_it_trains_on():
    pairs = fused_pair(net)
    state = copy.deepcopy(net().state_dict())
    for model,_ in pairs: model.load_state_dict(state)
    together(pairs, 9)

@pytest.mark.parametrize('change', [
    lambda m, o: m.double().float(), lambda m, o: setattr(m[0].weight, 'data', m[0].weight.data*2), lambda m, o: setattr(m[0].weight, 'data', m[0].weight.data[:, [1, 0, 2, 3, 4, 5]]),
    lambda m, o: o.state.clear(), lambda m, o: o.state[m[0].bias].update(exp_avg=torch.ones(8)), lambda m, o: o.state.pop(m[2].weight),
    lambda m, o: o.state[m[0].bias]['exp_avg'].zero_(), lambda m, o: setattr(o, 'state', type(o.state)(dict)), lambda m, o: o.load_state_dict(o.state_dict()),
    lambda m, o: m[0].bias.requires_grad_(False), lambda m, o: o.param_groups[0].update(amsgrad=True), lambda m, o: m.share_memory(),
], ids=['to dtype', 'data replaced', 'data permuted', 'state cleared', 'memory replaced', 'memory of one dropped', 'memory zeroed', 'state replaced', 'reloaded', 'frozen', 'amsgrad on', 'shared'])
def test_what_changes_between_two_steps_is_noticed(change):
    pairs = fused_pair(net)
    for model,opt in pairs: change(model, opt)
    together(pairs, 5)
    together(pairs, 6)

@BOTH
def test_the_memory_follows_its_parameter_to_another_type(fused):
    model = net()
    opt = AdamW(model.parameters(), lr=.02, fused=fused)
    train(model, opt, 0)
    model.double()
    for xb,yb in batches(3, 1):
        torch.nn.functional.cross_entropy(model(xb.double()), yb).backward()
        opt.step(); opt.zero_grad()
    assert all(v.dtype == torch.float64 for s in opt.state.values() for k,v in s.items() if k != 'step')

def conv():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Unflatten(1, (6, 1, 1)), torch.nn.Conv2d(6, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 60, 3, padding=1),
                               torch.nn.Conv2d(60, 60, 3, padding=1), torch.nn.Conv2d(60, 3, 3, padding=1), torch.nn.Flatten())

@pytest.mark.parametrize('when', ['before', 'after'])
def test_channels_last_stays_and_is_right(when):
    def last(): return conv().to(memory_format=torch.channels_last)
    pairs = fused_pair(last if when == 'before' else conv)
    if when == 'after':
        for model,_ in pairs: model.to(memory_format=torch.channels_last)
    together(pairs, 7, 1e-5)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in pairs[1][0].parameters() if p.ndim == 4)
    for model,opt in pairs:       # memory that was saved contiguous, and gradients in another layout
        saved = opt.state_dict()
        for s in saved['state'].values(): s.update({k: v.contiguous() for k,v in s.items()})
        opt.load_state_dict(saved)
        for p in model.parameters(): p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape).contiguous()
        opt.step(); opt.zero_grad()
    together(pairs, 8, 1e-5)

def test_parameters_that_share_one_memory_stay_in_it():
    whole = torch.randn(10, generator=torch.Generator().manual_seed(0))
    ps = [torch.nn.Parameter(t) for t in whole.split([4, 6])]
    run(AdamW(ps, lr=.1, fused=True), ps, rosenbrock, 3)
    assert torch.equal(whole, torch.cat(ps))

def test_shared_between_modules_and_strided_parameters_train_fused():
    def tied():
        model = net()
        model[0].weight = model.tied = torch.nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12)[:, ::2])    # not dense
        return model
    together(fused_pair(tied), 3)

def test_a_graph_from_before_the_step_is_refused_as_ever():
    for fused in (False, True):
        ps = start()
        opt = SGD(ps, lr=.1, fused=fused)
        run(opt, ps, bowl, 2)
        early = rosenbrock(ps)
        run(opt, ps, bowl, 1)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): early.backward()

def test_types_are_mixed():
    results = []
    for fused in (False, True):
        ps = [*start(torch.float64), *start(torch.float32), *start(torch.bfloat16)]
        results.append(run(AdamW(ps, lr=.01, fused=fused), ps, rosenbrock, 5))
    close(*results, 1e-2)
    close(results[0][:3], results[1][:3], 1e-12)

def test_parameters_swapped_in_the_groups_are_stepped():
    ps, new = start(), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = AdamW(ps, lr=.1, fused=True)
    run(opt, ps, rosenbrock, 2)
    opt.param_groups[0]['params'][0] = new
    opt.state.pop(ps[0])
    before = ps[0].detach().clone()
    new.grad = torch.ones_like(new)
    opt.step()
    assert torch.equal(ps[0], before) and (new != 1).all()

# -- clipping

@pytest.mark.parametrize('norm_type', [1., 2., float('inf')])
@pytest.mark.parametrize('max_norm', [.1, 1e3])
def test_clipping_equals_pytorchs_to_the_bit(norm_type, max_norm):
    a, b = start(), start()
    for ps in (a, b): bowl(ps).backward()
    ours, want = clip_grad_norm_(a, max_norm, norm_type), torch.nn.utils.clip_grad_norm_(b, max_norm, norm_type)
    close([ours, *(p.grad for p in a)], [want, *(p.grad for p in b)])
    clip_grad_value_(a, .01); torch.nn.utils.clip_grad_value_(b, .01)
    close([p.grad for p in a], [p.grad for p in b])

def test_a_norm_that_is_not_finite_is_told_when_asked():
    p = torch.zeros(2, requires_grad=True)
    assert clip_grad_norm_([p], 1.) == 0
    p.grad = torch.tensor([float('nan'), 1.])
    assert clip_grad_norm_(p, 1.).isnan()
    with pytest.raises(RuntimeError, match='the norm of 1 gradients is nan'): clip_grad_norm_(p, 1., error_if_nonfinite=True)

# -- errors

def sparse(fused):
    e = torch.nn.Embedding(5, 2, sparse=True)
    opt = SGD(e.parameters(), fused=fused)
    if fused:                              # lists were made already
        e.weight.grad = torch.ones(5, 2)
        opt.step()
        opt.zero_grad()
    e(torch.tensor([1])).sum().backward()
    opt.step()

@pytest.mark.parametrize('make, said', [
    (lambda ps: SGD([], lr=.1), 'no parameters were given'),
    (lambda ps: SGD(ps, lr=-.1), 'from 0 up, it is -0.1'),
    (lambda ps: SGD(ps, lr=float('nan')), 'from 0 up, it is nan'),
    (lambda ps: SGD(ps, momentum=-1), 'momentum is from 0 up, it is -1'),
    (lambda ps: SGD(ps, nesterov=True), 'nesterov needs momentum and no dampening'),
    (lambda ps: AdamW(ps, betas=(.9, 1.)), r'betas are from 0 to below 1, they are \(0.9, 1.0\)'),
    (lambda ps: SGD([*ps, ps[0]], lr=.1), 'given twice'),
    (lambda ps: SGD([ps[0]*2], lr=.1), r'a tensor \(4, 3\) is the result of MulBackward0, no parameter'),
    (lambda ps: SGD([torch.zeros(2, dtype=torch.complex64)], lr=.1), r'a parameter \(2,\) is complex'),
    (lambda ps: SGD([dict(params=ps, momentun=.9)], lr=.1), 'no setting momentun; there are lr, momentum, dampening, weight_decay'),
    (lambda ps: SGD(ps, lr=.1).load_state_dict(SGD(ps[:1], lr=.1).state_dict()), r'the saved groups have \[1\] parameters, these have \[3\]'),
    (lambda ps: Adam(ps).load_state_dict(torch.optim.AdamW(ps).state_dict()), 'weight decay in the saved settings is beside the gradient; load them into AdamW'),
    (lambda ps: AdamW(ps).load_state_dict(torch.optim.Adam(ps).state_dict()), 'load them into Adam'),
    (lambda ps: SGD(ps).load_state_dict(dict(state={0: dict(momentum_buffer=torch.zeros(2))}, param_groups=SGD(ps).state_dict()['param_groups'])), r'momentum_buffer \(2,\) is not for a parameter \(4, 3\)'),
    (lambda ps: Muon(ps), r'one is \(3,\); give the others to AdamW'),
    (lambda ps: Muon(ps[:1], adjust_lr_fn='arbitrary'), "it is 'arbitrary'"),
    (lambda ps: ScheduleFreeAdamW(ps, betas=(0., .9)), r'betas\[0\] is above 0'),
    (lambda ps: sparse(False), r'a parameter \(5, 2\) has a sparse gradient'),
    (lambda ps: sparse(True), r'SGD: a parameter \(5, 2\) has a sparse gradient'),
])
def test_errors_show_the_next_move(make, said):
    with pytest.raises(ValueError, match=said): make(start())

@pytest.mark.parametrize('make, said', [(lambda ps: SGD(ps[0]), 'this is one Tensor; put it in'), (lambda ps: SGD([('w', ps[0])]), 'a parameter is a tensor, this is tuple')])
def test_what_is_no_list_of_parameters(make, said):
    with pytest.raises(TypeError, match=said): make(start())

def test_repr():
    assert repr(Lion(start(), lr=.1)) == 'Lion(16 params in 3 tensors: lr=0.1, betas=(0.9, 0.99), weight_decay=0, maximize=False)'

def schedulers(opt):
    s = torch.optim.lr_scheduler
    yield s.StepLR(opt, 3, .5)
    yield s.CosineAnnealingWarmRestarts(opt, 4)
    yield s.OneCycleLR(opt, .3, total_steps=10)
    yield s.SequentialLR(opt, [s.LinearLR(opt, .1, total_iters=3), s.ExponentialLR(opt, .9)], [3])
    yield s.ReduceLROnPlateau(opt, patience=1)

@pytest.mark.parametrize('which', range(5))
@pytest.mark.parametrize('fused', [False, True])
def test_pytorchs_schedulers_turn_ours(which, fused):
    lrs = {}
    for owner, kw in ((optim, dict(fused=fused)), (torch.optim, {})):
        p = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        opt = owner.AdamW([p], lr=.1, **kw)
        sched = next(itertools.islice(schedulers(opt), which, None))
        lrs[owner] = []
        for _ in range(10):
            (p*p).sum().backward()
            opt.step(); opt.zero_grad()
            sched.step(1.) if which == 4 else sched.step()
            lrs[owner].append((opt.param_groups[0]['lr'], *opt.param_groups[0]['betas'], p.detach().sum().item()))
        copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    for a, b in zip(*lrs.values(), strict=True): assert a == pytest.approx(b, rel=1e-12)

def test_hooks_of_an_optimizer_act_as_pytorchs():
    said = {}
    for owner in (optim, torch.optim):
        p, seen = torch.nn.Parameter(torch.ones(3)), []
        opt = owner.SGD([p], lr=1.)
        opt.register_step_pre_hook(lambda o, args, kw, seen=seen, p=p: seen.append(('before', len(args), p.sum().item())))
        opt.register_step_post_hook(lambda o, args, kw, seen=seen, p=p: seen.append(('after', p.sum().item())))
        opt.register_state_dict_pre_hook(lambda o, seen=seen: seen.append('saving'))
        opt.register_state_dict_post_hook(lambda o, saved: {**saved, 'more': 1})
        opt.register_load_state_dict_pre_hook(lambda o, saved, seen=seen: seen.append(sorted(saved)))
        opt.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append('loaded'))
        p.grad = torch.ones(3)
        opt.step()
        opt.load_state_dict(opt.state_dict())
        said[owner] = seen
    assert said[optim] == said[torch.optim] and len(said[optim]) == 5

def test_a_rate_that_was_scheduled_is_known_again():
    p = torch.nn.Parameter(torch.ones(3))
    opt = optim.SGD([dict(params=[p], initial_lr=.1)], lr=.05)
    sched = torch.optim.lr_scheduler.StepLR(opt, 2, .5, last_epoch=4)
    other = optim.SGD([p], lr=1.)
    other.load_state_dict(opt.state_dict())
    assert sched.base_lrs == [.1] and other.param_groups[0]['initial_lr'] == .1 and 'initial_lr' not in repr(opt)
