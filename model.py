"""The plain Transformer and the Differential Transformer, V1 and V2, in one file.

Everything but the attention is shared: a Llama-style decoder with RMSNorm, RoPE and SwiGLU, and no biases. In order:
attention, layers, loss, model, generating. What a GPU does faster in Triton is in kernels.py.
Shapes are written beside tensors:

    B batch    T query positions    S key positions    C n_embd    D head_dim
    H query heads, as the kernel sees them    K key heads    G value heads

Sources: V1 is arXiv 2410.05258 (Ye et al., Differential Transformer); V2 is Microsoft's Differential
Transformer V2 (January 2026).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from flash_attn import flash_attn_func
except ImportError:  # optional; `auto` never needs it
    flash_attn_func = None
try:
    import kernels
except ImportError:  # they need Triton, which comes with PyTorch for CUDA
    kernels = None

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
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 and whole, not {getattr(self, name)!r}")
        for name in ("rope_theta", "norm_eps"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)!r}")
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
    """`auto` is PyTorch's kernels, but the flash-attn package where it is installed and cuDNN cannot be used."""
    if impl != "auto":
        return impl
    can_use_package = flash_attn_func is not None and q.is_cuda and q.dtype in HALF
    return "flash_attn" if can_use_package and not has_cudnn_attention(q) else "sdpa"


def has_cudnn_attention(q):
    """True where PyTorch prefers cuDNN's attention: half precision on the data-centre chips Hopper and Blackwell."""
    return q.is_cuda and q.dtype in HALF and q.size(-1) % 8 == 0 and gpu_generation(q.device) in ((9, 0), (10, 0))


def gpu_generation(device):
    """NVIDIA's compute capability: (9, 0) is Hopper."""
    gpu = torch.cuda.get_device_properties(device)
    return gpu.major, gpu.minor


def has_difference_kernel(q, k, v, impl):
    """True where one kernel for both maps takes less memory than attention() and a subtraction, and no more time: on
    Hopper, as far as it was measured, up to 8192 tokens, or 4096 where both maps read the same keys."""
    if kernels is None or impl != "auto" or not q.is_cuda or q.dtype not in HALF:
        return False
    longest = 4096 if k.size(2) == v.size(2) else 8192
    fits = q.size(1) <= longest and {q.size(-1), v.size(-1)} <= {16, 32, 64, 128}
    return fits and gpu_generation(q.device) == (9, 0)


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


class JointProjections(nn.Module):
    """A module that begins with several linear layers of the same x, `projections()`. One matrix product does the work
    of all, which is faster; it is filled up to a multiple of 8 columns, without which products slow down."""

    join_to_train = True

    def __init__(self):
        super().__init__()
        self.register_parameter("joint", None)  # once frozen, all weights of `projections()` in place of each

    def project(self, x):
        """x (..., in) -> what each layer makes of it. LoRA's layers, which have a `base`, add to what that makes."""
        layers = self.projections()
        bases = [getattr(layer, "base", layer) for layer in layers]
        outputs = self.base_outputs(x, bases)
        adapted = [layer for layer in layers if layer not in bases]  # LoRA's, whose adapt() does them all
        return adapted[0].adapt(outputs, layers, x) if adapted else outputs

    def base_outputs(self, x, layers):
        if self.joint is None and not self.join_to_train:
            return [layer(x) for layer in layers]
        weight = self.joint_weight(layers) if self.joint is None else self.joint
        sizes = [layer.out_features for layer in layers]
        if missing := len(weight) - sum(sizes):
            sizes.append(missing)
        return F.linear(x, weight).split(sizes, dim=-1)[: len(layers)]

    def joint_weight(self, layers):
        weight = torch.cat([layer.weight for layer in layers])
        return F.pad(weight, (0, 0, 0, -len(weight) % 8)) if len(weight) % 8 else weight

    def freeze(self):
        self.joint = nn.Parameter(self.joint_weight(self.projections()), requires_grad=False)
        for layer in self.projections():
            layer.weight = None


