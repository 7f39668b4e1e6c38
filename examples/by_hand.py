"""Fashion-MNIST with no automatic differentiation at all: our layers know their derivatives.  Prints the test accuracy."""
import torch
from miniai.backprop import CrossEntropy, Lin, Net, Relu
from miniai.core import set_seed
from miniai.datasets import DataLoaders
from miniai.fashion import SAMPLE, fashion_mnist
from miniai.optim import SGD

set_seed(42)
dls = DataLoaders.from_dd(fashion_mnist(SAMPLE), bs=64)      # fashion_mnist() for all 60,000 images
def lin(d_in, d_out): return Lin(torch.randn(d_out, d_in)*(2/d_in)**.5, torch.zeros(d_out))
net = Net(lin(784, 50), Relu(), lin(50, 10), loss=CrossEntropy())
opt = SGD(net.parameters(), lr=.05, momentum=.9)

with torch.inference_mode():                                  # PyTorch's autograd is off
    for _ in range(5):
        for x,targ in dls.train:
            net(x.flatten(1), targ)
            net.backward()
            opt.step()
            opt.zero_grad()
    right = sum((net.predict(x.flatten(1)).argmax(1) == targ).sum().item() for x,targ in dls.valid)
print(f'{right/len(dls.valid.ds):.3f}')
