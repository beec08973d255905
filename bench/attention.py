"""Speed and memory of attention alone, forward and backward, by implementation and context length.

python -m bench.attention                          # every implementation at 2048, 8192 and 32768 tokens
python -m bench.attention --length 4096 --impl sdpa naive

V1 and V2 are measured without the subtraction, but for `fused`, the kernel that contains it. TFLOP/s are those of the
multiplications that attention to both maps takes when they are not fused.
"""

import itertools

import torch

from bench import SMOKE, Table, batch_size, count, fresh_memory, median_ms, model_config, parse_arguments, peak_gib
from data import UserError, run_script
from model import ATTENTION, attention, flash_attn_func, gpu_generation, kernels

IMPLS = ("fused", "sdpa", "flash_attn", "naive")
FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    impl=dict(nargs="+", default=list(IMPLS), choices=[*IMPLS, "auto"], help="implementations"),
    length=dict(nargs="+", type=count, default=[2048, 8192, 32768], help="context lengths"),
    tokens=dict(type=count, default=65536, help="tokens in all; the batch is tokens / length"),
)


def random_qkv(attn, length, arguments, device):
    """q, k and v of one layer, (B, T, heads, width) each."""
    config = model_config(attn, length, arguments.smoke)
    kind, D = ATTENTION[attn], config.head_dim
    heads = (
        (kind.q_per_head * config.n_head, D),
        (config.n_kv_head, D),
        (config.n_kv_head // kind.value_width, kind.value_width * D),
    )
    options = dict(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, requires_grad=True)
    B = batch_size(arguments.tokens, length)
    return [torch.randn(B, length, n, width, **options) for n, width in heads]


def attend(q, k, v, lam, impl):
    if impl == "fused":
        return kernels.differential_attention(q, k, v, lam)
    return attention(q, k, v, causal=True, impl=impl)


def measure(attn, impl, length, arguments, device):
    fresh_memory(device)
    q, k, v = random_qkv(attn, length, arguments, device)
    lam = torch.rand(q.size(0), length, q.size(2) // 2, device=device, dtype=q.dtype)
    few = SMOKE if arguments.smoke else {}
    with torch.no_grad():
        forward_ms = median_ms(lambda: attend(q, k, v, lam, impl), device, **few)
    y = attend(q, k, v, lam, impl)
    upstream = torch.randn_like(y)

    def backward():
        torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True)

    backward_ms = median_ms(backward, device, **few)
    # Products of width D: scores, and in the backward pass again, dq, dk; of width Dv: values, dv, the maps' gradient.
    width = 4 * q.size(3) + 3 * v.size(3)
    flops = 2 * arguments.tokens * length / 2 * q.size(2) * width  # causal maps are half empty
    tflops = flops / (forward_ms + backward_ms) / 1e9
    return dict(forward_ms=forward_ms, backward_ms=backward_ms, tflops=tflops, peak_gib=peak_gib(device))


def main():
    arguments, device = parse_arguments("attention", __doc__, **FLAGS)
    if arguments.smoke:
        arguments.tokens, arguments.length = 256, [64, 128]
    on_gpu = device.type == "cuda"
    usable = {"flash_attn": flash_attn_func is not None and on_gpu}
    usable["fused"] = kernels is not None and on_gpu and gpu_generation(device) == (9, 0)
    if missing := [impl for impl in arguments.impl if not usable.get(impl, True)]:
        print(f"left out: {', '.join(missing)} (flash_attn needs its package and a GPU, fused Triton and Hopper)")
        arguments.impl = [impl for impl in arguments.impl if impl not in missing]
    if not arguments.impl:
        raise UserError("no implementation is left to measure")
    table = Table("attention", arguments, device)
    for length, attn, impl in itertools.product(arguments.length, arguments.attn, arguments.impl):
        if (attn, impl) == ("vanilla", "fused"):
            continue
        table.add(dict(attn=attn, impl=impl, T=length), measure, attn, impl, length, arguments, device)


if __name__ == "__main__":
    run_script(main)
