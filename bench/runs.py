"""The training runs that bench.figures draws. A run is trained once; after that its log is enough.

python -m bench.runs                          # all whose log is not in docs/runs yet
python -m bench.runs 'curves/*-1' 'rates/*'   # some, by name or pattern
python -m bench.runs --list                   # their names

An interrupted run goes on from its checkpoint in out/runs. Several processes share the runs among them, on one GPU or
each on its own (CUDA_VISIBLE_DEVICES). --corpus names a data set of your own for the longer runs; docs/results.md says
what it was. The tuning runs start from the models of other runs, which have to be finished.
"""

import contextlib
import csv
import fnmatch
import functools
import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import dpo
import sft
import train
from bench import reset_memory
from bench.probes import probe, sentence_maps
from data.tokenizer import IM_END, IM_START
from engine import parallel
from engine.checkpoint import (
    DAMAGED,
    NEWEST,
    PREVIOUS,
    RUN_FILES,
    Checkpointer,
    load_checkpoint,
    load_latest,
    run_folder,
)
from engine.device import autocast, choose_device
from engine.files import FolderInUse, atomic_write
from engine.log import Diverged, Log
from engine.settings import Parser, UserError, run_script

SENTENCE = "The dog that chased the cat up the tree sat down under the tree, and the cat looked down at the dog."
COLUMNS = ("step", "loss", "grad_norm", "accuracy", "margin", "val_loss", "val_accuracy", "val_margin")  # of a kept log
KINDS = ("vanilla", "v1", "v2")  # a fork's own attention has no place in the report's figures
LEARNING_RATES = (6e-4, 2e-3, 6e-3)


# ---------------------------------------------------------------------------------------------------
# Pretraining without the methods that L-Diff adds: the vocabulary is not padded, all logits exist at once, the learning
# rate is constant, and AdamW has PyTorch's own settings. BARE also turns the compiler off. The report's baseline has no
# fused attention either. bf16 and clipped gradients stay.


def unpadded_vocab(n_vocab):
    """In place of model.pad_vocab: the ids of the base vocabulary and <|endoftext|>, 50,257 for GPT-2."""
    return n_vocab - len((IM_START, IM_END))


def constant_lr(step, settings):
    """In place of train.lr_at."""
    return settings.learning_rate


def plain_loss(model, inputs, targets):
    """The mean cross-entropy of logits that exist all at once."""
    logits, _ = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def bare_loss(task, inputs, targets):
    """In place of Pretraining.loss."""
    with autocast(task.device):
        loss = plain_loss(task.compiled, inputs, targets)
    return {"loss": loss * len(inputs) / task.settings.batch_size}


# ---------------------------------------------------------------------------------------------------
# The plan


@dataclass
class PlannedRun:
    """What to train: a task (Pretraining, SFT or DPO) and its settings."""

    task_class: type
    settings: train.CommonSettings
    bare: bool = False  # without the methods
    after: str = ""  # name of the run whose best.pt it starts from
    keep_best: bool = False  # keep its own best.pt, from which another run starts
    probe_texts: int = 0  # texts on which bench.probes measures the trained model


BARE = dict(bare=True, compile="off", weight_decay=0.01)
SHORT = dict(batch_size=8, micro_batch_size=8, max_steps=1000, eval_interval=50, save_interval=500)
LONG = dict(batch_size=32, micro_batch_size=32, max_steps=1500, eval_interval=250, save_interval=500)


def pretraining(attn, bare=False, keep_best=False, probe_texts=0, **settings):
    settings = train.Settings(**train.SHAPES["ldiff"][attn], preset="ldiff", attn=attn, **settings)
    return PlannedRun(train.Pretraining, settings, bare=bare, keep_best=keep_best, probe_texts=probe_texts)


