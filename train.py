"""Pretrain a language model, plain or Differential Transformer.

python train.py                              # on a GPU the full recipe, elsewhere a small model on small data
python train.py --attn v1 --max_steps 500    # every setting is a flag
python train.py --resume                     # go on after an interruption, as if there had been none
torchrun --standalone --nproc_per_node=2 train.py    # on two GPUs; see parallel.py
"""

import argparse
import contextlib
import csv
import functools
import itertools
import math
import os
import re
import shutil
import signal
import statistics
import sys
import textwrap
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn as nn

import parallel
from data import Parser, UserError, run_script
from data.dataset import (
    atomic_write,
    fixed_batches,
    open_tokens,
    prefetch,
    prepared_directory,
    read_meta,
    sample_batch,
)
from data.tokenizer import END_OF_TEXT, TOKENIZERS, get_tokenizer
from model import ATTENTION, ATTENTION_IMPLS, GPT, GPTConfig, pad_vocab

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

# ---------------------------------------------------------------------------------------------------
# Settings: one dataclass a script, every field a flag. (All up to "Pretraining" is for any stage of training.)


def flag(default, help, choices=None, least=-math.inf, most=2**63 - 1):
    """A field of a settings dataclass, with its help text, and its choices or its range."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


PRESET_NAMES = ("auto", "tiny", "ldiff", "1b", "10b")


@dataclass
class CommonSettings:
    """The flags that mean the same in every script."""

    preset: str = flag(
        "auto", "defaults: tiny, for a CPU; ldiff, 159M parameters, for a GPU; auto, by the machine",
        choices=PRESET_NAMES,
    )  # fmt: skip
    attn: str = flag("v2", "attention mechanism", choices=tuple(ATTENTION))
    dataset: str = flag("wikitext2", "folder in data/, or a path with a slash")
    source: str = flag("", "local file to prepare the data set from, instead of the hub")
    out_dir: str = flag("out/pretrain", "where checkpoints and log.csv go")
    init_from: str = flag("", "checkpoint whose weights to start from")
    resume: bool = flag(False, "go on with the run in out_dir, whose settings hold unless given again")
    seed: int = flag(1, "of weights and batches", least=0)
    max_steps: int = flag(1000, "optimizer steps", least=1)
    batch_size: int = flag(16, "sequences a step", least=1)
    micro_batch_size: int = flag(16, "sequences a process has in memory; gradients of several add up", least=1)
    activation_checkpointing: bool = flag(False, "keep only the layers' inputs, compute the rest again: less memory")
    learning_rate: float = flag(6e-4, "the highest, which the warmup ends with", least=0)
    warmup_steps: int = flag(200, "steps of linear warmup, before the cosine", least=0)
    eval_interval: int = flag(100, "steps between validations", least=1)
    save_interval: int = flag(250, "steps between checkpoints", least=1)
    log_interval: int = flag(10, "steps between lines on the screen", least=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    compile: str = flag("auto", "torch.compile; auto: on with CUDA", choices=("auto", "on", "off"))
    attn_impl: str = flag("auto", "attention kernel; naive: plain PyTorch, for reading", choices=ATTENTION_IMPLS)


def parse_flags(settings_class, description, tiny, argv=None):
    """The flags that were given, as a dict. `tiny` is only for the help: the defaults that the tiny preset changes."""
    parser = Parser(description, argument_default=argparse.SUPPRESS)
    for f in fields(settings_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        default = f"{f.default!r}; tiny: {tiny[f.name]!r}" if f.name in tiny else repr(f.default)
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default: {default})", **kind)
    given = vars(parser.parse_args(argv))
    for f in fields(settings_class):
        if f.name in given and not is_allowed(f, given[f.name]):
            least, most = f.metadata["least"], f.metadata["most"]
            limit = f"the least is {least}" + (f", the most {most}" if most < 2**63 - 1 or given[f.name] > most else "")
            parser.error(f"--{f.name} {given[f.name]} is out of range; {limit}")
    return given


def is_allowed(f, value):
    """Whether a value has the type of a settings field and is one of its choices, or in its range."""
    least, most, choices = f.metadata["least"], f.metadata["most"], f.metadata["choices"]
    if type(value) is not f.type or (choices and value not in choices):
        return False
    return f.type not in (int, float) or least <= value <= most  # NaN fails it too


def choose_preset(given, preset, why):
    """The preset asked for; if that is `auto`, the one proposed, which is said."""
    if given.get("preset", "auto") != "auto":
        return given["preset"]
    print(f"preset: {preset}, since {why}; --preset tiny or --preset ldiff chooses")
    return preset


# What --resume cannot change: the model, and what its best validation loss was measured with.
FIXED = {"attn", "lora_rank", "lora_alpha", "block_size", "eval_windows", "eval_examples", "beta", "label_smoothing"}


def resumed_settings(given, settings_class, stage):
    """For --resume: the settings of the run in out_dir, under those given now, and its checkpoint."""
    if clash := {"preset", "init_from"} & given.keys():
        raise UserError(f"--resume goes on with a run as it was begun; it does not go with --{clash.pop()}")
    out_dir = Path(given.get("out_dir", settings_class.out_dir))
    with parallel.in_turn():
        start = load_latest(out_dir)
    if start["stage"] != stage:
        raise UserError(f"{out_dir / NEWEST} is a checkpoint of the stage {start['stage']}, not {stage}")
    saved = {f.name: start["settings"][f.name] for f in fields(settings_class) if f.name in start["settings"]}
    if wrong := [f.name for f in fields(settings_class) if f.name in saved and not is_allowed(f, saved[f.name])]:
        raise UserError(f"{out_dir / NEWEST} is no checkpoint to resume from: its {wrong[0]} cannot be used")
    for name in FIXED & given.keys():
        if given[name] != (begun := saved.get(name, getattr(settings_class, name))):
            raise UserError(f"the run was begun with --{name} {begun}, which --resume cannot change")
    # The data were prepared when the run began, and its folder may have been moved since.
    return settings_class(**{**saved, "source": "", "out_dir": str(out_dir), **given}), start


def check_settings(settings, device):
    processes = parallel.PROCESSES
    settings.micro_batch_size = min(settings.micro_batch_size, max(1, settings.batch_size // processes))
    if settings.batch_size % (settings.micro_batch_size * processes):
        size = f"{settings.micro_batch_size}" + (f" times {processes} processes" if processes > 1 else "")
        raise UserError(f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {size}")
    check_kernel(settings.attn_impl, device)


def check_kernel(attn_impl, device):
    """Raise UserError if the attention kernel is for another device."""
    if attn_impl == "flash_attn" and device.type != "cuda":
        raise UserError(f"--attn_impl flash_attn needs a CUDA GPU, and the device is {device}")


# ---------------------------------------------------------------------------------------------------
# Checkpoints: one dict of tensors and plain values

NEWEST, PREVIOUS, DAMAGED = "ckpt.pt", "ckpt-previous.pt", "ckpt-damaged.pt"
RUN_FILES = ("log.csv", "best.pt", "adapter.pt", "lambdas.csv", DAMAGED, PREVIOUS, NEWEST)  # which goes last
FORMAT = 1  # of checkpoints: one more whenever what is in them changes


def make_room(out_dir):
    """The files of an earlier run in the folder of a new one move aside rather than be lost."""
    if earlier := [*out_dir.glob("parts-*"), *(out_dir / name for name in RUN_FILES if (out_dir / name).exists())]:
        aside = next(path for n in itertools.count(1) if not (path := out_dir / f"earlier-{n}").exists())
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        hint = " (--resume would have continued it)" if (aside / NEWEST).exists() else ""
        print(f"the run that {out_dir} held is now in {aside}{hint}")


class Busy(UserError):
    """A folder that another run is writing to."""


@contextlib.contextmanager
def locked(out_dir, make=True):
    """Make the folder of a run, unless it should be there, and keep other runs out of it, from before its checkpoint is
    read, since another run could save a newer one after that; what a killed run left half written is removed."""
    out_dir = Path(out_dir)
    if not make and not out_dir.is_dir():
        raise UserError(f"there is no checkpoint {out_dir / NEWEST}: no such folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(out_dir / "lock", os.O_CREAT | os.O_WRONLY, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to {out_dir}: {error.strerror}") from error
    try:
        if take(lock, out_dir):
            for path in out_dir.glob("*.tmp"):
                path.unlink()
        yield
    finally:
        os.close(lock)


def take(lock, out_dir):
    """Whether there is a lock now, which of several processes the first takes; it ends with the process, however that
    ends. Windows and some network drives have none. Raises Busy if another run has it."""
    can_lock = bool(fcntl) and parallel.RANK == 0
    try:
        if can_lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return can_lock
    except BlockingIOError as error:
        raise Busy(f"another run is writing to {out_dir}; --out_dir names another folder") from error
    except OSError:
        return False


def save_checkpoint(path, previous=None, **contents):
    """Write a checkpoint; the one that it replaces is kept as `previous`, if that is given."""
    try:
        with atomic_write(path, previous) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **contents}, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"cannot save {path} ({reason.strerror}); what was saved before is still there") from error


class Damaged(UserError):
    """A checkpoint that is not there, or not whole."""


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU; raises UserError if the file is missing, damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums, and leaves the tensor of a part that is marked as a folder as
            # the memory happens to be
            if archive.testzip() or any(part.external_attr & 0x10 for part in archive.infolist()):
                raise ValueError
        # Mapped, it takes no memory of its own, even if several processes read it; Windows cannot replace such a file.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        missing = [n for n in ("model", "config", "settings", "data") if not isinstance(checkpoint.get(n), dict)]
        missing += [n for n, kind in (("step", int), ("stage", str)) if not isinstance(checkpoint.get(n), kind)]
        if "parts" in checkpoint:
            if not (Path(path).parent / checkpoint["parts"]).is_dir():
                raise Damaged(f"{path} needs the folder {checkpoint['parts']} beside it")
            parallel.complete(checkpoint, Path(path).parent)
    except Damaged:
        raise
    except FileNotFoundError as error:
        raise Damaged(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle, key, attribute and runtime errors: torch.load has none of its own
        raise Damaged(f"{path} is damaged, or not a checkpoint ({type(error).__name__})") from error
    if missing:
        raise UserError(f"{path} is no checkpoint of this project: it lacks {', '.join(missing)}")
    if checkpoint.get("format", FORMAT) not in range(1, FORMAT + 1):
        raise UserError(f"{path} was written by a newer version of this project")
    return checkpoint


def load_latest(out_dir):
    """The newest whole checkpoint of the run in out_dir, which is locked: the one before the last if that is damaged,
    which is said."""
    newest, previous = out_dir / NEWEST, out_dir / PREVIOUS
    if not newest.exists() and not previous.exists():
        raise UserError(f"there is no checkpoint {newest} to resume from; --out_dir names the run's folder")
    try:
        return load_checkpoint(newest)
    except Damaged as error:
        try:
            checkpoint = load_checkpoint(previous)
        except Damaged as older:
            hint = "--init_from best.pt would begin a new run with the weights there"
            raise Damaged(f"{error}, and {older}; {hint}") from older
        print(f"{error}; going on from the one before it, of step {checkpoint['step']}")
        if newest.exists():
            newest.replace(out_dir / DAMAGED)
        previous.rename(newest)  # the next checkpoint is not to replace the only whole one
        return checkpoint


def best_val_loss(out_dir):
    """That of the best.pt in a run's folder, which may come from steps after the last checkpoint; infinite if there is
    none, or it is damaged."""
    try:
        return float(load_checkpoint(out_dir / "best.pt")["best_val_loss"])
    except (Damaged, KeyError, TypeError, ValueError):
        return math.inf


def saved_config(checkpoint, attn_impl):
    """The GPTConfig of a checkpoint's model."""
    try:
        config = GPTConfig(**{**checkpoint["config"], "attn_impl": attn_impl})
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's config cannot be used: {error}") from error
    if config.vocab_size < (least := get_tokenizer(checkpoint["data"].get("tokenizer")).n_vocab):
        raise UserError(f"the checkpoint's vocabulary of {config.vocab_size} is smaller than its tokenizer's, {least}")
    return config


