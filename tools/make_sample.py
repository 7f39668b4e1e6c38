"""Make the sample that the package ships: the first images of each class of Fashion-MNIST, in the Hub's Parquet layout.

    python tools/make_sample.py [FOLDER]      FOLDER holds the four IDX files; default: Debian's package

The same files in give the same files out, as long as zlib and pyarrow stay what they are."""
import sys
from pathlib import Path
import numpy as np, pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from miniai.fashion import DEBIAN, FASHION, SAMPLE, _idx_pair, _to_hf

PER_CLASS = dict(train=400, test=100)

def first_of_each(y, n):
    "Rows of the first `n` of each class, in the order of the file"
    return np.sort(np.concatenate([np.flatnonzero(y == c)[:n] for c in range(len(FASHION))]))

def main(folder=DEBIAN):
    for split, stem in (('train', 'train'), ('test', 't10k')):
        x, y = _idx_pair(Path(folder), stem)
        rows = first_of_each(y, PER_CLASS[split])
        path = SAMPLE/f'{split}.parquet'
        pq.write_table(_to_hf(x[rows], y[rows]).data.table, path, compression='zstd', write_page_checksum=True)
        print(f'{path}: {len(rows):,} images, {path.stat().st_size:,} bytes')

if __name__ == '__main__': main(*sys.argv[1:])
