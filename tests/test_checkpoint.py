"Runs that are stopped anywhere and taken up again end with the weights, rows and losses of a run that nobody disturbed: equal to the bit."
import hashlib, json, os, pickle, shutil, signal, subprocess, sys, threading
from itertools import product
import pytest, safetensors, torch
from safetensors.torch import load_file, save
from miniai import nn, optim
from miniai.callbacks import DeviceCB, InterruptCB, LogCB, MetricsCB, RecordCB, SchedCB, ScheduleFreeCB
from miniai.checkpoint import CheckpointCB, CheckpointError, best_checkpoint, checkpoints, fold, is_pickle, newest, open_checkpoint, unfold, unspelt, write_tensors
from miniai.core import set_chance
from miniai.data import Dataset, MapDataset
from miniai.datasets import DataLoaders
from miniai.learner import Callback, Learner
from miniai.loader import DataLoader
from miniai.schedule import one_cycle
from miniai.training import AccumulateCB, AmpCB, ClipCB, EarlyStopCB, EMACB

N, BS, EPOCHS = 90, 16, 3            # 6 batches of training (the last one short), 3 of validation
TRAIN, VALID = 6, 3

def images(n, seed):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset(torch.randn(n, 1, 8, 8, generator=gen) + targ.view(-1, 1, 1, 1), targ)

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(.3), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 4))

class Noise:
    "Batch augmentation that draws by seed, epoch and row"
    takes_draw = True
    def __call__(self, batch, draw): return (batch[0] + .1*draw.normal(1, 8, 8), *batch[1:])

def blur(row): return row[0] + .1*torch.randn(1, 8, 8), row[1]       # draws from the global generator, in a worker or not

def ours(shuffle=True, **kw): return lambda ds, train: DataLoader(ds, BS if train else 32, shuffle=train and shuffle, transform=Noise() if train else None, **kw)
def ours_by_rows(**kw):       return lambda ds, train: DataLoader(MapDataset(ds, blur), BS if train else 32, shuffle=train, **kw)
def torchs(**kw):             return lambda ds, train: torch.utils.data.DataLoader(ds, BS if train else 32, shuffle=train, **kw)
def own_generator():          return lambda ds, train: torch.utils.data.DataLoader(ds, BS if train else 32, shuffle=train, generator=torch.Generator().manual_seed(3))
def rows_of_torchs(**kw):     return lambda ds, train: torch.utils.data.DataLoader(MapDataset(ds, blur), BS if train else 32, shuffle=train, **kw)

class Lottery(Callback):
    "Changes the batch by chance, from the global generators"
    def before_batch(self, learn):
        if learn.training: learn.batch = (learn.batch[0] + .1*torch.randn(()), *learn.batch[1:])

def saver(learn): return next(cb for cb in learn.cbs if isinstance(cb, CheckpointCB))

class Stop(Callback):
    "An end without warning after the batch `n` of the run, training and validation counted together"
    order = 1000
    def __init__(self, n): self.left = n
    def after_batch(self, learn):
        self.left -= 1
        if not self.left: raise KeyboardInterrupt

def new(run=None, *cbs, engine='torch', opt=lambda ps, lr: optim.AdamW(ps, lr=lr), loader=ours(), every=1, **kw):
    ds = images(N, 0), images(70, 1)
    dls = DataLoaders(loader(ds[0], True), loader(ds[1], False))
    saves = [CheckpointCB(run, every=every, minutes=1e-9, **kw), LogCB(run.parent/f'{run.name}.jsonl')] if run else []
    return Learner(model(), dls, opt_func=opt, lr=.01, engine=engine,
                   cbs=[DeviceCB('cpu'), SchedCB(lr=one_cycle(.01)), MetricsCB(), RecordCB(), *cbs, *saves])

def timeless(rows): return [{k: v for k,v in row.items() if k != 'seconds'} for row in rows]

def result(learn):
    logs = [[json.loads(line) for line in cb.path.read_text().splitlines()] for cb in learn.cbs if isinstance(cb, LogCB)]
    return {**{k: v.clone() for k,v in learn.model.state_dict().items()}, 'losses': list(learn.losses), 'rows': timeless(learn.rows),
            'log': timeless(logs[0] if logs else learn.rows), 'steps': learn.steps}

