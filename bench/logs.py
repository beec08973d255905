"""What bench.runs has kept of the runs, and what pictures and tables are made with."""

import csv
import json

import numpy as np

from bench.runs import log_path
from engine.settings import UserError, fail

try:
    import matplotlib.pyplot as plt
    from PIL import Image  # which matplotlib needs
except ImportError:
    fail("the pictures need matplotlib: pip install -r requirements-dev.txt")
plt.switch_backend("Agg")

COLORS = {
    "vanilla": "tab:gray", "v1": "tab:orange", "v2": "tab:blue", "vanilla-bare": "black", "v1-bare": "tab:red",
    "vanilla-heads": "tab:olive", "v1-wide": "tab:brown", "v2-low-rate": "tab:cyan",
}  # fmt: skip
NAMES = {
    "vanilla": "plain", "vanilla-heads": "plain, 12 heads of 64", "v1": "V1", "v1-wide": "V1, 3 pairs of 128",
    "v2": "V2", "v2-low-rate": "V2, plain's learning rate",
}  # fmt: skip
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles for 1, 2, ... degrees of freedom
SPIKE, MEMORY = 10, 100  # a spike is a gradient norm above SPIKE times the median of the MEMORY steps before


# ---------------------------------------------------------------------------------------------------
# Reading


def read_log(logs, name):
    """Read a finished run's log -> {column: (steps,)}, NaN where it is empty; `lambdas` is (steps, layers)."""
    path = log_path(logs, name)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "lambdas" not in rows[0]:
        raise UserError(f"{path} is no log of bench.runs; remove it, and bench.runs trains the run again")
    log = {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0] if key != "lambdas"}
    layers = max(len(row["lambdas"].split()) for row in rows)
    empty = [float("nan")] * layers
    log["lambdas"] = np.array([list(map(float, row["lambdas"].split())) or empty for row in rows])
    return log


def seed_names(runs, prefix):
    """The names of all seeds of a run: the prefix and a number."""
    return [name for name in runs if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()]


def read_seeds(logs, runs, prefix):
    return [read_log(logs, name) for name in seed_names(runs, prefix)]


def read_json(logs, name):
    return json.loads(log_path(logs, name).with_suffix(".json").read_text(encoding="utf-8"))


def read_probes(logs, runs, group):
    """Read what bench.probes measured in a group of runs -> {kind of run: {seed: measured}}, in the order of NAMES."""
    found = {}
    for name, plan in runs.items():
        if name.startswith(f"{group}/") and plan.probe_texts:
            kind, seed = name.removeprefix(f"{group}/").rsplit("-", 1)
            found.setdefault(kind, {})[int(seed)] = read_json(logs, name)
    return {kind: found[kind] for kind in NAMES if kind in found}


# ---------------------------------------------------------------------------------------------------
# Numbers


def smooth(values, width=20):
    """The moving average over `width` steps."""
    width = min(width, len(values) // 4 or 1)
    return np.convolve(values, np.ones(width) / width, mode="valid")


def middle(steps, line):
    """The steps at which a line of smooth() is drawn: the middles of its windows."""
    first = (len(steps) - len(line)) // 2
    return steps[first : first + len(line)]


def held_out_at(log, steps):
    """The held-out loss after some steps, interpolated between validations. NaN after the end of the run."""
    measured = ~np.isnan(log["val_loss"])
    return np.interp(steps, log["step"][measured], log["val_loss"][measured], right=np.nan)


def median_speed(log):
    """Tokens a second, without the compilation in the first step."""
    return np.nanmedian(log["tokens_per_s"])


def gaps(log, plain, steps):
    """The held-out loss of a run minus plain's after some steps of plain -> at equal steps, at equal time."""
    # A step has as many tokens in both, so these are the run's steps in the time of plain's
    meanwhile = np.array(steps) * median_speed(log) / median_speed(plain)
    return held_out_at(log, steps) - held_out_at(plain, steps), held_out_at(log, meanwhile) - held_out_at(plain, steps)


def gradient_norms(log):
    """The gradient norm of every step, without a row for the validation before the first one."""
    return log["grad_norm"][log["step"] > 0]


def spikes(norms):
    """The indices of gradient norms above SPIKE times the median of the MEMORY steps before. Only finite ones count."""
    norms = np.where(np.isfinite(norms), norms, np.nan)
    return [i for i in range(1, len(norms)) if norms[i] > SPIKE * np.nanmedian(norms[max(0, i - MEMORY) : i])]


def norm_columns(seeds):
    """The columns of a table: spikes, and the highest norm after step 200, where the warmup of most runs ends."""
    norms = [gradient_norms(log) for log in seeds]
    count = ", ".join(str(len(spikes(values))) for values in norms)
    highest = ", ".join(f"{np.nanmax(values[200:], initial=0):.1f}" for values in norms)
    return {"spikes": count, "highest norm after step 200": highest}


# ---------------------------------------------------------------------------------------------------
# Tables and pictures


def rate_text(rate):
    """A learning rate as the settings are written: 0.0006 -> 6e-4."""
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def t_interval(values):
    """values (n, ...), n up to 10 -> their mean and half the width of its 95 % interval, NaN for a single one."""
    n = len(values)
    if n == 1:
        return values[0], np.full_like(values[0], np.nan)
    return np.mean(values, axis=0), T_975[n - 2] * np.std(values, axis=0, ddof=1) / np.sqrt(n)


def over_seeds(values, digits=3, sign=""):
    """The mean of three numbers and more with its 95 % interval, as text; fewer as they are; "" if one is NaN.

    The interval of two is too wide to say anything: 12.7 standard errors.
    """
    if not np.isfinite(values).all():
        return ""
    if len(values) < 3:
        return ", ".join(f"{value:{sign}.{digits}f}" for value in values)
    mean, half = t_interval(values)
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def print_table(title, rows):
    """Print a list of {column: text} as Markdown. Without rows, print nothing."""
    if not rows:
        return
    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


def legend_above(axis, **options):
    """Put the legend above the picture, where it hides no data."""
    options = dict(fontsize=7, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False) | options
    axis.set_title(axis.get_title(), pad=44)
    axis.legend(**options)


def draw_map(figure, axis, weights, tokens, title, limit):
    """Draw an attention map (queries, keys) of a text, with colors from -limit to limit."""
    image = axis.imshow(np.array(weights), cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=axis, label="attention weight", fraction=0.046, pad=0.02)
    axis.set(xticks=range(len(tokens)), yticks=range(len(tokens)), xlabel="key", ylabel="query")
    axis.set_xticklabels(tokens, rotation=90, fontsize=6)
    axis.set_yticklabels(tokens, fontsize=6)
    axis.set_title(title, fontsize=8)


def draw_lambdas(figure, axis, log):
    measured, layers = ~np.isnan(log["lambdas"][:, 0]), log["lambdas"].shape[1]
    colors = plt.cm.ScalarMappable(plt.Normalize(0, layers - 1), "viridis")
    figure.colorbar(colors, ax=axis, label="layer")
    for layer in range(layers):
        axis.plot(log["step"][measured], log["lambdas"][measured, layer], color=colors.to_rgba(layer), linewidth=1)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as image:  # with a palette, it takes a third of the bytes
        image.convert("RGB").quantize().save(path, optimize=True)
