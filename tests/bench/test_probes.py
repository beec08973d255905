"""bench/probes.py: its maps against the attention modules, and its measurements against cases known exactly."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

from bench import probes
from bench.probes import differential_maps, probe, share
from engine.attention import attention_maps
from engine.generate import prepare_for_inference
from model import ATTENTION, GPT, GPTConfig

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


# ------------------------------------------------------------------------------------- measurements


def test_shares():
    weights = torch.tensor([[0.5, -0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(share(weights, slice(1, 3)), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(share(weights, torch.tensor([True, False, False, True])), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("attn", ["vanilla", "v1", "v2"])
def test_uniform_attention(float64, attn):
    """The first token gets its share. A map's norm is 1 / sqrt(n), the difference's (1 - factor) times that."""
    found = probe(uniform_model(attn), TEXT, 128, windows=3)
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


def hand_made(monkeypatch, first, second, factor):
    """Let layer_maps() yield one layer with one head of these maps (R, S), and with values that are all 2."""
    maps = {"weights": first - factor * second, "first": first, "second": second}
    maps = {kind: map_[None, None] for kind, map_ in maps.items()}
    values = torch.full((1, first.size(-1), 1, 4), 2.0)
    monkeypatch.setattr(probes, "layer_maps", lambda model, idx, rows: iter([(maps, values)]))


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


def test_mean_and_minimum_are_over_all_samples():
    samples = [{"weights": torch.arange(0.0, 100)[None]}, {"weights": torch.arange(100.0, 201)[None]}]
    sink = [{"weights": torch.tensor([0.2])}, {"weights": torch.tensor([0.4])}]
    shares, norms = probes.summarize_windows(list(zip(sink, samples)))
    assert shares["weights"] == pytest.approx([0.3])
    assert norms["weights"] == dict(mean=[100.0], minimum=[0.0])


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
    found = probe(model := tiny_model(attn, heads), TEXT, 128, windows=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    kinds = ["weights"] if attn == "vanilla" else ["weights", "first", "second"]
    assert (found["attn"], found["length"], list(found)[2:]) == (attn, 128, ["sink", "context_rms", "outliers"])
    assert list(found["sink"]) == kinds and list(found["context_rms"]) == ["bound", *kinds, "output"]
    for kind in set(kinds) - {"weights"}:
        assert min(found["context_rms"][kind]["minimum"]) >= found["context_rms"]["bound"]
    assert probe(model, TEXT, 128, windows=2) == found
    assert probe(model, TEXT, 128, windows=3)["sink"] != found["sink"]


@pytest.mark.parametrize("attn", ATTENTION)
def test_probe_under_autocast(attn, monkeypatch):
    """As on a GPU, where the model computes in bf16."""
    model = tiny_model(attn, std=0.1)
    exact = probe(model, TEXT, 128, windows=2)
    monkeypatch.setattr(probes, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    found = probe(model, TEXT, 128, windows=2)
    assert found != exact
    for kind in found["sink"]:
        assert found["sink"][kind] == pytest.approx(exact["sink"][kind], rel=0.05)
    for kind in set(found["context_rms"]) - {"bound"}:
        assert found["context_rms"][kind]["mean"] == pytest.approx(exact["context_rms"][kind]["mean"], rel=0.05)


def test_a_model_prepared_for_inference_can_be_probed(float64):
    model = tiny_model("v2", "grouped")
    before = probe(model, TEXT, 128, windows=1)
    after = probe(prepare_for_inference(model), TEXT, 128, windows=1)
    assert after["sink"]["weights"] == pytest.approx(before["sink"]["weights"])