def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        if isinstance(a[k], torch.Tensor): torch.testing.assert_close(a[k], b[k], rtol=0, atol=0, equal_nan=True)
        else: assert a[k] == b[k], k

def none(): return []

def undisturbed(cbs=none, **kw):
    torch.manual_seed(11)
    learn = new(None, *cbs(), **kw)
    learn.fit(EPOCHS)
    return result(learn)

def disturbed(run, stops, cbs=none, **kw):
    torch.manual_seed(11)
    for stop in [*stops, None]:
        learn = new(run, *cbs(), *([Stop(stop)] if stop else []), **kw)
        try: learn.fit(EPOCHS, resume=True)
        except KeyboardInterrupt: torch.rand(5)
    return result(learn)

PLACES = {'first batch': [1], 'mid-epoch': [3], 'last batch of training': [TRAIN], 'in validation': [TRAIN+2], 'end of validation': [TRAIN+VALID],
          'second epoch': [TRAIN+VALID+2], 'again and again': [2, 4, 3, 5]}
OPTS = {'AdamW': lambda ps, lr: optim.AdamW(ps, lr=lr), 'fused AdamW': lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True),
        'fused SGD': lambda ps, lr: optim.SGD(ps, lr=lr, momentum=.9, fused=True), 'schedule-free': lambda ps, lr: optim.ScheduleFreeAdamW(ps, lr=lr),
        "PyTorch's AdamW": torch.optim.AdamW, "PyTorch's fused": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, fused=True)}
LOADERS = {'ours': ours(), 'ours, 2 workers': ours_by_rows(num_workers=2), 'ours, rows that draw': ours_by_rows(), 'drop_last': lambda ds, train: DataLoader(ds, BS, shuffle=train, drop_last=True),
           "PyTorch's": torchs(), "PyTorch's with its own generator": own_generator(), "PyTorch's, 2 workers": rows_of_torchs(num_workers=2), "PyTorch's, rows that draw": rows_of_torchs(),
           'a list': lambda ds, train: [ds[i:i+BS] for i in range(0, len(ds), BS)]}

CALLBACKS = [lambda: [Lottery(), AccumulateCB(4), ClipCB(1.), EMACB(.9), AmpCB('bf16')], lambda: [AccumulateCB(4), AmpCB('fp16', init_scale=2.**40, growth_interval=2)]]

@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_stopped_anywhere_on_either_engine(place, engine, tmp_path):
    for i,cbs in enumerate(CALLBACKS):
        same(disturbed(tmp_path/str(i), PLACES[place], cbs=cbs, engine=engine), undisturbed(cbs=cbs, engine=engine))

@pytest.mark.parametrize('opt', OPTS)
def test_with_any_optimizer(opt, tmp_path):
    for i,(engine,every) in enumerate(product(('torch', 'tape'), (1, 4))):
        kw = dict(engine=engine, opt=OPTS[opt])
        cbs = (lambda: [ScheduleFreeCB()]) if 'free' in opt else (lambda: [EMACB(.9)])
        same(disturbed(tmp_path/str(i), [5, 9, 1], cbs=cbs, every=every, **kw), undisturbed(cbs=cbs, **kw))

@pytest.mark.parametrize('loader', LOADERS)
def test_with_any_loader(loader, tmp_path):
    same(disturbed(tmp_path/'r', [4, 6, 2], loader=LOADERS[loader]), undisturbed(loader=LOADERS[loader]))

def test_what_pytorchs_persistent_workers_keep_to_themselves_is_said(tmp_path, capsys):
    disturbed(tmp_path/'r', [4], loader=torchs(num_workers=1, persistent_workers=True))
    assert 'persistent_workers=True draws another order in a new process' in capsys.readouterr().err

# ---- what is in the files