class Attention(JointProjections):
    """Causal softmax attention with grouped queries: the baseline, and what both DIFF variants build on."""

    q_per_head = 1  # query heads, in n_head
    value_width = 1  # width of a value head, in head_dim

    def __init__(self, config, layer):
        super().__init__()
        self.head_dim, self.impl = config.head_dim, config.attn_impl
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, self.q_per_head * config.n_head * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)

    def projections(self):
        """The layers that read x."""
        return self.q_proj, self.k_proj, self.v_proj

    def qkv(self, x, rope):
        """x (B, T, C) -> q (B, T, H, D), k (B, T, K, D), both rotated, v (B, T, G, Dv), and what else there is."""
        q, k, v, *more = self.project(x)
        q = apply_rope(q.unflatten(-1, (-1, self.head_dim)), rope)
        k = apply_rope(k.unflatten(-1, (-1, self.head_dim)), rope)
        v = v.contiguous()  # else the backward pass would keep all of the product for it
        return q, k, v.unflatten(-1, (-1, self.value_width * self.head_dim)), *more

    def attend(self, q, k, v, cache):
        """Causal attention among these tokens, or of one token to all in the cache."""
        if cache is not None:
            cache.k[:, cache.positions], cache.v[:, cache.positions] = k, v
            if q.size(1) == 1:
                return decode_attention(q, cache.k, cache.v, cache.positions, self.impl)
        return attention(q, k, v, causal=True, impl=self.impl)

    def forward(self, x, rope, cache=None):
        y = self.attend(*self.qkv(x, rope), cache)
        return self.o_proj(y.flatten(2))


class DiffAttention(Attention):
    """What V1 and V2 share: heads 2i and 2i + 1 of q make the two maps of pair i, which read the same value head.

    A subclass has q_per_head or value_width of 2, a method lam(x), the factor of the second map broadcast to
    (B, T, pair), and a forward() that calls subtract(). Layers that it adds to projections() come last, and qkv()
    returns what they make of x in the end.
    """

    def subtract(self, q, k, v, lam, cache):
        """A1 V - lam A2 V, with lam broadcast to (B, T, pair) -> (B, T, pair, Dv)."""
        if cache is None and has_difference_kernel(q, k, v, self.impl):
            return kernels.differential_attention(q, k, v, lam)
        if k.size(2) == v.size(2):  # both maps read the same key head
            y1, y2 = self.attend(q, k, v, cache).unflatten(2, (-1, 2)).unbind(3)  # of (B, T, pair, map, Dv)
        else:  # kernels give neighbouring query heads one key head, so those of map 1 of a group come first
            q = q.unflatten(2, (v.size(2), -1, 2)).transpose(3, 4).flatten(2, 4)  # (B, T, group * map * pair, D)
            y = self.attend(q, k, v, cache).unflatten(2, (v.size(2), 2, -1))  # (B, T, group, map, pair, Dv)
            # Not unbind(3): ptxas 12.8, in Triton 3.6 and 3.7, drops an offset in its compiled gradient.
            y1, y2 = y[:, :, :, 0].flatten(2, 3), y[:, :, :, 1].flatten(2, 3)
        return (y1 - lam.unsqueeze(-1) * y2).type_as(y1)


class DiffAttnV1(DiffAttention):
    """DIFF V1 (arXiv 2410.05258, equations 1 to 3): two maps per pair of heads, the second subtracted.

        out = (1 - lambda_init) * RMSNorm(A1 V - lambda * A2 V)
        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init

    v is 2D wide. With grouped queries, a group has two key heads and one value head, and map m of each of its pairs
    reads key head m.
    """

    value_width = 2

    def __init__(self, config, layer):
        super().__init__(config, layer)
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

    def forward(self, x, rope, cache=None):
        y = self.subtract(*self.qkv(x, rope), self.lam(x), cache)
        y = at_least_float32(self.subln(y)) * (1 - self.lambda_init)
        return self.o_proj(y.type_as(x).flatten(2))


class DiffAttnV2(DiffAttention):
    """DIFF V2 (Microsoft, January 2026): twice the query heads, subtracted in pairs with a lambda per token and head.

        out_i = A_2i V - sigmoid(lambda_i) * A_2i+1 V,    lambda = x W_lambda

    Both maps of a pair read the same key head, so keys, values and their cache stay those of the plain Transformer. No
    norm follows.
    """

    q_per_head = 2

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.lambda_proj = nn.Linear(config.n_embd, config.n_head, bias=False)

    def projections(self):
        return *super().projections(), self.lambda_proj

    def lam(self, x):
        """The factor of the second map, sigmoid(lambda): x (B, T, C) -> (B, T, n_head)."""
        return torch.sigmoid(self.project(x)[-1])

    def forward(self, x, rope, cache=None):
        q, k, v, lam = self.qkv(x, rope)
        y = self.subtract(q, k, v, torch.sigmoid(lam), cache)  # (B, T, n_head, D)
        return self.o_proj(y.flatten(2))


