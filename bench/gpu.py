"""On a card: what share of it a training step uses, beside torch.compile, and how soon `fashion-best` is at its accuracy.

    python bench/gpu.py [--seeds 10] [--repeats 7] [--seconds .5]     writes bench/results/gpu.md

Without a card it says so and ends; `--small` runs a toy of it on the processor. Tests that need a card: `pytest -k on_a_card`."""
import argparse, statistics, warnings
from dataclasses import replace
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from accuracy import train
from autograd import resnet
from miniai.accel import channels_last, lay_one, tf32
from miniai.compile import CompileNote, compile_step
from miniai.fashion import SAMPLE, fashion_mnist
from miniai.optim import AdamW
from miniai.recipes import recipe
from report import ratio, take_turns, write
from step import Half

LR, STEPS = 1e-4, 10     # steps between two looks at whether the card is done

class Block(nn.Module):
    "Attention to what came before, and two layers, both residual"
    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj, self.up, self.down = nn.Linear(d, 3*d), nn.Linear(d, d), nn.Linear(d, 4*d), nn.Linear(4*d, d)
    def look(self, x):
        q, k, v = (o.unflatten(-1, (self.heads, -1)).transpose(1, 2) for o in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    def forward(self, x):
        x = x + self.look(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class GPT(nn.Module):
    "Words (n, l) to scores of the next one (n, l, words); without numbers as large as GPT-2 small"
    def __init__(self, words=50304, length=1024, d=768, heads=12, depth=12):
        super().__init__()
        self.words, self.places = nn.Embedding(words, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, words, bias=False)
        self.register_buffer('at', torch.arange(length), persistent=False)
    def forward(self, x): return self.head(self.norm(self.blocks(self.words(x) + self.places(self.at))))

def loss_func(scores, y): return F.cross_entropy(scores.flatten(0, -2), y.flatten())

def images(device, bs=256):
    x, y = torch.randn(bs, 1, 28, 28), torch.randint(0, 10, (bs,))
    return lambda: channels_last(resnet().to(device)), lay_one(x.to(device), torch.channels_last), y.to(device)

def words(device, bs=16, **size):
    gpt = GPT(**size)
    x = torch.randint(0, gpt.words.num_embeddings, (bs, len(gpt.at)+1))
    x, y = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    return lambda: GPT(**size).to(device), x.to(device), y.to(device)

def cases(device, small):
    if small: return {'ResNet, 2 images': images(device, 2), 'GPT of 8 words': words(device, 2, words=50, length=8, d=16, heads=2, depth=1)}
    return {'ResNet, 256 images': images(device), 'GPT-2 small, 16 × 1,024 words': words(device)}

def by_hand(make, x, y, **how):
    "PyTorch's autograd and optimizer, with its compiler where `how` says in which way"
    model = Half(make(), x.device.type)
    opt, f = torch.optim.AdamW(model.parameters(), lr=LR, fused=True), torch.compile(model, **how) if how else model
    def step():
        loss_func(f(x), y).backward()
        opt.step()
        opt.zero_grad()
    return step

def ours(make, x, y, backend):
    model = Half(make(), x.device.type)
    step = compile_step(model, loss_func, AdamW(model.parameters(), lr=LR, fused=True), backend)
    return lambda: step(x, y)

WAYS = {'PyTorch': by_hand, 'replay': lambda *a: ours(*a, 'replay'), 'inductor': lambda *a: ours(*a, 'inductor'),
        'torch.compile(model)': lambda *a: by_hand(*a, mode='default'),
        'torch.compile(model), CUDA graphs': lambda *a: by_hand(*a, mode='reduce-overhead')}

def settled(step, device, n=STEPS):
    "Several steps, and then no kernel is on its way"
    def go():
        for _ in range(n): step()
        if device.type == 'cuda': torch.cuda.synchronize()
    return go

def flops(make, x, y):
    "Of a step, forward and backward, in products and convolutions"
    with FlopCounterMode(display=False) as counter: loss_func(make()(x), y).backward()
    return counter.get_total_flops()

def product_rate(device, n):
    "bf16 floating point operations a second of a large product: the card's own roof"
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    go = settled(lambda: a@b, device)
    return 2*n**3*STEPS/statistics.median(take_turns({'product': go}, 7, .2)['product'])

def steps(device, args):
    "Rows for each model and way, and the roof"
    rows, roof = [], product_rate(device, 64 if args.small else 8192)
    for case,(make, x, y) in cases(device, args.small).items():
        work, ways = flops(make, x, y), list(WAYS)[:2] if args.small else WAYS
        torch.manual_seed(0)
        times = take_turns({k: settled(WAYS[k](make, x, y), device) for k in ways}, args.repeats, args.seconds)
        for way,ts in times.items():
            middle, half = ratio(ts, times['PyTorch'])
            ms = statistics.median(ts)/STEPS
            rows.append((case, way, f'{ms*1e3:.3g}', f'**{middle:.2f}**', half, f'{work/ms/1e12:.3g}', f'**{work/ms/roof:.2f}**'))
    return rows, roof

def accuracies(device, args):
    "A table, a row for each seed; before the first a run of one epoch, in which libraries make their plans"
    r, dd = recipe('fashion-best'), fashion_mnist(SAMPLE if args.small else None)
    if args.small: r = replace(r, model_args={}, epochs=1)
    train(replace(r, epochs=1), dd, 0, device, compile='replay')
    runs = [train(r, dd, seed, device, compile='replay') for seed in range(args.seeds)]
    lines = [f'| {i} | {s:.2f} | {a:.2%} | {b:.2%} |' for i,(s, _, a, b) in enumerate(runs)]
    s, _, a, b = (statistics.mean(o) for o in zip(*runs, strict=True))
    head = ['| seed | seconds | accuracy | with test-time flip |', '| --- | --- | --- | --- |']
    return '\n'.join([*head, *lines, f'| mean of {len(runs)} | **{s:.2f}** | **{a:.2%}** | **{b:.2%}** |'])

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, default=10)
    ap.add_argument('--repeats', type=int, default=7)
    ap.add_argument('--seconds', type=float, default=.5, help='for each turn')
    ap.add_argument('--small', action='store_true', help='a toy, on the processor')
    args = ap.parse_args()
    if not args.small and not torch.cuda.is_available():
        return print('gpu: there is no card here; --small runs a toy of it on the processor')
    warnings.simplefilter('ignore', CompileNote)
    device = torch.device('cpu' if args.small else 'cuda')
    with tf32():
        rows, roof = steps(device, args)
        table = accuracies(device, args)
    name = 'the processor' if args.small else torch.cuda.get_device_name()
    head = 'model', 'way', 'ms a step', 'to PyTorch', 'middle half', 'TFLOP/s', 'MFU'
    write('gpu', 'On a card', head, rows, f'On {name}. Forward, backward and fused AdamW, bfloat16 by autocast, {STEPS} steps between two '
          f'waits for the card; medians over {args.repeats} turns, ratios within each turn. MFU: to {roof/1e12:.4g} TFLOP/s, the rate of a '
          'large bfloat16 product in the same run. Replay is one CUDA graph.\n\nTraining on Fashion-MNIST by `fashion-best`, replayed, '
          f'judged by the test set; no run was left out.\n\n{table}')

if __name__ == '__main__': main()
