"""What test_distributed.py looks at: runs in 1, 2 and 4 processes.  `python tests/world.py FOLDER` starts them, all from one import, and leaves
`FOLDER/WORLD-RANK.pt`: {name of a case: what it returned, or its error as text}."""
import os, signal, sys, time, traceback
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
import torch
import miniai.inference  # noqa: F401  gives the learner `save`
from torch import distributed as dist, multiprocessing
from miniai import distributed, nn, optim
from miniai.callbacks import InterruptCB, LogCB, MetricsCB, RecordCB, SchedCB
from miniai.checkpoint import CheckpointCB, checkpoints
from miniai.core import set_seed
from miniai.data import Dataset
from miniai.datasets import DataLoaders
from miniai.distributed import DistributedCB, Reducer
from miniai.learner import Callback, CancelFitException, Learner
from miniai.loader import DataLoader
from miniai.schedule import one_cycle
from miniai.sharded import shard, sharded
from miniai.training import AccumulateCB, AmpCB, ClipCB, EMACB, tokens
from miniai.transform import Mixup

WORLDS,ENGINES = (2, 1, 4),('torch', 'tape')     # 2 before 1 before 4: a run goes from one to the next
N,BS,EPOCHS = 65,16,2                            # 5 batches, of which the last holds one row: there are processes without any

# data, models, loaders

def data(n=N, images=False, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *((2, 6, 6) if images else (8,)), generator=g, dtype=torch.float64)
    return Dataset(x=x.to(dtype), y=(x.flatten(1)[:, 0]*x.flatten(1)[:, 1] > 0).long() + (x.flatten(1)[:, 2] > 1).long())

def mlp(m=nn, drop=0.):
    set_seed(0)
    return m.Sequential(m.Linear(8, 16), m.ReLU(), *[m.Dropout(drop)]*(drop > 0), m.Linear(16, 16), m.ReLU(), m.Linear(16, 3)).double()

def conv(m=nn):
    set_seed(0)
    return m.Sequential(m.Conv2d(2, 4, 3, bias=False), m.BatchNorm2d(4), m.ReLU(), m.Flatten(), m.Linear(64, 8, bias=False), m.BatchNorm1d(8), m.Linear(8, 3)).double()

def ours(ds, train): return DataLoader(ds, BS if train else 20, shuffle=train, as_tuple=True)
def pair(rows): return tuple(torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in ('x', 'y'))
def torchs(ds, train, **kw):
    g = torch.Generator().manual_seed(5)
    return torch.utils.data.DataLoader(ds, BS if train else 20, shuffle=train, collate_fn=pair, generator=g, **kw)

def plain(): return [MetricsCB(), RecordCB()]
def learner(model=None, *cbs, loader=ours, n=N, images=False, dist_cb=None, opt=optim.AdamW, dtype=torch.float64, watch=plain, **kw):
    dls = DataLoaders(loader(data(n, images, 0, dtype), True), loader(data(33, images, 1, dtype), False))
    cbs = [DistributedCB() if dist_cb is None else dist_cb(), *watch(), *cbs]
    return Learner(mlp() if model is None else model, dls, lr=.01, opt_func=opt, cbs=cbs, **kw)

def whole(x): return (x.full_tensor() if hasattr(x, 'full_tensor') else x).detach().clone()
def result(learn):
    return dict(losses=list(learn.losses), rows=[{k: v for k,v in r.items() if k != 'seconds'} for r in learn.rows], steps=learn.steps,
                weights={k: whole(x) for k,x in learn.model.state_dict().items()})

def fit(*args, epochs=EPOCHS, resume=None, **kw):
    learn = learner(*args, **kw)
    learn.fit(epochs, resume=resume)
    return result(learn)

# curves that are to be the same in any number of processes

class Halves(Callback):
    "Two groups of weights, the second of which is not stepped: some parameters get gradients, and some none"
    def before_fit(self, learn): list(learn.model.parameters())[0].requires_grad_(False)

class Forked(nn.Module):
    "A layer that few rows pass: in most batches it has gradients in one process only, or in none"
    def __init__(self):
        set_seed(0)
        self.a,self.b,self.c = nn.Linear(8, 16).double(),nn.Linear(8, 16).double(),nn.Linear(16, 3).double()
    def forward(self, x): return self.c((self.a(x) + (self.b(x)*(x[:, :1] > 1.7) if (x[:, 0] > 1.7).any() else 0)).relu())