def test_a_state_comes_back_as_it_was():
    x = torch.randn(2, 3, 4, 5)
    state = dict(a=[1, 2.5, 'x', None, True], inf=float('-inf'), nested={0: {'x': x}, (1, 'b'): ()}, last=x.to(memory_format=torch.channels_last), t=x.mT, scalar=torch.tensor(3),
                 cut=x[:, ::2], half=x.bfloat16(), none={}, odd={'$tensor': 1})
    plain, tensors = fold(state)
    back = unfold(json.loads(json.dumps(plain)), tensors)
    def equal(a, b):
        assert type(a) is type(b)
        if isinstance(a, dict): assert list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
        elif isinstance(a, (list, tuple)): assert len(a) == len(b) and all(map(equal, a, b))
        elif isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert torch.empty_like(a).stride() == b.stride()
        else: assert a == b
        return True
    equal(state, back)
    assert str(unfold(json.loads(json.dumps(fold(dict(nan=float('nan')))[0])), {})['nan']) == 'nan'

def test_what_no_file_can_hold_is_told(tmp_path):
    with pytest.raises(TypeError, match='CountCB.seen is a set, which is neither a plain value nor a tensor'): fold(dict(CountCB=dict(seen=set())))
    with pytest.raises(ValueError, match='two tensors have the name a.b'): fold({'a': {'b': torch.zeros(1)}, 'a.b': torch.zeros(1)})
    with pytest.raises(TypeError, match='x is torch.complex128, which a safetensors file cannot hold'): write_tensors(tmp_path/'x', dict(a=torch.zeros(2), x=torch.zeros(2, dtype=torch.complex128)))
    with pytest.raises(OSError, match='no/x'): write_tensors(tmp_path/'no'/'x', dict(a=torch.zeros(2)))

def test_the_same_tensors_and_words_are_the_same_file(tmp_path):
    "Whatever order safetensors takes the words in, and whatever letters are in them"
    for i in range(20): write_tensors(tmp_path/str(i), dict(b=torch.ones(2), a=torch.zeros(3)), row='{"a": 1}', name='naïve "π"\n')
    assert len({(tmp_path/str(i)).read_bytes() for i in range(20)}) == 1
    with safetensors.safe_open(tmp_path/'0', 'pt') as f: assert f.metadata() == dict(format='pt', row='{"a": 1}', name='naïve "π"\n') and f.get_tensor('b').tolist() == [1, 1]

def test_a_file_of_tensors_is_what_is_said_of_it(tmp_path):
    tensors = {str(d): torch.randn(3, 5).mul(9).to(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)}
    said = write_tensors(tmp_path/'x', tensors)
    for k,x in load_file(tmp_path/'x').items(): assert torch.equal(x.view(torch.uint8), tensors[k].view(torch.uint8)) and x.dtype == tensors[k].dtype
    assert said == dict(size=(tmp_path/'x').stat().st_size, sha256=hashlib.sha256((tmp_path/'x').read_bytes()).hexdigest())

def test_no_length_of_a_header_makes_a_pickle_of_it(tmp_path):
    for n in range(1, 1500, 3):
        (tmp_path/'x').write_bytes(save({'x'*n: torch.zeros(1)}))
        assert not is_pickle(tmp_path/'x')
    for protocol in (2, 3, 4, 5):
        (tmp_path/'x').write_bytes(pickle.dumps({'a': torch.zeros(3)}, protocol))
        assert is_pickle(tmp_path/'x')
    for zipped in (True, False):
        torch.save({'a': torch.zeros(3)}, tmp_path/'x', _use_new_zipfile_serialization=zipped)
        assert is_pickle(tmp_path/'x')

def saved(run, *cbs, **kw):
    "A run with some checkpoints, ended in its second epoch"
    learn = new(run, *cbs, Stop(TRAIN+VALID+3), keep=3, **kw)
    with pytest.raises(KeyboardInterrupt): learn.fit(EPOCHS)
    return learn

def test_a_checkpoint_opens_elsewhere(tmp_path):
    learn = saved(tmp_path/'r')
    state = load_file(newest(tmp_path/'r').folder/'model.safetensors')
    assert state.keys() == learn.model.state_dict().keys()
    model().load_state_dict(state)
    assert not [o for o in (tmp_path/'r').rglob('*') if o.is_file() and o.suffix not in ('.json', '.safetensors')]

