"""The training runs that bench.figures draws: made here once, after which their logs are enough.

python -m bench.runs                          # all whose log is not in docs/runs yet
python -m bench.runs 'curves/*-1' 'rates/*'   # some, by name or pattern
python -m bench.runs --list                   # their names

An interrupted run goes on from its checkpoint in out/runs. Several processes, on one GPU or each on its own
(CUDA_VISIBLE_DEVICES), share the work out among them. The larger corpus is a data set of one's own (README). The
tuning runs begin with the models of others, which have to be finished.
"""

import csv
import fnmatch
import itertools
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import dpo
import parallel
import sft
import train
from bench import fresh_memory
from bench.probes import probe, sentence_maps
from data import Parser, UserError, run_script
from data.dataset import atomic_write

SENTENCE = "The dog that chased the cat up the tree sat down under the tree, and the cat looked down at the dog."
KEPT = ("step", "loss", "grad_norm", "accuracy", "margin", "val_loss", "val_accuracy", "val_margin")  # of a log.csv
KINDS = ("vanilla", "v1", "v2")  # a fork's own kind of attention has no place in the report's figures
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
    """Pretraining that keeps the lambdas of every validation, and its best model only if that is wanted."""

    keep = False

    def save_best(self, step):
        if self.keep:
            super().save_best(step)

    def validate(self, step):
        values, line = super().validate(step)
        with train.autocast(self.device):
            lambdas = self.model.lambdas(self.val_batches[0][0][:1].to(self.device))
        with open(self.out_dir / "lambdas.csv", "a", encoding="utf-8") as file:
            file.write(f"{step},{' '.join(f'{value:.4f}' for value in lambdas)}\n")
        return values, line


class WithoutMethods(Recorded):
    """Pretraining without the methods that L-Diff adds: the vocabulary is not padded, logits are kept, the learning
    rate is constant, and AdamW has PyTorch's own settings. BARE turns the compiler off, and the report's baseline has
    no fused attention either. bf16 and clipped gradients stay."""

    def config(self):
        return unpadded(super().config(), self.encoding)

    def make_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), weight_decay=self.settings.weight_decay, fused=True)

    def learning_rate(self, step):
        return self.settings.learning_rate

    def loss_of(self, inputs, targets):
        with train.autocast(self.device):
            loss = plain_loss(self.compiled, inputs, targets)
        return {"loss": loss * len(inputs) / self.settings.batch_size}


@dataclass
class Planned:
    """A run to be made: its class and settings; the run whose model it begins with; whether its own best.pt is wanted
    afterwards; and in how many texts its attention is looked at in the end."""

    kind: type
    settings: train.CommonSettings
    after: str = ""
    keep: bool = False
    texts: int = 0


SHORT = dict(batch_size=8, micro_batch_size=8, max_steps=1000, eval_interval=50, save_interval=500)
LONG = dict(batch_size=32, micro_batch_size=32, max_steps=1500, eval_interval=250, save_interval=500)
BARE = dict(kind=WithoutMethods, compile="off", weight_decay=0.01)


def pretraining(attn, kind=Recorded, keep=False, texts=0, **settings):
    shape = {**train.shape_of("ldiff", attn), "preset": "ldiff", "attn": attn}
    return Planned(kind, train.Settings(**shape, **settings), keep=keep, texts=texts)


def planned_runs(corpus, out):
    """{name: Planned}. Three seeds where curves are compared, two where final losses are."""
    runs = {}
    for seed in (1, 2, 3):
        runs[f"curves/vanilla-bare-{seed}"] = pretraining("vanilla", seed=seed, attn_impl="naive", **BARE, **SHORT)
        runs[f"curves/v1-bare-{seed}"] = pretraining("v1", seed=seed, **BARE, **SHORT)
        for attn in KINDS:
            runs[f"curves/{attn}-{seed}"] = pretraining(attn, seed=seed, **SHORT)
    for seed, attn in itertools.product((1, 2), KINDS):
        keep = (attn, seed) == ("v2", 2)  # SFT begins with it
        runs[f"corpus/{attn}-{seed}"] = pretraining(attn, keep=keep, texts=64, seed=seed, dataset=corpus, **LONG)
    for attn, rate in itertools.product(KINDS, LEARNING_RATES):
        runs[f"rates/{attn}-{rate:g}"] = pretraining(attn, learning_rate=rate, dataset=corpus, **SHORT)
    tuning = dict(preset="ldiff", attn="v2", save_interval=1000)
    for stage, kind, settings, after in (
        ("sft", sft.SFT, sft.Settings, "corpus/v2-2"), ("dpo", dpo.DPO, dpo.Settings, "tuning/sft"),
    ):  # fmt: skip
        begin = settings(**tuning, init_from=f"{out}/{after}/best.pt")
        runs[f"tuning/{stage}"] = Planned(kind, begin, after=after, keep=stage == "sft")
    return runs