def load_weights(model, checkpoint):
    """Put a checkpoint's weights into a model and return it; raises UserError if they do not fit, or are not
    finite."""
    if "parts" in checkpoint:
        folder = checkpoint["parts"].parent
        raise UserError(f"the checkpoint is in parts; python parallel.py {folder} makes one file of it")
    try:
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, RuntimeError, TypeError) as error:  # the latter of names and tensors that are none
        is_tuned = any(".lora_" in str(name) for name in checkpoint["model"])
        hint = ": its adapters are apart, but best.pt beside it holds the whole model" if is_tuned else ""
        raise UserError(f"the checkpoint's weights do not fit{hint}") from error
    if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
        raise UserError("the checkpoint's weights are not all finite: that run diverged")
    return model


def rng_state():
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():  # a run may go on with another number of GPUs
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------------------------------------------
# Device, optimizer, schedule

# Dense bf16 TFLOP/s from the vendors' data sheets; the first entry whose words are in the GPU's name counts.
PEAK_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "RTX A6000": 155, "A40": 150, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device):
    """The bf16 peak of all GPUs in FLOP/s, or None if they are not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "Laptop" in name:  # slower than the desktop GPU of the same name
        return None
    peaks = (1e12 * peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name))
    return next((peak * parallel.PROCESSES for peak in peaks), None)


def choose_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and parallel.PROCESSES > 1:
        name = f"cuda:{parallel.LOCAL_RANK}"
    try:
        device = torch.empty(1, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} is not available here") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # products that autocast leaves in float32 may use TF32
    return device


def autocast(device):
    """bf16 on CUDA, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def wants_compile(mode, device):
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def compile_model(model):
    """torch.compile of a model, or of a layer's forward(), allowed to compute cheap things that feed a matrix product,
    like norms, again in the backward pass instead of keeping them: a fifth less memory, about 1 % slower."""
    torch._functorch.config.ban_recompute_materialized_backward = False
    return torch.compile(model)


