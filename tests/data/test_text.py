"""Text data sets: written, prepared from local files or the hub, and opened again."""

import os
import random
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from data import write
from data.dataset import open_tokens, prepared_directory, read_meta, token_dtype
from data.fineweb_edu import prepare as fineweb
from data.tokenizer import END_OF_TEXT, get_tokenizer
from data.wikitext2 import prepare as wikitext2
from data.write import read_utf8, write_dataset
from engine.settings import UserError


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "set", {"train": ["first document", "second"], "val": ["third"]}, "bytes", "a test")
    return tmp_path / "set"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decode(path):
    return get_tokenizer("bytes").decode(np.fromfile(path, np.uint16).tolist())


# ------------------------------------------------------------------------------------- files


def test_documents_come_back_with_a_separator_after_each(folder):
    meta = read_meta(folder)
    assert meta.pop("crc32").keys() == {"train", "val"}
    tokens = {"train": 22, "val": 6}
    assert meta == {"tokenizer": "bytes", "vocab_size": 259, "tokens": tokens, "source": "a test", "files": ""}
    tokens = open_tokens(folder, "train", meta, block_size=8)
    assert tokens.dtype == np.uint16
    assert get_tokenizer("bytes").decode(tokens.tolist()) == f"first document{END_OF_TEXT}second{END_OF_TEXT}"


def test_text_cannot_separate_documents(tmp_path):
    write_dataset(tmp_path, {"train": [f"one{END_OF_TEXT}two"], "val": ["x"]}, "bytes", "a test")
    tokens = open_tokens(tmp_path, "train", read_meta(tmp_path), block_size=8)
    assert (tokens == 256).sum() == 1 and tokens[-1] == 256


