"""Speed and memory of a training step of the 159M model: forward, backward, clipping, AdamW.

python -m bench.pretrain                                  # the three attentions at 2048, 8192 and 32768 tokens
python -m bench.pretrain --attn v2 --length 2048 --profile 30
python -m bench.pretrain --attn v2 --length 2048 --loop   # what loading, logging and validation add

All tokens of a step are in memory at once. loop_ms is a step of the training loop, whose batches come from a file.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import train
from bench import Table, fresh_memory, loop_ms, median_ms, model_config, parse_arguments, peak_gib, quiet
from data import run_script
from data.dataset import write_dataset
from model import ATTENTION, ATTENTION_IMPLS, GPT

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    length=dict(nargs="+", type=int, default=[2048, 8192, 32768], help="context lengths"),
    tokens=dict(type=int, default=65536, help="tokens a step"),
    attn_impl=dict(default="auto", choices=ATTENTION_IMPLS, help="attention kernel"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile"),
    profile=dict(type=int, default=0, help="print the kernels of a step that take longest, so many"),
    loop=dict(action="store_true", help="measure train.py's loop too"),
)


def training_step(arguments, attn, length, device):
    """A function that takes one step on random tokens, and its model."""
    torch.manual_seed(1)
    config = dataclasses.replace(model_config(attn, length, arguments.smoke), attn_impl=arguments.attn_impl)
    model = GPT(config).to(device)
    compiled = train.compile_model(model) if train.wants_compile(arguments.compile, device) else model
    optimizer = train.make_optimizer(model, weight_decay=0.1)
    tokens = torch.randint(256, (arguments.tokens // length, length + 1), device=device)

    def loss_of(inputs, targets):
        with train.autocast(device):
            return {"loss": compiled(inputs, targets)[1]}

    accumulate = functools.partial(train.accumulate, loss_of)
    batch = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    return lambda: train.optimizer_step(optimizer, 1e-4, accumulate, batch), model


def measure(arguments, attn, length, device):
    fresh_memory(device)
    step, model = training_step(arguments, attn, length, device)
    ms = median_ms(step, device, **(dict(calls=2, runs=1, warmup=1) if arguments.smoke else {}))
    speed, peak = 1000 * arguments.tokens / ms, train.peak_flops(device)
    if arguments.profile:
        print_kernels(step, arguments.profile)
    mfu = speed * model.flops_per_token() / peak if peak else 0.0
    return dict(ms=ms, tokens_per_s=speed, mfu=mfu, peak_gib=peak_gib(device))


def print_kernels(step, count):
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    for kernel in kernels[:count]:
        print(f"    {kernel.self_device_time_total / 1000:7.2f} ms in {kernel.count:4d} calls of {kernel.key[:110]}")


def measure_loop(arguments, attn, length, device):
    """Milliseconds a step of train.py's loop, without and with its log, and the time that validation adds to that."""
    fresh_memory(device)
    text = "".join(map(chr, np.random.default_rng(1).integers(97, 123, size=50 * length)))
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_dataset(Path(folder) / "random", {"train": [text], "val": [text]}, "bytes", "random")
        size = arguments.tokens // length
        shape = {**train.PRESETS["tiny" if arguments.smoke else "ldiff"], "attn": attn, "block_size": length}
        shape |= train.SHAPES["tiny" if arguments.smoke else "ldiff", attn]
        settings = train.Settings(
            **{**shape, "batch_size": size, "micro_batch_size": size, "dataset": f"{folder}/random"},
            out_dir=folder, device=arguments.device, compile=arguments.compile,
        )  # fmt: skip
        run = train.Pretraining(settings)
        steps = 6 if arguments.smoke else 60
        loop_ms(run, 4)  # compiles
        plain = loop_ms(run, steps)
        log = train.Log(run)
        log.open(0)
        logged = loop_ms(run, steps, log)
        validation = median_ms(run.evaluate, device, calls=2, runs=1, warmup=1)
    return dict(loop_ms=plain, logged_ms=logged, validation=validation / (settings.eval_interval * logged))


def main():
    arguments = parse_arguments(__doc__, **FLAGS)
    device = train.choose_device(arguments.device)
    if arguments.smoke:
        arguments.tokens, arguments.length, arguments.loop = 256, [64, 128], True
    table = Table("pretrain", arguments, device)
    for length in arguments.length:
        for attn in arguments.attn:
            row = dict(attn=attn, T=length, B=arguments.tokens // length, **measure(arguments, attn, length, device))
            table.add(**row, **(measure_loop(arguments, attn, length, device) if arguments.loop else {}))
    table.write()


if __name__ == "__main__":
    run_script(main)
