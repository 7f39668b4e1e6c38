"Streams shared by several processes: every row once, nobody waits for ever, and a stopped run goes on in the middle of an epoch."
import faulthandler, glob, os, tempfile, warnings
from types import SimpleNamespace
import datasets, pytest, torch
from torch import distributed as dist, multiprocessing, nn
from torch.utils.data import DataLoader as TorchLoader, IterableDataset
from miniai.callbacks import MetricsCB, RecordCB
from miniai.checkpoint import CheckpointCB
from miniai.core import process_rank, set_seed
from miniai.distributed import DistributedCB, InStep, shared
from miniai.learner import Callback, Learner
from miniai.loader import DataLoader
from miniai.optim import AdamW
from miniai.training import AccumulateCB

LENGTHS = [5, 0, 9, 2, 13]
SHARDS = [list(range(100*i, 100*i + n)) for i,n in enumerate(LENGTHS)]
ROWS = sorted(sum(SHARDS, []))

def _one(rank, n, f, folder):
    os.environ |= dict(WORLD_SIZE=str(n), RANK=str(rank))
    warnings.simplefilter('ignore')
    faulthandler.dump_traceback_later(60, exit=True)         # who waits for ever says where
    dist.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=n)
    torch.save(f(), f'{folder}/{rank}')
    dist.destroy_process_group()

def together(n, f):
    "What `f()` returns in each of `n` processes"
    torch.set_num_threads(1)               # its threads do not survive being copied
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_one, (n, f, folder), nprocs=n, start_method='fork')
        return [torch.load(f'{folder}/{r}', weights_only=False) for r in range(n)]

def rows_of(files):
    for f in files: yield from ({'x': i} for i in f)

def hugging_face(shards=SHARDS): return datasets.IterableDataset.from_generator(rows_of, gen_kwargs={'files': shards})

FOLDER = tempfile.TemporaryDirectory()

def parquet():
    "As the Hub streams it"
    for i,rows in enumerate(SHARDS):
        path = f'{FOLDER.name}/{i}.parquet'
        if not os.path.exists(path): datasets.Dataset.from_dict({'x': rows}, features=datasets.Features(x=datasets.Value('int64'))).to_parquet(path)
    return datasets.load_dataset('parquet', data_files=sorted(glob.glob(f'{FOLDER.name}/*.parquet')), split='train', streaming=True)

class Files(IterableDataset):
    "A stream of our own that can be cut"
    def __init__(self, files): self.files,self.num_shards = files,len(files)
    def __iter__(self): return rows_of(self.files)
    def shard(self, num_shards, index, contiguous): return Files(self.files[index::num_shards])

class Whole(IterableDataset):
    "One that cannot"
    def __iter__(self): return rows_of(SHARDS)

STREAMS = {'hugging face': hugging_face, 'parquet': parquet, 'hugging face, even': lambda: hugging_face(SHARDS[:4]), 'few shards': lambda: hugging_face([ROWS]),
           'with a buffer': lambda: hugging_face().shuffle(seed=3, buffer_size=7), 'ours': lambda: Files(SHARDS), 'whole': Whole}
LOADERS = {'ours': lambda ds: DataLoader(ds, 7), 'shuffled': lambda ds: DataLoader(ds, 7, shuffle=True, buffer=21),
           'workers': lambda ds: DataLoader(ds, 7, shuffle=True, buffer=21, num_workers=2, context='fork'),
           'torch': lambda ds: TorchLoader(ds, 7)}

def seen(dl):
    "The rows of each batch of two epochs, nothing where it is spare"
    part,found = shared(dl, process_rank(), dist.get_world_size()),[]
    for epoch in range(2):
        part.set_epoch(epoch) if hasattr(part, 'set_epoch') else None
        own = part if isinstance(part, InStep) else part.batch_sampler
        found.append([[] if own.is_spare(epoch, k) else batch['x'].tolist() for k,batch in enumerate(part)])
    return found

@pytest.fixture(scope='module', params=(2, 6))
def sight(request):
    "{(stream, loader): what each process saw}, by one start of the processes"
    every = [(s, l) for s in STREAMS for l in LOADERS]
    found = together(request.param, lambda: [seen(LOADERS[l](STREAMS[s]())) for s,l in every])
    return request.param, {k: [process[i] for process in found] for i,k in enumerate(every)}

@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.parametrize('stream', STREAMS)
def test_every_row_once_and_as_many_batches_in_all_processes(stream, loader, sight):
    world,found = sight
    for epoch in zip(*found[stream, loader], strict=True):
        want = sorted(sum(SHARDS[:4], [])) if stream == 'hugging face, even' else ROWS
        assert len({len(batches) for batches in epoch}) == 1
        assert sorted(i for batches in epoch for rows in batches for i in rows) == want
        assert all(sum(map(len, parts)) <= 7 for parts in zip(*epoch, strict=True))

