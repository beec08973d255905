"""Examples for SFT and DPO: from rows to files, from files to micro-batches."""

import json
import os
import threading

import numpy as np
import pytest
import torch

from data import UserError
from data.chat import render, render_prompt
from data.dataset import (
    bucketed_epoch,
    collate,
    open_examples,
    open_rows,
    padded_length,
    prepared_directory,
    read_meta,
)
from data.orca_dpo_pairs.prepare import prepare_dpo
from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import prepare_sft
from data.slimorca.prepare import tokenize as tokenize_conversation
from data.tiny import prepare as tiny
from data.tokenizer import IM_END, get_tokenizer

BYTES = get_tokenizer("bytes")


def conversation(*turns):
    return {"conversations": [{"from": role, "value": text, "weight": None} for role, text in turns]}


def pair(question="Why?", chosen="So.", rejected="No.", system=""):
    return dict(system=system, question=question, chosen=chosen, rejected=rejected)


def prepare(tmp_path, prepare, lines, block_size=64):
    """Examples made of these lines, which are bytes or become JSON -> their folder and meta.json."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / "source.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    prepare(tmp_path / "set", str(tmp_path / "source.jsonl"), "bytes", block_size)
    return tmp_path / "set", read_meta(tmp_path / "set")


def rows_of(examples):
    bounds = zip(examples.offsets, examples.offsets[1:])
    return [(examples.ids[a:b].tolist(), examples.mask[a:b].tolist()) for a, b in bounds]


def without_newline(*turns):
    """A rendered conversation up to its last learned token."""
    ids, mask = render(turns, BYTES)
    return ids[:-1], mask[:-1]


# ------------------------------------------------------------------------------------- from rows to files


def test_conversations_become_rows(tmp_path):
    lines = [conversation(("human", f"Q{i}"), ("gpt", f"A{i}")) for i in range(100)]
    folder, meta = prepare(tmp_path, prepare_sft, lines)
    train, val = (open_examples(folder, split, meta, 1, 64) for split in ("train", "val"))
    expected = [without_newline(("user", f"Q{i}"), ("assistant", f"A{i}")) for i in range(100)]
    assert rows_of(val) == expected[::20]  # every 20th is held out
    assert rows_of(train) == [row for i, row in enumerate(expected) if i % 20]
    assert meta["examples"] == {"train": 95, "val": 5} and meta["report"] == {"rows": 100, "cut": 0}
    assert train.lengths().tolist() == [len(ids) for i, (ids, _) in enumerate(expected) if i % 20]


def test_many_rows_keep_their_order(tmp_path):
    """More than are under way at once."""
    lines = [conversation(("human", str(i)), ("gpt", "x")) for i in range(3000)]
    folder, meta = prepare(tmp_path, prepare_sft, lines)
    rows = rows_of(open_examples(folder, "train", meta, 1, 64))
    numbers = [int(BYTES.decode(ids).split("\n")[1].removesuffix(IM_END)) for ids, _ in rows]
    assert numbers == [i for i in range(3000) if i % 20]


def test_turns_of_a_conversation():
    row = conversation(("system", "Be kind."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert tokenize_conversation(row, BYTES, 2048) == [without_newline(*turns)]
    row["conversations"].append({"from": "human", "value": "not answered"})
    assert tokenize_conversation(row, BYTES, 2048) == [without_newline(*turns)]
    without = conversation(("system", " "), ("human", " a\n"), ("gpt", "b"))
    assert tokenize_conversation(without, BYTES, 2048) == [without_newline(("user", "a"), ("assistant", "b"))]


def test_rows_that_cannot_be_conversations_are_skipped_and_counted(tmp_path):
    good = conversation(("human", "a"), ("gpt", "b"))
    lines = [
        good, b"{", b"\xff\xfe", b"", b"null", b"[]", b"3",
        {"conversations": None}, {"conversations": [3]}, {"text": 1},
        conversation(("human", 3), ("gpt", "b")), conversation(("user", "a"), ("gpt", "b")), b"[" * 100_000,
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


def test_pairs_that_teach_nothing_are_dropped_and_counted(tmp_path):
    lines = [
        pair(), pair(), b"nonsense", [1], "text",
        pair(question=None), {"question": "a", "chosen": "b"}, {"conversations": []},
        pair(chosen=""), pair(rejected=" "), pair(chosen=["a"]),
        pair(chosen="Same", rejected="Same "), pair(chosen="x" * 64 + "a", rejected="x" * 64 + "b"),
        pair(question="q" * 64), pair(chosen="a" * 64),
    ]  # fmt: skip
    folder, meta = prepare(tmp_path, prepare_dpo, lines)
    assert meta["report"] == {
        "rows": 15, "cut": 1, "malformed": 4, "with an empty text": 5, "whose answers are the same": 2,
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


def test_useless_source_leaves_the_old_examples(tmp_path):
    folder, meta = prepare(tmp_path, prepare_dpo, [pair(), pair()])
    with pytest.raises(UserError, match="usable examples"):
        prepare(tmp_path, prepare_dpo, [b"no"])
    assert read_meta(folder) == meta and len(open_examples(folder, "train", meta, 2, 64)) == 1


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
def test_damaged_examples(tmp_path, damage, message):
    folder, meta = prepare(tmp_path, prepare_dpo, [pair(), pair()])
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_examples(folder, "val", meta, 2, 64)


def test_examples_for_another_context(tmp_path):
    folder, meta = prepare(tmp_path, prepare_dpo, [pair(), pair()])
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
    with pytest.raises(UserError, match="the data set wikitext2 is not for sft; slimorca and tiny are"):
        prepared_directory("wikitext2", "", "sft", **options)
    with pytest.raises(UserError, match="the data set slimorca is not for pretraining; wikitext2 and tiny are"):
        prepared_directory("slimorca", "my.jsonl", **options)


def test_tiny_examples_come_from_the_documentation():
    questions = set(tiny.questions())
    sequences = "What does the function difflib.SequenceMatcher.set_seqs do?", "Set the two sequences to be compared."
    assert sequences in questions
    assert len(questions) > 5000 and len({answer for _, answer in questions}) == len(questions)
    rows = list(tiny.preferences())
    answers = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert len(rows) > 1000 and len(set(answers)) == len(answers)  # nothing that is held out was seen
    assert all((row["question"], row["chosen"]) in questions for row in rows)
    about = [row["question"].startswith("What does the function") for row in rows]
    assert 0.45 < sum(about) / len(about) < 0.55


# ------------------------------------------------------------------------------------- from files to micro-batches


@pytest.mark.parametrize(
    "length, size", [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (1025, 1536), (1600, 2000)]
)
def test_padded_lengths_are_few(length, size):
    assert padded_length(length, 2000) == size


def test_every_example_comes_once_an_epoch():
    lengths = np.random.default_rng(0).integers(10, 1000, 1000)
    batches = bucketed_epoch(lengths, 16, seed=3, epoch=0)
    assert batches.shape == (62, 16) and len(set(batches.ravel())) == 62 * 16
    assert np.array_equal(batches, bucketed_epoch(lengths, 16, seed=3, epoch=0))
    for other in (bucketed_epoch(lengths, 16, 4, 0), bucketed_epoch(lengths, 16, 3, 1)):
        assert not np.array_equal(batches, other)
    left_out = [set(range(1000)) - set(bucketed_epoch(lengths, 16, 3, epoch).ravel()) for epoch in (0, 1)]
    assert left_out[0] != left_out[1]


def test_examples_of_a_batch_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(10, 1000, 5000)
    longest = lengths[bucketed_epoch(lengths, 16, 0, 0)].max(axis=1)
    assert lengths.mean() / longest.mean() > 0.95  # unsorted batches: about 0.53
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2  # and their order is random


def test_micro_batches_hold_what_is_learned(tmp_path):
    lines = [
        conversation(("human", "a" * i), ("gpt", "b" * (30 - i)), ("human", "c"), ("gpt", "d")) for i in range(1, 30)
    ]
    folder, meta = prepare(tmp_path, prepare_sft, lines, block_size=128)
    examples = open_examples(folder, "train", meta, 1, 128)
    numbers = np.array([3, 7, 1])
    idx, positions, targets = collate(examples, numbers, 128)
    assert idx.shape == (3, 96) and len(positions) == len(targets) and len(positions) % (3 * 96 // 16) == 0
    assert len(set(positions.tolist())) == len(positions)
    learned = dict(zip(positions.tolist(), targets.tolist()))
    for r, number in enumerate(numbers):
        ids, mask = rows_of(examples)[number]
        assert idx[r].tolist() == ids + [0] * (96 - len(ids))
        for t in range(96):
            expected = ids[t + 1] if t + 1 < len(ids) and mask[t + 1] else -100
            assert learned.pop(r * 96 + t, -100) == expected
    assert not learned


def test_pairs_are_collated_chosen_first(tmp_path):
    folder, meta = prepare(tmp_path, prepare_dpo, [pair(question=f"Q{i}?") for i in range(5)])
    examples = open_examples(folder, "train", meta, 2, 64)
    idx, _, _ = collate(examples, np.array([2, 0]), 64)
    rows = [ids for ids, _ in rows_of(examples)]
    expected = [rows[4], rows[0], rows[5], rows[1]]
    assert [row[: len(ids)] for row, ids in zip(idx.tolist(), expected)] == expected


def test_a_batch_in_which_all_is_learned_fits(tmp_path):
    """As many positions as there are ids, at most."""
    lines = [conversation(("human", "a"), ("gpt", "b" * 200))] * 3
    folder, meta = prepare(tmp_path, prepare_sft, lines, block_size=70)
    idx, positions, targets = collate(open_examples(folder, "train", meta, 1, 70), np.array([0, 1]), 70)
    assert idx.shape == (2, 70) and len(positions) <= 140 and (targets == ord("b")).sum() > 60
    assert isinstance(idx, torch.Tensor) and idx.dtype == positions.dtype == targets.dtype == torch.int64
