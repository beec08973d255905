"""What the runs on data/large show, with 95 % intervals: loss, retrieval, outliers, V2's design, learning rates.

bench.figures prints these tables and draws these pictures. An interval over seeds is Student's, of differences between
runs with the same seed, which have the same batches, where runs are compared.
"""

import functools
import itertools

import numpy as np

from bench.logs import (
    COLORS,
    NAMES,
    draw_map,
    gaps,
    held_out_at,
    mean_std,
    norm_row,
    plt,
    print_table,
    rate_text,
    read_json,
    read_log,
    read_probes,
    read_seeds,
    save,
    stability_row,
)
from bench.probes import PARTS
from bench.runs import KINDS

STEPS = (250, 500, 1000, 1500)  # after which the tables compare losses
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles for 1, 2, ... degrees of freedom
ACTIVATIONS = {"residual": "residual stream", "attention": "attention's output", "heads": "what o_proj reads"}

# ---------------------------------------------------------------------------------------------------
# Intervals


def t_interval(values):
    """values (n, ...), n up to 10 -> their mean and half the width of its 95 % interval, NaN for a single one."""
    n = len(values)
    if n == 1:
        return values[0], np.full_like(values[0], np.nan)
    return np.mean(values, axis=0), T_975[n - 2] * np.std(values, axis=0, ddof=1) / np.sqrt(n)


def with_interval(values, digits=3, sign=""):
    """The mean of a few numbers and its interval, as text. Empty if one is missing."""
    mean, half = t_interval(np.array(values, dtype=float))
    if not np.isfinite(mean):
        return ""
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def wilson(right, n, z=1.96):
    """Wilson's 95 % interval of a proportion -> its ends."""
    p = right / n
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def pairs(logs, runs, group, kind, other):
    """Read the logs of two kinds of runs -> [(log, the other's log)] for each seed that both have."""
    seeds = [name.removeprefix(f"{group}/{kind}-") for name in runs if name.startswith(f"{group}/{kind}-")]
    names = [(f"{group}/{kind}-{seed}", f"{group}/{other}-{seed}") for seed in seeds if seed.isdecimal()]
    return [(read_log(logs, name), read_log(logs, another)) for name, another in names if another in runs]


def print_cost(logs, runs, group):
    """Print what the runs of a group took, with compilation but without validation and saving."""
    names, tokens, seconds = [name for name in runs if name.startswith(f"{group}/")], 0, 0.0
    for name in names:
        speed = read_log(logs, name)["tokens_per_s"]
        a_step, steps = runs[name].settings.batch_size * runs[name].settings.block_size, np.isfinite(speed)
        tokens, seconds = tokens + a_step * steps.sum(), seconds + (a_step / speed[steps]).sum()
    row = {"group": group, "runs": len(names), "million tokens": f"{tokens / 1e6:.0f}"}
    print_table("Cost", [row | {"GPU minutes": f"{seconds / 60:.1f}"}])


# ---------------------------------------------------------------------------------------------------
# Loss


def large(logs, runs, folder):
    losses, norms, differences, drawn = [], [], [], {}
    for kind, name in NAMES.items():
        seeds, compared = read_seeds(logs, runs, f"large/{kind}-"), pairs(logs, runs, "large", kind, "vanilla")
        if not seeds:
            continue
        ends = [log["val_loss"][-1] for log in seeds]
        losses.append({"attn": name, "seeds": len(seeds), "held-out loss, nats": mean_std(ends)})
        losses[-1]["perplexity"] = mean_std(np.exp(ends), 2)
        norms.append(norm_row(name, seeds))
        if compared and kind != "vanilla":
            drawn[kind] = compared
            for what, by_seed in compare(compared, STEPS).items():
                row = {"attn": name, "seeds": len(compared), "at equal": what}
                at_steps = zip(STEPS, by_seed.T)
                differences.append(row | {f"step {step}": with_interval(values, 3, "+") for step, values in at_steps})
    if drawn:
        draw_gaps(drawn, runs, folder)
    print_table("Held-out loss at the end", losses)
    print_table("Held-out loss minus plain's, nats, with a 95 % interval", differences)
    print_table("Gradient norm, seed by seed", norms)
    print_cost(logs, runs, "large")


