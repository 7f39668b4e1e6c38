"""Three hosts on this machine, each with its own network and name; the cable of one is pulled in mid-epoch.

    python tests/hosts.py            needs root and `ip` (iproute2); says why where they cannot be made

Each host is a network namespace with one cable to a hub, and runs one process of a training that all three make together.  When the cable of
the third is pulled, all processes have to stop within 30 seconds and name it.  Then it is plugged in again, the run is taken up, and its weights are compared,
to the bit, with those of a run that nobody disturbed."""
import os, re, subprocess, sys, tempfile, time
from pathlib import Path

HOSTS = 'mh-a', 'mh-b', 'mh-c'
HUB = 'mh-hub'
LIMIT = 30          # seconds in which all have to stop

def ip(*args): return subprocess.run(['ip', *args], check=True, capture_output=True, text=True)

def missing():
    "Why there can be no hosts here, or None"
    if not hasattr(os, 'geteuid') or os.geteuid(): return 'only root can make network namespaces'
    try: ip('netns', 'add', 'mh-probe')
    except FileNotFoundError: return 'there is no `ip`; apt-get install iproute2'
    except subprocess.CalledProcessError as e: return f'ip netns add: {e.stderr.strip()}'
    ip('netns', 'del', 'mh-probe')

def build():
    ip('netns', 'add', HUB)
    ip('-n', HUB, 'link', 'add', 'hub', 'type', 'bridge')
    ip('-n', HUB, 'link', 'set', 'hub', 'up')
    for i,host in enumerate(HOSTS):
        ip('netns', 'add', host)
        ip('-n', HUB, 'link', 'add', host, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', host)
        ip('-n', HUB, 'link', 'set', host, 'master', 'hub', 'up')
        ip('-n', host, 'addr', 'add', f'10.77.0.{i+1}/24', 'dev', 'eth0')
        for link in ('eth0', 'lo'): ip('-n', host, 'link', 'set', link, 'up')

def demolish():
    for name in (*HOSTS, HUB): subprocess.run(['ip', 'netns', 'del', name], capture_output=True)

def start(folder, life, way):
    "One process on each host"
    env = dict(os.environ, MASTER_ADDR='10.77.0.1', MASTER_PORT='29577', WORLD_SIZE='3', GLOO_SOCKET_IFNAME='eth0', OMP_NUM_THREADS='1')
    where = ['ip', 'netns', 'exec'], ['unshare', '--uts', 'sh', '-c', 'hostname "$1"; shift; exec "$@"', 'sh']
    torchrun = '-m torch.distributed.run --nnodes 3 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29577 --node-rank'.split()
    return [subprocess.Popen([*where[0], host, *where[1], host, sys.executable, *([*torchrun, str(rank)] if way == 'torchrun' else []),
                              __file__, folder, life], env={**env, 'RANK': str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank,host in enumerate(HOSTS)]

def steps(folder):
    "How far the run is: the number of its newest checkpoint"
    return max((int(o.name.split('-')[1]) for o in folder.glob('run/checkpoint-*') if o.name[-1].isdigit()), default=0)

def ended(processes, seconds):
    "Exit codes, what our lines said, and how long it took"
    begun = time.monotonic()
    said = [p.communicate(timeout=max(1, seconds + begun - time.monotonic()))[1] for p in processes]
    ours = ['\n'.join(o for o in text.splitlines() if o.startswith('miniai:')) for text in said]
    return [p.returncode for p in processes], ours, time.monotonic() - begun

def whole(folder):
    "Nothing torn: the newest checkpoint is good, and no part of another lies about"
    from miniai.checkpoint import checkpoints, newest
    newest(folder/'run')
    assert not [o for o in (folder/'run').iterdir() if o.suffix in ('.part', '.old', '.tmp')]
    return checkpoints(folder/'run')[0].name

def main():
    if why := missing(): return print(f'skipped: {why}')
    for way in ('each process by itself', 'torchrun'):
        print(f'{way}:')
        once(way)

def once(way):
    demolish()
    build()
    processes = []
    try:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp)
            processes = start(folder, 'first', way)
            while steps(folder) < 12 and all(p.poll() is None for p in processes): time.sleep(.1)
            ip('-n', HUB, 'link', 'set', 'mh-c', 'down')
            print(f'  the cable of mh-c is pulled after step {steps(folder)}')
            codes, said, seconds = ended(processes, 2*LIMIT)
            for text in said: print('  ' + text)
            assert codes == [1, 1, 1] and seconds < LIMIT, (codes, seconds)
            for text in said[:2]: assert re.search(r'process 2 on mh-c \(pid \d+\) has given no sign', text), text
            assert re.search(r'process 0 on mh-a \(pid \d+\).* this one is cut off.* This is process 2 on mh-c', said[2]), said[2]
            print(f'  all stopped {seconds:.0f} s later; {whole(folder)} is good')
            ip('-n', HUB, 'link', 'set', 'mh-c', 'up')
            processes = start(folder, 'second', way)
            codes, said, seconds = ended(processes, 120)
            assert codes == [0, 0, 0], said
            compare(folder)
    finally:
        for p in processes: p.kill()
        demolish()

def compare(folder):
    import torch
    a, b = (torch.load(folder/f'{name}.pt') for name in ('run', 'whole'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    print(f'  taken up again it ended with the weights of an undisturbed run, equal to the bit ({len(a)} tensors)')

def train(folder, life):
    "What each host does"
    import torch
    from miniai import nn, optim
    from miniai.checkpoint import CheckpointCB
    from miniai.core import process_rank, set_seed
    from miniai.data import Dataset
    from miniai.datasets import DataLoaders
    from miniai.distributed import DistributedCB
    from miniai.faults import WatchCB
    from miniai.learner import Callback, Learner
    from miniai.loader import DataLoader

    class Slow(Callback):
        def after_batch(self, learn): time.sleep(.1)

    def fit(name, *cbs):
        set_seed(0)
        ds = Dataset(x=torch.randn(96, 4), y=torch.arange(96) % 2)
        dls = DataLoaders(DataLoader(ds, 12, shuffle=True, as_tuple=True), DataLoader(ds, 48, as_tuple=True))
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 2))
        learn = Learner(model, dls, opt_func=optim.AdamW, lr=.01, engine='tape',
                        cbs=[DistributedCB(), WatchCB(), CheckpointCB(folder/name, every=3), *cbs])
        learn.fit(6, resume=True)
        if not process_rank(): torch.save(model.state_dict(), folder/f'{name}.pt')

    fit('run', *([Slow()] if life == 'first' else []))
    fit('whole')

if __name__ == '__main__':
    if len(sys.argv) > 1: train(Path(sys.argv[1]), sys.argv[2])
    else: main()
