"""Speed and memory of a training step: forward, backward, clipping, AdamW.

python -m bench.pretrain                                  # the three attentions at 2048, 8192 and 32768 tokens
python -m bench.pretrain --attn v2 --length 2048 --profile 30
python -m bench.pretrain --attn v2 --length 2048 --loop   # what loading, logging and validation add
torchrun --standalone --nproc_per_node=2 -m bench.pretrain --preset 10b --attn v2 --length 2048 --tokens 32768

All tokens of a step are in memory at once, with several processes in equal parts.
"""

import itertools
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import parallel
import train
from bench import (
    LARGE,
    SMOKE,
    Table,
    batch_size,
    count,
    fresh_memory,
    loop_ms,
    median_ms,
    model_config,
    parse_arguments,
    peak_gib,
    quiet,
    training_step,
)
from data import UserError, run_script
from data.dataset import write_dataset
from model import ATTENTION, ATTENTION_IMPLS

FLAGS = dict(
    preset=dict(default="ldiff", choices=("ldiff", "1b", "10b"), help="model: 159 million, 1 or 10 billion parameters"),
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    length=dict(nargs="+", type=count, default=[2048, 8192, 32768], help="context lengths"),
    tokens=dict(type=count, default=65536, help="tokens a step; the batch is tokens / length"),
    attn_impl=dict(default="auto", choices=ATTENTION_IMPLS, help="attention kernel"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: with a GPU"),
    profile=dict(type=count, metavar="N", help="list the N kernels that take most of a step"),
    loop=dict(action="store_true", help="time train.py's own loop too: loading, logging, validation"),
)


def measure(attn, length, arguments, device):
    fresh_memory(device)
    config = model_config(attn, length, arguments.smoke, arguments.preset, arguments.attn_impl)
    recompute = train.PRESETS[arguments.preset].get("activation_checkpointing", False)
    step, model = training_step(config, arguments.tokens, device, arguments.compile, recompute=recompute)
    usual = {} if arguments.preset == "ldiff" else LARGE
    ms = median_ms(step, device, **(SMOKE if arguments.smoke else usual))
    speed, peak = 1000 * arguments.tokens / ms, train.peak_flops(device)
    mfu = speed * model.flops_per_token() / peak if peak else None
    figures = dict(step_ms=ms, tokens_per_s=speed, mfu=mfu, peak_gib=peak_gib(device))
    if arguments.profile:
        print_kernels(step, arguments.profile)
    if arguments.loop:
        del step, model
        figures |= measure_loop(attn, length, arguments, device)
    return figures


def print_kernels(step, most):
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    for kernel in kernels[:most]:
        print(f"    {kernel.self_device_time_total / 1000:7.2f} ms in {kernel.count:4d} calls of {kernel.key[:110]}")


class RandomPretraining(train.Pretraining):
    """A model of the usual vocabulary on random bytes."""

    def load_data(self):
        super().load_data()
        if self.settings.preset != "tiny":
            self.encoding = SimpleNamespace(n_vocab=50257)


def measure_loop(attn, length, arguments, device):
    """Milliseconds a step of train.py's loop, without and with its log, and the share of time that validation adds."""
    fresh_memory(device)
    preset, B = "tiny" if arguments.smoke else arguments.preset, batch_size(arguments.tokens, length)
    text = "".join(map(chr, np.random.default_rng(1).integers(97, 123, size=70 * length)))
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_dataset(Path(folder) / "random", {"train": [text], "val": [text]}, "bytes", "random")
        shape = {**train.PRESETS[preset], **train.shape_of(preset, attn), "attn": attn, "block_size": length}
        own = dict(preset=preset, dataset=f"{folder}/random", out_dir=folder, batch_size=B, micro_batch_size=B)
        own |= dict(device=arguments.device, compile=arguments.compile, attn_impl=arguments.attn_impl)
        run = RandomPretraining(train.Settings(**{**shape, **own}))
        log, steps, runs = train.Log(run), *((4, 1) if arguments.smoke else (22, 3))
        log.open(0)
        loop_ms(run, 3)  # compiles
        plain = statistics.median(loop_ms(run, steps) for _ in range(runs))
        logged = statistics.median(loop_ms(run, steps, log) for _ in range(runs))
        validation = median_ms(run.evaluate, device, calls=2, runs=1, warmup=1)
    share = validation / (run.settings.eval_interval * logged)
    return dict(loop_ms=plain, logged_ms=logged, validation_share=share)


def main():
    arguments, device = parse_arguments("pretrain", __doc__, several=True, **FLAGS)
    if arguments.profile and device.type != "cuda":
        raise UserError("--profile lists the kernels of a GPU, and the device is a CPU")
    train.check_kernel(arguments.attn_impl, device)
    if arguments.smoke:
        arguments.tokens, arguments.length, arguments.loop = 256, [64], True
    with parallel.started():
        table = Table("pretrain", arguments, device)
        for length, attn in itertools.product(arguments.length, arguments.attn):
            labels = dict(attn=attn, T=length, B=batch_size(arguments.tokens, length))
            table.add(labels, measure, attn, length, arguments, device)


if __name__ == "__main__":
    run_script(main)
