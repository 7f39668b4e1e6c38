"What goes on inside: hooks that go away, statistics that are right and change nothing, counts checked by hand and against PyTorch's, and every NaN found where it was made."
import math
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from miniai import nn
from miniai.autograd import Tape
from miniai.data import Dataset
from miniai.hooks import (ActivationStats, FindBad, GradStats, Hook, Hooks, NanGuardCB, Snapshot, describe, first_bad_gradient, illness, measure,
                          spread_out, summary)
from miniai.learner import Callback, Learner
from miniai.loader import DataLoader
from miniai.optim import SGD, AdamW
from miniai.training import AccumulateCB, AmpCB, ClipCB, EMACB

HOMES = dict(ours=nn, torchs=torch.nn)

def rows(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset(torch.randn(n, 8, generator=gen) + 2*torch.eye(4, 8)[targ], targ)
def new_dls(n=128, bs=16): return SimpleNamespace(train=DataLoader(rows(n), bs, shuffle=True), valid=DataLoader(rows(32, 1), bs))
def mlp(t=nn): return t.Sequential(t.Linear(8, 16), t.ReLU(), t.Linear(16, 4))
def new_learner(*cbs, model=None, **kw):
    torch.manual_seed(0)
    return Learner(model or mlp(), new_dls(), cbs=cbs, **kw)

# ---- hooks

@pytest.mark.parametrize('t', HOMES.values(), ids=HOMES)
@pytest.mark.parametrize('backward', [False, True])
def test_hooks_hear_and_are_gone_after_the_block_whatever_happens_in_it(t, backward):
    model,heard = mlp(t),[]
    def call(): model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    with pytest.raises(ZeroDivisionError), Hooks(model, lambda hook, m, a, b: heard.append(m), backward):
        call()
        assert heard == (list(model)[::-1] if backward else list(model))
        raise ZeroDivisionError
    call()
    assert len(heard) == 3

def test_a_hook_carries_what_it_saw_and_may_replace_the_output():
    m,x = nn.Linear(8, 4),torch.randn(3, 8)
    def double(hook, m, args, y): hook.seen = y; return 2*y
    with Hook(m, double) as hook: y = m(x)
    assert torch.equal(y, 2*hook.seen) and torch.equal(m(x), hook.seen)

def test_hooks_that_cannot_all_be_hung_are_not_hung_at_all():
    m = nn.Linear(8, 4)
    with pytest.raises(AttributeError): Hooks([m, None], print)
    assert not m._forward_hooks

# ---- statistics

@pytest.mark.parametrize('shape, axis', [((50, 7), 1), ((20, 5, 7), 2), ((6, 7, 5, 5), 1), ((3, 7, 2, 5, 5), 1)])
def test_describe_counts_units_on_the_right_axis(shape, axis):
    y = torch.randn(shape)
    y.select(axis, 2).zero_(); y.select(axis, 4).zero_()
    mean,std,dead,*counts = describe(y).tolist()
    assert dead == pytest.approx(2/7) and sum(counts) == y.numel()
    assert (mean, std) == pytest.approx((y.mean().item(), y.std(correction=0).item()), abs=1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_describe_takes_every_type_and_puts_what_is_far_into_the_last_bins(dtype):
    found = describe(torch.tensor([[-100., 0.], [100., 2.]], dtype=dtype), bins=4, span=(-4., 4.))
    assert found.dtype == torch.float32 and found[3:].tolist() == [1, 0, 1, 2]

def test_a_sample_is_spread_over_all_units_and_rows():
    y = torch.arange(64*128*32).view(64, 128, 32)
    some = spread_out(y, 2**12)
    assert len(some) <= 2**12*1.1 and len(set((some % 32).tolist())) == 32 and some.max() > .99*y.numel()

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_activation_stats_tell_what_the_layers_gave(engine):
    kept = []
    class Keep(Callback):
        def before_batch(self, learn): self.hook = Hook(learn.model[1], lambda hook, m, x, y: kept.append(y.detach().clone()) if learn.training else None)
        def cleanup_batch(self, learn): self.hook.remove()
    stats = ActivationStats(of=nn.ReLU)
    new_learner(stats, Keep(), engine=engine).fit(2)
    assert stats.means.shape == (16, 1) and stats.hists.shape == (16, 1, 40)
    torch.testing.assert_close(stats.means[:, 0], torch.stack([y.mean() for y in kept]))
    torch.testing.assert_close(stats.stds[:, 0], torch.stack([y.std(correction=0) for y in kept]))

def test_activation_stats_look_at_every_nth_batch_and_at_what_was_chosen():
    stats = ActivationStats(of=lambda m: isinstance(m, nn.Linear), every=4)
    new_learner(stats).fit(2)
    assert stats.table.shape == (4, 2, 43) and stats.names == ['0 Linear', '2 Linear']
    with pytest.raises(ValueError, match='no module of the model'): new_learner(ActivationStats(of=nn.Conv2d)).fit(1)

def test_hooks_of_statistics_are_gone_after_an_error():
    class Fails(Callback):
        def after_loss(self, learn): raise ZeroDivisionError
    learn = new_learner(ActivationStats(), Fails())
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert not any(m._forward_hooks for m in learn.model.modules())

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_grad_stats_are_those_of_the_step_that_is_made(engine):
    grads = GradStats()
    learn = new_learner(ClipCB(norm=.1), grads, engine=engine, lr=.5)
    learn.fit(1, valid=False)
    assert grads.norms.square().sum(1).sqrt().max() <= .1*(1+1e-5)           # clipped already
    start = torch.nn.Module.state_dict(new_learner().model)['0.weight']
    assert grads.ratios[0, 0] == pytest.approx(.5*grads.norms[0, 0].item()/start.norm().item(), rel=1e-4)

def test_pictures_are_drawn():
    stats,grads = ActivationStats(),GradStats()
    new_learner(stats, grads).fit(1)
    for fig in (stats.plot(), stats.plot_hists(), grads.plot()): assert fig.axes

# ---- summary

def theirs(model, *inputs):
    with FlopCounterMode(display=False) as counter: model(*inputs).sum().backward()
    return counter.get_total_flops()

CASES = {
    'mlp':         (lambda t: mlp(t), (5, 8), 2*5*(8*16 + 16*4)),
    'conv':        (lambda t: t.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 10), 2*2*8*10*10*3*9),
    'strided':     (lambda t: t.Sequential(t.Conv2d(3, 8, 3, 2, 1), t.ReLU(), t.Conv2d(8, 4, 1)), (2, 3, 10, 10), 2*2*5*5*(8*3*9 + 4*8)),
    'conv1d':      (lambda t: t.Conv1d(3, 6, 5), (2, 3, 20), 2*2*6*16*3*5),
    'transposed':  (lambda t: t.ConvTranspose2d(3, 6, 2, 2), (2, 3, 5, 5), 2*2*3*25*6*4),
}

@pytest.mark.parametrize('t', HOMES.values(), ids=HOMES)
@pytest.mark.parametrize('name', CASES)
def test_flops_are_those_of_the_hand_and_of_pytorchs_counter(name, t):
    make,shape,want = CASES[name]
    found = summary(make(t), torch.randn(shape))
    assert found.flops == want
    assert found.flops + found.back == theirs(make(t), torch.randn(shape))

def test_flops_of_groups_by_hand():
    "PyTorch's counter takes the backward of a convolution in groups for that of a whole one: here only the hand is right"
    found = summary(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)), torch.randn(2, 4, 6, 6))
    first,second = 2*2*8*36*4*9,2*2*8*36*2*9
    assert found.flops == first+second and found.back == first + 2*second

