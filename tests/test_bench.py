"Each benchmark runs, at toy size, and writes its page; no time is judged here."
import os, subprocess, sys
import pytest
from conftest import ROOT

TOY = {'accel': ['--repeats', '1', '--steps', '1', '--small'], 'import_time': ['--repeats', '1'], 'autograd': ['--repeats', '1', '--seconds', '.01', '--small'],
       'checkpoint': ['--repeats', '1', '--small'], 'optim': ['--repeats', '1', '--seconds', '.001', '--small'],
       'loop': ['--repeats', '1', '--seconds', '.001', '--small'], 'data': ['--repeats', '1', '--epochs', '4', '--small'],
       'step': ['--repeats', '1', '--seconds', '.001', '--small'], 'scale': ['--repeats', '1', '--small'],
       'accuracy': ['--recipe', 'fashion-fast', '--seeds', '2', '--small'],
       'distributed': ['--repeats', '1', '--steps', '2', '--small'],
       'memory': ['--repeats', '1', '--small'], 'bound': ['--steps', '2', '--repeats', '1', '--small'],
       'gpu': ['--seeds', '1', '--repeats', '1', '--seconds', '.001', '--small'], 'trainers': ['--repeats', '1', '--steps', '2', '--small']}

@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT/'bench').glob('*.py') if p.stem != 'report'))
def test_benchmark_runs(name, tmp_path):
    subprocess.run([sys.executable, ROOT/'bench'/f'{name}.py', *TOY[name]], check=True, capture_output=True, cwd=tmp_path,
                   env={**os.environ, 'MINIAI_BENCH_RESULTS': str(tmp_path), 'MINIAI_BENCH_ANYWAY': '1'})
    page = next(tmp_path.glob(f'{name}*.md')).read_text()
    assert 'date:' in page and 'command:' in page and 'versions:' in page and page.count('|') > 10
