"""Benchmarks: `python -m bench.NAME` prints a table and writes it to out/bench/NAME.json.

NAME is attention, pretrain, finetune, decode or table2. `--smoke` tries it on any machine. bench.runs trains the models
of docs/results.md, bench.probes and bench.retrieval measure them, and bench.figures draws them. bench.harness scores a
model in the tasks of lm_eval. bench.plot draws the logs of any runs.

A time is the median over runs of the median over calls, after a warm-up. CUDA events measure it on a GPU, the clock
elsewhere.
"""

import argparse
import contextlib
import gc
import io
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from engine.settings import Parser, UserError  # before torch, for Ctrl-C; isort: skip
import torch

import train
from data.dataset import prefetch
from engine import parallel
from engine.attention import flash_attn_func, kernels
from engine.device import autocast, choose_device, synchronize
from engine.graphs import compile_model
from model import GPT, GPTConfig, pad_vocab

GPT2_VOCAB = 50257
SMOKE = dict(calls=2, runs=1, warmup=1)  # options of median_ms
LARGE = dict(calls=5, runs=1)  # the same, for a model whose step takes seconds

# ---------------------------------------------------------------------------------------------------
# Arguments


def positive_int(text):
    """The type of a flag that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def parse_arguments(name, description, allow_torchrun=False, **flags):
    """Parse the command line of bench.NAME -> its arguments and its device.

    `flags` are {name: keywords of add_argument}.
    """
    if not allow_torchrun:
        parallel.refuse_torchrun()
    parser = Parser(description, prog=f"python -m bench.{name}")
    for flag, keywords in flags.items():
        if keywords.get("default") and "action" not in keywords:
            keywords = {**keywords, "help": f"{keywords['help']} (default: %(default)s)"}
        parser.add_argument(f"--{flag}", **keywords)
    parser.add_argument("--smoke", action="store_true", help="few calls, of small shapes instead of those asked for")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", default="out/bench", help="folder of the JSON file (default: %(default)s)")
    arguments = parser.parse_args()
    return arguments, choose_device(arguments.device)


def batch_size(tokens, length):
    """The number of sequences in a batch of so many tokens. Raises UserError if the processes cannot share them."""
    if tokens % (length * parallel.WORLD_SIZE):
        times = f" times {parallel.WORLD_SIZE} processes" if parallel.WORLD_SIZE > 1 else ""
        raise UserError(f"--tokens {tokens} is not a multiple of --length {length}{times}")
    return tokens // length


# ---------------------------------------------------------------------------------------------------
# What is measured


def preset_shape(preset, attn):
    """The settings of train.py that a preset has for an attention."""
    shapes = train.SHAPES[preset]
    return {**train.PRESETS[preset], **shapes.get(attn, shapes["vanilla"]), "attn": attn, "preset": preset}


def model_config(attn, block_size, smoke, preset="ldiff", attn_impl="auto", half_kv=False):
    """The GPTConfig of a preset's model, with GPT-2's vocabulary. In a smoke test, the tiny model with one of bytes.

    With half_kv, the upper half of its layers shares keys and values, and a wider SwiGLU keeps the parameters equal.
    """
    settings = train.Settings(**preset_shape("tiny" if smoke else preset, attn))
    shape = {name: getattr(settings, name) for name in train.MODEL_FLAGS}
    shape |= dict(n_kv_head=settings.n_kv_head or settings.n_head, block_size=block_size, attn_impl=attn_impl)
    if half_kv:
        shape["n_kv_layers"] = settings.n_layer // 2
        shape["n_inner"] += shape["n_kv_head"] * settings.head_dim // 3  # 2 matrices in half the layers, 3 in all
    return GPTConfig(**shape, vocab_size=pad_vocab(257 if smoke else GPT2_VOCAB))


def chunked_loss(model, inputs, targets):
    return model(inputs, targets)[1]


def training_step(config, tokens, device, compile, loss=chunked_loss, activation_checkpointing=False):
    """Build a model -> a function that takes a training step, always on the same random tokens, and the model."""
    torch.manual_seed(1)

    def build():
        return GPT(config).set_activation_checkpointing(activation_checkpointing)

    model = parallel.build_on_device(build, device)
    compiled = compile_model(model, compile, device)
    optimizer = train.make_optimizer(model, weight_decay=0.1)
    rows = batch_size(tokens, config.block_size) // parallel.WORLD_SIZE
    ids = torch.randint(256, (rows, config.block_size + 1), device=device)
    micro_batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]

    def task_loss(inputs, targets):
        with autocast(device):
            return {"loss": loss(compiled, inputs, targets)}

    task = SimpleNamespace(loss=task_loss, device=device, graphed=None)
    return lambda: train.training_step(task, optimizer, 1e-4, micro_batches), model


# ---------------------------------------------------------------------------------------------------
# Time and memory


def median_ms(function, device, calls=10, runs=3, warmup=3):
    """The milliseconds that one call of `function` takes."""
    for _ in range(warmup):
        function()
    return statistics.median(statistics.median(_timed_calls(function, device, calls)) for _ in range(runs))


def _timed_calls(function, device, calls):
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(calls):
            function()
            marks.append(time.perf_counter())
        return [1000 * (after - before) for before, after in zip(marks, marks[1:])]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:])]


def loop_ms(task, optimizer, steps, log=None):
    """The milliseconds that a step takes in a loop like train.fit, where another thread makes the batches.

    With `log`, the loop also writes it. The first two of the steps, of which there are at least 3, do not count.
    """
    batches = prefetch(task.get_batch, range(1, steps + 1), task.device)
    for step, (count, micro_batches) in enumerate(batches, start=1):
        if step == 3:
            synchronize(task.device)
            started = time.perf_counter()
        row = train.training_step(task, optimizer, 1e-4, micro_batches)
        if log:
            log.add({"step": step, "lr": 1e-4, "count": count} | row)
            if step % task.settings.log_interval == 0:
                log.flush()
    synchronize(task.device)
    return 1000 * (time.perf_counter() - started) / (steps - 2)


def reset_memory(device):
    """Free what earlier measurements have left: memory, its peak, and compiled programs."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device):
    """The peak of the GPU memory in tensors since reset_memory(), in GiB. None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


# ---------------------------------------------------------------------------------------------------
# Output


@contextlib.contextmanager
def quiet():
    """Keep what is printed off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def environment(device):
    """What a measurement depends on, besides the code."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "command": " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": gpu or f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "processes": parallel.WORLD_SIZE,
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "triton": kernels and kernels.triton.__version__, "flash_attn": flash_attn_func is not None,
    }  # fmt: skip


class Table:
    """Rows of {column: value}. Each is printed as Markdown when it is added, and all are kept in a JSON file."""

    def __init__(self, name, arguments, device):
        self.path = Path(arguments.out) / f"{name}{'-smoke' if arguments.smoke else ''}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.environment = [], environment(device)
        print("  ".join(f"{key}={value}" for key, value in self.environment.items()))
        print(f"written to {self.path}:\n")

    def add(self, labels, measure, *arguments):
        """Add a row of `labels` and of what measure(*arguments) returns, or of a note if it runs out of memory."""
        try:
            row = labels | measure(*arguments)
        except torch.OutOfMemoryError:
            if parallel.WORLD_SIZE > 1:  # the others would wait for this process
                raise
            row = labels | {"note": "out of memory"}
        if not self.rows:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(map(format_value, row.values())) + " |", flush=True)
        self.rows.append(row)
        if parallel.RANK == 0:
            self.path.write_text(json.dumps(self.environment | {"rows": self.rows}, indent=1) + "\n")


def format_value(value):
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
