"""fused_linear(): several layers at once are what they are one by one."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn

from engine.linear import fuse_weights, fused_linear
from lora import LoRALinear, disable_lora

WIDTHS = (12, 5, 6)  # 23 rows, no multiple of 8


def make_layers(adapted):
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(7, width, bias=False) for width in WIDTHS)
    for i in adapted:
        layers[i] = LoRALinear(layers[i], rank=2 + i, alpha=4)
        nn.init.normal_(layers[i].lora_B)
    return layers


@pytest.mark.parametrize("in_training", [True, False])
@pytest.mark.parametrize("adapted", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_equals_separate_layers(adapted, in_training):
    """Outputs and gradients, with adapters on some layers, and with those switched off."""
    x = torch.randn(2, 3, 7)
    for enabled in (True, False) if adapted else (True,):
        results = []
        for fused in (True, False):
            layers, own = make_layers(adapted), x.clone().requires_grad_()
            with nullcontext() if enabled else disable_lora(layers):
                outputs = fused_linear(own, *layers, in_training=in_training) if fused else [f(own) for f in layers]
            assert [y.shape for y in outputs] == [(2, 3, width) for width in WIDTHS]
            sum(y.square().sum() for y in outputs).backward()
            results.append([*outputs, own.grad, *(p.grad for p in layers.parameters())])
        for ours, expected in zip(*results, strict=True):
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("adapted", [(), (0, 2)])
def test_joined_weights(adapted):
    """fuse_weights() changes neither values nor names, and can be called again."""
    layers, x = make_layers(adapted), torch.randn(3, 7)
    expected, before = fused_linear(x, *layers), {name: t.clone() for name, t in layers.state_dict().items()}
    for _ in range(2):
        fuse_weights([getattr(layer, "base", layer) for layer in layers])
        assert layers.state_dict().keys() == before.keys()
        assert all(torch.equal(t, before[name]) for name, t in layers.state_dict().items())
        for in_training in (True, False):
            for ours, y in zip(fused_linear(x, *layers, in_training=in_training), expected, strict=True):
                torch.testing.assert_close(ours, y)


@pytest.mark.parametrize("bias", [(True, True, True), (False, True, False)])
def test_biases_are_added(bias):
    torch.manual_seed(0)
    layers, x = [nn.Linear(8, out, bias=b) for out, b in zip((8, 3, 5), bias)], torch.randn(2, 4, 8)
    expected = [layer(x) for layer in layers]
    torch.testing.assert_close(list(fused_linear(x, *layers)), expected)
    fuse_weights(layers)
    torch.testing.assert_close(list(fused_linear(x, *layers)), expected)
