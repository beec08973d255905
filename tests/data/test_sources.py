"""Local sources: what is read of them, when they are prepared again, and what of the user's own is left alone."""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

import dpo
import sft
import train
from data import write
from data.dataset import LOCAL_FILES, fingerprint, prepared_directory, preparing, read_meta, source_files
from data.fineweb_edu import prepare as fineweb
from data.slimorca import prepare as slimorca
from data.wikitext2 import prepare as wikitext2
from data.write import write_dataset
from engine.settings import UserError

TALK = '{"conversations": [{"from": "human", "value": "%s"}, {"from": "gpt", "value": "b"}]}\n' * 2
PAIR = '{"question": "%s", "chosen": "a", "rejected": "b"}\n' * 2
ROWS = {"": "a line of %s\n" * 50, "sft": TALK, "dpo": PAIR}
OPTIONS = {"": dict(tokenizer="bytes"), "sft": dict(tokenizer="bytes", block_size=96)}
OPTIONS["dpo"] = OPTIONS["sft"]
DATE = 10**18


def text(word, kind=""):
    return ROWS[kind].replace("%s", word)


def set_date(path, seconds):
    os.utime(path, (time.time() + seconds,) * 2)


# ------------------------------------------------------------------------------------- changed sources


@pytest.mark.parametrize("kind", ["", "sft", "dpo"])
@pytest.mark.parametrize(
    "change",
    [lambda new, old: (set_date(new, -9999), new.replace(old)),  # mv, cp -p, rsync and tar keep an older date
     lambda new, old: (set_date(new, 9999), new.replace(old)),
     lambda new, old: (set_date(new, -9999), old.unlink(), old.symlink_to(new)),
     lambda new, old: (old.write_bytes(new.read_bytes()), set_date(old, -5)),
     lambda new, old: (old.write_bytes(new.read_bytes() * 2), os.utime(old, ns=(DATE, DATE)))],
)  # fmt: skip
def test_a_replaced_source_is_prepared_again(tmp_path, kind, change):
    old, new, name = tmp_path / "old", tmp_path / "new", f"{tmp_path}/set"
    old.write_text(text("old", kind))
    os.utime(old, ns=(DATE, DATE))
    new.write_text(text("new", kind))
    directory = prepared_directory(name, str(old), kind, **OPTIONS[kind])
    before = (directory / "meta.json").stat().st_mtime_ns
    assert prepared_directory(name, str(old), kind, **OPTIONS[kind]) == directory
    assert (directory / "meta.json").stat().st_mtime_ns == before
    change(new, old)
    prepared_directory(name, str(old), kind, **OPTIONS[kind])
    ids = (directory / "train.bin").read_bytes()[::2]
    assert b"new" in ids and b"old" not in ids


def test_a_file_changed_inside_a_folder_is_noticed(tmp_path):
    (tmp_path / "source" / "more").mkdir(parents=True)
    files = [tmp_path / "source" / name for name in ("a.txt", "more/b.txt", "more/c.md")]
    for file in files:
        file.write_text("text")
    known = {fingerprint(tmp_path / "source")}

    def is_known():
        found = fingerprint(tmp_path / "source")
        return found in known or known.add(found)

    for file in files:
        assert is_known()
        file.write_text("other text")
        assert not is_known()
        set_date(file, -1000)
        assert not is_known()
        file.rename(file.with_suffix(".old"))
        assert not is_known()
    for name in (".hidden", "more/.DS_Store", ".git/index", "train-00000.bin", "meta.json", "more/val.bin.7.tmp"):
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_text("x")
        assert is_known()  # they are no data


def test_data_of_an_older_version_stay(tmp_path):
    source, name = tmp_path / "old.txt", f"{tmp_path}/set"
    source.write_text(text("old"))
    meta_path = prepared_directory(name, str(source), tokenizer="bytes") / "meta.json"
    meta = json.loads(meta_path.read_text())
    del meta["files"]
    meta_path.write_text(json.dumps(meta))
    for date in (-50, -5000):
        set_date(source, date)
        prepared_directory(name, str(source), tokenizer="bytes")
        assert "files" not in read_meta(name)
    set_date(source, 50)
    prepared_directory(name, str(source), tokenizer="bytes")
    assert read_meta(name)["files"]