def planned_runs(corpus, out):
    """{name: PlannedRun}, with three seeds where curves are compared, and two where final losses are."""
    runs = {}
    for seed in (1, 2, 3):
        runs[f"curves/vanilla-bare-{seed}"] = pretraining("vanilla", seed=seed, attn_impl="naive", **BARE, **SHORT)
        runs[f"curves/v1-bare-{seed}"] = pretraining("v1", seed=seed, **BARE, **SHORT)
        for attn in KINDS:
            runs[f"curves/{attn}-{seed}"] = pretraining(attn, seed=seed, **SHORT)
    for seed, attn in itertools.product((1, 2), KINDS):
        keep_best = (attn, seed) == ("v2", 2)  # SFT starts from it
        plan = pretraining(attn, keep_best=keep_best, probe_texts=64, seed=seed, dataset=corpus, **LONG)
        runs[f"corpus/{attn}-{seed}"] = plan
    for attn, rate in itertools.product(KINDS, LEARNING_RATES):
        runs[f"rates/{attn}-{rate:g}"] = pretraining(attn, learning_rate=rate, dataset=corpus, **SHORT)
    for stage, task_class, settings_class, after in (
        ("sft", sft.SFT, sft.Settings, "corpus/v2-2"), ("dpo", dpo.DPO, dpo.Settings, "tuning/sft"),
    ):  # fmt: skip
        settings = settings_class(preset="ldiff", attn="v2", save_interval=1000, init_from=f"{out}/{after}/best.pt")
        runs[f"tuning/{stage}"] = PlannedRun(task_class, settings, after=after, keep_best=stage == "sft")
    return runs


def shrink(plan):
    """The same run with a tiny model and few steps: a few seconds on any machine."""
    small = dict(preset="tiny", dataset="tiny", batch_size=2, micro_batch_size=2, max_steps=4, eval_interval=2)
    small |= dict(warmup_steps=1)
    if isinstance(plan.settings, train.Settings):
        small |= {**train.SHAPES["tiny"][plan.settings.attn], "block_size": 256, "n_layer": 4, "n_embd": 192}
        small |= dict(eval_windows=2)
    else:
        small |= dict(eval_examples=4)
    return replace(plan, settings=replace(plan.settings, **small), probe_texts=min(plan.probe_texts, 2))


# ---------------------------------------------------------------------------------------------------
# Training


def make_task(plan, settings, checkpoint):
    """Build the task of a planned run, and its optimizer."""
    task = plan.task_class(settings, checkpoint)
    if plan.bare:
        task.loss = functools.partial(bare_loss, task)
        return task, torch.optim.AdamW(task.model.parameters(), weight_decay=settings.weight_decay, fused=True)
    return task, train.make_optimizer(task.model, getattr(settings, "weight_decay", 0.0))  # tuning has no decay


def train_run(plan, folder, log, device):
    """Train a run in `folder`, which is locked, or resume it. Writes `log`, what is kept of its log.csv."""
    resume = any((folder / name).exists() for name in (NEWEST, PREVIOUS))
    settings = replace(plan.settings, out_dir=str(folder), resume=resume, device=device)
    checkpoint = load_checkpoint(settings.init_from) if settings.init_from and not resume else None
    if resume:
        checkpoint = load_latest(folder)

    def record_lambdas(row):
        if "val_loss" in row:
            with autocast(task.device):
                lambdas = task.model.lambdas(task.val_batches[0][0][:1].to(task.device))
            with open(folder / "lambdas.csv", "a", encoding="utf-8") as file:
                file.write(f"{row['step']},{' '.join(f'{value:.4f}' for value in lambdas)}\n")

    patched = mock.patch.multiple(train, pad_vocab=unpadded_vocab, lr_at=constant_lr)
    with patched if plan.bare else contextlib.nullcontext():
        task, optimizer = make_task(plan, settings, checkpoint)
        checkpointer = Checkpointer(task, optimizer)
        checkpointer.start(checkpoint)
        if not plan.keep_best:
            checkpointer.save_if_best = lambda step, val_loss: False
        on_step = record_lambdas if plan.task_class is train.Pretraining else None
        try:
            train.fit(task, optimizer, checkpointer, Log(task), on_step)
        except Diverged as error:  # its log up to here is the result
            print(f"{folder}: {error}")
    if plan.probe_texts:
        write_probes(task, plan.probe_texts, log.with_suffix(".json"))
    keep_log(folder, log)  # last, since it marks the run as done


