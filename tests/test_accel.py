"Each lever: does it do what it says, change no number, and leave nothing behind?"
import os, subprocess, sys, threading
from types import SimpleNamespace
import pytest, torch, torch.nn.functional as F
from conftest import ROOT
from miniai import accel, nn, optim, trial
from miniai.accel import FAST, FastCB
from miniai.callbacks import ProgressCB
from miniai.checkpoint import CheckpointCB
from miniai.data import Dataset
from miniai.learner import Callback, CancelFitException, Learner
from miniai.loader import DataLoader
from miniai.training import AmpCB
from miniai.trial import PYTORCH
from test_trial import forget

pytestmark = pytest.mark.usefixtures('own_times')
CL = torch.channels_last

# ---- memory and threads

MEMORY = """
import ctypes, os, torch
from miniai.accel import glibc, keep_memory
class Info(ctypes.Structure): _fields_ = [(k, ctypes.c_size_t) for k in 'arena ordblks smblks hblks mapped usmblks fsmblks used free top'.split()]
def info():
    glibc().mallinfo2.restype = Info
    return glibc().mallinfo2()
def by_mmap(n=2**24):
    before,x = info().mapped,torch.empty(n)
    return info().mapped > before
def resident(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')
said,start = [by_mmap()],resident()
with keep_memory() as able:
    with keep_memory(): said.append(by_mmap())
    said.append(by_mmap())                             # the inner block ended, the outer has not
    torch.ones(2**24)
    kept = resident()                                  # freed, and still here
said += [kept > start + 2**25, by_mmap(2**28), resident() > start + 2**25]     # larger than anything that was left
print(able, *said)
"""

def in_process(program, **env):
    base = {k: v for k,v in os.environ.items() if not k.startswith(accel.CHOSEN)}
    out = subprocess.run([sys.executable, '-c', program], env={**base, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}, capture_output=True, text=True, check=True)
    return [w == 'True' for w in out.stdout.split()]

needs_glibc = pytest.mark.skipif(accel.glibc() is None, reason='not glibc')

@needs_glibc
def test_freed_memory_is_kept_inside_the_block_and_given_back_after(): assert in_process(MEMORY) == [True, True, False, False, True, True, False]

@needs_glibc
@pytest.mark.parametrize('env', [dict(MALLOC_ARENA_MAX='2'), dict(GLIBC_TUNABLES='glibc.malloc.arena_max=2')], ids=str)
def test_who_has_chosen_is_left_alone(env): assert in_process(MEMORY, **env)[:4] == [False, True, True, True]

@needs_glibc
def test_little_memory_or_another_thread_is_no_place_for_it(monkeypatch):
    said = []
    def enter():
        with accel.keep_memory() as able: said.append(able)
    thread = threading.Thread(target=enter)
    thread.start(), thread.join()
    monkeypatch.setattr(accel, 'free_memory', lambda: 2**26)
    enter()
    assert said == [False, False] and not accel._keepers

@needs_glibc
def test_settings_are_bounded_and_put_back_after_an_error(monkeypatch):
    seen = []
    monkeypatch.setattr(accel, '_set', lambda libc, options: seen.append(options))
    monkeypatch.setattr(accel, 'free_memory', lambda: 10**9)
    for k in list(os.environ):
        if k.startswith(accel.CHOSEN): monkeypatch.delenv(k)
    with pytest.raises(KeyError), accel.keep_memory(share=.25): raise KeyError
    assert seen[0][accel.TRIM_THRESHOLD] == 250_000_000 and seen[0][accel.TOP_PAD] < 250_000_000 and seen[1][accel.MMAP_MAX] == 65536

def test_threads_are_never_more_than_cores_nor_more_than_before(monkeypatch):
    n = torch.get_num_threads()
    try:
        for real,was,want in ((3, 8, 3), (8, 2, 2), (1, 4, 1)):
            monkeypatch.setattr(accel, 'count_cores', lambda real=real: real)
            torch.set_num_threads(was)
            with pytest.raises(KeyError), accel.real_cores() as got:
                assert got == want == torch.get_num_threads()
                raise KeyError
            assert torch.get_num_threads() == was
    finally: torch.set_num_threads(n)

