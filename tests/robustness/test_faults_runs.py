"""How a run is begun, resumed and refused: paths, flags that are given again, folders, the environment, batch sizes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bench.runs
import data.wikitext2.prepare
import engine.checkpoint
from engine import parallel
from engine.checkpoint import BEST, NEWEST, load_checkpoint, part_folders, run_folder
from engine.settings import Parser, UserError, parse_flags, run_script
from tests.robustness.helpers import (
    ROOT,
    SCRIPTS,
    SHAPE,
    STAGES,
    call,
    equal,
    exit_code,
    fork,
    in_two_processes,
    load,
    read_log,
    run,
    steps_of,
)

TUNING = ["sft", "dpo"]


def refusal(function, *arguments, capsys):
    """The one line with which a call is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_script(lambda: function(*arguments))
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(lines) == 1, lines
    return lines[0]


# ------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("name", ["page", "notes/page", "__0_0.distcp.txt", "metadata"])
def test_a_folder_that_is_called_like_parts_but_has_other_files_is_none(tmp_path, name):
    (tmp_path / "parts-8" / name).parent.mkdir(parents=True)
    (tmp_path / "parts-8" / name).touch()
    (tmp_path / "parts-9").mkdir()
    for part in (".metadata", "__0_0.distcp", "__11_2.distcp"):
        (tmp_path / "parts-9" / part).touch()
    assert part_folders(tmp_path) == [tmp_path / "parts-9"]


def test_benchmarks_remove_their_own_files_alone(tmp_path, monkeypatch):
    mine = ["notes.txt", "curves/notes.txt", "curves/v2-1/notes.txt", "logs/mine.csv", "logs/curves-v2-9.csv"]
    theirs = ["curves/v2-1/log.csv", "curves/v2-1/ckpt.pt", "curves/v1-1/lock", "logs/curves-v2-1.csv"]
    for name in mine + theirs:
        (tmp_path / "smoke" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "smoke" / name).touch()
    monkeypatch.setattr("sys.argv", ["runs.py", "--smoke", "--out", str(tmp_path)])
    parser = Parser("")
    bench.runs.add_flags(parser)
    bench.runs.parse_runs(parser)
    left = {path for path in (tmp_path / "smoke").rglob("*") if path.is_file()}
    assert left == {tmp_path / "smoke" / name for name in mine} and not (tmp_path / "smoke" / "curves/v1-1").exists()


