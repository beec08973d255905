"""bench/runs.py, bench/figures.py and bench/table2.py: the report's runs, what is read from their logs, and Table 2."""

import contextlib
import csv
import itertools
import json
import re
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
import train
from bench import evidence, figures, logs, runs, table2
from bench.probes import probe
from bench.retrieval import Retrieval
from data.write import write_dataset
from engine import log
from engine.checkpoint import NEWEST, PREVIOUS, Checkpointer, load_checkpoint, run_folder
from engine.settings import Parser, UserError
from model import GPT, GPTConfig

SHAPE = dict(preset="tiny", block_size=32, n_layer=2, n_embd=32, n_head=2, head_dim=16, n_inner=48, device="cpu")
FEW = dict(batch_size=2, micro_batch_size=1, max_steps=6, warmup_steps=2, eval_interval=2, eval_windows=2)
FEW |= dict(save_interval=3, log_interval=1)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def plan(tmp_path):
    text = "".join(map(chr, np.random.default_rng(1).integers(97, 123, size=4000)))
    write_dataset(tmp_path / "text", {"train": [text], "val": [text[:1000]]}, "bytes", "a test")

    def make(task_class=train.Pretraining, bare=False, keep="", probe_texts=0, **settings):
        paths = dict(dataset=f"{tmp_path}/text", out_dir=f"{tmp_path}/run")
        settings = train.Settings(**{**SHAPE, **FEW, **paths, **settings})
        return runs.PlannedRun(task_class, settings, bare=bare, keep=keep, probe_texts=probe_texts)

    return make


def train_run(plan, folder, log):
    """Train a run, whether or not it has a log."""
    with run_folder(folder):
        runs.train_run(plan, folder, log, "cpu")


def test_the_runs_are_those_of_the_report():
    whole = runs.planned_runs("out/runs")
    planned = {name: plan for name, plan in whole.items() if name.split("/")[0] not in evidence.FIGURES}
    assert len(planned) == 5 * 3 + 2 + (2 * 2 + 1) + 2
    for name, plan in planned.items():
        s = plan.settings
        tokens = s.batch_size * getattr(s, "block_size", 0)
        if name.startswith("curves/"):
            assert (tokens, s.max_steps, s.warmup_steps) == (8 * 2048, 1000, 200)
        assert s.attn == ("v2" if name.endswith(("/sft", "/dpo")) else name.split("/")[1].split("-")[0])
        assert plan.bare == ("bare" in name)
    naive = {name for name, plan in planned.items() if plan.settings.attn_impl == "naive"}
    assert naive == {f"curves/vanilla-bare-{seed}" for seed in (1, 2, 3)}
    assert planned["tuning/sft"].settings.max_steps == 1000 and planned["tuning/dpo"].settings.max_steps == 625
    for stage, before, kept in (("sft", "large/v2-1", "last"), ("dpo", "tuning/sft", "best")):
        plan = planned[f"tuning/{stage}"]
        assert plan.after == before and whole[before].keep == kept
        assert plan.settings.init_from == f"out/runs/{before}/best.pt"


