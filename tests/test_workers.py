"Workers: tensors that cross a pipe, order, errors, killed processes, nothing left behind."
import gc, multiprocessing as mp, os, pickle, signal, subprocess, sys, threading, time
from collections import namedtuple
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import shared_memory
from miniai.workers import Parcel, Pool, Run, Task, WorkerTraceback, in_threads, receive, send

XY = namedtuple('XY', 'x y')
LINUX = sys.platform == 'linux'

def files(): return set(os.listdir('/proc/self/fd')) if LINUX else set()
def children(): return [p for p in mp.active_children() if p.is_alive()]
def tasks(n, rows=3): return [Task(0, k, torch.arange(rows) + k) for k in range(n)]

def there(o):
    a, b = mp.Pipe()
    parcel = Parcel(o)
    t = threading.Thread(target=send, args=(a, parcel))      # a large parcel waits for its reader
    t.start()
    try: return receive(b)
    finally: t.join(); parcel.close(); a.close(); b.close()

@pytest.fixture(autouse=True)
def nothing_is_left():
    before = files(), shared_memory()
    yield
    def left(): return children(), files() - before[0], shared_memory() - before[1]
    if any(left()): gc.collect()
    assert not any(left()), left()

# parcels

DTYPES = [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.complex64]

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', [(), (0,), (3, 5), (300, 1001)], ids=str)
def test_a_tensor_arrives_as_it_was_sent(dtype, shape):
    x = torch.randint(0, 2, shape).to(dtype)
    got = there((x, x.mT if x.ndim > 1 else x, 'text'))
    for a,b in zip(got[:2], (x, x.mT if x.ndim > 1 else x), strict=True): assert a.dtype == dtype and torch.equal(a, b)
    got[0].fill_(1)                                           # it may be written to, and is nobody else's
    assert not x.all() or x.numel() <= 1

def test_tensors_are_found_wherever_they_are():
    x = torch.rand(300, 300)
    got = there(dict(a=XY(x, [x, {'b': (x.conj(), x[::2, 1:7])}]), n=np.arange(3), p=torch.nn.Parameter(x), s=torch.eye(3).to_sparse(), z=torch.ones(2)*1j))
    assert type(got['a']) is XY and torch.equal(got['a'].y[1]['b'][1], x[::2, 1:7]) and got['p'].requires_grad and torch.equal(got['p'], x)
    assert torch.equal(got['s'].to_dense(), torch.eye(3)) and got['n'].tolist() == [0, 1, 2] and torch.equal(got['z'].conj(), torch.ones(2)*-1j)
    conj = there(torch.ones(2)*1j).conj()
    assert torch.equal(there(conj), conj)

@pytest.mark.skipif(not LINUX, reason='memory files are a thing of Linux')
def test_kept_batches_keep_no_file_open():
    before = files()
    kept = [there(torch.full((300_000,), k)) for k in range(50)]
    assert files() == before and [int(k[5]) for k in kept] == list(range(50))

# order

class Square:
    def __call__(self, task):
        if task.epoch % 3 == 0: time.sleep(.003)
        return task.rows**2

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 25), st.integers(1, 4), st.integers(1, 9), st.integers(1, 700))
def test_batches_come_in_order_whatever_the_number_of_workers(n, workers, ahead, rows):
    pool, todo = Pool(Square(), workers, 'fork'), tasks(n, rows)
    for _ in range(2):
        got = list(Run(pool, iter(todo), ahead))
        assert [t.epoch for t,_ in got] == list(range(n)) and all(torch.equal(b, t.rows**2) for t,b in got)
    pool.close()
    assert [b.tolist() for _,b in in_threads(Square(), todo, workers, ahead)] == [b.tolist() for _,b in got]

@pytest.mark.parametrize('way', ['processes', 'threads'])
def test_no_more_is_asked_for_than_agreed(way):
    asked = []
    def source():
        for t in tasks(50): asked.append(t); yield t
    run = iter(Run(Pool(Square(), 2, 'fork'), source(), 4)) if way == 'processes' else in_threads(Square(), source(), 2, 4)
    for k in range(5):
        next(run)
        assert k+4 <= len(asked) <= k+6                       # four out, and one made ready for the next free worker
        time.sleep(.01)
    run.close()

def test_large_tasks_and_large_batches_do_not_wait_for_each_other():
    class Text:
        def __call__(self, task): return ['x'*50]*20_000, task.items
    big = [Task(0, k, torch.arange(200_000), ['y'*300_000]) for k in range(8)]
    got = [b for _,b in Run(Pool(Text(), 2, 'fork'), big, 8)]
    assert len(got) == 8 and len(got[7][0]) == 20_000

