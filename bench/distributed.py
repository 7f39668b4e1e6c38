"""What a second process gives, what it sends, and whether a cost model foretells it; then the model for 8 to 1,024 graphics cards.

    python bench/distributed.py [--steps 30] [--repeats 3]     writes bench/results/distributed.md and distributed.png

Measured here: a step in one process and in two, with the same global batch; bytes on the network interfaces; and the parameters of the
model, each by itself. Computed: the step of two processes from these parameters, which is held against the measured one; and all of the
second table."""
import argparse, json, math, os, socket, statistics, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from itertools import pairwise
import torch, torch.nn.functional as F
from torch import distributed as dist
from miniai.callbacks import MetricsCB
from miniai.data import Dataset
from miniai.distributed import DistributedCB, join, leave
from miniai.learner import Callback, Learner
from miniai.loader import DataLoader
from miniai.training import AccumulateCB
from miniai.vision import mlp, resnet
from report import RESULTS, write

AIM = .20        # how far a foretold step may be from the measured one
NETS = {'resnet': (lambda small: resnet(widths=(8, 16) if small else (16, 32, 64, 128, 256)), (32, 128)),     # {name: (a net, batches)}
        'mlp': (lambda small: mlp(h=64 if small else 2048), (64, 256))}

# ----------------------------------------------------------------------------------------------------------------------------------------
# measuring

class Watch(Callback):
    "Seconds of each step, and of its backward pass; bytes sent from the fourth step to the last"
    order = -200
    def __init__(self): self.starts,self.back,self.sent = [],[],{}
    def before_batch(self, learn):
        if learn.iter in (3, len(learn.dl)-1): self.sent[learn.iter] = sent()
        self.starts.append(time.perf_counter())
    def after_loss(self, learn): self.lossed = time.perf_counter()
    def after_backward(self, learn): self.back.append(time.perf_counter() - self.lossed)
    def bytes(self):
        (a,before),(b,after) = self.sent.items()
        return None if before is None else (after - before)/(b-a)/2             # of both processes
    def steps(self): return [b-a for a,b in pairwise(self.starts)][3:]         # the first ones warm up

class Meet(Callback):
    "A word with the other process in each step: who is ahead waits for it, as in a step that both make together"
    order = -300
    def after_loss(self, learn): dist.all_reduce(torch.zeros(1))

def fit(name, bs, steps, small, cbs=()):
    "Train for some steps; the `Watch`, and the model"
    torch.manual_seed(0)
    n = bs*(steps + 4)
    ds = Dataset(torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,)))
    watch,model = Watch(),NETS[name][0](small)
    Learner(model, SimpleNamespace(train=DataLoader(ds, bs, shuffle=True), valid=[]), F.cross_entropy, lr=.01,
            cbs=[watch, MetricsCB(), *cbs]).fit(1, valid=False)
    return watch, model

def sent():
    "Bytes that went out by any network interface so far; None where the kernel does not tell"
    try: lines = Path('/proc/net/dev').read_text().splitlines()[2:]
    except OSError: return None
    return sum(int(line.split(':')[1].split()[8]) for line in lines)

class Spy:
    "Notes each all-reduce: its bytes, and whether it is waited for at once"
    def __init__(self): self.seen,self.real = [],dist.all_reduce
    def __call__(self, x, *args, async_op=False, **kw):
        self.seen.append((x.nbytes, async_op))
        return self.real(x, *args, async_op=async_op, **kw)
    def __enter__(self):
        dist.all_reduce = self
        return self
    def __exit__(self, *_): dist.all_reduce = self.real

def took(go, n):
    "The median of `n` calls, in seconds"
    times = []
    for _ in range(n):
        dist.barrier()
        start = time.perf_counter()
        go()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

