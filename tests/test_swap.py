"The joints: engine, module, optimizer, loader and loop are ours or PyTorch's in any combination, and the loss curve is one."
from itertools import product
import pytest, torch
from miniai import nn, optim
from miniai.autograd import engine
from miniai.data import Dataset
from miniai.datasets import DataLoaders
from miniai.loader import DataLoader
from miniai.sampler import BatchSampler, Sampler
from miniai.learner import Callback, Learner

STEPS, BS = 50, 16

def data(dtype):
    gen = torch.Generator().manual_seed(0)
    targ = torch.randint(0, 5, (200,), generator=gen)
    return Dataset(torch.randn(200, 1, 8, 8, generator=gen).to(dtype) + targ.view(-1, 1, 1, 1)/5, targ)

def our_module():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
def torch_module():
    t = torch.nn
    return t.Sequential(t.Conv2d(1, 4, 3, 2, 1, bias=False), t.BatchNorm2d(4), t.ReLU(), t.Flatten(), t.Linear(64, 5))

def our_loader(ds):   return DataLoader(ds, BS, shuffle=True)
def torch_loader(ds): return torch.utils.data.DataLoader(ds, sampler=BatchSampler(Sampler(ds, shuffle=True), BS), batch_size=None)

class Losses(Callback):
    def before_fit(self, learn): self.all = []
    def after_loss(self, learn): self.all.append(learn.loss.item())

def our_loop(engine_name, model, opt_func, dl):
    Learner(model, DataLoaders(dl, dl), lr=.05, opt_func=opt_func, engine=engine_name, cbs=(cb := Losses())).fit(4, valid=False)
    return cb.all[:STEPS]

def torch_loop(engine_name, model, opt_func, dl):
    opt, losses = opt_func(model.parameters(), lr=.05), []
    model.train()
    for _ in range(4):
        for xb, yb in dl:
            with engine(engine_name):
                loss = torch.nn.functional.cross_entropy(model(xb), yb)
                loss.backward(); opt.step(); opt.zero_grad()
            losses.append(loss.item())
    return losses[:STEPS]

JOINTS = dict(engine=('tape', 'torch'), module=(our_module, torch_module), optimizer=(optim.SGD, torch.optim.SGD), loader=(our_loader, torch_loader), loop=(our_loop, torch_loop))

def curve(engine_name, module, optimizer, loader, loop, dtype):
    torch.manual_seed(0)
    return loop(engine_name, module().to(dtype), lambda ps, lr: optimizer(ps, lr=lr, momentum=.9, weight_decay=1e-3), loader(data(dtype)))

@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=['float32', 'float64'])
@pytest.mark.parametrize('ours', list(product([True, False], repeat=len(JOINTS))), ids=lambda o: ''.join('mt'[not x] for x in o))
def test_any_combination_has_the_same_loss_curve(ours, dtype, tol):
    mixed = [pair[not mine] for pair, mine in zip(JOINTS.values(), ours, strict=True)]
    torchs = [pair[1] for pair in JOINTS.values()]
    got, want = curve(*mixed, dtype), curve(*torchs, dtype)
    assert len(got) == STEPS and want[-1] < want[0]/2
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=tol, atol=tol)

# ---- every layer type

def head(t, d): return t.Sequential(t.Flatten(), t.Linear(d, 5))

def stacked(t, *layers, d): return t.Sequential(t.Conv2d(1, 4, 3, padding=1), *layers, head(t, d))

class Steps(torch.nn.Module):
    "A sequence layer over the rows of the image; `take` finds the sequence in what it gives"
    def __init__(self, t, layer, d, take=lambda y: y):
        super().__init__()
        self.layer,self.head,self.take = layer,head(t, d),take
    def forward(self, x): return self.head(self.take(self.layer(x[:, 0])))

class Look(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x): return self.m(x, x, x)[0]

class Twice(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x): return self.m(x, x)

class Rows(torch.nn.Module):
    "A cell from row to row of the image"
    def __init__(self, t, cell):
        super().__init__()
        self.cell,self.head = cell,t.Linear(6, 5)
    def forward(self, x):
        state = None
        for row in x[:, 0].unbind(1): state = self.cell(row, state)
        return self.head(state[0] if isinstance(state, tuple) else state)

