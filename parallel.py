"""Training by several processes, one for each GPU, on PyTorch's own engine. One process alone needs nothing of it.

torchrun --standalone --nproc_per_node=2 train.py    # parameters, gradients and optimizer in parts (FSDP2)
torchrun --standalone --nproc_per_node=2 sft.py      # a copy of the model each; the adapters' gradients are added up
python parallel.py out/pretrain                      # make one file of a checkpoint that several processes wrote

The loss of a batch is a sum of shares, over micro-batches and over processes, and so is its gradient. Process 0 alone
prints and writes files; but a checkpoint is written in parts, by all (torch.distributed.checkpoint), which any number
of processes can read.
"""

import contextlib
import itertools
import os
import pickle
import re
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import Parser, UserError, run_script

if dist.is_available():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, distribute_tensor

# What torchrun tells each process; clusters set the same names for other programs.
RANK, LOCAL_RANK, PROCESSES = 0, 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, LOCAL_RANK, PROCESSES = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def refuse_several():
    """Raise UserError in a script that several processes would only run several times."""
    if PROCESSES > 1:
        raise UserError("this runs as one process, without torchrun")


@contextlib.contextmanager
def started():
    """Connect the processes, and silence all but the first; one that loses another raises UserError."""
    if PROCESSES == 1:
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


def highest(number):
    """The highest of all processes' numbers, for a decision that they must agree on. Waits for all."""
    if PROCESSES == 1:
        return number
    number = torch.tensor(int(number))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


@contextlib.contextmanager
def in_turn():
    """Process 0 goes first; the others follow once it is through, and find the files that it has written."""
    if RANK:
        highest(0)
    yield
    if not RANK:
        highest(0)


def add_up(shares, device, parameters=()):
    """The sums over all processes of {name: number or tensor}, and of the parameters' gradients, in place; those of
    sharded ones FSDP has added up already."""
    if PROCESSES == 1:
        return shares
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
    total = torch.stack([torch.as_tensor(share, dtype=torch.float64, device=device) for share in shares.values()])
    dist.all_reduce(total)
    return dict(zip(shares, total))


# ---------------------------------------------------------------------------------------------------
# A model in parts


def shard(build, device, compile=None):
    """The model that build() makes, with the values that it has in one process, in equal parts on all `device`s.

    Process 0 builds it whole on its CPU, the others its shapes only. Each layer is gathered when it is computed, and so
    are embedding and head together, in bf16 on CUDA; what is kept, added up and optimized is float32. `compile` is for
    the forward() of each layer and of the norm after them.
    """
    built = dict(tensors_of(build())) if RANK == 0 else {}
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # that weights loaded there have no effect
        model = build()
    mesh = dist.init_device_mesh(device.type, (PROCESSES,))
    dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" else {}
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)  # the rotary tables stay float32
    for module in (*model.layers, model.norm) if compile else ():
        module.forward = compile(module.forward)
    for module in (*model.layers, model):
        # A layer that keeps its activations for the backward pass can stay gathered until then as well.
        release = getattr(module, "recompute", False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=release)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(module, "lambdas" if module is model else "lam")
    model.to_empty(device=device)
    for name, tensor in tensors_of(model):
        scatter(built.get(name), tensor)
    return model


def tensors_of(model):
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def scatter(value, tensor):
    """Put process 0's tensor `value` into `tensor` on all: into each its part, if that is sharded."""
    like = dict(device=tensor.device, dtype=tensor.dtype)
    source = torch.empty(tensor.shape, **like) if RANK else value.detach().to(**like)
    if isinstance(tensor, DTensor):
        tensor.copy_(distribute_tensor(source, tensor.device_mesh, tensor.placements))
    else:
        dist.broadcast(source, 0)
        tensor.copy_(source)


def reduce_once(model, micro_batches):
    """Let the gradients of so many micro-batches add up on each GPU before they are reduced, and the layers stay
    gathered until then: less traffic, for the memory of a whole model in bf16 and its gradients in float32."""
    done = itertools.count(1)

    def before_forward(*_):
        if torch.is_grad_enabled():
            is_last = next(done) % micro_batches == 0
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)

    model.register_forward_pre_hook(before_forward)


