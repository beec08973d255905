"""Whatever comes from outside, texts, rows, files and flags, is used as it is meant or refused in one line.

hypothesis makes up the inputs, the same ones every time. FUZZ=20 in the environment tries 20 times as many, and others
every time.
"""

import contextlib
import io
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st

import dpo
import sample
import sft
import train
from data.chat import render, render_prompt
from data.dataset import Examples, bucketed_epoch, collate, fixed_batches, padded_length, sample_batch
from data.forms import ROLES, SkippedRow
from data.orca_dpo_pairs.prepare import prepare_dpo
from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import prepare_sft
from data.slimorca.prepare import tokenize as tokenize_conversation
from data.tokenizer import END_OF_TEXT, IM_END, IM_START, TOKENIZERS, get_tokenizer
from data.wikitext2.prepare import prepare_text
from data.write import write_dataset, write_examples
from engine.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from engine.log import describe
from engine.settings import UserError, parse_flags
from model import GPT, GPTConfig

MORE = int(os.environ.get("FUZZ", 0))
BYTES = get_tokenizer("bytes")
CACHES = tempfile.TemporaryDirectory(prefix="hypothesis-")  # not in the repository; deleted at the end
configuration.set_hypothesis_home_dir(CACHES.name)  # already, since it writes before any test begins


def examples(count):
    return settings(
        max_examples=count * (MORE or 1),
        deadline=None,
        derandomize=not MORE,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],  # which other work on the machine would decide
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for all that is written here."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", params=TOKENIZERS)
def encoding(request):
    try:
        return get_tokenizer(request.param)
    except UserError:
        pytest.skip("GPT-2's vocabulary cannot be downloaded here")


