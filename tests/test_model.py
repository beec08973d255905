"""model.py against references in float64 that are written from the equations."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from reference import REFERENCE

import model as model_module
from model import (
    ATTENTION,
    GPT,
    Decoder,
    GPTConfig,
    KVCache,
    RMSNorm,
    attention,
    cross_entropy_,
    decode_attention,
    mean_cross_entropy,
    pad_vocab,
    rope_table,
    sample_token,
    token_cross_entropy,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_flash_attn = pytest.mark.skipif(model_module.flash_attn_func is None, reason="needs the flash-attn package")

SHAPE = dict(block_size=24, vocab_size=64, n_layer=3, n_embd=32, n_inner=48, head_dim=8)
HEADS = {"multi-head": dict(n_head=4, n_kv_head=4), "grouped": dict(n_head=12, n_kv_head=4)}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny_config(attn, heads="multi-head", **changes):
    return GPTConfig(attn=attn, **{**SHAPE, **HEADS[heads], **changes})


def tiny_model(attn, heads="multi-head", **changes):
    """A model whose weights are large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    model = GPT(tiny_config(attn, heads, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# ------------------------------------------------------------------------------------- the attention modules


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
def test_outputs_and_gradients_follow_the_equations(float64, attn, heads, impl):
    torch.manual_seed(1)
    config, layer, T = tiny_config(attn, heads, attn_impl=impl), 2, 11
    module = ATTENTION[attn](config, layer)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    weights = {
        name.removesuffix(".weight"): p.detach().clone().requires_grad_() for name, p in module.named_parameters()
    }
    x = torch.randn(2, T, config.n_embd, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()

    cos, sin = rope_table(config.block_size, config.head_dim, config.rope_theta)
    ours = module(x, (cos[:T], sin[:T]))
    args = (config.n_head, config.n_kv_head, config.head_dim, config.rope_theta, layer)
    reference = REFERENCE[attn](x_reference, weights, *args)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)

    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    reference.backward(upstream)
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name.removesuffix(".weight")].grad, rtol=1e-9, atol=1e-9)


def test_lambda_init_counts_layers_from_zero():
    layers = [layer.attn for layer in tiny_model("v1").layers]
    assert layers[0].lambda_init == pytest.approx(0.2)
    assert layers[2].lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.6))


def test_norm_computes_in_float32():
    norm = RMSNorm(64, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(10, 64).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())  # rounded once, at the end


def test_whole_model_follows_the_equations(float64):
    """The block around the attention: x + attn(norm(x)), x + down(silu(gate) * up), norm, output layer."""
    model = tiny_model("v2")
    config, p = model.config, dict(model.named_parameters())
    idx = torch.randint(64, (2, 9))

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"]

    x = p["embed_tokens.weight"][idx]
    for i in range(config.n_layer):
        weights = {n.split(".")[3]: w for n, w in p.items() if n.startswith(f"layers.{i}.attn.")}
        args = (config.n_head, config.n_kv_head, config.head_dim, config.rope_theta, i)
        x = x + REFERENCE["v2"](norm(x, f"layers.{i}.attn_norm"), weights, *args)
        y = norm(x, f"layers.{i}.mlp_norm")
        gate, up = (y @ p[f"layers.{i}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ p[f"layers.{i}.mlp.down_proj.weight"].T
    torch.testing.assert_close(model(idx)[0], norm(x, "norm") @ p["lm_head.weight"].T, rtol=1e-10, atol=1e-10)


def test_lambdas_can_be_read_back():
    idx = torch.randint(64, (2, 9))
    assert tiny_model("vanilla").lambdas(idx) == []

    v1 = tiny_model("v1")
    for layer, value in zip(v1.layers, v1.lambdas(idx), strict=True):
        a = layer.attn
        expected = (a.lambda_q1 @ a.lambda_k1).exp() - (a.lambda_q2 @ a.lambda_k2).exp() + a.lambda_init
        assert value == pytest.approx(expected.item(), rel=1e-5)

    v2, seen = tiny_model("v2"), []
    for layer in v2.layers:
        weight = layer.attn.lambda_proj.weight
        layer.attn_norm.register_forward_hook(
            lambda module, args, x, weight=weight: seen.append((x @ weight.T).sigmoid().mean().item())
        )
    means = v2.lambdas(idx)
    assert len(means) == 3 and means == pytest.approx(seen[::2], rel=1e-5)  # each layer's norm runs twice


# ------------------------------------------------------------------------------------- the attention function


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, S", [(7, 7), (3, 7), (1, 7)])
@pytest.mark.parametrize("H, K, G, Dv", [(4, 4, 4, 8), (4, 2, 2, 8), (8, 4, 2, 16)])
def test_sdpa_equals_naive(float64, H, K, G, Dv, T, S, causal):
    q, k, v = torch.randn(2, T, H, 8), torch.randn(2, S, K, 8), torch.randn(2, S, G, Dv)
    naive = attention(q, k, v, causal=causal, impl="naive")
    assert naive.shape == (2, T, H, Dv)
    torch.testing.assert_close(attention(q, k, v, causal=causal, impl="sdpa"), naive, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
def test_causal_mask_is_aligned_to_the_bottom_right(float64, impl):
    """As in flash-attn: the queries are the last of the keys' positions."""
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    whole = attention(q, k, v, causal=True, impl=impl)
    torch.testing.assert_close(attention(q[:, 4:], k, v, causal=True, impl=impl), whole[:, 4:])


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
def test_softmax_scale(float64, impl):
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 16)
    expected = torch.softmax(torch.einsum("bthd,bshd->bhts", q, k) * 0.7, -1) @ v.transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, softmax_scale=0.7, impl=impl).transpose(1, 2), expected)