def test_the_runs_on_the_large_corpus():
    planned = runs.planned_runs("out/runs")
    groups = {group: {n: p for n, p in planned.items() if n.startswith(f"{group}/")} for group in evidence.FIGURES}
    counts = {group: len(plans) for group, plans in groups.items()}
    assert counts == dict(sweep=3 * 3, large=3 * 5 + 6, stable=3 * 3, design=7 * 3, retrieval=(3 * 3 + 1) * 2)
    for name, plan in itertools.chain(*(plans.items() for plans in groups.values())):
        s = plan.settings
        pattern = r"(\w+)/(.+?)(?:-wide|-shared|-low-rate|-heads)?-([\d.]+)(?:-\d+)?"
        group, kind, seed = re.fullmatch(pattern, name).groups()
        assert (s.attn, s.dataset, plan.full_log) == (kind, "large", True)
        assert group == "sweep" or s.seed == int(seed)
        if group in ("sweep", "large", "stable"):
            assert (s.batch_size * s.block_size, s.max_steps) == (65536, 1500 if group == "large" else 500)
    for name, plan in groups["large"].items():
        assert all(step % plan.settings.eval_interval == 0 for step in evidence.STEPS)
        assert plan.settings.learning_rate == runs.BEST_RATE["vanilla" if "low-rate" in name else plan.settings.attn]
        assert plan.probe_texts == (0 if "wide" in name or "shared" in name else 64)
    wide, usual = (planned[f"large/{kind}-4"].settings for kind in ("v1-wide", "v1"))
    assert (wide.n_head, wide.head_dim) == (6, 128) and replace(wide, n_head=12, head_dim=64) == usual
    heads, usual = (planned[f"large/{kind}-3"].settings for kind in ("vanilla-heads", "vanilla"))
    assert (heads.n_head, heads.head_dim) == (12, 64) and replace(heads, n_head=6, head_dim=128) == usual
    slow, shared, usual = (planned[f"large/{kind}-4"].settings for kind in ("v2-low-rate", "v2-shared", "v2"))
    assert replace(slow, learning_rate=usual.learning_rate) == usual
    assert shared.n_kv_layers == 6 and replace(shared, n_kv_layers=0, n_inner=shared.n_inner - 256) == usual
    assert {plan.settings.learning_rate for plan in groups["sweep"].values()} == {6e-4, 1.2e-3, 2.4e-3}
    assert {plan.settings.learning_rate for plan in groups["stable"].values()} == {2e-3}
    for name, plan in groups["retrieval"].items():
        start, s = planned[plan.after], plan.settings
        assert start.keep == "last" and s.init_from == f"out/runs/{plan.after}/best.pt"
        assert plan.after == (
            name.replace("2048", "512") if s.block_size == 2048 else name.replace("retrieval", "large")[:-4]
        )
        assert start.settings.attn == s.attn and start.settings.seed == s.seed and s.max_steps <= 2000
        assert s.batch_size == 2 * s.micro_batch_size  # one micro-batch of each kind


def test_a_small_test_has_some_of_every_group_and_what_they_start_from(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["runs.py", "--smoke", "--out", str(tmp_path)])
    parser = Parser("")
    runs.add_flags(parser)
    _, chosen = runs.parse_runs(parser)
    whole = runs.planned_runs("out")
    assert {name.split("/")[0] for name in chosen} == {name.split("/")[0] for name in whole} and len(chosen) < 50
    assert all(plan.after in chosen for plan in chosen.values() if plan.after)
    assert {f"large/{attn}-4" for attn in (*runs.KINDS, "v1-wide")} <= chosen.keys()


def test_the_runs_of_smollm2():
    """They are planned without its files."""
    planned = {name: plan for name, plan in runs.planned_runs("out/runs").items() if "smollm2/" in name}
    assert all(plan.full_log and not plan.bare for plan in planned.values())
    for kind in ("vanilla-2e-4", "vanilla-6e-4", "v2-2e-4", "v2-6e-4", "v2-noise-6e-4"):
        plan = planned.pop(f"smollm2/{kind}")
        s = plan.settings
        assert (s.batch_size, s.micro_batch_size, s.block_size) == (16, 16, 2048)
        assert (s.max_steps, s.warmup_steps) == (1000, 100)
        assert (s.eval_interval, s.eval_windows, s.seed, s.dataset) == (50, 64, 1, "large-smollm2")
        assert s.learning_rate == float(kind[-4:]) and plan.noise == (0.1 if "noise" in kind else 0)
        assert s.init_from == ("out/smollm2/best.pt" if "vanilla" in kind else "out/smollm2-v2/best.pt")
    first, second = planned.pop("smollm2/sft"), planned.pop("smollm2/dpo")
    assert not planned and first.keep == "best" and second.after == "smollm2/sft"
    found = [(p.settings.init_from, p.settings.dataset, p.settings.max_steps) for p in (first, second)]
    assert found[0] == ("out/smollm2-v2/best.pt", "slimorca-smollm2", 200)
    assert found[1] == ("out/runs/smollm2/sft/best.pt", "orca_dpo_pairs-smollm2", 100)


