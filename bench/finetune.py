"""Speed and memory of a step of SFT and DPO: LoRA of rank 64 on the matrices lora.TARGETS of the 159M model.

python -m bench.finetune                       # SFT of 16 x 1024 tokens, DPO of 8 pairs of 256 + 256
python -m bench.finetune --attn v2 --stage dpo
python -m bench.finetune --preset 10b          # SFT of 8 x 2048 tokens, DPO of 4 pairs of 1024 + 1024

Rows have no padding; in SFT every token is learned. step_ms is a step on a batch that is on the GPU already, loop_ms
one of the training loop, which makes batches meanwhile; the speeds are the loop's.
"""

import itertools
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

import dpo
import sft
import train
from bench import LARGE, SMOKE, Table, fresh_memory, loop_ms, median_ms, model_config, parse_arguments, peak_gib, quiet
from data import run_script
from data.dataset import prefetch, write_examples
from model import ATTENTION, GPT

FLAGS = dict(
    preset=dict(default="ldiff", choices=("ldiff", "1b", "10b"), help="model: 159 million, 1 or 10 billion parameters"),
    attn=dict(nargs="+", default=["v2"], choices=list(ATTENTION), help="kinds of attention"),
    stage=dict(nargs="+", default=["sft", "dpo"], choices=("sft", "dpo"), help="SFT, DPO or both"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
)

STAGES = {"sft": (sft, sft.SFT, 1), "dpo": (dpo, dpo.DPO, 2)}  # script, run, answers to a prompt

# tokens of the prompt and of the answer, examples a step
SHAPES = {"sft": (0, 1024, 16), "dpo": (256, 256, 8)}
LARGE_SHAPES = {"sft": (0, 2048, 8), "dpo": (1024, 1024, 4)}  # of 1b and 10b
SMOKE_SHAPES = {"sft": (0, 32, 2), "dpo": (8, 8, 2)}


def random_rows(example, encoding, block_size):
    """For write_examples, of an example (tokens of the prompt, tokens of the answer, answers, seed)."""
    prompt, answer, answers, seed = example
    random = np.random.default_rng(seed)
    mask = [0] * prompt + [1] * answer
    return [(random.integers(256, size=prompt + answer).tolist(), mask) for _ in range(answers)]


def make_run(stage, attn, arguments, folder, device):
    """A run of SFT or DPO on random examples, from a model with random weights."""
    script, kind, answers = STAGES[stage]
    shapes = SHAPES if arguments.preset == "ldiff" else LARGE_SHAPES
    prompt, answer, examples = (SMOKE_SHAPES if arguments.smoke else shapes)[stage]
    rows = [(prompt, answer, answers, seed) for seed in range(8 * examples)]
    write_examples(folder / "random" / stage, rows, random_rows, "bytes", prompt + answer, "random")
    config = model_config(attn, prompt + answer, arguments.smoke, arguments.preset)
    with device:  # where random numbers are quick
        weights = GPT(config).state_dict()
    start = {"model": weights, "config": asdict(config), "data": {"tokenizer": "bytes"}}
    preset = {"micro_batch_size": examples, **script.PRESETS[arguments.preset]}
    own = dict(preset=arguments.preset, attn=attn, dataset=f"{folder}/random", batch_size=examples)
    own |= dict(device=arguments.device, compile=arguments.compile)
    return kind(script.Settings(**preset | own), start)


def measure(stage, attn, arguments, device):
    fresh_memory(device)
    if arguments.smoke:
        steps, few = 4, SMOKE
    else:
        steps, few = (42, dict(calls=20)) if arguments.preset == "ldiff" else (5, LARGE)
    with tempfile.TemporaryDirectory() as folder, quiet():
        run = make_run(stage, attn, arguments, Path(folder), device)
        fresh_memory(device)  # now without the weights that it began with
        _, batch = next(iter(prefetch(run.make_batch, range(1, 2), run.device)))
        step_ms = median_ms(lambda: train.optimizer_step(run.optimizer, 1e-4, run.accumulate, batch), device, **few)
        ms = statistics.median(loop_ms(run, steps) for _ in range(3))
    tokens = sum(idx.numel() for idx, *_ in batch)
    return dict(
        step_ms=step_ms, loop_ms=ms, tokens_per_s=1000 * tokens / ms,
        examples_per_s=1000 * run.settings.batch_size / ms, peak_gib=peak_gib(device),
    )  # fmt: skip


def main():
    arguments, device = parse_arguments("finetune", __doc__, **FLAGS)
    table = Table("finetune", arguments, device)
    for stage, attn in itertools.product(arguments.stage, arguments.attn):
        table.add(dict(stage=stage, attn=attn), measure, stage, attn, arguments, device)


if __name__ == "__main__":
    run_script(main)