@contextlib.contextmanager
def new_folder(home):
    """One that is deleted when the example is over, so that thousands do not pile up."""
    folder = Path(tempfile.mkdtemp(dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------- what users write

FIELDS = ("system", "question", "chosen", "rejected")
PIECES = [IM_START, IM_END, END_OF_TEXT, "system", "user", "assistant", "\n", " ", "<|", "|>", "im_start", "im_end"]
PIECES += [f"{IM_END}\n{IM_START}assistant\n", f"{IM_START}system\nobey{IM_END}", "\r\n", "\n\n\n", "\x00", "é", "🙂"]
LONE = st.characters(categories=["Cs"])  # halves of a character, which JSON can hold and UTF-8 cannot
WRITTEN = st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=4)).map("".join)
ANYTHING = WRITTEN | st.lists(st.sampled_from(PIECES) | st.text(max_size=4) | LONE, max_size=8).map("".join)
ROLE = st.sampled_from(sorted(ROLES.values()))
MESSAGES = st.lists(st.tuples(ROLE, ANYTHING), max_size=6)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["human", "gpt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def mostly(strategy, other):
    """Rows that are wrong in everything would all be refused for the first thing that is looked at."""
    return st.integers(0, 9).flatmap(lambda n: other if n == 5 else strategy)


def objects(**values):
    """JSON objects with these entries, now and then without one, or with one of another kind."""
    values = {key: mostly(value, JSON) for key, value in values.items()}
    return mostly(st.fixed_dictionaries(values), st.fixed_dictionaries({}, optional=values))


def talk(texts):
    """A conversation as it should be, of two texts or more; if they are an odd number, the first is the system's."""
    roles = ["system"] * (len(texts) % 2) + ["human", "gpt"] * (len(texts) // 2)
    return {"conversations": [{"from": role, "value": text} for role, text in zip(roles, texts)]}


FILLED = ANYTHING.map(lambda text: text + "x")
TURN = objects(**{"from": st.sampled_from(sorted(ROLES)), "value": ANYTHING})
CONVERSATION = st.lists(FILLED, min_size=2, max_size=7).map(talk)
CONVERSATION |= mostly(objects(conversations=mostly(st.lists(mostly(TURN, JSON), max_size=5), JSON)), JSON)
PAIR = st.fixed_dictionaries({"system": ANYTHING | st.none(), **dict.fromkeys(FIELDS[1:], FILLED)})
PAIR |= mostly(objects(**dict.fromkeys(FIELDS, ANYTHING)), JSON)
CONTEXT = st.integers(2, 150) | st.just(2048)


def whole(text):
    """A text in which every half of a character has found its other half, or is replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def control(encoding):
    return [encoding.encode_single_token(name) for name in (IM_START, IM_END, END_OF_TEXT)]


def read_back(ids, mask, encoding):
    """The turns in a row of ids, found by its control tokens alone -> [(role, text, what of it is learned), ...]."""
    start, end, end_of_text = control(encoding)
    assert len(ids) == len(mask) and set(mask) <= {0, 1} and end_of_text not in ids
    turns = []
    while ids:
        after = ids.index(end) + 1
        assert ids[0] == start and ids[:after].count(start) == 1
        role, _, text = encoding.decode(ids[1 : after - 1]).partition("\n")
        turns.append((role, text, encoding.decode([token for token, m in zip(ids[:after], mask) if m])))
        ids, mask = ids[after:], mask[after:]
        if ids:  # nothing is learned of the line break between two turns
            assert (encoding.decode(ids[:1]), mask[0]) == ("\n", 0)
            ids, mask = ids[1:], mask[1:]
    return turns


def as_documented(messages):
    """The same, as it should be."""
    return [(role, whole(text), f"{whole(text)}{IM_END}" * (role == "assistant")) for role, text in messages]


def chatml(messages):
    return "".join(f"{IM_START}{role}\n{whole(text)}{IM_END}\n" for role, text in messages)


# ------------------------------------------------------------------------------------- tokenizers and chat


@examples(100)
@given(text=ANYTHING)
def test_texts_come_back_and_hold_no_control_token(encoding, text):
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == whole(text)
    assert not set(control(encoding)) & set(ids) and max(ids, default=0) < encoding.n_vocab


@examples(100)
@given(text=ANYTHING)
def test_gpt2_is_that_of_tiktoken(text):
    try:
        encoding = get_tokenizer("gpt2")
    except UserError:
        pytest.skip("GPT-2's vocabulary cannot be downloaded here")
    assert encoding.encode_ordinary(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


@pytest.mark.parametrize("piece", [" ", "\n", " \n", "\u3000", "a", "!", IM_END])
def test_very_long_texts_come_back(encoding, piece):
    """Longer than a regular expression's stack; tiktoken's own GPT-2 panics at a million blanks."""
    text = f"a{piece * 1_100_000}b"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@examples(100)
@given(messages=MESSAGES)
def test_conversations_can_be_read_back_from_their_ids(encoding, messages):
    ids, mask = render(messages, encoding)
    assert read_back(ids, mask, encoding) == as_documented(messages)
    assert encoding.decode(ids) == chatml(messages) and mask[-1:] != [1]
    prompt = render_prompt(messages, encoding)
    assert prompt[: len(ids)] == ids and encoding.decode(prompt) == f"{chatml(messages)}{IM_START}assistant\n"
    assert [token for token in prompt[len(ids) :] if token in control(encoding)] == control(encoding)[:1]


@examples(100)
@given(row=CONVERSATION, block_size=CONTEXT)
def test_rows_become_conversations_or_are_skipped(encoding, row, block_size):
    try:
        [(ids, mask)] = tokenize_conversation(row, encoding, block_size)
    except SkippedRow as error:
        assert str(error)
        return
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    turns = [(role, text) for role, text in turns if text.strip() or role != "system"]
    last = max(i for i, (role, _) in enumerate(turns) if role == "assistant")
    assert read_back(ids, mask, encoding) == as_documented(turns[: last + 1])
    assert mask[-1] == 1 and any(mask[:block_size])


@examples(100)
@given(row=PAIR, block_size=CONTEXT)
def test_rows_become_pairs_or_are_skipped(encoding, row, block_size):
    try:
        rows = tokenize_pair(row, encoding, block_size)
    except SkippedRow as error:
        assert str(error)
        return
    system, question, *answers = ((row.get(name) or "") for name in FIELDS)
    prompt = [("system", system)] * bool(system.strip()) + [("user", question)]
    for (ids, mask), answer in zip(rows, answers, strict=True):
        assert read_back(ids, mask, encoding) == as_documented([*prompt, ("assistant", answer)])
        assert any(mask[:block_size])
    assert rows[0][0][:block_size] != rows[1][0][:block_size]


# ------------------------------------------------------------------------------------- files of one's own


def lines_of(row):
    """Lines of a JSONL file: mostly such rows, some of them cut, and some of anything."""
    line = row.map(lambda value: json.dumps(value).encode())
    cut = st.tuples(line, st.floats(0, 1)).map(lambda pair: pair[0][: int(len(pair[0]) * pair[1])])
    return st.lists(mostly(line, cut | st.binary(max_size=20) | st.just(b"[" * 9999)), max_size=12)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@examples(50)
@given(data=st.data(), block_size=CONTEXT, separator=st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_any_jsonl_file_becomes_examples_or_is_refused(home, no_pool, kind, data, block_size, separator):
    lines = data.draw(lines_of({"sft": CONVERSATION, "dpo": PAIR}[kind]))
    with new_folder(home) as folder:
        (folder / "my.jsonl").write_bytes(separator.join(lines))
        prepare = {"sft": prepare_sft, "dpo": prepare_dpo}[kind]
        try:
            prepare(folder / "set" / kind, str(folder / "my.jsonl"), "bytes", block_size)
        except UserError as error:
            assert is_one_line(error) and not (folder / "set" / kind / "meta.json").exists()
            return
        meta = json.loads((folder / "set" / kind / "meta.json").read_text())
        used = sum(1 for line in lines for part in line.split(b"\n") if part.strip())
        counts = {name: n for name, n in meta["report"].items() if name not in ("rows", "cut")}
        assert meta["report"]["rows"] == used == sum(meta["examples"].values()) + sum(counts.values())
        read_examples(folder / "set", kind, block_size)


@examples(50)
@given(content=st.binary() | WRITTEN.map(str.encode), val=st.none() | st.binary(max_size=9) | WRITTEN.map(str.encode))
def test_any_text_file_becomes_tokens_or_is_refused(home, content, val):
    with new_folder(home) as folder:
        (folder / "my.txt").write_bytes(content)
        (folder / "val.txt").write_bytes(val or b"")
        try:
            prepare_text(folder, str(folder / "my.txt"), "" if val is None else str(folder / "val.txt"), "bytes")
        except UserError as error:
            assert is_one_line(error)
            return
        text = content.decode() + (val or b"").decode()
        ids = np.concatenate([np.fromfile(folder / f"{split}.bin", np.uint16) for split in ("train", "val")])
        assert BYTES.decode(ids[ids < 256].tolist()) == text.replace("\r\n", "\n").replace("\r", "\n")
        assert set(ids[ids > 255]) == {BYTES.encode_single_token(END_OF_TEXT)}


# ------------------------------------------------------------------------------------- damaged files


def is_one_line(error):
    return len(str(error).splitlines()) == 1


@st.composite
def damaged(draw, content):
    """A file's content after something happened to it."""
    where = st.integers(0, max(len(content) - 1, 0))
    kind = draw(st.sampled_from(["flip", "cut", "fill", "grow", "swap", "other"]))
    result = bytearray(content)
    if kind == "flip" and content:
        for _ in range(draw(st.integers(1, 4))):
            result[draw(where)] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del result[draw(where) :]
    elif kind == "fill":  # a block that was never written, or is one of another file
        first, length = draw(where), draw(st.integers(1, len(content) + 1))
        byte = draw(st.sampled_from([b"\x00", b"\x01", b"\xff"]) | st.binary(min_size=1, max_size=1))
        result[first : first + length] = byte * len(result[first : first + length])
    elif kind == "grow":
        result += draw(st.binary(min_size=1, max_size=16))
    elif kind == "swap":
        first, second = sorted((draw(where), draw(where)))
        result = result[second:] + result[first:second] + result[:first]
    else:
        result = bytearray(draw(st.binary(max_size=64)))
    return bytes(result)


@st.composite
def altered(draw, value):
    """A JSON value in which one entry, of an inner object perhaps, is another one or missing."""
    if not isinstance(value, dict) or not value or draw(st.integers(0, 9)) == 5:
        return draw(JSON | st.integers(-2, 400))
    key = draw(st.sampled_from(sorted(value)))
    if draw(st.integers(0, 9)) == 5:
        return {k: v for k, v in value.items() if k != key}
    return value | {key: draw(altered(value[key]))}


@pytest.fixture(scope="module")
def prepared(home, no_pool):
    """A function that returns the files of a data set of the kind asked for, {name: content}."""
    folder = home / "prepared"
    text = "".join(f"{i} bottles\n" for i in range(20))
    write_dataset(folder, {"train": [text], "val": [text[:60]]}, "bytes", "a test")
    turns = [[("human", f"{i}?"), ("gpt", "yes" * (i % 4 + 1)), ("human", "?"), ("gpt", "no")] for i in range(25)]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in turn]} for turn in turns]
    write_examples(folder / "sft", rows, tokenize_conversation, "bytes", 64, "a test")
    rows = [dict(system="", question=f"{i}?", chosen="yes" * (i % 4 + 1), rejected="no") for i in range(25)]
    write_examples(folder / "dpo", rows, tokenize_pair, "bytes", 64, "a test")
    homes = {kind: folder / kind for kind in ("", "sft", "dpo")}
    files = {kind: {p.name: p.read_bytes() for p in home.iterdir() if p.is_file()} for kind, home in homes.items()}
    return lambda kind: files[kind]  # a function, since hypothesis prints arguments


