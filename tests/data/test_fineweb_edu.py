"""A large corpus: written as shards, interrupted and continued, read as one."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from data import dataset
from data.dataset import fixed_batches, open_tokens, prepared_directory, read_meta, sample_batch
from data.fineweb_edu import prepare as fineweb
from data.tokenizer import END_OF_TEXT
from data.write import write_dataset
from engine.settings import UserError, run_script

BAD_ROWS = [None, "", " \n"]  # in both formats; JSONL has further ones


def texts(count, seed=0):
    """Documents of very different lengths; some spell out a control token."""
    rng = random.Random(seed)
    return [f"{i} {END_OF_TEXT} é " + "word " * rng.choice((0, 3, 30)) for i in range(count)]


def write_parquet(path, column, **options):
    table = pyarrow.table({"id": list(range(len(column))), "text": pyarrow.array(column, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, **options)


def write_jsonl(path, column):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in column))


@pytest.fixture
def corpus(tmp_path):
    """A folder with two files of each kind, and the rows in the order in which they are read, by file."""
    (tmp_path / "corpus" / "more").mkdir(parents=True)
    names = ("a.parquet", "b.jsonl", "more/c.jsonl", "more/d.parquet")
    columns = [texts(count, seed) for seed, count in enumerate((150, 64, 70, 130))]
    columns[1][5:5] = columns[3][100:100] = BAD_ROWS
    for name, column in zip(names, columns):
        write = write_parquet if name.endswith("parquet") else write_jsonl
        write(tmp_path / "corpus" / name, column)
    (tmp_path / "corpus" / "notes.md").write_text("not read")
    return tmp_path / "corpus", columns


def reference(columns, shard_tokens):
    """{file name: ids} by a plain loop over 64 rows at a time."""
    shards, val, count = [[]], [], 0
    for column in columns:
        for first in range(0, len(column), 64):
            if len(shards[-1]) >= shard_tokens:
                shards.append([])
            for text in column[first : first + 64]:
                if text and text.strip():
                    held_out = len(shards) == 1 and count % 20 == 0
                    (val if held_out else shards[-1]).extend([*text.encode(), 256])
                    count += 1
    return {"val.bin": val} | {f"train-{i:05}.bin": shard for i, shard in enumerate(shards)}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("shard_tokens, processes", [(1, 1), (3000, 3), (9000, 2), (10**9, 2)])
def test_shards_equal_a_plain_loop(corpus, tmp_path, shard_tokens, processes):
    source, columns = corpus
    fineweb.prepare_text(tmp_path / "out", str(source), "bytes", shard_tokens, processes)
    expected = reference(columns, shard_tokens)
    files = content(tmp_path / "out")
    meta = json.loads(files.pop("meta.json"))
    assert files == {name: np.array(ids, np.uint16).tobytes() for name, ids in expected.items()}
    assert meta["shards"] == [len(ids) for name, ids in expected.items() if name != "val.bin"]
    assert meta["tokens"] == {"train": sum(meta["shards"]), "val": len(expected["val.bin"])}
    assert meta["source"] == str(source) and meta["tokenizer"] == "bytes" and meta["vocab_size"] == 259
    assert meta["report"] == {"documents": 414, "rows without a text": 6}


def test_checksum_and_ids_do_not_depend_on_the_shards(corpus, tmp_path):
    source, _ = corpus
    for name, size in (("one", 10**9), ("many", 9000)):
        fineweb.prepare_text(tmp_path / name, str(source), "bytes", size, 2)
    one, many = read_meta(tmp_path / "one"), read_meta(tmp_path / "many")
    assert len(one["shards"]) == 1 and len(many["shards"]) > 2
    assert one["tokens"]["train"] + one["tokens"]["val"] == many["tokens"]["train"] + many["tokens"]["val"]
    assert all(crc > 0 for crc in (*one["crc32"].values(), *many["crc32"].values()))
    ids = b"".join(data for name, data in sorted(content(tmp_path / "many").items()) if name.startswith("train"))
    assert zlib.crc32(ids) == many["crc32"]["train"]


def test_rows_without_a_text_are_counted(tmp_path):
    lines = ["no JSON", "[1]", '"text"', "{}", '{"text": 5}', '{"text": null}', '{"other": "x"}', '{"text": ""}', ""]
    lines += ['{"text": "one"}', '{"text": "two", "more": 1}', '{"text": "\\ud800"}', '{"text": "cut']
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    fineweb.prepare_text(tmp_path / "out", str(tmp_path / "rows.jsonl"), "bytes", processes=1)
    assert read_meta(tmp_path / "out")["report"] == {"documents": 3, "rows without a text": 10}


def test_text_files_are_one_document_each(tmp_path):
    (tmp_path / "corpus" / "more").mkdir(parents=True)
    files = {"a.txt": "one\n", "b.txt": " \n", "c.txt": f"zwei ü {END_OF_TEXT}\nlines", "more/d.txt": "three"}
    for name, text in files.items():
        (tmp_path / "corpus" / name).write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "corpus" / "e.jsonl", ["four"])
    fineweb.prepare_text(tmp_path / "out", str(tmp_path / "corpus"), "bytes", processes=1)
    meta, files = json.loads((tmp_path / "out" / "meta.json").read_text()), content(tmp_path / "out")
    assert meta["report"] == {"documents": 4, "rows without a text": 1}
    train = [text.encode() for text in (f"zwei ü {END_OF_TEXT}\nlines", "four", "three")]
    assert files["val.bin"] == np.array([*b"one\n", 256], np.uint16).tobytes()
    expected = [i for text in train for i in [*text, 256]]
    assert files["train-00000.bin"] == np.array(expected, np.uint16).tobytes()


def test_text_files_are_not_read_twice(tmp_path):
    """A preparation that was interrupted goes on behind the last text file of a complete shard."""
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text(f"text {i}")
    chunks = list(fineweb.read_files(lambda: paths, None))
    assert [rows[0]["text"] for rows, _ in chunks] == ["text 0", "text 1", "text 2"]
    for done, (_, position) in enumerate(chunks, 1):
        assert list(fineweb.read_files(lambda: paths, position)) == chunks[done:]


def test_columns_that_are_no_text(tmp_path):
    for name, column in (("int", [1, 2]), ("bytes", [b'{"text": "x"}'] * 2), ("list", [["x"]] * 2)):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", "y"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"too few documents; the least is 2 \(0 documents, 8 rows without a text\)"):
        fineweb.prepare_text(tmp_path / "out", str(tmp_path), "bytes", processes=1)


# ------------------------------------------------------------------------------------- interrupted


def fork(function):
    """Call function() in a copy of this process, in a process group of its own -> the copy's process id."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        run_script(function)
        os._exit(0)
    finally:
        os._exit(1)