def shrunk(plan):
    """The same run in a few seconds on any machine."""
    few = dict(preset="tiny", dataset="tiny", batch_size=2, micro_batch_size=2, max_steps=4, eval_interval=2)
    few |= dict(warmup_steps=1)
    if isinstance(plan.settings, train.Settings):
        few |= {**train.shape_of("tiny", plan.settings.attn), "block_size": 256, "n_layer": 4, "n_embd": 192}
        few |= dict(eval_windows=2)
    else:
        few |= dict(eval_examples=4)
    return replace(plan, settings=replace(plan.settings, **few), texts=min(plan.texts, 2))


# ---------------------------------------------------------------------------------------------------
# Making one


def make(plan, folder, log, device):
    """Carry out a run in `folder`, which is locked, or the rest of it, and write `log`, what is kept of its log.csv."""
    resume = any((folder / name).exists() for name in (train.NEWEST, train.PREVIOUS))
    settings = replace(plan.settings, out_dir=str(folder), resume=resume, device=device)
    if resume:
        start = train.load_latest(folder)
    else:
        train.make_room(folder)
        start = train.load_checkpoint(settings.init_from) if settings.init_from else None
    run = plan.kind(settings, start)
    run.keep = plan.keep
    try:
        train.fit(run, train.Log(run))
    except train.Diverged as error:  # what came before is the result
        print(f"{folder}: {error}")
    if plan.texts:
        look_inside(run, plan.texts, log.with_suffix(".json"))
    keep_log(folder, log)  # last, for it marks the run as done


def clean_up(plan, folder):
    """Remove what is not needed of a finished run."""
    for name in (train.NEWEST, train.PREVIOUS, train.DAMAGED):
        (folder / name).unlink(missing_ok=True)
    if not plan.keep:
        shutil.rmtree(folder, ignore_errors=True)


def look_inside(run, texts, path):
    """Write what bench.probes finds in a run's model, with held-out text around its needles."""
    tokens = torch.cat([inputs.flatten() for inputs, _ in run.val_batches]).numpy()
    found = probe(run.model, run.encoding, tokens, run.settings.block_size, texts)
    with train.autocast(run.device), torch.no_grad():
        found["sentence"] = sentence_maps(run.model, run.encoding, SENTENCE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")


def keep_log(folder, path):
    """The columns KEPT of log.csv in five digits, and the lambdas where they were recorded."""
    lambdas = {}
    if (folder / "lambdas.csv").exists():
        with open(folder / "lambdas.csv", encoding="utf-8") as file:
            lambdas = dict(line.split(",") for line in file.read().split("\n") if "," in line)
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in KEPT if name in rows[0]] + ["lambdas"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
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
    """Make those of the runs whose log is not in the folder --logs, and which no other process is making."""
    device = train.choose_device(arguments.device)
    for name, plan in runs.items():
        log, folder = log_path(arguments.logs, name), Path(arguments.out) / name
        if log.exists() and not folder.exists():
            print(f"{name}: done, see {log}")
            continue
        try:
            with train.locked(folder):
                if not log.exists():
                    make_in_turn(name, plan, folder, log, arguments, device)
                clean_up(plan, folder)
        except train.Busy:
            print(f"\n{name}: another process is at it")


def make_in_turn(name, plan, folder, log, arguments, device):
    """Make a run; raises UserError if the one that it begins with is not done."""
    if plan.after and not log_path(arguments.logs, plan.after).exists():
        raise UserError(f"{name} begins with the model of {plan.after}, which is not done")
    print(f"\n{name}:")
    fresh_memory(device)
    make(plan, folder, log, arguments.device)


def add_flags(parser):
    parser.add_argument("--corpus", default="docs", help="data set of the longer runs (default: %(default)s)")
    parser.add_argument("--logs", default="docs/runs", help="folder of finished runs' logs (default: %(default)s)")
    parser.add_argument("--out", default="out/runs", help="folder of runs under way (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny models, anew, in OUT/smoke")


def parse(parser):
    """The arguments, and the runs that they are about; in a smoke test, those of the first seed and what they need."""
    parallel.refuse_several()
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.out, arguments.logs = f"{arguments.out}/smoke", f"{arguments.out}/smoke/logs"
        shutil.rmtree(arguments.out, ignore_errors=True)
    runs = planned_runs(arguments.corpus, arguments.out)
    if arguments.smoke:
        runs = {name: shrunk(plan) for name, plan in runs.items() if plan.keep or not name.endswith(("-2", "-3"))}
    return arguments, runs


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
