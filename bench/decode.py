"""Speed of generating text: one token at a time for a batch of sequences, with the 159M model.

python -m bench.decode                         # prompt 128 and 256 new tokens; contexts of 2048 and 32768
python -m bench.decode --batch 1 --context 2048

The first rows are whole answers, prompt included. In the others a cache that is full but for a few tokens is read, the
numbers in which are random.
"""

import itertools

import torch

import train
from bench import Table, fresh_memory, median_ms, parse_arguments, peak_gib
from data import run_script
from model import ATTENTION, GPT, Decoder, GPTConfig

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    batch=dict(nargs="+", type=int, default=[1, 64], help="sequences at a time"),
    context=dict(nargs="*", type=int, default=[2048, 32768], help="tokens before the new one"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile"),
)


def make_model(attn, block_size, arguments, device):
    preset = "tiny" if arguments.smoke else "ldiff"
    shape = train.SHAPES[preset, attn]
    vocab_size = 320 if arguments.smoke else 50304
    config = GPTConfig(attn=attn, **shape, n_kv_head=shape["n_head"], block_size=block_size, vocab_size=vocab_size)
    model = GPT(config).to(device).freeze()
    if train.wants_compile(arguments.compile, device):
        model.compile_layers(dynamic=False)
    return model


def measure_answers(model, batch, prompt, new, device, few):
    """Tokens a second of whole answers, the likeliest token each time."""
    idx = torch.randint(256, (batch, prompt), device=device)
    decoder = Decoder(model, batch, prompt + new, temperature=0)

    def answer():
        decoder.prefill(idx)
        for _ in range(new - 1):
            decoder.step()

    return 1000 * batch * new / median_ms(answer, device, **few)


def measure_context(model, batch, context, device, few):
    """Tokens a second at the end of a context."""
    decoder = Decoder(model, batch, context, temperature=0)
    for tensor in itertools.chain(*decoder.cache.layers):
        tensor.normal_()

    def steps():
        decoder.position.fill_(context - 40)
        for _ in range(32):
            decoder.step()

    return 1000 * batch * 32 / median_ms(steps, device, **few)


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
        model = make_model(attn, context or prompt + new, arguments, device)
        with torch.no_grad():
            if context:
                speed = measure_context(model, batch, context, device, few)
            else:
                speed = measure_answers(model, batch, prompt, new, device, few)
        table.add(
            attn=attn, batch=batch, context=context or f"{prompt} + {new}", tokens_per_s=speed,
            ms_per_token=1000 * batch / speed, peak_gib=peak_gib(device),
        )  # fmt: skip
        del model
    table.write()


if __name__ == "__main__":
    run_script(main)
