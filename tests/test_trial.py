"Of several ways to compute an operator the quickest: are all of them right, is the choice fair, and is it remembered?"
import json, shutil, time
from contextlib import nullcontext
import pytest, torch, torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from miniai import accel, nn, trial
from miniai.trial import CANDIDATES, PYTORCH, Kernels, agree, chosen, fastest, swap_kernels

aten = torch.ops.aten
CL = torch.channels_last
CONV,BACK = aten.convolution.default,aten.convolution_backward.default

pytestmark = pytest.mark.usefixtures('own_times')

def forget(): trial.TIMES.clear(), trial._chosen.clear()

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
        got,want = trial.apart(*fs, *args),BACK(*args)
        assert agree(got[:2], want[:2]) and (agree(got[2], want[2]) if bias else got[2] is None)

def test_the_unrolled_kernel_is_offered_where_it_is_small_and_both_products_in_float32():
    def names(size, dtype=torch.float32): return set(CANDIDATES[CONV](*conv_args(size, (3, 3), (1, 1), (1, 1), dtype)))
    both = {'columns onednn', 'unrolled onednn'} if trial.can_onednn(torch.ones(1)) else set()
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
    assert not trial.TIMES or not any(trial.TIMES.values())

@pytest.mark.parametrize('shapes', [(5, 7, 3), (1, 1, 1), (64, 784, 50), (33, 1, 17)], ids=str)
@pytest.mark.parametrize('turned', [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_products_through_onednn(shapes, turned):
    if not trial.can_onednn(torch.ones(1)): pytest.skip('no oneDNN here')
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
    monkeypatch.setattr(trial, 'race', lambda fs: {k: 2. if k == PYTORCH else 1. for k in fs})        # the wrong one would win
    made_up(wrong=WRONG[name])
    a,b = torch.randn(20, 20),torch.randn(20, 20)
    assert fastest(aten.mm.default, a, b) is aten.mm.default
    made_up(right=right) if (right := lambda a, b: torch.einsum('ij,jk->ik', a, b)) else None
    trial._chosen.clear(), trial.TIMES.clear(), trial.kernel_file().unlink()
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
    assert trial.pick({PYTORCH: 1., 'a': .97}) == PYTORCH
    assert trial.pick({PYTORCH: 1., 'a': .9, 'b': .8}) == 'b'
    assert trial.pick({PYTORCH: 1.}) == PYTORCH

def test_all_take_turns_and_the_slow_one_leaves():
    calls = []
    times = trial.race({'slow': lambda: (calls.append('slow'), torch.randn(300000)), 'quick': lambda: calls.append('quick')}, turns=6, seconds=10)
    assert calls[:6] == ['slow', 'quick']*3 and calls.count('quick') == 7 and calls.count('slow') == 3
    assert times['quick'] < times['slow']

@pytest.mark.parametrize('x', [torch.randn(4, 6, 5, 5).contiguous(memory_format=CL), torch.randn(3, 4).t(), torch.randn(4, 1).expand(4, 9), torch.randn(10, 10)[::2, 3:7], torch.randn(0, 3)], ids=lambda x: str(x.stride()))
def test_a_twin_has_the_same_layout(x):
    t = trial.twin(x, torch.Generator())
    assert (t.shape, t.stride(), t.dtype) == (x.shape, x.stride(), x.dtype) and (not x.numel() or t.std() > .1)
    assert trial.twin([1, 2], None) == [1, 2]

def test_each_layout_type_and_number_of_threads_is_a_call_of_its_own():
    a,b = torch.randn(6, 6),torch.randn(6, 6)
    n = torch.get_num_threads()
    try:
        for x in (a, a.t(), a.double()): fastest(aten.mm.default, x, b.to(x.dtype))
        torch.set_num_threads(1 if n > 1 else 2)
        fastest(aten.mm.default, a, b)
    finally: torch.set_num_threads(n)
    assert len(trial._chosen) == 4

# ---- the file

def count_trials(monkeypatch):
    seen,real = [],trial.trial
    monkeypatch.setattr(trial, 'trial', lambda *args: seen.append(args) or real(*args))
    return seen

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
    table, = json.loads(trial.kernel_file().read_text()).values()
    times, = table.values()
    assert times.keys() == {PYTORCH, 'right'}
    assert [p.name for p in trial.kernel_file().parent.iterdir()] == ['kernels.json']          # nothing half written beside it

@pytest.mark.parametrize('share', [.05, .5])
def test_what_was_found_while_others_had_the_cores_is_not_kept(share, monkeypatch, two):
    monkeypatch.setattr(trial, 'BUSY', .1)
    monkeypatch.setattr(trial, 'waited', lambda: share*time.perf_counter())
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
    assert trial.waited(tmp_path) == 2.5 and trial.waited(tmp_path/'none') == 0 and trial.waited() >= 0

TORN = ['', '{', '[]', '3', '{"m": [1]}', '{"m": {"c": {}}}', '{"m": {"c": {"PyTorch": -1.0}}}', '{"m": {"c": {"PyTorch": null}}}', '{"m": {"c": [1.0]}}', '\x00\xff', '['*100000]

@pytest.mark.parametrize('text', TORN, ids=range(len(TORN)))
def test_a_torn_or_foreign_file_is_passed_over_with_a_line(text, monkeypatch, capsys, two):
    path = trial.kernel_file()
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
    found = trial.read_times(trial.kernel_file())
    for calls in found.values():
        for times in calls.values(): times['of yore'] = 1e-12
    trial.kernel_file().write_text(json.dumps(found))
    forget()
    seen = count_trials(monkeypatch)
    fastest(aten.mm.default, *two)
    assert len(seen) == 1

def test_times_of_another_machine_stay_and_are_not_used(monkeypatch, two):
    trial.write_times(trial.kernel_file(), {'another': {'call': {PYTORCH: 1.}}})
    seen = count_trials(monkeypatch)
    fastest(aten.mm.default, *two)
    assert len(seen) == 1 and trial.read_times(trial.kernel_file()).keys() == {'another', trial.machine()}

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

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_a_program_with_other_kernels_has_the_same_gradients(engine, dtype, always):
    x,targ = torch.randn(6, 3, 8, 8, dtype=dtype),torch.randint(0, 4, (6,))
    def grads(mode=None):
        model = conv_net().to(dtype)
        block = nullcontext() if mode is None else mode
        from miniai.autograd import Tape
        with block, (Tape() if engine == 'tape' else nullcontext()):
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
    class Look(trial._Chooser):
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
