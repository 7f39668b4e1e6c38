"""Processes that train together and fail, each in its own way, many at the same time; what they said and how they ended, as JSON.

    python tests/crew.py FOLDER

`test_faults_distributed.py` starts it once.  The processes are copies of one that has imported everything, as `multiprocessing` makes them."""
import json, os, signal, socket, sys, time
from pathlib import Path
import torch, torch._dynamo  # noqa: F401, E401  what PyTorch imports late takes seconds: once, before the copies are made
from miniai import checkpoint, nn
from miniai.checkpoint import CheckpointCB
from miniai.core import process_rank, set_seed
from miniai.data import Dataset
from miniai.datasets import DataLoaders
from miniai.distributed import DistributedCB, join
from miniai.faults import WATCH, WatchCB, watch
from miniai.learner import Callback, Learner
from miniai.loader import DataLoader

LIMITS = dict(beat=.6, grace=2)

def here(learn, rank): return learn.training and (process_rank(), learn.epoch, learn.iter) == (rank, 1, 3)

class At(Callback):
    "Does something in one process, before a batch of the second epoch"
    def __init__(self, rank, do): self.rank, self.do = rank, do
    def before_batch(self, learn):
        if here(learn, self.rank): self.do()

class InPredict(Callback):
    "The same later, where all processes have heard of the same events"
    def __init__(self, rank, do): self.rank, self.do = rank, do
    def predict(self, learn, do):
        if here(learn, self.rank): self.do()
        do()

def learner(*cbs, engine='torch', **limits):
    set_seed(0)
    ds = Dataset(x=torch.randn(64, 4), y=torch.arange(64) % 2)
    dls = DataLoaders(DataLoader(ds, 8, shuffle=True, as_tuple=True), DataLoader(ds, 32, as_tuple=True))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 2))
    return Learner(model, dls, engine=engine, cbs=[DistributedCB(), WatchCB(**{**LIMITS, **limits}), *cbs])

def kill(): os.kill(os.getpid(), signal.SIGKILL)
def fails(): raise ValueError('bad row')
def freezes(): os.kill(os.getpid(), signal.SIGSTOP)
def sleeps(): time.sleep(100)
def spins():
    while True: pass
def leaves(): sys.exit(0)

def run(do, rank=1, at=At, **kw): return lambda folder: learner(at(rank, do), **kw).fit(3)

def slow_disk(seconds):
    real = checkpoint.settled
    def slow(path):
        time.sleep(seconds)
        return real(path)
    checkpoint.settled = slow

def while_saving(folder):
    "Killed while the first process writes a checkpoint"
    slow_disk(.2)
    learner(At(1, kill), CheckpointCB(folder/'run', every=1)).fit(3)

class SavesAndFails(CheckpointCB):
    "An error at a time when a checkpoint is being written, for longer than anybody wants to wait"
    def before_batch(self, learn):
        super().before_batch(learn)
        if not here(learn, 0): return
        self.writer.wait()
        slow_disk(20)
        self.save(learn, 1, 'train', 3)
        fails()

def told(folder):
    "A scheduler ends all; the first one needs longer for its checkpoint than silence may last"
    begun = []
    def terminate():
        slow_disk(5)
        begun.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
    join()
    try: learner(At(process_rank(), terminate), CheckpointCB(folder/'run'), silence=8).fit(3)
    finally: (folder/f'took-{process_rank()}').write_text(str(time.monotonic() - begun[0]))

def outside(folder):
    "An error where nobody trains"
    join()
    watch(**LIMITS)
    if process_rank() == 1: fails()
    torch.distributed.barrier()

def alone(rank):
    "After the training one process stays for longer than the others"
    def f(folder):
        learner().fit(1)
        if process_rank() == rank: time.sleep(3)
    return f

# name: processes, what each does
CREWS = {'killed': (3, run(kill)), 'killed, tape': (2, run(kill, engine='tape')), 'killed, first': (3, run(kill, 0)),
         'raises': (3, run(fails, 2, engine='tape')), 'raises, first': (2, run(fails, 0)), 'frozen': (2, run(freezes, silence=8)),
         'hangs': (3, run(sleeps, idle=5)), 'hangs, tape': (2, run(sleeps, 0, InPredict, idle=5, engine='tape')),
         'spins': (2, run(spins, patience=5)),
         'leaves': (2, run(leaves)), 'saving': (2, while_saving), 'told': (2, told), 'fails saving': (2, lambda folder: learner(SavesAndFails(folder/'run', every=1)).fit(3)),
         'outside': (2, outside),
         'first stays': (2, alone(0)), 'first goes': (2, alone(1))}

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def child(rank, n, port, f, folder):
    "The life of one process: what it says goes to a file, and it ends as Python ends, but for what the copy inherited"
    os.dup2(os.open(folder/f'said-{rank}', os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(os.dup(2), 'w', buffering=1)
    os.environ |= dict(MASTER_ADDR='localhost', MASTER_PORT=str(port), WORLD_SIZE=str(n), RANK=str(rank))
    code = 0
    try: f(folder)
    except SystemExit as e: code = e.code
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        code = 1
    for w in WATCH: w.rest()
    os._exit(code or 0)

def start(n, f, folder):
    folder.mkdir()
    port, pids = free_port(), []
    for rank in range(n):
        pids.append(os.fork())
        if not pids[-1]: child(rank, n, port, f, folder)
    return pids

def ends(pids, seconds):
    "`{pid: (exit code, seconds)}`, without a code for one that is stopped; what does not end in time is killed"
    found, begun = {}, time.monotonic()
    while len(found) < len(pids) and time.monotonic() < begun + seconds:
        for pid in set(pids) - set(found):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done: found[pid] = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status), time.monotonic() - begun
        time.sleep(.05)
    for pid in set(pids) - set(found): os.kill(pid, signal.SIGKILL)
    return found

def wake(pid, seconds=15):
    "How a process ends that slept while all others left"
    os.kill(pid, signal.SIGCONT)
    return ends([pid], seconds).get(pid, (None,))[0]

def main(folder):
    torch.set_num_threads(1)
    out, names = {}, list(CREWS)
    for some in (names[::2], names[1::2]):                  # all at once they would starve each other
        crews = {name: start(*CREWS[name], folder/name) for name in some}
        found = ends([p for pids in crews.values() for p in pids], 40)
        found |= {pid: (wake(pid), 0) for pid,(code,_) in found.items() if code is None}
        out |= {name: [dict(code=found.get(p, [None])[0], said=(folder/name/f'said-{r}').read_text(), after=found.get(p, [0, None])[1])
                       for r,p in enumerate(pids)] for name,pids in crews.items()}
    print(json.dumps(out))

if __name__ == '__main__': main(Path(sys.argv[1]))
