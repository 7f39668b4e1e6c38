"""Compiled steps: the numbers of eager ones, whatever the model, the optimizer, the precision and the callbacks"""
import copy, subprocess, sys, warnings
import pytest, torch
import torch.nn.functional as F
from types import SimpleNamespace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from miniai import compile as comp, optim
from miniai.callbacks import MetricsCB, RecordCB, SchedCB
from miniai.compile import BACKENDS, CompileNote, compile_step, python, record, tidy
from miniai.hooks import NanGuardCB
from miniai.learner import Callback, CompileCB, Learner
from miniai.nn import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, ReLU, Sequential
from miniai.schedule import one_cycle
from miniai.training import AccumulateCB, AmpCB, ClipCB, EMACB

pytestmark = pytest.mark.filterwarnings('ignore::miniai.compile.CompileNote')

def make(dtype=torch.float64):
    torch.manual_seed(0)
    return Sequential(Conv2d(1, 4, 3, 2, bias=False), BatchNorm2d(4), ReLU(), Dropout(.2), Flatten(), Linear(36, 5)).to(dtype)

def batches(n=6, dtype=torch.float64, last=7):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(k, 1, 8, 8, generator=g, dtype=dtype), torch.randint(0, 5, (k,), generator=g)) for k in [16]*(n-1)+[last]]

def eager_step(net, loss_func, opt):
    def step(*batch):
        loss = loss_func(net(*batch[:-1]), batch[-1])
        loss.backward()
        opt.step(); opt.zero_grad()
        return loss.detach()
    return step

def curve(kind, opt_func, net=None, data=None, loss_func=F.cross_entropy, epochs=3, rates=()):
    net = make() if net is None else copy.deepcopy(net)
    opt = opt_func(net.parameters())
    step = eager_step(net, loss_func, opt) if kind == 'eager' else compile_step(net, loss_func, opt, kind)
    losses = []
    torch.manual_seed(5)
    for epoch in range(epochs):
        if rates: opt.param_groups[0]['lr'] = rates[epoch]
        losses += [step(*b) for b in data or batches()]
    return torch.stack(losses), net, step

def same(a, b, tol=1e-12): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

OPTS = dict(
    sgd=lambda ps: optim.SGD(ps, lr=.1), nesterov=lambda ps: optim.SGD(ps, lr=.1, momentum=.9, nesterov=True, weight_decay=.01),
    fused=lambda ps: optim.AdamW(ps, lr=.01, fused=True), adam=lambda ps: optim.Adam(ps, lr=.01, amsgrad=True),
    adagrad=lambda ps: optim.Adagrad(ps, lr=.01), rmsprop=lambda ps: optim.RMSprop(ps, lr=.01, centered=True, momentum=.9),
    lion=lambda ps: optim.Lion(ps, lr=.001), lamb=lambda ps: optim.LAMB(ps, lr=.01), free=lambda ps: optim.ScheduleFreeAdamW(ps, lr=.01),
    torch=lambda ps: torch.optim.AdamW(ps, lr=.01))

@pytest.mark.parametrize('name', OPTS)
def test_replay_is_eager_for_every_optimizer(name):
    a, net, _ = curve('eager', OPTS[name], rates=(.01, .003, 0.))
    b, twin, step = curve('replay', OPTS[name], rates=(.01, .003, 0.))
    same(a, b)
    assert step.compiled.whole == (name not in ('torch', 'free')) and len(step.compiled.programs) == 2
    for k,v in net.state_dict().items(): same(v, twin.state_dict()[k], 1e-8)

@pytest.mark.parametrize('name', ['nesterov', 'adam', 'torch'])
def test_inductor_is_eager(name):
    a, _, _ = curve('eager', OPTS[name], data=batches(last=16), rates=(.01, .003, 0.))
    b, _, step = curve('inductor', OPTS[name], data=batches(last=16), rates=(.01, .003, 0.))
    same(a, b)
    assert step.compiled.backend == 'inductor' and all(not isinstance(p, bool) for p in step.compiled.programs.values())

