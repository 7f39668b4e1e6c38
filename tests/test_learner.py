"The loop and its callbacks: when each is called, what it may do, and that the numbers are those of a loop by hand."
import fcntl, io, json, os, pty, signal, struct, subprocess, sys, termios, threading
from types import SimpleNamespace
import pytest, torch
from miniai.callbacks import DeviceCB, InterruptCB, LogCB, MetricsCB, ProgressCB, RecordCB, SchedCB
from miniai.data import Dataset
from miniai.loader import DataLoader
from miniai.datasets import DataLoaders
from miniai.learner import (CANCEL, EVENTS, LEVELS, Callback, CancelFitException, Learner, accuracy, fit, set_epoch)
from miniai.nn import Linear, ReLU, Sequential, cross_entropy
from miniai.optim import SGD
from miniai.schedule import one_cycle

def points(n, seed):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset(torch.randn(n, 8, generator=gen) + 2*torch.eye(4, 8)[targ], targ)

def new_dls(bs=16): return DataLoaders(DataLoader(points(100, 0), bs, shuffle=True), DataLoader(points(50, 1), bs))
def new_model():
    torch.manual_seed(0)
    return Sequential(Linear(8, 8), ReLU(), Linear(8, 4))
def new_learner(*cbs, **kw): return Learner(new_model(), new_dls(), cbs=cbs, **kw)

class Diary(Callback):
    order = 100
    def __init__(self): self.events = []
    def __getattr__(self, name):
        if name not in EVENTS: raise AttributeError(name)
        return lambda learn: self.events.append(name)

