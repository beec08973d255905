"""A run's folder: its lock, its checkpoints, and how a run resumes from them.

    ckpt.pt             the latest state: model, optimizer, random state, settings, step
    ckpt-previous.pt    the one before, in case that is damaged
    best.pt             the model with the lowest validation loss so far
    tokenizer-*.json    the tokenizer of a model from elsewhere
    adapter.pt          its adapters alone, after tuning

A checkpoint is one dict of tensors and plain values. Several processes that have a sharded model write its tensors in
parts, all at once, into a folder parts-STEP that ckpt.pt names (torch.distributed.checkpoint, DCP); any number of
processes can read them. To merge them into one file:

    python -m engine.checkpoint out/pretrain
"""

import contextlib
import fnmatch
import itertools
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

from engine.settings import Parser, UserError, explain, is_allowed, run_script  # before torch, for Ctrl-C; isort: skip
import torch
from torch.overrides import TorchFunctionMode

from engine import parallel
from engine.device import rng_state, set_rng_state
from engine.files import atomic_write, locked

NEWEST, PREVIOUS, DAMAGED, BEST = "ckpt.pt", "ckpt-previous.pt", "ckpt-damaged.pt", "best.pt"
RUN_FILES = ("log.csv", BEST, "adapter.pt", "lambdas.csv", DAMAGED, PREVIOUS, NEWEST)  # bench.runs has lambdas.csv
TOKENIZER_FILE = f"tokenizer-{'[0-9a-f]' * 8}.json"  # of a model from elsewhere, see data/tokenizer.py
FORMAT = 1  # of checkpoints: one more whenever what is in them changes
DATA = ("tokenizer", "vocab_size", "block_size", "examples", "tokens", "crc32")  # what meta.json says of the data

# ---------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def run_folder(out_dir, resume=False):
    """Create the run folder, or on resume require it, and lock it. Yields whether to resume.

    With resume="auto", that depends on whether there is a checkpoint. Lock before reading, so that nobody saves a newer
    checkpoint in between. Raises UserError if the folder is missing, locked or cannot be written to. A run that leaves
    nothing in the folder, such as a failed start, leaves no new folder and no lock either.
    """
    out_dir = Path(out_dir)
    if resume is True and not out_dir.is_dir():
        raise UserError(f"there is no checkpoint {out_dir / NEWEST}: no such folder")
    if parallel.RANK:
        yield bool(parallel.all_reduce_max(0) if resume == "auto" else resume)  # as process 0 finds
        return
    lock = out_dir / "lock"
    try:
        created = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
        out_dir.mkdir(parents=True, exist_ok=True)
        before = {*out_dir.iterdir()}
    except OSError as error:
        raise UserError(f"cannot write to {explain(error)}") from error
    try:
        with locked(out_dir):
            if resume == "auto":
                has_checkpoint = (out_dir / NEWEST).exists() or (out_dir / PREVIOUS).exists()
                resume = parallel.all_reduce_max(has_checkpoint)
            yield bool(resume)
    finally:
        with contextlib.suppress(OSError):  # it may be gone, or another run's by now
            if {*out_dir.iterdir()} - before <= {lock}:
                if lock not in before:
                    lock.unlink(missing_ok=True)
                for path in created:
                    path.rmdir()


def archive_previous_run(out_dir):
    """Move the files of an earlier run in the folder aside, rather than overwrite them."""
    files = [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]
    files += [*part_folders(out_dir), *out_dir.glob(TOKENIZER_FILE)]
    if files:
        archive = next(path for n in itertools.count(1) if not (path := out_dir / f"earlier-{n}").exists())
        archive.mkdir()
        for path in files:
            path.rename(archive / path.name)
        hint = " (--resume would have continued it)" if (archive / NEWEST).exists() else ""
        print(f"the run that {out_dir} held is now in {archive}{hint}")


def part_folders(out_dir):
    """Return the folders of checkpoints in parts, with nothing else in them."""
    folders = [path for path in out_dir.glob("parts-*") if re.fullmatch(r"parts-\d+", path.name) and path.is_dir()]
    written = re.compile(r"\.metadata(\.tmp)?|__\d+_\d+\.distcp")
    return [path for path in folders if all(written.fullmatch(part.name) for part in path.iterdir())]