@pytest.mark.parametrize('files,want', [({'cpu.max': '50000 100000'}, .5), ({'cpu.max': 'max 100000'}, float('inf')), ({}, float('inf')),
                                        ({'cpu/cpu.cfs_quota_us': '300000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 3), ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, float('inf'))], ids=str)
def test_the_quota_of_a_container(files, want, tmp_path):
    for name,text in files.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
    assert accel.quota(tmp_path) == want

def test_half_a_core_is_one_thread(monkeypatch):
    monkeypatch.setattr(accel, 'quota', lambda: .5)
    assert accel.count_cores() == 1

# ---- FastCB

def rows(n, seed):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset(torch.randn(n, 3, 8, 8, generator=gen) + targ.view(-1, 1, 1, 1)/2, targ)

OPTS = {'SGD': lambda ps, lr: optim.SGD(ps, lr=lr, momentum=.9), 'AdamW fused': lambda ps, lr: optim.AdamW(ps, lr=lr/10, fused=True), 'fused AdamW': lambda ps, lr: torch.optim.AdamW(ps, lr=lr/10, fused=True)}

def plain_net(t=nn):
    torch.manual_seed(0)
    return t.Sequential(t.Conv2d(3, 16, 3, 2, 1, bias=False), t.BatchNorm2d(16), t.ReLU(), t.Conv2d(16, 8, 3, 2, 1), t.Flatten(), t.Dropout(.1), t.Linear(32, 4))

def new_learner(*cbs, engine='torch', opt='SGD', t=nn):
    dls = SimpleNamespace(train=DataLoader(rows(88, 0), 16, shuffle=True), valid=DataLoader(rows(40, 1), 32))
    return Learner(plain_net(t), dls, lr=.05, opt_func=OPTS[opt], cbs=cbs, engine=engine)

def weights(learn): return {k: x.detach().clone() for k,x in learn.model.state_dict().items()}
def settings(): return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled('cpu'), list(accel._keepers), len(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
def layouts(learn): return [(x.shape, x.stride()) for x in [*learn.model.state_dict().values(), *[v for s in learn.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]]]

def fit(learn, epochs, **kw):
    "With the same chance for all"
    torch.manual_seed(1)
    learn.fit(epochs, **kw)
    return learn

class Raise(Callback):
    order = 500
    def __init__(self, event, error): setattr(self, event, lambda learn: self.now(learn)); self.error = error
    def now(self, learn): raise self.error

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('fast', FAST)
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_the_learner_is_left_as_it_was(fast, engine, opt):
    before = settings()
    learn,other = new_learner(FastCB(fast), engine=engine, opt=opt),new_learner(engine=engine, opt=opt)
    for o in (learn, other): fit(o, 2)
    assert settings() == before and layouts(learn) == layouts(other)
    if fast == 'auto' and accel.has_bf16('cpu'): return
    for k,x in weights(learn).items(): torch.testing.assert_close(x, weights(other)[k], rtol=1e-3, atol=1e-4)
    for o in (learn, other):                      # one more step by hand: the optimizer's memories belong to where they were put
        o.batch,o.training = next(iter(o.dls.valid)),True
        o.model.eval()
        F.cross_entropy(o.model(o.batch[0]), o.batch[1]).backward()
        o.opt.step()
    for k,x in weights(learn).items(): torch.testing.assert_close(x, weights(other)[k], rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('event', ['before_fit', 'before_train', 'after_predict', 'after_backward', 'before_valid', 'after_fit'])
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_all_is_undone_when_a_run_ends_early(event, engine):
    before = settings()
    for error in (KeyError('stop'), CancelFitException()):
        learn = new_learner(FastCB(), Raise(event, error), engine=engine)
        try: learn.fit(1)
        except KeyError: pass
        assert settings() == before
        assert all(p.is_contiguous() for p in learn.model.parameters())

def test_inside_the_levers_are_pulled():
    seen = []
    class Look(Callback):
        order = 20
        def before_fit(self, learn): seen.append(len(accel.kernels_of(learn.model)) == 0)
        def after_predict(self, learn): seen.append((learn.preds.dtype, len(accel.kernels_of(learn.model)) == 0, len(settings()[4])))
    cb = FastCB()
    new_learner(cb, Look()).fit(1)
    half = torch.bfloat16 if accel.has_bf16('cpu') and accel.is_large(plain_net()) else torch.float32
    assert seen[0] is False and seen[1] == (half, True, 1)
    assert repr(cb).startswith("FastCB('auto': ") and 'channels last' in repr(cb)

def test_one_line_where_there_is_progress_and_none_elsewhere(tmp_path, capsys):
    with (tmp_path/'out').open('w') as f: new_learner(FastCB('exact'), ProgressCB(f)).fit(1)
    lines = (tmp_path/'out').read_text().splitlines()
    assert lines[0].startswith('fast=exact: ') and 'channels last' in lines[0] and 'bf16' not in lines[0] and len(lines) == 3
    new_learner(FastCB()).fit(1)
    assert not capsys.readouterr().out
    new_learner(FastCB('off'), ProgressCB()).fit(1)
    assert capsys.readouterr().out.startswith(' epoch')

def test_what_is_there_already_is_not_done_twice():
    if not accel.has_bf16('cpu'): pytest.skip('no bf16 here')
    cb = FastCB()
    new_learner(AmpCB('bf16'), cb).fit(1)
    assert 'bf16' not in cb.names
    learn = new_learner(cb := FastCB())
    accel.channels_last(learn.model)
    learn.fit(1)
    assert 'channels last' not in cb.names and trial.is_channels_last(learn.model[0].weight)

@pytest.fixture
def nothing_gained(monkeypatch): monkeypatch.setattr(trial, 'race', lambda fs: dict.fromkeys(fs, 1e-5))

def test_small_models_go_on_without_what_costs_more_than_it_saves(nothing_gained):
    cb = FastCB()
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), SimpleNamespace(train=DataLoader(rows(64, 0), 16), valid=DataLoader(rows(16, 1), 16)), cbs=cb)
    learn.fit(1)
    assert cb.decided and not cb.mode.on and 'bf16' not in cb.names and 'channels last' not in cb.names

def test_the_mode_goes_with_the_first_batch_where_it_is_not_worth_it(nothing_gained):
    seen = []
    class Look(Callback):
        order = 20
        def before_batch(self, learn): seen.append(settings()[-1] - (learn.training and learn.engine_name == 'tape'))
    for engine,want in (('torch', [1, 0, 0, 0, 0]), ('tape', [1, 1, 1, 1, 0])):
        seen.clear()
        dls = SimpleNamespace(train=DataLoader(rows(64, 0), 16), valid=DataLoader(rows(16, 1), 16))
        Learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), dls, cbs=[FastCB(), Look()], engine=engine).fit(1)
        assert seen == want

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_kernels_are_exchanged_in_a_run(engine, always):
    cb = FastCB('exact')
    learn,other = new_learner(cb, engine=engine),new_learner(engine=engine)
    for o in (learn, other): fit(o, 2)
    assert cb.mode.on and cb.mode.saved > 10
    for k,x in weights(learn).items(): torch.testing.assert_close(x, weights(other)[k], rtol=1e-3, atol=1e-4)

class StopAt(Callback):
    order = 200
    def __init__(self, n): self.n = n
    def after_batch(self, learn):
        self.n -= learn.training
        if not self.n: raise CancelFitException

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('fast', ['auto', 'exact'])
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_a_run_goes_on_with_the_kernels_it_had(engine, fast, opt, tmp_path, always, monkeypatch):
    whole = new_learner(FastCB(fast), engine=engine, opt=opt)
    fit(whole, 2)
    fit(new_learner(FastCB(fast), CheckpointCB(tmp_path/'run', every=1), StopAt(4), engine=engine, opt=opt), 2)
    forget()
    trial.kernel_file().unlink()
    monkeypatch.setattr(trial, 'trial', lambda op, fs, args, kwargs: {PYTORCH: 1.})       # another trial would end otherwise
    again = new_learner(FastCB(fast), CheckpointCB(tmp_path/'run', every=1), engine=engine, opt=opt)
    fit(again, 2, resume=tmp_path/'run')
    for k,x in weights(again).items(): assert torch.equal(x, weights(whole)[k]), k

class Share(Callback):
    order = -100
    def before_fit(self, learn): learn.shared = True

def test_processes_that_train_together_do_not_choose_each_for_itself(tmp_path, always):
    cb = FastCB()
    fit(new_learner(Share(), cb, CheckpointCB(tmp_path/'run', every=1), StopAt(4)), 2)
    assert cb.mode is None and 'kernels by trial' not in repr(cb)
    fit(new_learner(cb := FastCB(), CheckpointCB(tmp_path/'run', every=1)), 2, resume=tmp_path/'run')        # alone it may
    assert cb.mode.saved > 0

def test_a_run_that_began_without_goes_on_with_its_memories_laid_out(tmp_path):
    whole = new_learner(opt='fused AdamW')
    fit(whole, 2)
    fit(new_learner(CheckpointCB(tmp_path/'run', every=1), StopAt(4), opt='fused AdamW'), 2)
    again = new_learner(FastCB('exact'), CheckpointCB(tmp_path/'run', every=1), opt='fused AdamW')
    fit(again, 2, resume=tmp_path/'run')
    for k,x in weights(again).items(): torch.testing.assert_close(x, weights(whole)[k], rtol=1e-3, atol=1e-4)

def test_only_the_words_there_are():
    with pytest.raises(ValueError, match="there is no 'fest'"): FastCB('fest')

@pytest.mark.parametrize('shape', [(16, 1, 3, 3), (8, 4, 1, 1), (1, 1, 1, 1), (2, 3, 4, 5), (1, 3, 1, 2)], ids=str)
def test_a_kernel_whose_layout_says_nothing_still_gives_images_with_channels_last(shape):
    conv = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    was = conv.weight.detach().clone()
    accel.channels_last(conv)
    assert torch.equal(conv.weight, was) and not accel.kernels_of(conv)
    y = conv(torch.randn(2, shape[1], 9, 9))
    assert shape[0] == 1 or y.stride() == accel.strides(y.shape, CL)
    accel.lay([conv.weight], torch.contiguous_format)
    assert torch.equal(conv.weight, was) and conv.weight.stride() == was.stride()

def test_layout_of_what_is_no_image_stays():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv3d(2, 3, 3), nn.Linear(3, 4), nn.Conv2d(3, 4, 3))
    was = [p.stride() for p in model.parameters()]
    assert accel.channels_last(model) is model
    changed = [a != p.stride() for a,p in zip(was, model.parameters(), strict=True)]
    assert changed == [p.ndim == 4 for p in model.parameters()]

