"""Shuffled batches of Fashion-MNIST, normalised: our loader and others beside the limit, which is one permutation and `index_select`.

    python bench/data.py [--repeats 5] [--rows 60000] [--slow 10000] [--epochs 200] [--extra PATH] [--small]

writes bench/results/data.md.  Slow ways read only `--slow` rows; figures are by row.  `--extra` is a folder made with
`pip install --target PATH tensordict fastai`.  `--small` is a toy size, to see that everything runs."""
import argparse, functools, io, os, statistics, sys, time
from pathlib import Path
import numpy as np, torch
from torch.utils import data as torch_data
from miniai.data import Dataset
from miniai.datasets import DataLoaders, in_memory
from miniai.fashion import DEBIAN, SAMPLE, fashion_mnist
from miniai.loader import DataLoader
from miniai.transform import Normalize
from report import write

BS, MEAN, STD = 256, .2860, .3530
NORM = Normalize(MEAN, STD)

def normalised(x): return x.float().div_(255*STD).sub_(MEAN/STD)
def normalise_pair(batch): return normalised(batch[0]), batch[1]

def drain(batches):
    for xb,_ in batches: assert xb.dtype == torch.float32
    return len(xb)

def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t

def turns(fs, repeats):
    "`{name: seconds, turn by turn}`: each has a turn to warm up, then all take turns"
    for f in fs.values(): f()
    found = [{k: timed(fs[k]) for k in (list(fs) if turn % 2 else reversed(list(fs)))} for turn in range(repeats)]
    return {k: [turn[k] for turn in found] for k in fs}


# whole epochs, from data that is ready

def limit(x, y):
    for idxs in torch.randperm(len(x)).split(BS): yield normalised(x.index_select(0, idxs)), y.index_select(0, idxs)

def to_floats(batch):
    "What the course does to each row, and the normalisation"
    batch['image'] = [normalised(torch.from_numpy(np.array(o))[None]) for o in batch['image']]
    return batch

def tuples(batches, key='image'): return ((normalised(torch.as_tensor(b[key])).view(-1, 1, 28, 28), torch.as_tensor(b['label'])) for b in batches)

def theirs(ds, **kw): return torch_data.DataLoader(ds, BS, shuffle=True, **kw)
def pairs(batches): return ((b['image'], b['label']) for b in batches)

def by_numbers(ds):
    "Batches of a Hugging Face data set, each asked for with a list of row numbers"
    for idxs in torch.randperm(len(ds)).split(BS): yield ds[idxs.tolist()]

def from_arrow(batches):
    for b in batches:
        x = b['image'].combine_chunks().storage.flatten().flatten()
        yield normalised(torch.from_dlpack(x).view(-1, 1, 28, 28)), torch.from_dlpack(b['label'].combine_chunks())

def arrays(x, y):
    import datasets as hf
    features = hf.Features(image=hf.Array2D((28, 28), 'uint8'), label=hf.Value('int64'))
    return hf.Dataset.from_dict(dict(image=x[:,0].numpy(), label=y.numpy()), features=features)

