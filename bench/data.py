"""Shuffled batches of Fashion-MNIST, normalised: our loader and others beside the limit, which is one permutation and `index_select`.

    python bench/data.py [--repeats 5] [--rows 60000] [--slow 10000] [--epochs 200] [--extra PATH] [--small]

writes bench/results/data.md.  Slow ways read only `--slow` rows; figures are by row.  `--extra` is a folder of more libraries (tensordict,
fastai), made with `pip install --target`.  `--small` is a toy size, to see that everything runs."""
import argparse, io, os, statistics, sys, time
from functools import partial
from pathlib import Path
import datasets as hf, numpy as np, PIL.Image, torch
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

def drain(batches):
    for xb,_ in batches: assert xb.dtype == torch.float32

def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t

def turns(fs, repeats):
    "`{name: seconds, turn by turn}`: each runs once to warm up, then all take turns"
    for f in fs.values(): f()
    found = [{k: timed(fs[k]) for k in (list(fs) if turn % 2 else reversed(list(fs)))} for turn in range(repeats)]
    return {k: [turn[k] for turn in found] for k in fs}


# an epoch of data that is ready: each of these gives its batches

def limit(x, y):
    for idxs in torch.randperm(len(x)).split(BS): yield normalised(x.index_select(0, idxs)), y.index_select(0, idxs)

def to_floats(batch):
    "What the course does to each row, and the normalisation"
    batch['image'] = [normalised(torch.from_numpy(np.array(o))[None]) for o in batch['image']]
    return batch

def theirs(ds, **kw): return torch_data.DataLoader(ds, BS, shuffle=True, **kw)
def tuples(batches): return ((b['image'], b['label']) for b in batches)
def floats(batches): return ((normalised(torch.as_tensor(x)).view(-1, 1, 28, 28), torch.as_tensor(y)) for x,y in batches)

def by_numbers(ds):
    "Batches of a Hugging Face data set, each asked for with a list of row numbers"
    for idxs in torch.randperm(len(ds)).split(BS): yield ds[idxs.tolist()]

def from_arrow(tables):
    for b in tables:
        x = b['image'].combine_chunks().storage.flatten().flatten()
        yield torch.from_dlpack(x).view(-1, 1, 28, 28), torch.from_dlpack(b['label'].combine_chunks())

def arrays(x, y):
    "The images as numbers rather than PNG files"
    features = hf.Features(image=hf.Array2D((28, 28), 'uint8'), label=hf.Value('int64'))
    return hf.Dataset.from_dict(dict(image=x[:,0].numpy(), label=y.numpy()), features=features)

def ways(dd, x, y, slow):
    "`{name: (batches of an epoch, rows)}`"
    few, plain = dd['train'].select(range(slow)), arrays(x[:slow], y[:slow])
    own, tensors = few.with_transform(to_floats), torch_data.TensorDataset(x, y)
    memory, bridge = DataLoader(Dataset(x, y), BS, shuffle=True, transform=NORM), DataLoaders.from_dd(dd, BS, norm=NORM).train
    course, course2 = theirs(own), theirs(own, num_workers=2)
    alone, alone2 = theirs(tensors), theirs(tensors, num_workers=2)
    items = {k: theirs(few.with_format(k)) for k in ('torch', 'numpy')}
    lists = {k: plain.with_format(k) for k in ('torch', 'numpy', 'arrow')}
    ours = DataLoader(own, BS, shuffle=True)
    return {
        'the limit: permutation, index_select, normalise':      (lambda: limit(x, y), len(x)),
        'ours, from memory':                                    (lambda: memory, len(x)),
        'ours, through the bridge':                             (lambda: bridge, len(x)),
        'ours, with_transform':                                 (lambda: tuples(ours), slow),
        'PyTorch DataLoader over TensorDataset':                (lambda: floats(alone), len(x)),
        'the same, 2 workers':                                  (lambda: floats(alone2), len(x)),
        'datasets with_transform, PyTorch DataLoader (course)': (lambda: tuples(course), slow),
        'the course, 2 workers':                                (lambda: tuples(course2), slow),
        'datasets format torch, PyTorch DataLoader':            (lambda: floats(tuples(items['torch'])), slow),
        'datasets format numpy, PyTorch DataLoader':            (lambda: floats(tuples(items['numpy'])), slow),
        'datasets Array2D, format torch, lists of row numbers': (lambda: floats(tuples(by_numbers(lists['torch']))), slow),
        'datasets Array2D, format numpy, lists of row numbers': (lambda: floats(tuples(by_numbers(lists['numpy']))), slow),
        'datasets Array2D, format arrow, lists of row numbers': (lambda: floats(from_arrow(by_numbers(lists['arrow']))), slow)}

def same(batch): return batch

def with_tensordict(x, y):
    from tensordict import TensorDict
    dl = theirs(TensorDict(dict(image=x, label=y), batch_size=[len(x)]), collate_fn=same)
    return lambda: floats(tuples(dl))

def with_fastai(x, y):
    from fastai.basics import DataLoader as FastLoader
    dl = FastLoader(torch_data.TensorDataset(x, y), bs=BS, shuffle=True, num_workers=0)
    return lambda: floats(dl)

EXTRA = {'tensordict, PyTorch DataLoader': with_tensordict, 'fastai DataLoader over TensorDataset': with_fastai}

def extras(x, y):
    "The same for libraries that may be there; those that are not are told"
    found = {}
    for name,make in EXTRA.items():
        try: found[name] = make(x, y), len(x)
        except ImportError as e: print(f'{name} is left out: {e}', file=sys.stderr)
    return found


