"""bench.start: the seconds to a script's lines."""

import time
from types import SimpleNamespace

import pytest

from bench import start
from engine.settings import UserError


def write(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_the_time_to_each_line(tmp_path):
    script = write(
        tmp_path,
        """import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # as a process that compiles
assert os.environ["TRITON_CACHE_DIR"] == sys.argv[1] + "/triton"
assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == sys.argv[1] + "/inductor"
for line in ("settings: ", "model: v2", "    validation loss 9.1", "step   10/99", "step    1/99  loss 9"):
    print(line, flush=True)
    time.sleep(0.3)
time.sleep(60)
""",
    )
    began = time.perf_counter()
    row = start.measure(script, [str(tmp_path)], tmp_path)
    assert time.perf_counter() - began < 30, "the script and its processes end after its first step"
    model, validated, step = (row[f"{name}: s"] for name in ("model", "validated", "first step"))
    assert model + 0.29 < validated and validated + 0.59 < step and row["text: s"] is None


def test_a_script_without_steps_counts_to_its_end(tmp_path):
    script = write(tmp_path, "import time; print('model: out/best.pt', flush=True); time.sleep(0.5); print('text')")
    row = start.measure(script, [], tmp_path)
    assert row["text: s"] > 0.5 and row["model: s"] is row["first step: s"] is None


def test_a_script_that_fails_is_shown(tmp_path):
    for text in (
        "raise SystemExit('error: no data')",
        "print('    validation loss 1'); raise SystemExit('error: no data')",
    ):
        with pytest.raises(UserError, match="(?s)script.py failed.*error: no data"):
            start.measure(write(tmp_path, text), [], tmp_path)


def test_the_flags_of_each_script():
    arguments = SimpleNamespace(smoke=False, device="cuda", compile="whole")
    flags = start.scripts("f", arguments)
    assert list(flags) == ["train.py", "sft.py", "dpo.py", "sample.py"]
    after = {script: dict(zip(words[::2], words[1::2])) for script, words in flags.items()}
    assert after["train.py"]["--compile"] == "whole" and "--compile" not in after["sft.py"]
    assert "--init_from" not in after["train.py"]
    assert {after[name]["--init_from"] for name in ("sft.py", "dpo.py", "sample.py")} == {"f/model.pt"}
    assert {words["--device"] for words in after.values()} == {"cuda"}
