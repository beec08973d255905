"""bench/retrieval.py: its texts, its batches, its loss, and its test against greedy decoding."""

import json
import math
import re
import statistics
import types

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import train
from bench import retrieval
from bench.probes import layer_maps
from bench.retrieval import (
    CITIES,
    HELD_OUT,
    PARTS,
    TAUGHT,
    Retrieval,
    draw_numbers,
    needle_shares,
    needle_size,
    needle_texts,
    needles_fit,
    summarize_shares,
)
from data.tokenizer import get_tokenizer
from data.write import write_dataset
from engine.generate import Decoder
from engine.settings import UserError
from model import GPT, GPTConfig

BYTES = get_tokenizer("bytes")
# Bytes and most pairs of digits. As with GPT-2's BPE, numbers with equally many digits differ in their number of ids.
PAIRS = {**{bytes([i]): i for i in range(256)}, **{b"%02d" % i: 256 + i for i in range(100) if i % 7}}
MERGING = tiktoken.Encoding("pairs", pat_str=r" ?\d+|[^\d]+", mergeable_ranks=PAIRS, special_tokens={})
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog, " * 60, dtype=np.uint8).astype(np.uint16)
SHAPE = dict(preset="tiny", block_size=160, n_layer=2, n_embd=32, n_head=2, head_dim=16, n_inner=48, device="cpu")
SHAPE |= dict(batch_size=4, micro_batch_size=2, max_steps=4, warmup_steps=1, eval_interval=2, save_interval=2)
NEEDLE = re.compile(r" The magic number of (\w+) is (\d+)\.")
QUESTION = re.compile(r" The magic number of (\w+) is (\d+)$")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = "".join(map(chr, np.random.default_rng(1).integers(97, 123, size=6000)))
    write_dataset(folder / "text", {"train": [text], "val": [text[:3000]]}, "bytes", "a test")
    return lambda **changes: train.Settings(**SHAPE | dict(dataset=f"{folder}/text", eval_windows=6) | changes)


@pytest.fixture
def task(settings):
    return Retrieval(settings())


def decode(task, ids):
    return task.encoding.decode(ids.tolist(), errors="replace")


# ------------------------------------------------------------------------------------- needle texts


def texts(count, length, encoding=BYTES):
    """Needle texts of the usual size, about any cities."""
    return needle_texts(encoding, TEXT, length, count, needle_size(encoding.encode_ordinary, length), CITIES)


@pytest.mark.parametrize("encoding, length", [(BYTES, 128), (BYTES, 512), (MERGING, 300)])
def test_needles_are_where_the_spans_say(encoding, length):
    count, digits = needle_size(encoding.encode_ordinary, length)
    ids, spans = texts(20, length, encoding)
    assert ids.shape == (20, length) and ids.dtype == torch.int64 and len(spans) == 20
    for text, (answer, *others) in zip(ids.tolist(), spans):
        whole = encoding.decode(text)
        numbers = [encoding.decode(text[start:stop]) for start, stop in (answer, *others)]
        assert len(set(numbers)) == count and len({stop - start for start, stop in (answer, *others)}) == 1
        assert all(len(number) == digits + 1 and number[0] == " " and number[1:].isdigit() for number in numbers)
        asked = whole.rsplit(" The magic number of ", 1)[1].removesuffix(" is")
        for (start, stop), number in zip((answer, *others), numbers):
            city = encoding.decode(text[:start]).rsplit(" The magic number of ", 1)[1].removesuffix(" is")
            assert (city == asked) == ((start, stop) == answer)
            assert encoding.decode(text[stop:]).startswith(".")
            whole = whole.replace(f" The magic number of {city} is{number}.", "", 1)
        filler = whole.removesuffix(f" The magic number of {asked} is")
        assert len(filler) < len(whole) and filler in bytes(TEXT.astype(np.uint8)).decode()  # there is nothing else
        first_needle = encoding.decode(text).index(" The magic")
        assert first_needle >= answer[1] - answer[0]  # so many tokens are cut off


