"""The plain Transformer and the Differential Transformer, V1 and V2, in one file.

A Llama-style decoder with RMSNorm, RoPE and SwiGLU, without biases. The three models differ in their attention alone:

    vanilla    A V                                                      A = softmax(Q K^T / sqrt(head_dim)), causal
    V1         (1 - lambda_init) * RMSNorm(A1 V - lambda * A2 V)        arXiv 2410.05258 (Ye et al.)
    V2         A1 V - sigmoid(lambda) * A2 V                            Microsoft, Differential Transformer V2, 2026

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(attn="v1", n_layer=4))

In order: the config, norm and RoPE, the three attentions, SwiGLU, the block, the model. Shapes are written beside
tensors:

    B batch    T positions    C n_embd    D head_dim
    H query heads    K key heads    G value heads

The kernels that compute A V and the loss are in engine/attention.py and engine/loss.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine.attention import (
    ATTENTION_IMPLS,
    causal_attention,
    differential_attention,
    flash_attn_func,
    has_differential_kernel,
    paired_attention,
)
from engine.generate import generate
from engine.linear import fused_linear
from engine.loss import mean_cross_entropy


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError if the numbers do not fit.

    Every attention puts out n_head * head_dim numbers a token: V1 from n_head // 2 pairs of heads, V2 from 2 * n_head
    query heads.
    """

    attn: str = "v2"  # a key of ATTENTION
    block_size: int = 2048  # context length in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which matrix kernels like
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int | None = None  # None: n_head; fewer: grouped-query attention
    n_kv_layers: int = 0  # layers with keys and values of their own; those above read the last one's. 0: all
    n_embd: int = 768
    head_dim: int | None = None  # None: n_embd / n_head, rounded down to an even number
    n_inner: int = 1664  # width of the SwiGLU
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attn_impl: str = "auto"  # attention kernel, see engine/attention.py

    def __post_init__(self):
        for name, choices in (("attn", ATTENTION), ("attn_impl", ATTENTION_IMPLS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        self.check_sizes("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_inner")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head // 2 * 2
        self.n_kv_layers = self.n_kv_layers or self.n_layer
        self.check_sizes("n_kv_head", "n_kv_layers", "head_dim")
        for name in ("rope_theta", "norm_eps"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)!r}")
        if self.n_kv_layers > self.n_layer:
            raise ValueError(f"n_kv_layers {self.n_kv_layers} is more than n_layer {self.n_layer}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.n_kv_head % ATTENTION[self.attn].value_width:
            raise ValueError(f"{self.attn} pairs its key heads, so n_kv_head must be even, not {self.n_kv_head}")
        if self.attn_impl == "flash_attn" and flash_attn_func is None:
            raise ValueError("attn_impl flash_attn needs the flash-attn package; sdpa and auto do without")
        if self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs, so head_dim must be even, not {self.head_dim}")

    def check_sizes(self, *names):
        for name in names:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 and whole, not {getattr(self, name)!r}")


def pad_vocab(n, multiple=64):
    """The smallest multiple of `multiple` that holds n ids."""
    return math.ceil(n / multiple) * multiple


# ---------------------------------------------------------------------------------------------------
# Norm and positions


def at_least_float32(x):
    """Widen half precision to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (arXiv 1910.07467)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = at_least_float32(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).type_as(x)


def rope_table(block_size, head_dim, theta):
    """cos and sin of position * theta^(-2i / head_dim) (arXiv 2104.09864), each (block_size, 1, head_dim / 2)."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64), frequency)[:, None]
    return angle.cos().to(torch.get_default_dtype()), angle.sin().to(torch.get_default_dtype())


def apply_rope(x, rope):
    """Rotate x (B, T, H, D) by its positions; dimension i turns with i + D/2, as in Llama."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


# ---------------------------------------------------------------------------------------------------
# Attention


class Attention(nn.Module):
    """Causal softmax attention with grouped queries: the baseline, and what both DIFF variants build on.

    Layers from n_kv_layers on have no k_proj and v_proj: they read `shared`, the keys and values of the last that has.
    YOCO (arXiv 2405.05254) shares in this way what it makes of the lower half's output.

    A subclass with an entry in ATTENTION is a choice of --attn. It overrides what it changes: forward(), the number of
    query heads, the width of value heads, input_projections(), and lam(x), the factor of a second map, which is logged
    if it exists and broadcast to (B, T, pairs).
    """

    q_per_head = 1  # query heads for each of n_head
    value_width = 1  # width of a value head in units of head_dim; there are n_kv_head / value_width of them

    def __init__(self, config, layer):
        super().__init__()
        self.head_dim, self.impl = config.head_dim, config.attn_impl
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.q_per_head * config.n_head * config.head_dim, bias=False)
        self.has_kv = layer < config.n_kv_layers
        if self.has_kv:
            self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
            self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)

    def input_projections(self):
        """The linear layers that read x, which are multiplied at once."""
        return (self.q_proj, self.k_proj, self.v_proj) if self.has_kv else (self.q_proj,)

    def qkv(self, x, rope, shared=None):
        """x (B, T, C) -> q (B, T, H, D) and k (B, T, K, D), rotated, v (B, T, G, value_width * D).

        What further input_projections() of a subclass put out comes after them. k and v are `shared` in a layer without
        its own.
        """
        q, *more = fused_linear(x, *self.input_projections())
        q = apply_rope(q.unflatten(-1, (-1, self.head_dim)), rope)
        if not self.has_kv:
            return q, *shared, *more
        k, v, *more = more
        k = apply_rope(k.unflatten(-1, (-1, self.head_dim)), rope)
        v = v.contiguous()  # else the backward pass would keep all of the product for it
        return q, k, v.unflatten(-1, (-1, self.value_width * self.head_dim)), *more

    def forward(self, x, rope, cache=None, shared=None):
        """x (B, T, C) -> the output (B, T, C), and the keys and values that it read, (k, v)."""
        q, k, v = self.qkv(x, rope, shared)
        y = causal_attention(q, k, v, cache, self.impl)
        return self.o_proj(y.flatten(2)), (k, v)


class DiffAttnV1(Attention):
    """DIFF V1 (arXiv 2410.05258, equations 1 to 3): two softmax maps for each pair of heads, the second subtracted.

    Heads 2i and 2i + 1 of q are the two maps of pair i, and v is 2D wide. With grouped queries, a group has two key
    heads, one for each map, and one value head.
    """

    value_width = 2

    def __init__(self, config, layer):
        super().__init__(config, layer)
        # A buffer, because torch.compile would make a program for every value of a float. Layers count from 0.
        self.register_buffer("lambda_init", torch.tensor(0.8 - 0.6 * math.exp(-0.3 * layer)), persistent=False)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(torch.zeros(config.head_dim).normal_(std=0.1)))
        self.subln = RMSNorm(2 * config.head_dim, config.norm_eps)

    def lam(self, x):
        """Return lambda, the factor of the second map: one number a layer, in float32, whatever x is."""
        q1, k1, q2, k2 = map(at_least_float32, (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def forward(self, x, rope, cache=None, shared=None):
        q, k, v = self.qkv(x, rope, shared)
        lam = self.lam(x)
        if not has_differential_kernel(q, k, v, cache, self.impl):
            attn1, attn2 = paired_attention(q, k, v, cache, self.impl)  # A1 V and A2 V, (B, T, pairs, 2D)
            y = (attn1 - lam.unsqueeze(-1) * attn2).type_as(attn1)  # of shape (1,), lam makes the product float32
        else:  # one kernel for the two lines above
            y = differential_attention(q, k, v, lam)
        y = at_least_float32(self.subln(y)) * (1 - self.lambda_init)
        return self.o_proj(y.type_as(x).flatten(2)), (k, v)


class DiffAttnV2(Attention):
    """DIFF V2 (Microsoft, January 2026): twice the query heads, subtracted in pairs with a lambda per token and head.

    Query heads 2i and 2i + 1 are the two maps of head i. Both read the same key head, so keys, values and their cache
    stay those of the plain Transformer. No norm follows.
    """

    q_per_head = 2

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.lambda_proj = nn.Linear(config.n_embd, config.n_head, bias=False)

    def input_projections(self):
        return *super().input_projections(), self.lambda_proj

    def lam(self, x, logits=None):
        """Return sigmoid(lambda), the factor of the second map: x (B, T, C) -> (B, T, n_head).

        `logits`, x W_lambda, are passed where qkv() has computed them already.
        """
        return torch.sigmoid(self.lambda_proj(x) if logits is None else logits)

    def forward(self, x, rope, cache=None, shared=None):
        q, k, v, logits = self.qkv(x, rope, shared)
        lam = self.lam(x, logits)
        if not has_differential_kernel(q, k, v, cache, self.impl):
            attn1, attn2 = paired_attention(q, k, v, cache, self.impl)  # A1 V and A2 V, (B, T, n_head, D)
            y = (attn1 - lam.unsqueeze(-1) * attn2).type_as(attn1)
        else:  # one kernel for the two lines above
            y = differential_attention(q, k, v, lam)
        return self.o_proj(y.flatten(2)), (k, v)


ATTENTION = {"vanilla": Attention, "v1": DiffAttnV1, "v2": DiffAttnV2}


# ---------------------------------------------------------------------------------------------------
# The rest of a layer


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def input_projections(self):
        return self.gate_proj, self.up_proj

    def forward(self, x):
        # In training, writing both halves' gradients into one tensor would cost more than one product saves.
        gate, up = fused_linear(x, *self.input_projections(), in_training=False)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    activation_checkpointing = False  # keep only x for the backward pass, which computes the rest again

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = ATTENTION[config.attn](config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.shares_kv = layer == config.n_kv_layers - 1 and config.n_kv_layers < config.n_layer

    def forward(self, x, rope, cache=None, shared=None):
        """x (B, T, C) -> x after this layer, and its keys and values if the layers above read them, else None."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.residual, x, rope, None, shared, use_reentrant=False)
        return self.residual(x, rope, cache, shared)

    def residual(self, x, rope, cache=None, shared=None):
        y, keys_values = self.attn(self.attn_norm(x), rope, cache, shared)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), keys_values if self.shares_kv else None

    def lam(self, x):
        """The factor of the second map, for an attention that has one."""
        return self.attn.lam(self.attn_norm(x))


# ---------------------------------------------------------------------------------------------------
# The model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_table(config.block_size, config.head_dim, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Draw the weights as GPT-2 does: normal(0.02).

        The projections that write to the residual stream, of which there are two a layer, are scaled down so that its
        variance does not grow with depth.
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes_residual = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if writes_residual else 0.02
                nn.init.normal_(module.weight, std=std)

    def rope(self, T):
        """cos and sin for positions 0 to T - 1."""
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
        return self.rope_cos[:T], self.rope_sin[:T]

    def embed(self, idx):
        """The start of the residual stream (B, T, C). Under autocast it is bf16: norms and sums move half the bytes."""
        x = self.embed_tokens(idx)
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def hidden(self, idx, cache=None, positions=None):
        """Run all layers: idx (B, T) int64 -> (B, T, C), which lm_head turns into logits.

        With a KVCache, the tokens are those at `positions` (T,). A single token sees what is in the cache before it;
        several are the beginning of a text and see each other alone. Then layers without keys of their own read the
        last token alone, and the output is (B, 1, C) if there are any. Raises ValueError if T exceeds block_size.
        """
        rope = self.rope(idx.size(1)) if cache is None else (self.rope_cos[positions], self.rope_sin[positions])
        x, shared = self.embed(idx), None
        for i, layer in enumerate(self.layers):
            if cache is not None and i == self.config.n_kv_layers:
                x, positions, rope = x[:, -1:], positions[-1:], (rope[0][-1:], rope[1][-1:])
            x, keys_values = layer(x, rope, None if cache is None else cache.at(i, positions), shared)
            shared = keys_values or shared
        return self.norm(x)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and None.

        With targets (B, T) -> None and the mean cross-entropy in nats, in which targets of -100 are ignored. The logits
        are not kept then, since they would be the largest tensor of all. Raises ValueError if T exceeds block_size.
        """
        hidden = self.hidden(idx)
        if targets is None:
            return self.lm_head(hidden), None
        return None, mean_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def generate(self, idx, max_new_tokens, **options):
        """Continue idx (B, T) by sampling -> (B, T + max_new_tokens); options: temperature, top_k, top_p, ..."""
        return generate(self, idx, max_new_tokens, **options)

    @torch.no_grad()
    def lambdas(self, idx):
        """The factor of the second map in every layer as a list of floats, empty for attention without one.

        V1's lambda; V2's sigmoid(lambda), averaged over heads and the tokens of idx (B, T).
        """
        if not hasattr(ATTENTION[self.config.attn], "lam"):
            return []
        means = []
        rope, x, shared = self.rope(idx.size(1)), self.embed(idx), None
        for layer in self.layers:
            means.append(layer.lam(x).float().mean().item())
            x, keys_values = layer(x, rope, None, shared)
            shared = keys_values or shared
        return means

    def set_activation_checkpointing(self, enabled=True):
        """Train in less memory: of a layer, keep only its input. Returns the model."""
        for layer in self.layers:
            layer.activation_checkpointing = enabled
        return self

    def num_params(self):
        """The number of parameters; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())
