"""Speed of generating text with the 159M model, one token at a time for a batch of sequences, in tokens a second.

python -m bench.decode                         # prompt 128 and 256 new tokens; contexts of 2048 and 32768
python -m bench.decode --batch 1 --context 2048

The first column has the speed of whole answers, including the prompt. The others have the speed at the end of a
context. Their cache is as large as the largest context, and holds random numbers. Decoding takes the likeliest token,
and leaves it on the GPU.
"""

import itertools

import torch

from bench import SMOKE, Table, median_ms, model_config, parse_arguments, peak_gib, positive_int, reset_memory
from engine.generate import Decoder, prepare_for_inference
from engine.graphs import wants_compile
from engine.settings import UserError, run_script
from model import ATTENTION, GPT

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    batch=dict(nargs="+", type=positive_int, default=[1, 64], help="sequences"),
    context=dict(
        nargs="*", type=positive_int, default=[2048, 32768], help="tokens before the new ones; none: whole answers only"
    ),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
)

PROMPT, NEW = 128, 256  # tokens of a whole answer
STEPS = 32  # tokens that are timed together at the end of a context


def make_decoder(attn, batch, length, arguments, device):
    reset_memory(device)
    model = prepare_for_inference(GPT(model_config(attn, length, arguments.smoke)).to(device))
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


def measure(attn, batch, arguments, device):
    (prompt, new), options = ((8, 8), SMOKE) if arguments.smoke else ((PROMPT, NEW), dict(calls=3))
    decoder = make_decoder(attn, batch, prompt + new, arguments, device)
    speeds = {f"{prompt}+{new}": 1000 * batch * new / answer_ms(decoder, prompt, new, device, options)}
    if arguments.context:
        del decoder
        decoder = make_decoder(attn, batch, max(arguments.context), arguments, device)
        for tensor in itertools.chain(*decoder.cache.layers):
            tensor.normal_()
    for context in arguments.context:
        speeds[str(context)] = 1000 * batch * STEPS / context_ms(decoder, context, device, options)
    return speeds | {"peak_gib": peak_gib(device)}


def main():
    arguments, device = parse_arguments("decode", __doc__, **FLAGS)
    if arguments.smoke:
        arguments.batch, arguments.context = [2], [64]
    if too_short := [context for context in arguments.context if context < STEPS]:
        raise UserError(f"--context {too_short[0]} is shorter than the {STEPS} tokens that are timed")
    table = Table("decode", arguments, device)
    for batch, attn in itertools.product(arguments.batch, arguments.attn):
        table.add(dict(attn=attn, batch=batch), measure, attn, batch, arguments, device)


if __name__ == "__main__":
    run_script(main)
