"Callbacks that change the numbers: each against what it is meant to equal."
import math
from types import SimpleNamespace
import pytest, torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from miniai import nn, optim
from miniai.callbacks import MetricsCB, RecordCB
from miniai.data import Dataset
from miniai.hooks import Snapshot
from miniai.learner import Callback, CancelBatchException, CancelFitException, Learner
from miniai.loader import DataLoader
from miniai.training import AccumulateCB, AmpCB, ClipCB, EarlyStopCB, EMACB, HardCB, LRFind, TimerCB, smoothed, tokens

ENGINES = pytest.mark.parametrize('engine', ['torch', 'tape'])

def rows(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset(torch.randn(n, 8, generator=gen).double() + 2*torch.eye(4, 8)[targ].double(), targ)
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
def new_learner(*cbs, bs=16, n=100, model=None, opt=optim.SGD, **kw):
    dls = SimpleNamespace(train=DataLoader(rows(n), bs, shuffle=True), valid=DataLoader(rows(40, 1), 32))
    return Learner((model or mlp()).double(), dls, cbs=cbs, opt_func=lambda ps, lr: opt(ps, lr=lr, momentum=.9), **kw)
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def close(a, b, tol=1e-12): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

# ---- accumulate

@ENGINES
@pytest.mark.parametrize('bs, n', [(16, 1), (16, 2), (16, 3), (5, 4), (7, 100), (100, 3)])
def test_parts_equal_the_whole_also_where_the_last_window_is_short(bs, n, engine):
    whole,parts = new_learner(bs=bs*n, engine=engine),new_learner(AccumulateCB(n), bs=bs, engine=engine)
    for o in (whole, parts): o.fit(3)
    assert parts.steps == whole.steps == 3*math.ceil(100/(bs*n))
    close(weights(parts), weights(whole))

class Uneven:
    "Batches of these sizes"
    def __init__(self, ds, sizes, lengths=True):
        self.ds,self.sizes = ds,sizes
        if lengths: self.__class__ = type('Sized', (Uneven,), {'__len__': lambda self: len(sizes)})
    def __iter__(self):
        at = 0
        for n in self.sizes:
            yield self.ds[at:at+n]
            at += n

@ENGINES
@pytest.mark.parametrize('told', [True, False], ids=['sized', 'stream'])
def test_batches_of_different_sizes_and_loaders_without_a_length(told, engine):
    ds = rows(60)
    def run(sizes, *cbs):
        learn = Learner(mlp().double(), SimpleNamespace(train=Uneven(ds, sizes, told), valid=[]), cbs=cbs, engine=engine)
        learn.fit(2, valid=False)
        return weights(learn),learn.steps
    (a, m),(b, n) = run([3, 9, 1, 20, 2, 5, 13, 7], AccumulateCB(3)),run([13, 27, 20])
    assert m == n == 6
    close(a, b)

def test_a_batch_without_rows_counts_for_nothing():
    ds = rows(60)
    def run(sizes, *cbs):
        learn = Learner(mlp().double(), SimpleNamespace(train=Uneven(ds, sizes), valid=[]), cbs=cbs)
        learn.fit(1, valid=False)
        return weights(learn)
    close(run([20, 10, 30], AccumulateCB(2)), run([30, 30]))

def padded(n=24, l=10):
    gen = torch.Generator().manual_seed(0)
    x,targ = torch.randn(n, l, 8, generator=gen).double(),torch.randint(0, 4, (n, l), generator=gen)
    targ[torch.arange(l) >= torch.randint(1, l, (n, 1), generator=gen)] = -100
    targ[8:12] = -100                             # the third batch of four has no target at all
    return Dataset(x, targ)

class Scores(nn.Sequential):
    def forward(self, x): return super().forward(x).mT        # (n, c, l)

@ENGINES
@pytest.mark.parametrize('n', [2, 3, 4])
def test_tokens_weigh_parts_and_a_part_without_any_spoils_nothing(n, engine):
    def run(bs, *cbs):
        torch.manual_seed(0)
        dl = DataLoader(padded(), bs)
        learn = Learner(Scores(nn.Linear(8, 4)).double(), SimpleNamespace(train=dl, valid=dl), cbs=cbs, engine=engine)
        learn.fit(3, valid=False)
        return weights(learn)
    close(run(4, AccumulateCB(n, tokens())), run(4*n))
    assert (run(4, AccumulateCB(n)) - run(4*n)).abs().max() > 1e-4

def test_tokens_can_leave_out_the_first_of_each_row():
    learn = SimpleNamespace(targ=torch.tensor([[1, 2, -100], [3, 4, 5]]), spare=False)
    assert tokens()(learn) == 5 and tokens(shift=True)(learn) == 3 and tokens(ignore=1)(learn) == 5

def test_weights_of_ones_own():
    w = torch.tensor([1., 2., 3., 4.], dtype=torch.float64)
    def run(bs, *cbs):
        learn = new_learner(*cbs, bs=bs, n=96, loss_func=torch.nn.CrossEntropyLoss(w))
        learn.fit(2, valid=False)
        return weights(learn)
    close(run(16, AccumulateCB(3, lambda learn: w[learn.targ].sum())), run(48))

@ENGINES
@pytest.mark.parametrize('opt', [optim.SGD, torch.optim.SGD, lambda ps, **kw: optim.SGD(ps, fused=True, **kw)], ids=['ours', 'torch', 'fused'])
def test_accumulation_with_any_optimizer(opt, engine):
    whole,parts = new_learner(bs=48, opt=opt, engine=engine),new_learner(AccumulateCB(3), opt=opt, engine=engine)
    for o in (whole, parts): o.fit(2)
    close(weights(parts), weights(whole))

def test_a_cancelled_last_batch_leaves_no_gradient_behind_and_its_window_is_used():
    class Skip(Callback):
        order = -5
        def before_batch(self, learn):
            if learn.training and learn.iter == 6: raise CancelBatchException
    learn = new_learner(AccumulateCB(4), Skip())            # 7 batches, the last one never comes
    learn.fit(1, valid=False)
    assert learn.steps == 2 and all(p.grad is None for p in learn.model.parameters())

def test_a_run_that_is_stopped_in_a_window_leaves_no_gradient_behind():
    class Stop(Callback):
        def after_batch(self, learn):
            if learn.iter == 1: raise CancelFitException
    learn = new_learner(AccumulateCB(4), Stop())
    learn.fit(1, valid=False)
    assert learn.steps == 0 and all(p.grad is None for p in learn.model.parameters())

def test_accumulate_says_what_is_wrong():
    with pytest.raises(ValueError, match='from 1 up, it is 0'): AccumulateCB(0)

# ---- clip

@ENGINES
def test_clipping_by_norm_and_value_is_pytorchs(engine):
    for cb,theirs in ((ClipCB(norm=.2), lambda ps: torch.nn.utils.clip_grad_norm_(ps, .2)), (ClipCB(value=.01), lambda ps: torch.nn.utils.clip_grad_value_(ps, .01))):
        class Theirs(Callback):
            def after_backward(self, learn): self.clip(list(learn.model.parameters()))
        other = Theirs()
        other.clip = theirs
        a,b = new_learner(cb, engine=engine),new_learner(other)
        a.fit(2); b.fit(2)
        close(weights(a), weights(b), 1e-9)

def test_clip_wants_one_limit_above_zero():
    for kw in ({}, dict(norm=1., value=1.)):
        with pytest.raises(ValueError, match='norm= or value='): ClipCB(**kw)
    with pytest.raises(ValueError, match='above 0'): ClipCB(norm=0.)

# ---- the average

def with_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

@ENGINES
def test_the_average_is_pytorchs_buffers_included(engine):
    class Theirs(Callback):
        def before_fit(self, learn):
            self.m = AveragedModel(learn.model, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True)
            self.m.update_parameters(learn.model)
        def after_step(self, learn): self.m.update_parameters(learn.model)
    ours,theirs = EMACB(.9, warm=False),Theirs()
    new_learner(ours, theirs, model=with_norm(), engine=engine).fit(2)
    for k,x in theirs.m.module.state_dict().items():
        if x.is_floating_point(): close(ours.average[k], x, 1e-9)
    assert ours.average['1.num_batches_tracked'] == 14

def test_warm_up_of_the_decay():
    class Keep(Callback):
        def before_fit(self, learn): self.all = [weights(learn)]
        def after_step(self, learn): self.all.append(weights(learn))
    ema,keep = EMACB(.5),Keep()
    learn = new_learner(ema, keep)
    learn.fit(2)
    want = keep.all[0]
    for t,w in enumerate(keep.all[1:]):
        d = min(.5, (1+t)/(10+t))
        want = d*want + (1-d)*w
    close(torch.cat([x.flatten() for x in ema.average.values()]), want, 1e-9)

def test_validation_sees_the_average_and_training_never_does():
    seen = []
    class See(Callback):
        order = 200
        def before_batch(self, learn): seen.append((learn.training, weights(learn)))
    ema = EMACB(.9)
    learn,plain = new_learner(ema, See()),new_learner()
    for o in (learn, plain): o.fit(2)
    close(weights(learn), weights(plain), 0)
    average = torch.cat([x.flatten() for x in ema.average.values()])
    assert torch.equal([w for training,w in seen if not training][-1], average)
    assert not any(torch.equal(w, average) for training,w in seen if training)

def test_a_fault_in_validation_brings_the_weights_back():
    class Fails(Callback):
        def before_batch(self, learn):
            if not learn.training: raise ZeroDivisionError
    learn,plain = new_learner(EMACB(.9), Fails()),new_learner()
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    plain.fit(1)
    assert torch.equal(weights(learn), weights(plain))

def test_the_averaged_model_for_a_while():
    ema = EMACB(.9)
    learn = new_learner(ema)
    learn.fit(1)
    before = weights(learn)
    with ema.averaged(learn): assert not torch.equal(weights(learn), before)
    assert torch.equal(weights(learn), before)

def test_predictions_are_those_of_the_average():
    ema = EMACB(.9)
    learn = new_learner(ema)
    learn.fit(1)
    preds,_ = learn.get_preds()
    with ema.averaged(learn), torch.no_grad(): want = learn.model(rows(40, 1)[:][0])
    close(preds, want)

# ---- half precision

class Single(Callback):
    order = -5
    def before_batch(self, learn): learn.batch = learn.batch[0].float(),learn.batch[1]

def single(*cbs, **kw):
    learn = new_learner(Single(), *cbs, **kw)
    learn.model.float()
    return learn

@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_half_precision_is_near_single_on_both_engines_and_weights_stay_single(dtype):
    plain = single()
    plain.fit(2)
    found = []
    for engine in ('torch', 'tape'):
        learn = single(AmpCB(dtype), engine=engine)
        learn.fit(2)
        assert learn.preds.dtype == dict(bf16=torch.bfloat16, fp16=torch.float16)[dtype]
        assert all(p.dtype == torch.float32 for p in learn.model.parameters())
        found.append(weights(learn))
        torch.testing.assert_close(found[-1], weights(plain), rtol=.05, atol=.05)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)

