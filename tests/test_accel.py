"Each lever: does it do what it says, change no number, and leave nothing behind?"
import json, math, os, shutil, subprocess, sys, threading, time
from types import SimpleNamespace
import pytest, torch, torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from conftest import ROOT
from miniai import accel, nn, optim
from miniai.accel import CANDIDATES, FAST, PYTORCH, FastCB, Kernels, agree, chosen, fastest, swap_kernels
from miniai.callbacks import ProgressCB
from miniai.checkpoint import CheckpointCB
from miniai.data import Dataset
from miniai.learner import Callback, CancelFitException, Learner
from miniai.loader import DataLoader
from miniai.training import AmpCB

aten = torch.ops.aten
CL = torch.channels_last
CONV,BACK = aten.convolution.default,aten.convolution_backward.default

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Times of its own for each test"
    monkeypatch.setenv('MINIAI_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(accel, 'BUSY', math.inf)
    for table in (accel.TIMES, accel._chosen): table.clear()
    accel._say.cache_clear()
    yield
    for table in (accel.TIMES, accel._chosen): table.clear()

# ---- candidates

def conv_args(size, k, stride, pad, dtype, n=3, ci=4, co=5, bias=True):
    gen = torch.Generator().manual_seed(0)
    def new(*shape): return torch.randn(*shape, generator=gen).to(dtype)
    x,w = new(n, ci, *size).contiguous(memory_format=CL),new(co, ci, *k).contiguous(memory_format=CL)
    return [x, w, new(co) if bias else None, list(stride), list(pad), [1, 1], False, [0, 0], 1]

SHAPES = [((1, 1), (3, 3), (1, 1), (1, 1)), ((2, 2), (3, 3), (1, 1), (1, 1)), ((2, 2), (3, 3), (2, 2), (1, 1)), ((7, 5), (3, 3), (2, 2), (1, 1)),
          ((7, 6), (3, 3), (2, 1), (1, 0)), ((8, 8), (3, 3), (2, 2), (1, 1)), ((5, 9), (1, 1), (1, 1), (0, 0)), ((5, 4), (1, 1), (2, 2), (0, 0)),
          ((6, 7), (5, 3), (1, 1), (2, 1)), ((4, 4), (2, 2), (1, 1), (0, 0)), ((4, 4), (3, 3), (1, 1), (2, 2)), ((3, 3), (3, 3), (3, 3), (3, 3)),
          ((1, 2), (1, 3), (1, 1), (0, 1)), ((3, 3), (5, 5), (2, 2), (2, 2))]
DTYPES = torch.float64, torch.float32, torch.bfloat16

def every(op, args):
    "Every way there is for a call, with both products"
    fs = CANDIDATES[op](*args)
    assert all(k.split()[0] in ('columns', 'unrolled', 'apart') for k in fs)
    return fs

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('bias', [True, False])
def test_every_way_gives_the_convolution_of_pytorch(shape, dtype, bias):
    args = conv_args(*shape, dtype, bias=bias)
    fs,want = every(CONV, args),CONV(*args)
    assert 'columns' in fs
    for name,f in fs.items(): assert agree(f(*args), want), name

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_every_way_gives_the_gradients_of_pytorch(shape, dtype):
    x,w,b,*how = conv_args(*shape, dtype)
    g = torch.randn_like(CONV(x, w, b, *how))
    for mask in ([True, False, False], [False, True, False], [True, False, True], [False, True, True]):
        args = [g, x, w, [len(w)], *how, mask]
        fs,want = every(BACK, args),BACK(*args)
        assert 'columns' in fs
        for name,f in fs.items(): assert agree(f(*args), tuple(o if on else None for o,on in zip(want, mask, strict=True))), (name, mask)

@pytest.mark.parametrize('ways', [('columns', 'columns'), ('unrolled', 'columns'), (None, 'unrolled'), ('columns', None)], ids=str)
def test_two_gradients_each_in_a_way_of_its_own(ways):
    x,w,b,*how = conv_args((2, 2), (3, 3), (1, 1), (1, 1), torch.float64)
    g = torch.randn_like(CONV(x, w, b, *how))
    fs = [CANDIDATES[BACK](g, x, w, [len(w)], *how, [i == 0, i == 1, False])[k] if k else BACK for i,k in enumerate(ways)]
    for bias in (True, False):
        args = g, x, w, [len(w)], *how, [True, True, bias]
        got,want = accel.apart(*fs, *args),BACK(*args)
        assert agree(got[:2], want[:2]) and (agree(got[2], want[2]) if bias else got[2] is None)

def test_the_unrolled_kernel_is_offered_where_it_is_small_and_both_products_in_float32():
    def names(size, dtype=torch.float32): return set(CANDIDATES[CONV](*conv_args(size, (3, 3), (1, 1), (1, 1), dtype)))
    both = {'columns onednn', 'unrolled onednn'} if accel.can_onednn(torch.ones(1)) else set()
    assert names((2, 2)) == {'columns', 'unrolled'} | both
    assert names((2, 2), torch.bfloat16) == {'columns', 'unrolled'}
    assert 'unrolled' not in names((8, 8))
    assert not names((64, 64))

@pytest.mark.parametrize('what', ['groups', 'dilation', 'transposed', 'contiguous', 'one dimension', 'empty', 'integers'])
def test_other_convolutions_are_left_alone(what):
    x,w,b,stride,pad,dilation,transposed,outpad,groups = conv_args((6, 6), (3, 3), (1, 1), (1, 1), torch.float32, ci=4, co=4)
    if what == 'groups': w,groups = w[:, :2].contiguous(memory_format=CL),2
    if what == 'dilation': dilation = [2, 2]
    if what == 'transposed': transposed = True
    if what == 'contiguous': x,w = x.contiguous(),w.contiguous()
    if what == 'one dimension': x,w,stride,pad,dilation,outpad = x[..., 0],w[..., 0],[1],[1],[1],[0]
    if what == 'empty': x = x[:0]
    if what == 'integers': x,w,b = (o.long() for o in (x, w, b))
    args = x, w, b, stride, pad, dilation, transposed, outpad, groups
    assert CANDIDATES[CONV](*args) == {}
    assert CANDIDATES[BACK](torch.zeros(1), x, w, [4], *args[3:], [True, True, True]) == {}
    assert fastest(CONV, *args) is CONV
    assert not accel.TIMES or not any(accel.TIMES.values())

@pytest.mark.parametrize('shapes', [(5, 7, 3), (1, 1, 1), (64, 784, 50), (33, 1, 17)], ids=str)
@pytest.mark.parametrize('turned', [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_products_through_onednn(shapes, turned):
    if not accel.can_onednn(torch.ones(1)): pytest.skip('no oneDNN here')
    m,k,n = shapes
    a = torch.randn(k, m).t() if turned[0] else torch.randn(m, k)
    b = torch.randn(n, k).t() if turned[1] else torch.randn(k, n)
    bias = torch.randn(n)
    (f,),(fb,) = CANDIDATES[aten.mm.default](a, b).values(),CANDIDATES[aten.addmm.default](bias, a, b).values()
    assert agree(f(a, b), a@b) and agree(fb(bias, a, b), torch.addmm(bias, a, b))
    assert agree(fb(bias, a, b, beta=1, alpha=1), torch.addmm(bias, a, b))

def test_products_that_onednn_has_no_way_for():
    a,b,bias = torch.randn(4, 4),torch.randn(4, 4),torch.randn(4)
    assert not CANDIDATES[aten.mm.default](a.double(), b.double()) and not CANDIDATES[aten.mm.default](a.bfloat16(), b.bfloat16())
    assert not CANDIDATES[aten.mm.default](a[:0], b)
    assert not CANDIDATES[aten.addmm.default](bias, a, b, beta=2) and not CANDIDATES[aten.addmm.default](bias[:1], a, b)
    assert not CANDIDATES[aten.addmm.default](bias.expand(4, 4), a, b)

# ---- the trial

@pytest.fixture
def made_up(monkeypatch):
    "Put up candidates for `aten.mm`"
    def put(**fs): monkeypatch.setitem(CANDIDATES, aten.mm.default, lambda a, b: fs)
    return put

WRONG = {'a constant': lambda a, b: a.new_zeros(len(a), b.shape[1]), 'one number': lambda a, b: torch.mm(a, b).index_put_((torch.tensor(3), torch.tensor(3)), torch.tensor(0.)),
         'a thousandth': lambda a, b: torch.mm(a, b)*1.001, 'not a number': lambda a, b: torch.mm(a, b).fill_(float('nan')), 'another type': lambda a, b: torch.mm(a, b).double(),
         'another layout': lambda a, b: torch.mm(a, b).t().contiguous().t(), 'another shape': lambda a, b: torch.mm(a, b)[None], 'bfloat16': lambda a, b: (a.bfloat16()@b.bfloat16()).float()}

@pytest.mark.parametrize('name', WRONG)
def test_what_is_wrong_is_never_chosen(name, made_up, monkeypatch):
    monkeypatch.setattr(accel, 'race', lambda fs: {k: 2. if k == PYTORCH else 1. for k in fs})        # the wrong one would win
    made_up(wrong=WRONG[name])
    a,b = torch.randn(20, 20),torch.randn(20, 20)
    assert fastest(aten.mm.default, a, b) is aten.mm.default
    made_up(right=right) if (right := lambda a, b: torch.einsum('ij,jk->ik', a, b)) else None
    accel._chosen.clear(), accel.TIMES.clear(), accel.kernel_file().unlink()
    assert fastest(aten.mm.default, a, b) is right

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_wrong_number_is_seen_in_every_type(dtype):
    good = torch.randn(50, 50).to(dtype)
    bad = good.clone()
    bad[7, 7] += .5
    assert agree(good.clone(), good) and not agree(bad, good)

def test_a_gradient_of_zeros_does_not_let_a_wrong_one_pass(made_up):
    made_up(wrong=WRONG['a constant'])
    assert chosen(aten.mm.default, torch.zeros(64, 64), torch.zeros(64, 64)).name == PYTORCH

def test_the_trial_touches_neither_the_arguments_nor_chance(made_up):
    made_up(writes=lambda a, b: torch.mm(a.mul_(2), b))
    a,b = torch.randn(8, 8),torch.randn(8, 8)
    a_was,dice = a.clone(),torch.get_rng_state()
    fastest(aten.mm.default, a, b)
    assert torch.equal(a, a_was) and torch.equal(torch.get_rng_state(), dice)

def test_a_candidate_must_win_clearly():
    assert accel.pick({PYTORCH: 1., 'a': .97}) == PYTORCH
    assert accel.pick({PYTORCH: 1., 'a': .9, 'b': .8}) == 'b'
    assert accel.pick({PYTORCH: 1.}) == PYTORCH

def test_all_take_turns_and_the_slow_one_leaves():
    calls = []
    times = accel.race({'slow': lambda: (calls.append('slow'), torch.randn(300000)), 'quick': lambda: calls.append('quick')}, turns=6, seconds=10)
    assert calls[:6] == ['slow', 'quick']*3 and calls.count('quick') == 7 and calls.count('slow') == 3
    assert times['quick'] < times['slow']

@pytest.mark.parametrize('x', [torch.randn(4, 6, 5, 5).contiguous(memory_format=CL), torch.randn(3, 4).t(), torch.randn(4, 1).expand(4, 9), torch.randn(10, 10)[::2, 3:7], torch.randn(0, 3)], ids=lambda x: str(x.stride()))
def test_a_twin_has_the_same_layout(x):
    t = accel.twin(x, torch.Generator())
    assert (t.shape, t.stride(), t.dtype) == (x.shape, x.stride(), x.dtype) and (not x.numel() or t.std() > .1)
    assert accel.twin([1, 2], None) == [1, 2]

def test_each_layout_type_and_number_of_threads_is_a_call_of_its_own():
    a,b = torch.randn(6, 6),torch.randn(6, 6)
    n = torch.get_num_threads()
    try:
        for x in (a, a.t(), a.double()): fastest(aten.mm.default, x, b.to(x.dtype))
        torch.set_num_threads(1 if n > 1 else 2)
        fastest(aten.mm.default, a, b)
    finally: torch.set_num_threads(n)
    assert len(accel._chosen) == 4

# ---- the file

def count_trials(monkeypatch):
    seen,real = [],accel.trial
    monkeypatch.setattr(accel, 'trial', lambda *args: seen.append(args) or real(*args))
    return seen

def forget(): accel.TIMES.clear(), accel._chosen.clear()

@pytest.fixture
def two(made_up):
    made_up(right=lambda a, b: torch.einsum('ij,jk->ik', a, b))
    return torch.randn(9, 9), torch.randn(9, 9)

def test_a_new_process_tries_nothing_anew(monkeypatch, two):
    seen = count_trials(monkeypatch)
    fastest(aten.mm.default, *two)
    forget()
    fastest(aten.mm.default, *two)
    assert len(seen) == 1
    table, = json.loads(accel.kernel_file().read_text()).values()
    times, = table.values()
    assert times.keys() == {PYTORCH, 'right'}
    assert [p.name for p in accel.kernel_file().parent.iterdir()] == ['kernels.json']          # nothing half written beside it

@pytest.mark.parametrize('share', [.05, .5])
def test_what_was_found_while_others_had_the_cores_is_not_kept(share, monkeypatch, two):
    monkeypatch.setattr(accel, 'BUSY', .1)
    monkeypatch.setattr(accel, 'waited', lambda: share*time.perf_counter())
    seen = count_trials(monkeypatch)
    for _ in range(2):
        f = fastest(aten.mm.default, *two)
        assert fastest(aten.mm.default, *two) is f          # in this process it holds
        forget()
    assert len(seen) == (1 if share < .1 else 2)

def test_the_wait_for_a_core_is_counted(tmp_path):
    for i,text in enumerate(('5 2000000000 1', '7 500000000 3')):
        (tmp_path/str(i)).mkdir()
        (tmp_path/str(i)/'schedstat').write_text(text)
    assert accel.waited(tmp_path) == 2.5 and accel.waited(tmp_path/'none') == 0 and accel.waited() >= 0

TORN = ['', '{', '[]', '3', '{"m": [1]}', '{"m": {"c": {}}}', '{"m": {"c": {"PyTorch": -1.0}}}', '{"m": {"c": {"PyTorch": null}}}', '{"m": {"c": [1.0]}}', '\x00\xff', '['*100000]

@pytest.mark.parametrize('text', TORN, ids=range(len(TORN)))
def test_a_torn_or_foreign_file_is_passed_over_with_a_line(text, monkeypatch, capsys, two):
    path = accel.kernel_file()
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode('latin-1'))
    seen = count_trials(monkeypatch)
    fastest(aten.mm.default, *two)
    said = capsys.readouterr().err
    assert len(seen) == 1 and said.count('\n') == 1 and 'kernels.json is passed over' in said
    forget()
    fastest(aten.mm.default, *two)
    assert len(seen) == 1                        # it was written anew

def test_times_of_a_candidate_that_is_no_more_are_not_believed(monkeypatch, two):
    fastest(aten.mm.default, *two)
    found = accel.read_times(accel.kernel_file())
    for calls in found.values():
        for times in calls.values(): times['of yore'] = 1e-12
    accel.kernel_file().write_text(json.dumps(found))
    forget()
    seen = count_trials(monkeypatch)
    fastest(aten.mm.default, *two)
    assert len(seen) == 1

def test_times_of_another_machine_stay_and_are_not_used(monkeypatch, two):
    accel.write_times(accel.kernel_file(), {'another': {'call': {PYTORCH: 1.}}})
    seen = count_trials(monkeypatch)
    fastest(aten.mm.default, *two)
    assert len(seen) == 1 and accel.read_times(accel.kernel_file()).keys() == {'another', accel.machine()}

def test_a_folder_that_cannot_be_written_costs_a_line(monkeypatch, tmp_path, capsys, two):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('MINIAI_CACHE', str(tmp_path/'file'/'cache'))
    f = fastest(aten.mm.default, *two)
    assert agree(f(*two), torch.mm(*two))
    assert 'was not written' in capsys.readouterr().err

# ---- in a program

def conv_net(t=nn):
    torch.manual_seed(0)
    return accel.channels_last(t.Sequential(t.Conv2d(3, 8, 3, 2, 1, bias=False), t.BatchNorm2d(8), t.ReLU(), t.Conv2d(8, 8, 3, 1, 1), t.ReLU(), t.Conv2d(8, 8, 3, 2, 1), t.Flatten(), t.Linear(32, 4)))

@pytest.fixture
def always(monkeypatch):
    "Whoever computes the same wins, so that every exchange takes place"
    monkeypatch.setattr(accel, 'race', lambda fs: {k: 2. if k == PYTORCH else 1. for k in fs})

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_a_program_with_other_kernels_has_the_same_gradients(engine, dtype, always):
    x,targ = torch.randn(6, 3, 8, 8, dtype=dtype),torch.randint(0, 4, (6,))
    def grads(mode=None):
        model = conv_net().to(dtype)
        block = accel.nullcontext() if mode is None else mode
        from miniai.autograd import Tape
        with block, (Tape() if engine == 'tape' else accel.nullcontext()):
            loss = F.cross_entropy(model(x), targ)
            loss.backward()
        return [loss.detach(), *[p.grad for p in model.parameters()], *model.buffers()]
    mode = Kernels()
    got,want = grads(mode),grads()
    assert mode.saved >= 6                        # three convolutions and their gradients, at a made-up second each
    for a,b in zip(got, want, strict=True): torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)

def flat_step(dtype=torch.float32, amp=False):
    "Forward, backward and update as one graph, and what it is called with"
    model = conv_net().to(dtype)
    params,buffers = list(model.parameters()),list(model.buffers())
    def step(ps, bs, x, targ):
        named = dict(zip([k for k,_ in model.named_parameters()], ps, strict=True)) | dict(zip([k for k,_ in model.named_buffers()], bs, strict=True))
        with torch.autocast('cpu', torch.bfloat16, enabled=amp): loss = F.cross_entropy(torch.func.functional_call(model, named, x), targ)
        gs = torch.autograd.grad(loss, ps)
        with torch.no_grad():
            for p,g in zip(ps, gs, strict=True): p.sub_(g, alpha=.1)
        return loss
    inputs = params, buffers, torch.randn(6, 3, 8, 8, dtype=dtype), torch.randint(0, 4, (6,))
    return make_fx(step)(*inputs), inputs

def copy_of(inputs): return [[o.detach().clone().requires_grad_(o.requires_grad) for o in part] if isinstance(part, list) else part for part in inputs]

@pytest.mark.parametrize('amp', [False, True])
def test_a_graph_with_other_kernels_takes_the_same_step(amp, always):
    graph,inputs = flat_step(amp=amp)
    first,second = copy_of(inputs),copy_of(inputs)
    with torch.no_grad(): want = graph(*first)
    swaps = swap_kernels(graph, inputs)
    assert sum(s.op.startswith('aten.convolution') for s in swaps) == 6
    assert not any(n.target in (CONV, BACK) for n in graph.graph.nodes)
    with torch.no_grad(): got = graph(*second)
    tol = .05 if amp else 1e-4
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)
    for a,b in zip(second[0]+second[1], first[0]+first[1], strict=True): torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    assert any((a-b).abs().max() > 1e-4 for a,b in zip(second[0], inputs[0], strict=True))        # it was a step

