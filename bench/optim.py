"""An optimizer's step: ours against the best that PyTorch has, taking turns in one process, beside the memory's own speed.

    python bench/optim.py [--repeats 11] [--seconds .2] [--small]     writes bench/results/optim.md"""
import argparse, math, statistics, time
import torch
from miniai import optim
from report import write

def cnn():
    shapes, c = [], 1
    for n in (8, 16, 32, 64): shapes += [(n, c, 3, 3), (n,), (n,)]; c = n
    return [*shapes, (10, 64, 3, 3), (10,)]

def resnet():
    shapes, sizes = [], (1, 16, 32, 64, 128, 256, 512)
    for a,b in zip(sizes, sizes[1:], strict=False):
        for k,c in ((3, a), (3, b), (1, a)): shapes += [(b, c, k, k), (b,), (b,)]
    return [*shapes, (10, 512), (10,)]

def many(): return [(128, 390), (128,)]*250

CASES = {'small CNN': (cnn, .5), 'ResNet': (resnet, .9), '50 MB': (many, .9)}     # shapes, and the ratio of times that we aim at
RECIPES = {     # settings, and the numbers that are read and written for each entry
    'SGD': (dict(lr=1e-3, momentum=.9), 5), 'Adam': (dict(lr=1e-3), 7), 'AdamW': (dict(lr=1e-3), 7)}
THEIRS = {'loop': dict(foreach=False), 'foreach': dict(foreach=True), 'fused': dict(fused=True)}
OURS = {'plain': {}, 'ours': dict(fused=True)}

def steps(shapes, name, settings):
    "A step function of each: every parameter has its gradient, a tensor of its own, as after a backward"
    gos = {}
    for cls,ways in ((getattr(torch.optim, name), THEIRS), (getattr(optim, name), OURS)):
        for way,how in ways.items():
            torch.manual_seed(0)
            ps = [torch.nn.Parameter(torch.randn(s)/10) for s in shapes]
            for p in ps: p.grad = torch.randn_like(p)/10
            gos[way] = cls(ps, **settings, **how).step
    return gos

def stream(n):
    "Bytes a second of `a = b` and of `a = b + s·c` on n numbers each"
    a, b, c = (torch.rand(n) for _ in range(3))
    return {'copy': (lambda: a.copy_(b), 8*n), 'triad': (lambda: torch.add(b, c, alpha=3., out=a), 12*n)}

def timed(go, n):
    t = time.perf_counter()
    for _ in range(n): go()
    return (time.perf_counter()-t)/n

def measure(gos, repeats, seconds):
    "`{name: seconds a call, turn by turn}`"
    for go in gos.values(): go(); go()
    n = {k: max(1, int(seconds/timed(go, 3))) for k,go in gos.items()}
    turns = [{k: timed(gos[k], n[k]) for k in (list(gos) if turn % 2 else reversed(list(gos)))} for turn in range(repeats)]
    return {k: [t[k] for t in turns] for k in gos}

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=11)
    ap.add_argument('--seconds', type=float, default=.2, help='for each measurement')
    ap.add_argument('--small', action='store_true', help='the small CNN only')
    args = ap.parse_args()
    rows, memory = [], stream(2**16 if args.small else 2**24)
    for case in list(CASES)[:1 if args.small else None]:
        make, aim = CASES[case]
        shapes = make()
        entries = sum(map(math.prod, shapes))
        for name,(settings, streams) in RECIPES.items():
            gos = steps(shapes, name, settings) | {k: go for k,(go, _) in memory.items()}
            times = measure(gos, args.repeats, args.seconds)
            mid = {k: statistics.median(ts) for k,ts in times.items()}
            best = min(('foreach', 'fused'), key=mid.get)
            each = sorted(a/b for a,b in zip(times['ours'], times[best], strict=True))
            speed = max(size/mid[k] for k,(_, size) in memory.items())
            part = {k: f'{4*streams*entries/mid[k]/speed:.0%}' if entries > 10**6 else 'in cache' for k in (best, 'ours')}
            ms = (f'{mid[k]*1e3:.3g}' for k in (*THEIRS, *OURS))
            rows.append((f'{case}: {entries:,} in {len(shapes)}', name, *ms, best, f'**{statistics.median(each):.2f}**',
                         f'{each[0]:.2f}-{each[-1]:.2f}', f'{aim:g}', part[best], part['ours'], f'{speed/1e9:.0f}'))
    head = ('parameters', 'step of', 'torch loop, ms', 'torch foreach, ms', 'torch fused, ms', 'ours plain, ms', 'ours fused, ms',
            "torch's best", 'ours fused to best', 'range', 'aim', "best's part of the memory's speed", "ours", 'memory, GB/s')
    write('optim', "An optimizer's step against PyTorch's fastest", head, rows,
          f'float32, {torch.get_num_threads()} threads; SGD with momentum 0.9. Medians over {args.repeats} turns, the ratio within each '
          'turn. Gradients are tensors of their own, as '
          "`zero_grad()` and `backward()` leave them, for PyTorch's and for ours. "
          "The memory's speed is the better of copy and triad on 64 MB arrays in the same turns; "
          'a step moves 5 (SGD) or 7 numbers for each parameter at least. '
          'Above 100% a part of it came from the cache.')

if __name__ == '__main__': main()
