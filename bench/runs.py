"""The training runs that bench.figures draws: made here once, after which their logs are enough.

python -m bench.runs                          # all whose log is not in docs/runs yet
python -m bench.runs 'curves/*-1' sft dpo     # some, by name or pattern; several GPUs can take different ones
python -m bench.runs --list                   # their names

An interrupted run goes on from its checkpoint in out/runs. The larger corpus is a data set of one's own (README).
"""

import csv
import fnmatch
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import dpo
import sft
import train
from bench import fresh_memory
from data import Parser, UserError, run_script
from model import ATTENTION

KEPT = ("step", "loss", "grad_norm", "accuracy", "margin", "val_loss", "val_accuracy", "val_margin")  # of a log.csv
LEARNING_RATES = (6e-4, 2e-3, 6e-3)


# ---------------------------------------------------------------------------------------------------
# Kinds of run


def unpadded(config, encoding):
    """The shape of a model whose vocabulary is just the tokenizer's: 50,257 ids for GPT-2."""
    return replace(config, vocab_size=encoding.eot_token + 1)


def plain_loss(model, inputs, targets):
    """The mean cross-entropy of logits that exist all at once."""
    logits, _ = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Recorded(train.Pretraining):
    """Pretraining that keeps the lambdas of every validation too."""

    def validate(self, step):
        values, line = super().validate(step)
        with train.autocast(self.device):
            lambdas = self.model.lambdas(self.val_batches[0][0][:1].to(self.device))
        with open(self.out_dir / "lambdas.csv", "a", encoding="utf-8") as file:
            file.write(f"{step},{' '.join(f'{value:.4f}' for value in lambdas)}\n")
        return values, line


class WithoutMethods(Recorded):
    """Pretraining without the methods that L-Diff adds: the vocabulary is not padded, logits are kept, the learning
    rate is constant, and AdamW has PyTorch's own settings. Its settings turn the compiler off, and for the report's
    baseline the fused attention."""

    def config(self):
        return unpadded(super().config(), self.encoding)

    def make_optimizer(self):
        return torch.optim.AdamW(self.model.parameters())

    def learning_rate(self, step):
        return self.settings.learning_rate

    def loss_of(self, inputs, targets):
        with train.autocast(self.device):
            loss = plain_loss(self.compiled, inputs, targets)
        return {"loss": loss * len(inputs) / self.settings.batch_size}


@dataclass
class Planned:
    """A run to be made: its class and settings, and whether its best.pt is wanted afterwards."""

    kind: type
    settings: train.CommonSettings
    keep: bool = False


def planned_runs(corpus, out, device, smoke):
    """{name: Planned}. Three seeds where curves are compared, two where final losses are."""
    seeds, small = ((1,), (1,)) if smoke else ((1, 2, 3), (1, 2))
    few = dict(batch_size=8, micro_batch_size=8, max_steps=1000, eval_interval=50, save_interval=500)
    many = dict(batch_size=32, micro_batch_size=32, max_steps=1500, eval_interval=250, save_interval=500)
    tuning = dict(eval_interval=100, save_interval=1000, device=device)
    if smoke:
        corpus = "tiny"
        few = many = dict(batch_size=2, micro_batch_size=2, max_steps=4, eval_interval=2, eval_windows=2)
        tuning |= dict(max_steps=4, batch_size=2, eval_examples=4, warmup_steps=1)

    def pretraining(attn, kind=Recorded, keep=False, **changes):
        preset = "tiny" if smoke else "ldiff"
        shape = {**train.PRESETS[preset], **train.SHAPES[preset, attn], "preset": preset, "attn": attn}
        warmup = 2 if smoke else 200
        return Planned(kind, train.Settings(**{**shape, "device": device, "warmup_steps": warmup, **changes}), keep)

    wikitext = "tiny" if smoke else "wikitext2"
    bare = dict(kind=WithoutMethods, compile="off", dataset=wikitext, learning_rate=6e-4)
    runs = {}
    for seed in seeds:
        runs[f"curves/vanilla-bare-{seed}"] = pretraining("vanilla", seed=seed, attn_impl="naive", **bare, **few)
        runs[f"curves/v1-bare-{seed}"] = pretraining("v1", seed=seed, **bare, **few)
        for attn in ATTENTION:
            runs[f"curves/{attn}-{seed}"] = pretraining(attn, seed=seed, dataset=wikitext, **few)
    for seed in small:
        for attn in ATTENTION:
            runs[f"corpus/{attn}-{seed}"] = pretraining(attn, keep=True, seed=seed, dataset=corpus, **many)
    for attn in ATTENTION:
        for rate in LEARNING_RATES:
            runs[f"rates/{attn}-{rate:g}"] = pretraining(attn, learning_rate=rate, dataset=corpus, **few)
    tuning |= dict(preset="tiny" if smoke else "ldiff", attn="v2")
    data = ("tiny", "tiny") if smoke else (sft.Settings.dataset, dpo.Settings.dataset)
    base, tuned = f"{out}/corpus/v2-1/best.pt", f"{out}/sft/best.pt"
    runs["sft"] = Planned(sft.SFT, sft.Settings(**tuning, dataset=data[0], init_from=base), keep=True)
    runs["dpo"] = Planned(dpo.DPO, dpo.Settings(**tuning, dataset=data[1], init_from=tuned))
    return runs


