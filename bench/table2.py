"""Table 2 of the L-Diff report: training time for the same tokens, and what each ingredient contributes.

python -m bench.table2                  # the report's rows, then one ingredient at a time for all three attentions
python -m bench.table2 --ablate v2      # ... for V2 alone

Rows: (a) the report's baseline, (b) V1 without the pretraining methods, (c) L-Diff, (d) the plain Transformer with
everything that L-Diff has. The ingredients: `flash`, a fused attention kernel instead of one that materialises its
maps; `padding`, a vocabulary of a multiple of 64; `loss`, computed in chunks instead of with all logits at once;
`compile`, torch.compile, where there is a GPU. A step is forward, backward, clipping and AdamW on random tokens;
`minutes` are those of 1000 such steps, validation left out.
"""

import itertools
from dataclasses import replace

from bench import (
    SMOKE,
    Table,
    chunked_loss,
    count,
    fresh_memory,
    median_ms,
    model_config,
    parse_arguments,
    peak_gib,
    training_step,
)
from bench.runs import plain_loss, unpadded
from data import run_script
from data.tokenizer import get_tokenizer
from model import ATTENTION

INGREDIENTS = ("flash", "padding", "loss", "compile")
REPORT = {  # its rows, and (d), which it leaves out
    ("vanilla", ()): "a",
    ("v1", ("flash",)): "b",
    ("v1", INGREDIENTS): "c",
    ("v2", INGREDIENTS): "c",
    ("vanilla", INGREDIENTS): "d",
}
FLAGS = dict(
    ablate=dict(nargs="*", default=list(ATTENTION), choices=list(ATTENTION), help="attentions to take apart"),
    tokens=dict(type=count, default=16384, help="tokens a step"),
    length=dict(type=count, default=2048, help="context length"),
)


def step_with(attn, ingredients, arguments, device):
    """A function that takes one step with these ingredients."""
    config = model_config(attn, arguments.length, arguments.smoke)
    if "padding" not in ingredients:
        config = unpadded(config, get_tokenizer("bytes" if arguments.smoke else "gpt2"))
    config = replace(config, attn_impl="auto" if "flash" in ingredients else "naive")
    loss = chunked_loss if "loss" in ingredients else plain_loss
    compile = "auto" if "compile" in ingredients else "off"
    return training_step(config, arguments.tokens, device, compile, loss)[0]


def measure(attn, ingredients, table, arguments, device):
    fresh_memory(device)
    step = step_with(attn, ingredients, arguments, device)
    ms = median_ms(step, device, **(SMOKE if arguments.smoke else {}))
    first = table.rows[0].get("step_ms") if table.rows else ms  # that of row (a)
    ratio = ms / first if first else None
    figures = dict(step_ms=ms, minutes=ms / 60, tokens_per_s=1000 * arguments.tokens / ms, ratio=ratio)
    return figures | dict(peak_gib=peak_gib(device))


def main():
    arguments, device = parse_arguments("table2", __doc__, **FLAGS)
    if arguments.smoke:
        arguments.tokens, arguments.length = 256, 64
    table = Table("table2", arguments, device)
    alone = [(), *((ingredient,) for ingredient in INGREDIENTS)]
    for attn, ingredients in dict.fromkeys([*REPORT, *itertools.product(arguments.ablate, alone)]):
        labels = dict(row=REPORT.get((attn, ingredients), ""), attn=attn, ingredients=" ".join(ingredients) or "none")
        table.add(labels, measure, attn, ingredients, table, arguments, device)


if __name__ == "__main__":
    run_script(main)
