"""Kill a real training process again and again, and see whether the run ends as if nobody had.

    python tests/faults.py [KILLS] [SEED]      20 kills of each run if not given

Each life is a process that ends by SIGKILL: at a random moment, or at a random step of writing a checkpoint (in the middle of a
file, before or after an fsync, a rename, a removal).  Then the next one takes the run up.  What is compared, to the bit, with a run of
one life: weights, buffers, the loss of every batch, the rows of every epoch and the lines of the log, and the number of steps."""
import os, random, shutil, signal, sys, tempfile, time
from pathlib import Path
import safetensors.torch, torch
from miniai import checkpoint, optim
from miniai.callbacks import LogCB
from miniai.checkpoint import CheckpointCB
from miniai.learner import Callback
from miniai.training import AccumulateCB, AmpCB, EMACB
from test_checkpoint import Lottery, new, ours, ours_by_rows, result, same, torchs

RUNS = {
    'torch, AdamW, 2 workers, accumulation, average, bf16': dict(
        cbs=lambda: [AccumulateCB(5), EMACB(.9), AmpCB('bf16'), Lottery()], loader=ours_by_rows(num_workers=2)),
    'tape, fused AdamW, augmentation, average': dict(
        cbs=lambda: [EMACB(.9), Lottery()], engine='tape', loader=ours(), opt=lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True)),
    "torch, PyTorch's loader and optimizer, accumulation, fp16": dict(
        cbs=lambda: [AccumulateCB(5), AmpCB('fp16', init_scale=2.**40, growth_interval=2)], loader=torchs(), opt=torch.optim.AdamW)}
EPOCHS = 6

class Slow(Callback):
    "Time to be killed in"
    def after_batch(self, learn): time.sleep(.01)

def suicide(step):
    "SIGKILL at the given step of all writing of checkpoints"
    left = [step]
    def tick():
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    def around(f):
        def g(*args, **kwargs):
            tick(); out = f(*args, **kwargs); tick()
            return out
        return g
    real = safetensors.torch.save_file
    def save_file(tensors, path, metadata):
        tick(); real(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole)//2]); tick(); path.write_bytes(whole); tick()
    safetensors.torch.save_file = save_file
    checkpoint.os.fsync,checkpoint.shutil.rmtree,Path.rename = around(os.fsync),around(shutil.rmtree),around(Path.rename)

def live(run, cbs, step=None, **kw):
    "One life of the run, from where it is to its end"
    torch.manual_seed(11)
    if step: suicide(step)
    learn = new(None, *cbs(), Slow(), CheckpointCB(run, every=2), LogCB(run.parent/f'{run.name}.jsonl'), **kw)
    learn.fit(EPOCHS, resume=True)
    torch.save(result(learn), run/'result.part')
    os.replace(run/'result.part', run/'result.pt')

def born(*args, **kw):
    "The process of a life"
    if pid := os.fork(): return pid
    for fd in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    try: live(*args, **kw)
    except BaseException: os._exit(1)
    os._exit(0)

def kill(pid, seconds):
    "SIGKILL after so many seconds; how it ended: the signal, or 0"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        time.sleep(.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

def ended(status):
    if os.WIFSIGNALED(status): return os.WTERMSIG(status) == signal.SIGKILL
    if os.WEXITSTATUS(status): raise SystemExit('a life ended with an error')
    return False

def torn(run): return any(run.glob('*.part')) or any(run.glob('*.old'))

def many_lives(folder, kills, dice, **kw):
    "A run with so many kills; how many of them came in the middle of a checkpoint"
    start = time.monotonic()
    ended(kill(born(folder/'whole', **kw), 1e9))
    whole, within, killed, run = time.monotonic() - start, 0, 0, folder/'run'
    while killed < kills:
        if killed % 2: died = ended(kill(born(run, **kw), dice.uniform(0, 4*whole/kills + .1)))
        else:          died = ended(kill(born(run, step=dice.randrange(1, 120), **kw), 1e9))
        killed += died
        within += died and torn(run)
        if not died:                                    # it came to its end before it was killed: again from the beginning
            shutil.move(run, folder/f'ended-{killed}')
            os.remove(f'{run}.jsonl')
    ended(kill(born(run, **kw), 1e9))
    for o in [run, *folder.glob('ended-*')]: same(torch.load(o/'result.pt'), torch.load(folder/'whole/result.pt'))
    return within

def main(kills=20, seed=0):
    sys.path.insert(0, str(Path(__file__).parent))
    dice = random.Random(int(seed))
    for name,kw in RUNS.items():
        with tempfile.TemporaryDirectory() as tmp:
            within = many_lives(Path(tmp), int(kills), dice, **kw)
            print(f'{name}: killed {kills} times, {within} of them in the middle of a checkpoint; equal to the bit', flush=True)

if __name__ == '__main__': main(*sys.argv[1:])
