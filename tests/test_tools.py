"The check finds what it promises to find, and changes nothing."
import shutil, subprocess, sys
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import floors  # noqa: E402

@pytest.fixture
def copy(tmp_path):
    "The project as it stands, in a folder and repository of its own"
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for f in listed.split('\n'):
        if not f or not (ROOT/f).is_file(): continue
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, tmp_path/f)
    subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
    return tmp_path

def check(root): return subprocess.run([sys.executable, root/'tools/nb', 'check'], cwd=root, capture_output=True, text=True)
def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))

def test_the_project_is_in_step(copy):
    done = check(copy)
    assert done.returncode == 0, done.stderr
    assert 'in step' in done.stdout

@pytest.mark.parametrize('file, old, new, said', [
    ('miniai/layers.py', 'F.relu(x,', 'F.gelu(x,', 'miniai/layers.py is not what its notebook exports'),
    ('nbs/22_layers.ipynb', 'F.relu(x,', 'F.gelu(x,', 'miniai/layers.py is not what its notebook exports'),
    ('nbs/22_layers.ipynb', '"execution_count": null', '"execution_count": 7', 'nbs/22_layers.ipynb is not clean: run nbdev-clean'),
    ('nbs/index.ipynb', '# miniai', '# maxiai', 'README.md is not what nbs/index.ipynb gives'),
    ('tests/test_core.py', 'import random', 'import random, shutil', 'ruff finds faults'),
])
def test_what_is_out_of_step_is_found_and_left_as_it_is(copy, file, old, new, said):
    edit(copy/file, old, new)
    edited = (copy/file).read_bytes()
    done = check(copy)
    assert done.returncode == 1 and f'out of step: {said}' in done.stderr
    assert (copy/file).read_bytes() == edited

def test_an_upward_import_is_found(copy):
    for f in ('nbs/22_layers.ipynb', 'miniai/layers.py'):
        edit(copy/f, 'import torch.nn.functional as F', 'import torch.nn.functional as F\\nfrom miniai.optim import SGD' if f.endswith('ipynb') else
             'import torch.nn.functional as F\nfrom .optim import SGD')
    done = check(copy)
    assert done.returncode == 1
    assert 'layers (floor 22) imports optim (floor 30): imports point down' in done.stdout

def test_every_kind_of_import_is_seen(tmp_path):
    source = 'from .a import x\nfrom miniai.b import y\nfrom . import c\nfrom miniai import d\nimport miniai.e\nimport torch\ndef f():\n    from .g import z\n'
    (tmp_path/'m.py').write_text(source)
    assert sorted(name for _,name in floors.imports(tmp_path/'m.py')) == list('abcdeg')

def test_every_module_has_a_floor_and_no_arrow_points_up():
    assert set(floors.floors(ROOT)) == {p.stem for p in (ROOT/'miniai').glob('[a-z]*.py')} and floors.upward(ROOT) == []