def epochs_of(dd, x, y, slow):
    "`{name: (a function that runs an epoch, its rows)}`"
    few = dd['train'].select(range(slow))
    floats, plain = few.with_transform(to_floats), arrays(x[:slow], y[:slow])
    memory = DataLoader(Dataset(x, y), BS, shuffle=True, transform=NORM)
    bridge = DataLoaders.from_dd(dd, BS, norm=NORM).train
    own = DataLoader(floats, BS, shuffle=True)
    tensors = torch_data.TensorDataset(x, y)
    ways = {
        'ours, from memory':                                     (lambda: memory, len(x)),
        'ours, through the bridge':                              (lambda: bridge, len(x)),
        'ours, with_transform':                                  (lambda: pairs(own), slow),
        'PyTorch DataLoader over TensorDataset':                 (lambda dl=theirs(tensors): map(normalise_pair, dl), len(x)),
        'PyTorch DataLoader over TensorDataset, 2 workers':      (lambda dl=theirs(tensors, num_workers=2): map(normalise_pair, dl), len(x)),
        'datasets with_transform, PyTorch DataLoader (course)':  (lambda dl=theirs(floats): pairs(dl), slow),
        'the same, 2 workers':                                   (lambda dl=theirs(floats, num_workers=2): pairs(dl), slow),
        'datasets format torch, PyTorch DataLoader':             (lambda dl=theirs(few.with_format('torch')): tuples(dl), slow),
        'datasets format numpy, PyTorch DataLoader':             (lambda dl=theirs(few.with_format('numpy')): tuples(dl), slow),
        'datasets Array2D, format torch, lists of row numbers':  (lambda: tuples(by_numbers(plain.with_format('torch'))), slow),
        'datasets Array2D, format numpy, lists of row numbers':  (lambda: tuples(by_numbers(plain.with_format('numpy'))), slow),
        'datasets Array2D, format arrow, lists of row numbers':  (lambda: from_arrow(by_numbers(plain.with_format('arrow'))), slow)}
    return {k: ((lambda it=it: drain(it())), n) for k,(it, n) in ways.items()}

def same(batch): return batch

def extras(x, y):
    "The same for the libraries that happen to be there, and a line for each that is not"
    ways, missing = {}, []
    try:
        from tensordict import TensorDict
        td = TensorDict(dict(image=x, label=y), batch_size=[len(x)])
        ways['tensordict, PyTorch DataLoader'] = (lambda: drain(tuples(theirs(td, collate_fn=same))), len(x))
    except ImportError: missing.append('tensordict')
    try:
        from fastai.basics import DataLoader as FastLoader
        fast = FastLoader(torch_data.TensorDataset(x, y), bs=BS, shuffle=True, num_workers=0)
        ways['fastai DataLoader over TensorDataset'] = (lambda: drain(map(normalise_pair, fast)), len(x))
    except ImportError: missing.append('fastai')
    return ways, missing


# what comes before and around an epoch

def bare_pil(ds):
    import PIL.Image
    raw = ds.with_format('arrow')[:]['image'].combine_chunks().field('bytes').to_pylist()
    out = np.empty((len(raw), 28, 28), np.uint8)
    for i,png in enumerate(raw): out[i] = np.asarray(PIL.Image.open(io.BytesIO(png)))
    return out

def first_epoch(dd): drain(DataLoaders.from_dd(dd, BS, norm=NORM).train)
def first_batch(x, y): next(iter(DataLoader(Dataset(x, y), BS, shuffle=True, transform=NORM)))

class Slow:
    "A millisecond of work for each row"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        end = time.perf_counter() + .001
        while time.perf_counter() < end: pass
        return torch.zeros(1), i

def slow_epoch(n, workers):
    for _ in DataLoader(Slow(n), 32, num_workers=workers): pass

def memory_used():
    "Bytes of this process and its children, shared pages by their share"
    def one(pid): return sum(int(line.split()[1])*1024 for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines() if line.startswith('Pss:'))
    children = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()
    return one('self') + sum(map(one, children))