def remove_temporary_files(out_dir):
    """Remove the files that a killed run left half written."""
    for path in out_dir.glob("*.tmp"):
        name, _, process = path.stem.rpartition(".")
        if (name in RUN_FILES or fnmatch.fnmatch(name, TOKENIZER_FILE)) and process.isdecimal() and path.is_file():
            path.unlink()


# ---------------------------------------------------------------------------------------------------
# Files


class Damaged(UserError):
    """A checkpoint is missing or not whole."""


def save_checkpoint(path, previous=None, **contents):
    """Write a checkpoint. The one that it replaces is kept as `previous`, if that is given."""
    try:
        with atomic_write(path, previous) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **contents}, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"cannot save {path} ({reason.strerror}); what was saved before is still there") from error


def save_model(folder, state, config, encoding, **contents):
    """Write a model that no run has made to folder/best.pt, and its tokenizer beside it.

    Files of an earlier run there are moved aside.
    """
    folder, data = Path(folder), {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab}
    with run_folder(folder):
        archive_previous_run(folder)
        encoding.save(folder)
        save_checkpoint(folder / BEST, model=state, config=asdict(config), data=data, **contents)
    size = sum({tensor.data_ptr(): tensor.numel() for tensor in state.values()}.values())  # tied tensors once
    use = "completes text" if contents["stage"] == "pretrain" else "chats"
    print(f"{folder / BEST}: {config.attn}, {size / 1e6:.1f}M parameters, a context of {config.block_size}; it {use}")