class Words(torch.nn.Module):
    "The image as words of 6 letters, one for each brightness"
    def __init__(self, t):
        super().__init__()
        self.table,self.head = t.Embedding(6, 3, padding_idx=0),head(t, 64*3)
    def forward(self, x): return self.head(self.table((x.flatten(1)+3).clamp(0, 5).long()))

LAYERS = {
    **{name: (lambda t, name=name: stacked(t, getattr(t, name)(), d=256)) for name in
       ('ReLU', 'ReLU6', 'SELU', 'SiLU', 'Mish', 'Hardswish', 'Hardsigmoid', 'Sigmoid', 'LogSigmoid', 'Tanh', 'Softsign', 'LeakyReLU', 'PReLU', 'ELU', 'CELU', 'Hardtanh', 'GELU', 'Softplus', 'Identity')},
    **{name: (lambda t, name=name: stacked(t, getattr(t, name)(1), d=256)) for name in ('Softmax', 'LogSoftmax')},
    'GLU':         lambda t: stacked(t, t.GLU(1), d=128),
    'Dropout':     lambda t: stacked(t, t.Dropout(.0), d=256),
    'Dropout2d':   lambda t: stacked(t, t.Dropout2d(.0), d=256),
    'BatchNorm2d': lambda t: stacked(t, t.BatchNorm2d(4), d=256),
    'BatchNorm1d': lambda t: stacked(t, t.Flatten(2), t.BatchNorm1d(4), d=256),
    'BatchNorm3d': lambda t: t.Sequential(t.Conv3d(1, 2, 1), t.BatchNorm3d(2), head(t, 128)),
    'GroupNorm':   lambda t: stacked(t, t.GroupNorm(2, 4), d=256),
    'InstanceNorm2d': lambda t: stacked(t, t.InstanceNorm2d(4, affine=True), d=256),
    'LayerNorm':   lambda t: stacked(t, t.LayerNorm((8, 8)), d=256),
    'RMSNorm':     lambda t: stacked(t, t.RMSNorm(8, eps=1e-6), d=256),
    'Conv1d':      lambda t: t.Sequential(t.Flatten(2), t.Conv1d(1, 4, 5, stride=2, padding=2, padding_mode='reflect'), head(t, 128)),
    'Conv2d':      lambda t: stacked(t, t.Conv2d(4, 6, 3, dilation=2, groups=2), d=96),
    'Conv3d':      lambda t: t.Sequential(t.Conv3d(1, 3, (1, 3, 3)), head(t, 108)),
    **{f'ConvTranspose{n}d': (lambda t, n=n: t.Sequential(t.Flatten(2) if n == 1 else t.Identity(), getattr(t, f'ConvTranspose{n}d')(1, 2, 2, 2), head(t, 64*2*2**n))) for n in (1, 2, 3)},
    **{f'{kind}Pool2d': (lambda t, kind=kind: stacked(t, getattr(t, f'{kind}Pool2d')(2), d=64)) for kind in ('Max', 'Avg')},
    **{f'Adaptive{kind}Pool2d': (lambda t, kind=kind: stacked(t, getattr(t, f'Adaptive{kind}Pool2d')(3), d=36)) for kind in ('Max', 'Avg')},
    **{f'{kind}Pad2d': (lambda t, kind=kind: stacked(t, getattr(t, f'{kind}Pad2d')(1), d=400)) for kind in ('Zero', 'Reflection', 'Replication', 'Circular')},
    'ConstantPad2d': lambda t: stacked(t, t.ConstantPad2d(1, .5), d=400),
    'Upsample':      lambda t: stacked(t, t.Upsample(scale_factor=2, mode='bilinear'), d=1024),
    'PixelShuffle':  lambda t: stacked(t, t.PixelShuffle(2), d=256),
    'PixelUnshuffle': lambda t: stacked(t, t.PixelUnshuffle(2), d=256),
    'Unflatten':     lambda t: stacked(t, t.Unflatten(1, (2, 2)), d=256),
    'Embedding':     Words,
    **{name: (lambda t, name=name: Steps(t, getattr(t, name)(8, 6, 2, batch_first=True, bidirectional=True), 96, lambda y: y[0])) for name in ('RNN', 'LSTM', 'GRU')},
    'MultiheadAttention': lambda t: Steps(t, Look(t.MultiheadAttention(8, 2, batch_first=True)), 64),
    **{f'{name}Cell': (lambda t, name=name: Rows(t, getattr(t, f'{name}Cell')(8, 6))) for name in ('RNN', 'LSTM', 'GRU')},
    'TransformerEncoder': lambda t: Steps(t, t.TransformerEncoder(t.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), 2), 64),
    'TransformerDecoder': lambda t: Steps(t, Twice(t.TransformerDecoder(t.TransformerDecoderLayer(8, 2, 16, dropout=0., batch_first=True), 2, t.LayerNorm(8))), 64),
    'TransformerEncoderLayer': lambda t: Steps(t, t.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), 64),
}