@contextlib.contextmanager
def interrupted_by_saving(monkeypatch):
    """Let the run in this block end with its first checkpoint."""
    save = Checkpointer.save

    def save_and_stop(checkpointer, step):
        save(checkpointer, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpointer, "save", save_and_stop)
        yield


def test_a_run_has_the_shape_of_the_model_it_starts_from(plan, tmp_path, monkeypatch):
    """But its own context; also after an interruption."""
    train_run(plan(keep="best", n_kv_head=1), tmp_path / "start", tmp_path / "start.csv")
    other = dict(init_from=f"{tmp_path}/start/best.pt", block_size=16, n_layer=1, n_embd=64, n_head=1, n_inner=8)
    with interrupted_by_saving(monkeypatch):
        train_run(plan(**other), tmp_path / "run", tmp_path / "run.csv")
    train_run(plan(keep="last", **other), tmp_path / "run", tmp_path / "run.csv")
    before, after = (load_checkpoint(path)["config"] for path in (other["init_from"], tmp_path / "run" / "best.pt"))
    assert after == before | {"block_size": 16} and before["n_kv_head"] == 1
    with pytest.raises(UserError, match="the checkpoint's model has attn v2, but the settings say vanilla"):
        train_run(plan(**other, attn="vanilla"), tmp_path / "plain", tmp_path / "plain.csv")


def test_noise_is_in_the_second_query_heads_alone():
    torch.manual_seed(1)
    config = GPTConfig(attn="v2", vocab_size=64, n_layer=2, n_embd=64, n_head=4, n_kv_head=2, head_dim=32, n_inner=48)
    model, again, another = GPT(config), GPT(config), GPT(config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for other, seed in ((model, 1), (again, 1), (another, 2)):
        other.load_state_dict(before)
        runs.add_noise(other, 0.1, seed)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"layers.{layer}.attn.q_proj.weight" for layer in range(2)}
    for name in changed:
        old, new = (state[name].view(8, 32, 64) for state in (before, after))
        assert torch.equal(new[::2], old[::2])
        noise = (new - old)[1::2]
        relative = noise.pow(2).mean((1, 2)).sqrt() / old[1::2].pow(2).mean((1, 2)).sqrt()
        assert relative.tolist() == pytest.approx([0.1] * 4, rel=0.1)
        assert not torch.allclose(noise[0], noise[1])
        assert torch.equal(again.state_dict()[name], after[name])
        assert not torch.equal(another.state_dict()[name], after[name])


def test_noise_comes_once(plan, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "add_noise", lambda model, noise, seed: seen.append((noise, seed)))
    noisy = replace(plan(seed=3, max_steps=4), noise=0.1)  # saved after 3
    train_run(noisy, tmp_path / "run", tmp_path / "run.csv")
    train_run(replace(noisy, settings=replace(noisy.settings, max_steps=6)), tmp_path / "run", tmp_path / "run.csv")
    assert seen == [(0.1, 3)]
    train_run(plan(), tmp_path / "other", tmp_path / "other.csv")
    assert len(seen) == 1


def test_a_full_log_has_the_start_and_the_speed_and_others_have_not(plan, tmp_path):
    train_run(plan(), tmp_path / "run", tmp_path / "run.csv")
    runs.keep_log(tmp_path / "run", tmp_path / "full.csv", full=True)
    usual, full = (read_csv(tmp_path / f"{name}.csv") for name in ("run", "full"))
    assert list(usual[0]) == ["step", "loss", "grad_norm", "val_loss", "lambdas"]
    assert list(full[0]) == ["step", "loss", "grad_norm", "val_loss", "tokens_per_s", "lambdas"]
    assert [{name: row[name] for name in usual[0]} for row in full[1:]] == usual
    first = full[0]
    assert (first["step"], first["loss"], first["tokens_per_s"]) == ("0", "", "") and float(first["val_loss"]) > 0
    assert len(first["lambdas"].split()) == 2 and all(float(row["tokens_per_s"]) > 0 for row in full[1:])


