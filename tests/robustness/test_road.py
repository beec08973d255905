"""The whole road: pretraining, SFT, DPO and a conversation, with the data of the preset tiny, as a user calls them."""

import io
import runpy
from pathlib import Path

import pytest
from small import log_of

import dpo
import sample
import sft
import train

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The folder in which the four scripts ran, one after another, and what each of them printed."""
    folder, printed = tmp_path_factory.mktemp("road"), {}
    shape = ["--n_embd", 64, "--n_layer", 2, "--n_inner", 128, "--n_head", 2, "--head_dim", 32]
    small = ["--preset", "tiny", "--device", "cpu", "--eval_interval", 20]
    lora = [*small, "--eval_examples", 32, "--lora_rank", 16, "--lora_alpha", 32]
    flags = {
        train: [*small, *shape, "--max_steps", 40, "--warmup_steps", 10, "--learning_rate", 1e-2, "--eval_windows", 8],
        sft: [*lora, "--max_steps", 12, "--warmup_steps", 3, "--learning_rate", 5e-3],
        dpo: [*lora, "--max_steps", 12, "--warmup_steps", 3, "--learning_rate", 3e-3],
        sample: ["--max_new_tokens", 64],
    }
    for script, given in flags.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, given)])
            patch.setattr("sys.stdin", io.StringIO("What is the class queue.Queue?\n"))
            patch.setattr("sys.stdout", output := io.StringIO())
            patch.setattr("sys.stderr", output)
            script.main()
        printed[script] = output.getvalue()
    return folder, printed


def logged(folder, stage, column):
    return [float(value) for (value,) in log_of(folder / "out" / stage, column) if value]


def test_every_stage_begins_where_the_one_before_ended(road):
    _, printed = road
    assert "out/dpo/best.pt, v2 after dpo" in printed[sample]
    assert "before the first step:\n    validation loss 0.6931, accuracy 0.000, margin 0.000" in printed[dpo]
    assert all("sample:" in printed[script] for script in (train, sft, dpo))


def test_every_stage_learns(road):
    folder, printed = road
    assert logged(folder, "pretrain", "val_loss")[-1] < 3.2
    first = float(printed[sft].split("validation loss ")[1].split(";")[0])
    assert logged(folder, "sft", "val_loss")[-1] < first - 0.05
    # So short a run only begins to tell the answers apart; the README has what the preset's own length gives.
    assert min(logged(folder, "dpo", "val_loss")) < 0.6925 and max(logged(folder, "dpo", "val_accuracy")) > 0.5
    assert logged(folder, "dpo", "val_margin")[-1] > 0


def test_a_conversation_without_stdin(road, monkeypatch, capsys):
    """As after `python sample.py <&-`."""
    folder, _ = road
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["sample.py"])
    monkeypatch.setattr("sys.stdin", None)
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    output = capsys.readouterr()
    assert "v2 after dpo" in output.err and output.out == "\n"