ATTENTION = {"vanilla": Attention, "v1": DiffAttnV1, "v2": DiffAttnV2}


class SwiGLU(JointProjections):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    join_to_train = False  # to write the gradients of both halves into one tensor costs more than it saves

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def projections(self):
        return self.gate_proj, self.up_proj

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    recompute = False  # whether to keep x alone for the backward pass, which computes the rest again

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = ATTENTION[config.attn](config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, cache=None):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, rope, use_reentrant=False)
        return self.compute(x, rope, cache)

    def compute(self, x, rope, cache=None):
        x = x + self.attn(self.attn_norm(x), rope, cache)
        return x + self.mlp(self.mlp_norm(x))

    def lam(self, x):
        """The factor of the second map, for attention that has one."""
        return self.attn.lam(self.attn_norm(x))


# ---------------------------------------------------------------------------------------------------
# The loss


def mean_cross_entropy(hidden, weight, targets):
    """The mean cross-entropy in nats of logits = hidden weight^T, of which only a part exists at a time: they would be
    the largest tensor of all. hidden (M, C), weight (V, C), targets (M,) int64, of which -100 are ignored -> a scalar,
    at least float32."""
    learning = torch.is_grad_enabled()
    losses, _, _ = _linear_cross_entropy(hidden, weight, targets, learning, learning and weight.requires_grad)
    return losses.sum() / (targets != -100).sum()


def token_cross_entropy(hidden, weight, targets):
    """The same for every token, 0 for -100: (M,) float32. Raises ValueError if `weight` is trained: its gradient is
    computed before it is known what becomes of each loss."""
    learning = torch.is_grad_enabled()
    if learning and weight.requires_grad:
        raise ValueError("losses of single tokens need a frozen weight")
    return _linear_cross_entropy(hidden, weight, targets, learning, False)[0]


CHUNK = 8192  # rows whose logits exist at the same time; products of fewer rows are slower