def test_the_compiler_still_overlooks_a_factor():
    "When this fails, PyTorch has mended it, and `spell_out_alpha` may go"
    def f(a, b, c): return (a@b).add(c, alpha=.5)
    a, b, c = torch.ones(4, 5), torch.ones(5, 3), torch.ones(4, 3)
    with torch.no_grad(): assert not torch.allclose(torch.compile(f)(a, b, c), f(a, b, c))

@pytest.mark.parametrize('backend', BACKENDS)
def test_curves_of_200_steps_in_float32(backend):
    net, data = make(torch.float32), batches(10, torch.float32, last=16)
    a, b = (curve(k, OPTS['fused'], net, data, epochs=20)[0] for k in ('eager', backend))
    same(a, b, 1e-4)

def test_groups_with_rates_of_their_own_and_frozen_parameters():
    def groups(net):
        net[0].weight.requires_grad_(False)
        return optim.AdamW([dict(params=net[1].parameters(), lr=.1), dict(params=net[-1].parameters(), lr=.01, weight_decay=0.)])
    ends = []
    for wrap in (eager_step, compile_step):
        net = make()
        opt = groups(net)
        step = wrap(net, F.cross_entropy, opt)
        torch.manual_seed(5)
        for i,b in enumerate(batches()):
            if i == 3: net[0].weight.requires_grad_(True)      # nobody steps it, but it has a gradient to be computed
            for g in opt.param_groups: g['lr'] *= .9
            step(*b)
        ends.append(net.state_dict())
    assert torch.equal(ends[1]['0.weight'], make()[0].weight)
    for k in ends[0]: same(ends[0][k], ends[1][k], 1e-10)