def write_probes(task, texts, path):
    """Write what bench.probes measures in a trained model, on the text that it was validated on."""
    tokens = torch.cat([inputs.flatten() for inputs, _ in task.val_batches]).numpy()
    found = probe(task.model, task.encoding, tokens, task.settings.block_size, texts)
    with autocast(task.device), torch.no_grad():
        found["sentence"] = sentence_maps(task.model, task.encoding, SENTENCE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")


def keep_log(folder, path):
    """Write the COLUMNS of a run's log.csv to `path`, in five digits, and its lambdas if they were recorded."""
    lambdas = {}
    if (folder / "lambdas.csv").exists():
        with open(folder / "lambdas.csv", encoding="utf-8") as file:
            lambdas = dict(line.split(",") for line in file.read().split("\n") if "," in line)
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["step"] != "0"]  # the validation before the first step
    columns = [name for name in COLUMNS if name in rows[0]] + ["lambdas"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            row["lambdas"] = lambdas.get(row["step"], "")
            writer.writerow(
                [round_digits(row[name]) if name not in ("step", "lambdas") else row[name] for name in columns]
            )


def remove_run(folder):
    """Remove the files of a run, and its folder if nothing else is in it."""
    for name in (*RUN_FILES, "lock"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def round_digits(text):
    return f"{float(text):.5g}" if text else ""


def log_path(logs, name):
    return Path(logs) / f"{name.replace('/', '-')}.csv"


def train_missing(runs, arguments):
    """Train the runs whose log is not in the folder --logs, except those that another process is training.

    Of a finished run, its folder keeps at most best.pt. Raises UserError if the run that one starts from is not done.
    """
    device = choose_device(arguments.device)
    for name, plan in runs.items():
        log, folder = log_path(arguments.logs, name), Path(arguments.out) / name
        if log.exists() and not folder.exists():
            print(f"{name}: done, see {log}")
            continue
        try:
            with run_folder(folder):
                if not log.exists():
                    if plan.after and not log_path(arguments.logs, plan.after).exists():
                        raise UserError(f"{name} begins with the model of {plan.after}, which is not done")
                    print(f"\n{name}:")
                    reset_memory(device)
                    train_run(plan, folder, log, arguments.device)
                for file in (NEWEST, PREVIOUS, DAMAGED):
                    (folder / file).unlink(missing_ok=True)
                if not plan.keep_best:
                    remove_run(folder)
        except FolderInUse:
            print(f"\n{name}: another process is training it")


# ---------------------------------------------------------------------------------------------------
# Command line


def add_flags(parser):
    """Add the flags that bench.runs and bench.figures share."""
    parser.add_argument("--corpus", default="docs", help="data set of the longer runs (default: %(default)s)")
    parser.add_argument("--logs", default="docs/runs", help="folder of finished runs' logs (default: %(default)s)")
    parser.add_argument("--out", default="out/runs", help="folder of unfinished runs (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny models, anew, in OUT/smoke")


def parse_runs(parser):
    """Parse the command line -> its arguments, and the planned runs.

    In a smoke test these are the runs of the first seed, and those that others start from.
    """
    parallel.refuse_torchrun()
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.out, arguments.logs = f"{arguments.out}/smoke", f"{arguments.out}/smoke/logs"
    runs = planned_runs(arguments.corpus, arguments.out)
    if arguments.smoke:
        chosen = {name: plan for name, plan in runs.items() if plan.keep_best or not name.endswith(("-2", "-3"))}
        runs = {name: shrink(plan) for name, plan in chosen.items()}
        for name in runs:
            remove_run(Path(arguments.out) / name)
            for suffix in (".csv", ".json"):
                log_path(arguments.logs, name).with_suffix(suffix).unlink(missing_ok=True)
    return arguments, runs


def main():
    parser = Parser(__doc__, prog="python -m bench.runs")
    parser.add_argument("names", nargs="*", default=["*"], help="names or patterns of runs")
    parser.add_argument("--list", action="store_true", help="list the names and exit")
    add_flags(parser)
    arguments, runs = parse_runs(parser)
    chosen = {name: plan for name, plan in runs.items() if any(fnmatch.fnmatch(name, p) for p in arguments.names)}
    if not chosen:
        raise UserError(f"there is no run called {' or '.join(arguments.names)}; --list lists them")
    if arguments.list:
        print("\n".join(f"{name}{'  (done)' if log_path(arguments.logs, name).exists() else ''}" for name in chosen))
        sys.exit()
    train_missing(chosen, arguments)


if __name__ == "__main__":
    run_script(main)
