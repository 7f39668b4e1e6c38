"""PyTorch's own test material against the tape: every operator (`op_db`) and every module (`module_db`).

    python tests/sweep.py      all samples of both; writes bench/results/sweep.md

The suite runs a spread of the same (`tests/test_sweep.py`)."""
import itertools, sys, warnings
from collections import Counter
from datetime import date
from functools import partial
from pathlib import Path
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from miniai.autograd import Tape

KNOWN = {'as_strided_scatter': 'PyTorch is wrong: written over by a view of no dimensions, the base still gets a gradient (differences say 0)'}

NO_SECOND = {'nn.functional.linear_cross_entropy.chunked'}      # PyTorch takes its gradient for a constant

def tensors(o):
    "All tensors of floats in nested tuples, lists and dictionaries"
    if isinstance(o, torch.Tensor): return [o] if o.is_floating_point() or o.is_complex() else []
    if isinstance(o, dict): o = o.values()
    return [t for x in o for t in tensors(x)] if isinstance(o, (list, tuple, type({}.values()))) else []

def compare(run, xs, tol):
    "Do the gradients of `run()` at `xs`, for the same random gradient at its outputs, agree?  True, or None where there is nothing to compare"
    ys = [(i, y) for i,y in enumerate(run()) if y.requires_grad]
    if not ys: return None
    gs = [torch.randn_like(y) for _,y in ys]
    want = torch.autograd.grad([y for _,y in ys], xs, gs, allow_unused=True)
    with Tape() as tape: outs = run()
    got = tape.gradients([(outs[i], g) for (i,_),g in zip(ys, gs, strict=True)], xs)
    return agree(xs, want, got, tol)

def compare_second(run, xs, tol):
    "The same for gradients of gradients, of a random sum of all first ones; None where PyTorch has none"
    ys = [(i, y) for i,y in enumerate(run()) if y.requires_grad]
    if not ys: return None
    gs = [torch.randn_like(y, requires_grad=True) for _,y in ys]
    try:
        first = torch.autograd.grad([y for _,y in ys], xs, gs, allow_unused=True, create_graph=True)
        hs = [None if d is None else torch.randn_like(d) for d in first]
        some = [(d, h) for d,h in zip(first, hs, strict=True) if d is not None and d.requires_grad]
        if not some: return None
        want = torch.autograd.grad([d for d,_ in some], [*xs, *gs], [h for _,h in some], allow_unused=True)
    except (RuntimeError, NotImplementedError): return None
    with Tape() as outer:
        with Tape() as inner: outs = run()
        first = inner.gradients([(outs[i], g) for (i,_),g in zip(ys, gs, strict=True)], xs)
    got = outer.gradients([(d, h) for d,h in zip(first, hs, strict=True) if d is not None and h is not None], [*xs, *gs])
    got = [b if a is None or b is None else torch.where(a.isnan(), a, b) for a,b in zip(want, got, strict=True)]     # at a corner PyTorch may give up
    return agree([*xs, *gs], want, got, tol)

def agree(xs, want, got, tol):
    for x,a,b in zip(xs, want, got, strict=True):
        a,b = (torch.zeros_like(x) if o is None else o for o in (a, b))
        if a.layout != b.layout: a,b = a.to_dense(),b.to_dense()
        if a.dtype == torch.complex32: a,b = a.cfloat(),b.cfloat()
        torch.testing.assert_close(b, a, equal_nan=True, rtol=tol, atol=10*tol*max(1., float(a.nan_to_num().abs().max()) if a.numel() else 0.))
    return True

def check_op(info, sample, tol=1e-7, compare=compare):
    xs = [t for t in tensors([sample.input, sample.args, sample.kwargs]) if t.requires_grad]
    def run():
        torch.manual_seed(1)
        y = info(sample.input, *sample.args, **sample.kwargs)
        return tensors(sample.output_process_fn_grad(y) if sample.output_process_fn_grad else y)
    return compare(run, xs, tol)

