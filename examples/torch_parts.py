"""PyTorch's module, optimizer and loader in our loop: any part can be swapped for the other's.  Prints the test accuracy."""
import torch
from miniai.callbacks import MetricsCB
from miniai.core import set_seed
from miniai.datasets import DataLoaders
from miniai.fashion import SAMPLE, fashion_mnist
from miniai.learner import Learner

set_seed(42)
dls = DataLoaders.from_dd(fashion_mnist(SAMPLE), bs=64, loader=torch.utils.data.DataLoader)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
learn = Learner(model, dls, loss_func=torch.nn.functional.cross_entropy, lr=1e-3, opt_func=torch.optim.AdamW, cbs=MetricsCB())
learn.fit(3)
print(f"{learn.row['valid_accuracy']:.3f}")
