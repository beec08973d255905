"""Speed: what the clock of a run counts, and the peak that MFU refers to."""

import time
from types import SimpleNamespace

import torch
from small import log_of

from engine.device import peak_flops
from engine.log import Log


def test_the_clock_leaves_out_what_is_paused(tmp_path):
    settings = SimpleNamespace(out_dir=tmp_path, max_steps=1)
    log = Log(
        SimpleNamespace(settings=settings, device=torch.device("cpu"), unit="tokens", metrics=(), flops_per_unit=1)
    )
    log.open(0)
    with log.paused():
        time.sleep(0.5)
    log.add(dict(step=1, count=1000, loss=1.0, grad_norm=1.0, skipped=False, lr=1.0))
    log.flush()
    assert float(log_of(tmp_path, "tokens_per_s")[0][0]) > 1000 / 0.4


def test_peak_of_the_gpu_by_its_name(monkeypatch):
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A6000", 155e12),
                       ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A10G", 70e12), ("NVIDIA RTX A4000", None),
                       ("NVIDIA GB200", None), ("NVIDIA RTX 4090 Laptop GPU", None), ("Some GPU", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
