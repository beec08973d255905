"""Several processes against one: torchrun with gloo on a CPU, NCCL on GPUs."""

import copy
import csv
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import parallel
import sft
import train
from data import UserError
from lora import apply_lora
from model import ATTENTION, GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SHAPE = ["--block_size", 32, "--n_layer", 2, "--n_embd", 32, "--n_inner", 48, "--n_head", 2, "--head_dim", 16]
COMMON = ["--preset", "tiny", "--device", "cpu", "--batch_size", 4, "--log_interval", 1]
PRETRAIN = [*SHAPE, *COMMON, "--warmup_steps", 3, "--eval_windows", 5]  # which leaves a process without a window
TUNE = [*COMMON, "--micro_batch_size", 1, "--max_steps", 4, "--eval_interval", 2]
TUNE += ["--eval_examples", 3, "--lora_rank", 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_data):
    """Data for all stages, and the model that SFT and DPO begin with."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(small_data, home / "set")
    launch(1, "train.py", home / "base", *PRETRAIN, "--dataset", home / "set", "--max_steps", 2)
    return home


def command(processes, script, out_dir, *flags):
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *start, *map(str, (script, "--out_dir", out_dir, *flags))]


def launch(processes, script, out_dir, *flags, fails=False):
    """Run a script in its own processes; returns what it printed, if it fails on stderr."""
    result = subprocess.run(
        command(processes, script, out_dir, *flags), cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert bool(result.returncode) == fails, result.stdout + result.stderr
    return result.stderr if fails else result.stdout


def log_of(folder):
    """Per step: what was measured, without speeds."""
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [[float(v or 0) for name, v in row.items() if "per_s" not in name and name != "mfu"] for row in rows]


def weights_of(folder, name="ckpt.pt"):
    return train.load_checkpoint(folder / name)["model"]


def assert_same(a, b):
    """Checkpoints with the same weights and state of the optimizer, bit for bit."""
    a, b = (train.load_checkpoint(folder / "ckpt.pt") for folder in (a, b))
    assert a["model"].keys() == b["model"].keys() and a["step"] == b["step"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)


# ------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "attn, flags", [("vanilla", ["--tie_embeddings"]), ("v1", ["--activation_checkpointing"]), ("v2", [])]
)
def test_losses_and_gradient_norms_are_those_of_one_process(home, tmp_path, attn, flags):
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", attn, "--max_steps", 20, "--eval_interval", 10, *flags]
    launch(1, "train.py", tmp_path / "one", *flags)
    text = launch(2, "train.py", tmp_path / "two", *flags, "--micro_batch_size", 1)
    one, two = (torch.tensor(log_of(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    assert one[-1, 1] < one[0, 1] - 1 and text.count("step     1/20") == 1  # it learned, and one process printed
    a, b = (weights_of(tmp_path / name, "best.pt") for name in ("one", "two"))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_weights_begin_as_in_one_process(home, tmp_path):
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", "v1", "--max_steps", 1, "--learning_rate", 0]
    launch(1, "train.py", tmp_path / "one", *flags)
    launch(2, "train.py", tmp_path / "two", *flags)
    one, parts, best = (
        weights_of(tmp_path / "one"),
        weights_of(tmp_path / "two"),
        weights_of(tmp_path / "two", "best.pt"),
    )
    assert "layers.1.attn.lambda_q1" in one and one.keys() == parts.keys() == best.keys()
    assert all(torch.equal(one[name], parts[name]) and torch.equal(one[name], best[name]) for name in one)


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_tuning_is_that_of_one_process(home, tmp_path, script):
    flags = [*TUNE, "--dataset", home / "set", "--init_from", home / "base" / "best.pt"]
    launch(1, script, tmp_path / "one", *flags)
    launch(2, script, tmp_path / "two", *flags)
    one, two = (torch.tensor(log_of(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    a, b = (weights_of(tmp_path / name, "adapter.pt") for name in ("one", "two"))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
    assert any(value.abs().max() > 0 for name, value in a.items() if name.endswith("lora_B"))
    launch(2, script, tmp_path / "two", "--resume", "--max_steps", 5)
    assert len(log_of(tmp_path / "two")) == 5


@pytest.mark.parametrize("attn", ATTENTION)
def test_activation_checkpointing_keeps_less_and_changes_nothing(attn):
    config = GPTConfig(attn, 16, 64, n_layer=3, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_inner=48)
    torch.manual_seed(1)
    models, idx, results = [GPT(config)], torch.randint(64, (2, 16)), []
    models.append(copy.deepcopy(models[0]).checkpoint_activations())
    for model in models:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            loss = model(idx, idx)[1]
        loss.backward()
        results.append((len(kept), [p.grad for p in model.parameters()]))
    assert results[1][0] < results[0][0] / 2
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def runs(home):
    """For 1 and 2 processes, a run of 8 steps, and the same as it was after step 6."""
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", "v1", "--max_steps", 8, "--save_interval", 3]
    for processes in (1, 2):
        whole, cut = home / f"whole-{processes}", home / f"cut-{processes}"
        launch(processes, "train.py", whole, *flags, "--eval_interval", 4)
        shutil.copytree(whole, cut)
        os.replace(cut / "ckpt-previous.pt", cut / "ckpt.pt")
    return home


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2)])
def test_resume_with_any_number_of_processes(runs, tmp_path, before, after):
    shutil.copytree(runs / f"cut-{before}", tmp_path / "run")
    launch(after, "train.py", tmp_path / "run", "--resume")
    whole = runs / f"whole-{before}"
    a, b = (torch.tensor(log_of(folder)) for folder in (tmp_path / "run", whole))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(whole), rtol=1e-3, atol=1e-5)
    if before == after:
        assert torch.equal(a, b)
        assert_same(tmp_path / "run", whole)


def test_two_checkpoints_in_parts_are_kept_and_become_one_file(runs, tmp_path):
    whole = runs / "whole-2"
    assert {path.name for path in whole.glob("parts-*")} == {"parts-6", "parts-8"}
    shutil.copytree(whole, tmp_path / "run")
    subprocess.run([sys.executable, "parallel.py", tmp_path / "run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_same(tmp_path / "run", whole)
    for folder in (tmp_path / "run").glob("parts-*"):
        shutil.rmtree(folder)
    assert_same(tmp_path / "run", whole)  # it needs them no more


def test_damaged_parts_give_way_to_those_before(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole-2", tmp_path / "run")
    for path in (tmp_path / "run" / "parts-8").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    assert train.load_latest(tmp_path / "run")["step"] == 6
    assert "going on from the one before it, of step 6" in capsys.readouterr().out
    next((tmp_path / "run" / "parts-6").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match="is damaged"):
        train.load_latest(tmp_path / "run")


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_parts_are_described_without_running_code(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "whole-2", folder)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    description = folder / checkpoint["parts"] / ".metadata"
    about = parallel.describe(description.parent)
    description.write_bytes(pickle.dumps(Attack(tmp_path / "harm")))
    with pytest.raises(UserError, match="is damaged"):
        train.load_checkpoint(folder / "ckpt.pt")
    assert not (tmp_path / "harm").exists()
    for part in about.storage_data.values():
        part.relative_path = "../../secret"
    description.write_bytes(pickle.dumps(about))
    with pytest.raises(ValueError, match="it names other files"):
        parallel.describe(description.parent)


def test_a_checkpoint_in_parts_that_cannot_be_written_is_a_users_error():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="Not a directory"):
        parallel.save_parts(Path("/dev/null/parts"), layer, torch.optim.AdamW(layer.parameters()))


# ------------------------------------------------------------------------------------- what goes wrong


def start_run(home, out_dir):
    """A long run of 2 processes, once it has written a checkpoint, and the process ids of its workers by rank."""
    flags = [*PRETRAIN, "--dataset", home / "set", "--max_steps", 100_000, "--save_interval", 5]
    run = subprocess.Popen(
        command(2, "train.py", out_dir, *flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in run.stdout:
        if "step    12" in line:
            break
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True).stdout
    workers = {}
    for pid in map(int, children.split()):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        workers.update({int(v[5:]): pid for v in variables if v.startswith(b"RANK=")})
    return run, workers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_same_step_everywhere(home, tmp_path, number):
    run, _ = start_run(home, tmp_path)
    run.send_signal(number)
    rest, _ = run.communicate(timeout=40)
    assert run.returncode != 0 and rest.count("saving after this step") == rest.count("stopped after step") == 1
    step = train.load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert f"stopped after step {step};" in rest and len(log_of(tmp_path)) == step


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_a_killed_process_ends_the_run_which_can_be_resumed(home, tmp_path):
    run, workers = start_run(home, tmp_path)
    os.kill(workers[1], signal.SIGKILL)
    started, (_, errors) = time.time(), run.communicate(timeout=60)
    assert run.returncode != 0 and time.time() - started < 45
    assert "Traceback" not in errors.split("torch/distributed/elastic")[0]  # torchrun's own report is all there is
    step = train.load_latest(tmp_path)["step"]
    text = launch(2, "train.py", tmp_path, "--resume", "--max_steps", step + 1)
    assert f"step {step + 1:>5}/{step + 1}" in text


@pytest.mark.parametrize(
    "flags, message",
    [(["--batch_sise", 4], "unrecognized arguments: --batch_sise 4"),
     (["--batch_size", 3], "batch_size 3 is not a multiple of micro_batch_size 1 times 2 processes"),
     (["--out_dir", "/dev/null/run"], "cannot write to /dev/null/run: Not a directory"),
     (["--learning_rate", 1e18, "--warmup_steps", 0, "--max_steps", 1], "the validation after step 1 is not finite"),
     (["--init_from", "whole-2/ckpt.pt", "--attn", "v1"], "the checkpoint is in parts; python parallel.py")],
)  # fmt: skip
def test_an_error_is_one_line_once(runs, tmp_path, flags, message):
    flags = [runs / flag if "/ckpt.pt" in str(flag) else flag for flag in flags]
    errors = launch(2, "train.py", tmp_path, *PRETRAIN, "--dataset", runs / "set", *flags, fails=True)
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]
    assert 'train.py", line' not in errors  # no traceback of ours


def launch_with(home, tmp_path, second_step, **options):
    """A run of 2 processes in which process 1 alone does `second_step` with its share of the loss of step 2."""
    (tmp_path / "script.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, parallel, train
loss_of, calls = train.Pretraining.loss_of, []
def changed(self, *tensors):
    share = loss_of(self, *tensors)
    calls.append(share)
    if parallel.RANK == 1 and len(calls) == 2:
        {second_step}
    return share
train.Pretraining.loss_of = changed
train.run_script(train.main)
""")
    flags = [*PRETRAIN, "--dataset", home / "set", "--max_steps", 4]
    return launch(2, tmp_path / "script.py", tmp_path / "run", *flags, **options)