def place(build, device, compiles):
    """Put the model that build() makes on its device -> the model, and what to call in training: itself, or if
    `compiles`, compiled. Of several processes, each has a part of the model, whose layers are compiled one by one."""
    if parallel.PROCESSES > 1:
        model = parallel.shard(build, device, compile_model if compiles else None)
        return model, model
    model = build().to(device)
    return model, compile_model(model) if compiles else model


def make_optimizer(model, weight_decay):
    """AdamW. Only the matrices of linear layers decay: not norms, V1's lambda vectors or embeddings, of which a tied
    output layer is one. V2's lambda_proj is a linear layer and decays, which draws lambda toward 1/2."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if p not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def load_moments(optimizer, saved):
    """Give an optimizer what a checkpoint has of its state, but no rates: those are in the settings, and may be others
    now. Raises some error if it does not fit, which the fused kernel would not notice and write beyond it."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[parameter]
        moments = state["exp_avg"], state["exp_avg_sq"]
        if state["step"].numel() != 1 or any(m.shape != parameter.shape or not m.is_contiguous() for m in moments):
            raise ValueError


def lr_at(step, settings, floor=0.1):
    """The learning rate of steps 1 to max_steps: up linearly to the peak, then a cosine down to floor * peak."""
    peak, warmup, last = settings.learning_rate, settings.warmup_steps, settings.max_steps
    if step <= warmup:
        return peak * step / warmup
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup))))


