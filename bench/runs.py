"""The training runs that bench.figures draws. A run is trained once; after that its log is enough.

python -m bench.runs                          # all whose log is not in docs/runs yet
python -m bench.runs 'curves/*-1' 'sweep/*'   # some, by name or pattern
python -m bench.runs --list                   # their names

An interrupted run goes on from its last checkpoint in out/runs. The runs of sweep, large and stable take a few minutes,
save none and begin anew. Several processes share the runs among them, on one GPU or each on its own
(CUDA_VISIBLE_DEVICES). The runs of retrieval and tuning start from the models of large, which have to be finished. The
smollm2 runs start from SmolLM2-135M-Instruct in out/smollm2 and out/smollm2-v2, which convert.py writes; their data
sets end in -smollm2. The runs of curves read data/wikitext2, the other pretraining data/large, a corpus that
docs/results.md describes.

A run of your own is an entry in planned_runs(), and if it is of a new kind, in NAMES and COLORS of bench/logs.py.
"""

import contextlib
import csv
import fnmatch
import functools
import itertools
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import dpo
import sft
import train
from bench import preset_shape, reset_memory
from bench.designs import DESIGNS
from bench.probes import probe
from bench.retrieval import Retrieval
from data.tokenizer import IM_END, IM_START
from engine import parallel
from engine.checkpoint import (
    DAMAGED,
    NEWEST,
    PREVIOUS,
    RUN_FILES,
    TOKENIZER_FILE,
    Checkpointer,
    load_checkpoint,
    load_latest,
    run_folder,
)
from engine.device import autocast, choose_device
from engine.files import FolderInUse, atomic_write, locked
from engine.graphs import uncompiled
from engine.log import Diverged, Log
from engine.settings import Parser, UserError, run_script
from model import ATTENTION

COLUMNS = ("step", "loss", "grad_norm", "accuracy", "margin", "val_loss", "val_accuracy", "val_margin")  # of a kept log
KINDS = ("vanilla", "v1", "v2")  # the attentions that are compared
SWEEP_RATES = (6e-4, 1.2e-3, 2.4e-3)
# Of SWEEP_RATES the one with the lowest held-out loss after 500 steps
BEST_RATE = {"vanilla": 1.2e-3, "v1": 1.2e-3, "v2": 2.4e-3}
SMOLLM2 = {"vanilla": "out/smollm2/best.pt", "v2": "out/smollm2-v2/best.pt"}
SMOKE = (  # runs of a smoke test: of each group one seed, or less, and what others start from
    "curves/*-1", "sweep/v2-0.0006", "large/*-4", "large/v2-1", "stable/v2-1", "design/v2-1", "design/norm-1",
    "retrieval/v2-1-*", "tuning/*", "smollm2/*",
)  # fmt: skip


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
    """What to train: a task (Pretraining, Retrieval, SFT or DPO) and its settings."""

    task_class: type
    settings: train.CommonSettings
    bare: bool = False  # without the methods
    after: str = ""  # name of the run whose best.pt it starts from
    keep: str = ""  # as best.pt, from which another run starts: the `best` model so far, or the `last`
    probe_texts: int = 0  # texts on which bench.probes, or Retrieval itself, measures the trained model
    noise: float = 0.0  # in the second query heads at the start, in units of the RMS of their weights
    full_log: bool = False  # the kept log has the validation before the first step, and the speed


BARE = dict(bare=True, compile="off", weight_decay=0.01)
SHORT = dict(batch_size=8, micro_batch_size=8, max_steps=1000, eval_interval=50, save_interval=500)
CONTINUED = dict(batch_size=16, micro_batch_size=16, max_steps=1000, eval_interval=50, save_interval=500)
CONTINUED |= dict(warmup_steps=100)
# On data/large: 98 million tokens, drawn at random from its 102 million. Validations are so frequent that the loss can
# be interpolated between them.
EPOCH = dict(dataset="large", batch_size=32, micro_batch_size=32, max_steps=1500, eval_interval=50, save_interval=1500)
THIRD = EPOCH | dict(max_steps=500, eval_interval=100)
SMALL = dict(n_layer=8, n_embd=384, n_head=6, n_kv_head=3, head_dim=64, n_inner=896, tie_embeddings=True)  # 32.3M
SMALL |= dict(dataset="large", block_size=512, batch_size=32, micro_batch_size=32, eval_interval=100, eval_windows=256)
TUNED = {  # by context: half of a step's sequences are needle texts
    512: dict(batch_size=32, micro_batch_size=16, max_steps=2000),
    2048: dict(batch_size=16, micro_batch_size=8, max_steps=1000),
}