def test_flash_attn_asked_for_but_missing(monkeypatch):
    monkeypatch.setattr(model_module, "flash_attn_func", None)
    with pytest.raises(ValueError, match="needs the flash-attn package"):
        tiny_config("v2", attn_impl="flash_attn")


# ------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
@pytest.mark.parametrize("attn", ATTENTION)
def test_the_future_changes_nothing(attn, impl):
    model = tiny_model(attn, "grouped", attn_impl=impl)
    before, after = torch.randint(32, (1, 20)), None
    for t in (1, 10, 19):
        after = before.clone()
        after[0, t] += 32
        a, b = model(before)[0], model(after)[0]
        assert torch.equal(a[:, :t], b[:, :t])
        assert not torch.equal(a[:, t:], b[:, t:])


@pytest.mark.parametrize("attn", ATTENTION)
def test_loss_is_the_mean_over_targets_that_count(attn):
    model = tiny_model(attn)
    idx, targets = torch.randint(64, (2, 8)), torch.randint(64, (2, 8))
    targets[:, :3] = -100
    logits, loss = model(idx)[0], model(idx, targets)[1]
    assert logits.shape == (2, 8, 64)
    picked = F.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[:, 3:]
    assert loss.item() == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert model(idx)[1] is None


@pytest.mark.parametrize("chunk", [4, 100])
def test_mean_cross_entropy_equals_the_plain_one(float64, monkeypatch, chunk):
    """The loss and both gradients, in chunks that do and do not divide the rows."""
    monkeypatch.setattr(model_module, "CHUNK", chunk)
    torch.manual_seed(0)
    targets = torch.randint(50, (11,))
    targets[[0, 5]] = -100
    ours = [torch.randn(11, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)]
    plain = [x.detach().clone().requires_grad_() for x in ours]
    loss, expected = mean_cross_entropy(*ours, targets), F.cross_entropy(plain[0] @ plain[1].T, targets)
    torch.testing.assert_close(loss, expected)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    for x, y in zip(ours, plain):
        torch.testing.assert_close(x.grad, y.grad)
    with torch.no_grad():
        torch.testing.assert_close(mean_cross_entropy(*ours, targets), expected)


def test_chunks_of_a_bf16_weights_gradient_are_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(model_module, "CHUNK", 64)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 32).bfloat16(), (torch.randn(100, 32) * 0.3).bfloat16().requires_grad_()
    targets = torch.randint(100, (2048,))
    mean_cross_entropy(hidden, weight, targets).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, targets).backward()
    assert weight.grad.dtype == torch.bfloat16 and relative_error(weight.grad, exact.grad) < 3e-3


