"""bench/evidence.py: its intervals, and its tables and pictures of logs made by hand."""

import json

import numpy as np
import pytest

from bench import evidence, figures, runs
from bench.evidence import t_interval, wilson, with_interval

LAYERS = 3


def test_interval_over_seeds():
    mean, half = t_interval(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2, 5] and half.tolist() == [pytest.approx(4.303 / np.sqrt(3)), 0]
    assert t_interval(np.array([0.0, 0, 0, 0, 5])) == pytest.approx((1, 2.776))
    assert with_interval([0.1, 0.2, 0.3], 2, "+") == "+0.20 ± 0.25" and with_interval([0.1], 1) == "0.1"
    assert with_interval([0.1, np.nan]) == ""


@pytest.mark.parametrize("freedom, quantile", list(enumerate(evidence.T_975, start=1)))
def test_quantiles(freedom, quantile):
    """The density of Student's t up to the quantile, which is 0.475 beyond 0."""
    angle = np.linspace(0, np.arctan(quantile / np.sqrt(freedom)), 100_001)  # t = sqrt(freedom) tan(angle)
    density = np.cos(angle) ** (freedom - 1)
    whole = np.cos(np.linspace(0, np.pi / 2, 100_001)) ** (freedom - 1)
    area = np.trapezoid(density, angle) / np.trapezoid(whole, dx=np.pi / 200_000)
    assert area / 2 == pytest.approx(0.475, abs=2e-5)


def test_interval_of_a_proportion():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    for end in wilson(30, 100):  # where the observed share is 1.96 standard errors of that end away
        assert abs(0.3 - end) == pytest.approx(1.96 * np.sqrt(end * (1 - end) / 100))


