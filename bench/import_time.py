"""What `import miniai` adds to `import torch`: fresh processes taking turns, in seconds.

    python bench/import_time.py [--repeats 9]     writes bench/results/import_time.md"""
import argparse, statistics, subprocess, sys
from report import write

CODE = 'import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)'
CASES = {
    'import torch':              'import torch',
    'import miniai':             'import torch, miniai',
    'all that training takes':   'import torch; from miniai import callbacks, data, datasets, learner, nn, optim, vision',
    'what is left for later':    'import torch, matplotlib.pyplot, datasets',
}

def seconds(code):
    done = subprocess.run([sys.executable, '-c', CODE.format(code)], capture_output=True, text=True, check=True)
    return float(done.stdout)

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--repeats', type=int, default=9)
    ap.add_argument('--small', action='store_true', help='one turn, to see whether it runs')
    args = ap.parse_args()
    repeats = 1 if args.small else args.repeats
    times = {name: [] for name in CASES}
    for turn in range(repeats+1):                      # the first turn warms the disk's cache
        for name, code in CASES.items():
            s = seconds(code)
            if turn: times[name].append(s)
    base = times['import torch']
    def ratio(ts): return statistics.median(a/b for a,b in zip(ts, base, strict=True))
    rows = [(name, f'{statistics.median(ts):.2f}', f'{min(ts):.2f}-{max(ts):.2f}', f'{ratio(ts):.2f}') for name, ts in times.items()]
    write('import_time', 'What `import miniai` adds to `import torch`', ('', 'seconds, median', 'range', 'to `import torch`'), rows,
          f'Ratios are medians over {repeats} turns of time / time of `import torch` in the same turn. The aim: at most 1.15. '
          'What is left for later: matplotlib and Hugging Face datasets, imported where they are used.')

if __name__ == '__main__': main()
