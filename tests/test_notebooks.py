"Every notebook is a test: it runs from top to bottom, and its checks hold."
import pytest
from conftest import ROOT
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs').with_suffix('')))
def test_notebook(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    passed, seconds = run_notebook(path, skip_flags=['notest', 'slow'], basepath=ROOT)
    assert passed
