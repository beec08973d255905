"""Read prepared data sets and cut them into batches.

A prepared data set is a folder with two files of token ids, train.bin and val.bin, and with meta.json. data/write.py
writes meta.json last, so a folder that has it is complete. There are two kinds:

- Text, for pretraining: one stream of ids, in which <|endoftext|> ends every document. A large corpus has shards,
  train-00000.bin, train-00001.bin, ..., instead of train.bin. They are read as one file.
- Examples, in a subfolder sft or dpo: one row of ids after another. train.mask.bin has a 1 for every id to be learned,
  train.offsets.bin has the start of every row. An SFT example is one row. A DPO example is two neighbouring rows, the
  chosen and the rejected answer to the same prompt.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import get_tokenizer
from engine.files import locked
from engine.settings import UserError

# For each kind of data: the data set whose prepare.py reads local files, and the format of these files.
LOCAL_FILES = {
    "": ("wikitext2", "text file"),
    "sft": ("slimorca", "JSONL file"),
    "dpo": ("orca_dpo_pairs", "JSONL file"),
}

# The names of the files in a data set's folder; while one is written, its name ends in .<process id>.tmp.
WRITTEN = re.compile(
    r"((train|val)(-\d{5}|\.mask|\.offsets)?\.bin|(meta|progress|tokenizer-[0-9a-f]{8})\.json|prepare\.lock)(\.\d+\.tmp)?"
)

# ---------------------------------------------------------------------------------------------------
# Files


def prepared_directory(name, source, kind="", **options):
    """Return the folder of a data set, and prepare it first if it is missing or outdated.

    `name` is a folder in data/, or a path with a slash. `kind` is "" for text, "sft" or "dpo". `source` is a local file
    to prepare the data from, or "" for the hub. The data are outdated if they were made from another file than
    `source`, or if the size or the date of its files has changed since. `options` are passed to the function in
    prepare.py.
    """
    if name in ("", ".", ".."):
        raise UserError("--dataset needs a name, or a path with a slash")
    local, file_format = LOCAL_FILES[kind]
    if source and name == local:
        raise UserError(f"--source needs a name for your data: --dataset NAME --source {source} ({name} is the hub's)")
    folder = Path(name) if "/" in name else Path(__file__).parent / name
    directory = folder / kind
    if is_up_to_date(directory, source):
        return directory
    has_prepare = "/" not in name and (folder / "prepare.py").exists()
    is_begun = (directory / "progress.json").exists
    if not has_prepare and not source and not is_begun():
        raise UserError(f"there is no data set {name}; --dataset {name} --source FILE makes one from a {file_format}")
    module = importlib.import_module(f"data.{name if has_prepare else local}.prepare")
    prepare = getattr(module, f"prepare_{kind or 'text'}", None)
    if prepare is None:
        raise UserError(f"the data set {name} is not for {kind or 'pretraining'}; {local} and tiny are")
    with preparing(directory):
        if is_up_to_date(directory, source):  # by now
            return directory
        if not has_prepare and is_begun():
            raise UserError(f"{folder} is not finished; run python -m data.fineweb_edu.prepare again as it was begun")
        prepare(directory, source=source, **options)
    return directory


@contextlib.contextmanager
def preparing(directory):
    """Create the folder of a data set and keep other processes from preparing it. Yields whether one had to end first.

    A preparation that leaves nothing in the folder leaves no new folder either.
    """
    directory = Path(directory)
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as stack:
            waited = None
            while waited is None:
                directory.mkdir(parents=True, exist_ok=True)
                lock = locked(directory, "prepare.lock", f"waiting for another process that prepares {directory}")
                with contextlib.suppress(FileNotFoundError):  # it failed, and removed its new folder
                    waited = stack.enter_context(lock)
            try:
                yield waited
            finally:
                with contextlib.suppress(OSError):  # Windows deletes no open file
                    (directory / "prepare.lock").unlink()
    finally:
        with contextlib.suppress(OSError):  # a folder with files in it stays
            for path in created:
                path.rmdir()


def is_up_to_date(directory, source):
    """Return whether a data set is prepared, and from the files of `source` as they are now, unless that is ""."""
    meta_path = Path(directory) / "meta.json"
    if not meta_path.exists() or not source:
        return meta_path.exists()
    meta, source = read_meta(directory), Path(source)
    if meta["source"] != str(source.resolve()) or not source.exists():
        return False
    if "files" not in meta:  # written by an older version
        return source.stat().st_mtime <= meta_path.stat().st_mtime
    return meta["files"] == fingerprint(source.resolve())


def source_files(source):
    """List the files in a folder, in the order of their names, or the one file `source`.

    What begins with a dot below the folder is left out (.ipynb_checkpoints, ._a.parquet), and so are the files that a
    preparation writes.
    """
    source = Path(source)
    if not source.is_dir():
        return [source]
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not WRITTEN.fullmatch(path.name)]
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(source).parts)]


def fingerprint(source):
    """Return a hash of the names, sizes and dates of the files in `source`, a file or folder; "" if there is none."""
    source = Path(source)
    if not source.is_absolute() or not source.exists():  # the name of a data set on the hub
        return ""
    stats = [(str(path.relative_to(source)), path.stat()) for path in source_files(source)]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def read_meta(directory, tokenizer="", name="meta.json"):
    """Read and check meta.json. Raises UserError if it is missing or damaged, or if it names another tokenizer."""
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
            f"delete {path} to prepare it again, or make another data set: --source FILE --dataset NAME, or "
            f"python -m data.NAME.prepare --tokenizer {tokenizer} --out_dir data/NEW"
        )
    return meta


def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def shard_path(directory, index):
    return Path(directory) / f"train-{index:05}.bin"


def open_tokens(directory, split, meta, block_size=0):
    """Memory-map the token ids of a split (N,). Raises UserError on damage, and unless N > block_size.

    Reading all shards would take minutes, so their ids are checked as batches are drawn.
    """
    path, dtype = Path(directory) / f"{split}.bin", token_dtype(meta["vocab_size"])
    if meta["vocab_size"] != get_tokenizer(meta["tokenizer"], directory).n_vocab:
        raise UserError(f"{directory}/meta.json is damaged: its tokenizer has another vocabulary")
    if split == "train" and "shards" in meta:
        files = [_memory_map(shard_path(directory, index), dtype, size) for index, size in enumerate(meta["shards"])]
        tokens = Shards(files, meta["vocab_size"])
    else:
        tokens = _memory_map(path, dtype, meta["tokens"].get(split))
        _check_ids(tokens, path, meta["vocab_size"])
    if len(tokens) <= block_size:
        raise UserError(
            f"{path} has {len(tokens):,} tokens: too few for a block_size of {block_size}; "
            "give it more text, or lower --block_size"
        )
    return tokens


def _memory_map(path, dtype, length):
    try:
        array = np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(array) != length:
        raise UserError(f"{path} has {len(array):,} entries, by meta.json it should have {length}: damaged?")
    return array


def _check_ids(ids, path, vocab_size):
    if (largest := int(ids.max())) >= vocab_size:
        raise UserError(f"{path} holds token id {largest}, outside the vocabulary of {vocab_size}")


class Shards:
    """Memory-mapped arrays of token ids, read as one. It has a length, and slices, which may cross borders."""

    def __init__(self, files, vocab_size):
        self.files, self.vocab_size = files, vocab_size
        self.ends = np.cumsum([len(file) for file in files])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, window):
        start, stop, pieces = window.start, min(window.stop, len(self)), []
        while start < stop:
            index = np.searchsorted(self.ends, start, side="right")
            file = self.files[index]
            offset = self.ends[index] - len(file)
            pieces.append(file[start - offset : stop - offset])
            _check_ids(pieces[-1], file.filename, self.vocab_size)
            start += len(pieces[-1])
        return np.concatenate(pieces)


@dataclass
class Examples:
    """Rows of token ids. Row r is ids[offsets[r] : offsets[r + 1]], its loss mask the same slice of `mask`.

    `group` neighbouring rows are one example: 1 for SFT, 2 for DPO.
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    group: int

    def __len__(self):
        return (len(self.offsets) - 1) // self.group

    def lengths(self):
        """Return the length of the longest row of every example (N,)."""
        return np.diff(self.offsets).reshape(-1, self.group).max(axis=1)