# ---------------------------------------------------------------------------------------------------
# The log: a row of log.csv for every step, a line on the screen for some


MOST_SKIPPED = 10  # steps in a row, after which a run ends


class Diverged(UserError):
    """A run that no longer learns."""


def _number(name, value):
    return int(value) if name in ("step", "skipped") else float(value)


class Log:
    """Keeps losses on the device and reads them every log_interval steps, so that the GPU never waits for the CPU to
    catch up. Its clock leaves out validation and saving."""

    def __init__(self, run):
        self.path, self.last_step, self.device = run.out_dir / "log.csv", run.settings.max_steps, run.device
        self.unit, self.metrics = run.unit, run.metrics
        self.flops, self.peak = run.flops_per_unit(), peak_flops(run.device)
        self.columns = ["step", "loss", *run.metrics, "grad_norm", "skipped", "lr", f"{run.unit}_per_s", "mfu"]
        self.columns += [f"val_{name}" for name in ("loss", *run.metrics)]
        self.rows, self.speeds, self.started = [], [], time.perf_counter()
        self.skipped = self.skipped_in_a_row = 0

    def open(self, done):
        """Begin log.csv, or keep its rows up to step `done`: an interrupted run repeats those after its checkpoint."""
        rows, kept = [], set(map(str, range(1, done + 1)))
        if done and self.path.exists():
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
            self._count(row.get("skipped") == "1")
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Stop the clock, once the GPU has done what it was given so far."""
        synchronize(self.device)
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def flush(self):
        """Write the rows added so far and print the last; raises Diverged if too many steps had to be skipped, or a
        validation gave a number that is not finite."""
        synchronize(self.device)
        now, work = time.perf_counter(), sum(row.pop("work") for row in self.rows)
        speed, seconds_per_step = work / (now - self.started), (now - self.started) / len(self.rows)
        mfu = round(speed * self.flops / self.peak, 4) if self.flops and self.peak else ""
        rows = [{name: _number(name, value) for name, value in row.items()} for row in self.rows]
        measured = {f"{self.unit}_per_s": round(speed, 1), "mfu": mfu}
        if parallel.RANK == 0:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(row | measured for row in rows)
        self._print(rows[-1], speed, seconds_per_step)
        for row in rows:
            self._check(row)
        self.speeds += [speed] * len(rows)
        self.rows, self.started = [], now

    def _count(self, skipped):
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def _check(self, row):
        advice = "try a lower --learning_rate or a longer --warmup_steps"
        self._count(row["skipped"])
        if row["skipped"]:
            say(f"step {row['step']} skipped: loss or gradient not finite ({self.skipped} so far)")
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise Diverged(
                f"{MOST_SKIPPED} steps in a row up to {row['step']} gave no finite gradient and were skipped; {advice}"
            )
        if not all(math.isfinite(value) for name, value in row.items() if name.startswith("val_")):
            raise Diverged(f"the validation after step {row['step']} is not finite; {advice}")

    def _print(self, row, speed, seconds_per_step):
        parts = [f"step {row['step']:>5}/{self.last_step}", f"loss {row['loss']:.4f}"]
        parts += [f"{name} {row[name]:.3f}" for name in self.metrics[:2]]  # a line has no room for more
        parts += [f"grad norm {row['grad_norm']:.3f}", f"lr {row['lr']:.2e}", f"{si(speed)} {self.unit}/s"]
        if self.flops:
            share = f"{speed * self.flops / self.peak:.1%} MFU" if self.peak else f"{si(speed * self.flops)} FLOP/s"
            parts.append(share)
        minutes, seconds = divmod(round((self.last_step - row["step"]) * seconds_per_step), 60)
        say(" | ".join([*parts, f"{minutes}m{seconds:02}s left"]))


def say(text):
    """Print; if nobody reads any more, a closed terminal or pipe, the run goes on in silence."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def si(number):
    """A number in short: 158700000 -> "159M"."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}T"


# ---------------------------------------------------------------------------------------------------
# The training loop


@contextlib.contextmanager
def stop_signals():
    """Yield a list to which SIGINT and SIGTERM are appended, so that the loop can save before it leaves. The second one
    ends the program at once."""
    received, previous = [], {}

    def receive(number, frame):
        received.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the reader of a pipe may have got the signal, too
            os.write(1, b"\nsaving after this step; once more quits at once\n")  # print() cannot interrupt itself

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(run, log):
    """Take the optimizer steps from run.done + 1 to run.settings.max_steps; Run says what `run` is asked for."""
    s = run.settings
    with stop_signals() as stop:
        if not run.done:  # what training has to improve on
            print(f"before the first step:\n{run.validate(0)[1]}", flush=True)
        log.open(run.done)
        steps = range(run.done + 1, s.max_steps + 1)
        for step, (work, micro_batches) in zip(steps, prefetch(run.make_batch, steps, run.device)):
            lr = run.learning_rate(step)
            measured = optimizer_step(run.optimizer, lr, run.accumulate, micro_batches)
            log.rows.append(dict(step=step, lr=lr, work=work, **measured))
            last = step == steps[-1]
            stopping = parallel.highest(stop[0] if stop else 0)  # a signal from here on waits for the next step
            validating = last or step % s.eval_interval == 0
            saving = last or stopping or step % s.save_interval == 0
            if validating:
                with log.paused():
                    values, line = run.validate(step)
                log.rows[-1] |= values
            if validating or saving or step % s.log_interval == 0 or step == steps[0]:
                log.flush()  # before saving, so that log.csv holds every step that the checkpoint does
            if validating:
                say(line)
            if saving:
                with log.paused():
                    run.save(step)
            if stopping:
                say(f"stopped after step {step}; --resume --out_dir {run.out_dir} goes on from the checkpoint")
                sys.exit(128 + stopping)


def optimizer_step(optimizer, lr, accumulate, micro_batches, clip=1.0):
    """One step on a batch that passes in micro-batches, whose shares of loss and gradient add up, over all processes
    too -> a dict of the loss, what else `accumulate` measures, the gradient's norm before it is clipped, and whether
    the step was skipped, which leaves weights and optimizer as they are, for a loss or gradient that is not finite."""
    total = {}
    for tensors in micro_batches:
        total = add_share(total, accumulate(*tensors))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = parallel.add_up(total, parameters[0].device, parameters)
    total["grad_norm"] = parallel.whole(nn.utils.clip_grad_norm_(parameters, clip))
    total["skipped"] = ~torch.isfinite(total["loss"] + total["grad_norm"])
    # Fused AdamW does nothing where it is 1; an `if` would wait for the GPU.
    optimizer.found_inf = total["skipped"].float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return total


def accumulate(loss_of, *tensors):
    """Add the gradients of a micro-batch's share of the loss to those there are -> the shares that loss_of returns."""
    share = loss_of(*tensors)
    share["loss"].backward()
    return {name: value.detach() for name, value in share.items()}


