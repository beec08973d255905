"""The plain Transformer and the Differential Transformer, V1 and V2, in one file.

Everything but the attention is shared: a Llama-style decoder with RMSNorm, RoPE and SwiGLU, and no biases.
Shapes are written beside tensors:

    B batch    T query positions    S key positions    C n_embd    D head_dim
    H query heads, as the kernel sees them    K key heads    G value heads

Sources: V1 is arXiv 2410.05258 (Ye et al., Differential Transformer); V2 is Microsoft's Differential
Transformer V2 (January 2026).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_func
except ImportError:  # optional; `auto` never needs it
    flash_attn_func = None

HALF = (torch.bfloat16, torch.float16)  # what fused kernels on CUDA take
ATTENTION_IMPLS = ("auto", "flash_attn", "sdpa", "naive")


@dataclass
class GPTConfig:
    """The shape of a model. All kinds of attention put out n_head * head_dim numbers: V1 from n_head // 2 pairs of
    heads, V2 from 2 * n_head queries. Raises ValueError if the numbers don't fit."""

    attn: str = "v2"
    block_size: int = 2048
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which matrix kernels like
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6  # < n_head: grouped-query attention
    n_embd: int = 768
    head_dim: int = 128
    n_inner: int = 1664  # SwiGLU width
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attn_impl: str = "auto"

    def __post_init__(self):
        for name, choices in (("attn", ATTENTION), ("attn_impl", ATTENTION_IMPLS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.n_kv_head % ATTENTION[self.attn].value_width:
            raise ValueError(f"{self.attn} pairs its key heads, so n_kv_head must be even, not {self.n_kv_head}")
        if self.attn_impl == "flash_attn" and flash_attn_func is None:
            raise ValueError("attn_impl flash_attn needs the flash-attn package; sdpa and auto do without")
        if self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs, so head_dim must be even, not {self.head_dim}")


def pad_vocab(n, multiple=64):
    """The smallest multiple of `multiple` that holds n ids."""
    return math.ceil(n / multiple) * multiple


def at_least_float32(x):
    """Half precision is widened to float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------
# Attention: one function, three implementations


def attention(q, k, v, softmax_scale=None, causal=False, impl="auto"):
    """softmax(q k^T * softmax_scale) v, called like flash_attn_func.

    q (B, T, H, D), k (B, S, K, D), v (B, S, G, Dv) -> (B, T, H, Dv). H is a multiple of K and K of G: query head h
    reads key head h // (H / K) and value head h // (H / G). softmax_scale defaults to D ** -0.5. A causal mask is
    aligned to the bottom right (the last query sees every key), so T <= S.

    V1 is why v may be wider than q and have fewer heads than k: both maps of a pair read one 2D-wide value head.
    """
    softmax_scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    return _IMPLS[resolve_impl(impl, q)](q, k, v, softmax_scale, causal)


def resolve_impl(impl, q):
    """`auto` is PyTorch's kernels, except on GPUs where the flash-attn package is faster and installed."""
    if impl != "auto":
        return impl
    can_use_package = flash_attn_func is not None and q.is_cuda and q.dtype in HALF
    return "flash_attn" if can_use_package and not has_cudnn_attention(q) else "sdpa"


def has_cudnn_attention(q):
    """True where PyTorch prefers cuDNN's attention: half precision on the data-centre chips Hopper and Blackwell."""
    if not q.is_cuda or q.dtype not in HALF or q.size(-1) % 8:
        return False
    gpu = torch.cuda.get_device_properties(q.device)
    return (gpu.major, gpu.minor) in ((9, 0), (10, 0))


def _flash_attn(q, k, v, softmax_scale, causal):
    return flash_attn_func(*_equalize(q, k, v), softmax_scale=softmax_scale, causal=causal)


def _sdpa(q, k, v, softmax_scale, causal):
    if not has_cudnn_attention(q):  # cuDNN alone has a fused kernel for values that differ from the keys
        q, k, v = _equalize(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    T, S, mask = q.size(2), k.size(2), None
    if causal and T != S:  # PyTorch aligns is_causal to the top left; the two agree only for T == S
        mask, causal = _causal_mask(T, S, q.device), False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return y.transpose(1, 2)


def _naive(q, k, v, softmax_scale, causal):
    maps = attention_maps(q, k, softmax_scale, causal)
    v = v.repeat_interleave(q.size(2) // v.size(2), dim=2)
    return torch.einsum("bhts,bshd->bthd", maps.type_as(v), v)


def attention_maps(q, k, softmax_scale, causal=True):
    """The attention probabilities themselves, (B, H, T, S): quadratic in memory, for reading and for pictures."""
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
    if causal:
        scores = scores.masked_fill(~_causal_mask(q.size(1), k.size(1), q.device), float("-inf"))
    return torch.softmax(at_least_float32(scores), dim=-1)


_IMPLS = {"flash_attn": _flash_attn, "sdpa": _sdpa, "naive": _naive}


def _equalize(q, k, v):
    """Give v the heads of k, and q and k the width of v, for kernels that want all alike.

    The zeros add nothing to q . k; the softmax scale is given explicitly, so it stays that of the real width.
    """
    if v.size(2) != k.size(2):
        v = v.repeat_interleave(k.size(2) // v.size(2), dim=2)
    if missing := v.size(-1) - q.size(-1):
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    return q, k, v


def _causal_mask(T, S, device):
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


# ---------------------------------------------------------------------------------------------------
# Layers


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


class Attention(nn.Module):
    """Causal softmax attention with grouped queries: the baseline, and what both DIFF variants build on."""

    q_per_head = 1  # query heads, in n_head
    value_width = 1  # width of a value head, in head_dim
    products = 2  # multiplications per pair of tokens, in n_head * head_dim: one for the scores, one for the values

    def __init__(self, config, layer):
        super().__init__()
        self.head_dim, self.impl = config.head_dim, config.attn_impl
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.q_per_head * config.n_head * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)

    def qkv(self, x, rope):
        """x (B, T, C) -> q (B, T, H, D), k (B, T, K, D), both rotated, and v (B, T, G, Dv)."""
        q = apply_rope(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        k = apply_rope(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        v = self.v_proj(x).unflatten(-1, (-1, self.value_width * self.head_dim))
        return q, k, v

    def forward(self, x, rope):
        y = attention(*self.qkv(x, rope), causal=True, impl=self.impl)
        return self.o_proj(y.flatten(2))


class DiffAttnV1(Attention):
    """DIFF V1 (arXiv 2410.05258, equations 1 to 3): two maps per pair of heads, the second subtracted.

        out = (1 - lambda_init) * RMSNorm(A1 V - lambda * A2 V)
        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init

    Heads 2i and 2i + 1 of q and k make the two maps of pair i; v is 2D wide. With grouped queries, a group has two key
    heads and one value head, and map m of each of its pairs reads key head m.
    """

    value_width = 2
    products = 3

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.n_group = config.n_kv_head // 2
        # A buffer, not a float, of which torch.compile would make a program for every layer. Layers count from 0.
        lambda_init = torch.tensor(0.8 - 0.6 * math.exp(-0.3 * layer), dtype=torch.float64)
        self.register_buffer("lambda_init", lambda_init, persistent=False)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(torch.zeros(config.head_dim).normal_(std=0.1)))
        self.subln = RMSNorm(2 * config.head_dim, config.norm_eps)

    def lam(self, x):
        """The factor of the second map: a scalar in float32, whatever x is."""
        q1, k1, q2, k2 = map(at_least_float32, (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init.type_as(q1)

    def forward(self, x, rope):
        q, k, v = self.qkv(x, rope)
        # Kernels give neighbouring query heads the same key head, so the queries that use map 1 of a group come first.
        q = q.unflatten(2, (self.n_group, -1, 2))  # (B, T, group, pair, map, D)
        q = q.transpose(3, 4).flatten(2, 4)  # (B, T, group * map * pair, D)
        y = attention(q, k, v, causal=True, impl=self.impl)  # (B, T, group * map * pair, 2D)
        y1, y2 = y.unflatten(2, (self.n_group, 2, -1)).unbind(3)  # (B, T, group, pair, 2D) each
        y = at_least_float32(self.subln(y1 - self.lam(x) * y2)) * (1 - self.lambda_init)
        return self.o_proj(y.type_as(x).flatten(2))


class DiffAttnV2(Attention):
    """DIFF V2 (Microsoft, January 2026): twice the query heads, subtracted in pairs with a lambda per token and head.

        out_i = A_2i V - sigmoid(lambda_i) * A_2i+1 V,    lambda = x W_lambda

    Neighbouring query heads 2i and 2i + 1 share a key and value head, so keys, values and their cache stay those of the
    plain Transformer. No norm follows.
    """

    q_per_head = 2
    products = 4

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.lambda_proj = nn.Linear(config.n_embd, config.n_head, bias=False)

    def lam(self, x):
        """The factor of the second map, sigmoid(lambda): x (B, T, C) -> (B, T, n_head)."""
        return torch.sigmoid(self.lambda_proj(x))

    def forward(self, x, rope):
        y = attention(*self.qkv(x, rope), causal=True, impl=self.impl)  # (B, T, 2 * n_head, D)
        y1, y2 = y.unflatten(2, (-1, 2)).unbind(3)  # (B, T, n_head, D) each
        return self.o_proj((y1 - self.lam(x).unsqueeze(-1) * y2).flatten(2))


ATTENTION = {"vanilla": Attention, "v1": DiffAttnV1, "v2": DiffAttnV2}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = ATTENTION[config.attn](config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope):
        x = x + self.attn(self.attn_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


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
        """GPT-2's: normal(0.02), and the projections that write to the residual stream, of which there are two a
        layer, scaled down so that its variance does not grow with depth."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes_residual = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if writes_residual else 0.02
                nn.init.normal_(module.weight, std=std)

    def rope(self, T):
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.block_size}")
        return self.rope_cos[:T], self.rope_sin[:T]

    def embed(self, idx):
        """The start of the residual stream (B, T, C). Under autocast it is bf16: norms and sums move half the bytes."""
        x = self.embed_tokens(idx)
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def hidden(self, idx):
        """What lm_head turns into logits: idx (B, T) int64 -> (B, T, C). Raises ValueError if T exceeds block_size."""
        rope, x = self.rope(idx.size(1)), self.embed(idx)
        for layer in self.layers:
            x = layer(x, rope)
        return self.norm(x)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and None; with targets (B, T), detached logits and the mean
        cross-entropy in nats, in which targets of -100 are ignored. Raises ValueError if T exceeds block_size."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits.detach(), loss  # else torch.compile adds a gradient of zeros for the logits, gigabytes of them

    @torch.no_grad()
    def lambdas(self, idx):
        """The factor of the second map in every layer, a list of floats: V1's lambda; V2's sigmoid(lambda), averaged
        over heads and the tokens of idx (B, T). Empty for attention without one."""
        if not hasattr(ATTENTION[self.config.attn], "lam"):
            return []
        means = []
        rope, x = self.rope(idx.size(1)), self.embed(idx)
        for layer in self.layers:
            means.append(layer.attn.lam(layer.attn_norm(x)).float().mean().item())
            x = layer(x, rope)
        return means

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, n_vocab=None):
        """Continue idx (B, T) by sampling: yield one column of new ids (B, 1) after another. sample_token explains
        temperature, top_k and top_p; n_vocab keeps the ids below it, since the rest are padding. Beyond block_size the
        model sees the last block_size tokens."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            token = sample_token(logits[:, -1, :n_vocab], temperature, top_k, top_p)
            idx = torch.cat((idx, token), dim=1)
            yield token

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) and all that `stream` adds to it -> (B, T + max_new_tokens)."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, **options)), dim=1)

    def num_params(self):
        """Trained numbers; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations of one training token, forward and backward, in sequences of T (default
        block_size): 6 for each weight in a matrix product and for each multiplication in the attention.

        The attention counts what the algorithm multiplies for every pair of tokens, in units of n_head * head_dim:
        vanilla 2 (scores and values), V1 3 (its values are twice as wide), V2 4 (twice the heads). An implementation
        that pads V1's queries and keys, or calls a kernel four times, executes 4; padding is not counted.
        """
        T, config = T or self.config.block_size, self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        visible = T / 2  # keys a causal token sees on average
        products = ATTENTION[config.attn].products * config.n_head * config.head_dim * visible
        return 6 * (weights + config.n_layer * products)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw one id from each row of logits (B, vocab) -> (B, 1). Temperature 0 takes the likeliest. top_k keeps the k
    likeliest; top_p, of those, the fewest likeliest whose probabilities sum to p (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids = logits.float().topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # of all that come before
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(probabilities, num_samples=1))
