"""Table 2 of the L-Diff report: training time for the same tokens, and what each ingredient contributes.

python -m bench.table2                  # the report's rows, then one ingredient at a time for vanilla and V1
python -m bench.table2 --ablate v2      # ... for V2

The ingredients: `flash`, a fused attention kernel instead of one that materialises its maps; `padding`, a vocabulary
of a multiple of 64; `loss`, computed in chunks instead of with all logits at once; `compile`, torch.compile. A step is
forward, backward, clipping and AdamW on random tokens; `minutes` are those of 1000 such steps, validation left out.
"""

import functools
import itertools
from dataclasses import replace

import torch

import train
from bench import SMOKE, Table, batch_size, count, fresh_memory, median_ms, model_config, parse_arguments, peak_gib
from bench.runs import plain_loss, unpadded
from data import run_script
from data.tokenizer import get_tokenizer
from model import ATTENTION, GPT

INGREDIENTS = ("flash", "padding", "loss", "compile")
REPORT = {  # its rows, and (d), which it leaves out
    ("vanilla", ()): "a",
    ("v1", ("flash",)): "b",
    ("v1", INGREDIENTS): "c",
    ("v2", INGREDIENTS): "c",
    ("vanilla", INGREDIENTS): "d",
}
FLAGS = dict(
    ablate=dict(nargs="*", default=["vanilla", "v1"], choices=list(ATTENTION), help="attentions to take apart"),
    tokens=dict(type=count, default=16384, help="tokens a step"),
    length=dict(type=count, default=2048, help="context length"),
)


def training_step(attn, ingredients, arguments, device):
    """A function that takes one step with these ingredients."""
    torch.manual_seed(1)
    config = model_config(attn, arguments.length, arguments.smoke)
    if "padding" not in ingredients:
        config = unpadded(config, get_tokenizer("bytes" if arguments.smoke else "gpt2"))
    model = GPT(replace(config, attn_impl="auto" if "flash" in ingredients else "naive")).to(device)
    can_compile = train.wants_compile("auto", device)
    compiled = train.compile_model(model) if "compile" in ingredients and can_compile else model
    optimizer = train.make_optimizer(model, weight_decay=0.1)
    tokens = torch.randint(256, (batch_size(arguments.tokens, arguments.length), arguments.length + 1), device=device)

    def loss_of(inputs, targets):
        with train.autocast(device):
            chunked = "loss" in ingredients
            return {"loss": compiled(inputs, targets)[1] if chunked else plain_loss(compiled, inputs, targets)}

    accumulate = functools.partial(train.accumulate, loss_of)
    batch = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    return lambda: train.optimizer_step(optimizer, 1e-4, accumulate, batch)


def measure(attn, ingredients, table, arguments, device):
    fresh_memory(device)
    step = training_step(attn, ingredients, arguments, device)
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
