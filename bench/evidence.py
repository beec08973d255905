"""What the runs on data/large show: loss, learning rates, V2's design, the inside of the models, retrieval.

bench.figures prints these tables and draws these pictures. Intervals over seeds are Student's t. Comparisons are paired
by seed: such runs have the same batches.
"""

import functools
import itertools
import re

import numpy as np

from bench.logs import (
    COLORS,
    NAMES,
    draw_lambdas,
    draw_map,
    gaps,
    held_out_at,
    legend_above,
    median_speed,
    norm_columns,
    over_seeds,
    plt,
    print_table,
    rate_text,
    read_json,
    read_log,
    read_probes,
    read_seeds,
    save,
    seed_names,
    t_interval,
)
from bench.retrieval import PARTS
from bench.runs import KINDS

STEPS = (250, 500, 1000, 1500)  # after which the tables compare losses
SHOWN = PARTS[:-1]  # of the last token's attention, in tables and pictures: all but the rest
ACTIVATIONS = {"residual": "residual stream", "attention": "attention's output", "heads": "what o_proj reads"}


def pairs(logs, runs, group, kind, other):
    """Read the logs of two kinds of runs -> [(log, the other's log)] for each seed that both have."""
    names = [(name, name.replace(f"/{kind}-", f"/{other}-")) for name in seed_names(runs, f"{group}/{kind}-")]
    return [(read_log(logs, name), read_log(logs, another)) for name, another in names if another in runs]


def group_settings(runs, group):
    """The settings of a group's first run. Steps, validations and warmup are those of the whole group."""
    return next(plan.settings for name, plan in runs.items() if name.startswith(f"{group}/"))


def print_cost(logs, runs, group):
    """Print what the runs of a group took by kind, with compilation but without validation and saving."""
    costs = {}
    for name, plan in runs.items():
        if name.startswith(f"{group}/"):
            speeds = read_log(logs, name)["tokens_per_s"]
            speeds, a_step = speeds[np.isfinite(speeds)], plan.settings.batch_size * plan.settings.block_size
            kind = re.sub(r"(-[\d.]+)+$", "", name)  # without seed, learning rate and length
            costs.setdefault(kind, []).append((a_step * len(speeds) / 1e6, (a_step / speeds).sum() / 60))
    rows = []
    for kind, values in (costs | {"all": itertools.chain(*costs.values())}).items():
        tokens, minutes = zip(*values)
        row = {"runs of": kind, "number": len(tokens), "million tokens": f"{sum(tokens):.0f}"}
        rows.append(row | {"GPU minutes": f"{sum(minutes):.1f}"})
    print_table("Cost", rows)


# ---------------------------------------------------------------------------------------------------
# Loss


def large(logs, runs, folder):
    """Print plain's held-out loss, and draw and print how far the others are from it."""
    rows, norms, speeds, drawn = [], [], [], {}
    settings = group_settings(runs, "large")
    tokens = settings.batch_size * settings.block_size  # a step, in all of them
    for kind, name in NAMES.items():
        seeds, compared = read_seeds(logs, runs, f"large/{kind}-"), pairs(logs, runs, "large", kind, "vanilla")
        if seeds:
            norms.append({"run": name} | norm_columns(seeds))
            times = [1000 * tokens / median_speed(log) for log in seeds]
            speeds.append({"run": name, "ms a step": over_seeds(times, 1)})
        if kind == "vanilla" and seeds:
            losses = [held_out_at(log, STEPS) for log in seeds]
            rows.append({"attn": "plain: its loss", "seeds": len(seeds), "at equal": ""} | at_steps(losses))
        elif compared:
            drawn[kind] = compared
            for what, by_seed in compare(compared, STEPS).items():
                rows.append({"attn": name, "seeds": len(compared), "at equal": what} | at_steps(by_seed, "+"))
    if drawn:
        draw_gaps(drawn, runs, folder)
    print_table("Held-out loss, nats: plain's, and the others' minus plain's", rows)
    print_table("Gradient norm in the runs `large`, seed by seed", norms)
    print_table(f"Time of a step of {tokens:,} tokens, the median of a run", speeds)
    print_cost(logs, runs, "large")