def test_a_setting_that_changes_is_noticed():
    "One-cycle moves the momentum too: then the optimizer steps by itself"
    ends = []
    for wrap in (eager_step, compile_step):
        net = make()
        opt = optim.SGD(net.parameters(), lr=.1, momentum=.9)
        step = wrap(net, F.cross_entropy, opt)
        torch.manual_seed(5)
        losses = []
        for i,b in enumerate(batches(12)):
            opt.param_groups[0]['momentum'] = .95 - .02*(i//4)
            losses.append(step(*b))
        ends.append(torch.stack(losses))
    same(*ends)
    assert not step.compiled.whole

def test_a_learnt_loss_and_shared_parameters():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        def forward(self, preds, targ): return F.cross_entropy(preds*self.scale, targ) + self.scale.square().sum()
    def model():
        torch.manual_seed(0)
        lin = Linear(5, 5)
        return Sequential(lin, ReLU(), lin).double()
    ends = []
    for wrap in (eager_step, compile_step):
        net, loss = model(), Loss()
        step = wrap(net, loss, optim.SGD([*net.parameters(), loss.scale], lr=.1))
        ends.append(torch.stack([step(torch.ones(3, 5, dtype=torch.float64)*i, torch.tensor([0, 1, 2])) for i in range(5)]))
    same(*ends)

# -- what cannot be recorded

def run_noted(net, n=3, **kwargs):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        step = compile_step(net, lambda p, t: p.square().mean(), optim.SGD(net.parameters(), lr=.01), **kwargs)
        for i in range(n): step(torch.randn(4, 3)+i, None)
    return step, [str(w.message) for w in seen if w.category is CompileNote]

class Decides(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.lin, self.how = torch.nn.Linear(3, 3), how
    def forward(self, x): return self.how(self.lin(x))

@pytest.mark.parametrize('how', [lambda x: x*2 if x.sum() > 0 else x, lambda x: x[x > 0], lambda x: x*x.max().item(),
                                 lambda x: x[x.argmax(1).nonzero().flatten()]])
def test_what_depends_on_the_numbers_is_done_as_always_and_the_place_is_told(how):
    net = Decides(how)
    twin = copy.deepcopy(net)
    torch.manual_seed(0)
    step, notes = run_noted(net)
    assert len(notes) == 1 and 'steps are done as always' in notes[0] and 'test_compile.py, line' in notes[0]
    torch.manual_seed(0)
    eager = eager_step(twin, lambda p, t: p.square().mean(), optim.SGD(twin.parameters(), lr=.01))
    for i in range(3): eager(torch.randn(4, 3)+i, None)
    for p,q in zip(net.parameters(), twin.parameters(), strict=True): assert torch.equal(p, q)

def test_recording_that_fails_leaves_no_trace():
    "Running statistics, chance and weights are as before"
    class Late(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.drop = torch.nn.BatchNorm1d(3), torch.nn.Dropout(.5)
        def forward(self, x):
            x = self.drop(self.bn(x))
            return x*2 if x.sum() > -1e9 else x
    net = Late()
    before = copy.deepcopy(net.state_dict())
    step = compile_step(net, lambda p, t: p.sum(), optim.AdamW(net.parameters(), lr=.1))
    torch.manual_seed(3)
    x = torch.randn(4, 3)
    state = torch.get_rng_state()
    assert step.compiled.program((x, None), [x, None]) is None
    assert torch.equal(state, torch.get_rng_state()) and not step.opt.state
    for k,v in before.items(): assert torch.equal(v, net.state_dict()[k])

def test_hooks_are_not_passed_over():
    net, seen = torch.nn.Linear(3, 3), []
    net.register_forward_hook(lambda *a: seen.append(1))
    _, notes = run_noted(net)
    assert len(seen) == 3 and 'module Linear has hooks' in notes[0]
    net = torch.nn.Linear(3, 3)
    net.weight.register_post_accumulate_grad_hook(lambda p: seen.append(2))
    _, notes = run_noted(net)
    assert seen.count(2) == 3 and 'parameter weight has hooks' in notes[0]

def test_another_shape_is_said_once_and_there_is_an_end_to_it(monkeypatch):
    monkeypatch.setattr(comp, 'MANY', 2)
    net = torch.nn.Linear(3, 3)
    step = compile_step(net, lambda p, t: p.square().mean(), optim.SGD(net.parameters(), lr=.01))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for n in (4, 5, 6, 7, 4, 5): step(torch.randn(n, 3), None)
    notes = [str(w.message) for w in seen if w.category is CompileNote]
    assert '(5, 3); recorded once more' in notes[0] and 'more than 2 kinds of batch' in notes[1] and len(notes) == 2
    assert sum(map(bool, step.compiled.programs.values())) == 2

def test_no_compiler_no_fusing(monkeypatch):
    from torch._inductor import cpp_builder
    def none(): raise RuntimeError('no compiler')
    monkeypatch.setattr(cpp_builder, 'get_cpp_compiler', none)
    step, notes = run_noted(torch.nn.Linear(3, 3), backend=True)
    assert step.compiled.backend == 'replay' and len(notes) == 1 and 'install g++' in notes[0] and step.compiled.programs

def test_an_unknown_backend():
    net = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match='no backend \'reply\'; did you mean replay'): compile_step(net, F.mse_loss, optim.SGD(net.parameters(), lr=.1), 'reply')

# -- programs

def test_a_program_spells_its_values():
    g = torch.Generator()
    def f():
        y = torch.full_like(x, float('inf')).clamp(max=3.)
        return [(x.to(torch.float64, memory_format=torch.contiguous_format)*y + torch.rand(2, generator=g)).split([1, 1])[1], x.sum((0,), dtype=torch.float64)]
    x = torch.randn(2)
    program = python(tidy(record(f, [x])))
    for a,b in zip((g.manual_seed(3), f())[1], (g.manual_seed(3), program(x))[1], strict=True): assert torch.equal(a, b)
    assert 'torch.float64' in program.source and 'inf' not in program.source

def test_values_go_after_their_last_use():
    x = torch.ones(1000, 1000)
    program = python(tidy(record(lambda: [((x+1)*2-3).sum()], [x])))
    assert program.source.count('del') == 4
    assert not any(d in program.source for d in ('detach', 'alias'))

# -- in the learner

def dls(n=6): return SimpleNamespace(train=batches(n), valid=batches(2))

class Scale(Callback):
    "A step that sees another loss than the model gave"
    order = 5
    def backward(self, learn, do):
        loss = learn.loss
        learn.loss = loss*2
        do()
        learn.loss = loss

CALLBACKS = dict(
    none=lambda: [], watched=lambda: [MetricsCB(), RecordCB()], clip=lambda: [ClipCB(norm=.5)], accumulate=lambda: [AccumulateCB(4)], ema=lambda: [EMACB(.9)],
    one_cycle=lambda: [SchedCB(lr=one_cycle(.05))], guard=lambda: [NanGuardCB()], scale=lambda: [Scale()],
    all=lambda: [AccumulateCB(2), ClipCB(norm=.5), EMACB(.9), MetricsCB(), SchedCB(lr=one_cycle(.05))])

def trained(name, engine='torch', **kwargs):
    learn = Learner(make(), dls(), F.cross_entropy, lr=.05, opt_func=lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True), cbs=CALLBACKS[name](), engine=engine, **kwargs)
    torch.manual_seed(5)
    learn.fit(3)
    return learn

@pytest.mark.parametrize('engine', ['torch', 'tape'])
@pytest.mark.parametrize('name', CALLBACKS)
def test_callbacks_have_their_way(name, engine):
    a, b = trained(name, engine), trained(name, engine, compile='replay')
    compiled = next(cb for cb in b.cbs if isinstance(cb, CompileCB)).compiled
    assert compiled.whole == (name in ('none', 'watched', 'one_cycle')) and all(compiled.programs.values()) and a.steps == b.steps
    for k,v in a.model.state_dict().items(): same(v, b.model.state_dict()[k], 1e-8)
    for r,s in zip(a.rows, b.rows, strict=True):
        assert {k: v for k,v in r.items() if k != 'seconds'} == pytest.approx({k: v for k,v in s.items() if k != 'seconds'}, rel=1e-9)

@pytest.mark.parametrize('kind', ['bf16', 'fp16'])
def test_half_precision(kind):
    ends = []
    for compile in (False, 'replay'):
        learn = Learner(make(torch.float32), SimpleNamespace(train=batches(6, torch.float32), valid=[]), F.cross_entropy, lr=.05, cbs=[AmpCB(kind), RecordCB()], compile=compile)
        torch.manual_seed(5)
        learn.fit(3)
        ends.append(torch.stack([p.detach().flatten() for p in learn.model.parameters() for p in [p.flatten()[:1]]]))
        if compile: assert all(next(cb for cb in learn.cbs if isinstance(cb, CompileCB)).compiled.programs.values())
    torch.testing.assert_close(*ends, rtol=2e-2, atol=2e-3)

def test_predictions_that_were_changed_under_way_are_refused():
    class Other(Callback):
        def after_predict(self, learn):
            if learn.training: learn.preds = learn.preds*2
    learn = Learner(make(), dls(), F.cross_entropy, cbs=Other(), compile='replay')
    with pytest.raises(RuntimeError, match='put another batch or other predictions in place'): learn.fit(1)

def test_a_model_that_gives_a_dictionary_with_its_loss():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(3, 2)
        def forward(self, x, labels):
            logits = self.lin(x)
            return dict(loss=F.cross_entropy(logits, labels), logits=logits)
    data = [dict(x=torch.randn(4, 3), labels=torch.tensor([0, 1, 1, 0])) for _ in range(4)]
    ends = []
    for compile in (False, 'replay'):
        torch.manual_seed(0)
        learn = Learner(Model(), SimpleNamespace(train=data, valid=data[:1]), cbs=[MetricsCB(), RecordCB()], compile=compile)
        learn.fit(2)
        ends.append(torch.stack(learn.losses) if torch.is_tensor(learn.losses[0]) else torch.tensor(learn.losses))
    same(*ends, 1e-6)

def test_a_fresh_process_finds_what_was_compiled(tmp_path):
    code = '''
import time, torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from miniai.compile import compile_step
from miniai.optim import SGD
torch.manual_seed(0)
net = torch.nn.Linear(6, 3)
step = compile_step(net, F.cross_entropy, SGD(net.parameters(), lr=.1), 'inductor')
for _ in range(3): step(torch.ones(4, 6), torch.tensor([0, 1, 2, 0]))
print(counters['inductor']['fxgraph_cache_hit'], counters['inductor']['fxgraph_cache_miss'])
'''
    import os
    env = {**os.environ, 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)}
    said = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env).stdout.split() for _ in range(2)]
    assert said == [['0', '1'], ['1', '0']]

