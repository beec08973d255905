"""Runs of train.py: where they start, what they leave of an earlier one, and what --resume does without."""

import shutil

import pytest
import torch
from small import log_of, pretrain, same, weights_of

import dpo
import sample
import sft
import train
from engine.settings import UserError, parse_flags


@pytest.fixture
def run(small_data, tmp_path):
    """Calls train.py in this process, in a folder of its own."""
    return lambda *flags, out="run", data=small_data, **options: pretrain(data, tmp_path / out, *flags, **options)


def test_init_from_a_checkpoint_takes_its_weights_and_shape(run, tmp_path):
    first = run("--attn", "v1", "--max_steps", 2).folder
    second = run("--attn", "v1", "--init_from", first / "ckpt.pt", "--max_steps", 1, "--learning_rate", 0, out="second")
    assert same(weights_of(first), weights_of(second.folder))
    settings, _ = train.choose_settings({"preset": "tiny", "attn": "v1", "init_from": str(first / "best.pt")})
    assert (settings.n_embd, settings.n_layer, settings.block_size) == (32, 2, 16)


def test_an_earlier_run_moves_aside(run, capsys):
    folder = run("--max_steps", 2).folder
    (folder / "notes.txt").write_text("mine")
    for steps in (3, 4):
        run("--max_steps", steps)
    assert [len(log_of(path, "step")) for path in (folder / "earlier-1", folder / "earlier-2", folder)] == [2, 3, 4]
    assert sorted(path.name for path in (folder / "earlier-1").iterdir()) == ["best.pt", "ckpt.pt", "log.csv"]
    assert (folder / "notes.txt").exists() and "is now in" in capsys.readouterr().out


ROWS = ["²,1,1,0,1,1,,", '2,"1,1,0,1,1,,', f"{'9' * 5000},1,1,0,1,1,,", f"2,{'1' * 200000}", "4,1.2\x00", "\x00\x00"]


def test_a_damaged_row_of_the_log_is_left_out_alone(run, tmp_path):
    whole = run("--max_steps", 3).folder
    lines = (whole / "log.csv").read_text().splitlines()
    for i, row in enumerate(ROWS):
        shutil.copytree(whole, tmp_path / str(i))
        (tmp_path / str(i) / "log.csv").write_text("\n".join([*lines[:3], row, lines[4], ""]), encoding="utf-8")
        folder = run("--resume", "--max_steps", 5, out=str(i)).folder
        steps = [line.split(",")[0] for line in (folder / "log.csv").read_text().splitlines()]
        assert [step for step in steps if step != "2"] == ["step", "0", "1", "3", "4", "5"], row


def test_a_log_that_ends_in_bytes_that_are_no_text(run):
    folder = run("--max_steps", 3).folder
    with open(folder / "log.csv", "ab") as file:
        file.write(b"4,1.2\x00\xff\n\x00\x00")
    run("--resume", "--max_steps", 5)
    assert log_of(folder, "step") == [(str(step),) for step in range(1, 6)]


def test_resume_does_without_the_source_but_not_with_another(run, tmp_path):
    text, own = tmp_path / "my.txt", tmp_path / "own"
    text.write_text("some lines of text\n" * 100)
    folder = run("--source", text, data=own).folder
    text.unlink()
    run("--resume", "--max_steps", 9, data=own)
    assert len(log_of(folder, "step")) == 9
    text.write_text("same lines of text\n" * 100)
    with pytest.raises(UserError, match="not the one that the run began with"):
        run("--resume", "--source", text, "--max_steps", 10, data=own)


def test_resume_of_a_finished_run_says_so(run, capsys):
    run()
    run("--resume", sample=True)
    assert "has 8 steps already; a higher --max_steps adds to it" in capsys.readouterr().out
    assert len(log_of(run("--resume", "--max_steps", 10).folder, "step")) == 10


def test_resume_with_other_settings(run):
    """Those given now hold, and those of a later version of the project are ignored."""
    folder = run().folder
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    torch.save(saved | {"settings": saved["settings"] | {"of_a_later_version": 1}}, folder / "ckpt.pt")
    run("--resume", "--max_steps", 9, "--weight_decay", 0.5)
    assert torch.load(folder / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_windows_to_validate_on(run):
    task = run("--max_steps", 1, "--eval_windows", 3, "--micro_batch_size", 2).task
    assert sum((targets[:, 0] != -100).sum() for _, targets in task.val_batches) == 3


@pytest.mark.parametrize("steps, at", [(1, 1), (8, 4)])
def test_a_validation_that_is_not_finite_stops_the_run(run, steps, at):
    with pytest.raises(UserError, match=f"the validation after step {at} is not finite; .* lower --learning_rate"):
        run("--learning_rate", 1e18, "--warmup_steps", 0, "--max_steps", steps)


def test_data_of_another_tokenizer(run):
    with pytest.raises(UserError, match="was prepared with --tokenizer bytes, not gpt2"):
        run("--tokenizer", "gpt2")


@pytest.mark.parametrize("script", [train, sft, dpo, sample])
def test_help_lists_every_flag(script, capsys):
    with pytest.raises(SystemExit):
        parse_flags(script.Settings, script.__doc__, {"max_steps": 4}, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in script.Settings.__dataclass_fields__)
