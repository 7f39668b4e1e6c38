"A short form of `make faults`: real processes, killed at random moments and in the middle of checkpoints, equal to the bit."
import os, subprocess, sys
from conftest import ROOT

def test_a_run_that_is_killed_again_and_again_ends_as_if_nobody_had():
    done = subprocess.run([sys.executable, ROOT/'tests'/'faults.py', '4', '1'], capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT/"tests"}'})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all('killed 4 times' in line and line.endswith('equal to the bit') for line in lines), done.stdout
    assert sum(int(line.split('killed 4 times, ')[1].split()[0]) for line in lines) >= 3, 'too few kills in the middle of a checkpoint'