def whole(tensor):
    """A tensor that may be in parts, in one piece. All processes have to ask for it."""
    return tensor.full_tensor() if PROCESSES > 1 and isinstance(tensor, DTensor) else tensor


def gather(tensors):
    """{name: whole tensor} on process 0's CPU, from {name: tensor in parts}; the other processes get nothing."""
    if PROCESSES == 1:
        return tensors
    pieces = ((name, whole(tensor)) for name, tensor in tensors.items())  # one at a time is whole on the GPU
    return {name: tensor.cpu() for name, tensor in pieces if RANK == 0}


# ---------------------------------------------------------------------------------------------------
# Checkpoints in parts: a folder beside ckpt.pt, which holds all else and names it


def parts(model, optimizer):
    """All tensors to save, by name, in place: loading writes into them."""
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    return named


class Description(pickle.Unpickler):
    """Reads the .metadata of a folder of parts, but unlike DCP makes nothing of it that DCP does not write there."""

    known = {
        "torch": "Size float32 bfloat16", "torch.serialization": "_get_layout",
        "torch.distributed.checkpoint.metadata":
            "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex StorageMeta "
            "_MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "pathlib": "PosixPath WindowsPath", "pathlib._local": "PosixPath WindowsPath",
    }  # fmt: skip

    def find_class(self, module, name):
        if name not in self.known.get(module, "").split():
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


def describe(folder):
    """What DCP says of a folder of parts; any error if it is missing, damaged or not of DCP's own making."""
    if not (folder / ".metadata").exists():  # which is written last
        raise ValueError("it is not complete")
    with open(folder / ".metadata", "rb") as file:
        about = Description(file).load()
    if not all(re.fullmatch(r"__\d+_\d+\.distcp", part.relative_path) for part in about.storage_data.values()):
        raise ValueError("it names other files")
    for part in about.storage_data.values():
        path = folder / part.relative_path
        if not path.exists() or path.stat().st_size < part.offset + part.length:
            raise ValueError(f"{path.name} is not complete")
    return about


@contextlib.contextmanager
def one_line():
    """Turn what DCP says of a failure, with the traces of all processes, into its first cause."""
    try:
        yield
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        reason = cause if isinstance(cause, OSError) else type(cause).__name__
        raise UserError(f"a checkpoint in parts failed: {reason}") from error


def save_parts(folder, model, optimizer):
    with one_line():
        dcp.save(parts(model, optimizer), checkpoint_id=folder)


def restore(model, optimizer, checkpoint):
    """Go on from a checkpoint: the optimizer's state, and if it is in parts, the weights too. Raises some error, in all
    processes, if it does not fit."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), device=p.device)
            optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    if "parts" in checkpoint:
        with one_line():
            return dcp.load(parts(model, optimizer), checkpoint_id=checkpoint["parts"])
    for number, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            saved = checkpoint["optimizer"]["state"][number][name]
            if saved.shape != tensor.shape:
                raise ValueError
            scatter(saved, tensor)


def complete(checkpoint, out_dir):
    """Say where the parts of a checkpoint are, and for one process read them as a whole; any error if they are not."""
    checkpoint["parts"] = folder = out_dir / checkpoint["parts"]
    about = describe(folder).state_dict_metadata
    if PROCESSES > 1:
        return
    named = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in about.items()}
    with one_line(), warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load(named, checkpoint_id=checkpoint.pop("parts"))
    for name, tensor in named.items():
        kind, name = name.split(".", 1)
        if kind == "model":
            checkpoint["model"][name] = tensor
        else:
            number, name = name.split(".")
            checkpoint["optimizer"]["state"].setdefault(int(number), {})[name] = tensor


def main():
    refuse_several()
    parser = Parser(__doc__)
    parser.add_argument("out_dir", type=Path, help="a run's folder, whose ckpt.pt becomes one file")
    path = parser.parse_args().out_dir / train.NEWEST
    with train.locked(path.parent, make=False):
        train.save_checkpoint(path, **train.load_checkpoint(path))
    print(f"{path} is one file now")


if __name__ == "__main__":
    import train  # which imports this module

    run_script(main)
