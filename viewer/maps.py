"""What the page shows of a model: the maps of a layer in full, and small pictures and numbers of all its heads.

Shapes are as in bench/probes.py: H is the number of heads after the subtraction.
"""

import contextlib

import torch
import torch.nn.functional as F

from bench.probes import differential_maps, share

PICTURE = 32  # pixels on a side of a small picture


@torch.no_grad()
def read(model, ids):
    """Read a list of T ids -> what the attention of every layer is called with.

    layer_maps() computes maps from it, which are quadratic and would not all fit.
    """
    calls = []
    with contextlib.ExitStack() as hooks:
        for layer in model.layers:
            hooks.enter_context(layer.attn.register_forward_pre_hook(lambda module, inputs: calls.append(inputs)))
        model.hidden(torch.tensor([ids], device=model.rope_cos.device))
    return calls


@torch.no_grad()
def layer_maps(model, calls, layer):
    """Compute the maps of a layer from what read() returned -> [first (H, T, T), second (H, T, T), factor (H, T, 1)].

    The weights that multiply the values are first - factor * second. The plain Transformer has first alone.
    """
    x, rope, _, shared = calls[layer]  # shared: the keys and values of a layer below, if it reads those
    maps = differential_maps(model.layers[layer].attn, x, rope, slice(None), shared)
    return [kind[0] for kind in maps if kind is not None]


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