def add_share(total, share):
    return {name: total.get(name, 0.0) + value for name, value in share.items()}


# ---------------------------------------------------------------------------------------------------
# A run: what every stage of training has


class Run:
    """The settings, folder, device and checkpoints of a run. A stage adds its data (`meta`, `encoding`), `model` and
    `optimizer`, and these methods:

    make_batch(step)    the work in it, counted in `unit`, and a list of micro-batches, each a tuple of tensors
    loss_of(*tensors)   a micro-batch's share of the batch's mean loss, {"loss": tensor, and one for each of `metrics`}
    evaluate()          {"val_loss": float, and one for each of `metrics`}, and a line about it for the screen
    sample()            some text by the model
    """

    stage = ""
    unit = "tokens"  # which the speed is told in
    metrics = ()  # what is measured beside the loss
    counted = "tokens"  # the entry of meta.json that tells the size of the data

    def __init__(self, settings):
        self.settings, self.out_dir, self.device = settings, Path(settings.out_dir), choose_device(settings.device)
        check_settings(settings, self.device)
        self.done, self.best_val_loss = 0, math.inf

    def flops_per_unit(self):
        """Floating-point operations for one `unit` of work, or None where that depends on the batch."""
        return None

    def learning_rate(self, step):
        return lr_at(step, self.settings)

    def accumulate(self, *tensors):
        return accumulate(self.loss_of, *tensors)

    def restore(self, checkpoint):
        """Go on where a run was: optimizer, random numbers, and the same data."""
        if checkpoint["data"] != self.meta:
            raise UserError("the data set is not the one that the run began with; --init_from starts a new run on it")
        try:
            self.done, self.best_val_loss = checkpoint["step"], best_val_loss(self.out_dir)
            self.restore_state(checkpoint)
            set_rng_state(checkpoint["rng"])
            if self.done < 1:
                raise ValueError
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.out_dir / NEWEST} is no checkpoint to resume from") from error

    def restore_state(self, checkpoint):
        load_moments(self.optimizer, checkpoint["optimizer"])

    def validate(self, step):
        """What evaluate() says; the model with the lowest loss so far is kept."""
        values, line = self.evaluate()
        if values["val_loss"] < self.best_val_loss:
            self.best_val_loss = values["val_loss"]
            self.save_best(step)
            line += "; the best so far"
        return values, line

    def weights(self):
        """The model's tensors, by name."""
        return self.model.state_dict()

    def save(self, step):
        """ckpt.pt, the checkpoint to resume from; the one before is kept."""
        if parallel.RANK:
            return
        state = dict(optimizer=self.optimizer.state_dict(), rng=rng_state(), previous=self.out_dir / PREVIOUS)
        self.write(NEWEST, step, self.weights(), **state)

    def save_best(self, step):
        """best.pt, the model for the next stage."""
        self.write("best.pt", step, parallel.gather(self.weights()))

    def write(self, name, step, weights, **more):
        if parallel.RANK:
            return
        save_checkpoint(
            self.out_dir / name, model=weights, config=asdict(self.model.config), settings=asdict(self.settings),
            data=self.meta, stage=self.stage, step=step, best_val_loss=self.best_val_loss, **more,
        )  # fmt: skip


