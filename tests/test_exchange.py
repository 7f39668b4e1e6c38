"""Our modules in the field's hands: two processes, export, compilation, checkpoints, ensembles. PyTorch's own modules, or one process, are the judge.

What needs libraries that the development environment has not is in `tests/libraries.py` (`make libraries`)."""
import copy
from datetime import timedelta
from functools import partial
import pytest, torch, torch.distributed as dist
from libraries import worst
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from miniai import nn, optim
from miniai.vision import cnn

pytestmark = pytest.mark.filterwarnings('ignore')

def net():
    "Of odd widths, which two cannot share evenly"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Residual(nn.Linear(9, 9), nn.GELU(), nn.LayerNorm(9)), nn.Linear(9, 5))

# ---- two processes, each with half of the batch, against one with all of it

def sharded(model):
    "Parameters divided among the processes: a group for each layer, and what is left"
    mesh = dist.init_device_mesh('cpu', (2,))
    for layer in (model[0], model[2]): fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

WRAPS = {'DDP': DistributedDataParallel, 'FSDP2': sharded}
OPTIMIZERS = {'ours': partial(optim.AdamW, lr=.1, weight_decay=.1), 'PyTorch\'s': partial(torch.optim.AdamW, lr=.1, weight_decay=.1)}

def whole(t):
    "A tensor with what the other processes have of it, apart from what will still change"
    return (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().clone()

def learnt(model, opt_func, rows=slice(None)):
    "The gradients of the first step, and the state after four, of a model that sees these rows of each batch"
    gen,opt,gs = torch.Generator().manual_seed(1),opt_func(model.parameters()),None
    for _ in range(4):
        x,targ = torch.randn(8, 6, generator=gen),torch.randint(0, 5, (8,), generator=gen)
        nn.cross_entropy(model(x[rows]), targ[rows]).backward()
        gs = gs or [whole(p.grad) for p in model.parameters()]
        opt.step(); opt.zero_grad()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return dict(gs=gs, state={k: whole(t) for k,t in inner.state_dict().items()})

def work(rank, folder):
    "What one of the two processes does"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    rows = slice(4*rank, 4*rank+4)
    try: torch.save({(w, o): learnt(wrap(net()), opt, rows) for w,wrap in WRAPS.items() for o,opt in OPTIMIZERS.items()}, f'{folder}/{rank}.pt')
    finally: dist.destroy_process_group()

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder/f'{rank}.pt') for rank in range(2)]

@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('wrap', WRAPS)
def test_two_processes_are_one_on_the_whole_batch(two, wrap, optimizer):
    one = learnt(net(), OPTIMIZERS[optimizer])
    half = learnt(net(), OPTIMIZERS[optimizer], slice(4))
    assert (half['gs'][0]-one['gs'][0]).abs().max() > .01                  # neither half has the gradients of both
    for found in two: torch.testing.assert_close(found[wrap, optimizer], one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two[0][wrap, optimizer], two[1][wrap, optimizer], rtol=0, atol=0)
    fresh = net()
    fresh.load_state_dict(two[0][wrap, optimizer]['state'])
    torch.testing.assert_close(dict(fresh.state_dict()), one['state'], rtol=1e-5, atol=1e-6)

# ---- export and compilation

def block(): return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

def gru(): return nn.GRU(8, 6, batch_first=True)

@pytest.mark.parametrize('make, shape', [(cnn, (1, 28, 28)), (block, (5, 8)), (gru, (5, 8))])
def test_exported_for_any_batch_saved_and_loaded(make, shape, tmp_path):
    m = make().eval()
    torch.export.save(torch.export.export(m, (torch.randn(4, *shape),), dynamic_shapes=({0: torch.export.Dim('n')},)), tmp_path/'m.pt2')
    loaded = torch.export.load(tmp_path/'m.pt2').module()
    for n in (4, 7): torch.testing.assert_close(loaded(x := torch.randn(n, *shape)), m(x))

@pytest.mark.parametrize('make, shape', [(cnn, (8, 1, 28, 28)), (block, (8, 5, 8))])
def test_compiled_for_training_with_its_averages_and_dropout(make, shape):
    torch._dynamo.reset()
    torch.manual_seed(0); m = make()
    found = []
    for how in (lambda m: m, partial(torch.compile, backend='aot_eager', fullgraph=True)):
        model = copy.deepcopy(m)
        call = how(model)
        torch.manual_seed(1)
        for _ in range(2): call(torch.randn(shape)).square().mean().backward()
        found.append([dict(model.state_dict()), [p.grad for p in model.parameters()]])
    torch.testing.assert_close(*found)
    assert make is not cnn or found[0][0]['0.1.num_batches_tracked'] == 2

# ---- what else is done with a module

def test_averaged_by_pytorch():
    m,seen = net(),[]
    average = torch.optim.swa_utils.AveragedModel(m)
    for i in range(3):
        for p in m.parameters(): p.data.add_(i + 1)
        average.update_parameters(m)
        seen.append(copy.deepcopy(m.state_dict()))
    want = {k: torch.stack([s[k] for s in seen]).mean(0) for k in seen[0]}
    torch.testing.assert_close(dict(average.module.state_dict()), want)

def test_saved_as_safetensors_with_shared_weights(tmp_path):
    from safetensors.torch import load_model, save_model
    def tied():
        m = net()
        m[2].layers[0].weight = m.again = torch.nn.Parameter(torch.randn(9, 9))
        return m
    m,other = tied(),tied()
    save_model(m, tmp_path/'m.safetensors')
    load_model(other, tmp_path/'m.safetensors')
    torch.testing.assert_close(other(x := torch.ones(2, 6)), m(x), rtol=0, atol=0)
    assert other.again is other[2].layers[0].weight

def test_saved_as_a_distributed_checkpoint(tmp_path):
    from torch.distributed import checkpoint
    m,other = net(),net()
    for p in m.parameters(): p.data.normal_()
    checkpoint.save(m.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    checkpoint.load(other.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    torch.testing.assert_close(other(x := torch.ones(2, 6)), m(x), rtol=0, atol=0)

def test_an_ensemble_in_one_call():
    models = [net() for _ in range(3)]
    for m in models:
        for p in m.parameters(): p.data.normal_()
    with torch.device('meta'): empty = net()
    weights,x = torch.func.stack_module_state(models),torch.randn(4, 6)
    ys = torch.vmap(lambda p, b: torch.func.functional_call(empty, (p, b), (x,)))(*weights)
    torch.testing.assert_close(ys, torch.stack([m(x) for m in models]))

# ---- the measure of `make libraries`

def test_what_is_compared_there_shows_small_faults():
    want = [torch.randn(5, 3).double(), None, torch.randn(4).double()*1e-2, torch.zeros(2).double()]
    assert worst(want, want) == 0
    for i in (0, 2):
        off = [None if t is None else t*(1 + 1e-7*(j == i)) for j,t in enumerate(want)]
        assert 5e-8 < worst(want, off) < 2e-7
    assert worst(want, [*want[:3], want[3] + 1e-12]) > 1e-10
    with pytest.raises(AssertionError, match='None'): worst(want, [want[0], want[0], *want[2:]])
