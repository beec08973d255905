"""What may go wrong with a run: it is killed, its disk is full, its files are damaged, its numbers explode."""

import contextlib
import csv
import itertools
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
import sft
import train
from data import UserError, explain, run_script
from data.dataset import write_dataset, write_examples
from data.slimorca.prepare import tokenize as tokenize_conversation

SHAPE = ["--block_size", 32, "--n_layer", 1, "--n_embd", 16, "--n_inner", 16, "--n_head", 2, "--head_dim", 8]
COMMON = ["--device", "cpu", "--log_interval", 5, "--eval_interval", 20, "--save_interval", 4, "--warmup_steps", 4]
FLAGS = {
    "pretrain": [*SHAPE, "--preset", "tiny", "--batch_size", 2, "--eval_windows", 2],
    "sft": ["--batch_size", 2, "--lora_rank", 2, "--eval_examples", 3],
    "dpo": ["--batch_size", 2, "--lora_rank", 2, "--eval_examples", 3],
}
STAGES = {"pretrain": train.Pretraining, "sft": sft.SFT, "dpo": dpo.DPO}
WHOLE = 300  # steps of a run that is killed


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_data):
    """Data, and the models that SFT and DPO begin with."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(small_data, home / "set")
    carry_out(home, "pretrain", home / "base", "--max_steps", 2)
    return home


def new_run(home, stage, out_dir, *flags):
    """A run as its script would make it; with --resume, the rest of one."""
    new = [] if "--resume" in flags else ["--dataset", home / "set", *FLAGS[stage], *COMMON]
    if stage != "pretrain" and "--resume" not in flags:
        new += ["--init_from", home / "base" / "best.pt"]
    argv = list(map(str, [*new, "--out_dir", out_dir, *flags]))
    if stage == "pretrain":
        return train.Pretraining(*train.choose_settings(train.parse_flags(train.Settings, "", {}, argv)))
    module = {"sft": sft, "dpo": dpo}[stage]
    given = train.parse_flags(module.Settings, "", {}, argv)
    return STAGES[stage](*sft.choose_settings(given, module.Settings, module.PRESETS, stage))


def carry_out(home, stage, out_dir, *flags):
    with train.locked(out_dir):
        run = new_run(home, stage, out_dir, *flags)
        run.sample = lambda: ""  # which takes longer than these runs
        train.carry_out(run)
    return out_dir


def in_a_child(work):
    """Start work() in a copy of this process, without its output -> the copy's number."""
    child = os.fork()
    if child:
        return child
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        run_script(work)
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code)
    finally:
        os._exit(1)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def rows_of(out_dir, *left_out):
    with open(out_dir / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows]


def same(a, b):
    """Whether two checkpoints' contents are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("out_dir", "resume"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_25_times_equals_one_that_is_not(home, tmp_path, stage):
    """SIGKILL at random moments, a third of them while a checkpoint is written."""
    whole = carry_out(home, stage, tmp_path / "whole", "--max_steps", WHOLE)
    out, chance, kills = tmp_path / "killed", random.Random(1), 0
    while kills < 25:
        resume = ["--resume"] if (out / train.NEWEST).exists() or (out / train.PREVIOUS).exists() else []
        child = in_a_child(lambda: carry_out(home, stage, out, "--max_steps", WHOLE, *resume))  # noqa: B023
        wait_for_a_moment(out, child, chance, while_saving=kills % 3 == 0)
        os.kill(child, signal.SIGKILL)
        if exit_code(child) == 0:  # it was done before: take away its last steps
            (out / train.NEWEST).unlink()
        kills += 1
    carry_out(home, stage, out, "--resume", "--max_steps", WHOLE)
    assert rows_of(out, *TIMES) == rows_of(whole, *TIMES)
    assert [int(row["step"]) for row in rows_of(out)] == list(range(1, WHOLE + 1))
    for name in (train.NEWEST, train.PREVIOUS, "best.pt", *["adapter.pt"] * (stage != "pretrain")):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (out, whole))), name
    assert not list(out.glob("*.tmp"))


TIMES = ("tokens_per_s", "pairs_per_s", "mfu")


def wait_for_a_moment(out, child, chance, while_saving):
    """Some milliseconds of a run's life; if asked to, until a checkpoint is half written."""
    deadline = time.monotonic() + 0.05 + 0.15 * chance.random()
    while time.monotonic() < deadline:
        if while_saving and list(out.glob(f"{train.NEWEST}.{child}.tmp")):
            return
        time.sleep(0.0005)


