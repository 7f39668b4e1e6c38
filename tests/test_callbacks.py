"One audit for every callback of the package; and those that change numbers, together in all ways, on both engines."
import importlib, inspect, json, pkgutil
from itertools import product
from types import SimpleNamespace
import pytest, torch
import miniai, trackers
from miniai import nn, optim
from miniai.accel import FastCB
from miniai.callbacks import DeviceCB, InterruptCB, LogCB, MetricsCB, ProgressCB, RecordCB, SchedCB, ScheduleFreeCB
from miniai.checkpoint import Checkpoint, CheckpointCB, ResumeCB, fold, write_checkpoint
from miniai.data import Dataset
from miniai.distributed import DistributedCB
from miniai.faults import WatchCB
from miniai.hooks import ActivationStats, GradStats, NanGuardCB
from miniai.learner import EVENTS, VERBS, Callback, CompileCB, CancelFitException, Learner
from miniai.loader import DataLoader
from miniai.loggers import CSVLogCB, LivePlotCB, StopButtonCB, TensorBoardCB, TrackioCB, Tracker, WandbCB
from miniai.recipes import FlipTTA, SizesCB
from miniai.schedule import one_cycle
from miniai.training import AccumulateCB, AmpCB, ClipCB, EarlyStopCB, EMACB, HardCB, TimerCB

def rows(n, seed, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset((torch.randn(n, 1, 8, 8, generator=gen) + targ.view(-1, 1, 1, 1)/2).to(dtype), targ)

def new_dls(bs=16, dtype=torch.float32):
    return SimpleNamespace(train=DataLoader(rows(88, 0, dtype), bs, shuffle=True), valid=DataLoader(rows(40, 1, dtype), 32))

def new_model(t=nn, norm=True):
    torch.manual_seed(0)
    return t.Sequential(t.Conv2d(1, 4, 3, 2, 1, bias=False), *[t.BatchNorm2d(4)]*norm, t.ReLU(), t.Flatten(), t.Dropout(.2), t.Linear(64, 4))

def new_learner(*cbs, engine='torch', opt=None, **kw):
    return Learner(new_model(), new_dls(), opt_func=opt or (lambda ps, lr: optim.SGD(ps, lr=lr, momentum=.9)), cbs=cbs, engine=engine, **kw)

def weights(learn): return {k: x.detach().clone() for k,x in learn.model.state_dict().items()}
def same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k

# ---- the audit

MAKE = {          # how each is made in a folder; those that need company bring it
    'DeviceCB':        lambda tmp: [DeviceCB('cpu')],
    'MetricsCB':       lambda tmp: [MetricsCB()],
    'RecordCB':        lambda tmp: [RecordCB()],
    'SchedCB':         lambda tmp: [SchedCB(lr=one_cycle(.3))],
    'ScheduleFreeCB':  lambda tmp: [ScheduleFreeCB()],
    'ProgressCB':      lambda tmp: [ProgressCB((tmp/'out').open('a'))],
    'LogCB':           lambda tmp: [LogCB(tmp/'log.jsonl')],
    'InterruptCB':     lambda tmp: [InterruptCB()],
    'ActivationStats': lambda tmp: [ActivationStats()],
    'GradStats':       lambda tmp: [GradStats()],
    'NanGuardCB':      lambda tmp: [NanGuardCB(every=4)],
    'AccumulateCB':    lambda tmp: [AccumulateCB(4)],
    'AmpCB':           lambda tmp: [AmpCB('fp16', init_scale=2.**20, growth_interval=4)],
    'ClipCB':          lambda tmp: [ClipCB(norm=.05)],
    'EMACB':           lambda tmp: [EMACB(.9)],
    'HardCB':          lambda tmp: [HardCB((1, .5))],
    'FastCB':          lambda tmp: [FastCB('exact')],
    'EarlyStopCB':     lambda tmp: [EarlyStopCB(patience=2), MetricsCB()],
    'TimerCB':         lambda tmp: [TimerCB()],
    'CheckpointCB':    lambda tmp: [CheckpointCB(tmp/'own')],
    'CSVLogCB':        lambda tmp: [CSVLogCB(tmp/'log.csv')],
    'TensorBoardCB':   lambda tmp: [TensorBoardCB(tmp/'board', every=4)],
    'TrackioCB':       lambda tmp: [TrackioCB('project', every=4)],
    'WandbCB':         lambda tmp: [WandbCB('project', every=4)],
    'LivePlotCB':      lambda tmp: [LivePlotCB(show=lambda fig: None), MetricsCB(), RecordCB()],
    'StopButtonCB':    lambda tmp: [StopButtonCB()],
    'CompileCB':       lambda tmp: [CompileCB()],
    'SizesCB':         lambda tmp: [SizesCB((7,))],
    'FlipTTA':         lambda tmp: [FlipTTA()],
    'DistributedCB':   lambda tmp: [DistributedCB()],
    'WatchCB':         lambda tmp: [WatchCB(tmp)],
}
CHANGE = {'SchedCB', 'ScheduleFreeCB', 'AccumulateCB', 'AmpCB', 'ClipCB', 'HardCB', 'SizesCB'} # training becomes another with these, with no other
ROUNDS = {'FastCB', 'CompileCB'}                    # only that sums are in another order, or rounded elsewhere
ANYWHERE = {'MetricsCB', 'SchedCB', 'ScheduleFreeCB'}                          # whose place among the others does not matter, so that it is not stated
WITHIN = {'Tracker': 'the base of three', 'ServiceCB': 'the base of two of them', 'ResumeCB': 'made by `fit(resume=)`'}

def classes():
    "Every callback of the package that has a public name"
    found = set()
    for m in pkgutil.iter_modules(miniai.__path__):
        if m.name.startswith('_'): continue
        module = importlib.import_module(f'miniai.{m.name}')
        found |= {o for o in vars(module).values() if inspect.isclass(o) and issubclass(o, Callback) and o.__module__ == module.__name__}
    return {o.__name__: o for o in found if o is not Callback and not o.__name__.startswith('_')}

ALL = classes()

def opt_of(name): return (lambda ps, lr: optim.ScheduleFreeAdamW(ps, lr=.01)) if name == 'ScheduleFreeCB' else None

@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path_factory):
    monkeypatch.setenv('MINIAI_CACHE', str(tmp_path_factory.mktemp('cache')))
    return trackers.install(monkeypatch)

