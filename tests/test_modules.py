"Every module that we have against PyTorch's, over PyTorch's own samples (`module_db`): values, gradients, state, names; on either engine."
import copy, itertools, pickle, sys
from contextlib import nullcontext
from functools import partial
import pytest, torch
from sweep import tensors
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map_only
from miniai import nn
from miniai.autograd import Tape, engine

pytestmark = pytest.mark.filterwarnings('ignore')
INFOS = {i.name.removeprefix('nn.'): i for i in module_db if hasattr(nn, i.name.removeprefix('nn.'))}
LEGACY = {'size_average', 'reduce'}          # arguments that PyTorch itself has given up

def samples(name, dtype, training):
    torch.manual_seed(0)
    for s in INFOS[name].module_inputs_func(INFOS[name], device='cpu', dtype=dtype, requires_grad=True, training=training):
        if not LEGACY & set(s.constructor_input.kwargs): yield s

def pair(name, sample, dtype, training):
    "Ours and PyTorch's from one seed"
    args,kwargs = sample.constructor_input.args,sample.constructor_input.kwargs
    for home in (nn, torch.nn):
        torch.manual_seed(1)
        yield getattr(home, name)(*args, **kwargs).to(dtype).train(training)

def outcome(m, sample, on=nullcontext):
    "Outputs, gradients of parameters and inputs, state afterwards"
    args,kwargs = tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (sample.forward_input.args, sample.forward_input.kwargs))
    if 'input' in kwargs: args = kwargs.pop('input'),*args
    xs = [t for t in tensors([args, kwargs]) if t.requires_grad]
    torch.manual_seed(2)
    with on():
        ys = tensors(m(*args, **kwargs))
        loss = sum((y*torch.linspace(.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in ys)
        if xs or list(m.parameters()): loss.backward()
    return dict(ys=[y.detach() for y in ys], gs=[t.grad for t in [*m.parameters(), *xs]], state=dict(m.state_dict()))

CASES = [pytest.param(name, dtype, training, id=f'{name}-{str(dtype)[6:]}-{"train" if training else "eval"}')
         for name in INFOS for dtype in (torch.float32, torch.float64, torch.bfloat16) for training in (True, False)
         if dtype in INFOS[name].dtypes or dtype == torch.bfloat16]
TOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}

@pytest.mark.parametrize('name, dtype, training', CASES)
def test_values_and_gradients_are_pytorchs(name, dtype, training):
    count = 0
    for s in samples(name, dtype, training):
        ours,theirs = pair(name, s, dtype, training)
        assert {k: v.shape for k,v in ours.state_dict().items()} == {k: v.shape for k,v in theirs.state_dict().items()}
        try: want = outcome(theirs, s)
        except RuntimeError as e:
            assert dtype == torch.bfloat16 and 'not implemented for' in str(e), e       # PyTorch has no such kernel
            continue
        torch.testing.assert_close(outcome(ours, s), want, rtol=TOL[dtype], atol=TOL[dtype], equal_nan=True)
        count += 1
    assert count or dtype == torch.bfloat16

@pytest.mark.parametrize('name', INFOS)
def test_on_the_tape_too(name):
    for s in itertools.islice(samples(name, torch.float64, True), 3):
        one,two = (next(iter(pair(name, s, torch.float64, True))) for _ in range(2))
        torch.testing.assert_close(outcome(one, s, partial(engine, 'tape')), outcome(two, s), rtol=1e-9, atol=1e-9, equal_nan=True)

def test_nothing_that_both_have_is_left_out():
    missing = {i.name.removeprefix('nn.') for i in module_db} - INFOS.keys()
    assert len(INFOS) >= 81 and not missing & {'Linear', 'LSTM', 'MultiheadAttention', 'BatchNorm3d', 'CrossEntropyLoss'}

# what module_db has no samples of
OTHERS = {'Dropout': ((.3,), (6, 5)), 'Dropout1d': ((.3,), (6, 5, 4)), 'Dropout2d': ((.3,), (6, 5, 2, 3)), 'Dropout3d': ((.3,), (6, 5, 2, 2, 2)), 'Flatten': ((), (4, 3, 2)), 'Hardsigmoid': ((), (6, 5)), 'Identity': ((), (3,)), 'PixelShuffle': ((2,), (2, 8, 3, 3)), 'PixelUnshuffle': ((2,), (2, 3, 4, 4)), 'Unflatten': ((1, (2, 3)), (4, 6)),
          'Upsample': ((None, 2, 'bilinear', False), (2, 3, 4, 4)), 'Embedding': ((9, 4, -1), None)}

@pytest.mark.parametrize('on', [nullcontext, partial(engine, 'tape')], ids=['torch', 'tape'])
@pytest.mark.parametrize('name', OTHERS)
def test_the_others_are_pytorchs_too(name, on):
    args,shape = OTHERS[name]
    found = []
    for home in (nn, torch.nn):
        torch.manual_seed(0)
        m = getattr(home, name)(*args)
        x = torch.randint(0, 9, (5, 3)) if shape is None else torch.randn(shape, requires_grad=True)
        with on() if home is nn else nullcontext():
            y = m(x)
            y.square().sum().backward()
        found.append([y.detach(), *m.state_dict().values(), *[t.grad for t in (x, *m.parameters()) if t.requires_grad]])
    torch.testing.assert_close(*found)

ARGS = {   # further arguments, on both sides: (positional, keywords), the shape of an input
    'Conv2d dilated':    ('Conv2d', (4, 6, (3, 1)), dict(stride=(2, 1), padding=(1, 2), dilation=2, groups=2, bias=False), (2, 4, 9, 8)),
    **{f'Conv2d {mode}': ('Conv2d', (3, 4, 3), dict(padding=(2, 1), padding_mode=mode), (2, 3, 6, 7)) for mode in ('reflect', 'replicate', 'circular')},
    'Conv1d same':       ('Conv1d', (3, 4, 4), dict(padding='same', dilation=3, padding_mode='circular'), (2, 3, 12)),
    'Conv1d valid':      ('Conv1d', (3, 4, 4), dict(padding='valid', padding_mode='reflect'), (2, 3, 12)),
    'ConvTranspose2d':   ('ConvTranspose2d', (4, 6, 3), dict(stride=3, padding=1, output_padding=2, groups=2, dilation=2), (2, 4, 5, 6)),
    'BatchNorm2d cumulative': ('BatchNorm2d', (3, 1e-3, None), {}, (4, 3, 5, 5)),
    'LSTM deep':         ('LSTM', (3, 4, 2), dict(batch_first=True, bidirectional=True, proj_size=2), (2, 5, 3)),
    'GRU dropout':       ('GRU', (3, 4, 3), dict(dropout=.5), (5, 2, 3)),
    'AvgPool2d divisor': ('AvgPool2d', (3, 2, 1), dict(ceil_mode=True, divisor_override=5), (2, 3, 8, 8))}

@pytest.mark.parametrize('name', ARGS)
def test_further_arguments(name):
    cls,args,kwargs,shape = ARGS[name]
    found = []
    for home in (nn, torch.nn):
        torch.manual_seed(0)
        m,x = getattr(home, cls)(*args, **kwargs),torch.randn(shape, requires_grad=True)
        for _ in range(2): y = tensors(m(x))[0]
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad for p in m.parameters()], *m.state_dict().values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)

