"""The training loop: our `Learner` with loss, accuracy, progress and log against a loop written by hand that computes the same.

    python bench/loop.py [--repeats 21] [--seconds .5] [--small]     writes bench/results/loop.md"""
import argparse, io, json, statistics, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import torch, torch.nn.functional as F
from autograd import cnn, mlp
from miniai.callbacks import LogCB, MetricsCB, ProgressCB, RecordCB
from miniai.learner import Learner
from report import write

CASES = {     # the model, its batch, and the ratio of times that we aim at
    'MLP 784-50-10, batch 64': (mlp, 64, 1.1),
    'CNN, batch 256': (cnn, 256, 1.02)}

class Shuffled:
    "Batches of data in memory, in a new order each time: the cheapest loader there is"
    def __init__(self, x, y, bs): self.x, self.y, self.bs = x, y, bs
    def __len__(self): return len(self.x)//self.bs
    def __iter__(self):
        for i in torch.randperm(len(self.x)).split(self.bs): yield self.x[i], self.y[i]

class Terminal(io.StringIO):
    "A screen, so that the bar is drawn"
    def isatty(self): return True

def by_hand(model, opt, dl, epochs, log):
    "Loss and accuracy of every epoch, on the screen and in a file; no callbacks, no learner"
    screen = Terminal()
    for epoch in range(epochs):
        model.train()
        loss_sum, right, n = torch.zeros(()), torch.zeros((), dtype=torch.long), 0
        for xb,yb in dl:
            preds = model(xb)
            loss = F.cross_entropy(preds, yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            with torch.no_grad():
                loss_sum += loss.detach()*len(xb)
                right += (preds.argmax(1) == yb).sum()
                n += len(xb)
        row = dict(epoch=epoch, train_loss=(loss_sum/n).item(), train_accuracy=(right/n).item())
        print(row, file=screen)
        with open(log, 'a') as f: print(json.dumps(row), file=f)

def loops(make, dl, epochs, log):
    "Both, as functions of nothing"
    torch.manual_seed(0)
    hand, ours = make(), make()
    opt = torch.optim.SGD(hand.parameters(), lr=.05)
    cbs = [MetricsCB(), RecordCB(), ProgressCB(Terminal()), LogCB(log)]
    learn = Learner(ours, SimpleNamespace(train=dl, valid=[]), F.cross_entropy, lr=.05, opt_func=torch.optim.SGD, cbs=cbs)
    return {'by hand': lambda: by_hand(hand, opt, dl, epochs, log), 'ours': lambda: learn.fit(epochs, valid=False)}

def timed(go):
    t = time.perf_counter()
    go()
    return time.perf_counter()-t

def measure(gos, repeats):
    "`{name: seconds, turn by turn}`"
    turns = [{k: timed(gos[k]) for k in (list(gos) if turn % 2 else reversed(list(gos)))} for turn in range(repeats+1)]
    return {k: [t[k] for t in turns[1:]] for k in gos}

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=21)
    ap.add_argument('--seconds', type=float, default=.5, help='for each turn')
    ap.add_argument('--small', action='store_true', help='the first case only, on few rows')
    args = ap.parse_args()
    rows = []
    for case in list(CASES)[:1 if args.small else None]:
        make, bs, aim = CASES[case]
        x, y = torch.randn(10*bs if args.small else 19200, 1, 28, 28), torch.randint(0, 10, (19200,))[:10*bs if args.small else None]
        dl = Shuffled(x, y, bs)
        for name,batches in {'shuffled in memory': dl, 'a list of batches': list(dl)}.items():
            with tempfile.TemporaryDirectory() as tmp:
                once = timed(loops(make, batches, 1, Path(tmp)/'log.jsonl')['by hand'])
                epochs = max(1, round(args.seconds/once))
                times = measure(loops(make, batches, epochs, Path(tmp)/'log.jsonl'), args.repeats)
            each = sorted(a/b for a,b in zip(times['ours'], times['by hand'], strict=True))
            us = {k: statistics.median(ts)/epochs/len(batches)*1e6 for k,ts in times.items()}
            rows.append((case, name, f"{us['by hand']:.0f}", f"{us['ours']:.0f}", f'**{statistics.median(each):.3f}**',
                         f'{each[len(each)//4]:.3f}-{each[-1-len(each)//4]:.3f}', f'{aim:g}' if batches is dl else ''))
    head = ('model', 'data', 'by hand, µs a step', 'ours, µs a step', 'ours to by hand', 'middle half', 'aim')
    write('loop', 'The training loop against one written by hand', head, rows,
          f'The same PyTorch model, optimizer (SGD) and batches for both, {torch.get_num_threads()} threads, float32, random images. '
          'Both have the mean loss and the accuracy of every epoch, on a screen and in a file; '
          'ours also a progress bar with loss and speed, and the loss of every step. '
          f'Medians over {args.repeats} turns, the ratio within each turn.')

if __name__ == '__main__': main()
