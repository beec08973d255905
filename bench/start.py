"""The time from the command line to the first training step, or to a whole text, in fresh processes.

python -m bench.start            # the preset ldiff; its data sets are prepared first
python -m bench.start --out /tmp/bench --compile whole

train.py, sft.py, dpo.py and sample.py run with empty caches of the compilers, and again with what that has left there.
Each script starts from the model of the one before. The columns are seconds since the command: to the line that
describes the model, to the validation before the first step, to the first step, to the end of a text of 100 tokens.
"""

import os
import subprocess
import sys
import tempfile
import time

from bench import Table, parse_arguments
from data.dataset import prepared_directory
from engine.settings import UserError, run_script

FLAGS = dict(
    compile=dict(default="auto", choices=("auto", "on", "whole", "off"), help="of train.py"),
)
MARKS = {"model: ": "model", "validation loss": "validated", "step 1/": "first step"}  # in what a script prints
DATASETS = {"wikitext2": "", "slimorca": "sft", "orca_dpo_pairs": "dpo"}  # of the preset ldiff, and their kinds


def measure(script, flags, caches):
    """Run a script until its first step, or to its end if it takes none -> {"model: s": seconds, ...}."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
    command, seconds, printed = [sys.executable, script, *flags], {}, []
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout:
            printed.append(line)
            for mark, name in MARKS.items():
                if mark in " ".join(line.split()) and name not in seconds:
                    seconds[name] = time.perf_counter() - started
            if "first step" in seconds:
                process.kill()  # best.pt was saved after the validation
    if "first step" not in seconds:
        if process.returncode:
            raise UserError(f"{script} failed:\n{''.join(printed)}")
        seconds = {"text": time.perf_counter() - started}
    return {f"{name}: s": seconds.get(name) for name in (*MARKS.values(), "text")}


def scripts(folder, arguments):
    """The flags of each script, with which it starts from the model of the one before."""
    preset = "tiny" if arguments.smoke else "ldiff"
    common = ["--device", arguments.device, "--preset", preset]
    yield "train.py", [*common, "--compile", arguments.compile, "--out_dir", f"{folder}/pretrain"]
    yield "sft.py", [*common, "--init_from", f"{folder}/pretrain/best.pt", "--out_dir", f"{folder}/sft"]
    yield "dpo.py", [*common, "--init_from", f"{folder}/sft/best.pt", "--out_dir", f"{folder}/dpo"]
    sampling = ["--max_new_tokens", "100", "--prompt", "The", "--device", arguments.device]
    yield "sample.py", ["--init_from", f"{folder}/pretrain/best.pt", *sampling]


def main():
    arguments, device = parse_arguments("start", __doc__, **FLAGS)
    if not arguments.smoke:
        for dataset, kind in DATASETS.items():
            prepared_directory(dataset, "", kind, tokenizer="gpt2")
    table = Table("start", arguments, device)
    with tempfile.TemporaryDirectory() as folder:
        for caches in ("empty", "full"):
            for script, flags in scripts(folder, arguments):
                table.add({"script": script, "caches": caches}, measure, script, flags, f"{folder}/caches")


if __name__ == "__main__":
    run_script(main)