class Cancelled(Callback):
    "The last batch of an epoch is left out, so that a window ends before its time"
    order = 1
    def before_batch(self, learn):
        from miniai.learner import CancelBatchException
        if learn.training and learn.iter == 4: raise CancelBatchException

def mixed(ds, train): return DataLoader(ds, BS if train else 20, shuffle=train, as_tuple=True, transform=Mixup(3) if train else None)

def right(preds, targ): return (preds.argmax(1) == targ)[targ != 2].double().mean()
def by_tokens(model=None, **kw):
    count = tokens(ignore=2)
    return fit(model, AccumulateCB(2, count), watch=lambda: [MetricsCB(weight=count, right=right), RecordCB(weight=count)], loss_func=nn.CrossEntropyLoss(ignore_index=2), **kw)

class Right:
    "Counts, and adds itself up over processes as the metrics of torchmetrics do"
    def __init__(self): self.reset()
    def reset(self): self.counts = torch.zeros(2, dtype=torch.float64)
    def update(self, preds, targ): self.counts += torch.tensor([(preds.argmax(1) == targ).sum(), len(targ)])
    @contextmanager
    def sync_context(self):
        own,self.counts = self.counts,distributed.total(self.counts) if dist.is_initialized() else self.counts
        yield
        self.counts = own
    def compute(self):
        with self.sync_context(): return (self.counts[0]/self.counts[1]).item()
    def state_dict(self): return dict(counts=self.counts)
    def load_state_dict(self, state): self.counts = state['counts'].clone()

def counting(): return [MetricsCB(right=Right()), RecordCB()]

CLASSES = torch.tensor([1., 2., 4.], dtype=torch.float64)
def by_classes(**kw):
    "A loss that weights its classes, and a weight of one's own, which knows nothing of spare parts"
    def count(learn): return CLASSES[learn.targ].sum()
    return fit(None, AccumulateCB(2, count), watch=lambda: [RecordCB(weight=count)], loss_func=nn.CrossEntropyLoss(CLASSES), **kw)

CURVES = {
    'classes':      lambda e: by_classes(engine=e),
    'object':       lambda e: fit(engine=e, watch=counting),
    'plain':        lambda e: fit(engine=e),
    'even':         lambda e: fit(engine=e, n=64),
    'accumulate':   lambda e: fit(None, AccumulateCB(2), engine=e),
    'accumulate 3': lambda e: fit(None, AccumulateCB(3), ClipCB(.5), engine=e, n=70),
    'tokens':       lambda e: by_tokens(engine=e),
    'a window cut': lambda e: fit(None, AccumulateCB(2), Cancelled(), engine=e),
    'clip':         lambda e: fit(None, ClipCB(.1), engine=e),
    'average':      lambda e: fit(None, EMACB(.9), engine=e),
    'schedule':     lambda e: fit(None, SchedCB(lr=one_cycle(.02)), engine=e),
    'sgd':          lambda e: fit(engine=e, opt=lambda ps, lr: optim.SGD(ps, lr=lr, momentum=.9, nesterov=True)),
    'fused':        lambda e: fit(engine=e, opt=lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True)),
    "torch's":      lambda e: fit(mlp(torch.nn), loader=torchs, engine=e, opt=lambda ps, lr: torch.optim.AdamW(ps, lr=lr)),
    "torch's sgd":  lambda e: fit(mlp(torch.nn), engine=e, opt=lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=.9)),
    'compiled':     lambda e: fit(engine=e, compile='replay'),
    'compiled, accumulate': lambda e: fit(None, AccumulateCB(2), engine=e, compile='replay'),
    'forked':       lambda e: fit(Forked(), engine=e),
    'frozen':       lambda e: fit(None, Halves(), engine=e),
    'small buckets':lambda e: fit(engine=e, dist_cb=lambda: DistributedCB(mb=1e-4)),
    'batch norm':   lambda e: fit(conv(), engine=e, images=True, n=66, dist_cb=lambda: DistributedCB(sync_bn=True)),
    "batch norm, torch's": lambda e: fit(conv(torch.nn), AccumulateCB(2), engine=e, images=True, n=66, dist_cb=lambda: DistributedCB(sync_bn=True)),
    'sharded':      lambda e: fit(None, ClipCB(.5), engine=e, opt=sharded(optim.AdamW)),
    'sharded, accumulate, fused': lambda e: fit(None, AccumulateCB(2), engine=e, opt=sharded(lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True))),
    "sharded, torch's": lambda e: fit(mlp(torch.nn), engine=e, opt=sharded(torch.optim.AdamW)),
    'sharded, compiled': lambda e: fit(engine=e, compile='replay', opt=sharded(optim.AdamW)),
    'mixup':        lambda e: fit(conv(), engine=e, images=True, n=66, loader=mixed, dist_cb=lambda: DistributedCB(sync_bn=True)),
}
TORCH_ONLY = {
    'in shards':    lambda e: fit(shard(mlp(torch.nn)), ClipCB(.5), EMACB(.9)),
    'in shards, accumulate': lambda e: fit(shard(mlp()), AccumulateCB(2)),
    'in shards, tokens': lambda e: by_tokens(shard(mlp())),
    "in shards, torch's": lambda e: fit(shard(mlp(torch.nn)), opt=lambda ps, lr: torch.optim.AdamW(ps, lr=lr)),
    'in shards, batch norm': lambda e: fit(shard(conv(torch.nn)), images=True, n=66, dist_cb=lambda: DistributedCB(sync_bn=True)),
    'ddp':          lambda e: fit(None, AccumulateCB(2), ClipCB(.5), dist_cb=lambda: DistributedCB(ddp={})),
    "ddp, torch's": lambda e: fit(mlp(torch.nn), loader=torchs, dist_cb=lambda: DistributedCB(ddp=dict(gradient_as_bucket_view=True))),
    'ddp, batch norm': lambda e: fit(conv(torch.nn), images=True, n=66, dist_cb=lambda: DistributedCB(ddp={}, sync_bn=True)),
}
LOOSE = {
    'bf16':         lambda e: fit(mlp().float(), AmpCB(), engine=e, dtype=torch.float32),
    'half':         lambda e: fit(engine=e, dist_cb=lambda: DistributedCB(half=True)),
    'ddp, half':    lambda e: fit(dist_cb=lambda: DistributedCB(half=True, ddp={})),
}

