"""What bounds a step of `fashion-fast`: where its time goes, and how near its convolutions are to what a large product reaches.

    python bench/bound.py [--steps 30]     writes bench/results/bound.md"""
import argparse, statistics
from dataclasses import replace
import torch
from torch.profiler import ProfilerActivity, profile
from miniai.callbacks import DeviceCB, MetricsCB
from miniai.fashion import SAMPLE, fashion_mnist
from miniai.learner import Callback, CancelFitException
from miniai.nn import Conv2d
from miniai.recipes import learner, loaders, recipe
from report import take_turns, write

KINDS = {'convolutions, forward': ('mkldnn_convolution',), 'convolutions, backward': ('convolution_backward',),
         'batch normalisation': ('native_batch_norm', 'native_batch_norm_backward'), 'products: Muon, the last layer': ('mm', 'addmm'),
         'ReLU': ('clamp_min', 'threshold_backward')}

class ProfileCB(Callback):
    "Profiles some steps after ten, and ends the run"
    order = 1000
    def __init__(self, steps): self.steps, self.profile = steps, profile(activities=[ProfilerActivity.CPU])
    def before_batch(self, learn):
        if learn.iter == 10: self.profile.start()
    def after_batch(self, learn):
        if learn.iter < 9+self.steps: return
        self.profile.stop()
        raise CancelFitException

def shares(learn, steps):
    "{kind: milliseconds a step}; what no kind claims is the rest"
    with learn.with_cbs(cb := ProfileCB(steps)): learn.fit(1, valid=False)
    ms = {e.key.removeprefix('aten::'): e.self_cpu_time_total/1e3/steps for e in cb.profile.key_averages()}
    found = {kind: sum(ms.get(op, 0.) for op in ops) for kind,ops in KINDS.items()}
    return {**found, 'all the rest': sum(ms.values())-sum(found.values())}

@torch.no_grad()
def calls(learn):
    "(input, kernel, convolution) of each, as a step computes them"
    seen = []
    hooks = [m.register_forward_hook(lambda m, xs, y: seen.append((xs[0].bfloat16(), m.weight.bfloat16(), m)))
             for m in learn.model.modules() if isinstance(m, Conv2d)]
    with torch.autocast('cpu', torch.bfloat16): learn.model(next(iter(learn.dls.train))[0])
    for h in hooks: h.remove()
    return seen

@torch.no_grad()
def rates(seen, repeats):
    "{direction: floating point operations a second over all convolutions, each alone}; the first has no gradient of its input"
    work, times = {}, {}
    for i,(x, w, m) in enumerate(seen):
        how = None, m.stride, m.padding, m.dilation
        y = torch.conv2d(x, w, *how)
        g, back = torch.randn_like(y), (*how, False, [0, 0], 1)
        gos = {'forward': lambda x=x, w=w, how=how: torch.conv2d(x, w, *how)}
        for what,mask in (('gradient of the input', [True, False, False]), ('gradient of the kernel', [False, True, False])):
            gos[what] = lambda g=g, x=x, w=w, back=back, mask=mask: torch.ops.aten.convolution_backward(g, x, w, *back, mask)
        if i == 0: del gos['gradient of the input']
        for what,ts in take_turns(gos, repeats, .02).items():
            work[what] = work.get(what, 0) + 2*y.numel()*w[0].numel()
            times[what] = times.get(what, 0) + statistics.median(ts)
    return {k: work[k]/times[k] for k in work}

def product_rate(repeats, n=2048):
    a, b = (torch.randn(n, n).bfloat16() for _ in range(2))
    return 2*n**3/statistics.median(take_turns({'product': lambda: a@b}, repeats, .1)['product'])

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--steps', type=int, default=30)
    ap.add_argument('--repeats', type=int, default=15, help='turns of each convolution')
    ap.add_argument('--small', action='store_true', help='on the sample')
    args = ap.parse_args()
    r = replace(recipe('fashion-fast'), sizes=(), keep=())
    learn = learner(r, loaders(r, fashion_mnist(SAMPLE if args.small else None), 0), 0, [DeviceCB(), MetricsCB()])
    ms = shares(learn, args.steps)
    found, roof, total = rates(calls(learn), args.repeats), product_rate(args.repeats, 256 if args.small else 2048), sum(ms.values())
    rows = [(kind, f'{t:.1f}', f'{t/total:.0%}', '', '') for kind,t in ms.items()]
    rows += [(f'all convolutions alone, {what}', '', '', f'{rate/1e9:.0f}', f'**{rate/roof:.2f}**') for what,rate in found.items()]
    head = 'what', 'ms a step', 'share', 'GFLOP/s', 'to a product'
    write('bound', 'What bounds a step of fashion-fast', head, rows,
          f'{r.bs} whole images a step, bfloat16, {torch.get_num_threads()} threads. Times of operators from a profile of {args.steps} '
          f'steps; rates from each convolution of the net by itself, {args.repeats} turns; a large bfloat16 product reaches '
          f'{roof/1e9:.0f} GFLOP/s in the same run. More than 1 is possible: kernels leave out what meets padding, and it is counted here.')

if __name__ == '__main__': main()
