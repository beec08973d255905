"""The pictures and tables of docs/results.md and docs/finetuning.md, from what bench.runs has kept. No GPU needed.

python -m bench.figures                      # of all groups of runs
python -m bench.figures --only curves large  # of two
python -m bench.figures --logs out/logs      # of the runs whose logs are there; bench.plot draws any log.csv

The tables are printed as Markdown, and the pictures written to docs/. The groups sweep, large, stable, design and
retrieval are drawn from the runs that are done, the others when all of their runs are.
"""

import itertools
from pathlib import Path

import numpy as np

from bench import evidence
from bench.logs import (
    COLORS,
    NAMES,
    draw_lambdas,
    gaps,
    held_out_at,
    legend_above,
    median_speed,
    middle,
    norm_columns,
    over_seeds,
    plt,
    print_table,
    read_json,
    read_log,
    read_seeds,
    save,
    smooth,
)
from bench.runs import KINDS, add_flags, log_path, parse_runs, train_missing
from engine.settings import Parser, UserError, run_script

REPORT_ROWS = {
    "vanilla-bare": "(a) plain Transformer, nothing else", "v1-bare": "(b) V1 without the methods",
    "v1": "(c) V1, with all methods", "v2": "(c) V2, with all methods", "vanilla": "(d) plain, with all methods",
}  # fmt: skip
SMOLLM2_LINES = {  # of the runs of smollm2, in a picture; the wide ones are below others
    "vanilla-2e-4": dict(label="plain, 2e-4", color="moccasin", linewidth=5),
    "v2-2e-4": dict(label="V2, 2e-4", color="tab:orange", linewidth=1.2),
    "vanilla-6e-4": dict(label="plain, 6e-4", color="lightgray", linewidth=5),
    "v2-6e-4": dict(label="V2, 6e-4", color="tab:blue", linewidth=1.2),
    "v2-noise-6e-4": dict(label="V2 with noise, 6e-4", color="black", linewidth=1.2, linestyle=":"),
}
GAP_STEPS = (100, 250, 500, 1000)  # at which a table compares V2 made from SmolLM2 with SmolLM2


# ---------------------------------------------------------------------------------------------------
# Loss and gradient norm (figures 2 and 3), fine-tuning (4 and 5)


def curves(logs, runs, folder):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    kinds = {kind: read_seeds(logs, runs, f"curves/{kind}-") for kind in REPORT_ROWS}
    for (kind, seeds), (axis, column) in itertools.product(kinds.items(), zip(axes, ("loss", "grad_norm"))):
        shortest = min(len(log["step"]) for log in seeds)  # a run that diverged ends early
        lines = np.array([smooth(log[column][:shortest]) for log in seeds])
        steps = middle(seeds[0]["step"][:shortest], lines[0])
        axis.plot(steps, lines.mean(0), color=COLORS[kind], label=REPORT_ROWS[kind], linewidth=1)
        axis.fill_between(steps, lines.min(0), lines.max(0), color=COLORS[kind], alpha=0.2, linewidth=0)
    axes[0].set(xlabel="step", ylabel="training loss, nats", yscale="log")
    axes[1].set(xlabel="step", ylabel="norm of the gradient, before clipping", yscale="log")
    axes[1].axvline(200, color="lightgray", zorder=0, linewidth=1)
    top = dict(y=0.95, transform=axes[1].get_xaxis_transform())
    axes[1].text(205, s="(c), (d): end of the warmup", fontsize=8, color="gray", **top)
    title = "mean over 20 steps and three seeds; band: lowest to highest seed"
    legend_above(axes[0], ncol=2, title=title, title_fontsize=7)
    save(figure, folder / "curves.png")
    print_table("Training loss, nats", loss_rows(kinds))
    norms = [{"run": REPORT_ROWS[kind]} | norm_columns(seeds) for kind, seeds in kinds.items()]
    print_table("Gradient norm, seed by seed", norms)


def loss_rows(kinds):
    """The mean training loss of all steps, and its distance from both baselines seed by seed."""
    means = {kind: [np.nanmean(log["loss"]) for log in seeds] for kind, seeds in kinds.items()}
    rows = []
    for kind, losses in means.items():
        row = {"run": REPORT_ROWS[kind], "training loss, mean of all steps": over_seeds(losses)}
        for baseline, letter in (("vanilla-bare", "a"), ("vanilla", "d")):
            changes = [100 * (loss / other - 1) for loss, other in zip(losses, means[baseline])]
            row[f"against ({letter})"] = f"{over_seeds(changes, 1, '+')} %" if kind != baseline else ""
        rows.append(row)
    return rows