def open_examples(directory, split, meta, group, block_size):
    """Memory-map the Examples of a split. Raises UserError on damage, and if they were cut for another block_size."""
    directory, tokens, examples = Path(directory), meta["tokens"].get(split), meta.get("examples", {}).get(split, 0)
    if meta.get("block_size") != block_size:
        raise UserError(
            f"{directory} was made for a context of {meta.get('block_size')}, and the model has one of {block_size}; "
            f"delete {directory / 'meta.json'} to prepare it again, or make another data set: --source FILE --dataset "
            f"NAME, or python -m data.NAME.prepare --block_size {block_size} --out_dir data/NEW"
        )
    ids = open_tokens(directory, split, meta)
    mask = _memory_map(directory / f"{split}.mask.bin", np.uint8, tokens)
    offsets = _memory_map(directory / f"{split}.offsets.bin", np.int64, examples * group + 1)
    lengths = np.diff(offsets)
    complete = len(lengths) and offsets[0] == 0 and offsets[-1] == tokens
    if not complete or not 1 <= lengths.min() <= lengths.max() <= block_size:
        raise UserError(f"{directory / f'{split}.offsets.bin'} is damaged")
    # Every row needs an id to learn after its first one, which no position predicts.
    starts = offsets[:-1]
    if mask.max() > 1 or (np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]).min() < 1:
        raise UserError(f"{directory / f'{split}.mask.bin'} is damaged")
    return Examples(ids, mask, offsets, group)