@ENGINES
def test_a_scaled_loss_gives_the_gradient_of_the_loss(engine):
    "In float32 (nothing is cast where the operators are float32 in autocast): a scale that is a power of two changes no bit"
    class NoCast(AmpCB):
        def half(self): return torch.autocast(self.device, torch.float16, enabled=False)
    a,b = single(NoCast('fp16'), engine=engine),single(engine=engine)
    a.fit(2); b.fit(2)
    assert torch.equal(weights(a), weights(b)) and a.steps == b.steps

@ENGINES
def test_steps_that_overflow_are_left_out_whole(engine):
    ema,amp = EMACB(.9),AmpCB('fp16', init_scale=2.**20, growth_interval=5)
    learn = single(amp, ClipCB(norm=1.), ema, engine=engine)
    learn.fit(2)
    assert 0 < learn.steps < 14 and ema.t == learn.steps and weights(learn).isfinite().all()
    assert amp.scaler.get_scale() < 2.**20

def test_amp_says_what_there_is():
    with pytest.raises(ValueError, match="no 'bf16x'; did you mean bf16"): AmpCB('bf16x')

# ---- hard rows

class Orders(Callback):
    "The rows of every epoch, and the batches' row numbers as the data have them"
    order = 100
    def before_fit(self, learn): self.epochs = []
    def before_train(self, learn): self.epochs.append(learn.dl.batch_sampler.batches(learn.epoch).order)

