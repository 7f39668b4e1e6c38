"Stand-ins for TensorBoard, trackio and Weights & Biases, with the few functions of theirs that we call; they note what they are told."
import sys
from types import ModuleType, SimpleNamespace

class Run:
    def __init__(self, told, name): self.told,self.name,self.id = told,name,name
    def log(self, values, step=None): self.told.append((step, values))
    def finish(self): self.told.append('end')

class SummaryWriter:
    def __init__(self, folder, purge_step=None): self.told,self.folder = sys.modules['torch.utils.tensorboard'].told,folder; self.told.append(('begin', purge_step))
    def add_scalar(self, name, value, step): self.told.append((step, {name: value}))
    def close(self): self.told.append('end')

def tracker(told):
    def init(project, name=None, id=None, resume=None, **kwargs):
        told.append(('begin', project, resume))
        return Run(told, id or name or f'run-{len(told)}')
    return SimpleNamespace(init=init, told=told)

def install(monkeypatch):
    "Put them where the real ones would be imported from; gives `{extra: what it was told}`"
    told = {k: [] for k in ('tensorboard', 'trackio', 'wandb')}
    for k in ('trackio', 'wandb'): monkeypatch.setitem(sys.modules, k, tracker(told[k]))
    module = ModuleType('torch.utils.tensorboard')
    module.SummaryWriter,module.told = SummaryWriter,told['tensorboard']
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return told
