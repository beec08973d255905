"""FineWeb-Edu's sample of 10 billion tokens, educational pages of the web, or Parquet and JSONL files of your own.

    python -m data.fineweb_edu.prepare
    python -m data.fineweb_edu.prepare --source FOLDER --out_dir data/mine

The documents are in a column (or field) "text". If this is broken off, the same command goes on after the last whole
shard of 100 million tokens.
"""

import functools
import itertools
from pathlib import Path

from data import Parser, UserError, run_script
from data.dataset import CHUNK, SHARD_TOKENS, chunks_of, load_from_hub, write_shards
from data.tokenizer import TOKENIZERS

HUB_NAME, HUB_CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
HUB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


def hub_files():
    """The addresses of the sample's Parquet files, 2 GB each, which are read as they are needed."""
    builder = load_from_hub(HUB_NAME, "load_dataset_builder", name=HUB_CONFIG, revision=HUB_REVISION)
    return builder.config.data_files["train"]


def find_files(source):
    """The Parquet and JSONL files in the folder `source`, or itself; raises UserError if there are none."""
    source = Path(source)
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [path for path in paths if path.suffix in READERS and path.is_file()]
    if not files:
        raise UserError(f"cannot read {source}: it is no .parquet or .jsonl file, and no folder with any")
    return files


def read_files(list_files, position):
    """Yield chunks of rows, each with the number of its file and how far that is read, from `position` on."""
    files = list_files()
    first, done = position or (0, 0)
    for number, path in enumerate(files[first:], first):
        read = READERS[Path(path).suffix]
        for rows, reached in read(path, done):
            yield rows, (number, reached)
        done = 0


def read_parquet(path, done):
    """Yield chunks of rows and how many chunks were read, beginning after `done` of them."""
    import fsspec  # here, because prepared data needs none of it
    import pyarrow.parquet

    options = dict(pre_buffer=False, buffer_size=2**20)  # or it would hold whole groups of rows in memory
    try:
        with fsspec.open(path, block_size=2**25) as raw, pyarrow.parquet.ParquetFile(raw, **options) as file:
            chunks = file.iter_batches(CHUNK, columns=["text"], use_threads=False)
            for number, rows in enumerate(itertools.islice(chunks, done, None), done + 1):
                yield rows.to_pylist(), number
    except Exception as error:  # pyarrow, the hub's client and its HTTP library each raise their own
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error})") from error


def read_jsonl(path, done):
    """Yield chunks of lines and how many bytes were read, beginning after `done` of them."""
    with open(path, "rb") as file:
        file.seek(done)
        for lines in chunks_of(file):
            yield [line for line in lines if line.strip()], file.tell()


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl}


def prepare_text(directory, source="", tokenizer="gpt2", shard_tokens=SHARD_TOKENS, processes=None):
    """Write the data set into `directory` from the hub, or from `source`, a Parquet or JSONL file or a folder."""
    name, list_files, size = f"{HUB_NAME} {HUB_CONFIG} {HUB_REVISION}", hub_files, 0
    if source:
        files = find_files(source)
        name, list_files, size = str(Path(source).resolve()), lambda: files, sum(path.stat().st_size for path in files)
    read = functools.partial(read_files, list_files)
    write_shards(directory, read, tokenizer, name, size, shard_tokens, processes)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--source", default="", help="local .parquet or .jsonl file or folder, instead of the hub")
    parser.add_argument("--tokenizer", default="gpt2", choices=TOKENIZERS)
    parser.add_argument("--out_dir", default=Path(__file__).parent, help="where to write (default: beside this file)")
    args = parser.parse_args()
    prepare_text(args.out_dir, args.source, args.tokenizer)


if __name__ == "__main__":
    run_script(main)
