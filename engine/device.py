"""The device: choosing it, its precision and peak, its random state, steps without waiting, advice on full memory."""

import contextlib
import re

import torch

from engine import parallel
from engine.settings import UserError

# Dense bf16 TFLOP/s from the vendors' data sheets; the first entry whose words are in the GPU's name counts.
PEAK_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "RTX A6000": 155, "A40": 150, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def choose_device(name):
    """Return the torch.device for a flag: auto, cpu, cuda, cuda:1, mps, ... Raises UserError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and parallel.WORLD_SIZE > 1:
        name = f"cuda:{parallel.LOCAL_RANK}"
    try:
        device = torch.empty(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} is not available here") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # products that autocast leaves in float32 may use TF32
    return device


def choose_preset(preset, checkpoint=None):
    """Return the preset. For `auto`, choose by a checkpoint's tokenizer and size, or by the machine, and print why."""
    if preset != "auto":
        return preset
    if checkpoint:
        tokenizer = checkpoint["data"].get("tokenizer")
        # Tied weights have one address and count once.
        size = sum({t.data_ptr(): t.numel() for t in checkpoint["model"].values() if torch.is_tensor(t)}.values())
        preset = "tiny" if tokenizer == "bytes" else "ldiff" if size < 6e8 else "1b" if size < 4e9 else "10b"
        why = f"the checkpoint has the tokenizer {tokenizer} and {size / 1e6:,.1f}M parameters"
    else:
        preset, why = ("ldiff", "there is a") if torch.cuda.is_available() else ("tiny", "there is no")
        why += " CUDA GPU"
    print(f"preset: {preset}, since {why}; --preset chooses another")
    return preset


def autocast(device):
    """Return a context that computes in bf16 on CUDA and in float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def synchronize(device):
    """Wait until the GPU has done what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_flops(device):
    """Return the bf16 peak of all GPUs in FLOP/s, or None for an unknown GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "Laptop" in name:  # slower than the desktop GPU of the same name
        return None
    peaks = (1e12 * peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name))
    return next((peak * parallel.WORLD_SIZE for peak in peaks), None)


def rng_state():
    """Return the state of PyTorch's random number generators, for a checkpoint."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    """Restore what rng_state() returned."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():  # a run may go on with another number of GPUs
        torch.cuda.set_rng_state_all(state["cuda"])


def step_unless(skipped, optimizer):
    """Take an optimizer's step, but leave weights and optimizer as they are if `skipped`, a tensor, is True.

    Fused Adam does nothing where found_inf is 1, but on mps. With other optimizers, the CPU waits for the GPU to know.
    """
    if isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"] and skipped.device.type != "mps":
        optimizer.found_inf = skipped.float()
        optimizer.step()
    elif not skipped:
        optimizer.step()


@contextlib.contextmanager
def oom_advice(settings):
    """Turn a full GPU into a UserError that names the micro-batch size to try."""
    try:
        yield
    except RuntimeError as error:
        cause = error
        while cause and not isinstance(cause, torch.OutOfMemoryError):  # recording a CUDA graph hides it
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        smaller = range(1, settings.micro_batch_size)
        sizes = [n for n in smaller if settings.batch_size % (n * parallel.WORLD_SIZE) == 0]
        advice = f"try --micro_batch_size {sizes[-1]}" if sizes else "not even one sequence fits: try a smaller model"
        raise UserError(f"the GPU's memory is full; {advice}") from error