def test_token_cross_entropy_has_a_factor_for_every_token(float64):
    hidden, weight, targets = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8), torch.randint(50, (6,))
    targets[2] = -100
    factors = torch.randn(6)
    losses = token_cross_entropy(hidden, weight, targets)
    (losses * factors).sum().backward()
    ours, hidden.grad = hidden.grad, None
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (expected * factors).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(ours, hidden.grad)
    with pytest.raises(ValueError, match="frozen"):
        token_cross_entropy(hidden, weight.requires_grad_(), targets)


def test_gradients_in_bf16_have_no_common_error():
    """Each may be off by bf16's rounding, all together may not."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(777, 32), torch.randn(100, 32)
    targets, half = torch.randint(100, (777,)), hidden.bfloat16().requires_grad_()
    mean_cross_entropy(half, weight.bfloat16().requires_grad_(), targets).backward()
    exact = half.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.bfloat16().double().T, targets).backward()
    scale = (half.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(scale - 1) < 5e-4


def test_context_too_long_is_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        tiny_model("v2")(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("attn", ATTENTION)
def test_autocast_computes_in_bf16(attn):
    model, idx = tiny_model(attn), torch.randint(64, (2, 20))
    expected = model(idx)[0]
    assert model.embed(idx).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embed(idx).dtype == torch.bfloat16
        logits, loss = model(idx)[0], model(idx, idx)[1]
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert relative_error(logits, expected) < 5e-2


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_the_difference_has_the_dtype_of_the_values(attn):
    model = tiny_model(attn)
    x, rope, attention_module = torch.randn(2, 20, 32), model.rope(20), model.layers[1].attn
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, *_ = attention_module.qkv(x.bfloat16(), rope)
        lam = attention_module.lam(x.bfloat16())
        assert attention_module.subtract(q, k, v, lam, None).dtype == v.dtype == torch.bfloat16


@pytest.mark.parametrize("attn", ATTENTION)
def test_initialisation(attn):
    torch.manual_seed(0)
    model = GPT(tiny_config(attn, n_embd=128, n_inner=128, head_dim=32))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05), name
        elif "norm" in name or "subln" in name:
            assert (parameter == 1).all(), name
        elif "lambda_q" in name or "lambda_k" in name:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.6), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_tied_embeddings():
    untied, tied = tiny_model("v2"), tiny_model("v2", tie_embeddings=True)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.num_params() - tied.num_params() == 64 * 32


def test_pad_vocab():
    assert [pad_vocab(n) for n in (1, 64, 65, 259, 50257, 50259)] == [64, 64, 128, 320, 50304, 50304]
    assert pad_vocab(10, multiple=8) == 16


@pytest.mark.parametrize(
    "attn, changes, attention_products",
    [("vanilla", dict(n_head=6, n_kv_head=6, head_dim=128, n_inner=1920), 2),
     ("v1", dict(n_head=12, n_kv_head=12, head_dim=64, n_inner=1920), 3),
     ("v2", dict(n_head=6, n_kv_head=6, head_dim=128, n_inner=1664), 4)],
)  # fmt: skip
def test_parameters_and_flops_of_the_recipe(attn, changes, attention_products):
    with torch.device("meta"):
        model = GPT(GPTConfig(attn=attn, **changes))
    assert model.num_params() / 1e6 == pytest.approx(158.7, abs=0.05)
    q = 2 if attn == "v2" else 1
    per_layer = (q + 3) * 768**2 + 3 * 768 * changes["n_inner"] + (768 * 6 if attn == "v2" else 0)
    products = 12 * per_layer + 768 * 50304  # the embedding is looked up, not multiplied
    scores_and_values = 12 * attention_products * 768 * (2048 / 2)
    assert model.flops_per_token() == 6 * (products + scores_and_values)


@pytest.mark.parametrize(
    "changes, message",
    [(dict(attn="v3"), "attn must be one of vanilla, v1, v2, not 'v3'"), (dict(attn_impl="fast"), "attn_impl"),
     (dict(n_head=6, n_kv_head=4), "multiple of n_kv_head"), (dict(attn="v1", n_head=3, n_kv_head=3), "even"),
     (dict(head_dim=7), "even"), (dict(n_layer=0), "n_layer must be at least 1")],
)  # fmt: skip
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


# ------------------------------------------------------------------------------------- sampling


def test_greedy_generation_takes_the_likeliest_token():
    model = tiny_model("v2")
    idx = torch.randint(64, (2, 5))
    out = model.generate(idx, 40, temperature=0)  # beyond the context of 24
    assert out.shape == (2, 45) and torch.equal(out[:, :5], idx)
    for t in range(5, 45):
        forgotten = 0 if t <= 24 else 13 if t <= 37 else 26  # when 24 are full, all but the last 12
        assert torch.equal(out[:, t], model(out[:, forgotten:t])[0][:, -1].argmax(-1))


def test_a_prompt_longer_than_the_context_is_cut():
    model = tiny_model("v1")
    idx = torch.randint(64, (1, 40))
    out = model.generate(idx, 2, temperature=0)
    assert torch.equal(out[:, :40], idx)
    assert torch.equal(out[:, 40], model(idx[:, -24:])[0][:, -1].argmax(-1))
    assert torch.equal(out[:, 41], model(out[:, 29:41])[0][:, -1].argmax(-1))


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward_pass(float64, attn, heads, impl):
    model = tiny_model(attn, heads, attn_impl=impl)
    idx = torch.randint(64, (3, 20))
    expected = model.hidden(idx)
    for prompt in (1, 7, 19):
        cache = KVCache(model.config, 3, 20, torch.float64, "cpu")
        hidden = [model.hidden(idx[:, :prompt], cache, torch.arange(prompt))]
        hidden += [model.hidden(idx[:, t : t + 1], cache, torch.tensor([t])) for t in range(prompt, 20)]
        torch.testing.assert_close(torch.cat(hidden, dim=1), expected)


@pytest.mark.parametrize("attn", ATTENTION)
def test_a_frozen_model_computes_the_same(float64, attn):
    idx = torch.randint(64, (2, 20))
    model = tiny_model(attn)
    expected = model(idx)[0]
    torch.testing.assert_close(model.freeze()(idx)[0], expected)
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(copy.deepcopy(model)(idx)[0], expected)


def test_the_room_of_a_decoder_is_checked():
    model = tiny_model("v2")
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        Decoder(model, 2, 25)
    decoder = Decoder(model, 2, 6)
    for shape in ((2, 7), (1, 3)):
        with pytest.raises(ValueError, match="no room"):
            decoder.prefill(torch.zeros(shape, dtype=torch.long))
    decoder.prefill(torch.zeros(2, 5, dtype=torch.long))
    decoder.step()
    with pytest.raises(ValueError, match="full"):
        decoder.step()


def test_a_finished_decoder_leaves_no_memory():
    decoder = Decoder(tiny_model("v2"), 2, 6)
    decoder.prefill(torch.zeros(2, 3, dtype=torch.long))
    decoder.step()
    cache = weakref.ref(decoder.cache.layers[0][0])
    gc.disable()
    del decoder
    gc.enable()
    assert cache() is None


@pytest.mark.parametrize("attn", ATTENTION)
def test_every_cache_has_the_size_of_the_plain_one(attn):
    config = tiny_config(attn, "grouped")
    cache = KVCache(config, 5, 20, torch.float32, "cpu")
    for k, v in cache.layers:
        assert k.numel() + v.numel() == 2 * config.n_kv_head * config.head_dim * 5 * 20


def test_generation_never_takes_a_padding_id():
    model = tiny_model("vanilla")
    out = model.generate(torch.zeros(8, 1, dtype=torch.long), 20, temperature=5.0, n_vocab=3)
    assert out.max() <= 2


def test_sample_token_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20000, 4)

    def frequency(**options):
        return torch.bincount(sample_token(logits, **options).flatten(), minlength=4) / len(logits)

    torch.testing.assert_close(frequency(), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequency(top_k=2), torch.tensor([0.0, 0.0, 3 / 7, 4 / 7]), atol=0.015, rtol=0)
    squared = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30  # temperature 1/2
    torch.testing.assert_close(frequency(temperature=0.5), squared, atol=0.015, rtol=0)


# ------------------------------------------------------------------------------------- on a GPU


def relative_error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@needs_gpu
@pytest.mark.parametrize("impl", ["sdpa", "auto", pytest.param("flash_attn", marks=needs_flash_attn)])
@pytest.mark.parametrize(
    "H, K, G, D, Dv",
    [(6, 6, 6, 64, 64), (12, 6, 6, 128, 128), (12, 12, 6, 64, 128), (12, 4, 2, 64, 128), (6, 6, 3, 128, 256)],
)
def test_gpu_kernels_in_bf16(H, K, G, D, Dv, impl):
    """Forward and backward against float64 on the same bf16 numbers."""
    if impl == "flash_attn" and Dv > 128:
        pytest.skip("not every build of flash-attn has it")
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, 200, heads, width, device="cuda", dtype=torch.bfloat16)
        for heads, width in ((H, D), (K, D), (G, Dv))
    ]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, reference = attention(*inputs, causal=True, impl=impl), attention(*exact, causal=True, impl="naive")
    assert relative_error(ours, reference) < 5e-3
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    reference.backward(upstream.double())
    for x, y in zip(inputs, exact):
        assert relative_error(x.grad, y.grad) < 1e-2


@needs_gpu
@pytest.mark.parametrize("T", [1, 64, 500])
@pytest.mark.parametrize(
    "N, G, keys, D, Dv", [(6, 6, 1, 128, 128), (4, 2, 1, 64, 64), (6, 6, 2, 64, 128), (4, 2, 2, 16, 32)]
)
def test_gpu_difference_kernel(N, G, keys, D, Dv, T):
    """Output and gradients against float64, pair by pair; V2's lambda is of a token and head, V1's one number."""
    if model_module.gpu_generation("cuda") != (9, 0):
        pytest.skip("the kernel is for Hopper")
    torch.manual_seed(0)
    shapes = [(2, T, 2 * N, D), (2, T, keys * G, D), (2, T, G, Dv), (2, T, N) if keys == 1 else ()]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, lam = exact
    pairs = []
    for i in range(N):
        g, factor = i // (N // G), lam[..., i : i + 1, None] if lam.ndim else lam
        maps = [(q[:, :, [2 * i + m]], k[:, :, [keys * g + m * (keys - 1)]], v[:, :, [g]]) for m in (0, 1)]
        y1, y2 = (attention(*heads, causal=True, impl="naive") for heads in maps)
        pairs.append(y1 - factor * y2)
    reference = torch.cat(pairs, dim=2)
    strided = [x.movedim(1, 0).contiguous().movedim(0, 1) if x.ndim else x for x in inputs]
    ours = model_module.kernels.differential_attention(*strided)
    assert ours.dtype == torch.bfloat16 and relative_error(ours, reference) < 5e-3
    upstream = torch.randn_like(ours[:, :, :, :1]).expand_as(ours)
    ours.backward(upstream)
    reference.backward(upstream.double())
    for x, y in zip(inputs, exact):
        if T > 1 or x is not inputs[0] and x is not inputs[1]:  # a single key has no gradient
            assert relative_error(x.grad, y.grad) < 1e-2


@needs_gpu
@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_gpu_models_with_and_without_the_difference_kernel(attn, monkeypatch):
    """The same loss and gradients, compiled, with several pairs to a key head and several blocks of queries. A group
    has three pairs: with unbind() in DiffAttention.subtract, ptxas 12.8 gets V1's gradient wrong then."""
    if model_module.gpu_generation("cuda") != (9, 0):
        pytest.skip("the kernel is for Hopper")
    torch.compiler.reset()  # programs of other tests count towards a limit
    asked, has_kernel, results = [], model_module.has_difference_kernel, []
    for impl in ("auto", "sdpa"):
        model = tiny_model(attn, "grouped", attn_impl=impl, head_dim=32, n_layer=1, block_size=200).cuda()
        idx = torch.randint(64, (4, 200), generator=torch.Generator().manual_seed(1)).cuda()
        with monkeypatch.context() as patched, torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            patched.setattr(model_module, "has_difference_kernel", lambda *x: asked.append(has_kernel(*x)) or asked[-1])
            model(idx)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.compile(model, fullgraph=True)(idx, idx)[1]
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert asked == [True, False]
    (loss, gradients), (expected, others) = results
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    for name in gradients:
        assert relative_error(gradients[name], others[name]) < 5e-2, name