def test_learner_equals_fit_number_for_number():
    learn = new_learner(MetricsCB(), RecordCB())
    learn.fit(3)
    model, dls = new_model(), new_dls()
    rows = fit(3, model, cross_entropy, SGD(model.parameters(), lr=.1), dls.train, dls.valid)
    for a,b in zip(learn.model.parameters(), model.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a,b in zip(learn.rows, rows, strict=True):
        assert a['valid_loss'] == pytest.approx(b['valid_loss']) and a['valid_accuracy'] == pytest.approx(b['valid_accuracy'])

def test_every_event_comes_in_its_place():
    learn = Learner(new_model(), new_dls(50), cbs=(diary := Diary()))
    learn.fit(1)
    batch = lambda *verbs: ['before_batch', *verbs, 'after_batch', 'cleanup_batch']
    train = batch('after_predict', 'after_loss', 'after_backward', 'after_step')
    assert diary.events == ['before_fit', 'before_epoch', 'before_train', *train*2, 'after_train', 'cleanup_train',
                            'before_valid', *batch('after_predict', 'after_loss'), 'after_valid', 'cleanup_valid',
                            'after_epoch', 'cleanup_epoch', 'after_fit', 'cleanup_fit']
    assert set(diary.events) == set(EVENTS)

@pytest.mark.parametrize('level', LEVELS)
def test_a_cancelled_level_is_cleaned_up_and_the_loop_goes_on(level):
    class Cancel(Callback):
        def __init__(self): self.done = False
    def cancel(self, learn):
        if not self.done:
            self.done = True
            raise CANCEL[level]
    cls = type('Cancel', (Cancel,), {f'before_{level}': cancel})
    learn = Learner(new_model(), new_dls(50), cbs=[cls(), diary := Diary()])
    learn.fit(2)
    after, cleanup = diary.events.count(f'after_{level}'), diary.events.count(f'cleanup_{level}')
    assert cleanup == after + 1
    assert ('after_step' in diary.events) == (level != 'fit')

def test_an_error_in_a_callback_passes_through_and_everything_is_cleaned_up():
    class Fails(Callback):
        def after_loss(self, learn): raise ZeroDivisionError
    learn = new_learner(Fails(), diary := Diary())
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert diary.events[-4:] == ['cleanup_batch', 'cleanup_train', 'cleanup_epoch', 'cleanup_fit']

@pytest.mark.parametrize('name, near', [('after_bach', 'after_batch'), ('before_epochs', 'before_epoch'), ('cleanup_trian', 'cleanup_train')])
def test_a_misspelled_event_is_an_error_when_the_class_is_made(name, near):
    with pytest.raises(TypeError, match=f'{name} is not an event; did you mean {near}'): type('CB', (Callback,), {name: print})

def test_callbacks_act_in_order_and_only_where_asked():
    class First(Callback): order = -5
    class Last(Callback): order = 5
    learn = new_learner(Last(), first := First())
    assert learn.cbs[0] is first
    seen = []
    class During(Callback):
        def before_fit(self, learn): seen.append([type(cb).__name__ for cb in learn.cbs])
    learn.fit(1, cbs=During())
    assert seen == [['First', 'During', 'Last']] and len(learn.cbs) == 2
    with pytest.raises(TypeError, match=r'call the class: First\(\)'): learn.add_cbs([First])

def test_modes_and_gradients_are_right_in_each_pass():
    seen = set()
    class See(Callback):
        def after_loss(self, learn): seen.add((learn.training, learn.model.training, learn.loss.requires_grad))
    new_learner(See()).fit(1)
    assert seen == {(True, True, True), (False, False, False)}

def test_a_verb_can_be_had_ones_own_way():
    class Twice(Learner):
        def get_loss(self):
            super().get_loss()
            self.loss = 2*self.loss
    one, two = new_learner(lr=.2), Twice(new_model(), new_dls(), lr=.1)
    one.fit(2); two.fit(2)
    for a,b in zip(one.model.parameters(), two.model.parameters(), strict=True): torch.testing.assert_close(a, b)

def test_metrics_weigh_every_batch_by_its_rows():
    learn = new_learner(MetricsCB(accuracy=accuracy, targ=lambda preds, targ: targ.float().mean()), RecordCB())
    learn.fit(1)
    preds, targs = learn.get_preds()
    assert learn.rows[0]['valid_accuracy'] == pytest.approx((preds.argmax(1) == targs).float().mean().item())
    assert learn.rows[0]['valid_loss'] == pytest.approx(cross_entropy(preds, targs).item(), rel=1e-5)
    assert learn.rows[0]['train_targ'] == pytest.approx(points(100, 0)[:][1].float().mean().item())

def test_get_preds_is_in_order_and_leaves_the_run_as_it_is():
    learn = new_learner(MetricsCB(), RecordCB())
    learn.fit(2)
    rows, losses, opt = list(learn.rows), list(learn.losses), learn.opt
    preds, targs = learn.get_preds()
    assert torch.equal(targs, points(50, 1)[:][1]) and preds.shape == (50, 4) and not preds.requires_grad
    assert learn.rows == rows and learn.losses == losses and learn.opt is opt

def test_the_order_of_epoch_three_does_not_depend_on_epochs_before():
    seen = {}
    class See(Callback):
        def before_batch(self, learn):
            if learn.training: seen.setdefault(learn.epoch, []).append(learn.batch[1])
    dls = new_dls()
    next(iter(dls.train))                        # a look at a batch changes nothing
    Learner(new_model(), dls, cbs=See()).fit(3)
    dls.train.set_epoch(2)
    for a,b in zip(dls.train, seen[2], strict=True): assert torch.equal(a[1], b)

def test_set_epoch_finds_the_sampler_and_leaves_others_alone():
    sampler = torch.utils.data.DistributedSampler(range(10), num_replicas=1, rank=0)
    set_epoch(torch.utils.data.DataLoader(range(10), sampler=sampler), 4)
    assert sampler.epoch == 4
    set_epoch([1, 2], 4)

def test_schedule_reaches_every_group_and_only_in_training():
    seen = []
    class See(Callback):
        order = 1
        def before_batch(self, learn):
            if learn.training: seen.append([g['lr'] for g in learn.opt.param_groups])
    def two_groups(params, lr):
        params = list(params)
        return SGD([dict(params=params[:2]), dict(params=params[2:])], lr=lr)
    new_learner(SchedCB(lr=one_cycle(.5)), See(), opt_func=two_groups).fit(2)
    assert [lr for both in seen for lr in both] == pytest.approx([one_cycle(.5)(i/14) for i in range(14) for _ in range(2)])
    with pytest.raises(ValueError, match='SGD has no setting beta; it has lr, momentum'): new_learner(SchedCB(beta=one_cycle(1))).fit(1)

def test_log_has_a_line_an_epoch(tmp_path):
    learn = new_learner(MetricsCB(), RecordCB(), LogCB(tmp_path/'log.jsonl'))
    learn.fit(3)
    assert [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()] == learn.rows

def test_progress_outside_a_terminal_is_the_same_at_every_run():
    outs = []
    for _ in range(2):
        new_learner(MetricsCB(), RecordCB(), ProgressCB(out := io.StringIO())).fit(2)
        outs.append(out.getvalue())
    assert outs[0] == outs[1] and len(outs[0].splitlines()) == 3 and 'seconds' not in outs[0]

def read_all(master, chunks):
    "What is written to the terminal behind `master`, until its last writer closes it"
    try:
        while chunk := os.read(master, 1 << 16): chunks.append(chunk)
    except OSError: pass                                       # Linux's way to say that the other side is closed

def test_progress_in_a_real_terminal_shows_loss_and_speed_and_leaves_a_table():
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))     # 24 lines of 100 columns
    reader = threading.Thread(target=read_all, args=(master, chunks := []))         # a terminal reads while the program writes
    reader.start()
    with os.fdopen(slave, 'w') as screen: new_learner(MetricsCB(), RecordCB(), ProgressCB(screen)).fit(2)
    reader.join(timeout=60)
    os.close(master)
    shown = b''.join(chunks).decode()
    assert 'epoch 1/2 train' in shown and 'epoch 2/2 valid' in shown and 'loss' in shown and 'rows/s' in shown and 'seconds' in shown

