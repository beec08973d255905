"""What the page shows of a model: the maps of a layer in full, and small pictures and numbers of all its heads.

Shapes are as in bench/probes.py: H is the number of heads after the subtraction. S is the side of a small picture.
"""

import torch
import torch.nn.functional as F

from bench.probes import differential_maps, share

PICTURE = 32  # pixels on a side of a small picture, at most


@torch.no_grad()
def read(model, ids):
    """Read a list of T ids -> what the attention of every layer reads, (1, T, C) each.

    layer_maps() computes maps from them, which are quadratic and would not all fit.
    """
    inputs = []
    attentions = [layer.attn for layer in model.layers]
    hooks = [attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for attn in attentions]
    try:
        model.hidden(torch.tensor([ids], device=model.rope_cos.device))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@torch.no_grad()
def layer_maps(model, inputs, layer):
    """Compute the maps of a layer from what read() returned -> [first (H, T, T), second (H, T, T), factor (H, T, 1)].

    The weights that multiply the values are first - factor * second. The plain Transformer has first alone.
    """
    x = inputs[layer]
    maps = differential_maps(model.layers[layer].attn, x, model.rope(x.size(1)), slice(None))
    return [kind[0] for kind in maps if kind is not None]


def summarize(first, second=None, factor=None):
    """Summarize the maps of a layer -> numbers (3, H) float32 and pictures (H, S, S) uint8.

    The numbers are means over queries: what the subtraction removes, min(first, factor * second) summed over all tokens
    but the first; the share of the first token; the entropy of the weights' sizes, in nats. A pixel is the weight of
    its square that is largest by size, w: 128 + 127 * sign(w) * sqrt(abs(w)), where sizes beyond 1 count as 1.
    """
    weights = first if second is None else first - factor * second
    removed = (first - weights.clamp(min=0))[..., 1:].sum(-1)  # min(a, b) = a - max(a - b, 0)
    sizes = weights.abs()
    entropy = torch.special.entr(sizes / sizes.sum(-1, keepdim=True)).sum(-1)
    side = min(PICTURE, weights.size(-1))
    high, low = F.adaptive_max_pool2d(weights, side), -F.adaptive_max_pool2d(-weights, side)
    largest = torch.where(high > -low, high, low)
    pictures = 128 + 127 * largest.sign() * largest.abs().clamp(max=1).sqrt()
    return torch.stack((removed, share(weights, slice(1)), entropy)).mean(-1), pictures.round().to(torch.uint8)


def to_bytes(*tensors):
    """Join tensors as bytes, little-endian."""
    arrays = [tensor.cpu().numpy() for tensor in tensors]
    return b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
