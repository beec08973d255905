"""FineWeb-Edu's sample of 10 billion tokens, educational pages of the web, or a folder of files of your own.

    python -m data.fineweb_edu.prepare
    python -m data.fineweb_edu.prepare --source FOLDER --out_dir data/mine

A .parquet or .jsonl file has its documents in the column or field "text". A .txt file is one document, in UTF-8. If the
command is interrupted, the same command continues after the last complete shard of 100 million tokens.
"""

import functools
import itertools
from pathlib import Path

from data.dataset import source_files
from data.fineweb_edu.shards import SHARD_TOKENS, write_shards
from data.tokenizer import END_OF_TEXT, TOKENIZER_HELP
from data.write import CHUNK, chunked, load_from_hub, prepare_anew, read_utf8, report_spelled_out
from engine.settings import Parser, UserError, run_script

HUB_NAME, HUB_CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
HUB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


def hub_files():
    """List the addresses of the sample's Parquet files, 2 GB each. They are streamed, not downloaded."""
    builder = load_from_hub(HUB_NAME, "load_dataset_builder", name=HUB_CONFIG, revision=HUB_REVISION)
    return builder.config.data_files["train"]


def find_files(source):
    """List the files to read in a folder, or the one file `source`. Raises UserError if there are none."""
    source = Path(source)
    files = [path for path in source_files(source) if path.suffix in READERS and path.is_file()]
    if not files:
        raise UserError(f"cannot read {source}: it is no .parquet, .jsonl or .txt file, and no folder with any")
    return files


def read_files(list_files, position):
    """Yield (chunk of rows, position of the next chunk), from `position` on.

    A position is the index of a file and the reader's own position in it.
    """
    files = list_files()
    first, start = position or (0, 0)
    for index, path in enumerate(files[first:], first):
        read = READERS[Path(path).suffix]
        for rows, end in read(path, start):
            yield rows, (index, end)
        start = 0


def read_parquet(path, start):
    """Yield (chunk of rows, number of chunks read so far), without the first `start` chunks."""
    import fsspec  # here, because prepared data do not need it
    import pyarrow.parquet

    options = dict(pre_buffer=False, buffer_size=2**20)  # the defaults would hold whole row groups in memory
    try:
        with fsspec.open(path, block_size=2**25) as raw, pyarrow.parquet.ParquetFile(raw, **options) as file:
            chunks = file.iter_batches(CHUNK, columns=["text"], use_threads=False)
            for count, rows in enumerate(itertools.islice(chunks, start, None), start + 1):
                yield rows.to_pylist(), count
    except Exception as error:  # pyarrow, the hub's client and its HTTP library each raise their own
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error})") from error


def read_jsonl(path, start):
    """Yield (chunk of lines, number of bytes read so far), without the first `start` bytes."""
    with open(path, "rb") as file:
        file.seek(start)
        for lines in chunked(file):
            yield [line for line in lines if line.strip()], file.tell()


def read_txt(path, start):
    """Yield (a chunk of one row, 1): the file is one document. Yield nothing if it was read before (start is 1)."""
    if not start:
        text = read_utf8(path)
        report_spelled_out(path, text.count(END_OF_TEXT))
        yield [{"text": text}], 1


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


def prepare_text(directory, source="", tokenizer="gpt2", shard_tokens=SHARD_TOKENS, processes=None):
    """Write the data set to `directory`, from the hub or from `source`, a .parquet, .jsonl or .txt file or a folder."""
    name, list_files, size = f"{HUB_NAME} {HUB_CONFIG} {HUB_REVISION}", hub_files, 0
    if source:
        files = find_files(source)
        name, list_files, size = str(Path(source).resolve()), lambda: files, sum(path.stat().st_size for path in files)
    read = functools.partial(read_files, list_files)
    write_shards(directory, read, tokenizer, name, size, shard_tokens, processes)


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--source", default="", help="local folder, or .parquet, .jsonl or .txt file, instead of the hub"
    )
    parser.add_argument("--tokenizer", default="gpt2", help=TOKENIZER_HELP)
    parser.add_argument("--out_dir", default=Path(__file__).parent, help="where to write (default: beside this file)")
    args = parser.parse_args()
    prepare_anew(prepare_text, args.out_dir, args.source, tokenizer=args.tokenizer)


if __name__ == "__main__":
    run_script(main)
