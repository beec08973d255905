"""Speed of generating text: one token at a time for a batch of sequences, with the 159M model, in tokens a second.

python -m bench.decode                         # prompt 128 and 256 new tokens; contexts of 2048 and 32768
python -m bench.decode --batch 1 --context 2048

The first column of speeds is of whole answers, prompt included. In the others the cache is as large as the largest
context, and holds random numbers. The likeliest token is taken each time, and left on the GPU.
"""

import itertools

import torch

import train
from bench import SMOKE, Table, count, fresh_memory, median_ms, model_config, parse_arguments, peak_gib
from data import UserError, run_script
from model import ATTENTION, GPT, Decoder

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    batch=dict(nargs="+", type=count, default=[1, 64], help="sequences at a time"),
    context=dict(
        nargs="*", type=count, default=[2048, 32768], help="tokens before the new ones; none: whole answers only"
    ),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
)

PROMPT, NEW = 128, 256  # tokens of a whole answer
STEPS = 32  # timed together at the end of a context


def make_decoder(attn, batch, length, arguments, device):
    fresh_memory(device)
    compiling = train.wants_compile(arguments.compile, device)
    model = GPT(model_config(attn, length, arguments.smoke)).to(device).freeze()
    return Decoder(model, batch, length, compiling, temperature=0)


def answer_ms(decoder, prompt, new, device, few):
    """Milliseconds of a whole answer."""
    idx = torch.randint(256, (len(decoder.token), prompt), device=device)

    def answer():
        decoder.prefill(idx)
        for _ in range(new - 1):
            decoder.step()

    return median_ms(answer, device, **few)


def context_ms(decoder, context, device, few):
    """Milliseconds of STEPS tokens that end a context."""

    def steps():
        decoder.used = context - STEPS
        decoder.position.fill_(decoder.used)
        for _ in range(STEPS):
            decoder.step()

    return median_ms(steps, device, **few)


def measure(attn, batch, arguments, device):
    (prompt, new), few = ((8, 8), SMOKE) if arguments.smoke else ((PROMPT, NEW), dict(calls=3))
    decoder = make_decoder(attn, batch, prompt + new, arguments, device)
    speeds = {f"{prompt}+{new}": 1000 * batch * new / answer_ms(decoder, prompt, new, device, few)}
    if arguments.context:
        del decoder
        decoder = make_decoder(attn, batch, max(arguments.context), arguments, device)
        for tensor in itertools.chain(*decoder.cache.layers):
            tensor.normal_()
    for context in arguments.context:
        speeds[str(context)] = 1000 * batch * STEPS / context_ms(decoder, context, device, few)
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
