"Several processes train together: the same curves, weights and metrics as one process has, stopped and taken up by any number of them."
import os, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import ROOT
from world import CURVES, ENGINES, STAGED, TORCH_ONLY, TWO_ONLY

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
MANY = 2, 4
EVERYTHING = [(k, e) for k in CURVES for e in ENGINES] + [(k, 'torch') for k in TORCH_ONLY]

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "{number of processes: what each of them found}"
    folder = tmp_path_factory.mktemp('world')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, Path(__file__).with_name('world.py'), folder], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {n: [torch.load(folder/f'{n}-{r}.pt', weights_only=False) for r in range(n)] for n in (1, *MANY)}
    errors = [f'{n} processes, {r}, {k}:\n{v}' for n,parts in found.items() for r,part in enumerate(parts) for k,v in part.items() if isinstance(v, str)]
    return found, errors, done.stderr, folder

def of(world, n, case): return [part[case] for part in world[0][n]]

def close(a, b, tol=1e-12, loose=1e-7):
    "Losses, weights and steps to `tol`; metrics to `loose`, for accuracy is counted in float32"
    assert (a['steps'], len(a['losses'])) == (b['steps'], len(b['losses']))
    torch.testing.assert_close(torch.tensor(a['losses']), torch.tensor(b['losses']), rtol=tol, atol=tol)
    for k,x in b['weights'].items(): torch.testing.assert_close(a['weights'][k], x, rtol=tol, atol=tol, msg=lambda m, k=k: f'{k}: {m}')
    for r,s in zip(a['rows'], b['rows'], strict=True): assert r.keys() == s.keys() and list(r.values()) == pytest.approx(list(s.values()), rel=loose, abs=loose)

def equal(a, b): close(a, b, 0, 0)

def test_nothing_failed(world): assert not world[1], '\n\n'.join(world[1])

@pytest.mark.parametrize('n,case', [(n, c) for n in MANY for c in EVERYTHING if n == 2 or c[0] not in TWO_ONLY], ids=str)
def test_any_number_of_processes_has_the_curve_of_one(world, case, n):
    alone, = of(world, 1, case)
    for found in of(world, n, case): close(found, alone)
    for found in of(world, n, case)[1:]: assert found['rows'] == of(world, n, case)[0]['rows']

@pytest.mark.parametrize('case', EVERYTHING, ids=' '.join)
def test_the_curves_are_of_runs_that_learn(world, case):
    losses = of(world, 1, case)[0]['losses']
    assert len(set(losses)) == len(losses) >= 8

@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('case,tol', [('bf16', .05), ('half', .02), ('ddp, half', .02)])
def test_in_half_precision_the_curve_is_about_the_same(world, case, tol, engine):
    alone, = of(world, 1, (case, engine))
    for found in of(world, 2, (case, engine)):
        assert found['losses'] == pytest.approx(alone['losses'], rel=tol)
        assert case == 'bf16' or found['losses'] != alone['losses']

def test_half_the_bytes_are_three_digits(world):
    for n in MANY:
        for g in of(world, n, 'sums in half'): assert g.tolist() == [n, n, 3*n]            # 1 + 2**-12 is 1 in bfloat16

@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('kind', STAGED)
def test_a_run_goes_from_two_processes_to_one_to_four(world, kind, engine):
    found = {n: of(world, n, ('journey', engine)) for n in (1, *MANY)}
    straight = found[1][0][f'{kind}: undisturbed']
    for n in (2, 1):
        for part in found[n]:
            assert len(part[kind]['losses']) == {2: 8, 1: 9 if kind == 'accumulate' else 10}[n]
            assert straight['losses'][:len(part[kind]['losses'])] == pytest.approx(part[kind]['losses'], rel=1e-12)
    for part in found[4]: close(part[kind], straight)

def test_a_run_in_shards_goes_from_two_processes_to_one_to_four(world):
    found = {n: of(world, n, 'shards journey') for n in (1, *MANY)}
    for part in found[4]: close(part['run'], found[1][0]['undisturbed'])
    assert [o for o in found[2][0]['files'] if 'checkpoint-8' in o] == [
        'checkpoint-8/shards/shard-00001-model-00001-of-00001.safetensors', 'checkpoint-8/shards/shard-00002-model-00001-of-00001.safetensors', 'checkpoint-8/state.json']
    assert 'checkpoint-10/model.safetensors' in found[1][0]['files']
    assert sum('checkpoint-15/shards/' in o for o in found[4][0]['files']) == 4
    assert not any('.part' in o or '.distcp' in o or 'metadata' in o for n in found for o in found[n][0]['files'])

def test_a_checkpoint_in_shards_becomes_one_file(world):
    import miniai.sharded
    from miniai.checkpoint import CheckpointError, checkpoints
    folder = world[3]
    saved = checkpoints(folder/'runs'/'in shards')[0]
    out = miniai.sharded.join_shards(saved, folder/'joined')
    end = of(world, 4, 'shards journey')[0]['run']['weights']
    from safetensors.torch import load_file
    model = load_file(folder/'joined'/'model.safetensors')
    assert model.keys() == end.keys() and all(torch.equal(model[k], end[k]) for k in end)
    assert sorted(o.name for o in out.folder.iterdir()) == ['callbacks.safetensors', 'model.safetensors', 'optimizer.safetensors', 'state.json']
    shard = next((saved/'shards').iterdir())
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(CheckpointError, match='damaged'): miniai.sharded.join_shards(saved, folder/'other')