def tuning(logs, runs, folder):
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6))
    sft, dpo = read_log(logs, "tuning/sft"), read_log(logs, "tuning/dpo")
    panels = ((sft, "loss", "SFT: loss", "nats a token"), (dpo, "loss", "DPO: loss", "nats a pair"))
    panels += ((dpo, "accuracy", "DPO: accuracy", "share of pairs"), (dpo, "margin", "DPO: margin of rewards", "nats"))
    for axis, (log, column, title, label) in zip(axes, panels):
        line, held_out = smooth(log[column]), log[f"val_{column}"]
        axis.plot(middle(log["step"], line), line, color="tab:blue", linewidth=1, label="training, mean over 20 steps")
        measured = ~np.isnan(held_out)
        axis.plot(log["step"][measured], held_out[measured], "o", color="tab:orange", markersize=4, label="held out")
        axis.set(xlabel="step", title=title, ylabel=label)
    axes[0].legend(fontsize=7)
    save(figure, folder / "tuning.png")
    rows = []
    for name, log in (("SFT", sft), ("DPO", dpo)):
        measured = {key: log[key] for key in ("loss", "val_loss", "val_accuracy", "val_margin") if key in log}
        row = {"stage": name, "steps": len(log["step"]), "loss, first and last 50 steps": first_and_last(log["loss"])}
        row |= {"lowest held-out loss": f"{np.nanmin(measured['val_loss']):.3f}"}
        row |= {"held-out at the end": ", ".join(f"{k[4:]} {v[-1]:.3f}" for k, v in measured.items() if "val" in k)}
        rows.append(row)
    print_table("Fine-tuning", rows)


def first_and_last(values, width=50):
    return f"{np.nanmean(values[:width]):.3f}, {np.nanmean(values[-width:]):.3f}"


# ---------------------------------------------------------------------------------------------------
# Held-out loss


def wikitext2(logs, runs, folder):
    losses = {attn: [np.nanmin(log["val_loss"]) for log in read_seeds(logs, runs, f"curves/{attn}-")] for attn in KINDS}
    rows = []
    for attn, lowest in losses.items():
        differences = [loss - plain for loss, plain in zip(lowest, losses["vanilla"])]
        row = {"attn": NAMES[attn], "seeds": len(lowest), "held-out loss, nats": over_seeds(lowest)}
        row["minus plain's"] = over_seeds(differences, 3, "+") if attn != "vanilla" else ""
        rows.append(row)
    print_table("Held-out loss on WikiText-2, at its lowest", rows)


# ---------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct: trained on as it is and as DIFF V2, and fine-tuned as DIFF V2


def smollm2(logs, runs, folder):
    found = {name: read_log(logs, f"smollm2/{name}") for name in SMOLLM2_LINES}
    labels = {name: line["label"] for name, line in SMOLLM2_LINES.items()}
    plain, v2, noisy = (found[f"{kind}-6e-4"] for kind in ("vanilla", "v2", "v2-noise"))  # the better rate of both

    figure, (loss_axis, gap_axis, lambda_axis) = plt.subplots(1, 3, figsize=(13, 3.8))
    for name, log in found.items():
        measured = ~np.isnan(log["val_loss"])
        loss_axis.plot(log["step"][measured], log["val_loss"][measured], **SMOLLM2_LINES[name])
    loss_axis.set(xlabel="step", ylabel="held-out loss, nats", title="SmolLM2-135M, trained further")
    loss_axis.legend(title="model, peak learning rate", title_fontsize=8, fontsize=8)

    settings = runs["smollm2/vanilla-6e-4"].settings
    steps = plain["step"][~np.isnan(plain["val_loss"])]
    steps = steps[steps >= settings.warmup_steps]  # before, the loss falls too steeply to interpolate it
    gap_axis.axhline(0, color="lightgray", zorder=0)
    for gap, label, line in zip(gaps(v2, plain, steps), ("steps", "time (that of plain's steps)"), ("o-", "s--")):
        gap_axis.plot(steps, gap, line, color=COLORS["v2"], markersize=3, linewidth=1, label=f"at equal {label}")
    gap_axis.set(xlabel="step", ylabel="held-out loss, V2 minus plain, nats", title="V2 against plain, 6e-4")
    gap_axis.legend(fontsize=8)

    draw_lambdas(figure, lambda_axis, v2)
    lambda_axis.set(xlabel="step", ylabel="lambda, the factor of the second map", title="V2, 6e-4: lambda")
    save(figure, folder / "smollm2.png")

    tokens = settings.batch_size * settings.block_size  # a step, in all runs
    rows = [{"run": labels[name]} | continued_row(log, tokens) for name, log in found.items()]
    print_table("SmolLM2-135M, trained further", rows)
    print_table("Difference in held-out loss, nats, at 6e-4", gap_rows(plain, v2, noisy))
    rows = []
    for name, log in found.items():
        if name.startswith("v2"):
            rows.append({"run": labels[name]} | lambda_row(log, read_json(logs, f"smollm2/{name}")["query_distances"]))
    print_table("Lambda and the distance of the query heads there: mean over layers (lowest to highest)", rows)


