"""Checkpoints that are damaged, and disks that are full or closed."""

import contextlib
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from data.write import write_dataset
from engine.checkpoint import BEST, NEWEST, PREVIOUS, load_checkpoint
from engine.settings import UserError, explain
from tests.robustness.helpers import STAGES, equal, exit_code, fork, load, read_log, run

# ------------------------------------------------------------------------------------- damaged files


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [(flip, "is damaged"), (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged"),
     (lambda path: path.write_bytes(b""), "is damaged"), (Path.unlink, "there is no checkpoint")],
)  # fmt: skip
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(home, tmp_path, capsys, damage, message):
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 16)
    rows, whole = read_log(out), load(out / NEWEST)
    damage(out / NEWEST)
    capsys.readouterr()
    run(home, "pretrain", out, "--resume")
    text = capsys.readouterr().out
    assert message in text and "going on from the one before it, of step 12" in text
    assert read_log(out) == rows and equal(load(out / NEWEST), whole)
    assert load_checkpoint(out / PREVIOUS)["step"] == 12  # still the intact one


def test_two_damaged_checkpoints_are_an_error(home, tmp_path):
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 12)
    flip(out / NEWEST)
    flip(out / PREVIOUS)
    with pytest.raises(UserError, match="ckpt-previous.pt is damaged"):
        run(home, "pretrain", out, "--resume")


def test_a_full_memory_is_no_damage(home, tmp_path, monkeypatch):
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 12)

    def full(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(torch, "load", full)
        run(home, "pretrain", out, "--resume")
    assert load_checkpoint(out / NEWEST)["step"] == 12


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_best_model_that_is_damaged_or_missing_is_replaced(home, tmp_path, damage):
    """By the best of what follows, however bad that is."""
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 4)
    damage(out / BEST)
    run(home, "pretrain", out, "--resume", "--max_steps", 8, "--learning_rate", 10)
    best = load_checkpoint(out / BEST)
    assert best["step"] == 8 and best["best_val_loss"] == float(read_log(out)[-1]["val_loss"])


def test_a_best_model_from_after_the_checkpoint_is_not_replaced_by_a_worse_one(home, tmp_path):
    """Which the repeated steps may give, if a flag is another now."""
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 20, "--save_interval", 16)
    (out / NEWEST).unlink()  # as if killed after validation at step 20
    best = (out / BEST).read_bytes()
    run(home, "pretrain", out, "--resume", "--learning_rate", 1e-5)
    assert float(read_log(out)[-1]["val_loss"]) > load_checkpoint(out / BEST)["best_val_loss"]
    assert (out / BEST).read_bytes() == best


# ------------------------------------------------------------------------------------- no room


@contextlib.contextmanager
def room_for(size):
    """No file may grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(home, tmp_path):
    """With a limit that a checkpoint goes beyond and nothing else."""
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 8)
    before = (out / NEWEST).read_bytes()
    with room_for(len(before) // 2), pytest.raises(UserError, match=r"cannot save .*ckpt.pt \(File too large\)"):
        run(home, "pretrain", out, "--resume", "--max_steps", 16)
    assert (out / NEWEST).read_bytes() == before and not list(out.glob("*.tmp"))
    run(home, "pretrain", out, "--resume", "--max_steps", 16)


def test_a_disk_that_data_fill_is_named(tmp_path):
    with room_for(1000), pytest.raises(OSError) as caught:
        write_dataset(tmp_path, {"train": ["text " * 1000], "val": ["text"]}, "bytes", "a test")
    assert explain(caught.value) == f"{tmp_path / 'train.bin'}: File too large" and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become somebody else")
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_may_not_be_written_to(home, tmp_path, exists):
    """For this process, which is root, every folder may: a child becomes somebody else first."""
    closed = tmp_path / "closed" / "run"

    def work():
        os.setuid(65534)
        run(home, "pretrain", closed, "--max_steps", 2)

    (closed if exists else closed.parent).mkdir(parents=True)
    for folder in (*tmp_path.parents[:2], tmp_path):
        folder.chmod(0o755)
    assert exit_code(fork(work, tmp_path / "output")) == 2
    assert (tmp_path / "output").read_text() == f"error: cannot write to {closed}: Permission denied\n"


# ------------------------------------------------------------------------------------- older versions


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_that_is_older_than_a_setting_goes_on(home, tmp_path, stage):
    out = run(home, stage, tmp_path / "run", "--max_steps", 8)
    whole, older = load(out / NEWEST), load(out / PREVIOUS)
    for part in ("config", "settings"):
        older[part].pop("n_kv_layers", None)  # which was added later
    torch.save(older, out / NEWEST)
    run(home, stage, out, "--resume")
    assert older["step"] == 4 and equal(load(out / NEWEST), whole)
