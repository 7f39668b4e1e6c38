"A spread of PyTorch's own test material against the tape; `make sweep` takes all of it."
import itertools
import pytest, torch
import sweep
from miniai.rules import RULES, reads, rule

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def operators(): return sweep.operators(3)

@pytest.fixture(scope='module')
def modules(): return sweep.modules(3)

def names(found, what): return sorted(k for k,(v,_) in found.items() if v == what and k not in sweep.KNOWN)

def test_no_operator_is_wrong(operators):
    assert {k: operators[k] for k in names(operators, 'wrong')} == {}
    assert len(names(operators, 'exact')) >= 533

def test_what_is_refused_is_refused_by_name(operators):
    refused = names(operators, 'refused')
    assert len(refused) <= 4
    for k in refused: assert 'no chain rule for ' in operators[k][1], operators[k]

def test_no_operator_in_place_is_wrong():
    found = sweep.in_place(3)
    assert {k: found[k] for k in names(found, 'wrong')} == {}
    assert len(names(found, 'exact')) >= 120

def test_no_module_is_wrong(modules):
    assert {k: modules[k] for k in names(modules, 'wrong')} == {}
    assert len(names(modules, 'exact')) == 114

def test_the_sweep_finds_a_rule_that_is_wrong_by_a_thousandth():
    op, right = torch.ops.aten.sin.default, RULES[torch.ops.aten.sin.default]
    info = next(i for i in sweep.op_db if i.name == 'sin')
    sample = next(iter(sweep.samples_of(info)))
    try:
        rule(op, lambda g,y,a: g*a.cos()*1.001)
        with pytest.raises(AssertionError): sweep.check_op(info, sample)
    finally: RULES[op] = right
    assert sweep.check_op(info, sample)

def test_no_gradient_of_a_gradient_is_wrong():
    found = sweep.second(1)
    assert {k: found[k] for k in names(found, 'wrong')} == {}
    assert len(names(found, 'exact')) >= 480

PLAIN = {op: r for op,r in RULES.items() if r.plain}

@pytest.fixture(scope='module')
def formulas():
    "{operator: verdicts of the samples that reach it} with every kernel's row put away and the derived formula in its place"
    found, asked = {op: [] for op in PLAIN}, set()
    def watched(f, op):
        def g(*args): asked.add(op); return f(*args)
        g.reads = reads(f)
        return g
    try:
        for op,r in PLAIN.items(): RULES[op] = type(r)(r.op, [f and watched(f, op) for f in r.plain.fs], r.inputs, several=r.several)
        for info in sweep.op_db:
            if torch.float64 not in info.dtypes or not info.supports_autograd: continue
            torch.manual_seed(0)
            for k,s in enumerate(itertools.islice(sweep.samples_of(info), 4)):
                if k == 1 and not asked: break
                asked.clear()
                verdict = sweep.verdict([lambda info=info, s=s: sweep.check_op(info, s)])
                for op in asked: found[op].append((verdict[0], sweep.name_of(info), verdict[1]))
    finally: RULES.update(PLAIN)
    return found

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

@pytest.mark.parametrize('causal', [True, False])
def test_attentions_formula_says_what_its_kernel_says(causal):
    "It is not reached in float64, where `op_db` asks"
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    args = q, k, v, 0., causal, None, None
    y, gs = FLASH(*args[:5]), [torch.randn(2, 2, 5, 4)]
    ours = [f(gs, y, *args[:n]) for f,n in zip(RULES[FLASH].plain.fs[:3], RULES[FLASH].plain.counts, strict=False)]
    for a, b in zip(RULES[FLASH].together([True]*3 + [False]*4, gs, y, *args), ours, strict=False): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('op', [op for op in PLAIN if op != FLASH], ids=lambda op: str(RULES[op].op))
def test_the_formula_says_what_the_kernel_says(op, formulas):
    assert formulas[op] and {v for v,*_ in formulas[op]} == {'exact'}, formulas[op]

ADJOINT = {op: getattr(torch.ops.aten, f'{op._schema.name[6:]}_backward').default for op in RULES if isinstance(op, torch._ops.OpOverload)
           and op._overloadname == 'default' and getattr(getattr(torch.ops.aten, f'{op._schema.name[6:]}_backward', None), 'default', None) in RULES}

@pytest.mark.parametrize('op', ADJOINT, ids=str)
def test_a_linear_kernel_and_its_adjoint_are_one_map(op):
    "<Ax, g> = <x, A'g>: what holds the two kernels together"
    n = int(next(c for c in reversed(str(op)) if c.isdigit()))
    x = torch.randn(2, 3, *range(5, 5+n), dtype=torch.float64)
    given = dict(kernel_size=[2]*n, output_size=[7]*n, align_corners=True, **({} if 'avg' in str(op) else dict(padding=[1, 2]*n)))
    how = [given.get(a.name, a.default_value) for a in op._schema.arguments[1:]]
    y = op(x, *how)
    g = torch.randn_like(y)
    f = RULES[op].fs[0]
    torch.testing.assert_close((y*g).sum(), (x*f(g, None, *[x, *how][:RULES[op].counts[0]])).sum())

def test_a_convolution_keeps_its_inputs_only():
    "so that what follows may write into its output"
    for n in (1, 2, 3):
        keep = RULES[getattr(torch.ops.aten, f'conv{n}d').default].keeps[0, 1, 2]
        assert keep.y is None and keep.values == (0, 1)

@pytest.mark.parametrize('op', PLAIN, ids=lambda op: str(RULES[op].op))
def test_a_formula_reads_no_tensor_that_its_kernel_does_not(op):
    "else gradients of gradients would cost memory in every run"
    r = RULES[op]
    if any(reads(f).n is None for f in r.fs if f): return              # it keeps all
    kernel = {i for f in ([reads(r.together, 2)] if r.together else [reads(f) for f in r.fs if f]) for i,how in f.args.items() if how == 'value'}
    plain = {i for f in r.plain.fs if f for i,how in reads(f).args.items() if how == 'value'}
    tensors = set(range(len(r.fs)) if r.tensors is None else r.tensors)
    assert plain & tensors <= kernel
