"""Peak memory of a training step of the ResNet above what stays between steps: PyTorch, and ours in each way of running it.

    python bench/memory.py [--repeats 3]     writes bench/results/memory.md"""
import argparse, os, statistics, subprocess, sys, warnings
import torch, torch.nn.functional as F
from autograd import peak, resnet
from miniai.accel import channels_last
from miniai.autograd import engine
from miniai.compile import compile_step
from miniai.optim import AdamW
from miniai.trial import swap_kernels
from report import write

BS, AIM = 256, 1.
WAYS = {'PyTorch eager': {}, 'tape': dict(tape=True), 'replay': dict(backend='replay'), 'inductor': dict(backend='inductor'),
        'PyTorch, bf16, channels last': dict(half=True), 'replay, bf16, channels last': dict(backend='replay', half=True),
        'replay, bf16, channels last, kernels by trial': dict(backend='replay', half=True, improve=swap_kernels)}

def stepper(backend=None, tape=False, half=False, improve=None, bs=BS):
    "A function that trains one step"
    torch.manual_seed(0)
    model, x, y = resnet(), torch.randn(bs, 1, 28, 28), torch.randint(0, 10, (bs,))
    if half: model = channels_last(model)
    def loss_func(preds, y): return F.cross_entropy(preds.float(), y)
    if backend:
        step = compile_step(model, loss_func, AdamW(model.parameters(), lr=1e-3), backend, improve)
        def go():
            with torch.autocast('cpu', torch.bfloat16, enabled=half): step(x, y)
        return go
    opt, around = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), engine('tape' if tape else 'torch')
    def go():
        with around:
            with torch.autocast('cpu', torch.bfloat16, enabled=half): loss = loss_func(model(x), y)
            loss.backward()
        opt.step()
        opt.zero_grad()
    return go

def child(way, bs):
    "Print the peak of one step, in megabytes"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    go = stepper(**WAYS[way], bs=bs)
    for _ in range(3): go()
    before = peak('VmRSS')
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    go()
    print(peak('VmHWM')-before)

def megabytes(way, bs):
    "In a process of its own, every tensor mapped by itself and given back at once"
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '16384', 'MALLOC_TRIM_THRESHOLD_': '0', 'MALLOC_TOP_PAD_': '0'}
    command = [sys.executable, __file__, '--child', way, '--batch', str(bs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return float(done.stdout.splitlines()[-1])

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--batch', type=int, default=BS)
    ap.add_argument('--small', action='store_true', help='the first three ways, batches of 8')
    ap.add_argument('--child')
    args = ap.parse_args()
    if args.child: return child(args.child, args.batch)
    bs, rows, first = 8 if args.small else args.batch, [], None
    for way in list(WAYS)[:3 if args.small else None]:
        all_mb = [megabytes(way, bs) for _ in range(args.repeats)]
        mb = statistics.median(all_mb)
        first = first or mb
        aim = f'{AIM:g}' if way in ('replay', 'inductor') else ''
        rows.append((way, f'{mb:.1f}', f'{min(all_mb):.1f}-{max(all_mb):.1f}', f'**{mb/first:.2f}**', aim))
    write('memory', 'Peak memory of a training step', ('way', 'MB', 'range', 'to eager', 'aim'), rows,
          f'The ResNet of bench/autograd.py, batch {bs}, AdamW (the fused kernel for both), one thread; the peak of one step above what '
          f'stays between steps, in a process of its own, every tensor mapped by itself; medians of {args.repeats}.', timed=False)

if __name__ == '__main__': main()
