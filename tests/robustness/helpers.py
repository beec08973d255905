"""Small runs of the scripts, in this process or in copies of it, and comparisons of what they leave behind."""

import csv
import os
import signal
import socket
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed.checkpoint  # these two here, so that copies of this process need not import them
import torch.distributed.fsdp

import dpo
import sft
import train
from engine import parallel
from engine.settings import run_script

ROOT = Path(__file__).parent.parent.parent

STAGES = {"pretrain": train.Pretraining, "sft": sft.SFT, "dpo": dpo.DPO}
SCRIPTS = {"pretrain": train, "sft": sft, "dpo": dpo}

SHAPE = ["--block_size", 32, "--n_layer", 1, "--n_embd", 16, "--n_inner", 16, "--n_head", 2, "--head_dim", 8]
COMMON = ["--device", "cpu", "--log_interval", 5, "--eval_interval", 20, "--save_interval", 4, "--warmup_steps", 4]
FLAGS = {
    "pretrain": [*SHAPE, "--preset", "tiny", "--batch_size", 2, "--eval_windows", 2],
    "sft": ["--batch_size", 2, "--lora_rank", 2, "--eval_examples", 3],
    "dpo": ["--batch_size", 2, "--lora_rank", 2, "--eval_examples", 3],
}


def call(script, *flags):
    """Call a script's main() in this process, without the sample at the end, which takes longer than these runs."""
    argv = [f"{script.__name__}.py", *map(str, flags)]
    samples = [patch.object(stage, "sample", lambda task: "") for stage in STAGES.values()]
    with patch("sys.argv", argv), samples[0], samples[1], samples[2]:
        script.main()


def run(home, stage, out_dir, *flags):
    """Make a run with a small model and the data in `home`, or with --resume go on with it. Returns out_dir."""
    new = [] if "--resume" in flags else ["--dataset", home / "set", *FLAGS[stage], *COMMON]
    if stage != "pretrain" and "--resume" not in flags:
        new += ["--init_from", home / "base" / "best.pt"]
    call(SCRIPTS[stage], *new, "--out_dir", out_dir, *flags)
    return out_dir


def fork(function, output=os.devnull):
    """Start function() in a copy of this process, whose output goes to a file, and return the copy's process id.

    Its exit code is that of a script whose main() is the function. To import PyTorch anew would take seconds.
    """
    child = os.fork()
    if child:
        return child
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))  # not pytest's
        run_script(function)
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code)
    finally:
        os._exit(1)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_two_processes(script, out_dir, *flags):
    """Call a script's main() in two connected processes -> whether it worked, and what they printed.

    Like torchrun, end the other if one fails.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def work(rank):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
        for name, value in numbers.items():
            setattr(parallel, name, value)
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = [f"{script.__name__}.py", *map(str, ("--out_dir", out_dir, *flags))]
        script.main()

    outputs = [Path(f"{out_dir}-output-{rank}") for rank in range(2)]
    for path in outputs:
        path.touch()
    children, works = {fork(lambda rank=rank: work(rank), outputs[rank]) for rank in range(2)}, True
    while children:
        ended, status = os.wait()
        children.remove(ended)
        if os.waitstatus_to_exitcode(status):
            works = False
            for child in children:
                os.kill(child, signal.SIGKILL)
    text = "".join(path.read_text() for path in outputs)
    for path in outputs:
        path.unlink()
    return works, text


def torchrun(processes, script, out_dir, *flags):
    """The command that a user would enter."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *start, *map(str, (script, "--out_dir", out_dir, *flags))]


def wait_until(condition, seconds=60):
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.0005)


def read_log(out_dir):
    """The rows of log.csv without speeds, which are never the same twice."""
    with open(out_dir / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if "per_s" not in name and name != "mfu"} for row in rows]


def steps_of(out_dir):
    """The steps in log.csv, without the validation before the first, which is row 0."""
    return [int(row["step"]) for row in read_log(out_dir) if row["step"] != "0"]


def equal(a, b):
    """True if two checkpoints' contents are equal bit for bit, apart from the settings that name a folder or resume."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key not in ("out_dir", "resume"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)
