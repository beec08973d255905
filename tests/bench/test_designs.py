"""bench/designs.py: V2's variants against formulas, and against V2 where they are the same."""

import dataclasses

import pytest
import torch

import train
from bench import runs
from bench.designs import DESIGNS
from engine.attention import attention_maps
from model import ATTENTION, GPT, DiffAttnV2, GPTConfig

H, D, T = 6, 8, 11


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def modules(name, n_kv_head=3):
    """A variant and V2 with the same weights, and what they read: x and rope."""
    shape = dict(n_head=H, n_kv_head=n_kv_head, head_dim=D, n_embd=32, block_size=16)
    model = GPT(GPTConfig(attn="v2", n_layer=1, vocab_size=64, n_inner=16, **shape)).requires_grad_(False)
    torch.manual_seed(1)
    v2 = model.layers[0].attn
    for weight in v2.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    variant = DESIGNS[name](model.config, 0).requires_grad_(False)
    variant.load_state_dict(v2.state_dict(), strict=False)
    return variant, v2, torch.randn(2, T, 32), model.rope(T)


def reference(module, x, rope, pairs, factor):
    """A1 V - factor A2 V for the two query heads of each of `pairs`, before o_proj: (B, T, H, D)."""
    q, k, v, _ = module.qkv(x, rope)
    maps = attention_maps(q, k, D**-0.5)  # (B, 2H, T, T)
    group = 2 * H // k.size(2)
    read = [maps[:, head] @ v[:, :, head // group] for head in range(2 * H)]  # (B, T, D)
    return torch.stack([read[a] - factor[..., i, None] * read[b] for i, (a, b) in enumerate(pairs)], dim=2)


NEIGHBOURS = [(2 * i, 2 * i + 1) for i in range(H)]
FAR = [(i, i + H) for i in range(H)]


@pytest.mark.parametrize("n_kv_head", [1, 3, 6])
@pytest.mark.parametrize("name", DESIGNS)
def test_output(name, n_kv_head):
    variant, v2, x, rope = modules(name, n_kv_head)
    logits = v2.lambda_proj(x)
    factor = {"no-lambda": torch.ones_like(logits), "half": torch.ones_like(logits) / 2, "no-sigmoid": logits}
    y = reference(v2, x, rope, FAR if name == "across" else NEIGHBOURS, factor.get(name, logits.sigmoid()))
    if name == "norm":
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(variant(x, rope)[0], torch.nn.functional.linear(y.flatten(2), v2.o_proj.weight))
    lam = variant.lam(x)  # which is logged
    torch.testing.assert_close(lam, factor.get(name, logits.sigmoid()))


def test_half_is_v2_without_its_projection():
    half, v2, x, rope = modules("half")
    assert not torch.allclose(half(x, rope)[0], v2(x, rope)[0])
    v2.lambda_proj.weight.zero_()
    torch.testing.assert_close(half(x, rope)[0], v2(x, rope)[0])


def test_without_lambda_it_is_v2_where_lambda_is_1():
    variant, v2, x, rope = modules("no-lambda")
    x[..., 0] = 1
    v2.lambda_proj.weight.zero_()[:, 0] = 50  # whose sigmoid is 1
    torch.testing.assert_close(variant(x, rope)[0], v2(x, rope)[0])


def test_across_is_v2_in_another_order_where_all_heads_share_their_keys():
    across, v2, x, rope = modules("across", n_kv_head=1)
    across.q_proj.weight.copy_(v2.q_proj.weight.view(H, 2, D, 32).transpose(0, 1).flatten(0, 2))
    torch.testing.assert_close(across(x, rope)[0], v2(x, rope)[0])
    across, v2, x, rope = modules("across", n_kv_head=3)
    across.q_proj.weight.copy_(v2.q_proj.weight.view(H, 2, D, 32).transpose(0, 1).flatten(0, 2))
    assert not torch.allclose(across(x, rope)[0], v2(x, rope)[0])


def test_the_runs_have_equal_parameters(monkeypatch):
    for name, kind in DESIGNS.items():
        monkeypatch.setitem(ATTENTION, name, kind)
    counts = {}
    for name, plan in runs.planned_runs("out").items():
        if name.startswith("design/") and name.endswith("-1"):
            shape = {field: getattr(plan.settings, field) for field in train.MODEL_FLAGS}
            with torch.device("meta"):
                counts[plan.settings.attn] = GPT(GPTConfig(**shape, vocab_size=50304)).num_params()
    assert counts.keys() == {"vanilla", "v2", *DESIGNS}
    assert all(32.25e6 < count < 32.35e6 for count in counts.values())


def test_they_are_no_choices_of_the_scripts():
    (field,) = (field for field in dataclasses.fields(train.Settings) if field.name == "attn")
    assert field.metadata["choices"] == tuple(ATTENTION) and not DESIGNS.keys() & ATTENTION.keys()
    with pytest.raises(ValueError, match="attn must be one of"):
        GPTConfig(attn="across")


def test_the_output_layer_is_drawn_like_others(monkeypatch):
    monkeypatch.setitem(ATTENTION, "norm", DESIGNS["norm"])
    shape = dict(n_layer=8, n_head=2, head_dim=32, n_embd=64, n_inner=16, vocab_size=64)
    stds = [GPT(GPTConfig(attn=attn, **shape)).layers[0].attn.o_proj.weight.std().item() for attn in ("v2", "norm")]
    assert stds == pytest.approx([0.02 / 4] * 2, rel=0.1)
    assert issubclass(DESIGNS["norm"], DiffAttnV2)
