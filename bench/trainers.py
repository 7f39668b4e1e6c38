"""The same ResNet in our Learner and in the trainers of the field, each as it comes: seconds a step, and how much of the machine it uses.

    python bench/trainers.py [--repeats 7] [--steps 6] [--extra FOLDER]     writes bench/results/trainers.md and trainers.png

`--extra` names a folder that pip filled with `--target`: fastai, pytorch-lightning, transformers, keras; who is not there is left out."""
import argparse, contextlib, importlib.util, logging, os, statistics, sys, tempfile, time, warnings
from types import SimpleNamespace
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from autograd import resnet
from miniai.accel import FastCB
from miniai.callbacks import MetricsCB, ProgressCB, RecordCB
from miniai.learner import Callback, Learner
from miniai.optim import AdamW
from report import picture, ratio, write

SETTINGS = dict(KERAS_BACKEND='torch', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
BS, EPOCHS, LR, AIM, AIM_MFU = 256, 2, 1e-3, .42, .40

class Stamp(nn.Module):
    "Notes the time of every forward pass in training"
    def __init__(self, m, times):
        super().__init__()
        self.m, self.times = m, times
    def forward(self, x):
        if self.training: self.times.append(time.perf_counter())
        return self.m(x)

class StampCB(Callback):
    order = -1000
    def __init__(self, times): self.times = times
    def before_batch(self, learn): self.times.append(time.perf_counter())

class Batches:
    "In memory, in a new order each time"
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)//BS
    def __iter__(self):
        for i in torch.randperm(len(self.x)).split(BS): yield self.x[i], self.y[i]

def ours(x, y, times, fast='auto'):
    cbs = [FastCB(fast), MetricsCB(), RecordCB(), ProgressCB(), StampCB(times)]
    Learner(resnet(), SimpleNamespace(train=Batches(x, y), valid=[]), F.cross_entropy, lr=LR, opt_func=AdamW, cbs=cbs,
            compile='replay' if fast != 'off' else False).fit(EPOCHS, valid=False)

def by_hand(x, y, times):
    model = Stamp(resnet(), times)
    opt = torch.optim.AdamW(model.parameters(), lr=LR)
    for _ in range(EPOCHS):
        loss_sum, right, n = torch.zeros(()), torch.zeros((), dtype=torch.long), 0
        for xb,yb in Batches(x, y):
            preds = model(xb)
            loss = F.cross_entropy(preds, yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            with torch.no_grad(): loss_sum, right, n = loss_sum + loss*len(xb), right + (preds.argmax(1) == yb).sum(), n+len(xb)
        print((loss_sum/n).item(), (right/n).item())

def fastai(x, y, times):
    from fastai import basics as fa
    dls = fa.DataLoaders(*[fa.DataLoader(TensorDataset(x[:n], y[:n]), bs=BS, shuffle=True) for n in (len(x), BS)])
    learn = fa.Learner(dls, Stamp(resnet(), times), loss_func=F.cross_entropy, lr=LR, metrics=fa.accuracy)
    learn.recorder.train_metrics = True
    learn.fit(EPOCHS)

def lightning(x, y, times):
    import pytorch_lightning as pl
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Stamp(resnet(), times)
        def training_step(self, batch, i):
            preds = self.net(batch[0])
            loss = F.cross_entropy(preds, batch[1])
            self.log_dict(dict(loss=loss, accuracy=(preds.argmax(1) == batch[1]).float().mean()), on_epoch=True, prog_bar=True)
            return loss
        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=LR)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=EPOCHS, accelerator='cpu', default_root_dir=folder)
        trainer.fit(Module(), DataLoader(TensorDataset(x, y), BS, shuffle=True))

def hf_trainer(x, y, times):
    from transformers import Trainer, TrainingArguments
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Stamp(resnet(), times)
        def forward(self, x, labels):
            logits = self.net(x)
            return dict(loss=F.cross_entropy(logits, labels), logits=logits)
    class Rows(torch.utils.data.Dataset):
        def __len__(self): return len(x)
        def __getitem__(self, i): return dict(x=x[i], labels=y[i])
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_train_batch_size=BS, num_train_epochs=EPOCHS, learning_rate=LR, report_to='none',
                                 save_strategy='no', use_cpu=True, dataloader_pin_memory=False)
        Trainer(Model(), args, train_dataset=Rows()).train()