@pytest.mark.parametrize('engine', [*ENGINES, "torch's"])
def test_taken_up_by_as_many_processes_it_is_equal_to_the_bit(world, engine):
    for n in MANY:
        for straight,found in of(world, n, ('again', engine)): equal(found, straight)

def test_in_shards_it_is_equal_to_the_bit(world):
    for n in MANY:
        for straight,found in of(world, n, 'again in shards'): equal(found, straight)

def test_dropout_is_not_the_same_in_all_processes(world):
    straight = [of(world, n, ('again', 'torch'))[0][0]['losses'] for n in (1, *MANY)]
    assert len({o[0] for o in straight}) == 3

def test_a_window_begun_by_one_process_is_ended_by_four(world):
    straight,begun = of(world, 1, 'window')[0]
    assert all(len(o['losses']) == 7 and o['steps'] == 4 for o in begun)          # 3 of epoch 0, whose last window holds one batch; the 7th is open
    for part in of(world, 4, 'window'):
        for found in part: close(found, straight)

@pytest.mark.parametrize('engine', ENGINES)
def test_sigterm_to_one_process_is_heard_by_all(world, engine):
    for n in (1, *MANY):
        for part in of(world, n, ('terminated', engine)):
            assert part['code'] == 0 and part['saved'][0] == 'checkpoint-8'
            equal(part['end'], part['straight'])
    said = world[2]
    assert said.count('SIGTERM: saved') == 2*3 + 2                                # the first process says so, nobody else

def test_sigterm_between_the_batches_of_a_step_waits_for_the_step(world):
    for n in MANY:
        for part in of(world, n, 'a window terminated'):
            assert part['code'] == 0 and part['saved'][0] == 'checkpoint-9'
            equal(part['end'], part['straight'])

def test_a_model_in_shards_is_saved_as_one_file(world):
    for n in MANY:
        for states in of(world, n, 'file'):
            for k,x in states[0].items(): assert all(torch.equal(x, o[k]) for o in states[1:]) and x.shape == states[2][k].shape

def test_only_the_first_process_writes(world):
    for n in (1, *MANY):
        first,*others = of(world, n, 'writes')
        assert 'checkpoint-10' in first and 'log.jsonl' in first and others == [None]*(n-1)

# messages: how many, and how many bytes, against what they have to be

def sent(world, n, case, way):
    (steps,sizes),*_ = of(world, n, (case, way))
    assert all(o[0] == steps for o in of(world, n, (case, way)))
    return [(o.get(('all_reduce', 'calls'), 0), o.get(('all_reduce', 'bytes'), 0)) for o in steps], sizes

WAYS = 'torch', 'tape', 'ddp'
def marks(way, sizes, bytes=8): return 0 if way == 'ddp' else bytes*len(sizes)     # a parameter that had no gradient anywhere is told by one number
WEIGHT = 8                                                                         # of the batch, which `AccumulateCB` asks for

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('n', MANY)
def test_a_step_sends_its_gradients_once(world, n, way):
    steps,sizes = sent(world, n, 'messages', way)
    assert steps == [(2, WEIGHT + sum(sizes) + marks(way, sizes))]*4

@pytest.mark.parametrize('way', WAYS)
def test_while_gradients_accumulate_nothing_is_sent_but_the_weight(world, way):
    steps,sizes = sent(world, 2, 'messages, accumulate', way)
    assert steps == [(1, WEIGHT), (2, WEIGHT + sum(sizes) + marks(way, sizes))]*2

@pytest.mark.parametrize('way', WAYS)
def test_bfloat16_is_a_quarter_of_float64(world, way):
    steps,sizes = sent(world, 2, 'messages, half', way)
    assert steps == [(2, WEIGHT + (sum(sizes) + marks(way, sizes))//4)]*4

@pytest.mark.parametrize('way', WAYS)
def test_small_buckets_are_more_messages_and_the_same_bytes(world, way):
    steps,sizes = sent(world, 2, 'messages, buckets', way)
    assert steps[1:] == [({'ddp': 3}.get(way, 5), WEIGHT + sum(sizes) + marks(way, sizes))]*3

@pytest.mark.parametrize('way', WAYS)
def test_a_shared_out_optimizer_sends_the_weights_back(world, way):
    for steps,sizes in of(world, 2, ('messages, sharded', way)):
        assert [(o['broadcast', 'calls'], o['broadcast', 'bytes']) for o in steps] == [(2, sum(sizes))]*4

def test_what_cannot_be_is_said(world):
    for n in MANY:
        for found in of(world, n, 'mistakes'):
            assert found['tape'].startswith('NotImplementedError') and 'opt_func=sharded' in found['tape']
            assert 'mine, a Alone' in found['object'] and 'torchmetrics' in found['object']
            assert 'ddp= is for' in found['ddp'] and 'in shards already' in found['sharded']
            assert 'the processes differ in train' in found['differ'] and 'sync_bn' in found['sync_bn']
