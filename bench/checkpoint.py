"""What a checkpoint costs: how long training waits for it, how long it is written beside the training, and `torch.save` for comparison.

    python bench/checkpoint.py [--repeats 15] [--small]     writes bench/results/checkpoint.md"""
import argparse, os, statistics, tempfile, time
from functools import partial
from pathlib import Path
import torch
from miniai.checkpoint import CheckpointCB, newest, put_back
from miniai.datasets import DataLoaders
from miniai.learner import Learner
from miniai.nn import Linear, ReLU, Sequential
from miniai.optim import AdamW
from report import write

WIDTHS = {'small MLP': 50, 'half a million': 420, '25 million': 4600}

def trained(width):
    "A learner that has made one step of AdamW"
    torch.manual_seed(0)
    model = Sequential(Linear(784, width), ReLU(), Linear(width, width), ReLU(), Linear(width, 10))
    batch = [(torch.randn(32, 784), torch.randint(0, 10, (32,)))]*2
    learn = Learner(model, DataLoaders(batch, batch), opt_func=AdamW, lr=1e-3)
    learn.fit(1)
    learn.entry = None
    return learn

def timed(f):
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start)*1e3

def through(path, state):
    "torch.save as it would have to be for the disk to have it"
    torch.save(state, path.with_suffix('.part'))
    with open(path.with_suffix('.part'), 'rb+') as f: os.fsync(f.fileno())
    os.replace(path.with_suffix('.part'), path)

def measure(width, repeats):
    "Milliseconds of each, turn by turn"
    learn,found = trained(width),dict(waits=[], writes=[], save=[], through=[], reads=[])
    with tempfile.TemporaryDirectory(dir='.') as tmp:
        learn.add_cbs(cb := CheckpointCB(Path(tmp)/'run'))
        for i in range(repeats):
            cb.batches = i
            found['waits'].append(timed(lambda: cb.save(learn, 0, 'train', 1)))
            found['writes'].append(timed(cb.writer.wait))
            state = dict(model=learn.model.state_dict(), optimizer=learn.opt.state_dict())
            found['save'].append(timed(partial(torch.save, state, Path(tmp)/'theirs')))
            found['through'].append(timed(partial(through, Path(tmp)/'theirs', state)))
            found['reads'].append(timed(lambda: put_back(learn, newest(cb.folder))))
        size = sum(p.stat().st_size for p in newest(cb.folder).folder.iterdir())
    return found,size,sum(p.numel() for p in learn.model.parameters())

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=15)
    ap.add_argument('--small', action='store_true', help='the small MLP only')
    args = ap.parse_args()
    rows = []
    for name in list(WIDTHS)[:1 if args.small else None]:
        found,size,n = measure(WIDTHS[name], args.repeats)
        times = (f'{statistics.median(ts):.3g} ({min(ts):.3g}-{max(ts):.3g})' for ts in found.values())
        rows.append((f'{name}: {n:,}', f'{size/1e6:.1f}', *times))
    head = ('parameters', 'MB', 'training waits, ms', 'then written beside it, ms', 'torch.save, ms', '... through to the disk, ms',
            'verified and read back, ms')
    write('checkpoint', 'What a checkpoint costs', head, rows,
          'Medians, and the range. Weights, two moments of AdamW, generators and the rest. `torch.save` writes weights and moments as a '
          "pickle and leaves them to the system's memory; in the next column it also waits for the disk and renames. Ours does, "
          'and makes and checks SHA-256 sums.')

if __name__ == '__main__': main()