def layer_curve(name, home, engine_name, optimizer, steps=8):
    torch.manual_seed(0)
    model = LAYERS[name](home).double()
    ds,opt,losses = data(torch.float64),optimizer(model.parameters(), lr=.01, momentum=.9),[]
    x,targ = ds[:32]
    if name in ('BatchNorm3d', 'Conv3d', 'ConvTranspose3d'): x = x.unflatten(2, (2, 4) if name == 'ConvTranspose3d' else (1, 8))
    for _ in range(steps):
        with engine(engine_name):
            loss = torch.nn.functional.cross_entropy(model(x), targ)
            loss.backward(); opt.step(); opt.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)

@pytest.mark.parametrize('name', LAYERS)
def test_any_layer_on_any_engine_with_any_optimizer_has_the_same_loss_curve(name):
    want = layer_curve(name, torch.nn, 'torch', torch.optim.SGD)
    assert want[-1] < want[0]
    for ours in (nn, torch.nn):
        for engine_name in ('tape', 'torch'):
            torch.testing.assert_close(layer_curve(name, ours, engine_name, optim.SGD), want, rtol=1e-9, atol=1e-9)

def test_every_layer_type_is_in_the_matrix():
    plain = {name for name in nn.layers.__all__ + nn.sequence.__all__ if not name.endswith(('1d', '3d'))} - {'attention', 'Flatten', 'Linear', 'TransformerDecoderLayer'}
    assert plain <= LAYERS.keys()

# -- every other optimizer, ours and PyTorch's, plain and fused, on either engine and module

SETTINGS = {'SGD': dict(lr=.05, momentum=.9), 'RMSprop': dict(lr=.003), 'Adam': dict(lr=.01), 'AdamW': dict(lr=.01), 'Adagrad': dict(lr=.05), 'Muon': dict(lr=.05),
            'Lion': dict(lr=.003), 'LAMB': dict(lr=.03), 'ScheduleFreeAdamW': dict(lr=.02)}

def losses(engine_name, module, loop, name, owner, **kw):
    "With PyTorch's engine, module and loop where not said otherwise; a loader of ours"
    torch.manual_seed(0)
    def opt_func(ps, lr): return getattr(owner, name)([p for p in ps if p.ndim == 2 or name != 'Muon'], **SETTINGS[name], **kw)
    return torch.tensor(loop(engine_name, module().to(torch.float64), opt_func, our_loader(data(torch.float64))))

@pytest.mark.parametrize('name', SETTINGS)
def test_every_optimizer_swaps_with_pytorchs_on_either_engine_and_module(name):
    judge = torch.optim if hasattr(torch.optim, name) else optim      # PyTorch has no Lion, LAMB and schedule-free: there ours under its parts
    want = losses('torch', torch_module, torch_loop, name, judge)
    assert want[-5:].mean() < want[0]*.8
    ways = [*[(dict(fused=True), optim)]*bool(getattr(optim, name).kernel), ({}, judge)]
    for engine_name,module,loop in (('tape', our_module, our_loop), ('torch', our_module, torch_loop), ('tape', torch_module, torch_loop)):
        for kw,owner in [({}, optim), *ways]:
            torch.testing.assert_close(losses(engine_name, module, loop, name, owner, **kw), want, rtol=1e-8, atol=1e-8)
