"""How good, and how soon: each recipe trained from several seeds, every one of them listed, in turns with a loop by hand.

    python bench/accuracy.py [--recipe NAME ...] [--seeds N] [--on test]      writes bench/results/accuracy-NAME.md
    python bench/accuracy.py --on validation                                  writes bench/results/accuracy-NAME-validation.md
    python bench/accuracy.py --exact      all in float32, to compare:         writes bench/results/accuracy-NAME-float32.md

Seconds are those of one machine in one hour. So before each seed a net is trained by a plain PyTorch loop, in what was the shortest time
to 92.7% we knew of (58 s on the machine where the aims, 40 s and 240 s, were set), and the ratio of both is what can be compared.

Recipes are chosen on the validation split: 6,000 of the training images, other ones for each seed, that are not trained on.
The test images are for the figure at the end. It stops without a page where others use the machine: see `BUSY` in report.py."""
import argparse, statistics, sys, time
from dataclasses import replace
import torch, torch.nn.functional as F
from torch import nn
from miniai.callbacks import DeviceCB, MetricsCB, RecordCB
from miniai.datasets import DataLoaders
from miniai.fashion import SAMPLE, fashion_mnist
from miniai.recipes import RECIPES, FlipTTA, learner, loaders, recipe
from report import BUSY, waited, write

SEEDS = {'fashion-fast': 5, 'fashion-best': 3}
AIMS = {'fashion-fast': 40/58, 'fashion-best': 240/58}      # of the time by hand

class Skip(nn.Sequential):
    "What its layers say of x, added to x"
    def forward(self, x): return x + super().forward(x)