@pytest.mark.parametrize('loader', LOADERS)
def test_no_shard_is_read_twice_and_what_cannot_be_cut_has_the_batches_of_one_process(loader, sight):
    world,found = sight
    if world <= 5:
        for epoch in zip(*found['hugging face', loader], strict=True):
            read = [{i//100 for rows in batches for i in rows} for batches in epoch]
            assert sum(map(len, read)) == len(set.union(*read)) == 4         # one is empty
    alone = [sorted(batch['x'].tolist()) for batch in LOADERS[loader](Whole())]
    first = [epochs[0] for epochs in found['whole', loader]]
    assert [sorted(sum(parts, [])) for parts in zip(*first, strict=True)] == alone

def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match='2 processes cannot share a batch of 1; take bs from 2 up'): shared(DataLoader(Files(SHARDS), 1), 0, 2)
    with pytest.raises(ValueError, match='take batch_size from 2 up'): shared(TorchLoader(Whole(), 1), 0, 2)
    with pytest.raises(TypeError, match='has no batches of rows or items'): shared(TorchLoader(Whole(), None), 0, 2)

# ----------------------------------------------------------------------------------------------------------------------------------------
# training

def as_batch(batch):
    x = batch['x'].double()
    return torch.stack([x.sin(), x.cos(), (x/7).sin()], 1), (batch['x'] % 3 == 0).long()

def ready(rows): return as_batch({'x': torch.tensor([r['x'] for r in rows])})

def new_dls(stream, loader='ours'):
    if loader == 'torch': return SimpleNamespace(train=TorchLoader(stream(), 6, collate_fn=ready), valid=TorchLoader(stream(), 8, collate_fn=ready))
    return SimpleNamespace(train=DataLoader(stream(), 6, shuffle=True, buffer=18, transform=as_batch), valid=DataLoader(stream(), 8, transform=as_batch))

class Stop(Callback):
    "An end in training batch `n` of the run"
    order = 95
    def __init__(self, n): self.left = n
    def after_batch(self, learn):
        self.left -= learn.training
        if not self.left: raise InterruptedError

def train(dls, engine='torch', norm=False, cbs=(), **kw):
    set_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.ReLU(), nn.Dropout(.2 if norm else 0.), nn.Linear(16, 2)).double()
    learn = Learner(model, dls, lr=.01, opt_func=AdamW, engine=engine, cbs=[DistributedCB(), MetricsCB(), RecordCB(), *cbs])
    try: learn.fit(2, **kw)
    except InterruptedError: pass
    rows = [{k: v for k,v in row.items() if k != 'seconds'} for row in learn.rows]
    return torch.cat([p.detach().flatten() for p in [*model.parameters(), *model.buffers()]]), rows, learn.steps

def close(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-12)
    assert a[2] == b[2] and len(a[1]) == len(b[1])
    for x,y in zip(a[1], b[1], strict=True): assert x == pytest.approx(y, rel=1e-6)

def joined(parts):
    "The batches that several processes had, as those of one"
    def cat(batches): return tuple(torch.cat(o) for o in zip(*(b for b in batches if b is not None), strict=True))
    return [cat(batches) for batches in zip(*parts, strict=True)]

class Passes:
    "A loader of given batches for each epoch"
    def __init__(self, epochs): self.epochs,self.epoch = epochs,0
    def set_epoch(self, epoch): self.epoch = epoch
    def __iter__(self): return iter(self.epochs[self.epoch])

def parts_of(dl):
    part,found = shared(dl, process_rank(), dist.get_world_size()),[]
    for epoch in range(2):
        part.set_epoch(epoch)
        found.append([None if part.spare else batch for batch in part])
    return found

def test_training_on_a_stream_is_that_of_one_process_with_the_same_batches():
    def all():
        dls = new_dls(hugging_face)
        return [parts_of(dl) for dl in (dls.train, dls.valid)], [train(new_dls(s), e) for s in (hugging_face, Whole) for e in ('torch', 'tape')]
    found = together(2, all)
    alone = SimpleNamespace(**{k: Passes([joined([f[0][i][epoch] for f in found]) for epoch in range(2)]) for i,k in enumerate(('train', 'valid'))})
    cut,whole = train(alone),train(new_dls(Whole))
    for _,(a,b,c,d) in found:
        for got in (a, b): close(got, cut)
        for got in (c, d): close(got, whole)

CASES = [('ours', hugging_face, 1), ('ours', parquet, 4), ('ours', Whole, 3), ('torch', hugging_face, 4)]   # of nine or five batches

def whole_and_stopped(folder, loader, stream, n):
    "A run, and one that was stopped after `n` batches and went on"
    def run(*cbs, **kw): return train(new_dls(stream, loader), norm=True, cbs=cbs, **kw)
    run(CheckpointCB(folder, every=n), Stop(n))
    return run(), run(CheckpointCB(folder, every=n), resume=True)

def test_a_stopped_run_goes_on_in_the_middle_of_a_stream(tmp_path):
    def all(): return [whole_and_stopped(tmp_path/str(i), *case) for i,case in enumerate(CASES)]
    for process in together(2, all):
        for whole,stopped in process:
            torch.testing.assert_close(stopped[0], whole[0], rtol=0, atol=0)
            assert stopped[1:] == whole[1:]

def test_shards_go_on_with_as_many_processes_only_and_whole_streams_with_any_number(tmp_path):
    def kept(s): return [CheckpointCB(tmp_path/s.__name__, every=2), AccumulateCB(1)]
    def begin(): return [train(new_dls(s), cbs=[*kept(s), Stop(2)]) and None for s in (hugging_face, Whole)]
    together(2, begin)
    with pytest.raises(ValueError, match='the stream was shared by 2 processes'): train(new_dls(hugging_face), cbs=kept(hugging_face), resume=True)
    close(train(new_dls(Whole), cbs=kept(Whole), resume=True), train(new_dls(Whole)))