def is_alive(group):
    """Whether a process of the group is running (Linux)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, process_group = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False


def test_kills_at_any_moment_do_not_change_the_files(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", texts(6000))
    prepare = lambda name: fineweb.prepare_text(tmp_path / name, str(tmp_path / "rows.jsonl"), "bytes", 3000, 2)  # noqa: E731
    start = time.monotonic()
    prepare("whole")
    duration, rng, seen, out = time.monotonic() - start, random.Random(1), set(), tmp_path / "killed"
    for _ in range(25):
        child = fork(lambda: prepare("killed"))
        time.sleep(rng.uniform(0, duration / 2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        deadline = time.monotonic() + 10
        while is_alive(child):
            assert time.monotonic() < deadline, "processes were left behind"
        with contextlib.suppress(FileNotFoundError):
            seen.add(len(json.loads((out / "progress.json").read_bytes())["shards"]))
        (out / "meta.json").unlink(missing_ok=True)  # it was finished: begin anew
    prepare("killed")
    assert content(out) == content(tmp_path / "whole")
    assert len(seen) > 3, seen  # it was killed in the middle


def test_interrupted_after_every_shard(corpus, tmp_path, monkeypatch):
    """Each time it continues at the position in progress.json."""
    source, _ = corpus
    prepare = lambda name: fineweb.prepare_text(tmp_path / name, str(source), "bytes", 1, 1)  # noqa: E731
    prepare("whole")
    whole, read_files, positions = content(tmp_path / "whole"), fineweb.read_files, []

    def read_five_chunks(list_files, position):
        """With one process, the fifth chunk is read before the first one is written, and the sixth after it."""
        positions.append(position)
        yield from itertools.islice(read_files(list_files, position), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(fineweb, "read_files", read_five_chunks)
    for count in range(1, len(json.loads(whole["meta.json"])["shards"]) - 4):
        with pytest.raises(KeyboardInterrupt):
            prepare("out")
        progress = json.loads((tmp_path / "out" / "progress.json").read_bytes())
        assert len(progress["shards"]) == count and progress["position"] not in positions
    monkeypatch.setattr(fineweb, "read_files", read_files)
    prepare("out")
    assert content(tmp_path / "out") == whole


@pytest.fixture
def begun(corpus, tmp_path):
    """A folder in which the second shard was about to be written when a file turned out to be damaged."""
    source, _ = corpus
    (source / "b.parquet").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(UserError, match=r"cannot read .*b.parquet \(ArrowInvalid"):
        fineweb.prepare_text(tmp_path / "out", str(source), "bytes", 300, 1)
    assert (tmp_path / "out" / "progress.json").exists()
    return source, tmp_path / "out"


@pytest.mark.parametrize(
    "change, message",
    [(lambda source, out: ("gpt2", 300), "begun with tokenizer bytes, not gpt2; delete .*progress.json to begin anew"),
     (lambda source, out: ("bytes", 301), "begun with shard_tokens 300, not 301"),
     (lambda source, out: (source / "e.jsonl").write_text("{}") and None, "begun with source_bytes"),
     (lambda source, out: source.rename(source.parent / "moved") and None, "begun with source .*corpus, not"),
     (lambda source, out: (out / "progress.json").write_text("{") and None, "progress.json is damaged"),
     (lambda source, out: (out / "progress.json").write_text('{"tokens": {}}') and None, "progress.json is damaged")],
)  # fmt: skip
def test_only_the_same_command_continues(begun, change, message):
    source, out = begun
    tokenizer, shard_tokens = change(source, out) or ("bytes", 300)
    source = source if source.exists() else source.parent / "moved"
    before = content(out)
    with pytest.raises(UserError, match=message):
        fineweb.prepare_text(out, str(source), tokenizer, shard_tokens, 1)
    assert content(out) == before


def test_a_new_text_replaces_shards(begun, tmp_path):
    source, out = begun
    write_dataset(out, {"train": ["text"], "val": ["more"]}, "bytes", "another")
    assert content(out).keys() == {"train.bin", "val.bin", "meta.json"}
    write_jsonl(tmp_path / "small.jsonl", ["one", "two"])
    fineweb.prepare_text(out, str(tmp_path / "small.jsonl"), "bytes", 300, 1)
    assert read_meta(out)["tokens"] == {"train": 4, "val": 4}


def test_fewer_shards_replace_more(folder, tmp_path):
    write_jsonl(tmp_path / "small.jsonl", ["one", "two"])
    fineweb.prepare_text(folder, str(tmp_path / "small.jsonl"), "bytes", 100, 1)
    assert content(folder).keys() == {"train-00000.bin", "val.bin", "meta.json"}


# ------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "name, data, message",
    [("none.parquet", None, "no .parquet, .jsonl or .txt file"),
     ("rows.csv", b"text", "no .parquet, .jsonl or .txt file"),
     ("rows.txt", b"text", r"too few documents; the least is 2 \(1 documents, 0 rows"),
     ("rows.txt", b"ok \xff", r"rows.txt is not UTF-8 text \(byte 3\)"),
     ("rows.parquet", b"", "cannot read .*rows.parquet"),
     ("rows.parquet", b"PAR1 damaged PAR1", "cannot read .*rows.parquet"),
     ("rows.jsonl", b"", r"too few documents; the least is 2 \(0 documents, 0 rows"),
     ("rows.jsonl", b'{"text": "one"}', r"too few documents; the least is 2 \(1 documents, 0 rows")],
)  # fmt: skip
def test_a_source_that_cannot_be_used_leaves_the_earlier_set_alone(tmp_path, monkeypatch, capsys, name, data, message):
    write_jsonl(tmp_path / "good.jsonl", ["one", "two"])
    fineweb.prepare_text(tmp_path / "out", str(tmp_path / "good.jsonl"), "bytes", processes=1)
    before = content(tmp_path / "out")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    flags = ["--source", str(tmp_path / name), "--tokenizer", "bytes", "--out_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *flags])
    with pytest.raises(SystemExit) as exit:
        run_script(fineweb.main)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert content(tmp_path / "out") == before


# ------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that `datasets` takes for a repository of the hub with two configurations."""
    home = tmp_path / "hub"
    (home / "sample").mkdir(parents=True)
    columns = [texts(150, seed=5), texts(100, seed=6)]
    for number, column in enumerate(columns):
        write_parquet(home / "sample" / f"00{number}.parquet", column, row_group_size=10)
    write_parquet(home / "all.parquet", ["not in the sample"])
    configs = "- config_name: default\n  data_files: all.parquet\n"
    configs += "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/*\n"
    (home / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(fineweb, "HUB_NAME", str(home))
    monkeypatch.setattr(fineweb, "HUB_REVISION", None)
    return columns


def test_from_the_hub(hub, tmp_path):
    assert len(fineweb.hub_files()) == 2
    fineweb.prepare_text(tmp_path / "out", tokenizer="bytes", shard_tokens=3000, processes=2)
    files = content(tmp_path / "out")
    del files["meta.json"]
    assert files == {name: np.array(ids, np.uint16).tobytes() for name, ids in reference(hub, 3000).items()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of the data set where prepared_directory looks for it: not the checkout's."""
    monkeypatch.setattr(dataset, "__file__", str(tmp_path / "dataset.py"))
    (tmp_path / "fineweb_edu").mkdir()
    (tmp_path / "fineweb_edu" / "prepare.py").touch()
    return tmp_path / "fineweb_edu"


def test_hub_is_pinned_and_may_be_out_of_reach(home, monkeypatch):
    def out_of_reach(path, name, revision):
        assert (path, name) == ("HuggingFaceFW/fineweb-edu", "sample-10BT") and len(revision) == 40
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset_builder", out_of_reach)
    with pytest.raises(UserError, match=r"hub \(ConnectionError\).*--source FILE.*--preset tiny"):
        prepared_directory("fineweb_edu", "", tokenizer="bytes")


# ------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """A data set in five shards, a chunk of rows each."""
    home = tmp_path_factory.mktemp("shards")
    write_jsonl(home / "rows.jsonl", texts(300, seed=2))
    fineweb.prepare_text(home / "mine", str(home / "rows.jsonl"), "bytes", 100, 1)
    return home / "mine"


@pytest.fixture
def folder(shared_folder, tmp_path):
    return shutil.copytree(shared_folder, tmp_path / "mine")


def whole(folder):
    return np.concatenate([np.fromfile(path, np.uint16) for path in sorted(folder.glob("train-*.bin"))])


def test_shards_are_read_as_one(shared_folder):
    meta = read_meta(shared_folder)
    tokens, expected = open_tokens(shared_folder, "train", meta, 16), whole(shared_folder)
    assert len(meta["shards"]) == 5 and len(tokens) == len(expected)
    for start in range(0, len(tokens), 31):
        for length in (1, 17, 5000):
            assert np.array_equal(tokens[start : start + length], expected[start : start + length])
    ends = np.cumsum(meta["shards"])
    for start in (*(ends - 1), *ends[:-1]):
        assert np.array_equal(tokens[start : start + 3], expected[start : start + 3])


def test_batches_are_those_of_one_file(shared_folder):
    """So windows are drawn uniformly, across borders too, and depend on (seed, step) alone."""
    tokens, expected = open_tokens(shared_folder, "train", read_meta(shared_folder), 16), whole(shared_folder)
    for step in range(20):
        batch, other = (sample_batch(ids, 64, 8, 3, step, 1, 2) for ids in (tokens, expected))
        assert all(map(torch.equal, batch, other))
    for batch, other in zip(fixed_batches(tokens, 64, 4, 100), fixed_batches(expected, 64, 4, 100)):
        assert all(map(torch.equal, batch, other))


@pytest.mark.parametrize(
    "damage, message",
    [(lambda path: path.unlink(), "cannot read .*train-00003.bin"),
     (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot read .*train-00003.bin"),
     (lambda path: path.write_bytes(path.read_bytes()[:-2]), "train-00003.bin has .* entries, by meta.json it should"),
     (lambda path: path.write_bytes(b""), "cannot read .*train-00003.bin"),
     (lambda path: (path.parent / "meta.json").write_text(
         (path.parent / "meta.json").read_text().replace('"train": ', '"train": 1')), "meta.json is damaged")],
)  # fmt: skip
def test_damaged_shards(folder, damage, message):
    damage(folder / "train-00003.bin")
    with pytest.raises(UserError, match=message):
        open_tokens(folder, "train", read_meta(folder), 16)


def test_shards_too_short_for_the_context(folder):
    meta = read_meta(folder)
    assert open_tokens(folder, "train", meta, meta["tokens"]["train"] - 1)
    with pytest.raises(UserError, match="too few for a block_size"):
        open_tokens(folder, "train", meta, meta["tokens"]["train"])


def test_ids_of_shards_are_checked_when_drawn(folder):
    path = folder / "train-00003.bin"
    np.full_like(np.fromfile(path, np.uint16), 259).tofile(path)
    tokens = open_tokens(folder, "train", read_meta(folder), 16)
    with pytest.raises(UserError, match="train-00003.bin holds token id 259, outside the vocabulary of 259"):
        sample_batch(tokens, 16, 100, seed=0, step=0)


def test_prepared_on_first_use(home, tmp_path):
    write_parquet(tmp_path / "rows.parquet", texts(100))
    assert prepared_directory("fineweb_edu", str(tmp_path / "rows.parquet"), tokenizer="bytes") == home
    assert read_meta(home)["source"] == str(tmp_path / "rows.parquet")
    before = (home / "meta.json").stat().st_mtime_ns
    prepared_directory("fineweb_edu", str(tmp_path / "rows.parquet"), tokenizer="bytes")
    assert (home / "meta.json").stat().st_mtime_ns == before


def test_an_unfinished_corpus_and_rows_are_not_taken_for_text(tmp_path):
    (tmp_path / "progress.json").write_text("{}")
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="is not finished; run python -m data.fineweb_edu.prepare"):
        prepared_directory(f"{tmp_path}/", str(tmp_path / "mine.jsonl"), tokenizer="bytes")
    with pytest.raises(UserError, match="is no plain text; python -m data.fineweb_edu.prepare"):
        prepared_directory(f"{tmp_path}/new", str(tmp_path / "mine.jsonl"), tokenizer="bytes")
