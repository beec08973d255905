"""Speed and memory of a training step of the 159M model: forward, backward, clipping, AdamW.

python -m bench.pretrain                                  # the three attentions at 2048, 8192 and 32768 tokens
python -m bench.pretrain --attn v2 --length 2048 --profile 30
"""

import dataclasses
import functools

import torch
from torch.profiler import ProfilerActivity, profile

import train
from bench import Table, fresh_memory, median_ms, parse_arguments, peak_gib
from data import run_script
from model import ATTENTION, ATTENTION_IMPLS, GPT

FLAGS = dict(
    attn=dict(nargs="+", default=list(ATTENTION), choices=list(ATTENTION), help="kinds of attention"),
    length=dict(nargs="+", type=int, default=[2048, 8192, 32768], help="context lengths"),
    tokens=dict(type=int, default=65536, help="tokens a step, all in memory at once"),
    attn_impl=dict(default="auto", choices=ATTENTION_IMPLS, help="attention kernel"),
    compile=dict(default="auto", choices=("auto", "on", "off"), help="torch.compile"),
    profile=dict(type=int, default=0, help="print the kernels of a step that take longest, so many"),
)


def training_step(arguments, attn, length, device):
    """A function that takes one step on random tokens, and its model."""
    preset = "tiny" if arguments.smoke else "ldiff"
    settings = train.Settings(**{**train.PRESETS[preset], **train.SHAPES[preset, attn], "attn": attn})
    settings = dataclasses.replace(settings, block_size=length, attn_impl=arguments.attn_impl)
    torch.manual_seed(settings.seed)
    model = GPT(train.build_config(settings, vocab_size=257 if arguments.smoke else 50257)).to(device)
    compiled = torch.compile(model) if train.wants_compile(arguments.compile, device) else model
    optimizer = train.make_optimizer(model, settings.weight_decay)
    tokens = torch.randint(256, (arguments.tokens // length, length + 1), device=device)

    def loss_of(inputs, targets):
        with train.autocast(device):
            return {"loss": compiled(inputs, targets)[1]}

    accumulate = functools.partial(train.accumulate, loss_of)
    batch = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    return lambda: train.optimizer_step(optimizer, 1e-4, accumulate, batch), model


def print_kernels(step, count):
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    for kernel in kernels[:count]:
        print(f"    {kernel.self_device_time_total / 1000:7.2f} ms in {kernel.count:4d} calls of {kernel.key[:110]}")


def main():
    arguments = parse_arguments(__doc__, **FLAGS)
    device = train.choose_device(arguments.device)
    if arguments.smoke:
        arguments.tokens, arguments.length = 256, [64, 128]
    table, peak = Table("pretrain", arguments, device), train.peak_flops(device)
    for length in arguments.length:
        for attn in arguments.attn:
            fresh_memory(device)
            step, model = training_step(arguments, attn, length, device)
            ms = median_ms(step, device, **(dict(calls=2, runs=1, warmup=1) if arguments.smoke else {}))
            speed = arguments.tokens / ms * 1000
            mfu = f"{speed * model.flops_per_token() / peak:.1%}" if peak else ""
            table.add(
                attn=attn, T=length, B=arguments.tokens // length, ms=ms,
                tokens_per_s=speed, mfu=mfu, peak_gib=peak_gib(device),
            )  # fmt: skip
            if arguments.profile:
                print_kernels(step, arguments.profile)
            del step, model
    table.write()


if __name__ == "__main__":
    run_script(main)
