"""Signals, processes that die and errors under torchrun, whose own behaviour matters here.

Each run starts three times PyTorch, so there are few.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import train
from engine.checkpoint import load_checkpoint, load_latest
from tests.robustness.helpers import COMMON, FLAGS, ROOT, in_two_processes, steps_of, torchrun

RUN = [*FLAGS["pretrain"], *COMMON, "--log_interval", 1]


def start_run(home, out_dir):
    """A long run of 2 processes, once it has written a checkpoint, and the process ids of its workers by rank."""
    flags = [*RUN, "--dataset", home / "set", "--max_steps", 100_000, "--save_interval", 5]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(torchrun(2, "train.py", out_dir, *flags), cwd=ROOT, **pipes)
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
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert f"stopped after step {step};" in rest and steps_of(tmp_path) == list(range(1, step + 1))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_a_killed_process_ends_the_run_which_can_be_resumed(home, tmp_path):
    run, workers = start_run(home, tmp_path)
    os.kill(workers[1], signal.SIGKILL)
    started, (_, errors) = time.time(), run.communicate(timeout=60)
    assert run.returncode != 0 and time.time() - started < 45
    assert "Traceback" not in errors.split("torch/distributed/elastic")[0]  # torchrun's own report is all there is
    step = load_latest(tmp_path)["step"]
    works, text = in_two_processes(train, tmp_path, "--resume", "--max_steps", step + 1)
    assert works and f"step {step + 1}/{step + 1}" in text


def test_an_error_is_one_line_before_torchruns_own(home, tmp_path):
    flags = [*RUN, "--dataset", home / "set", "--learning_rate", 1e18, "--warmup_steps", 0, "--max_steps", 1]
    done = subprocess.run(torchrun(2, "train.py", tmp_path, *flags), cwd=ROOT, capture_output=True, text=True)
    [line] = {line for line in done.stderr.splitlines() if line.startswith("error:")}  # twice on a very busy machine
    assert done.returncode and "the validation after step 1 is not finite" in line
    assert 'train.py", line' not in done.stderr  # no traceback of ours
