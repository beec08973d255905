"""model.py against references in float64 that are written from the equations, and the losses."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from reference import REFERENCE
from small import HEADS, relative_error, tiny_config, tiny_model

import train
from engine import loss as loss_module
from engine.loss import mean_cross_entropy, token_cross_entropy
from model import ATTENTION, GPT, DiffAttnV2, GPTConfig, pad_vocab, rope_table


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
def test_outputs_and_gradients_follow_the_equations(float64, attn, heads, impl):
    torch.manual_seed(1)
    config, layer, T = tiny_config(attn, heads, attn_impl=impl), 2, 11
    module = ATTENTION[attn](config, layer)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    weights = {
        name.removesuffix(".weight"): p.detach().clone().requires_grad_() for name, p in module.named_parameters()
    }
    x = torch.randn(2, T, config.n_embd, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()

    cos, sin = rope_table(config.block_size, config.head_dim, config.rope_theta)
    ours, _ = module(x, (cos[:T], sin[:T]))
    args = (config.n_head, config.n_kv_head, config.head_dim, config.rope_theta, layer)
    reference = REFERENCE[attn](x_reference, weights, *args)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)

    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    reference.backward(upstream)
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name.removesuffix(".weight")].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attn", ATTENTION)
def test_a_model_has_no_float64_which_a_mac_has_not(attn):
    model = tiny_model(attn)
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float32}


@pytest.mark.parametrize("n_kv_layers", [0, 1, 2])
@pytest.mark.parametrize("attn", ATTENTION)
def test_whole_model_follows_the_equations(float64, attn, n_kv_layers):
    """The block around the attention: x + attn(norm(x)), x + down(silu(gate) * up), norm, output layer.

    And keys and values that the layers from n_kv_layers on share, with what the last layer that makes them reads.
    """
    model = tiny_model(attn, n_kv_layers=n_kv_layers)
    config, p = model.config, dict(model.named_parameters())
    idx = torch.randint(64, (2, 9))

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"]

    x, weights, kv_x = p["embed_tokens.weight"][idx], {}, None
    for i in range(config.n_layer):
        weights |= {n.split(".")[3]: w for n, w in p.items() if n.startswith(f"layers.{i}.attn.")}
        args = (config.n_head, config.n_kv_head, config.head_dim, config.rope_theta, i)
        read = norm(x, f"layers.{i}.attn_norm")
        kv_x = read if i < (n_kv_layers or 3) else kv_x
        x = x + REFERENCE[attn](read, weights, *args, kv_x)
        y = norm(x, f"layers.{i}.mlp_norm")
        gate, up = (y @ p[f"layers.{i}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ p[f"layers.{i}.mlp.down_proj.weight"].T
    expected = norm(x, "norm") @ p["lm_head.weight"].T
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(model(idx)[0], list(p.values()), upstream)
    for a, b in zip(ours, torch.autograd.grad(expected, list(p.values()), upstream)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
@pytest.mark.parametrize("attn", ATTENTION)
def test_the_future_changes_nothing(attn, impl):
    model = tiny_model(attn, "grouped", attn_impl=impl)
    before = torch.randint(32, (1, 20))
    for t in (1, 10, 19):
        after = before.clone()
        after[0, t] += 32
        a, b = model(before)[0], model(after)[0]
        assert torch.equal(a[:, :t], b[:, :t])
        assert not torch.equal(a[:, t:], b[:, t:])


# ------------------------------------------------------------------------------------- lambda


def test_lambdas_can_be_read_back():
    idx = torch.randint(64, (2, 9))
    assert tiny_model("vanilla").lambdas(idx) == []

    v1 = tiny_model("v1")
    for layer, value in zip(v1.layers, v1.lambdas(idx), strict=True):
        a = layer.attn
        expected = (a.lambda_q1 @ a.lambda_k1).exp() - (a.lambda_q2 @ a.lambda_k2).exp() + a.lambda_init
        assert value == pytest.approx(expected.item(), rel=1e-5)

    for n_kv_layers in (0, 1):
        v2, inputs = tiny_model("v2", n_kv_layers=n_kv_layers), {}
        for layer in v2.layers:
            layer.attn.register_forward_pre_hook(lambda module, args, read=inputs: read.update({module: args[0]}))
        v2(idx)
        expected = [(x @ attn.lambda_proj.weight.T).sigmoid().mean().item() for attn, x in inputs.items()]
        assert v2.lambdas(idx) == pytest.approx(expected, rel=1e-5)


def test_a_subclass_with_another_lambda(monkeypatch):
    """lam() is the only place: what forward() subtracts changes with it, and so does what is reported."""

    class ConstantLambda(DiffAttnV2):
        def lam(self, x, logits=None):
            return torch.full_like(super().lam(x, logits), self.factor)

    monkeypatch.setitem(ATTENTION, "constant", ConstantLambda)
    model, idx = tiny_model("constant"), torch.randint(64, (2, 9))

    def logits_with(factor):
        ConstantLambda.factor = factor
        assert model.lambdas(idx) == pytest.approx([factor] * 3)
        return model(idx)[0]

    assert not torch.allclose(logits_with(0.0), logits_with(0.9), atol=0.1)

    # Without the second map it is the plain Transformer with the first head of every pair.
    plain, weights = tiny_model("vanilla"), model.state_dict()
    for name in plain.state_dict():
        if name.endswith("q_proj.weight"):
            weights[name] = weights[name].view(4, 2, 8, 32)[:, 0].reshape(32, 32)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    torch.testing.assert_close(logits_with(0.0), plain(idx)[0], rtol=1e-4, atol=1e-4)


def test_a_subclass_with_one_lambda_a_token(monkeypatch):
    """For all heads at once: in forward, backward, and token by token with a cache."""

    class OneLambda(DiffAttnV2):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.lambda_proj = nn.Linear(config.n_embd, 1, bias=False)

    monkeypatch.setitem(ATTENTION, "one", OneLambda)
    model, per_head, idx = tiny_model("one", "grouped"), tiny_model("v2", "grouped"), torch.randint(64, (2, 9))
    weights = model.state_dict()
    for name in weights:
        if "lambda_proj" in name:
            weights[name] = weights[name].expand(12, -1)  # the same for every head
    per_head.load_state_dict(weights)
    torch.testing.assert_close(model(idx)[0], per_head(idx)[0])
    assert model.lambdas(idx) == pytest.approx(per_head.lambdas(idx), rel=1e-5)

    for each in (model, per_head):
        each(idx, idx)[1].backward()
    for ours, expected in zip(model.layers, per_head.layers):
        gradient = expected.attn.lambda_proj.weight.grad.sum(0, keepdim=True)
        assert relative_error(ours.attn.lambda_proj.weight.grad, gradient) < 1e-4

    text = model.generate(idx, 12, temperature=0)
    assert torch.equal(text[:, 9:], model(text)[0].argmax(-1)[:, 8:-1])


# ------------------------------------------------------------------------------------- the losses


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
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
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


# ------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "given, n_head, n_kv_head, head_dim",
    [({}, 6, 6, 128), (dict(n_embd=64), 6, 6, 10), (dict(n_head=2), 2, 2, 384), (dict(n_head=12), 12, 12, 64),
     (dict(n_head=4, n_embd=64, attn="v1"), 4, 4, 16), (dict(n_head=8, n_kv_head=2, n_embd=64), 8, 2, 8),
     (dict(n_head=2, head_dim=8), 2, 2, 8), (dict(n_head=3, n_embd=32, attn="vanilla"), 3, 3, 10)],
)  # fmt: skip
def test_heads_follow_from_what_is_given(given, n_head, n_kv_head, head_dim):
    """As many key heads as heads, which together are as wide as the model; a checkpoint holds the numbers."""
    config = GPTConfig(**{**given, "n_layer": 1, "n_inner": 8, "vocab_size": 64, "block_size": 8})
    assert (config.n_head, config.n_kv_head, config.head_dim) == (n_head, n_kv_head, head_dim)
    assert GPTConfig(**asdict(config)) == config and None not in asdict(config).values()
    assert GPT(config)(torch.zeros(1, 2, dtype=torch.long))[0].shape == (1, 2, 64)


def test_the_default_model_is_the_recipes():
    c = GPTConfig()
    shape = (c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.n_inner)
    assert c.attn == "v2" and shape == (12, 768, 6, 6, 128, 1664)
    with torch.device("meta"):
        assert GPT(c).num_params() / 1e6 == pytest.approx(158.7, abs=0.05)


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


@pytest.mark.parametrize("preset", train.SHAPES)
def test_v2_has_fewer_attention_parameters_than_as_many_query_heads_of_a_transformer(preset):
    """One sixth with as many key heads as heads, towards a quarter with fewer; lambda_proj takes 1 / head_dim of it."""
    shape = train.SHAPES[preset]["v2"]
    heads, width = shape["n_head"], shape["head_dim"]
    small = dict(n_embd=64, vocab_size=64, block_size=8, n_inner=8, n_kv_head=shape.get("n_kv_head", heads), n_layer=1)
    v2 = GPT(GPTConfig(attn="v2", n_head=heads, head_dim=width, **small)).layers[0].attn
    plain = GPT(GPTConfig(attn="vanilla", n_head=2 * heads, head_dim=width, **small)).layers[0].attn
    assert v2.q_proj.weight.shape == plain.q_proj.weight.shape and v2.k_proj.weight.shape == plain.k_proj.weight.shape
    counts = [sum(p.numel() for p in attn.parameters()) for attn in (v2, plain)]
    saved = (1 - 1 / width) / (4 + 2 * small["n_kv_head"] / heads)
    assert 1 - counts[0] / counts[1] == pytest.approx(saved)
    assert {"tiny": 0.164, "ldiff": 0.165, "1b": 0.2205, "10b": 0.2205}[preset] == pytest.approx(saved, abs=5e-4)