@pytest.mark.parametrize('t', HOMES.values(), ids=HOMES)
def test_flops_of_a_transformer_block(t):
    n,l,d = 4, 10, 16
    block,x = t.TransformerEncoderLayer(d, 4, 4*d, dropout=0., batch_first=True),torch.randn(n, l, d)
    forward = 2*n*l*(4*d*d + 2*l*d + 8*d*d)
    assert summary(block, x).flops == forward
    with sdpa_kernel(SDPBackend.MATH):
        found = summary(block, x)
        assert found.flops == forward and found.flops+found.back == theirs(block, x)

def test_flops_of_recurrence_by_hand():
    n,l,d,h = 3, 7, 5, 6
    assert summary(nn.LSTM(d, h, batch_first=True), torch.randn(n, l, d)).flops == 2*n*l*4*h*(d+h)

def test_frozen_layers_cost_no_backward():
    model = mlp()
    for p in model[0].parameters(): p.requires_grad_(False)
    found = summary(model, torch.randn(5, 8))
    assert (found.params, found.trained) == (8*16+16+16*4+4, 16*4+4)
    assert found.back == 2*5*16*4 and 'of them frozen' in repr(found)

def test_memory_is_what_the_engine_keeps_once():
    x = torch.randn(10, 8)
    assert summary(mlp(), x).kept == 10*16*4                                         # what ReLU gives; the second layer's input is that
    assert summary(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), x).kept == 2*10*16*4    # GELU keeps its input
    assert summary(nn.Sequential(nn.Linear(8, 16), nn.Dropout(.5)), x).kept == 10*16*4                   # the mask
    tied = nn.Linear(8, 8)
    found = summary(nn.Sequential(tied, nn.Tanh(), tied), x)
    assert found.params == 72 and found.rows[0][1] == 'Linear ×2' and sum(r[3] for r in found.rows) == 72

