"What every benchmark shares: a results file that says what was measured, where, when and how, and how noisy the machine was."
import datetime, os, platform, shlex, statistics, sys, time
from contextlib import nullcontext
from importlib.metadata import version
import miniai
from pathlib import Path

RESULTS = Path(os.environ.get('MINIAI_BENCH_RESULTS') or Path(__file__).parent/'results')
BUSY = .1     # share of the time that some task waited for a core, above which figures are not to be trusted

def waited():
    "Seconds in which some task of this machine waited for a core; None where the kernel does not tell"
    try: return int(Path('/proc/pressure/cpu').read_text().split('total=')[1].split()[0])/1e6
    except (OSError, IndexError): return None

START = time.perf_counter(), waited()

def pressure():
    "The share of this process's time so far in which some task waited for a core"
    t, w = START
    return None if w is None else (waited()-w)/(time.perf_counter()-t)

def processor():
    try: return next(line.split(': ')[1] for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()

def script(): return str(Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parent.parent))

def write(
    name,         # of the results file, without ending
    title,
    head,         # column names
    rows,         # tuples of strings
    note='',      # how to read the table
    timed=True,   # are there times in it, which a busy machine spoils?
    packages=(),  # others whose versions matter
):
    "Write bench/results/NAME.md, and print it."
    busy = pressure()
    table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---']*len(head), *rows])
    versions = ', '.join(f'{p} {version(p)}' for p in ('torch', *packages))
    noise = 'unknown' if busy is None else f'{busy:.2f}'
    noise = f'; share of the time that tasks waited for a core: {noise}' if timed else ''
    text = f"""# {title}

{table}

{note}

- command: `python {shlex.join([script(), *sys.argv[1:]])}`
- date: {datetime.date.today()}
- machine: {processor()}, {os.cpu_count()} cores, {platform.system()}{noise}
- versions: Python {platform.python_version()}, {versions}, miniai {miniai.__version__}
"""
    print(text)
    if timed and (busy or 0) > BUSY and not os.environ.get('MINIAI_BENCH_ANYWAY'):
        sys.exit(f'{name}: for {busy:.0%} of the time some task waited for a core: no figures from a busy machine; try again later')
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS/f'{name}.md').write_text(text)

def take_turns(
    gos,         # {name: a function of nothing, or one with `around`, a context for its turns}
    repeats,     # how many turns each has
    seconds,     # about how long a turn is
):               # {name: seconds for one call, turn by turn}
    "Time functions side by side, in an order that turns round, so that a slow moment of the machine meets all of them."
    for go in gos.values(): go(), go(), go()
    n, times = {k: max(1, round(seconds/timed(go, 1))) for k,go in gos.items()}, {k: [] for k in gos}
    for turn in range(repeats):
        for k in (list(gos) if turn % 2 else reversed(list(gos))): times[k].append(timed(gos[k], n[k]))
    return times

def timed(go, n):
    with getattr(go, 'around', nullcontext)():
        if hasattr(go, 'around'): go()
        t = time.perf_counter()
        for _ in range(n): go()
        return (time.perf_counter()-t)/n

def ratio(a, b):
    "Of two lists of times the median of the ratios, turn by turn, and their middle half"
    each = sorted(x/y for x,y in zip(a, b, strict=True))
    return statistics.median(each), f'{each[len(each)//4]:.2f}-{each[-1-len(each)//4]:.2f}'

def picture(
    name,      # of the file, without ending
    groups,    # {a label: {name of a bar: its length}}
    what,      # what the length is
    line=None, # where to draw a line
):
    "Write bench/results/NAME.png: bars in groups."
    import matplotlib.pyplot as plt
    bars = list(dict.fromkeys(k for g in groups.values() for k in g))
    fig, ax = plt.subplots(figsize=(8, .3*len(groups)*(len(bars)+1)+.8), layout='constrained')
    for i,(label, group) in enumerate(groups.items()):
        ax.text(-.01, -i*(len(bars)+1)-(len(bars)-1)/2, label, transform=ax.get_yaxis_transform(), ha='right', va='center')
        for j,(k, v) in enumerate(group.items()):
            ax.barh(-i*(len(bars)+1)-j, v, color=f'C{bars.index(k)}', alpha=.85)
            ax.text(v, -i*(len(bars)+1)-j, f' {v:.2f}  {k}', va='center', fontsize=8)
    if line is not None: ax.axvline(line, color='k', lw=.8, ls=':')
    ax.set(yticks=[], xlabel=what, xlim=(0, 1.25*max(v for g in groups.values() for v in g.values())))
    for side in ('top', 'right'): ax.spines[side].set_visible(False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    fig.savefig(RESULTS/f'{name}.png', dpi=110)