@needs_gpu
@pytest.mark.parametrize("impl", ["sdpa", pytest.param("flash_attn", marks=needs_flash_attn)])
@pytest.mark.parametrize("attn", ATTENTION)
def test_gpu_model_compiles_into_one_graph(attn, impl):
    torch.compiler.reset()  # programs of other tests count towards a limit
    model = tiny_model(attn, "grouped", attn_impl=impl, head_dim=32).cuda()
    idx = torch.randint(64, (2, 24), device="cuda")
    with torch.no_grad():
        reference = tiny_model(attn, "grouped", attn_impl="naive", head_dim=32).double().cuda()(idx)[0]
    with torch.autocast("cuda", torch.bfloat16):
        _, loss = torch.compile(model, fullgraph=True)(idx, idx)
        logits = torch.compile(model, fullgraph=True)(idx)[0]
    loss.backward()
    assert relative_error(logits, reference) < 3e-2
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_gpu
def test_gpu_cross_entropy_kernel():
    torch.manual_seed(0)
    logits = (torch.randn(40, 5003, device="cuda") * 4).bfloat16()
    targets = torch.randint(5003, (40,), device="cuda")
    targets[7] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    losses = cross_entropy_(logits, targets)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert relative_error(logits, exact.grad) < 3e-3


@needs_gpu
def test_gpu_loss_and_gradients_of_bf16_products():
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(1000, 64, device="cuda").requires_grad_()
    targets = torch.randint(1000, (300,), device="cuda")
    loss = mean_cross_entropy(hidden, weight, targets)
    loss.backward()
    exact = [hidden.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert relative_error(hidden.grad, exact[0].grad) < 1e-2 and relative_error(weight.grad, exact[1].grad) < 1e-2


@needs_gpu
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("B, S, position", [(1, 700, 699), (1, 30000, 29876), (3, 1000, 130), (70, 90, 0)])
@pytest.mark.parametrize(
    "H, K, G, D, Dv",
    [
        (6, 6, 6, 64, 64),
        (12, 6, 6, 128, 128),
        (12, 12, 6, 64, 128),
        (12, 4, 2, 24, 48),
        (6, 6, 3, 128, 256),
        (8, 1, 1, 64, 64),
        (4, 4, 4, 8, 8),
    ],
)
def test_gpu_decode_kernel(H, K, G, D, Dv, B, S, position, dtype, bound):
    torch.manual_seed(0)
    shapes = ((B, 1, H, D), (B, S, K, D), (B, S, G, Dv))
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    ours = decode_attention(q, k, v, torch.tensor([position], device="cuda"))
    end = position + 1
    expected = attention(q.double(), k[:, :end].double(), v[:, :end].double(), impl="naive")
    assert ours.dtype == dtype and relative_error(ours, expected) < bound


@needs_gpu
@pytest.mark.parametrize("rows", [1, 3])  # products of a single row are compiled to kernels of their own
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("attn", ATTENTION)
@torch.no_grad()
def test_gpu_generation_replays_a_graph(attn, compile, rows):
    """In bf16 the likeliest token may differ where two are close, so every choice has to be nearly the best."""
    model = tiny_model(attn, "grouped", head_dim=32, block_size=64).cuda()
    exact = tiny_model(attn, "grouped", head_dim=32, block_size=64, attn_impl="naive").double().cuda()
    idx = torch.randint(64, (rows, 5), device="cuda")
    out = model.freeze().generate(idx, 50, temperature=0, compile=compile)
    logits = exact(out[:, :-1])[0][:, 4:]
    chosen = logits.gather(-1, out[:, 5:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()


@needs_gpu
def test_gpu_sampling_follows_the_seed_and_fills_the_context():
    model = tiny_model("v2", block_size=64).cuda().freeze()
    idx = torch.randint(64, (2, 63), device="cuda")  # the second new token is the last one there is room for

    def text(seed, **options):
        torch.manual_seed(seed)
        return model.generate(idx, 40, **options)

    for options in ({}, dict(top_k=5, top_p=0.9)):
        assert torch.equal(text(1, **options), text(1, **options))
        assert not torch.equal(text(1, **options), text(2, **options))
