"The command as a shell sees it: what it writes, says and returns, for good input and bad."
import fcntl, json, os, pty, shutil, signal, struct, subprocess, sys, termios, time
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace
import pytest
from PIL import Image

ENV = {**os.environ, 'HF_HUB_OFFLINE': '1', 'COLUMNS': '100'}
FILES = ['config.json', 'confusion.png', 'curves.png', 'examples', 'log.jsonl', 'model.safetensors', 'predictions.png']

def files(run):
    "What is in a run's folder, beside its checkpoints"
    return sorted(p.name for p in run.iterdir() if not p.name.startswith('checkpoint-'))

def miniai(*argv, cwd, **kw):
    return subprocess.run([sys.executable, '-m', 'miniai', *map(str, argv)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300, **kw)

def log(run): return [json.loads(line) for line in (run/'log.jsonl').read_text().splitlines()]

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Two runs with the same seed, one with another"
    cwd = tmp_path_factory.mktemp('runs')
    for out, seed in (('a', 1), ('b', 1), ('c', 2)):
        done = miniai('train', '--epochs', 1, '--model', 'mlp', '--data', 'sample', '--out', out, '--seed', seed, cwd=cwd)
        assert done.returncode == 0, done.stderr
    (cwd/'odd.json').write_text('{"epoch": 3}')
    (cwd/'many.json').write_text('{"epochs": "many"}')
    return cwd, done

def test_a_run_folder_has_everything(trained):
    cwd, done = trained
    assert files(cwd/'a') == FILES and sorted(p.name for p in (cwd/'a').glob('checkpoint-*')) == ['checkpoint-0', 'checkpoint-32']
    for name in ('curves', 'predictions', 'confusion'):
        im = Image.open(cwd/'a'/f'{name}.png').convert('L')
        assert im.width > 400 and len(set(im.resize((50, 50)).tobytes())) > 10          # a picture with something in it
    config = json.loads((cwd/'a/config.json').read_text())
    assert (config['model'], config['epochs'], config['seed'], len(config['names'])) == ('mlp', 1, 1, 10)

def test_outside_a_terminal_there_is_one_quiet_row_an_epoch(trained):
    lines = trained[1].stdout.splitlines()
    assert lines[0].startswith('fast=auto: ')
    assert lines[1].split() == ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy'] and len(lines[2].split()) == 5
    assert '\r' not in trained[1].stdout and 'of 1,000 test images are right' in trained[1].stdout and 'miniai predict c' in trained[1].stdout

def test_same_seed_same_numbers(trained):
    a, b, c = (log(trained[0]/o) for o in 'abc')
    for rows in (a, b, c):
        for row in rows: assert row.pop('seconds') > 0
    assert a == b != c
    assert (trained[0]/'a/model.safetensors').read_bytes() == (trained[0]/'b/model.safetensors').read_bytes()

def test_predict_reads_a_run_back(trained):
    cwd, _ = trained
    done = miniai('predict', 'a', 'a/examples/trouser.png', 'a/examples/ankle-boot.png', cwd=cwd)
    first, second = done.stdout.splitlines()
    assert done.returncode == 0 and first.startswith('a/examples/trouser.png: Trouser ') and second.startswith('a/examples/ankle-boot.png: ')

def test_predict_takes_images_of_any_size_colour_and_background(trained):
    cwd, _ = trained
    trouser = Image.open(cwd/'a/examples/trouser.png')
    big = trouser.resize((300, 300))
    variants = dict(rgb=big.convert('RGB'), palette=big.convert('P'), light=Image.eval(big, lambda v: 255-v),
                    glass=Image.merge('LA', (Image.eval(big, lambda v: 255-v), big.point(lambda v: 255 if v > 20 else 0))))
    for name, im in variants.items(): im.save(cwd/f'{name}.png')
    done = miniai('predict', 'a', *[f'{name}.png' for name in variants], cwd=cwd)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(': Trouser ' in line for line in lines), done.stdout + done.stderr
    assert ['inverted' in line for line in lines] == [False, False, True, True]

@pytest.mark.parametrize('line, said', [
    ('', 'usage: miniai COMMAND'),
    ('trian', 'there is no command trian; did you mean train?'),
    ('train --modle cnn', 'there is no --modle; did you mean --model?'),
    ('train --model cn', 'there is no model cn; did you mean cnn?'),
    ('train --epochs many', "invalid int value: 'many'"),
    ('train --epochs 0', '--epochs is a number from 1 up, it is 0'),
    ('train --bs 0', '--bs is a number of rows from 1 up, it is 0'),
    ('train --data sample --bs 4001', '--bs 4001 is more than the 4,000 training images; take one up to 4,000'),
    ('train --lr 0', '--lr is a step length above 0, it is 0.0'),
    ('train --lr nan', '--lr is a step length above 0, it is nan'),
    ('train --seed -1', '--seed is a whole number from 0 up, it is -1'),
    ('train --device gpu', 'device gpu is not to be had here'),
    ('train --data nowhere', 'there is no folder or file nowhere, and a data set on the Hub is called owner/name'),
    ('train --data sample --out a', 'a holds a run already; choose another --out, or go on with: miniai resume a'),
    ('train --opt adamv', '--opt adamv is not known; did you mean adamw?'),
    ('train --sched one-cicle', '--sched one-cicle is not known; did you mean one-cycle?'),
    ('train --amp bf61', '--amp bf61 is not known; did you mean bf16?'),
    ('train --ema 1', '--ema is the share of the average that a step leaves, between 0 and 1, it is 1.0'),
    ('train --workers -1', '--workers is a number of processes from 0 up, it is -1'),
    ('train --checkpoint -1', '--checkpoint is a number of batches from 0 up, it is -1'),
    ('train --config nowhere.json', 'there is no file nowhere.json'),
    ('train --config a/model.safetensors', 'a/model.safetensors is no JSON'),
    ('train --config odd.json', 'odd.json: there is no epoch; did you mean epochs?'),
    ('train --config many.json', "invalid int value: 'many'"),
    ('train --resume a --lr .2', '--lr: a run goes on as it began, with what a/config.json says; leave it out'),
    ('train --resume nowhere', 'nowhere is no run: it has no config.json; miniai train makes one'),
    ('resume nowhere', 'nowhere is no run: it has no config.json; miniai train makes one'),
    ('resume', 'the following arguments are required: run'),
    ('eval nowhere', 'nowhere is no finished run: it has no config.json; miniai train makes one'),
    ('train --data sample --out a/config.json/b', 'cannot write the run to a/config.json/b'),
    ('predict a', 'which images? for example: miniai predict a'),
    ('predict', 'the following arguments are required: run'),
    ('predict nowhere x.png', 'nowhere is no finished run: it has no config.json; miniai train makes one'),
    ('predict a nothing.png', 'there is no image nothing.png'),
    ('predict a a/config.json', 'a/config.json is not an image that can be read'),
])
def test_a_mistake_is_a_sentence_and_exit_code_2(trained, line, said):
    done = miniai(*line.split(), cwd=trained[0])
    assert said in done.stdout + done.stderr and 'Traceback' not in done.stderr
    assert done.returncode == (2 if line else 0)

def test_a_damaged_model_is_told(trained):
    cwd, _ = trained
    (cwd/'torn').mkdir()
    (cwd/'torn/config.json').write_bytes((cwd/'a/config.json').read_bytes())
    (cwd/'torn/model.safetensors').write_bytes((cwd/'a/model.safetensors').read_bytes()[:-100])
    done = miniai('predict', 'torn', 'a/examples/bag.png', cwd=cwd)
    assert done.returncode == 2 and 'torn/model.safetensors cannot be read' in done.stderr and 'Traceback' not in done.stderr

def test_help_explains_every_option(trained):
    done = miniai('train', '--help', cwd=trained[0])
    for flag in ('--epochs', '--bs', '--lr', '--model', '--data', '--seed', '--device', '--out'): assert flag in done.stdout
    assert 'for images cnn, mlp or timm:NAME, for texts bag or transformer; when not given, the first' in ' '.join(done.stdout.split())
    assert miniai('--version', cwd=trained[0]).stdout.startswith('miniai 0.')

def test_runs_are_numbered_and_never_written_over(tmp_path):
    for _ in range(2): assert miniai('train', '--epochs', 1, '--model', 'mlp', '--data', 'sample', cwd=tmp_path).returncode == 0
    assert sorted(p.name for p in (tmp_path/'runs').iterdir()) == ['mlp-1', 'mlp-2']

def in_terminal(*argv, cwd, until, send=None):
    "Run in a pseudo-terminal of 24 lines by 100 columns; press a key when `until` is seen; what was shown, and the exit code"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    p = subprocess.Popen([sys.executable, '-m', 'miniai', *map(str, argv)], cwd=cwd, env=ENV, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    shown, pressed, deadline = '', False, time.monotonic() + 120
    while time.monotonic() < deadline:
        try: piece = os.read(master, 4096)
        except OSError: break
        if not piece: break
        shown += piece.decode(errors='replace')
        if send and not pressed and until in shown: p.send_signal(send); pressed = True
    os.close(master)
    return shown, p.wait(60)

def test_a_terminal_gets_a_bar_with_loss_and_speed(tmp_path):
    shown, code = in_terminal('train', '--epochs', 1, '--data', 'sample', cwd=tmp_path, until='')
    assert code == 0 and 'epoch 1/1 train' in shown and 'loss ' in shown and ' rows/s' in shown and 'test images are right' in shown

def test_ctrl_c_in_mid_epoch_saves_what_is_trained_and_says_so(tmp_path):
    shown, code = in_terminal('train', '--epochs', 50, '--data', 'sample', '--out', 'r', cwd=tmp_path, until='epoch 2/50', send=signal.SIGINT)
    assert code == 130 and 'what was trained so far is saved' in shown and 'Traceback' not in shown
    assert files(tmp_path/'r') == FILES and 'miniai resume r' in shown
    assert 1 <= len(log(tmp_path/'r')) < 50
    assert miniai('predict', 'r', 'r/examples/bag.png', cwd=tmp_path).returncode == 0

def weights(run): return (run/'model.safetensors').read_bytes()

def timeless(run): return [{k: v for k,v in row.items() if k != 'seconds'} for row in log(run)]

ASKED = '--epochs 3 --model cnn --data sample --opt adamw --sched wsd --amp bf16 --ema .9 --checkpoint 5 --bs 256 --seed 3'.split()

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nobody disturbed"
    cwd = tmp_path_factory.mktemp('whole')
    done = miniai('train', *ASKED, '--out', 'whole', cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd/'whole'

def stopped(cwd, sig, when):
    "A run that a signal ends when there is the checkpoint `when`; what it said, and its exit code"
    p = subprocess.Popen([sys.executable, '-m', 'miniai', 'train', *ASKED, '--out', 'r'], cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (cwd/'r'/when).exists() and p.poll() is None and time.monotonic() < deadline: time.sleep(.002)
    p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    return out + err, p.returncode

def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(whole, tmp_path):
    said, code = stopped(tmp_path, signal.SIGTERM, 'checkpoint-5')
    assert code == 0 and 'SIGTERM: saved r/checkpoint-' in said and 'to go on: miniai resume r' in said and 'Traceback' not in said
    unfinished = miniai('predict', 'r', 'x.png', cwd=tmp_path)
    assert unfinished.returncode == 2 and 'it has no model.safetensors; miniai resume r goes on with it' in unfinished.stderr
    done = miniai('resume', 'r', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path/'r') == weights(whole) and timeless(tmp_path/'r') == timeless(whole)

def test_a_killed_run_goes_on_too(whole, tmp_path):
    _, code = stopped(tmp_path, signal.SIGKILL, 'checkpoint-20')
    assert code == -signal.SIGKILL
    done = miniai('train', '--resume', 'r', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path/'r') == weights(whole) and timeless(tmp_path/'r') == timeless(whole)

def test_a_finished_run_becomes_longer(trained, tmp_path):
    shutil.copytree(trained[0]/'a', tmp_path/'a')
    done = miniai('resume', 'a', '--epochs', 2, cwd=tmp_path)
    assert done.returncode == 0 and len(log(tmp_path/'a')) == 2 and json.loads((tmp_path/'a/config.json').read_text())['epochs'] == 2
    assert timeless(tmp_path/'a')[:1] == timeless(trained[0]/'a')

def test_a_config_is_passed_back_and_flags_come_first(trained, tmp_path):
    config = trained[0]/'a/config.json'
    assert miniai('train', '--config', config, '--out', 'same', cwd=tmp_path).returncode == 0
    assert weights(tmp_path/'same') == weights(trained[0]/'a') and json.loads((tmp_path/'same/config.json').read_text()) == json.loads(config.read_text())
    assert miniai('train', '--config', config, '--out', 'other', '--seed', 2, cwd=tmp_path).returncode == 0
    assert weights(tmp_path/'other') == weights(trained[0]/'c')

def test_eval_says_how_good_a_run_is(trained, whole):
    done = miniai('eval', 'a', cwd=trained[0])
    assert done.returncode == 0 and f"{log(trained[0]/'a')[-1]['valid_accuracy']:.2%} of 1,000 test images are right; loss " in done.stdout
    said = json.loads(miniai('eval', 'whole', '--json', cwd=whole.parent).stdout)
    assert said['images'] == 1000 and abs(said['valid_loss'] - log(whole)[-1]['valid_loss']) < .05       # the average was saved; half precision was not asked for
    said = json.loads(miniai('eval', 'a/checkpoint-32', '--json', cwd=trained[0]).stdout)
    assert said['valid_accuracy'] == log(trained[0]/'a')[-1]['valid_accuracy']

def test_a_program_gets_json_and_nobody_gets_nothing(tmp_path):
    done = miniai('train', '--epochs', 1, '--model', 'mlp', '--data', 'sample', '--out', 'r', '--json', cwd=tmp_path)
    said = json.loads(done.stdout)
    assert (said['run'], said['interrupted'], said['epochs']) == ('r', False, log(tmp_path/'r')) and .5 < said['accuracy'] < 1
    assert miniai('train', '--epochs', 1, '--model', 'mlp', '--data', 'sample', '--out', 'q', '--quiet', cwd=tmp_path).stdout == ''
    lines = [json.loads(line) for line in miniai('predict', 'r', 'r/examples/bag.png', 'r/examples/coat.png', '--json', cwd=tmp_path).stdout.splitlines()]
    assert [line['image'] for line in lines] == ['r/examples/bag.png', 'r/examples/coat.png'] and all(0 < p <= 1 for line in lines for p in line['said'].values())

def test_ctrl_c_before_training_leaves_quietly(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', 'import miniai.cli, os, signal\n'
        'miniai.cli.run_folder = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n'
        'raise SystemExit(miniai.cli.main(["train", "--data", "sample"]))'], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True)
    assert 'miniai: stopped' in p.communicate(timeout=60)[1] and p.returncode == 130

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_write_permission_is_told(tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    done = miniai('train', '--data', 'sample', '--out', 'locked/r', cwd=tmp_path)
    assert done.returncode == 2 and 'cannot write the run to locked/r: Permission denied' in done.stderr

@pytest.fixture(scope='module')
def odd_data(tmp_path_factory):
    "Folders with data that is wrong in one way each, as a user may have made them"
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image as HFImage
    from miniai.fashion import FASHION
    root = tmp_path_factory.mktemp('data')
    features = Features(image=HFImage(), label=ClassLabel(names=FASHION))
    good = dict(image=[np.full((28, 28), 7, np.uint8)]*20, label=list(range(10))*2)
    bad = {'empty': dict(image=[], label=[]), 'labels': dict(good, label=[-1]*20)}
    for name, rows in bad.items():
        (root/name).mkdir()
        Dataset.from_dict(rows, features=features).to_parquet(root/name/'train.parquet')
        Dataset.from_dict(good, features=features).to_parquet(root/name/'test.parquet')
    (root/'torn').mkdir()
    for stem, part in (('train', 'images-idx3'), ('train', 'labels-idx1'), ('t10k', 'images-idx3'), ('t10k', 'labels-idx1')):
        (root/'torn'/f'{stem}-{part}-ubyte').write_bytes(bytes.fromhex('00000801 00000014') + bytes(7))
    return root

@pytest.mark.parametrize('name, said', [
    ('empty', 'split train has no rows'),
    ('labels', 'label: -1 in row 0 is no class: there are names for 0 to 9'),
    ('torn', '20 of uint8 is 20 bytes, but 7 are there'),
])
def test_data_that_cannot_be_trained_on_is_told(odd_data, tmp_path, name, said):
    done = miniai('train', '--data', odd_data/name, '--out', 'r', cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path/'r').exists()

# ---- data of any kind

def inside(*argv, cwd, input=''):
    "As `miniai`, but in this process, which has everything imported already"
    from miniai.cli import main
    out,err,stdin = StringIO(),StringIO(),sys.stdin
    sys.stdin = StringIO(input)
    try:
        with chdir(cwd), redirect_stdout(out), redirect_stderr(err): code = main([str(o) for o in argv])
    except SystemExit as e: code = e.code
    finally: sys.stdin = stdin
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

@pytest.fixture(scope='module')
def field(tmp_path_factory):
    "A table of sentences and a folder of pictures; a run on each, the first with all that may be said"
    import random
    cwd = tmp_path_factory.mktemp('field')
    words,chance = dict(weather='sunny cloudy rainy windy'.split(), food='bread cheese apple soup'.split()), random.Random(1)
    rows = [(f'we had {chance.choice(words[k])} and "more", today', k) for _ in range(60) for k in words]
    (cwd/'talk.jsonl').write_text('\n'.join(json.dumps(dict(said=a, about=b)) for a,b in rows))
    for i in range(20):
        for name, shade in dict(dark=(90, 10, 10), light=(10, 200, 250)).items():
            path = cwd/'shades'/'train'/name/f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (30 + i%3, 26), shade).save(path)
    text = inside('train', '--data', 'talk.jsonl', '--target', 'about', '--model', 'transformer', '--length', 12, '--epochs', 2, '--bs', 8, '--lr', .003, '--out', 'talk', cwd=cwd)
    image = inside('train', '--data', 'shades', '--epochs', 1, '--bs', 4, '--size', 20, '--fast', 'exact', '--out', 'look', cwd=cwd)
    assert text.returncode == image.returncode == 0, text.stderr + image.stderr
    return cwd, text, image

def test_a_run_on_texts_has_everything(field):
    cwd, done, _ = field
    assert files(cwd/'talk') == ['config.json', 'confusion.png', 'curves.png', 'examples.txt', 'log.jsonl', 'model.safetensors', 'predictions.txt', 'vocab.json']
    config = json.loads((cwd/'talk/config.json').read_text())
    assert {k: config[k] for k in ('kind', 'input', 'target', 'model', 'opt', 'length', 'names')} == dict(
        kind='text', input='said', target='about', model='transformer', opt='adamw', length=12, names=['food', 'weather'])
    assert 'rows are held out' in done.stderr and 'of 12 held-out texts are right' in done.stdout
    assert 'miniai predict talk - < talk/examples.txt' in done.stdout and 'miniai train --data talk.jsonl --input said --target about --model bag' in done.stdout
    assert (cwd/'talk/predictions.txt').read_text().splitlines()[0].split() == ['said', 'is']

def test_texts_are_predicted_from_words_and_from_standard_input(field):
    cwd, *_ = field
    done = inside('predict', 'talk', 'some soup, and bread', 'a rainy and windy day', '¿qué?', cwd=cwd)
    lines = done.stdout.splitlines()
    assert lines[0].startswith('some soup, and bread: food ') and lines[1].startswith('a rainy and windy day: weather ') and lines[2].endswith('[no word of it is known]')
    done = inside('predict', 'talk', '-', '--json', cwd=cwd, input='cheese\n\ncloudy\n')
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [o['text'] for o in said] == ['cheese', 'cloudy'] and [max(o['said'], key=o['said'].get) for o in said] == ['food', 'weather']

def test_a_run_on_pictures_in_colour_and_of_any_size(field):
    cwd, done, _ = field
    config = json.loads((cwd/'look/config.json').read_text())
    assert {k: config[k] for k in ('kind', 'c_in', 'size', 'model', 'opt')} == dict(kind='image', c_in=3, size=20, model='cnn', opt='sgd')
    assert files(cwd/'look') == FILES and Image.open(cwd/'look/examples/light.png').size == (20, 20)
    assert inside('predict', 'look', 'shades/train/light/3.png', cwd=cwd).stdout.startswith('shades/train/light/3.png: light ')

def test_eval_on_the_same_rows_and_on_others(field):
    cwd, *_ = field
    for run in ('talk', 'look'):
        said = json.loads(inside('eval', run, '--json', cwd=cwd).stdout)
        assert said['valid_loss'] == pytest.approx(log(cwd/run)[-1]['valid_loss'], rel=1e-5)
    (cwd/'new.csv').write_text('what,kind\nhot soup,food\nwindy,weather\nbread,food\n')
    done = inside('eval', 'talk', '--data', 'new.csv', '--input', 'what', '--target', 'kind', cwd=cwd)
    assert done.stdout.startswith('100.00% of 3 texts are right') and 'held out' not in done.stderr
    (cwd/'odd.csv').write_text('said,about\nhot soup,drink\n')
    done = inside('eval', 'talk', '--data', 'odd.csv', cwd=cwd)
    assert done.returncode == 2 and "about: 'drink' in row 0 of train is none of the classes: food, weather" in done.stderr

def test_a_run_on_texts_goes_on_and_its_config_is_passed_back(field, tmp_path):
    cwd, *_ = field
    shutil.copytree(cwd/'talk', tmp_path/'talk')
    for name in ('talk.jsonl', 'shades'): (tmp_path/name).symlink_to(cwd/name)
    shutil.rmtree(tmp_path/'talk'/'checkpoint-28')                              # as if it had been killed in the second epoch
    assert inside('resume', 'talk', cwd=tmp_path).returncode == 0 and weights(tmp_path/'talk') == weights(cwd/'talk')
    assert inside('train', '--config', 'talk/config.json', '--out', 'again', cwd=tmp_path).returncode == 0
    for name in ('config.json', 'vocab.json', 'model.safetensors'): assert (tmp_path/'again'/name).read_bytes() == (cwd/'talk'/name).read_bytes()
    (tmp_path/'talk.jsonl').unlink()
    (tmp_path/'talk.jsonl').write_text((cwd/'talk.jsonl').read_text().replace('sunny', 'snowy'))
    done = inside('resume', 'talk', '--epochs', 3, cwd=tmp_path)
    assert done.returncode == 2 and 'the data is not what talk was trained on: its words differ' in done.stderr

@pytest.mark.parametrize('line, said', [
    ('train --data talk.jsonl', 'which column is the target? there are said (string), about (string); say --target NAME'),
    ('train --data talk.jsonl --target abuot', '--target abuot: there is no such column; did you mean about?'),
    ('train --data talk.jsonl --target about --model cnn', '--model cnn is for images, and these are texts: take bag or transformer'),
    ('train --data shades --model bag', '--model bag is for texts, and these are images: take cnn or mlp'),
    ('train --data shades --size 0', '--size is a number of pixels from 1 up, it is 0'),
    ('train --data talk.jsonl --target about --length 0', '--length is a number of words from 1 up, it is 0'),
    ('train --data talk.jsonl --target about --bs 200', '--bs 200 is more than the 108 training texts'),
    ('train --data nobody/nothing', "nobody/nothing is not in Hugging Face's cache"),
    ('train --data shades --model timm:resnet18', '--model timm:resnet18 needs timm, which is not here: pip install "miniai-torch[timm]"'),
    ('lr-find --data shades --lo 1 --hi .1', '--lo 1.0 has to be above 0 and below --hi 0.1'),
    ('lr-find --data shades --mdoel cnn', 'there is no --mdoel; did you mean --model?'),
    ('predict talk', 'which texts? for example: miniai predict talk "words to judge"'),
    ('eval look --data talk.jsonl --input said --target about', 'about'),
])
def test_a_mistake_with_data_is_a_sentence_too(field, line, said):
    done = inside(*line.split(), cwd=field[0])
    assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr, done.stderr

def test_lr_find_suggests_draws_and_leaves_no_run(tmp_path):
    done = inside('lr-find', '--data', 'sample', '--model', 'mlp', '--steps', 40, '--out', 'x.png', '--json', cwd=tmp_path)
    said = json.loads(done.stdout)
    assert 1e-4 < said['lr'] < 1 and said['lr'] in said['lrs'] and len(said['lrs']) == len(said['losses']) <= 40
    assert [p.name for p in tmp_path.iterdir()] == ['x.png'] and Image.open(tmp_path/'x.png').width > 400
    (tmp_path/'c.json').write_text('{"data": "sample", "model": "mlp", "epochs": 9}')
    done = inside('lr-find', '--config', 'c.json', '--steps', 30, cwd=tmp_path)
    assert 'next:\n  miniai train --data sample --model mlp --lr ' in done.stdout and (tmp_path/'lr-find.png').exists()

# -- recipes and levers

@pytest.mark.parametrize(('words', 'said'), [
    ('--recipe fashion-fats', 'did you mean fashion-fast'), ('--recipe fashion-fast --lr .2', 'the recipe fashion-fast says what it is'),
    ('--fast turbo', '--fast turbo is not known'), ('--compile replai', 'did you mean replay')])
def test_levers_and_recipes_that_are_not_known(words, said, tmp_path):
    done = inside('train', *words.split(), '--data', 'sample', '--out', 'r', cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and not list(tmp_path.iterdir())

def test_a_recipe_that_is_interrupted_goes_on_as_a_program(tmp_path):
    "One process that does both epochs, and one that is told to stop after the first; steps are replayed in both"
    words = ('train', '--recipe', 'fashion-fast', '--data', 'sample', '--epochs', 2, '--compile', 'replay')
    done = miniai(*words, '--out', 'a', cwd=tmp_path)
    assert done.returncode == 0 and 'images of 20×20 in the first epoch; validation sees them as they are' in done.stdout
    config = json.loads((tmp_path/'a/config.json').read_text())
    assert (config['model'], config['bs'], config['amp'], config['opt'], config['fast']) == ('fastnet', 256, 'bf16', None, 'off')
    assert miniai(*words, '--out', 'b', cwd=tmp_path).returncode == 0
    last = max((tmp_path/'b').glob('checkpoint-*'), key=lambda p: int(p.name.split('-')[1]))
    shutil.rmtree(last)                                                                         # as if it had been killed in the second
    done = miniai('resume', 'b', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'a/model.safetensors').read_bytes() == (tmp_path/'b/model.safetensors').read_bytes()
