"What every benchmark shares: a results file that says what was measured, where, when and how, and how noisy the machine was."
import datetime, os, platform, shlex, sys, time
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
    noise = 'unknown' if busy is None else f'{busy:.2f}' + (' (TOO BUSY: these figures are not to be trusted)' if busy > BUSY else '')
    noise = f'; share of the time that tasks waited for a core: {noise}' if timed else ''
    text = f"""# {title}

{table}

{note}

- command: `python {shlex.join([script(), *sys.argv[1:]])}`
- date: {datetime.date.today()}
- machine: {processor()}, {os.cpu_count()} cores, {platform.system()}{noise}
- versions: Python {platform.python_version()}, {versions}, miniai {miniai.__version__}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS/f'{name}.md').write_text(text)
    print(text)
