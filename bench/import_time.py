"""What `import miniai` adds to `import torch`: fresh processes taking turns, in seconds.

    python bench/import_time.py [--repeats 9]     writes bench/results/import_time.md"""
import argparse, statistics, subprocess, sys
from report import write

CODE = 'import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)'
CASES = {
    'import torch':              'import torch',
    'import miniai':             'import torch, miniai',
    'every floor to train with': 'import torch, miniai.nn, miniai.optim, miniai.data, miniai.datasets, miniai.learner, miniai.callbacks, miniai.vision',
    'import torch, matplotlib, datasets (what miniai leaves for later)': 'import torch, matplotlib.pyplot, datasets',
}

def seconds(code): return float(subprocess.run([sys.executable, '-c', CODE.format(code)], capture_output=True, text=True, check=True).stdout)

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=9)
    repeats = ap.parse_args().repeats
    times = {name: [] for name in CASES}
    for turn in range(repeats+1):                      # the first turn warms the disk's cache
        for name, code in CASES.items():
            s = seconds(code)
            if turn: times[name].append(s)
    base = times['import torch']
    rows = [(name, f'{statistics.median(ts):.2f}', f'{min(ts):.2f}-{max(ts):.2f}', f'{statistics.median(a/b for a,b in zip(ts, base, strict=True)):.2f}')
            for name, ts in times.items()]
    write('import_time', 'What `import miniai` adds to `import torch`', ('', 'seconds, median', 'range', 'to `import torch`'), rows,
          f'Ratios are medians over {repeats} turns of time / time of `import torch` in the same turn. The aim: at most 1.15.')

if __name__ == '__main__': main()