def wire(small):
    """Latency and bandwidth of an all-reduce, by a line through the times of two sizes; the share of it that is hidden behind computing;
    bytes that are gathered into a bucket in a second"""
    size = (1 if small else 8)*2**20
    n,a,word,x = dist.get_world_size(),torch.randn(256, 256),torch.zeros(1),torch.zeros(size//4)
    times = took(lambda: dist.all_reduce(word), 30),took(lambda: dist.all_reduce(x), 9)
    def compute(k=20 if small else 150):
        for _ in range(k): a @ a
    def both():
        work = dist.all_reduce(x, async_op=True)
        compute()
        work.wait()
    alone,together = took(compute, 9),took(both, 9)
    hidden = (alone + times[1] - together)/min(alone, times[1])
    return dict(latency=times[0], bandwidth=2*(n-1)/n*size/(times[1]-times[0]), overlap=min(1., max(0., hidden)),
                gather=size/took(lambda: torch.cat([x, word]), 9))

def worker(args):
    "One of two processes: everything that needs two"
    join()
    out = dict(wire=wire(args.small), rows={})
    for name,(_, batches) in NETS.items():
        for bs in batches:
            dist.barrier()
            alone = [fit(name, bs//2, args.steps, args.small, [AccumulateCB(1), Meet()])[0] for _ in range(args.repeats)]
            dist.barrier()
            with Spy() as spy: shared = [fit(name, bs, args.steps, args.small, [DistributedCB()]) for _ in range(args.repeats)]
            moved = [w.bytes() for w,_ in shared]
            compute = statistics.median(t for w in alone for t in w.steps())
            out['rows'][f'{name} {bs}'] = dict(
                compute=compute - out['wire']['latency'], back=statistics.median(t for w in alone for t in w.back[3:])/compute,
                step=statistics.median(t for w,_ in shared for t in w.steps()),
                sent=None if None in moved else min(moved),                    # the least: somebody else's messages may be among the others
                bytes=sum(p.nbytes for p in shared[0][1].parameters()), messages=a_step(spy.seen))
    if dist.get_rank() == 0: print(json.dumps(out))
    leave()

def a_step(seen):
    "The messages of one step: from one gradient's first bucket to the next one's"
    starts = [i for i,(k,is_async) in enumerate(seen) if is_async and not seen[i-1][1]]
    return seen[starts[-2]:starts[-1]]

def two_processes(args):
    with socket.socket() as s:
        s.bind(('', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2',
           'MINIAI_BENCH_WORKER': '1'}
    me = [sys.executable, __file__, *sys.argv[1:]]
    ps = [subprocess.Popen(me, stdout=subprocess.PIPE, text=True, env={**env, 'RANK': str(r)}) for r in range(2)]
    said = [p.communicate()[0] for p in ps]
    if any(p.returncode for p in ps): sys.exit('distributed: a worker failed')
    return json.loads(said[0].splitlines()[-1])

# ----------------------------------------------------------------------------------------------------------------------------------------
# the model

def ring(n, size, latency, bandwidth):
    "Seconds of an all-reduce: every process sends 2(n-1)/n of the bytes"
    return latency + 2*(n-1)/n*size/bandwidth

def foretell(n, compute, back, buckets, others, latency, bandwidth, overlap, gather):
    """Seconds of a step. Gradients are gathered into buckets, evenly during the backward pass, which is the share `back` of `compute`. A
    bucket is sent as soon as it is full and the wire is free. What is sent while the pass goes on is hidden, but for the share 1-`overlap`.
    Other messages are waited for."""
    begin,whole,done,free,total = compute*(1-back),sum(buckets),0,0.,0.
    back,compute = compute*back + whole/gather,compute + whole/gather
    for size in buckets:
        done += size
        free = max(free, begin + back*done/whole) + ring(n, size, latency, bandwidth)
        total += ring(n, size, latency, bandwidth)
    after = max(0., free - compute)                    # the optimizer's step is short: the backward pass ends about here
    return compute + after + (1-overlap)*(total-after) + sum(ring(n, k, latency, bandwidth) for k in others)

def tree(n, nodes, card):
    "NCCL's own estimate of the latency of a tree all-reduce, in seconds"
    return 1e-6*(card.base + 2*((n//nodes - 1)*card.inside + math.log2(nodes)*card.between))

CARD = SimpleNamespace(peak=989e12, mfu=.40, nvlink=450e9, net=50e9, base=4.4, inside=1.2, between=8.5, overlap=1., each=8,
                       gather=1.675e12)
SOURCES = """- peak 989 TFLOP/s in bfloat16, NVLink 450 GB/s in each direction: NVIDIA's data sheet of the H100 SXM
- network 400 Gbit/s = 50 GB/s for each card: NVIDIA's description of the DGX H100 (a ConnectX-7 for each)
- share of the peak that is reached: 40%, of the 38 to 43% reported for Llama 3 on up to 16,384 H100 (Grattafiori et al. 2024, table 4)
- memory 3.35 TB/s, half of it for reading gradients and half for writing them into buckets: the same data sheet
- latency: formula and constants of NCCL for trees with its protocol LL128 (github.com/NVIDIA/nccl, src/graph/tuning.cc, commit 01afd20)
- overlap: 1, since copies between cards hardly need their processors; backward: 2/3 of a step, since it multiplies twice as much as forward
- buckets of 25 MB, gradients sent in bfloat16; three small messages a step, one for the number of rows and two of a batch norm's kind"""
LARGE = {'ResNet-50, 64 images a card': (25.6e6, 3*4.1e9*2*64), 'GPT-2 small, 8,192 tokens a card': (124e6, 6*124e6*8192),
         'GPT-2 XL, 8,192 tokens a card': (1.56e9, 6*1.56e9*8192)}                                   # parameters, FLOPs of a card's step

def on_cards(n, params, flops, card=CARD):
    "Seconds of a step on `n` cards, and on one"
    nodes,compute = max(1, n//card.each),flops/(card.peak*card.mfu)
    size,mb = 2*params,25*2**20
    buckets = [mb]*int(size//mb) + [size % mb]
    if n == 1: return compute
    return foretell(n, compute, 2/3, buckets, [8]*3, tree(n, nodes, card), card.net if nodes > 1 else card.nvlink, card.overlap,
                    card.gather)

# ----------------------------------------------------------------------------------------------------------------------------------------
# the page

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--steps', type=int, default=30)
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--small', action='store_true', help='small nets')
    args = ap.parse_args()
    torch.set_num_threads(1)
    if 'MINIAI_BENCH_WORKER' in os.environ: return worker(args)
    two,rows,worst = two_processes(args),[],0.
    for key,r in two['rows'].items():
        name,bs = key.split()
        one = statistics.median(t for _ in range(args.repeats) for t in fit(name, int(bs), args.steps, args.small)[0].steps())
        buckets,others = ([k for k,is_async in r['messages'] if is_async == kind] for kind in (True, False))
        guess = foretell(2, r['compute'], r['back'], buckets, others, **two['wire'])
        worst,theory = max(worst, abs(guess/r['step'] - 1)),sum(k for k,_ in r['messages'])       # 2(n-1)/n = 1 for two processes
        gone = 'unknown' if r['sent'] is None else f"{r['sent']/1e6:.2f} ({r['sent']/theory:.2f} times)"
        rows.append((f'{name}, {bs} rows', f'{1e3*one:.1f}', f"{1e3*r['step']:.1f}", f"{one/r['step']/2:.0%}", f'{1e3*guess:.1f}',
                     f"{guess/r['step']-1:+.0%}", f"{r['bytes']/1e6:.2f}", f'{theory/1e6:.2f}', gone))
    ns = [8*2**i for i in range(8)]
    effs = {k: [on_cards(1, *v)/on_cards(n, *v) for n in ns] for k,v in LARGE.items()}
    picture(ns, effs)
    write('distributed', 'The same training in two processes, and a model of it for a thousand cards',
          HEAD, rows, note(two['wire'], worst, ns, effs))

HEAD = ('net, global batch', 'one process, ms', 'two, ms', 'efficiency', 'foretold, ms', 'off by', 'parameters, MB', 'sent in theory, MB',
        'sent, MB')

def note(w, worst, ns, effs):
    lines = [('computed', *(f'{n:,}' for n in ns)), ['---']*(len(ns)+1), *((k, *(f'{e:.0%}' for e in es)) for k,es in effs.items())]
    table = '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
    gather = f"{w['gather']/1e9:.1f} GB/s"
    hidden,small,large = f"{w['overlap']:.0%}",f"{1e6*w['latency']:.0f} µs",f"{w['bandwidth']/1e9:.2f} GB/s"
    return f"""**Measured**: a step of `Learner.fit` in one process and in two with `DistributedCB` (gloo), each on one thread, with one
global batch; the efficiency is the first by twice the second. MB are millions of bytes, for a step and a process. In theory a process
sends 2(n-1)/n times its message, here once; the last column is what the network interfaces counted, with TCP's headers and whatever else
went by.

**Foretold** from parameters that were each measured by itself: computing half a batch while the other process does the same, both waiting
for each other once in a step; the latency of an all-reduce ({small}) and its bandwidth ({large}); the share of it that is hidden behind
computing ({hidden}: without graphics cards the sending needs a core too); gathering gradients into buckets ({gather}).
The worst is off by {worst:.0%}; the aim is {AIM:.0%}.

**Computed** by the same model, with parameters from elsewhere: how much of a card's work is left when {ns[0]:,} to {ns[-1]:,} H100 share a
step, each with a batch of its own size (weak scaling), in machines of {CARD.each}.

{table}

![efficiency](distributed.png)

{SOURCES}

(ResNet-50 does not reach 40% on such cards; then more of the sending is hidden, and the efficiency is higher.) Not in the model: cards that
differ in speed, other traffic on the network, reading data, memory (GPT-2 XL with its optimizer just fits on a card)."""

def picture(ns, effs):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 3), layout='constrained')
    for k,es in effs.items(): ax.plot(ns, es, 'o-', label=k)
    ax.set(xscale='log', xlabel='H100 (computed)', ylabel='efficiency', ylim=(0, 1.05), xticks=ns)
    ax.set_xticks(ns, [f'{n:,}' for n in ns]); ax.minorticks_off(); ax.legend(fontsize=8, loc='lower left')
    for side in ('top', 'right'): ax.spines[side].set_visible(False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    fig.savefig(RESULTS/'distributed.png', dpi=110)

if __name__ == '__main__': main()
