"""The time from the command line to the first training step, or to a whole text, in fresh processes.

python -m bench.start            # the preset ldiff; its data sets are prepared first
python -m bench.start --compile whole

train.py, sft.py, dpo.py and sample.py run with empty caches of the compilers, and again with what that has left there.
The last three start from a model of random numbers. The columns are seconds since the command: to the line that
describes the model, to the validation before the first step, to the first step, to the end of a text of 100 tokens.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

from bench import Table, model_config, parse_arguments
from data.dataset import prepared_directory
from engine.checkpoint import save_checkpoint
from engine.graphs import COMPILE_MODES
from engine.settings import UserError, run_script
from model import GPT

FLAGS = dict(compile=dict(default="auto", choices=COMPILE_MODES, help="of train.py"))
MARKS = {"model: ": "model", "validation loss": "validated", "step 1/": "first step"}  # in what a script prints
DATASETS = {"wikitext2": "", "slimorca": "sft", "orca_dpo_pairs": "dpo"}  # of the preset ldiff, and their kinds


def measure(script, flags, caches):
    """Run a script until its first step, or to its end if it takes none -> {"model: s": seconds, ...}."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
    command, seconds, printed = [sys.executable, script, *flags], {}, []
    started = time.perf_counter()
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    with subprocess.Popen(command, env=environment, **options) as process:
        try:
            for line in process.stdout:
                printed.append(line)
                for mark, name in MARKS.items():
                    if mark in " ".join(line.split()) and name not in seconds:
                        seconds[name] = time.perf_counter() - started
                if "first step" in seconds:
                    break
            if "first step" not in seconds:
                process.wait()  # it has printed all
        finally:  # Ctrl-C, too, must not leave it running
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile
    if "first step" not in seconds:
        if process.returncode:
            raise UserError(f"{script} failed:\n{''.join(printed)}")
        seconds = {"text": time.perf_counter() - started}
    return {f"{name}: s": seconds.get(name) for name in (*MARKS.values(), "text")}


def write_model(path, smoke):
    """Write a checkpoint of a V2 model that has learned nothing."""
    model = GPT(model_config("v2", 256 if smoke else 2048, smoke))
    contents = dict(settings={}, data={"tokenizer": "bytes" if smoke else "gpt2"}, stage="pretrain", step=0)
    save_checkpoint(path, model=model.state_dict(), config=asdict(model.config), **contents)


def scripts(folder, arguments):
    """The flags of each script."""
    run, begun = ["--preset", "tiny" if arguments.smoke else "ldiff"], ["--init_from", f"{folder}/model.pt"]
    flags = {
        "train.py": [*run, "--compile", arguments.compile, "--out_dir", f"{folder}/pretrain"],
        "sft.py": [*run, *begun, "--out_dir", f"{folder}/sft"],
        "dpo.py": [*run, *begun, "--out_dir", f"{folder}/dpo"],
        "sample.py": [*begun, "--max_new_tokens", "100", "--prompt", "The"],
    }
    return {script: [*words, "--device", arguments.device] for script, words in flags.items()}


def main():
    arguments, device = parse_arguments("start", __doc__, **FLAGS)
    if not arguments.smoke:
        for dataset, kind in DATASETS.items():
            prepared_directory(dataset, "", kind, tokenizer="gpt2")
    table = Table("start", arguments, device)
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/model.pt", arguments.smoke)
        for caches in ("empty", "full"):
            for script, flags in scripts(folder, arguments).items():
                table.add({"script": script, "caches": caches}, measure, script, flags, f"{folder}/caches/{script}")


if __name__ == "__main__":
    run_script(main)