def test_what_the_graph_writes_to_is_not_written_to(always):
    graph,inputs = flat_step()
    was,dice = copy_of(inputs),torch.get_rng_state()
    swap_kernels(graph, inputs)
    for a,b in zip(inputs[0]+inputs[1], was[0]+was[1], strict=True): assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), dice)

def test_tensors_that_share_memory_share_it_in_the_copy(made_up, always):
    made_up(right=lambda a, b: torch.einsum('ij,jk->ik', a, b))
    whole = torch.zeros(2, 3, 3)
    def step(whole, part, x):
        whole.add_(1)
        return torch.mm(part, x)
    graph = make_fx(step)(whole.clone(), torch.zeros(3, 3), torch.eye(3))
    seen = []
    class Look(accel._Chooser):
        def run_node(self, node):
            out = super().run_node(node)
            if node.target is aten.mm.default: seen.append(out)
            return out
    Look(graph).run(whole, whole[1], torch.eye(3))
    assert torch.equal(seen[0], torch.ones(3, 3)) and not whole.any()

def test_parameters_that_the_graph_holds_are_copied_too(always):
    conv = accel.channels_last(nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=CL)
    def f(x):
        with torch.no_grad(): conv.weight.mul_(2)
        return conv(x)
    was = conv.weight.detach().clone()
    graph = make_fx(f)(x)
    with torch.no_grad(): conv.weight.copy_(was)
    assert len(swap_kernels(graph, (x,))) == 1 and torch.equal(conv.weight, was)

