"Who listens to a run: metrics of any kind, files, trackers, a terminal, a pipe, a notebook, a plot, a button."
import csv, json, os, subprocess, sys
from types import SimpleNamespace
import nbformat, pytest, torch
import trackers
from conftest import ROOT
from miniai.callbacks import LogCB, MetricsCB, RecordCB, accuracy, plain
from miniai.checkpoint import CheckpointCB
from miniai.data import Dataset
from miniai.learner import Callback, CancelFitException, Learner
from miniai.loader import DataLoader
from miniai.loggers import CSVLogCB, LivePlotCB, StopButtonCB, TensorBoardCB, TrackioCB, WandbCB, fit_aside, need
from miniai.nn import Linear, ReLU, Sequential, cross_entropy
from miniai.training import tokens

def rows(n, seed):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset(torch.randn(n, 8, generator=gen) + 2*torch.eye(4, 8)[targ], targ)
def new_dls(): return SimpleNamespace(train=DataLoader(rows(100, 0), 16, shuffle=True), valid=DataLoader(rows(50, 1), 16))
def new_learner(*cbs, **kw):
    torch.manual_seed(0)
    return Learner(Sequential(Linear(8, 8), ReLU(), Linear(8, 4)), new_dls(), cbs=cbs, **kw)

class StopAt(Callback):
    order = 200
    def __init__(self, n): self.n = n
    def after_batch(self, learn):
        self.n -= learn.training
        if not self.n: raise CancelFitException

# ---- metrics

class Recall:
    "A metric as torchmetrics has them, by the protocol alone: the lowest recall, which is no mean over batches"
    def __init__(self): self.resets,self.reset_ = 0,self.reset
    def reset(self): self.right,self.all,self.resets = torch.zeros(4),torch.zeros(4),self.resets+1
    def update(self, preds, targ):
        assert not preds.requires_grad
        self.all   += torch.bincount(targ, minlength=4)
        self.right += torch.bincount(targ[preds.argmax(1) == targ], minlength=4)
    def compute(self): return (self.right/self.all).min()

class SavedRecall(Recall):
    def state_dict(self): return dict(right=self.right.clone(), all=self.all.clone())
    def load_state_dict(self, state): self.right,self.all = state['right'],state['all']

def recall(preds, targs): return min((preds[targs == c].argmax(1) == c).float().mean().item() for c in range(4))

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_an_object_is_told_of_every_batch_and_asked_once_a_pass(engine):
    metric = Recall()
    learn = new_learner(MetricsCB(accuracy=accuracy, recall=metric), RecordCB(), engine=engine)
    learn.fit(2)
    assert metric.resets == 4 and list(learn.rows[0]) == ['epoch', 'train_loss', 'train_accuracy', 'train_recall', 'valid_loss', 'valid_accuracy', 'valid_recall', 'seconds']
    assert learn.rows[-1]['valid_recall'] == pytest.approx(recall(*learn.get_preds()))

def test_metrics_of_a_broken_run_are_those_of_a_whole_one(tmp_path):
    def run(*cbs, **kw):
        learn = new_learner(MetricsCB(loss_again=lambda preds, targ: cross_entropy(preds, targ).item(), recall=SavedRecall()), RecordCB(), *cbs)
        learn.fit(2, **kw)
        return [{k: v for k,v in row.items() if k != 'seconds'} for row in learn.rows]
    whole = run()
    run(CheckpointCB(tmp_path, every=1), StopAt(4))
    assert run(CheckpointCB(tmp_path, every=1), resume=tmp_path) == whole
    assert whole[0]['train_loss_again'] == pytest.approx(whole[0]['train_loss'])

def test_results_of_any_form_become_plain_numbers():
    assert plain('f', torch.tensor(2.)) == {'f': 2.} and plain('f', 3) == {'f': 3}
    assert plain('f', torch.tensor([1., 2.])) == {'f_0': 1., 'f_1': 2.} and plain('f', dict(a=torch.tensor(1.))) == {'f_a': 1.}