@ENGINES
def test_hard_rows_are_those_of_a_loop_written_out(engine):
    learn = new_learner(HardCB((1, .5, .3)), orders := Orders(), engine=engine)
    learn.fit(4)
    model,ds = mlp().double(),rows(100)
    opt,last = torch.optim.SGD(model.parameters(), lr=learn.lr, momentum=.9),torch.full((100,), torch.inf)
    whole = DataLoader(ds, 16, shuffle=True).batch_sampler
    for epoch,n in enumerate((100, 50, 30, 30)):
        hard = set(last.argsort(descending=True)[:n].tolist())
        order = torch.tensor([i for i in whole.batches(epoch).order.tolist() if i in hard])
        assert orders.epochs[epoch].equal(order)
        for i in order.split(16):
            x,targ = ds[i]
            losses = torch.nn.functional.cross_entropy(model(x), targ, reduction='none')
            losses.mean().backward()
            opt.step(), opt.zero_grad()
            last[i] = losses.detach().float()
    close(weights(learn), torch.cat([p.detach().flatten() for p in model.parameters()]))

@pytest.mark.parametrize('compile', [False, 'replay'])
def test_every_row_of_a_batch_that_came_is_known(compile):
    class Skip(Callback):
        order = -5
        def before_batch(self, learn):
            if learn.training and learn.epoch == 0 and learn.iter in (1, 3): raise CancelBatchException
    learn = new_learner(HardCB((1, .5)), Skip(), orders := Orders(), compile=compile)
    learn.fit(2)
    first,second = orders.epochs
    missed = set(first[16:32].tolist() + first[48:64].tolist())          # never seen: they count as hardest
    assert missed < set(second.tolist())

