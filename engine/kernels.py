"""GPU kernels in Triton, which comes with PyTorch for CUDA. Elsewhere, plain PyTorch computes the same.

    differential_attention    A1 V - lambda A2 V with its gradients: training
    decode_attention          attention from one new token to all in the KV cache: generating
    cross_entropy_            the loss; the logits are overwritten with their gradient

Letters as in model.py, and

    N        pairs of maps                    pairs             B * N
    GROUP    pairs that read one value head   KEYS              key heads a group: 2 in V1, 1 in V2
    BM, BN   queries and keys of a block      index1, index2    where a query's values for map 1 and map 2 lie in memory

A block may reach beyond the end of a text: the descriptors read zeros there and write nothing.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)

# Block sizes, warps and pipeline stages: the fastest of about thirty choices for V2 on an H100.
FORWARD = dict(BM=64, BN=64, num_warps=4, num_stages=2)
KEY_GRADIENT = dict(BM=32, BN=64, num_warps=4, num_stages=2)
QUERY_GRADIENT = dict(BM=64, BN=32, num_warps=4, num_stages=3)

# ---------------------------------------------------------------------------------------------------
# Differential attention, in the blocks of FlashAttention (arXiv 2205.14135, 2307.08691)
#
# Both maps of a pair read the same values. A kernel for softmax attention, called for one map after the other, cannot
# use that. With P1 and P2 the attention probabilities, O1 = P1 V and O2 = P2 V, dO the gradient of the output, and
# d1 = dO . O1 and d2 = dO . O2 for every query, the gradients are
#
#     dP = dO V^T    dV = (P1 - lambda P2)^T dO    dS1 = P1 (dP - d1)    dS2 = lambda P2 (d2 - dP)    dlambda = -d2
#
# so one product for dP and one for dV serve both maps. One kernel computes dK and dV, another dQ, so that each sum has
# a fixed order. The forward pass keeps the logarithm of each softmax's total, from which the backward pass recomputes
# the probabilities. Logarithms and powers have base 2, for which a GPU has an instruction. Blocks with the most work
# start first, so that none of them is left running alone at the end.


@triton.jit
def _softmax_step(scores, v, top, total, values, row, column, scale: tl.constexpr, MASK: tl.constexpr):
    """Add a block of keys to a map's running softmax: its highest score, its total, and its weighted sum of values."""
    if MASK:
        scores = tl.where(row[:, None] >= column[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(weights, 1)
    return new_top, total, tl.dot(weights.to(v.dtype), v, values * rescale[:, None])


@triton.jit
def _key_pair(k_desc, b, start, g, KEYS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr):
    """Load the keys of both maps of group g: V1 has two key heads, V2 one."""
    k1 = k_desc.load([b, start, KEYS * g * D]).reshape(BN, D)
    if KEYS == 1:
        return k1, k1
    return k1, k_desc.load([b, start, (KEYS * g + 1) * D]).reshape(BN, D)


@triton.jit
def _forward_blocks(
    state, q1, q2, k_desc, v_desc, b, g, first, stop, row,
    scale: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add the keys from `first` to `stop` to the running softmax of both maps."""
    top1, total1, values1, top2, total2, values2 = state
    for start in tl.range(first, stop, BN):
        column = start + tl.arange(0, BN)
        k1, k2 = _key_pair(k_desc, b, start, g, KEYS, D, BN)
        scores1, scores2 = tl.dot(q1, k1.T), tl.dot(q2, k2.T)
        v = v_desc.load([b, start, g * DV]).reshape(BN, DV)
        top1, total1, values1 = _softmax_step(scores1, v, top1, total1, values1, row, column, scale, MASK)
        top2, total2, values2 = _softmax_step(scores2, v, top2, total2, values2, row, column, scale, MASK)
    return top1, total1, values1, top2, total2, values2


@triton.jit(do_not_specialize=["T", "pairs"])
def _forward_kernel(
    q_desc, k_desc, v_desc, out_desc, out2_desc, lam, log_totals, T, pairs,
    SCALE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute the output, O2 and both maps' log2 totals. A program has BM queries of a pair, the last ones first."""
    blocks = tl.cdiv(T, BM)
    pair, start = tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BM
    b, h = pair // N, pair % N
    row = start + tl.arange(0, BM)
    scale: tl.constexpr = SCALE * LOG2E  # of scores in powers of 2
    q1 = q_desc.load([b, start, 2 * h * D]).reshape(BM, D)
    q2 = q_desc.load([b, start, (2 * h + 1) * D]).reshape(BM, D)
    low, zero = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    state = (low, zero, tl.zeros([BM, DV], tl.float32), low, zero, tl.zeros([BM, DV], tl.float32))
    boundary = start // BN * BN  # all of these queries see the keys before it, so no mask is needed
    g = h // GROUP
    state = _forward_blocks(state, q1, q2, k_desc, v_desc, b, g, 0, boundary, row, scale, KEYS, D, DV, BN, False)
    state = _forward_blocks(
        state, q1, q2, k_desc, v_desc, b, g, boundary, start + BM, row, scale, KEYS, D, DV, BN, True
    )
    top1, total1, values1, top2, total2, values2 = state
    inside, index1 = row < T, pair.to(tl.int64) * T + row
    out2 = values2 / total2[:, None]
    out = values1 / total1[:, None] - tl.load(lam + index1, mask=inside, other=0.0)[:, None] * out2
    out_desc.store([b, start, h * DV], out.to(out_desc.dtype).reshape(1, BM, DV))
    out2_desc.store([b, start, h * DV], out2.to(out2_desc.dtype).reshape(1, BM, DV))
    tl.store(log_totals + index1, top1 + tl.log2(total1), mask=inside)
    tl.store(log_totals + pairs * T + index1, top2 + tl.log2(total2), mask=inside)


@triton.jit
def _weights(scores, log_total, row, column, scale: tl.constexpr, MASK: tl.constexpr):
    """Recompute attention probabilities from scores and the log2 of their softmax's total."""
    weights = tl.exp2(scores * scale - log_total)
    return tl.where(row >= column, weights, 0.0) if MASK else weights


@triton.jit
def _key_blocks(
    dk1, dk2, dv, k1, k2, v, q_desc, grad_desc, lam, log_totals, dots, b, h, T, pairs, first, stop, column,
    scale: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Add the contributions of a pair's queries from `first` to `stop` to dK and dV.

    Everything is transposed, keys x queries. Probabilities are cast to 16 bits early, because registers are scarce.
    """
    base = (b * N + h).to(tl.int64) * T
    for start in tl.range(first, stop, BM):
        row = start + tl.arange(0, BM)
        inside, index1, index2 = row < T, base + row, pairs * T + base + row
        q1 = q_desc.load([b, start, 2 * h * D]).reshape(BM, D)
        q2 = q_desc.load([b, start, (2 * h + 1) * D]).reshape(BM, D)
        grad = grad_desc.load([b, start, h * DV]).reshape(BM, DV)
        log1 = tl.load(log_totals + index1, mask=inside, other=float("inf"))  # no weights beyond the last query
        log2 = tl.load(log_totals + index2, mask=inside, other=float("inf"))
        w1 = _weights(tl.dot(k1, q1.T), log1[None, :], row[None, :], column[:, None], scale, MASK).to(k1.dtype)
        w2 = _weights(tl.dot(k2, q2.T), log2[None, :], row[None, :], column[:, None], scale, MASK)
        w2 = (w2 * tl.load(lam + index1, mask=inside, other=0.0)[None, :]).to(k1.dtype)
        dp = tl.dot(v, grad.T)
        dv = tl.dot((w1 - w2).to(grad.dtype), grad, dv)
        d1 = tl.load(dots + index1, mask=inside, other=0.0)
        d2 = tl.load(dots + index2, mask=inside, other=0.0)
        dk1 = tl.dot((w1.to(tl.float32) * (dp - d1[None, :])).to(k1.dtype), q1, dk1)
        ds2 = (w2.to(tl.float32) * (d2[None, :] - dp)).to(k1.dtype)
        if KEYS == 1:
            dk1 = tl.dot(ds2, q2, dk1)
        else:
            dk2 = tl.dot(ds2, q2, dk2)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["T", "pairs"])
def _key_gradient_kernel(
    q_desc, k_desc, v_desc, grad_desc, dk_desc, dv_desc, lam, log_totals, dots, T, pairs,
    SCALE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV. A program has BN keys and values of a group, those that most queries see first."""
    blocks, G = tl.cdiv(T, BN), N // GROUP
    group, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BN
    b, g = group // G, group % G
    column = start + tl.arange(0, BN)
    scale: tl.constexpr = SCALE * LOG2E  # of scores in powers of 2
    k1, k2 = _key_pair(k_desc, b, start, g, KEYS, D, BN)
    v = v_desc.load([b, start, g * DV]).reshape(BN, DV)
    dk1, dv = tl.zeros([BN, D], tl.float32), tl.zeros([BN, DV], tl.float32)
    dk2 = tl.zeros([BN, D], tl.float32)
    first, boundary = start // BM * BM, tl.cdiv(start + BN, BM) * BM  # queries from `boundary` on see all of these keys
    for h in range(g * GROUP, (g + 1) * GROUP):
        dk1, dk2, dv = _key_blocks(
            dk1, dk2, dv, k1, k2, v, q_desc, grad_desc, lam, log_totals, dots, b, h, T, pairs,
            first, tl.minimum(boundary, T), column, scale, N, KEYS, D, DV, BM, True,
        )  # fmt: skip
        dk1, dk2, dv = _key_blocks(
            dk1, dk2, dv, k1, k2, v, q_desc, grad_desc, lam, log_totals, dots, b, h, T, pairs,
            boundary, T, column, scale, N, KEYS, D, DV, BM, False,
        )  # fmt: skip
    dk_desc.store([b, start, KEYS * g * D], (dk1 * SCALE).to(dk_desc.dtype).reshape(1, BN, D))
    if KEYS == 2:
        dk_desc.store([b, start, (KEYS * g + 1) * D], (dk2 * SCALE).to(dk_desc.dtype).reshape(1, BN, D))
    dv_desc.store([b, start, g * DV], dv.to(dv_desc.dtype).reshape(1, BN, DV))


@triton.jit
def _query_blocks(
    dq1, dq2, q1, q2, grad, log1, log2, d1, d2, k_desc, v_desc, b, g, first, stop, row,
    scale: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add the contributions of the keys from `first` to `stop` to dQ of both maps."""
    for start in tl.range(first, stop, BN):
        column = start + tl.arange(0, BN)
        k1, k2 = _key_pair(k_desc, b, start, g, KEYS, D, BN)
        v = v_desc.load([b, start, g * DV]).reshape(BN, DV)
        scores1, scores2 = tl.dot(q1, k1.T), tl.dot(q2, k2.T)
        dp = tl.dot(grad, v.T)
        w1 = _weights(scores1, log1[:, None], row[:, None], column[None, :], scale, MASK)
        dq1 = tl.dot((w1 * (dp - d1[:, None])).to(k1.dtype), k1, dq1)
        w2 = _weights(scores2, log2[:, None], row[:, None], column[None, :], scale, MASK)
        dq2 = tl.dot((w2 * (d2[:, None] - dp)).to(k1.dtype), k2, dq2)
    return dq1, dq2


@triton.jit(do_not_specialize=["T", "pairs"])
def _query_gradient_kernel(
    q_desc, k_desc, v_desc, grad_desc, dq_desc, lam, log_totals, dots, T, pairs,
    SCALE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute dQ. A program has BM queries of a pair, those that see most keys first."""
    blocks = tl.cdiv(T, BM)
    pair, start = tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BM
    b, h = pair // N, pair % N
    row = start + tl.arange(0, BM)
    scale: tl.constexpr = SCALE * LOG2E  # of scores in powers of 2
    q1 = q_desc.load([b, start, 2 * h * D]).reshape(BM, D)
    q2 = q_desc.load([b, start, (2 * h + 1) * D]).reshape(BM, D)
    grad = grad_desc.load([b, start, h * DV]).reshape(BM, DV)
    inside, index1 = row < T, pair.to(tl.int64) * T + row
    index2 = pairs * T + index1
    log1 = tl.load(log_totals + index1, mask=inside, other=float("inf"))
    log2 = tl.load(log_totals + index2, mask=inside, other=float("inf"))
    d1 = tl.load(dots + index1, mask=inside, other=0.0)
    d2 = tl.load(dots + index2, mask=inside, other=0.0)
    dq1, dq2 = tl.zeros([BM, D], tl.float32), tl.zeros([BM, D], tl.float32)
    boundary, g = start // BN * BN, h // GROUP
    dq1, dq2 = _query_blocks(
        dq1, dq2, q1, q2, grad, log1, log2, d1, d2, k_desc, v_desc, b, g, 0, boundary, row,
        scale, KEYS, D, DV, BN, False,
    )  # fmt: skip
    dq1, dq2 = _query_blocks(
        dq1, dq2, q1, q2, grad, log1, log2, d1, d2, k_desc, v_desc, b, g, boundary, start + BM, row,
        scale, KEYS, D, DV, BN, True,
    )  # fmt: skip
    # lambda is one number a query, so it is applied once, after the sum over keys.
    dq2 *= tl.load(lam + index1, mask=inside, other=0.0)[:, None]
    dq_desc.store([b, start, 2 * h * D], (dq1 * SCALE).to(dq_desc.dtype).reshape(1, BM, D))
    dq_desc.store([b, start, (2 * h + 1) * D], (dq2 * SCALE).to(dq_desc.dtype).reshape(1, BM, D))


def _descriptor(x, tokens):
    """Describe x (B, T, heads, width) to the GPU's copy engine, which loads and stores `tokens` of a head at a time."""
    B, T, heads, width = x.shape
    return TensorDescriptor(x, [B, T, heads * width], [T * heads * width, heads * width, 1], [1, tokens, width])


def _shared_arguments(q, k, v):
    """Return the arguments that all three kernels share. Raises ValueError if the heads do not go together."""
    (B, T, H, D), K, (G, Dv) = q.shape, k.size(2), v.shape[2:]
    if H % (2 * G) or K not in (G, 2 * G):
        raise ValueError(f"{H} query, {K} key and {G} value heads do not make pairs of maps")
    N = H // 2
    return dict(T=T, pairs=B * N, SCALE=D**-0.5, N=N, GROUP=N // G, KEYS=K // G, D=D, DV=Dv)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the output and O2, (B, T, N, Dv) each, and both maps' log2 totals (2, B, N, T).

    lam is (B, N, T) float32.
    """
    BM, BN, shape = FORWARD["BM"], FORWARD["BN"], _shared_arguments(q, k, v)
    out, out2, log_totals = _empty_outputs(q, k, v, lam)
    _forward_kernel[(triton.cdiv(q.size(1), BM) * shape["pairs"],)](
        _descriptor(q, BM), _descriptor(k, BN), _descriptor(v, BN), _descriptor(out, BM), _descriptor(out2, BM), lam,
        log_totals, **shape, **FORWARD,
    )  # fmt: skip
    return out, out2, log_totals


# By a call, here and below, so that the function can run without the operator, too.
_differential_attention = torch.library.custom_op("ldiff::differential_attention", _forward, mutates_args=())


@_differential_attention.register_fake
def _empty_outputs(q, k, v, lam):
    B, T, H, _ = q.shape
    out, out2 = (v.new_empty(B, T, H // 2, v.size(3)) for _ in range(2))
    return out, out2, lam.new_empty(2, *lam.shape)


def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor,
    log_totals: torch.Tensor, dots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dq, dk, dv = _empty_gradients(grad, q, k, v, lam, log_totals, dots)
    T, shape, rows = q.size(1), _shared_arguments(q, k, v), (lam, log_totals, dots)
    BM, BN = KEY_GRADIENT["BM"], KEY_GRADIENT["BN"]
    _key_gradient_kernel[(triton.cdiv(T, BN) * v.size(0) * v.size(2),)](
        _descriptor(q, BM), _descriptor(k, BN), _descriptor(v, BN), _descriptor(grad, BM), _descriptor(dk, BN),
        _descriptor(dv, BN), *rows, **shape, **KEY_GRADIENT,
    )  # fmt: skip
    BM, BN = QUERY_GRADIENT["BM"], QUERY_GRADIENT["BN"]
    _query_gradient_kernel[(triton.cdiv(T, BM) * shape["pairs"],)](
        _descriptor(q, BM), _descriptor(k, BN), _descriptor(v, BN), _descriptor(grad, BM), _descriptor(dq, BM),
        *rows, **shape, **QUERY_GRADIENT,
    )  # fmt: skip
    return dq, dk, dv


_differential_attention_backward = torch.library.custom_op(
    "ldiff::differential_attention_backward", _backward, mutates_args=()
)


@_differential_attention_backward.register_fake
def _empty_gradients(grad, q, k, v, lam, log_totals, dots):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, grad, *unused):
    q, k, v, lam, out, out2, log_totals = ctx.saved_tensors
    d2 = (grad.float() * out2).sum(-1).transpose(1, 2)  # (B, N, T)
    d1 = (grad.float() * out).sum(-1).transpose(1, 2) + lam * d2  # for O1 = out + lambda O2
    dots = torch.stack((d1, d2))
    return *_differential_attention_backward(grad.contiguous(), q, k, v, lam, log_totals, dots), -d2


_differential_attention.register_autograd(_gradients, setup_context=_setup_context)


def differential_attention(q, k, v, lam):
    """Compute causal A1 V - lam A2 V, where heads 2i and 2i + 1 of q make the maps of pair i.

    q (B, T, 2N, D), k (B, T, G or 2G, D), v (B, T, G, Dv), lam broadcast to (B, T, N) -> (B, T, N, Dv). With 2G key
    heads, map m of the pairs in group g reads key head 2g + m; with G, both read key head g. D and Dv are powers of 2
    from 16 to 128. Raises ValueError if the heads do not go together.
    """
    B, T, H, _ = q.shape
    lam = lam.float().expand(B, T, H // 2).transpose(1, 2).contiguous()
    return _differential_attention(q.contiguous(), k.contiguous(), v.contiguous(), lam)[0]


def compile_differential_attention(q, k, v):
    """Compile the kernels for tensors like these, of any number of texts and tokens, by running them once.

    Unlike a custom operator, this does not wait for the import of PyTorch's compiler.
    """
    B, T, H, _ = q.shape
    lam = torch.zeros(B, H // 2, T, device=q.device)
    out, _, log_totals = _forward(q, k, v, lam)
    _backward(out, q, k, v, lam, log_totals, torch.zeros_like(log_totals))


# ---------------------------------------------------------------------------------------------------
# Attention of one new token


def decode_attention(q, k, v, position):
    """Compute decode_attention() of engine/attention.py.

    Every program reads one part of the context. With one program a sequence, a few long ones would leave most of a GPU
    idle.
    """
    B, _, H, D = q.shape
    S, K, G, Dv = k.size(1), k.size(2), v.size(2), v.size(3)
    # Two programs for each multiprocessor, so that one loads while another waits. Up to a third of them is given up to
    # make the number of parts a power of two, which fills the block of _combine_kernel.
    max_splits = min(max(1, 2 * torch.cuda.get_device_properties(q.device).multi_processor_count // (B * G)), 128)
    power = 1 << (max_splits.bit_length() - 1)
    splits = min(power if 3 * power >= 2 * max_splits else max_splits, triton.cdiv(S, 64))
    parts = torch.empty(B, H, splits, Dv, device=q.device, dtype=q.dtype if splits == 1 else torch.float32)
    log_totals = torch.empty(B, H, splits, device=q.device)
    _decode_kernel[(B * G, splits)](
        q.contiguous(), k, v, parts, log_totals, position, D**-0.5, S, G,
        QUERIES=H // G, KEYS=K // G, D=D, KEY_WIDTH=max(16, triton.next_power_of_2(K // G * D)),
        DV=Dv, VALUE_WIDTH=max(16, triton.next_power_of_2(Dv)), ROWS=max(16, triton.next_power_of_2(H // G)),
        BLOCK=64 if Dv <= 128 else 32,
    )  # fmt: skip
    if splits == 1:
        return parts.transpose(1, 2)
    out = torch.empty(B, 1, H, Dv, device=q.device, dtype=q.dtype)
    _combine_kernel[(B * H,)](
        parts, log_totals, out, splits, PARTS=triton.next_power_of_2(splits),
        DV=Dv, WIDTH=triton.next_power_of_2(Dv), num_warps=4 if splits <= 32 else 8,
    )  # fmt: skip
    return out


@triton.jit
def _decode_kernel(
    q, k, v, parts, log_totals, position, scale, S, G,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, KEY_WIDTH: tl.constexpr,
    DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend to one part of the context: the weighted mean of its values, and the log of its softmax's total.

    A program has one value head of a sequence, with the QUERIES query heads that read it.

    V1's value head has two key heads. They are read as one key head of twice the width, and a query has zeros in the
    half of the other map, so that values are read once. Queries of map 1 come first, as paired_attention() orders them.
    """
    sequence, group, part = tl.program_id(0).to(tl.int64) // G, tl.program_id(0) % G, tl.program_id(1)
    length, splits = tl.load(position) + 1, tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    start = part * share
    stop = tl.minimum(start + share, length)
    row, key_column, column = tl.arange(0, ROWS), tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    head = (sequence * G + group) * QUERIES + row
    own_half = (key_column // D)[None, :] == (row // (QUERIES // KEYS))[:, None]
    q_mask = own_half & (row < QUERIES)[:, None]
    query = tl.load(q + head[:, None] * D + (key_column % D)[None, :], mask=q_mask, other=0.0)  # (ROWS, KEY_WIDTH)
    k += (sequence * S * G + group) * KEYS * D
    v += (sequence * S * G + group) * DV
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    for first in range(start, stop, BLOCK):
        token = first + tl.arange(0, BLOCK)
        k_mask = (token < stop)[None, :] & (key_column < KEYS * D)[:, None]
        keys = tl.load(k + token[None, :] * (G * KEYS * D) + key_column[:, None], mask=k_mask, other=0.0)
        scores = (tl.dot(query, keys) * scale).to(tl.float32)  # (ROWS, BLOCK)
        scores = tl.where((token < stop)[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        probabilities = tl.exp(scores - new_top[:, None])
        v_mask = (token < stop)[:, None] & (column < DV)[None, :]
        block = tl.load(v + token[:, None] * (G * DV) + column[None, :], mask=v_mask, other=0.0)
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(probabilities, 1)
        values = values * rescale[:, None] + tl.dot(probabilities.to(block.dtype), block)
        top = new_top
    out = head * splits + part
    tl.store(log_totals + out, top + tl.log(total), mask=row < QUERIES)  # -inf where a part is empty
    mean = values / tl.where(total > 0, total, 1.0)[:, None]
    out_mask = (row < QUERIES)[:, None] & (column < DV)[None, :]
    tl.store(parts + out[:, None] * DV + column[None, :], mean, mask=out_mask)


@triton.jit
def _combine_kernel(parts, log_totals, out, splits, PARTS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr):
    """Combine the parts of the context: the mean of their results, weighted by their totals.

    A program has one query head of a sequence.
    """
    head, part, column = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, WIDTH)
    log_total = tl.load(log_totals + head * splits + part, mask=part < splits, other=-float("inf"))
    weight = tl.exp(log_total - tl.max(log_total, 0))
    mask = (part < splits)[:, None] & (column < DV)[None, :]
    values = tl.load(parts + (head * splits + part)[:, None] * DV + column[None, :], mask=mask, other=0.0)
    mean = tl.sum(values * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + head * DV + column, mean, mask=column < DV)


# ---------------------------------------------------------------------------------------------------
# The loss


def cross_entropy_(logits, targets):
    """Compute cross_entropy_() of engine/loss.py."""
    M, V = logits.shape
    losses = torch.empty(M, device=logits.device)
    _cross_entropy_kernel[(M,)](logits, targets.contiguous(), losses, V, BLOCK=4096, num_warps=16)
    return losses


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):
    """Compute a row's loss and gradient. One pass computes the log of the sum of exponentials, one the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    learned = tl.where(target == -100, 0.0, 1.0)
    inside = (target >= 0) & (target < V)
    at_target = tl.load(logits + target, mask=inside, other=0.0).to(tl.float32)
    # One of each for every lane. -1e30 avoids inf - inf.
    top, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # evict_last: the row should still be in the cache when the second pass reads it.
        x = tl.load(logits + column, mask=column < V, other=-float("inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        new_top = tl.maximum(top, x)
        total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
        top = new_top
    highest = tl.max(top)
    log_total = highest + tl.log(tl.sum(total * tl.exp(top - highest)))
    known = inside | (target == -100)
    tl.store(losses + row, tl.where(known, (log_total - at_target) * learned, float("nan")))
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, eviction_policy="evict_first").to(tl.float32)
        gradient = (tl.exp(x - log_total) - tl.where(column == target, 1.0, 0.0)) * learned
        tl.store(logits + column, gradient, mask=column < V, eviction_policy="evict_first")