# runs that are stopped and taken up

class StopAt(Callback):
    "The run ends after so many batches of training"
    order = 1000
    def __init__(self, n): self.n = n
    def after_batch(self, learn):
        self.n -= learn.training
        if learn.training and not self.n: raise CancelFitException

class KillAt(Callback):
    "SIGTERM to one process, in the middle of a batch"
    order = 5
    def __init__(self, rank, batch): self.rank,self.batch = rank,batch
    def after_loss(self, learn):
        if learn.training and (learn.epoch, learn.iter) == self.batch and distributed.process_rank() == self.rank: os.kill(os.getpid(), signal.SIGTERM)

def run_of(name): return FOLDER/'runs'/name

def stage(name, stop=0, resume=True, cbs=(), every=1, model=None, epochs=3, **kw):
    "A part of a run: up to a stop, or to the end"
    run = run_of(name)
    cbs = [ClipCB(.5), SchedCB(lr=one_cycle(.02)), *cbs, CheckpointCB(run, every=every), StopAt(stop)]
    return fit(model() if model else None, *cbs, epochs=epochs, resume=run if resume else None, **kw)

def undisturbed(cbs=(), model=None, epochs=3, **kw):
    return fit(model() if model else None, ClipCB(.5), SchedCB(lr=one_cycle(.02)), *cbs, epochs=epochs, **kw)

STAGED = {
    'ours':         dict(cbs=lambda: [EMACB(.9)]),
    'accumulate':   dict(cbs=lambda: [AccumulateCB(2)]),
    "torch's":      dict(cbs=lambda: [], loader=torchs, model=lambda: mlp(torch.nn), opt=lambda ps, lr: torch.optim.AdamW(ps, lr=lr)),
    'sharded':      dict(cbs=lambda: [], opt=sharded(optim.AdamW)),
    'object':       dict(cbs=lambda: [], watch=counting),
}
def journey(world, engine, first=None):
    "Every stage of the way 2 -> 1 -> 4; the undisturbed run is made by one process"
    found = {}
    for k,how in STAGED.items():
        how = {**how, 'engine': engine}
        name,cbs = f'{k}, {engine}',how.pop('cbs')
        if world == 1 and k == 'ours': how['dist_cb'] = Callback            # one process needs no DistributedCB
        if world == 1: found[f'{k}: undisturbed'] = undisturbed(cbs(), **how)
        found[k] = stage(name, stop={2: 8, 1: 2, 4: 0}[world], resume=world != 2, cbs=cbs(), **how)
    return found