def test_the_sampler_comes_back_also_after_a_fault():
    class Fails(Callback):
        def after_step(self, learn): raise ZeroDivisionError
    learn = new_learner(HardCB((1, .5)), Fails())
    sampler = learn.dls.train.batch_sampler.sampler
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert learn.dls.train.batch_sampler.sampler is sampler and len(learn.dls.train) == 7

def test_hard_rows_in_worker_processes_are_the_same():
    def run(**kw):
        dls = SimpleNamespace(train=DataLoader(rows(60), 16, shuffle=True, **kw), valid=[])
        learn = Learner(mlp().double(), dls, cbs=HardCB((1, .5)))
        learn.fit(3, valid=False)
        return weights(learn)
    assert run().equal(run(num_workers=2, context='thread', seed_rows=False))

def test_hard_rows_need_rows_that_have_numbers():
    theirs = torch.utils.data.DataLoader(rows(20), 4)
    for train in (theirs, [next(iter(theirs))]):
        learn = Learner(mlp().double(), SimpleNamespace(train=train, valid=[]), cbs=HardCB())
        with pytest.raises(ValueError, match='has no sampler with an order of rows'): learn.fit(1, valid=False)
    for keep in ((), (1, 0), (2,)):
        with pytest.raises(ValueError, match='each above 0 and up to 1'): HardCB(keep)

# ---- enough

@pytest.mark.parametrize('by, low, values, stops', [
    ('valid_loss', None, [3, 2, 2.5, 2.4, 2.3, 1], 4), ('valid_loss', None, [3, 2, 1, .5, .4, .3], None), ('valid_score', None, [1, 2, 1, 1, 1, 3], 4),
    ('error', None, [1, .5, .6, .7, .8, .9], 4), ('valid_score', True, [5, 4, 5, 5, 5, 3], 4)])
