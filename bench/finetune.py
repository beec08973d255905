"""Speed and memory of a step of SFT and DPO: LoRA of rank 64 on the matrices lora.TARGETS of the 159M model.

python -m bench.finetune                       # SFT of 16 x 1024 tokens, DPO of 8 pairs of 256 + 256
python -m bench.finetune --attn v2 --stage dpo
python -m bench.finetune --preset 10b          # SFT of 8 x 2048 tokens, DPO of 4 pairs of 1024 + 1024

Rows have no padding, and SFT learns every token. step_ms is the time of a step on a batch that is on the GPU already.
loop_ms is the time of a step in the training loop, where another thread makes the batches. The speeds are the loop's.
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
from bench import LARGE, SMOKE, Table, loop_ms, median_ms, model_config, parse_arguments, peak_gib, quiet, reset_memory
from data.dataset import prefetch
from data.write import write_examples
from engine import parallel
from engine.settings import run_script
from model import ATTENTION, GPT

FLAGS = dict(
    preset=dict(default="ldiff", choices=("ldiff", "1b", "10b"), help="model: 159 million, 1 or 10 billion parameters"),
    attn=dict(nargs="+", default=["v2"], choices=list(ATTENTION), help="kinds of attention"),
    stage=dict(nargs="+", default=["sft", "dpo"], choices=("sft", "dpo"), help="SFT, DPO or both"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
)

STAGES = {"sft": (sft, sft.SFT), "dpo": (dpo, dpo.DPO)}

# tokens of the prompt, tokens of the answer, examples of a batch
SHAPES = {"sft": (0, 1024, 16), "dpo": (256, 256, 8)}
LARGE_SHAPES = {"sft": (0, 2048, 8), "dpo": (1024, 1024, 4)}  # for the presets 1b and 10b
SMOKE_SHAPES = {"sft": (0, 32, 2), "dpo": (8, 8, 2)}


def random_example(row, encoding, block_size):
    """Draw an example for write_examples; `row` is (tokens of the prompt, tokens of an answer, answers, seed)."""
    prompt, answer, answers, seed = row
    random = np.random.default_rng(seed)
    mask = [0] * prompt + [1] * answer
    return [(random.integers(256, size=prompt + answer).tolist(), mask) for _ in range(answers)]


def make_task(stage, attn, arguments, folder, device):
    """The task of SFT or DPO on random examples, with random weights."""
    script, task_class = STAGES[stage]
    shapes = SHAPES if arguments.preset == "ldiff" else LARGE_SHAPES
    prompt, answer, examples = (SMOKE_SHAPES if arguments.smoke else shapes)[stage]
    rows = [(prompt, answer, task_class.rows_per_example, seed) for seed in range(8 * examples)]
    write_examples(folder / "random" / stage, rows, random_example, "bytes", prompt + answer, "random")
    config = model_config(attn, prompt + answer, arguments.smoke, arguments.preset)
    weights = parallel.build_on_device(lambda: GPT(config), device).state_dict()
    checkpoint = {"model": weights, "config": asdict(config), "data": {"tokenizer": "bytes"}}
    checkpoint["path"] = folder / "best.pt"  # a tokenizer of its own would lie beside it
    settings = {"micro_batch_size": examples, **script.PRESETS[arguments.preset]}
    settings |= dict(preset=arguments.preset, attn=attn, dataset=f"{folder}/random", batch_size=examples)
    settings |= dict(device=arguments.device, compile=arguments.compile)
    return task_class(script.Settings(**settings), checkpoint)


def measure(stage, attn, arguments, device):
    reset_memory(device)
    if arguments.smoke:
        steps, options = 4, SMOKE
    else:
        steps, options = (42, dict(calls=20)) if arguments.preset == "ldiff" else (5, LARGE)
    with tempfile.TemporaryDirectory() as folder, quiet():
        task = make_task(stage, attn, arguments, Path(folder), device)
        optimizer = train.make_optimizer(task.model, weight_decay=0.0)
        reset_memory(device)  # without the weights of the checkpoint
        _, batch = next(iter(prefetch(task.get_batch, range(1, 2), device)))
        step_ms = median_ms(lambda: train.training_step(task, optimizer, 1e-4, batch), device, **options)
        ms = statistics.median(loop_ms(task, optimizer, steps) for _ in range(3))
    tokens = sum(idx.numel() for idx, *_ in batch)
    return dict(
        step_ms=step_ms, loop_ms=ms, tokens_per_s=1000 * tokens / ms,
        examples_per_s=1000 * task.settings.batch_size / ms, peak_gib=peak_gib(device),
    )  # fmt: skip


def main():
    arguments, device = parse_arguments("finetune", __doc__, **FLAGS)
    table = Table("finetune", arguments, device)
    for stage, attn in itertools.product(arguments.stage, arguments.attn):
        table.add(dict(stage=stage, attn=attn), measure, stage, attn, arguments, device)


if __name__ == "__main__":
    run_script(main)