# ---------------------------------------------------------------------------------------------------
# Batches of text


def sample_batch(tokens, block_size, batch_size, seed, step, rank=0, world_size=1):
    """Draw this rank's rows of a step's batch -> inputs and targets, each (batch_size / world_size, block_size) int64.

    The windows start anywhere in the text. They depend on (seed, step) alone: a resumed run draws the same
    batches, and all ranks together draw what one process would.
    """
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - block_size, size=batch_size)
    return _windows(tokens, starts[rank::world_size], block_size)


def fixed_batches(tokens, block_size, batch_size, max_windows, rank=0, world_size=1):
    """Yield the same batches at every call: up to max_windows windows, evenly spread over the text, without overlap.

    The last batch is filled up with rows whose targets are -100. So all batches have one shape, which spares a
    recompilation. Of each batch, process `rank` gets every world_size-th row.
    """
    count = min(max_windows, (len(tokens) - 1) // block_size)
    starts = np.arange(count) * ((len(tokens) - 1) // count)
    for first in range(0, count, batch_size):
        rows = starts[first : first + batch_size]
        inputs, targets = _windows(tokens, np.pad(rows, (0, batch_size - len(rows))), block_size)
        targets[len(rows) :] = -100
        yield inputs[rank::world_size], targets[rank::world_size]


def _windows(tokens, starts, block_size):
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    windows = torch.from_numpy(windows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------------
# Batches of examples


def bucketed_epoch(lengths, batch_size, seed, epoch):
    """Divide examples of these lengths (N,) into an epoch's batches -> indices (N // batch_size, batch_size).

    Examples of similar length share a batch, so there is little padding: shuffle the examples, sort runs of 64 batches
    by length, then shuffle the batches. The remainder of N / batch_size is left out, a different one in each epoch. All
    depends on (seed, epoch) alone.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    runs = np.split(order, range(64 * batch_size, len(order), 64 * batch_size))
    indices = np.concatenate([run[np.argsort(lengths[run], kind="stable")] for run in runs])
    return rng.permutation(indices.reshape(-1, batch_size))


def padded_length(length, block_size):
    """Round a length up to the next of 64, 96, 128, 192, 256, 384, ..., but at most to block_size.

    Kernels are compiled for each length, so there should be few. Beyond 64, at most a third of a row is padding.
    """
    sizes = (size for power in itertools.count(6) for size in (2**power, 3 * 2**power // 2))
    return min(next(size for size in sizes if size >= length), block_size)


def collate(examples, indices, block_size):
    """Collate examples into a micro-batch -> idx (R, T), positions (M,), targets (M,), all int64.

    `positions` are those in the flattened idx whose next id is to be learned, `targets` are these next ids. Both are
    filled up to a quarter, a half, three quarters or all of R * T, with other positions and targets of -100: a CUDA
    graph is recorded for each size. Rows are padded on the right. Attention is causal, so no real token sees the
    padding, and no mask is needed. With two rows an example, the first rows of all examples precede the second ones.
    """
    rows = np.concatenate([indices * examples.group + i for i in range(examples.group)])
    lengths = examples.offsets[rows + 1] - examples.offsets[rows]
    T = padded_length(int(lengths.max()), block_size)
    idx, is_learned = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), bool)
    for r, (start, length) in enumerate(zip(examples.offsets[rows], lengths)):
        idx[r, :length] = examples.ids[start : start + length]
        is_learned[r, : length - 1] = examples.mask[start + 1 : start + length]  # position t predicts id t + 1
    count, quarter = is_learned.sum(), math.ceil(is_learned.size / 4)
    size = math.ceil(count / quarter) * quarter
    positions = np.argsort(~is_learned.ravel(), kind="stable")[:size]  # those to be learned come first
    targets = np.full(len(positions), -100)
    targets[:count] = idx.ravel()[positions[:count] + 1]
    return tuple(map(torch.from_numpy, (idx, positions, targets)))


# ---------------------------------------------------------------------------------------------------
# Both


def prefetch(get_batch, steps, device):
    """Yield (count, micro-batches) of get_batch(step) for every step, with all tensors on `device`.

    A thread calls get_batch for the next step in the meantime.
    """

    def get_pinned(step):
        count, micro_batches = get_batch(step)
        if device.type == "cuda":
            micro_batches = [[tensor.pin_memory() for tensor in tensors] for tensors in micro_batches]
        return count, micro_batches

    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for step in steps:
            current = upcoming or pool.submit(get_pinned, step)
            upcoming = pool.submit(get_pinned, step + 1) if step + 1 in steps else None
            count, micro_batches = current.result()
            pinned = device.type == "cuda"
            yield count, [[tensor.to(device, non_blocking=pinned) for tensor in tensors] for tensors in micro_batches]