# what comes before and around an epoch

def bare_pil(ds):
    raw = ds.with_format('arrow')[:]['image'].combine_chunks().field('bytes').to_pylist()
    out = np.empty((len(raw), 28, 28), np.uint8)
    for i,png in enumerate(raw): out[i] = np.asarray(PIL.Image.open(io.BytesIO(png)))

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

def slow_epoch(n, workers): drain(DataLoader(Slow(n), 32, num_workers=workers))

def memory_used():
    "Bytes that this process and its children have written; the libraries' own pages are shared with strangers, and left out"
    children = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split()
    lines = [line for pid in ('self', *children) for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()]
    return sum(int(line.split()[1])*1024 for line in lines if line.startswith(('Pss_Anon:', 'Pss_Shmem:')))

def growth(x, y, epochs):
    "Memory within an epoch, at a tenth of the way and at the end, with two workers"
    dl, used = DataLoader(Dataset(x, y), BS, shuffle=True, num_workers=2, transform=NORM), []
    for _ in range(epochs):
        for k,_ in enumerate(dl):
            if k == 2: used.append(memory_used())
    return used[len(used)//10], used[-1]


# the table

def per_second(seconds, n):
    rate = n/statistics.median(seconds)
    return f'{rate/1e6:.2f} million/s' if rate > 1e6 else f'{rate/1e3:.3g} thousand/s'

def seconds(each): return f'{statistics.median(each):.3g} s'

def row(what, n, measured, beside, a, b, aim=''):
    "A line that ends in the ratios a/b, turn by turn"
    each = sorted(p/q for p,q in zip(a, b, strict=True))
    return what, f'{n:,}', measured, beside, f'**{statistics.median(each):.3g}**', f'{each[0]:.3g}-{each[-1]:.3g}', aim

def epochs(dd, x, y, slow, repeats):
    "How near each way comes to the limit"
    every = ways(dd, x, y, slow) | extras(x, y)
    took = turns({k: (lambda batches=batches: drain(batches())) for k,(batches, _) in every.items()}, repeats)
    top = next(iter(every))
    aims = {'ours, from memory': '0.8 or more', 'ours, through the bridge': '0.75 or more'}
    each = {k: [t/n for t in took[k]] for k,(_, n) in every.items()}      # a row
    return [row(k, n, per_second(took[k], n), '' if k == top else 'the limit', each[top], each[k], aims.get(k, ''))
            for k,(_, n) in every.items()]

def decoding(dd, repeats):
    "What is paid once, beside what others pay in every epoch"
    ds = dd['train']
    course = theirs(ds.with_transform(to_floats))
    took = turns({'first': lambda: first_epoch(dd), 'course': lambda: drain(tuples(course)), 'decode': lambda: in_memory(ds),
                  'pil': lambda: bare_pil(ds)}, repeats)
    return [row('the first epoch through the bridge, decoding included', len(ds), seconds(took['first']),
                f"the course's epoch, {seconds(took['course'])}", took['first'], took['course'], '0.6 or less'),
            row('decoding alone', len(ds), seconds(took['decode']), f"a bare PIL loop, {seconds(took['pil'])}",
                took['decode'], took['pil'], '1.5 or less')]

def around(x, y, slow, repeats, n_epochs):
    "Workers, the first batch, memory"
    n, few = max(64, slow//5), (x[:4*BS], y[:4*BS])
    work = turns({w: partial(slow_epoch, n, w) for w in (0, 2)}, repeats)
    yield row('1 ms of work for each row, 2 workers', n, per_second(work[2], n), f'0 workers, {per_second(work[0], n)}',
              work[0], work[2], '1.8 or more')
    ms = sorted(1e3*t for t in turns({'first': lambda: first_batch(x, y)}, max(repeats, 11))['first'])
    yield ('from data in memory to the first batch', f'{len(x):,}', f'**{statistics.median(ms):.3g} ms**', '', '',
           f'{ms[0]:.3g}-{ms[-1]:.3g} ms', '50 ms or less')
    before, after = growth(*few, n_epochs)
    yield (f'memory in epoch {n_epochs}, 2 workers', f'{len(few[0]):,}', f'{after/1e6:,.0f} MB',
           f'epoch {n_epochs//10 + 1}, {before/1e6:,.0f} MB', f'**{after/before:.3f}**', '', '1.02 or less')

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
    hf.disable_progress_bars()
    torch.set_num_threads(1)
    dd = fashion_mnist(SAMPLE if args.small or not DEBIAN.is_dir() else DEBIAN)
    dd = hf.DatasetDict(train=dd['train'].select(range(min(args.rows, len(dd['train'])))), test=dd['test'].select(range(100)))
    x, y = in_memory(dd['train'])[:].values()
    slow = min(args.slow, len(x))
    rows = [*epochs(dd, x, y, slow, args.repeats), *decoding(dd, args.repeats), *around(x, y, slow, args.repeats, args.epochs)]
    write('data', 'Shuffled batches of Fashion-MNIST', ('what', 'rows', 'measured', 'beside', 'ratio', 'range', 'aim'), rows,
          f'One thread, batches of {BS}: bytes gathered in a new random order, made floats, normalised. Rates are images, and a ratio '
          'to the limit is rate over rate in the same turn: 1 is as quick as the limit. Medians over '
          f'{args.repeats} turns, in which all ways take part in one process. Ways over PNG images decode them anew in each epoch, except '
          'through the bridge, which has decoded them once: the two lines on that tell what it takes. '
          'With workers, starting them is part of the epoch.')

if __name__ == '__main__': main()
