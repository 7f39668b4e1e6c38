"""Fashion-MNIST from each of its sources, whole or broken"""
import gzip, os, re, socket, struct, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest
import datasets as hf
import huggingface_hub.constants
from miniai import fashion as m
from miniai.datasets import in_memory

hf.disable_progress_bars()          # what they write to stderr is not ours

IDX = dict(train=('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'), test=('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'))
ROWS = dict(train=30, test=20)

def idx(x):
    kind = {np.dtype(v): k for k,v in m._IDX_TYPES.items()}[x.dtype]
    return struct.pack(f'>HBB{x.ndim}I', 0, kind, x.ndim, *x.shape) + x.tobytes()

def arrays(split, seed=0):
    rng, n = np.random.default_rng((seed, len(split))), ROWS[split]
    return rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)

def write_idx(folder, seed=0, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in IDX.items():
        for name, x in zip(names, arrays(split, seed), strict=True):
            if zipped: (folder/f'{name}.gz').write_bytes(gzip.compress(idx(x), 1))
            else: (folder/name).write_bytes(idx(x))
    return folder

def pixels(ds): return np.stack([np.asarray(o) for o in ds['image']])
def same(dd, seed=0):
    return all(np.array_equal(pixels(dd[o]), arrays(o, seed)[0]) and list(dd[o]['label']) == arrays(o, seed)[1].tolist() for o in IDX)

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A machine with nothing on it and no network"
    monkeypatch.setenv('MINIAI_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(m, 'DEBIAN', tmp_path/'debian')
    monkeypatch.setattr(hf.config, 'HF_DATASETS_CACHE', tmp_path/'hf'/'datasets')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hf'/'hub'))
    monkeypatch.setattr(hf.config, 'HF_HUB_OFFLINE', True)
    return tmp_path

@pytest.fixture(scope='module')
def sample(): return m._from_parquet(m.SAMPLE)


# IDX

@pytest.mark.parametrize('kind', m._IDX_TYPES.values())
@pytest.mark.parametrize('shape', [(7,), (3, 2), (2, 3, 4, 1), (0, 5)])
def test_read_idx(tmp_path, kind, shape):
    x = (np.arange(np.prod(shape)) - 3*('u' not in kind)).astype(kind).reshape(shape)
    (tmp_path/'x').write_bytes(idx(x))
    got = m.read_idx(tmp_path/'x')
    assert got.dtype == x.dtype.newbyteorder('=') and got.dtype.isnative and np.array_equal(got, x)
    got += 1                                       # our own copy, not a view of the file's bytes

good = idx(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))
zipped = gzip.compress(good, mtime=0)              # a time in it would be another name of the test in each process
@pytest.mark.parametrize('raw, why', [
    (b'', 'its header is empty'),
    (b'\0\0', 'its header is 00 00, not'),
    (good[:9], 'its header is 00 00 08 03'),                            # ends within the dimensions
    (b'\1' + good[1:], 'its header is 01 00 08 03'),                    # wrong magic number
    (b'\0\0\x0a' + good[3:], 'its header is 00 00 0a 03'),              # no such type
    (good[:-1], r'3×2×2 of uint8 is 12 bytes, but 11 are there'),
    (good + b'!', r'3×2×2 of uint8 is 12 bytes, but 13 are there'),
    (good[:2] + b'\x0d' + good[3:], r'3×2×2 of float32 is 48 bytes, but 12 are there'),
    (good[:4] + b'\xff'*12 + good[16:], 'is 79,228,162,458,924,105,385,300,197,375 bytes, but 12 are there'),
    (zipped[:-1], 'gzip says Compressed file ended'),
    (zipped[:20], 'gzip says Compressed file ended'),
    (zipped[:-8] + b'\0'*8, 'gzip says CRC check failed'),
    (b'\x1f\x8b' + bytes(30), 'gzip says'),
    (zipped[:12] + b'\xff'*9 + zipped[21:], 'gzip says'),
    (b'PAR1 something else', 'its header is 50 41 52 31'),
])
def test_damaged_idx(tmp_path, raw, why):
    (tmp_path/'x').write_bytes(raw)
    with pytest.raises(ValueError, match=why) as e: m.read_idx(tmp_path/'x')
    assert str(tmp_path/'x') in str(e.value) and str(e.value).endswith('Get it again')

@pytest.mark.parametrize('name, x, why', [
    ('train-labels-idx1-ubyte', np.zeros(29, np.uint8), 'train has 30 images and 29 labels'),
    ('train-labels-idx1-ubyte', np.array([0]*29 + [10], np.uint8), 'train has label 10 at row 29'),
    ('t10k-images-idx3-ubyte', np.zeros((20, 784), np.uint8), 't10k images are 20×784 uint8'),
    ('t10k-images-idx3-ubyte', np.zeros((20, 28, 28), np.dtype('>f4')), 't10k images are 20×28×28 float32'),
    ('t10k-labels-idx1-ubyte', np.zeros((20, 1), np.uint8), 'labels 20×1 uint8'),
])
def test_idx_files_that_do_not_fit(tmp_path, name, x, why):
    (write_idx(tmp_path, zipped=False)/name).write_bytes(idx(x))
    with pytest.raises(ValueError, match=why): m.fashion_mnist(tmp_path)

def test_idx_without_rows(tmp_path):
    write_idx(tmp_path, zipped=False)
    for name, shape in zip(IDX['test'], ((0, 28, 28), (0,)), strict=True): (tmp_path/name).write_bytes(idx(np.zeros(shape, np.uint8)))
    with pytest.raises(ValueError, match='t10k has 0 images and 0 labels'): m.fashion_mnist(tmp_path)

def test_png_is_what_it_says():
    import io, PIL.Image
    for shape in ((1, 1), (28, 28), (3, 300)):
        x = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
        for png, want in zip(m._pngs(x), x, strict=True):
            PIL.Image.open(io.BytesIO(png)).verify()                    # checksums of the chunks
            im = PIL.Image.open(io.BytesIO(png))
            assert im.mode == 'L' and np.array_equal(np.asarray(im), want)


# a path of the user's

@pytest.mark.parametrize('zipped', [True, False])
def test_path_to_idx(home, capsys, zipped):
    dd = m.fashion_mnist(str(write_idx(home/'mine', zipped=zipped)))
    assert same(dd) and dd['train'].features == m._features()
    assert capsys.readouterr().err == f"miniai: Fashion-MNIST, 30 + 20 images from {home/'mine'}\n"
    assert not (home/'cache').exists()             # what the user points at is not necessarily Fashion-MNIST: not kept

def test_path_to_parquet_or_disk(home):
    dd = m._from_idx(write_idx(home/'mine'))
    m._keep(dd, home/'flat')
    dd.save_to_disk(home/'disk')
    (home/'hub'/'fashion_mnist').mkdir(parents=True)
    for o in dd: dd[o].to_parquet(home/'hub'/'fashion_mnist'/f'{o}-00000-of-00001.parquet')
    (home/'shards').mkdir()
    for i in range(2):
        for o in dd: dd[o].shard(2, i, contiguous=True).to_parquet(home/'shards'/f'{o}-{i:05}-of-00002.parquet')
    for folder in ('flat', 'disk', 'hub', 'shards'):
        got = m.fashion_mnist(home/folder)
        assert same(got) and got['test'].features == m._features(), folder

def test_wrong_paths(home):
    with pytest.raises(FileNotFoundError, match='nowhere is not a folder'): m.fashion_mnist(home/'nowhere')
    (home/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='neither IDX files'): m.fashion_mnist(home/'empty')
    (write_idx(home/'three')/'t10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(FileNotFoundError, match='t10k-labels-idx1-ubyte is missing'): m.fashion_mnist(home/'three')
    (home/'half').mkdir()
    (home/'half'/'train.parquet').write_bytes((m.SAMPLE/'train.parquet').read_bytes())
    with pytest.raises(FileNotFoundError, match='test.parquet is missing'): m.fashion_mnist(home/'half')
    (home/'half'/'test.parquet').write_text('nothing')
    with pytest.raises(ValueError, match='test.parquet is damaged'): m.fashion_mnist(home/'half')
    hf.Dataset.from_dict(dict(img=[1])).to_parquet(home/'half'/'test.parquet')
    with pytest.raises(ValueError, match='image and label cannot be read'): m.fashion_mnist(home/'half')


# the order of the sources

def hub_cache(home, dd, kind):
    "What `load_dataset` leaves behind, in its own layout"
    if kind == 'arrow':
        folder = home/'hf'/'datasets'/'zalando-datasets___fashion_mnist'/'fashion_mnist'/'0.0.0'/'531be5'
        folder.mkdir(parents=True)
        for o in dd:
            dd[o].save_to_disk(home/'tmp'/o)
            (home/'tmp'/o/'data-00000-of-00001.arrow').rename(folder/f'fashion_mnist-{o}.arrow')
    else:
        folder = home/'hf'/'hub'/'datasets--zalando-datasets--fashion_mnist'/'snapshots'/'531be5'/'fashion_mnist'
        folder.mkdir(parents=True)
        for o in dd: dd[o].to_parquet(folder/f'{o}-00000-of-00001.parquet')
    return folder

def test_sources_nearest_first(home, monkeypatch, capsys):
    def got(seed, source):
        assert same(m.fashion_mnist(), seed)
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and f'30 + 20 images from {source}' in err
    hub = m._from_idx(write_idx(home/'made', seed=1))
    monkeypatch.setattr(m, '_from_hub', lambda: hub)
    got(1, 'the Hugging Face Hub, zalando-datasets/fashion_mnist')
    write_idx(m.DEBIAN, seed=2)
    got(2, "Debian's package dataset-fashion-mnist")
    got(2, f"the cache in {home/'cache'/'fashion_mnist'}")     # kept from Debian's
    for o in (home/'cache'/'fashion_mnist').iterdir(): o.unlink()
    hub_cache(home, m._from_idx(write_idx(home/'made', seed=3)), 'parquet')
    got(3, "Hugging Face's cache")
    arrow = hub_cache(home, m._from_idx(write_idx(home/'made', seed=4)), 'arrow')
    got(4, "Hugging Face's cache")
    arrow.rename(arrow.with_suffix('.incomplete'))             # load_dataset was interrupted, or is at it right now
    got(3, "Hugging Face's cache")
    m._keep(m._from_idx(write_idx(home/'made', seed=5)), home/'cache'/'fashion_mnist')
    got(5, f"the cache in {home/'cache'/'fashion_mnist'}")

def test_sample_is_the_last_resort_and_loud(home, capsys):
    ways = 'ONLY THE SAMPLE.*apt install dataset-fashion-mnist.*Hugging Face Hub.*path='
    with pytest.warns(UserWarning, match=ways): dd = m.fashion_mnist()
    assert {k: len(v) for k,v in dd.items()} == dict(train=4000, test=1000)
    assert capsys.readouterr().err.endswith('4,000 + 1,000 images from the sample that miniai ships\n')
    assert not (home/'cache').exists()

def test_asked_for_sample_is_quiet(home, capsys, recwarn):
    m.fashion_mnist(m.SAMPLE)
    assert capsys.readouterr().err == 'miniai: Fashion-MNIST, 4,000 + 1,000 images from the sample that miniai ships\n' and not recwarn.list

def test_broken_sources_are_said_and_passed_over(home, capsys):
    write_idx(m.DEBIAN)
    (m.DEBIAN/'train-images-idx3-ubyte.gz').write_bytes(gzip.compress(b'nonsense'))
    arrow = hub_cache(home, m._from_idx(write_idx(home/'made')), 'arrow')/'fashion_mnist-train.arrow'
    arrow.write_bytes(arrow.read_bytes()[:-2000])
    with pytest.warns(UserWarning, match='ONLY THE SAMPLE'): m.fashion_mnist()
    hugging, debian, last = capsys.readouterr().err.splitlines()
    assert hugging.startswith("miniai: Hugging Face's cache is passed over: ")
    assert debian.startswith("miniai: Debian's package dataset-fashion-mnist is passed over: ")
    assert 'train-images-idx3-ubyte.gz is damaged' in debian
    assert last.endswith('from the sample that miniai ships')


# our cache

@pytest.mark.parametrize('damage', ['flip', 'cut', 'text', 'empty', 'gone'])
def test_damaged_cache_is_passed_over_and_renewed(home, capsys, damage):
    write_idx(m.DEBIAN)
    m.fashion_mnist()
    path = home/'cache'/'fashion_mnist'/'test.parquet'
    raw = bytearray(path.read_bytes())
    if damage == 'flip': raw[len(raw)//2] ^= 4
    elif damage == 'cut': raw = raw[:len(raw)//2]
    elif damage == 'text': raw = b'<html>'
    elif damage == 'empty': raw = b''
    path.unlink()
    if damage != 'gone': path.write_bytes(raw)
    capsys.readouterr()
    assert same(m.fashion_mnist())
    said, used = capsys.readouterr().err.splitlines()
    assert said.startswith(f'miniai: the cache in {path.parent} is passed over: ') and "from Debian's package" in used
    assert same(m.fashion_mnist())
    assert 'from the cache' in capsys.readouterr().err

def test_cache_that_cannot_be_written(home, capsys, monkeypatch):
    write_idx(m.DEBIAN)
    (home/'cache').write_text('a file where the folder should be')
    assert same(m.fashion_mnist())
    assert 'not kept in' in capsys.readouterr().err
    (home/'cache').unlink()
    import pyarrow.parquet as pq
    def full(table, path, **kwargs):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pq, 'write_table', full)
    assert same(m.fashion_mnist())
    assert 'No space left on device' in capsys.readouterr().err
    assert not list((home/'cache'/'fashion_mnist').iterdir())  # nothing half-written stays behind
    m.fashion_mnist()
    assert 'passed over' not in capsys.readouterr().err        # and an empty folder is no damage

@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='root may write everywhere')
def test_cache_in_a_read_only_home(home, capsys):
    write_idx(m.DEBIAN)
    (home/'cache').mkdir(mode=0o500)
    assert same(m.fashion_mnist())
    assert 'Permission denied' in capsys.readouterr().err

def test_cache_is_written_under_another_name_first(home, monkeypatch):
    write_idx(m.DEBIAN)
    seen, replace = [], os.replace
    def watch(a, b):
        seen.append((Path(a).name, Path(b).name, Path(b).exists()))
        replace(a, b)
    monkeypatch.setattr(os, 'replace', watch)
    m.fashion_mnist()
    assert [(b, there) for _, b, there in seen] == [('train.parquet', False), ('test.parquet', False)]
    assert not any(a.endswith('.parquet') for a, _, _ in seen)


# the Hub

def head(n): return b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % n

@contextmanager
def server(serve):
    "`serve(connection, path, done)` for each request to a local server, in threads"
    done, held = threading.Event(), []
    def one(conn):
        held.append(conn)
        try:
            path = conn.recv(1<<16).split(b' ')[1].decode()
            serve(conn, path, done)
        except (OSError, IndexError): pass
    def accept(sock):
        while True:
            try: conn, _ = sock.accept()
            except OSError: return
            threading.Thread(target=one, args=(conn,), daemon=True).start()
    with socket.create_server(('127.0.0.1', 0)) as sock:
        threading.Thread(target=accept, args=(sock,), daemon=True).start()
        try: yield f'http://127.0.0.1:{sock.getsockname()[1]}'
        finally:
            done.set()
            for o in held: o.close()

def answer(body):
    def serve(conn, path, done):
        conn.sendall(head(len(body(path))) + body(path))
        conn.close()
    return serve

@pytest.fixture
def parquet(home):
    dd = m._from_idx(write_idx(home/'made', seed=7))
    m._keep(dd, home/'files')
    return lambda path: (home/'files'/f"{path.rsplit('/', 1)[-1].split('-')[0]}.parquet").read_bytes()

def use_hub(monkeypatch, url):
    monkeypatch.setattr(hf.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(hf.config, 'HF_ENDPOINT', url)

def test_hub_gives_the_data_and_it_is_kept(home, monkeypatch, parquet, capsys):
    asked = []
    def body(path):
        asked.append(path)
        return parquet(path)
    with server(answer(body)) as url:
        use_hub(monkeypatch, url)
        assert same(m.fashion_mnist(), 7)
        assert sorted(set(asked)) == [f'/datasets/zalando-datasets/fashion_mnist/resolve/main/fashion_mnist/{o}-00000-of-00001.parquet'
                                      for o in ('test', 'train')]
        n = len(asked)
        assert same(m.fashion_mnist(), 7) and len(asked) == n  # the second time from the cache
    assert [o.split('from ')[1] for o in capsys.readouterr().err.splitlines()] == [
        'the Hugging Face Hub, zalando-datasets/fashion_mnist', f"the cache in {home/'cache'/'fashion_mnist'}"]

def test_hub_follows_redirects(home, monkeypatch, parquet):
    def serve(conn, path, done):
        if path.startswith('/cdn'): return answer(parquet)(conn, path, done)
        conn.sendall(f'HTTP/1.1 302 Found\r\nLocation: /cdn{path}\r\nContent-Length: 0\r\n\r\n'.encode())
        conn.close()
    with server(serve) as url:
        use_hub(monkeypatch, url)
        assert same(m.fashion_mnist(), 7)

def no_answer(conn, path, done): done.wait(60)
def redirect_then_silence(conn, path, done):
    if path.startswith('/cdn'): return done.wait(60)
    conn.sendall(f'HTTP/1.1 302 Found\r\nLocation: /cdn{path}\r\nContent-Length: 0\r\n\r\n'.encode())
    conn.close()
def stall_in_the_file(conn, path, done):
    conn.sendall(head(10_000_000) + bytes(100_000))
    done.wait(60)
def drip(conn, path, done):
    conn.sendall(head(10_000_000))
    while not done.wait(0.2): conn.sendall(b'x')
def hang_up(conn, path, done): conn.close()
def cut(conn, path, done):
    conn.sendall(head(10_000_000) + bytes(100_000))
    conn.close()

quiet = 'nothing heard for 0.7 s'
SAID = {no_answer: quiet, redirect_then_silence: quiet, stall_in_the_file: quiet, drip: quiet,
         hang_up: 'closed connection|reset by peer', cut: 'ended 9,900,000 bytes early'}

def left(capsys, within):
    "The line that says why the Hub was left, in time, for the sample"
    start = time.monotonic()
    with pytest.warns(UserWarning, match='ONLY THE SAMPLE'): m.fashion_mnist()
    assert time.monotonic() - start < within
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith('miniai: the Hugging Face Hub, zalando-datasets/fashion_mnist is passed over: ')
    return line

@pytest.mark.parametrize('serve', SAID, ids=lambda o: o.__name__)
def test_hub_that_fails_is_left(home, monkeypatch, capsys, serve):
    monkeypatch.setattr(m._download, '__defaults__', (0.7,))
    with server(serve) as url:
        use_hub(monkeypatch, url)
        assert re.search(SAID[serve], left(capsys, within=3))

def test_hub_is_left_within_10_s(home, monkeypatch, capsys):
    "With the limits as they are: a redirect after 1.5 s, the first piece after 3 s, then silence"
    def serve(conn, path, done):
        done.wait(1.5)
        if not path.startswith('/cdn'): return redirect_then_silence(conn, path, done)
        conn.sendall(head(10*m._PIECE) + bytes(m._PIECE))
        done.wait(60)
    with server(serve) as url:
        use_hub(monkeypatch, url)
        assert 'nothing heard for 4 s' in left(capsys, within=9)

@pytest.mark.parametrize('reply, why', [
    (b'HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n', '503'),
    (b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n', '404'),
    (head(6) + b'<html>', 'is damaged'),                                # the hotel's login page
    (b'SSH-2.0\r\n', 'SSH-2.0'),
])
def test_hub_that_answers_wrong(home, monkeypatch, capsys, reply, why):
    def serve(conn, path, done):
        conn.sendall(reply)
        conn.close()
    with server(serve) as url:
        use_hub(monkeypatch, url)
        with pytest.warns(UserWarning, match='ONLY THE SAMPLE'): m.fashion_mnist()
    assert why in capsys.readouterr().err and not (home/'cache').exists()

def test_hub_refuses_or_has_no_name(home, monkeypatch, capsys):
    with socket.create_server(('127.0.0.1', 0)) as sock: port = sock.getsockname()[1]
    for url in (f'http://127.0.0.1:{port}', 'http://hub.invalid'):
        use_hub(monkeypatch, url)
        assert url in left(capsys, within=9)

def test_name_lookup_that_hangs(home, monkeypatch, capsys):
    done = threading.Event()
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: done.wait(60))
    monkeypatch.setattr(m._download, '__defaults__', (0.3,))
    use_hub(monkeypatch, 'http://hub.invalid')
    assert 'nothing heard for 0.3 s' in left(capsys, within=2)
    done.set()

def test_slow_but_steady_is_waited_for():
    "Three times the limit in all, and never silent for as long as the limit"
    def serve(conn, path, done):
        conn.sendall(head(10*m._PIECE))
        for _ in range(10):
            done.wait(0.15)
            conn.sendall(bytes(m._PIECE))
    with server(serve) as url: assert m._download(url, quiet=0.5) == bytes(10*m._PIECE)

def test_local_copies_come_before_the_network(home, monkeypatch):
    asked = []
    def serve(conn, path, done): asked.append(path)
    with server(serve) as url:
        use_hub(monkeypatch, url)
        write_idx(m.DEBIAN)
        assert same(m.fashion_mnist()) and same(m.fashion_mnist()) and not asked

def test_a_silent_hub_does_not_keep_python_from_ending(tmp_path):
    with server(no_answer) as url:
        code = f"""if True:
            from miniai import fashion as m
            try: m._download({url!r}, quiet=0.3)
            except TimeoutError: print('left')"""
        start = time.monotonic()
        # the socket has a limit of its own: take it away, so that the thread still hangs when Python ends
        code = 'import miniai.fashion as d, urllib.request as u; d.urlopen = lambda request, timeout: u.urlopen(request)\n' + code
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=30, env={**os.environ, 'no_proxy': '*'})
        assert out.stdout == 'left\n', out.stderr
        assert time.monotonic() - start < 20


# the sample

def test_sample_is_balanced_small_and_licensed(sample):
    for split, n in (('train', 400), ('test', 100)): assert np.bincount(sample[split]['label']).tolist() == [n]*10
    assert sum(o.stat().st_size for o in m.SAMPLE.iterdir()) < 3_000_000
    text = (m.SAMPLE/'LICENSE').read_text()
    assert 'Copyright (c) 2017 Zalando SE, https://tech.zalando.com' in text
    assert 'Permission is hereby granted, free of charge' in text and 'THE SOFTWARE IS PROVIDED "AS IS"' in text

def test_sample_opens_elsewhere(tmp_path):
    dd = hf.load_dataset('parquet', data_files={o: str(m.SAMPLE/f'{o}.parquet') for o in IDX}, cache_dir=str(tmp_path))
    assert dd['train'].features == m._features()
    assert dd['test'][0]['image'].size == (28, 28) and dd['test'].features['label'].int2str(dd['test'][0]['label']) == 'Ankle boot'

debian = pytest.mark.skipif(not (m.DEBIAN/'train-images-idx3-ubyte.gz').exists(), reason='apt install dataset-fashion-mnist')

@debian
def test_sample_is_the_first_of_each_class(sample):
    for split, stem in (('train', 'train'), ('test', 't10k')):
        x, y = m._idx_pair(m.DEBIAN, stem)
        n = len(sample[split]) // 10
        rows = np.sort(np.concatenate([np.flatnonzero(y == c)[:n] for c in range(10)]))
        assert np.array_equal(pixels(sample[split]), x[rows]) and list(sample[split]['label']) == y[rows].tolist()

@debian
def test_full_set(monkeypatch, tmp_path):
    monkeypatch.setenv('MINIAI_CACHE', str(tmp_path))
    dd = m.fashion_mnist(m.DEBIAN)
    assert np.bincount(dd['train']['label']).tolist() == [6000]*10 and np.bincount(dd['test']['label']).tolist() == [1000]*10
    rows = in_memory(dd['test'])
    x, y = m._idx_pair(m.DEBIAN, 't10k')
    assert np.array_equal(rows.columns['image'][:,0].numpy(), x) and np.array_equal(rows.columns['label'].numpy(), y)


# the module

def test_import_is_cheap():
    code = "import sys, miniai.fashion; print({'datasets', 'PIL', 'pyarrow', 'huggingface_hub', 'pandas', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'set()\n'
