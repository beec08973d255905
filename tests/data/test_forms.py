"""The forms of conversations and preferences that are read, and what of a row is learned."""

import json

import pytest

from data.chat import render, render_prompt
from data.dataset import open_examples, read_meta
from data.forms import CONVERSATIONS, PREFERENCES, SkippedRow, read_conversation, read_preference
from data.orca_dpo_pairs.prepare import prepare_dpo
from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import prepare_sft
from data.slimorca.prepare import tokenize as tokenize_conversation
from data.tokenizer import get_tokenizer
from engine.settings import UserError

BYTES = get_tokenizer("bytes")
Q, A, SYSTEM = ("user", "Why?\n"), ("assistant", "    return a + b\n"), ("system", "Be kind.")


def openai(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": text} for role, text in turns]


# ------------------------------------------------------------------------------------- forms

TALKS = [
    ({"conversations": sharegpt(Q, A)}, [Q, A]),
    ({"conversations": sharegpt(SYSTEM, Q, A, Q, A), "id": 3}, [SYSTEM, Q, A, Q, A]),
    ({"conversations": openai(Q, A)}, [Q, A]),
    ({"conversations": [{"from": role, "value": text} for role, text in (Q, A)]}, [Q, A]),
    ({"conversations": sharegpt(Q, A), "system": "Be kind."}, [SYSTEM, Q, A]),
    ({"conversations": sharegpt(SYSTEM, Q, A), "system": "Be kind."}, [SYSTEM, Q, A]),
    ({"conversations": sharegpt(Q, A), "system": " "}, [Q, A]),
    ({"conversations": sharegpt(Q, A), "system": None}, [Q, A]),
    ({"messages": openai(SYSTEM, Q, A)}, [SYSTEM, Q, A]),
    ({"messages": sharegpt(Q, A), "system": "Be kind."}, [SYSTEM, Q, A]),
    ({"instruction": Q[1], "output": A[1]}, [Q, A]),
    ({"instruction": Q[1], "input": "", "output": A[1], "system": "Be kind."}, [SYSTEM, Q, A]),
    ({"instruction": "Add.", "input": "1 2", "output": A[1]}, [("user", "Add.\n\n1 2"), A]),
    ({"prompt": Q[1], "completion": A[1]}, [Q, A]),
    ({"prompt": openai(SYSTEM, Q), "completion": openai(A)}, [SYSTEM, Q, A]),
]
B = ("assistant", "\treturn a + b\n")
PAIRS = [
    ({"question": Q[1], "chosen": A[1], "rejected": B[1]}, [Q]),
    ({"system": "Be kind.", "question": Q[1], "chosen": A[1], "rejected": B[1]}, [SYSTEM, Q]),
    ({"prompt": Q[1], "chosen": A[1], "rejected": B[1]}, [Q]),
    ({"prompt": Q[1], "chosen": A[1], "rejected": B[1], "system": "Be kind."}, [SYSTEM, Q]),
    ({"prompt": openai(SYSTEM, Q), "chosen": openai(A), "rejected": openai(B)}, [SYSTEM, Q]),
    ({"prompt": openai(Q, A, Q), "chosen": openai(A), "rejected": openai(B)}, [Q, A, Q]),
    ({"chosen": openai(Q, A), "rejected": openai(Q, B)}, [Q]),
    ({"chosen": openai(SYSTEM, Q, A, Q, A), "rejected": openai(SYSTEM, Q, A, Q, B)}, [SYSTEM, Q, A, Q]),
    ({"prompt": Q[1], "chosen": openai(Q, A), "rejected": openai(Q, B)}, [Q]),
    ({"prompt": Q[1], "chosen": openai(SYSTEM, Q, A), "rejected": openai(SYSTEM, Q, B)}, [SYSTEM, Q]),
    ({"conversations": sharegpt(Q), "chosen": sharegpt(A)[0], "rejected": sharegpt(B)[0]}, [Q]),
]


@pytest.mark.parametrize("row, turns", TALKS)
def test_common_forms_of_conversations(row, turns):
    ids, mask = render(turns, BYTES)
    assert tokenize_conversation(row, BYTES, 2048) == [(ids[:-1], mask[:-1])]


@pytest.mark.parametrize("row, prompt", PAIRS)
def test_common_forms_of_preferences(row, prompt):
    assert read_preference(row) == (prompt, A[1], B[1])
    ids = render_prompt(prompt, BYTES)
    for (row_ids, mask), (_, text) in zip(tokenize_pair(row, BYTES, 2048), (A, B), strict=True):
        assert row_ids[: len(ids)] == ids and BYTES.decode(row_ids[len(ids) : -1]) == text
        assert mask == [0] * len(ids) + [1] * (len(text) + 1)


def test_every_form_is_tried():
    for forms, rows in ((CONVERSATIONS, TALKS), (PREFERENCES, PAIRS)):
        for keys in forms:
            assert any(row.keys() >= set(keys.split(", ")) for row, _ in rows)


@pytest.mark.parametrize(
    "read, row, reason",
    [(read_conversation, {"messages": "text"}, "malformed"),
     (read_conversation, {"messages": [{"role": "tool", "content": "x"}]}, "malformed"),
     (read_conversation, {"messages": [{"role": "user", "content": None}]}, "malformed"),
     (read_conversation, {"messages": openai(Q, ("assistant", " \n"))}, "with an empty turn"),
     (read_conversation, {"instruction": "", "input": " ", "output": "x"}, "with an empty turn"),
     (read_conversation, {"instruction": 5, "output": "x"}, "malformed"),
     (read_conversation, {"messages": openai(Q, A), "system": 5}, "malformed"),
     (read_preference, {"chosen": "a", "rejected": "b"}, "that are no question and two answers"),
     (read_preference, {"prompt": "q", "chosen": openai(Q), "rejected": openai(Q)}, "that are no question and two"),
     (read_preference, {"prompt": "q", "chosen": [], "rejected": []}, "with an empty text"),
     (read_preference, {"prompt": "q", "chosen": " \n", "rejected": "b"}, "with an empty text"),
     (read_preference, {"chosen": openai(Q, A), "rejected": openai(("user", "Other?"), B)}, "different prompts")],
)  # fmt: skip
def test_rows_without_a_meaning_are_skipped(read, row, reason):
    with pytest.raises(SkippedRow, match=reason):
        read(row)


# ------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("weight", [0, 0.0, False])
@pytest.mark.parametrize("form", [sharegpt, openai])
def test_answers_of_weight_0_are_not_learned(weight, form):
    turns = form(Q, ("assistant", "draft"), Q, A)
    row, (ids, mask) = {"conversations": turns}, render([Q, ("assistant", "draft"), Q, A], BYTES)
    for turn, other in zip(turns, (0, 1, None, 1.0)):  # of questions, the weight says nothing
        turn["weight"] = other
    assert tokenize_conversation(row, BYTES, 2048) == [(ids[:-1], mask[:-1])]
    turns[1]["weight"] = weight
    learned = render([Q], BYTES)[1] + [0] * len(render([("assistant", "draft")], BYTES)[1]) + render([Q, A], BYTES)[1]
    assert tokenize_conversation(row, BYTES, 2048) == [(ids[:-1], learned[:-1])]
    turns[3]["weight"] = weight
    with pytest.raises(SkippedRow, match="without an answer"):
        tokenize_conversation(row, BYTES, 2048)
    turns[3]["weight"] = 0.5
    with pytest.raises(SkippedRow, match="weight other than 0 and 1"):
        tokenize_conversation(row, BYTES, 2048)


@pytest.mark.parametrize("text", ["    return a + b\n", "\tx", "x\n\n", " x ", "\n\nx", "x\r\n"])
def test_texts_keep_their_indentation_and_line_ends(text):
    [(ids, _)] = tokenize_conversation({"conversations": sharegpt(("user", text), ("assistant", text))}, BYTES, 2048)
    assert ids == render([("user", text), ("assistant", text)], BYTES)[0][:-1]
    pair = {"question": text, "chosen": text, "rejected": text.strip()}  # two answers that differ
    assert read_preference(pair) == ([("user", text)], text, text.strip())
    assert len(tokenize_pair(pair, BYTES, 2048)) == 2


# ------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("prepare, row, group", [(prepare_sft, TALKS[8][0], 1), (prepare_dpo, PAIRS[4][0], 2)])
@pytest.mark.parametrize("style", [dict(), dict(indent=2), dict(indent="\t"), dict(separators=(",", ":"))])
def test_an_array_is_read_as_lines_are(tmp_path, prepare, row, group, style):
    rows = [row] * 25
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "array.json").write_bytes(b"\xef\xbb\xbf" * ("indent" in style) + json.dumps(rows, **style).encode())
    for name in ("lines.jsonl", "array.json"):
        prepare(tmp_path / name[:5], str(tmp_path / name), "bytes", 128)
    meta = read_meta(tmp_path / "array")
    assert meta["examples"] == {"train": 23, "val": 2} and meta["crc32"] == read_meta(tmp_path / "lines")["crc32"]
    assert len(open_examples(tmp_path / "array", "train", meta, group, 128)) == 23


@pytest.mark.parametrize("prepare, forms", [(prepare_sft, CONVERSATIONS), (prepare_dpo, PREFERENCES)])
@pytest.mark.parametrize(
    "content, found",
    [('{"ask": "a", "reply": "b"}\n' * 3, "has the keys ask, reply;"),
     ('[{"ask": "a"}, {"ask": "b"}]', "has the keys ask;"),
     ("{}\n[]\n", "has the keys ;"),
     ("[1, 2]\n[3]\n", "is no JSON object;"),
     ('[{"chosen": ', "is no JSON object;"),
     ("a,b\n1,2\n", "is no JSON object;")],
)  # fmt: skip
def test_where_nothing_fits_the_keys_and_the_forms_are_named(tmp_path, prepare, forms, content, found):
    (tmp_path / "my.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"the first row {found} the forms that are read have the keys ") as error:
        prepare(tmp_path / "set", str(tmp_path / "my.jsonl"), "bytes", 128)
    assert all(keys in str(error.value) for keys in forms) and "\n" not in str(error.value)
