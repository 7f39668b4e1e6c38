"Processes that train together, one of which is killed, frozen, hangs, raises or leaves: the others stop soon and say which one and where."
import json, os, re, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest, torch
from conftest import ROOT
from miniai.checkpoint import newest
from miniai.faults import WATCH, WatchCB
from miniai.learner import Callback
from test_checkpoint import new, same

HOST = os.uname().nodename
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}

@pytest.fixture(scope='module')
def crews(tmp_path_factory):
    "What became of each crew of `crew.py`"
    folder = tmp_path_factory.mktemp('crews')
    done = subprocess.run([sys.executable, ROOT/'tests/crew.py', folder], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])

def spoken(said):
    "All lines but PyTorch's own warnings, one line each, which it has on a busy machine"
    return [o for o in said.splitlines() if not re.match(r'(\[rank\d+\]:)?\[[WE]\d{4} ', o)]

def ours(said): return [o for o in said.splitlines() if o.startswith('miniai: ')]          # where a store dies, PyTorch has a page of its own

# crew: which process failed, how it ended, what the others say of it
FAULTS = {'killed': (1, -9, 'is gone'), 'killed, tape': (1, -9, 'is gone'), 'killed, first': (0, -9, 'is gone'),
          'raises': (2, 1, 'raised ValueError: bad row, in epoch 2 of 3, train, batch 4'),
          'raises, first': (0, 1, 'raised ValueError: bad row, in epoch 2 of 3, train, batch 4'),
          'frozen': (1, 1, r'has given no sign for \d+ s'), 'hangs': (1, 1, r'it stands at crew.py:\d+ in sleeps and does nothing'),
          'spins': (1, 1, r'it stands at crew.py:\d+ in spins \(patience'),
          'hangs, tape': (0, 1, r'it stands at crew.py:\d+ in sleeps and does nothing'), 'leaves': (1, 0, 'left, in epoch 2 of 3, train, batch 4'),
          'saving': (1, -9, 'is gone'), 'fails saving': (0, 1, 'raised ValueError: bad row, in epoch 2 of 3, train, batch 4'), 'outside': (1, 1, 'raised ValueError: bad row, before the training')}

@pytest.mark.parametrize('name', FAULTS)
def test_others_stop_and_say_which_one(crews, name):
    rank, code, word = FAULTS[name]
    processes = crews[1][name]
    assert processes[rank]['code'] == code
    for r,p in enumerate(processes):
        if r == rank: continue
        assert p['code'] == 1 and p['after'] < 30, p
        said = (ours if name == 'killed, first' else spoken)(p['said'])
        assert len(said) == 1 and 'Traceback' not in p['said'], p
        who = rf'process {rank} on {HOST} \(pid \d+\)'
        if name == 'killed, first': who = rf'({who}|process 0), at whose [\w.]+:\d+ the processes keep in touch,'     # it may be killed before its first beat was read
        assert re.match(rf'miniai: {who}.* {word}', said[0]) and f'This is process {r} on {HOST}, ' in said[0], p

@pytest.mark.parametrize('name, rank', [('raises', 2), ('raises, first', 0), ('outside', 1), ('fails saving', 0)])
def test_who_raised_has_its_own_traceback(crews, name, rank):
    said = crews[1][name][rank]['said']
    assert 'in fails' in said and 'ValueError: bad row' in said and ('miniai: process' in said) == (name == 'fails saving')

def test_who_wakes_up_alone_leaves_too(crews):
    said = crews[1]['frozen'][1]['said']
    assert len(ours(said)) == 1 and re.match(r'miniai: process 0.* is gone.*; or this one is cut off\. This is process 1', ours(said)[0]), said

@pytest.mark.parametrize('name', ['first stays', 'first goes'])
def test_who_is_done_is_not_missed(crews, name):
    assert [(p['code'], spoken(p['said'])) for p in crews[1][name]] == [(0, []), (0, [])]

def test_checkpoint_that_is_being_written_is_whole(crews):
    run = crews[0]/'saving/run'
    assert newest(run).place == (1, 'train', 3) and not list(run.glob('*.part'))