@pytest.mark.parametrize("name, hinted", [("ckpt.pt", True), ("adapter.pt", False)])
def test_a_run_that_moves_aside_is_only_said_to_resume_if_it_could(tmp_path, capsys, name, hinted):
    (tmp_path / name).write_text("kept")
    train.make_room(tmp_path)
    assert ("--resume" in capsys.readouterr().out) == hinted
    assert (tmp_path / "earlier-1" / name).read_text() == "kept"


def test_a_signal_before_the_first_step_is_obeyed(home, tmp_path):
    run = new_run(home, "pretrain", tmp_path / "run")
    validate = run.validate

    def interrupted(step):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(step)

    run.validate = interrupted
    with train.locked(run.out_dir), pytest.raises(SystemExit) as left:
        train.fit(run, train.Log(run))
    assert left.value.code == 128 + signal.SIGTERM
    assert train.load_checkpoint(run.out_dir / "ckpt.pt")["step"] == 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_followed_by_a_checkpoint_within_seconds(home, tmp_path, stage, number):
    child = in_a_child(lambda: carry_out(home, stage, tmp_path / "run", "--max_steps", 100000))
    while not (tmp_path / "run" / train.NEWEST).exists():
        time.sleep(0.01)
    os.kill(child, number)
    started = time.monotonic()
    assert exit_code(child) == 128 + number and time.monotonic() - started < 5
    steps = train.load_checkpoint(tmp_path / "run" / train.NEWEST)["step"]
    assert [int(row["step"]) for row in rows_of(tmp_path / "run")] == list(range(1, steps + 1))


def test_a_signal_to_the_reader_too_is_no_reason_not_to_save(home, tmp_path):
    """As Ctrl-C does with `python train.py | tee log`: nobody reads what is printed any more."""

    reader, writer = os.pipe()

    def work():
        os.close(reader)
        os.dup2(writer, 1)
        os.close(writer)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # pytest has its own
        carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 2000)

    child = in_a_child(work)
    os.close(writer)
    while not (tmp_path / "run" / train.NEWEST).exists():
        time.sleep(0.01)
    os.close(reader)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130
    steps = train.load_checkpoint(tmp_path / "run" / train.NEWEST)["step"]
    assert [int(row["step"]) for row in rows_of(tmp_path / "run")] == list(range(1, steps + 1))


def test_two_runs_cannot_share_a_folder(home, tmp_path):
    out = tmp_path / "run"
    with train.locked(out):
        for flags in (["--max_steps", 4], ["--max_steps", 4, "--seed", 2]):
            with pytest.raises(UserError, match=f"another run is writing to {re.escape(str(out))}"):
                carry_out(home, "pretrain", out, *flags)
        assert not (out / "log.csv").exists()
    carry_out(home, "pretrain", out, "--max_steps", 4)


@pytest.mark.parametrize("module", [train, sft, dpo])
def test_a_checkpoint_is_read_once_no_other_run_can_save_a_later_one(tmp_path, module, monkeypatch):
    class Read(Exception):
        pass

    def read(out_dir):
        with pytest.raises(UserError, match="another run is writing to"), train.locked(out_dir):
            pass
        raise Read

    monkeypatch.setattr(train, "load_latest", read)
    monkeypatch.setattr("sys.argv", ["script.py", "--resume", "--out_dir", str(tmp_path)])
    with pytest.raises(Read):
        module.main()


