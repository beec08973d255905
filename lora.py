"""Low-rank adaptation (LoRA, arXiv 2106.09685): train two thin matrices beside each frozen one.

apply_lora(model, rank=64, alpha=128)     # the model computes what it did before, and only the adapters train
with disable_lora(model): ...             # the model without its adapters: the reference policy of DPO
merge_lora(model)                         # the adapters become part of the weights; plain linear layers again
"""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# All large matrices of a block. Not V2's lambda_proj: with a handful of outputs it has no rank 64. Not the embedding
# and the head: 50,304 tokens long, their adapters would be over a third of all, for tokens the model already knows.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) * B A dropout(x), with the linear layer W (out, in) frozen, A (rank, in), B (out, rank).

    A and B are float32 and multiply in the dtype of x. B starts at zero, so training starts from the layer as it was.
    Raises ValueError if the rank is not between 1 and that of a full matrix.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"LoRA rank {rank} does not fit a matrix of {tuple(base.weight.shape)}")
        self.base, self.scaling, self.dropout, self.enabled = base.requires_grad_(False), alpha / rank, dropout, True
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.adapt([self.base(x)], [self], x)[0]  # base(x) + scaling * B(A(dropout(x)))

    @staticmethod
    def adapt(outputs, layers, x):
        """Add the adapters' part to the outputs of several frozen layers that read the same x (..., in).

        `outputs` are those of the frozen layers, which `layers` may have adapters for. All their A are one product: x
        is read once and gets one gradient. fused_linear() in engine/linear.py calls it.
        """
        on = [i for i, layer in enumerate(layers) if isinstance(layer, LoRALinear) and layer.enabled]
        if not on:
            return outputs
        A = torch.cat([layers[i].lora_A for i in on]).to(x.dtype)  # (sum of ranks, in)
        dropped = F.dropout(x, layers[on[0]].dropout, training=layers[on[0]].training)
        parts = F.linear(dropped, A).split([len(layers[i].lora_A) for i in on], dim=-1)  # (..., rank) each
        outputs = list(outputs)
        for i, part in zip(on, parts):
            outputs[i] = outputs[i] + layers[i].scaling * F.linear(part, layers[i].lora_B.to(part.dtype))
        return outputs


def apply_lora(model, rank, alpha, dropout=0.0, targets=TARGETS):
    """Freeze `model` and put an adapter beside each linear layer named in `targets`. Returns the model.

    Raises ValueError if the model has no layer of one of the names, or if the rank does not fit.
    """
    model.requires_grad_(False)
    found = set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha, dropout))
                found.add(name)
    if missing := set(targets) - found:
        raise ValueError(f"the model has no linear layer called {', '.join(sorted(missing))}")
    return model


@torch.no_grad()
def merge_lora(model):
    """Replace every adapted layer by a plain one with the weight W + (alpha / rank) * B A, added in float32.

    The sum is cast once, to the dtype of W. The whole model becomes trainable again. Returns the model.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                linear, weight = child.base, child.base.weight
                # In float64, which autocast and TF32 leave alone, and on the CPU, since a Mac's GPU has none.
                delta = child.scaling * child.lora_B.cpu().double() @ child.lora_A.cpu().double()
                merged = (weight.float() + delta.float().to(weight.device)).to(weight.dtype)
                linear.weight = nn.Parameter(merged)  # a new one, so that a tied embedding stays as it is
                setattr(parent, name, linear)
    return model.requires_grad_(True)


@contextlib.contextmanager
def disable_lora(model):
    """Switch the adapters off within a `with` block: the model computes what it did before apply_lora()."""
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear) and module.enabled]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


def lora_state_dict(model):
    """Return the adapters alone: {name: tensor}."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def load_lora(model, state):
    """Load the adapters of `state` into an adapted model. Raises ValueError if it has others."""
    own = lora_state_dict(model)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise ValueError("the adapters belong to another model, rank or choice of layers")
    model.load_state_dict(state, strict=False)