class Press(Callback):
    "Ctrl-C, the real signal, during the third training batch"
    def after_loss(self, learn):
        if learn.training and learn.iter == 2: os.kill(os.getpid(), signal.SIGINT)

def test_ctrl_c_stops_after_the_batch_and_gives_the_handler_back():
    before = signal.getsignal(signal.SIGINT)
    learn = new_learner(RecordCB(), InterruptCB(), Press())
    learn.fit(2)
    assert learn.interrupted and learn.iter == 2 and len(learn.losses) == 3
    assert len(learn.get_preds()[0]) == 50
    assert signal.getsignal(signal.SIGINT) is before

def test_a_second_ctrl_c_is_pythons_own():
    class PressTwice(Press):
        def after_loss(self, learn):
            super().after_loss(learn); super().after_loss(learn)
    with pytest.raises(KeyboardInterrupt): new_learner(RecordCB(), InterruptCB(), PressTwice()).fit(1)

def test_device_moves_model_and_batches():
    learn = new_learner(DeviceCB('cpu'))
    learn.fit(1)
    assert learn.batch[0].device.type == 'cpu' and repr(learn.cbs[0]) == "DeviceCB('cpu')"

def test_imports_stay_cheap():
    code = 'import sys, miniai.callbacks, miniai.vision, miniai.datasets, miniai.cli; print([m for m in ("matplotlib", "datasets", "pandas") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    code = 'import sys, miniai.cli; miniai.cli.main(["--help"]); print("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip().endswith('False')

def test_anything_with_train_and_valid_will_do():
    xy = points(20, 0)[:]
    Learner(new_model(), SimpleNamespace(train=[xy]*3, valid=[xy]), cbs=MetricsCB()).fit(1)

def test_cancel_fit_in_validation_ends_the_run():
    class Stop(Callback):
        def before_valid(self, learn): raise CancelFitException
    learn = new_learner(Stop(), RecordCB())
    learn.fit(5)
    assert len(learn.rows) == 1