def test_the_distance_of_the_query_heads_is_kept_of_a_full_log(plan, tmp_path):
    with_distances = replace(plan(keep="last"), full_log=True)
    train_run(with_distances, tmp_path / "run", tmp_path / "run.csv")
    model = GPT(GPTConfig(**(checkpoint := load_checkpoint(tmp_path / "run" / "best.pt"))["config"]))
    model.load_state_dict(checkpoint["model"])
    kept = json.loads((tmp_path / "run.json").read_text())["query_distances"]
    assert kept == pytest.approx(runs.query_distances(model)) and all(0 < distance < 2 for distance in kept)
    for layer, factor in zip(model.layers, (1.0, -1.0)):
        pairs = layer.attn.q_proj.weight.data.unflatten(0, (-1, 2, 16))
        pairs[:, 1] = factor * pairs[:, 0]
    assert runs.query_distances(model) == pytest.approx([0.0, 2.0])
    for other in (plan(), replace(plan(attn="vanilla", n_kv_head=2), full_log=True)):
        train_run(other, tmp_path / other.settings.attn, tmp_path / f"{other.settings.attn}.csv")
        assert not (tmp_path / f"{other.settings.attn}.json").exists()


def test_the_trained_model_is_measured(plan, tmp_path):
    """On the windows of its validation, at its own context."""
    train_run(plan(keep="last", probe_texts=3), tmp_path / "run", tmp_path / "run.csv")
    model = GPT(GPTConfig(**(checkpoint := load_checkpoint(tmp_path / "run" / "best.pt"))["config"]))
    model.load_state_dict(checkpoint["model"])
    val = np.fromfile(tmp_path / "text" / "val.bin", dtype=np.uint16)
    kept = json.loads((tmp_path / "run.json").read_text())
    assert kept["length"] == 32 and kept["attn"] == "v2"
    windows = train.Pretraining(replace(plan().settings)).val_batches
    tokens = torch.cat([inputs.flatten() for inputs, _ in windows]).numpy()
    assert np.isin(tokens, val).all() and kept == probe(model, tokens, 32, 3)


def test_a_run_without_the_methods(plan, tmp_path):
    bare, usual = plan(**{**runs.BARE, "learning_rate": 1e-3}), plan(learning_rate=1e-3)
    for name, a_plan in (("bare", bare), ("usual", usual)):
        train_run(a_plan, tmp_path / name, tmp_path / f"{name}.csv")
    rates = [[row["lr"] for row in read_csv(tmp_path / name / "log.csv")[1:]] for name in ("bare", "usual")]
    assert rates[0] == ["0.001"] * 6 and rates[1][:2] == ["0.0005", "0.001"] and float(rates[1][-1]) < 0.0002
    sizes = [load_checkpoint(tmp_path / name / NEWEST)["config"]["vocab_size"] for name in ("bare", "usual")]
    assert sizes == [257, 320]
    task, optimizer = runs.make_task(bare, bare.settings, None)
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    for name in ("betas", "weight_decay", "eps"):
        assert [group[name] for group in optimizer.param_groups] == [defaults[name]]
    inputs, targets = task.get_batch(1)[1][0]
    expected = F.cross_entropy(task.model(inputs)[0].flatten(0, 1), targets.flatten()) / 2  # one of two micro-batches
    assert task.loss(inputs, targets)["loss"].item() == expected.item()


RETRIEVAL = dict(task_class=Retrieval, block_size=160, probe_texts=2)


