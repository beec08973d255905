"""The cross-entropy of a language model, computed in chunks together with its gradient.

The logits of a batch, (M, vocab_size), would be the largest tensor of all. Here only CHUNK rows of them exist at a
time: a custom operator computes their losses and at once the gradients for the hidden states and the output layer, and
the backward pass only scales those.
"""

import torch
import torch.nn.functional as F

try:
    from engine import kernels
except ImportError:  # no Triton
    kernels = None

CHUNK = 8192  # rows whose logits exist at the same time; products of fewer rows are slower


def mean_cross_entropy(hidden, weight, targets):
    """Compute the mean cross-entropy in nats of logits = hidden weight^T.

    hidden (M, C), weight (V, C), targets (M,) int64, of which -100 are ignored -> a scalar, at least float32.
    """
    needs_grad = torch.is_grad_enabled()
    losses, _, _ = _linear_cross_entropy(hidden, weight, targets, needs_grad, needs_grad and weight.requires_grad)
    return losses.sum() / (targets != -100).sum()


def token_cross_entropy(hidden, weight, targets):
    """Compute the cross-entropy of every token in nats -> (M,), 0 where the target is -100, at least float32.

    Raises ValueError if `weight` is trained: its gradient is computed before the factor of each loss is known.
    """
    needs_grad = torch.is_grad_enabled()
    if needs_grad and weight.requires_grad:
        raise ValueError("losses of single tokens need a frozen weight")
    return _linear_cross_entropy(hidden, weight, targets, needs_grad, False)[0]


@torch.library.custom_op("ldiff::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, hidden_grad: bool, weight_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the losses, and the gradients of their sum for `hidden` and `weight`; those not asked for are empty."""
    losses, grad_hidden, grad_weight = _empty_results(hidden, weight, targets, hidden_grad, weight_grad)
    grad_weight.zero_()
    weight_cast = weight.to(hidden.dtype)
    buffer = hidden.new_empty(min(CHUNK, len(hidden)), len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = torch.mm(hidden[rows], weight_cast.T, out=buffer[: len(hidden[rows])])
            losses[rows] = cross_entropy_(logits, targets[rows])  # logits hold their gradient from here on
            if hidden_grad:
                torch.mm(logits, weight_cast, out=grad_hidden[rows])
            if weight_grad and logits.is_cuda and logits.dtype != grad_weight.dtype:
                torch.addmm(grad_weight, logits.T, hidden[rows], out_dtype=grad_weight.dtype, out=grad_weight)
            elif weight_grad:
                grad_weight.addmm_(logits.T.type_as(grad_weight), hidden[rows].type_as(grad_weight))
    return losses, grad_hidden, grad_weight


@_linear_cross_entropy.register_fake
def _empty_results(hidden, weight, targets, hidden_grad, weight_grad):
    losses = hidden.new_empty(hidden.size(0), dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_hidden = torch.empty_like(hidden) if hidden_grad else hidden.new_empty(0)
    # The chunks are summed in it, so it is at least float32, even where FSDP gives a weight in bf16.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grad_weight = torch.empty_like(weight, dtype=dtype) if weight_grad else weight.new_empty(0)
    return losses, grad_hidden, grad_weight


def _keep_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for the outputs that are not used
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx, factors, *unused):
    grad_hidden, grad_weight = ctx.saved_tensors
    scaled = (grad_hidden * factors.unsqueeze(-1)).type_as(grad_hidden)
    # The weight is trained by mean_cross_entropy() alone, whose factors are all the same.
    grad_weight = (grad_weight * factors[0]).to(ctx.weight_dtype) if len(grad_weight) else None
    return scaled, grad_weight, None, None, None


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def cross_entropy_(logits, targets):
    """Compute each row's cross-entropy and overwrite logits (M, V) with its gradient."""
    if kernels is not None and logits.is_cuda and logits.dtype != torch.float64:
        return kernels.cross_entropy_(logits, targets)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses, gradient, counts = F.cross_entropy(x, targets, reduction="none"), x.softmax(dim=-1), targets != -100
    gradient[counts, targets[counts]] -= 1
    logits.copy_(gradient * counts[:, None])
    return losses