def at_steps(by_seed, sign=""):
    """The columns of a table with values after STEPS, by_seed (seeds, steps)."""
    return {f"step {step}": over_seeds(values, 3, sign) for step, values in zip(STEPS, np.transpose(by_seed))}


def draw_gaps(drawn, runs, folder):
    """Draw the gaps of {kind: [(log, plain's log)]} at equal steps, their end enlarged, and at equal time."""
    figure, (all_axis, end_axis, time_axis) = plt.subplots(1, 3, figsize=(13, 4.3))
    time_axis.sharey(all_axis)
    settings = group_settings(runs, "large")
    steps = np.arange(0, settings.max_steps + 1, settings.eval_interval)
    steps = steps[steps >= settings.warmup_steps]  # before, the loss falls too steeply to interpolate
    last_third = steps[steps >= steps[-1] * 2 / 3]
    panels = (all_axis, "steps", steps), (end_axis, "steps", last_third), (time_axis, "time", steps)
    for (kind, compared), (axis, equal, at) in itertools.product(drawn.items(), panels):
        mean, half = t_interval(compare(compared, at)[equal])
        label, color = f"{NAMES[kind]}, n = {len(compared)}", COLORS[kind]
        axis.plot(at, mean, "o-", color=color, label=label, markersize=2, linewidth=1)
        if len(compared) > 2:
            band = dict(facecolor=(color, 0.15), edgecolor=(color, 0.8), linewidth=0.8)
            axis.fill_between(at, mean - half, mean + half, **band)
    titles = ("at equal steps", "at equal steps, the last third", "after the time that plain takes")
    for (axis, _, _), title in zip(panels, titles):
        axis.axhline(0, color=COLORS["vanilla"], linewidth=1, label="plain")
        axis.set(xlabel="step of plain", title=title)
    for axis in (all_axis, end_axis):
        axis.set(ylabel="held-out loss minus plain's, nats")
    all_axis.legend(fontsize=8, title="bands: 95 % intervals, from n = 3 on", title_fontsize=8)
    save(figure, folder / "large.png")


def shared_keys(logs, runs, folder):
    """V2 whose upper six layers share keys and values (n_kv_layers), against V2 and plain."""
    rows = []
    for other, name in (("v2-shared", "6 layers with keys"), ("v2", "12 layers with keys"), ("vanilla", "plain")):
        compared = pairs(logs, runs, "large", "v2-shared", other)
        if compared:
            rows.append({"V2": name} | at_steps([held_out_at(log, STEPS) for _, log in compared]))
        for what, by_seed in compare(compared, STEPS).items() if compared and other != "v2-shared" else ():
            rows.append({"V2": f"6 layers minus {name}, at equal {what}"} | at_steps(by_seed, "+"))
    print_table("V2 with shared keys and values: held-out loss, nats, and differences", rows)


def compare(compared, steps):
    """The differences in held-out loss after some steps of the others -> {"steps": (seeds, steps), "time": ...}."""
    by_seed = np.array([gaps(log, other, steps) for log, other in compared])
    return {"steps": by_seed[:, 0], "time": by_seed[:, 1]}


def sweep(logs, runs, folder):
    losses, norms = {}, []
    for name, plan in runs.items():
        if name.startswith("sweep/"):
            log, rate, attn = read_log(logs, name), rate_text(plan.settings.learning_rate), NAMES[plan.settings.attn]
            row = losses.setdefault(rate, {"peak learning rate": rate} | {NAMES[kind]: "" for kind in KINDS})
            row[attn] = over_seeds(held_out_at(log, [plan.settings.max_steps])) or "diverged"
            norms.append({"run": f"{attn}, {rate}"} | norm_columns([log]))
    print_table("Learning rates: held-out loss after 500 steps of 65,536 tokens", [*losses.values()])
    print_table("Gradient norm in the runs `sweep`", norms)
    print_cost(logs, runs, "sweep")