def test_early_stop_waits_for_patience_epochs(by, low, values, stops):
    class Give(Callback):
        order = 1
        def cleanup_valid(self, learn): learn.row[by] = values[learn.epoch]
    learn = new_learner(Give(), RecordCB(), EarlyStopCB(by, patience=3, low=low))
    learn.fit(len(values))
    assert learn.stopped == (stops is not None) and len(learn.rows) == (stops+1 if stops else len(values))

def test_what_is_hardly_better_is_not_better():
    class Give(Callback):
        order = 1
        def cleanup_valid(self, learn): learn.row['valid_loss'] = 1 - .001*learn.epoch
    learn = new_learner(Give(), EarlyStopCB(patience=2, least=.01))
    learn.fit(10)
    assert learn.epoch == 2

# ---- the finder

def test_the_finder_leaves_nothing_behind_also_in_a_run_that_has_begun():
    learn = new_learner(MetricsCB(), RecordCB(), EMACB(.9), AccumulateCB(2), model=with_norm())
    learn.fit(1)
    shot,known,dice = Snapshot(learn),dict(vars(learn)),torch.get_rng_state()
    learn.lr_find(steps=30)
    assert known == {k: v for k,v in vars(learn).items() if k in known} and torch.equal(torch.get_rng_state(), dice)
    for k,x in learn.model.state_dict().items(): assert torch.equal(x, shot.model[k])
    for a,b in zip(shot.cbs, learn.cbs, strict=True): assert a[0] is b
    plain = new_learner(MetricsCB(), RecordCB(), EMACB(.9), AccumulateCB(2), model=with_norm())
    plain.fit(1)
    for o in (learn, plain): o.fit(1)
    assert torch.equal(weights(learn), weights(plain))

@ENGINES
def test_the_finder_finds_a_rate_that_learns_and_ends_before_all_is_lost(engine):
    learn = new_learner(RecordCB(), MetricsCB(), engine=engine)
    found = learn.lr_find(lo=1e-5, hi=1e3)
    assert 1e-3 < found.lr < 10 and len(found.losses) < 100
    learn.fit(3, lr=found.lr)
    assert learn.rows[-1]['valid_loss'] < .8*learn.rows[0]['train_loss']

def test_the_finder_writes_no_log_and_a_fault_brings_everything_back():
    class Fails(Callback):
        def after_loss(self, learn): raise ZeroDivisionError
    learn = new_learner(Fails(), RecordCB())
    before = weights(learn)
    learn.lr_find(steps=5)                                   # it takes no part
    with pytest.raises(ZeroDivisionError): learn.lr_find(steps=5, keep=('Fails',))
    assert torch.equal(weights(learn), before) and len(learn.cbs) == 2

def test_the_suggestion_is_the_steepest_fall_before_the_lowest_point():
    lrs = [10**(i/10-5) for i in range(60)]
    losses = [2 - 1/(1+math.exp(-(i-30)/2)) + (0 if i < 45 else (i-45)**2/5) for i in range(60)]
    assert 25 <= lrs.index(LRFind(lrs, losses).lr) <= 42 and LRFind(lrs, losses).plot().axes
    with pytest.raises(ValueError, match='begin lower'): LRFind(lrs, [2**i for i in range(60)])
    assert smoothed([1., 1., 1.]) == pytest.approx([1., 1., 1.])

# ---- the timer

def test_the_timer_knows_where_time_goes():
    import time
    class Slow(Callback):
        def get_loss(self, learn, do): do(); time.sleep(.02)
        def after_step(self, learn): time.sleep(.02)
    timer = TimerCB()
    new_learner(timer, Slow()).fit(1)
    shares = timer.shares()
    assert timer.batches == 7 and timer.rows == 100 and sum(shares.values()) == pytest.approx(1)
    assert shares['callbacks and loop'] > .5 and shares['get_loss'] < .3      # a callback that stands in is not the verb
