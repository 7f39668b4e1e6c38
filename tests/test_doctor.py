"`launch`, the launchers of others, and `miniai doctor`."
import json, os, subprocess, sys, types
import pytest
from conftest import ROOT
from miniai import launch
from miniai.cli import main
from miniai.core import process_rank
from miniai.distributed import total

ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}

def start(*argv, **kw): return subprocess.run([sys.executable, '-m', *map(str, argv)], capture_output=True, text=True, timeout=120, **{'env': ENV, **kw})

# ----------------------------------------------------------------------------------------------------------------------------------------
# one script, three ways to start it

SCRIPT = '''
import sys, torch
from miniai import nn
from miniai.callbacks import RecordCB
from miniai.core import process_rank, set_seed
from miniai.data import Dataset
from miniai.datasets import DataLoaders
from miniai.distributed import DistributedCB
from miniai.learner import Learner
from miniai.loader import DataLoader

def train():
    set_seed(0)
    x = torch.randn(100, 4, dtype=torch.float64)
    ds = Dataset(x, (x[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    learn = Learner(model, DataLoaders(DataLoader(ds, 16, shuffle=True), DataLoader(ds, 32)), lr=.5, cbs=[DistributedCB(), RecordCB()])
    learn.fit(2)
    return learn.cbs[0].world, process_rank(), learn.losses

if __name__ == '__main__':
    world, rank, losses = train()
    with open(f'{sys.argv[1]}-{rank}', 'w') as f: print(world, *losses, file=f)
'''

@pytest.fixture(scope='module')
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp('script')/'train.py'
    path.write_text(SCRIPT)
    return path

def losses(path):
    world, *numbers = path.read_text().split()
    return int(world), [float(x) for x in numbers]

def test_torchrun_accelerate_and_launch_start_the_same_training(script):
    here = script.parent
    train = types.ModuleType('train')
    exec(script.read_text(), vars(train))
    _,_,want = train.train()
    runs = {'torchrun': start('torch.distributed.run', '--standalone', '--nproc-per-node', 2, script, here/'torchrun'),
            'accelerate': start('accelerate.commands.launch', '--multi_gpu', '--num_processes', 2, '--main_process_port', launch.free_port(), script, here/'accelerate',
                                env={**ENV, 'HF_HOME': str(here)})}
    for name,run in runs.items():
        assert run.returncode == 0, run.stderr
        for rank in range(2):
            world, got = losses(here/f'{name}-{rank}')
            assert world == 2 and got == pytest.approx(want, rel=1e-10)
    for rank,(world, r, got) in enumerate(launch.launch(train.train, 2)):
        assert (world, r) == (2, rank) and got == pytest.approx(want, rel=1e-10)

def add(x, y=0): return process_rank(), total(x + y + process_rank())

def test_results_come_back_also_where_accelerate_would_start_one_process_only(monkeypatch):
    assert launch.launch(lambda x: x + 1, 1, 3) == [4]
    monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Interactive')
    monkeypatch.setattr('accelerate.launchers.get_gpu_info', lambda: ([], 0))
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert launch.launch(add, 2, 1, y=10) == [(0, 23), (1, 23)]

def test_what_cannot_be_launched(monkeypatch):
    with pytest.raises(TypeError, match='the function that each process calls, this is int'): launch.launch(3, add)
    with pytest.raises(ValueError, match='from 1 up, it is 0'): launch.launch(add, 0)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    with pytest.raises(ValueError, match='3 processes, but 2 graphics cards; take n up to 2'): launch.launch(add, 3, 1)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match=r"pip install 'miniai-torch\[scale\]'"): launch.launch(add, 2, 1)

# ----------------------------------------------------------------------------------------------------------------------------------------
# doctor

def test_the_report_and_json(capsys):
    assert main(['doctor', '--seconds', '60', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    test = found['test']
    assert found['ok'] and test['seconds'] < 60 and 0 < test['latency'] < 1 and test['bandwidth'] > 1e6
    assert found['has']['cores']['usable'] <= os.cpu_count() and 'gloo' in found['has']['backends']
    said = launch.report(found)
    assert all(len(line.split(None, 1)) == 2 for line in said.splitlines())
    assert 'ok: two processes met' in said and found['plan']['command'] in said

def test_a_machine_whose_processes_cannot_meet(monkeypatch, capsys):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'nowhere0')
    assert main(['doctor', '--seconds', '60']) == 1
    said = capsys.readouterr().out
    assert 'test       FAILED: process' in said and 'nowhere0' in said and 'GLOO_SOCKET_IFNAME' in said

def test_a_self_test_ends_in_its_time_and_leaves_no_process(monkeypatch):
    code = 'import time; time.sleep(600)'
    started = []
    def sleeps(env):
        started.append(subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]
    monkeypatch.setattr(launch, 'start_probe', sleeps)
    test = launch.selftest(1)
    assert not test['ok'] and 'did not come to an end within 1 s' in test['why']
    assert [p.wait(10) for p in started] == [-9, -9]

def test_wrong_sums_are_a_fault(monkeypatch):
    def lies(env): return subprocess.Popen([sys.executable, '-c', 'print(\'{"right": false}\')'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    monkeypatch.setattr(launch, 'start_probe', lies)
    assert 'their sum is wrong' in launch.selftest(60)['why']

@pytest.mark.parametrize('cards, n, threads, words', [(0, 2, 4, 'OMP_NUM_THREADS=4 torchrun --nproc-per-node 2 -m miniai train'),
                                                      (1, 2, 4, 'CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=4'), (4, 4, 2, 'OMP_NUM_THREADS=2 torchrun --nproc-per-node 4')])
def test_the_plan_of_a_machine(cards, n, threads, words):
    plan = launch.plan(dict(gpus=[{}]*cards, cores=dict(usable=8)))
    assert (plan['processes'], plan['threads'], plan['backend']) == (n, threads, 'nccl' if cards > 1 else 'gloo') and words in plan['command']

def test_the_report_of_a_machine_with_cards_limits_and_no_name():
    has = launch.facts()
    card = dict(name='H100', memory=80*10**9, capability='9.0', bf16=True, peer=False)
    has |= dict(gpus=[card, {**card, 'peer': True}], compiler=None, memory=dict(total=10**11, free=None, limit=10**10),
                network=dict(host='node7', address=None, links=[dict(name='eth0', up=False, mbits=None), dict(name='ib0', up=True, mbits=200000)], infiniband=['mlx5_0']))
    said = launch.parts(has)
    assert said['gpus'] == 'H100, 80.0 GB, compute 9.0, bf16; H100, 80.0 GB, compute 9.0, bf16, peer of the first'
    assert said['network'] == 'eth0 (down), ib0 200000 Mbit/s; the name node7 has no address: set GLOO_SOCKET_IFNAME; InfiniBand mlx5_0'
    assert said['memory'] == '100.0 GB, unknown free, 10.0 GB allowed' and said['compiler'].startswith('none')
