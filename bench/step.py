"""A whole training step, forward, backward and SGD: by hand with PyTorch, with its compiled model, and ours as one program.

    python bench/step.py [--repeats 9] [--seconds .3] [--case MLP]     writes bench/results/step.md and step.png"""
import argparse, statistics, warnings
import torch, torch.nn.functional as F
from autograd import cnn, mlp, resnet
from miniai.accel import channels_last, keep_memory, lay_one
from miniai.compile import CompileNote, compile_step
from miniai.optim import SGD
from miniai.trial import swap_kernels
from report import picture, ratio, take_turns, write

CASES = {    # name: the model, its batch, and the ratios of times that we aim at
    'MLP, batch 64': (mlp, 64, {'replay': .75, 'inductor': .60}),
    'CNN, batch 64': (cnn, 64, {'inductor': .66}),
    'CNN, batch 256': (cnn, 256, {'inductor': .80}),
    'ResNet, batch 256': (resnet, 256, {})}

def by_hand(make, x, y, compiled=False):
    "PyTorch's autograd and optimizer"
    model = make()
    opt, f = torch.optim.SGD(model.parameters(), lr=.01), torch.compile(model) if compiled else model
    def go():
        F.cross_entropy(f(x), y).backward()
        opt.step()
        opt.zero_grad()
    return go

class Half(torch.nn.Module):
    "A model in bfloat16 where autocast says so"
    def __init__(self, model, kind='cpu'):
        super().__init__()
        self.model, self.kind = model, kind
    def forward(self, x):
        with torch.autocast(self.kind, torch.bfloat16): return self.model(x)

def ours(make, x, y, backend, levers='off'):
    "One program; with the levers that `FastCB` pulls when it is told the same"
    model = make()
    if levers != 'off': model, x = channels_last(model), lay_one(x, torch.channels_last)
    if levers == 'auto': model = Half(model)
    step = compile_step(model, F.cross_entropy, SGD(model.parameters(), lr=.01), backend, swap_kernels if levers != 'off' else None)
    def go(): step(x, y)
    if levers != 'off': go.around = keep_memory
    return go

def ways(make, x, y):
    programs = {f'{how}{said}': ours(make, x, y, how, levers) for levers,said in LEVERS.items() for how in ('replay', 'inductor')}
    return {'eager': by_hand(make, x, y), 'torch.compile(model)': by_hand(make, x, y, compiled=True), **programs}

LEVERS = {'off': '', 'exact': ', exact levers', 'auto': ', all levers'}

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=9)
    ap.add_argument('--seconds', type=float, default=.3, help='for each turn')
    ap.add_argument('--case', default='', help='only those whose names begin so')
    ap.add_argument('--small', action='store_true', help='replay of the first case only')
    args = ap.parse_args()
    warnings.simplefilter('ignore', CompileNote)
    rows, groups = [], {}
    for case in [c for c in CASES if c.startswith(args.case)][:1 if args.small else None]:
        make, bs, aims = CASES[case]
        torch.manual_seed(0)
        x, y = torch.randn(bs, 1, 28, 28), torch.randint(0, 10, (bs,))
        gos = {'eager': by_hand(make, x, y), 'replay': ours(make, x, y, 'replay')} if args.small else ways(make, x, y)
        times = take_turns(gos, args.repeats, args.seconds)
        groups[case] = {}
        for way,ts in times.items():
            aim = aims.get(way.split(',')[0])
            middle, half = ratio(ts, times['eager'])
            groups[case][way] = middle
            rows.append((case, way, f'{statistics.median(ts)*1e3:.3g}', f'**{middle:.2f}**', half, f'{aim:g}' if aim else ''))
    head = 'model', 'way', 'ms a step', 'to eager', 'middle half', 'aim'
    write('step', 'A whole training step as one program', head, rows,
          f'Forward, backward and SGD on images of 28×28, {torch.get_num_threads()} threads; medians over {args.repeats} turns, '
          'ratios within each turn. Eager and `torch.compile(model)` step with `torch.optim.SGD`. '
          'Exact levers: channels last, kernels by trial, freed memory kept; with all levers also bfloat16, the rest is in float32.'
          '\n\n![ratios](step.png)')
    picture('step', groups, 'time of a step, as a share of PyTorch eager', 1)

if __name__ == '__main__': main()