def damage(folder, what):
    path = folder/'model.safetensors'
    data = path.read_bytes()
    if what == 'torn': path.write_bytes(data[:len(data)//2])
    elif what == 'a flipped bit': path.write_bytes(data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])
    elif what == 'missing': path.unlink()
    elif what == 'a pickle': torch.save(dict(x=torch.ones(2)), path)
    else: (folder/'state.json').write_text({'state torn': (folder/'state.json').read_text()[:500], 'state changed': (folder/'state.json').read_text().replace('"steps": ', '"steps": 1'),
           'older': '{"format": "miniai checkpoint", "version": 0}', 'newer': '{"format": "miniai checkpoint", "version": 9, "state": 1}', 'foreign': '{"format": "other", "version": 1}', 'not ours': '[1, 2]'}[what])

SAID = {'torn': 'model.safetensors is torn: ', 'a flipped bit': 'model.safetensors is not as it was written: it is damaged', 'missing': 'model.safetensors is missing',
        'a pickle': 'is a pickle, which can run any code when it is read: it was not opened', 'state torn': 'state.json cannot be read, it is torn or from another program',
        'state changed': 'state.json is not as it was written', 'older': 'version 0 of the format, this miniai reads version 1; take up the run with the miniai that began it',
        'newer': 'take up the run with the miniai that wrote it', 'foreign': "says that it is a 'other'", 'not ours': 'torn or from another program'}

@pytest.mark.parametrize('what', SAID)
def test_a_bad_checkpoint_is_told_and_the_last_good_one_offered_and_taken(what, tmp_path, capsys):
    run = tmp_path/'r'
    saved(run)
    bad, good = checkpoints(run)[:2]
    damage(bad, what)
    with pytest.raises(CheckpointError) as e: open_checkpoint(bad)
    assert SAID[what] in str(e.value) and f'The newest good one is {good}' in str(e.value)
    torch.manual_seed(11)
    learn = new(run)
    learn.fit(EPOCHS, resume=run)
    assert SAID[what] in capsys.readouterr().err
    same(result(learn), undisturbed())

def test_other_folders_are_told(tmp_path):
    with pytest.raises(CheckpointError, match='there is no folder'): open_checkpoint(tmp_path/'nowhere')
    with pytest.raises(CheckpointError, match='has no checkpoint to go on from'): open_checkpoint(tmp_path)
    (tmp_path/'checkpoint-500').mkdir()
    torch.save({}, tmp_path/'checkpoint-500/optimizer.pt')
    with pytest.raises(CheckpointError, match='it has no state.json; optimizer.pt is a pickle'): open_checkpoint(tmp_path/'checkpoint-500')
    with pytest.raises(CheckpointError, match='none of the 1 checkpoints in'): open_checkpoint(tmp_path)

def test_what_does_not_fit_is_told(tmp_path):
    run = tmp_path/'r'
    saved(run, AccumulateCB(4))
    def refused(words, *cbs, fit=None, **kw):
        with pytest.raises(ValueError, match=words): new(None, *cbs, **kw).fit(**{'epochs': EPOCHS, 'resume': run, **(fit or {})})
    refused('has the state of AccumulateCB, CheckpointCB, LogCB, and this learner has no such callback')
    refused('made with the optimizer AdamW, this learner has SGD', opt=optim.SGD)
    rest = AccumulateCB(4), LogCB(tmp_path/'log'), CheckpointCB(run)
    refused('belongs to another order: bs is 16 there and 8 here', *rest, loader=lambda ds, train: DataLoader(ds, 8, shuffle=train, transform=Noise()))
    refused('made with another kind of loader', *rest, loader=torchs())
    refused(r'fit\(1\) has no such epoch', fit=dict(epochs=1))
    with pytest.raises(ValueError, match='no CheckpointCB says where the run is'): new().fit(2, resume=True)

def test_a_new_run_does_not_begin_in_the_folder_of_another(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match='holds checkpoints of a run, the newest is checkpoint-9'): new(tmp_path).fit(1)

def test_going_on_from_an_older_one_sets_the_newer_aside(tmp_path):
    saved(tmp_path)
    there = checkpoints(tmp_path)
    torch.manual_seed(11)
    learn = new(tmp_path, keep=1)
    learn.fit(EPOCHS, resume=there[-1])
    same(result(learn), undisturbed())
    assert [o.name for o in checkpoints(tmp_path)] == ['checkpoint-18'] and (tmp_path/f'{there[0].name}.aside').exists()

def test_newest_and_best_stay(tmp_path):
    class Row(Callback):
        def after_epoch(self, learn):
            learn.row['valid_loss'] = [3., 1., float('nan'), 2.][learn.epoch]
            learn.rows.append(learn.row)
    learn = Learner(model(), new().dls, lr=.01, cbs=[Row(), CheckpointCB(tmp_path, keep=1, best='valid_loss')])
    learn.fit(4)
    assert [o.name for o in checkpoints(tmp_path)] == ['checkpoint-24', 'checkpoint-12']
    assert best_checkpoint(tmp_path, 'valid_loss').name == 'checkpoint-12'
    with pytest.raises(ValueError, match="no 'valid_los'; it has epoch, valid_loss"): best_checkpoint(tmp_path, 'valid_los')

def test_a_finished_run_has_nothing_left_to_do_and_can_be_made_longer(tmp_path):
    learn = new(tmp_path)
    learn.fit(EPOCHS, resume=True)
    again = new(tmp_path)
    again.fit(EPOCHS, resume=True)
    same(result(again), result(learn))
    again.fit(EPOCHS+1, resume=True)
    assert len(result(again)['rows']) == EPOCHS+1 and again.steps == TRAIN*(EPOCHS+1)

# ---- the disk

def test_a_disk_that_is_full_loses_nothing_and_training_goes_on(tmp_path, monkeypatch, capsys):
    from miniai import checkpoint
    real, full = checkpoint.os.fsync, []
    def fsync(fd):
        if full: raise OSError(28, 'No space left on device')
        real(fd)
    monkeypatch.setattr(checkpoint.os, 'fsync', fsync)
    class Fill(Callback):
        order = 80
        def before_train(self, learn):
            saver(learn).writer.wait()
            full[:] = [1]*learn.epoch
    learn = new(tmp_path, Fill())
    learn.fit(2)
    assert result(learn)['steps'] == 2*TRAIN and newest(tmp_path).place == (1, 'train', 0)
    assert 'checkpoint-7 was not written ([Errno 28] No space left on device); the last one is ' + str(tmp_path/'checkpoint-6') in capsys.readouterr().err
    assert not list(tmp_path.glob('*.part'))

FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import *
from pathlib import Path
run = Path({run!r})
class Fill(Callback):
    order = 80
    def before_train(self, learn):
        saver(learn).writer.wait()
        if learn.epoch == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
learn = new(run, Fill())
learn.fit(2)
print(newest(run).place, result(learn)['log'] == timeless(learn.rows[:1]))
"""

def test_a_file_that_the_system_cuts_off_is_no_checkpoint(tmp_path):
    code = FULL.format(tests=os.path.dirname(__file__), run=str(tmp_path/'r'))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "(1, 'train', 0) True" in done.stdout and 'File too large' in done.stderr and 'Training goes on' in done.stderr
    assert 'its line comes with the next' in done.stderr

# ---- signals

class Terminate(Callback):
    "SIGTERM, the real signal, in the batch `n` of the run"
    def __init__(self, n): self.left = n
    def after_predict(self, learn):
        self.left -= 1
        if not self.left: os.kill(os.getpid(), signal.SIGTERM)

@pytest.mark.parametrize('n', [1, 3, TRAIN, TRAIN+1, TRAIN+VALID, TRAIN+VALID+1, EPOCHS*(TRAIN+VALID)])
def test_sigterm_saves_after_the_batch_says_how_to_go_on_and_exits_0(n, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    torch.manual_seed(11)
    learn = new(None, Terminate(n), CheckpointCB(tmp_path))
    with pytest.raises(SystemExit) as e: learn.fit(EPOCHS)
    assert e.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert f"miniai: SIGTERM: saved {newest(tmp_path).folder}; to go on: learn.fit(3, resume='{tmp_path}')" in capsys.readouterr().err
    torch.rand(3)
    learn = new(None, CheckpointCB(tmp_path))
    learn.fit(EPOCHS, resume=True)
    same(result(learn), undisturbed())

GROUP = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_checkpoint import *
class Alarm:
    "In a worker, when the main process waits for it: SIGTERM to all, once"
    seen = 0
    def __call__(self, row):
        self.seen += 1
        if self.seen == 20:
            time.sleep(.7)
            try: (Path({run!r}).parent/'sent').touch(exist_ok=False)
            except FileExistsError: return row
            os.killpg(0, signal.SIGTERM)
        return row
learn = new(Path({run!r}), loader=lambda ds, train: DataLoader(MapDataset(ds, Alarm()), 16, shuffle=train, num_workers=2, prefetch=1))
learn.fit(EPOCHS)
"""

def test_sigterm_to_all_processes_at_once_is_the_main_ones_to_answer(tmp_path):
    code = GROUP.format(tests=os.path.dirname(__file__), run=str(tmp_path/'r'))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.returncode == 0 and 'SIGTERM: saved' in done.stderr, done.stderr
    assert newest(tmp_path/'r').place[:2] == (0, 'train')

def test_sigterm_with_a_full_disk_is_no_success(tmp_path, monkeypatch):
    from miniai import checkpoint
    def no(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint.os, 'fsync', no)
    with pytest.raises(SystemExit, match='SIGTERM: .*checkpoint-3 was not written .*; there is none yet'): new(None, Terminate(3), CheckpointCB(tmp_path)).fit(EPOCHS)

def test_ctrl_c_leaves_a_checkpoint_of_that_batch(tmp_path):
    class Press(Callback):
        def after_predict(self, learn):
            if learn.training and (learn.epoch, learn.iter) == (1, 2): os.kill(os.getpid(), signal.SIGINT)
    torch.manual_seed(11)
    new(None, Press(), InterruptCB(), CheckpointCB(tmp_path)).fit(EPOCHS)
    assert newest(tmp_path).place == (1, 'train', 3)
    learn = new(None, InterruptCB(), CheckpointCB(tmp_path))
    learn.fit(EPOCHS, resume=True)
    same(result(learn), undisturbed())

def test_a_fork_waits_for_the_file_that_is_being_written(tmp_path):
    cb, going = CheckpointCB(tmp_path), threading.Event()
    cb.writer.start(lambda: going.wait(.3))
    if not (pid := os.fork()): os._exit(cb.writer.thread is not None)
    assert os.waitpid(pid, 0)[1] == 0

def test_a_run_that_stopped_early_stays_so(tmp_path):
    def cbs(): return [EarlyStopCB('valid_loss', patience=1, low=False)]          # a low loss is bad: stops at once
    learn = new(tmp_path/'r', *cbs())
    learn.fit(EPOCHS)
    assert len(learn.rows) == 2
    again = new(tmp_path/'r', *cbs())
    again.fit(EPOCHS, resume=True)
    same(result(again), result(learn))

def test_a_run_that_ends_before_its_first_epochs_checkpoint_begins_as_it_began(tmp_path):
    "Its line is in the log already, its weights came from no seed"
    class Cut(Callback):
        order = 50
        def cleanup_epoch(self, learn): raise KeyboardInterrupt
    def learner(*cbs):
        learn = new(None, *cbs, LogCB(tmp_path/'log.jsonl'), CheckpointCB(tmp_path/'r'))
        torch.nn.init.normal_(learn.model[-1].weight, std=.1, generator=torch.Generator().manual_seed(torch.seed() % 2**60))
        return learn
    first = learner(Cut())
    with pytest.raises(KeyboardInterrupt): first.fit(EPOCHS)
    shutil.copytree(tmp_path/'r'/'checkpoint-0', tmp_path/'beginning')
    again = learner()
    again.fit(EPOCHS, resume=True)
    whole = new(None)
    whole.model.load_state_dict(load_file(tmp_path/'beginning'/'model.safetensors'))
    set_chance(unspelt(json.loads((tmp_path/'beginning'/'state.json').read_text())['state']['chance']))
    whole.fit(EPOCHS)
    same(result(again), result(whole))