def test_the_audit_knows_every_callback(): assert MAKE.keys() | WITHIN.keys() == ALL.keys()

@pytest.mark.parametrize('name', sorted(ALL))
def test_events_are_called_with_the_learner_and_verbs_with_do_too(name):
    cls = ALL[name]
    acts = [k for k in dir(cls) if k.startswith(('before_', 'after_', 'cleanup_')) or k in VERBS]
    assert acts
    for k in acts:
        assert k in EVENTS or k in VERBS
        inspect.signature(getattr(cls, k)).bind('self', *(('learn', 'do') if k in VERBS else ('learn',)))

@pytest.mark.parametrize('name', sorted(ALL))
def test_order_is_stated_where_it_matters(name):
    stated = any('order' in vars(o) for o in ALL[name].__mro__ if o is not Callback)
    assert stated != (name in ANYWHERE)
    assert stated or not any(hasattr(ALL[name], v) for v in VERBS)

def test_those_that_stand_in_for_one_verb_stand_in_a_stated_line():
    for verb in VERBS:
        orders = [cls.order for cls in ALL.values() if hasattr(cls, verb)]
        assert len(set(orders)) == len(orders)

def test_the_line_is_accumulate_scale_clip_average_look():
    assert AccumulateCB.order < FastCB.order < AmpCB.order < ClipCB.order < EMACB.order < GradStats.order < TimerCB.order
    assert DeviceCB.order < MetricsCB.order < RecordCB.order < min(o.order for o in (ProgressCB, LogCB, CSVLogCB, Tracker, LivePlotCB)) < CheckpointCB.order
    assert CheckpointCB.order < min(InterruptCB.order, StopButtonCB.order, EarlyStopCB.order) < ResumeCB.order