def layer(c_in, c_out, k=3, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, stride, k//2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

def net():
    "The net that held the record: a small ResNet-9 with a stem of stride 2"
    a, b, c = 32, 64, 128
    def twice(n): return Skip(layer(n, n), layer(n, n))
    return nn.Sequential(layer(1, a, 5, 2), twice(a), layer(a, b), nn.MaxPool2d(2), twice(b), layer(b, c), nn.MaxPool2d(2), twice(c),
                         nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(c, 10, bias=False))

def by_hand(dd, seed, epochs):
    "Seconds and accuracy of a plain loop: some epochs of one-cycle AdamW, flips, bfloat16, channels last, data in memory"
    bs, lr = 256, 6e-3
    torch.manual_seed(seed)
    (x, y), (xt, yt) = [[dl.ds.columns[k] for k in ('image', 'label')] for dl in DataLoaders.from_dd(dd, bs=bs)]
    mean, std = x.float().mean(), x.float().std()
    def ready(x): return x.float().sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
    def half(): return torch.autocast('cpu', torch.bfloat16)
    model = net().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), lr, betas=(.9, .99), weight_decay=.05, fused=True)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs*(len(x)//bs), pct_start=.15, cycle_momentum=False)
    start = time.perf_counter()
    for _ in range(epochs):
        for i in torch.randperm(len(x))[:len(x)//bs*bs].split(bs):
            xb = torch.where(torch.rand(bs, 1, 1, 1) < .5, x[i].flip(3), x[i])
            with half(): loss = F.cross_entropy(model(ready(xb))/8, y[i])
            loss.backward()
            opt.step()
            opt.zero_grad()
            sched.step()
    seconds = time.perf_counter()-start
    model.eval()
    with torch.no_grad(), half(): preds = torch.cat([model(ready(xb)).argmax(1) for xb in xt.split(1000)])
    return seconds, (preds == yt).float().mean().item()

def splits(dd, on, seed):
    "The images to learn from, and those to be judged by"
    if on == 'test': return dd
    return dd['train'].train_test_split(len(dd['train'])//10, seed=seed)

def share(since):
    "Of the time since then, in which some task waited for a core; 0 where the kernel does not tell"
    t, w = since
    return 0. if w is None else (waited()-w)/(time.perf_counter()-t)

def train(r, dd, seed, device=None, **kwargs):
    "Seconds of training, share of them in which the machine was busy, accuracy, and the same with test-time flip"
    learn = learner(r, loaders(r, dd, seed, device=device), seed, [DeviceCB(device), MetricsCB(), RecordCB()], **kwargs)
    start = time.perf_counter(), waited()
    learn.fit(r.epochs, valid=False)
    seconds, busy = time.perf_counter()-start[0], share(start)
    once = learn.validate()['valid_accuracy']
    with learn.with_cbs(FlipTTA()): return seconds, busy, once, learn.validate()['valid_accuracy']

HEAD = {'seconds': '.1f', 'by hand': '.1f', 'ratio': '.2f', 'busy': '.2f',      # and how each is written
        'accuracy': '.2%', 'with test-time flip': '.2%', 'accuracy by hand': '.2%'}

def run(r, dd, seed, epochs):
    "One row of `HEAD`: by hand for so many epochs, then ours"
    (theirs, right), (seconds, *rest) = by_hand(dd, seed, epochs), train(r, dd, seed)
    return seconds, theirs, seconds/theirs, *rest, right

def line(seed, *row): return str(seed), *[f'{o:{spec}}' for o,spec in zip(row, HEAD.values(), strict=True)]

def summary(runs):
    "Mean and deviation of the seeds"
    def both(xs, digits, scale=1, end=''):
        spread = statistics.stdev(xs) if len(xs) > 1 else 0
        return f'**{scale*statistics.mean(xs):.{digits}f}{end}** ± {scale*spread:.{digits}f}'
    seconds, theirs, ratios, busy, *accuracies = zip(*runs, strict=True)
    return (f'mean of {len(runs)}', both(seconds, 1), both(theirs, 1), both(ratios, 2), f'{max(busy):.2f} at most',
            *[both(o, 2, 100, '%') for o in accuracies])

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--recipe', nargs='+', default=list(RECIPES), help='which')
    ap.add_argument('--seeds', type=int, help='how many, from 0 up; 5 for the fast one and 3 for the best if not given')
    ap.add_argument('--on', choices=('test', 'validation'), default='test')
    ap.add_argument('--exact', action='store_true', help='float32 also where the recipe has bfloat16')
    ap.add_argument('--small', action='store_true', help='on the sample, one epoch by hand, however busy the machine is')
    args = ap.parse_args()
    dd = fashion_mnist(SAMPLE if args.small else None)
    for name in args.recipe:
        runs,r = [],recipe(name)
        if args.exact: r = replace(r, name=f'{name}-float32', amp=None)
        for seed in range(args.seeds or SEEDS.get(name, 3)):
            runs.append(run(r, splits(dd, args.on, seed), seed, 1 if args.small else 4))
            print(*line(seed, *runs[-1]), file=sys.stderr, flush=True)
            if (busy := runs[-1][3]) > BUSY and not args.small:
                sys.exit(f'accuracy: for {busy:.0%} of the time some task waited for a core: no figures from a busy machine; '
                         'try again later')
        page(r.name, args.on, [*(line(seed, *run) for seed,run in enumerate(runs)), summary(runs)], AIMS.get(r.name))

def page(name, on, rows, aim):
    "The results of a recipe"
    what = 'the test set' if on == 'test' else 'a tenth of the training images, another for each seed, not trained on'
    aimed = f' (aim: {aim:.2f})' if aim else ''
    write(f'accuracy-{name}' + '-validation'*(on == 'validation'), f'How good, and how soon: {name}', ('seed', *HEAD), rows,
          f'Judged by {what}. Seconds are those of all epochs, on {torch.get_num_threads()} threads, without reading the data and '
          'validating. By hand: a residual net of as many parameters as `fashion-fast` has, in a plain PyTorch loop just before, 4 epochs '
          f'of one-cycle AdamW, flips, bfloat16, channels last; ratio: our seconds to its{aimed}. Busy: the share of our training in '
          'which some task waited for a core. The deviation is that of the seeds; each seed is that of weights, order and augmentation. '
          'No run was left out.')

if __name__ == '__main__': main()
