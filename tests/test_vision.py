"Models against twins written with PyTorch's layers; sizes and channels; recipes that rerun to the bit; test-time flip"
import math
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from miniai import recipes, vision
from miniai.autograd import Tape
from miniai.callbacks import MetricsCB, RecordCB
from miniai.core import Draw, set_seed
from miniai.data import Dataset
from miniai.datasets import DataLoaders
from miniai.fashion import SAMPLE, fashion_mnist
from miniai.learner import Learner
from miniai.loader import DataLoader
from miniai.training import AmpCB
from miniai.transform import Compose, CutMix, Cutout, Flip, Mixup, RandomCrop, RandomErase
from torch import nn

@pytest.fixture(scope='module')
def dd():
    whole = fashion_mnist(SAMPLE)
    for split in whole: whole[split] = whole[split].select(range(512 if split == 'train' else 200))
    return whole

# -- models: any size and channels

@pytest.mark.parametrize('size', [16, 17, 28, 32, 45])
@pytest.mark.parametrize('c_in', [1, 3])
@pytest.mark.parametrize('name', vision.MODELS)
def test_any_size_and_channels(name, c_in, size):
    model = vision.build(name, c_in=c_in, size=size, c=7)
    assert model(torch.randn(3, c_in, size, size)).shape == (3, 7)
    assert model.eval()(torch.randn(1, c_in, size, size)).isfinite().all()

@pytest.mark.parametrize('name, size, at_least', [('cnn', 7, 8), ('resnet', 15, 16), ('fastnet', 6, 7)])
def test_an_image_too_small_is_refused_and_the_next_size_taken(name, size, at_least):
    with pytest.raises(ValueError, match=f'{name}: .*{size}×{size}.*from {at_least}×{at_least} up'): vision.build(name, size=size)
    assert vision.build(name, size=at_least)(torch.randn(2, 1, at_least, at_least)).shape == (2, 10)

def test_fewer_widths_for_small_images():
    assert vision.resnet(size=4, widths=(8, 16, 32))(torch.randn(2, 1, 4, 4)).shape == (2, 10)

# -- the same nets with PyTorch's layers; parameters are numbered in the order of their making, so that dictionaries fit by order

def t_conv(a, b, k=3, stride=1, act=True):
    return nn.Sequential(nn.Conv2d(a, b, k, stride, k//2, bias=False), nn.BatchNorm2d(b), *[nn.ReLU()]*act)

class TBlock(nn.Module):
    def __init__(self, a, b, stride, pre):
        super().__init__()
        def before(a, b, stride): return nn.Sequential(nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, stride, 1, bias=False))
        self.convs = nn.Sequential(before(a, b, 1), before(b, b, stride)) if pre else nn.Sequential(t_conv(a, b), t_conv(b, b, stride=stride, act=False))
        self.idconv = nn.Identity() if a == b else nn.Conv2d(a, b, 1, bias=False) if pre else t_conv(a, b, 1, act=False)
        self.stride, self.pre = stride, pre
    def forward(self, x):
        short = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        y = self.convs(x) + self.idconv(short)
        return y if self.pre else y.relu()

def t_resnet(c_in, widths, c, pre):
    blocks = [TBlock(a, b, 1 + (i > 0), pre) for i,(a,b) in enumerate(zip((c_in, *widths[:-1]), widths, strict=True))]
    end = [nn.BatchNorm2d(widths[-1]), nn.ReLU()] if pre else []
    return nn.Sequential(*blocks, *end, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], c, bias=False), nn.BatchNorm1d(c))

class TFast(nn.Module):
    def __init__(self, c_in, widths, c):
        super().__init__()
        a,b,d = widths
        def down(a, b): return nn.ModuleList([nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)])
        def pair(n): return nn.Sequential(t_conv(n, n), t_conv(n, n))
        self.parts = nn.ModuleList([t_conv(c_in, a, 5, 2), pair(a), down(a, b), pair(b), down(b, d), pair(d)])
        self.head = nn.Linear(d, c, bias=False)
    def forward(self, x):
        stem,r1,d1,r2,d2,r3 = self.parts
        x = stem(x)
        x = x + r1(x)
        for (conv,norm),r in ((d1, r2), (d2, r3)):
            x = norm(conv(F.max_pool2d(x, 2))).relu()
            x = x + r(x)
        return self.head(x.amax((2, 3)))/8

SMALL,FULL = (4, 8, 16),(16, 32, 64, 128, 256, 512)
TWINS = {'resnet':              ((3, 20, 20), lambda: vision.resnet(3, 20, 5, SMALL), lambda: t_resnet(3, SMALL, 5, False)),
         'resnet, ReLU before': ((3, 20, 20), lambda: vision.resnet(3, 20, 5, SMALL, pre=True), lambda: t_resnet(3, SMALL, 5, True)),
         "the course's, odd":   ((1, 29, 29), lambda: vision.resnet(1, 29, 5), lambda: t_resnet(1, FULL, 5, False)),
         'fastnet':             ((1, 28, 28), lambda: vision.fastnet(1, 28, 5, SMALL), lambda: TFast(1, SMALL, 5))}

