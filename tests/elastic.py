"""A script as `torchrun` starts it, in processes that are killed on the way.

    python -m torch.distributed.run --nproc-per-node 2 --max-restarts 3 tests/elastic.py FOLDER

In the first life process 1 is killed in mid-epoch on PyTorch's engine, in the second process 0 on the tape, in the third both runs come to
their end; then each is done once more without a break, and all that came out is written to FOLDER.  Started with `--once` it has one life."""
import os, sys
from pathlib import Path
import torch
from crew import InPredict, kill, learner
from miniai.callbacks import LogCB, MetricsCB, RecordCB
from miniai.checkpoint import CheckpointCB
from miniai.core import process_rank

LIFE = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))

def result(folder, *cbs, engine):
    learn = learner(MetricsCB(), RecordCB(), LogCB(folder/'log.jsonl'), CheckpointCB(folder, every=3), *cbs, engine=engine, run=folder)
    learn.fit(3, resume=True)
    rows = [{k: v for k,v in row.items() if k != 'seconds'} for row in learn.rows]
    return dict(learn.model.state_dict(), losses=learn.losses, rows=rows, steps=learn.steps)

if __name__ == '__main__':
    folder = Path(sys.argv[1])
    out = {}
    for life,(engine,rank) in enumerate([('torch', 1), ('tape', 0)]):
        out[engine] = result(folder/engine, *([InPredict(rank, kill)] if LIFE == life else []), engine=engine)
    for engine in ('torch', 'tape'): out[f'{engine}, whole'] = result(folder/f'{engine}-whole', engine=engine)
    if not process_rank(): torch.save(dict(out, lives=LIFE + 1), folder/'out.pt')