def check_module(info, sample, training, tol=1e-7):
    args,kwargs = sample.constructor_input.args,sample.constructor_input.kwargs
    torch.manual_seed(0)
    m = info.module_cls(*args, **kwargs).double().train(training)
    ins = sample.forward_input
    if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in m.parameters()): m(*ins.args, **ins.kwargs)
    state = {k: v.clone() for k,v in m.state_dict().items()}
    xs = [t for t in [*m.parameters(), *tensors([ins.args, ins.kwargs])] if t.requires_grad]
    def run():
        m.load_state_dict(state)
        torch.manual_seed(1)
        return tensors(m(*ins.args, **ins.kwargs))
    return compare(run, xs, tol)

def name_of(info): return info.name + (f'.{info.variant_test_name}' if getattr(info, 'variant_test_name', '') else '')

def verdict(checks):
    "('exact' | 'refused' | 'wrong' | 'nothing to differentiate', the reason)"
    found = 'nothing to differentiate'
    for check in checks:
        try: found = 'exact' if check() else found
        except NotImplementedError as e: return 'refused',str(e)
        except AssertionError as e: return 'wrong',' '.join(str(e).split())
        except Exception as e: return 'wrong',f'{type(e).__name__}: {e}'
    return found,''

def samples_of(info):
    return info.sample_inputs('cpu', torch.float64, requires_grad=True)

def operators(most=None, check=check_op):
    "{name: verdict} of every operator that PyTorch differentiates in float64"
    out = {}
    for info in op_db:
        if torch.float64 not in info.dtypes or not info.supports_autograd: continue
        torch.manual_seed(0)
        samples = itertools.islice(samples_of(info), most)
        out[name_of(info)] = verdict(partial(check, info, s) for s in samples)
    return out

def second(most=None):
    "{name: verdict} of the gradients of gradients of the same operators"
    found = operators(most, partial(check_op, tol=1e-6, compare=compare_second))
    return {name: v for name,v in found.items() if name not in NO_SECOND}

def check_in_place(info, sample, tol=1e-7):
    "The same for the operator's form in place, on a copy of its input; None where PyTorch itself refuses"
    xs = [t for t in tensors([sample.input, sample.args, sample.kwargs]) if t.requires_grad]
    def run():
        torch.manual_seed(1)
        y = sample.input.clone()
        info.inplace_variant(y, *sample.args, **sample.kwargs)
        return tensors(y)
    try: torch.autograd.grad([y.sum() for y in run() if y.requires_grad], xs, allow_unused=True)
    except (RuntimeError, TypeError): return None
    return compare(run, xs, tol)

def in_place(most=None):
    "{name: verdict} of every operator that has a form in place"
    out = {}
    for info in op_db:
        if torch.float64 not in info.dtypes or not info.supports_autograd or not info.inplace_variant: continue
        torch.manual_seed(0)
        out[name_of(info)] = verdict(partial(check_in_place, info, s) for s in itertools.islice(samples_of(info), most))
    return out

def modules(most=None):
    "{name: verdict} of every module, in training and in evaluation"
    out = {}
    for info in module_db:
        def checks(info=info):
            for training in (True, False):
                torch.manual_seed(0)
                for s in itertools.islice(info.module_inputs_func(info, device='cpu', dtype=torch.float64, requires_grad=True, training=training), most):
                    yield partial(check_module, info, s, training)
        out[info.name] = verdict(checks())
    return out

def report(title, found):
    counts = Counter("known" if k in KNOWN else v for k,(v,_) in found.items())
    lines = [f'## {title}', '', ', '.join(f'{n} {v}' for v,n in counts.most_common()) + f' of {len(found)}.', '', '| name | | why |', '|---|---|---|']
    return lines + [f'| {name} | {"known" if name in KNOWN else v} | {KNOWN.get(name, why)[:160].replace("|", "/")} |' for name,(v,why) in found.items() if v in ('refused', 'wrong')] + ['']

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    most = int(sys.argv[1]) if len(sys.argv) > 1 else None
    found = {'operators': operators(most), 'operators in place': in_place(most), 'modules': modules(most), 'gradients of gradients': second(most)}
    lines = ['# The tape against PyTorch\'s own test material', '', f'`python tests/sweep.py`, {date.today()}, torch {torch.__version__}, float64, '
             'relative tolerance 1e-7: the gradients of every sample of `op_db` and `module_db`.', '']
    for title,f in found.items(): lines += report(title.capitalize(), f)
    if most is None: Path(__file__).resolve().parent.parent.joinpath('bench/results/sweep.md').write_text('\n'.join(lines))
    print('\n'.join(lines))
