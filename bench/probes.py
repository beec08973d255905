"""What differential attention does inside a trained model: where its heads look, and how large its activations are.

probe() measures a model on held-out text. bench.retrieval and the viewer use the maps, too. There are up to three kinds
of weights:

    first, second    the two softmax maps
    weights          first - factor * second, which multiply the values; the plain Transformer has only these

Shapes are as in model.py, but H is the number of heads after the subtraction (pairs of V1's heads), and R the number of
query positions that are looked at.
"""

from collections import defaultdict

import torch

from data.dataset import sample_batch
from engine.device import autocast
from model import at_least_float32

LATE = 64  # last positions of a window, where the norms of the weights are measured

# ---------------------------------------------------------------------------------------------------
# Attention maps


def differential_maps(module, x, rope, rows, shared=None):
    """Compute the maps of an attention module that reads x (B, T, C) -> first, second, factor, at least float32.

    The maps are (B, H, R, S), for the queries at `rows`, a slice or a tensor of positions. The factor of the second map
    is (B, H, R, 1). An attention with one map has None for the others. `shared` are the keys and values of a layer
    below, for a module without its own.
    """
    q, k, _, *logits = module.qkv(x, rope, shared)  # V2 adds the logits of lambda
    q, positions = q[:, rows], torch.arange(x.size(1), device=x.device)[rows]
    if not hasattr(module, "lam"):
        return causal_maps(q, k, positions), None, None
    keys = (k[:, :, 0::2], k[:, :, 1::2]) if module.value_width == 2 else (k, k)  # V1 has a key head for each map
    first, second = (causal_maps(q[:, :, m::2], keys[m], positions) for m in (0, 1))
    lam = at_least_float32(module.lam(x, *logits)).expand(*x.shape[:2], first.size(1))  # (B, T, H)
    return first, second, lam[:, rows].transpose(1, 2).unsqueeze(-1)


def causal_maps(q, k, positions):
    """engine.attention.attention_maps() for queries at any `positions` (R,), in float32 even under autocast.

    q (B, R, H, D), k (B, S, K, D) -> (B, H, R, S).
    """
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("brhd,bshd->bhrs", at_least_float32(q), at_least_float32(k)) * q.size(-1) ** -0.5
    future = torch.arange(k.size(1), device=k.device) > positions[:, None]  # (R, S)
    return torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)


def layer_maps(model, idx, rows):
    """Yield {kind of weights: (B, H, R, S)} and the values (B, S, G, Dv) of every layer, as the model reads idx (B, T).

    `rows` are the positions of the queries.
    """
    rope, x, shared = model.rope(idx.size(1)), model.embed(idx), None
    for layer in model.layers:
        attn_input = layer.attn_norm(x)
        first, second, factor = differential_maps(layer.attn, attn_input, rope, rows, shared)
        maps = {"weights": first}
        if second is not None:
            maps = {"weights": first - factor * second, "first": first, "second": second}
        yield maps, layer.attn.qkv(attn_input, rope, shared)[2]
        x, keys_values = layer(x, rope, None, shared)
        shared = keys_values or shared


def share(weights, keys):
    """The share of attention that `keys`, a slice or mask of S, get: weights (..., S) -> (...).

    It is sum |w| over the keys / sum |w| over all, since differences may be negative and sum to 1 - factor. For one
    map it is the probability.
    """
    size = weights.abs()
    return size[..., keys].sum(-1) / size.sum(-1)


# ---------------------------------------------------------------------------------------------------
# Plain text: the attention sink, and the RMS of what is read


