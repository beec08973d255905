"""Speed and memory of attention alone, forward and backward, by implementation and context length.

python -m bench.attention                          # every implementation at 2048, 8192 and 32768 tokens
python -m bench.attention --length 4096 --impl sdpa naive
"""

import torch

import train
from bench import Table, fresh_memory, median_ms, model_config, parse_arguments, peak_gib
from data import run_script
from model import ATTENTION, ATTENTION_IMPLS, attention, flash_attn_func

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    impl=dict(nargs="+", default=["sdpa", "flash_attn", "naive"], choices=ATTENTION_IMPLS, help="implementations"),
    length=dict(nargs="+", type=int, default=[2048, 8192, 32768], help="context lengths"),
    tokens=dict(type=int, default=65536, help="tokens in all"),
)


def inputs(attn, length, tokens, smoke, device):
    """Random q, k and v of one layer, (B, T, heads, width) each."""
    config = model_config(attn, length, smoke)
    kind, D = ATTENTION[attn], config.head_dim
    heads = (
        (kind.q_per_head * config.n_head, D),
        (config.n_kv_head, D),
        (config.n_kv_head // kind.value_width, kind.value_width * D),
    )
    options = dict(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, requires_grad=True)
    return [torch.randn(tokens // length, length, n, width, **options) for n, width in heads]


def measure(attn, impl, length, arguments, device):
    """Milliseconds forward, milliseconds backward, TFLOP/s of both together, peak memory in GiB."""
    fresh_memory(device)
    q, k, v = inputs(attn, length, arguments.tokens, arguments.smoke, device)
    few = dict(calls=2, runs=1, warmup=1) if arguments.smoke else {}
    with torch.no_grad():
        forward = median_ms(lambda: attention(q, k, v, causal=True, impl=impl), device, **few)
    y = attention(q, k, v, causal=True, impl=impl)
    upstream = torch.randn_like(y)

    def backward():
        torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True)

    backward_ms = median_ms(backward, device, **few)
    # A backward pass has five products where the forward pass has two; causal maps are half empty.
    products = 2 * arguments.tokens * length / 2 * q.size(2) * (q.size(3) + v.size(3))
    tflops = 3.5 * products / (forward + backward_ms) / 1e9
    return dict(forward_ms=forward, backward_ms=backward_ms, tflops=tflops, peak_gib=peak_gib(device))


def main():
    arguments = parse_arguments(__doc__, **FLAGS)
    device = train.choose_device(arguments.device)
    if arguments.smoke:
        arguments.tokens, arguments.length = 256, [64, 128]
    if flash_attn_func is None or device.type != "cuda":
        arguments.impl = [impl for impl in arguments.impl if impl != "flash_attn"]
    table = Table("attention", arguments, device)
    for length in arguments.length:
        for attn in arguments.attn:
            for impl in arguments.impl:
                try:
                    table.add(attn=attn, impl=impl, T=length, **measure(attn, impl, length, arguments, device))
                except torch.OutOfMemoryError:
                    table.note(f"{attn}, {impl}, {length} tokens: out of memory")
    table.write()


if __name__ == "__main__":
    run_script(main)
