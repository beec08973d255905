"""Text data sets: written, prepared from local files or the hub, and opened again."""

import os
import time

import numpy as np
import pytest

from data.dataset import open_tokens, prepared_directory, read_meta, token_dtype
from data.tokenizer import END_OF_TEXT, get_tokenizer
from data.wikitext2 import prepare as wikitext2
from data.write import write_dataset
from engine.settings import UserError


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "set", {"train": ["first document", "second"], "val": ["third"]}, "bytes", "a test")
    return tmp_path / "set"


def decode(path):
    return get_tokenizer("bytes").decode(np.fromfile(path, np.uint16).tolist())


# ------------------------------------------------------------------------------------- files


def test_documents_come_back_with_a_separator_after_each(folder):
    meta = read_meta(folder)
    assert meta.pop("crc32").keys() == {"train", "val"}
    assert meta == {"tokenizer": "bytes", "vocab_size": 259, "tokens": {"train": 22, "val": 6}, "source": "a test"}
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


def test_an_interrupted_text_has_no_meta_json_and_no_half_file(folder):
    def documents():
        yield "new"
        raise OSError("disk full")

    before = (folder / "train.bin").read_bytes()
    with pytest.raises(OSError):
        write_dataset(folder, {"train": documents(), "val": ["b"]}, "bytes", "new")
    assert sorted(path.name for path in folder.iterdir()) == ["train.bin", "val.bin"]
    assert (folder / "train.bin").read_bytes() == before


# ------------------------------------------------------------------------------------- prepare.py


def test_articles_are_split_at_titles():
    text = " \n = One = \n \n body = not a title\n = = Section = = \n more\n = Two = \n text\n"
    assert wikitext2.split_articles(text) == [
        " \n = One = \n \n body = not a title\n = = Section = = \n more\n",
        " = Two = \n text\n",
    ]
    assert wikitext2.split_articles("no titles\nat all") == ["no titles\nat all"]


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
