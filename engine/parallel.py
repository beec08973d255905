"""Training by several processes, one a GPU, on PyTorch's own engine. A single process needs nothing of it.

    torchrun --standalone --nproc_per_node=2 train.py    # parameters, gradients and optimizer are sharded (FSDP2)
    torchrun --standalone --nproc_per_node=2 sft.py      # a copy of the model each; the adapters' gradients are summed

The loss of a batch is a sum of shares, over micro-batches and over processes, and so is its gradient. Process 0 alone
prints and writes files, except for checkpoints in parts (engine/checkpoint.py).
"""

import contextlib
import itertools
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.settings import UserError

# What torchrun tells each process. Clusters set the same names for other programs, so they count under torchrun alone.
RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
if "TORCHELASTIC_RUN_ID" in os.environ and all(number.isdecimal() for number in numbers):
    RANK, LOCAL_RANK, WORLD_SIZE = map(int, numbers)


def refuse_torchrun():
    """Raise UserError in a script that several processes would only run several times."""
    if WORLD_SIZE > 1:
        raise UserError("this runs as one process, without torchrun")


@contextlib.contextmanager
def process_group():
    """Connect the processes, and silence all but process 0. Raises UserError if another process has ended."""
    if WORLD_SIZE == 1:
        yield
        return
    if not dist.is_available():
        raise UserError("this PyTorch has no torch.distributed; run one process, without torchrun")
    if RANK:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))  # process 0 may have data to prepare
    try:
        yield
    except RuntimeError as error:
        if "by peer" not in str(error):  # "Connection closed by peer", or reset
            raise
        raise UserError("another process has ended, see its error") from error
    dist.destroy_process_group()


def all_reduce_max(number):
    """Return the highest of all processes' numbers, for a decision that they must agree on. Waits for all."""
    if WORLD_SIZE == 1:
        return number
    number = torch.tensor(int(number))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def all_reduce_sum(values, device):
    """Return the sums over all processes of {name: number or tensor}."""
    if WORLD_SIZE == 1:
        return values
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, total))


def all_reduce_gradients(parameters):
    """Sum the parameters' gradients over all processes, in place.

    FSDP has summed those of sharded parameters in the backward pass.
    """
    for parameter in parameters if WORLD_SIZE > 1 else ():
        if not is_part(parameter):
            dist.all_reduce(parameter.grad)


@contextlib.contextmanager
def main_process_first():
    """Let process 0 run the block before the others, which then find the files that it has written."""
    if RANK:
        all_reduce_max(0)
    yield
    if not RANK:
        all_reduce_max(0)


def fit_micro_batch_size(settings, given):
    """Unless it was given, lower micro_batch_size to what divides a process's part of the batch. Returns settings."""
    part = settings.batch_size // WORLD_SIZE
    if "micro_batch_size" not in given and part:
        sizes = range(1, min(settings.micro_batch_size, part) + 1)
        settings.micro_batch_size = max(size for size in sizes if part % size == 0)
    return settings


@contextlib.contextmanager
def stop_signals():
    """Yield a list to which SIGINT and SIGTERM are appended, so that a run can save before it ends.

    The second signal ends the program at once.
    """
    received, previous = [], {}

    def receive(number, frame):
        received.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the reader of a pipe may have got the signal, too
            os.write(1, b"\nsaving after this step; once more quits at once\n")  # print() cannot interrupt itself

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_batch_size(settings):
    """Lower micro_batch_size to a process's part of the batch; raise UserError if it does not divide the batch."""
    settings.micro_batch_size = min(settings.micro_batch_size, max(1, settings.batch_size // WORLD_SIZE))
    if settings.batch_size % (settings.micro_batch_size * WORLD_SIZE):
        size = f"{settings.micro_batch_size}" + (f" times {WORLD_SIZE} processes" if WORLD_SIZE > 1 else "")
        raise UserError(f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {size}")


# ---------------------------------------------------------------------------------------------------
# Sharded models


def build_on_device(build, device):
    """Build a model on its device, which draws random numbers quickly if it is a GPU. Several processes shard it.

    Each process builds the whole model before it keeps its part, at 4 bytes a parameter for a moment. All draw the same
    numbers.
    """
    with torch.device(device if device.type == "cuda" else "cpu"):
        model = build()
    model = model.to(device)
    return shard(model) if WORLD_SIZE > 1 else model


def shard(model):
    """Shard a model that all processes have over them (FSDP2). Returns the model.

    Each layer is gathered while it computes, and so are embedding and head together, in bf16 on CUDA; what is kept,
    summed and optimized is float32.
    """
    # Here, and not at the top, because it takes a second or two, for which sample.py and convert.py need not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    kind = model.rope_cos.device.type
    mesh = dist.init_device_mesh(kind, (WORLD_SIZE,))
    dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if kind == "cuda" else {}
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)  # the rotary tables stay float32
    for module in (*model.layers, model):
        # A layer that keeps its activations for the backward pass can stay gathered until then as well.
        reshard = getattr(module, "activation_checkpointing", False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(module, "lambdas" if module is model else "lam")
    return model


@torch.no_grad()
def scatter(value, tensor):
    """Copy process 0's tensor `value` into `tensor` on all processes, into each its part if that is sharded."""
    like = dict(device=tensor.device, dtype=tensor.dtype)
    source = torch.empty(tensor.shape, **like) if RANK else value.detach().to(**like)
    if is_part(tensor):
        from torch.distributed.tensor import distribute_tensor

        tensor.copy_(distribute_tensor(source, tensor.device_mesh, tensor.placements))
    else:
        dist.broadcast(source, 0)
        tensor.copy_(source)


def sync_grads_on_last_micro_batch(model, settings):
    """Let a sharded model accumulate the gradients of a batch on each GPU before they are reduced.

    Layers stay gathered meanwhile. That is less traffic, for the memory of a whole model in bf16 and its gradients in
    float32. Activation checkpointing says that memory is short: then they are reduced after each micro-batch.
    """
    if WORLD_SIZE == 1 or settings.activation_checkpointing:
        return
    micro_batches = settings.batch_size // (settings.micro_batch_size * WORLD_SIZE)
    done = itertools.count(1)

    def before_forward(*_):
        if torch.is_grad_enabled():
            is_last = next(done) % micro_batches == 0
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)

    model.register_forward_pre_hook(before_forward)


def is_sharded(model):
    """Return True if each process has a part of the model's parameters only."""
    if WORLD_SIZE == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)  # its parameters may be gathered at the moment


def is_part(tensor):
    """Return True if each process has a part of the tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor):
    """Return the whole of a tensor that may be sharded. All processes must call it."""
    return tensor.full_tensor() if WORLD_SIZE > 1 and is_part(tensor) else tensor


def gather(tensors):
    """Gather {name: sharded tensor} -> {name: whole tensor} on process 0's CPU, {} on the others."""
    if WORLD_SIZE == 1:
        return tensors
    whole = ((name, full_tensor(tensor)) for name, tensor in tensors.items())  # one at a time on the GPU
    return {name: tensor.cpu() for name, tensor in whole if RANK == 0}