def test_checkpoint_that_takes_too_long_is_not_waited_for(crews):
    run = crews[0]/'fails saving/run'
    assert newest(run).place == (1, 'train', 3) and list(run.glob('*.part'))        # the one before is; the next run clears away the part
    assert all(p['after'] < 25 for p in crews[1]['fails saving'])

def test_alone_it_is_not_there(tmp_path):
    hook, threads = sys.excepthook, threading.active_count()
    learn = new(None, WatchCB(run=tmp_path/'run', patience=1))
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[Fails()])
    learn.fit(1)
    assert len(learn.rows) == 1 and (sys.excepthook, threading.active_count()) == (hook, threads) and not WATCH and not (tmp_path/'run').exists()

class Fails(Callback):
    def before_batch(self, learn): raise ZeroDivisionError

def test_where_all_leave_together_nobody_failed(crews):
    first, second = crews[1]['told']
    assert (first['code'], second['code'], second['said']) == (0, 0, ''), (first, second)
    assert 'miniai: SIGTERM: saved' in first['said'] and 'miniai: process' not in first['said']
    assert float((crews[0]/'told/took-0').read_text()) > 8
    assert newest(crews[0]/'told/run').place == (1, 'train', 4)

@pytest.fixture(scope='module')
def elastic(tmp_path_factory):
    folder = tmp_path_factory.mktemp('elastic')
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--max-restarts', '3', ROOT/'tests/elastic.py', folder]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr, torch.load(folder/'out.pt')

@pytest.mark.parametrize('engine', ['torch', 'tape'])
def test_started_again_it_ends_with_the_same_weights(elastic, engine):
    same(elastic[2][engine], elastic[2][f'{engine}, whole'])
    assert elastic[2]['lives'] == 3 and elastic[2][engine]['steps'] == 24
    logs = [[{k: v for k,v in json.loads(line).items() if k != 'seconds'} for line in (elastic[0]/f'{engine}{end}/log.jsonl').open()]
            for end in ('', '-whole')]
    assert logs[0] == logs[1] and len(logs[0]) == 3

def test_under_torchrun_the_reason_is_said_before_it_ends_the_others(elastic):
    for rank in (0, 1): assert re.search(rf'miniai: process {rank} on {HOST} \(pid \d+\) is gone.* This is process {1-rank} on {HOST}', elastic[1])

def test_fault_is_kept_with_the_warnings_of_the_rank(elastic):
    assert 'miniai: process 1' in (elastic[0]/'torch/rank-0.log').read_text()
    assert 'miniai: process 0' in (elastic[0]/'tape/rank-1.log').read_text()

def workers(agent):
    "The processes that `torchrun` has started, by their rank"
    found = {}
    for o in Path('/proc').glob('[0-9]*'):
        try:
            if int((o/'stat').read_text().rsplit(')', 1)[1].split()[1]) != agent: continue
            env = dict(line.split('=', 1) for line in (o/'environ').read_text().split('\0') if '=' in line)
        except (OSError, ValueError): continue
        if 'RANK' in env: found[int(env['RANK'])] = int(o.name)
    return found

@pytest.mark.skipif(sys.platform != 'linux', reason='looks for the processes in /proc')
def test_command_that_is_started_again_goes_on_with_its_own_run(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--max-restarts', '2', '-m', 'miniai', 'train',
               '--data', 'sample', '--epochs', '2', '--checkpoint', '2', '--quiet']
    with (tmp_path/'said').open('w') as said:
        agent = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=said, stderr=said)
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob('runs/*/checkpoint-1?')) and time.monotonic() < deadline: time.sleep(.05)
        os.kill(workers(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(120) == 0, (tmp_path/'said').read_text()
    assert f'miniai: process 1 on {HOST}' in (tmp_path/'said').read_text()
    assert [o.name for o in (tmp_path/'runs').iterdir()] == ['cnn-1'] and (tmp_path/'runs/cnn-1/rank-1.log').exists()
    subprocess.run([*command, '--out', 'whole'], cwd=tmp_path, env=ENV, check=True, timeout=120, capture_output=True)
    assert (tmp_path/'runs/cnn-1/model.safetensors').read_bytes() == (tmp_path/'whole/model.safetensors').read_bytes()