def test_a_step_is_skipped_by_all_or_none(home, tmp_path):
    text = launch_with(home, tmp_path, "share['loss'] = share['loss'] * float('nan')")
    assert "step 2 skipped" in text
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        assert [row["skipped"] for row in csv.DictReader(file)] == ["0", "1", "0", "0"]
    weights, optimizer = (train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[name] for name in ("model", "optimizer"))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert {state["step"].item() for state in optimizer["state"].values()} == {3}


def test_one_process_that_fails_ends_all_with_its_error(home, tmp_path):
    errors = launch_with(home, tmp_path, "raise torch.OutOfMemoryError", fails=True)
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "the GPU's memory is full; try --micro_batch_size 1" in lines[0]
    assert lines[1:] in ([], ["error: another process has ended, see its error"])


# ------------------------------------------------------------------------------------- large models


@pytest.mark.parametrize("preset, size", [("1b", 1.1e9), ("10b", 10e9)])
def test_large_presets_have_equal_parameters(preset, size):
    counts = []
    for attn in ATTENTION:
        settings = train.Settings(**{**train.PRESETS[preset], **train.shape_of(preset, attn), "attn": attn})
        with torch.device("meta"):
            counts.append(GPT(train.build_config(settings, 50257)).num_params())
    assert all(abs(count / counts[0] - 1) < 0.01 and abs(count / size - 1) < 0.02 for count in counts)


