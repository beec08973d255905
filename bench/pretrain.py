"""Speed and memory of a training step: forward, backward, clipping, AdamW.

python -m bench.pretrain                                  # the three attentions at 2048, 8192 and 32768 tokens
python -m bench.pretrain --attn v2 --length 2048 --profile 30
python -m bench.pretrain --attn v2 --length 2048 --loop   # what loading, logging and validation add
torchrun --standalone --nproc_per_node=2 -m bench.pretrain --preset 10b --attn v2 --length 2048 --tokens 32768

All tokens of a step are in memory at once. Several processes have equal parts of them.
"""

import itertools
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import train
from bench import (
    GPT2_VOCAB,
    LARGE,
    SMOKE,
    Table,
    batch_size,
    loop_ms,
    median_ms,
    model_config,
    parse_arguments,
    peak_gib,
    positive_int,
    preset_shape,
    quiet,
    reset_memory,
    training_step,
)
from data.write import write_dataset
from engine import parallel
from engine.attention import ATTENTION_IMPLS, check_impl
from engine.device import peak_flops
from engine.graphs import COMPILE_MODES
from engine.log import Log, flops_per_token
from engine.settings import UserError, run_script
from model import ATTENTION, pad_vocab

FLAGS = dict(
    preset=dict(default="ldiff", choices=("ldiff", "1b", "10b"), help="model: 159 million, 1 or 10 billion parameters"),
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    length=dict(nargs="+", type=positive_int, default=[2048, 8192, 32768], help="context lengths"),
    tokens=dict(type=positive_int, default=65536, help="tokens of a batch, which has tokens / length rows"),
    attn_impl=dict(default="auto", choices=ATTENTION_IMPLS, help="attention kernel"),
    compile=dict(default="auto", choices=COMPILE_MODES, help="torch.compile, as in train.py"),
    profile=dict(type=positive_int, metavar="N", help="list the N kernels that take most of a step's time"),
    loop=dict(action="store_true", help="also time train.py's own loop: loading, logging, validation"),
)


def measure(attn, length, arguments, device):
    reset_memory(device)
    config = model_config(attn, length, arguments.smoke, arguments.preset, arguments.attn_impl)
    checkpointing = train.PRESETS[arguments.preset].get("activation_checkpointing", False)
    step, model = training_step(
        config, arguments.tokens, device, arguments.compile, activation_checkpointing=checkpointing
    )
    options = {} if arguments.preset == "ldiff" else LARGE
    ms = median_ms(step, device, **(SMOKE if arguments.smoke else options))
    speed, peak = 1000 * arguments.tokens / ms, peak_flops(device)
    mfu = speed * flops_per_token(model) / peak if peak else None
    row = dict(step_ms=ms, tokens_per_s=speed, mfu=mfu, peak_gib=peak_gib(device))
    if arguments.profile:
        print_kernels(step, arguments.profile)
    if arguments.loop:
        del step, model
        row |= measure_loop(attn, length, arguments, device)
    return row


def print_kernels(step, count):
    """Print the GPU kernels that take most of a step's time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    for kernel in kernels[:count]:
        print(f"    {kernel.self_device_time_total / 1000:7.2f} ms in {kernel.count:4d} calls of {kernel.key[:110]}")


def measure_loop(attn, length, arguments, device):
    """Time a step of train.py's loop on random bytes, without its log and with it, and the share of validation.

    The model has GPT-2's vocabulary, except in a smoke test.
    """
    reset_memory(device)
    preset, B = "tiny" if arguments.smoke else arguments.preset, batch_size(arguments.tokens, length)
    text = "".join(map(chr, np.random.default_rng(1).integers(97, 123, size=70 * length)))
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_dataset(Path(folder) / "random", {"train": [text], "val": [text]}, "bytes", "random")
        settings = preset_shape(preset, attn) | dict(dataset=f"{folder}/random", out_dir=folder, block_size=length)
        settings |= dict(batch_size=B, micro_batch_size=B, attn_impl=arguments.attn_impl)
        settings |= dict(device=arguments.device, compile=arguments.compile)
        with mock.patch.object(train, "pad_vocab", lambda n: pad_vocab(n if arguments.smoke else GPT2_VOCAB)):
            task = train.Pretraining(train.Settings(**settings))
        optimizer = train.make_optimizer(task.model, task.settings.weight_decay)
        log, steps, runs = Log(task), *((4, 1) if arguments.smoke else (22, 3))
        log.open(0)
        loop_ms(task, optimizer, 3)  # compiles
        plain = statistics.median(loop_ms(task, optimizer, steps) for _ in range(runs))
        logged = statistics.median(loop_ms(task, optimizer, steps, log) for _ in range(runs))
        validation = median_ms(task.evaluate, device, calls=2, runs=1, warmup=1)
    share = validation / (task.settings.eval_interval * logged)
    return dict(loop_ms=plain, logged_ms=logged, validation_share=share)


def main():
    arguments, device = parse_arguments("pretrain", __doc__, allow_torchrun=True, **FLAGS)
    if arguments.profile and device.type != "cuda":
        raise UserError("--profile lists the kernels of a GPU, and the device is a CPU")
    check_impl(arguments.attn_impl, device)
    if arguments.smoke:
        arguments.tokens, arguments.length, arguments.loop = 256, [64], True
    with parallel.process_group():
        table = Table("pretrain", arguments, device)
        for length, attn in itertools.product(arguments.length, arguments.attn):
            labels = dict(attn=attn, T=length, B=batch_size(arguments.tokens, length))
            table.add(labels, measure, attn, length, arguments, device)


if __name__ == "__main__":
    run_script(main)