def test_a_run_goes_on_in_the_folder_that_it_was_moved_to(home, tmp_path, monkeypatch):
    """And not where its checkpoint says it was."""
    monkeypatch.chdir(tmp_path)
    carry_out(home, "pretrain", tmp_path / "before", "--max_steps", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "before").rename(tmp_path / "out" / "pretrain")
    given = train.parse_flags(train.Settings, "", {}, ["--resume", "--max_steps", "8"])  # the default --out_dir
    run = train.Pretraining(*train.choose_settings(given))
    run.sample = lambda: ""
    train.carry_out(run)
    assert not (tmp_path / "before").exists() and len(rows_of(tmp_path / "out" / "pretrain")) == 8


def test_half_a_row_of_the_log_is_no_row(home, tmp_path):
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 8)
    with open(out / "log.csv", "a") as file:
        file.write("1")  # the beginning of 12, say
    carry_out(home, "pretrain", out, "--resume", "--max_steps", 12)
    assert [int(row["step"]) for row in rows_of(out)] == list(range(1, 13))


def test_a_preparation_that_is_killed_leaves_no_process_behind(tmp_path):
    """Each of them has a pipe open, which ends when the last one does."""
    reader, writer = os.pipe()
    rows = itertools.repeat({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    child = in_a_child(lambda: write_examples(tmp_path, rows, tokenize_conversation, "bytes", 32, "a test"))
    os.close(writer)
    while not sum(path.stat().st_size for path in tmp_path.glob("train.bin.*")):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    assert select.select([reader], [], [], 20)[0] and os.read(reader, 1) == b""
    os.close(reader)


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
    whole = carry_out(home, "pretrain", tmp_path / "whole", "--max_steps", 16)
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 16)
    damage(out / train.NEWEST)
    capsys.readouterr()
    carry_out(home, "pretrain", out, "--resume")
    text = capsys.readouterr().out
    assert message in text and "going on from the one before it, of step 12" in text
    assert rows_of(out, *TIMES) == rows_of(whole, *TIMES)
    assert same(*(torch.load(folder / train.NEWEST, weights_only=True)["model"] for folder in (out, whole)))
    assert train.load_checkpoint(out / train.PREVIOUS)["step"] == 12  # still the whole one


def test_the_files_of_a_running_run_are_left_alone(home, tmp_path):
    """Even if one of its checkpoints is missing for a moment."""
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 12)
    (out / train.NEWEST).unlink()
    with train.locked(out), pytest.raises(UserError, match="another run is writing to"):
        carry_out(home, "pretrain", out, "--resume")
    assert (out / train.PREVIOUS).exists()


def test_a_full_memory_is_no_damage(home, tmp_path, monkeypatch):
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 12)

    def full(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(torch, "load", full)
        carry_out(home, "pretrain", out, "--resume")
    assert train.load_checkpoint(out / train.NEWEST)["step"] == 12


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_best_model_that_is_damaged_or_missing_is_replaced(home, tmp_path, damage):
    """By the best of what follows, however bad that is."""
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 4)
    damage(out / "best.pt")
    carry_out(home, "pretrain", out, "--resume", "--max_steps", 8, "--learning_rate", 10)
    best = train.load_checkpoint(out / "best.pt")
    assert best["step"] == 8 and best["best_val_loss"] == float(rows_of(out)[-1]["val_loss"])


def test_a_best_model_from_after_the_checkpoint_is_not_replaced_by_a_worse_one(home, tmp_path):
    """Which the repeated steps may give, if a flag is another now."""
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 20, "--save_interval", 16)
    (out / train.NEWEST).unlink()  # as if killed after validation at step 20
    best = (out / "best.pt").read_bytes()
    carry_out(home, "pretrain", out, "--resume", "--learning_rate", 1e-5)
    losses = [float(rows_of(out)[-1]["val_loss"]), train.load_checkpoint(out / "best.pt")["best_val_loss"]]
    assert losses[0] > losses[1] and (out / "best.pt").read_bytes() == best