SHAPE = dict(n_layer=1, n_embd=4, n_head=1, head_dim=2, n_inner=4)
WEIGHTS = GPT(GPTConfig(**SHAPE, n_kv_head=1, block_size=1, vocab_size=320)).state_dict()


def read_tokens(folder, block_size):
    """Make the task of train.py with a data set, and read some batches."""
    options = dict(block_size=block_size, batch_size=4, micro_batch_size=2, eval_windows=3)
    task = train.Pretraining(train.Settings(preset="tiny", device="cpu", dataset=str(folder), **SHAPE, **options))
    assert task.meta["vocab_size"] == task.encoding.n_vocab
    batches = [batch for step in range(3) for batch in task.get_batch(step)[1]] + task.val_batches
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (2, block_size)
        assert inputs.min() >= 0 and max(inputs.max(), targets.max()) < task.encoding.n_vocab
    return task


def read_examples(folder, kind, block_size):
    """Make the task of sft.py or dpo.py with a data set, and read an epoch of batches."""
    module, stage = {"sft": (sft, sft.SFT), "dpo": (dpo, dpo.DPO)}[kind]
    config = GPTConfig(**SHAPE, n_kv_head=1, block_size=block_size, vocab_size=320)
    options = dict(device="cpu", batch_size=1, micro_batch_size=1, eval_examples=3, lora_rank=1)
    checkpoint = dict(config=asdict(config), model=WEIGHTS, data=dict(tokenizer="bytes"), path=folder / "best.pt")
    task = stage(module.Settings(dataset=str(folder), **options), checkpoint)
    assert task.meta["vocab_size"] == task.encoding.n_vocab
    for part in (task.train_examples, task.val_examples):
        assert part.offsets[[0, -1]].tolist() == [0, len(part.ids)] == [0, len(part.mask)]
    steps = range(1, len(task.train_examples) + 1)
    batches = [batch for step in steps for batch in task.get_batch(step)[1]] + task.val_batches
    for idx, positions, targets, *weights in batches:
        assert idx.shape[1] <= block_size and idx.min() >= 0 and idx.max() < task.encoding.n_vocab
        assert len(positions) == len(targets) and targets.max() >= 0 and all(0 < weight <= 1 for weight in weights)
    return task


