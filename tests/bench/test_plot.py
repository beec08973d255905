"""bench.plot reads any run's log.csv and compares them."""

import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from bench import plot  # noqa: E402
from engine.settings import UserError  # noqa: E402

LOG = """step,loss,grad_norm,skipped,lr,tokens_per_s,mfu,val_loss
0,,,,,,,2.5
1,2.0,1.0,0,0.1,100,,
2,1.5,inf,1,0.1,300,,1.75
3,1.0,0.5,0,0.1,200,,1.875
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text(LOG)
    return tmp_path / "run"


def test_reads_a_folder_or_a_file(run):
    a, b = plot.read_run(run), plot.read_run(run / "log.csv")
    for log in (a, b):
        np.testing.assert_equal(log["val_loss"], [2.5, np.nan, 1.75, 1.875])
        np.testing.assert_equal(log["per_s"], [np.nan, 100, 300, 200])


def test_summary(run):
    expected = ["a", 3, "1.5000", "1.7500", "1.8750", "200 tokens/s"]
    assert list(plot.summary("a", plot.read_run(run)).values()) == expected


@pytest.mark.parametrize("text", ["", "step,loss\n1,2\n", LOG.splitlines()[0], LOG.replace("1.5", "x"), "\x00"])
def test_other_files_are_refused(run, text):
    (run / "log.csv").write_text(text)
    with pytest.raises(UserError, match="log.csv is no log.csv of this project, or has no step yet"):
        plot.read_run(run)


def test_a_missing_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nosuch: No such file"):
        plot.read_run(tmp_path / "nosuch")


def test_a_picture_has_an_ending(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot", str(run), "--out", str(tmp_path / "picture")])
    with pytest.raises(UserError, match="the picture's name needs an ending"):
        plot.main()


def test_the_mean_is_drawn_at_the_middle_of_its_steps(tmp_path, monkeypatch):
    figures, steps = [], np.arange(101)
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    empty = np.full(101, np.nan)
    log = dict(step=steps, loss=steps / 10, grad_norm=empty, val_loss=empty, per_s=empty, unit="tokens")
    plot.draw({"run": log}, tmp_path / "all.png")
    thick = max(figures[0].axes[0].get_lines(), key=lambda line: line.get_linewidth())
    np.testing.assert_allclose(thick.get_ydata(), thick.get_xdata() / 10, atol=0.051)  # of 20 steps, half a step off


def test_draws_runs_of_several_stages(run, tmp_path, monkeypatch, capsys):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(LOG.replace("tokens_per_s", "pairs_per_s"))
    labels, save = [], plot.save
    note = lambda figure, path: (labels.extend(axis.get_ylabel() for axis in figure.axes), save(figure, path))  # noqa: E731
    monkeypatch.setattr(plot, "save", note)
    monkeypatch.setattr(sys, "argv", ["plot", str(run), str(pairs), "--out", str(tmp_path / "new" / "all.png")])
    plot.main()
    assert (tmp_path / "new" / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert labels == ["nats per token or pair", "nats per token or pair", "L2 norm", "tokens or pairs a second"]
    assert capsys.readouterr().out.count("| 3 | 1.5000 |") == 2
