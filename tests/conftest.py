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