def test_only_what_is_trained_stays_float32_on_the_gpu():
    model = GPT(GPTConfig("v1", 16, 64, n_layer=1, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_inner=48))
    apply_lora(model, rank=2, alpha=4)
    small, expected = sft.bf16_copy(model, torch.device("cpu")), copy.deepcopy(model).cast_frozen()
    for (name, p), q in zip(small.named_parameters(), expected.parameters()):
        assert p.dtype == q.dtype and torch.equal(p, q) and p.requires_grad == ("lora" in name)
    assert all(p.dtype == torch.float32 for p in model.parameters())


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

FLOAT32 = f"""
import contextlib, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import parallel, train
from data import run_script

train.autocast = lambda device: contextlib.nullcontext()
torch.set_float32_matmul_precision = lambda precision: None
policy = parallel.MixedPrecisionPolicy
parallel.MixedPrecisionPolicy = lambda **dtypes: policy(cast_forward_inputs=False)
run_script(train.main)
"""


@needs_two_gpus
def test_two_gpus_have_the_losses_of_one_in_float32(home, tmp_path):
    """NCCL against one process, gradient norms too, without what bf16 and TF32 round away."""
    script = tmp_path / "float32.py"
    script.write_text(FLOAT32)
    flags = [*PRETRAIN, "--dataset", home / "set", "--max_steps", 20, "--device", "cuda", "--compile", "off"]
    launch(1, script, tmp_path / "one", *flags)
    launch(2, script, tmp_path / "two", *flags, "--micro_batch_size", 1)
    one, two = (torch.tensor(log_of(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


@needs_two_gpus
@pytest.mark.parametrize("attn", ATTENTION)
def test_two_gpus_have_the_losses_of_one(home, tmp_path, attn):
    """In bf16, and compiled."""
    flags = [*PRETRAIN, "--dataset", home / "set", "--attn", attn, "--max_steps", 20, "--device", "cuda"]
    launch(1, "train.py", tmp_path / "one", *flags)
    launch(2, "train.py", tmp_path / "two", *flags, "--micro_batch_size", 1)
    one, two = (torch.tensor(log_of(tmp_path / name))[:, 1] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0.02, atol=0.02)


def test_only_torchrun_makes_several_processes():
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    show = [sys.executable, "-c", "import parallel; print(parallel.RANK, parallel.LOCAL_RANK, parallel.PROCESSES)"]
    assert subprocess.run(show, cwd=ROOT, env=environment, capture_output=True, text=True).stdout == "0 0 1\n"
