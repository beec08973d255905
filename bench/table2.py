"""Table 2 of the L-Diff report: training time for the same tokens, and what each ingredient contributes.

python -m bench.table2                  # the report's rows, then one ingredient at a time for all three attentions
python -m bench.table2 --ablate v2      # ... for V2 alone

The report's rows are (a) its baseline, (b) V1 without the pretraining methods, and (c) L-Diff. Row (d), which it leaves
out, is the plain Transformer with all ingredients of L-Diff:

    flash      a fused attention kernel, instead of one that materialises its maps
    padding    a vocabulary that is a multiple of 64
    loss       computed in chunks, instead of with all logits at once
    compile    torch.compile, on a GPU

A step is forward, backward, clipping and AdamW on random tokens. `minutes` is the time of 1000 such steps, without
validation.
"""

import itertools
from dataclasses import replace

from bench import (
    SMOKE,
    Table,
    chunked_loss,
    median_ms,
    model_config,
    parse_arguments,
    peak_gib,
    positive_int,
    reset_memory,
    training_step,
)
from bench.runs import plain_loss, unpadded_vocab
from data.tokenizer import get_tokenizer
from engine.settings import run_script
from model import ATTENTION

INGREDIENTS = ("flash", "padding", "loss", "compile")
ROWS = {
    ("vanilla", ()): "a",
    ("v1", ("flash",)): "b",
    ("v1", INGREDIENTS): "c",
    ("v2", INGREDIENTS): "c",
    ("vanilla", INGREDIENTS): "d",
}
FLAGS = dict(
    ablate=dict(
        nargs="*",
        default=list(ATTENTION),
        choices=list(ATTENTION),
        help="attentions to take apart",
    ),
    tokens=dict(type=positive_int, default=16384, help="tokens a step"),
    length=dict(type=positive_int, default=2048, help="context length"),
)


def step_with(attn, ingredients, arguments, device):
    """A function that takes one training step with these ingredients."""
    config = model_config(attn, arguments.length, arguments.smoke)
    if "padding" not in ingredients:
        n_vocab = get_tokenizer("bytes" if arguments.smoke else "gpt2").n_vocab
        config = replace(config, vocab_size=unpadded_vocab(n_vocab))
    config = replace(config, attn_impl="auto" if "flash" in ingredients else "naive")
    loss = chunked_loss if "loss" in ingredients else plain_loss
    compile = "auto" if "compile" in ingredients else "off"
    return training_step(config, arguments.tokens, device, compile, loss)[0]


def measure(attn, ingredients, table, arguments, device):
    reset_memory(device)
    step = step_with(attn, ingredients, arguments, device)
    ms = median_ms(step, device, **(SMOKE if arguments.smoke else {}))
    baseline = table.rows[0].get("step_ms") if table.rows else ms  # row (a), unless it ran out of memory
    ratio = ms / baseline if baseline else None
    speed = 1000 * arguments.tokens / ms
    return dict(step_ms=ms, minutes=ms / 60, tokens_per_s=speed, ratio=ratio, peak_gib=peak_gib(device))


def main():
    arguments, device = parse_arguments("table2", __doc__, **FLAGS)
    if arguments.smoke:
        arguments.tokens, arguments.length = 256, 64
    table = Table("table2", arguments, device)
    alone = [(), *((ingredient,) for ingredient in INGREDIENTS)]
    for attn, ingredients in dict.fromkeys([*ROWS, *itertools.product(arguments.ablate, alone)]):
        labels = dict(row=ROWS.get((attn, ingredients), ""), attn=attn, ingredients=" ".join(ingredients) or "none")
        table.add(labels, measure, attn, ingredients, table, arguments, device)


if __name__ == "__main__":
    run_script(main)
