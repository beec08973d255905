"""What is computed in float32 although the model is in bf16, and where it is rounded."""

import pytest
import torch
import torch.nn as nn
from small import base_model, tiny_model

import sft
from lora import LoRALinear, merge_lora
from model import RMSNorm


def test_norm_computes_in_float32():
    norm = RMSNorm(64, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(10, 64).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())  # rounded once, at the end


def test_lambda_of_v1_computes_in_float32():
    """Also where its vectors are bf16, as FSDP gathers them."""
    attn = tiny_model("v1").layers[2].attn.bfloat16()
    vectors = (attn.lambda_q1, attn.lambda_k1, attn.lambda_q2, attn.lambda_k2)
    q1, k1, q2, k2 = (vector.detach().double() for vector in vectors)
    expected = (q1 @ k1).exp() - (q2 @ k2).exp() + attn.lambda_init.double()
    lam = attn.lam(torch.zeros(1, 1, 32, dtype=torch.bfloat16))
    assert lam.dtype == torch.float32 and lam.item() == pytest.approx(expected.item(), rel=1e-5)


def test_merging_rounds_once():
    base = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(base, rank=8, alpha=16)
    nn.init.normal_(layer.lora_B, std=0.2)  # so that both summands are of one size
    exact = base.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    merged = merge_lora(nn.Sequential(layer))[0].weight
    assert merged.dtype == torch.bfloat16
    assert (merged != exact.bfloat16()).float().mean() < 0.01  # where float32 and float64 round to different sides


def test_adapters_are_float32_and_compute_in_bf16():
    base = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(base, rank=4, alpha=4)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    y = layer(torch.ones(1, 8, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_B.grad.dtype == torch.float32


def test_log_probabilities_are_float32_sums():
    model = base_model().bfloat16().requires_grad_(False)
    idx, positions, targets = torch.zeros(2, 8, dtype=torch.long), torch.tensor([3]), torch.tensor([1])
    logps = sft.token_logps(model, idx, positions, targets)
    assert logps.dtype == torch.float32 and (logps != 0).nonzero().tolist() == [[0, 3]]
