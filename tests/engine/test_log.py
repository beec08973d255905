"""Speed: what the clock of a run counts, and the peak that MFU refers to."""

import io
import time
from types import SimpleNamespace

import pytest
import torch
from small import log_of, tiny_model

from engine.device import peak_flops
from engine.log import MAX_SKIPPED, Diverged, Log, describe, progress
from train import Settings


@pytest.fixture
def log(tmp_path):
    settings = SimpleNamespace(out_dir=tmp_path, max_steps=1)
    log = Log(
        SimpleNamespace(settings=settings, device=torch.device("cpu"), unit="tokens", metrics=(), flops_per_unit=1)
    )
    log.open(0)
    return log


def row(step, skipped=False):
    return dict(step=step, count=1000, loss=1.0, grad_norm=1.0, skipped=skipped, lr=1.0)


def test_skipped_steps_end_a_run_only_in_a_row(log, capsys):
    """A step that is taken in between begins the count anew; the total is on the screen."""
    for step in range(1, 40):
        log.add(row(step, skipped=step % MAX_SKIPPED != 0))
        log.flush()
    assert "(36 so far)" in capsys.readouterr().out
    with pytest.raises(Diverged, match=f"{MAX_SKIPPED} steps in a row up to 40"):
        log.add(row(40, skipped=True))
        log.flush()


def test_the_clock_leaves_out_what_is_paused(log, tmp_path):
    with log.paused():
        time.sleep(0.5)
    log.add(row(1))
    log.flush()
    assert float(log_of(tmp_path, "tokens_per_s")[0][0]) > 1000 / 0.4


def test_peak_of_the_gpu_by_its_name(monkeypatch):
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A6000", 155e12),
                       ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A10G", 70e12), ("NVIDIA RTX A4000", None),
                       ("NVIDIA GB200", None), ("NVIDIA RTX 4090 Laptop GPU", None), ("Some GPU", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "stage, mode, device, seconds",
    [("pretrain", "auto", "cpu", None), ("sft", "off", "cuda", None), ("pretrain", "auto", "cuda", 10),
     ("pretrain", "whole", "cuda", 25), ("sft", "auto", "cuda", 15)],
)  # fmt: skip
def test_compiling_is_announced(stage, mode, device, seconds, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    meta = dict(source="text", tokens=dict(train=1), tokenizer="bytes")
    task = SimpleNamespace(settings=Settings(compile=mode), meta=meta, model=tiny_model("v2"), flops_per_unit=None)
    task.device = torch.device(device)
    task.model.embed_tokens.requires_grad_(stage == "pretrain")
    if stage == "pretrain":
        task.compiled = object() if mode == "whole" else task.model
    describe(task)
    printed = capsys.readouterr().out
    assert (
        (f"compiling before the first step: about {seconds} s" in printed) if seconds else ("compiling" not in printed)
    )


@pytest.mark.parametrize("is_terminal, seconds, shown", [(True, 0.6, True), (True, 0, False), (False, 0.6, False)])
def test_long_waits_have_progress_on_a_terminal(is_terminal, seconds, shown, monkeypatch):
    output = io.StringIO()
    output.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", output)
    assert [(time.sleep(seconds), batch)[1] for batch in progress(range(3), "validating")] == [0, 1, 2]
    assert ("validating" in output.getvalue()) == shown
