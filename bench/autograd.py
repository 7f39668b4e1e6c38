"""The tape against PyTorch's autograd: time of forward and backward, taking turns in one process; peak memory, each in its own.

    python bench/autograd.py [--repeats 9] [--seconds .5] [--small]     writes bench/results/autograd.md"""
import argparse, os, statistics, subprocess, sys, time
import torch, torch.nn.functional as F
from torch import nn
from miniai.autograd import engine
from report import write

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))

def cnn():
    layers, c = [], 1
    for n in (8, 16, 32, 64): layers += [nn.Conv2d(c, n, 3, 2, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]; c = n
    return nn.Sequential(*layers, nn.Conv2d(64, 10, 3, 2, 1), nn.Flatten())

def conv(ni, nf, ks=3, stride=1): return nn.Sequential(nn.Conv2d(ni, nf, ks, stride, ks//2, bias=False), nn.BatchNorm2d(nf))

class ResBlock(nn.Module):
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.first, self.second, self.shortcut = conv(ni, nf), conv(nf, nf, stride=stride), conv(ni, nf, 1)
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
    def forward(self, x): return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(self.pool(x)))

def resnet():
    sizes = (1, 16, 32, 64, 128, 256, 512)
    blocks = [ResBlock(a, b, 1 if a == 1 else 2) for a,b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))

class Transformer(nn.Module):
    "Rows of the image as 28 tokens"
    def __init__(self, d=128, heads=4, depth=4):
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, heads, 4*d, dropout=.1, activation='gelu', batch_first=True, norm_first=True)
        self.embed, self.head = nn.Linear(28, d), nn.Linear(d, 10)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.layers(self.embed(x.squeeze(1))).mean(1))

CASES = {     # the model, its batch, and the ratio of times that we aim at
    'MLP 784-50-10, batch 64': (mlp, 64, 1.3),
    'CNN, batch 256': (cnn, 256, 1.05),
    'ResNet, batch 256': (resnet, 256, 1.),
    'transformer, batch 128': (Transformer, 128, None)}

def step(make, bs, name):
    "A function that runs forward and backward once, with the engine of that name"
    torch.manual_seed(0)
    model, x, targ = make(), torch.randn(bs, 1, 28, 28), torch.randint(0, 10, (bs,))
    around = engine(name)
    def go():
        with around: F.cross_entropy(model(x), targ).backward()
        for p in model.parameters(): p.grad = None
    return go

def timed(go, n):
    t = time.perf_counter()
    for _ in range(n): go()
    return (time.perf_counter()-t)/n

def ratios(make, bs, repeats, seconds):
    "Seconds a step of each engine, turn by turn"
    gos = {name: step(make, bs, name) for name in ('torch', 'tape')}
    for go in gos.values(): go(); go()
    n = max(1, int(seconds/timed(gos['torch'], 2)))
    turns = [{name: timed(gos[name], n) for name in (list(gos) if k % 2 else reversed(list(gos)))} for k in range(repeats)]
    return [t['torch'] for t in turns], [t['tape'] for t in turns]

# -- memory: a child process that maps every tensor by itself and gives it back at once

def peak(key):
    with open('/proc/self/status') as f: return int(next(line for line in f if line.startswith(key)).split()[1])/1024

def child(case, name):
    torch.set_num_threads(1)
    make, bs, _ = CASES[case]
    go = step(make, bs, name)
    for _ in range(2): go()
    before = peak('VmRSS')
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    go()
    print(peak('VmHWM')-before)

def megabytes(case, name):
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '16384', 'MALLOC_TRIM_THRESHOLD_': '0', 'MALLOC_TOP_PAD_': '0'}
    out = subprocess.run([sys.executable, __file__, '--child', case, name], capture_output=True, text=True, check=True, env=env)
    return float(out.stdout)

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=9)
    ap.add_argument('--seconds', type=float, default=.5)
    ap.add_argument('--small', action='store_true', help='the first case only')
    ap.add_argument('--child', nargs=2)
    args = ap.parse_args()
    if args.child: return child(*args.child)
    rows = []
    for case in list(CASES)[:1 if args.small else None]:
        make, bs, aim = CASES[case]
        theirs, ours = ratios(make, bs, args.repeats, args.seconds)
        each = sorted(a/b for a,b in zip(ours, theirs, strict=True))
        mb = [statistics.median(megabytes(case, name) for _ in range(1 if args.small else 3)) for name in ('torch', 'tape')]
        memory = (f'{mb[0]:.1f}', f'{mb[1]:.1f}', f'**{mb[1]/mb[0]:.2f}**') if mb[0] > 1 else ('', '', '')
        ms = (f'{statistics.median(ts)*1e3:.3g}' for ts in (theirs, ours))
        rows.append((case, *ms, f'**{statistics.median(each):.2f}**', f'{each[0]:.2f}-{each[-1]:.2f}',
                     '' if aim is None else f'{aim:g}', *memory))
    head = '', 'torch, ms', 'tape, ms', 'ratio', 'range', 'aim', 'torch, MB', 'tape, MB', 'ratio'
    write('autograd', "The tape against PyTorch's autograd", head, rows,
          f'Forward and backward of float32 images of 28×28 with cross-entropy; {torch.get_num_threads()} threads. '
          f'Time: medians over {args.repeats} turns, the ratio within each turn. '
          'Memory: the peak of one step above what stays between steps, in a process of its own, every tensor mapped by itself (aim 1.15).')

if __name__ == '__main__': main()
