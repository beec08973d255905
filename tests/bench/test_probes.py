"""bench/probes.py: its maps against the attention modules, and its measurements against cases known exactly."""

import json
import math
import statistics

import numpy as np
import pytest
import tiktoken
import torch

from bench import probes
from bench.probes import differential_maps, needle_size, needle_texts, probe, sentence_maps, share
from data.tokenizer import get_tokenizer
from engine.attention import attention_maps
from engine.generate import prepare_for_inference
from model import ATTENTION, GPT, GPTConfig

BYTES = get_tokenizer("bytes")
# Bytes and most pairs of digits. As with GPT-2's BPE, numbers with equally many digits differ in their number of ids.
PAIRS = {**{bytes([i]): i for i in range(256)}, **{b"%02d" % i: 256 + i for i in range(100) if i % 7}}
MERGING = tiktoken.Encoding("pairs", pat_str=r" ?\d+|[^\d]+", mergeable_ranks=PAIRS, special_tokens={})
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog, " * 60, dtype=np.uint8).astype(np.uint16)
SHAPE = dict(block_size=128, vocab_size=384, n_layer=2, n_embd=32, n_inner=48, head_dim=8)
HEADS = {"multi-head": dict(n_head=4, n_kv_head=4), "grouped": dict(n_head=8, n_kv_head=4)}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_model(attn, heads="multi-head", std=0.3, **changes):
    """A model whose weights are large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(attn=attn, **{**SHAPE, **HEADS[heads], **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.requires_grad_(False)


def uniform_model(attn):
    """A model whose queries are zero, so that every map is uniform. V2's factor is sigmoid(0), V1's lambda_init."""
    model = tiny_model(attn)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "lambda_" in name:
            parameter.zero_()
    return model


# ------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize(
    "rows", [slice(None), slice(3, 8), slice(-1, None), torch.tensor([9, 2, 5])], ids=["all", "some", "last", "any"]
)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
def test_maps_times_values_are_the_output_of_the_module(float64, attn, heads, rows):
    model = tiny_model(attn, heads)
    module, rope, x = model.layers[1].attn, model.rope(11), torch.randn(2, 11, 32)
    first, second, factor = differential_maps(module, x, rope, rows)
    values = module.qkv(x, rope)[2].transpose(1, 2)  # (B, G, S, Dv)
    weights = first if attn == "vanilla" else first - factor * second
    H = HEADS[heads]["n_head"] // (2 if attn == "v1" else 1)
    R = len(torch.arange(11)[rows])
    assert weights.shape == (2, H, R, 11)
    assert attn != "v2" or factor.shape == (2, H, R, 1)
    output = (weights @ values.repeat_interleave(H // values.size(1), dim=1)).transpose(1, 2)  # (B, R, H, Dv)
    if attn == "v1":
        output = module.subln(output) * (1 - module.lambda_init)
    expected = module(x, rope)[0][:, rows]
    torch.testing.assert_close(module.o_proj(output.flatten(2)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("attn", ATTENTION)
def test_maps_are_probabilities_over_earlier_positions(float64, attn):
    model, x = tiny_model(attn, "grouped"), torch.randn(2, 11, 32)
    for rows in (slice(None), torch.tensor([7, 0])):
        for map_ in differential_maps(model.layers[0].attn, x, model.rope(11), rows)[:2]:
            if map_ is not None:
                torch.testing.assert_close(map_.sum(-1), torch.ones_like(map_.sum(-1)))
                assert (map_ >= 0).all()
                for position, row in zip(torch.arange(11)[rows], map_.unbind(2)):
                    assert (row[..., position + 1 :] == 0).all() and (row[..., : position + 1] > 0).all()


@pytest.mark.parametrize("attn", ATTENTION)
def test_maps_are_float32_under_autocast(attn):
    """q and k are bf16, as in the model, but nothing is rounded after them."""
    model, x = tiny_model(attn, "grouped"), torch.randn(2, 11, 32)
    module = model.layers[0].attn
    with torch.autocast("cpu", torch.bfloat16):
        first, second, factor = differential_maps(module, x, model.rope(11), slice(None))
        q, k = module.qkv(x, model.rope(11))[:2]
    assert {t.dtype for t in (first, second, factor) if t is not None} == {torch.float32}
    if attn != "vanilla":
        q = q[:, :, 0::2]
    if attn == "v1":
        k = k[:, :, 0::2]
    assert q.dtype == torch.bfloat16
    torch.testing.assert_close(first, attention_maps(q.float(), k.float(), 8**-0.5))


@pytest.mark.parametrize("n_kv_layers", [0, 1])
@pytest.mark.parametrize("attn", ATTENTION)
def test_every_layer_reads_what_it_reads_in_the_model(float64, attn, n_kv_layers):
    model, idx, read = tiny_model(attn, n_layer=3, n_kv_layers=n_kv_layers), torch.randint(256, (1, 9)), []
    for layer in model.layers:
        layer.attn.register_forward_pre_hook(lambda module, args: read.append((module, *args)))
    measured = list(probes.layer_maps(model, idx, slice(2, 5)))
    model(idx)
    assert len(measured) == 3
    for (maps, values), (module, x, rope, _, shared) in zip(measured, read[-3:]):
        first, second, factor = differential_maps(module, x, rope, slice(2, 5), shared)
        expected = {"weights": first}
        if attn != "vanilla":
            expected = {"weights": first - factor * second, "first": first, "second": second}
        assert list(maps) == list(expected)
        for kind in maps:
            torch.testing.assert_close(maps[kind], expected[kind])
        torch.testing.assert_close(values, module.qkv(x, rope, shared)[2])


# ------------------------------------------------------------------------------------- needle texts


@pytest.mark.parametrize("encoding, length", [(BYTES, 128), (BYTES, 512), (MERGING, 300)])
def test_needles_are_where_the_spans_say(encoding, length):
    count, digits = needle_size(encoding.encode_ordinary, length)
    ids, spans = needle_texts(encoding, TEXT, length, 20)
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


def test_needle_texts_depend_on_the_seed_alone():
    (one, spans), (same, same_spans) = (needle_texts(BYTES, TEXT, 256, 5, seed=3) for _ in range(2))
    other, other_spans = needle_texts(BYTES, TEXT, 256, 5, seed=4)
    assert torch.equal(one, same) and spans == same_spans
    assert not torch.equal(one, other) and spans != other_spans
    assert len({tuple(text) for text in one.tolist()}) == 5
    assert len({text[0] for text in spans}) > 1  # the answer is not always at the same place


def test_needles_of_a_size_about_given_cities():
    cities = ("Kobe", "Lima", "Oslo")
    ids, spans = needle_texts(BYTES, TEXT, 256, 9, size=(3, 4), cities=cities)
    for text, found in zip(ids.tolist(), spans):
        named = [word.split(" is")[0] for word in BYTES.decode(text).split(" The magic number of ")[1:]]
        assert sorted(named[:-1]) == sorted(cities) and named[-1] in cities
        assert [stop - start for start, stop in found] == [5] * 3
    width = len(" The magic number of Athens is")
    for count in (2, 3, 7):
        longest = count * (width + 1 + 4 + 1) + width
        assert probes.needles_fit(BYTES.encode_ordinary, math.ceil(longest * 8 / 7), count, 4)
        assert not probes.needles_fit(BYTES.encode_ordinary, math.ceil(longest * 8 / 7) - 1, count, 4)


def test_any_needle_may_be_asked_for_and_be_anywhere():
    _, spans = needle_texts(BYTES, TEXT, 512, 60)
    ranks = [sorted(text).index(text[0]) for text in spans]
    assert set(ranks) == set(range(6))
    starts = [start for text in spans for start, _ in text]
    assert min(starts) < 60 and max(starts) > 430


def test_too_short_a_text_is_refused():
    encode = BYTES.encode_ordinary
    shortest = next(length for length in range(200) if 7 / 8 * length >= 2 * (30 + 5) + 30)
    assert needle_size(encode, shortest) == (2, 3) and needle_size(encode, 2048) == (6, 7)
    with pytest.raises(ValueError, match="no room"):
        needle_texts(BYTES, TEXT, shortest - 1, 2)
    with pytest.raises(ValueError, match="128 tokens are too few"):
        needle_texts(BYTES, TEXT[:128], 128, 2)
    for seed in range(40):
        assert needle_texts(BYTES, TEXT, shortest, 1, seed)[0].shape == (1, shortest)


def test_numbers_are_compared_at_the_same_length():
    encode, rng = MERGING.encode_ordinary, np.random.default_rng(0)
    lengths = [len(encode(f" {number}")) for number in rng.integers(10**6, 10**7, size=300)]
    for count in (2, 6):
        numbers = probes.draw_numbers(rng, encode, count, 7)
        assert len(numbers) == len({tuple(number) for number in numbers}) == count
        assert {len(number) for number in numbers} == {statistics.mode(lengths)}
    assert len(set(lengths)) > 2
    assert sorted(probes.draw_numbers(rng, encode, 9, 1)) == [[32, 48 + digit] for digit in range(1, 10)]  # each once


# ------------------------------------------------------------------------------------- measurements


def test_shares():
    weights = torch.tensor([[0.5, -0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(share(weights, slice(1, 3)), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(share(weights, torch.tensor([True, False, False, True])), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("attn", ["vanilla", "v1", "v2"])
def test_uniform_attention(float64, attn):
    """A part gets its share of the tokens. A map's norm is 1 / sqrt(n), the difference's (1 - factor) times that."""
    found = probe(uniform_model(attn), BYTES, TEXT, 128, texts=3)
    _, spans = needle_texts(BYTES, TEXT, 128, 3)
    width = spans[0][0][1] - spans[0][0][0]
    assert found["answer_tokens"] == width == 4  # a space and three digits, of two needles
    for shares in found["needle"].values():
        for part, tokens in dict(answer=4, others=4, first_token=1, rest=119).items():
            assert shares[part] == pytest.approx([tokens / 128] * 2)
        assert shares["best_head"]["answer"] == pytest.approx(4 / 128)
    factors = {"vanilla": [0, 0], "v1": [0.2, 0.8 - 0.6 * math.exp(-0.3)], "v2": [0.5, 0.5]}[attn]
    for shares in found["sink"].values():
        assert shares == pytest.approx([statistics.mean(1 / n for n in range(65, 129))] * 2)
    assert found["context_rms"]["bound"] == pytest.approx(1 / math.sqrt(128))
    norms = [1 / math.sqrt(n) for n in range(65, 129)]
    for kind in ("weights",) if attn == "vanilla" else ("weights", "first", "second"):
        measured = found["context_rms"][kind]
        scales = [1 - factor if kind == "weights" else 1 for factor in factors]
        assert measured["mean"] == pytest.approx([scale * statistics.mean(norms) for scale in scales])
        assert measured["minimum"] == pytest.approx([scale / math.sqrt(128) for scale in scales])
        low = np.quantile(norms * 3, 0.01)  # heads and windows have all the same
        assert measured["percentile_1"] == pytest.approx([scale * low for scale in scales], rel=1e-2)


def hand_made(monkeypatch, first, second, factor):
    """Let layer_maps() yield one layer with one head of these maps (R, S), and with values that are all 2."""
    maps = {"weights": first - factor * second, "first": first, "second": second}
    maps = {kind: map_[None, None] for kind, map_ in maps.items()}
    values = torch.full((1, first.size(-1), 1, 4), 2.0)
    monkeypatch.setattr(probes, "layer_maps", lambda model, idx, rows: iter([(maps, values)]))


def test_shares_of_every_part(monkeypatch):
    """Tokens 2 and 3 are the answer, 5 and 7 are others; the weights are 0.1 -0.1 0.4 0.1 0 0.1 0 -0.1 0.1."""
    first = torch.tensor([[0.1, 0.0, 0.5, 0.1, 0.0, 0.2, 0.0, 0.0, 0.1]])
    second = torch.tensor([[0.0, 0.2, 0.2, 0.0, 0.0, 0.2, 0.0, 0.2, 0.0]])
    hand_made(monkeypatch, first, second, 0.5)
    found = probes.needle_shares(None, torch.arange(9), [(2, 4), (7, 8), (5, 6)])
    expected = {"weights": [0.5, 0.2, 0.1, 0.2], "first": [0.6, 0.2, 0.1, 0.1], "second": [0.25, 0.5, 0.0, 0.25]}
    for kind, shares in expected.items():
        torch.testing.assert_close(found[kind], torch.tensor([[shares]]))


def test_measures_of_a_window(monkeypatch):
    """All values are the same, so the output is the sum of the weights times that value."""
    first, second = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.0, 0.4]]), torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.0, 0.8]])
    hand_made(monkeypatch, first, second, 0.25)
    sink, rms = probes.window_measures(None, torch.arange(3))
    shares = dict(weights=(0.6 / 0.75 + 0.55 / 0.75) / 2, first=0.6, second=0.1)
    assert {kind: value.item() for kind, value in sink.items()} == pytest.approx(shares)
    expected = dict(
        weights=[math.hypot(0.6, 0.15), math.hypot(0.55, 0.2)], first=[math.hypot(0.6, 0.4)] * 2,
        second=[1.0, math.hypot(0.2, 0.8)], output=[0.75, 0.75],
    )  # fmt: skip
    assert list(rms) == list(expected)
    for kind, values in expected.items():
        assert rms[kind].tolist() == [pytest.approx(values)]


def test_layer_head_and_part_of_a_share():
    """Texts are averaged before the best head is chosen."""
    one, two = torch.full((2, 3, 4), 0.25), torch.full((2, 3, 4), 0.25)
    one[1, 2], one[0, 1] = torch.tensor([0.7, 0.1, 0.2, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    two[1, 2], two[0, 1] = torch.tensor([0.9, 0.0, 0.0, 0.1]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    found = probes.summarize_shares([{"weights": one}, {"weights": two}])["weights"]
    assert found["best_head"] == dict(layer=1, head=2, answer=pytest.approx(0.8))
    assert found["answer"] == pytest.approx([(0.25 + 0.5 + 0.25) / 3, (0.25 + 0.25 + 0.8) / 3])
    assert found["others"] == pytest.approx([(0.25 + 0.0 + 0.25) / 3, (0.25 + 0.25 + 0.05) / 3])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
def test_output_rms(float64, attn, heads):
    """Against the output of the attention kernel, for the last query of every head."""
    model = tiny_model(attn, heads)
    x, rope, module = torch.randn(1, 11, 32), model.rope(11), model.layers[1].attn
    first, second, factor = differential_maps(module, x, rope, slice(-1, None))
    values = module.qkv(x, rope)[2]
    ours = probes.output_rms(first if second is None else first - factor * second, values)
    seen = []
    module.o_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    if attn == "v1":  # the output before the norm
        module.subln.register_forward_pre_hook(lambda layer, args: seen.append(args[0].flatten(2)))
    module(x, rope)
    output = seen[0][:, -1].unflatten(-1, (ours.size(1), -1))  # (B, H, Dv)
    group = ours.size(1) // values.size(2)
    for h in range(ours.size(1)):
        expected = output[0, h].square().mean().sqrt() / values[0, :, h // group].square().mean().sqrt()
        assert ours[0, h, 0].item() == pytest.approx(expected.item())


def test_output_rms_of_uncorrelated_values_is_the_norm():
    torch.manual_seed(0)
    weights = torch.randn(1, 2, 3, 50)
    ratio = probes.output_rms(weights, torch.randn(1, 50, 1, 20000)) / weights.norm(dim=-1)
    torch.testing.assert_close(ratio, torch.ones(1, 2, 3), rtol=0.05, atol=0)


@pytest.mark.parametrize("attn", ATTENTION)
def test_scores_of_numbers(float64, attn):
    """Against a plain forward pass for each number, with a full context."""
    model = tiny_model(attn)
    ids, spans = needle_texts(BYTES, TEXT, 128, 1)
    scores = probes.number_scores(model, ids[0], spans[0])
    for score, (start, stop) in zip(scores.tolist(), spans[0], strict=True):
        number = ids[0, start:stop]
        text = torch.cat((ids[0], number))[len(number) - 1 : -1]
        assert len(text) == model.config.block_size
        chances = model(text[None])[0][0].log_softmax(-1)[-len(number) :]
        assert score == pytest.approx(chances.gather(-1, number[:, None]).mean().item())


def test_retrieval_is_right_where_the_answer_beats_all_others():
    scores = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.5, -9.0], [-0.5, -3.0, -2.5], [-1.0, -1.0, -1.0]])
    found = probes.summarize_scores(scores)
    assert found == dict(right=-1.125, wrong=pytest.approx(-23 / 8), accuracy=0.5, chance=pytest.approx(1 / 3))


def test_minimum_and_percentile_are_over_all_samples():
    samples = [{"weights": torch.arange(0.0, 100)[None]}, {"weights": torch.arange(100.0, 201)[None]}]
    sink = [{"weights": torch.tensor([0.2])}, {"weights": torch.tensor([0.4])}]
    shares, norms = probes.summarize_windows(list(zip(sink, samples)))
    assert shares["weights"] == pytest.approx([0.3])
    assert norms["weights"] == dict(mean=[100.0], minimum=[0.0], percentile_1=[pytest.approx(2.0)])


@pytest.mark.parametrize("attn", ATTENTION)
def test_outliers(float64, attn):
    """Against numpy, of what is in the layers as they are called one by one."""
    model, windows, seen = tiny_model(attn, "grouped"), torch.randint(256, (3, 40)), {}
    found = probes.summarize_moments([probes.activation_moments(model, window) for window in windows])
    rope, x = model.rope(40), model.embed(windows)
    for number, layer in enumerate(model.layers):
        hook = layer.attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
        added = layer.attn(layer.attn_norm(x), rope)[0]
        hook.remove()
        x = x + added
        x = x + layer.mlp(layer.mlp_norm(x))
        for kind, values in dict(residual=x, attention=added, heads=seen["heads"]).items():
            values = values.numpy().ravel()
            standard = (values - values.mean()) / values.std()
            assert found[kind]["largest"][number] == pytest.approx(np.abs(values).max())
            assert found[kind]["kurtosis"][number] == pytest.approx((standard**4).mean())
    assert all(len(values) == 2 for kind in found.values() for values in kind.values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_kurtosis_of_known_distributions():
    """3 if normal, 9/5 if uniform, also far from 0, and 1 / (p (1 - p)) - 3 for ones of probability p."""
    torch.manual_seed(0)
    few = torch.zeros(100)
    few[:10] = 1
    for values, kurtosis in ((torch.randn(10**6) + 5, 3), (torch.rand(10**6) - 3, 9 / 5), (few, 1 / 0.09 - 3)):
        values = values.double()
        moments = torch.stack([values.abs().amax(), *((values**power).sum() for power in range(5))])
        found = probes.summarize_moments([{"residual": moments[None]}, {"residual": moments[None]}])
        assert found["residual"]["kurtosis"] == [pytest.approx(kurtosis, rel=0.01)]


# ------------------------------------------------------------------------------------- what figures get


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
def test_probe(attn, heads):
    model = tiny_model(attn, heads)
    found = probe(model, BYTES, TEXT, 128, texts=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    kinds = ["weights"] if attn == "vanilla" else ["weights", "first", "second"]
    about = dict(attn=attn, length=128, texts=2, seed=1, answer_tokens=4)
    assert {name: found[name] for name in about} == about
    assert list(found)[5:] == ["needle", "retrieval", "sink", "context_rms", "outliers"]
    assert list(found["needle"]) == list(found["sink"]) == kinds
    assert list(found["context_rms"]) == ["bound", *kinds, "output"]
    for kind in kinds:
        assert all(len(found["needle"][kind][part]) == 2 for part in probes.PARTS)
        assert 0 <= found["needle"][kind]["best_head"]["head"] < model.config.n_head
        assert kind == "weights" or min(found["context_rms"][kind]["minimum"]) >= found["context_rms"]["bound"]
    assert found["retrieval"]["right"] < 0 and found["retrieval"]["wrong"] < 0
    assert probe(model, BYTES, TEXT, 128, texts=2) == found
    assert probe(model, BYTES, TEXT, 128, texts=2, seed=2)["needle"] != found["needle"]


@pytest.mark.parametrize("attn", ATTENTION)
def test_probe_under_autocast(attn, monkeypatch):
    """As on a GPU, where the model computes in bf16."""
    model = tiny_model(attn, std=0.1)
    exact = probe(model, BYTES, TEXT, 128, texts=2)
    monkeypatch.setattr(probes, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    found = probe(model, BYTES, TEXT, 128, texts=2)
    assert found != exact
    for kind in found["sink"]:
        assert found["sink"][kind] == pytest.approx(exact["sink"][kind], rel=0.05)
        assert found["needle"][kind]["answer"] == pytest.approx(exact["needle"][kind]["answer"], rel=0.05)
    for kind in set(found["context_rms"]) - {"bound"}:
        assert found["context_rms"][kind]["mean"] == pytest.approx(exact["context_rms"][kind]["mean"], rel=0.05)
    assert found["retrieval"]["right"] == pytest.approx(exact["retrieval"]["right"], abs=0.1)


def test_a_model_prepared_for_inference_can_be_probed(float64):
    model = tiny_model("v2", "grouped")
    before = probe(model, BYTES, TEXT, 128, texts=1)
    after = probe(prepare_for_inference(model), BYTES, TEXT, 128, texts=1)
    assert after["needle"]["weights"]["answer"] == pytest.approx(before["needle"]["weights"]["answer"])


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_maps_of_a_sentence(float64, attn):
    model, text = tiny_model(attn, "grouped"), "A fox, a dog."
    found = sentence_maps(model, BYTES, text)
    assert json.loads(json.dumps(found)) == found
    assert found["tokens"] == list(text) and len(found["heads"]) == 3
    ids = torch.tensor([BYTES.encode_ordinary(text)])
    removed, rope, x = {}, model.rope(len(text)), model.embed(ids)
    for number, layer in enumerate(model.layers):
        maps = [t[0] for t in differential_maps(layer.attn, layer.attn_norm(x), rope, slice(None))]
        factors = maps[2].expand(4 if attn == "v1" else 8, len(text), 1)
        for head, (first, second, factor) in enumerate(zip(*maps[:2], factors)):
            amount = torch.minimum(first, factor * second)[:, 1:].sum().item()
            removed[number, head] = amount, first, second, factor
        x, _ = layer(x, rope)
    best = sorted(removed, key=lambda place: -removed[place][0])[:3]
    assert [(head["layer"], head["head"]) for head in found["heads"]] == best
    for head, (_, first, second, factor) in zip(found["heads"], map(removed.get, best)):
        assert list(head) == ["layer", "head", "factor", "first", "second", "difference"]
        assert head["factor"] == pytest.approx(factor[-1].item())
        for name, expected in dict(first=first, second=second, difference=first - factor * second).items():
            torch.testing.assert_close(torch.tensor(head[name]), expected, rtol=0, atol=5.001e-5)
            assert all(weight == round(weight, 4) for row in head[name] for weight in row)


def test_plain_attention_has_no_maps_to_subtract():
    assert sentence_maps(tiny_model("vanilla"), BYTES, "A fox") == dict(tokens=list("A fox"), heads=[])