def shards_journey(world):
    "The same of a model in shards, which one process has whole"
    how = dict(model=lambda: shard(mlp(torch.nn)))
    found = dict(undisturbed=undisturbed([EMACB(.9)], **how)) if world == 1 else {}
    return found | dict(run=stage('in shards', stop={2: 8, 1: 2, 4: 0}[world], resume=world != 2, cbs=[EMACB(.9)], **how),
                        files=sorted(str(o.relative_to(run_of('in shards'))) for o in run_of('in shards').rglob('*') if o.is_file()))

def again(engine, **how):
    "Stopped and taken up by the same number of processes, with dropout"
    how = dict(model=lambda: mlp(drop=.3), engine=engine, **how)
    name = f'again, {dist.get_world_size() if dist.is_initialized() else 1}, {engine}, {len(how)}'
    straight = undisturbed(**how)
    stage(name, stop=7, resume=False, **how)
    if dist.is_initialized(): dist.barrier()
    return straight, stage(name, **how)

def again_in_shards(world):
    how = dict(model=lambda: shard(mlp(torch.nn, .3)))
    straight = undisturbed(**how)
    stage(f'again in shards, {world}', stop=7, resume=False, **how)
    return straight, stage(f'again in shards, {world}', **how)

def window(world):
    "One process stops between the two batches of a step; others finish it"
    how = dict(cbs=[AccumulateCB(2)])
    if world == 1: return undisturbed(**how), [stage(f'window, {e}', stop=7, resume=False, cbs=[AccumulateCB(2)]) for e in ENGINES]
    if world == 4: return [stage(f'window, {e}', engine=e, **how) for e in ENGINES]

def terminated(world, engine, *cbs):
    "Did all leave, with which code, having saved what; and how does the run end?"
    name = f'terminated, {world}, {engine}, {len(cbs)}'
    def more(): return [AccumulateCB(n) for n in cbs]
    try: code = stage(name, resume=False, every=None, cbs=[KillAt(world-1, (1, 2)), InterruptCB(), *more()], engine=engine) and 'went on'
    except SystemExit as e: code = e.code
    if dist.is_initialized(): dist.barrier()
    saved = [o.name for o in checkpoints(run_of(name))]
    return dict(code=code, saved=saved, end=stage(name, every=None, engine=engine, cbs=more()), straight=undisturbed(engine=engine, cbs=more()))

def file():
    "A model in shards saved by all as one file, and taken by a model in shards, and by one that is whole"
    learn = learner(shard(mlp()))
    learn.fit(1)
    learn.save(FOLDER/'file.safetensors')
    dist.barrier()
    others = [learner(m) for m in (shard(mlp()), mlp())]
    for o in others: o.load(FOLDER/'file.safetensors')
    return [{k: whole(x) for k,x in o.model.state_dict().items()} for o in (learn, *others)]

def writes(world):
    "Each process is given a folder of its own: those of all but the first stay empty"
    mine = FOLDER/f'own-{world}-{distributed.process_rank()}'
    fit(None, CheckpointCB(mine/'run', every=2), LogCB(mine/'log.jsonl'))
    if dist.is_initialized(): dist.barrier()
    return sorted(o.name for o in mine.rglob('*')) if mine.exists() else None

# messages

class Counted:
    "How often each word of torch.distributed is said, and with how many bytes; also those that DistributedDataParallel's hook says"
    def __enter__(self):
        self.real,self.calls,self.bytes = {k: getattr(dist, k) for k in ('all_reduce', 'broadcast')},Counter(),Counter()
        for k in self.real: setattr(dist, k, self.counted(k))
        return self
    def counted(self, k):
        def f(x, *args, **kw):
            self.calls[k] += 1
            self.bytes[k] += x.nbytes
            return self.real[k](x, *args, **kw)
        return f
    def __exit__(self, *_):
        for k,f in self.real.items(): setattr(dist, k, f)

class Steps(Callback):
    "Messages of the verbs of each batch of training: what `Counted` saw during backward and step"
    order = -1000
    def __init__(self, counted): self.counted,self.seen = counted,[]
    def now(self): return Counter({(k, what): v for what in ('calls', 'bytes') for k,v in getattr(self.counted, what).items()})
    def backward(self, learn, do):
        before = self.now()
        do()
        self.seen.append(self.now()-before)
    def step(self, learn, do):
        before = self.now()
        do()
        self.seen[-1] += self.now()-before

def messages(engine, *cbs, **kw):
    "Of each batch; and the bytes of each parameter"
    with Counted() as counted:
        learn = learner(None, steps := Steps(counted), *cbs, n=64, engine=engine, **kw)
        learn.fit(1)
    return [dict(o) for o in steps.seen], [p.nbytes for p in learn.model.parameters()]