def test_two_damaged_checkpoints_are_an_error(home, tmp_path):
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 12)
    flip(out / train.NEWEST)
    flip(out / train.PREVIOUS)
    with pytest.raises(UserError, match="ckpt-previous.pt is damaged"):
        carry_out(home, "pretrain", out, "--resume")


@pytest.mark.parametrize("share", np.linspace(0.02, 0.98, 9))
def test_a_flipped_bit_is_found_wherever_it_is(home, tmp_path, share):
    """Or it is in a place that means nothing."""
    good = torch.load(home / "base" / train.NEWEST, weights_only=True)
    content = bytearray((home / "base" / train.NEWEST).read_bytes())
    for position in range(int(share * len(content)), len(content), len(content) // 3)[:20]:
        content[position] ^= 4
        (tmp_path / "flipped.pt").write_bytes(content)
        try:
            assert same(train.load_checkpoint(tmp_path / "flipped.pt"), good)
        except UserError as error:
            assert "is damaged" in str(error)
        content[position] ^= 4


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
    out = carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 8)
    before = (out / train.NEWEST).read_bytes()
    with room_for(len(before) // 2), pytest.raises(UserError, match=r"cannot save .*ckpt.pt \(File too large\)"):
        carry_out(home, "pretrain", out, "--resume", "--max_steps", 16)
    assert (out / train.NEWEST).read_bytes() == before and not list(out.glob("*.tmp"))
    carry_out(home, "pretrain", out, "--resume", "--max_steps", 16)


def test_a_disk_that_data_fill_is_named(tmp_path):
    with room_for(1000), pytest.raises(OSError) as caught:
        write_dataset(tmp_path, {"train": ["text " * 1000], "val": ["text"]}, "bytes", "a test")
    assert explain(caught.value) == f"{tmp_path / 'train.bin'}: File too large" and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become somebody else")
def test_a_folder_that_may_not_be_written_to(home, tmp_path):
    """For this process, which is root, every folder may: a child becomes somebody else first."""
    messages = []

    def work():
        os.setuid(65534)
        try:
            carry_out(home, "pretrain", tmp_path / "closed" / "run", "--max_steps", 2)
        except UserError as error:
            messages.append(str(error))
        os._exit(7 if messages and messages[0].startswith("cannot write to") else 8)

    (tmp_path / "closed").mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    assert exit_code(in_a_child(work)) == 7


# ------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_without_finite_numbers_changes_nothing(home, tmp_path, stage, value, monkeypatch, capsys):
    """Weights and moments after it are those before it, bit for bit."""
    loss_of, states = STAGES[stage].loss_of, []

    def bad_at_step_3(run, *batch):
        shares = loss_of(run, *batch)
        if torch.is_grad_enabled():  # not validating
            states.append([p.detach().clone() for p in run.model.parameters() if p.requires_grad])
            shares["loss"] = shares["loss"] * (value if len(states) == 3 else 1)
        return shares

    monkeypatch.setattr(STAGES[stage], "loss_of", bad_at_step_3)
    out = carry_out(home, stage, tmp_path / "run", "--max_steps", 6, "--learning_rate", 1e-2)
    assert [row["skipped"] for row in rows_of(out)] == ["0", "0", "1", "0", "0", "0"]
    assert "step 3 skipped: loss or gradient not finite (1 so far)" in capsys.readouterr().out
    assert [same(before, after) for before, after in zip(states, states[1:])] == [False, False, True, False, False]
    checkpoint = train.load_checkpoint(out / train.NEWEST)
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    moments = checkpoint["optimizer"]["state"].values()
    assert all(state["step"] == 5 and state["exp_avg"].isfinite().all() for state in moments)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", id="gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_the_optimizer_leaves_out_what_is_not_finite(device):
    layer = torch.nn.Linear(4, 4, device=device)
    optimizer = train.make_optimizer(layer, weight_decay=0.1)
    changed = []
    for value in (1.0, float("nan"), float("inf"), 1.0):
        before = [p.detach().clone() for p in layer.parameters()]
        batch = (torch.full((2, 4), value, device=device),)
        train.optimizer_step(optimizer, 0.1, lambda x: train.accumulate(square_of(layer), x), [batch])
        changed.append(not same(before, list(layer.parameters())))
    assert changed == [True, False, False, True]
    assert all(state["step"] == 2 for state in optimizer.state.values())


def square_of(layer):
    return lambda x: {"loss": layer(x).square().mean()}


def test_too_many_such_steps_end_the_run(home, tmp_path, monkeypatch, capsys):
    """Resumed, it ends at the same step: those before are counted."""
    loss_of, steps = train.Pretraining.loss_of, []

    def bad_from_step_10_on(run, *batch):
        steps.append(1)
        return {"loss": loss_of(run, *batch)["loss"] * (1 if len(steps) < 10 else float("nan"))}

    monkeypatch.setattr(train.Pretraining, "loss_of", bad_from_step_10_on)
    out = tmp_path / "run"
    with pytest.raises(train.Diverged, match="10 steps in a row up to 19 .* lower --learning_rate") as caught:
        carry_out(home, "pretrain", out, "--max_steps", 100)
    assert "\n" not in str(caught.value)
    newest = train.load_checkpoint(out / train.NEWEST)
    assert newest["step"] == 16 and all(tensor.isfinite().all() for tensor in newest["model"].values())
    capsys.readouterr()
    with pytest.raises(train.Diverged, match="10 steps in a row up to 19"):
        carry_out(home, "pretrain", out, "--resume")
    assert "step 17 skipped: loss or gradient not finite (8 so far)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, advice",
    [(["--batch_size", 12, "--micro_batch_size", 12], "try --micro_batch_size 6"),
     (["--batch_size", 12, "--micro_batch_size", 4], "try --micro_batch_size 3"),
     (["--batch_size", 3, "--micro_batch_size", 1], "not even one sequence fits")],
)  # fmt: skip
@pytest.mark.parametrize("recording", [False, True])
def test_a_full_gpu_is_one_line_with_what_fits(home, tmp_path, flags, advice, recording, monkeypatch):
    def full(run, *batch):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        finally:
            if recording:  # the end of which is an error of its own
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(train.Pretraining, "loss_of", full)
    with pytest.raises(UserError, match=f"the GPU's memory is full; {advice}"):
        carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 2, *flags)


