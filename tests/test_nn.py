"Our modules against PyTorch's: numbers, names, and what a model knows of itself."
import copy, pickle
import pytest, torch
from miniai import nn
from torch.nn import Buffer, Parameter

PAIRS = {   # ours, PyTorch's, the shape of an input
    'Linear':         (lambda: nn.Linear(6, 4),            lambda: torch.nn.Linear(6, 4),            (5, 6)),
    'Linear no bias': (lambda: nn.Linear(6, 4, bias=False), lambda: torch.nn.Linear(6, 4, bias=False), (5, 2, 6)),
    'Conv2d':         (lambda: nn.Conv2d(3, 4),            lambda: torch.nn.Conv2d(3, 4, 3),         (2, 3, 7, 9)),
    'Conv2d strided': (lambda: nn.Conv2d(3, 4, 5, 2, 2, bias=False), lambda: torch.nn.Conv2d(3, 4, 5, 2, 2, bias=False), (2, 3, 8, 8)),
    'BatchNorm2d':    (lambda: nn.BatchNorm2d(3),          lambda: torch.nn.BatchNorm2d(3),          (4, 3, 5, 5)),
    'BatchNorm2d m':  (lambda: nn.BatchNorm2d(3, 1e-2, .3), lambda: torch.nn.BatchNorm2d(3, 1e-2, .3), (4, 3, 5, 5)),
    'ReLU':           (lambda: nn.ReLU(),                  lambda: torch.nn.ReLU(),                  (5, 6)),
    'Flatten':        (lambda: nn.Flatten(),               lambda: torch.nn.Flatten(),               (5, 2, 3)),
    'Dropout':        (lambda: nn.Dropout(.3),             lambda: torch.nn.Dropout(.3),             (50, 6)),
    'Sequential':     (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)),
                       lambda: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), (5, 6)),
}

def pair(name, dtype=torch.float32):
    make_ours, make_theirs, shape = PAIRS[name]
    torch.manual_seed(0); ours = make_ours().to(dtype)
    torch.manual_seed(0); theirs = make_theirs().to(dtype)
    return ours, theirs, shape

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', PAIRS)
def test_forward_and_backward_equal_pytorchs(name, training, dtype):
    ours, theirs, shape = pair(name, dtype)
    ours.train(training), theirs.train(training)
    results = []
    for m in (ours, theirs):
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = m(x)
        (y*torch.arange(y.numel(), dtype=dtype).view(y.shape)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=0)

@pytest.mark.parametrize('name', PAIRS)
def test_one_seed_gives_pytorchs_weights_under_pytorchs_names(name):
    ours, theirs, _ = pair(name)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for k in ours: torch.testing.assert_close(ours[k], theirs[k], rtol=0, atol=0)

@pytest.mark.parametrize('name', PAIRS)
def test_checkpoints_go_both_ways(name):
    ours, theirs, shape = pair(name)
    for p in ours.parameters(): p.data.add_(1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)
    fresh = pair(name)[0]
    fresh.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(fresh.eval()(x), theirs(x), rtol=0, atol=0)

class Nested(nn.Module):
    "Parts in every place where a part can be"
    def __init__(self):          # no super().__init__(): none is needed
        self.scale = Parameter(torch.ones(1))
        self.seen = Buffer(torch.zeros(1))
        self.layers = [nn.Linear(2, 2), torch.nn.BatchNorm1d(2)]
        self.heads = dict(a=nn.Linear(2, 1), b=(nn.ReLU(), [torch.nn.Linear(2, 3)]))
        self.size, self.names = 3, ['x', 'y']
    def forward(self, x): return self.layers[0](x)*self.scale

NAMES = ['scale', 'layers.0.weight', 'layers.0.bias', 'layers.1.weight', 'layers.1.bias', 'heads.a.weight', 'heads.a.bias',
         'heads.b.1.0.weight', 'heads.b.1.0.bias']

def test_parts_are_found_wherever_they_are():
    m = Nested()
    assert [k for k,_ in m.named_parameters()] == NAMES
    assert [k for k,_ in m.named_buffers()] == ['seen', 'layers.1.running_mean', 'layers.1.running_var', 'layers.1.num_batches_tracked']
    assert [k for k,_ in m.named_modules()] == ['', 'layers', 'layers.0', 'layers.1', 'heads', 'heads.a', 'heads.b', 'heads.b.0', 'heads.b.1', 'heads.b.1.0']
    assert set(m.state_dict()) == {*NAMES, *(k for k,_ in m.named_buffers())}