def sums_in_half():
    "What comes of numbers that bfloat16 cannot hold, by either way of adding up"
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1., 1 + 2**-12, 3.])
    Reducer([p], half=True).finish()
    return p.grad

class Alone:
    "A metric that knows nothing of other processes"
    def update(self, *_): pass
    reset = compute = update

def mistakes():
    found = {}
    def says(name, f):
        try: f()
        except Exception as e: found[name] = f'{type(e).__name__}: {e}'
    says('tape', lambda: fit(shard(mlp()), engine='tape'))
    says('sharded', lambda: fit(shard(mlp()), opt=sharded(optim.AdamW)))
    says('ddp', lambda: fit(engine='tape', dist_cb=lambda: DistributedCB(ddp={})))
    says('object', lambda: fit(watch=lambda: [MetricsCB(mine=Alone())]))
    says('differ', lambda: fit(n=64 + 16*distributed.process_rank()))
    says('sync_bn', lambda: fit(conv(), images=True, compile='replay', dist_cb=lambda: DistributedCB(sync_bn=True)))
    return found

TWO_ONLY = {'even', "torch's sgd", 'compiled', 'sharded, compiled', 'frozen', 'small buckets', 'schedule', 'in shards, tokens', "in shards, torch's", *LOOSE}     # four add nothing there

def cases(world):
    all = {(k, e): lambda f=f, e=e: f(e) for k,f in {**CURVES, **LOOSE}.items() for e in ENGINES}
    all |= {(k, 'torch'): lambda f=f: f('torch') for k,f in TORCH_ONLY.items()}
    if world == 4: all = {k: f for k,f in all.items() if k[0] not in TWO_ONLY}
    all['again', "torch's"] = lambda: again('torch', loader=torchs)
    for e in ENGINES: all |= {('journey', e): lambda e=e: journey(world, e), ('again', e): lambda e=e: again(e),
                              ('terminated', e): lambda e=e: terminated(world, e)}
    all |= {'shards journey': lambda: shards_journey(world), 'window': lambda: window(world), 'writes': lambda: writes(world)}
    if world == 1: return all
    for way,e,ddp in (('torch', 'torch', None), ('tape', 'tape', None), ('ddp', 'torch', {})):
        def sent(*cbs, e=e, ddp=ddp, half=False, mb=25., **kw): return lambda: messages(e, *cbs, dist_cb=lambda: DistributedCB(ddp=ddp, half=half, mb=mb), **kw)
        all |= {('messages', way): sent(), ('messages, accumulate', way): sent(AccumulateCB(2)), ('messages, half', way): sent(half=True),
                ('messages, buckets', way): sent(mb=1e-3), ('messages, sharded', way): sent(opt=sharded(optim.AdamW))}
    all |= {'a window terminated': lambda: terminated(world, 'torch', 2), 'file': file, 'sums in half': sums_in_half, 'mistakes': mistakes, 'again in shards': lambda: again_in_shards(world)}
    return all

def answers(world, only):
    found = {}
    for k,f in cases(world).items():
        if only and only not in str(k): continue
        began = time.process_time()
        try: found[k] = f()
        except (Exception, SystemExit):
            found[k] = traceback.format_exc()
            if '-v' in sys.argv: print(world, distributed.process_rank(), k, found[k][-500:], flush=True)
        if '-v' in sys.argv and not distributed.process_rank(): print(f'{time.process_time()-began:7.2f} s', world, k, flush=True)
        if dist.is_initialized(): dist.monitored_barrier(timeout=timedelta(seconds=30))       # one that fails is not to be the fault of the next
    return found

def one_of(rank, world, only):
    if world > 1:
        os.environ |= dict(MASTER_ADDR='localhost', WORLD_SIZE=str(world), RANK=str(rank))
        dist.init_process_group('gloo', f'file://{FOLDER}/meet-{world}', rank=rank, world_size=world, timeout=timedelta(seconds=30))
    torch.save(answers(world, only), FOLDER/f'{world}-{rank}.pt')
    if world > 1: dist.destroy_process_group()

if __name__ == '__main__':
    FOLDER,only = Path(sys.argv[1]),' '.join(o for o in sys.argv[2:] if o != '-v')
    torch.set_num_threads(1)
    import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp  # noqa: F401  once, and not in every process
    for e in ENGINES: CURVES["compiled"](e), CURVES["torch's"](e)
    for world in WORLDS: multiprocessing.start_processes(one_of, (world, only), nprocs=world, start_method='fork')
