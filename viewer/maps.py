"""What the page shows of a model: the maps of a layer in full, and small pictures and numbers of all its heads.

Shapes are as in bench/probes.py: H is the number of heads after the subtraction.
"""

import contextlib
from functools import lru_cache

import torch
import torch.nn.functional as F

from bench.probes import differential_maps, share

PICTURE = 32  # pixels on a side of a small picture


@torch.no_grad()
def read(model, ids):
    """Read a list of T ids -> what the attention of each layer is called with, and its summary (H, 3 + PICTURE**2).

    layer_maps() computes the maps again from a call. They are quadratic and would not all fit.
    """
    calls, summaries = [], []

    def look(attn, inputs, output):
        calls.append((attn, *inputs))
        summaries.append(summarize(*layer_maps(*calls[-1])))
        attn.qkv.cache_clear()

    with contextlib.ExitStack() as undo:
        for layer in model.layers:
            layer.attn.qkv = lru_cache(1)(layer.attn.qkv)  # look() has the queries and keys that the model has computed
            undo.callback(delattr, layer.attn, "qkv")
            undo.enter_context(layer.attn.register_forward_hook(look))
        model.hidden(torch.tensor([ids], device=model.rope_cos.device))
    return calls, summaries


@torch.no_grad()
def layer_maps(attn, x, rope, cache, shared):
    """Compute the maps of a call from read() -> [first (H, T, T), second (H, T, T), factor (H, T, 1)].

    The weights that multiply the values are first - factor * second. The plain Transformer has first alone. `shared`
    are the keys and values of a layer below, if this one reads those.
    """
    return [kind[0] for kind in differential_maps(attn, x, rope, slice(None), shared) if kind is not None]


def summarize(first, second=None, factor=None):
    """Summarize the maps of a layer -> three numbers and the pixels of a picture for each head, (H, 3 + PICTURE**2).

    The numbers are means over queries: what the subtraction removes, min(first, factor * second) summed over all tokens
    but the first; the share of the first token; the entropy of the weights' sizes, in nats. A pixel is the weight of
    its square that is largest by size.
    """
    subtracted = torch.zeros_like(first) if second is None else factor * second
    weights, removed = first - subtracted, torch.minimum(first, subtracted)[..., 1:].sum(-1)
    sizes = weights.abs()
    entropy = torch.special.entr(sizes / sizes.sum(-1, keepdim=True)).sum(-1)
    numbers = torch.stack((removed, share(weights, slice(1)), entropy)).mean(-1)  # (3, H)
    _, largest = F.adaptive_max_pool2d(sizes, PICTURE, return_indices=True)  # of each square
    return torch.cat((numbers.T, weights.flatten(1).gather(1, largest.flatten(1))), dim=1)
