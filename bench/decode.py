"""Speed of generating text: one token at a time for a batch of sequences, with the 159M model.

python -m bench.decode                         # prompt 128 and 256 new tokens; contexts of 2048 and 32768
python -m bench.decode --batch 1 --context 2048

The first rows are whole answers, prompt included. In the others a cache that is full but for a few tokens is read, the
numbers in which are random.
"""

import functools
import itertools

import torch

import train
from bench import Table, fresh_memory, median_ms, model_config, parse_arguments, peak_gib
from data import run_script
from model import ATTENTION, GPT, Decoder

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    batch=dict(nargs="+", type=int, default=[1, 64], help="sequences at a time"),
    context=dict(nargs="*", type=int, default=[2048, 32768], help="tokens before the new one"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile"),
)


def make_decoder(attn, batch, length, arguments, device):
    config = model_config(attn, length, arguments.smoke)
    compiling = train.wants_compile(arguments.compile, device)
    return Decoder(GPT(config).to(device).freeze(), batch, length, compiling, temperature=0)


def measure_answers(decoder, device, few, prompt, new):
    """Tokens a second of whole answers, the likeliest token each time."""
    batch = len(decoder.token)
    idx = torch.randint(256, (batch, prompt), device=device)

    def answer():
        decoder.prefill(idx)
        for _ in range(new - 1):
            decoder.step()

    return 1000 * batch * new / median_ms(answer, device, **few)


def measure_context(decoder, device, few):
    """Tokens a second where the room is nearly full."""
    for tensor in itertools.chain(*decoder.cache.layers):
        tensor.normal_()

    def steps():
        decoder.position.fill_(decoder.length - 40)
        for _ in range(32):
            decoder.step()

    return 1000 * len(decoder.token) * 32 / median_ms(steps, device, **few)


def main():
    arguments = parse_arguments(__doc__, **FLAGS)
    device = train.choose_device(arguments.device)
    prompt, new, few = 128, 256, dict(calls=3)
    if arguments.smoke:
        prompt, new, few = 8, 8, dict(calls=1, runs=1, warmup=1)
        arguments.batch, arguments.context = [1, 2], [64]
    table = Table("decode", arguments, device)
    for context, batch, attn in itertools.product([0, *arguments.context], arguments.batch, arguments.attn):
        fresh_memory(device)
        decoder = make_decoder(attn, batch, context or prompt + new, arguments, device)
        measure = measure_context if context else functools.partial(measure_answers, prompt=prompt, new=new)
        speed = measure(decoder, device, few)
        table.add(
            attn=attn, batch=batch, context=context or f"{prompt} + {new}", tokens_per_s=speed,
            ms_per_token=1000 * batch / speed, peak_gib=peak_gib(device),
        )  # fmt: skip
        del decoder
    table.write()


if __name__ == "__main__":
    run_script(main)