def compare_ends(group, base, title, logs, runs, folder):
    """Compare the kinds of runs of a group with `base`, seed by seed: held-out loss at the end, and spikes."""
    rows, last = [], group_settings(runs, group).max_steps
    for kind in dict.fromkeys(plan.settings.attn for name, plan in runs.items() if name.startswith(f"{group}/")):
        compared = pairs(logs, runs, group, kind, base)
        if not compared:
            continue
        losses = over_seeds([held_out_at(log, last) for log, _ in compared]) or "diverged"
        row = {"attn": NAMES.get(kind, kind), "seeds": len(compared), "held-out loss, nats": losses}
        differences = compare(compared, [last])["steps"][:, 0]
        row[f"minus {NAMES[base]}'s"] = over_seeds(differences, 3, "+") if kind != base else ""
        rows.append(row | norm_columns([log for log, _ in compared]))
    print_table(f"{title}: at the end", rows)
    print_cost(logs, runs, group)


# ---------------------------------------------------------------------------------------------------
# Inside the models: lambda, and what bench.probes measured, but for outliers


def lambdas(logs, runs, folder):
    """Draw lambda by layer in the first seed of V1 and of V2."""
    seeds = {attn: read_seeds(logs, runs, f"large/{attn}-") for attn in ("v1", "v2")}
    seeds = {attn: found for attn, found in seeds.items() if found}
    if not seeds:
        return
    figure, axes = plt.subplots(1, len(seeds), figsize=(11, 3.6), sharey=True, squeeze=False)
    for axis, (attn, (first, *_)) in zip(axes[0], seeds.items()):
        draw_lambdas(figure, axis, first)
        axis.set(xlabel="step", title=f"{NAMES[attn]}, first seed")
    axes[0, 0].set(ylabel="lambda, the factor of the second map")
    save(figure, folder / "lambdas.png")


def inside(logs, runs, folder):
    found = {attn: [*seeds.values()] for attn, seeds in read_probes(logs, runs, "large").items()}
    if not found:
        return
    figure, (sink_axis, norm_axis, output_axis) = plt.subplots(1, 3, figsize=(13, 4))
    for attn, probes in found.items():
        line = dict(color=COLORS[attn], marker="o", markersize=3)
        label = f"{NAMES[attn]}, n = {len(probes)}"
        sink_axis.plot(np.mean([probe["sink"]["weights"] for probe in probes], axis=0), **line, label=label)
        for axis, kind in ((norm_axis, "weights"), (output_axis, "output")):
            measured = [probe["context_rms"][kind] for probe in probes]
            axis.plot(np.mean([norms["mean"] for norms in measured], axis=0), **line)
            lowest = np.min([norms["minimum"] for norms in measured], axis=0)
            axis.plot(lowest, ":", color=COLORS[attn], label=f"{NAMES[attn]}, lowest")
    one = next(iter(found.values()))[0]
    even = 2 / one["length"] * np.log(2)  # the mean of 1 / n over the second half of a text
    sink_axis.axhline(even, color="lightgray", zorder=0, label="even attention")
    bound = one["context_rms"]["bound"]
    norm_axis.axhline(bound, color="lightgray", zorder=0, label="least of a softmax, 1/sqrt(tokens)")
    sink_axis.set(title="the first token's share of attention", ylabel="share")
    norm_axis.set(title="L2 norm of a query's weights", ylabel="norm")
    output_axis.set(title="RMS of a head's output / of its values", ylabel="ratio")
    for axis in (sink_axis, norm_axis, output_axis):
        axis.set(xlabel="layer", yscale="log")
        legend_above(axis, ncol=2)
    text = "solid: means over seeds; lowest: of all seeds, heads and queries; of V1 and V2, A1 - lambda A2"
    figure.supxlabel(text, fontsize=9)
    save(figure, folder / "attention.png")
    print_table("Attention sink: the first token's share in the second half of a text", sink_rows(found))
    print_table("Norm of a query's weights (the RMS it reads from uncorrelated values of RMS 1)", norm_rows(found))


def map_name(weights, kinds):
    """How tables call a kind of weights: "weights" multiply the values, in V1 and V2 A1 - lambda A2."""
    if weights != "weights":
        return weights
    return "difference" if "first" in kinds else "only one"


def sink_rows(found):
    rows = []
    for attn, probes in found.items():
        for kind in probes[0]["sink"]:
            layers = np.array([probe["sink"][kind] for probe in probes])  # (seeds, layers)
            by_layer = layers.mean(0)
            row = {"attn": NAMES[attn], "seeds": len(probes), "map": map_name(kind, probes[0]["sink"])}
            row |= {"mean": over_seeds(layers.mean(1), 5), "highest": f"{by_layer.max():.4f}"}
            rows.append(row | {"in layer": by_layer.argmax()})
    return rows