@pytest.mark.parametrize('cls', ['RNN', 'LSTM', 'GRU'])
def test_sequences_of_different_lengths(cls):
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(6, 3, 4), torch.tensor([2, 6, 3]), enforce_sorted=False)
    torch.manual_seed(0); ours = getattr(nn, cls)(4, 5, 2)
    theirs = getattr(torch.nn, cls)(4, 5, 2)
    theirs.load_state_dict(ours.state_dict())
    h = torch.randn(2, 3, 5)
    states = (h, h+1) if cls == 'LSTM' else h
    (a, last_a), (b, last_b) = ours(x, states), theirs(x, states)
    torch.testing.assert_close((a.data, last_a), (b.data, last_b), rtol=0, atol=0)
    pad = torch.nn.utils.rnn.pad_packed_sequence
    torch.testing.assert_close(pad(a), pad(b), rtol=0, atol=0)

def test_attention_with_every_mask():
    torch.manual_seed(0)
    ours,theirs = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True), torch.nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    q,k,v = torch.randn(3, 4, 8), torch.randn(3, 7, 5), torch.randn(3, 7, 6)
    missing,score = torch.arange(7) >= torch.tensor([[7], [3], [5]]), torch.randn(6, 4, 7)
    for kw in (dict(key_padding_mask=missing), dict(attn_mask=score), dict(attn_mask=score[0], average_attn_weights=False), dict(attn_mask=score > 2, key_padding_mask=missing)):
        torch.testing.assert_close(ours(q, k, v, **kw), theirs(q, k, v, **kw))
        torch.testing.assert_close(ours(q, k, v, need_weights=False, **kw), theirs(q, k, v, need_weights=False, **kw))

