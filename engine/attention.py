"""Softmax attention and the kernels that compute it: which one runs where, and how a KV cache enters.

Letters as in model.py: B batch, T queries, S keys, D head_dim, Dv width of a value head, H query heads, K key heads,
G value heads.
"""

import torch
import torch.nn.functional as F

from engine.settings import UserError

try:
    from flash_attn import flash_attn_func
except ImportError:  # optional; `auto` never needs it
    flash_attn_func = None
try:
    from engine import kernels
except ImportError:  # they need Triton, which comes with PyTorch for CUDA
    kernels = None

HALF = (torch.bfloat16, torch.float16)  # dtypes of the fused kernels on CUDA
ATTENTION_IMPLS = ("auto", "flash_attn", "sdpa", "naive")


def attention(q, k, v, softmax_scale=None, causal=False, impl="auto"):
    """Compute softmax(q k^T * softmax_scale) v, with the signature of flash_attn_func.

    q (B, T, H, D), k (B, S, K, D), v (B, S, G, Dv) -> (B, T, H, Dv). H is a multiple of K and K of G: query head h
    reads key head h // (H / K) and value head h // (H / G). softmax_scale defaults to D ** -0.5. A causal mask is
    aligned to the bottom right (the last query sees every key), so T <= S.

    V1 needs values that are wider than q and shared by two key heads: both maps of a pair read one 2D-wide value head.
    """
    softmax_scale = q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
    return _IMPLS[resolve_impl(impl, q)](q, k, v, softmax_scale, causal)


def causal_attention(q, k, v, cache=None, impl="auto"):
    """Attend causally among these tokens or, with a LayerCache (engine/generate.py), from one token to all before it.

    q (B, T, H, D), k (B, T, K, D), v (B, T, G, Dv) -> (B, T, H, Dv). k and v are written to the cache, if they are not
    there yet.
    """
    if cache is not None:
        if not cache.is_written:
            cache.k[:, cache.positions], cache.v[:, cache.positions] = k, v
        if q.size(1) == 1:
            return decode_attention(q, cache.k, cache.v, cache.positions, impl)
    return attention(q, k, v, causal=True, impl=impl)


def paired_attention(q, k, v, cache=None, impl="auto"):
    """Apply causal_attention() to both maps of every pair, in one call -> A1 V and A2 V, (B, T, pairs, Dv) each.

    Query heads 2i and 2i + 1 are the two maps of pair i. With as many key heads as value heads (V2), both maps of a
    pair read the same key head; with twice as many (V1), map m of the pairs in group g reads key head 2g + m.
    """
    if k.size(2) == v.size(2):
        y = causal_attention(q, k, v, cache, impl).unflatten(2, (-1, 2))  # (B, T, pair, map, Dv)
        return y.unbind(3)
    # Kernels give one key head to neighbouring query heads, so map 1 of all pairs in a group comes first.
    q = q.unflatten(2, (v.size(2), -1, 2)).transpose(3, 4).flatten(2, 4)  # (B, T, group * map * pair, D)
    y = causal_attention(q, k, v, cache, impl).unflatten(2, (v.size(2), 2, -1))  # (B, T, group, map, pair, Dv)
    # Not unbind(3): ptxas 12.8, in Triton 3.6 and 3.7, drops an offset in its compiled gradient.
    return y[:, :, :, 0].flatten(2, 3), y[:, :, :, 1].flatten(2, 3)


# ---------------------------------------------------------------------------------------------------
# Which kernel where


def check_impl(impl, device):
    """Raise UserError if the attention kernel is for another device."""
    if impl == "flash_attn" and device.type != "cuda":
        raise UserError(f"--attn_impl flash_attn needs a CUDA GPU, and the device is {device}")


def resolve_impl(impl, q):
    """Replace `auto` by sdpa, or by flash_attn where that package is installed and cuDNN cannot be used."""
    if impl != "auto":
        return impl
    can_use_package = flash_attn_func is not None and q.is_cuda and q.dtype in HALF
    return "flash_attn" if can_use_package and not has_cudnn_attention(q) else "sdpa"


def has_cudnn_attention(q):
    """Return True where PyTorch prefers cuDNN's attention: half precision on Hopper and data-centre Blackwell."""
    return q.is_cuda and q.dtype in HALF and q.size(-1) % 8 == 0 and gpu_generation(q.device) in ((9, 0), (10, 0))


def gpu_generation(device):
    """Return NVIDIA's compute capability: (9, 0) is Hopper."""
    gpu = torch.cuda.get_device_properties(device)
    return gpu.major, gpu.minor


def has_differential_kernel(q, k, v, cache=None, impl="auto"):
    """Return True where the fused kernel takes less memory than paired_attention() and a subtraction, and no more time.

    Measured so on Hopper up to 8192 tokens, or 4096 where both maps read the same keys. Not measured on other GPUs.
    """
    if kernels is None or cache is not None or impl != "auto" or not q.is_cuda or q.dtype not in HALF:
        return False
    longest = 4096 if k.size(2) == v.size(2) else 8192
    fits = q.size(1) <= longest and {q.size(-1), v.size(-1)} <= {16, 32, 64, 128}
    return fits and gpu_generation(q.device) == (9, 0)


def differential_attention(q, k, v, lam):
    """Compute A1 V - lam A2 V for every pair in one Triton kernel -> (B, T, pairs, Dv); see engine/kernels.py."""
    return kernels.differential_attention(q, k, v, lam)


def has_decode_kernel(k, impl):
    """Return True where one new token's attention runs in Triton, so that a CUDA graph can record it."""
    return kernels is not None and k.is_cuda and k.dtype in HALF and impl != "naive"


def decode_attention(q, k, v, position, impl="auto"):
    """Attend from one query a head, q (B, 1, H, D), to keys k (B, S, K, D) and values v (B, S, G, Dv) -> (B, 1, H, Dv).

    Only keys up to `position` count, inclusive. It is a tensor (1,), which a CUDA graph reads at every replay.
    """
    if not has_decode_kernel(k, impl):
        end = int(position) + 1
        return attention(q, k[:, :end], v[:, :end], impl=impl)
    return kernels.decode_attention(q, k, v, position)


# ---------------------------------------------------------------------------------------------------
# Implementations


def _flash_attn(q, k, v, softmax_scale, causal):
    return flash_attn_func(*_pad_to_values(q, k, v), softmax_scale=softmax_scale, causal=causal)


def _sdpa(q, k, v, softmax_scale, causal):
    if not has_cudnn_attention(q):  # only cuDNN has a fused kernel for values that differ from the keys
        q, k, v = _pad_to_values(q, k, v)
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
    """Return the attention probabilities (B, H, T, S). Memory is quadratic: for reading and pictures."""
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
    if causal:
        scores = scores.masked_fill(~_causal_mask(q.size(1), k.size(1), q.device), float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


_IMPLS = {"flash_attn": _flash_attn, "sdpa": _sdpa, "naive": _naive}


def _pad_to_values(q, k, v):
    """Give v the heads of k, and q and k the width of v, for kernels that want all alike.

    The zeros add nothing to q . k, and the softmax scale is passed explicitly.
    """
    if v.size(2) != k.size(2):
        v = v.repeat_interleave(k.size(2) // v.size(2), dim=2)
    if padding := v.size(-1) - q.size(-1):
        q, k = F.pad(q, (0, padding)), F.pad(k, (0, padding))
    return q, k, v


def _causal_mask(T, S, device):
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