# ---- CUDA graphs: on a card, and by a stand-in that holds to the same rules

class Notes(TorchDispatchMode):
    "Which operators were called, with which memory"
    def __init__(self):
        super().__init__()
        self.calls = []
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append((op, args, kwargs or {}, y := op(*args, **kwargs or {})))
        return y

def stand_in(f, inputs):
    "As `capture`: while notes are taken nothing is computed, and whoever starts again finds and leaves everything at the same addresses"
    kept, chance = [x.clone() for x in inputs], torch.get_rng_state()
    with Notes() as notes: outs = f(*inputs)
    for x,was in zip(inputs, kept, strict=True): x.copy_(was)
    torch.set_rng_state(chance)
    def replay():
        for op,args,kwargs,y in notes.calls:
            for old,new in zip(tree_leaves(y), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor): old.copy_(new)
    return replay, outs

@pytest.fixture
def card(monkeypatch):
    taken = []
    def capture(f, inputs):
        taken.append(f)
        return stand_in(f, inputs)
    monkeypatch.setattr(comp, 'on_card', lambda inputs: True)
    monkeypatch.setattr(comp, 'capture', capture)
    return taken

@pytest.mark.parametrize('name', ['sgd', 'nesterov', 'fused', 'torch'])
def test_captured_is_eager(name, card):
    a, net, _ = curve('eager', OPTS[name], rates=(.01, .003, 0.))
    b, twin, step = curve('replay', OPTS[name], rates=(.01, .003, 0.))
    same(a, b)
    assert len(card) == (name != 'torch')                   # the whole step only; the short batch came too seldom
    for k,v in net.state_dict().items(): same(v, twin.state_dict()[k], 1e-8)

