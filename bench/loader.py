"""The data loader: in memory beside the quickest loop there can be, with work a row beside PyTorch's workers, and what it leaves behind.

    python bench/loader.py [--repeats 9] [--rows 60000] [--epochs 200]     writes bench/results/loader.md"""
import argparse, gc, os, random, statistics, time
import numpy as np, PIL.Image, torch
from functools import partial
from miniai.data import Dataset, MapDataset
from miniai.loader import DataLoader
from report import write
from torch.utils import data as torch_data

BS, MEAN, STD = 256, 72.9, 90.

def norm(x): return x.float().sub_(MEAN).div_(STD)
def norm_batch(batch): return norm(batch[0]), batch[1]

def limit(x, y, then):
    "The quickest loop: one permutation, one `index_select` a column and batch"
    order = torch.randperm(len(x))
    for i in range(0, len(x), BS):
        idxs = order[i:i+BS]
        then((x.index_select(0, idxs), y.index_select(0, idxs)))

def drain(dl, then=None):
    for batch in dl: then and then(batch)

class Photo:
    "About a millisecond of PIL's work for each row"
    def __init__(self, n, ms=1.):
        self.im, self.n, self.times = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)), n, 1
        self.times = max(1, round(ms/min(self._ms() for _ in range(20))))
    def _ms(self):
        start = time.perf_counter()
        for i in range(20): self[i]
        return (time.perf_counter()-start)*50
    def __len__(self): return self.n
    def __getitem__(self, i):
        for _ in range(self.times): im = self.im.rotate(i).resize((64, 64))
        return torch.from_numpy(np.array(im)), i

class Waits(Photo):
    "A millisecond of waiting for each row, as for a disk or a network"
    def __init__(self, n): self.n = n
    def __getitem__(self, i): time.sleep(1e-3); return i

class Rows:
    "Rows that are only looked up"
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]

def measure(gos, repeats):
    "`{name: seconds, turn by turn}`"
    for go in gos.values(): go()
    out = {k: [] for k in gos}
    for turn in range(repeats):
        for k in list(gos) if turn % 2 else reversed(list(gos)):
            start = time.perf_counter()
            gos[k]()
            out[k].append(time.perf_counter()-start)
    return out

def compared(what, gos, base, repeats, aims=()):
    "A row of the page for each contestant: its time, and `base`'s time as a part of it in the same turns"
    times = measure(gos, repeats)
    for k,ts in times.items():
        each = sorted(b/t for b,t in zip(times[base], ts, strict=True))
        ratio, spread = f'{statistics.median(each):.2f}', f'{each[0]:.2f}-{each[-1]:.2f}'
        yield what, k, f'{statistics.median(ts)*1e3:.3g}', ratio, spread, dict(aims).get(k, '')

def in_memory(n, repeats):
    x, y = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (n,))
    ds = Dataset(x, y)
    theirs = torch_data.DataLoader(torch_data.TensorDataset(x, y), BS, shuffle=True)
    yield from compared(f'{n:,} images, shuffled, normalised', {
        'limit': partial(limit, x, y, norm_batch), 'ours': partial(drain, DataLoader(ds, BS, True, transform=norm_batch)),
        "PyTorch's": partial(drain, theirs, norm_batch)}, 'limit', repeats, {'ours': '0.8 or more'})
    yield from compared('the same as bytes', {
        'limit': partial(limit, x, y, len), 'ours': partial(drain, DataLoader(ds, BS, True))}, 'limit', repeats)
    first = measure({'': lambda: next(iter(DataLoader(ds, BS, True, transform=norm_batch)))}, repeats)['']
    yield 'first batch of a fresh loader', 'ours', f'{statistics.median(first)*1e3:.3g}', '', '', '50 ms or less'

def with_work(what, ds, repeats):
    def ours(w, context='fork', **kw): return partial(drain, DataLoader(ds, 32, True, num_workers=w, context=context, **kw))
    def theirs(w, **kw): return partial(drain, torch_data.DataLoader(ds, 32, shuffle=True, num_workers=w, **kw))
    gos = {'no workers': ours(0), 'ours, 2 workers kept': ours(2, persistent=True), 'ours, 2 workers started anew': ours(2),
           'ours, 2 threads': ours(2, 'thread'), "PyTorch's, 2 workers kept": theirs(2, persistent_workers=True),
           "PyTorch's, 2 workers started anew": theirs(2)}
    yield from compared(f'{len(ds)} rows of 1 ms, {what}', gos, 'no workers', repeats, {'ours, 2 workers kept': '1.8 or more'})

def across(n, repeats):
    "Cheap batches through two workers: what the way costs"
    for size,bs in ((28, 256), (224, 64)):
        x = torch.randint(0, 256, (bs*n, 3, size, size), dtype=torch.uint8)
        batches = torch_data.BatchSampler(range(len(x)), bs, False)
        theirs = torch_data.DataLoader(x, sampler=batches, batch_size=None, num_workers=2, persistent_workers=True)
        ours = DataLoader(x, bs, num_workers=2, context='fork', persistent=True)
        yield from compared(f'{n} batches of {x[:bs].nbytes/1e6:.3g} MB from 2 workers', {
            "PyTorch's": partial(drain, theirs), 'ours': partial(drain, ours)}, "PyTorch's", repeats)

def seeding(n, repeats):
    ds = Rows(torch.zeros(n, 8))
    yield from compared(f'{n:,} rows looked up one by one', {
        'not seeded': partial(drain, DataLoader(ds, 64, seed_rows=False)),
        'ours, each row seeded': partial(drain, DataLoader(ds, 64))}, 'not seeded', repeats)

def left_behind(epochs):
    "Memory, open files and shared memory of the main process over many epochs with workers"
    dl = DataLoader(MapDataset(Rows(torch.zeros(256, 1000)), lambda row: row + random.random()), 64, True, num_workers=2, context='fork')
    def state():
        gc.collect()
        return int(open('/proc/self/statm').read().split()[1])*4096/2**20, len(os.listdir('/proc/self/fd')), len(os.listdir('/dev/shm'))
    for k in range(epochs+1):
        if k == max(1, epochs//20): before = state()
        drain(dl)
    after = state()
    yield (f'{epochs} epochs, workers started anew', 'ours', '', f'{after[0]/before[0]:.3f} of the memory ({before[0]:.0f} MB)',
           f'{after[1]-before[1]:+d} files, {after[2]-before[2]:+d} in /dev/shm', 'within 2%, none')

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=9)
    ap.add_argument('--rows', type=int, default=60_000)
    ap.add_argument('--epochs', type=int, default=200)
    args = ap.parse_args()
    torch.set_num_threads(1)
    few = max(64, args.rows//100)
    rows = [*in_memory(args.rows, args.repeats), *with_work('work', Photo(few), args.repeats),
            *with_work('waiting', Waits(few), args.repeats), *across(max(2, args.rows//1500), args.repeats),
            *seeding(few*4, args.repeats), *left_behind(args.epochs)]
    write('loader', 'The data loader', ('what', 'who', 'time, ms', 'ratio', 'range', 'aim'), rows,
          f'One thread. Medians over {args.repeats} turns in which the contestants take turns. The ratio is the time of the first in its '
          "group over one's own, turn by turn: more is quicker. The limit is one permutation and one `index_select` a column and batch. "
          "Rows of 1 ms are PIL's rotate and resize; two workers can halve the time only where two cores are free.")

if __name__ == '__main__': main()