def test_parts_come_and_go():
    m = Nested()
    m.layers.append(nn.Linear(2, 2))
    assert 'layers.2.weight' in dict(m.named_parameters())
    del m.heads
    m.layers = None
    assert [k for k,_ in m.named_parameters()] == ['scale']
    m.scale = None
    m.seen = torch.ones(1)             # a tensor for a buffer stays a buffer
    assert not list(m.parameters()) and [k for k,_ in m.named_buffers()] == ['seen']
    with pytest.raises(AttributeError): del m.heads

def test_a_plain_tensor_cannot_replace_a_parameter():
    with pytest.raises(TypeError, match='Nested.scale is a parameter'): Nested().scale = torch.ones(1)

def test_what_is_shared_counts_once_and_is_saved_under_both_names():
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    m[1].weight = m[0].weight
    assert [k for k,_ in m.named_parameters()] == ['0.weight', '0.bias', '1.bias']
    assert list(m.state_dict()) == ['0.weight', '0.bias', '1.weight', '1.bias']

def test_train_and_eval_reach_everything():
    m = Nested()
    assert not any(o.training for o in m.eval().modules())
    assert all(o.training for o in m.train().modules())

def test_to_moves_everything_and_keeps_identity():
    m = Nested()
    before = list(m.parameters())
    m.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in m.parameters())
    assert dict(m.named_buffers())['layers.1.num_batches_tracked'].dtype == torch.int64
    assert all(a is b for a,b in zip(before, m.parameters(), strict=True))
    assert m.to('cpu', torch.float32).scale.dtype == torch.float32 and isinstance(m.seen, Buffer)

@pytest.mark.parametrize('twin_of', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_twins_are_equal_and_apart(twin_of):
    m = Nested()
    twin = twin_of(m)
    assert [k for k,_ in twin.named_parameters()] == NAMES
    twin.layers[0].weight.data.zero_()
    assert m.layers[0].weight.abs().sum() > 0 and twin.layers[0].weight is dict(twin.named_parameters())['layers.0.weight']

def test_load_state_dict_changes_nothing_when_something_is_wrong():
    m = Nested()
    before = {k: v.clone() for k,v in m.state_dict().items()}
    bad = {k: v+1 for k,v in before.items()}
    bad['scale'] = torch.ones(2)
    with pytest.raises(ValueError, match=r'scale: \(2,\) does not fit \(1,\)'): m.load_state_dict(bad)
    for k,v in m.state_dict().items(): torch.testing.assert_close(v, before[k])
    m.load_state_dict({'scale': torch.tensor([7.])}, strict=False)
    assert m.scale.item() == 7

def test_buffers_that_are_not_to_be_saved_are_not_saved():
    theirs = torch.nn.Module()
    theirs.register_buffer('a', torch.zeros(1)); theirs.register_buffer('b', torch.zeros(1), persistent=False)
    m = nn.Sequential(theirs, nn.ReLU())
    m.c = Buffer(torch.zeros(1), persistent=False)
    assert list(m.state_dict()) == ['0.a'] and len(list(m.buffers())) == 3
    assert list(torch.nn.Sequential(theirs).state_dict()) == ['0.a']

def test_ours_holds_pytorchs_and_gradients_flow_through_both():
    m = nn.Sequential(torch.nn.Linear(3, 4), nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    m(torch.randn(5, 3)).sum().backward()
    assert all(p.grad is not None for p in m.parameters()) and len(list(m.parameters())) == 4

def test_sequential_takes_any_callable():
    m = nn.Sequential(nn.Flatten(), torch.tanh, lambda x: x*2)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(m(x), x.flatten(1).tanh()*2)
    assert len(m) == 3 and m[1].f is torch.tanh and list(m)[0] is m[0]

def test_repr_answers_the_next_question():
    assert repr(nn.Linear(784, 50)) == 'Linear(784→50) 39,250 params'
    assert repr(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 2)))) == (
        'Sequential() 10 params\n  0: Flatten()\n  1: Sequential() 10 params\n    0: Linear(4→2) 10 params')

@pytest.mark.parametrize('call, said', [
    (lambda: nn.Linear(784, 50)(torch.zeros(64, 1, 28, 28)), r'Linear\(784→50\): x \(64, 1, 28, 28\) ends in 28, not in 784; put a Flatten'),
    (lambda: nn.Conv2d(3, 8)(torch.zeros(4, 1, 28, 28)),     r'Conv2d\(3→8, 3×3\): x is \(4, 1, 28, 28\), not \(n, 3, h, w\)'),
    (lambda: nn.BatchNorm2d(3)(torch.zeros(4, 3)),           r'BatchNorm2d\(3\): x is \(4, 3\), not \(n, 3, h, w\)'),
    (lambda: nn.Dropout(1.),                                 'probability from 0 to below 1'),
    (lambda: nn.mse(torch.zeros(8, 1), torch.zeros(8)),      'would be compared pairwise'),
    (lambda: nn.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3])), 'classes 0 to 2, the targets go from 0 to 3'),
])
def test_errors_show_the_next_move(call, said):
    with pytest.raises(ValueError, match=said): call()

