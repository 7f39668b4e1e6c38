"Data sets of every form that is promised, and what is said of each that is not as it should be"
import json, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import datasets as hf, numpy as np, pandas as pd, pytest, torch
import PIL.Image
from conftest import ROOT
from miniai import tables as m
from miniai.datasets import DataLoaders

hf.disable_progress_bars()

ROWS = [dict(text=f'a {"good" if i%3 else "bad"} thing, number {i}', label='plus' if i%3 else 'minus') for i in range(30)]
ONLY = [dict(id=str(i), **row) for i,row in enumerate(ROWS)]

def write(path, rows):
    "A table of the kind that the name says"
    path.parent.mkdir(parents=True, exist_ok=True)
    df = pd.DataFrame(rows)
    if path.suffix == '.parquet': df.to_parquet(path)
    elif path.suffix in ('.csv', '.tsv'): df.to_csv(path, index=False, sep=',' if path.suffix == '.csv' else '\t')
    elif path.suffix == '.jsonl': path.write_text('\n'.join(map(json.dumps, rows)))
    else: path.write_text(json.dumps(rows))
    return path

def paint(path, shade, size=(8, 8), mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode or ('RGB' if isinstance(shade, tuple) else 'L'), size, shade).save(path)

def told(capsys): return capsys.readouterr().err

@pytest.mark.parametrize('ending', ['parquet', 'csv', 'tsv', 'jsonl', 'json'])
def test_a_table_of_any_kind_gives_the_same_rows(ending, tmp_path, capsys):
    found = m.labelled(write(tmp_path/f'x.{ending}', ROWS), seed=3)
    assert (found.kind, found.input, found.target, found.names, found.judge) == ('text', 'text', 'label', ['minus', 'plus'], 'held-out')
    assert 'no validation split: 3 of 30 rows are held out (their share of each class, seed 3)' in told(capsys)
    rows = sorted((o['text'], found.names[o['label']]) for ds in found.dd.values() for o in ds)
    assert rows == sorted((o['text'], o['label']) for o in ROWS)
    assert found.dd['held-out']['label'][:].count(0) == 1

def test_what_is_held_out_depends_on_the_seed_alone(tmp_path, capsys):
    path = write(tmp_path/'x.csv', ROWS)
    one,two,other = (m.labelled(path, seed=s).dd['held-out']['text'][:] for s in (1, 1, 2))
    assert one == two != other

@pytest.mark.parametrize('names', [('train.csv', 'test.csv'), ('train-00000-of-00001.csv', 'validation-00000-of-00001.csv'), ('data/my_train.csv', 'data/my_dev.csv'),
                                   ('train/x.csv', 'val/x.csv')])
def test_a_folder_tells_its_splits_by_name(names, tmp_path, capsys):
    for name,rows in zip(names, (ROWS[:20], ROWS[20:]), strict=True): write(tmp_path/name, rows)
    found = m.labelled(tmp_path)
    assert found.judge in ('test', 'validation') and [len(ds) for ds in found.dd.values()] == [20, 10] and not told(capsys)

def test_several_files_of_a_split_are_one_and_validation_comes_before_test(tmp_path, capsys):
    for i in range(3): write(tmp_path/f'train-{i}.jsonl', ROWS[10*i:10*i+10])
    for name in ('test', 'validation'): write(tmp_path/f'{name}.jsonl', ROWS[:4])
    found = m.labelled(tmp_path)
    assert len(found.dd['train']) == 30 and found.judge == 'validation'

def test_categories_classes_numbers_and_truth_become_classes(tmp_path, capsys):
    df = pd.DataFrame(ROWS)
    df['label'] = df.label.astype('category')
    df.to_parquet(tmp_path/'category.parquet')
    assert m.labelled(tmp_path/'category.parquet').names == ['minus', 'plus']
    numbers = [dict(row, label=[10, 9, 100][i%3]) for i,row in enumerate(ROWS)]
    assert m.labelled(write(tmp_path/'n.csv', numbers)).names == ['9', '10', '100']
    assert m.labelled(write(tmp_path/'t.jsonl', [dict(row, label=i%3 == 0) for i,row in enumerate(ROWS)])).names == ['False', 'True']
    features = hf.Features(text=hf.Value('string'), label=hf.ClassLabel(names=['up', 'down']))
    hf.Dataset.from_list([dict(text=o['text'], label=i%2) for i,o in enumerate(ROWS)], features=features).to_parquet(tmp_path/'c.parquet')
    assert m.labelled(tmp_path/'c.parquet').names == ['up', 'down']