def test_abandoned_and_interleaved_runs_share_the_workers():
    pool = Pool(Square(), 2, 'fork')
    pids = [w.process.pid for w in pool.workers]
    for k in range(10):
        it = iter(Run(pool, tasks(20), 6))
        for _ in range(k): next(it)
        del it
    pairs = list(zip(Run(pool, tasks(9), 4), Run(pool, tasks(9)[::-1], 4), strict=True))
    assert [a[0].epoch for a,_ in pairs] == list(range(9)) and [b[0].epoch for _,b in pairs] == list(range(9))[::-1]
    assert pids == [w.process.pid for w in pool.workers] and not pool.runs
    assert repr(pool) == 'Pool(2 workers by fork)'
    pool.close()
    assert not pool.alive and repr(pool) == 'Pool(0 workers by fork, closed)'
    with pytest.raises(RuntimeError, match='the workers were stopped'): pool.take(0)

def test_a_worker_keeps_to_one_thread_and_sees_no_ctrl_c():
    class Look:
        def __call__(self, task):
            os.kill(os.getpid(), signal.SIGINT)
            return torch.get_num_threads()
    assert [b for _,b in Run(Pool(Look(), 1, 'fork'), tasks(2), 2)] == [1, 1]

# errors

class Refusing(Exception):
    def __init__(self, a, b): super().__init__(f'{a} and {b}')

class Fails:
    def __init__(self, e): self.e = e
    def __call__(self, task):
        if task.epoch == 3: raise self.e
        return task.rows

@pytest.mark.parametrize('e, kind, said', [(ValueError('bad row'), ValueError, 'bad row'), (KeyError('image\nof two lines'), KeyError, 'two lines'),
    (FileNotFoundError(2, 'gone', 'a.png'), FileNotFoundError, 'a.png'), (Refusing(1, 2), RuntimeError, 'a worker had Refusing: 1 and 2'),
    (StopIteration('odd'), RuntimeError, 'odd|StopIteration'), (UnicodeDecodeError('utf8', b'x', 0, 1, 'why'), UnicodeDecodeError, 'why')], ids=str)
def test_an_exception_arrives_in_its_turn_with_worker_rows_and_traceback(e, kind, said):
    pool, got = Pool(Fails(e), 2, 'fork'), []
    with pytest.raises(kind, match=said) as caught:
        for t,_ in Run(pool, tasks(9), 6): got.append(t.epoch)
    assert got == [0, 1, 2] and not pool.alive
    cause = caught.value.__cause__
    if kind is RuntimeError and isinstance(e, StopIteration): return
    assert type(cause) is WorkerTraceback and 'rows [3, 4, 5] of epoch 3' in str(cause) and 'in __call__' in str(cause) and 'in worker ' in str(cause)

def test_an_exception_in_a_thread_says_its_rows():
    with pytest.raises(ValueError, match='bad row') as e: list(in_threads(Fails(ValueError('bad row')), tasks(9), 2, 4))
    assert e.value.__notes__ == ['in a thread that had rows [3, 4, 5] of epoch 3']

def test_a_batch_that_cannot_be_sent_is_an_error():
    class Opens:
        def __call__(self, task): return lambda: None
    with pytest.raises((AttributeError, pickle.PicklingError, RuntimeError), match='lambda'): list(Run(Pool(Opens(), 1, 'fork'), tasks(2), 2))

class Dies:
    def __init__(self, how): self.how = how
    def __call__(self, task):
        if task.epoch == 5: self.how()
        return task.rows

@pytest.mark.parametrize('how, said', [(lambda: os.kill(os.getpid(), signal.SIGKILL), 'killed by SIGKILL'), (lambda: os._exit(3), 'ended with exit code 3'),
                                       (lambda: os.kill(os.getpid(), signal.SIGUSR1), 'killed by SIGUSR1')])
def test_a_worker_that_dies_is_an_error_at_once(how, said):
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match=rf'worker [01] \(process \d+\) (was )?{said} while it had rows \[5, 6, 7\] of epoch 5'):
        list(Run(Pool(Dies(how), 2, 'fork'), tasks(20), 4))
    assert time.perf_counter() - started < 5

def test_a_worker_killed_from_outside_while_it_works_or_waits():
    class Slow:
        def __call__(self, task):
            if task.epoch: time.sleep(60)
    for victim in ('busy', 'idle'):
        pool = Pool(Slow(), 2, 'fork')
        it = iter(Run(pool, tasks(2 if victim == 'busy' else 3)[:2], 2))
        next(it)
        w = next(w for w in pool.workers if bool(w.tasks) == (victim == 'busy'))
        threading.Timer(.2, os.kill, (w.process.pid, signal.SIGKILL)).start()
        started = time.perf_counter()
        with pytest.raises(RuntimeError, match='SIGKILL while it had rows' if victim == 'busy' else 'SIGKILL between two tasks'): next(it)
        assert time.perf_counter() - started < 5 and not children()

def test_a_worker_that_dies_and_leaves_a_child_that_holds_its_pipe():
    a, b = mp.Pipe()
    class Forks:
        def __call__(self, task):
            if child := os.fork():
                b.send(child)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
            os._exit(0)
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match='SIGKILL while it had rows'): list(Run(Pool(Forks(), 1, 'fork'), tasks(1), 1))
    assert time.perf_counter() - started < 5
    os.kill(a.recv(), signal.SIGKILL)