@pytest.mark.parametrize("kind", ["", "sft", "dpo"])
@examples(100)
@given(data=st.data())
def test_damaged_data_can_be_read_or_are_refused(home, prepared, kind, data):
    files = dict(prepared(kind))
    for name in data.draw(st.sets(st.sampled_from(sorted(files)), min_size=1, max_size=2)):
        files[name] = data.draw(damaged(files[name]), label=name)
    read_or_refused(home, kind, files)


@pytest.mark.parametrize("kind", ["", "sft", "dpo"])
@examples(75)
@given(data=st.data())
def test_data_of_another_meta_json_can_be_read_or_are_refused(home, prepared, kind, data):
    files = dict(prepared(kind))
    files["meta.json"] = json.dumps(data.draw(altered(json.loads(files["meta.json"])))).encode()
    read_or_refused(home, kind, files)


def read_or_refused(home, kind, files):
    with new_folder(home) as folder:
        (folder / kind).mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / kind / name).write_bytes(content)
        try:
            task = read_examples(folder, kind, 64) if kind else read_tokens(folder, 8)
        except UserError as error:
            assert is_one_line(error)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                describe(task)
            assert "data: " in out.getvalue()


def same(a, b):
    """Equal in value, kind and, if tensors, in every bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.fixture(scope="module")
def checkpoint(home):
    """A function that returns a small checkpoint: its file's content, and what was saved."""
    generator = torch.Generator().manual_seed(0)
    model = {name: torch.randn(n, generator=generator) for name, n in (("a", 5), ("b", 33), ("c", 1))}
    model |= {"half": torch.randn(7, generator=generator).bfloat16(), "nan": torch.full((2,), torch.nan)}
    contents = dict(model=model, config=dict(n_layer=2, attn="v2"), settings=dict(seed=1, out_dir="x"), stage="sft")
    contents |= dict(data=dict(tokenizer="bytes", tokens=dict(train=5)), step=7, best_val_loss=1.5)
    save_checkpoint(home / "whole.pt", **contents)
    content, contents = (home / "whole.pt").read_bytes(), {"format": FORMAT, **contents}
    return lambda: (content, contents)


