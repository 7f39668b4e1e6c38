"What all tests share: no network, no windows, no plots left open."
import os, re, signal
from pathlib import Path

# a shell that starts `make test &` lets Ctrl-C be ignored in all that it starts: the tests that press it need Python's own handler
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(HF_HUB_OFFLINE='1', MPLBACKEND='agg', HF_DATASETS_DISABLE_PROGRESS_BARS='1')

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')

def shared_memory():
    "What this process and its children have in /dev/shm: names have the number of the process in them"
    if not os.path.isdir('/dev/shm'): return set()
    own = [str(os.getpid()), *Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()]
    return {name for name in os.listdir('/dev/shm') if set(own) & set(re.findall(r'\d+', name))}

@pytest.fixture
def own_times(tmp_path, monkeypatch):
    "What `miniai.trial` finds holds for this test only, and is kept however busy the machine is"
    from miniai import trial
    def forget(): trial.TIMES.clear(), trial._chosen.clear(), trial._say.cache_clear()
    monkeypatch.setenv('MINIAI_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(trial, 'BUSY', float('inf'))
    forget()
    yield
    forget()

@pytest.fixture
def always(monkeypatch):
    "Whoever computes the same wins, so that every exchange of kernels takes place"
    from miniai import trial
    monkeypatch.setattr(trial, 'race', lambda fs: {k: 2. if k == trial.PYTORCH else 1. for k in fs})
