"""Each lever of `miniai.accel` on a training step of the course's ResNet; and each kernel that was tried.

    python bench/accel.py [--repeats 7] [--steps 3] [--small]     writes bench/results/accel.md

Every contender is a process of its own, because freed memory is a matter of the whole process; one works while the others wait."""
import argparse, os, re, statistics, subprocess, sys, tempfile, time
from contextlib import ExitStack, nullcontext
from itertools import pairwise
import torch, torch.nn.functional as F
from miniai import accel, trial
from miniai.nn import AdaptiveAvgPool2d, AvgPool2d, BatchNorm1d, BatchNorm2d, Conv2d, Flatten, Identity, Linear, Module, ReLU, Sequential
from report import write

WAYS = {      # name: its levers
    'float32 as it comes': '',
    'freed memory kept': 'memory',
    'channels last': 'last',
    'all exact: memory, channels last, kernels': 'memory last kernels',
    'bf16, channels last': 'last bf16',
    'bf16, channels last, memory': 'last bf16 memory',
    'bf16, channels last, kernels': 'last bf16 kernels',
    'all: bf16, channels last, memory, kernels': 'last bf16 memory kernels',
    'all, kernels put into the graph': 'last bf16 memory graph'}

def conv(c_in, c_out, k=3, stride=1, act=True):
    return Sequential(Conv2d(c_in, c_out, k, stride, k//2, bias=False), BatchNorm2d(c_out), *[ReLU()]*act)

class ResBlock(Module):
    "Two convolutions, the second with the stride, and a way around them"
    def __init__(self, c_in, c_out, stride):
        self.convs = Sequential(conv(c_in, c_out), conv(c_out, c_out, stride=stride, act=False))
        pool = [AvgPool2d(2, ceil_mode=True)]*(stride == 2)
        self.around = Sequential(*pool, conv(c_in, c_out, 1, act=False) if c_in != c_out else Identity())
    def forward(self, x): return F.relu(self.convs(x) + self.around(x))

def resnet(widths):
    blocks = [ResBlock(1, widths[0], 1), *[ResBlock(a, b, 2) for a,b in pairwise(widths)]]
    return Sequential(*blocks, AdaptiveAvgPool2d(1), Flatten(), Linear(widths[-1], 10, bias=False), BatchNorm1d(10))

def new_step(levers, args, stack):
    "A function that does one training step with these levers"
    torch.manual_seed(0)
    if 'memory' in levers: stack.enter_context(accel.keep_memory())
    stack.enter_context(accel.real_cores())
    widths, bs = ((4, 8, 16), 8) if args.small else ((16, 32, 64, 128, 256, 512), 256)
    model, x, y = resnet(widths), torch.randn(bs, 1, 28, 28), torch.randint(0, 10, (bs,))
    if 'last' in levers: model,x = accel.channels_last(model),accel.lay_one(x, torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    def loss():
        with torch.autocast('cpu', torch.bfloat16, enabled='bf16' in levers): return F.cross_entropy(model(x), y)
    if 'graph' in levers: return in_graph(model, loss, opt)
    def step():
        with trial.Kernels() if 'kernels' in levers else nullcontext():
            loss().backward()
            opt.step()
            opt.zero_grad()
    return step

def in_graph(model, loss, opt):
    "Forward and backward as one flat graph with the quickest kernels in it; the optimizer as it is"
    from torch.fx.experimental.proxy_tensor import make_fx
    params = list(model.parameters())
    torch.clear_autocast_cache()
    graph = make_fx(lambda: torch.autograd.grad(loss(), params))()
    trial.swap_kernels(graph, ())
    def step():
        with torch.no_grad():
            for p,g in zip(params, graph(), strict=True): p.grad = g
        opt.step()
        opt.zero_grad()
    return step

def work(args):
    "The process of one contender: for every line that comes in, some steps, and the seconds of one"
    with ExitStack() as stack:
        step = new_step(WAYS[args.work].split(), args, stack)
        for _ in range(2): step()
        print('ready', flush=True)
        for _ in sys.stdin:
            step()
            began = time.perf_counter()
            for _ in range(args.steps): step()
            print((time.perf_counter()-began)/args.steps, flush=True)

def measure(args):
    "{name: [seconds a step]}, all in turns"
    command = [sys.executable, __file__, *sys.argv[1:], '--work']
    workers = {}
    for k in WAYS:                              # one after another: each tries kernels while nobody disturbs it
        workers[k] = subprocess.Popen([*command, k], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        if workers[k].stdout.readline() != 'ready\n': raise SystemExit(f'bench/accel.py: the process of {k!r} did not start')
    times = {k: [] for k in WAYS}
    for _ in range(args.repeats):
        for k,w in workers.items():
            print(file=w.stdin)
            times[k].append(float(w.stdout.readline()))
    for w in workers.values():
        w.stdin.close()
        w.wait()
    return times

def steps(times):
    "The rows of the table for whole steps"
    base = next(iter(times.values()))
    for k,ts in times.items():
        each = sorted(a/b for a,b in zip(ts, base, strict=True))
        middle = f'{each[len(each)//4]:.3f}-{each[-1-len(each)//4]:.3f}'
        yield 'step', k, f'{statistics.median(ts)*1e3:.1f}', f'**{statistics.median(each):.3f}**', middle

def short(call):
    "A call as it is spoken of: type, sizes, which of its outputs"
    kind, sizes = call.split('(')[1].split('[')[0], [o.split(', ') for o in re.findall(r'\[([\d, ]+)\]/', call)]
    if 'convolution' not in call: return f"{kind} product {' by '.join('×'.join(o) for o in sizes[-2:])}"
    (n,c,h,w), (co,_,kh,kw) = sizes[-2:]
    stride = re.search(r'\[(\d), \d\], \[\d, \d\], \[1, 1\]', call)[1]
    masks = {'[True, False, False])': 'gradient of x', '[False, True, False])': 'gradient of w'}
    part = next((v for k,v in masks.items() if call.endswith(k)), 'output')
    return f'{kind} {kh}×{kw} convolution {c}→{co} of {n} images {h}×{w}, stride {stride}: {part}'

def kernels():
    "The rows for calls of half a millisecond and more that another way computes quicker"
    for call,times in trial.known(trial.machine()).items():
        name, op = trial.pick(times), times[trial.PYTORCH]
        if name in (trial.PYTORCH, 'apart') or op < 5e-4: continue
        yield 'kernel', f'{short(call)}: {name}', f'{times[name]*1e3:.2f}', f'{times[name]/op:.3f}', ''

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=7, help='turns of all')
    parser.add_argument('--steps', type=int, default=3, help='training steps a turn')
    parser.add_argument('--small', action='store_true', help='a toy, to see whether it runs')
    parser.add_argument('--work', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work: return work(args)
    with tempfile.TemporaryDirectory() as tmp:
        os.environ['MINIAI_CACHE'] = tmp        # every kernel is tried anew
        rows = [*steps(measure(args)), *kernels()]
        tried = len(trial.known(trial.machine()))
    head = ('what', 'levers, or the call and the quickest way', 'ms', 'to the default', 'middle half')
    write('accel', 'What each lever gives', head, rows,
          "A step is forward, backward and fused AdamW of the course's ResNet (4.9 M parameters) on 256 images of 28×28, "
          f'{torch.get_num_threads()} threads. Medians over {args.repeats} turns of {args.steps} steps, the ratio within each turn, '
          f'each contender a process of its own. Kernels: {tried} calls were tried; listed are those of half a millisecond and more '
          "where another way was quicker than PyTorch's by more than a twentieth, each time the least of up to 7 turns.")

if __name__ == '__main__': main()