def pretraining(attn, bare=False, keep="", probe_texts=0, full_log=False, **settings):
    settings = train.Settings(**preset_shape("ldiff", attn) | settings)
    return PlannedRun(train.Pretraining, settings, bare, keep=keep, probe_texts=probe_texts, full_log=full_log)


def planned_runs(out):
    """{name: PlannedRun}. `out` is the folder of --out, where the models are from which other runs start."""
    runs = {}
    for seed in (1, 2, 3):
        runs[f"curves/vanilla-bare-{seed}"] = pretraining("vanilla", seed=seed, attn_impl="naive", **BARE, **SHORT)
        runs[f"curves/v1-bare-{seed}"] = pretraining("v1", seed=seed, **BARE, **SHORT)
        for attn in KINDS:
            runs[f"curves/{attn}-{seed}"] = pretraining(attn, seed=seed, **SHORT)
    for attn, rate in itertools.product(KINDS, SWEEP_RATES):
        runs[f"sweep/{attn}-{rate:g}"] = pretraining(attn, full_log=True, learning_rate=rate, **THIRD)
    for seed, attn in itertools.product((1, 2, 3, 4, 5), KINDS):
        kept = dict(probe_texts=64, full_log=True)
        kept |= dict(keep="last" if seed <= 3 else "")  # retrieval starts from three seeds
        runs[f"large/{attn}-{seed}"] = pretraining(attn, **kept, seed=seed, learning_rate=BEST_RATE[attn], **EPOCH)
    for seed in (4, 5):
        # V1's authors keep the width of a head, and halve the number
        settings = replace(runs[f"large/v1-{seed}"].settings, n_head=6, head_dim=128)
        runs[f"large/v1-wide-{seed}"] = PlannedRun(train.Pretraining, settings, full_log=True)
        settings = replace(runs[f"large/v2-{seed}"].settings, n_kv_layers=6, n_inner=1920)  # at equal parameters
        runs[f"large/v2-shared-{seed}"] = PlannedRun(train.Pretraining, settings, full_log=True)
    settings = replace(runs["large/v2-4"].settings, learning_rate=BEST_RATE["vanilla"])  # which is V1's, too
    runs["large/v2-low-rate-4"] = replace(runs["large/v2-4"], settings=settings)
    settings = replace(runs["large/vanilla-3"].settings, n_head=12, head_dim=64)  # as many maps as V1
    runs["large/vanilla-heads-3"] = replace(runs["large/vanilla-3"], settings=settings)
    for seed, attn in itertools.product((1, 2, 3), KINDS):
        kept = dict(probe_texts=64, full_log=True)
        runs[f"stable/{attn}-{seed}"] = pretraining(attn, **kept, seed=seed, learning_rate=2e-3, **THIRD)
    for seed, attn in itertools.product((1, 2, 3), ("v2", "vanilla", *DESIGNS)):
        shape = SMALL | dict(n_inner=1024) if attn == "vanilla" else SMALL  # 32.3M, too
        settings = train.Settings(preset="ldiff", attn=attn, seed=seed, **shape)
        runs[f"design/{attn}-{seed}"] = PlannedRun(train.Pretraining, settings, full_log=True)
    for seed, length, kind in itertools.product((1, 2, 3), TUNED, (*KINDS, "vanilla-heads")):
        name, after = f"retrieval/{kind}-{seed}", f"large/{kind}-{seed}"
        if after not in runs:  # vanilla-heads has a single seed
            continue
        attn = runs[after].settings.attn
        if length == 2048:
            after = f"{name}-512"
        settings = dict(preset="ldiff", attn=attn, init_from=f"{out}/{after}/best.pt", dataset="large", seed=seed)
        settings |= dict(learning_rate=3e-4, warmup_steps=100, eval_interval=100, eval_windows=256)
        settings = train.Settings(**settings, block_size=length, **TUNED[length])
        kept = dict(keep="last" if length == 512 else "", probe_texts=512, full_log=True)
        runs[f"{name}-{length}"] = PlannedRun(Retrieval, settings, after=after, **kept)
    for stage, task_class, settings_class, after in (
        ("sft", sft.SFT, sft.Settings, "large/v2-1"), ("dpo", dpo.DPO, dpo.Settings, "tuning/sft"),
    ):  # fmt: skip
        settings = settings_class(preset="ldiff", attn="v2", save_interval=1000, init_from=f"{out}/{after}/best.pt")
        keep = "best" if stage == "sft" else ""
        runs[f"tuning/{stage}"] = PlannedRun(task_class, settings, after=after, keep=keep)
    for (attn, start), rate in itertools.product(SMOLLM2.items(), ("2e-4", "6e-4")):
        settings = dict(preset="ldiff", attn=attn, init_from=start, dataset="large-smollm2", **CONTINUED)
        settings = train.Settings(**settings, learning_rate=float(rate))
        runs[f"smollm2/{attn}-{rate}"] = PlannedRun(train.Pretraining, settings, full_log=True)
    runs["smollm2/v2-noise-6e-4"] = replace(runs["smollm2/v2-6e-4"], noise=0.1)
    tuned = dict(preset="ldiff", attn="v2", eval_interval=25)
    settings = sft.Settings(init_from=SMOLLM2["v2"], dataset="slimorca-smollm2", max_steps=200, **tuned)
    runs["smollm2/sft"] = PlannedRun(sft.SFT, settings, keep="best", full_log=True)
    tuned |= dict(init_from=f"{out}/smollm2/sft/best.pt", dataset="orca_dpo_pairs-smollm2", max_steps=100)
    runs["smollm2/dpo"] = PlannedRun(dpo.DPO, dpo.Settings(**tuned), after="smollm2/sft", keep="best", full_log=True)
    return runs