def test_a_graph_without_candidates_stays_as_it_is():
    graph = make_fx(lambda x: x.sin().sum())(torch.randn(3))
    code = graph.code
    assert swap_kernels(graph, (torch.randn(3),)) == [] and graph.code == code

def test_candidates_can_be_traced_with_stand_ins():
    x,w,b,*how = conv_args((2, 2), (3, 3), (1, 1), (1, 1), torch.float32)
    for name,f in CANDIDATES[CONV](x, w, b, *how).items():
        def call(x, w, b): return f(x, w, b, *how)  # noqa: B023  called at once
        graph = make_fx(call, tracing_mode='fake')(x, w, b)
        assert agree(graph(x, w, b), CONV(x, w, b, *how)), name

def test_a_compiler_that_looks_on_is_not_disturbed(always):
    x,w,b,*how = conv_args((2, 2), (3, 3), (1, 1), (1, 1), torch.float32)
    with Kernels(): graph = make_fx(lambda x: CONV(x, w, b, *how), tracing_mode='fake', _allow_non_fake_inputs=True)(x)
    assert agree(graph(x), CONV(x, w, b, *how))

@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')
def test_inductor_takes_the_graph(always):
    x,w,b,*how = conv_args((2, 2), (3, 3), (1, 1), (1, 1), torch.float32)
    def step(x, w, b, v):
        y = CONV(x, w, b, *how)
        gx,gw,gb = BACK(y.sin(), x, w, [len(w)], *how, [True, True, True])
        return y.flatten(1)@v + 1, gx*2, gw*2, gb*2
    inputs = x, w, b, torch.randn(20, 3)
    graph = make_fx(step)(*inputs)
    assert len(swap_kernels(graph, inputs)) == 3
    for got,want in zip(torch.compile(graph)(*inputs), step(*inputs), strict=True): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

