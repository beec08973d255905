"""Examples for SFT and DPO: from rows to files, and opened again."""

import json
import os
import shutil
import threading

import numpy as np
import pytest

from data.chat import render, render_prompt
from data.dataset import open_examples, prepared_directory, read_meta
from data.orca_dpo_pairs.prepare import prepare_dpo
from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import prepare_sft
from data.slimorca.prepare import tokenize as tokenize_conversation
from data.tokenizer import IM_END, get_tokenizer
from data.write import open_rows
from engine.settings import UserError

BYTES = get_tokenizer("bytes")


def conversation(*turns):
    return {"conversations": [{"from": role, "value": text, "weight": None} for role, text in turns]}


def pair(question="Why?", chosen="So.", rejected="No.", system=""):
    return dict(system=system, question=question, chosen=chosen, rejected=rejected)


def prepare(tmp_path, prepare, lines, block_size=64):
    """Prepare examples from lines, which are bytes or become JSON -> their folder and meta.json."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / "source.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    prepare(tmp_path / "set", str(tmp_path / "source.jsonl"), "bytes", block_size)
    return tmp_path / "set", read_meta(tmp_path / "set")


def rows_of(examples):
    bounds = zip(examples.offsets, examples.offsets[1:])
    return [(examples.ids[a:b].tolist(), examples.mask[a:b].tolist()) for a, b in bounds]


def rendered(*turns):
    """A rendered conversation up to its last learned token."""
    ids, mask = render(turns, BYTES)
    return ids[:-1], mask[:-1]


# ------------------------------------------------------------------------------------- from rows to files


def test_conversations_become_rows(tmp_path):
    lines = [conversation(("human", f"Q{i}"), ("gpt", f"A{i}")) for i in range(100)]
    folder, meta = prepare(tmp_path, prepare_sft, lines)
    train, val = (open_examples(folder, split, meta, 1, 64) for split in ("train", "val"))
    expected = [rendered(("user", f"Q{i}"), ("assistant", f"A{i}")) for i in range(100)]
    assert rows_of(val) == expected[::20]  # every 20th is held out
    assert rows_of(train) == [row for i, row in enumerate(expected) if i % 20]
    assert meta["examples"] == {"train": 95, "val": 5} and meta["report"] == {"rows": 100, "cut": 0}
    assert train.lengths().tolist() == [len(ids) for i, (ids, _) in enumerate(expected) if i % 20]


def test_many_rows_keep_their_order(tmp_path):
    """More than are read ahead."""
    count = 64 * (4 * os.cpu_count() + 4)
    lines = [conversation(("human", str(i)), ("gpt", "x")) for i in range(count)]
    folder, meta = prepare(tmp_path, prepare_sft, lines)
    rows = rows_of(open_examples(folder, "train", meta, 1, 64))
    numbers = [int(BYTES.decode(ids).split("\n")[1].removesuffix(IM_END)) for ids, _ in rows]
    assert numbers == [i for i in range(count) if i % 20]


def test_turns_of_a_conversation():
    row = conversation(("system", "Be kind."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert tokenize_conversation(row, BYTES, 2048) == [rendered(*turns)]
    row["conversations"].append({"from": "human", "value": "not answered"})
    assert tokenize_conversation(row, BYTES, 2048) == [rendered(*turns)]
    without = conversation(("system", " "), ("human", "a"), ("gpt", "b"))
    assert tokenize_conversation(without, BYTES, 2048) == [rendered(("user", "a"), ("assistant", "b"))]


def test_rows_that_cannot_be_conversations_are_skipped_and_counted(tmp_path):
    good = conversation(("human", "a"), ("gpt", "b"))
    lines = [
        good, b"{", b"\xff\xfe", b"", b"null", b"[]", b"3",
        {"conversations": None}, {"conversations": [3]}, {"text": 1},
        conversation(("human", 3), ("gpt", "b")), conversation(("tool", "a"), ("gpt", "b")), b"[" * 100_000,
        conversation(), conversation(("human", "a")),
        conversation(("human", "a"), ("gpt", "")), conversation(("human", ""), ("gpt", "b")),
        conversation(("human", "a" * 100), ("gpt", "b")), conversation(("gpt", "b"), ("human", "a")),
        b"[" * 900 + b"]" * 900,
        conversation(("human", "a"), ("gpt", "b" * 100)), good,
    ]  # fmt: skip
    folder, meta = prepare(tmp_path, prepare_sft, lines)
    assert meta["report"] == {
        "rows": 21, "cut": 1, "malformed": 12, "that begin with an answer": 1, "without an answer": 2,
        "with an empty turn": 2, "whose answers begin beyond the context": 1,
    }  # fmt: skip
    assert meta["examples"] == {"train": 2, "val": 1}
    cut, _ = rows_of(open_examples(folder, "train", meta, 1, 64))
    assert len(cut[0]) == len(cut[1]) == 64 and cut[1][-1] == 1 and cut[0][-1] == ord("b")


def test_pairs_become_two_rows_with_the_same_prompt(tmp_path):
    folder, meta = prepare(tmp_path, prepare_dpo, [pair(), pair(system="Be kind.", chosen="Yes.")])
    train, val = (open_examples(folder, split, meta, 2, 64) for split in ("train", "val"))
    end = BYTES.encode_single_token(IM_END)
    for examples, system, answers in ((val, [], ("So.", "No.")), (train, [("system", "Be kind.")], ("Yes.", "No."))):
        prompt = render_prompt([*system, ("user", "Why?")], BYTES)
        assert len(examples) == 1
        for (ids, mask), answer in zip(rows_of(examples), answers):
            assert ids == [*prompt, *answer.encode(), end]
            assert mask == [0] * len(prompt) + [1] * (len(answer) + 1)


def test_pairs_that_teach_nothing_are_skipped_and_counted(tmp_path):
    lines = [
        pair(), pair(), b"nonsense", [1], "text",
        pair(question=None), {"question": "a", "chosen": "b"}, {"conversations": []},
        pair(chosen=""), pair(rejected=" "), pair(chosen=["a"]),
        pair(chosen="Same", rejected="Same"), pair(chosen="x" * 64 + "a", rejected="x" * 64 + "b"),
        pair(question="q" * 64), pair(chosen="a" * 64),
    ]  # fmt: skip
    folder, meta = prepare(tmp_path, prepare_dpo, lines)
    assert meta["report"] == {
        "rows": 15, "cut": 1, "malformed": 6, "with an empty text": 3, "whose answers are the same": 2,
        "whose prompt leaves no room": 1,
    }  # fmt: skip
    assert meta["examples"] == {"train": 2, "val": 1}


def test_prompt_and_answers_are_tokenized_apart():
    """GPT-2's tokenizer would join the end of one with the beginning of the other."""
    chosen, rejected = tokenize_pair(pair(chosen="So.", rejected="Not so."), BYTES, 2048)
    prompt = render_prompt([("user", "Why?")], BYTES)
    assert chosen[0][: len(prompt)] == rejected[0][: len(prompt)] == prompt


