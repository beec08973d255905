"""Write a corpus of any size as shards, in a way that can be interrupted and continued.

progress.json says what is complete: the content of meta.json so far, and the position in the source where the next
shard begins. It is written after every shard, and becomes meta.json at the end.
"""

import contextlib
import itertools
import zlib
from pathlib import Path

from tqdm import tqdm

from data.dataset import fingerprint, read_meta, shard_path
from data.tokenizer import get_tokenizer
from data.write import (
    PROGRESS,
    VAL_EVERY,
    encode,
    format_report,
    format_splits,
    open_atomic,
    parallel_map,
    parse_row,
    remove_text,
    write_meta,
    written_files,
)
from engine.settings import UserError

SHARD_TOKENS = 100_000_000


def write_shards(directory, read, tokenizer, source, source_bytes=0, shard_tokens=SHARD_TOKENS, processes=None):
    """Tokenize a corpus into shards, on all cores and in memory that does not grow with it.

    If the call is interrupted, the same call continues after the last complete shard and writes the same files.

    read(position) yields (chunk of rows, position of the next chunk), beginning at a position, which is any JSON value,
    None at the start. A row is a dict with a "text", or a line of JSONL. Rows without a text are counted and left out.
    A shard ends with the chunk that fills it. Every VAL_EVERY-th document of the first shard goes to val.bin.

    Raises UserError if there are fewer than two documents, one for each split. Raises UserError if progress.json is of
    another corpus or of other settings, or if the files of the source have changed since. `source_bytes` is their size.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    encoding = get_tokenizer(tokenizer)
    settings = dict(tokenizer=encoding.name, source=source, source_bytes=source_bytes, shard_tokens=shard_tokens)
    settings["files"] = fingerprint(source)
    meta = _load_progress(directory, settings, encoding.n_vocab)
    for path in written_files(directory, "*.tmp"):  # left by a process that was killed
        path.unlink()

    def tokenized_chunks():
        """Yield the documents of every chunk that has any, and note the position behind it."""
        chunks = parallel_map(_encode_chunk, read(meta["position"]), tokenizer, processes=processes)
        for documents, without_text, position in chunks:
            meta["report"]["rows without a text"] += without_text
            meta["position"] = position
            if documents:
                yield documents

    chunks = tokenized_chunks()
    options = dict(initial=meta["tokens"]["train"], unit=" tokens", unit_scale=True, **PROGRESS)
    with tqdm(desc="tokenizing", **options) as bar:
        for chunk in chunks:
            _write_shard(directory, itertools.chain([chunk], chunks), meta, bar)
    _check_splits(meta)
    encoding.save(directory)
    write_meta(directory, {name: value for name, value in meta.items() if name != "position"})
    (directory / "progress.json").unlink()
    counts = f"{format_splits(meta['tokens'], 'tokens')} in {len(meta['shards'])} shards"
    print(f"{directory}: {counts} ({encoding.name} tokenizer); {format_report(meta['report'])}")


def _load_progress(directory, settings, vocab_size):
    """Load progress.json if there is one to continue from, else return its content for a new corpus."""
    path = directory / "progress.json"
    is_resumed = path.exists() and not (directory / "meta.json").exists()
    meta = read_meta(directory, name=path.name) if is_resumed else {}
    for name, value in settings.items():
        if meta.get(name, value) != value:
            begun = "files of other sizes or dates" if name == "files" else f"{name} {meta[name]}, not {value}"
            raise UserError(f"{directory} was begun with {begun}; delete {path} to begin anew")
    new = settings | {"vocab_size": vocab_size}
    new |= {"tokens": {"train": 0, "val": 0}, "crc32": {"train": 0, "val": 0}, "shards": []}
    new |= {"report": {"documents": 0, "rows without a text": 0}, "position": None}
    if not is_resumed:
        return new
    meta.setdefault("files", settings["files"])  # which older versions did not note
    if meta.keys() != new.keys():
        raise UserError(f"{path} is damaged; delete it to prepare the data again")
    print(f"{directory}: going on after {len(meta['shards'])} shards")
    return meta


def _write_shard(directory, chunks, meta, bar):
    """Write the next shard, and val.bin with the first one; then progress.json, which says that they are complete."""
    index, before, report = len(meta["shards"]), meta["tokens"]["train"], meta["report"]
    with contextlib.ExitStack() as stack:
        files = {"train": open_atomic(shard_path(directory, index), stack)}
        if index == 0:
            files["val"] = open_atomic(directory / "val.bin", stack)
        for documents in chunks:
            for ids in documents:
                split = "val" if index == 0 and report["documents"] % VAL_EVERY == 0 else "train"
                files[split].write(ids)
                meta["tokens"][split] += len(ids)
                meta["crc32"][split] = zlib.crc32(ids, meta["crc32"][split])
                report["documents"] += 1
            bar.update(sum(map(len, documents)))
            if meta["tokens"]["train"] - before >= meta["shard_tokens"]:
                break
        if index == 0:
            _check_splits(meta)
            remove_text(directory)  # until here the files of an earlier set stay complete
    meta["shards"].append(meta["tokens"]["train"] - before)
    write_meta(directory, meta, "progress.json")


def _check_splits(meta):
    if not all(meta["tokens"].values()):
        report = format_report(meta["report"])
        raise UserError(f"{meta['source']} has too few documents; the least is 2 ({report})")


def _encode_chunk(chunk, tokenizer):
    """Encode (rows, position) -> the ids of every document, the number of rows without a text, the position."""
    rows, position = chunk
    encoding = get_tokenizer(tokenizer)
    texts = [row.get("text") for row in map(parse_row, rows) if isinstance(row, dict)]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    return [encode(text, True, encoding) for text in texts], len(rows) - len(texts), position