# ---- memory and threads

MEMORY = """
import ctypes, os, torch
from miniai.accel import glibc, keep_memory
class Info(ctypes.Structure): _fields_ = [(k, ctypes.c_size_t) for k in 'arena ordblks smblks hblks mapped usmblks fsmblks used free top'.split()]
def info():
    glibc().mallinfo2.restype = Info
    return glibc().mallinfo2()
def by_mmap(n=2**24):
    before,x = info().mapped,torch.empty(n)
    return info().mapped > before
def resident(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')
said,start = [by_mmap()],resident()
with keep_memory() as able:
    with keep_memory(): said.append(by_mmap())
    said.append(by_mmap())                             # the inner block ended, the outer has not
    torch.ones(2**24)
    kept = resident()                                  # freed, and still here
said += [kept > start + 2**25, by_mmap(2**28), resident() > start + 2**25]     # larger than anything that was left
print(able, *said)
"""

def in_process(program, **env):
    base = {k: v for k,v in os.environ.items() if not k.startswith(accel.CHOSEN)}
    out = subprocess.run([sys.executable, '-c', program], env={**base, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}, capture_output=True, text=True, check=True)
    return [w == 'True' for w in out.stdout.split()]

needs_glibc = pytest.mark.skipif(accel.glibc() is None, reason='not glibc')

