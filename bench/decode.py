"""Speed of generating text with the 159M model, one token at a time for a batch of sequences, in tokens a second.

python -m bench.decode                         # prompt 128 and 256 new tokens; contexts of 2048 and 32768
python -m bench.decode --batch 1 --context 2048
python -m bench.decode --prefill               # reading prompts instead, in milliseconds

The first column has the speed of whole answers, including the prompt. The others have the speed at the end of a
context. Their cache is as large as the largest context, and holds random numbers. Decoding takes the likeliest token,
and leaves it on the GPU. "kv layers" is the number of layers with keys and values of their own: all, and half of them.
"""

import functools
import itertools

import torch

from bench import SMOKE, Table, median_ms, model_config, parse_arguments, peak_gib, positive_int, reset_memory
from engine.generate import Decoder, prepare_for_inference
from engine.graphs import wants_compile
from engine.settings import UserError, run_script
from model import ATTENTION, GPT

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    batch=dict(nargs="+", type=positive_int, help="sequences (default: [1, 64]; to prefill [1, 8])"),
    context=dict(
        nargs="*",
        type=positive_int,
        help="tokens before the new ones (default: [2048, 32768]); none: whole answers "
        "only. To prefill: tokens of a prompt (default: [2048, 8192, 32768])",
    ),
    prefill=dict(action="store_true", help="time the reading of prompts"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
)

PROMPT, NEW = 128, 256  # tokens of a whole answer
STEPS = 32  # tokens that are timed together at the end of a context


def make_decoder(attn, half_kv, batch, length, arguments, device):
    reset_memory(device)
    model = prepare_for_inference(GPT(model_config(attn, length, arguments.smoke, half_kv=half_kv)).to(device))
    return Decoder(model, batch, length, compile=wants_compile(arguments.compile, device), temperature=0)


def answer_ms(decoder, prompt, new, device, options):
    """The milliseconds of a whole answer, of `new` tokens."""
    idx = torch.randint(256, (len(decoder.token), prompt), device=device)

    def answer():
        decoder.prefill(idx)
        for _ in range(new - 1):
            decoder.step()

    return median_ms(answer, device, **options)


def context_ms(decoder, context, device, options):
    """The milliseconds of the last STEPS tokens of a context."""

    def steps():
        decoder.used = context - STEPS
        decoder.position.fill_(decoder.used)
        for _ in range(STEPS):
            decoder.step()

    return median_ms(steps, device, **options)


def measure(attn, half_kv, batch, arguments, device):
    (prompt, new), options = ((8, 8), SMOKE) if arguments.smoke else ((PROMPT, NEW), dict(calls=3))
    decoder = make_decoder(attn, half_kv, batch, prompt + new, arguments, device)
    speeds = {f"{prompt}+{new}": 1000 * batch * new / answer_ms(decoder, prompt, new, device, options)}
    if arguments.context:
        del decoder
        decoder = make_decoder(attn, half_kv, batch, max(arguments.context), arguments, device)
        for tensor in itertools.chain(*decoder.cache.layers):
            tensor.normal_()
    for context in arguments.context:
        speeds[str(context)] = 1000 * batch * STEPS / context_ms(decoder, context, device, options)
    return speeds | {"peak_gib": peak_gib(device)}


def measure_prefill(attn, half_kv, batch, arguments, device):
    """The milliseconds of reading prompts, the peak of memory with the longest, and the bytes of a token's cache."""
    decoder = make_decoder(attn, half_kv, batch, max(arguments.context), arguments, device)
    row, options = {}, SMOKE if arguments.smoke else dict(calls=5)
    for length in arguments.context:
        idx = torch.randint(256, (batch, length), device=device)
        row[f"{length}: ms"] = median_ms(functools.partial(decoder.prefill, idx), device, **options)
    cache_bytes = sum(tensor.nbytes for tensor in itertools.chain(*decoder.cache.layers))
    return row | {"peak_gib": peak_gib(device), "cache bytes a token": cache_bytes // (batch * decoder.length)}


def main():
    arguments, device = parse_arguments("decode", __doc__, **FLAGS)
    arguments.batch = arguments.batch or ([1, 8] if arguments.prefill else [1, 64])
    if arguments.context is None:
        arguments.context = [2048, 8192, 32768] if arguments.prefill else [2048, 32768]
    if arguments.smoke:
        arguments.batch, arguments.context = [2], [64]
    if arguments.prefill and not arguments.context:
        raise UserError("--prefill needs the lengths of prompts: --context 2048")
    too_short = [context for context in arguments.context if context < STEPS]
    if too_short and not arguments.prefill:
        raise UserError(f"--context {too_short[0]} is shorter than the {STEPS} tokens that are timed")
    table = Table("prefill" if arguments.prefill else "decode", arguments, device)
    for batch, attn, half_kv in itertools.product(arguments.batch, arguments.attn, (False, True)):
        labels = {"attn": attn, "kv layers": "half" if half_kv else "all", "batch": batch}
        table.add(labels, measure_prefill if arguments.prefill else measure, attn, half_kv, batch, arguments, device)


if __name__ == "__main__":
    run_script(main)
