"""Benchmarks: `python -m bench.NAME` prints a table and writes it to out/bench/NAME.json; --smoke tries it in seconds.

Times are medians of CUDA events over several calls after a warm-up, and of such medians over several runs.
"""

import contextlib
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
import train
from data import Parser
from data.dataset import prefetch


def parse_arguments(description, **flags):
    """The arguments of a benchmark: `flags` maps each name to the keywords of add_argument."""
    parser = Parser(description)
    for name, keywords in flags.items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_argument("--smoke", action="store_true", help="small shapes and few calls, on any machine")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", default="out/bench", help="folder of the JSON file")
    return parser.parse_args()


def model_config(attn, block_size, smoke):
    """The shape of the 159M model, or of the tiny one."""
    preset = "tiny" if smoke else "ldiff"
    shape = {**train.PRESETS[preset], **train.SHAPES[preset, attn], "attn": attn, "block_size": block_size}
    return train.build_config(train.Settings(**shape), vocab_size=257 if smoke else 50257)


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


@contextlib.contextmanager
def quiet():
    """Keep what is printed off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def loop_ms(run, steps, log=None):
    """Milliseconds a step of a loop like train.fit, whose batches another thread makes, and with its log if given."""
    batches = prefetch(run.make_batch, range(1, steps + 1), run.device)
    with quiet():
        for step, (work, micro_batches) in enumerate(batches, start=1):
            if step == 3:  # the first two have the queue to fill
                train.synchronize(run.device)
                started = time.perf_counter()
            measured = train.optimizer_step(run.optimizer, 1e-4, run.accumulate, micro_batches)
            if log:
                log.rows.append(dict(step=step, lr=1e-4, work=work, **measured))
                if step % run.settings.log_interval == 0:
                    log.flush()
        train.synchronize(run.device)
    return 1000 * (time.perf_counter() - started) / (steps - 2)


def fresh_memory(device):
    """Forget what earlier measurements left: memory, its peak, and compiled programs."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device):
    """The most GPU memory that tensors took since fresh_memory, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def environment(device):
    """What a figure depends on, beside the code."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "command": " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": gpu or f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "triton": model.triton and model.triton.__version__, "flash_attn": model.flash_attn_func is not None,
    }  # fmt: skip


class Table:
    """Rows of {column: value}, printed as Markdown while they come, and written to a JSON file at the end."""

    def __init__(self, name, arguments, device):
        self.path, self.rows, self.about = Path(arguments.out) / f"{name}.json", [], environment(device)
        print("  ".join(f"{key}={value}" for key, value in self.about.items()) + "\n")

    def add(self, **row):
        if not self.rows:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(_short(value) for value in row.values()) + " |", flush=True)
        self.rows.append(row)

    def note(self, text):
        print(f"({text})", flush=True)

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.about | {"rows": self.rows}, indent=1) + "\n")
        print(f"\nwritten to {self.path}")


def _short(value):
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
