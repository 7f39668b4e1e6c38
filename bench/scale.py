"""How the cost of training grows: with the number of images, of epochs, of rows in a batch, with width, with depth, with workers.

    python bench/scale.py [--repeats 7]     writes bench/results/scale.md and scale.png"""
import argparse, math, statistics, time
from types import SimpleNamespace
import torch, torch.nn.functional as F
from miniai.callbacks import MetricsCB, RecordCB
from miniai.data import Dataset
from miniai.learner import Learner
from miniai.loader import DataLoader
from miniai.nn import AdaptiveAvgPool2d, Conv2d, Flatten, Linear, ReLU, Sequential
from report import RESULTS, write

FLAT = .05

def net(width=32, depth=2):
    "Convolutions of one size"
    layers = [Conv2d(1, width, 3, 2, 1), ReLU()]
    for _ in range(depth): layers += [Conv2d(width, width, 3, padding=1), ReLU()]
    return Sequential(*layers, AdaptiveAvgPool2d(1), Flatten(), Linear(width, 10))

def rows(n): return Dataset(torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (n,)))
def scaled(batch): return batch[0].float().div_(255), batch[1]

def loader(n, bs): return DataLoader(rows(n), bs, shuffle=True, drop_last=True, transform=scaled)

def fit(model, dl, epochs=1):
    "Seconds for each epoch"
    learn = Learner(model, SimpleNamespace(train=dl, valid=[]), F.cross_entropy, lr=.01, cbs=[MetricsCB(), RecordCB()])
    learn.fit(epochs, valid=False)
    return [row['seconds'] for row in learn.rows]

def turns(points, repeats):
    "`points` is {size: a function that gives seconds}; the median of each, by turns"
    seen = {k: [] for k in points}
    for go in points.values(): go()
    for turn in range(repeats):
        for k in (list(points) if turn % 2 else reversed(list(points))): seen[k].append(points[k]())
    return {k: statistics.median(v) for k,v in seen.items()}

def exponent(times):
    "Of the power of the size that the time goes with, from least squares on logarithms"
    xs, ys = [math.log(k) for k in times], [math.log(v) for v in times.values()]
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x-mx)*(y-my) for x,y in zip(xs, ys, strict=True))/sum((x-mx)**2 for x in xs)

def timed(go):
    t = time.perf_counter()
    go()
    return time.perf_counter()-t

def one_step(bs=128, width=32, depth=2):
    "A function that gives the seconds of a step"
    model, x, y = net(width, depth), torch.randn(bs, 1, 28, 28), torch.randint(0, 10, (bs,))
    def step():
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()
    return lambda: timed(lambda: [step() for _ in range(3)])/3

def cases(small):
    "{what grows: ({size: a function that gives seconds}, what is expected of the exponent)}"
    sizes = (128, 256) if small else (1000, 4000, 15000, 60000)
    def epoch(n):
        model, dl = net(8, 1), loader(n, 128 if small else 250)
        return lambda: fit(model, dl)[0]
    return {'images in the data set': ({n: epoch(n) for n in sizes}, 'linear'),
            'images in a batch': ({n: one_step(bs=n) for n in ((8, 16) if small else (32, 64, 128, 256, 512))}, 'linear'),
            'channels': ({n: one_step(bs=8 if small else 128, width=n) for n in ((4, 8) if small else (16, 32, 64, 128))}, 'from 1 to 2'),
            'layers': ({n: one_step(bs=8 if small else 128, depth=n) for n in ((1, 2) if small else (2, 4, 8, 16))}, 'linear')}

class Slow:
    "Rows that take their time, as decoding does: about a millisecond"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        for _ in range(30): torch.fft.fft(torch.ones(2000))
        return torch.zeros(1, 28, 28), i % 10

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=7)
    ap.add_argument('--small', action='store_true', help='two small sizes of each')
    args = ap.parse_args()
    lines, curves = [], {}
    for what,(points, expected) in cases(args.small).items():
        times = curves[what] = turns(points, args.repeats)
        shown = ', '.join(f'{k:,}: {v*1e3:.3g}' for k,v in times.items())
        lines.append((what, shown, f'{exponent(times):.2f}', expected))
    ns = list(curves['images in the data set'].items())
    each = [1e6*t/n for n,t in ns]
    lines.append(('cost of one image, smallest to largest data set', f'{each[0]:.1f} to {each[-1]:.1f} µs',
                  f'{each[-1]/each[0]-1:+.1%}', f'within {FLAT:.0%}'))
    torch.manual_seed(0)
    runs = [fit(net(8, 1), loader(1000 if args.small else 15000, 125), 10) for _ in range(args.repeats)]
    epochs = [statistics.median(e) for e in zip(*runs, strict=True)]
    drift = statistics.median(epochs[7:])/statistics.median(epochs[1:4])-1
    lines.append(('epochs: the last three of ten to the second to fourth', f'{epochs[1]*1e3:.3g} to {epochs[-1]*1e3:.3g} ms',
                  f'{drift:+.1%}', f'within {FLAT:.0%}'))
    def busy(workers):
        dl = DataLoader(Slow(64 if args.small else 1000), 32, num_workers=workers)
        return lambda: timed(lambda: [0 for _ in dl])
    loads = turns({w+1: busy(w) for w in (0, 1, 2)}, args.repeats)
    lines.append(('worker processes, with slow rows', ', '.join(f'{k-1}: {v*1e3:.3g}' for k,v in loads.items()),
                  f'{loads[1]/loads[3]:.2f} times as soon with 2', 'up to the cores'))
    picture(curves)
    write('scale', 'How the cost of training grows', ('what grows', 'ms', 'exponent, or change', 'expected'), lines,
          'Small convolutional nets, forward and backward (the first row: whole epochs of `Learner.fit`, data in memory), '
          f'{torch.get_num_threads()} threads; medians over {args.repeats} turns. '
          'The exponent is the slope of the logarithms.\n\n![curves](scale.png)')

def picture(curves):
    import matplotlib.pyplot as plt
    fig, axs = plt.subplots(1, len(curves), figsize=(11, 2.6), layout='constrained')
    for ax,(what, times) in zip(axs, curves.items(), strict=True):
        ms = [1e3*t for t in times.values()]
        ax.loglog(list(times), ms, 'o-')
        ax.set(xlabel=what, title=f'exponent {exponent(times):.2f}')
        ax.set_xticks(list(times), [f'{k:,}' for k in times])
        ax.set_yticks(ms, [f'{v:,.0f}' for v in ms])
        ax.minorticks_off()
        for side in ('top', 'right'): ax.spines[side].set_visible(False)
    axs[0].set_ylabel('ms')
    RESULTS.mkdir(parents=True, exist_ok=True)
    fig.savefig(RESULTS/'scale.png', dpi=110)

if __name__ == '__main__': main()