def test_other_errors_are_not_taken_for_a_full_gpu(home, tmp_path, monkeypatch):
    def broken(run, *batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train.Pretraining, "loss_of", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        carry_out(home, "pretrain", tmp_path / "run", "--max_steps", 2)


# ------------------------------------------------------------------------------------- long runs


def memory_in_use():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of a process's memory")
def test_memory_and_speed_hold_over_20000_steps(home, tmp_path, capsys):
    """After the first 4,000 steps, in which allocators fill up."""
    marks = []

    class Watched(train.Pretraining):
        def make_batch(self, step):
            if step % 4000 == 0:
                marks.append((time.process_time(), memory_in_use()))
            return super().make_batch(step)

    flags = ["--max_steps", 20001, "--log_interval", 500, "--eval_interval", 20000, "--save_interval", 10000]
    run = new_run(home, "pretrain", tmp_path / "run", *flags, "--n_embd", 8, "--block_size", 8, "--batch_size", 1)
    run = Watched(run.settings)
    run.sample = lambda: ""
    with train.locked(tmp_path / "run"):
        train.carry_out(run)
    seconds = [after - before for (before, _), (after, _) in zip(marks, marks[1:])]
    growth = marks[-1][1] - marks[0][1]
    shutil.rmtree(tmp_path / "run")
    with capsys.disabled():
        print(f"\n20,000 steps: memory {growth:+.1f} MiB after the first 4,000; CPU seconds a 4,000 {seconds}")
    assert len(marks) == 5 and growth < 8
    assert max(seconds) < 2 * min(seconds)