def carry_out(run):
    """The whole run, from a description to a sample of text, in its folder, which is locked."""
    describe(run)
    if run.done >= run.settings.max_steps:
        print(f"the run in {run.out_dir} has {run.done} steps already; a higher --max_steps adds to it")
        return
    if not run.settings.resume and parallel.RANK == 0:
        make_room(run.out_dir)
    log, started = Log(run), time.perf_counter()
    try:
        fit(run, log)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"the GPU's memory is full; {smaller(run.settings)}") from error
    summarize(run, log, time.perf_counter() - started)


def is_out_of_memory(error):
    """Whether an error is, or came of, a full GPU: one that is full while a CUDA graph is recorded says that this
    failed."""
    while error and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def smaller(settings):
    """What to try when a micro-batch does not fit."""
    sizes = [n for n in range(1, settings.micro_batch_size) if settings.batch_size % (n * parallel.PROCESSES) == 0]
    return f"try --micro_batch_size {sizes[-1]}" if sizes else "not even one sequence fits: try a smaller model"


def describe(run):
    meta, parameters = run.meta, list(run.model.parameters())
    text = "  ".join(f"{name}={value}" for name, value in asdict(run.settings).items())
    print(textwrap.fill(text, 118, initial_indent="settings: ", subsequent_indent="  ", break_on_hyphens=False))
    counts = ", ".join(f"{count:,} {split}" for split, count in meta[run.counted].items())
    print(f"data: {meta['source']} ({counts} {run.counted}, {meta['tokenizer']} tokenizer)")
    is_gpu = run.device.type == "cuda"
    machine = torch.cuda.get_device_name(run.device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    if parallel.PROCESSES > 1:
        machine = f"{parallel.PROCESSES} x {machine}"
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    size = f"{si(total)} parameters" + (f", {si(trained)} of them trained" if trained < total else "")
    if flops := run.flops_per_unit():
        size += f", {si(flops)} FLOPs a {run.unit.removesuffix('s')}"
    print(f"model: {run.model.config.attn}, {size}, on {machine}")


def summarize(run, log, seconds):
    speed = statistics.median(log.speeds)
    text = f"done in {seconds / 60:.1f} minutes: {si(speed)} {run.unit}/s (median)"
    if log.peak and log.flops:
        text += f", {speed * log.flops / log.peak:.1%} MFU"
    if run.device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(run.device) / 2**30:.1f} GiB peak memory"
    print(f"{text}; best validation loss {run.best_val_loss:.4f} in {run.out_dir / 'best.pt'}")
    print(f"sample:\n{textwrap.indent(run.sample(), '    ')}")


# ---------------------------------------------------------------------------------------------------
# Pretraining


@dataclass
class Settings(CommonSettings):
    """Pretraining. The defaults are the ldiff preset with DIFF V2."""

    # Validation takes a third of a step's time for each batch: this way it stays under 1 % of the whole.
    eval_interval: int = flag(200, "steps between validations", least=1)
    tokenizer: str = flag("", "of the data set; new data have gpt2, or with the tiny preset bytes", choices=TOKENIZERS)
    block_size: int = flag(2048, "context length in tokens", least=1)
    n_layer: int = flag(12, "layers", least=1)
    n_embd: int = flag(768, "width", least=1)
    n_head: int = flag(6, "heads, by --attn; n_head * head_dim is the width of the attention", least=1)
    n_kv_head: int = flag(0, "key and value heads; 0: as many as n_head", least=0)
    head_dim: int = flag(128, "width of a head, by --attn", least=2)
    n_inner: int = flag(1664, "width of the SwiGLU, by --attn", least=1)
    tie_embeddings: bool = flag(False, "one matrix for the embedding and the output layer")
    weight_decay: float = flag(0.1, "of AdamW", least=0)
    eval_windows: int = flag(64, "sequences to validate on, always the same", least=1)


