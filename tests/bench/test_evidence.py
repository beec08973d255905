"""bench/evidence.py: its intervals, and its tables and pictures of logs made by hand."""

import itertools
import json

import numpy as np
import pytest

from bench import evidence, figures, logs, runs
from bench.logs import T_975, over_seeds, t_interval
from engine.settings import UserError

LAYERS = 3


def test_interval_over_seeds():
    mean, half = t_interval(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2, 5] and half.tolist() == [pytest.approx(4.303 / np.sqrt(3)), 0]
    assert t_interval(np.array([0.0, 0, 0, 0, 5])) == pytest.approx((1, 2.776))
    assert over_seeds([0.1, 0.2, 0.3], 2, "+") == "+0.20 ± 0.25" and over_seeds([0.1], 1) == "0.1"
    assert over_seeds([0.1, 0.2], sign="+") == "+0.100, +0.200"  # two have no interval worth the name
    assert over_seeds([0.1, np.nan]) == over_seeds([0.1, 0.2, np.nan]) == ""


@pytest.mark.parametrize("freedom, quantile", list(enumerate(T_975, start=1)))
def test_quantiles(freedom, quantile):
    """The density of Student's t up to the quantile, which is 0.475 beyond 0."""
    angle = np.linspace(0, np.arctan(quantile / np.sqrt(freedom)), 100_001)  # t = sqrt(freedom) tan(angle)
    density = np.cos(angle) ** (freedom - 1)
    whole = np.cos(np.linspace(0, np.pi / 2, 100_001)) ** (freedom - 1)
    area = np.trapezoid(density, angle) / np.trapezoid(whole, dx=np.pi / 200_000)
    assert area / 2 == pytest.approx(0.475, abs=2e-5)