# ---- the module itself

class Net(nn.Module):
    "Parts of every kind, in every place"
    def __init__(self, home=nn):
        self.stem = home.Linear(6, 8)
        self.blocks = [nn.Residual(home.Linear(8, 8), home.GELU(), home.LayerNorm(8)) for _ in range(2)]
        self.heads = dict(a=home.Linear(8, 3), b=torch.nn.Linear(8, 2))
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = b(x)
        return torch.cat([h(x) for h in self.heads.values()], 1)

class TorchNet(torch.nn.Module):
    "The same, PyTorch's way"
    def __init__(self):
        super().__init__()
        t = torch.nn
        class Residual(t.Module):
            def __init__(self):
                super().__init__()
                self.layers,self.skip = t.Sequential(t.Linear(8, 8), t.GELU(), t.LayerNorm(8)),t.Identity()
            def forward(self, x): return self.skip(x) + self.layers(x)
        self.stem = t.Linear(6, 8)
        self.blocks = t.ModuleList([Residual() for _ in range(2)])
        self.heads = t.ModuleDict(dict(a=t.Linear(8, 3), b=t.Linear(8, 2)))
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = b(x)
        return torch.cat([h(x) for h in self.heads.values()], 1)

def trained(m, steps, seed):
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x,targ = torch.randn(16, 6, generator=gen),torch.randint(0, 5, (16,), generator=gen)
        nn.cross_entropy(m(x), targ).backward()
        opt.step(); opt.zero_grad()
    return m

def test_saved_by_ours_trained_by_pytorch_and_loaded_by_ours(tmp_path):
    start = trained(Net(), 3, 0)
    torch.save(start.state_dict(), tmp_path/'ours.pt')
    theirs = TorchNet()
    theirs.load_state_dict(torch.load(tmp_path/'ours.pt'))
    torch.save(trained(theirs, 5, 1).state_dict(), tmp_path/'theirs.pt')
    there_and_back = Net()
    there_and_back.load_state_dict(torch.load(tmp_path/'theirs.pt'))
    stayed = trained(start, 5, 1)
    assert list(stayed.state_dict()) == list(theirs.state_dict())
    for m in (there_and_back, theirs): torch.testing.assert_close(dict(m.state_dict()), stayed.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(trained(there_and_back, 5, 2).state_dict(), trained(stayed, 5, 2).state_dict(), rtol=0, atol=0)

def test_no_line_of_pytorchs_module_runs(tmp_path):
    "but for the one that makes its empty dictionaries"
    file,ran = torch.nn.modules.module.__file__,set()
    def watch(frame, event, arg):
        if event == 'call' and frame.f_code.co_filename == file: ran.add(frame.f_code.co_name)
    model = trained(Net(home=nn), 0, 0)
    model.heads.b = nn.Linear(8, 2)
    sys.setprofile(watch)
    try:
        m = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.1), nn.Linear(8, 5))
        m.tied,m.scale = m[0],torch.nn.Parameter(torch.ones(1))
        del m.tied, m.scale
        for net in (m, model):
            net.train(); net.register_full_backward_hook(lambda *a: None); net.register_forward_hook(lambda *a: None)
            trained(net, 2, 0).eval().to(torch.float64).to(torch.float32).requires_grad_().zero_grad()
            net.load_state_dict(net.state_dict())
            net.apply(repr)
            copy.deepcopy(nn.Linear(2, 2)), pickle.loads(pickle.dumps(nn.Linear(2, 2)))
    finally: sys.setprofile(None)
    assert ran == {'__init__'}

def test_the_parent_would_have_been_seen():
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(frame.f_code.co_name) if frame.f_code.co_filename == torch.nn.modules.module.__file__ else None)
    try: list(torch.nn.Linear(2, 2).parameters())
    finally: sys.setprofile(None)
    assert 'named_parameters' in seen