def draw_gaps(drawn, runs, folder):
    """Draw the gaps of {kind: [(log, plain's log)]} at equal steps and at equal time."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    _, plain = next(iter(drawn.values()))[0]
    steps = plain["step"][~np.isnan(plain["val_loss"])]
    warmup = next(iter(runs.values())).settings.warmup_steps  # that of all runs
    steps = steps[steps >= warmup]  # before, the loss falls too steeply to interpolate
    for kind, compared in drawn.items():
        for axis, by_seed in zip(axes, compare(compared, steps).values()):
            mean, half = t_interval(by_seed)
            label = f"{NAMES[kind]}, n = {len(compared)}"
            axis.plot(steps, mean, "o-", color=COLORS[kind], label=label, markersize=2, linewidth=1)
            if len(compared) > 2:  # with two, the interval is 12.7 standard errors
                axis.fill_between(steps, mean - half, mean + half, color=COLORS[kind], alpha=0.2, linewidth=0)
    for axis, title in zip(axes, ("at equal steps", "at equal time (that of plain's steps)")):
        axis.axhline(0, color=COLORS["vanilla"], linewidth=1, label="plain")
        axis.set(xlabel="step of plain", title=title)
    axes[0].set(ylabel="held-out loss minus plain's, nats")
    banded = any(len(compared) > 2 for compared in drawn.values())
    axes[0].legend(fontsize=8, title="band: 95 % interval" if banded else None, title_fontsize=8)
    save(figure, folder / "large.png")


def shared_keys(logs, runs, folder):
    """V2 whose upper six layers share keys and values (n_kv_layers), against V2, in the mean of the seeds of both."""
    compared = pairs(logs, runs, "large", "v2-shared", "v2")
    if not compared:
        return
    rows = []
    for name, seeds in zip(("6 layers with keys", "12 layers with keys"), zip(*compared)):
        losses = np.mean([held_out_at(log, STEPS) for log in seeds], axis=0)
        rows.append({"V2": name} | {f"step {step}": f"{loss:.3f}" for step, loss in zip(STEPS, losses)})
    for what, by_seed in compare(compared, STEPS).items():
        row = {"V2": f"6 minus 12, at equal {what}"}
        rows.append(row | {f"step {step}": with_interval(values, 3, "+") for step, values in zip(STEPS, by_seed.T)})
    title = "V2 with shared keys and values: held-out loss, nats, and the difference with a 95 % interval"
    print_table(f"{title}, {len(compared)} seeds", rows)


def compare(compared, steps):
    """The differences in held-out loss after some steps of the others -> {"steps": (seeds, steps), "time": ...}."""
    by_seed = np.array([gaps(log, other, steps) for log, other in compared])
    return {"steps": by_seed[:, 0], "time": by_seed[:, 1]}


def sweep(logs, runs, folder):
    rows = {}
    for name, plan in runs.items():
        if name.startswith("sweep/"):
            rate = rate_text(plan.settings.learning_rate)
            row = rows.setdefault(rate, {"peak learning rate": rate} | {NAMES[attn]: "" for attn in KINDS})
            row[NAMES[plan.settings.attn]] = f"{read_log(logs, name)['val_loss'][-1]:.3f}"
    print_table("Learning rates: held-out loss after 500 steps of 65,536 tokens", [*rows.values()])


def rates(group, title, logs, runs, folder):
    names = [name for name in runs if name.startswith(f"{group}/")]
    rows = []
    for name in names:
        settings = runs[name].settings
        labels = {"peak learning rate": rate_text(settings.learning_rate), "attn": NAMES[settings.attn]}
        labels["seed"] = settings.seed
        rows.append(labels | stability_row(read_log(logs, name), settings))
    print_table(title, rows)
    print_cost(logs, runs, group)


def design(logs, runs, folder):
    rows = []
    for kind in dict.fromkeys(plan.settings.attn for name, plan in runs.items() if name.startswith("design/")):
        compared = pairs(logs, runs, "design", kind, "v2")
        if not compared:
            continue
        ends = [log["val_loss"][-1] for log, _ in compared]
        differences = [log["val_loss"][-1] - v2["val_loss"][-1] for log, v2 in compared]
        row = {"design": kind, "seeds": len(compared), "held-out loss, nats": mean_std(ends)}
        rows.append(row | {"minus v2": with_interval(differences, 3, "+") if kind != "v2" else ""})
    print_table("V2 taken apart: held-out loss at the end, and its difference from V2 with a 95 % interval", rows)
    print_cost(logs, runs, "design")


# ---------------------------------------------------------------------------------------------------
# Activation outliers


def outliers(group, logs, runs, folder):
    found, rows = read_probes(logs, runs, group), []
    if not found:
        return
    figure, axes = plt.subplots(2, len(ACTIVATIONS), figsize=(11, 5.5), sharex=True)
    kinds = [kind for kind in NAMES if kind in found]
    for (column, (what, title)), attn in itertools.product(enumerate(ACTIVATIONS.items()), kinds):
        probes = found[attn]
        row = {"activations": title, "attn": NAMES[attn], "seeds": len(probes)}
        for axis, measure in zip(axes[:, column], ("largest", "kurtosis")):
            by_layer = np.array([probe["outliers"][what][measure] for probe in probes])  # (seeds, layers)
            layers = np.arange(by_layer.shape[1])
            axis.plot(layers, by_layer.mean(0), "o-", color=COLORS[attn], label=NAMES[attn], markersize=3)
            axis.fill_between(layers, by_layer.min(0), by_layer.max(0), color=COLORS[attn], alpha=0.2, linewidth=0)
            axis.set(yscale="log", xticks=layers[::2])
            for layer, values in (("median", np.median(by_layer, axis=1)), ("highest", by_layer.max(1))):
                few = len(probes) < 3  # the interval of two seeds is 12.7 standard errors
                text = ", ".join(f"{value:.1f}" for value in values) if few else with_interval(values, 1)
                row[f"{measure}, {layer} layer"] = text
            row[f"{measure}, layer"] = ", ".join(map(str, by_layer.argmax(1)))
        axes[0, column].set(title=title)
        axes[1, column].set(xlabel="layer")
        rows.append(row)
    for axis in axes[1]:
        axis.axhline(3, color="lightgray", zorder=0, label="normal distribution")
    axes[0, 0].set(ylabel="largest absolute value")
    axes[1, 0].set(ylabel="kurtosis")
    axes[1, 2].legend(fontsize=8, title="band: lowest to highest seed", title_fontsize=8)
    save(figure, folder / f"outliers-{group}.png")
    print_table(f"Outliers by layer in the runs `{group}`, with a 95 % interval of three seeds and more", rows)


# ---------------------------------------------------------------------------------------------------
# Retrieval


def read_retrieval(logs, runs):
    """Read what bench.retrieval measured -> {(attn, length): [one for each seed]}."""
    found = {}
    for name in runs:
        if name.startswith("retrieval/"):
            measured = read_json(logs, name)
            found.setdefault((measured["attn"], measured["length"]), []).append(measured)
    return found


def accuracies(seeds, needles):
    """The share of right answers to texts with so many needles -> by depth (seeds, depths), overall (seeds,)."""
    right, texts = (np.array([seed["accuracy"][needles][what] for seed in seeds]) for what in ("right", "texts"))
    return right / np.where(texts, texts, np.nan), right.sum(1) / texts.sum(1)


def retrieval(logs, runs, folder):
    found = read_retrieval(logs, runs)
    longest = max(length for _, length in found)
    figure, (depth_axis, count_axis, share_axis) = plt.subplots(1, 3, figsize=(13, 4))
    for (attn, length), seeds in found.items():
        line = dict(color=COLORS[attn], linestyle="-" if length == longest else ":", marker="o", markersize=3)
        line |= dict(label=f"{NAMES[attn]}, {length} tokens", capsize=2, linewidth=1)
        by_depth = accuracies(seeds, str(seeds[0]["needles"]))[0]
        mean, half = t_interval(by_depth)
        beside = KINDS.index(attn) - 1  # so that no attention hides another
        depth_axis.errorbar((np.arange(len(mean)) + 0.5) / len(mean) * 100 + beside, mean, half, **line)
        counts = list(seeds[0]["accuracy"])
        mean, half = t_interval(np.array([accuracies(seeds, count)[1] for count in counts]).T)
        count_axis.errorbar([int(count) + 0.1 * beside for count in counts], mean, half, **line)
        if length == longest:
            shares = [[np.mean(seed["needle"]["weights"][part]) for part in PARTS] for seed in seeds]
            mean, half = t_interval(np.array(shares))
            place = np.arange(len(PARTS)) + 0.27 * beside
            share_axis.bar(place, mean, 0.25, yerr=half, color=COLORS[attn], label=NAMES[attn], capsize=2)
    needles = next(iter(found.values()))[0]["needles"]
    chance = dict(color="lightgray", zorder=0, label="one of the numbers, at random")
    depth_axis.axhline(1 / needles, **chance)
    counts = np.linspace(1, 8, 50)
    count_axis.plot(counts, 1 / counts, **chance)
    depth_axis.set(xlabel="place of the answer, % of the text", title=f"{needles} numbers in a text")
    count_axis.set(xlabel="numbers in a text", title="all places")
    for axis in (depth_axis, count_axis):
        axis.set(ylabel="share of texts answered right", ylim=(0, 1.03))
    depth_axis.legend(fontsize=7)
    share_axis.set(ylabel="share of the last token's attention", title=f"{longest} tokens, mean over layers and heads")
    share_axis.set_xticks(range(len(PARTS)), ["answer", "other\nnumbers", "first\ntoken", "rest"])
    share_axis.legend(fontsize=8, title="error bars: 95 % over seeds", title_fontsize=8)
    save(figure, folder / "retrieval.png")
    print_table("Retrieval: texts answered right, by numbers in a text, 95 % over seeds", accuracy_rows(found))
    print_table("Retrieval, model by model, with Wilson's 95 % interval", model_rows(logs, runs))
    print_table("Shares of the last token's attention, mean over layers and heads, 95 % over seeds", share_rows(found))
    print_cost(logs, runs, "retrieval")


def recall_maps(logs, runs, folder):
    """Draw the maps of the head that looks at the answer most, of the shorter texts' first seed of each attention."""
    found = read_retrieval(logs, runs)
    shortest = min(length for _, length in found)
    heads = {attn: seeds[0]["recall"] for (attn, length), seeds in found.items() if length == shortest}
    figure, axes = plt.subplots(len(heads), 3, figsize=(13, 3.9 * len(heads)), squeeze=False)
    for row, (attn, head) in zip(axes, heads.items()):
        place = f"{NAMES[attn]}, layer {head['layer']}, head {head['head']}"
        titles = {"first": "A1" if "second" in head else "its only map", "second": "A2"}
        titles["difference"] = f"A1 - {head.get('factor', 0):.2f} A2 (lambda of the last query)"
        for axis, (kind, title) in zip(row, titles.items()):
            if kind not in head:
                axis.set_axis_off()
                continue
            draw_map(figure, axis, head[kind], head["tokens"], f"{place}: {title}", limit=1)
            for edge in head["span"]:
                axis.axvline(edge - 0.5, color="tab:green", linewidth=0.8)
    figure.supxlabel("between the green lines: the answer to the question at the end", fontsize=9)
    save(figure, folder / "recall.png")