@pytest.mark.parametrize('engine', ['torch', 'tape'])
@pytest.mark.parametrize('name', sorted(MAKE))
def test_works_on_either_engine_and_who_watches_changes_nothing(name, engine, tmp_path):
    def final(*cbs):
        learn = new_learner(*cbs, engine=engine, opt=opt_of(name))
        learn.fit(2)
        return weights(learn)
    with_it,without = final(*MAKE[name](tmp_path)),final()
    assert all(x.isfinite().all() for x in with_it.values())
    if name in ROUNDS: torch.testing.assert_close(with_it, without, rtol=1e-3, atol=1e-4)
    elif name not in CHANGE: same(with_it, without)
    else: assert any(not torch.equal(with_it[k], without[k]) for k in without)

class StopAt(Callback):
    "Ends the run after so many training batches, like a power cut that leaves the checkpoint"
    order = 200
    def __init__(self, n): self.n = n
    def after_batch(self, learn):
        self.n -= learn.training
        if not self.n: raise CancelFitException

@pytest.mark.parametrize('at', [3, 6, 8])          # in the first epoch, at its end, in the second
@pytest.mark.parametrize('engine', ['torch', 'tape'])
@pytest.mark.parametrize('name', sorted(MAKE.keys() - {'CheckpointCB'}))        # which is in every one of these runs
def test_a_run_that_was_broken_off_ends_as_if_it_had_not(name, engine, at, tmp_path):
    (tmp_path/'one').mkdir(), (tmp_path/'two').mkdir()
    whole = new_learner(*MAKE[name](tmp_path/'one'), engine=engine, opt=opt_of(name))
    whole.fit(3)
    broken = new_learner(*MAKE[name](tmp_path/'two'), CheckpointCB(tmp_path/'run', every=1), StopAt(at), engine=engine, opt=opt_of(name))
    broken.fit(3)
    again = new_learner(*MAKE[name](tmp_path/'two'), CheckpointCB(tmp_path/'run', every=1), engine=engine, opt=opt_of(name))
    again.fit(3, resume=tmp_path/'run')
    same(weights(again), weights(whole))
    assert again.steps == whole.steps
    def told(learn): return [{k: v for k,v in row.items() if k != 'seconds'} for row in learn.rows]
    assert told(again) == told(whole)
    if hasattr(whole, 'losses'): assert again.losses == whole.losses
    if name == 'LogCB': assert len((tmp_path/'two'/'log.jsonl').read_text().splitlines()) == 3

@pytest.mark.parametrize('name', sorted(MAKE))
def test_state_survives_json_and_safetensors(name, tmp_path):
    (tmp_path/'one').mkdir(), (tmp_path/'two').mkdir()
    first,*_ = cbs = MAKE[name](tmp_path/'one')
    states = []
    class Save(Callback):
        order = 150
        def after_batch(self, learn):
            if learn.epoch == 1 and learn.training and learn.iter == 2: states.append(fold(first.state_dict(), 'cb'))
    learn = new_learner(*cbs, opt=opt_of(name))
    learn.fit(2, cbs=Save())
    (plain, tensors), = states
    write_checkpoint(tmp_path/'checkpoint-1', dict(json.loads(json.dumps(dict(cb=plain)))), dict(cb=tensors))
    back = Checkpoint(tmp_path/'checkpoint-1').part('cb')
    fresh,*_ = others = MAKE[name](tmp_path/'two')
    seen,rows = [],learn.rows[:1]                                                          # those of the run that the state is of
    class Load(Callback):
        order = 150
        def before_train(self, learn):
            if not back: return
            fresh.load_state_dict(back)
            learn.rows += rows
            seen.append(fold(fresh.state_dict(), 'cb'))
    new_learner(*others, opt=opt_of(name)).fit(1, cbs=Load())
    assert bool(seen) == bool(back)
    for again,found in seen[:1]:
        if name == 'RecordCB': again['seconds'] = plain['seconds']                         # a clock
        if name == 'LogCB': again['size'] = plain['size']                                  # of a file
        assert again == plain
        same(found, tensors)