def test_means_can_weigh_batches_by_tokens():
    x,targ = torch.randn(24, 5, 8),torch.randint(0, 4, (24, 5))
    targ[torch.arange(5) >= torch.randint(1, 5, (24, 1))] = -100
    class Scores(Sequential):
        def forward(self, x): return super().forward(x).mT
    dl = DataLoader(Dataset(x, targ), 7)
    learn = Learner(Scores(Linear(8, 4)), SimpleNamespace(train=dl, valid=dl), cbs=[MetricsCB(weight=tokens(), loss_again=cross_entropy), RecordCB()])
    learn.fit(1)
    with torch.no_grad(): want = cross_entropy(learn.model(x), targ).item()
    assert learn.row['valid_loss'] == pytest.approx(want, rel=1e-5) and learn.row['valid_loss_again'] == pytest.approx(want, rel=1e-5)

def test_metrics_are_not_read_off_batch_by_batch():
    class Sealed(torch.Tensor):
        "A number that nobody may read"
        def item(self): raise AssertionError('read')
        __float__ = __bool__ = tolist = item
    class Seal(Callback):
        order = -1
        def after_loss(self, learn): learn.loss = learn.loss.as_subclass(Sealed)
    class Unseal(Callback):
        order = 100
        def after_loss(self, learn): learn.loss = learn.loss.as_subclass(torch.Tensor)
        def after_train(self, learn):
            for cb in learn.cbs:
                if isinstance(cb, MetricsCB): cb.values['loss'] = [o.as_subclass(torch.Tensor) for o in cb.values['loss']]
                if isinstance(cb, RecordCB): cb.waiting = [(o.as_subclass(torch.Tensor), n) for o,n in cb.waiting]
    learn = new_learner(Seal(), MetricsCB(), RecordCB(), Unseal())
    learn.fit(1, valid=False)
    assert len(learn.losses) == 7

def test_torchmetrics(tmp_path):
    classification = pytest.importorskip('torchmetrics.classification')
    def metrics(): return dict(acc=classification.MulticlassAccuracy(4, average='micro'), auroc=classification.MulticlassAUROC(4))
    def run(*cbs, **kw):
        learn = new_learner(MetricsCB(accuracy=accuracy, **metrics()), RecordCB(), *cbs)
        learn.fit(2, **kw)
        return learn
    learn = run()
    assert all(row[f'{k}_acc'] == pytest.approx(row[f'{k}_accuracy']) for row in learn.rows for k in ('train', 'valid'))
    preds,targs = learn.get_preds()
    assert learn.rows[-1]['valid_auroc'] == pytest.approx(classification.MulticlassAUROC(4)(preds, targs).item())
    run(CheckpointCB(tmp_path, every=1), StopAt(4))
    again = run(CheckpointCB(tmp_path, every=1), resume=tmp_path)
    for a,b in zip(again.rows, learn.rows, strict=True): assert {**a, 'seconds': 0} == {**b, 'seconds': 0}

# ---- files

