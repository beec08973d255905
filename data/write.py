"""Write data sets: get texts or rows, tokenize them, and write the files that data/dataset.py reads.

Rows are tokenized on all cores, in memory that does not grow with the data. Files appear when they are complete, and
meta.json last.
"""

import codecs
import contextlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.dataset import WRITTEN, fingerprint, is_up_to_date, preparing, read_meta, token_dtype
from data.forms import SkippedRow
from data.tokenizer import END_OF_TEXT, TOKENIZER_HELP, get_tokenizer
from engine.files import atomic_write
from engine.settings import Parser, UserError

VAL_EVERY = 20  # of examples, of tiny's documents and of those in a first shard, every 20th is held out
CHUNK = 64  # rows that a process tokenizes at a time
PIECE = 2**20  # characters of a document that are tokenized at a time
PROGRESS = dict(disable=None, leave=False)  # a progress bar on a terminal only, and only while it runs

# ---------------------------------------------------------------------------------------------------
# Sources


def load_from_hub(path, load="load_dataset", **options):
    """Call datasets.load_dataset, or another of its functions. Raises UserError if the hub cannot be reached."""
    import datasets  # here, because it takes seconds to import and prepared data do not need it

    print(f"loading {path} from the hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report each of its retries
    try:
        return getattr(datasets, load)(path, **options)
    except Exception as error:  # the hub's client, its HTTP library and the operating system each raise their own
        raise UserError(
            f"{path} cannot be loaded from the hub ({type(error).__name__}); use a local file with --dataset NAME "
            "--source FILE, or --preset tiny, which needs no download"
        ) from error


def read_utf8(path):
    """Read a text file. Raises UserError if it cannot be read, or is not UTF-8."""
    return "".join(stream_utf8(path))


def stream_utf8(path, start=0, stop=math.inf):
    """Yield the text of a file from byte `start` to byte `stop` in blocks. Raises UserError as read_utf8() does."""
    decoder, position = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True), start
    try:
        with open(path, "rb") as file:
            if start:
                file.seek(start)
            while block := file.read(min(PIECE, stop - position)):
                position += len(block)
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {position - len(error.object) + error.start})") from error


def open_rows(hub_name, revision, source):
    """Open the JSONL file `source`, or else a data set on the hub -> rows, their number or None, the source's name.

    A file with one array of objects in place of lines is read into memory as a whole.
    """
    if not source:
        rows = load_from_hub(hub_name, split="train", revision=revision)
        return rows, len(rows), f"{hub_name} {revision}"

    def lines():
        with open(source, "rb") as file:
            yield from (line for line in file if line.strip())

    try:
        if Path(source).is_fifo():  # it can be read only once
            return lines(), None, str(Path(source).resolve())
        if next(lines(), b"").removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            rows = parse_row(Path(source).read_bytes())
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                return rows, len(rows), str(Path(source).resolve())
        total = sum(1 for _ in lines())
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    return lines(), total, str(Path(source).resolve())


def parse_row(row):
    """Parse a line of a JSONL file, None if it is not JSON. A row that is parsed already stays as it is."""
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row.decode("utf-8-sig"))  # json.loads alone would take some lines for UTF-16
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------------------
# Text


def write_dataset(directory, documents, tokenizer, source):
    """Tokenize {"train": [text, ...], "val": [text, ...]} into `directory`, one document after another.

    A document that may be larger than memory is an iterable of its pieces(). `source` is noted in meta.json: a local
    file as str(Path(file).resolve()), which the scripts compare with --source. Raises UserError if a split has no
    documents; the files of an earlier set are complete until those of this one are.
    """
    directory = Path(directory)
    encoding = get_tokenizer(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "tokens": {}, "crc32": {}, "source": source}
    meta["files"], spelled_out = fingerprint(source), 0
    with contextlib.ExitStack() as stack:
        for split, texts in documents.items():
            file, count, checksum = open_atomic(directory / f"{split}.bin", stack), 0, 0
            with tqdm(desc=f"tokenizing {split}", unit=" tokens", unit_scale=True, **PROGRESS) as bar:
                for text in texts:
                    for piece, is_last in mark_last([text] if isinstance(text, str) else text):
                        ids = encode(piece, is_last, encoding)
                        file.write(ids)
                        count, checksum = count + len(ids), zlib.crc32(ids, checksum)
                        spelled_out += piece.count(END_OF_TEXT)
                        bar.update(len(ids))
            if not count:
                raise UserError(f"{source} has no documents for {split}; give it more text")
            meta["tokens"][split], meta["crc32"][split] = count, checksum
        remove_text(directory)
    encoding.save(directory)
    write_meta(directory, meta)
    print(f"{directory}: {format_splits(meta['tokens'], 'tokens')} ({encoding.name} tokenizer)")
    report_spelled_out(source, spelled_out)