def test_pytorchs_own_methods_work_on_ours():
    m = torch.nn.Sequential(Net(), nn.Linear(5, 2))
    assert m.double().eval()[0].blocks[0].skip.training is False and m[0].stem.weight.dtype == torch.float64
    assert m.get_parameter('0.blocks.1.layers.0.weight') is m[0].blocks[1].layers[0].weight
    assert m.get_submodule('0.heads.b') is m[0].heads['b']
    other = torch.nn.Sequential(Net(), nn.Linear(5, 2)).double()
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(other(x := torch.randn(3, 6).double()), m(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='Missing key'): other.load_state_dict({})
    m.float().requires_grad_(False)
    assert not any(p.requires_grad for p in m.parameters())

def test_weight_norm_and_parametrizations_take_ours():
    m = nn.Linear(4, 3)
    before = m.weight.detach().clone()
    torch.nn.utils.parametrizations.weight_norm(m)
    torch.testing.assert_close(m.weight, before)
    assert sorted(k for k,_ in m.named_parameters()) == ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']

@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compile(backend):
    torch._dynamo.reset()
    m = Net()
    x,compiled = torch.randn(4, 6),torch.compile(m, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), m(x))
    m(x).sum().backward()
    want = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    compiled(x).sum().backward()
    torch.testing.assert_close([p.grad for p in m.parameters()], want)

def test_compile_in_place():
    m,x = nn.Linear(4, 3),torch.randn(2, 4)
    y = m(x)
    m.compile(backend='eager')
    assert 'forward' in vars(m) and 'forward' not in vars(copy.deepcopy(m))
    torch.testing.assert_close(m(x), y)

@pytest.mark.parametrize('make, shape', [(Net, (4, 6)), (lambda: nn.Sequential(nn.Conv2d(1, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 3)), (2, 1, 8, 8)),
                                         (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8))], ids=['net', 'cnn', 'transformer'])
def test_export(make, shape):
    m,x = make().eval(),torch.randn(shape)
    exported = torch.export.export(m, (x,))
    assert {k: v.shape for k,v in exported.state_dict.items()} == {k: v.shape for k,v in m.state_dict().items()}
    torch.testing.assert_close(exported.module()(x), m(x))

def test_a_function_of_its_parameters():
    m,x = Net(),torch.randn(4, 6)
    params = {k: p.detach()*.5 for k,p in m.named_parameters()}
    half = copy.deepcopy(m)
    for p in half.parameters(): p.data *= .5
    torch.testing.assert_close(torch.func.functional_call(m, params, (x,)), half(x))

@pytest.mark.parametrize('on', [nullcontext, Tape, partial(engine, 'tape')], ids=['torch', 'Tape', 'engine'])
def test_backward_hooks_on_every_engine(on):
    def told(home, on):
        torch.manual_seed(0)
        m,x,rows = home.Sequential(home.Linear(6, 8), home.Tanh(), home.Linear(8, 5)),torch.randn(4, 6),[]
        m[1].register_full_backward_hook(lambda m, ins, outs: rows.append((ins[0].clone(), outs[0].clone())))
        m[0].register_full_backward_hook(lambda m, ins, outs: rows.append((outs[0].clone(),)))
        m[2].register_full_backward_pre_hook(lambda m, outs: (outs[0]*2,))
        m[1].register_full_backward_hook(lambda m, ins, outs: (ins[0]*3,))
        with on(): m(x).square().sum().backward()
        return rows, [p.grad for p in m.parameters()]
    torch.testing.assert_close(told(nn, on), told(torch.nn, nullcontext))

def test_the_first_layer_is_told_of_its_outputs():
    m,rows = nn.Linear(3, 2),[]
    m.register_full_backward_hook(lambda m, ins, outs: rows.append((ins, outs[0].shape)))
    m(torch.randn(4, 3)).sum().backward()
    assert rows == [((None,), (4, 2))]

def test_forward_hooks_change_what_passes_and_go_away():
    m,x = nn.Linear(3, 2),torch.randn(4, 3)
    y = m(x)
    with m.register_forward_pre_hook(lambda m, args: args[0]*2), m.register_forward_hook(lambda m, args, y: y+1):
        torch.testing.assert_close(m(x), 2*(y-m.bias) + m.bias + 1)
    order = []
    a = m.register_forward_hook(lambda m, args, y: order.append('a'))
    b = m.register_forward_hook(lambda m, args, kwargs, y: order.append(('b', kwargs)), prepend=True, with_kwargs=True)
    m(x=x); a.remove(); b.remove(); m(x)
    assert [o if isinstance(o, str) else o[0] for o in order] == ['b', 'a'] and list(order[0][1]) == ['x']