@pytest.mark.parametrize('name', TWINS)
def test_like_a_twin_of_pytorchs_layers(name):
    shape, *makers = TWINS[name]
    ours, theirs = (make().double() for make in makers)
    set_seed(0)
    for p in ours.parameters(): p.data.add_(torch.randn_like(p), alpha=.1)        # scales and shifts that are not 1 and 0
    mine = ours.state_dict()
    assert [v.shape for v in mine.values()] == [v.shape for v in theirs.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), mine.values(), strict=True)))
    x, y = torch.randn(6, *shape, dtype=torch.double), torch.arange(6) % 5
    for m in (ours, theirs): F.cross_entropy(m(x), y).backward()
    for (k,a),b in zip(ours.named_parameters(), theirs.parameters(), strict=True): torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10, msg=k)
    for a,b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True): torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

@pytest.mark.parametrize('name', ['resnet', 'fastnet'])
def test_on_the_tape_too(name):
    set_seed(0)
    model = vision.build(name, size=16).double()
    x, y = torch.randn(8, 1, 16, 16, dtype=torch.double), torch.arange(8)
    F.cross_entropy(model(x), y).backward()
    want = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters(): p.grad = None
    with Tape(): F.cross_entropy(model(x), y).backward()
    for p,g in zip(model.parameters(), want, strict=True): torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-10)

def test_he_init_keeps_the_size_and_touches_kernels_only():
    set_seed(0)
    model = vision.resnet(pre=True)
    for name,p in model.named_parameters():
        if p.ndim == 4 and p.numel() > 2000: assert abs(p.std()/(2/p[0].numel())**.5 - 1) < .1, name
        if p.ndim == 1: assert p.eq(p[0]).all()

# -- augmentation: the same for any number of workers and on either engine, in range, labels right

EVERY = Compose(Flip(), RandomCrop(2), Cutout(6), RandomErase(), CutMix(10))

def batches(workers=0, seed=3, epochs=2, context=None):
    g = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8, generator=g), torch.arange(100) % 10)
    dl = DataLoader(ds, 32, shuffle=True, seed=seed, num_workers=workers, context=context, transform=EVERY)
    return [b for _ in range(epochs) for b in dl]

def test_augmentation_is_a_function_of_seed_epoch_and_row():
    want = batches()
    for kw in (dict(workers=2), dict(workers=3, context='thread'), {}):
        for (x, y), (x2, y2) in zip(batches(**kw), want, strict=True): assert x.equal(x2) and y.equal(y2)
    assert not batches(seed=4)[0][0].equal(want[0][0])
    assert not want[4][0].equal(want[0][0])
    for x, y in want:
        assert x.dtype == torch.uint8 and x.shape[1:] == (1, 28, 28)
        torch.testing.assert_close(y.sum(1), torch.ones(len(y)))

def test_labels_follow_the_images():
    "Images that are one number everywhere, which is their label: what a mixture says is what it is made of"
    y = torch.arange(10).repeat(6)
    x = (y*20.).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    for mix in (Mixup(10), CutMix(10)):
        mixed, soft = mix((x, y), Draw(1, 0, range(60)))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ (torch.arange(10.)*20), rtol=1e-4, atol=1e-3)

# -- test-time flip

@pytest.mark.parametrize('amp', [None, 'bf16'])
def test_test_time_flip_is_the_mean_of_both_predictions(dd, amp):
    set_seed(0)
    dls = DataLoaders.from_dd(dd, bs=64)
    learn = Learner(vision.cnn(), dls, cbs=[AmpCB(amp)] if amp else [])
    one, targ = learn.get_preds()
    two, _ = learn.get_preds([(x.flip(-1), y) for x,y in dls.valid])
    with learn.with_cbs(recipes.FlipTTA()):
        both, same = learn.get_preds()
        row = learn.validate()
    assert not one.equal(two) and same.equal(targ) and both.equal((one+two)/2)
    torch.testing.assert_close(row['valid_loss'], F.cross_entropy(both.float(), targ).item(), rtol=1e-2 if amp else 1e-5, atol=1e-6)
    assert learn.get_preds()[0].equal(one)                                    # gone with the callback

def test_test_time_flip_leaves_training_alone(dd):
    def losses(*cbs):
        set_seed(0)
        learn = Learner(vision.cnn(), DataLoaders.from_dd(dd, bs=64), cbs=[RecordCB(), *cbs])
        learn.fit(1)
        return learn.losses
    assert losses() == losses(recipes.FlipTTA())

# -- small first

class Shapes(recipes.Callback):
    order = 100
    def before_fit(self, learn): self.seen = []
    def before_batch(self, learn): self.seen.append((learn.epoch, learn.training, tuple(learn.batch[0].shape[1:])))

