"""Linear layers that read the same input, multiplied in one matrix product."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def fused_linear(x, *layers, in_training=True):
    """Apply several linear layers to the same x (..., in) -> a list of (..., out), one for each layer.

    Without biases, one matrix product does the work of all, which is faster. With in_training=False that holds only for
    layers whose weights fuse_weights() has joined. A LoRALinear has a frozen layer as its `base`, and a method `adapt`
    that adds to the outputs of all bases what the adapters contribute.
    """
    bases = [getattr(layer, "base", layer) for layer in layers]
    weight = getattr(bases[0], "fused_weight", None)
    if weight is None and in_training and len(bases) > 1 and all(base.bias is None for base in bases):
        weight = concatenate_weights(bases)
    if weight is None:
        outputs = [base(x) for base in bases]
    else:
        sizes = [base.out_features for base in bases]
        if padding := len(weight) - sum(sizes):
            sizes.append(padding)
        outputs = F.linear(x, weight).split(sizes, dim=-1)[: len(bases)]
    adapted = [layer for layer, base in zip(layers, bases) if layer is not base]
    return adapted[0].adapt(outputs, layers, x) if adapted else outputs


def concatenate_weights(layers):
    """Concatenate the weights of several layers -> (sum of outs, in), padded with zero rows to a multiple of 8.

    Matrix products slow down where the number of columns of their result is no multiple of 8.
    """
    weight = torch.cat([layer.weight for layer in layers])
    return F.pad(weight, (0, 0, 0, -len(weight) % 8)) if len(weight) % 8 else weight


def fuse_weights(layers):
    """Join the frozen weights of layers that read the same x, so that no forward pass has to concatenate them.

    Each layer keeps its weight under its name, as a view into the joint one.
    """
    if any(layer.bias is not None for layer in layers):
        return
    weight, sizes = concatenate_weights(layers).detach(), [layer.out_features for layer in layers]
    layers[0].register_buffer("fused_weight", weight, persistent=False)
    for layer, rows in zip(layers, weight[: sum(sizes)].split(sizes)):
        layer.weight = nn.Parameter(rows, requires_grad=False)
