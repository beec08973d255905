"""Devices: which are accepted, and what happens where there is no CUDA."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import write_tuning_data

import dpo
import sft
import train
from engine.device import autocast, choose_device, synchronize
from engine.graphs import wants_compile
from engine.settings import UserError

ROOT = Path(__file__).parents[2]


class Somewhere:
    """A tensor of another machine."""

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_mps_is_accepted_where_pytorch_has_it(name, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape, device: Somewhere(device))
    device = choose_device(name)
    assert device.type == "mps" and not wants_compile("auto", device) and wants_compile("on", device)
    with autocast(device):
        assert not any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps")))


@pytest.mark.parametrize("name", ["mps", "meta", "cuda:99", "gpu", "xpu", "", "cpu:x"])
def test_devices_that_are_not_here(name):
    with pytest.raises(UserError, match="is not available here"):
        choose_device(name)


def test_waits_for_the_device_that_computes(monkeypatch):
    waited = []
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda kind=kind: waited.append(kind))
    for kind in ("cpu", "mps", "cuda"):
        synchronize(torch.device(kind))
    assert waited == ["mps", "cuda"]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_models_and_batches_go_to_any_device(stage, tmp_path, monkeypatch, small_data):
    """The meta device computes shapes only, and refuses what is elsewhere, as a GPU does."""
    script = {"pretrain": train, "sft": sft, "dpo": dpo}[stage]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # PyTorch has no autocast for meta
    monkeypatch.setattr(torch, "autocast", lambda *kind, **options: contextlib.nullcontext())
    monkeypatch.setattr(script if stage == "pretrain" else sft, "choose_device", lambda name: torch.device("meta"))
    if stage == "pretrain":
        flags = dict(preset="tiny", dataset=str(small_data), block_size=16, n_layer=1, batch_size=2, eval_windows=2)
        task = train.Pretraining(*train.choose_settings(flags))
    else:
        write_tuning_data(tmp_path)
        given = dict(
            preset="tiny", dataset=str(tmp_path / "set"), init_from=str(tmp_path / "v2.pt"), batch_size=2, lora_rank=2
        )
        settings, checkpoint = sft.choose_settings(given, script.Settings, script.PRESETS, stage)
        task = (sft.SFT if stage == "sft" else dpo.DPO)(settings, checkpoint)
    assert {p.device.type for p in task.model.parameters()} == {"meta"}
    _, micro_batches = task.get_batch(1)
    values = task.loss(*(tensor.to("meta") for tensor in micro_batches[0]))
    assert all(value.device.type == "meta" and value.dtype == torch.float32 for value in values.values())


@pytest.mark.parametrize("running, given, policy", [(1, None, None), (99, None, "passive"), (99, "active", "active")])
def test_threads_wait_without_spinning_where_the_cores_are_busy(running, given, policy):
    code = (
        "import io, pathlib; pathlib.Path.read_text = lambda path: '9.9 9.9 9.9 %d/999 1'; import engine, os\n"
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    run = subprocess.run([sys.executable, "-c", code % running], cwd=ROOT, env=environment, capture_output=True)
    assert run.stdout.decode().strip() == str(policy)


@pytest.mark.parametrize("script", ["train", "sft", "dpo", "sample"])
def test_that_is_settled_before_torch_is_imported(script):
    """PyTorch reads it then. So the scripts import something of engine first, which does not import torch."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    first = next(line for line in source.splitlines() if line.startswith(("from engine", "import torch")))
    code = f"{first.partition('#')[0]}\nimport sys\nsys.exit('torch' in sys.modules or 'engine' not in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