def accuracy_rows(found):
    rows = []
    for (attn, length), seeds in found.items():
        row = {"attn": NAMES[attn], "tokens": length, "seeds": len(seeds)}
        rows.append(row | {n: with_interval(accuracies(seeds, n)[1]) for n in seeds[0]["accuracy"]})
    return rows


def model_rows(logs, runs):
    rows = []
    for name in runs:
        if name.startswith("retrieval/"):
            measured, log = read_json(logs, name), read_log(logs, name)
            right, texts = (sum(measured["accuracy"][str(measured["needles"])][what]) for what in ("right", "texts"))
            low, high = wilson(right, texts)
            learned = log["step"][log["val_accuracy"] > 0.9]
            row = {"run": name.removeprefix("retrieval/"), "right": right, "texts": texts}
            row |= {"share": f"{right / texts:.3f}", "95 %": f"{low:.3f} to {high:.3f}"}
            rows.append(row | {"over 0.9 in validation from step": int(learned[0]) if len(learned) else ""})
    return rows


def share_rows(found):
    rows = []
    for (attn, length), seeds in found.items():
        for kind in seeds[0]["needle"]:
            parts = [seed["needle"][kind] for seed in seeds]
            name = "difference" if kind == "weights" and attn != "vanilla" else kind
            row = {"attn": NAMES[attn], "tokens": length, "weights": name}
            row |= {part: with_interval([np.mean(shares[part]) for shares in parts], 4) for part in PARTS}
            rows.append(row | {"answer, best head": with_interval([shares["best_head"]["answer"] for shares in parts])})
    return rows


FIGURES = {  # by group of runs
    "sweep": (sweep, functools.partial(rates, "sweep", "Stability of the same runs")),
    "large": (large, shared_keys, functools.partial(outliers, "large")),
    "stable": (
        functools.partial(rates, "stable", "Stability at 2e-3, 500 steps of 65,536 tokens"),
        functools.partial(outliers, "stable"),
    ),
    "design": (design,),
    "retrieval": (retrieval, recall_maps),
}