def test_a_captured_loss_is_not_written_over_and_a_parameter_may_move(card):
    ends = []
    for kind in ('eager', 'replay'):
        net, data = make(), batches(8, last=16)
        opt = OPTS['sgd'](net.parameters())
        step = eager_step(net, F.cross_entropy, opt) if kind == 'eager' else compile_step(net, F.cross_entropy, opt)
        losses = []
        torch.manual_seed(5)
        for i,b in enumerate(data):
            if i == 6:
                for p in net.parameters(): p.data = p.data.clone()
            losses.append(step(*b))
        ends.append(losses)
    assert len(card) == 2
    same(torch.stack(ends[0]), torch.stack(ends[1]))

def test_a_card_that_refuses_is_passed_over(card, monkeypatch):
    def refuse(f, inputs): raise RuntimeError('operation not permitted when stream is capturing\nand much more')
    monkeypatch.setattr(comp, 'capture', refuse)
    a, *_ = curve('eager', OPTS['sgd'])
    with pytest.warns(CompileNote, match='as one graph .operation not permitted when stream is capturing.; its kernels are started one by one') as seen:
        b, *_ = curve('replay', OPTS['sgd'])
    same(a, b)
    assert sum('one graph' in str(w.message) for w in seen) == 1

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a card')
@pytest.mark.parametrize('name', ['sgd', 'nesterov', 'fused'])
def test_captured_is_eager_on_a_card(name):
    net, data = make().cuda(), [[x.cuda() for x in b] for b in batches()]
    (a, net, _), (b, twin, step) = (curve(kind, OPTS[name], net, data, rates=(.01, .003, 0.)) for kind in ('eager', 'replay'))
    same(a, b, 1e-6)                                        # the rate is a float32 there
    assert any(o and o.run.replay for o in step.compiled.programs.values())
    for k,v in net.state_dict().items(): same(v, twin.state_dict()[k], 1e-6)