def write_log(folder, name, losses, speed, accuracies=None):
    """Write a log with a validation every 50 steps."""
    lines = ["step,loss,grad_norm,val_loss,val_accuracy,tokens_per_s,lambdas"]
    for index, loss in enumerate(losses):
        accuracy = "" if accuracies is None else accuracies[index]
        lines.append(f"{50 * index},1,1,{loss},{accuracy},{speed if index else ''},0.5 0.5")
    runs.log_path(folder, name).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Logs of all runs on data/large. At all steps V2 - plain is -0.01 * seed, V1 - plain 0.02, v2-half - V2 0.04."""
    folder = tmp_path_factory.mktemp("logs")
    planned = {n: p for n, p in runs.planned_runs("docs", "out").items() if n.split("/")[0] in evidence.FIGURES}
    rng, falling = np.random.default_rng(1), 5 - 2 * np.arange(31) / 30
    for name, plan in planned.items():
        attn, seed = plan.settings.attn, plan.settings.seed
        change = {"v1": 0.02, "v2": -0.01 * seed, "norm": -0.01 * seed + 0.03}.get(attn, 0)
        change += 0.04 if "v2-half" in name else 0
        write_log(folder, name, falling + seed + change, 500 if attn == "v2" else 1000, np.arange(31) / 30)
        kinds = ["weights"] if attn == "vanilla" else ["weights", "first", "second"]
        share = dict(answer=[0.1, 0.3], others=[0.1] * 2, first_token=[0.1] * 2, rest=[0.7, 0.5])
        measured = dict(attn=attn, needle={k: share | {"best_head": dict(answer=0.25 * seed)} for k in kinds})
        if name.startswith("retrieval/"):
            right = {n: [100 - 10 * seed] * 5 for n in ("1", "2", "4", "6", "8")}
            accuracy = {n: dict(right=values, texts=[100] * 5) for n, values in right.items()}
            measured |= dict(length=plan.settings.block_size, needles=6, accuracy=accuracy)
        else:
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
    rows = table(text, "Held-out loss minus plain's")
    steps, time = (next(row for row in rows if row[0] == "V2" and row[2] == what) for what in ("steps", "time"))
    # The differences are -0.01 to -0.05, whose standard deviation is 0.0158; the losses themselves are 1 apart.
    expected = f"-0.030 ± {2.776 * np.std([1, 2, 3, 4, 5], ddof=1) * 0.01 / np.sqrt(5):.3f}"
    assert steps[1:] == ["5", "steps", *[expected] * 4]
    # At half the speed, V2 has taken half of plain's steps, and its loss has yet to fall by 2 * steps / 1500 / 2.
    assert time[3:] == [expected.replace("-0.030", f"{step / 1500 - 0.03:+.3f}") for step in evidence.STEPS]
    assert [row[3] for row in rows if row[0] == "V1, 3 pairs of 128"] == ["+0.020 ± 0.000"] * 2
    ends = {row[0]: row[1:3] for row in table(text, "Held-out loss at the end")}
    assert ends["plain"] == ["5", "6.000 ± 1.581"] and ends["V1, 3 pairs of 128"] == ["2", "7.520 ± 0.707"]
    tokens = 19 * 30 * 65536
    minutes = (12 * 30 * 65536 / 1000 + 7 * 30 * 65536 / 500) / 60
    assert table(text, "Cost") == [["large", "19", f"{tokens / 1e6:.0f}", f"{minutes:.1f}"]]


def test_shared_keys_are_compared_with_v2(kept, tmp_path, capsys):
    evidence.shared_keys(*kept, tmp_path)
    rows = table(capsys.readouterr().out, "V2 with shared keys")
    assert rows == [["2", what, *["+0.040 ± 0.000"] * 4] for what in ("steps", "time")]


def test_a_smoke_test_has_one_seed_of_few_steps(kept, tmp_path, capsys):
    folder, planned = kept
    evidence.large(folder, {name: plan for name, plan in planned.items() if name.endswith("-4")}, tmp_path)
    rows = table(capsys.readouterr().out, "Held-out loss minus plain's")
    assert rows[0][:4] == ["V1", "1", "steps", "+0.020"]


def test_designs_are_compared_with_v2(kept, tmp_path, capsys):
    evidence.design(*kept, tmp_path)
    rows = {row[0]: row[1:] for row in table(capsys.readouterr().out, "V2 taken apart")}
    assert list(rows) == ["v2", "vanilla", "across", "plain", "half", "raw", "norm"]
    assert rows["norm"][2] == "+0.030 ± 0.000" and rows["half"][2] == "+0.020 ± 0.025" and rows["v2"][2] == ""


def test_retrieval(kept, tmp_path, capsys):
    evidence.retrieval(*kept, tmp_path)
    text = capsys.readouterr().out
    rows = table(text, "Retrieval: texts answered right")
    assert len(rows) == 6 and all(row[2:] == ["3", *["0.800 ± 0.248"] * 5] for row in rows)  # 0.9, 0.8 and 0.7
    model = next(row for row in table(text, "Retrieval, model by model") if row[0] == "v2-1-512")
    assert model[1:] == ["450", "500", "0.900", "0.871 to 0.923", "1400"]
    shares = next(row for row in table(text, "Shares") if row[:3] == ["V1", "2048", "first"])
    assert shares[3:] == ["0.2000 ± 0.0000", "0.1000 ± 0.0000", "0.1000 ± 0.0000", "0.6000 ± 0.0000", "0.500 ± 0.621"]


def test_outliers(kept, tmp_path, capsys):
    evidence.outliers(*kept, tmp_path)
    rows = table(capsys.readouterr().out, "Outliers")
    assert len(rows) == 9 and [row[1] for row in rows[:3]] == ["plain", "V1", "V2"]
    assert all(row[6:] == ["7.0 ± 2.0", "9.0 ± 0.0", "2, 2, 2, 2, 1"] for row in rows)  # the medians are 5 to 9


def test_rates(kept, tmp_path, capsys):
    for group, runs_in_it in (("fair", 9), ("stable", 9)):
        for draw in evidence.FIGURES[group]:
            draw(*kept, tmp_path)
        assert len(table(capsys.readouterr().out, "")) == runs_in_it


def test_pictures_are_light(kept, tmp_path):
    for draw in (evidence.large, evidence.outliers, evidence.retrieval):
        draw(*kept, tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"large.png", "outliers.png", "retrieval.png"}
    assert all(5_000 < size < 150_000 for size in sizes.values())


def test_groups_without_logs_are_drawn_on_request(monkeypatch, tmp_path):
    """Else bench.figures would train them."""
    drawn = []
    fakes = {group: (lambda *_, group=group: drawn.append(group),) for group in figures.FIGURES}
    monkeypatch.setattr(figures, "FIGURES", fakes)
    monkeypatch.setattr(figures, "train_missing", lambda runs, arguments: drawn.append({n.split("/")[0] for n in runs}))
    for flags in ([], ["--only", "design"], ["--smoke", "--out", str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["figures", *flags])
        figures.main()
    old = ["curves", "corpus", "rates", "tuning", "smollm2"]
    assert drawn[: len(old) + 1] == [set(old), *old]
    assert drawn[len(old) + 1 :] == [{"design"}, "design", set(fakes), *fakes]