START = {
    "train": ["--dataset", "nosuch"],
    "sft": ["--init_from", "nosuch.pt"],
    "dpo": ["--init_from", "nosuch.pt"],
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=START)
@pytest.mark.parametrize("out", ["out", "out/run", "a/b/c"])
def test_a_failed_start_leaves_no_folder(script, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        call(script, "--out_dir", out, *START[script.__name__])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_start_leaves_a_folder_as_it_was(error, tmp_path):
    for out, mine in ((tmp_path / "mine", ["mine", "mine/notes"]), (tmp_path / "empty", ["empty"])):
        out.mkdir()
        for name in mine[1:]:
            (tmp_path / name).touch()
        with pytest.raises(error), run_folder(out):
            raise error
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == mine
        shutil.rmtree(out)


def test_a_folder_with_something_new_in_it_stays(tmp_path):
    with pytest.raises(UserError), run_folder(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "log.csv").touch()
        raise UserError
    assert sorted(path.name for path in (tmp_path / "a" / "run").iterdir()) == ["lock", "log.csv"]
    with pytest.raises(UserError), run_folder(tmp_path / "b" / "run"):
        (tmp_path / "b" / "notes").touch()
        raise UserError
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["notes"]


@pytest.mark.parametrize("out", ["link", "link/run", "real/link", "real/link/a/b"])
def test_a_link_to_nowhere_is_called_one(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    os.symlink("gone", "link")
    os.symlink("/no/such/folder", "real/link")
    for function in (lambda: call(SCRIPTS["pretrain"], "--out_dir", out), lambda: Path(out).mkdir(parents=True)):
        line = refusal(function, capsys=capsys)
        assert re.search(r"link: a link to (gone|/no/such/folder), which does not exist$", line), line


# ------------------------------------------------------------------------------------- paths


FLAGS_OF_PATHS = [
    (script.Settings, flag) for script in SCRIPTS.values() for flag in ("out_dir", "source", "init_from", "dataset")
]


@pytest.mark.parametrize("settings, flag", FLAGS_OF_PATHS, ids=lambda x: getattr(x, "__module__", x))
def test_a_home_folder_is_found_whatever_the_form_of_the_flag(settings, flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for path, meant in (("~/runs", "/home/me/runs"), ("~", "/home/me"), ("./~/x", "./~/x"), ("a~b", "a~b")):
        for argv in ([f"--{flag}={path}"], [f"--{flag}", path]):
            assert parse_flags(settings, "", argv=argv) == {flag: meant}


@pytest.mark.parametrize(
    "main, flags",
    [
        (data.wikitext2.prepare.main, ["--source=~/my.txt", "--out_dir=~/set", "--tokenizer=bytes"]),
        (data.wikitext2.prepare.main, ["--source=~/my.txt", "--val=~/my.txt", "--out_dir=~/set", "--tokenizer=bytes"]),
    ],
)
def test_a_home_folder_is_found_by_a_preparation(main, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("some lines of text\n" * 99)
    monkeypatch.setattr("sys.argv", ["prepare.py", *flags])
    main()
    assert (tmp_path / "set" / "meta.json").exists() and not (tmp_path / "~").exists()


def test_a_home_folder_is_found_by_the_benchmarks_and_the_merge_of_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser("")
    bench.runs.add_flags(parser)
    flags = parser.parse_args(["--out=~/a", "--logs=~/b"])
    assert [flags.out, flags.logs] == [f"{tmp_path}/{name}" for name in "ab"]
    monkeypatch.setattr("sys.argv", ["checkpoint.py", "~/run"])
    assert f"{tmp_path}/run/ckpt.pt" in refusal(engine.checkpoint.main, capsys=capsys)


def test_a_prompt_is_no_path(monkeypatch):
    import sample

    monkeypatch.setenv("HOME", "/home/me")
    assert parse_flags(sample.Settings, "", argv=["--prompt=~/x", "--init_from=~/x"]) == {
        "prompt": "~/x",
        "init_from": "/home/me/x",
    }


# ------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_data_at_another_path(home, tmp_path, stage, monkeypatch):
    """Another source and another report of it; what was trained on is the same."""
    out, kind = run(home, stage, tmp_path / "run", "--max_steps", 4), "" if stage == "pretrain" else stage
    shutil.copytree(home / "set", tmp_path / "moved")
    meta = tmp_path / "moved" / kind / "meta.json"
    for change in (lambda text: re.sub(r'"source": "[^"]*"', '"source": "/elsewhere/my.txt"', text),
                   lambda text: text.replace("{", '{"sources": {"/elsewhere/my.txt": [1, 2]}, ', 1)):  # fmt: skip
        meta.write_text(change(meta.read_text()))
    run(home, stage, out, "--resume", "--dataset", tmp_path / "moved", "--max_steps", 6)
    assert steps_of(out) == list(range(1, 7))
    for name, value in (("crc32", {"train": 1, "val": 2}), ("block_size", 33), ("vocab_size", 260)):
        changed = load_checkpoint(out / NEWEST)
        changed["data"][name] = value
        monkeypatch.setattr(engine.checkpoint, "load_latest", lambda out_dir: changed)  # noqa: B023
        with pytest.raises(UserError, match=rf"not the one that the run began with \({name} differ\)"):
            run(home, stage, out, "--resume", "--max_steps", 8)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_the_command_that_began_it(home, tmp_path, stage, monkeypatch):
    monkeypatch.chdir(home)
    begun = ["--preset", "tiny", "--dataset", home / "set", *FLAGS[stage], "--max_steps", 4]
    if stage != "pretrain":
        begun += ["--init_from", "base/best.pt"]
    out = tmp_path / "run"
    call(SCRIPTS[stage], *begun, "--out_dir", out)
    again = [[], ["--preset", "auto"]]
    if stage != "pretrain":
        again += [["--init_from", home / "base" / "best.pt"], ["--init_from", "./base/../base/best.pt"]]
    for steps, flags in enumerate(again, 5):
        call(SCRIPTS[stage], *begun, "--max_steps", steps, *flags, "--resume", "--out_dir", out)
    assert steps_of(out) == list(range(1, steps + 1))
    saved = load(out / NEWEST)["settings"]
    assert saved["preset"] == "tiny" and saved["init_from"] == ("" if stage == "pretrain" else "base/best.pt")
    for name, other in (("preset", "ldiff"), ("init_from", "set/best.pt")):
        with pytest.raises(UserError, match=f"the run was begun with --{name} {saved[name]}.*, which --resume cannot"):
            call(SCRIPTS[stage], *begun, f"--{name}", other, "--resume", "--out_dir", out)


FLAGS = {
    "pretrain": [*SHAPE, "--device", "cpu", "--batch_size", 2, "--eval_windows", 2],
    **dict.fromkeys(TUNING, ["--device", "cpu", "--batch_size", 2, "--lora_rank", 2, "--eval_examples", 3]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_resume_auto_begins_and_goes_on(home, tmp_path, stage):
    whole = run(home, stage, tmp_path / "whole", "--max_steps", 8)
    base = [] if stage == "pretrain" else ["--init_from", home / "base" / "best.pt"]
    common = ["--dataset", home / "set", *base, "--preset", "tiny", *FLAGS[stage]]
    common += ["--log_interval", 5, "--eval_interval", 20, "--save_interval", 4, "--warmup_steps", 4]
    auto = [*common, "--out_dir", tmp_path / "auto", "--resume", "auto", "--max_steps"]
    call(SCRIPTS[stage], *auto, 8)
    assert equal(load(whole / NEWEST)["model"], load(tmp_path / "auto" / NEWEST)["model"])
    assert load(tmp_path / "auto" / NEWEST)["settings"]["resume"] is False
    call(SCRIPTS[stage], *auto, 10)
    assert steps_of(tmp_path / "auto") == list(range(1, 11)) and not (tmp_path / "auto" / "earlier-1").exists()
    (tmp_path / "auto" / NEWEST).unlink()  # the previous one is left
    call(SCRIPTS[stage], *auto, 10)
    assert steps_of(tmp_path / "auto") == list(range(1, 11)) and not (tmp_path / "auto" / "earlier-1").exists()
    assert load(tmp_path / "auto" / NEWEST)["settings"]["resume"] is True
    (tmp_path / "auto" / NEWEST).write_text("no checkpoint")
    (tmp_path / "auto" / "ckpt-previous.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="is damaged"):  # rather than begun anew
        call(SCRIPTS[stage], *auto, 10)


def test_resume_auto_of_two_processes(home, tmp_path):
    flags = ["--dataset", home / "set", "--preset", "tiny", *FLAGS["pretrain"], "--micro_batch_size", 1]
    for steps in (2, 4):
        works, text = in_two_processes(
            SCRIPTS["pretrain"], tmp_path / "run", *flags, "--resume", "auto", "--max_steps", steps
        )
        assert works, text
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4] and not (tmp_path / "run" / "earlier-1").exists()


@pytest.mark.parametrize("argv", ["--resume", "--resume auto", "--no-resume", "--resume --no-resume", ""])
def test_forms_of_resume(argv):
    given = {"--resume": True, "--resume auto": "auto", "--no-resume": False, "--resume --no-resume": False, "": None}
    assert all(parse_flags(s.Settings, "", argv=argv.split()).get("resume") == given[argv] for s in SCRIPTS.values())


@pytest.mark.parametrize("word", ["yes", "True", "", "always"])
def test_other_words_after_resume(word, capsys):
    line = refusal(lambda: parse_flags(SCRIPTS["sft"].Settings, "", argv=[f"--resume={word}"]), capsys=capsys)
    assert "argument --resume: invalid choice" in line and "auto" in line


@pytest.mark.parametrize("stage", TUNING)
def test_the_order_of_examples_cannot_change(home, tmp_path, stage):
    out = run(home, stage, tmp_path / "run", "--max_steps", 4)
    for flags in (["--batch_size", 1], ["--batch_size", 4], ["--seed", 2]):
        with pytest.raises(UserError, match=f"begun with {flags[0]} .*, which --resume cannot change"):
            run(home, stage, out, "--resume", *flags)
    run(home, stage, out, "--resume", "--batch_size", 2, "--seed", 1, "--micro_batch_size", 1, "--max_steps", 6)
    assert steps_of(out) == list(range(1, 7))


def test_pretraining_may_go_on_with_other_batches(home, tmp_path):
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 4)
    run(home, "pretrain", out, "--resume", "--batch_size", 3, "--seed", 2, "--max_steps", 6)
    assert steps_of(out) == list(range(1, 7))


# ------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("batch_size, most, fits", [(6, 4, 3), (7, 4, 1), (9, 16, 9), (10, 4, 2), (24, 16, 12)])
def test_a_micro_batch_that_was_not_given_adapts(stage, batch_size, most, fits, home, tmp_path, monkeypatch):
    """To a part of the batch, on one and on two processes. One that was given is refused, if it does not fit."""
    script, preset = SCRIPTS[stage], {"micro_batch_size": most}
    monkeypatch.setitem(script.PRESETS, "tiny", {**script.PRESETS["tiny"], **preset})
    given = {"batch_size": batch_size, "preset": "tiny", "device": "cpu"}
    more = () if stage == "pretrain" else (script.Settings, script.PRESETS, stage)
    choose = script.choose_settings if stage != "dpo" else SCRIPTS["sft"].choose_settings
    if more:
        given["init_from"] = str(home / "base" / "best.pt")
    settings, _ = choose(given, *more)
    parallel.check_batch_size(settings)
    assert settings.micro_batch_size == fits and batch_size % fits == 0
    if batch_size % most and batch_size > most:
        settings, _ = choose({**given, "micro_batch_size": most}, *more)
        with pytest.raises(UserError, match=f"{batch_size} is not a multiple of micro_batch_size {most}"):
            parallel.check_batch_size(settings)
    monkeypatch.setattr(parallel, "WORLD_SIZE", 2)
    settings, _ = choose({**given, "batch_size": 2 * batch_size}, *more)
    parallel.check_batch_size(settings)
    assert settings.micro_batch_size == fits
    settings, _ = choose({**given, "batch_size": 2 * batch_size + 1}, *more)
    with pytest.raises(UserError, match="is not a multiple of .* times 2 processes"):
        parallel.check_batch_size(settings)


def test_a_micro_batch_adapts_on_resume(home, tmp_path):
    out = run(home, "pretrain", tmp_path / "run", "--max_steps", 2, "--batch_size", 4, "--micro_batch_size", 4)
    run(home, "pretrain", out, "--resume", "--batch_size", 6, "--max_steps", 4)
    assert load(out / NEWEST)["settings"]["micro_batch_size"] == 3
    with pytest.raises(UserError, match="batch_size 6 is not a multiple of micro_batch_size 4"):
        run(home, "pretrain", out, "--resume", "--micro_batch_size", 4, "--max_steps", 6)


# ------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("warmup, steps, advised", [(4, 4, True), (9, 2, True), (3, 4, False), (0, 1, False)])
def test_a_run_shorter_than_its_warmup_is_advised(home, tmp_path, stage, warmup, steps, advised, capsys):
    run(home, stage, tmp_path / "run", "--warmup_steps", warmup, "--max_steps", steps)
    assert ("a lower --warmup_steps" in capsys.readouterr().out) == advised


@pytest.mark.parametrize("stage", STAGES)
def test_the_validation_before_the_first_step_is_in_the_log(home, tmp_path, stage):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(home, stage, whole, "--max_steps", 8)
    first, *others = read_log(whole)
    filled = {name for name, value in first.items() if value}
    assert first["step"] == "0" and filled == {"step", *(name for name in first if name.startswith("val_"))}
    assert all(row["loss"] for row in others)
    run(home, stage, out, "--max_steps", 4)
    run(home, stage, out, "--resume", "--max_steps", 8)
    assert [row["step"] for row in read_log(out)] == [row["step"] for row in read_log(whole)]
    assert read_log(out)[0] == first
    bench.runs.keep_log(whole, tmp_path / "kept.csv")
    assert [line.split(",")[0] for line in (tmp_path / "kept.csv").read_text().split()[1:]] == list("12345678")


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_has_not_learned_yet_is_called_what_it_is(home, tmp_path, stage):
    """A best.pt of step 0 is the model that the run began with: of that stage, and of that step.

    A new model of random numbers is not saved before it has learned.
    """
    for begun in (home / "base" / "best.pt", tmp_path / "named.pt"):
        if stage == "pretrain" and begun.parent == home / "base":
            out = run(home, stage, tmp_path / "new", "--max_steps", 1, "--learning_rate", 0)
            assert (load(out / BEST)["stage"], load(out / BEST)["step"]) == ("pretrain", 1)
            continue
        content = load(home / "base" / "best.pt")
        if begun.parent != home / "base":
            engine.checkpoint.save_checkpoint(begun, **{**content, "stage": "sft", "step": 77})
        out = run(home, stage, tmp_path / begun.stem, "--init_from", begun, "--max_steps", 1, "--learning_rate", 0)
        best, content = load_checkpoint(out / BEST), load(begun)
        assert (best["stage"], best["step"]) == (content["stage"], content["step"])
        assert equal(best["model"], content["model"])
        assert (load(out / NEWEST)["stage"], load(out / NEWEST)["step"]) == (stage, 1)
    run(home, stage, out, "--resume", "--max_steps", 2)
    assert load(out / BEST)["step"] in (0, 77)
    learned = run(home, stage, tmp_path / "learned", "--max_steps", 20, "--learning_rate", 0.02)
    assert (load(learned / BEST)["stage"], load(learned / BEST)["step"]) == (stage, 20)


# ------------------------------------------------------------------------------------- the environment


@pytest.mark.parametrize("value", ["", "abc", "-1", "1.5", " ", "²"])
def test_numbers_of_processes_that_are_none(value, monkeypatch, capsys):
    monkeypatch.setenv("RANK", value)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for no other process"))
    line = refusal(lambda: parse_flags(SCRIPTS["pretrain"].Settings, "", argv=["--x"]), capsys=capsys)
    assert "unrecognized arguments: --x" in line
    code = "from engine import parallel; print(parallel.RANK, parallel.LOCAL_RANK, parallel.WORLD_SIZE)"
    environment = {**os.environ, "RANK": value, "LOCAL_RANK": value, "WORLD_SIZE": value}
    if value == "":  # a process for each takes seconds
        environment["TORCHELASTIC_RUN_ID"] = "1"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout == "0 0 1\n", done.stderr


@pytest.mark.parametrize(
    "script", ["train.py", "sft.py", "dpo.py", "sample.py", "-m engine.checkpoint", "-m bench.runs"]
)
def test_ctrl_c_during_the_imports(script):
    """In the seconds that they take: after one module or another."""
    command, rng = [sys.executable, "-X", "importtime", *script.split(), "--help"], random.Random(script)
    for module in rng.sample(["numpy", "torch._C", "torch.types", "torch.nn.parameter", "torch.autograd"], 2):
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for line in child.stderr:
            if line.split("|")[-1].strip() == module:
                break
        child.send_signal(signal.SIGINT)
        error = child.stderr.read()
        assert child.wait() in (-signal.SIGINT, 130) and "Traceback" not in error, error[-2000:]


def test_ctrl_c_is_not_lost_in_an_import(tmp_path):
    """As in those of PyTorch, which goes on where one of its own fails."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""}
    child = subprocess.Popen(
        [sys.executable, "sample.py"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == -signal.SIGINT


@pytest.mark.parametrize(
    "command, at_once",
    [("script.py", True), ("-m package.script", True), (".venv/lib/site-packages/other.py", False),
     (".venv/bin/other", False), ("../elsewhere.py", False)],
)  # fmt: skip
def test_ctrl_c_is_left_to_other_programs(command, at_once, tmp_path):
    """pytest, say, or a notebook, which may lie in a virtual environment inside the project."""
    home = tmp_path / "project"
    shutil.copytree(ROOT / "engine", home / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(home)!r})\nimport engine.settings, signal\n"
    names = [
        ".venv/lib/site-packages/other.py",
        ".venv/bin/other",
        "../elsewhere.py",
        "script.py",
        "package/__init__.py",
    ]
    for name in (*names, "package/script.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"{code}print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)\n")
    done = subprocess.run([sys.executable, *command.split()], cwd=home, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {str(at_once)}


@pytest.mark.parametrize("broken", ["stdout", "stdout that is flushed", "stderr"])
def test_a_reader_that_has_read_enough(broken, tmp_path):
    """`| head` ends a program quietly, whether it prints at once or at its end."""
    reader, writer = os.pipe()
    os.close(reader)

    def main():
        os.dup2(writer, 2 if broken == "stderr" else 1)
        os.close(writer)
        print("text", file=sys.stderr if broken == "stderr" else sys.stdout, flush=broken != "stdout")

    child = fork(main, tmp_path / "output")
    os.close(writer)
    assert exit_code(child) == 141 and not (tmp_path / "output").read_text()