def norm_rows(found):
    rows = []
    for attn, probes in found.items():
        norms = [probe["context_rms"] for probe in probes]
        row = {"attn": NAMES[attn], "seeds": len(probes)}
        for kind, text in (("first", "first map"), ("weights", "weights"), ("output", "output RMS / values'")):
            measured = [norm[kind] for norm in norms if kind in norm]  # plain's map is its weights
            row[f"{text}: mean"] = over_seeds([np.mean(norm["mean"]) for norm in measured]) if measured else ""
            row[f"{text}: lowest"] = f"{min(min(norm['minimum']) for norm in measured):.4f}" if measured else ""
        bound = norms[0]["bound"]  # the least of a softmax
        below = [sum(lowest < bound for lowest in norm["weights"]["minimum"]) for norm in norms]
        rows.append(row | {f"layers below {bound:.4f}": ", ".join(map(str, below))})
    return rows


# ---------------------------------------------------------------------------------------------------
# Activation outliers


def outliers(group, logs, runs, folder):
    found, rows = read_probes(logs, runs, group), []
    if not found:
        return
    figure, axes = plt.subplots(2, len(ACTIVATIONS), figsize=(11, 5.5), sharex=True)
    for (column, (what, title)), (attn, probes) in itertools.product(enumerate(ACTIVATIONS.items()), found.items()):
        row = {"activations": title, "attn": NAMES[attn], "seeds": len(probes)}
        found_here = [probe["outliers"][what] for probe in probes.values()]
        largest, kurtosis = (np.array([one[name] for one in found_here]) for name in ("largest", "kurtosis"))
        for axis, by_layer in zip(axes[:, column], (largest, kurtosis)):  # (seeds, layers)
            layers = np.arange(by_layer.shape[1])
            label = f"{NAMES[attn]}, n = {len(probes)}"
            axis.plot(layers, by_layer.mean(0), "o-", color=COLORS[attn], label=label, markersize=3)
            axis.fill_between(layers, by_layer.min(0), by_layer.max(0), color=COLORS[attn], alpha=0.2, linewidth=0)
            axis.set(yscale="log", xticks=layers[::2])
            axis.yaxis.set(major_locator=plt.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axes[0, column].set(title=title)
        axes[1, column].set(xlabel="layer")
        row["kurtosis, median layer"] = over_seeds(np.median(kurtosis, axis=1), 1)
        row["largest value of all layers"] = over_seeds(largest.max(1), 1)
        plain = {seed: max(probe["outliers"][what]["largest"]) for seed, probe in found.get("vanilla", {}).items()}
        differences = [value - plain[seed] for seed, value in zip(probes, largest.max(1)) if seed in plain]
        row["minus plain's"] = over_seeds(differences, 1, "+") if attn != "vanilla" else ""
        rows.append(row)
    for axis in axes[1]:
        axis.axhline(3, color="lightgray", zorder=0, label="normal distribution")
    axes[0, 0].set(ylabel="largest absolute value")
    axes[1, 0].set(ylabel="kurtosis")
    axes[1, 2].legend(fontsize=8, title="band: lowest to highest seed", title_fontsize=8)
    save(figure, folder / f"outliers-{group}.png")
    print_table(f"Outliers in the runs `{group}`", rows)


# ---------------------------------------------------------------------------------------------------
# Retrieval


def read_retrieval(logs, runs):
    """Read what bench.retrieval measured -> {(kind of run, length): {seed: measured}}, by length, kinds as in NAMES."""
    found = {}
    for name in runs:
        if name.startswith("retrieval/"):
            kind, seed, length = name.removeprefix("retrieval/").rsplit("-", 2)
            found.setdefault((kind, int(length)), {})[int(seed)] = read_json(logs, name)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], [*NAMES].index(item[0][0]))))


def seed_range(values):
    """values (seeds, ...) -> how far the lowest and the highest are from the mean, for errorbar(); one seed: None."""
    if len(values) == 1:
        return None
    return np.maximum(0, [values.mean(0) - values.min(0), values.max(0) - values.mean(0)])  # 0, despite rounding


