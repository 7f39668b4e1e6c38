"Every notebook is a test: it runs from top to bottom, in a process of its own, and its checks hold."
import multiprocessing, os, sys
import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
PROCESSES = multiprocessing.get_context('forkserver')      # each begins anew, with what takes long to import
PROCESSES.set_forkserver_preload(['torch', 'matplotlib.pyplot', 'nbdev.test'])

def run(path):
    from nbdev.test import test_nb as run_notebook
    os.chdir(path.parent)
    passed, seconds = run_notebook(path, skip_flags=['notest', 'slow'], basepath=ROOT)
    sys.exit(not passed)

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs').with_suffix('')))
def test_notebook(path):
    process = PROCESSES.Process(target=run, args=[path])
    process.start()
    process.join()
    assert process.exitcode == 0
