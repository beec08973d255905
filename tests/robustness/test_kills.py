"""A run that is killed, stopped, moved or started twice."""

import errno
import fcntl
import itertools
import os
import random
import re
import select
import signal
import time

import pytest

import engine.checkpoint
from data.slimorca.prepare import tokenize
from data.write import write_examples
from engine.checkpoint import BEST, NEWEST, PREVIOUS, archive_previous_run, load_checkpoint
from engine.files import locked
from engine.settings import UserError
from tests.robustness.helpers import (
    SCRIPTS,
    STAGES,
    call,
    equal,
    exit_code,
    fork,
    load,
    read_log,
    run,
    steps_of,
    wait_until,
)

STEPS = 120  # of a run that is killed

# ------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_25_times_equals_one_that_is_not(home, tmp_path, stage):
    """SIGKILL at random moments: while it starts, between checkpoints, and a third while one is being written."""
    whole = run(home, stage, tmp_path / "whole", "--max_steps", STEPS)
    out, rng = tmp_path / "killed", random.Random(1)
    for kill in range(25):
        resume = ["--resume"] if (out / NEWEST).exists() or (out / PREVIOUS).exists() else []
        before = age(out / NEWEST)
        child = fork(lambda: run(home, stage, out, "--max_steps", STEPS, *resume))  # noqa: B023
        if kill % 3 == 0:
            wait_until(lambda: list(out.glob(f"{NEWEST}.{child}.tmp")) or ended(child))  # noqa: B023
        elif kill % 3 == 1:
            wait_until(lambda: age(out / NEWEST) != before or ended(child))  # noqa: B023
            time.sleep(0.05 * rng.random())
        else:
            time.sleep(0.1 * rng.random())
        os.kill(child, signal.SIGKILL)
        if exit_code(child) == 0:  # it was done before: take away its last steps
            (out / NEWEST).unlink()
    run(home, stage, out, "--resume", "--max_steps", STEPS)
    assert_equal_runs(out, whole, *[BEST, "adapter.pt"][: 1 + (stage != "pretrain")])
    assert steps_of(out) == list(range(1, STEPS + 1)) and not list(out.glob("*.tmp"))