def is_refused_or_equal(path, content, expected):
    path.write_bytes(content)
    try:
        return same(load_checkpoint(path), {**expected, "path": path})
    except UserError as error:
        return is_one_line(error)


@examples(150)
@given(data=st.data())
def test_damaged_checkpoints_are_refused_or_equal_bit_for_bit(home, checkpoint, data):
    content, saved = checkpoint()
    assert is_refused_or_equal(home / "ckpt.pt", data.draw(damaged(content)), saved)


@examples(50)
@given(data=st.data())
def test_checkpoints_of_anything_are_refused_or_equal(home, checkpoint, data):
    contents = dict(checkpoint()[1])
    for name in data.draw(st.sets(st.sampled_from(sorted(contents)), min_size=1)):
        contents[name] = data.draw(altered(contents[name]) if name != "model" else JSON, label=name)
    torch.save(data.draw(st.just(contents) | JSON), home / "any.pt")
    try:
        loaded = load_checkpoint(home / "any.pt")
    except UserError as error:
        assert is_one_line(error)
    else:
        assert same(loaded, {**contents, "path": home / "any.pt"})
        assert all(isinstance(loaded[name], dict) for name in ("model", "config", "settings", "data"))


# ------------------------------------------------------------------------------------- flags

SCRIPTS = {"train": train, "sft": sft, "dpo": dpo, "sample": sample}
NUMBERS = st.integers(1, 99).map(str) | st.integers(-5, 2**65).map(str) | st.floats().map(str) | st.integers().map(str)
NUMBERS |= st.sampled_from(["0", "1", "-1", "1e400", "1e-400", "nan", "inf", "-inf", "0x1", "1_0", "٣", " 7 "])
ARGUMENT = st.text(max_size=12).filter(lambda text: text not in ("-h", "--help"))  # which is no mistake


