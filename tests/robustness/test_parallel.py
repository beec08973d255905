"""Several processes against one: gloo on a CPU, NCCL on GPUs.

On a CPU, the processes are copies of this one; test_torchrun.py has those of torchrun.
"""

import copy
import importlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo
import sft
import train
from engine import checkpoint, parallel
from engine.checkpoint import load_checkpoint, load_latest
from engine.graphs import bf16_copy
from engine.settings import UserError
from lora import apply_lora
from model import ATTENTION, GPT, GPTConfig, pad_vocab
from tests.robustness.helpers import (
    ROOT,
    SHAPE,
    call,
    equal,
    exit_code,
    fork,
    in_two_processes,
    load,
    read_log,
    steps_of,
    torchrun,
)

COMMON = ["--preset", "tiny", "--device", "cpu", "--batch_size", 4, "--log_interval", 1]
PRETRAIN = [*SHAPE, "--n_layer", 2, "--n_embd", 32, "--n_inner", 48, "--head_dim", 16, *COMMON]
PRETRAIN += ["--warmup_steps", 3, "--eval_windows", 5]  # which leaves a process without a window
TUNE = [*COMMON, "--micro_batch_size", 1, "--max_steps", 4, "--eval_interval", 2]
TUNE += ["--eval_examples", 3, "--lora_rank", 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_data):
    """Data for all stages, and the model that SFT and DPO begin with."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(small_data, home / "set")
    call(train, *PRETRAIN, "--dataset", home / "set", "--out_dir", home / "base", "--max_steps", 2)
    return home


def launch(processes, script, out_dir, *flags):
    """Run a script, in this process or in two others; returns what these printed."""
    if processes == 1:
        return call(script, "--out_dir", out_dir, *flags)
    works, text = in_two_processes(script, out_dir, *flags)
    assert works, text
    return text


def log_of(folder):
    """Per step, and before the first: what was measured, without speeds."""
    assert steps_of(folder) == list(range(1, len(steps_of(folder)) + 1))
    return torch.tensor([[float(value or 0) for value in row.values()] for row in read_log(folder)])


def weights_of(folder, name="ckpt.pt"):
    return load_checkpoint(folder / name)["model"]


def assert_same(a, b):
    """Checkpoints with the same weights and state of the optimizer, bit for bit."""
    a, b = (load_checkpoint(folder / "ckpt.pt") for folder in (a, b))
    assert a["step"] == b["step"] and equal(a["model"], b["model"])
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)


# ------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "attn, flags",
    [("vanilla", ["--tie_embeddings"]), ("v1", ["--activation_checkpointing", "--n_kv_layers", 1]), ("v2", [])],
)
def test_losses_and_gradient_norms_are_those_of_one_process(home, tmp_path, attn, flags):
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", attn, "--max_steps", 20, "--eval_interval", 10, *flags]
    launch(1, train, tmp_path / "one", *flags)
    text = launch(2, train, tmp_path / "two", *flags, "--micro_batch_size", 1)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    assert one[-1, 1] < one[1, 1] - 1 and text.count("step  1/20") == 1  # it learned, and one process printed
    a, b = (weights_of(tmp_path / name, "best.pt") for name in ("one", "two"))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_weights_begin_as_in_one_process(home, tmp_path):
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", "v1", "--max_steps", 1, "--learning_rate", 0]
    launch(1, train, tmp_path / "one", *flags)
    launch(2, train, tmp_path / "two", *flags)
    one, parts = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert "layers.1.attn.lambda_q1" in one
    assert equal(one, parts) and equal(one, weights_of(tmp_path / "two", "best.pt"))


@pytest.mark.parametrize("script", [sft, dpo])
def test_tuning_is_that_of_one_process(home, tmp_path, script):
    flags = [*TUNE, "--dataset", home / "set", "--init_from", home / "base" / "best.pt"]
    launch(1, script, tmp_path / "one", *flags)
    text = launch(2, script, tmp_path / "two", *flags)
    torch.testing.assert_close(log_of(tmp_path / "two"), log_of(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    a, b = (weights_of(tmp_path / name, "adapter.pt") for name in ("one", "two"))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
    assert any(value.abs().max() > 0 for name, value in a.items() if name.endswith("lora_B"))
    assert text.count("<|im_start|>assistant") == 1  # a sample, by one process
    launch(2, script, tmp_path / "two", "--resume", "--max_steps", 5)
    assert steps_of(tmp_path / "two") == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def runs(home):
    """For 1 and 2 processes, a run of 8 steps, and the same as it was after step 6."""
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", "v1", "--max_steps", 8, "--save_interval", 3]
    for processes in (1, 2):
        whole, cut = home / f"whole-{processes}", home / f"cut-{processes}"
        launch(processes, train, whole, *flags, "--eval_interval", 4)
        shutil.copytree(whole, cut)
        os.replace(cut / "ckpt-previous.pt", cut / "ckpt.pt")
    return home


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2)])
def test_resume_with_any_number_of_processes(runs, tmp_path, before, after):
    shutil.copytree(runs / f"cut-{before}", tmp_path / "run")
    launch(after, train, tmp_path / "run", "--resume")
    whole = runs / f"whole-{before}"
    a, b = log_of(tmp_path / "run"), log_of(whole)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(whole), rtol=1e-3, atol=1e-5)
    if before == after:
        assert torch.equal(a, b)
        assert_same(tmp_path / "run", whole)


def test_two_checkpoints_in_parts_are_kept_and_become_one_file(runs, tmp_path):
    whole, out = runs / "whole-2", tmp_path / "run"
    assert {path.name for path in whole.glob("parts-*")} == {"parts-6", "parts-8"}
    shutil.copytree(whole, out)
    subprocess.run([sys.executable, "-m", "engine.checkpoint", out], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_same(out, whole)
    for folder in out.glob("parts-*"):
        shutil.rmtree(folder)
    assert_same(out, whole)  # it needs them no more


def test_damaged_parts_give_way_to_those_before(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole-2", tmp_path / "run")
    for path in (tmp_path / "run" / "parts-8").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    assert load_latest(tmp_path / "run")["step"] == 6
    assert "going on from the one before it, of step 6" in capsys.readouterr().out
    next((tmp_path / "run" / "parts-6").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match="is damaged"):
        load_latest(tmp_path / "run")


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_parts_are_described_without_running_code(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "whole-2", folder)
    description = folder / load(folder / "ckpt.pt")["parts"] / ".metadata"
    metadata = checkpoint.read_metadata(description.parent)
    description.write_bytes(pickle.dumps(Attack(tmp_path / "harm")))
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(folder / "ckpt.pt")
    assert not (tmp_path / "harm").exists()
    for part in metadata.storage_data.values():
        part.relative_path = "../../secret"
    description.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(folder / "ckpt.pt")


def test_a_checkpoint_in_parts_that_cannot_be_written_is_a_users_error():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="Not a directory"):
        checkpoint.save_parts(Path("/dev/null/parts"), layer, torch.optim.AdamW(layer.parameters()))


# ------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "flags, message",
    [(["--batch_sise", 4], "unrecognized arguments: --batch_sise 4"),
     (["--batch_size", 3], "batch_size 3 is not a multiple of micro_batch_size 1 times 2 processes"),
     (["--out_dir", "/dev/null/run"], "cannot write to /dev/null/run: Not a directory"),
     (["--init_from", "whole-2/ckpt.pt", "--attn", "v1"], "the checkpoint is in parts; python -m engine.checkpoint")],
)  # fmt: skip
def test_an_error_is_one_line_once(runs, tmp_path, flags, message):
    flags = [runs / flag if "/ckpt.pt" in str(flag) else flag for flag in flags]
    works, text = in_two_processes(train, tmp_path / "run", *PRETRAIN, "--dataset", runs / "set", *flags)
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert not works and len(lines) == 1 and message in lines[0] and "Traceback" not in text


def change_step_2(monkeypatch, change):
    """Let process 1 alone change its share of the loss of step 2."""
    loss, calls = train.Pretraining.loss, []

    def changed(task, *tensors):
        values = loss(task, *tensors)
        calls.append(values)
        if parallel.RANK == 1 and len(calls) == 2:
            change(values)
        return values

    monkeypatch.setattr(train.Pretraining, "loss", changed)


def test_a_step_is_skipped_by_all_or_none(home, tmp_path, monkeypatch):
    change_step_2(monkeypatch, lambda values: values.update(loss=values["loss"] * float("nan")))
    text = launch(2, train, tmp_path / "run", *PRETRAIN, "--dataset", home / "set", "--max_steps", 4)
    assert "step 2 skipped" in text
    assert [row["skipped"] for row in read_log(tmp_path / "run")] == ["", "0", "1", "0", "0"]
    weights, optimizer = (load_checkpoint(tmp_path / "run" / "ckpt.pt")[name] for name in ("model", "optimizer"))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert {state["step"].item() for state in optimizer["state"].values()} == {3}


def test_one_process_that_fails_ends_all_with_its_error(home, tmp_path, monkeypatch):
    def full(values):
        raise torch.OutOfMemoryError

    change_step_2(monkeypatch, full)
    flags = [*PRETRAIN, "--dataset", home / "set", "--max_steps", 4]
    works, text = in_two_processes(train, tmp_path / "run", *flags)
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert not works and set(lines) <= {
        "error: the GPU's memory is full; try --micro_batch_size 1",
        "error: another process has ended, see its error",
    }


def test_only_torchrun_makes_several_processes(tmp_path):
    """Clusters set RANK and WORLD_SIZE for other programs, too."""

    def work():
        os.environ.update(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
        importlib.reload(parallel)
        os._exit(0 if (parallel.RANK, parallel.LOCAL_RANK, parallel.WORLD_SIZE) == (0, 0, 1) else 1)

    assert exit_code(fork(work)) == 0


# ------------------------------------------------------------------------------------- large models


@pytest.mark.parametrize("n_kv_layers", [0, 2])
@pytest.mark.parametrize("attn", ATTENTION)
def test_activation_checkpointing_keeps_less_and_changes_nothing(attn, n_kv_layers):
    shape = dict(n_layer=3, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_inner=48, n_kv_layers=n_kv_layers)
    config = GPTConfig(attn, 16, 64, **shape)
    torch.manual_seed(1)
    models, idx, results = [GPT(config)], torch.randint(64, (2, 16)), []
    models.append(copy.deepcopy(models[0]).set_activation_checkpointing())
    for model in models:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            loss = model(idx, idx)[1]
        loss.backward()
        results.append((len(kept), [p.grad for p in model.parameters()]))
    assert results[1][0] < results[0][0] / 2
    assert equal(results[0][1], results[1][1])


@pytest.mark.parametrize("preset, size", [("1b", 1.1e9), ("10b", 10e9)])
def test_large_presets_have_equal_parameters(preset, size):
    counts = []
    for attn in ATTENTION:
        settings, _ = train.choose_settings({"preset": preset, "attn": attn})
        shape = {name: getattr(settings, name) for name in train.MODEL_FLAGS}
        with torch.device("meta"):
            counts.append(GPT(GPTConfig(**shape, vocab_size=pad_vocab(50259))).num_params())
    assert all(abs(count / counts[0] - 1) < 0.01 and abs(count / size - 1) < 0.02 for count in counts)


def test_only_what_is_trained_stays_float32_on_the_gpu():
    model = GPT(GPTConfig("v1", 16, 64, n_layer=1, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_inner=48))
    apply_lora(model, rank=2, alpha=4)
    small = bf16_copy(model, torch.device("cpu"))
    for (name, p), q in zip(small.named_parameters(), model.parameters()):
        is_cast = q.ndim == 2 and "lora" not in name
        assert p.dtype == (torch.bfloat16 if is_cast else torch.float32) and torch.equal(p, q.to(p.dtype))
        assert q.dtype == torch.float32 and p.requires_grad == q.requires_grad == ("lora" in name)


# ------------------------------------------------------------------------------------- GPUs

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

FLOAT32 = f"""
import contextlib, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
from engine import parallel
from engine.settings import run_script