@pytest.mark.parametrize('c', [1, 3])
def test_a_smaller_image_is_what_pytorchs_filter_makes_of_it(c):
    x = torch.rand(4, c, 28, 28).to(memory_format=torch.channels_last)
    small = recipes.shrink(x, 14)
    assert small.shape == (4, c, 14, 14) and small.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small, F.interpolate(x.contiguous(), (14, 14), mode='bilinear', antialias=True))
    flat = torch.full((1, c, 28, 28), .7)
    torch.testing.assert_close(recipes.shrink(flat, 11), torch.full((1, c, 11, 11), .7))
    assert (recipes.shrink(x, 14).mean() - x.mean()).abs() < .01

@pytest.mark.parametrize('compile', [False, 'replay'])
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_the_first_epochs_are_small_on_either_engine_and_replayed(dd, engine, compile):
    def run(**kw):
        set_seed(0)
        learn = Learner(vision.fastnet(widths=(4, 8, 16)), DataLoaders.from_dd(dd, bs=128, drop_last=True), lr=.02,
                        cbs=[recipes.SizesCB((16, 20)), shapes := Shapes(), RecordCB()], **kw)
        learn.fit(3)
        return learn,shapes.seen
    learn,seen = run(engine=engine, compile=compile)
    assert {o[2] for o in seen if o[:2] == (0, True)} == {(1, 16, 16)} and {o[2] for o in seen if o[:2] == (1, True)} == {(1, 20, 20)}
    assert {o[2] for o in seen if o[:2] == (2, True) or not o[1]} == {(1, 28, 28)}
    plain,_ = run()
    torch.testing.assert_close(torch.tensor(learn.losses), torch.tensor(plain.losses), rtol=1e-3, atol=1e-4)

# -- recipes

def short(name, **kw): return replace(recipes.recipe(name), bs=64, epochs=2, **kw)

@pytest.mark.parametrize('name', recipes.RECIPES)
def test_a_recipe_trains_and_reruns_to_the_bit(dd, name):
    r = replace(short(name, model_args=dict(widths=(8, 16, 32))), epochs=4)
    shares = ([*r.keep, *r.keep[-1:]*4] or [1]*4)[:4]
    def run(seed=0, data_seed=0):
        learn = recipes.learner(r, recipes.loaders(r, dd, data_seed), seed, [MetricsCB(), RecordCB()])
        learn.fit(r.epochs)
        return learn
    first, again = run(), run()
    assert first.losses == again.losses and len(first.losses) == sum(round(512*share)//64 for share in shares)
    for a,b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True): assert a.equal(b)
    assert first.rows[-1]['valid_loss'] < .85*math.log(10) and first.rows[-1]['valid_accuracy'] > .35      # chance is log 10 and .1
    assert run(seed=1).losses != first.losses and run(data_seed=1).losses != first.losses

@pytest.mark.parametrize('name', recipes.RECIPES)
def test_what_a_recipe_says_is_what_the_learner_does(dd, name):
    r = replace(short(name), epochs=4)
    dls = recipes.loaders(r, dd)
    learn = recipes.learner(r, dls)
    seen = []
    class Watch(recipes.Callback):
        order = 100
        def before_fit(self, learn): self.sides,self.rows = [],[]
        def before_train(self, learn): self.rows.append(len(learn.dl.batch_sampler.sampler))
        def after_predict(self, learn):
            if not learn.training: return
            x = learn.batch[0]
            self.sides[learn.epoch:] = [x.shape[-1]]
            seen.append((x.is_contiguous(memory_format=torch.channels_last), learn.preds.dtype, len(x), [g['lr'] for g in learn.opt.param_groups]))
    with learn.with_cbs(watch := Watch()): learn.fit(r.epochs, valid=False)
    last, kinds, sizes, rates = zip(*seen, strict=True)
    assert all(last) and set(kinds) == {torch.bfloat16} and set(sizes) == {64}
    assert watch.sides == [*r.sizes, *[28]*r.epochs][:r.epochs]
    assert watch.rows == [round(512*share) for share in ([*r.keep, *r.keep[-1:]*r.epochs] or [1]*r.epochs)[:r.epochs]]
    assert type(learn.opt) is r.opt and learn.opt.fused
    for peak, each in zip(r.lr, zip(*rates, strict=True), strict=True): assert peak == pytest.approx(max(each)) and each[0] < peak/5 and each[-1] < peak/5
    assert isinstance(dls.train.transform.steps[0], Compose) and not any(isinstance(o, Compose) for o in dls.valid.transform.steps)

def test_recipes_are_told_by_name_and_can_be_read():
    with pytest.raises(ValueError, match='no recipe fashion-fas; did you mean fashion-fast'): recipes.recipe('fashion-fas')
    for name,r in recipes.RECIPES.items():
        assert r.name == name and f"name='{name}'" in repr(r) and 'object at' not in repr(r) and repr(r).count('\n') < 16
    with pytest.raises(AttributeError): recipes.recipe('fashion-fast').epochs = 7