@torch.library.custom_op("ldiff::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, want_hidden: bool, want_weight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses and the gradients of their sum for `hidden` and `weight`; those not wanted are empty."""
    losses, grad_hidden, grad_weight = _empty_results(hidden, weight, targets, want_hidden, want_weight)
    grad_weight.zero_()
    weight_cast = weight.to(hidden.dtype)
    buffer = hidden.new_empty(min(CHUNK, len(hidden)), len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = torch.mm(hidden[rows], weight_cast.T, out=buffer[: len(hidden[rows])])
            losses[rows] = cross_entropy_(logits, targets[rows])
            if want_hidden:
                torch.mm(logits, weight_cast, out=grad_hidden[rows])
            if want_weight:
                _add_product(grad_weight, logits.T, hidden[rows])
    return losses, grad_hidden, grad_weight


@_linear_cross_entropy.register_fake
def _empty_results(hidden, weight, targets, want_hidden, want_weight):
    losses = hidden.new_empty(hidden.size(0), dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_hidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
    # Chunks are added up in it, so it is at least float32, even where FSDP gives a weight in bf16.
    wide = torch.promote_types(weight.dtype, torch.float32)
    grad_weight = torch.empty_like(weight, dtype=wide) if want_weight else weight.new_empty(0)
    return losses, grad_hidden, grad_weight


def _keep_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for the outputs that are not used
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx, factors, *unused):
    grad_hidden, grad_weight = ctx.saved_tensors
    scaled = (grad_hidden * factors.unsqueeze(-1)).type_as(grad_hidden)
    grad_weight = (grad_weight * factors[0]).to(ctx.weight_dtype) if len(grad_weight) else None  # all are the same
    return scaled, grad_weight, None, None, None


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _add_product(total, a, b):
    """total += a b, in the precision of total."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.type_as(total), b.type_as(total))


def cross_entropy_(logits, targets):
    """The cross-entropy of each row of logits (M, V), which is overwritten with its gradient."""
    if kernels is None or not logits.is_cuda or logits.dtype == torch.float64:
        return _cross_entropy_torch(logits, targets)
    return kernels.cross_entropy_(logits, targets)


def _cross_entropy_torch(logits, targets):
    x, learned = at_least_float32(logits), targets != -100
    losses, gradient = F.cross_entropy(x, targets, reduction="none"), x.softmax(dim=-1)
    gradient[learned, targets[learned]] -= 1
    logits.copy_(gradient * learned[:, None])
    return losses


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

    def hidden(self, idx, cache=None, positions=None):
        """What lm_head turns into logits: idx (B, T) int64 -> (B, T, C). Raises ValueError if T exceeds block_size.

        With a KVCache, for the tokens at `positions` (T,). A single token sees what is in the cache before it; several
        are the beginning of a text and see each other alone."""
        rope = self.rope(idx.size(1)) if cache is None else (self.rope_cos[positions], self.rope_sin[positions])
        caches = [None] * len(self.layers) if cache is None else cache.at(positions)
        x = self.embed(idx)
        for layer, layer_cache in zip(self.layers, caches):
            x = layer(x, rope, layer_cache)
        return self.norm(x)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and None; with targets (B, T), None, since logits are not kept,
        and the mean cross-entropy in nats, in which targets of -100 are ignored. Raises ValueError if T exceeds
        block_size."""
        hidden = self.hidden(idx)
        if targets is None:
            return self.lm_head(hidden), None
        return None, mean_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.no_grad()
    def lambdas(self, idx):
        """The factor of the second map in every layer, a list of floats: V1's lambda; V2's sigmoid(lambda), averaged
        over heads and the tokens of idx (B, T). Empty for attention without one."""
        if not issubclass(ATTENTION[self.config.attn], DiffAttention):
            return []
        means = []
        rope, x = self.rope(idx.size(1)), self.embed(idx)
        for layer in self.layers:
            means.append(layer.lam(x).float().mean().item())
            x = layer(x, rope)
        return means

    def checkpoint_activations(self):
        """Train in less memory: of a layer, only its input is kept. Returns the model."""
        for layer in self.layers:
            layer.recompute = True
        return self

    def freeze(self):
        """Prepare for generation only: bf16 on a GPU, and weights that are used together side by side, no longer under
        their names. Merge adapters first. Returns the model."""
        self.requires_grad_(False).eval()
        if self.rope_cos.is_cuda:
            self.cast_frozen()
        for module in self.modules():
            if isinstance(module, JointProjections):
                module.freeze()
        return self

    def cast_frozen(self):
        """Cast matrices that are not trained to bf16, once, as autocast does at every product; returns the model."""
        for parameter in self.parameters():
            if parameter.ndim == 2 and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return self

    def generate(self, idx, max_new_tokens, **options):
        """Continue idx (B, T) by sampling -> (B, T + max_new_tokens). Decoder explains the options; one that is kept
        saves recording its graph for every text."""
        decoder = Decoder(self, len(idx), min(idx.size(1) + max_new_tokens, self.config.block_size), **options)
        return torch.cat((idx, *decoder.stream(idx, max_new_tokens)), dim=1)

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
        kind = ATTENTION[config.attn]
        products = kind.q_per_head * (1 + kind.value_width) * config.n_head * config.head_dim * visible
        return 6 * (weights + config.n_layer * products)


# ---------------------------------------------------------------------------------------------------
# Generating: the attention of one new token to all before it, whose keys and values are kept


class LayerCache(NamedTuple):
    """Keys (B, S, K, D) and values (B, S, G, Dv) of one layer, with room for S tokens, and the positions (T,) where
    those of the tokens being read go."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor


class KVCache:
    """Keys and values of `batch_size` sequences of up to `length` tokens: 2 * n_kv_head * head_dim numbers a token and
    layer for every kind of attention."""

    def __init__(self, config, batch_size, length, dtype, device):
        width = ATTENTION[config.attn].value_width
        k_shape = (batch_size, length, config.n_kv_head, config.head_dim)
        v_shape = (batch_size, length, config.n_kv_head // width, width * config.head_dim)
        shapes = [(k_shape, v_shape)] * config.n_layer
        self.layers = [[torch.zeros(shape, dtype=dtype, device=device) for shape in pair] for pair in shapes]

    def at(self, positions):
        return [LayerCache(k, v, positions) for k, v in self.layers]


def has_decode_kernel(k, impl):
    return kernels is not None and k.is_cuda and k.dtype in HALF and impl != "naive"


def decode_attention(q, k, v, position, impl="auto"):
    """attention() of one query a head, q (B, 1, H, D), to the keys k (B, S, K, D) and values v (B, S, G, Dv) up to and
    with `position`, a tensor (1,): a CUDA graph goes on with another position. -> (B, 1, H, Dv)
    """
    if not has_decode_kernel(k, impl):
        end = int(position) + 1
        return attention(q, k[:, :end], v[:, :end], impl=impl)
    return kernels.decode_attention(q, k, v, position)


class Decoder:
    """Continues texts: reads what there is, then produces token by token, as a CUDA graph on a GPU with Triton.

    It has room for `batch_size` texts of `length` tokens. n_vocab keeps the ids below it, since the rest are padding;
    sample_token explains temperature, top_k and top_p. compile=True takes a while at first, then runs faster; the
    model's layers stay compiled.
    """

    def __init__(self, model, batch_size, length, compile=False, n_vocab=None, **options):
        if length > model.config.block_size:
            raise ValueError(f"{length} tokens do not fit the context of {model.config.block_size}")
        self.model, self.length, self.n_vocab, self.options = model, length, n_vocab, options
        device = model.rope_cos.device
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # the latest, not in the cache yet
        self.used = 0  # tokens in the cache
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # the same, where a CUDA graph can read it
        self.cache = KVCache(model.config, batch_size, length, model.embed(self.token).dtype, device)
        self.hidden = model.hidden
        if compile:
            for layer in model.layers:  # to read prompts of any length; they share a program
                layer.compile(dynamic=True)
            # The first option is for products of a single row, which become kernels that take in what comes before and
            # after; the second makes one kernel of several that do not depend on each other.
            inductor = {"coordinate_descent_tuning": True, "combo_kernels": True}
            self.hidden = torch.compile(model.hidden, dynamic=False, options=inductor)
        self.replay = None

    @torch.no_grad()
    def prefill(self, idx):
        """Begin with idx (B, T) -> the token after it, (B, 1)."""
        if idx.size(1) > self.length or len(idx) != len(self.token):
            raise ValueError(f"there is no room for {tuple(idx.shape)} tokens, but for {len(self.token), self.length}")
        self._choose(self.model.hidden(idx, self.cache, torch.arange(idx.size(1), device=idx.device)))
        self.used = idx.size(1)
        self.position.fill_(self.used)
        return self.token.clone()

    @torch.no_grad()
    def step(self):
        """The token after that, (B, 1)."""
        if self.used == self.length:
            raise ValueError(f"the room for {self.length} tokens is full")
        if not has_decode_kernel(self.cache.layers[0][0], self.model.config.attn_impl):
            self._step()
        else:
            self._replay()
        self.used += 1
        self.position += 1
        return self.token.clone()

    def _replay(self):
        if self.replay is None:
            latest = self.token.clone()
            self.replay = cuda_graph(self._step)
            self.token.copy_(latest)  # recording has put others there
        self.replay()

    def _step(self):
        self._choose(self.hidden(self.token, self.cache, self.position))

    def _choose(self, hidden):
        logits = self.model.lm_head(hidden[:, -1])
        self.token.copy_(sample_token(logits[:, : self.n_vocab], **self.options))

    def stream(self, idx, max_new_tokens):
        """Continue idx (B, T): yield one column of new ids (B, 1) after another. A text longer than `length` is cut to
        its last tokens. When the room is full, the older half is dropped, and the rest read again."""
        text = [idx[:, -self.length :]]
        for count in range(max_new_tokens):
            if count and self.used < self.length:
                text.append(self.step())
            else:
                if count:
                    text = [torch.cat(text, dim=1)[:, -(self.length // 2 or 1) :]]
                text.append(self.prefill(text[0]))
            yield text[-1]


def cuda_graph(work, pool=None):
    """Record what work() does on the GPU, and return a function that does it again with a single launch. work() is
    called three times; it has to find its inputs and leave its results at the same places each time."""
    stream, graph, random = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.get_rng_state()
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a graph may not use weights that autocast has cast before
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and plans what must not happen while recording
                work()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may use the GPU
            work()
    finally:
        torch.set_autocast_cache_enabled(caching)
    torch.cuda.set_rng_state(random)  # as if nothing had been drawn yet
    return graph.replay


def sample_token(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw one id from each row of logits (B, vocab) -> (B, 1). Temperature 0 takes the likeliest. top_k keeps the k
    likeliest; top_p, of those, the fewest likeliest whose probabilities sum to p (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    if top_k is None and top_p is None:
        return draw(((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1))
    logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # of all that come before
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    return ids.gather(-1, draw(probabilities))


def draw(probabilities):
    """One index from each row of probabilities (B, V), which need not sum to 1 -> (B, 1). The first of V exponential
    clocks to ring; torch.multinomial would make the CPU wait for the GPU, which no CUDA graph can."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1, keepdim=True)