@pytest.mark.parametrize("lines", [[], [b"no"], [pair()]])
def test_too_few_examples(tmp_path, lines):
    with pytest.raises(UserError, match="too few usable examples, .; the least is 2"):
        prepare(tmp_path, prepare_dpo, lines)
    assert not any((tmp_path / "set").iterdir())


@pytest.fixture(scope="module")
def two_pairs(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("pairs"), prepare_dpo, [pair(), pair()])


def test_useless_source_leaves_the_old_examples(tmp_path, two_pairs):
    folder = shutil.copytree(two_pairs[0], tmp_path / "set")
    with pytest.raises(UserError, match="usable examples"):
        prepare(tmp_path, prepare_dpo, [b"no"])
    assert read_meta(folder) == two_pairs[1] and len(open_examples(folder, "train", two_pairs[1], 2, 64)) == 1


def test_a_pipe_is_read_only_once(tmp_path):
    """As with --source <(zcat my.jsonl.gz), which has nothing more to say the second time."""
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b'{"a": 1}\n\n{"b": 2}\n',)).start()
    rows, total, _ = open_rows("a/b", "main", str(tmp_path / "pipe"))
    assert total is None and list(rows) == [b'{"a": 1}\n', b'{"b": 2}\n']


def test_source_that_is_missing():
    with pytest.raises(UserError, match="cannot read nosuch.jsonl: No such file"):
        open_rows("a/b", "main", "nosuch.jsonl")


def test_rows_from_the_hub(monkeypatch, tmp_path):
    def load_dataset(path, **options):
        assert options == dict(split="train", revision="624952e3f420ae18d88b31977ee2ea436c833abb")
        return [pair(), pair()]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    prepare_dpo(tmp_path, "", "bytes", 64)
    assert read_meta(tmp_path)["source"].startswith("Intel/orca_dpo_pairs 62495")


@pytest.mark.parametrize(
    "damage, message",
    [(lambda f: (f / "val.mask.bin").unlink(), "cannot read"),
     (lambda f: (f / "val.mask.bin").write_bytes(bytes(3)), "should have"),
     (lambda f: (f / "val.mask.bin").write_bytes(bytes((f / "val.mask.bin").stat().st_size)), "is damaged"),
     (lambda f: (f / "val.offsets.bin").write_bytes(bytes(8)), "should have"),
     (lambda f: (f / "val.offsets.bin").write_bytes(bytes(24)), "is damaged"),
     (lambda f: (f / "val.offsets.bin").write_bytes(np.array([0, 60, 54]).tobytes()), "is damaged"),
     (lambda f: (f / "val.bin").write_bytes(b""), "cannot read")],
)  # fmt: skip
def test_damaged_examples(tmp_path, two_pairs, damage, message):
    folder = shutil.copytree(two_pairs[0], tmp_path / "set")
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_examples(folder, "val", two_pairs[1], 2, 64)


def test_examples_for_another_context(two_pairs):
    folder, meta = two_pairs
    with pytest.raises(UserError, match="made for a context of 64, and the model has one of 65"):
        open_examples(folder, "train", meta, 2, 65)


def test_examples_of_a_named_data_set(tmp_path):
    (tmp_path / "my.jsonl").write_text(json.dumps(pair()) + "\n" + json.dumps(pair()) + "\n")
    name, options = f"{tmp_path}/own", dict(tokenizer="bytes", block_size=64)
    with pytest.raises(UserError, match="--source FILE makes one from a JSONL file"):
        prepared_directory(name, "", "dpo", **options)
    assert prepared_directory(name, f"{tmp_path}/my.jsonl", "dpo", **options) == tmp_path / "own" / "dpo"
    assert prepared_directory(name, "", "dpo", **options) == tmp_path / "own" / "dpo"
    with pytest.raises(UserError, match="there is no data set"):
        prepared_directory(name, "", "sft", **options)
