"""What a run prints and logs: its description, a row of log.csv for every step, lines on the screen, a summary."""

import contextlib
import csv
import math
import os
import statistics
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from engine import parallel
from engine.device import peak_flops, synchronize
from engine.files import atomic_write
from engine.graphs import wants_compile
from engine.settings import UserError
from engine.terminal import printable

WIDTH = 80  # columns of a terminal
MAX_SKIPPED = 10  # skipped steps in a row that end a run


def flops_per_token(model, T=None):
    """Return the floating-point operations of one training token, forward and backward, in sequences of T tokens.

    T is block_size by default. Each weight in a matrix product and each multiplication in the attention counts 6. The
    attention's are those of the algorithm for every pair of tokens, in units of n_head * head_dim: vanilla 2 (scores
    and values), V1 3 (its values are twice as wide), V2 4 (twice the heads). Padding is not counted.
    """
    config, attn = model.config, model.layers[0].attn
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    visible = (T or config.block_size) / 2  # keys a causal token sees on average
    products = attn.q_per_head * (1 + attn.value_width) * config.n_head * config.head_dim * visible
    return 6 * (weights + config.n_layer * products)


class Diverged(UserError):
    """The run no longer learns."""


def describe(task):
    """Print the settings of a run, its data and its model."""
    settings = "  ".join(f"{name}={value}" for name, value in asdict(task.settings).items())
    print_line(f"settings: {settings}")
    meta, unit = task.meta, "examples" if "examples" in task.meta else "tokens"
    counts = ", ".join(f"{count:,} {split}" for split, count in meta[unit].items())
    print_line(f"data: {meta['source']} ({counts} {unit}, {meta['tokenizer']} tokenizer)")
    machines = {"cpu": f"CPU, {torch.get_num_threads()} threads", "mps": "Apple GPU"}
    machine = machines.get(task.device.type) or torch.cuda.get_device_name(task.device)
    if parallel.WORLD_SIZE > 1:
        machine = f"{parallel.WORLD_SIZE} x {machine}"
    if task.settings.warmup_steps >= task.settings.max_steps:
        print("all steps are warmup: a lower --warmup_steps lets the learning rate reach its peak and fall again")
    parameters = list(task.model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    size = f"{si(total)} parameters" + (f", {si(trained)} of them trained" if trained < total else "")
    if task.flops_per_unit:
        size += f", {si(task.flops_per_unit)} FLOPs a {task.unit.removesuffix('s')}"
    print_line(f"model: {task.model.config.attn}, {size}, on {machine}")
    if wants_compile(task.settings.compile, task.device):
        by_layer = getattr(task, "compiled", task.model) is task.model
        seconds = 25 if not by_layer else 15 if trained < total else 10  # layers with adapters take longer
        print_line(f"compiling before the first step: about {seconds} s on an H200, less in a second run")


class Log:
    """The log of a run. Keeps losses on the device and reads them every log_interval steps.

    So the GPU never waits for the CPU to catch up. The clock leaves out validation and saving. A task has a `unit`
    whose count a second is its speed ("tokens"), and names of `metrics` beside the loss.
    """

    def __init__(self, task):
        settings, self.device, self.unit, self.metrics = task.settings, task.device, task.unit, task.metrics
        self.path, self.max_steps = Path(settings.out_dir) / "log.csv", settings.max_steps
        self.flops, self.peak = task.flops_per_unit, peak_flops(task.device)
        self.columns = ["step", "loss", *self.metrics, "grad_norm", "skipped", "lr", f"{self.unit}_per_s", "mfu"]
        self.columns += [f"val_{name}" for name in ("loss", *self.metrics)]
        self.rows, self.speeds, self.started = [], [], time.perf_counter()  # rows: those not written yet
        self.began, self.skipped, self.skipped_in_a_row = self.started, 0, 0

    def open(self, step, metrics=None):
        """Begin log.csv, or keep its rows up to `step`: an interrupted run repeats those after its checkpoint.

        `metrics` are those of the validation before the first step, for a row 0.
        """
        rows, kept = [{"step": 0, **metrics}] if metrics else [], set(map(str, range(step + 1)))
        if step and self.path.exists():
            with open(self.path, encoding="utf-8-sig", errors="replace") as file:  # csv would stumble over damage
                names, *lines = [line.rstrip("\n").split(",") for line in file] or [[]]
            rows = [dict(zip(names, values)) for values in lines if len(values) == len(names)]  # not torn by a crash
            rows = [row for row in rows if row.get("step") in kept]
        if parallel.RANK == 0:
            with atomic_write(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        for row in rows:
            self.count_skipped(row.get("skipped") == "1")
        self.started = time.perf_counter()

    def add(self, row):
        """Add the row of a step: numbers, or tensors on the device. `count` is the number of units in the step."""
        self.rows.append(row)

    @contextlib.contextmanager
    def paused(self):
        """Stop the clock in this block. Waits for the GPU first, so that its work so far is timed."""
        synchronize(self.device)
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def flush(self):
        """Write the rows added so far and print the last.

        Raises Diverged if too many steps had to be skipped, or a validation loss is not finite.
        """
        synchronize(self.device)
        now, count = time.perf_counter(), sum(row["count"] for row in self.rows)
        speed, seconds_per_step = count / (now - self.started), (now - self.started) / len(self.rows)
        mfu = round(speed * self.flops / self.peak, 4) if self.flops and self.peak else ""
        rows = [
            {name: int(value) if name in ("step", "skipped") else float(value) for name, value in row.items()}
            for row in self.rows
        ]
        measured = {f"{self.unit}_per_s": round(speed, 1), "mfu": mfu}
        if parallel.RANK == 0:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, extrasaction="ignore").writerows(row | measured for row in rows)
        self.print_row(rows[-1], speed, seconds_per_step)
        for row in rows:
            self.check(row)
        self.speeds += [speed] * len(rows)
        self.rows, self.started = [], now

    def print_row(self, row, speed, seconds_per_step):
        """Print a row of log.csv with the speed and the time left."""
        columns = [f"step {row['step']:>{len(str(self.max_steps))}}/{self.max_steps}", f"loss {row['loss']:.4f}"]
        columns += [f"{name} {row[name]:.3f}" for name in self.metrics[:1]] + [f"{si(speed)} {self.unit}/s"]
        if self.flops and self.peak:
            columns.append(f"{speed * self.flops / self.peak:.1%} MFU")
        minutes, seconds = divmod(round((self.max_steps - row["step"]) * seconds_per_step), 60)
        columns += [f"{minutes}m{seconds:02}s left", f"norm {row['grad_norm']:.3g}", f"lr {row['lr']:.1e}"]
        while len(line := "  ".join(columns)) > WIDTH:
            columns.pop()  # what is in log.csv anyway
        print_line(line)

    def check(self, row):
        """Count and report a skipped step. Raises Diverged after too many, or if a validation loss is not finite."""
        advice = "try a lower --learning_rate or a longer --warmup_steps"
        self.count_skipped(row["skipped"])
        if row["skipped"]:
            print_line(f"step {row['step']} skipped: loss or gradient not finite ({self.skipped} so far)")
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row up to {row['step']} gave no finite gradient and were skipped; {advice}"
            )
        if not all(math.isfinite(value) for name, value in row.items() if name.startswith("val_")):
            raise Diverged(f"the validation after step {row['step']} is not finite; {advice}")

    def count_skipped(self, skipped):
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def summarize(task, checkpointer, log):
    """Print speed, memory and best loss of a run that is done, and a sample of the model's text."""
    if not log.speeds:  # nothing was left to do
        return
    speed, minutes = statistics.median(log.speeds), (time.perf_counter() - log.began) / 60
    text = f"done in {minutes:.1f} minutes: {si(speed)} {task.unit}/s (median)"
    if log.peak and log.flops:
        text += f", {speed * log.flops / log.peak:.1%} MFU"
    if task.device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(task.device) / 2**30:.1f} GiB peak memory"
    best = checkpointer.out_dir / "best.pt"
    print_line(f"{text}; best validation loss {checkpointer.best_val_loss:.4f} in {best}")
    if parallel.is_sharded(task.model):  # its processes would have to generate together
        print_line(f"python sample.py --init_from {best} generates text")
    else:
        print_line("sample:")
        print(textwrap.indent(printable(task.sample()), "    "))


def print_line(text):
    """Print a line, wrapped to 80 columns. If the terminal or pipe is closed, the run goes on in silence."""
    words = dict(break_long_words=False, break_on_hyphens=False)
    try:
        print(textwrap.fill(printable(text), WIDTH, subsequent_indent="    ", **words), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def progress(batches, what):
    """Iterate over batches. If that takes longer than a second, a terminal shows a progress bar meanwhile."""
    return tqdm(batches, what, delay=1, leave=False, disable=True if parallel.RANK else None)


def si(number):
    """Format a number with an SI prefix: 158700000 -> "159M"."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}T"
