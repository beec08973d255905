"""Speed and memory of a step of SFT and DPO: LoRA of rank 64 on the matrices lora.TARGETS of the 159M model.

python -m bench.finetune                       # SFT of 16 x 1024 tokens, DPO of 8 pairs of 256 + 256
python -m bench.finetune --attn v2 --stage dpo

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
from bench import SMOKE, Table, fresh_memory, loop_ms, median_ms, model_config, parse_arguments, peak_gib, quiet
from data import run_script
from data.dataset import prefetch, write_examples
from model import ATTENTION, GPT

FLAGS = dict(
    attn=dict(nargs="+", default=["v2"], choices=list(ATTENTION), help="kinds of attention"),
    stage=dict(nargs="+", default=["sft", "dpo"], choices=("sft", "dpo"), help="SFT, DPO or both"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
)

STAGES = {"sft": (sft.Settings, sft.SFT, 1), "dpo": (dpo.Settings, dpo.DPO, 2)}  # settings, run, answers to a prompt

# tokens of the prompt and of the answer, examples a step
SHAPES = {"sft": (0, 1024, 16), "dpo": (256, 256, 8)}
SMOKE_SHAPES = {"sft": (0, 32, 2), "dpo": (8, 8, 2)}


def random_rows(example, encoding, block_size):
    """For write_examples, of an example (tokens of the prompt, tokens of the answer, answers, seed)."""
    prompt, answer, answers, seed = example
    random = np.random.default_rng(seed)
    mask = [0] * prompt + [1] * answer
    return [(random.integers(256, size=prompt + answer).tolist(), mask) for _ in range(answers)]


def make_run(stage, attn, arguments, folder):
    """A run of SFT or DPO on random examples, from a model with random weights."""
    settings_class, kind, answers = STAGES[stage]
    prompt, answer, examples = (SMOKE_SHAPES if arguments.smoke else SHAPES)[stage]
    rows = [(prompt, answer, answers, seed) for seed in range(8 * examples)]
    write_examples(folder / "random" / stage, rows, random_rows, "bytes", prompt + answer, "random")
    config = model_config(attn, prompt + answer, arguments.smoke)
    start = {"model": GPT(config).state_dict(), "config": asdict(config), "data": {"tokenizer": "bytes"}}
    settings = settings_class(
        attn=attn, dataset=f"{folder}/random", batch_size=examples, micro_batch_size=examples,
        device=arguments.device, compile=arguments.compile,
    )  # fmt: skip
    return kind(settings, start)


def measure(stage, attn, arguments, device):
    fresh_memory(device)
    steps, few = (4, SMOKE) if arguments.smoke else (42, dict(calls=20))
    with tempfile.TemporaryDirectory() as folder, quiet():
        run = make_run(stage, attn, arguments, Path(folder))
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