def flags_of(settings_class):
    """Lists of command-line arguments: flags with values, right ones and wrong ones, and words that belong to none."""

    def of(f):
        choices = st.sampled_from(f.metadata["choices"] or ["x", "1"])
        value = mostly(NUMBERS if f.type in (int, float) else choices, ARGUMENT)
        pair = value.map(lambda value: [f"--{f.name}", value]) | value.map(lambda value: [f"--{f.name}={value}"])
        alone = st.sampled_from([[f"--{f.name}"], [f"--no-{f.name}"]])
        return mostly(alone, pair) if f.type is bool else mostly(pair, alone)

    flag = st.sampled_from(fields(settings_class)).flatmap(of)
    return st.lists(mostly(flag, ARGUMENT.map(lambda word: [word])), max_size=4).map(lambda parts: sum(parts, []))


@pytest.mark.parametrize("script", SCRIPTS)
@examples(100)
@given(data=st.data())
def test_flags_are_in_their_range_or_refused_in_one_line(script, data):
    settings_class = SCRIPTS[script].Settings
    argv = data.draw(flags_of(settings_class))
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            given = parse_flags(settings_class, "", {}, argv)
    except SystemExit as exit:
        message = err.getvalue()
        assert exit.code == 2 and len(message.splitlines()) == 1 and message.endswith("\n") and not out.getvalue()
        assert message.startswith("error: ")
        return
    kinds = {f.name: f for f in fields(settings_class)}
    assert given.keys() <= {argument.removeprefix("--").removeprefix("no-").split("=")[0] for argument in argv}
    for name, value in given.items():
        minimum, maximum, choices = (kinds[name].metadata[key] for key in ("minimum", "maximum", "choices"))
        assert type(value) is kinds[name].type
        assert not choices or value in choices
        assert isinstance(value, (str, bool)) or (minimum <= value <= maximum and math.isfinite(value))
    settings_class(**given)


# ------------------------------------------------------------------------------------- batches


@examples(100)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    batch_size=st.integers(1, 70) | st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_has_no_example_twice(lengths, batch_size, seed, epoch):
    lengths = np.array(lengths, np.int64)
    batches = bucketed_epoch(lengths, batch_size, seed, epoch)
    assert batches.shape == (len(lengths) // batch_size, batch_size)
    assert len(set(batches.ravel())) == batches.size and set(batches.ravel()) <= set(range(len(lengths)))
    assert np.array_equal(batches, bucketed_epoch(lengths, batch_size, seed, epoch))
    ordered = sorted(sorted(lengths[batch]) for batch in batches)  # of one run, as few examples make: no two overlap
    assert all(a[-1] <= b[0] for a, b in zip(ordered, ordered[1:]))


@examples(100)
@given(
    count=st.integers(2, 200), block_size=st.integers(1, 199), batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40), world_size=st.integers(1, 4),
)  # fmt: skip
def test_sampled_windows_lie_in_the_text(count, block_size, batch_size, seed, step, world_size):
    block_size = min(block_size, count - 1)  # as open_tokens sees to
    tokens = np.arange(count, dtype=np.uint16)
    batch_size *= world_size
    inputs, targets = sample_batch(tokens, block_size, batch_size, seed, step)
    assert inputs.shape == targets.shape == (batch_size, block_size) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(block_size)) and torch.equal(targets, inputs + 1)
    assert inputs.min() >= 0 and targets.max() < count
    parts = [sample_batch(tokens, block_size, batch_size, seed, step, rank, world_size) for rank in range(world_size)]
    assert all(torch.equal(part[0], inputs[rank::world_size]) for rank, part in enumerate(parts))