def test_nothing_of_a_summary_stays_behind():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(.5), nn.Linear(16, 4))
    before,dice = {k: x.clone() for k,x in model.state_dict().items()},torch.get_rng_state()
    model[0].weight.grad = grad = torch.ones(16, 8)
    summary(model, torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    for k,x in model.state_dict().items(): assert torch.equal(x, before[k])
    assert model[0].weight.grad is grad and model[3].weight.grad is None and torch.equal(torch.get_rng_state(), dice)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_a_summary_takes_learners_dictionaries_and_models_that_give_dictionaries():
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.m = nn.Linear(8, 4)
        def forward(self, x, labels=None): return dict(logits=self.m(x), loss=None)
    batch = dict(x=torch.randn(16, 8), labels=torch.zeros(16).long())
    assert summary(Named(), batch).flops == summary(Named(), dict(x=batch['x'])).flops == 2*16*8*4
    learn = Learner(Named(), SimpleNamespace(train=[batch], valid=[]))
    assert summary(learn).flops == 2*16*8*4
    assert summary(new_learner()).flops == 2*16*(8*16 + 16*4)
    with pytest.raises(ValueError, match='summary\\(model, x\\)'): summary(mlp())

def test_the_meter_knows_who_called():
    class Outside(nn.Module):
        def __init__(self): super().__init__(); self.a,self.w = nn.Linear(8, 8),torch.nn.Parameter(torch.randn(8, 3))
        def forward(self, x): return self.a(x) @ self.w
    meter = measure(Outside(), (torch.randn(5, 8),))
    assert dict(meter.flops) == {'a': 2*5*64, '': 2*5*8*3}

# ---- the guard

class Spoil(nn.Module):
    "`f(x)` where `bad(step)`, else x"
    def __init__(self, f, at): super().__init__(); self.f,self.at,self.seen = f,at,0
    def forward(self, x):
        if self.training: self.seen += 1
        return self.f(x) if self.training and self.seen-1 == self.at else x

class Once(Callback):
    "Batch `at` of the run is changed by `f`"
    order = -5
    def __init__(self, f, at): self.f,self.at = f,at
    def before_batch(self, learn):
        if learn.training and learn.epoch*8 + learn.iter == self.at: learn.batch = self.f(learn.batch[0].clone()),learn.batch[1]

def zero_row(x): x[3] = 0; return x
def nan_row(x): x[3, 2] = math.nan; return x
def huge(x): return x*1e30

class Log(nn.Module):
    def forward(self, x): return x.log_softmax(1).exp().log()
class Norm(nn.Module):
    def forward(self, x): return x/x.norm(dim=1, keepdim=True)
class Root(nn.Module):
    def forward(self, x): return (x*x).sum(1, keepdim=True).sqrt() + x
class Square(nn.Module):
    def forward(self, x): return (x*x)*(x*x)

def wrong(layer, *extra): return nn.Sequential(nn.Linear(8, 8, bias=False), layer, nn.Linear(8, 4), *extra)

FAULTS = {      # the model, what is done to the batch, and what must be named
    'a division by nothing':       (lambda: wrong(Norm()), zero_row, ['the loss is nan', 'NaN    first from aten.div.Tensor, module 1', 'division by 0']),
    'the slope of a root':         (lambda: wrong(Root()), zero_row, ['the weights after the step are not', 'way back through aten.sqrt.default, module 1', 'square root']),
    'a hole in the data':          (lambda: wrong(nn.ReLU()), nan_row, ['the loss is nan', 'born   in the batch itself', 'clean the data']),
    'too large':                   (lambda: wrong(Square()), huge, ['inf    first from aten.mul.Tensor, module 1']),
}

@pytest.mark.parametrize('every', [1, 5, 50])
@pytest.mark.parametrize('at', [0, 5, 11])
@pytest.mark.parametrize('engine', ['torch', 'tape'])
@pytest.mark.parametrize('fault', FAULTS)
def test_the_guard_names_the_operator_and_gives_back_the_weights_before_it(fault, engine, at, every):
    make,spoil,words = FAULTS[fault]
    class Weights(Callback):
        order = -20
        def __init__(self): self.seen = []
        def before_batch(self, learn):
            if learn.training: self.seen.append([x.detach().clone() for x in (*learn.model.parameters(), *(s['momentum_buffer'] for s in learn.opt.state.values()))])
    learn = new_learner(Once(spoil, at), NanGuardCB(every=every), seen := Weights(), model=make(), opt_func=lambda ps, lr: torch.optim.SGD(ps, lr=.01, momentum=.9), engine=engine)
    with pytest.raises(FloatingPointError) as error: learn.fit(3)
    for word in words: assert word in str(error.value), str(error.value)
    assert (learn.epoch, learn.iter) == divmod(at, 8) and f'epoch {at//8}, batch {at%8},' in str(error.value)
    now = [*learn.model.parameters(), *(s['momentum_buffer'] for s in learn.opt.state.values() if s)]
    for a,b in zip(now, seen.seen[at], strict=False): assert torch.equal(a, b)
    assert learn.steps == at

def test_the_guard_goes_back_through_accumulation_averages_and_dropout():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Dropout(.5), Norm(), nn.Linear(8, 4))
    class Blank(Callback):
        order = -5
        def before_batch(self, learn):
            if learn.training and learn.iter == 6: learn.batch = zero_row(learn.batch[0].clone()),learn.batch[1]
    learn = new_learner(Blank(), AccumulateCB(4), ema := EMACB(.9), NanGuardCB(), model=model)
    with pytest.raises(FloatingPointError, match='aten.div.Tensor, module 2'): learn.fit(1)
    assert learn.iter == 6 and learn.steps == 1 and ema.t == 1
    assert all(x.isfinite().all() for x in (*learn.model.parameters(), *ema.average.values()))

