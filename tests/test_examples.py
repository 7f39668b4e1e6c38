"Each example runs offline and prints one number, which is better than chance by far."
import subprocess, sys
import pytest
from conftest import ROOT

@pytest.mark.parametrize('path', sorted((ROOT/'examples').glob('*.py')), ids=lambda p: p.stem)
def test_example(path, tmp_path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert .75 < float(done.stdout.splitlines()[-1]) < 1