# ---------------------------------------------------------------------------------------------------
# Making one


def make(plan, folder, log):
    """Carry out a run in `folder`, or the rest of it, and write `log`, what is kept of its log.csv."""
    resume = (folder / "ckpt.pt").exists()
    settings = replace(plan.settings, out_dir=str(folder), resume=resume)
    start = train.load_checkpoint(folder / "ckpt.pt") if resume else None
    if not resume and settings.init_from:
        start = train.load_checkpoint(settings.init_from)
    run = plan.kind(settings, start)
    if not resume:
        train.make_room(folder)
    try:
        train.fit(run, train.Log(run))
    except UserError as error:  # a number that is not finite: what came before is the result
        if "not finite" not in str(error):
            raise
        print(f"{folder}: {error}")
    keep_log(folder, log)
    (folder / "ckpt.pt").unlink(missing_ok=True)
    if not plan.keep:
        shutil.rmtree(folder)


def keep_log(folder, path):
    """The columns KEPT of log.csv in five digits, and the lambdas where they were recorded."""
    lambdas = {}
    if (folder / "lambdas.csv").exists():
        with open(folder / "lambdas.csv", encoding="utf-8") as file:
            lambdas = dict(line.rstrip("\n").split(",") for line in file)
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in KEPT if name in rows[0]] + ["lambdas"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            row["lambdas"] = lambdas.get(row["step"], "")
            writer.writerow([_short(row[name]) if name not in ("step", "lambdas") else row[name] for name in columns])


def _short(text):
    return f"{float(text):.5g}" if text else ""


def log_path(logs, name):
    return Path(logs) / f"{name.replace('/', '-')}.csv"


def make_missing(runs, arguments):
    """Make those of the runs whose log is not in the folder --logs."""
    device = train.choose_device(arguments.device)
    for name, plan in runs.items():
        log = log_path(arguments.logs, name)
        if not log.exists():
            print(f"\n{name}:")
            fresh_memory(device)
            make(plan, Path(arguments.out) / name, log)


def add_flags(parser):
    parser.add_argument("--corpus", default="docs", help="data set of the longer runs (default: %(default)s)")
    parser.add_argument("--logs", default="docs/runs", help="folder of finished runs' logs (default: %(default)s)")
    parser.add_argument("--out", default="out/runs", help="folder of runs under way (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny models, in out/smoke")


def parse(parser):
    """The arguments, and the runs that they are about."""
    arguments = parser.parse_args()
    if arguments.smoke:
        shutil.rmtree("out/smoke", ignore_errors=True)
        arguments.out, arguments.logs = "out/smoke/runs", "out/smoke/logs"
    return arguments, planned_runs(arguments.corpus, arguments.out, arguments.device, arguments.smoke)


def main():
    parser = Parser(__doc__, prog="python -m bench.runs")
    parser.add_argument("names", nargs="*", default=["*"], help="names or patterns of runs")
    parser.add_argument("--list", action="store_true", help="list the names and leave")
    add_flags(parser)
    arguments, runs = parse(parser)
    chosen = {name: plan for name, plan in runs.items() if any(fnmatch.fnmatch(name, p) for p in arguments.names)}
    if not chosen:
        raise UserError(f"there is no run called {' or '.join(arguments.names)}; --list lists them")
    if arguments.list:
        print("\n".join(f"{name}{'  (done)' if log_path(arguments.logs, name).exists() else ''}" for name in chosen))
        sys.exit()
    make_missing(chosen, arguments)


if __name__ == "__main__":
    run_script(main)