def test_needle_texts_are_always_the_same():
    (one, spans), (same, same_spans) = texts(5, 256), texts(5, 256)
    assert torch.equal(one, same) and spans == same_spans
    assert len({tuple(text) for text in one.tolist()}) == 5
    assert len({tuple(text[start:stop].tolist()) for text, ((start, stop), *_) in zip(one, spans)}) == 5  # the answers
    assert len({text[0] for text in spans}) > 1  # the answer is not always at the same place


def test_needles_of_a_size_about_given_cities():
    cities = ("Kobe", "Lima", "Oslo")
    ids, spans = needle_texts(BYTES, TEXT, 256, 9, (3, 4), cities)
    for text, found in zip(ids.tolist(), spans):
        named = [word.split(" is")[0] for word in BYTES.decode(text).split(" The magic number of ")[1:]]
        assert sorted(named[:-1]) == sorted(cities) and named[-1] in cities
        assert [stop - start for start, stop in found] == [5] * 3
    width = len(" The magic number of Athens is")
    for count in (2, 3, 7):
        longest = count * (width + 1 + 4 + 1) + width
        assert needles_fit(BYTES.encode_ordinary, math.ceil(longest * 8 / 7), count, 4)
        assert not needles_fit(BYTES.encode_ordinary, math.ceil(longest * 8 / 7) - 1, count, 4)


def test_any_needle_may_be_asked_for_and_be_anywhere():
    _, spans = texts(60, 512)
    ranks = [sorted(text).index(text[0]) for text in spans]
    assert set(ranks) == set(range(6))
    starts = [start for text in spans for start, _ in text]
    assert min(starts) < 60 and max(starts) > 430


def test_too_short_a_text_is_refused():
    encode = BYTES.encode_ordinary
    shortest = next(length for length in range(200) if 7 / 8 * length >= 2 * (30 + 5) + 30)
    assert needle_size(encode, shortest) == (2, 3) and needle_size(encode, 2048) == (6, 7)
    with pytest.raises(ValueError, match="no room"):
        needle_size(encode, shortest - 1)
    with pytest.raises(ValueError, match="128 tokens are too few"):
        needle_texts(BYTES, TEXT[:128], 128, 2, (2, 3), CITIES)
    assert texts(40, shortest)[0].shape == (40, shortest)


def test_numbers_have_the_same_length():
    encode, rng = MERGING.encode_ordinary, np.random.default_rng(0)
    lengths = [len(encode(f" {number}")) for number in rng.integers(10**6, 10**7, size=300)]
    for count in (2, 6):
        numbers = draw_numbers(rng, encode, count, 7)
        assert len(numbers) == len({tuple(number) for number in numbers}) == count
        assert {len(number) for number in numbers} == {statistics.mode(lengths)}
    assert len(set(lengths)) > 2
    assert sorted(draw_numbers(rng, encode, 9, 1)) == [[32, 48 + digit] for digit in range(1, 10)]  # each once


def test_shares_of_every_part(monkeypatch):
    """Tokens 2 and 3 are the answer, 5 and 7 are others; the weights are 0.1 -0.1 0.4 0.1 0 0.1 0 -0.1 0.1."""
    first = torch.tensor([[0.1, 0.0, 0.5, 0.1, 0.0, 0.2, 0.0, 0.0, 0.1]])
    second = torch.tensor([[0.0, 0.2, 0.2, 0.0, 0.0, 0.2, 0.0, 0.2, 0.0]])
    maps = {"weights": first - 0.5 * second, "first": first, "second": second}
    layers = [({kind: map_[None, None] for kind, map_ in maps.items()}, None)]  # of one layer with one head
    monkeypatch.setattr(retrieval, "layer_maps", lambda model, idx, rows: layers)
    found = needle_shares(None, torch.arange(9), [(2, 4), (7, 8), (5, 6)])
    expected = {"weights": [0.5, 0.2, 0.1, 0.2], "first": [0.6, 0.2, 0.1, 0.1], "second": [0.25, 0.5, 0.0, 0.25]}
    for kind, shares in expected.items():
        torch.testing.assert_close(found[kind], torch.tensor([[shares]]))