def test_what_save_to_disk_wrote(tmp_path, capsys):
    hf.DatasetDict(train=hf.Dataset.from_list(ROWS), test=hf.Dataset.from_list(ROWS[:4])).save_to_disk(tmp_path/'kept')
    assert m.labelled(tmp_path/'kept').judge == 'test'

# ---- images

@pytest.fixture
def shades(tmp_path):
    "Pictures of two classes, sorted"
    for split,n in dict(train=10, test=4).items():
        for i in range(n):
            for name,shade in dict(dark=20, light=220).items(): paint(tmp_path/'shades'/split/name/f'{i}.png', shade+i)
    return tmp_path/'shades'

def test_pictures_sorted_into_folders(shades, capsys):
    found = m.labelled(shades)
    assert (found.kind, found.names, found.judge, len(found.dd['train'])) == ('image', ['dark', 'light'], 'test', 20)
    assert [(np.asarray(o['image'])[0,0] > 100) == (found.names[o['label']] == 'light') for o in found.dd['test']] == [True]*8
    alone = m.labelled(shades/'train')
    assert alone.judge == 'held-out' and len(alone.dd['held-out']) == 2 and sum(alone.dd['held-out']['label']) == 1

def test_a_table_that_names_its_pictures(shades, tmp_path, capsys):
    rows = [dict(file_name=f'{name}/{i}.png', kind=name) for i in range(10) for name in ('dark', 'light')]
    write(shades/'train'/'metadata.csv', rows)
    found = m.labelled(shades/'train'/'metadata.csv')
    assert (found.kind, found.input, found.target) == ('image', 'file_name', 'kind') and found.dd['train'][0]['image'].size == (8, 8)
    assert m.labelled(shades/'train').input == 'file_name'                     # the table in the folder comes first

def test_pictures_in_parquet_of_any_size_and_mode(tmp_path, capsys):
    sizes,gen = [(28, 28)]*6 + [(40, 28), (28, 60), (9, 9)],np.random.default_rng(0)
    ims = [gen.integers(0, 256, s, dtype=np.uint8) for s in sizes] + [gen.integers(0, 256, (28, 28, 3), dtype=np.uint8)]
    features = hf.Features(picture=hf.Image(), what=hf.ClassLabel(names=['a', 'b']))
    for split in ('train', 'test'): hf.Dataset.from_dict(dict(picture=ims, what=[0, 1]*5), features=features).to_parquet(tmp_path/f'{split}.parquet')
    found = m.labelled(tmp_path)
    frame = m.frame_of(found.dd)
    assert 'images of 9×9 to 60×40 are brought into squares of 28×28; --size takes another side' in told(capsys)
    assert (found.input, found.target, frame) == ('picture', 'what', m.Frame(28, 'RGB'))
    dls = DataLoaders.from_dd(m.framed(found.dd, frame), bs=4, size=frame.size)
    x = dls.valid.ds.columns['image']
    assert x.shape == (10, 3, 28, 28) and torch.equal(x[0], torch.from_numpy(ims[0])[None].expand(3, -1, -1))
    assert not x[6, :, :, :4].any() and not x[7, :, :7].any()               # black beside what is too narrow: nothing is cut off
    assert x[6, :, :, 4:24].float().mean() > 100

def test_a_side_that_nobody_asked_for(tmp_path):
    def of(*sizes):
        ims = [PIL.Image.new('L', s) for s in sizes]
        return m.frame_of(dict(train=hf.Dataset.from_dict(dict(image=ims), features=hf.Features(image=hf.Image()))))
    assert of((20, 30), (30, 20), (50, 50)) == (20, 'L') and of((500, 400)) == (128, 'L')

# ---- the Hub

