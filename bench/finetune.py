"""Speed and memory of a step of SFT and DPO: LoRA of rank 64 on all matrices of the 159M model.

python -m bench.finetune                       # SFT of 16 x 1024 tokens, DPO of 8 pairs of 256 + 256
python -m bench.finetune --attn v2 --stage dpo

Rows have no padding, and of SFT all tokens are learned. step_ms is a step on a batch that is on the GPU already,
loop_ms one of the training loop, which makes batches meanwhile.
"""

import itertools
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

import dpo
import sft
import train
from bench import Table, fresh_memory, loop_ms, median_ms, model_config, parse_arguments, peak_gib, quiet
from data import run_script
from data.dataset import prefetch, write_examples
from model import ATTENTION, GPT

FLAGS = dict(
    attn=dict(nargs="+", default=["v2"], choices=list(ATTENTION), help="kinds of attention"),
    stage=dict(nargs="+", default=["sft", "dpo"], choices=("sft", "dpo"), help="SFT, DPO or both"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile"),
)

# tokens of the prompt and of the answer, examples a step
SHAPES = {"sft": (0, 1024, 16), "dpo": (256, 256, 8)}
SMOKE_SHAPES = {"sft": (0, 32, 2), "dpo": (8, 8, 2)}


def random_rows(seed, encoding, block_size):
    """For write_examples: `seed` is the lengths of prompt and answer and the number of answers, and a seed."""
    prompt, answer, answers, seed = seed
    random = np.random.default_rng(seed)
    mask = [0] * prompt + [1] * answer
    return [(random.integers(256, size=prompt + answer).tolist(), mask) for _ in range(answers)]


def make_run(stage, attn, arguments, folder):
    """A run of SFT or DPO on random examples, from a model with random weights."""
    prompt, answer, batch_size = (SMOKE_SHAPES if arguments.smoke else SHAPES)[stage]
    seeds = [(prompt, answer, 1 if stage == "sft" else 2, number) for number in range(8 * batch_size)]
    write_examples(folder / "random" / stage, seeds, random_rows, "bytes", prompt + answer, "random")
    config = model_config(attn, prompt + answer, arguments.smoke)
    start = {"model": GPT(config).state_dict(), "config": asdict(config), "data": {"tokenizer": "bytes"}}
    script = sft if stage == "sft" else dpo
    settings = script.Settings(
        attn=attn, dataset=f"{folder}/random", batch_size=batch_size, micro_batch_size=batch_size,
        device=arguments.device, compile=arguments.compile,
    )  # fmt: skip
    return (sft.SFT if stage == "sft" else dpo.DPO)(settings, start)


def measure(stage, attn, arguments, device):
    fresh_memory(device)
    few = dict(calls=2, runs=1, warmup=1) if arguments.smoke else dict(calls=20)
    with tempfile.TemporaryDirectory() as folder, quiet():
        run = make_run(stage, attn, arguments, Path(folder))
        _, batch = next(iter(prefetch(run.make_batch, range(1, 2), run.device)))
        step_ms = median_ms(lambda: train.optimizer_step(run.optimizer, 1e-4, run.accumulate, batch), device, **few)
        ms = loop_ms(run, 4 if arguments.smoke else 60)
    tokens = sum(idx.numel() for idx, *_ in batch)
    return dict(
        step_ms=step_ms, loop_ms=ms, tokens_per_s=1000 * tokens / ms,
        examples_per_s=1000 * run.settings.batch_size / ms, peak_gib=peak_gib(device),
    )  # fmt: skip


def main():
    arguments = parse_arguments(__doc__, **FLAGS)
    device = train.choose_device(arguments.device)
    table = Table("finetune", arguments, device)
    for stage, attn in itertools.product(arguments.stage, arguments.attn):
        table.add(stage=stage, attn=attn, **measure(stage, attn, arguments, device))
    table.write()


if __name__ == "__main__":
    run_script(main)