def age(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # a run may be renaming it at this moment
        return 0


def ended(child):
    """True if a child has ended; its exit code can still be asked for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def assert_equal_runs(a, b, *names):
    assert read_log(a) == read_log(b)
    for name in (NEWEST, PREVIOUS, *names):
        assert equal(load(a / name), load(b / name)), name


def test_a_kill_between_the_two_renames_of_a_checkpoint(home, tmp_path, monkeypatch):
    """The old checkpoint has its other name already, and the new one has no name yet."""
    whole, out, rename = run(home, "pretrain", tmp_path / "whole", "--max_steps", 16), tmp_path / "run", os.replace

    def killed(source, target):
        if os.path.basename(target) == NEWEST and load(source)["step"] == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        assert exit_code(fork(lambda: run(home, "pretrain", out, "--max_steps", 16))) == -signal.SIGKILL
    assert not (out / NEWEST).exists() and load(out / PREVIOUS)["step"] == 8
    assert [path.suffix for path in out.glob(f"{NEWEST}.*")] == [".tmp"]
    run(home, "pretrain", out, "--resume")
    assert_equal_runs(out, whole, BEST)
    assert not list(out.glob("*.tmp"))


def test_a_preparation_that_is_killed_leaves_no_process_behind(tmp_path):
    """Each of them has a pipe open, which ends when the last one does."""
    reader, writer = os.pipe()
    rows = itertools.repeat({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    child = fork(lambda: write_examples(tmp_path, rows, tokenize, "bytes", 32, "a test"))
    os.close(writer)
    wait_until(lambda: sum(path.stat().st_size for path in tmp_path.glob("train.bin.*")))
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    assert select.select([reader], [], [], 20)[0] and os.read(reader, 1) == b""
    os.close(reader)


# ------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_followed_by_a_checkpoint_within_seconds(home, tmp_path, stage, number):
    child = fork(lambda: run(home, stage, tmp_path / "run", "--max_steps", 100_000))
    wait_until((tmp_path / "run" / NEWEST).exists)
    os.kill(child, number)
    started = time.monotonic()
    assert exit_code(child) == 128 + number and time.monotonic() - started < 5
    assert steps_of(tmp_path / "run") == list(range(1, load_checkpoint(tmp_path / "run" / NEWEST)["step"] + 1))


def test_a_signal_before_the_first_step_is_obeyed_after_it(home, tmp_path, monkeypatch):
    evaluate = STAGES["pretrain"].evaluate

    def interrupted(task):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(task)

    monkeypatch.setattr(STAGES["pretrain"], "evaluate", interrupted)
    with pytest.raises(SystemExit) as left:
        run(home, "pretrain", tmp_path / "run", "--max_steps", 9)
    assert left.value.code == 128 + signal.SIGTERM and load_checkpoint(tmp_path / "run" / NEWEST)["step"] == 1


def test_the_second_signal_ends_a_run_at_once(home, tmp_path, monkeypatch):
    """Even in the middle of a step."""

    def endless(task, *tensors):
        (tmp_path / "in a step").touch()
        while True:
            time.sleep(1)

    monkeypatch.setattr(STAGES["pretrain"], "loss", endless)
    child = fork(lambda: run(home, "pretrain", tmp_path / "run", "--max_steps", 9), tmp_path / "output")
    wait_until((tmp_path / "in a step").exists)
    os.kill(child, signal.SIGINT)
    wait_until(lambda: b"once more quits at once" in (tmp_path / "output").read_bytes())
    assert not ended(child)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == -signal.SIGINT


def test_a_signal_to_the_reader_too_is_no_reason_not_to_save(home, tmp_path):
    """As Ctrl-C does with `python train.py | tee log`: nobody reads what is printed any more."""
    reader, writer = os.pipe()

    def work():
        os.close(reader)
        os.dup2(writer, 1)
        os.close(writer)
        run(home, "pretrain", tmp_path / "run", "--max_steps", 2000)

    child = fork(work)
    os.close(writer)
    wait_until((tmp_path / "run" / NEWEST).exists)
    os.close(reader)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130
    assert steps_of(tmp_path / "run") == list(range(1, load_checkpoint(tmp_path / "run" / NEWEST)["step"] + 1))


# ------------------------------------------------------------------------------------- started twice


def test_two_runs_cannot_share_a_folder(home, tmp_path):
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 12)
    (out / NEWEST).unlink()  # it may be missing for a moment, and no second run may move the previous one
    files = {path: path.read_bytes() for path in out.iterdir()}
    with locked(out):
        for flags in (["--max_steps", 4], ["--max_steps", 4, "--seed", 2], ["--resume"]):
            with pytest.raises(UserError, match=f"another run is writing to {re.escape(str(out))}"):
                run(home, "pretrain", out, *flags)
        assert {path: path.read_bytes() for path in out.iterdir()} == files
    run(home, "pretrain", out, "--resume")


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_a_checkpoint_is_read_once_no_other_run_can_save_a_later_one(tmp_path, script, monkeypatch):
    class Read(Exception):
        pass

    def read(out_dir):
        with pytest.raises(UserError, match="another run is writing to"), locked(out_dir):
            pass
        raise Read

    monkeypatch.setattr(engine.checkpoint, "load_latest", read)
    with pytest.raises(Read):
        call(script, "--resume", "--out_dir", tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_no_run(home, tmp_path, code, monkeypatch):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    run(home, "pretrain", tmp_path / "run", "--max_steps", 4)
    run(home, "pretrain", tmp_path / "run", "--resume", "--max_steps", 8)
    assert steps_of(tmp_path / "run") == list(range(1, 9))


# ------------------------------------------------------------------------------------- the files in its folder


def test_a_run_goes_on_in_the_folder_that_it_was_moved_to(home, tmp_path, monkeypatch):
    """And not where its checkpoint says it was."""
    monkeypatch.chdir(tmp_path)
    run(home, "pretrain", tmp_path / "before", "--max_steps", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "before").rename(tmp_path / "out" / "pretrain")
    call(SCRIPTS["pretrain"], "--resume", "--max_steps", 8)  # the default --out_dir
    assert not (tmp_path / "before").exists() and steps_of(tmp_path / "out" / "pretrain") == list(range(1, 9))


def test_half_a_row_of_the_log_is_no_row(home, tmp_path):
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 8)
    with open(out / "log.csv", "a") as file:
        file.write("1")  # the beginning of 12, say
    run(home, "pretrain", out, "--resume", "--max_steps", 12)
    assert steps_of(out) == list(range(1, 13))


def test_files_that_the_project_did_not_write_survive(home, tmp_path):
    """A run, the next one, a resumed and a refused one; what a killed run left half written does not."""
    out = tmp_path / "run"
    names = ["notes.tmp", "x.tmp/notes", "parts-of-my-paper/page", "ckpt.pt.mine.tmp", "best.pt.1.tmp/x"]
    names += ["model.pt", "paper.pt.12.tmp", "logs/log.csv"]
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    left = [out / f"{name}.99999.tmp" for name in (NEWEST, BEST, "log.csv")]

    def check():
        assert all((out / name).read_text() == name for name in names)
        assert not any(path.exists() for path in left)
        for path in left:
            path.write_text("half")

    check()
    run(home, "pretrain", out, "--max_steps", 4)
    check()
    run(home, "pretrain", out, "--max_steps", 4, "--seed", 2)
    check()
    run(home, "pretrain", out, "--resume", "--max_steps", 8)
    check()
    for flags in (["--n_head", 3, "--n_kv_head", 2], ["--resume", "--eval_windows", 3]):
        with pytest.raises(UserError):
            run(home, "pretrain", out, *flags)
        assert all((out / name).read_text() == name for name in names)


@pytest.mark.parametrize("name, hinted", [(NEWEST, True), ("adapter.pt", False)])
def test_a_run_that_moves_aside_is_only_said_to_resume_if_it_could(tmp_path, capsys, name, hinted):
    (tmp_path / name).write_text("kept")
    archive_previous_run(tmp_path)
    assert ("--resume" in capsys.readouterr().out) == hinted
    assert (tmp_path / "earlier-1" / name).read_text() == "kept"
