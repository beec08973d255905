"""Draws and compares the log.csv of any runs: loss, held-out loss, norm of the gradient, speed.

python -m bench.plot out/pretrain out/v1                  # folders of runs, or log.csv files, also of runs in progress
python -m bench.plot out/sft out/dpo --out sft-dpo.png    # a picture's name
"""

import csv
from pathlib import Path

import numpy as np

from bench.logs import middle, plt, print_table, save, smooth
from engine.settings import Parser, UserError, run_script

PANELS = {  # column of log.csv -> title; speeds are per_s columns
    "loss": "training loss", "val_loss": "held-out loss", "grad_norm": "norm of the gradient", "per_s": "speed",
}  # fmt: skip


def read_run(path):
    """Read a log.csv, or that of a run's folder -> {column: (steps,)}, NaN where it is empty, speed as per_s.

    `unit` is what the speed counts, "tokens" or "pairs". Raises UserError if the log cannot be read.
    """
    path = Path(path) / "log.csv" if Path(path).is_dir() else Path(path)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        log = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0] if name != "lambdas"}
        speed = next(name for name in log if name.endswith("_per_s"))
        log |= {"per_s": log[speed], "unit": speed.removesuffix("_per_s")}
        if not log.keys() >= {"step", *PANELS}:
            raise KeyError
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise UserError(f"{path} is no log.csv of this project, or has no step yet") from error
    return log


def summary(name, log):
    """One row of the table: the run's last training losses, its held-out losses and its speed."""
    held_out = log["val_loss"][~np.isnan(log["val_loss"])]
    row = {"run": name, "steps": int(log["step"][-1]), "loss, last 50 steps": f"{np.nanmean(log['loss'][-50:]):.4f}"}
    row["held-out, lowest"] = f"{held_out.min():.4f}" if len(held_out) else ""
    row["held-out, last"] = f"{held_out[-1]:.4f}" if len(held_out) else ""
    return row | {"speed, median": f"{np.nanmedian(log['per_s']):,.0f} {log['unit']}/s"}


def draw(logs, path):
    """Draw {name: log} to a picture."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5))
    units = dict.fromkeys(log["unit"] for log in logs.values())
    nats = f"nats per {' or '.join(unit.removesuffix('s') for unit in units)}"
    labels = dict(loss=nats, val_loss=nats, grad_norm="L2 norm", per_s=f"{' or '.join(units)} a second")
    for axis, (column, title) in zip(axes.flat, PANELS.items()):
        for number, (name, log) in enumerate(logs.items()):
            color, known = f"C{number}", ~np.isnan(log[column])
            steps, values = log["step"][known], log[column][known]
            if column == "val_loss":
                axis.plot(steps, values, "o-", color=color, markersize=3, label=name)
            elif len(values):
                line = np.exp(smooth(np.log(values))) if column == "grad_norm" else smooth(values)  # spikes weigh less
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.5)
                axis.plot(middle(steps, line), line, color=color, linewidth=1.5, label=name)
        axis.set(xlabel="step", ylabel=labels[column], title=title, yscale="log" if column == "grad_norm" else "linear")
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("thin: every step; thick: mean over 20 steps, or a quarter of a short run", fontsize=9)
    save(figure, path)


def main():
    parser = Parser(__doc__, prog="python -m bench.plot")
    parser.add_argument("runs", nargs="+", help="folders of runs, or log.csv files")
    parser.add_argument("--out", default="out/bench/plot.png", type=Path, help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.out.suffix:
        raise UserError(f"--out {arguments.out}: the picture's name needs an ending, such as .png")
    logs = {run: read_run(run) for run in arguments.runs}
    print_table("Runs", [summary(name, log) for name, log in logs.items()])
    draw(logs, arguments.out)
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    run_script(main)