def test_overflows_that_the_scaler_leaves_out_are_no_fault():
    learn = new_learner(AmpCB('fp16', init_scale=2.**22), NanGuardCB(every=2))
    learn.fit(2)
    assert 0 < learn.steps < 16

def test_an_overflow_of_half_precision_is_told_as_one():
    class Big(nn.Module):
        def forward(self, x): return x*1e4
    learn = new_learner(AmpCB('fp16'), NanGuardCB(), model=nn.Sequential(nn.Linear(8, 8), Big(), Big(), nn.Linear(8, 4)))
    with pytest.raises(FloatingPointError, match='inf    first from aten.mul.Tensor, module [12]'): learn.fit(1)

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_weights_that_grow_beyond_all_bounds_are_told(engine):
    learn = new_learner(NanGuardCB(), lr=1e4, engine=engine)
    with pytest.raises(FloatingPointError) as error: learn.fit(30)
    assert 'weights have grown to' in str(error.value) and illness(list(learn.model.parameters())) == 0

def test_a_fault_that_does_not_come_again_is_told_so_and_the_weights_are_good():
    state = dict(left=1)
    def moody(x):
        state['left'] -= 1
        return x*math.nan if state['left'] == 0 else x
    learn = new_learner(NanGuardCB(), model=wrong(Spoil(moody, 3)))
    with pytest.raises(FloatingPointError, match='not when the last 8 batches were run again'): learn.fit(1)
    assert illness(list(learn.model.parameters())) == 0

def test_a_mask_of_infinities_is_no_fault_and_not_the_first_of_one():
    x = torch.randn(2, 5)
    with FindBad(mlp()) as found: (x.masked_fill(x > 0, -math.inf).softmax(1) / torch.zeros(2, 5)).sum()
    assert [str(op) for op,*_ in found.born.values()] == ['aten.div.Tensor'] or 2 in found.born and str(found.born[2][0]) == 'aten.div.Tensor'
    assert all('masked_fill' not in str(op) for op,*_ in found.born.values())

def test_the_way_back_is_searched_through_branches():
    a,b = torch.zeros(3, requires_grad=True),torch.ones(3, requires_grad=True)
    with Tape() as tape:
        h = a*b
        loss = h.exp().sum() + h.abs().pow(.5).sum()
    op,_,into,gave = first_bad_gradient(tape, loss)
    assert 'pow' in op and illness(into) == 0 and illness(gave)
    with Tape() as tape: loss = (a*b).exp().sum()
    assert first_bad_gradient(tape, loss) is None

@pytest.mark.parametrize('opt', [SGD, AdamW, torch.optim.AdamW])
def test_a_snapshot_brings_everything_back(opt):
    learn = new_learner(ema := EMACB(.9), opt_func=lambda ps, lr: opt(ps, lr=.01))
    learn.fit(1)
    shot,seen = Snapshot(learn),[]
    for _ in range(2):
        shot.restore(learn)
        for xb,yb in learn.dls.train.ds[:32], learn.dls.train.ds[32:64]:
            F.cross_entropy(F.dropout(learn.model(xb)), yb).backward()
            learn.step(); learn.zero_grad()
        seen.append(torch.cat([x.detach().flatten() for x in (*learn.model.parameters(), *ema.average.values())]).clone())
    assert torch.equal(*seen)