def window_measures(model, ids):
    """Measure the attention sink and the RMS of what is read in a window ids (T,) -> sink, rms.

    sink is {kind of weights: (n_layer,)}, the first token's share in the second half of the window. rms is
    {kind: (n_layer, H * R)}, the L2 norms of the weights at the LATE last positions, and as "output" output_rms().
    """
    sink, rms = defaultdict(list), defaultdict(list)
    for maps, values in layer_maps(model, ids[None], slice(len(ids) // 2, None)):
        for kind, weights in maps.items():
            sink[kind].append(share(weights, slice(1)).mean())
            rms[kind].append(weights[:, :, -LATE:].norm(dim=-1).flatten())
        rms["output"].append(output_rms(maps["weights"][:, :, -LATE:], values).flatten())
    return [{kind: torch.stack(layers) for kind, layers in measured.items()} for measured in (sink, rms)]


def output_rms(weights, values):
    """The RMS of a head's output, before any norm, over the RMS of its values.

    weights (B, H, R, S), values (B, S, G, Dv) -> (B, H, R). For uncorrelated values it is the L2 norm of the weights.
    """
    values = at_least_float32(values).transpose(1, 2).repeat_interleave(weights.size(1) // values.size(2), dim=1)
    with torch.autocast(weights.device.type, enabled=False):
        output = weights @ values  # (B, H, R, Dv)
    return (output.square().mean(-1) / values.square().mean((-2, -1)).unsqueeze(-1)).sqrt()


def summarize_windows(windows):
    """Summarize window_measures() of many windows -> sink and norms, {kind: ...} with lists by layer.

    The sink is the mean over windows. The norms have statistics over windows, heads and positions.
    """
    sink = {kind: torch.stack([sink[kind] for sink, _ in windows]).mean(0).tolist() for kind in windows[0][0]}
    norms = {}
    for kind in windows[0][1]:
        samples = torch.cat([rms[kind] for _, rms in windows], dim=1)  # (n_layer, windows * H * R)
        norms[kind] = dict(mean=samples.mean(1).tolist(), minimum=samples.amin(1).tolist())
    return sink, norms


# ---------------------------------------------------------------------------------------------------
# Outliers: few entries that are much larger than the others


def activation_moments(model, ids):
    """Run the model on a window ids (T,) -> {kind: (n_layer, 6)} in float64.

    Kinds are "residual", the residual stream after the layer, "attention", what its attention adds to the stream, and
    "heads", what o_proj reads. Of all T * width entries, the six numbers are the largest absolute value, the count, and
    the sums of the first four powers.
    """
    moments = defaultdict(list)

    def add(kind, x):
        x = x.double()
        moments[kind].append(torch.stack([x.abs().amax(), *((x**power).sum() for power in range(5))]))

    readers = [*(layer.attn_norm for layer in model.layers[1:]), model.norm]  # of the stream after each layer
    hooks = [norm.register_forward_pre_hook(lambda _, args: add("residual", args[0])) for norm in readers]
    for layer in model.layers:
        o_proj = layer.attn.o_proj
        hooks.append(o_proj.register_forward_hook(lambda _, args, output: add("attention", output)))
        hooks.append(o_proj.register_forward_pre_hook(lambda _, args: add("heads", args[0])))
    try:
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return {kind: torch.stack(layers) for kind, layers in moments.items()}


def summarize_moments(windows):
    """Summarize activation_moments() of many windows -> {kind: {"largest": list by layer, "kurtosis": ...}}.

    The kurtosis is the fourth standardized moment mean((x - mean)^4) / variance^2 over the entries of all windows: 3
    for a normal distribution, higher with outliers.
    """
    summary = {}
    for kind in windows[0]:
        moments = torch.stack([window[kind] for window in windows])  # (windows, n_layer, 6)
        count, *sums = moments[..., 1:].sum(0).unbind(-1)
        mean, second, third, fourth = (total / count for total in sums)
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        kurtosis = central / (second - mean**2).square()
        summary[kind] = dict(largest=moments[..., 0].amax(0).tolist(), kurtosis=kurtosis.tolist())
    return summary


# ---------------------------------------------------------------------------------------------------
# What figures are drawn from


@torch.no_grad()
def probe(model, tokens, length, windows):
    """Measure a model on so many windows of `length` held-out `tokens` (N,), one at a time -> a dict for JSON.

    The windows are drawn at random and may overlap. bench.runs gives the windows of its validation in a row as tokens,
    so that most of these span the seam of two.

    "bound" is 1 / sqrt(n): weights that are positive and sum to 1 over n tokens have no smaller L2 norm. Differences
    can have one, which is an argument for DIFF V2 (Microsoft, January 2026).
    """
    device = model.rope_cos.device
    ids = sample_batch(tokens, length, windows, seed=1, step=0)[0].to(device)
    with autocast(device):
        sink, norms = summarize_windows([window_measures(model, window) for window in ids])
        outliers = summarize_moments([activation_moments(model, window) for window in ids])
    context_rms = {"bound": length**-0.5, **norms}
    return dict(attn=model.config.attn, length=length, sink=sink, context_rms=context_rms, outliers=outliers)
