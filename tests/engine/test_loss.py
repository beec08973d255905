"""The loss in bf16, and its kernel. tests/test_model.py has the loss itself."""

import pytest
import torch
import torch.nn.functional as F
from small import relative_error

from engine import loss as loss_module
from engine.loss import cross_entropy_, mean_cross_entropy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_chunks_of_a_bf16_weights_gradient_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 64)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 32).bfloat16(), (torch.randn(100, 32) * 0.3).bfloat16().requires_grad_()
    targets = torch.randint(100, (2048,))
    mean_cross_entropy(hidden, weight, targets).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, targets).backward()
    assert weight.grad.dtype == torch.bfloat16 and relative_error(weight.grad, exact.grad) < 3e-3


def test_gradients_in_bf16_have_no_common_error():
    """Each may be off by bf16's rounding, all together may not."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(777, 32), torch.randn(100, 32)
    targets, half = torch.randint(100, (777,)), hidden.bfloat16().requires_grad_()
    mean_cross_entropy(half, weight.bfloat16().requires_grad_(), targets).backward()
    exact = half.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.bfloat16().double().T, targets).backward()
    scale = (half.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(scale - 1) < 5e-4


def check_cross_entropy(device):
    torch.manual_seed(0)
    logits = (torch.randn(40, 5003, device=device) * 4).bfloat16()
    targets = torch.randint(5003, (40,), device=device)
    targets[7] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    losses = cross_entropy_(logits, targets)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert relative_error(logits, exact.grad) < 3e-3


def test_logits_become_their_gradient():
    check_cross_entropy("cpu")


@needs_gpu
def test_gpu_cross_entropy_kernel():
    check_cross_entropy("cuda")


@needs_gpu
def test_gpu_loss_and_gradients_of_bf16_products():
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(1000, 64, device="cuda").requires_grad_()
    targets = torch.randint(1000, (300,), device="cuda")
    loss = mean_cross_entropy(hidden, weight, targets)
    loss.backward()
    exact = [hidden.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert relative_error(hidden.grad, exact[0].grad) < 1e-2 and relative_error(weight.grad, exact[1].grad) < 1e-2