@needs_glibc
def test_freed_memory_is_kept_inside_the_block_and_given_back_after(): assert in_process(MEMORY) == [True, True, False, False, True, True, False]

@needs_glibc
@pytest.mark.parametrize('env', [dict(MALLOC_ARENA_MAX='2'), dict(GLIBC_TUNABLES='glibc.malloc.arena_max=2')], ids=str)
def test_who_has_chosen_is_left_alone(env): assert in_process(MEMORY, **env)[:4] == [False, True, True, True]

@needs_glibc
def test_little_memory_or_another_thread_is_no_place_for_it(monkeypatch):
    said = []
    def enter():
        with accel.keep_memory() as able: said.append(able)
    thread = threading.Thread(target=enter)
    thread.start(), thread.join()
    monkeypatch.setattr(accel, 'free_memory', lambda: 2**26)
    enter()
    assert said == [False, False] and not accel._keepers

@needs_glibc
def test_settings_are_bounded_and_put_back_after_an_error(monkeypatch):
    seen = []
    monkeypatch.setattr(accel, '_set', lambda libc, options: seen.append(options))
    monkeypatch.setattr(accel, 'free_memory', lambda: 10**9)
    for k in list(os.environ):
        if k.startswith(accel.CHOSEN): monkeypatch.delenv(k)
    with pytest.raises(KeyError), accel.keep_memory(share=.25): raise KeyError
    assert seen[0][accel.TRIM_THRESHOLD] == 250_000_000 and seen[0][accel.TOP_PAD] < 250_000_000 and seen[1][accel.MMAP_MAX] == 65536

