"""Speed and memory of attention alone, forward and backward, by implementation and context length.

python -m bench.attention                          # every implementation at 2048, 8192 and 32768 tokens
python -m bench.attention --length 4096 --impl sdpa naive

V1 and V2 are measured without the subtraction. Only `fused`, the kernel that contains it, is measured with it. TFLOP/s
count the multiplications of both maps' attention when it is not fused.
"""

import itertools

import torch

from bench import (
    SMOKE,
    Table,
    batch_size,
    median_ms,
    model_config,
    parse_arguments,
    peak_gib,
    positive_int,
    reset_memory,
)
from engine.attention import attention, differential_attention, flash_attn_func, gpu_generation, kernels
from engine.settings import UserError, run_script
from model import ATTENTION

IMPLS = ("fused", "sdpa", "flash_attn", "naive")
FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    impl=dict(nargs="+", default=list(IMPLS), choices=[*IMPLS, "auto"], help="implementations"),
    length=dict(nargs="+", type=positive_int, default=[2048, 8192, 32768], help="context lengths"),
    tokens=dict(type=positive_int, default=65536, help="tokens of a batch, which has tokens / length rows"),
)


def random_qkv(attn, length, arguments, device):
    """Draw q, k and v of one layer, (B, T, heads, width) each."""
    config = model_config(attn, length, arguments.smoke)
    kind, D = ATTENTION[attn], config.head_dim
    heads = (
        (kind.q_per_head * config.n_head, D),
        (config.n_kv_head, D),
        (config.n_kv_head // kind.value_width, kind.value_width * D),
    )
    dtype, B = torch.bfloat16 if device.type == "cuda" else torch.float32, batch_size(arguments.tokens, length)
    options = dict(device=device, dtype=dtype, requires_grad=True)
    return [torch.randn(B, length, n, width, **options) for n, width in heads]


def attend(q, k, v, lam, impl):
    if impl == "fused":
        return differential_attention(q, k, v, lam)
    return attention(q, k, v, causal=True, impl=impl)


def measure(attn, impl, length, arguments, device):
    reset_memory(device)
    q, k, v = random_qkv(attn, length, arguments, device)
    lam = torch.rand(q.size(0), length, q.size(2) // 2, device=device, dtype=q.dtype)
    options = SMOKE if arguments.smoke else {}
    with torch.no_grad():
        forward_ms = median_ms(lambda: attend(q, k, v, lam, impl), device, **options)
    y = attend(q, k, v, lam, impl)
    upstream = torch.randn_like(y)

    def backward():
        torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True)

    backward_ms = median_ms(backward, device, **options)
    # Four products have width D: the scores, in both passes, dq and dk. Three have width Dv: the values, dv, and the
    # gradient of the maps.
    width = 4 * q.size(3) + 3 * v.size(3)
    flops = 2 * arguments.tokens * length / 2 * q.size(2) * width  # half of a causal map is empty
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