def test_a_state_is_needed_where_a_run_depends_on_it(tmp_path):
    "The test above could pass with empty states: these must not be empty"
    for name in ('AmpCB', 'EMACB', 'HardCB', 'EarlyStopCB', 'MetricsCB', 'RecordCB', 'LogCB'):
        first,*_ = cbs = MAKE[name](tmp_path)
        new_learner(*cbs).fit(1)
        assert first.state_dict(), name
    (between := AccumulateCB(4)).count = 1             # batches of a step that is to come; otherwise nothing hangs on it
    assert between.state_dict()['count'] == 1 and not AccumulateCB(4).state_dict()

# ---- the swap matrix: accumulate, clip, average, half precision, in all combinations

CHANGERS = {'accumulate': lambda: AccumulateCB(3), 'clip': lambda: ClipCB(norm=.3), 'ema': lambda: EMACB(.9), 'amp': lambda: AmpCB('bf16')}

def run_with(names, engine, t=nn, opt=optim.SGD, dtype=torch.float64):
    torch.manual_seed(1)
    cbs = [CHANGERS[k]() for k in names]
    learn = Learner(new_model(t).to(dtype), new_dls(dtype=dtype), opt_func=lambda ps, lr: opt(ps, lr=lr, momentum=.9), cbs=[MetricsCB(), RecordCB(), *cbs], engine=engine)
    learn.fit(2)
    ema = next((cb for cb in cbs if isinstance(cb, EMACB)), None)
    return torch.cat([x.double().flatten() for x in [*learn.model.parameters(), *(ema.average.values() if ema else ())]]).detach(),learn.rows

SUBSETS = [[k for k,on in zip(CHANGERS, ons, strict=True) if on] for ons in product([0, 1], repeat=len(CHANGERS))]

@pytest.mark.parametrize('names', SUBSETS, ids=lambda names: '+'.join(names) or 'none')
def test_all_combinations_are_equal_between_engines_modules_and_optimizers(names):
    half = 'amp' in names
    dtype,tol = (torch.float32, 2e-2) if half else (torch.float64, 1e-10)
    want,rows = run_with(names, 'torch', torch.nn, torch.optim.SGD, dtype)
    for engine,t,opt in product(('torch', 'tape'), (nn, torch.nn), (optim.SGD, torch.optim.SGD)):
        got,other = run_with(names, engine, t, opt, dtype)
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)
        assert other[-1]['valid_loss'] == pytest.approx(rows[-1]['valid_loss'], rel=tol)

def test_each_of_them_changes_something():
    plain,rows = run_with([], 'torch')
    for name in ('accumulate', 'clip'): assert (run_with([name], 'torch')[0] - plain).abs().max() > 1e-3
    assert abs(run_with(['ema'], 'torch')[1][-1]['valid_loss'] - rows[-1]['valid_loss']) > 1e-3
    assert (run_with(['amp'], 'torch', dtype=torch.float32)[0] - plain).abs().max() > 1e-5

class Broken(Exception): "What somebody's callback raises"

class BreakAt(Callback):
    def __init__(self, event, order): self.event,self.order = event,order
    def __getattr__(self, name):
        if name != self.__dict__.get('event'): raise AttributeError(name)
        def broken(learn): raise Broken(name)
        return broken

@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('name', sorted(MAKE))
def test_an_error_of_another_callback_is_the_one_that_is_raised(name, event, tmp_path):
    learn = new_learner(*MAKE[name](tmp_path), BreakAt(event, -10_000), opt=opt_of(name))
    with pytest.raises(Broken): learn.fit(1)

def test_all_are_told_to_clean_up_though_one_fails():
    class Tidy(Callback):
        order,told = 1,0
        def cleanup_epoch(self, learn): self.told += 1
    with pytest.raises(Broken): new_learner(BreakAt('cleanup_epoch', 0), tidy := Tidy()).fit(1)
    assert tidy.told == 1