def test_threads_are_never_more_than_cores_nor_more_than_before(monkeypatch):
    n = torch.get_num_threads()
    try:
        for real,was,want in ((3, 8, 3), (8, 2, 2), (1, 4, 1)):
            monkeypatch.setattr(accel, 'count_cores', lambda real=real: real)
            torch.set_num_threads(was)
            with pytest.raises(KeyError), accel.real_cores() as got:
                assert got == want == torch.get_num_threads()
                raise KeyError
            assert torch.get_num_threads() == was
    finally: torch.set_num_threads(n)

@pytest.mark.parametrize('files,want', [({'cpu.max': '50000 100000'}, .5), ({'cpu.max': 'max 100000'}, float('inf')), ({}, float('inf')),
                                        ({'cpu/cpu.cfs_quota_us': '300000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 3), ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, float('inf'))], ids=str)
def test_the_quota_of_a_container(files, want, tmp_path):
    for name,text in files.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
    assert accel.quota(tmp_path) == want

def test_half_a_core_is_one_thread(monkeypatch):
    monkeypatch.setattr(accel, 'quota', lambda: .5)
    assert accel.count_cores() == 1

# ---- FastCB

def rows(n, seed):
    gen = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, 4, (n,), generator=gen)
    return Dataset(torch.randn(n, 3, 8, 8, generator=gen) + targ.view(-1, 1, 1, 1)/2, targ)

OPTS = {'SGD': lambda ps, lr: optim.SGD(ps, lr=lr, momentum=.9), 'AdamW fused': lambda ps, lr: optim.AdamW(ps, lr=lr/10, fused=True), 'fused AdamW': lambda ps, lr: torch.optim.AdamW(ps, lr=lr/10, fused=True)}

def plain_net(t=nn):
    torch.manual_seed(0)
    return t.Sequential(t.Conv2d(3, 16, 3, 2, 1, bias=False), t.BatchNorm2d(16), t.ReLU(), t.Conv2d(16, 8, 3, 2, 1), t.Flatten(), t.Dropout(.1), t.Linear(32, 4))

def new_learner(*cbs, engine='torch', opt='SGD', t=nn):
    dls = SimpleNamespace(train=DataLoader(rows(88, 0), 16, shuffle=True), valid=DataLoader(rows(40, 1), 32))
    return Learner(plain_net(t), dls, lr=.05, opt_func=OPTS[opt], cbs=cbs, engine=engine)

def weights(learn): return {k: x.detach().clone() for k,x in learn.model.state_dict().items()}
def settings(): return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled('cpu'), list(accel._keepers), len(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
def layouts(learn): return [(x.shape, x.stride()) for x in [*learn.model.state_dict().values(), *[v for s in learn.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]]]

def fit(learn, epochs, **kw):
    "With the same chance for all"
    torch.manual_seed(1)
    learn.fit(epochs, **kw)
    return learn

class Raise(Callback):
    order = 500
    def __init__(self, event, error): setattr(self, event, lambda learn: self.now(learn)); self.error = error
    def now(self, learn): raise self.error

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('fast', FAST)
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_the_learner_is_left_as_it_was(fast, engine, opt):
    before = settings()
    learn,other = new_learner(FastCB(fast), engine=engine, opt=opt),new_learner(engine=engine, opt=opt)
    for o in (learn, other): fit(o, 2)
    assert settings() == before and layouts(learn) == layouts(other)
    if fast == 'auto' and accel.has_bf16('cpu'): return
    for k,x in weights(learn).items(): torch.testing.assert_close(x, weights(other)[k], rtol=1e-3, atol=1e-4)
    for o in (learn, other):                      # one more step by hand: the optimizer's memories belong to where they were put
        o.batch,o.training = next(iter(o.dls.valid)),True
        o.model.eval()
        F.cross_entropy(o.model(o.batch[0]), o.batch[1]).backward()
        o.opt.step()
    for k,x in weights(learn).items(): torch.testing.assert_close(x, weights(other)[k], rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('event', ['before_fit', 'before_train', 'after_predict', 'after_backward', 'before_valid', 'after_fit'])
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_all_is_undone_when_a_run_ends_early(event, engine):
    before = settings()
    for error in (KeyError('stop'), CancelFitException()):
        learn = new_learner(FastCB(), Raise(event, error), engine=engine)
        try: learn.fit(1)
        except KeyError: pass
        assert settings() == before
        assert all(p.is_contiguous() for p in learn.model.parameters())

def test_inside_the_levers_are_pulled():
    seen = []
    class Look(Callback):
        order = 20
        def before_fit(self, learn): seen.append(len(accel.kernels_of(learn.model)) == 0)
        def after_predict(self, learn): seen.append((learn.preds.dtype, len(accel.kernels_of(learn.model)) == 0, len(settings()[4])))
    cb = FastCB()
    new_learner(cb, Look()).fit(1)
    half = torch.bfloat16 if accel.has_bf16('cpu') and accel.is_large(plain_net()) else torch.float32
    assert seen[0] is False and seen[1] == (half, True, 1)
    assert repr(cb).startswith("FastCB('auto': ") and 'channels last' in repr(cb)

def test_one_line_where_there_is_progress_and_none_elsewhere(tmp_path, capsys):
    with (tmp_path/'out').open('w') as f: new_learner(FastCB('exact'), ProgressCB(f)).fit(1)
    lines = (tmp_path/'out').read_text().splitlines()
    assert lines[0].startswith('fast=exact: ') and 'channels last' in lines[0] and 'bf16' not in lines[0] and len(lines) == 3
    new_learner(FastCB()).fit(1)
    assert not capsys.readouterr().out
    new_learner(FastCB('off'), ProgressCB()).fit(1)
    assert capsys.readouterr().out.startswith('fast=off: nothing\n')

def test_what_is_there_already_is_not_done_twice():
    if not accel.has_bf16('cpu'): pytest.skip('no bf16 here')
    cb = FastCB()
    new_learner(AmpCB('bf16'), cb).fit(1)
    assert 'bf16' not in cb.names
    learn = new_learner(cb := FastCB())
    accel.channels_last(learn.model)
    learn.fit(1)
    assert 'channels last' not in cb.names and accel.is_channels_last(learn.model[0].weight)

@pytest.fixture
def nothing_gained(monkeypatch): monkeypatch.setattr(accel, 'race', lambda fs: dict.fromkeys(fs, 1e-5))

def test_small_models_go_on_without_what_costs_more_than_it_saves(nothing_gained):
    cb = FastCB()
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), SimpleNamespace(train=DataLoader(rows(64, 0), 16), valid=DataLoader(rows(16, 1), 16)), cbs=cb)
    learn.fit(1)
    assert cb.decided and not cb.mode.on and 'bf16' not in cb.names and 'channels last' not in cb.names

def test_the_mode_goes_with_the_first_batch_where_it_is_not_worth_it(nothing_gained):
    seen = []
    class Look(Callback):
        order = 20
        def before_batch(self, learn): seen.append(settings()[-1] - (learn.training and learn.engine_name == 'tape'))
    for engine,want in (('torch', [1, 0, 0, 0, 0]), ('tape', [1, 1, 1, 1, 0])):
        seen.clear()
        dls = SimpleNamespace(train=DataLoader(rows(64, 0), 16), valid=DataLoader(rows(16, 1), 16))
        Learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), dls, cbs=[FastCB(), Look()], engine=engine).fit(1)
        assert seen == want

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_kernels_are_exchanged_in_a_run(engine, always):
    cb = FastCB('exact')
    learn,other = new_learner(cb, engine=engine),new_learner(engine=engine)
    for o in (learn, other): fit(o, 2)
    assert cb.mode.on and cb.mode.saved > 10
    for k,x in weights(learn).items(): torch.testing.assert_close(x, weights(other)[k], rtol=1e-3, atol=1e-4)

class StopAt(Callback):
    order = 200
    def __init__(self, n): self.n = n
    def after_batch(self, learn):
        self.n -= learn.training
        if not self.n: raise CancelFitException

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('fast', ['auto', 'exact'])
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_a_run_goes_on_with_the_kernels_it_had(engine, fast, opt, tmp_path, always, monkeypatch):
    whole = new_learner(FastCB(fast), engine=engine, opt=opt)
    fit(whole, 2)
    fit(new_learner(FastCB(fast), CheckpointCB(tmp_path/'run', every=1), StopAt(4), engine=engine, opt=opt), 2)
    forget()
    accel.kernel_file().unlink()
    monkeypatch.setattr(accel, 'trial', lambda op, fs, args, kwargs: {PYTORCH: 1.})       # another trial would end otherwise
    again = new_learner(FastCB(fast), CheckpointCB(tmp_path/'run', every=1), engine=engine, opt=opt)
    fit(again, 2, resume=tmp_path/'run')
    for k,x in weights(again).items(): assert torch.equal(x, weights(whole)[k]), k

class Share(Callback):
    order = -100
    def before_fit(self, learn): learn.shared = True

def test_processes_that_train_together_do_not_choose_each_for_itself(tmp_path, always):
    cb = FastCB()
    fit(new_learner(Share(), cb, CheckpointCB(tmp_path/'run', every=1), StopAt(4)), 2)
    assert cb.mode is None and 'kernels by trial' not in repr(cb)
    fit(new_learner(cb := FastCB(), CheckpointCB(tmp_path/'run', every=1)), 2, resume=tmp_path/'run')        # alone it may
    assert cb.mode.saved > 0

def test_a_run_that_began_without_goes_on_with_its_memories_laid_out(tmp_path):
    whole = new_learner(opt='fused AdamW')
    fit(whole, 2)
    fit(new_learner(CheckpointCB(tmp_path/'run', every=1), StopAt(4), opt='fused AdamW'), 2)
    again = new_learner(FastCB('exact'), CheckpointCB(tmp_path/'run', every=1), opt='fused AdamW')
    fit(again, 2, resume=tmp_path/'run')
    for k,x in weights(again).items(): torch.testing.assert_close(x, weights(whole)[k], rtol=1e-3, atol=1e-4)

def test_only_the_words_there_are():
    with pytest.raises(ValueError, match="there is no 'fest'"): FastCB('fest')

@pytest.mark.parametrize('shape', [(16, 1, 3, 3), (8, 4, 1, 1), (1, 1, 1, 1), (2, 3, 4, 5), (1, 3, 1, 2)], ids=str)
def test_a_kernel_whose_layout_says_nothing_still_gives_images_with_channels_last(shape):
    conv = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    was = conv.weight.detach().clone()
    accel.channels_last(conv)
    assert torch.equal(conv.weight, was) and not accel.kernels_of(conv)
    y = conv(torch.randn(2, shape[1], 9, 9))
    assert shape[0] == 1 or y.stride() == accel.strides(y.shape, CL)
    accel.lay([conv.weight], torch.contiguous_format)
    assert torch.equal(conv.weight, was) and conv.weight.stride() == was.stride()

def test_layout_of_what_is_no_image_stays():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv3d(2, 3, 3), nn.Linear(3, 4), nn.Conv2d(3, 4, 3))
    was = [p.stride() for p in model.parameters()]
    assert accel.channels_last(model) is model
    changed = [a != p.stride() for a,p in zip(was, model.parameters(), strict=True)]
    assert changed == [p.ndim == 4 for p in model.parameters()]

