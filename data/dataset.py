"""Token files: writing them, reading them back, and cutting them into batches.

A prepared data set is a folder with files of token ids, train.bin and val.bin, and meta.json, which is written last and
so marks the folder as complete. There are two kinds:

- text, for pretraining: the ids in one stream, in which <|endoftext|> ends every document. A large corpus has shards,
  train-00000.bin, train-00001.bin, ..., instead of train.bin, which are read as one;
- examples, in a folder sft or dpo inside: one row of ids after another. train.mask.bin has a 1 for every id that is to
  be learned, train.offsets.bin says where each row begins. An SFT example is a row; a DPO example is two neighbouring
  ones, the chosen and the rejected answer to the same prompt.
"""

import contextlib
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Parser, UserError
from data.tokenizer import END_OF_TEXT, TOKENIZERS, get_tokenizer

# For each kind of data, the data set whose prepare.py reads the user's own files, and what they are.
READERS = {"": ("wikitext2", "text file"), "sft": ("slimorca", "JSONL file"), "dpo": ("orca_dpo_pairs", "JSONL file")}
HELD_OUT = 0.1  # share of the text that becomes val.bin where no validation text is given
PROGRESS = dict(disable=None, leave=False)  # a progress bar for a terminal alone, which what is printed next replaces
VAL_EVERY = 20  # of examples, of tiny's documents and of those in a first shard, every 20th is held out
CHUNK = 64  # rows that a process tokenizes at a time
SHARD_TOKENS = 100_000_000

