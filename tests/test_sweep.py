"A spread of PyTorch's own test material against the tape; `make sweep` takes all of it."
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
    assert len(names(operators, 'exact')) >= 525

def test_what_is_refused_is_refused_by_name(operators):
    refused = names(operators, 'refused')
    assert len(refused) <= 12
    for k in refused: assert 'no chain rule for ' in operators[k][1], operators[k]

def test_no_operator_in_place_is_wrong():
    found = sweep.in_place(3)
    assert {k: found[k] for k in names(found, 'wrong')} == {}
    assert len(names(found, 'exact')) >= 120

def test_no_module_is_wrong(modules):
    assert {k: modules[k] for k in names(modules, 'wrong')} == {}
    assert len(names(modules, 'exact')) >= 113

def test_the_sweep_finds_a_rule_that_is_wrong_by_a_thousandth():
    op, right = torch.ops.aten.sin.default, RULES[torch.ops.aten.sin.default]
    info = next(i for i in sweep.op_db if i.name == 'sin')
    sample = next(iter(sweep.samples_of(info)))
    try:
        rule(op, lambda g,y,a: g*a.cos()*1.001)
        with pytest.raises(AssertionError): sweep.check_op(info, sample)
    finally: RULES[op] = right
    assert sweep.check_op(info, sample)

PLAIN = {'nn.functional.conv2d': 'convolution', 'nn.functional.conv1d': 'convolution', 'nn.functional.conv3d': 'convolution',
         'nn.functional.conv_transpose1d': 'convolution', 'nn.functional.conv_transpose2d': 'convolution', 'nn.functional.conv_transpose3d': 'convolution',
         'nn.functional.batch_norm': 'native_batch_norm', 'nn.functional.layer_norm': 'native_layer_norm', 'nn.functional.group_norm': 'native_group_norm',
         'nn.functional.instance_norm': 'native_batch_norm',
         'nn.functional.scaled_dot_product_attention': '_scaled_dot_product_flash_attention_for_cpu', 'nn.functional.relu': 'relu', 'nn.functional.gelu': 'gelu',
         'softmax': '_softmax', 'log_softmax': '_log_softmax', 'nn.functional.max_pool2d': 'max_pool2d_with_indices', 'nn.functional.nll_loss': 'nll_loss_forward'}

@pytest.mark.parametrize('name', PLAIN)
def test_the_formula_says_what_the_kernel_says(name):
    "The same samples, with the kernel's row put away and the derived formula in its place"
    op = getattr(torch.ops.aten, PLAIN[name]).default
    right, asked = RULES[op], []
    def watched(f): return f and (lambda *args: asked.append(1) or f(*args))
    plain = right.plain
    fs = [watched(f) for f in plain.fs]
    for f,old in zip(fs, plain.fs, strict=True):
        if f: f.reads = reads(old)
    try:
        RULES[op] = type(right)(op, fs, right.inputs)
        RULES[op].inputs = right.inputs
        info = next(i for i in sweep.op_db if i.name == name)
        for k,s in enumerate(sweep.samples_of(info)):
            if k < 12: sweep.check_op(info, s)
    finally: RULES[op] = right
    assert asked or name == 'nn.functional.nll_loss'

@pytest.mark.parametrize('op', [op for op,r in RULES.items() if r.plain], ids=str)
def test_a_formula_reads_no_tensor_that_its_kernel_does_not(op):
    "else gradients of gradients would cost memory in every run"
    r = RULES[op]
    if any(reads(f).n is None for f in r.fs if f): return              # it keeps all
    kernel = {i for f in ([reads(r.together, 2)] if r.together else [reads(f) for f in r.fs if f]) for i,how in f.args.items() if how == 'value'}
    plain = {i for f in r.plain.fs if f for i,how in reads(f).args.items() if how == 'value'}
    tensors = {i for i,a in enumerate(op._schema.arguments) if 'Tensor' in str(a.type)}
    assert plain & tensors <= kernel