def report_spelled_out(source, count):
    """Report that a text has <|endoftext|> in it, which does not separate documents."""
    if count:
        print(
            f"{source}: {END_OF_TEXT} occurs {count:,} times and is spelled out as text. To separate documents, put "
            "each in a .txt file, or on a line of JSONL: python -m data.fineweb_edu.prepare --source FOLDER"
        )


def encode(text, is_last, encoding):
    """Encode the text of a document, or a piece of it -> ids (N,), after the last one with the token that ends it."""
    ids = encoding.encode_ordinary(text) + [encoding.encode_single_token(END_OF_TEXT)] * is_last
    return np.array(ids, token_dtype(encoding.n_vocab))


def mark_last(items):
    """Yield (item, whether it is the last one)."""
    items = iter(items)
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following is None
        item = following


def pieces(strings):
    """Yield a document, given as strings, in pieces of about PIECE characters that are encoded to the ids of the whole.

    The cuts are before a blank between two words: there, every tokenizer begins a word. A piece without such a place is
    cut before a blank or a line end that follows another character, as gpt2 and bytes allow. Only a piece without that
    is cut elsewhere, and may have one token more for it.
    """
    parts, length = [], 0
    for string in strings:
        parts.append(string)
        length += len(string)
        if length >= PIECE:
            text = "".join(parts)
            last_place = re.match(r"(?s).*\w(?= \w)", text) or re.match(r"(?s).*\S(?=[ \n])", text)
            cut = last_place.end() if last_place else len(text)
            yield text[:cut]
            parts, length = [text[cut:]], len(text) - cut
    if length:
        yield "".join(parts)


def remove_text(directory):
    """Remove meta.json, progress.json and the shards of an earlier text, which may have been more."""
    for path in [directory / "meta.json", directory / "progress.json", *written_files(directory, "train-*.bin")]:
        path.unlink(missing_ok=True)


