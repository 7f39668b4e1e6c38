"""How good, and how soon: each recipe trained from several seeds, every one of them listed.

    python bench/accuracy.py [--recipe NAME ...] [--seeds N] [--on test]      writes bench/results/accuracy-NAME.md
    python bench/accuracy.py --on validation                                  writes bench/results/accuracy-NAME-validation.md
    python bench/accuracy.py --exact      all in float32, to compare:         writes bench/results/accuracy-NAME-float32.md

Recipes are chosen on the validation split: 6,000 of the training images, other ones for each seed, that are not trained on.
The test images are for the figure at the end. It stops without a page where others use the machine: see `BUSY` in report.py."""
import argparse, statistics, sys, time
from dataclasses import replace
import torch
from miniai.callbacks import DeviceCB, MetricsCB, RecordCB
from miniai.fashion import SAMPLE, fashion_mnist
from miniai.recipes import RECIPES, FlipTTA, learner, loaders, recipe
from report import BUSY, waited, write

SEEDS = {'fashion-fast': 5, 'fashion-best': 3}

def splits(dd, on, seed):
    "The images to learn from, and those to be judged by"
    if on == 'test': return dd
    return dd['train'].train_test_split(len(dd['train'])//10, seed=seed)

def share(since):
    "Of the time since then, in which some task waited for a core; 0 where the kernel does not tell"
    t, w = since
    return 0. if w is None else (waited()-w)/(time.perf_counter()-t)

def train(r, dd, seed):
    "Seconds of training, share of them in which the machine was busy, accuracy, and the same with test-time flip"
    learn = learner(r, loaders(r, dd, seed), seed, [DeviceCB(), MetricsCB(), RecordCB()])
    start = time.perf_counter(), waited()
    learn.fit(r.epochs, valid=False)
    seconds, busy = time.perf_counter()-start[0], share(start)
    once = learn.validate()['valid_accuracy']
    with learn.with_cbs(FlipTTA()): return seconds, busy, once, learn.validate()['valid_accuracy']

def line(seed, seconds, busy, once, twice):
    return str(seed), f'{seconds:.1f}', f'{busy:.2f}', f'{once:.2%}', f'{twice:.2%}'

def summary(runs):
    "Mean and deviation of the seeds"
    def both(xs, scale, end): return f'**{scale*statistics.mean(xs):.2f}{end}** ± {scale*statistics.stdev(xs) if len(xs) > 1 else 0:.2f}'
    seconds, busy, once, twice = zip(*runs, strict=True)
    return f'mean of {len(runs)}', both(seconds, 1, ''), f'{max(busy):.2f} at most', both(once, 100, '%'), both(twice, 100, '%')

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--recipe', nargs='+', default=list(RECIPES), help='which')
    ap.add_argument('--seeds', type=int, help='how many, from 0 up; 5 for the fast one and 3 for the best if not given')
    ap.add_argument('--on', choices=('test', 'validation'), default='test')
    ap.add_argument('--exact', action='store_true', help='float32 also where the recipe has bfloat16')
    ap.add_argument('--small', action='store_true', help='on the sample, however busy the machine is')
    args = ap.parse_args()
    dd = fashion_mnist(SAMPLE if args.small else None)
    for name in args.recipe:
        runs,r = [],recipe(name)
        if args.exact: r = replace(r, name=f'{name}-float32', amp=None)
        for seed in range(args.seeds or SEEDS.get(name, 3)):
            runs.append(train(r, splits(dd, args.on, seed), seed))
            print(*line(seed, *runs[-1]), file=sys.stderr, flush=True)
            if runs[-1][1] > BUSY and not args.small:
                sys.exit(f'accuracy: for {runs[-1][1]:.0%} of the time some task waited for a core: no figures from a busy machine; '
                         'try again later')
        page(r.name, args.on, [*(line(seed, *run) for seed,run in enumerate(runs)), summary(runs)])

def page(name, on, rows):
    "The results of a recipe"
    what = 'the test set' if on == 'test' else 'a tenth of the training images, another for each seed, not trained on'
    write(f'accuracy-{name}' + '-validation'*(on == 'validation'), f'How good, and how soon: {name}',
          ('seed', 'seconds of training', 'busy', f'accuracy, {on}', 'with test-time flip'), rows,
          f'Judged by {what}. Seconds are those of all epochs, on {torch.get_num_threads()} threads, without reading the data and '
          'validating. Busy: the share of the training in which some task waited for a core. The deviation is that of the seeds; each '
          'seed is that of weights, order and augmentation. No run was left out.')

if __name__ == '__main__': main()