def load_checkpoint(path):
    """Load what save_checkpoint() wrote, on the CPU, and its path. A run's folder stands for its best.pt.

    Raises UserError if it is missing, damaged or something else.
    """
    path = Path(path, BEST) if os.path.isdir(path) else path
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load ignores the checksums
                raise ValueError
        # Memory-mapped, it takes no memory of its own, even if several processes read it. Windows cannot replace such a
        # file, and PyTorch maps none whose name is not UTF-8.
        can_map = os.name != "nt" and str(path).encode(errors="ignore") == os.fsencode(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
        missing = [n for n in ("model", "config", "settings", "data") if not isinstance(checkpoint.get(n), dict)]
        missing += [n for n, kind in (("step", int), ("stage", str)) if not isinstance(checkpoint.get(n), kind)]
        if "parts" in checkpoint:
            if not (Path(path).parent / checkpoint["parts"]).is_dir():
                raise Damaged(f"{path} needs the folder {checkpoint['parts']} beside it")
            resolve_parts(checkpoint, Path(path).parent)
    except Damaged:
        raise
    except FileNotFoundError as error:
        raise Damaged(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle, key, attribute and runtime errors: torch.load has none of its own
        raise Damaged(f"{path} is damaged, or not a checkpoint ({type(error).__name__})") from error
    if missing:
        raise UserError(f"{path} is no checkpoint of this project: it lacks {', '.join(missing)}")
    if checkpoint.get("format", FORMAT) not in range(1, FORMAT + 1):
        raise UserError(f"{path} was written by a newer version of this project")
    return checkpoint | {"path": Path(path)}  # its tokenizer may be a file beside it


def load_init_from(path, attn=None):
    """Load the checkpoint that a new run starts from. Raises UserError if `attn` is given and not its model's."""
    checkpoint = load_checkpoint(path)
    saved = checkpoint["config"].get("attn")
    if attn not in (None, saved):
        raise UserError(f"the model in {path} has the attention {saved}, not {attn}")
    return checkpoint


def load_latest(out_dir):
    """Load the newest intact checkpoint of a locked run folder. Falls back to the previous one and reports it."""
    newest, previous = out_dir / NEWEST, out_dir / PREVIOUS
    if not newest.exists() and not previous.exists():
        raise UserError(f"there is no checkpoint {newest} to resume from; --out_dir names the run's folder")
    try:
        return load_checkpoint(newest)
    except Damaged as error:
        try:
            checkpoint = load_checkpoint(previous)
        except Damaged as older:
            hint = "--init_from best.pt would begin a new run with the weights there"
            raise Damaged(f"{error}, and {older}; {hint}") from older
        print(f"{error}; going on from the one before it, of step {checkpoint['step']}")
        if newest.exists():
            newest.replace(out_dir / DAMAGED)
        previous.rename(newest)  # the next checkpoint must not replace the only intact one
        return checkpoint


def find_furthest():
    """Find the best.pt of out/dpo, else out/sft, else out/pretrain, even where an earlier stage is newer."""
    for stage in ("dpo", "sft", "pretrain"):
        if (path := Path("out") / stage / BEST).exists():
            return path
    raise UserError("there is no model in out/ yet; python train.py makes one, or name another checkpoint")


class SkipInit(TorchFunctionMode):
    """Within a `with` block, leave new parameters as they are in memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":  # all of them pass their tensor by name
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


def build_loaded(build, checkpoint):
    """Return the model that build() makes, with a checkpoint's weights. Raises UserError as load_weights() does.

    No weights are drawn before, which would take a second for 150 million parameters.
    """
    with SkipInit():
        model = build()
    return load_weights(model, checkpoint)


def load_weights(model, checkpoint):
    """Load a checkpoint's weights into a model and return it. Raises UserError if they do not fit or are not finite."""
    if "parts" in checkpoint:
        folder = checkpoint["parts"].parent
        raise UserError(f"the checkpoint is in parts; python -m engine.checkpoint {folder} makes one file of it")
    try:
        model.load_state_dict(checkpoint["model"])
    except (AttributeError, RuntimeError, TypeError) as error:  # TypeError: names or tensors of another type
        is_tuned = any(".lora_" in str(name) for name in checkpoint["model"])
        hint = f": its adapters are apart, but {BEST} beside it holds the whole model" if is_tuned else ""
        raise UserError(f"the checkpoint's weights do not fit{hint}") from error
    if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
        raise UserError("the checkpoint's weights are not all finite: that run diverged")
    return model


def load_optimizer_state(optimizer, saved, sharded=False):
    """Copy a saved optimizer's state into an optimizer's, in place, but not its learning rates: the settings have them.

    Raises an exception (of any type) if it does not fit.
    """
    init_optimizer_state(optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            loaded = saved["state"][index][name]
            if not torch.is_tensor(value):
                state[name] = loaded
            elif loaded.shape != value.shape:
                raise ValueError
            elif sharded:
                parallel.scatter(loaded, value)
            else:
                value.copy_(loaded)


def check_fit(checkpoint, config, encoding):
    """Raise UserError unless a checkpoint has a model of this shape, for this tokenizer."""
    if (saved := checkpoint["data"].get("tokenizer")) != encoding.name:
        raise UserError(f"the checkpoint's tokenizer is {saved}, the data's {encoding.name}")
    if config.vocab_size < encoding.n_vocab:
        raise UserError(f"the checkpoint's vocabulary of {config.vocab_size} is smaller than its tokenizer's")
    try:  # as GPTConfig, since an older checkpoint lacks newer fields
        saved = asdict(type(config)(**{**checkpoint["config"], "attn_impl": config.attn_impl}))
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's config cannot be used: {error}") from error
    for name, value in asdict(config).items():
        if name not in ("attn_impl", "block_size") and saved[name] != value:  # no weight depends on these two
            raise UserError(f"the checkpoint's model has {name} {saved[name]}, but the settings say {value}")


def init_optimizer_state(optimizer):
    """Give an optimizer the state that it has after its first step, without changing the parameters.

    As in torch.distributed.checkpoint: gradients of zero, at a learning rate of zero.
    """
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if torch.is_tensor(group["lr"]) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr


# ---------------------------------------------------------------------------------------------------
# A run


def resume_settings(given, settings_class, stage):
    """Return the settings of the run in out_dir, overridden by the flags given with --resume, and its checkpoint."""
    out_dir = Path(given.get("out_dir", settings_class.out_dir))
    with parallel.main_process_first():  # it may have to fall back to the previous checkpoint
        checkpoint = load_latest(out_dir)
    if checkpoint["stage"] != stage:
        raise UserError(f"{out_dir / NEWEST} is a checkpoint of the stage {checkpoint['stage']}, not {stage}")
    saved = {f.name: f for f in fields(settings_class) if f.name in checkpoint["settings"]}
    for name, f in saved.items():
        saved[name] = checkpoint["settings"][name]
        if not is_allowed(f, saved[name]):
            raise UserError(f"{out_dir / NEWEST} is no checkpoint to resume from: its {name} cannot be used")
    for f in fields(settings_class):
        if not f.metadata["fixed"] or f.name not in given:
            continue
        begun, now = saved.get(f.name, f.default), given[f.name]
        same_file = f.name == "init_from" and os.path.realpath(now) == os.path.realpath(begun)
        if now != begun and not same_file and (f.name, now) != ("preset", "auto"):
            raise UserError(f"the run was begun with --{f.name} {begun or repr(begun)}, which --resume cannot change")
        given = {**given, f.name: begun}
    # The data were prepared when the run began, and the run folder may have been moved since.
    settings = settings_class(**{**saved, "source": "", "out_dir": str(out_dir), **given})
    return parallel.fit_micro_batch_size(settings, given), checkpoint


class Checkpointer:
    """Saves and restores a task and its optimizer in the folder of a run.

    `step` counts the steps taken before; `best_val_loss` is the lowest validation loss so far. A task has settings,
    stage, meta (of its data), encoding (its tokenizer) and model, and methods state_dict(), what ckpt.pt holds of the
    model, and best_state_dicts(), {file name: state_dict} of the files for the next stage.
    """

    def __init__(self, task, optimizer):
        if not isinstance(optimizer, torch.optim.Optimizer):  # found now rather than when the run is to be resumed
            raise TypeError(f"checkpoints need a torch.optim.Optimizer, not {type(optimizer).__name__}")
        self.task, self.optimizer, self.out_dir = task, optimizer, Path(task.settings.out_dir)
        self.step, self.best_val_loss, self.last_parts = 0, math.inf, None
        self.begins_as = {"stage": task.stage, "step": 0}  # what the model has learned before the first step

    def start(self, checkpoint=None):
        """Restore the run from its checkpoint, or make room for a new one, which may begin with a checkpoint."""
        if resume := self.task.settings.resume:
            self.restore(checkpoint)
        elif checkpoint:
            self.begins_as = {name: checkpoint[name] for name in self.begins_as}
        if parallel.RANK == 0:
            remove_temporary_files(self.out_dir)
            if not resume:
                archive_previous_run(self.out_dir)
            self.task.encoding.save(self.out_dir)
        else:
            seed = self.task.settings.seed + 1000 * self.step + parallel.RANK
            torch.manual_seed(seed)  # other dropout than process 0's

    def restore(self, checkpoint):
        """Restore step, optimizer and random state. The model has its weights already, unless they are in parts."""
        then, now = checkpoint["data"], self.task.meta  # which say as well where the data came from
        if changed := [name for name in DATA if then.get(name) != now.get(name)]:
            advice = f"({', '.join(changed)} differ); --init_from starts a new run on it"
            raise UserError(f"the data set is not the one that the run began with {advice}")
        try:
            self.step, self.best_val_loss = checkpoint["step"], self.saved_best_val_loss()
            if "parts" in checkpoint:  # they hold the model, too
                load_parts(checkpoint["parts"], self.task.model, self.optimizer)
            else:
                sharded = parallel.is_sharded(self.task.model)
                load_optimizer_state(self.optimizer, checkpoint["optimizer"], sharded)
            set_rng_state(checkpoint["rng"])
            if self.step < 1:
                raise ValueError
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise UserError(f"{self.out_dir / NEWEST} is no checkpoint to resume from ({cause})") from error
        self.last_parts = checkpoint.get("parts")
        if self.step >= self.task.settings.max_steps:
            print(f"the run in {self.out_dir} has {self.step} steps already; a higher --max_steps adds to it")

    def saved_best_val_loss(self):
        """Return the loss of best.pt, which may be newer than the last checkpoint, or infinity if it cannot be read."""
        try:
            return float(load_checkpoint(self.out_dir / BEST)["best_val_loss"])
        except (Damaged, KeyError, TypeError, ValueError):
            return math.inf

    def save_if_best(self, step, val_loss):
        """Save the model for the next stage if its loss is the lowest so far. Returns True if it is."""
        if not val_loss < self.best_val_loss:  # also if it is NaN
            return False
        self.best_val_loss = val_loss
        for name, state_dict in self.task.best_state_dicts().items():
            self.write(name, step, state_dict)
        return True

    def save(self, step):
        """Write ckpt.pt, the checkpoint to resume from, and keep the one before."""
        state = dict(rng=rng_state(), previous=self.out_dir / PREVIOUS)
        if not parallel.is_sharded(self.task.model):
            if parallel.RANK == 0:
                self.write(NEWEST, step, self.task.state_dict(), optimizer=self.optimizer.state_dict(), **state)
            return
        folder, optimizer = self.out_dir / f"parts-{step}", self.optimizer.state_dict() | {"state": {}}
        save_parts(folder, self.task.model, self.optimizer)
        self.write(NEWEST, step, {}, parts=folder.name, optimizer=optimizer, **state)
        if parallel.RANK == 0:
            for old in {*part_folders(self.out_dir)} - {folder, self.last_parts}:
                shutil.rmtree(old)
        self.last_parts = folder

    def write(self, name, step, state_dict, **more):
        """Write a checkpoint of the run, in process 0 alone."""
        if parallel.RANK:
            return
        task, learned = self.task, {"stage": self.task.stage, "step": step} if step else self.begins_as
        save_checkpoint(
            self.out_dir / name, model=state_dict, config=asdict(task.model.config), settings=asdict(task.settings),
            data=task.meta, best_val_loss=self.best_val_loss, **learned, **more,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Checkpoints in parts


def sharded_tensors(model, optimizer):
    """Return all tensors of a checkpoint by name, not copies: loading writes into them."""
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    return named


def save_parts(folder, model, optimizer):
    """Write the tensors of a sharded model and its optimizer into a folder. All processes must call it."""
    with distributed_checkpoint() as dcp:
        dcp.save(sharded_tensors(model, optimizer), checkpoint_id=folder)


def load_parts(folder, model, optimizer):
    """Read what save_parts() wrote into a sharded model and its optimizer. All processes must call it."""
    init_optimizer_state(optimizer)
    with distributed_checkpoint() as dcp:
        dcp.load(sharded_tensors(model, optimizer), checkpoint_id=folder)
    if parallel.all_reduce_max(not all(parallel.full_tensor(p).isfinite().all() for p in model.parameters())):
        raise UserError("the checkpoint's weights are not all finite: that run diverged")


def resolve_parts(checkpoint, out_dir):
    """Put the parts' folder into a checkpoint, or for a single process the tensors that it holds.

    Raises an exception (of any type) if the parts are not complete.
    """
    checkpoint["parts"] = folder = out_dir / checkpoint["parts"]
    metadata = read_metadata(folder).state_dict_metadata
    if parallel.WORLD_SIZE > 1:
        return
    named = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in metadata.items()}
    with distributed_checkpoint() as dcp, warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load(named, checkpoint_id=checkpoint.pop("parts"))
    for name, tensor in named.items():
        kind, name = name.split(".", 1)
        if kind == "model":
            checkpoint["model"][name] = tensor
        else:
            number, name = name.split(".")
            checkpoint["optimizer"]["state"].setdefault(int(number), {})[name] = tensor


class MetadataUnpickler(pickle.Unpickler):
    """Reads the .metadata of a folder of parts without running code: only classes that DCP writes there are known."""

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


def read_metadata(folder):
    """Read DCP's metadata of a folder of parts.

    Raises an exception (of any type) if it is missing, damaged or not written by DCP.
    """
    if not (folder / ".metadata").exists():  # which is written last
        raise ValueError("it is not complete")
    with open(folder / ".metadata", "rb") as file:
        metadata = MetadataUnpickler(file).load()
    if not all(re.fullmatch(r"__\d+_\d+\.distcp", part.relative_path) for part in metadata.storage_data.values()):
        raise ValueError("it names other files")
    for part in metadata.storage_data.values():
        path = folder / part.relative_path
        if not path.exists() or path.stat().st_size < part.offset + part.length:
            raise ValueError(f"{path.name} is not complete")
    return metadata


@contextlib.contextmanager
def distributed_checkpoint():
    """Yield torch.distributed.checkpoint (DCP). Its errors, which have the traces of all processes, become one line."""
    import torch.distributed.checkpoint as dcp  # here, because it takes a second or two

    try:
        yield dcp
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        reason = cause if isinstance(cause, OSError) else type(cause).__name__
        raise UserError(f"a checkpoint in parts failed: {reason}") from error


def main():
    parallel.refuse_torchrun()
    parser = Parser(__doc__, prog="python -m engine.checkpoint")
    parser.add_argument("out_dir", type=Path, help=f"a run's folder, whose {NEWEST} becomes one file")
    path = parser.parse_args().out_dir / NEWEST
    with run_folder(path.parent, resume=True):
        checkpoint = load_checkpoint(path)
        save_checkpoint(checkpoint.pop("path"), **checkpoint)
    print(f"{path} is one file now")


if __name__ == "__main__":
    run_script(main)