PRESETS = {
    "ldiff": {},
    "tiny": dict(
        dataset="tiny", block_size=256, n_layer=4, n_embd=192, max_steps=800, batch_size=4,
        micro_batch_size=4, learning_rate=3e-3, warmup_steps=50,
    ),
    "1b": dict(
        dataset="fineweb_edu", n_layer=20, n_embd=2048, max_steps=20000, batch_size=512, micro_batch_size=8,
        learning_rate=4e-4, warmup_steps=1000, eval_interval=500, save_interval=1000,
    ),
    "10b": dict(
        dataset="fineweb_edu", n_layer=44, n_embd=4096, max_steps=100000, batch_size=1024, micro_batch_size=8,
        learning_rate=3e-4, warmup_steps=2000, eval_interval=500, save_interval=500, activation_checkpointing=True,
    ),
}  # fmt: skip

# What depends on the attention. Equal parameters: V2's second half of the queries is paid for with a narrower SwiGLU.
SHAPES = {
    ("ldiff", "vanilla"): dict(n_head=6, head_dim=128, n_inner=1920),
    ("ldiff", "v1"): dict(n_head=12, head_dim=64, n_inner=1920),
    ("ldiff", "v2"): dict(n_head=6, head_dim=128, n_inner=1664),
    ("tiny", "vanilla"): dict(n_head=3, head_dim=64, n_inner=512),
    ("tiny", "v1"): dict(n_head=12, head_dim=16, n_inner=512),
    ("tiny", "v2"): dict(n_head=3, head_dim=64, n_inner=448),
    ("1b", "vanilla"): dict(n_head=16, n_kv_head=4, head_dim=128, n_inner=5632),
    ("1b", "v1"): dict(n_head=32, n_kv_head=8, head_dim=64, n_inner=5632),
    ("1b", "v2"): dict(n_head=16, n_kv_head=4, head_dim=128, n_inner=4928),
    ("10b", "vanilla"): dict(n_head=32, n_kv_head=8, head_dim=128, n_inner=14336),
    ("10b", "v1"): dict(n_head=64, n_kv_head=16, head_dim=64, n_inner=14336),
    ("10b", "v2"): dict(n_head=32, n_kv_head=8, head_dim=128, n_inner=12928),
}


def shape_of(preset, attn):
    """What an attention without a line of its own in SHAPES has is vanilla's."""
    return SHAPES.get((preset, attn), SHAPES[preset, "vanilla"])


SHAPE_FLAGS = {f.name for f in fields(GPTConfig)} & {f.name for f in fields(Settings)} - {"attn_impl"}


def choose_settings(given):
    """The settings, and the checkpoint to start from or None. Flags go over the preset, the preset over the defaults; a
    model to start from brings its shape."""
    if given.get("resume"):
        return resumed_settings(given, Settings, Pretraining.stage)
    has_gpu = torch.cuda.is_available()
    preset = choose_preset(given, *(("ldiff", "there is a CUDA GPU") if has_gpu else ("tiny", "there is no CUDA GPU")))
    start = load_checkpoint(given["init_from"]) if given.get("init_from") else None
    shape = shape_of(preset, given.get("attn", Settings.attn))
    if start:
        check_attn(given, start, given["init_from"])
        shape = {name: start["config"][name] for name in SHAPE_FLAGS if name in start["config"]}
    return Settings(**{**PRESETS[preset], **shape, **given, "preset": preset}), start


def check_attn(given, start, path):
    """Raise UserError if the flags name another attention than that of the checkpoint to start from, at `path`."""
    attn = start["config"].get("attn")
    if given.get("attn", attn) != attn:
        raise UserError(f"the model in {path} has the attention {attn}, not {given['attn']}")


def build_config(settings, vocab_size):
    shape = {name: getattr(settings, name) for name in SHAPE_FLAGS}
    shape["n_kv_head"] = settings.n_kv_head or settings.n_head
    try:
        return GPTConfig(**shape, vocab_size=pad_vocab(vocab_size), attn_impl=settings.attn_impl)
    except ValueError as error:
        raise UserError(error) from error


def check_shape(checkpoint, config):
    """Raise UserError unless the checkpoint's model has the shape that `config` asks for."""
    for name, value in asdict(config).items():
        saved = checkpoint["config"].get(name)
        if name not in ("attn_impl", "block_size") and saved != value:  # which no weight depends on
            raise UserError(f"the checkpoint's model has {name} {saved}, but the settings say {value}")


@torch.no_grad()
def validation_loss(model, batches, device):
    """Mean cross-entropy in nats over all target tokens of `batches`."""
    total, count = 0.0, 0
    for inputs, targets in batches:
        tokens = (targets != -100).sum().item()
        with autocast(device):
            _, loss = model(inputs.to(device), targets.to(device))
        if tokens:  # else a process has nothing but filling, whose loss is no number
            total, count = total + loss.float() * tokens, count + tokens
    total, count = parallel.add_up(dict(total=total, count=count), device).values()
    return (total / count).item()