def write_log(folder, name, losses, speed, accuracies, lam, spike=1):
    """Write a log with a validation every 50 steps, two layers' lambda, and the gradient norm `spike` in row 10."""
    lines = ["step,loss,grad_norm,val_loss,val_accuracy,tokens_per_s,lambdas"]
    for index, loss in enumerate(losses):
        norm = spike if index == 10 else 1
        lines.append(f"{50 * index},1,{norm},{loss},{accuracies[index]},{speed if index else ''},{lam} {lam + 0.5}")
    runs.log_path(folder, name).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Logs of all runs on data/large.

    At all steps V2 - plain is -0.01 * seed, V1 - plain 0.02, v2-shared - V2 0.04, v2-low-rate - V2 0.06 and
    vanilla-heads - plain 0.05. Plain's loss falls from 5 to 3, plus the seed. In a text of n numbers, the answer in the
    d-th part, plain is right in 90 - 10 * seed - n + d of 100, V1 in 4 more, V2 in 2 more. V2's logs have a
    spike, its designs', too.
    """
    folder = tmp_path_factory.mktemp("logs")
    planned = {n: p for n, p in runs.planned_runs("out").items() if n.split("/")[0] in evidence.FIGURES}
    rng = np.random.default_rng(1)
    for name, plan in planned.items():
        attn, seed = plan.settings.attn, plan.settings.seed
        change = {"v1": 0.02, "v2": -0.01 * seed, "norm": -0.01 * seed + 0.03}.get(attn, 0)
        change += dict(shared=0.04, low=0.06, heads=0.05).get(name.split("-")[1], 0)
        speed = 250 if "shared" in name else 500 if attn == "v2" else 1000
        longer = name.endswith("-2048")
        done = np.arange(0, plan.settings.max_steps + 1, 50) / plan.settings.max_steps
        lam, spike = seed / (10 if attn == "v1" else 20), 1 if attn in ("vanilla", "v1") else 20
        write_log(folder, name, 5 - 2 * done + seed + change, speed, done / (1 + longer), lam, spike)
        kinds = ["weights"] if attn == "vanilla" else ["weights", "first", "second"]
        measured = dict(attn=attn, needle={})
        for i, kind in enumerate(kinds):
            share = dict(answer=[0.1, (0.5 if longer else 0.3) + 0.02 * i], others=[0.04] * 2, first_token=[0.02] * 2)
            measured["needle"][kind] = share | {"best_head": dict(answer=0.25 * seed + 0.1 * i)}
        if name.startswith("retrieval/"):
            more = dict(v1=4, v2=2).get(attn, 0)
            right = {n: [90 - 10 * seed - int(n) + d + more for d in range(5)] for n in ("1", "2", "4", "6", "8")}
            accuracy = {n: dict(right=values, texts=[100] * 5) for n, values in right.items()}
            measured |= dict(length=plan.settings.block_size, needles=6, accuracy=accuracy)
            half = [[0.5, 0.0], [0.5, 0.5]]
            maps = {"first": half}
            if attn != "vanilla":
                maps |= dict(second=[[1, 0], [0, 1]], difference=[[0.5, 0], [0.5, -0.5]], factor=0.25)
            head = plan.settings.block_size
            measured |= dict(recall=dict(layer=seed, head=head, tokens=["a", "b"], span=[0, 1], **maps))
        else:
            named = [*enumerate((*kinds, "output"))]
            norms = {k: dict(mean=[0.3 + 0.1 * i, 0.5], minimum=[0.1, 0.01 * seed + 0.001 * i]) for i, k in named}
            sink = {k: [0.1 * seed + 0.1 * i, 0.2] for i, k in enumerate(kinds)}
            measured |= dict(length=2048, sink=sink, context_rms={"bound": 0.025, **norms})
            layers = [dict(largest=rng.uniform(1, 9, LAYERS).tolist(), kurtosis=[3, 4 + seed, 9]) for _ in range(3)]
            measured |= dict(outliers=dict(zip(evidence.ACTIVATIONS, layers)))
        runs.log_path(folder, name).with_suffix(".json").write_text(json.dumps(measured))
    return folder, planned


def table(text, title):
    """The rows of a table that was printed -> lists of cells, without the header."""
    lines = text.split(f"\n{title}", 1)[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_pairs_have_the_same_seed(kept):
    found = evidence.pairs(*kept, "large", "v1", "vanilla")
    assert [round(log["val_loss"][0] - plain["val_loss"][0], 6) for log, plain in found] == [0.02] * 5
    assert [round(plain["val_loss"][0]) for _, plain in found] == [6, 7, 8, 9, 10]
    assert len(evidence.pairs(*kept, "large", "v1-wide", "vanilla")) == 2


def test_the_gap_has_the_interval_of_paired_differences(kept, tmp_path, capsys):
    evidence.large(*kept, tmp_path)
    text = capsys.readouterr().out
    rows = table(text, "Held-out loss, nats")
    steps, time = (next(row for row in rows if row[0] == "V2" and row[2] == what) for what in ("steps", "time"))
    # The differences are -0.01 to -0.05, whose standard deviation is 0.0158; the losses themselves are 1 apart.
    expected = f"-0.030 ± {2.776 * np.std([1, 2, 3, 4, 5], ddof=1) * 0.01 / np.sqrt(5):.3f}"
    assert steps[1:] == ["5", "steps", *[expected] * 4]
    # At half the speed, V2 has taken half of plain's steps, and its loss has yet to fall by 2 * steps / 1500 / 2.
    assert time[3:] == [expected.replace("-0.030", f"{step / 1500 - 0.03:+.3f}") for step in evidence.STEPS]
    assert [row[3] for row in rows if row[0] == "V1, 3 pairs of 128"] == ["+0.020, +0.020"] * 2
    assert [row[1:4] for row in rows if row[0] == "V2, plain's learning rate"][0] == ["1", "steps", "+0.020"]
    assert [row[1:4] for row in rows if row[0] == "plain, 12 heads of 64"][0] == ["1", "steps", "+0.050"]
    half = 2.776 * np.std([4, 5, 6, 7, 8], ddof=1) / np.sqrt(5)
    losses = (8 - 2 * step / 1500 for step in evidence.STEPS)  # 5 to 3, and the seed's 3 in the mean
    assert rows[0] == ["plain: its loss", "5", "", *(f"{loss:.3f} ± {half:.3f}" for loss in losses)]
    speeds = {row[0]: row[1] for row in table(text, "Time of a step of 65,536 tokens")}
    assert speeds["plain"] == "65536.0 ± 0.0" and speeds["V1, 3 pairs of 128"] == "65536.0, 65536.0"
    assert speeds["V2, plain's learning rate"] == "131072.0"  # 500 tokens a second
    a_run = 30 * 65536  # tokens, at 1000 a second, V2's at 500 and v2-shared's at 250
    costs = {row[0]: row[1:] for row in table(text, "Cost")}
    assert costs["large/v1"] == ["5", f"{5 * a_run / 1e6:.0f}", f"{5 * a_run / 1000 / 60:.1f}"]
    assert costs["large/v2-shared"] == ["2", f"{2 * a_run / 1e6:.0f}", f"{2 * a_run / 250 / 60:.1f}"]
    minutes = a_run * (13 / 1000 + 6 / 500 + 2 / 250) / 60
    assert costs["all"] == ["21", f"{21 * a_run / 1e6:.0f}", f"{minutes:.1f}"] and [*costs][-1] == "all"


def test_the_picture_of_gaps_begins_after_the_warmup(kept, tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    evidence.large(*kept, tmp_path)
    for axis, first, v2 in zip(figures[0].axes, (200, 1000, 200), (-0.03, -0.03, 0.97)):  # as in the test above
        curves = {line.get_label(): line for line in axis.get_lines() if "n = " in line.get_label()}
        assert len(curves) == 5 and all(line.get_xdata()[0] == first for line in curves.values())
        assert curves["V2, n = 5"].get_ydata()[-1] == pytest.approx(v2)
        assert len(axis.collections) == 2  # bands of V1 and V2, of which there are five
    whole, end, time = figures[0].axes
    assert whole.get_ylim() == time.get_ylim() != end.get_ylim()
    norms = {row[0]: row[1:] for row in table(capsys.readouterr().out, "Gradient norm")}
    assert norms["V2"] == ["1, 1, 1, 1, 1", "0.0, 0.0, 0.0, 0.0, 0.0"]  # these logs have 30 rows
    assert norms["V1, 3 pairs of 128"] == ["0, 0", "0.0, 0.0"]


def test_shared_keys_are_compared_with_v2(kept, tmp_path, capsys):
    evidence.shared_keys(*kept, tmp_path)
    rows = table(capsys.readouterr().out, "V2 with shared keys")
    ends = [9 - 2 * step / 1500 for step in evidence.STEPS]  # plain's, of seed 4; seed 5 is 1 above

    def losses(fourth, fifth):
        return [f"{end + fourth:.3f}, {end + 1 + fifth:.3f}" for end in ends]

    assert rows[0] == ["6 layers with keys", *losses(0, -0.01)]
    assert rows[1] == ["12 layers with keys", *losses(-0.04, -0.05)]
    assert rows[2] == ["6 layers minus 12 layers with keys, at equal steps", *["+0.040, +0.040"] * 4]
    # At half of V2's speed, half of the steps are done, as in the test above.
    assert rows[3][1:] == [f"{0.04 + step / 1500:+.3f}, {0.04 + step / 1500:+.3f}" for step in evidence.STEPS]
    assert rows[4] == ["plain", *losses(0, 0)]
    assert rows[5] == [
        "6 layers minus plain, at equal steps",
        *["+0.000, -0.010"] * 4,
    ]  # -0.04 and -0.05, and 0.04


def test_one_seed_has_no_interval(kept, tmp_path, capsys):
    folder, planned = kept
    evidence.large(folder, {name: plan for name, plan in planned.items() if name.endswith("-4")}, tmp_path)
    rows = table(capsys.readouterr().out, "Held-out loss, nats")
    assert rows[0][:3] == ["plain: its loss", "1", ""] and rows[1][:4] == ["V1", "1", "steps", "+0.020"]


def test_designs_are_compared_with_v2(kept, tmp_path, capsys):
    for draw in evidence.FIGURES["design"]:
        draw(*kept, tmp_path)
    rows = {row[0]: row[1:] for row in table(capsys.readouterr().out, "V2 taken apart")}
    assert list(rows) == ["V2", "plain", "across", "no-lambda", "half", "no-sigmoid", "norm"]
    assert rows["norm"][2] == "+0.030 ± 0.000" and rows["half"][2] == "+0.020 ± 0.025" and rows["V2"][2] == ""
    assert rows["norm"][3:] == ["1, 1, 1", "0.0, 0.0, 0.0"]  # these logs have 20 rows


def test_retrieval(kept, tmp_path, capsys):
    evidence.retrieval(*kept, tmp_path)
    text = capsys.readouterr().out
    rows = table(text, "Retrieval: share of texts answered right")
    heads, names = "plain, 12 heads of 64", ["plain"]  # in the order of NAMES, whatever the order of the runs
    names += [name + minus for name in (heads, "V1", "V2") for minus in ("", " minus plain")]
    assert [row[:2] for row in rows] == [[name, length] for length in ("512", "2048") for name in names]
    rows = {(row[0], row[1]): row[2:] for row in rows}
    assert rows["V2", "512"][6] == "1850, 1850, 1850"  # these logs have validations from 0 to 1
    assert rows["V2", "2048"][6] == "never, never, never"  # and these to 0.5
    half = 4.303 * 0.1 / np.sqrt(3)  # of an interval of three values that are 0.1 apart
    for length, (name, more) in itertools.product(("512", "2048"), (("plain", 0), ("V1", 0.04), ("V2", 0.02))):
        assert rows[name, length][:6] == ["3", *(f"{0.72 - n / 100 + more:.3f} ± {half:.3f}" for n in (1, 2, 4, 6, 8))]
        if more:
            assert rows[f"{name} minus plain", length][:6] == ["3", *[f"{more:+.3f} ± 0.000"] * 5]
        assert rows[heads, length][:6] == ["1", *(f"{0.62 - n / 100:.3f}" for n in (1, 2, 4, 6, 8))]  # seed 3
        assert rows[f"{heads} minus plain", length][:6] == ["1", *["+0.000"] * 5]
    assert [row[:2] for row in table(text, "Cost")][1:3] == [["retrieval/v1", "6"], ["retrieval/v2", "6"]]
    shares = table(text, "Shares")
    assert [row[2] for row in shares] == ["only one"] * 2 + ["difference", "first", "second"] * 2
    assert shares[0][3:6] == ["0.3000 ± 0.0000", "0.0400 ± 0.0000", "0.0200 ± 0.0000"]
    assert shares[3][:4] == ["V1", "3", "first", "0.3100 ± 0.0000"] and shares[3][6] == "0.600 ± 0.621"
    assert shares[7][:4] == ["V2", "3", "second", "0.3200 ± 0.0000"]


def test_retrieval_is_compared_at_the_same_seed(kept):
    """V1's first seed and plain's second are missing."""
    found = evidence.read_retrieval(*kept)
    v1, plain = found["v1", 512], found["vanilla", 512]
    v1[3]["accuracy"]["8"]["right"] = [44, 45, 46, 47, 48]  # plain has 52 to 56
    found = {("vanilla", 512): {1: plain[1], 3: plain[3]}, ("v1", 512): {2: v1[2], 3: v1[3]}}
    *_, difference = evidence.accuracy_rows(found, kept[0])
    assert [*difference.values()] == ["V1 minus plain", 512, 1, *["+0.040"] * 4, "-0.080", ""]


def test_bars_from_the_lowest_to_the_highest_seed():
    below, above = evidence.seed_range(np.array([[0.2, 1.0], [0.3, 1.0], [0.7, 1.0]]))
    assert below == pytest.approx([0.2, 0]) and above == pytest.approx([0.3, 0])
    assert evidence.seed_range(np.array([[0.2, 1.0]])) is None


def test_the_picture_of_retrieval(kept, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    evidence.retrieval(*kept, tmp_path)
    learning, counts, depths, shares = figures[0].axes
    assert learning.get_title().startswith("512 tokens, 6 numbers") and shares.get_title().startswith("2048 tokens")
    assert [line.get_ydata()[-1] for line in learning.get_lines()] == [1.0] * 4  # the last validation of these logs
    assert learning.get_lines()[0].get_xdata()[-1] == 2000
    bars = [axis.containers for axis in (counts, depths, shares)]
    assert [*map(len, bars)] == [8, 4, 4 + 3]  # bars over the bars of the three that have three seeds
    assert bars[1][2].lines[0].get_ydata() == pytest.approx([0.68, 0.69, 0.70, 0.71, 0.72])  # V1, six numbers
    styles = [(container.lines[0].get_linestyle(), container.lines[0].get_xdata()) for container in bars[0]]
    assert [style for style, _ in styles] == [":"] * 4 + ["-"] * 4  # 512 tokens, and 2048
    assert all(places == pytest.approx([1, 2, 4, 6, 8], abs=0.2) for _, places in styles)
    heights = [bar.get_height() for bar in bars[2][1].patches]  # plain's, after those over it
    assert heights == pytest.approx([0.3, 0.04, 0.02])


def test_the_inside_of_the_models(kept, tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    evidence.inside(*kept, tmp_path)
    text = capsys.readouterr().out
    norms = {row[0]: row[1:] for row in table(text, "Norm of a query's weights")}
    first, weights, output = (
        [f"{mean} ± 0.000", low] for mean, low in (("0.450", "0.0110"), ("0.400", "0.0100"), ("0.550", "0.0130"))
    )
    assert norms["V2"] == ["5", *first, *weights, *output, "1, 1, 0, 0, 0"]  # 0.01 and 0.02 are below 0.025
    assert norms["plain"] == ["5", "", "", *weights, "0.450 ± 0.000", "0.0110", "1, 1, 0, 0, 0"]
    sinks = table(text, "Attention sink")
    assert [row[2] for row in sinks if row[0] == "V1"] == ["difference", "first", "second"]
    # The means of two layers are 0.15 to 0.35; layer 0 has 0.3 in the mean of five seeds.
    half = 2.776 * np.std([0.15, 0.2, 0.25, 0.3, 0.35], ddof=1) / np.sqrt(5)
    assert sinks[0] == ["plain", "5", "only one", f"0.25000 ± {half:.5f}", "0.3000", "0"]
    lowest = [line.get_ydata()[1] for line in figures[0].axes[1].get_lines() if line.get_linestyle() == ":"]
    assert lowest == [0.01, 0.03, 0.01, 0.01, 0.04]  # plain with 12 heads is seed 3, V2 at plain's rate seed 4


def test_lambda_of_the_first_seeds(kept, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    folder, planned = kept
    evidence.lambdas(folder, planned, tmp_path)
    evidence.lambdas(folder, {n: p for n, p in planned.items() if p.settings.attn == "v2"}, tmp_path)
    evidence.lambdas(folder, {n: p for n, p in planned.items() if p.settings.attn == "vanilla"}, tmp_path)
    titles = [[axis.get_title() for axis in figure.axes if axis.get_title()] for figure in figures]
    assert titles == [["V1, first seed", "V2, first seed"], ["V2, first seed"]]
    ends = [[line.get_ydata()[-1] for line in axis.get_lines()] for axis in figures[0].axes if axis.get_title()]
    assert ends == [[0.1, 0.6], [0.05, 0.55]]  # of two layers


def test_outliers(kept, tmp_path, monkeypatch, capsys):
    figures, (folder, planned) = [], kept
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    evidence.outliers("large", folder, planned, tmp_path)
    rows = table(capsys.readouterr().out, "Outliers in the runs `large`")
    names = ["plain", "plain, 12 heads of 64", "V1", "V2", "V2, plain's learning rate"]
    assert len(rows) == 15 and [tuple(row[1:3]) for row in rows[:5]] == [*zip(names, "51551")]
    assert all(row[3] == "7.0 ± 2.0" for row in rows if row[2] == "5")  # the medians of the kurtosis are 5 to 9
    assert rows[1][3] == "7.0"  # of seed 3
    seeds = [logs.read_json(folder, f"large/vanilla-{seed}")["outliers"]["residual"] for seed in range(1, 6)]
    assert rows[0][4] == over_seeds([max(measured["largest"]) for measured in seeds], 1)
    for axis, name in ((figures[0].axes[0], "largest"), (figures[0].axes[3], "kurtosis")):
        means = np.mean([measured[name] for measured in seeds], axis=0)
        assert axis.get_lines()[0].get_ydata() == pytest.approx(means)


def test_outliers_are_compared_with_plain_at_the_same_seed(kept, tmp_path, capsys):
    folder, planned = kept
    evidence.outliers("large", folder, planned, tmp_path)
    rows = {row[1]: row[5] for row in table(capsys.readouterr().out, "Outliers")[:5]}  # of the residual stream
    assert rows["plain"] == ""

    def highest(kind, seed):
        return max(logs.read_json(folder, f"large/{kind}-{seed}")["outliers"]["residual"]["largest"])

    assert rows["plain, 12 heads of 64"] == f"{highest('vanilla-heads', 3) - highest('vanilla', 3):+.1f}"
    assert rows["V2, plain's learning rate"] == f"{highest('v2-low-rate', 4) - highest('vanilla', 4):+.1f}"
    assert rows["V1"] == over_seeds([highest("v1", seed) - highest("vanilla", seed) for seed in range(1, 6)], 1, "+")
    evidence.outliers("large", folder, {n: p for n, p in planned.items() if p.settings.attn == "v2"}, tmp_path)
    assert table(capsys.readouterr().out, "Outliers")[0][5] == ""  # without plain


def test_stability(kept, tmp_path, capsys):
    for group in ("sweep", "stable"):
        for draw in evidence.FIGURES[group]:
            draw(*kept, tmp_path)
    text = capsys.readouterr().out
    rows = table(text, "Gradient norm in the runs `sweep`")
    assert len(rows) == 9 and rows[1] == ["plain, 1.2e-3", "0", "0.0"]  # these logs have 10 rows
    assert rows[7] == ["V2, 1.2e-3", "1", "0.0"]
    rows = {row[0]: row[1:] for row in table(text, "500 steps of 65,536 tokens at a peak rate of 2e-3")}
    half = 4.303 / np.sqrt(3)  # of 4, 5 and 6
    assert rows["plain"] == ["3", f"5.000 ± {half:.3f}", "", "0, 0, 0", "0.0, 0.0, 0.0"]
    assert rows["V1"][2] == "+0.020 ± 0.000" and rows["V2"][2:4] == ["-0.020 ± 0.025", "1, 1, 1"]


def test_runs_that_diverged(kept, tmp_path, monkeypatch, capsys):
    """They end before their last step, at a validation or not."""
    figures = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    for name, end in (("large/vanilla-1", 250), ("large/v1-1", 1500), ("large/vanilla-2", 1500), ("large/v1-2", 400)):
        write_log(tmp_path, name, [5] * (end // 50 + 1), 1, [0] * 31, 0)
    for name, end in (("design/v2-1", 1000), ("design/norm-1", 950)):
        write_log(tmp_path, name, [5] * (end // 50 + 1), 1, [0] * 31, 0)
    write_log(tmp_path, "sweep/v1-0.0012", [5, 5, 5], 1, [0] * 3, 0)
    there = {n: p for n, p in kept[1].items() if runs.log_path(tmp_path, n).exists()}
    evidence.large(tmp_path, there, tmp_path)
    evidence.sweep(tmp_path, there, tmp_path)
    for draw in evidence.FIGURES["design"]:
        draw(tmp_path, there, tmp_path)
    text = capsys.readouterr().out
    losses, differences, *_ = table(text, "Held-out loss, nats")
    assert losses[3:] == ["5.000, 5.000", "", "", ""] and differences[3:] == ["+0.000, +0.000", "", "", ""]
    gaps = figures[0].axes[0].get_lines()[0].get_ydata()
    assert np.isfinite(gaps).tolist() == [True, True] + [False] * 25  # at steps 200 and 250
    assert table(text, "Learning rates")[0] == ["1.2e-3", "", "diverged", ""]
    assert [row[2:4] for row in table(text, "V2 taken apart")] == [["5.000", ""], ["diverged", ""]]


def test_retrieval_that_diverged(kept, tmp_path, monkeypatch, capsys):
    """The picture ends where the first of the seeds ends; without plain, V1 and V2, there are no maps."""
    figures = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    folder, planned = kept
    names = [f"retrieval/vanilla-{seed}-512" for seed in (1, 2, 3)]
    for name in names:
        write_log(tmp_path, name, [1] * 41, 1, np.arange(41) / 40, 0)
        source = runs.log_path(folder, name).with_suffix(".json")
        (tmp_path / source.name).write_text(source.read_text())
    write_log(tmp_path, names[2], [1] * 11, 1, np.arange(11) / 40, 0)
    evidence.retrieval(tmp_path, {name: planned[name] for name in names}, tmp_path)
    assert figures[0].axes[0].get_lines()[0].get_xdata()[-1] == 500
    assert table(capsys.readouterr().out, "Retrieval: share")[0][8] == "1850, 1850, never"
    evidence.recall_maps(folder, {n: planned[n] for n in planned if n.startswith("retrieval/vanilla-heads")}, tmp_path)
    assert len(figures) == 1


def test_maps_of_the_head_that_finds_the_answer(kept, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: figures.append(figure))
    evidence.recall_maps(*kept, tmp_path)
    titles = [axis.get_title() for axis in figures[0].axes if axis.get_images()]
    plain, *v1 = titles[:4]
    assert len(titles) == 7 and plain == "plain, layer 1, head 512: its only map"  # seed 1
    kinds = ("A1", "A2", "A1 - lambda A2 (0.25 at the last query)")
    assert v1 == [f"V1, layer 1, head 512: {kind}" for kind in kinds]
    drawn = [axis.get_images()[0].get_array()[1].tolist() for axis in figures[0].axes if axis.get_title()]
    (answer,) = figures[0].axes[0].patches
    assert (answer.get_xy(), answer.get_width(), answer.get_height()) == ((-0.5, 0.5), 1, 1)  # token 0, last query
    assert drawn[:4] == [[0.5, 0.5], [0.5, 0.5], [0, 1], [0.5, -0.5]]


def test_a_sweep_of_learning_rates(kept, tmp_path, capsys):
    """All runs have seed 1, so plain ends at 4, V1 0.02 above it and V2 0.01 below."""
    folder, planned = kept
    evidence.sweep(folder, {n: p for n, p in planned.items() if n != "sweep/v1-0.0024"}, tmp_path)
    rows = table(capsys.readouterr().out, "Learning rates")
    assert rows == [
        [rate, "4.000", "4.020" if rate != "2.4e-3" else "", "3.990"] for rate in ("6e-4", "1.2e-3", "2.4e-3")
    ]


def test_pictures_are_light(kept, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evidence, "save", lambda figure, path: (drawn.append(path.name), logs.save(figure, path)))
    for draw in itertools.chain(*evidence.FIGURES.values()):
        draw(*kept, tmp_path)
    names = ["large", "lambdas", "attention", "outliers-large", "outliers-stable", "retrieval", "recall"]
    assert drawn == [f"{name}.png" for name in names]
    assert all(5_000 < (tmp_path / name).stat().st_size < 60_000 for name in drawn)


def test_runs_without_logs_are_not_trained_but_said_to_be_missing(monkeypatch, tmp_path, capsys):
    """A group of bench.evidence is drawn from the runs that there are, another one when it is complete."""
    drawn, trained = {}, []
    fakes = {
        group: (lambda logs, runs, folder, group=group: drawn.update({group: [*runs]}),) for group in figures.FIGURES
    }
    monkeypatch.setattr(figures, "FIGURES", fakes)
    monkeypatch.setattr(figures, "train_missing", lambda runs, arguments: trained.append(len(runs)))
    done = ["large/v2-4", "curves/v1-1", "tuning/sft", "tuning/dpo"]
    for name in done:
        runs.log_path(tmp_path, name).touch()
    monkeypatch.setattr("sys.argv", ["figures", "--logs", str(tmp_path)])
    figures.main()
    text = capsys.readouterr().out
    assert drawn == dict(tuning=done[2:], large=done[:1]) and not trained
    assert f"large: 20 of 21 runs have no log; python -m bench.runs --logs {tmp_path} 'large/*' trains them" in text
    assert "curves: 14 of 15 runs" in text and "tuning:" not in text
    drawn.clear()
    monkeypatch.setattr("sys.argv", ["figures", "--logs", str(tmp_path), "--only", "large", "design"])
    figures.main()
    assert drawn == dict(large=done[:1]) and "design: 21 of 21" in capsys.readouterr().out
    drawn.clear()
    monkeypatch.setattr("sys.argv", ["figures", "--smoke", "--out", str(tmp_path)])
    monkeypatch.setattr(figures, "train_missing", lambda runs, arguments: [make_log(arguments, name) for name in runs])
    figures.main()
    assert [*drawn] == [*fakes]
    for flags in (["--out", "x"], ["--device", "cpu"]):
        monkeypatch.setattr("sys.argv", ["figures", "--logs", str(tmp_path), *flags])
        with pytest.raises(UserError, match="--out and --device need --smoke"):
            figures.main()
    monkeypatch.setattr("sys.argv", ["figures", "--logs", f"{tmp_path}/none"])
    with pytest.raises(UserError, match="none is no folder of logs"):
        figures.main()


def make_log(arguments, name):
    path = runs.log_path(arguments.logs, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_tables_of_a_few_runs(kept, tmp_path, capsys):
    """First one run of V2 alone; then one of some kinds, without the runs that they are compared with."""
    folder, planned = kept
    evidence.large(folder, {"large/v2-2": planned["large/v2-2"]}, tmp_path)
    assert not (tmp_path / "large.png").exists()
    text = capsys.readouterr().out
    assert "Held-out loss" not in text and [row[0] for row in table(text, "Gradient norm in")] == ["V2"]
    names = ("large/vanilla-1", "large/v2-2", "design/norm-1", "sweep/v1-0.0012", "retrieval/v1-1-2048")
    for group, draws in evidence.FIGURES.items():
        few = {name: planned[name] for name in names if name.startswith(f"{group}/")}
        for draw in draws if few else ():
            draw(folder, few, tmp_path)
    text = capsys.readouterr().out
    assert [row[0] for row in table(text, "Held-out loss, nats")] == ["plain: its loss"]
    assert [row[0] for row in table(text, "Gradient norm in the runs `large`")] == ["plain", "V2"]
    for title in ("V2 with shared keys", "V2 taken apart"):
        assert title not in text


def test_the_attention_sink_by_layer_and_kind_of_weights():
    probes = {
        "vanilla": [dict(sink=dict(weights=[0.1, 0.4])), dict(sink=dict(weights=[0.3, 0.2]))],
        "v1": [dict(sink=dict(weights=[0.1, 0.0], first=[0.0, 0.5]))],
    }
    plain, difference, first = evidence.sink_rows(probes)
    assert (plain["map"], plain["mean"], plain["highest"]) == ("only one", "0.25000, 0.25000", "0.3000")
    assert plain["in layer"] == 1
    assert (difference["map"], difference["mean"], difference["in layer"]) == ("difference", "0.05000", 0)
    assert (first["map"], first["highest"], first["in layer"]) == ("first", "0.5000", 1)