def test_the_table_takes_new_columns_and_is_whole_at_any_time(tmp_path):
    class More(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 1: learn.row['more'] = .5
    learn = new_learner(MetricsCB(), RecordCB(), More(), CSVLogCB(tmp_path/'log.csv'))
    learn.fit(3)
    with open(tmp_path/'log.csv', newline='') as f: table = list(csv.DictReader(f))
    assert [row['more'] for row in table] == ['', '0.5', ''] and [float(row['train_loss']) for row in table] == [row['train_loss'] for row in learn.rows]
    assert os.listdir(tmp_path) == ['log.csv']

def test_files_of_a_broken_run_are_those_of_a_whole_one(tmp_path):
    def run(*cbs, **kw):
        (tmp_path/'files').mkdir(exist_ok=True)
        new_learner(MetricsCB(), RecordCB(), LogCB(tmp_path/'files'/'log.jsonl'), CSVLogCB(tmp_path/'files'/'log.csv'), *cbs).fit(3, **kw)
    run(CheckpointCB(tmp_path/'run', every=1), StopAt(12))                   # the second epoch, whose row is written as it ends
    run(CheckpointCB(tmp_path/'run', every=1), resume=tmp_path/'run')
    assert [json.loads(line)['epoch'] for line in (tmp_path/'files'/'log.jsonl').read_text().splitlines()] == [0, 1, 2]
    with open(tmp_path/'files'/'log.csv', newline='') as f: assert [row['epoch'] for row in csv.DictReader(f)] == ['0', '1', '2']

# ---- trackers

TRACKERS = {'tensorboard': lambda tmp: TensorBoardCB(tmp/'board', every=3), 'trackio': lambda tmp: TrackioCB('project', 'me', every=3), 'wandb': lambda tmp: WandbCB('project', 'me', every=3)}

def by_step(told):
    "`{step: values}` of what a tracker was told; nothing of it twice"
    found = {}
    for step,values in (o for o in told if isinstance(o, tuple) and isinstance(o[0], int)):
        assert not values.keys() & found.setdefault(step, {}).keys(), f'step {step} was told twice'
        found[step].update(values)
    return found

@pytest.mark.parametrize('extra', TRACKERS)
def test_a_tracker_is_told_every_step_and_every_epoch(extra, tmp_path, monkeypatch):
    told = trackers.install(monkeypatch)[extra]
    learn = new_learner(MetricsCB(), RecordCB(), TRACKERS[extra](tmp_path))
    learn.fit(2)
    steps = by_step(told)
    assert told[0][0] == 'begin' and told[-1] == 'end' and list(steps) == list(range(1, 15))
    assert [steps[i+1]['step_loss'] for i in range(14)] == learn.losses and steps[1]['lr'] == .1
    for epoch in (0, 1): assert {k: steps[7*epoch+7][k] for k in learn.rows[epoch]} == learn.rows[epoch]

@pytest.mark.parametrize('extra', TRACKERS)
def test_a_run_that_goes_on_goes_on_in_its_tracker(extra, tmp_path, monkeypatch):
    told = trackers.install(monkeypatch)[extra]
    def run(*cbs, **kw):
        learn = new_learner(MetricsCB(), RecordCB(), TRACKERS[extra](tmp_path), CheckpointCB(tmp_path/'run', every=3), *cbs)
        learn.fit(2, **kw)
        return learn
    run(StopAt(11))                               # the last checkpoint is that of step 9: 10 and 11 come again
    learn = run(resume=tmp_path/'run')
    begins,steps = [o for o in told if o[0] == 'begin'],by_step(told)
    assert len(begins) == 2 and begins[1] == (('begin', 10) if extra == 'tensorboard' else ('begin', 'project', 'must'))
    assert sorted(steps) == list(range(1, 15)) and [steps[i+1]['step_loss'] for i in range(14)] == learn.losses
    for epoch in (0, 1): assert steps[7*epoch+7]['valid_loss'] == learn.rows[epoch]['valid_loss']

def test_a_state_leaves_nothing_untold(tmp_path, monkeypatch):
    told = trackers.install(monkeypatch)['wandb']
    cb,counts = WandbCB('project', every=50),[]
    class Save(Callback):
        order = 90
        def after_batch(self, learn): counts.append((cb.state_dict(), len(by_step(told))))
    new_learner(cb, Save()).fit(1, valid=False)
    assert [n for _,n in counts] == list(range(1, 8)) and all(state['ident'] for state,_ in counts)

@pytest.mark.parametrize('extra, cls', [('tensorboard', TensorBoardCB), ('trackio', TrackioCB), ('wandb', WandbCB)])
def test_a_package_that_is_missing_is_told_at_once(extra, cls, monkeypatch):
    for name in ('torch.utils.tensorboard', 'tensorboard', 'trackio', 'wandb'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{cls.__name__} needs {extra}, which is not here: pip install "miniai-torch\[{extra}\]"'): cls('x')

def test_every_extra_that_is_named_is_one_of_ours():
    import tomllib
    extras = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['optional-dependencies']
    assert {'tensorboard', 'trackio', 'wandb', 'notebook', 'torchmetrics'} <= extras.keys()

# The real ones: where they are installed, and by `make trackers`.  Each in a process of its own, that trains, stops two steps after a checkpoint, and goes on.

REAL = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]
from pathlib import Path
from test_loggers import *
tmp = Path(sys.argv[1])
def run(*cbs, **kw):
    cb = MAKE
    learn = new_learner(MetricsCB(), RecordCB(), cb, CheckpointCB(tmp/'run', every=3), *cbs)
    learn.fit(2, **kw)
    return learn
run(StopAt(11))
learn = run(resume=tmp/'run')
"""

def real(package, make, check, tmp_path, **env):
    pytest.importorskip(package)
    code = REAL.replace('MAKE', make) + check
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

def test_the_real_tensorboard_reads_what_was_written(tmp_path):
    real('tensorboard', "TensorBoardCB(tmp/'board', every=3)", """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
board = EventAccumulator(str(tmp/'board')).Reload()
assert [o.step for o in board.Scalars('step_loss')] == list(range(1, 15))
assert [o.value for o in board.Scalars('step_loss')] == pytest.approx(learn.losses)
assert [o.value for o in board.Scalars('valid_accuracy')] == pytest.approx([row['valid_accuracy'] for row in learn.rows])
""", tmp_path)

def test_the_real_trackio_keeps_what_was_told(tmp_path):
    real('trackio', "TrackioCB('miniai-test', 'one', every=3)", """
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs('miniai-test', 'one')
assert [o['step'] for o in logs if 'step_loss' in o] == list(range(1, 15)), logs
assert [o['step_loss'] for o in logs if 'step_loss' in o] == learn.losses
assert [o['valid_loss'] for o in logs if o['step'] in (7, 14) and 'valid_loss' in o] == [row['valid_loss'] for row in learn.rows]
""", tmp_path, TRACKIO_DIR=str(tmp_path/'trackio'))

def test_the_real_wandb_runs_without_a_network(tmp_path):
    real('wandb', "WandbCB('miniai-test', every=3, mode='offline', dir=str(tmp))", """
from wandb.proto.wandb_internal_pb2 import Record
def records(data):
    "What is in a run's file: blocks of 32 kB with pieces of checksum, length, kind (whole, first, middle, last) and content; 7 bytes stand before all"
    at,whole = 7,b''
    while at+7 <= len(data):
        if 32768 - at%32768 < 7: at += 32768 - at%32768
        n,kind = int.from_bytes(data[at+4:at+6], 'little'),data[at+6]
        whole += data[at+7:at+7+n]
        at += 7+n
        if kind in (1, 4): yield whole; whole = b''
def told(path):
    for data in records(path.read_bytes()):
        record = Record(); record.ParseFromString(data)
        if record.WhichOneof('record_type') == 'history': yield {'/'.join(o.nested_key) or o.key: json.loads(o.value_json) for o in record.history.item}
first,second = sorted((tmp/'wandb').glob('offline-run-*/*.wandb'), key=lambda p: p.parent.name.split('-')[2]+p.parent.name)
assert first.name == second.name, 'it goes on under the same name'
rows = {row['_step']: row for p in (first, second) for row in told(p)}
assert [rows[i+1]['step_loss'] for i in range(14)] == learn.losses
assert [rows[i]['valid_loss'] for i in (7, 14)] == [row['valid_loss'] for row in learn.rows]
""", tmp_path, WANDB_SILENT='true')

def test_stand_ins_take_what_the_real_ones_take():
    import inspect
    from importlib import import_module
    def check(real, ours):
        theirs = inspect.signature(real).parameters
        unknown = [k for k in inspect.signature(ours).parameters if k not in theirs]
        assert not unknown, f'{real} takes no {unknown}, only {list(theirs)}'
    here = {name: pytest.importorskip(name) for name in ('tensorboard', 'trackio', 'wandb')}
    init,own = trackers.service([], False).init,dict(trackio='id', wandb='')
    writer = import_module('torch.utils.tensorboard').SummaryWriter
    for name in ('__init__', 'add_scalar', 'close'): check(getattr(writer, name), getattr(trackers.SummaryWriter, name))
    for name,what in own.items():
        theirs = inspect.signature(here[name].init).parameters
        assert [k for k in inspect.signature(init).parameters if k not in theirs and k != what] == []
        assert list(inspect.signature(here[name].Run.log).parameters)[2] == 'step' and hasattr(here[name].Run, 'finish')
    assert isinstance(here['wandb'].Run.starting_step, property)

# ---- a pipe and a notebook (the terminal is in test_learner)

RUN = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]
from test_loggers import *
from miniai.callbacks import ProgressCB
new_learner(MetricsCB(), RecordCB(), ProgressCB()).fit(3)
"""

def test_progress_into_a_pipe_is_the_same_to_the_byte():
    one,two = (subprocess.run([sys.executable, '-c', RUN], capture_output=True, check=True) for _ in range(2))
    assert one.stdout == two.stdout and not one.stderr and len(one.stdout.splitlines()) == 4 and b'\r' not in one.stdout and b'\x1b' not in one.stdout

def run_notebook(tmp_path, *cells):
    "The outputs of each cell"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(nb, tmp_path/'in.ipynb')
    from fastcore.nbio import read_nb
    from execnb.shell import CaptureShell
    nb,shell = read_nb(tmp_path/'in.ipynb'),CaptureShell()
    shell.run_all(nb, exc_stop=True)
    return [c.get('outputs', []) for c in nb.cells]

def test_progress_in_a_notebook_is_a_table_of_text(tmp_path):
    (out,), = run_notebook(tmp_path, RUN)
    lines = ''.join(out['text']).splitlines()
    assert out['output_type'] == 'stream' and [line.split()[0] for line in lines] == ['epoch', '0', '1', '2'] and not any('\r' in line for line in lines)

def test_a_live_plot_where_nobody_watches_is_one_picture(tmp_path):
    *_,outs = run_notebook(tmp_path, RUN, 'new_learner(MetricsCB(), RecordCB(), LivePlotCB()).fit(3)')
    assert [o['output_type'] for o in outs] == ['display_data'] and 'image/png' in outs[0]['data']

# ---- the plot and the button

@pytest.mark.parametrize('cbs', [(MetricsCB, RecordCB), (RecordCB,), ()], ids=['all', 'record', 'alone'])
def test_a_live_plot_grows_with_the_run_whoever_else_is_there(cbs):
    import matplotlib.pyplot as plt
    ends = []
    learn = new_learner(*(cb() for cb in cbs), LivePlotCB(share=1e9, show=lambda fig: ends.append(max(line.get_xdata()[-1] for line in fig.axes[0].get_lines()))))
    learn.fit(2)
    assert len(ends) == 2*7+2 and ends == pytest.approx(sorted(ends)) and ends[0] == pytest.approx(-1 + 1/7) and ends[-1] == 1 and not plt.get_fignums()

def test_a_live_plot_of_a_stream():
    xy,figs = rows(20, 0)[:],[]
    class Stream:
        def __iter__(self): return iter([xy]*3)
    Learner(Sequential(Linear(8, 4)), SimpleNamespace(train=Stream(), valid=[xy]), cbs=[LivePlotCB(share=1e9, show=figs.append)]).fit(2)
    assert len(figs) == 2*3+2

def test_drawing_takes_no_more_than_its_share_of_the_time():
    import time
    figs = []
    def slow(fig): figs.append(fig); time.sleep(.2)
    began = time.perf_counter()
    new_learner(LivePlotCB(share=.1, show=slow)).fit(3)
    assert len(figs) <= 1 + 3 and time.perf_counter()-began < 5        # the first batch, and the end of each epoch

def test_the_button_ends_the_run_after_the_batch_and_is_off_before_and_after():
    pytest.importorskip('ipywidgets')
    stop = StopButtonCB()
    assert stop.button.disabled
    class Finger(Callback):
        def after_loss(self, learn):
            if learn.training and learn.iter == 2: assert not stop.button.disabled; stop.button.click()
    learn = new_learner(RecordCB(), stop, Finger())
    learn.fit(3)
    assert learn.interrupted and learn.iter == 2 and len(learn.losses) == 3 and stop.button.disabled
    learn = new_learner(RecordCB(), stop)
    learn.fit(1)
    assert not learn.interrupted and len(learn.losses) == 7

def test_a_run_in_a_thread_of_its_own_is_the_same_run():
    a,b = new_learner(RecordCB()),new_learner(RecordCB())
    a.fit(2)
    fit_aside(b, 2).join()
    assert a.losses == b.losses

def test_need_gives_the_module(): assert need('json', 'x', 'y') is json