class Pretraining(Run):
    """`start` is the checkpoint to resume, or to take the model from."""

    stage = "pretrain"

    def __init__(self, settings, start=None):
        super().__init__(settings)
        self.last_parts = start.get("parts") if start else None
        self.load_data()
        if start and start["data"].get("tokenizer") != settings.tokenizer:
            raise UserError(
                f"the checkpoint's tokenizer is {start['data'].get('tokenizer')}, the data's {settings.tokenizer}"
            )
        torch.manual_seed(settings.seed)
        build = functools.partial(self.build_model, start)
        self.model, self.compiled = place(build, self.device, wants_compile(settings.compile, self.device))
        # Activations are checkpointed where memory is short: then gradients are reduced after each micro-batch.
        if parallel.PROCESSES > 1 and not settings.activation_checkpointing:
            micro_batches = settings.batch_size // (settings.micro_batch_size * parallel.PROCESSES)
            parallel.reduce_once(self.model, micro_batches)
        self.optimizer = self.make_optimizer()
        if settings.resume:
            self.restore(start)

    def config(self):
        return build_config(self.settings, self.encoding.n_vocab)

    def build_model(self, start):
        model = GPT(self.config())
        if start:
            check_shape(start, model.config)
        if start and not (self.settings.resume and "parts" in start):  # whose weights come with restore()
            load_weights(model, start)
        return model.checkpoint_activations() if self.settings.activation_checkpointing else model

    def make_optimizer(self):
        return make_optimizer(self.model, self.settings.weight_decay)

    def load_data(self):
        s = self.settings
        new = "bytes" if s.preset == "tiny" else "gpt2"
        with parallel.in_turn():
            directory = prepared_directory(s.dataset, s.source, tokenizer=s.tokenizer or new)
        self.meta = read_meta(directory, s.tokenizer)
        s.tokenizer = self.meta["tokenizer"]
        self.encoding = get_tokenizer(s.tokenizer)
        self.train_tokens = open_tokens(directory, "train", self.meta, s.block_size)
        val_tokens = open_tokens(directory, "val", self.meta, s.block_size)
        rows = slice(parallel.RANK, None, parallel.PROCESSES)  # this process's
        batches = fixed_batches(val_tokens, s.block_size, s.micro_batch_size * parallel.PROCESSES, s.eval_windows)
        self.val_batches = [(inputs[rows], targets[rows]) for inputs, targets in batches]

    def flops_per_unit(self):
        return self.model.flops_per_token()

    def make_batch(self, step):
        s = self.settings
        who = parallel.RANK, parallel.PROCESSES
        batch = sample_batch(self.train_tokens, s.block_size, s.batch_size, s.seed, step, *who)
        micro_batches = list(zip(*(tensor.split(s.micro_batch_size) for tensor in batch)))
        return s.batch_size * s.block_size, micro_batches

    def loss_of(self, inputs, targets):
        with autocast(self.device):
            _, loss = self.compiled(inputs, targets)
        return {"loss": loss * len(inputs) / self.settings.batch_size}

    def evaluate(self):
        loss = validation_loss(self.compiled, self.val_batches, self.device)
        line = f"    validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"
        with autocast(self.device):
            lambdas = self.model.lambdas(self.val_batches[0][0][:1].to(self.device))
        if lambdas:
            line += "; lambda by layer " + " ".join(f"{value:.2f}" for value in lambdas)
        return {"val_loss": loss}, line

    def restore_state(self, checkpoint):
        if parallel.PROCESSES == 1:
            return super().restore_state(checkpoint)
        parallel.restore(self.model, self.optimizer, checkpoint)

    def save(self, step):
        """See Run. Several processes each write their parts of the tensors; two checkpoints' are kept."""
        if parallel.PROCESSES == 1:
            return super().save(step)
        folder, optimizer = self.out_dir / f"parts-{step}", self.optimizer.state_dict() | {"state": {}}
        parallel.save_parts(folder, self.model, self.optimizer)
        state = dict(parts=folder.name, optimizer=optimizer, rng=rng_state(), previous=self.out_dir / PREVIOUS)
        self.write(NEWEST, step, {}, **state)
        if parallel.RANK == 0:
            for old in {*self.out_dir.glob("parts-*")} - {folder, self.last_parts}:
                shutil.rmtree(old)
        self.last_parts = folder

    def sample(self, max_new_tokens=256):
        """Some text, begun from nothing."""
        if parallel.PROCESSES > 1:
            return f"(python sample.py --init_from {self.out_dir / 'best.pt'} generates text)"
        encoding = self.encoding
        start = torch.tensor([[encoding.encode_single_token(END_OF_TEXT)]], device=self.device)
        with autocast(self.device):
            ids = self.model.generate(start, max_new_tokens, temperature=0.8, top_k=50, n_vocab=encoding.n_vocab)
        return encoding.decode(ids[0, 1:].tolist(), errors="replace")


def main():
    tiny = {**PRESETS["tiny"], **SHAPES["tiny", Settings.attn]}
    given = parse_flags(Settings, __doc__, tiny)
    with parallel.started(), locked(given.get("out_dir", Settings.out_dir), make=not given.get("resume")):
        carry_out(Pretraining(*choose_settings(given)))


if __name__ == "__main__":
    run_script(main)