def rows(count):
    return "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(count))


def test_a_corpus_that_changed_is_not_continued(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "source" / name).write_text(rows(1000))
    (tmp_path / "source" / "c.parquet").write_bytes(b"damaged")
    prepare = lambda: fineweb.prepare_text(tmp_path / "out", str(tmp_path / "source"), "bytes", 300, 1)  # noqa: E731
    with pytest.raises(UserError, match="cannot read .*c.parquet"):
        prepare()
    progress = tmp_path / "out" / "progress.json"
    with pytest.raises(UserError, match="cannot read .*c.parquet"):  # it goes on
        prepare()
    set_date(tmp_path / "source" / "a.jsonl", -1000)
    with pytest.raises(UserError, match="begun with files of other sizes or dates; delete .*progress.json"):
        prepare()
    content = json.loads(progress.read_text())
    del content["files"]  # as an older version left it
    progress.write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot read .*c.parquet"):
        prepare()


# ------------------------------------------------------------------------------------- hidden files


HIDDEN = [".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "more/._b.parquet", ".git/x/y.txt", ".txt.txt"]


def test_hidden_files_are_no_data(tmp_path):
    home = tmp_path / ".corpus"  # which may be hidden itself
    (home / "more").mkdir(parents=True)
    (home / "a.jsonl").write_text(rows(40))
    (home / "more" / "b.jsonl").write_text(rows(20))
    for name in HIDDEN:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"\0\5\x16\7")
    assert source_files(home) == fineweb.find_files(home) == [home / "a.jsonl", home / "more" / "b.jsonl"]
    assert fineweb.find_files(home / HIDDEN[0]) == [home / HIDDEN[0]]  # a file that is named is read
    fineweb.prepare_text(tmp_path / "out", str(home), "bytes", processes=1)
    assert read_meta(tmp_path / "out")["report"] == {"documents": 60, "rows without a text": 0}


# ------------------------------------------------------------------------------------- files of the user


KEPT = ["train-original.bin", "train-1.bin", "train-000001.bin", "train-00000.bin.bak", "notes.tmp", "val.bin.tmp"]
KEPT += ["a.7.tmp", "train-x.bin.7.tmp", "my-train-00000.bin", "meta.json.old"]


@pytest.mark.parametrize(
    "prepare",
    [lambda out, source: write_dataset(out, {"train": ["a"], "val": ["b"]}, "bytes", "a test"),
     lambda out, source: fineweb.prepare_text(out, str(source), "bytes", processes=1),
     lambda out, source: slimorca.prepare_sft(out, str(source), "bytes", 96)],
)  # fmt: skip
def test_only_files_that_a_preparation_writes_are_removed(tmp_path, prepare):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text(text("a", "sft") + rows(2))
    out.mkdir()
    for name in KEPT:
        (out / name).write_text(name)
    for name in ("train-00008.bin", "train-00009.bin.7.tmp"):  # folders and links are not ours
        (out / name).mkdir()
    (out / "train-00006.bin").symlink_to(source)
    prepare(out, source)
    assert {name: (out / name).read_text() for name in KEPT} == dict(zip(KEPT, KEPT))
    assert (out / "train-00008.bin").is_dir() and (out / "train-00009.bin.7.tmp").is_dir()
    assert (out / "train-00006.bin").is_symlink()


def test_leftovers_of_earlier_preparations_are_removed(tmp_path):
    leftovers = ["train-00007.bin", "train-00001.bin.42.tmp", "val.bin.1.tmp", "meta.json.99.tmp"]
    for name in leftovers:
        (tmp_path / name).touch()
    (tmp_path / "rows.jsonl").write_text(rows(3))
    fineweb.prepare_text(tmp_path, str(tmp_path / "rows.jsonl"), "bytes", processes=1)
    assert not [name for name in leftovers if (tmp_path / name).exists()]


# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("script, kind", [(train, ""), (sft, "sft"), (dpo, "dpo")])
def test_data_of_ones_own_need_a_name(tmp_path, script, kind):
    """Those of the hub would be gone, and later runs would take the others for them."""
    name, source = script.Settings().dataset, tmp_path / "my.txt"
    source.write_text(text("a", kind))
    assert name == LOCAL_FILES[kind][0]
    for dataset, message in ((name, "--dataset NAME --source .*my.txt"), ("tiny", "--dataset mine --source FILE")):
        with pytest.raises(UserError, match=message) as error:
            prepared_directory(dataset, str(source), kind, **OPTIONS[kind])
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- two at once


def hold(directory, seconds, prepare):
    """Prepare in another process that takes its time. Returns when it has begun."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException), preparing(directory):
            os.write(writer, b"x")
            time.sleep(seconds)
            prepare()
        os._exit(0)
    os.read(reader, 1)
    return child


COMMANDS = {
    "wikitext2": (wikitext2, "", "", "prepare_text"),
    "slimorca": (slimorca, "sft", "sft", "prepare_sft"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("call", ["script", "command"])
def test_the_second_of_two_preparations_waits_and_finds_the_data(tmp_path, monkeypatch, capsys, name, call):
    module, kind, folder, function = COMMANDS[name]
    source, out = tmp_path / "my.txt", tmp_path / "out"
    source.write_text(text("a", kind))
    prepare = getattr(module, function)
    child = hold(out / folder, 0.7, lambda: prepare(out / folder, source=str(source), **OPTIONS[kind]))
    monkeypatch.setattr(module, function, lambda *args, **options: pytest.fail("prepared twice"))
    if call == "script":
        prepared_directory(str(out), str(source), kind, **OPTIONS[kind])
    else:
        size = ["--block_size", "96"] * bool(kind)
        argv = ["prepare.py", "--source", str(source), "--out_dir", str(out), "--tokenizer", "bytes", *size]
        monkeypatch.setattr(sys, "argv", argv)
        module.main()
    assert f"waiting for another process that prepares {out}" in capsys.readouterr().out
    assert os.waitpid(child, 0)[1] == 0 and read_meta(out / folder)["source"] == str(source)
    assert not list((out / folder).glob("*lock*"))


def test_the_second_prepares_what_the_first_did_not(tmp_path, capsys):
    for failed in (True, False):  # it failed, or made something else
        source, out = tmp_path / "my.txt", tmp_path / f"out-{failed}"
        source.write_text(text("a"))
        other = lambda: None if failed else write_dataset(out, {"train": ["a"], "val": ["b"]}, "bytes", "other")  # noqa: B023, E731
        child = hold(out, 0.5, other)
        write.prepare_anew(wikitext2.prepare_text, out, str(source), tokenizer="bytes")
        os.waitpid(child, 0)
        assert read_meta(out)["source"] == str(source)
        assert "waiting for another process" in capsys.readouterr().out


def test_many_preparations_at_once(tmp_path, monkeypatch):
    source, calls = tmp_path / "my.txt", []
    source.write_text(text("a"))
    prepare = wikitext2.prepare_text
    monkeypatch.setattr(
        wikitext2, "prepare_text", lambda *args, **options: (calls.append(1), prepare(*args, **options))
    )
    get = lambda: prepared_directory(f"{tmp_path}/set", str(source), tokenizer="bytes")  # noqa: E731
    threads = [threading.Thread(target=get) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(calls) == 1 and read_meta(tmp_path / "set")


def test_a_preparation_that_fails_leaves_no_folder(tmp_path):
    for kind in OPTIONS:
        with pytest.raises(UserError, match="cannot read"):
            prepared_directory(f"{tmp_path}/new/set", f"{tmp_path}/no.txt", kind, **OPTIONS[kind])
        assert not (tmp_path / "new").exists()
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        prepared_directory(f"{tmp_path}/set", f"{tmp_path}/no.txt", tokenizer="bytes")
    assert not any(Path(tmp_path / "set").iterdir())