def test_cross_entropy_is_the_formula_at_extremes():
    for scale in (1e-30, 1., 1e4, 1e30):
        x = torch.randn(6, 5, dtype=torch.float64)*scale
        targ = torch.tensor([0, 1, 2, 3, 4, 0])
        torch.testing.assert_close(nn.cross_entropy(x, targ), (x.logsumexp(1) - x[range(6), targ]).mean())

# ---- begin anew

ANEW = dict(Linear=(6, 4), Conv1d=(3, 4, 3), Conv2d=(3, 4, 3), Conv3d=(3, 4, 3), ConvTranspose1d=(3, 4, 3), ConvTranspose2d=(3, 4, 3),
            ConvTranspose3d=(3, 4, 3), BatchNorm1d=(3,), BatchNorm2d=(3,), BatchNorm3d=(3,), InstanceNorm1d=(3, 1e-5, .1, True, True),
            InstanceNorm2d=(3, 1e-5, .1, True, True), InstanceNorm3d=(3, 1e-5, .1, True, True), LayerNorm=((4, 3),), RMSNorm=(4,),
            GroupNorm=(2, 4), Embedding=(5, 3, 1), PReLU=(3, .1), RNN=(3, 4, 2), LSTM=(3, 4, 2), GRU=(3, 4, 2), RNNCell=(3, 4),
            LSTMCell=(3, 4), GRUCell=(3, 4), MultiheadAttention=(4, 2, 0., True, True))

@pytest.mark.parametrize('name', ANEW)
def test_what_has_learned_begins_anew_with_pytorchs_numbers(name):
    ends = []
    for t in (nn, torch.nn):
        torch.manual_seed(0)
        m = getattr(t, name)(*ANEW[name])
        for x in m.state_dict().values(): x.add_(1)
        torch.manual_seed(3)
        (m._reset_parameters if hasattr(m, '_reset_parameters') else m.reset_parameters)()       # the first is PyTorch's attention
        ends.append(m.state_dict())
    assert list(ends[0]) == list(ends[1])
    for k in ends[0]: torch.testing.assert_close(ends[0][k], ends[1][k], rtol=0, atol=0)

def test_running_averages_are_forgotten():
    m = nn.BatchNorm2d(3)
    m(torch.randn(4, 3, 5, 5)+2)
    m.weight.data.fill_(5)
    m.reset_running_stats()
    assert m.running_mean.eq(0).all() and m.running_var.eq(1).all() and m.num_batches_tracked == 0 and m.weight.eq(5).all()

def test_rows_that_somebody_else_has_learned():
    rows = torch.randn(5, 3)
    chance = torch.get_rng_state()
    m = nn.Embedding.from_pretrained(rows, padding_idx=-1)
    assert torch.equal(chance, torch.get_rng_state()) and m.weight.data_ptr() == rows.data_ptr()
    assert not m.weight.requires_grad and m.padding_idx == 4 and nn.Embedding.from_pretrained(rows, freeze=False).weight.requires_grad
    torch.testing.assert_close(m(torch.tensor([1, 4])), torch.nn.Embedding.from_pretrained(rows, padding_idx=-1)(torch.tensor([1, 4])))
    with pytest.raises(ValueError, match=r'embeddings is \(3,\), not \(rows, features\)'): nn.Embedding.from_pretrained(rows[0])

INSIDE = {'check_forward_args', 'check_hidden_size', 'check_input', 'get_expected_hidden_size', 'get_expected_cell_size', 'permute_hidden',
          'merge_masks'}       # public by name, but for PyTorch's own use

def test_a_layer_has_every_method_of_pytorchs():
    shared = [(getattr(nn, k), getattr(torch.nn, k)) for k in dir(nn) if isinstance(getattr(torch.nn, k, None), type)]
    assert len(shared) > 90
    missing = {f'{ours.__name__}.{k}' for ours,theirs in shared for k in dir(theirs)
               if not k.startswith('_') and k not in INSIDE and callable(getattr(theirs, k)) and not hasattr(ours, k)}
    assert not missing