# ---------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """Yield a temporary path beside `path` and rename it at the end, so that `path` is never seen half written. What
    was there before is kept as `previous`, if that is given."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows wants to be able to write to it
            os.fsync(file.fileno())  # a power cut must not leave the new name on missing data
        if previous and Path(path).exists():
            _keep_as(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # which a full disk does not name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _keep_as(path, previous):
    """Let `previous` be what `path` is; where files can have two names, without a moment in which one is missing."""
    second = Path(f"{previous}.{os.getpid()}.tmp")
    try:
        os.link(path, second)
        os.replace(second, previous)
    except OSError:
        os.replace(path, previous)
    finally:
        second.unlink(missing_ok=True)  # still there if both were one file already, as after a kill just here


def write_dataset(directory, documents, tokenizer, source):
    """Tokenize {"train": [text, ...], "val": [text, ...]} into `directory`, one document after another."""
    directory = Path(directory)
    encoding = get_tokenizer(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    _forget(directory)
    meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "tokens": {}, "crc32": {}, "source": source}
    for split, texts in documents.items():
        with atomic_write(directory / f"{split}.bin") as path:
            progress = tqdm(texts, f"tokenizing {split}", unit=" documents", **PROGRESS)
            meta["tokens"][split], meta["crc32"][split] = _write_tokens(path, progress, encoding)
    _write_meta(directory, meta)
    counts = ", ".join(f"{count:,} tokens for {split}" for split, count in meta["tokens"].items())
    print(f"{directory}: {counts} ({tokenizer} tokenizer)")


def _forget(directory):
    """Remove what says that a text is prepared, or begun, and its shards, of which another text may have fewer."""
    for path in [directory / "meta.json", directory / "progress.json", *directory.glob("train-*.bin")]:
        path.unlink(missing_ok=True)


def _write_meta(directory, meta, name="meta.json"):
    with atomic_write(directory / name) as path:
        path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _write_tokens(path, texts, encoding):
    """Write the texts' ids; returns how many there are, and a checksum that tells this text from any other."""
    end = encoding.encode_single_token(END_OF_TEXT)
    count = checksum = 0
    with open(path, "wb") as file:
        for text in texts:
            ids = np.array([*encoding.encode_ordinary(text), end], dtype=_token_type(encoding.n_vocab))
            file.write(ids)
            count, checksum = count + len(ids), zlib.crc32(ids, checksum)
    return count, checksum


def _token_type(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_own_text(directory, source, val, tokenizer, split_documents=lambda text: [text]):
    """Prepare a text file of one's own; without `val`, a file of validation text, the end of `source` is held out."""
    text = read_text(source)
    train, held_out = (text, read_text(val)) if val else _hold_out(text)
    documents = {"train": split_documents(train), "val": split_documents(held_out)}
    write_dataset(directory, documents, tokenizer, source=str(Path(source).resolve()))


def read_text(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise UserError(f"{path} has no text in it")
    return text


def _hold_out(text):
    """Cut off the last HELD_OUT of a text, at the end of a line if there is one."""
    start = round(len(text) * (1 - HELD_OUT))
    cut = text.find("\n", start, -1) + 1 or start
    return text[:cut], text[cut:]


def load_from_hub(path, load="load_dataset", **options):
    """datasets.load_dataset with a progress bar, or another of its functions; UserError, with the ways out, if the hub
    cannot be reached."""
    import datasets  # here, because it takes seconds to import and prepared data needs none of it

    print(f"loading {path} from the hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report each of its retries
    try:
        return getattr(datasets, load)(path, **options)
    except Exception as error:  # the hub's client, its HTTP library and the operating system each raise their own
        raise UserError(
            f"{path} cannot be loaded from the hub ({type(error).__name__}); use a local file with --source FILE, "
            "or --preset tiny, which needs no download"
        ) from error


# ---------------------------------------------------------------------------------------------------
# Writing on all cores


def chunks_of(rows):
    rows = iter(rows)
    return iter(lambda: list(itertools.islice(rows, CHUNK)), [])


def _in_order(work, chunks, *arguments, processes=None):
    """Yield work(chunk, *arguments) of every chunk, in order, on all cores. Only so many are under way at once. It is
    called by other processes, so it must be a module's function."""
    processes, under_way = processes or os.cpu_count(), deque()
    with ProcessPoolExecutor(processes, initializer=_follow_parent) as pool:
        pool.submit(os.getpid).result()  # so they start before whatever reads the chunks has threads
        for chunk in chunks:
            under_way.append(pool.submit(work, chunk, *arguments))
            if len(under_way) > 4 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _follow_parent():
    """Leave Ctrl-C to the process that started this one, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_shards(directory, read, tokenizer, source, source_bytes=0, shard_tokens=SHARD_TOKENS, processes=None):
    """Tokenize a corpus into shards, on all cores and in memory that does not grow with it. If this is broken off, the
    same call goes on after the last whole shard, and comes to the same files.

    read(position) yields pairs: a chunk of rows, and the position of the next chunk, any JSON value; that of the first
    is None. A row is a dict with a "text", or a line of JSONL; rows without one are counted and left out. A shard ends
    with the chunk that fills it. Every VAL_EVERY-th document of the first one is held out, in val.bin. `source_bytes`
    tells a source from an older version of it. Raises UserError if something else was begun in `directory`, and unless
    there is a document to train on and one to hold out.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    meta = _begun(directory, tokenizer, source, source_bytes, shard_tokens)
    for path in directory.glob("*.tmp"):  # of a process that was killed
        path.unlink()
    results = _in_order(_encode_chunk, read(meta["position"]), tokenizer, processes=processes)
    documents = _take_note(results, meta)
    options = dict(initial=meta["tokens"]["train"], unit=" tokens", unit_scale=True, **PROGRESS)
    with tqdm(desc="tokenizing", **options) as bar:
        for first in documents:
            _write_shard(directory, itertools.chain([first], documents), meta, bar)
    _check_enough(meta)
    _write_meta(directory, {name: value for name, value in meta.items() if name != "position"})
    (directory / "progress.json").unlink()
    counts = ", ".join(f"{count:,} tokens for {split}" for split, count in meta["tokens"].items())
    print(f"{directory}: {counts} in {len(meta['shards'])} shards ({tokenizer} tokenizer); {_counts(meta['report'])}")


def _begun(directory, tokenizer, source, source_bytes, shard_tokens):
    """The meta.json of what is on disk, and the "position" where the next shard begins: those in progress.json, if
    there is one."""
    settings = dict(tokenizer=tokenizer, source=source, source_bytes=source_bytes, shard_tokens=shard_tokens)
    path, none = directory / "progress.json", {"train": 0, "val": 0}
    goes_on = path.exists() and not (directory / "meta.json").exists()
    meta = read_meta(directory, name=path.name) if goes_on else {}
    for name, value in settings.items():
        if meta.get(name, value) != value:
            raise UserError(f"{directory} was begun with {name} {meta[name]}, not {value}; delete {path} to begin anew")
    new = settings | {"vocab_size": get_tokenizer(tokenizer).n_vocab, "tokens": none, "crc32": dict(none), "shards": []}
    new |= {"report": {"documents": 0, "rows without a text": 0}, "position": None}
    if not goes_on:
        return new
    if meta.keys() != new.keys():
        raise UserError(f"{path} is damaged; delete it to prepare the data again")
    print(f"{directory}: going on after {len(meta['shards'])} shards")
    return meta


def _take_note(results, meta):
    """Yield the documents of every chunk that has any, and count all in `meta`."""
    for documents, left_out, position in results:
        meta["report"]["rows without a text"] += left_out
        meta["position"] = position
        if documents:
            yield documents


def _write_shard(directory, chunks, meta, bar):
    """Write the next shard, with the first val.bin as well; then progress.json, which says that they are whole."""
    number, before = len(meta["shards"]), meta["tokens"]["train"]
    with contextlib.ExitStack() as stack:
        files = {"train": _start(_shard(directory, number), stack)}
        if not number:
            files["val"] = _start(directory / "val.bin", stack)
        for documents in chunks:
            for ids in documents:
                held_out = not number and meta["report"]["documents"] % VAL_EVERY == 0
                _add(ids, "val" if held_out else "train", files, meta)
            bar.update(sum(map(len, documents)))
            if meta["tokens"]["train"] - before >= meta["shard_tokens"]:
                break
        if not number:
            _check_enough(meta)
            _forget(directory)  # the files of an earlier set stay whole until here
    meta["shards"].append(meta["tokens"]["train"] - before)
    _write_meta(directory, meta, "progress.json")


def _shard(directory, number):
    return Path(directory) / f"train-{number:05}.bin"


def _add(ids, split, files, meta):
    files[split].write(ids)
    meta["report"]["documents"] += 1
    meta["tokens"][split] += len(ids)
    meta["crc32"][split] = zlib.crc32(ids, meta["crc32"][split])


def _check_enough(meta):
    if not all(meta["tokens"].values()):
        raise UserError(f"{meta['source']} has too few documents; the least is 2 ({_counts(meta['report'])})")


def _counts(report):
    return ", ".join(f"{count:,} {what}" for what, count in report.items())


def _encode_chunk(chunk, tokenizer):
    """The ids of each document, how many rows have no text, and the position that came with the chunk."""
    rows, position = chunk
    encoding = get_tokenizer(tokenizer)
    end, id_type = encoding.encode_single_token(END_OF_TEXT), _token_type(encoding.n_vocab)
    rows = [_parse(row) if isinstance(row, bytes) else row for row in rows]
    texts = [row.get("text") for row in rows if isinstance(row, dict)]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    documents = [np.array([*encoding.encode_ordinary(text), end], id_type) for text in texts]
    return documents, len(rows) - len(texts), position


# ---------------------------------------------------------------------------------------------------
# Writing examples


class SkippedRow(ValueError):
    """A row that cannot become an example; the message is the reason, under which it is counted."""


def write_examples(directory, rows, tokenize, tokenizer, block_size, source, total=None):
    """Make examples of `rows`, of which there are `total`, on all cores and in memory that does not grow with them.

    tokenize(row, encoding, block_size) returns the rows of an example, [(ids, mask), ...], or raises SkippedRow. It is
    called by other processes, so it must be a module's function. Ids beyond block_size are cut off. Raises UserError
    unless there is an example to train on and one to hold out.
    """
    directory, encoding, report = Path(directory), get_tokenizer(tokenizer), Counter(rows=0, cut=0)
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        train, val = (_ExampleWriter(directory, split, files) for split in ("train", "val"))
        chunks = _in_order(_tokenize_chunk, chunks_of(rows), tokenize, tokenizer, block_size)
        results = itertools.chain.from_iterable(chunks)
        for example, cut, skipped in tqdm(results, "tokenizing", total, unit=" rows", **PROGRESS):
            report.update(rows=1, cut=cut)
            if skipped:
                report[skipped] += 1
            else:
                (train if (train.examples + val.examples) % VAL_EVERY else val).add(example)
        if not train.examples:
            raise UserError(f"{source} has too few usable examples, {val.examples}; the least is 2 ({_counts(report)})")
        (directory / "meta.json").unlink(missing_ok=True)  # the files of an earlier set stay whole until here
    writers = {"train": train, "val": val}
    meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "block_size": block_size, "source": source}
    for count in ("examples", "tokens", "crc32"):
        meta[count] = {split: getattr(writer, count) for split, writer in writers.items()}
    _write_meta(directory, meta | {"report": report})
    counts = ", ".join(f"{count:,} examples for {split}" for split, count in meta["examples"].items())
    print(f"{directory}: {counts} ({tokenizer} tokenizer); {_counts(report)}")


class _ExampleWriter:
    """Writes examples to SPLIT.bin, SPLIT.mask.bin and SPLIT.offsets.bin, which `files`, an ExitStack, completes."""

    def __init__(self, directory, split, files):
        names = (f"{split}.bin", f"{split}.mask.bin", f"{split}.offsets.bin")
        self.ids, self.mask, self.offsets = (_start(directory / name, files) for name in names)
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


def _tokenize_chunk(rows, tokenize, tokenizer, block_size):
    """For each row: the rows of its example as pairs of arrays, whether they were cut, and why it is skipped, or ""."""
    encoding, results = get_tokenizer(tokenizer), []
    id_type = _token_type(encoding.n_vocab)
    for row in rows:
        try:
            example = tokenize(_parse(row) if isinstance(row, bytes) else row, encoding, block_size)
        except SkippedRow as error:
            results.append(([], 0, str(error)))
            continue
        arrays = [(np.array(ids[:block_size], id_type), np.array(mask[:block_size], np.uint8)) for ids, mask in example]
        results.append((arrays, int(any(len(ids) > block_size for ids, _ in example)), ""))
    return results


def _start(path, files):
    """Open a file to write into, which `files`, an ExitStack, completes."""
    return files.enter_context(open(files.enter_context(atomic_write(path)), "wb"))


def _parse(line):
    """The value in a line of a JSONL file; None if it is not JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))  # json.loads would guess UTF-16, of which lines are cut elsewhere
    except (ValueError, RecursionError):
        return None


def open_rows(hub_name, revision, source):
    """The rows of a data set on the hub, or the lines of the JSONL file `source`; how many, if known; and whence."""
    if not source:
        rows = load_from_hub(hub_name, split="train", revision=revision)
        return rows, len(rows), f"{hub_name} {revision}"
    try:
        total = None if Path(source).is_fifo() else sum(1 for _ in _lines(source))  # a pipe can be read only once
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    return _lines(source), total, str(Path(source).resolve())


def _lines(path):
    with open(path, "rb") as file:
        yield from (line for line in file if line.strip())


def prepare_examples(description, prepare, home, kind):
    """The command line of a prepare.py for examples; `home` is the data set's folder."""
    parser = Parser(description)
    parser.add_argument("--source", default="", help="local JSONL file, instead of the hub")
    parser.add_argument("--tokenizer", default="gpt2", choices=TOKENIZERS)
    parser.add_argument("--block_size", default=2048, type=int, help="longer examples are cut (default: 2048)")
    parser.add_argument(
        "--out_dir", default=home, help=f"the data set's folder, for a folder {kind} (default: this one)"
    )
    args = parser.parse_args()
    if args.block_size < 2:
        raise UserError(f"--block_size {args.block_size} has no room for an answer")
    prepare(Path(args.out_dir) / kind, args.source, args.tokenizer, args.block_size)


# ---------------------------------------------------------------------------------------------------
# Reading


def prepared_directory(name, source, kind="", **options):
    """The folder of the data set `name`, a folder in data/ or a path with a slash; of its `kind`, "" for text or sft or
    dpo. It is prepared first, with `options`, if it is missing, or was made from something else than the local file
    `source`, or from an older version of it."""
    if name in ("", ".", ".."):
        raise UserError("--dataset needs a name, or a path with a slash")
    reader, file = READERS[kind]
    home = Path(name) if "/" in name else Path(__file__).parent / name
    if _is_prepared(home / kind / "meta.json", source):
        return home / kind
    has_own = "/" not in name and (home / "prepare.py").exists()
    if not has_own and (home / "progress.json").exists():
        raise UserError(f"{home} is not finished; run python -m data.fineweb_edu.prepare again as it was begun")
    if not has_own and not source:
        raise UserError(f"there is no data set {name}; --dataset {name} --source FILE makes one from a {file}")
    module = importlib.import_module(f"data.{name if has_own else reader}.prepare")
    prepare = getattr(module, f"prepare_{kind or 'text'}", None)
    if prepare is None:
        raise UserError(f"the data set {name} is not for {kind or 'pretraining'}; {reader} and tiny are")
    prepare(home / kind, source=source, **options)
    return home / kind


def _is_prepared(meta, source):
    if not meta.exists() or not source:
        return meta.exists()
    same = read_meta(meta.parent)["source"] == str(Path(source).resolve())
    return same and Path(source).exists() and Path(source).stat().st_mtime <= meta.stat().st_mtime


def read_meta(directory, tokenizer="", name="meta.json"):
    """meta.json of a prepared data set; raises UserError if it is missing, damaged or of another tokenizer."""
    path = Path(directory) / name
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        counts = [*meta["tokens"].values(), *meta.get("examples", {}).values(), meta["vocab_size"]]
        if not all(isinstance(count, int) for count in [*counts, meta.get("block_size", 0)]):
            raise TypeError
        if not all(isinstance(meta[name], str) for name in ("tokenizer", "source")) or "crc32" not in meta:
            raise TypeError
        if "shards" in meta and sum(meta["shards"]) != meta["tokens"]["train"]:
            raise ValueError
    except OSError as error:
        raise UserError(f"{directory} is not a prepared data set: {path} cannot be read") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete it to prepare the data again") from error
    if tokenizer not in ("", meta["tokenizer"]):
        raise UserError(
            f"{directory} was prepared with --tokenizer {meta['tokenizer']}, not {tokenizer}; "
            f"give the other data another --dataset name, or delete {path} to prepare it again"
        )
    return meta


def open_tokens(directory, split, meta, block_size=0):
    """Memory-map the ids of one split (N,), checked against meta.json and for being more than block_size. Shards, which
    would take minutes to read, have their ids checked when they are drawn."""
    path = Path(directory) / f"{split}.bin"
    if meta["vocab_size"] != get_tokenizer(meta["tokenizer"]).n_vocab:
        raise UserError(f"{directory}/meta.json is damaged: its tokenizer has another vocabulary")
    id_type = _token_type(meta["vocab_size"])
    if split == "train" and "shards" in meta:
        sizes = enumerate(meta["shards"])
        files = [_memory_map(_shard(directory, number), id_type, size) for number, size in sizes]
        tokens = Shards(files, meta["vocab_size"])
    else:
        tokens = _memory_map(path, id_type, meta["tokens"].get(split))
        _check_ids(tokens, path, meta["vocab_size"])
    if len(tokens) <= block_size:
        raise UserError(f"{path} has {len(tokens):,} tokens: too few for a block_size of {block_size}")
    return tokens


def _check_ids(ids, path, vocab_size):
    if (largest := int(ids.max())) >= vocab_size:
        raise UserError(f"{path} holds token id {largest}, outside the vocabulary of {vocab_size}")


class Shards:
    """Arrays of ids that are read as one: its length, and slices of it, which may begin in one and end in another."""

    def __init__(self, files, vocab_size):
        self.files, self.vocab_size = files, vocab_size
        self.ends = np.cumsum([len(file) for file in files])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, window):
        start, stop, pieces = window.start, min(window.stop, len(self)), []
        while start < stop:
            number = np.searchsorted(self.ends, start, side="right")
            file = self.files[number]
            offset = self.ends[number] - len(file)
            pieces.append(file[start - offset : stop - offset])
            _check_ids(pieces[-1], file.filename, self.vocab_size)
            start += len(pieces[-1])
        return np.concatenate(pieces)


def _memory_map(path, kind, length):
    try:
        numbers = np.memmap(path, dtype=kind, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(numbers) != length:
        raise UserError(f"{path} has {len(numbers):,} entries, by meta.json it should have {length}: damaged?")
    return numbers


@dataclass
class Examples:
    """Row r is ids[offsets[r] : offsets[r + 1]], and mask likewise; `group` neighbouring rows are an example."""

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    group: int

    def __len__(self):
        return (len(self.offsets) - 1) // self.group

    def lengths(self):
        """How long the longest row of every example is (N,)."""
        return np.diff(self.offsets).reshape(-1, self.group).max(axis=1)


def open_examples(directory, split, meta, group, block_size):
    """Memory-map the Examples of one split; raises UserError if they are damaged, or were made for another context."""
    directory, tokens, examples = Path(directory), meta["tokens"].get(split), meta.get("examples", {}).get(split, 0)
    if meta.get("block_size") != block_size:
        raise UserError(
            f"{directory} was made for a context of {meta.get('block_size')}, and the model has one of {block_size}; "
            f"give the other data another --dataset name, or delete {directory / 'meta.json'} to prepare it again"
        )
    ids = open_tokens(directory, split, meta)
    mask = _memory_map(directory / f"{split}.mask.bin", np.uint8, tokens)
    offsets = _memory_map(directory / f"{split}.offsets.bin", np.int64, examples * group + 1)
    lengths = np.diff(offsets)
    whole = len(lengths) and offsets[0] == 0 and offsets[-1] == tokens
    if not whole or not 1 <= lengths.min() <= lengths.max() <= block_size:
        raise UserError(f"{directory / f'{split}.offsets.bin'} is damaged")
    starts = offsets[:-1]  # every row has something to learn beside its first id, which follows none
    if mask.max() > 1 or (np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]).min() < 1:
        raise UserError(f"{directory / f'{split}.mask.bin'} is damaged")
    return Examples(ids, mask, offsets, group)


# ---------------------------------------------------------------------------------------------------
# Batches


def sample_batch(tokens, block_size, batch_size, seed, step, rank=0, world_size=1):
    """This rank's rows of batch number `step` -> inputs and targets, each (batch_size / world_size, block_size) int64.

    The windows start anywhere in the text. They depend on nothing but (seed, step), so a resumed run goes on with the
    batches it would have had, and the ranks together draw what one process alone would.
    """
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - block_size, size=batch_size)
    return _windows(tokens, starts[rank::world_size], block_size)


def fixed_batches(tokens, block_size, batch_size, max_windows):
    """The same batches every time: up to max_windows windows spread evenly over the text, without overlap.

    All have the same shape, which spares a recompilation; the last is filled up with rows whose targets are -100.
    """
    count = min(max_windows, (len(tokens) - 1) // block_size)
    starts = np.arange(count) * ((len(tokens) - 1) // count)
    for first in range(0, count, batch_size):
        rows = starts[first : first + batch_size]
        filled = np.concatenate((rows, np.zeros(batch_size - len(rows), dtype=rows.dtype)))
        inputs, targets = _windows(tokens, filled, block_size)
        targets[len(rows) :] = -100
        yield inputs, targets


def _windows(tokens, starts, block_size):
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    windows = torch.from_numpy(windows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def bucketed_epoch(lengths, batch_size, seed, epoch):
    """The batches of one pass over examples of these lengths (N,) -> (N // batch_size, batch_size) numbers of examples.

    Examples of similar length come together, for little padding: shuffle them, sort runs of 64 batches by length, then
    shuffle the batches. Fewer than batch_size, others in every epoch, are left out. All depends on (seed, epoch) alone.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    runs = np.split(order, range(64 * batch_size, len(order), 64 * batch_size))
    in_order = np.concatenate([run[np.argsort(lengths[run], kind="stable")] for run in runs])
    return rng.permutation(in_order.reshape(-1, batch_size))


def padded_length(length, block_size):
    """The next of 64, 96, 128, 192, 256, 384, ..., but at most block_size: so few lengths need few kernels compiled and
    planned, and at most a third is padding (beyond 64)."""
    sizes = (size for octave in itertools.count(6) for size in (2**octave, 3 * 2**octave // 2))
    return min(next(size for size in sizes if size >= length), block_size)


def collate(examples, numbers, block_size):
    """A micro-batch of some examples -> idx (R, T), positions (M,), targets (M,), int64.

    Rows are padded at the right. That needs no mask: attention is causal, so no real token sees the padding behind it,
    and what the padding itself computes is not asked for. `positions`, in the flattened idx, are those whose next id is
    to be learned, and `targets` those ids; filled up with other positions, whose targets are -100, to one of 4 sizes,
    since a CUDA graph is recorded for each. With two rows an example, the first rows of all come first.
    """
    rows = np.concatenate([numbers * examples.group + place for place in range(examples.group)])
    lengths = examples.offsets[rows + 1] - examples.offsets[rows]
    T = padded_length(int(lengths.max()), block_size)
    idx, learned = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), bool)
    for i, start, length in zip(itertools.count(), examples.offsets[rows], lengths):
        idx[i, :length] = examples.ids[start : start + length]
        learned[i, : length - 1] = examples.mask[start + 1 : start + length]  # position t predicts id t + 1
    count, quarter = learned.sum(), math.ceil(learned.size / 4)
    filled = math.ceil(count / quarter) * quarter
    positions = np.argsort(~learned.ravel(), kind="stable")[:filled]  # the learned ones come first
    targets = np.full(len(positions), -100)
    targets[:count] = idx.ravel()[positions[:count] + 1]
    return tuple(map(torch.from_numpy, (idx, positions, targets)))


def prefetch(make_batch, steps, device):
    """Yield make_batch(step), (work, micro-batches), for every step, with the micro-batches' tensors on `device`; a
    thread makes the next one meanwhile."""

    def make(step):
        work, micro_batches = make_batch(step)
        if device.type == "cuda":
            micro_batches = [[tensor.pin_memory() for tensor in tensors] for tensors in micro_batches]
        return work, micro_batches

    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for step in steps:
            current = upcoming or pool.submit(make, step)
            upcoming = pool.submit(make, step + 1) if step + 1 in steps else None
            work, micro_batches = current.result()
            yield work, [[tensor.to(device, non_blocking=True) for tensor in tensors] for tensors in micro_batches]
