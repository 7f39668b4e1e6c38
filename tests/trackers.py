"""Stand-ins for TensorBoard, trackio and Weights & Biases, with the few functions of theirs that we call; they note what they are told.
Their arguments are the real ones' (`make trackers` holds them against each other), and so is what they do when a run goes on."""
import sys
from types import ModuleType, SimpleNamespace

class SummaryWriter:
    "Of a run that goes on, everything from `purge_step` on is struck out"
    def __init__(self, log_dir=None, purge_step=None):
        self.told,self.folder = sys.modules['torch.utils.tensorboard'].told,log_dir
        if purge_step is not None: self.told[:] = [o for o in self.told if not (isinstance(o, tuple) and isinstance(o[0], int) and o[0] >= purge_step)]
        self.told.append(('begin', purge_step))
    def add_scalar(self, tag, scalar_value, global_step=None): self.told.append((global_step, {tag: scalar_value}))
    def close(self): self.told.append('end')

class Run:
    "trackio keeps whatever it is told, twice if it is told twice; Weights & Biases takes no step that lies behind"
    def __init__(self, told, name, steps, forward): self.told,self.name,self.id,self.steps,self.forward = told,name,name,steps,forward
    @property
    def _next_step(self): return max(self.steps, default=-1)+1                  # trackio's
    @property
    def starting_step(self): return self.begin                                 # Weights & Biases'
    def log(self, data, step=None):
        if self.forward and step < max(self.steps, default=-1): return
        self.steps.append(step)
        self.told.append((step, dict(data)))
    def finish(self): self.told.append('end')

def service(told, forward):
    runs = {}
    def init(project=None, name=None, id=None, resume=None):
        name = id or name or f'run-{len(runs)}'
        if resume == 'must' and name not in runs: raise ValueError(f'there is no run {name}')
        if resume != 'must': runs[name] = Run(told, name, [], forward)
        runs[name].begin = runs[name]._next_step
        told.append(('begin', project, resume))
        return runs[name]
    return SimpleNamespace(init=init, told=told)

def install(monkeypatch):
    "Put them where the real ones would be imported from; gives `{extra: what it was told}`"
    told = {k: [] for k in ('tensorboard', 'trackio', 'wandb')}
    for k in ('trackio', 'wandb'): monkeypatch.setitem(sys.modules, k, service(told[k], forward=k == 'wandb'))
    module = ModuleType('torch.utils.tensorboard')
    module.SummaryWriter,module.told = SummaryWriter,told['tensorboard']
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return told
