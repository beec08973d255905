"""Token files: writing them from text, reading them back, and cutting them into batches.

A prepared data set is a folder with train.bin and val.bin, flat token ids in which <|endoftext|> ends every document,
and meta.json, which is written last and so marks the folder as complete.
"""

import contextlib
import importlib
import json
import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError
from data.tokenizer import END_OF_TEXT, get_tokenizer

HELD_OUT = 0.1  # share of the text that becomes val.bin where no validation text is given

# ---------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path` and rename it at the end, so that `path` is never seen half written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave the new name on missing data
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_dataset(directory, documents, tokenizer, source):
    """Tokenize {"train": [text, ...], "val": [text, ...]} into `directory`, one document after another."""
    directory = Path(directory)
    encoding = get_tokenizer(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "meta.json").unlink(missing_ok=True)
    meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "tokens": {}, "crc32": {}, "source": source}
    for split, texts in documents.items():
        with atomic_write(directory / f"{split}.bin") as path:
            progress = tqdm(texts, f"tokenizing {split}", unit=" documents")
            meta["tokens"][split], meta["crc32"][split] = _write_tokens(path, progress, encoding)
    with atomic_write(directory / "meta.json") as path:
        path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    counts = ", ".join(f"{count:,} tokens for {split}" for split, count in meta["tokens"].items())
    print(f"{directory}: {counts} ({tokenizer} tokenizer)")


def _write_tokens(path, texts, encoding):
    """Write the texts' ids; returns how many there are, and a checksum that tells this text from any other."""
    end = encoding.encode_single_token(END_OF_TEXT)
    count = checksum = 0
    with open(path, "wb") as file:
        for text in texts:
            ids = np.array([*encoding.encode_ordinary(text), end], dtype=_token_type(encoding.n_vocab))
            ids.tofile(file)
            count, checksum = count + len(ids), zlib.crc32(ids, checksum)
    return count, checksum


def _token_type(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def prepare_text(directory, source, val, tokenizer, split_documents=lambda text: [text]):
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


def load_from_hub(path, **options):
    """datasets.load_dataset with a progress bar; UserError, with the ways out, if the hub cannot be reached."""
    from datasets import load_dataset  # here, because it takes seconds to import and prepared data needs none of it

    print(f"loading {path} from the hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report each of its retries
    try:
        return load_dataset(path, **options)
    except Exception as error:  # the hub's client, its HTTP library and the operating system each raise their own
        raise UserError(
            f"{path} cannot be loaded from the hub ({type(error).__name__}); use a local file with --source FILE, "
            "or --preset tiny, which needs no download"
        ) from error


# ---------------------------------------------------------------------------------------------------
# Reading


def prepared_directory(name, source, tokenizer):
    """The folder of the data set `name`, a folder in data/ or a path with a slash. It is prepared first if it is
    missing, or was made from something else than the local file `source`, or from an older version of it."""
    directory = Path(name) if "/" in name else Path(__file__).parent / name
    if _is_prepared(directory / "meta.json", source):
        return directory
    has_own = "/" not in name and (directory / "prepare.py").exists()
    if not has_own and not source:
        raise UserError(f"there is no data set {name}; --dataset {name} --source FILE makes one from a text file")
    module = importlib.import_module(f"data.{name if has_own else 'wikitext2'}.prepare")
    module.prepare(directory, source=source, tokenizer=tokenizer)
    return directory


def _is_prepared(meta, source):
    if not meta.exists() or not source:
        return meta.exists()
    same = read_meta(meta.parent)["source"] == str(Path(source).resolve())
    return same and Path(source).exists() and Path(source).stat().st_mtime <= meta.stat().st_mtime


def read_meta(directory):
    """meta.json of a prepared data set as a dict; raises UserError if it is missing or not one."""
    path = Path(directory) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta = {key: meta[key] for key in ("tokenizer", "vocab_size", "tokens", "crc32", "source")}
        if not isinstance(meta["vocab_size"], int) or not isinstance(meta["tokens"], dict):
            raise TypeError
        return meta
    except OSError as error:
        raise UserError(f"{directory} is not a prepared data set: {path} cannot be read") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete it to prepare the data again") from error


def open_tokens(directory, split, meta, block_size):
    """Memory-map one split (N,), checked against its meta.json and against block_size + 1, the shortest usable."""
    path = Path(directory) / f"{split}.bin"
    try:
        tokens = np.memmap(path, dtype=_token_type(meta["vocab_size"]), mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(tokens) != meta["tokens"].get(split):
        raise UserError(f"{path} has {len(tokens):,} tokens, meta.json says {meta['tokens'].get(split)}: damaged?")
    if len(tokens) <= block_size:
        raise UserError(f"{path} has {len(tokens):,} tokens: too few for a block_size of {block_size}")
    if (largest := int(tokens.max())) >= meta["vocab_size"]:
        raise UserError(f"{path} holds token id {largest}, outside the vocabulary of {meta['vocab_size']}")
    return tokens


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


def prefetch(make_batch, steps, device):
    """Yield make_batch(step), a tuple of tensors, on `device` for every step; a thread makes the next one meanwhile."""

    def make(step):
        batch = make_batch(step)
        return [tensor.pin_memory() for tensor in batch] if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for step in steps:
            current = upcoming or pool.submit(make, step)
            upcoming = pool.submit(make, step + 1) if step + 1 in steps else None
            yield [tensor.to(device, non_blocking=True) for tensor in current.result()]