def test_large_vocabularies_take_four_bytes_a_token():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize(
    "damage, message",
    [(lambda f: (f / "train.bin").unlink(), "cannot read"),
     (lambda f: (f / "train.bin").write_bytes(b""), "cannot read"),
     (lambda f: (f / "train.bin").write_bytes(bytes(20)), "has 10 entries, by meta.json it should have 22"),
     (lambda f: (f / "train.bin").write_bytes(bytes(43)), "cannot read"),
     (lambda f: (f / "train.bin").write_bytes(bytes(42) + b"\xff\xff"), "token id 65535, outside the vocabulary"),
     (lambda f: (f / "meta.json").unlink(), "not a prepared data set"),
     (lambda f: (f / "meta.json").write_text("{"), "damaged"),
     (lambda f: (f / "meta.json").write_text("[1]"), "damaged"),
     (lambda f: (f / "meta.json").write_text('{"tokenizer":"","vocab_size":9,"tokens":5,"crc32":0,"source":""}'),
      "damaged"),
     (lambda f: (f / "meta.json").write_text('{"tokenizer": "bytes"}'), "damaged")],
)  # fmt: skip
def test_damage_is_reported(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_tokens(folder, "train", read_meta(folder), block_size=8)


def test_too_little_text_for_the_context(folder):
    assert len(open_tokens(folder, "train", read_meta(folder), block_size=21)) == 22
    with pytest.raises(UserError, match="too few for a block_size of 22"):
        open_tokens(folder, "train", read_meta(folder), block_size=22)


def test_an_interrupted_text_leaves_the_earlier_one(folder):
    def documents():
        yield "new"
        raise OSError("disk full")

    before = content(folder)
    for splits in ({"train": documents(), "val": ["b"]}, {"train": ["a"], "val": documents()}):
        with pytest.raises(OSError):
            write_dataset(folder, splits, "bytes", "new")
        assert content(folder) == before


def test_a_split_without_documents_is_refused(folder):
    before = content(folder)
    with pytest.raises(UserError, match="my.txt has no documents for val; give it more text"):
        write_dataset(folder, {"train": ["text"], "val": []}, "bytes", "my.txt")
    assert content(folder) == before


# ------------------------------------------------------------------------------------- prepare.py


def test_articles_are_split_at_titles():
    text = " \n = One = \n \n body = not a title\n = = Section = = \n more\n = Two = \n text\n"
    split = lambda blocks: ["".join(lines) for lines in wikitext2.split_articles(blocks)]  # noqa: E731
    assert (
        split([text])
        == split(text)
        == [
            " \n = One = \n \n body = not a title\n = = Section = = \n more\n",
            " = Two = \n text\n",
        ]
    )
    assert split(["no titles\nat all"]) == ["no titles\nat all"]


def test_wikitext_from_the_hub(tmp_path, monkeypatch):
    def load_dataset(path, name, revision):
        assert (path, name) == ("Salesforce/wikitext", "wikitext-2-raw-v1") and len(revision) == 40
        rows = [" = A = \n", " text\n", " = B = \n", " more\n"]
        return {"train": {"text": rows}, "validation": {"text": [" = C = \n"]}, "test": {"text": []}}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    wikitext2.prepare_text(tmp_path, tokenizer="bytes")
    assert decode(tmp_path / "train.bin") == f" = A = \n text\n{END_OF_TEXT} = B = \n more\n{END_OF_TEXT}"
    assert decode(tmp_path / "val.bin") == f" = C = \n{END_OF_TEXT}"
    assert read_meta(tmp_path)["source"].startswith("Salesforce/wikitext wikitext-2-raw-v1 ")


def test_hub_out_of_reach(tmp_path, monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"(?s)cannot be loaded.*--source FILE.*--preset tiny"):
        wikitext2.prepare_text(tmp_path)


def test_own_text_with_and_without_validation_text(tmp_path):
    text, val = tmp_path / "text.txt", tmp_path / "val.txt"
    text.write_text("".join(f"line {i}\n" for i in range(100)))
    val.write_text("other")
    wikitext2.prepare_text(tmp_path / "a", text, val, "bytes")
    assert decode(tmp_path / "a" / "train.bin") == text.read_text() + END_OF_TEXT
    assert decode(tmp_path / "a" / "val.bin") == f"other{END_OF_TEXT}"

    wikitext2.prepare_text(tmp_path / "b", text, "", "bytes")
    train, held_out = (decode(tmp_path / "b" / f"{split}.bin").removesuffix(END_OF_TEXT) for split in ("train", "val"))
    assert train + held_out == text.read_text()
    assert train.endswith("\n") and 0.05 < len(held_out) / len(text.read_text()) <= 0.1


@pytest.mark.parametrize(
    "content, message", [(None, "No such file"), (b"", "no text"), (b"ok \xff", "not UTF-8 text \\(byte 3\\)")]
)
def test_own_text_that_cannot_be_used(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        wikitext2.prepare_text(tmp_path / "out", tmp_path / "text.txt", "", "bytes")
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("name, what", [("corpus", "is a folder"), ("rows.jsonl", "is no plain text")])
def test_sources_of_another_kind_name_the_command_that_reads_them(tmp_path, name, what):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    command = f"python -m data.fineweb_edu.prepare --source {tmp_path / name} --out_dir data/NAME reads"
    with pytest.raises(UserError, match=f"{name} {what}; {command}"):
        wikitext2.prepare_text(tmp_path / "out", str(tmp_path / name), "", "bytes")


# ------------------------------------------------------------------------------------- prepared on first use


def test_data_are_prepared_when_missing_or_outdated(tmp_path):
    one, two, out = tmp_path / "one.txt", tmp_path / "two.txt", f"{tmp_path}/out"
    one.write_text("one\n" * 10)
    two.write_text("two\n" * 20)
    with pytest.raises(UserError, match="there is no data set"):
        prepared_directory(out, "", tokenizer="bytes")
    prepared_directory(out, str(one), tokenizer="bytes")
    assert sum(read_meta(out)["tokens"].values()) == 42
    prepared_directory(out, "", tokenizer="bytes")  # already there
    assert read_meta(out)["source"] == str(one)
    prepared_directory(out, str(two), tokenizer="bytes")
    assert read_meta(out)["source"] == str(two)
    two.write_text("new\n" * 30)
    os.utime(two, (time.time() + 60,) * 2)
    prepared_directory(out, str(two), tokenizer="bytes")
    assert sum(read_meta(out)["tokens"].values()) == 122
    with pytest.raises(UserError, match="cannot read"):
        prepared_directory(out, str(tmp_path / "three.txt"), tokenizer="bytes")
    assert read_meta(out)["source"] == str(two)  # and what was there is still there


def test_data_sets_for_other_stages():
    options = dict(tokenizer="bytes", block_size=64)
    with pytest.raises(UserError, match="the data set wikitext2 is not for sft; slimorca and tiny are"):
        prepared_directory("wikitext2", "", "sft", **options)
    with pytest.raises(UserError, match="the data set slimorca is not for pretraining; wikitext2 and tiny are"):
        prepared_directory("slimorca", "my.jsonl", **options)


# ------------------------------------------------------------------------------------- long lines, long files


LONG = [
    ("word " * 220_000 + "\nTHE END\n", r"word$"),
    *[(("word " * 20_000 + "\n") * 8 + "x" * 2000 + end, r"word$") for end in ("", "\n", "\r\n", "\n\n")],
    ("word " * 2000, r"word$"),
    ("word\r" * 20_000, r"word\n$"),
    ("x" * 500_000, r"x$"),
    ("数据" * 50_000 + "\nTHE END\n", r"[数据]$"),
    ("line of text\n" * 9000, r"\n$"),
    ("line of text\r\n" * 9000, r"text\n$"),
    ("line\n" * 100, r"\n$"),
    ("a" * 1000 + "\n" + "b" * 50, r"a$"),
]


@pytest.mark.parametrize("text, end", LONG)
def test_a_tenth_is_held_out_wherever_lines_end(tmp_path, text, end):
    (tmp_path / "my.txt").write_text(text, newline="")
    wikitext2.prepare_text(tmp_path / "out", str(tmp_path / "my.txt"), "", "bytes")
    train, val = (decode(tmp_path / "out" / f"{split}.bin").removesuffix(END_OF_TEXT) for split in ("train", "val"))
    assert train + val == text.replace("\r\n", "\n").replace("\r", "\n")
    least = 0.05 if len(text) < 100_000 else 0.09
    assert re.search(end, train) and least <= len(val.encode()) / len((train + val).encode()) <= 0.101


@pytest.mark.parametrize("text", ["x", "é"])
def test_a_text_that_is_too_short(tmp_path, text):
    (tmp_path / "my.txt").write_text(text)
    with pytest.raises(UserError, match="my.txt has no documents for .*; give it more text"):
        wikitext2.prepare_text(tmp_path / "out", str(tmp_path / "my.txt"), "", "bytes")
    write_dataset(tmp_path / "out", {"train": [text], "val": [text]}, "bytes", "a test")
    with pytest.raises(UserError, match="too few for a block_size of 8; give it more text, or lower --block_size"):
        open_tokens(tmp_path / "out", "train", read_meta(tmp_path / "out"), block_size=8)


WORDS = [
    "a",
    "word",
    "don't",
    "'s",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\x1c",
    "\u2028",
    "\xa0",
    "é",
    "数据",
    "1",
    "23",
    ".",
    "!?",
]
WORDS += [" = T = \n", "\n = T = \n", " = = S = = \n", END_OF_TEXT, "<|", "|>"]


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_encoded_to_the_ids_of_the_whole(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(WORDS, k=800))
    whole = [get_tokenizer("gpt2").encode_ordinary(text)]
    size = rng.choice((200, 300))
    monkeypatch.setattr(write, "PIECE", size)
    parts = list(write.pieces(text[i : i + 7] for i in range(0, len(text), 7)))
    assert "".join(parts) == text and len(parts) > 800 / size
    assert [sum(map(get_tokenizer("gpt2").encode_ordinary, parts), [])] == whole


@pytest.mark.parametrize("seed", range(10))
def test_a_file_read_in_blocks_is_that_read_at_once(tmp_path, monkeypatch, seed):
    text = "".join(random.Random(seed).choices([*WORDS, "\r\n", "\r"], k=1000))
    (tmp_path / "my.txt").write_text(text, newline="", encoding="utf-8")
    contents = []
    for size in (2**20, 64, 7):
        monkeypatch.setattr(write, "PIECE", size)
        monkeypatch.setattr(wikitext2, "PIECE", max(64, size))
        assert "".join(write.stream_utf8(tmp_path / "my.txt")) == (tmp_path / "my.txt").read_text(encoding="utf-8")
        wikitext2.prepare_text(tmp_path / "out", str(tmp_path / "my.txt"), "", "bytes")
        contents.append({name: (tmp_path / "out" / name).read_bytes() for name in ("train.bin", "val.bin")})
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("position", [0, 5, 1000, 1023, 1024, 5000])
def test_the_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, position):
    monkeypatch.setattr(write, "PIECE", 1024)
    (tmp_path / "my.txt").write_bytes(b"x" * position + b"\xc3(" + b"x" * 3000)
    for read in (read_utf8, lambda path: wikitext2.prepare_text(tmp_path / "out", path, "", "bytes")):
        with pytest.raises(UserError, match=rf"my.txt is not UTF-8 text \(byte {position}\)"):
            read(tmp_path / "my.txt")


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Of lines and of words without a line end; the least of several sizes is what the modules take."""
    code = "import resource, sys; from data.wikitext2.prepare import prepare_text as prepare; "
    code += "prepare(*sys.argv[1:], '', 'bytes'); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    for line in ("some words of text\n", "some words of text "):
        peaks = []
        for megabytes in (2, 12):
            (tmp_path / "my.txt").write_text(line * (megabytes * 10**6 // len(line)))
            command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "my.txt")]
            peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
        assert peaks[1] - peaks[0] < 40, peaks  # MiB; 17 to 21 bytes a byte would be 170


def test_a_pipe_of_text(tmp_path):
    for name in ("text", "val"):
        os.mkfifo(tmp_path / name)
        threading.Thread(target=(tmp_path / name).write_bytes, args=(b"line of text\n" * 100,)).start()
    wikitext2.prepare_text(tmp_path / "out", str(tmp_path / "text"), str(tmp_path / "val"), "bytes")
    assert read_meta(tmp_path / "out")["tokens"] == {"train": 1301, "val": 1301}
    threading.Thread(target=(tmp_path / "text").write_bytes, args=(b"line of text\n" * 100,)).start()
    wikitext2.prepare_text(tmp_path / "out", str(tmp_path / "text"), "", "bytes")
    assert sum(read_meta(tmp_path / "out")["tokens"].values()) == 1302


@pytest.mark.parametrize("count", [0, 1, 2, 1500])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_spelled_out_separators_are_reported(tmp_path, capsys, count, kind):
    (tmp_path / "source").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "source" / name).write_text("text\n" * 50)
    with open(tmp_path / "source" / "b.txt", "a") as file:
        file.write(f"text{END_OF_TEXT}\n" * count)
    if kind == "file":
        wikitext2.prepare_text(tmp_path / "out", str(tmp_path / "source" / "b.txt"), "", "bytes")
    else:
        fineweb.prepare_text(tmp_path / "out", str(tmp_path / "source"), "bytes", processes=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if END_OF_TEXT in line]
    assert len(lines) == (count > 0)
    for line in lines:
        assert "b.txt" in line and f"{END_OF_TEXT} occurs {count:,} times and is spelled out as text" in line
        assert "python -m data.fineweb_edu.prepare --source FOLDER" in line