def written_files(directory, pattern):
    """List the files that match a pattern and have a name that this project writes; others are the user's."""
    paths = [path for path in directory.glob(pattern) if WRITTEN.fullmatch(path.name)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def write_meta(directory, meta, name="meta.json"):
    with atomic_write(directory / name) as path:
        path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def format_splits(counts, unit):
    return ", ".join(f"{count:,} {unit} for {split}" for split, count in counts.items())


def format_report(report):
    return ", ".join(f"{count:,} {what}" for what, count in report.items())


# ---------------------------------------------------------------------------------------------------
# On all cores


def chunked(rows):
    """Yield lists of CHUNK rows; the last may be shorter."""
    rows = iter(rows)
    return iter(lambda: list(itertools.islice(rows, CHUNK)), [])


def parallel_map(function, chunks, *arguments, processes=None):
    """Yield function(chunk, *arguments) for every chunk, in order, computed by as many processes as there are cores.

    Only 4 chunks a process are read ahead. `function` is pickled, so it must be at the top level of a module.
    """
    processes, pending = processes or os.cpu_count(), deque()
    with ProcessPoolExecutor(processes, initializer=_end_with_parent) as pool:
        pool.submit(os.getpid).result()  # starts the processes before reading the chunks starts threads
        for chunk in chunks:
            pending.append(pool.submit(function, chunk, *arguments))
            if len(pending) > 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _end_with_parent():
    """Let the parent process alone handle Ctrl-C, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---------------------------------------------------------------------------------------------------
# Examples


def write_examples(directory, rows, tokenize, tokenizer, block_size, source, total=None, forms=()):
    """Tokenize rows into examples and write them to `directory`.

    tokenize(row, encoding, block_size) returns the rows of an example, [(ids, mask), ...], or raises SkippedRow. It is
    pickled, so it must be at the top level of a module. Ids beyond block_size are cut off. `total` is the number of
    rows, for the progress bar. Raises UserError if there are fewer than two examples, one for each split; its message
    names the `forms` that are read, if a row is malformed.
    """
    directory, encoding, report = Path(directory), get_tokenizer(tokenizer), Counter(rows=0, cut=0)
    files = fingerprint(source)
    directory.mkdir(parents=True, exist_ok=True)
    rows = iter(rows)
    first = list(itertools.islice(rows, 1))
    with contextlib.ExitStack() as stack:
        train, val = (_ExampleWriter(directory, split, stack) for split in ("train", "val"))
        chunks = parallel_map(_tokenize_chunk, chunked(itertools.chain(first, rows)), tokenize, tokenizer, block_size)
        results = itertools.chain.from_iterable(chunks)
        for example, is_cut, reason in tqdm(results, "tokenizing", total, unit=" rows", **PROGRESS):
            report.update(rows=1, cut=is_cut)
            if reason:
                report[reason] += 1
            else:
                (train if (train.examples + val.examples) % VAL_EVERY else val).add(example)
        if not train.examples:
            usable = f"{val.examples}; the least is 2 ({format_report(report)})"
            raise UserError(f"{source} has too few usable examples, {usable}{_forms_help(first, forms, report)}")
        (directory / "meta.json").unlink(missing_ok=True)  # until here the files of an earlier set stay complete
    encoding.save(directory)
    meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "block_size": block_size, "source": source}
    meta["files"] = files
    for count in ("examples", "tokens", "crc32"):
        meta[count] = {"train": getattr(train, count), "val": getattr(val, count)}
    write_meta(directory, meta | {"report": report})
    counts = format_splits(meta["examples"], "examples")
    print(f"{directory}: {counts} ({encoding.name} tokenizer); {format_report(report)}")


def _forms_help(first, forms, report):
    if not forms or not report["malformed"]:
        return ""
    row = parse_row(first[0])
    found = f"has the keys {', '.join(map(str, row))[:200]}" if isinstance(row, dict) else "is no JSON object"
    return f"; the first row {found}; the forms that are read have the keys {', or '.join(forms)} (docs/data.md)"


class _ExampleWriter:
    """Writes examples to SPLIT.bin, SPLIT.mask.bin and SPLIT.offsets.bin. They are complete when `stack` is closed."""

    def __init__(self, directory, split, stack):
        names = (f"{split}.bin", f"{split}.mask.bin", f"{split}.offsets.bin")
        self.ids, self.mask, self.offsets = (open_atomic(directory / name, stack) for name in names)
        self.examples = self.tokens = self.crc32 = 0
        self.offsets.write(np.int64(0))

    def add(self, example):
        for ids, mask in example:
            self.tokens += len(ids)
            self.crc32 = zlib.crc32(mask, zlib.crc32(ids, self.crc32))
            self.ids.write(ids)
            self.mask.write(mask)
            self.offsets.write(np.int64(self.tokens))
        self.examples += 1


def open_atomic(path, stack):
    """Open a file for writing. It gets its name when `stack`, an ExitStack, is closed."""
    return stack.enter_context(open(stack.enter_context(atomic_write(path)), "wb"))


def _tokenize_chunk(rows, tokenize, tokenizer, block_size):
    """Tokenize rows -> for each, its example as a list of (ids, mask), 1 if it was cut, and why it is skipped or ""."""
    encoding, results = get_tokenizer(tokenizer), []
    dtype = token_dtype(encoding.n_vocab)
    for row in rows:
        try:
            example = tokenize(parse_row(row), encoding, block_size)
        except SkippedRow as error:
            results.append(([], 0, str(error)))
            continue
        arrays = [(np.array(ids[:block_size], dtype), np.array(mask[:block_size], np.uint8)) for ids, mask in example]
        results.append((arrays, int(any(len(ids) > block_size for ids, _ in example)), ""))
    return results


def prepare_anew(prepare, directory, source="", **options):
    """Call a prepare function for its command line, unless another process has just done the same in that folder."""
    with preparing(directory) as waited:
        if waited and is_up_to_date(directory, source):
            meta = read_meta(directory)
            same_place = Path(meta["source"]).is_absolute() == bool(source)  # both local, or both from the hub
            asked = dict(options)
            if "tokenizer" in asked:
                asked["tokenizer"] = get_tokenizer(asked["tokenizer"]).name  # for a file as well
            if same_place and all(meta.get(name) == value for name, value in asked.items()):
                print(f"{directory}: prepared by the other process")
                return
        prepare(directory, source=source, **options)


def prepare_examples(description, prepare, folder, kind):
    """Parse the command line of a prepare.py for examples, and call its prepare function.

    `folder` is the data set's folder. `kind`, sft or dpo, is the subfolder to write to.
    """
    parser = Parser(description)
    parser.add_argument("--source", default="", help="local JSONL file, instead of the hub")
    parser.add_argument("--tokenizer", default="gpt2", help=TOKENIZER_HELP)
    parser.add_argument("--block_size", default=2048, type=int, help="longer examples are cut (default: 2048)")
    parser.add_argument(
        "--out_dir", default=folder, help=f"the data set's folder, for a folder {kind} (default: this one)"
    )
    args = parser.parse_args()
    if args.block_size < 2:
        raise UserError(f"--block_size {args.block_size} has no room for an answer")
    options = dict(tokenizer=args.tokenizer, block_size=args.block_size)
    prepare_anew(prepare, Path(args.out_dir) / kind, args.source, **options)