class FakeHub(BaseHTTPRequestHandler):
    "As much of the Hub as `load_dataset` asks for: one data set, of two files"
    files,asked,sha = {},[],'1'*40
    def log_message(self, *args): pass

    def answer(self, body=b'', code=200, **headers):
        self.send_response(code)
        for k,v in {'Content-Length': len(body), **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.split('?')[0]
        listed = [dict(type='file', path=k, rfilename=k, size=len(v), oid=f'{i:040x}') for i,(k,v) in enumerate(self.files.items())]
        name = path.split(f'/resolve/{self.sha}/')[-1]
        if path == '/': self.answer(b'here')
        elif '/tree/' in path: self.answer(json.dumps(listed if path.endswith(self.sha) else []).encode())
        elif path.startswith('/api/datasets/owner/talk'):
            self.answer(json.dumps(dict(id='owner/talk', sha=self.sha, siblings=listed, private=False, tags=[])).encode())
        elif name in self.files: self.answer(self.files[name], ETag=f'"{name}"', X_Repo_Commit=self.sha)
        else: self.answer(b'{"error": "not found"}', 404, X_Error_Code='EntryNotFound' if 'talk' in path else 'RepoNotFound')
    do_HEAD = do_GET

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['paths']
        found = [dict(type='file', path=k, size=len(self.files[k]), oid='0'*40) for k in wanted if k in self.files]
        self.answer(json.dumps(found).encode())

HUB = """
import sys, time
from miniai.tables import labelled
for name in sys.argv[1:]:
    began = time.perf_counter()
    try:
        found = labelled(name)
        print(found.names, {k: len(v) for k,v in found.dd.items()}, flush=True)
    except (OSError, ValueError) as e: print(type(e).__name__, e)
    print(time.perf_counter() - began, flush=True)
"""

@pytest.fixture
def hub(tmp_path):
    "A Hub on this machine, and what a process says that asks it"
    FakeHub.files = {f'{k}.csv': '\n'.join(['text,label', *(f'"{o["text"]}",{o["label"]}' for o in rows)]).encode() for k,rows in dict(train=ROWS[:20], test=ROWS[20:]).items()}
    server = ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    def ask(*names, port=server.server_port):
        env = {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{port}', 'HF_HOME': str(tmp_path/'hf'), 'HF_HUB_OFFLINE': '0', 'PYTHONPATH': str(ROOT), 'HF_HUB_DISABLE_XET': '1'}
        done = subprocess.run([sys.executable, '-c', HUB, *names], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        return list(zip(lines[::2], map(float, lines[1::2]), strict=True))
    yield ask
    server.shutdown()
    server.server_close()

def test_a_name_is_looked_up_at_home_and_then_on_the_hub(hub):
    (said, _),(unknown, _) = hub('owner/talk', 'owner/other')
    assert said == "['minus', 'plus'] {'train': 20, 'test': 10}" and any('talk' in o for o in FakeHub.asked)
    assert unknown.startswith('ValueError owner/other cannot be loaded from the Hub: ')
    FakeHub.asked.clear()
    (again, _),(far, seconds) = hub('owner/talk', 'owner/other', port=9)           # where nobody answers
    assert again == said and not FakeHub.asked
    assert far.startswith("ConnectionError owner/other is not in Hugging Face's cache (") and 'http://127.0.0.1:9 cannot be reached' in far and seconds < 10

def test_without_a_network_nobody_is_asked():
    with pytest.raises(ConnectionError, match="owner/other is not in Hugging Face's cache .*, and HF_HUB_OFFLINE is set"): m.from_hub('owner/other')

# ---- what is wrong

@pytest.mark.parametrize('make, kwargs, said', [
    (lambda t: write(t/'x.csv', ROWS), dict(target='labl'), '--target labl: there is no such column; did you mean label?'),
    (lambda t: write(t/'x.csv', ROWS), dict(input='words'), '--input words: there is no such column; there are text, label'),
    (lambda t: write(t/'x.csv', [dict(a='b', c='d')]*4), {}, 'which column is the target? there are a (string), c (string); say --target NAME'),
    (lambda t: write(t/'x.jsonl', [dict(text='a', score=.5)]*4), {}, 'no column is the target: there are text (string), score (float64); say --target NAME'),
    (lambda t: write(t/'x.jsonl', [dict(text='a', score=.5)]*4), dict(target='score'), 'score is Value(\'float64\'): a class is a word or a whole number'),
    (lambda t: write(t/'x.csv', [dict(number=i, label=i%2) for i in range(9)]), dict(target='label'), 'no column is the input: there are number (int64), label (int64)'),
    (lambda t: write(t/'x.csv', [dict(number=i, label=i%2) for i in range(9)]), dict(input='number'), "--input number is Value('int64'), neither images nor text"),
    (lambda t: write(t/'x.csv', [dict(o, label='plus') for o in ROWS]), {}, 'label: all 30 rows are plus; there is nothing to learn with one class only'),
    (lambda t: write(t/'x.csv', [dict(o, label=o['text']) for o in ROWS]), {}, 'label has 30 different values in 30 rows: those are no classes'),
    (lambda t: write(t/'x.csv', [*ROWS[:4], dict(text='a', label=None), *ROWS]), {}, 'label: nothing in 1 of 35 rows, first in row 4'),
    (lambda t: write(t/'x.csv', []), {}, 'x.csv cannot be read as csv'),
    (lambda t: (t/'x.json').write_text('{"a": 1') and t/'x.json', {}, 'x.json cannot be read as json'),
    (lambda t: (t/'x.json').write_text('[{"a": 1}, 2]') and t/'x.json', {}, 'x.json cannot be read as json'),
    (lambda t: (t/'x.csv').write_text('a,b\n1,2,3\n') and t/'x.csv', {}, 'x.csv cannot be read as csv'),
    (lambda t: (t/'x.txt').write_text('a') and t/'x.txt', {}, 'x.txt: a file of data ends in .parquet, .csv, .tsv, .jsonl, .json'),
    (lambda t: t/'no'/'where'/'far', {}, 'there is no folder or file'),
    (lambda t: t, {}, 'holds no data set'),
    (lambda t: (write(t/'test.csv', ROWS), t)[1], {}, 'nothing in it is called train, only test'),
    (lambda t: (write(t/'train.csv', ROWS), write(t/'rest.csv', ROWS), t)[-1], {}, 'which split is rest.csv? Others are train'),
    (lambda t: (write(t/'train.csv', ROWS), write(t/'test.csv', [dict(ROWS[0], label='zero')]), t)[-1], {}, "label: 'zero' in row 0 of test is none of the classes: minus, plus"),
    (lambda t: (write(t/'train.csv', ROWS), write(t/'test.csv', [dict(text='a', lable='plus')]), t)[-1], {}, 'split test has no column label; did you mean lable?'),
    (lambda t: (write(t/'train-1.csv', ROWS), write(t/'train-2.csv', ONLY), t)[-1], {}, 'train-2.csv has the columns id, text, label, train-1.csv has text, label'),
])
def test_a_mistake_is_told_with_the_facts(make, kwargs, said, tmp_path):
    with pytest.raises((ValueError, OSError)) as e: m.labelled(make(tmp_path), **kwargs)
    assert said in str(e.value)

def test_mistakes_with_pictures(shades, tmp_path):
    (shades/'train'/'void').mkdir()
    with pytest.raises(ValueError, match='class void is empty: no .png'): m.labelled(shades)
    (shades/'train'/'void').rmdir()
    (shades/'test'/'lite').mkdir()
    paint(shades/'test'/'lite'/'0.png', 3)
    with pytest.raises(ValueError, match='the training split has no class lite; did you mean light'): m.labelled(shades)
    (shades/'test'/'lite'/'0.png').rename(shades/'test'/'dark'/'x.png'); (shades/'test'/'lite').rmdir()
    (shades/'train'/'dark'/'3.png').write_bytes(b'no picture')
    found = m.labelled(shades)
    frame = m.frame_of(found.dd)
    with pytest.raises(ValueError, match='from_dd: split train, image: row 3 is no image that can be read'): DataLoaders.from_dd(m.framed(found.dd, frame), size=frame.size)
    (shades/'validation').mkdir(); (shades/'valid').mkdir()
    with pytest.raises(ValueError, match='valid and validation are both validation; put them together'): m.labelled(shades)

def test_a_class_that_nobody_shows_is_said(tmp_path, capsys):
    features = hf.Features(text=hf.Value('string'), label=hf.ClassLabel(names=['up', 'down', 'never']))
    hf.Dataset.from_list([dict(text='a', label=i%2) for i in range(20)], features=features).to_parquet(tmp_path/'c.parquet')
    m.labelled(tmp_path/'c.parquet')
    assert 'label: no row to learn from for never' in told(capsys)

def test_large_tables_take_no_time(tmp_path, capsys):
    path = write(tmp_path/'x.parquet', ROWS*2000)
    began = time.perf_counter()
    m.labelled(path)
    assert time.perf_counter() - began < 3
