"""Steps without finite numbers, full GPUs, and long runs."""

import resource
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from engine.checkpoint import NEWEST, load_checkpoint
from engine.log import Diverged
from engine.settings import UserError
from tests.robustness.helpers import STAGES, equal, read_log, run

# ------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_without_finite_numbers_changes_nothing(home, tmp_path, stage, value, monkeypatch, capsys):
    """Weights and moments after it are those before it, bit for bit."""
    loss, states = STAGES[stage].loss, []

    def bad_at_step_3(task, *tensors):
        values = loss(task, *tensors)
        if torch.is_grad_enabled():  # not validating
            states.append([p.detach().clone() for p in task.model.parameters() if p.requires_grad])
            values["loss"] = values["loss"] * (value if len(states) == 3 else 1)
        return values

    monkeypatch.setattr(STAGES[stage], "loss", bad_at_step_3)
    out = run(home, stage, tmp_path / "run", "--max_steps", 6, "--learning_rate", 1e-2)
    assert [row["skipped"] for row in read_log(out)] == ["", "0", "0", "1", "0", "0", "0"]
    assert "step 3 skipped: loss or gradient not finite (1 so far)" in capsys.readouterr().out
    assert [equal(before, after) for before, after in zip(states, states[1:])] == [False, False, True, False, False]
    checkpoint = load_checkpoint(out / NEWEST)
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    moments = checkpoint["optimizer"]["state"].values()
    assert all(state["step"] == 5 and state["exp_avg"].isfinite().all() for state in moments)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", id="gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_the_optimizer_leaves_out_what_is_not_finite(device):
    layer = torch.nn.Linear(4, 4, device=device)
    task = SimpleNamespace(graphed=None, device=torch.device(device), loss=lambda x: {"loss": layer(x).square().mean()})
    optimizer, changed = train.make_optimizer(layer, weight_decay=0.1), []
    for value in (1.0, float("nan"), float("inf"), 1.0):
        before = [p.detach().clone() for p in layer.parameters()]
        train.training_step(task, optimizer, 0.1, [(torch.full((2, 4), value, device=device),)])
        changed.append(not equal(before, list(layer.parameters())))
    assert changed == [True, False, False, True]
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_too_many_such_steps_end_the_run(home, tmp_path, monkeypatch, capsys):
    """Resumed, it ends at the same step: those before are counted."""
    loss, steps = train.Pretraining.loss, []

    def bad_from_step_10_on(task, *tensors):
        steps.append(1)
        return {"loss": loss(task, *tensors)["loss"] * (1 if len(steps) < 10 else float("nan"))}

    monkeypatch.setattr(train.Pretraining, "loss", bad_from_step_10_on)
    out = tmp_path / "run"
    with pytest.raises(Diverged, match="10 steps in a row up to 19 .* lower --learning_rate") as caught:
        run(home, "pretrain", out, "--max_steps", 100)
    assert "\n" not in str(caught.value)
    newest = load_checkpoint(out / NEWEST)
    assert newest["step"] == 16 and all(tensor.isfinite().all() for tensor in newest["model"].values())
    capsys.readouterr()
    with pytest.raises(Diverged, match="10 steps in a row up to 19"):
        run(home, "pretrain", out, "--resume")
    assert "step 17 skipped: loss or gradient not finite (8 so far)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- a full GPU


@pytest.mark.parametrize(
    "flags, recording, advice",
    [(["--batch_size", 12, "--micro_batch_size", 12], False, "try --micro_batch_size 6"),
     (["--batch_size", 12, "--micro_batch_size", 4], True, "try --micro_batch_size 3"),
     (["--batch_size", 3, "--micro_batch_size", 1], False, "not even one sequence fits")],
)  # fmt: skip
def test_a_full_gpu_is_one_line_with_what_fits(home, tmp_path, flags, recording, advice, monkeypatch):
    def full(task, *tensors):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        finally:
            if recording:  # a CUDA graph, which then ends with an error of its own
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(train.Pretraining, "loss", full)
    with pytest.raises(UserError, match=f"the GPU's memory is full; {advice}"):
        run(home, "pretrain", tmp_path / "run", "--max_steps", 2, *flags)


def test_other_errors_are_not_taken_for_a_full_gpu(home, tmp_path, monkeypatch):
    def broken(task, *tensors):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train.Pretraining, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(home, "pretrain", tmp_path / "run", "--max_steps", 2)


# ------------------------------------------------------------------------------------- long runs


def memory_in_use():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of a process's memory")
def test_memory_and_speed_hold_over_3000_steps(home, tmp_path, monkeypatch):
    """After the first 1,000 steps, in which allocators fill up, a step keeps less than 512 bytes."""
    get_batch, marks = train.Pretraining.get_batch, []

    def watched(task, step):
        if step >= 1000 and step % 500 == 0:
            marks.append((time.process_time(), memory_in_use()))
        return get_batch(task, step)

    monkeypatch.setattr(train.Pretraining, "get_batch", watched)
    flags = ["--attn", "vanilla", "--n_embd", 8, "--block_size", 8, "--batch_size", 1, "--max_steps", 3001]
    flags += ["--log_interval", 250, "--eval_interval", 3000, "--save_interval", 1500]
    run(home, "pretrain", tmp_path / "run", *flags)
    seconds = [after - before for (before, _), (after, _) in zip(marks, marks[1:])]
    growth = marks[-1][1] - marks[0][1]
    assert len(marks) == 5 and growth < 2000 * 512
    assert max(seconds) < 2 * min(seconds)