def test_layer_head_and_part_of_a_share():
    """Texts are averaged before the best head is chosen."""
    one, two = torch.full((2, 3, 4), 0.25), torch.full((2, 3, 4), 0.25)
    one[1, 2], one[0, 1] = torch.tensor([0.7, 0.1, 0.2, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    two[1, 2], two[0, 1] = torch.tensor([0.9, 0.0, 0.0, 0.1]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    found = summarize_shares([{"weights": one}, {"weights": two}])["weights"]
    assert found["best_head"] == dict(layer=1, head=2, answer=pytest.approx(0.8))
    assert found["answer"] == pytest.approx([(0.25 + 0.5 + 0.25) / 3, (0.25 + 0.25 + 0.8) / 3])
    assert found["others"] == pytest.approx([(0.25 + 0.0 + 0.25) / 3, (0.25 + 0.25 + 0.05) / 3])


# ------------------------------------------------------------------------------------- the task


def test_cities_of_the_test_are_held_out():
    assert (len(HELD_OUT), len(TAUGHT)) == (20, 60) and {*HELD_OUT} | {*TAUGHT} == {*CITIES}


def test_a_batch(task):
    """Half of it is pretraining's, the other half are texts that end with the answer, which alone is learned."""
    asked = set()
    for step in range(1, 41):
        count, (ordinary, (inputs, targets)) = task.get_batch(step)
        _, (same, _) = train.Pretraining.get_batch(task, step)
        assert count == 4 * 160 and all(map(torch.equal, ordinary, same))
        assert inputs.shape == targets.shape == (2, 160)
        for row, target in zip(inputs, targets):
            learned = target != -100
            number = decode(task, target[learned])
            assert learned[-len(number) :].all() and learned.sum() == len(number)
            assert torch.equal(row[1:][learned[:-1]], target[learned][:-1])  # a target is the next input
            text = decode(task, torch.cat((row, target[-1:])))
            city, answer = QUESTION.search(text).groups()
            needles = dict(NEEDLE.findall(text))
            assert len(needles) == 2 and needles[city] == answer == number.strip() and len(answer) == 3
            assert {*needles} <= {*TAUGHT}
            asked.add(city)
    assert len(asked) > 30


def test_a_step_without_needle_texts_is_refused(settings):
    for count in (1, 3):
        with pytest.raises(UserError, match="even number of micro-batches"):
            Retrieval(settings(batch_size=2 * count, micro_batch_size=2))


def test_batches_depend_on_the_seed_and_the_step_alone(task, settings):
    again, other = Retrieval(settings()), Retrieval(settings(seed=2))
    again.get_batch(1)
    texts = [t.get_batch(step)[1][1][0] for t, step in ((task, 5), (again, 5), (task, 6), (other, 5))]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[3])


def test_the_batches_of_all_attentions_are_the_same(settings):
    for plan in (train.Pretraining, Retrieval):
        batches = [plan(settings(attn=attn)).get_batch(3)[1] for attn in ("vanilla", "v1", "v2")]
        flat = [[tensor for tensors in batch for tensor in tensors] for batch in batches]
        assert all(map(torch.equal, flat[0], flat[1])) and all(map(torch.equal, flat[0], flat[2]))


def test_both_halves_of_the_loss_weigh_the_same(task):
    _, micro_batches = task.get_batch(1)
    loss = sum(task.loss(*tensors)["loss"] for tensors in micro_batches)
    expected = [F.cross_entropy(task.model(idx)[0].flatten(0, 1), y.flatten()) for idx, y in micro_batches]
    assert loss.item() == pytest.approx((expected[0] + expected[1]).item() / 2)


@pytest.mark.parametrize("attn", ["vanilla", "v1", "v2"])
def test_right_answers_are_those_of_greedy_decoding(attn):
    """With a vocabulary of 4, some answers of two tokens are right by chance."""
    torch.manual_seed(2)
    model = GPT(
        GPTConfig(attn=attn, n_layer=2, n_head=4, head_dim=8, n_embd=32, n_inner=32, vocab_size=4, block_size=16)
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    task = object.__new__(Retrieval)
    task.model, task.device = model.requires_grad_(False), torch.device("cpu")
    task.settings = types.SimpleNamespace(micro_batch_size=7)
    ids = torch.randint(4, (60, 15))
    spans = [[(start, start + 2), (0, 2)] for start in torch.randint(1, 13, (60,)).tolist()]
    right, loss = task.answers(ids, spans)
    losses = []
    for text, (span, _), found in zip(ids, spans, right.tolist(), strict=True):
        answer = text[slice(*span)]
        greedy = list(Decoder(model, 1, 16, temperature=0).stream(text[None, 1:], 2))
        assert found == torch.equal(torch.cat(greedy, dim=1)[0], answer)
        whole = torch.cat((text[1:], answer))
        losses.append(F.cross_entropy(model(whole[None, :-1])[0][0, -2:], answer).item())
    assert 0 < right.sum() < 60 and loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_validation_asks_for_held_out_cities(task, monkeypatch):
    ids, _ = task.val_texts
    assert ids.shape == (6, 160)
    for text in ids:
        assert {*dict(NEEDLE.findall(decode(task, text)))} <= {*HELD_OUT}
    monkeypatch.setattr(task, "answers", lambda *texts: (torch.tensor([True, False, True, True]), 0.5))
    metrics, text = task.evaluate()
    plain, _ = train.Pretraining.evaluate(task)
    assert metrics == dict(val_loss=(plain["val_loss"] + 0.5) / 2, val_accuracy=0.75)
    assert text.endswith("answers: loss 0.5000, right 0.750")


def test_measurement_by_number_of_needles_and_depth(task, monkeypatch):
    """Where answers in the first half of a text are right."""
    seen = []

    def answers(ids, spans):
        seen.append(spans)
        assert all({*dict(NEEDLE.findall(decode(task, text)))} <= {*HELD_OUT} for text in ids)
        return torch.tensor([start < 80 for (start, _), *_ in spans]), 0.0

    monkeypatch.setattr(task, "answers", answers)
    found = task.measure(50)
    assert json.loads(json.dumps(found)) == found
    assert (found["attn"], found["length"], found["needles"]) == ("v2", 160, 2)
    assert list(found["accuracy"]) == ["1", "2"]  # four do not fit
    for (needles, tested), spans in zip(found["accuracy"].items(), seen, strict=True):
        assert all(len(text) == int(needles) for text in spans)
        starts = [start for (start, _), *_ in spans]
        assert tested["texts"] == [sum(32 * part <= start < 32 * (part + 1) for start in starts) for part in range(5)]
        assert tested["right"] == [*tested["texts"][:2], sum(64 <= start < 80 for start in starts), 0, 0]
    for kinds in found["needle"].values():
        assert sum(kinds[part][0] for part in PARTS) == pytest.approx(1)


@pytest.mark.parametrize("attn", ["vanilla", "v2"])
def test_maps_of_the_head_that_looks_at_the_answer_most(settings, attn):
    task = Retrieval(settings(attn=attn))
    found = task.measure(4)
    recall, best = found["recall"], found["needle"]["weights"]["best_head"]
    assert json.loads(json.dumps(recall)) == recall
    assert {key: recall[key] for key in best} == best
    text = "".join(recall["tokens"])
    facts, asked = dict(NEEDLE.findall(text)), text.rsplit(" ", 2)[1]
    assert len(facts) == 2 and text.endswith(f" The magic number of {asked} is") and asked == [*facts][1]
    assert "".join(recall["tokens"][slice(*recall["span"])]) == f" {facts[asked]}"
    ids = torch.tensor([task.encoding.encode_ordinary(text)])
    with torch.no_grad():
        layers = [maps for maps, _ in layer_maps(task.model, ids, slice(None))]
        other = task.recall_maps(1 - best["layer"], 1 - best["head"], 0.5)  # of two layers with two heads
    kinds = dict(first="weights") if attn == "vanilla" else dict(first="first", second="second", difference="weights")
    for kind, name in kinds.items():
        for found in (recall, other):
            expected = layers[found["layer"]][name][0, found["head"]].numpy()
            assert torch.tensor(found[kind]) == pytest.approx(expected, abs=6e-5)
    assert ("factor" in recall, "difference" in recall) == (attn == "v2",) * 2