def keras(x, y, times):
    import keras
    from keras import layers as L
    keras.backend.set_image_data_format('channels_first')
    def conv(h, nf, ks=3, stride=1):
        h = L.Conv2D(nf, ks, stride, 'same', use_bias=False)(h)
        return L.BatchNormalization(axis=1)(h)
    inputs = h = L.Input(x.shape[1:])
    h = L.ReLU()(conv(h, 16))
    for nf in (32, 64, 128, 256, 512):
        short = L.AveragePooling2D(2, padding='same')(h)
        h = L.ReLU()(L.Add()([conv(L.ReLU()(conv(h, nf)), nf, stride=2), conv(short, nf, 1)]))
    model = keras.Model(inputs, L.Dense(10)(L.Flatten()(L.GlobalAveragePooling2D()(h))))
    model.compile(keras.optimizers.AdamW(LR), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=['accuracy'])
    class Times(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None): times.append(time.perf_counter())
    model.fit(x.numpy(), y.numpy(), batch_size=BS, epochs=EPOCHS, callbacks=[Times()])

WAYS = {'PyTorch by hand': (by_hand, None), 'miniai': (ours, None), 'miniai, all levers off': (lambda *a: ours(*a, fast='off'), None),
        'fastai': (fastai, 'fastai'), 'Lightning': (lightning, 'pytorch_lightning'), 'HF Trainer': (hf_trainer, 'transformers'),
        'Keras on torch': (keras, 'keras')}

def step_time(go, x, y, steps):
    "Seconds a step, the first epoch left out"
    torch.manual_seed(0)
    times = []
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null): go(x, y, times)
    return (times[-1]-times[steps])/(len(times)-1-steps)

@torch.no_grad()
def roofline():
    "bf16 floating point operations a second of a convolution that suits the machine: 256 channels, images of 7×7, channels last"
    x, w = (torch.randn(s).bfloat16().contiguous(memory_format=torch.channels_last) for s in ((256, 256, 7, 7), (256, 256, 3, 3)))
    def rate():
        t = time.perf_counter()
        F.conv2d(x, w, padding=1)
        return 2*x.numel()*256*9/(time.perf_counter()-t)
    return statistics.median(rate() for _ in range(7))

def flops(x, y):
    "Of a step, forward and backward, in products and convolutions"
    with FlopCounterMode(display=False) as counter: F.cross_entropy(resnet()(x), y).backward()
    return counter.get_total_flops()

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=7)
    ap.add_argument('--steps', type=int, default=6, help='in each of the two epochs')
    ap.add_argument('--extra', help='a folder with other trainers')
    ap.add_argument('--small', action='store_true', help='by hand and ours only, small batches')
    args = ap.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    for k,v in SETTINGS.items(): os.environ.setdefault(k, v)
    if args.extra: sys.path.append(args.extra)
    if args.small: globals().update(BS=8)
    ways = {k: go for k,(go, package) in WAYS.items() if package is None or (not args.small and importlib.util.find_spec(package))}
    x, y = torch.randn(args.steps*BS, 1, 28, 28), torch.randint(0, 10, (args.steps*BS,))
    turns, roofs = {k: [] for k in ways}, []
    for turn in range(args.repeats):
        for k in (list(ways) if turn % 2 else reversed(list(ways))): turns[k].append(step_time(ways[k], x, y, args.steps))
        roofs.append(roofline())
    work, roof, rows, bars = flops(x[:BS], y[:BS]), statistics.median(roofs), [], {}
    for k,ts in turns.items():
        middle, half = ratio(ts, turns['PyTorch by hand'])
        bars[k] = {'': middle}
        mfu = work/statistics.median(ts)/roof
        aims = (f'{AIM:g}', f'{AIM_MFU:g}') if k == 'miniai' else ('', '')
        rows.append((k, f'{statistics.median(ts)*1e3:.0f}', f'**{middle:.2f}**', half, aims[0], f'{mfu:.2f}', aims[1]))
    head = 'trainer', 'ms a step', 'to by hand', 'middle half', 'aim', 'MFU', 'aim'
    packages = [package.replace('_', '-') for k,(_, package) in WAYS.items() if package and k in ways]
    write('trainers', 'A ResNet in the trainers of the field, each as it comes', head, rows,
          f"The ResNet of bench/autograd.py, batches of {BS} images of 28×28 in memory, AdamW, mean loss and accuracy, each trainer's own "
          f'progress; {torch.get_num_threads()} threads, medians over {args.repeats} turns, the first epoch of each left out. '
          f'MFU: {work/1e9:.1f} GFLOP a step against a bf16 convolution of {roof/1e9:.0f} GFLOP/s measured between the turns. '
          '`miniai` is `FastCB()` with `compile="replay"`.'
          '\n\n![ratios](trainers.png)', packages=packages)
    picture('trainers', bars, 'time of a step, as a share of the loop by hand', 1)

if __name__ == '__main__': main()