def shrink(plan):
    """The same run with a tiny model and few steps: a few seconds on any machine."""
    micro_batches = plan.settings.batch_size // plan.settings.micro_batch_size
    small = dict(preset="tiny", dataset="tiny", batch_size=2, micro_batch_size=2 // micro_batches, max_steps=4)
    small |= dict(eval_interval=2, warmup_steps=1)
    if isinstance(plan.settings, train.Settings):
        shapes = train.SHAPES["tiny"]
        small |= {**shapes.get(plan.settings.attn, shapes["v2"]), "block_size": 256, "n_layer": 4, "n_embd": 192}
        small |= dict(eval_windows=2, n_kv_layers=min(2, plan.settings.n_kv_layers))
        if not plan.after:  # SmolLM2 itself is too large
            small |= dict(init_from="")
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


@torch.no_grad()
def add_noise(model, noise, seed):
    """Add noise to the second query heads of a DIFF V2 model: normal, of `noise` times the RMS of a head's weights."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on all machines
    for layer in model.layers:
        second = layer.attn.q_proj.weight.unflatten(0, (-1, 2, layer.attn.head_dim))[:, 1]  # a view, (H / 2, D, C)
        rms = second.square().mean(dim=(1, 2), keepdim=True).sqrt()
        second += noise * rms * torch.randn(second.shape, generator=generator).to(second.device)


@torch.no_grad()
def query_distances(model):
    """Return how far the two query heads of a pair are apart in each layer, relative to the RMS of their norms."""
    pairs = [layer.attn.q_proj.weight.unflatten(0, (-1, 2, layer.attn.head_dim)) for layer in model.layers]
    return [((q[:, 0] - q[:, 1]).norm() / (q.norm() / math.sqrt(2))).item() for q in pairs]


@mock.patch.dict(ATTENTION, DESIGNS)
def train_run(plan, folder, log, device):
    """Train a run in `folder`, which is locked, or resume it. Writes `log`, what is kept of its log.csv."""
    pretrains = issubclass(plan.task_class, train.Pretraining)
    resume = any((folder / name).exists() for name in (NEWEST, PREVIOUS))
    settings = replace(plan.settings, out_dir=str(folder), resume=resume, device=device)
    if plan.after and not resume and not Path(settings.init_from).exists():
        raise UserError(
            f"there is no {settings.init_from}: the log of {plan.after} was kept, its model not; "
            "with another folder as --logs, both can be trained"
        )
    checkpoint = load_checkpoint(settings.init_from) if settings.init_from and not resume else None
    if resume:
        checkpoint = load_latest(folder)
    if checkpoint and pretrains:  # its model has the shape, which the plan does not know
        names = checkpoint["config"].keys() & train.MODEL_FLAGS - {"attn", "block_size"}
        settings = replace(settings, **{name: checkpoint["config"][name] for name in names})

    def record_lambdas(step):
        with autocast(task.device), uncompiled():
            lambdas = task.model.lambdas(task.val_batches[0][0][:1].to(task.device))
        with open(folder / "lambdas.csv", "a", encoding="utf-8") as file:
            file.write(f"{step},{' '.join(f'{value:.4f}' for value in lambdas)}\n")

    def on_step(row):
        if "val_loss" in row and pretrains:
            record_lambdas(row["step"])

    # A resumed run would miss the ids of chats, which an unpadded vocabulary has not.
    patched = mock.patch.multiple(train, pad_vocab=unpadded_vocab, lr_at=constant_lr, check_fit=mock.DEFAULT)
    with patched if plan.bare else contextlib.nullcontext():
        task, optimizer = make_task(plan, settings, checkpoint)
        checkpointer = Checkpointer(task, optimizer)
        checkpointer.start(checkpoint)
        # Saving takes longer than validating. A checkpoint of the end would be deleted at once.
        last, save, save_if_best = settings.max_steps, checkpointer.save, checkpointer.save_if_best
        checkpointer.save = lambda step: step < last and save(step)
        if plan.keep != "best":
            checkpointer.save_if_best = lambda step, loss: plan.keep and step == last and save_if_best(step, loss)
        if plan.noise and not resume:
            add_noise(task.model, plan.noise, settings.seed)
        if pretrains and not resume:
            record_lambdas(0)
        run_log = Log(task)
        if plan.task_class is Retrieval:
            run_log.columns.append("val_accuracy")  # a training step has none
        try:
            train.fit(task, optimizer, checkpointer, run_log, on_step)
        except Diverged as error:  # its log up to here is the result
            print(f"{folder}: {error}")
    measured = {}
    with uncompiled():
        if plan.task_class is Retrieval:
            measured |= task.measure(plan.probe_texts)
        elif plan.probe_texts:
            tokens = torch.cat([inputs.flatten() for inputs, _ in task.val_batches]).numpy()
            measured |= probe(task.model, tokens, settings.block_size, plan.probe_texts)
    if plan.full_log and plan.task_class is train.Pretraining and settings.attn == "v2":
        measured["query_distances"] = query_distances(task.model)
    if measured:
        log.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(log.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    keep_log(folder, log, plan.full_log)  # last, since it marks the run as done


def keep_log(folder, path, full=False):
    """Write the COLUMNS of a run's log.csv to `path`, in five digits, and its lambdas if they were recorded.

    A full log has two things more: row 0, the validation before the first step, and the speed.
    """
    lambdas = {}
    if (folder / "lambdas.csv").exists():
        with open(folder / "lambdas.csv", encoding="utf-8") as file:
            lambdas = dict(line.split(",") for line in file.read().split("\n") if "," in line)
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in COLUMNS if name in rows[0]]
    if full:
        columns += [name for name in rows[0] if name.endswith("_per_s")]
    else:
        rows = [row for row in rows if row["step"] != "0"]
    columns.append("lambdas")
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
    for path in (*(folder / name for name in (*RUN_FILES, "lock")), *folder.glob(TOKENIZER_FILE)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def round_digits(text):
    return f"{float(text):.5g}" if text else ""


def log_path(logs, name):
    return Path(logs) / f"{name.replace('/', '-')}.csv"


def train_missing(runs, arguments):
    """Train the runs whose log is not in the folder --logs, except those that another process is training.

    Of a finished run, its folder keeps at most best.pt. If another process is training the run that one starts from,
    wait for it. Raises UserError if that run is not done.
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
                    if plan.after and (before := Path(arguments.out) / plan.after).exists():
                        with locked(before, waiting=f"\n{name} waits for {plan.after}"):
                            pass
                    if plan.after and not log_path(arguments.logs, plan.after).exists():
                        raise UserError(f"{name} begins with the model of {plan.after}, which is not done")
                    print(f"\n{name}:")
                    reset_memory(device)
                    train_run(plan, folder, log, arguments.device)
                for file in (NEWEST, PREVIOUS, DAMAGED):
                    (folder / file).unlink(missing_ok=True)
                if not plan.keep:
                    remove_run(folder)
        except FolderInUse:
            print(f"\n{name}: another process is training it")


# ---------------------------------------------------------------------------------------------------
# Command line


def add_flags(parser):
    """Add the flags that bench.runs and bench.figures share."""
    parser.add_argument("--logs", default="docs/runs", help="folder of finished runs' logs (default: %(default)s)")
    parser.add_argument("--out", default="out/runs", help="folder of unfinished runs (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny models, anew, in OUT/smoke")


def parse_runs(parser):
    """Parse the command line -> its arguments, and the planned runs.

    In a smoke test these are the runs that SMOKE names.
    """
    parallel.refuse_torchrun()
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.out, arguments.logs = f"{arguments.out}/smoke", f"{arguments.out}/smoke/logs"
    runs = planned_runs(arguments.out)
    if arguments.smoke:
        chosen = [name for name in runs if any(fnmatch.fnmatch(name, pattern) for pattern in SMOKE)]
        runs = {name: shrink(runs[name]) for name in chosen}
        runs["smollm2/sft"] = replace(runs["tuning/sft"], full_log=True)  # SmolLM2 itself is too large
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
    for pattern in arguments.names:
        if not fnmatch.filter(runs, pattern):
            raise UserError(f"there is no run called {pattern}; --list lists them, and a group is 'large/*'")
    chosen = {name: plan for name, plan in runs.items() if any(fnmatch.fnmatch(name, p) for p in arguments.names)}
    if arguments.list:
        print("\n".join(f"{name}{'  (done)' if log_path(arguments.logs, name).exists() else ''}" for name in chosen))
        sys.exit()
    train_missing(chosen, arguments)


if __name__ == "__main__":
    run_script(main)
