"The loop and its callbacks: when each is called, what it may do, and that the numbers are those of a loop by hand."
import fcntl, io, json, os, pty, signal, struct, subprocess, sys, termios, threading
from types import SimpleNamespace
import pytest, torch
from miniai.callbacks import DeviceCB, InterruptCB, LogCB, MetricsCB, ProgressCB, RecordCB, SchedCB
from miniai.data import Dataset
from miniai.loader import DataLoader
from miniai.datasets import DataLoaders
from miniai.learner import (CANCEL, EVENTS, LEVELS, VERBS, Callback, CancelFitException, Learner, accuracy, fit, set_epoch)
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

def test_accuracy_takes_classes_and_their_probabilities():
    preds, targ = torch.eye(4)[[0, 1, 2, 3]], torch.tensor([0, 1, 0, 3])
    mixed = .7*torch.eye(4)[targ] + .3*torch.eye(4)[[3, 2, 1, 0]]
    assert accuracy(preds, targ).item() == accuracy(preds, mixed).item() == .75

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
    diary, behind = Diary(), Diary()
    diary.order = -100
    learn = Learner(new_model(), new_dls(50), cbs=[diary, cls(), behind])
    learn.fit(2)
    after, cleanup = diary.events.count(f'after_{level}'), diary.events.count(f'cleanup_{level}')
    assert cleanup == after + 1
    assert ('after_step' in diary.events) == (level != 'fit')
    assert behind.events.count(f'before_{level}') == behind.events.count(f'cleanup_{level}') == after      # who did not hear the beginning

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

class Around(Callback):
    "Stands in for every verb, and notes it"
    def __init__(self, name, seen, order=0): self.name,self.seen,self.order = name,seen,order
    def around(self, verb, do):
        self.seen.append((self.name, verb)); do(); self.seen.append((self.name, verb))
    def predict(self, learn, do): self.around('predict', do)
    def get_loss(self, learn, do): self.around('get_loss', do)
    def backward(self, learn, do): self.around('backward', do)
    def step(self, learn, do): self.around('step', do)
    def zero_grad(self, learn, do): self.around('zero_grad', do)

def test_callbacks_stand_in_for_verbs_the_first_in_order_outside_and_nothing_changes():
    seen = []
    learn, plain = new_learner(), new_learner()
    learn.fit(1, cbs=[Around('b', seen, 2), Around('a', seen, 1)])
    assert seen[:20] == [(who, verb) for verb in VERBS for who in 'abba']
    plain.fit(1)
    for a,b in zip(learn.model.parameters(), plain.model.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not vars(learn).keys() & set(VERBS) and learn.steps == plain.steps == 7

def test_a_verb_that_is_not_done_is_not_done():
    class Never(Callback):
        def step(self, learn, do): pass
    learn = new_learner(Never())
    learn.fit(1)
    assert learn.steps == 0
    for a,b in zip(learn.model.parameters(), new_model().parameters(), strict=True): assert torch.equal(a, b)

@pytest.mark.parametrize('f', [lambda self: 0, lambda self, learn: 0, lambda: 0])
def test_a_method_that_only_has_a_verbs_name_is_told(f):
    with pytest.raises(TypeError, match=r'CB.step has the name of a verb and would be called in its place, with \(learn, do\)'): type('CB', (Callback,), {'step': f})

def test_a_state_that_is_saved_is_taken_back():
    with pytest.raises(TypeError, match='has one of state_dict and load_state_dict'): type('CB', (Callback,), {'state_dict': lambda self: {}})

def test_a_verb_of_a_subclass_is_what_callbacks_stand_in_for():
    class Twice(Learner):
        def get_loss(self):
            super().get_loss()
            self.loss = 2*self.loss
    seen = []
    one, two = new_learner(lr=.2), Twice(new_model(), new_dls(), lr=.1, cbs=Around('a', seen))
    one.fit(1); two.fit(1)
    for a,b in zip(one.model.parameters(), two.model.parameters(), strict=True): torch.testing.assert_close(a, b)

# ---- batches of all forms

X, Y = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])

def trained(batch, model=None, loss_func=cross_entropy, **kw):
    learn = Learner(model or new_model(), SimpleNamespace(train=[batch]*3, valid=[batch]), loss_func, cbs=MetricsCB(zero=lambda p, t: torch.tensor(0.)), **kw)
    learn.fit(2)
    return learn