def growth(x, y, epochs):
    "Memory in the middle of the last epoch over that at a tenth of the way, with two workers"
    dl, used = DataLoader(Dataset(x, y), BS, shuffle=True, num_workers=2, transform=NORM), []
    for _ in range(epochs):
        for k,_ in enumerate(dl):
            if k == 2: used.append(memory_used())
    return used[len(used)//10], used[-1]


def rate(seconds, n): return f'{n/statistics.median(seconds)/1e3:,.0f} thousand/s' if n/statistics.median(seconds) > 5e5 else f'{n/statistics.median(seconds):,.0f}/s'
def ratios(a, b): return sorted(p/q for p,q in zip(a, b, strict=True))
def row(what, n, measured, beside, each, aim=''):
    return what, f'{n:,}', measured, beside, f'**{statistics.median(each):.3g}**', f'{each[0]:.3g}-{each[-1]:.3g}', aim

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=5)
    ap.add_argument('--rows', type=int, default=60_000)
    ap.add_argument('--slow', type=int, default=10_000, help='rows for the slow ways')
    ap.add_argument('--epochs', type=int, default=200, help='over which the memory is watched')
    ap.add_argument('--extra', help='a folder with more libraries')
    ap.add_argument('--small', action='store_true', help='toy size')
    args = ap.parse_args()
    if args.extra: sys.path.append(args.extra)
    if args.small: args.rows, args.slow = min(args.rows, 1000), min(args.slow, 512)
    import datasets as hf
    hf.disable_progress_bars()
    torch.set_num_threads(1)
    dd = fashion_mnist(SAMPLE if args.small or not DEBIAN.is_dir() else DEBIAN)
    dd = hf.DatasetDict(train=dd['train'].select(range(min(args.rows, len(dd['train'])))), test=dd['test'].select(range(100)))
    x, y = in_memory(dd['train'])[:].values()
    n, slow = len(x), min(args.slow, len(x))

    more, missing = extras(x, y)
    ways = epochs_of(dd, x, y, slow) | more
    times = turns({'limit': lambda: drain(limit(x, y)), **{k: f for k,(f, _) in ways.items()}}, args.repeats)
    aims = {'ours, from memory': '0.8 or more', 'ours, through the bridge': '0.75 or more'}
    rows = [('the limit: permutation, index_select, normalise', f'{n:,}', rate(times['limit'], n), '', '1', '', '')]
    for k,(_, m) in ways.items():
        each = ratios([t/n for t in times['limit']], [t/m for t in times[k]])
        rows.append(row(k, m, rate(times[k], m), 'the limit', each, aims.get(k, '')))
    rows += [(k, '', 'not installed', '', '', '', '') for k in missing]

    whole = theirs(dd['train'].with_transform(to_floats))
    once = turns({'first': lambda: first_epoch(dd), 'course': lambda: drain(pairs(whole)), 'decode': lambda: in_memory(dd['train']),
                  'pil': lambda: bare_pil(dd['train'])}, args.repeats)
    def secs(k): return f'{statistics.median(once[k]):.3g} s'
    rows.append(row('first epoch through the bridge, decoding included', n, secs('first'), f"the course's epoch, {secs('course')}",
                    ratios(once['first'], once['course']), '0.6 or less'))
    rows.append(row('decoding alone', n, secs('decode'), f"a bare PIL loop, {secs('pil')}", ratios(once['decode'], once['pil']), '1.5 or less'))

    m = max(64, slow//5)
    work = turns({w: functools.partial(slow_epoch, m, w) for w in (0, 2)}, args.repeats)
    rows.append(row('1 ms of work for each row, 2 workers', m, rate(work[2], m), f'0 workers, {rate(work[0], m)}', ratios(work[0], work[2]), '1.8 or more'))

    start = turns({'first': lambda: first_batch(x, y)}, max(args.repeats, 11))['first']
    ms = sorted(1e3*t for t in start)
    rows.append(('from the data in memory to the first batch', f'{n:,}', f'**{statistics.median(ms):.3g} ms**', '', '', f'{ms[0]:.3g}-{ms[-1]:.3g} ms', '50 ms or less'))

    before, after = growth(x[:4*BS], y[:4*BS], args.epochs)
    rows.append((f'memory in epoch {args.epochs} beside epoch {args.epochs//10 + 1}, 2 workers', f'{len(x[:4*BS]):,}', f'{after/1e6:,.0f} MB', f'{before/1e6:,.0f} MB',
                 f'**{after/before:.3f}**', '', 'within 2%'))
    write('data', 'Shuffled batches of Fashion-MNIST', ('what', 'rows', 'measured', 'beside', 'ratio', 'range', 'aim'), rows,
          f'One thread, batches of {BS}: bytes gathered in a new random order, floats, normalised. Rates are images; the ratio to the limit is rate over rate, of '
          f'the same turn, so 1 is as quick as the limit. Medians over {args.repeats} turns, all ways taking turns in one process. The first three are ours. '
          'Ways over PNG images decode them anew in each epoch, except through the bridge, which has done it once; the two lines on decoding tell what that takes. '
          'With workers, their start is part of the epoch.')

if __name__ == '__main__': main()
