"""Speed of generating text: one token at a time for a batch of sequences, with the 159M model.

python -m bench.decode                         # prompt 128 and 256 new tokens; contexts of 2048 and 32768
python -m bench.decode --batch 1 --context 2048

The first rows are whole answers, prompt included. The others decode at the end of a nearly full cache of random
numbers. The likeliest token is taken each time, and left on the GPU.
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
    context=dict(nargs="*", type=count, default=[2048, 32768], help="sizes of the cache; none: whole answers only"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
)

PROMPT, NEW = 128, 256  # tokens of a whole answer
STEPS = 32  # timed together at the end of a context


def make_decoder(attn, batch, length, arguments, device):
    fresh_memory(device)
    compiling = train.wants_compile(arguments.compile, device)
    model = GPT(model_config(attn, length, arguments.smoke)).to(device).freeze()
    return Decoder(model, batch, length, compiling, temperature=0)


def figures(tokens, ms, decoder, device):
    batch = len(decoder.token)
    return dict(tokens_per_s=1000 * batch * tokens / ms, ms_per_token=ms / tokens, peak_gib=peak_gib(device))


def measure_answers(attn, batch, prompt, new, arguments, device):
    decoder = make_decoder(attn, batch, prompt + new, arguments, device)
    idx = torch.randint(256, (batch, prompt), device=device)

    def answer():
        decoder.prefill(idx)
        for _ in range(new - 1):
            decoder.step()

    return figures(new, median_ms(answer, device, **(SMOKE if arguments.smoke else dict(calls=3))), decoder, device)


def measure_context(attn, batch, context, arguments, device):
    decoder = make_decoder(attn, batch, context, arguments, device)
    for tensor in itertools.chain(*decoder.cache.layers):
        tensor.normal_()

    def steps():
        decoder.used = context - STEPS
        decoder.position.fill_(decoder.used)
        for _ in range(STEPS):
            decoder.step()

    return figures(STEPS, median_ms(steps, device, **(SMOKE if arguments.smoke else dict(calls=3))), decoder, device)


def main():
    arguments, device = parse_arguments("decode", __doc__, **FLAGS)
    prompt, new = (8, 8) if arguments.smoke else (PROMPT, NEW)
    if arguments.smoke:
        arguments.batch, arguments.context = [2], [64]
    if too_short := [context for context in arguments.context if context < STEPS]:
        raise UserError(f"--context {too_short[0]} is shorter than the {STEPS} tokens that are timed")
    table = Table("decode", arguments, device)
    for batch, attn in itertools.product(arguments.batch, arguments.attn):
        labels = dict(attn=attn, batch=batch, context=f"{prompt} + {new}")
        table.add(labels, measure_answers, attn, batch, prompt, new, arguments, device)
    for context, batch, attn in itertools.product(arguments.context, arguments.batch, arguments.attn):
        labels = dict(attn=attn, batch=batch, context=context)
        table.add(labels, measure_context, attn, batch, context, arguments, device)


if __name__ == "__main__":
    run_script(main)