class Named(torch.nn.Module):
    "Takes its inputs by name, and gives its loss if it is told what is wanted"
    def __init__(self, form):
        super().__init__()
        self.inner,self.form = new_model(),form
    def forward(self, x, labels=None, extra=None):
        logits = self.inner(x if extra is None else x + extra)
        return self.form(logits=logits, loss=None if labels is None else cross_entropy(logits, labels))

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_every_form_of_a_batch_trains_alike(engine):
    want = trained((X, Y), engine=engine)
    forms = [trained([X, Y], engine=engine), trained(dict(x=X, label=Y), target='label', engine=engine), trained(dict(x=X, a=Y), target=['a'], engine=engine),
             trained((X/2, X/2, Y), model=Two(), engine=engine), trained((X/2, X/2, Y, Y), Two(), lambda p, a, b: (cross_entropy(p, a) + cross_entropy(p, b))/2, target=2, engine=engine),
             *[trained(dict(x=X, labels=Y), Named(form), None, engine=engine) for form in (dict, SimpleNamespace)],
             *[trained(dict(x=X, labels=Y), Named(form), target='labels', engine=engine) for form in (dict, SimpleNamespace)]]
    for got in forms:
        for a,b in zip(got.model.parameters(), want.model.parameters(), strict=True): torch.testing.assert_close(a, b)
        torch.testing.assert_close(got.loss, want.loss)
        assert isinstance(got.preds, torch.Tensor) and (got.targ if isinstance(got.targ, torch.Tensor) else got.targ[0]).equal(Y)

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = new_model()
    def forward(self, a, b): return self.inner(a + b)

@pytest.mark.parametrize('batch, target, said', [
    (X, None, r'a batch is a tuple \(inputs..., target\) or a dictionary, this is Tensor\(6, 8\)'), (dict(x=X, label=Y), 'lable', "no 'lable', which is the target; did you mean label"),
    ((X, Y), 'label', "target='label', but a batch is a tuple of 2"), ((X, Y), 2, 'say how many of the last are wanted'), (None, None, 'this is NoneType')])
def test_a_batch_that_cannot_be_read_is_told(batch, target, said):
    with pytest.raises((TypeError, ValueError), match=said): Learner(new_model(), SimpleNamespace(train=[batch], valid=[]), target=target).fit(1, valid=False)

# ---- what a model says

def test_get_preds_takes_other_data_and_gives_the_loss_of_each_item():
    learn = new_learner(MetricsCB())
    learn.fit(1)
    xy = points(30, 5)[:]
    preds, targs, losses = learn.get_preds([xy], with_loss=True)
    assert torch.equal(targs, xy[1])
    torch.testing.assert_close(losses, cross_entropy(preds, targs, reduction='none'))
    weighted = Learner(learn.model, learn.dls, lambda p, t: cross_entropy(p, t, label_smoothing=.1))
    torch.testing.assert_close(weighted.get_preds([xy], with_loss=True)[2], cross_entropy(preds, targs, reduction='none', label_smoothing=.1))
    with pytest.raises(ValueError, match='the model computes the loss of a batch itself'): trained(dict(x=X, labels=Y), Named(dict)).get_preds(with_loss=True)

def test_validate_is_what_an_epoch_says_and_leaves_no_trace():
    learn = new_learner(MetricsCB(), RecordCB())
    learn.fit(2)
    before, row = {k: v for k,v in vars(learn).items()}, dict(learn.rows[-1])
    got = learn.validate()
    assert got['valid_accuracy'] == row['valid_accuracy'] and got['valid_loss'] == pytest.approx(row['valid_loss'])
    assert {k: v for k,v in vars(learn).items()} == before and learn.rows[-1] == row and 'epoch' not in got
    assert Learner(learn.model, learn.dls).validate() == {'valid_loss': pytest.approx(row['valid_loss'])}

def test_the_learner_shows_who_acts_when():
    lines = repr(new_learner(Around('a', [], 1), SchedCB(lr=one_cycle(.1)), Diary())).splitlines()
    assert lines[0] == 'Learner(Sequential of 108 parameters, SGD, engine torch, 7 batches to learn from, 4 to be judged by)'
    assert lines[1].split()[:3] == ['SchedCB(lr)', 'before_fit,', 'before_batch']
    assert 'in place of predict, in place of get_loss' in lines[2]

def test_one_cycle_is_a_schedule_for_one_fit():
    a, b = new_learner(lr=.5), new_learner(SchedCB(lr=one_cycle(.5)))
    a.fit_one_cycle(2); b.fit(2)
    for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True): assert torch.equal(p, q)
    assert not a.cbs
    c = new_learner()
    c.fit(1, lr=.5)
    assert c.opt.param_groups[0]['lr'] == .5 and c.lr == .1

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

def test_a_line_that_the_disk_has_no_room_for_comes_with_the_next(tmp_path, monkeypatch, capsys):
    from miniai import callbacks
    real, calls = os.fsync, []
    def fsync(fd):
        calls.append(fd)
        if len(calls) == 2: raise OSError(28, 'No space left on device')
        real(fd)
    monkeypatch.setattr(callbacks.os, 'fsync', fsync)
    learn = new_learner(MetricsCB(), RecordCB(), LogCB(tmp_path/'log.jsonl'))
    learn.fit(3)
    assert [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()] == learn.rows
    assert 'its line comes with the next' in capsys.readouterr().err

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

def test_progress_of_a_stream_counts_without_an_end():
    class Screen(io.StringIO):
        def isatty(self): return True
    xy = points(20, 0)[:]
    class Stream:
        def __iter__(self): return iter([xy]*3)
    Learner(new_model(), SimpleNamespace(train=Stream(), valid=Stream()), cbs=[MetricsCB(), RecordCB(), ProgressCB(screen := Screen())]).fit(1)
    assert 'epoch 1/1 train' in screen.getvalue() and 'rows/s' in screen.getvalue()

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