def accuracies(seeds, needles):
    """The share of right answers to texts with so many needles -> by depth (seeds, depths), overall (seeds,)."""
    tested = [measured["accuracy"][needles] for measured in seeds]
    right, texts = (np.array([counts[what] for counts in tested]) for what in ("right", "texts"))
    return right / np.where(texts, texts, np.nan), right.sum(1) / texts.sum(1)


def retrieval(logs, runs, folder):
    found = read_retrieval(logs, runs)
    draw_retrieval(found, logs, folder)
    print_table("Retrieval: share of texts answered right, by numbers in a text", accuracy_rows(found, logs))
    print_table("Shares of the last token's attention in the longest texts", share_rows(found))
    print_cost(logs, runs, "retrieval")


def draw_retrieval(found, logs, folder):
    """Draw how the shorter texts are learned, and the test: by numbers in a text, by the answer's place, and shares."""
    lengths, kinds = [length for _, length in found], [*dict.fromkeys(kind for kind, _ in found)]
    short, long = min(lengths), max(lengths)
    beside = {kind: i - (len(kinds) - 1) / 2 for i, kind in enumerate(kinds)}  # so that no kind hides another
    figure, ((learning_axis, count_axis), (depth_axis, share_axis)) = plt.subplots(2, 2, figsize=(11, 8))
    for (kind, length), by_seed in found.items():
        seeds, color = [*by_seed.values()], COLORS[kind]
        bars = dict(color=color, marker="o", markersize=3, capsize=2, linewidth=1)
        if length == short:
            validations = [read_log(logs, f"retrieval/{kind}-{seed}-{length}") for seed in by_seed]
            measured = [~np.isnan(log["val_accuracy"]) for log in validations]
            steps = min((log["step"][where] for log, where in zip(validations, measured)), key=len)
            right = [log["val_accuracy"][where][: len(steps)] for log, where in zip(validations, measured)]
            label = f"{NAMES[kind]}, n = {len(seeds)}"
            learning_axis.plot(steps, np.mean(right, axis=0), "o-", color=color, label=label, markersize=3)
            lowest, highest = np.min(right, axis=0), np.max(right, axis=0)
            learning_axis.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
        counts = list(seeds[0]["accuracy"])
        right = np.array([accuracies(seeds, count)[1] for count in counts]).T  # (seeds, counts)
        places = [int(count) + 0.1 * beside[kind] for count in counts]
        style = dict(linestyle="-" if length == long else ":")
        count_axis.errorbar(places, right.mean(0), seed_range(right), **bars, **style)
        if length == long:
            right = accuracies(seeds, str(seeds[0]["needles"]))[0]  # (seeds, depths)
            places = (np.arange(right.shape[1]) + 0.5) / right.shape[1] * 100 + beside[kind]
            depth_axis.errorbar(places, right.mean(0), seed_range(right), **bars)
            shares = np.array([[np.mean(seed["needle"]["weights"][part]) for part in SHOWN] for seed in seeds])
            places = np.arange(len(SHOWN)) + 0.22 * beside[kind]
            share_axis.bar(places, shares.mean(0), 0.2, yerr=seed_range(shares), color=color, capsize=2)
    needles = {length: next(iter(by_seed.values()))["needles"] for (_, length), by_seed in found.items()}
    learning_axis.set(xlabel="step", title=f"{short} tokens, {needles[short]} numbers in a text, while it is learned")
    text = f"solid: {long} tokens" + (f", dotted: {short}" if short < long else "")
    count_axis.set(xlabel="numbers in a text", title=f"by the numbers in a text ({text})")
    title = f"{long} tokens, {needles[long]} numbers in a text, by place"
    depth_axis.set(xlabel="place of the answer, % from the beginning", title=title)
    for axis in (learning_axis, count_axis, depth_axis):
        axis.set(ylabel="share of texts answered right")
    share_axis.set(ylabel="share of attention", title=f"{long} tokens: where the last token looks")
    share_axis.set_xticks(range(len(SHOWN)), ["answer", "other numbers", "first token"])
    learning_axis.legend(title="colors in all four", title_fontsize=8, fontsize=8)
    text = "bands and bars: lowest to highest seed; below right: mean of layers and heads; V1 and V2: |A1 - lambda A2|"
    figure.supxlabel(text, fontsize=9)
    save(figure, folder / "retrieval.png")