def test_patience_ends_where_it_is_said_to():
    class Hangs:
        def __call__(self, task): time.sleep(60)
    with pytest.raises(TimeoutError, match=r'no batch within 0.2 s: worker 0 has rows \[0, 1, 2\] of epoch 0'):
        list(Run(Pool(Hangs(), 1, 'fork', timeout=.2), tasks(2), 1))

def test_an_error_in_the_source_of_tasks_stops_the_workers():
    def source():
        yield from tasks(3)
        raise OSError('the stream broke')
    with pytest.raises(OSError, match='the stream broke'): list(Run(Pool(Square(), 2, 'fork'), source(), 2))

# starting: a new process costs seconds, so these are few

@pytest.mark.parametrize('context', ['spawn', 'forkserver'])
def test_new_processes_do_the_same_work(context):
    pool = Pool(Doubled(torch.arange(100_000.)), 1, context)
    assert [b.tolist() for _,b in Run(pool, tasks(3), 2)] == [(2*t.rows).tolist() for t in tasks(3)]
    pool.close()
    mp.resource_tracker._resource_tracker._stop()             # Python's own helper process
    if context == 'forkserver': mp.forkserver._forkserver._stop()

class Doubled:
    def __init__(self, x): self.x = x
    def __call__(self, task): return 2*self.x[task.rows]

def test_what_a_new_process_cannot_have_is_told_in_words():
    class Local:
        def __call__(self, task): return 0
    with pytest.raises(TypeError, match=r"Can't (get|pickle) local object.*define classes and functions in a module"): Pool(Local(), 1, 'spawn')

SCRIPT = '''
import multiprocessing as mp, os, signal, sys, time, torch
from miniai.workers import Pool, Run, Task
class Local:
    def __call__(self, task): time.sleep(task.epoch); return os.getpid()
tasks = [Task(0, {slow}*(k > 1), torch.arange(3)) for k in range(9)]
'''

def run(text, slow=0, **kw):
    return subprocess.Popen([sys.executable, '-c', SCRIPT.format(slow=slow) + text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def test_a_class_of_a_notebook_is_told_in_words_too():
    out, err = run("try: list(Run(Pool(Local(), 1, 'spawn'), tasks, 2))\nexcept TypeError as e: print(e, '|', e.__cause__)").communicate(timeout=60)
    assert "a newly started worker cannot have the data set or its functions: AttributeError: Can't get attribute 'Local'" in out and "context='fork'" in out, err
    assert 'Traceback' in out.split('|')[1]

def gone(pids, seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if not any(os.path.exists(f'/proc/{p}') for p in pids): return True
        time.sleep(.05)

PIDS = "it = iter(Run(pool := Pool(Local(), 2, 'fork'), tasks, 4)); next(it); print(*[w.process.pid for w in pool.workers], flush=True)\n"

@pytest.mark.skipif(not LINUX, reason='looks into /proc')
@pytest.mark.parametrize('end, said', [('', ''), ('os.kill(os.getpid(), signal.SIGKILL)', ''), ('raise ValueError("mine")', 'ValueError: mine'),
                                       ('os.kill(os.getpid(), signal.SIGTERM)', ''), ('sys.exit(3)', '')], ids=['end', 'SIGKILL', 'error', 'SIGTERM', 'exit'])
def test_however_a_program_ends_its_workers_end(end, said):
    p = run(PIDS + end)
    out, err = p.communicate(timeout=30)
    assert gone(out.split(), 12) and said in err and 'Exception ignored' not in err, err

@pytest.mark.skipif(not LINUX, reason='looks into /proc')
def test_ctrl_c_ends_the_wait_and_the_workers():
    p = run(PIDS + "for _ in it: pass", slow=60)
    pids = p.stdout.readline().split()
    time.sleep(.5)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=10)
    assert 'KeyboardInterrupt' in err.splitlines()[-1] and gone(pids, 2) and 'miniai-worker' not in err, err

def test_a_forked_copy_leaves_the_workers_alone():
    pool = Pool(Square(), 1, 'fork')
    child = os.fork()
    if not child:
        try: pool.close()
        finally: os._exit(pool.alive)
    assert os.waitpid(child, 0)[1] == 0
    assert [b.tolist() for _,b in Run(pool, tasks(1), 1)] == [[0, 1, 4]]
    pool.close()

HALF = """
import os, signal, torch
from miniai.workers import Pool
pool = Pool(abs, 2, 'fork')
print(*[w.process.pid for w in pool.workers], flush=True)
for w in pool.workers: os.write(w.conn.fileno(), bytes(2))       # of a message's length, which is told in four
os.kill(os.getpid(), signal.SIGKILL)
"""

def test_half_a_message_of_a_killed_main_process_is_not_waited_for():
    p = subprocess.run([sys.executable, '-c', HALF], stdout=subprocess.PIPE, text=True, timeout=30)         # until the last that holds its output has gone
    assert p.returncode == -signal.SIGKILL and len(p.stdout.split()) == 2