def continued_row(log, tokens):
    """The held-out losses of a run, and its speed, where a step has so many tokens."""
    losses = {"start": log["val_loss"][0], "end": log["val_loss"][-1]}
    row = {f"held-out loss, {name}": f"{value:.4f}" for name, value in losses.items()}
    return row | {"ms a step": f"{1000 * tokens / median_speed(log):.1f}"}


def gap_rows(plain, v2, noisy):
    """The differences at GAP_STEPS. A cell is empty where a run has ended before."""
    noise = held_out_at(noisy, GAP_STEPS) - held_out_at(v2, GAP_STEPS)
    columns = dict(zip(("V2 minus plain, equal steps", "equal time"), gaps(v2, plain, GAP_STEPS)))
    columns["V2 with noise minus V2, equal steps"] = noise
    rows = [{"step": step} for step in GAP_STEPS]
    for name, values in columns.items():
        for row, value in zip(rows, values):
            row[name] = f"{value:+.4f}" if np.isfinite(value) else ""
    return rows


def lambda_row(log, distances):
    """Lambda before the first step and after the last, and how far the two query heads of a pair are apart then."""
    first, *_, last = log["lambdas"][~np.isnan(log["lambdas"][:, 0])]
    by_layer = {"lambda, start": first, "lambda, end": last, "query heads apart, end": np.array(distances)}
    return {name: f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for name, x in by_layer.items()}


def smollm2_tuning(logs, runs, folder):
    rows = []
    for stage in ("sft", "dpo"):
        log = read_log(logs, f"smollm2/{stage}")
        row = {"stage": stage.upper(), "steps": int(log["step"][-1])}
        losses = {"before": log["val_loss"][0], "after": log["val_loss"][-1], "lowest": np.nanmin(log["val_loss"])}
        row |= {f"held-out loss, {name}": f"{value:.4f}" for name, value in losses.items()}
        for name in ("accuracy", "margin"):
            row[f"{name}, after"] = f"{log[f'val_{name}'][-1]:.3f}" if f"val_{name}" in log else ""
        rows.append(row)
    print_table("SmolLM2-135M as DIFF V2, fine-tuned", rows)


FIGURES = {  # by group of runs
    "curves": (curves, wikitext2),
    **evidence.FIGURES,
    "tuning": (tuning,),
    "smollm2": (smollm2, smollm2_tuning),
}


def main():
    parser = Parser(__doc__, prog="python -m bench.figures")
    add_flags(parser)
    parser.add_argument("--pictures", default="docs", help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), help="groups of runs (default: all)")
    arguments, runs = parse_runs(parser)
    if arguments.smoke:
        train_missing(runs, arguments)
    elif any(getattr(arguments, name) != parser.get_default(name) for name in ("out", "device")):
        raise UserError("--out and --device need --smoke; --pictures names the folder of pictures")
    elif not Path(arguments.logs).is_dir():
        raise UserError(f"{arguments.logs} is no folder of logs")
    folder = Path(arguments.out if arguments.smoke else arguments.pictures)
    for group in arguments.only or FIGURES:
        planned = {name: plan for name, plan in runs.items() if name.startswith(f"{group}/")}
        done = {name: plan for name, plan in planned.items() if log_path(arguments.logs, name).exists()}
        missing = len(planned) - len(done)
        if missing:
            command = f"python -m bench.runs --logs {arguments.logs} '{group}/*'"
            print(f"\n{group}: {missing} of {len(planned)} runs have no log; {command} trains them")
        if not missing or (done and group in evidence.FIGURES):
            for draw in FIGURES[group]:
                draw(arguments.logs, done, folder)


if __name__ == "__main__":
    run_script(main)