train.autocast = lambda device: contextlib.nullcontext()
torch.set_float32_matmul_precision = lambda precision: None
policy = parallel.MixedPrecisionPolicy
parallel.MixedPrecisionPolicy = lambda **dtypes: policy(cast_forward_inputs=False)
run_script(train.main)
"""


def compare_gpus(script, tmp_path, *flags):
    """Run a script on one GPU and on two -> their logs."""
    for processes, more in ((1, []), (2, ["--micro_batch_size", 1])):
        subprocess.run(torchrun(processes, script, tmp_path / str(processes), *flags, *more), cwd=ROOT, check=True)
    return log_of(tmp_path / "1"), log_of(tmp_path / "2")


@needs_two_gpus
def test_two_gpus_have_the_losses_of_one_in_float32(home, tmp_path):
    """NCCL against one process, gradient norms too, without what bf16 and TF32 round away."""
    script = tmp_path / "float32.py"
    script.write_text(FLOAT32)
    flags = [*PRETRAIN, "--dataset", home / "set", "--max_steps", 20, "--device", "cuda", "--compile", "off"]
    one, two = compare_gpus(script, tmp_path, *flags)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


@needs_two_gpus
@pytest.mark.parametrize("attn", ATTENTION)
def test_two_gpus_have_the_losses_of_one(home, tmp_path, attn):
    """In bf16, and compiled."""
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", attn, "--max_steps", 20, "--device", "cuda"]
    one, two = compare_gpus("train.py", tmp_path, *flags)
    torch.testing.assert_close(two[:, 1], one[:, 1], rtol=0.02, atol=0.02)