def test_an_error_names_the_path_of_the_layer():
    m = nn.Sequential(dict(body=nn.Sequential(nn.Linear(4, 4), nn.Parallel(nn.Linear(4, 2), nn.Linear(5, 2)))))
    with pytest.raises(ValueError, match=r'^Sequential\.body\.1\.layers\.1: Linear\(5→2\): x \(3, 4\) ends in 4'): m(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r'^Sequential\.body\.0: .*dtype'): m(torch.randn(3, 4).double())

def test_containers_are_lists_and_dictionaries():
    a,b,c = (nn.Linear(2, 2) for _ in range(3))
    m = nn.ModuleList([a, b])
    m.insert(1, c); assert list(m) == [a, c, b] and m.pop() is b and m[-1] is c and m.index(c) == 1
    m += [b]; m[0] = c; del m[1]; m.reverse()
    assert list(m) == [b, c] and [k for k,_ in m.named_children()] == ['0', '1'] and isinstance(m[:1], nn.ModuleList)
    d = nn.ModuleDict(dict(x=a, items=b))
    assert d['items'] is b and list(d) == ['x', 'items'] and 'x' in d and d.pop('x') is a and list(d.state_dict()) == ['items.weight', 'items.bias']
    with pytest.raises(ValueError, match='has a dot'): d['a.b'] = a
    s = nn.Sequential(a, b, c)
    assert type(s[1:]) is nn.Sequential and len(s[1:]) == 2 and s[-1] is c

def test_a_list_is_looked_into_when_parts_come_late():
    class Late(nn.Module):
        def __init__(self): self.slots,self.plain,self.empty = [None, None],[1, 2],{}
    m = Late()
    m.slots[1],m.empty['k'] = nn.Linear(2, 2),nn.Linear(2, 1)
    outer = torch.nn.Sequential(m)
    assert [k for k,_ in outer.named_parameters()] == ['0.slots.1.weight', '0.slots.1.bias', '0.empty.k.weight', '0.empty.k.bias']
    assert m.plain == [1, 2] and m.slots[0] is None

def test_parts_of_one_name_and_another_kind():
    m = nn.Module()
    m.a = torch.nn.Buffer(torch.ones(1), persistent=False); assert not m.state_dict()
    m.a = torch.zeros(1);                             assert not m.state_dict() and len(list(m.buffers())) == 1
    m.a = torch.nn.Parameter(torch.ones(1));                assert list(m.state_dict()) == ['a'] and not list(m.buffers())
    m.a = nn.Linear(1, 1);                            assert list(m.state_dict()) == ['a.weight', 'a.bias']
    m.a = 3;                                          assert m.a == 3 and not m.state_dict()
    with pytest.raises(AttributeError, match="no attribute 'b'"): m.b  # noqa: B018

def test_to_takes_what_pytorchs_does():
    m = nn.Sequential(nn.Conv2d(2, 3), nn.BatchNorm2d(3))
    m(torch.randn(2, 2, 5, 5)).sum().backward()
    m.to(memory_format=torch.channels_last)
    assert m[0].weight.is_contiguous(memory_format=torch.channels_last) and m[1].num_batches_tracked.dtype == torch.int64
    m.to(torch.zeros(1, dtype=torch.float64))
    assert m[0].weight.grad.dtype == m[0].weight.dtype == m[1].running_mean.dtype == torch.float64

def test_load_by_assignment_from_nothing():
    source = Net()
    with torch.device('meta'): m = Net()
    m.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(m(x := torch.ones(2, 6)), source(x), rtol=0, atol=0)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in m.parameters())

def test_a_part_that_overrides_train_is_asked():
    class Frozen(nn.Sequential):
        def train(self, mode=True): return super().train(False)
    m = nn.Sequential(Frozen(nn.Dropout(.5)), nn.Dropout(.5)).train()
    assert not m[0][0].training and m[1].training

def test_to_the_meta_device_and_back_as_pytorch_goes():
    for Linear in (nn.Linear, torch.nn.Linear):
        m = torch.nn.Sequential(Linear(2, 3)) if Linear is torch.nn.Linear else nn.Sequential(Linear(2, 3))
        w = m[0].weight
        w.grad = torch.ones(3, 2)
        m.to('meta')
        assert m[0].weight.is_meta and m[0].weight.grad.is_meta and isinstance(m[0].weight, torch.nn.Parameter)
        m.to_empty(device='cpu')
        assert not m[0].weight.is_meta and m[0].weight.shape == (3, 2)