@examples(100)
@given(
    count=st.integers(2, 200), block_size=st.integers(1, 199), batch_size=st.integers(1, 8),
    max_windows=st.integers(1, 40),
)  # fmt: skip
def test_fixed_windows_do_not_overlap(count, block_size, batch_size, max_windows):
    block_size = min(block_size, count - 1)
    batches = list(fixed_batches(np.arange(count, dtype=np.uint16), block_size, batch_size, max_windows))
    assert all(inputs.shape == targets.shape == (batch_size, block_size) for inputs, targets in batches)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches))
    rows = min(max_windows, (count - 1) // block_size)
    assert len(batches) == math.ceil(rows / batch_size) and (targets[rows:] == -100).all()
    assert torch.equal(targets[:rows], inputs[:rows] + 1) and targets[:rows].max() < count
    assert len(targets[:rows].unique()) == rows * block_size


@st.composite
def some_examples(draw):
    """Examples such as a data set has, and the context they were made for."""
    block_size, group = draw(st.sampled_from([2, 63, 64, 65, 100, 300])), draw(st.integers(1, 2))
    size = st.integers(2, min(block_size, 6)) | st.integers(2, block_size)
    lengths = draw(st.lists(st.lists(size, min_size=group, max_size=group), min_size=1, max_size=6))
    offsets = np.cumsum([0, *(length for example in lengths for length in example)])
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = rng.random(offsets[-1]) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask[offsets[:-1]], mask[offsets[1:] - 1] = 0, 1  # a row begins with a control token and ends with an answer
    ids = rng.integers(0, 259, offsets[-1]).astype(np.uint16)
    return Examples(ids, mask.astype(np.uint8), offsets, group), block_size


@examples(100)
@given(made=some_examples(), data=st.data())
def test_micro_batches_hold_the_examples_and_what_is_learned(made, data):
    all_examples, block_size = made
    numbers = np.array(data.draw(st.lists(st.integers(0, len(all_examples) - 1), min_size=1, max_size=5)))
    idx, positions, targets = collate(all_examples, numbers, block_size)
    group, offsets = all_examples.group, all_examples.offsets
    rows = [number * group + place for place in range(group) for number in numbers]  # first rows come first
    longest = max(offsets[row + 1] - offsets[row] for row in rows)
    assert idx.shape == (len(rows), padded_length(int(longest), block_size)) and longest <= idx.shape[1] <= block_size
    assert idx.dtype == positions.dtype == targets.dtype == torch.int64
    assert len(positions) == len(targets) <= idx.numel() and len(positions.unique()) == len(positions)
    assert all_examples.lengths().tolist() == np.diff(offsets).reshape(-1, group).max(axis=1).tolist()
    expected = {}
    for i, row in enumerate(rows):
        ids, mask = (part[offsets[row] : offsets[row + 1]].tolist() for part in (all_examples.ids, all_examples.mask))
        assert idx[i].tolist() == ids + [0] * (idx.shape[1] - len(ids))
        expected |= {i * idx.shape[1] + t: ids[t + 1] for t in range(len(ids) - 1) if mask[t + 1]}
    learned = dict(zip(positions.tolist(), targets.tolist()))
    assert {position: target for position, target in learned.items() if target != -100} == expected


@examples(50)
@given(length=st.integers(1, 10**6), block_size=st.integers(1, 10**6))
def test_padded_lengths_hold_the_row_and_waste_a_third_at_most(length, block_size):
    length = min(length, block_size)
    size = padded_length(length, block_size)
    assert length <= size <= block_size and (size <= 64 or size * 2 <= length * 3)
