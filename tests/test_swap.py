"The joints: engine, module, optimizer, loader and loop are ours or PyTorch's in any combination, and the loss curve is one."
from itertools import product
import pytest, torch
from miniai import nn, optim
from miniai.autograd import engine
from miniai.data import BatchSampler, DataLoader, Dataset, Sampler
from miniai.datasets import DataLoaders
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

# -- every other optimizer, ours and PyTorch's, plain and flat, on either engine and module

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
    ways = [(dict(flat=True), optim), ({}, judge)] if name not in ('Muon', 'LAMB') else [({}, judge)]
    for engine_name,module,loop in (('tape', our_module, our_loop), ('torch', our_module, torch_loop), ('tape', torch_module, torch_loop)):
        for kw,owner in [({}, optim), *ways]:
            torch.testing.assert_close(losses(engine_name, module, loop, name, owner, **kw), want, rtol=1e-8, atol=1e-8)
