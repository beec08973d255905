"""The screen: encodings, control characters, what is waited for, and lines of 80 columns."""

import importlib
import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import log_of

import train
from engine import terminal
from engine.log import Log, print_line
from engine.settings import run_script
from engine.terminal import printable
from tests.robustness.helpers import COMMON, FLAGS, ROOT, SCRIPTS, STAGES, call

TEXT = "字符 ä ł 👩‍👧 \udcff\N{EURO SIGN}"  # \udcff: a byte of a file name that is not UTF-8


# ------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16", "shift_jis"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_character_that_the_encoding_lacks_is_replaced(encoding, errors, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr("sys.stdout", output)
    run_script(lambda: print(f"begin {TEXT} end"))
    printed = output.buffer.getvalue().decode(encoding)
    assert printed.startswith("begin ") and printed.endswith(" end\n") and "?" in printed


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_input_that_the_encoding_lacks_is_replaced(encoding, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding=encoding))
    run_script(lambda: print(input()))
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}b\n"


class NotebookStream:
    """What a notebook has for stdout: no reconfigure, no buffer."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def closed_stream():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


def stream_read_from():
    stream = io.TextIOWrapper(io.BytesIO(b"a\nb\n"))
    stream.readline()
    return stream


@pytest.mark.parametrize("stdin", [lambda: None, io.StringIO, NotebookStream, closed_stream, stream_read_from])
@pytest.mark.parametrize("stdout", [lambda: None, io.StringIO, NotebookStream])
def test_streams_that_cannot_be_changed(stdin, stdout, monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin())
    monkeypatch.setattr("sys.stdout", output := stdout())
    run_script(lambda: print(TEXT))
    assert output is None or TEXT in getattr(output, "text", "") + (output.getvalue() if stdout is io.StringIO else "")


NAMES = [train.__name__, "sft", "dpo", "sample", "engine.checkpoint"]
NAMES += [f"data.{name}.prepare" for name in ("wikitext2", "tiny", "slimorca", "orca_dpo_pairs", "fineweb_edu")]


@pytest.mark.parametrize("name", NAMES)
def test_every_script_ends_with_run_script(name):
    """It mends the streams."""
    source = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
    assert source.endswith('if __name__ == "__main__":\n    run_script(main)\n')


def test_a_run_on_files_with_such_names(tmp_path):
    source, folder = tmp_path / "数据-\udcff.txt", tmp_path / "out-\udcfe-字"
    source.write_text("".join(f"字符 ä ł {i}\n" for i in range(300)), encoding="utf-8")
    flags = ["--dataset", tmp_path / "set-字", "--source", source, *FLAGS["pretrain"], *COMMON, "--max_steps", 2]
    for more in ([], ["--resume", "--max_steps", 3]):
        command = [sys.executable, ROOT / "train.py", *(more or flags), "--out_dir", folder]
        done = subprocess.run(
            list(map(os.fspath, map(os.fsencode, map(str, command)))), capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert b"sample:" in done.stdout and done.stdout.isascii()
    assert len(log_of(folder, "step")) >= 3


# ------------------------------------------------------------------------------------- control characters


@pytest.mark.parametrize("code", [*range(32), *range(0x7F, 0xA0)])
def test_control_characters_are_shown(code):
    shown = printable(f"a{chr(code)}b")
    assert shown == ("a" + (chr(code) if chr(code) in "\n\t" else repr(chr(code))[1:-1]) + "b")


@pytest.mark.parametrize("text", ["plain", "ä 字 👩‍👧", "a\tb\nc", "\\x1b is a backslash", "\xa0\xad"])
def test_other_characters_stay(text):
    assert printable(text) == text


@pytest.mark.parametrize("stage", STAGES)
def test_a_sample_sends_no_control_characters(stage, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.robustness.helpers.STAGES", {})
    flags = FLAGS[stage] + ["--dataset", home / "set", *COMMON, "--max_steps", 1, "--out_dir", tmp_path / "run"]
    flags += [] if stage == "pretrain" else ["--init_from", home / "base" / "best.pt"]
    monkeypatch.setattr(STAGES[stage], "sample", lambda task: "a\x1b[2Jb\x08\x9b1m\tc\nd")
    monkeypatch.setattr("sys.argv", ["x", *map(str, flags)])
    SCRIPTS[stage].main()
    assert "sample:\n    a\\x1b[2Jb\\x08\\x9b1m\tc\n    d\n" in capsys.readouterr().out


def test_an_error_and_a_line_send_no_control_characters(capsys):
    def main():
        print_line("a \x1b[2J file")
        raise FileNotFoundError(2, "No such file", "a\x1b]0;b\x07")

    with pytest.raises(SystemExit):
        run_script(main)
    output = capsys.readouterr()
    assert output.out == "a \\x1b[2J file\n" and output.err == "error: a\\x1b]0;b\\x07: No such file\n"


# ------------------------------------------------------------------------------------- what is waited for


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_waited_for_is_said_before(stage, home, tmp_path, monkeypatch):
    """Also where the output is a file: it is flushed."""
    path = tmp_path / "printed.txt"
    seen = []

    def evaluate(task):
        seen.append(path.read_text().splitlines()[-1])
        return original(task)

    original = STAGES[stage].evaluate
    monkeypatch.setattr(STAGES[stage], "evaluate", evaluate)
    flags = FLAGS[stage] + ["--dataset", home / "set", *COMMON, "--max_steps", 1, "--out_dir", tmp_path / "run"]
    flags += [] if stage == "pretrain" else ["--init_from", home / "base" / "best.pt"]
    with open(path, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        call(SCRIPTS[stage], *flags)
    assert seen[0] == "before the first step:"


# ------------------------------------------------------------------------------------- 80 columns


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("max_steps", [3, 800, 100_000, 99_999_999])
@pytest.mark.parametrize("peak", [None, 1e15])
@pytest.mark.parametrize("loss, norm, rate", [(1.763, 0.69, 3e-4), (12345.678, 123456.7, 0.0), (-1.0, 1e-9, 1.0)])
def test_a_step_line_fits_80_columns(stage, max_steps, peak, loss, norm, rate, tmp_path, capsys):
    task = STAGES[stage]
    settings = SimpleNamespace(out_dir=tmp_path, max_steps=max_steps)
    flops = 1e9 if stage == "pretrain" else None
    log = Log(SimpleNamespace(settings=settings, device=torch.device("cpu"), unit=task.unit, metrics=task.metrics,
                              flops_per_unit=flops))  # fmt: skip
    log.peak = peak
    row = dict.fromkeys(task.metrics, 0.51234) | dict(step=max_steps // 2, loss=loss, grad_norm=norm, lr=rate)
    log.print_row(row, 158_765.4, 0.31)
    line = capsys.readouterr().out
    assert len(line) <= 81 and line.count("\n") == 1
    assert line.startswith(f"step {max_steps // 2:>{len(str(max_steps))}}/{max_steps}  loss {loss:.4f}")
    assert f"159k {task.unit}/s" in line and ("s left" in line or max_steps > 1e7 or loss > 1e4)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_run_prints_fits_80_columns(stage, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = FLAGS[stage] + ["--dataset", home / "set", *COMMON, "--max_steps", 21, "--out_dir", "run"]
    flags += ["--n_layer", 24] if stage == "pretrain" else ["--init_from", home / "base" / "best.pt"]
    call(SCRIPTS[stage], *flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if str(home) not in line and "preset:" not in line]
    assert len(lines) > 10 and all(len(line) <= 80 for line in lines)


# ------------------------------------------------------------------------------------- what is typed


class Terminal:
    """A pseudoterminal as stdin. `type` puts what is typed or pasted into it."""

    def __init__(self, monkeypatch):
        self.keyboard, end = pty.openpty()
        monkeypatch.setattr("sys.stdin", os.fdopen(end, "r"))

    def type(self, text):
        os.write(self.keyboard, text.encode())


@pytest.fixture
def typist(monkeypatch):
    return Terminal(monkeypatch)


@pytest.mark.parametrize("text", ["a", "a\nb", "a\n\n\nb", "if x:\n    return\n\tb", "    indented", "/exit\nls"])
def test_a_pasted_text_is_one_message(text, typist, capsys):
    typist.type(text + "\n")
    assert terminal.read_message() == text
    typist.type("next\n")
    assert terminal.read_message() == "next"


@pytest.mark.parametrize("text", ["ls\n", "a\nb\n", "unfinished", "\n\nls\n"])
def test_what_was_not_read_is_discarded(text, typist):
    typist.type(text)
    terminal.discard_input()
    timer = threading.Timer(0.3, typist.type, ["after\n"])
    timer.start()
    assert sys.stdin.readline() == "after\n"
    timer.join()


@pytest.mark.parametrize("typed", ["a\nb\n\nc\n", "a\nb\n\nc", "a\r\nb\n \nc\n"])
def test_through_a_pipe_every_line_is_a_message(typed, monkeypatch, capsys):
    read, write = os.pipe()
    os.write(write, typed.encode())
    os.close(write)
    monkeypatch.setattr("sys.stdin", os.fdopen(read, "r"))
    messages = iter(terminal.read_message, None)
    assert list(messages) == ["a", "b", "", "c"]