@pytest.mark.parametrize(
    "kind", [{}, dict(bare=True), dict(attn="half"), RETRIEVAL], ids=["usual", "bare", "half", "retrieval"]
)
def test_an_interrupted_run_has_the_same_log(plan, kind, tmp_path, monkeypatch):
    plan = partial(plan, weight_decay=0.01, **kind)
    train_run(plan(), tmp_path / "whole", tmp_path / "whole.csv")
    with interrupted_by_saving(monkeypatch):
        train_run(plan(), tmp_path / "part", tmp_path / "part.csv")
    assert not (tmp_path / "part.csv").exists()
    train_run(plan(), tmp_path / "part", tmp_path / "part.csv")
    assert (tmp_path / "part.csv").read_text() == (tmp_path / "whole.csv").read_text()
    log = figures.read_log(tmp_path, "whole")
    if kind == RETRIEVAL:
        assert np.isfinite(log["val_accuracy"][1::2]).all()
        assert (tmp_path / "part.json").read_text() == (tmp_path / "whole.json").read_text()
    assert log["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert log["lambdas"].shape == (6, 2) and np.isfinite(log["lambdas"][1::2]).all()
    assert np.isnan(log["val_loss"][::2]).all() and np.isfinite(log["val_loss"][1::2]).all()


def test_a_run_that_diverges_is_a_result_and_other_errors_are_not(plan, tmp_path, monkeypatch):
    loss, calls = train.Pretraining.loss, []

    def diverging(task, *tensors):
        calls.append(1)
        return {"loss": loss(task, *tensors)["loss"] * (float("nan") if len(calls) > 6 else 1)}

    monkeypatch.setattr(train.Pretraining, "loss", diverging)
    monkeypatch.setattr(log, "MAX_SKIPPED", 2)
    train_run(plan(), tmp_path / "run", tmp_path / "run.csv")
    assert np.isnan(figures.read_log(tmp_path, "run")["loss"]).tolist() == [False, False, False, True, True]
    with pytest.raises(UserError, match="no data set"):
        train_run(plan(dataset=f"{tmp_path}/none"), tmp_path / "run", tmp_path / "other.csv")


def test_only_missing_runs_are_trained_and_their_folders_removed(plan, tmp_path, monkeypatch):
    trained = []

    def fake(plan, folder, log, device):
        with pytest.raises(UserError, match="another run is writing to"), run_folder(folder):
            pass
        trained.append((folder.name, log.name))

    monkeypatch.setattr(runs, "train_run", fake)
    (tmp_path / "curves-a.csv").write_text("")
    tokenizer = "tokenizer-0a1b2c3d.json"
    for name in ("a", "b", "c"):
        (tmp_path / "curves" / name).mkdir(parents=True)
        for file in (NEWEST, PREVIOUS, "best.pt", tokenizer):
            (tmp_path / "curves" / name / file).write_text("")
    arguments = types.SimpleNamespace(logs=tmp_path, out=tmp_path, device="cpu")
    with run_folder(tmp_path / "curves" / "a"):  # as if another process were training it
        runs.train_missing({"curves/a": plan()}, arguments)
    assert (tmp_path / "curves" / "a" / "best.pt").exists()
    runs.train_missing({"curves/a": plan(), "curves/b": plan(), "curves/c": plan(keep="best")}, arguments)
    assert trained == [("b", "curves-b.csv"), ("c", "curves-c.csv")]
    assert {path.name for path in (tmp_path / "curves").rglob("*")} - {"lock"} == {"c", "best.pt", tokenizer}
    with pytest.raises(UserError, match="x begins with the model of curves/b, which is not done"):
        runs.train_missing({"x": replace(plan(), after="curves/b")}, arguments)


def test_a_run_whose_start_was_not_kept_is_refused_but_goes_on(plan, tmp_path, monkeypatch):
    train_run(plan(keep="last"), tmp_path / "start", tmp_path / "start.csv")
    later = replace(plan(init_from=f"{tmp_path}/start/best.pt"), after="start")
    with interrupted_by_saving(monkeypatch):
        train_run(later, tmp_path / "run", tmp_path / "run.csv")
    (tmp_path / "start" / "best.pt").unlink()
    with pytest.raises(UserError, match="there is no .*start/best.pt: the log of start was kept, its model not"):
        train_run(later, tmp_path / "other", tmp_path / "other.csv")
    train_run(later, tmp_path / "run", tmp_path / "run.csv")  # its checkpoint has all that it needs
    assert (tmp_path / "run.csv").exists()


def test_a_run_waits_for_the_one_that_it_starts_from(plan, tmp_path, monkeypatch):
    """While another process is training that."""
    trained, begun = [], threading.Event()
    monkeypatch.setattr(runs, "train_run", lambda plan, folder, log, device: trained.append(folder.name))

    def other_process():
        with run_folder(tmp_path / "start"):
            begun.set()
            time.sleep(0.2)
            assert not trained
            (tmp_path / "start" / "best.pt").write_text("")
            (tmp_path / "start.csv").write_text("")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(other_process)
        begun.wait()
        arguments = types.SimpleNamespace(logs=tmp_path, out=tmp_path, device="cpu")
        runs.train_missing({"x": replace(plan(), after="start")}, arguments)
        other.result()
    assert trained == ["x"]


def test_half_a_line_of_lambdas_is_left_out(tmp_path):
    """An interruption may leave one."""
    (tmp_path / "lambdas.csv").write_text("2,0.5 0.5\n4")
    (tmp_path / "log.csv").write_text("step,loss,grad_norm,val_loss\n1,1.0,1.0,\n2,1.0,1.0,3.0\n")
    runs.keep_log(tmp_path, tmp_path / "run.csv")
    assert (tmp_path / "run.csv").read_text() == "step,loss,grad_norm,val_loss,lambdas\n1,1,1,,\n2,1,1,3,0.5 0.5\n"


@pytest.mark.parametrize("keep, step", [("", None), ("best", 4), ("last", 6)])
def test_a_model_is_kept_where_another_run_starts_from_it(plan, tmp_path, keep, step, monkeypatch):
    losses = iter((9.0, 3.0, 1.0, 2.0))  # before the first step, and after 2, 4 and 6
    monkeypatch.setattr(train.Pretraining, "evaluate", lambda task: ({"val_loss": next(losses)}, ""))
    train_run(plan(keep=keep), tmp_path / "run", tmp_path / "run.csv")
    best = tmp_path / "run" / "best.pt"
    assert (load_checkpoint(best)["step"] if best.exists() else None) == step


def test_small_runs_are_about_the_same_thing():
    for plan in runs.planned_runs("out").values():
        small = runs.shrink(plan)
        micro_batches = [p.settings.batch_size // p.settings.micro_batch_size for p in (small, plan)]
        assert micro_batches[0] == micro_batches[1]
        assert (small.task_class, small.bare, small.after) == (plan.task_class, plan.bare, plan.after)
        assert (small.settings.dataset, small.settings.max_steps) == ("tiny", 4)
        assert (small.noise, small.full_log) == (plan.noise, plan.full_log)
        for name in ("attn", "attn_impl", "compile", "learning_rate"):
            assert getattr(small.settings, name) == getattr(plan.settings, name)


def test_spikes_are_found_against_the_median_before():
    assert logs.spikes(np.ones(50)) == []
    norms = np.ones(300)
    norms[[120, 250]] = 10.5
    norms[200] = 9.9
    assert logs.spikes(norms) == [120, 250]
    risen = np.concatenate((np.ones(10), np.full(200, 20.0)))  # a higher level is a spike until it is the median
    assert logs.spikes(risen) == list(range(10, 20))
    assert logs.spikes(np.array([1.0, 1.0, np.nan, 1.0, 11.0])) == [4]


def test_smoothing_and_deviation():
    assert figures.smooth(np.arange(100.0)) == pytest.approx(np.arange(81) + 9.5)
    assert figures.smooth(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert figures.middle(np.arange(100), figures.smooth(np.arange(100.0))).tolist() == list(range(9, 90))


def log_of(loss, grad_norm=None):
    return dict(step=np.arange(1, len(loss) + 1), loss=loss, grad_norm=loss if grad_norm is None else grad_norm)


def test_training_loss_and_its_distance_from_the_baselines():
    kinds = {kind: [log_of(np.full(1000, 2.0)) for _ in range(3)] for kind in figures.REPORT_ROWS}
    kinds["v2"] = [log_of(np.full(1000, loss)) for loss in (1.0, 1.4, 1.8)]
    kinds["v2"][0]["loss"][7] = np.nan  # a step that was skipped
    row = figures.loss_rows(kinds)[list(figures.REPORT_ROWS).index("v2")]
    half = 4.303 * 0.4 / np.sqrt(3)  # of three values that are 0.4 apart, and of -50, -30 and -10 %
    assert row["training loss, mean of all steps"] == f"1.400 ± {half:.3f}"
    assert row["against (a)"] == row["against (d)"] == f"-30.0 ± {50 * half:.1f} %"
    kinds["vanilla"] = [log_of(np.full(1000, 1.0)) for _ in range(3)]
    rows = dict(zip(figures.REPORT_ROWS, figures.loss_rows(kinds)))
    assert rows["v2"]["against (d)"].startswith("+40.0") and rows["v2"]["against (a)"].startswith("-30.0")
    assert rows["vanilla"]["against (d)"] == rows["vanilla-bare"]["against (a)"] == ""


def test_gradient_norms_seed_by_seed():
    calm, wild = np.ones(300), np.ones(300)
    wild[[50, 250]] = 50.0, 20.0
    row = figures.norm_columns([log_of(calm), log_of(np.ones(300), wild)])
    assert row == {"spikes": "0, 2", "highest norm after step 200": "1.0, 20.0"}
    full = dict(step=np.arange(301), grad_norm=np.array([np.nan, *wild]))
    assert figures.norm_columns([full])["spikes"] == "2"


def test_a_picture_makes_its_folder(tmp_path):
    figure, axis = figures.plt.subplots()
    axis.plot([1, 2], label="line")
    figures.legend_above(axis)
    figures.save(figure, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_small_test_does_without_smollm2(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["runs.py", "--smoke", "--out", str(tmp_path)])
    parser = Parser("")
    runs.add_flags(parser)
    _, planned = runs.parse_runs(parser)
    starts = {name: plan.settings.init_from for name, plan in planned.items() if name.startswith("smollm2/")}
    assert len(starts) == 7 and starts.pop("smollm2/sft") == f"{tmp_path}/smoke/large/v2-1/best.pt"
    assert starts.pop("smollm2/dpo") == f"{tmp_path}/smoke/smollm2/sft/best.pt" and not any(starts.values())


def continued(losses, speed, lambdas=(0.5, 0.5)):
    """A log of steps 0 to 20 * (len(losses) - 1), with a validation every 20."""
    last = 20 * (len(losses) - 1)
    val_loss, tokens_per_s = np.full(last + 1, np.nan), np.full(last + 1, float(speed))
    val_loss[::20], tokens_per_s[:2] = losses, (np.nan, speed / 9)  # the first step compiles
    by_layer = np.full((last + 1, len(lambdas)), np.nan)
    by_layer[::20] = 0.5
    by_layer[-1] = lambdas
    return dict(step=np.arange(last + 1), val_loss=val_loss, tokens_per_s=tokens_per_s, lambdas=by_layer)


def test_the_gap_at_equal_steps_and_at_equal_time():
    plain, slower = continued([5.0, 4.0, 3.5, 3.25], 1000), continued([5.0, 3.9, 3.4, 3.1], 800)
    equal_steps, equal_time = figures.gaps(slower, plain, [0, 20, 50, 60, 70])
    assert equal_steps[:4] == pytest.approx([0, 3.9 - 4.0, 3.25 - 3.375, 3.1 - 3.25])
    # In the time of 20, 50 and 60 steps, the slower one takes 16, 40 and 48.
    assert equal_time[:4] == pytest.approx([0, 4.12 - 4.0, 3.4 - 3.375, 3.28 - 3.25])
    assert np.isnan([equal_steps[4], equal_time[4]]).all()  # both have ended
    assert np.isnan(figures.gaps(plain, slower, [60])[1]).all()  # a faster one ends before
    assert figures.held_out_at(plain, [10, 60, 61])[:2] == pytest.approx([4.5, 3.25])


def test_differences_of_smollm2_in_a_table():
    steps = np.arange(0, 1001, 20)
    plain, v2 = continued(4 - steps / 1000, 1000), continued(4 - steps / 900, 500)
    noisy = continued(4 - steps[:31] / 800, 500)  # ends after step 600
    rows = figures.gap_rows(plain, v2, noisy)
    assert [row["step"] for row in rows] == [100, 250, 500, 1000]
    for row in rows:
        step, (equal_steps, equal_time, noise) = row["step"], list(row.values())[1:]
        assert float(equal_steps) == pytest.approx(step / 1000 - step / 900, abs=1e-4)
        assert float(equal_time) == pytest.approx(step / 1000 - step / 2 / 900, abs=1e-4)
        assert noise == ("" if step == 1000 else f"{step / 900 - step / 800:+.4f}")


def test_start_end_speed_and_lambda_of_a_run_of_smollm2():
    log = continued([3.5, 3.0, 3.25], 2000, lambdas=(0.3, 0.4, 0.8))
    row = dict(start="3.5000", end="3.2500")
    row = {f"held-out loss, {name}": text for name, text in row.items()}
    assert figures.continued_row(log, tokens=64) == row | {"ms a step": "32.0"}
    row = {"lambda, start": "0.500 (0.500 to 0.500)", "lambda, end": "0.500 (0.300 to 0.800)"}
    row |= {"query heads apart, end": "0.200 (0.100 to 0.400)"}
    assert figures.lambda_row(log, [0.1, 0.4, 0.1]) == row


def test_pictures_and_tables_of_all_runs(tmp_path, capsys):
    """Kept logs are enough for them."""
    old = figures.FIGURES.keys() - evidence.FIGURES.keys()
    planned = {n: runs.shrink(p) for n, p in runs.planned_runs("out").items() if n.split("/")[0] in old}
    for name in planned:
        columns = [c for c in runs.COLUMNS if name.endswith("/dpo") or "accuracy" not in c and "margin" not in c]
        columns += ["tokens_per_s"] * planned[name].full_log
        lines = [",".join([*columns, "lambdas"])]
        for step in range(1, 5):  # the held-out loss falls to 0.5
            values = [f"{0.5 + 0.1 * (4 - step)}" if column == "val_loss" else "0.5" for column in columns[1:]]
            lines.append(",".join([str(step), *values, "0.2 0.3"]))
        path = runs.log_path(tmp_path, name)
        path.write_text("\n".join(lines) + "\n")
        if name.startswith("smollm2/v2"):
            path.with_suffix(".json").write_text('{"query_distances": [0.1, 0.2]}')
    for draw in itertools.chain(*map(figures.FIGURES.get, old)):
        draw(tmp_path, planned, tmp_path)
    text = capsys.readouterr().out
    assert "| V1 | 3 | 0.500 ± 0.000 | +0.000 ± 0.000 |" in text
    assert "| V2 with noise, 6e-4 | 0.250 (0.200 to 0.300) | 0.250 (0.200 to 0.300) | 0.150 (0.100 to 0.200) |" in text
    assert "| DPO | 4 | 0.8000 | 0.5000 | 0.5000 | 0.500 | 0.500 |" in text
    for name in ("curves", "tuning", "smollm2"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_file_that_is_no_log(tmp_path):
    (tmp_path / "run.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match="run.csv is no log of bench.runs"):
        figures.read_log(tmp_path, "run")


# ------------------------------------------------------------------------------------- table 2


@pytest.mark.parametrize("without", [*table2.INGREDIENTS, None])
def test_every_ingredient_is_what_it_says(without, monkeypatch):
    """With all but one: the vocabulary, the attention kernel, the loss and the compiler."""
    seen = {"plain loss": 0, "compiled": 0}

    def build(config):
        seen["config"] = config
        return GPT(config)

    def counted(name, function):
        def call(*arguments):
            seen[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(bench, "GPT", build)
    monkeypatch.setattr(table2, "plain_loss", counted("plain loss", table2.plain_loss))
    monkeypatch.setattr(bench, "compile_model", lambda model, mode, _: seen.update(compiled=mode == "auto") or model)
    arguments = types.SimpleNamespace(length=16, tokens=32, smoke=True)
    ingredients = [name for name in table2.INGREDIENTS if name != without]
    table2.step_with("v1", ingredients, arguments, torch.device("cpu"))()
    assert seen["config"].vocab_size == (257 if without == "padding" else 320)
    assert seen["config"].attn_impl == ("naive" if without == "flash" else "auto")
    assert (seen["plain loss"], seen["compiled"]) == (without == "loss", without != "compile")