def recall_maps(logs, runs, folder):
    """Draw the maps of the head that looks at the answer most, of the shorter texts' first seed of each attention."""
    found = read_retrieval(logs, runs)
    shortest = min(length for _, length in found)
    first = {kind: next(iter(seeds.values())) for (kind, length), seeds in found.items() if length == shortest}
    heads = {kind: first[kind]["recall"] for kind in KINDS if kind in first}
    if not heads:
        return
    figure, axes = plt.subplots(len(heads), 3, figsize=(13, 3.9 * len(heads)), squeeze=False)
    for row, (kind, head) in zip(axes, heads.items()):
        place = f"{NAMES[kind]}, layer {head['layer']}, head {head['head']}"
        titles = {"first": "A1" if "second" in head else "its only map", "second": "A2"}
        titles["difference"] = f"A1 - lambda A2 ({head.get('factor', 0):.2f} at the last query)"
        for axis, (map_, title) in zip(row, titles.items()):
            if map_ not in head:
                axis.set_axis_off()
                continue
            draw_map(figure, axis, head[map_], head["tokens"], f"{place}: {title}", limit=1)
            (start, stop), last = head["span"], len(head["tokens"]) - 1
            frame = dict(fill=False, color="tab:green", linewidth=2)
            axis.add_patch(plt.Rectangle((start - 0.5, last - 0.5), stop - start, 1, **frame))
    figure.supxlabel("green: the last query, and the keys of the answer to its question", fontsize=9)
    save(figure, folder / "recall.png")


def accuracy_rows(found, logs):
    """The share of right answers, and from which step on validation, with as many numbers as training, is above 0.9."""
    rows, column = [], "above 0.9 from step"
    for (kind, length), by_seed in found.items():
        seeds, learned = [*by_seed.values()], []
        for seed in by_seed:
            log = read_log(logs, f"retrieval/{kind}-{seed}-{length}")
            measured = ~np.isnan(log["val_accuracy"])
            steps, right = log["step"][measured], log["val_accuracy"][measured]
            after = steps[np.append(-1, np.flatnonzero(right <= 0.9))[-1] + 1 :]  # the last that is not above
            learned.append(f"{after[0]:.0f}" if len(after) else "never")
        counts = {count: f"{count} number{'s' * (count != '1')}" for count in seeds[0]["accuracy"]}
        row = {"attn": NAMES[kind], "tokens": length, "seeds": len(seeds)}
        row |= {text: over_seeds(accuracies(seeds, count)[1]) for count, text in counts.items()}
        rows.append(row | {column: ", ".join(learned)})
        plain = found.get(("vanilla", length), {})
        both = [(by_seed[seed], plain[seed]) for seed in by_seed if seed in plain]
        if both and kind != "vanilla":
            row = {"attn": f"{NAMES[kind]} minus plain", "tokens": length, "seeds": len(both)}
            for count, text in counts.items():
                ours, theirs = (accuracies(measured, count)[1] for measured in zip(*both))
                row[text] = over_seeds(ours - theirs, 3, "+")
            rows.append(row | {column: ""})
    return rows


def share_rows(found):
    """Where the last token looks in the longest texts."""
    longest, rows = max(length for _, length in found), []
    for (kind, length), seeds in found.items():
        needles = [measured["needle"] for measured in seeds.values()]
        for weights in needles[0] if length == longest else ():
            parts = [needle[weights] for needle in needles]
            row = {"attn": NAMES[kind], "seeds": len(parts), "map": map_name(weights, needles[0])}
            row |= {part.replace("_", " "): over_seeds([np.mean(s[part]) for s in parts], 4) for part in SHOWN}
            rows.append(row | {"answer, best head": over_seeds([s["best_head"]["answer"] for s in parts])})
    return rows


FIGURES = {  # by group of runs
    "sweep": (sweep,),
    "large": (large, shared_keys, lambdas, inside, functools.partial(outliers, "large")),
    "stable": (
        functools.partial(compare_ends, "stable", "vanilla", "500 steps of 65,536 tokens at a peak rate of 2e-3"),
        functools.partial(outliers, "stable"),
    ),
    "design": (functools.partial(compare_ends, "design", "v2", "V2 taken apart"),),
    "retrieval": (retrieval, recall_maps),
}
