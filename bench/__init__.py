"""Benchmarks: `python -m bench.NAME` prints a table and writes it to out/bench/NAME.json; --smoke tries it anywhere.
NAME is attention, pretrain, finetune, decode or table2; runs and figures have other outputs, and probes is for them.

A time is the median over runs of the median over calls, after a warm-up: CUDA events on a GPU, the clock elsewhere.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import model
import parallel
import train
from data import Parser, UserError
from data.dataset import prefetch
from model import GPT

SMOKE = dict(calls=2, runs=1, warmup=1)  # for median_ms
LARGE = dict(calls=5, runs=1)  # of a model whose step takes seconds


def count(text):
    """The type of a flag that is a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def parse_arguments(name, description, several=False, **flags):
    """The arguments of bench.NAME, whose `flags` are {name: keywords of add_argument}, and its device. Only with
    `several` it may run in several processes."""
    if not several:
        parallel.refuse_several()
    parser = Parser(description, prog=f"python -m bench.{name}")
    for flag, keywords in flags.items():
        if keywords.get("default") and "action" not in keywords:
            keywords = {**keywords, "help": f"{keywords['help']} (default: %(default)s)"}
        parser.add_argument(f"--{flag}", **keywords)
    parser.add_argument("--smoke", action="store_true", help="small shapes in place of those asked for, few calls")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", default="out/bench", help="folder of the JSON file (default: %(default)s)")
    arguments = parser.parse_args()
    return arguments, train.choose_device(arguments.device)


def batch_size(tokens, length):
    if tokens % (length * parallel.PROCESSES):
        times = f" times {parallel.PROCESSES} processes" * (parallel.PROCESSES > 1)
        raise UserError(f"--tokens {tokens} is not a multiple of --length {length}{times}")
    return tokens // length


def model_config(attn, block_size, smoke, preset="ldiff", attn_impl="auto"):
    """The shape of a preset's model, or to try things of the tiny one."""
    preset = "tiny" if smoke else preset
    shape = {**train.PRESETS[preset], **train.shape_of(preset, attn), "attn": attn, "block_size": block_size}
    return train.build_config(train.Settings(**shape, attn_impl=attn_impl), vocab_size=257 if smoke else 50257)


def chunked_loss(model, inputs, targets):
    return model(inputs, targets)[1]


def training_step(config, tokens, device, compile, loss=chunked_loss, recompute=False):
    """A function that takes a training step of a new model on the same random tokens, and the model."""
    torch.manual_seed(1)

    def build():
        on = torch.get_default_device()  # meta, if parallel.shard wants shapes only
        with on if on.type == "meta" else device:  # a GPU draws random numbers quickly
            model = GPT(config)
        return model.checkpoint_activations() if recompute else model

    model, compiled = train.place(build, device, train.wants_compile(compile, device))
    optimizer = train.make_optimizer(model, weight_decay=0.1)
    rows = batch_size(tokens, config.block_size) // parallel.PROCESSES
    ids = torch.randint(256, (rows, config.block_size + 1), device=device)
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]

    def loss_of(inputs, targets):
        with train.autocast(device):
            return {"loss": loss(compiled, inputs, targets)}

    accumulate = functools.partial(train.accumulate, loss_of)
    return lambda: train.optimizer_step(optimizer, 1e-4, accumulate, batch), model


def median_ms(work, device, calls=10, runs=3, warmup=3):
    """Milliseconds that one call of `work` takes."""
    for _ in range(warmup):
        work()
    return statistics.median(statistics.median(_timed_calls(work, device, calls)) for _ in range(runs))


def _timed_calls(work, device, calls):
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(calls):
            work()
            marks.append(time.perf_counter())
        return [1000 * (after - before) for before, after in zip(marks, marks[1:])]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:])]


def loop_ms(run, steps, log=None):
    """Milliseconds a step of a loop like train.fit, whose batches another thread makes, with its log if given. The
    first two of the steps, at least 3, are not counted."""
    for step, (work, micro_batches) in enumerate(prefetch(run.make_batch, range(1, steps + 1), run.device), start=1):
        if step == 3:
            train.synchronize(run.device)
            started = time.perf_counter()
        measured = train.optimizer_step(run.optimizer, 1e-4, run.accumulate, micro_batches)
        if log:
            log.rows.append(dict(step=step, lr=1e-4, work=work, **measured))
            if step % run.settings.log_interval == 0:
                log.flush()
    train.synchronize(run.device)
    return 1000 * (time.perf_counter() - started) / (steps - 2)


@contextlib.contextmanager
def quiet():
    """Keep what is printed off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def fresh_memory(device):
    """Forget what earlier measurements left: memory, its peak, and compiled programs."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device):
    """The most GPU memory that tensors took since fresh_memory, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def environment(device):
    """What a figure depends on, beside the code."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "command": " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": gpu or f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "processes": parallel.PROCESSES,
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "triton": model.kernels and model.kernels.triton.__version__, "flash_attn": model.flash_attn_func is not None,
    }  # fmt: skip


class Table:
    """Rows of {column: value}, printed as Markdown while they come, and kept in a JSON file."""

    def __init__(self, name, arguments, device):
        self.path = Path(arguments.out) / f"{name}{'-smoke' if arguments.smoke else ''}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.about = [], environment(device)
        print("  ".join(f"{key}={value}" for key, value in self.about.items()))
        print(f"written to {self.path}:\n")

    def add(self, labels, measure, *arguments):
        """A row of `labels` and what measure(*arguments) returns; "out of memory" if it runs out of it."""
        try:
            row = labels | measure(*arguments)
        except torch.OutOfMemoryError:
            if parallel.PROCESSES > 1:  # the others would wait for this one
                raise
            row = labels | {"note": "out of memory"}
        if not self.rows:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(map(_short, row.values())) + " |", flush=True)
        self.rows.append(row)
        if parallel.RANK == 0:
            self.path.write_text(json.dumps(self.about | {"rows": self.rows}, indent=1) + "\n")


def _short(value):
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
