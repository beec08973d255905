"""Hugging Face's folders: config.json, weights in safetensors, tokenizer.json, a chat template.

What the formats of models mean is in convert.py; this reads and writes their files.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import torch

from engine.settings import UserError

SMALL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_folder(source, files):
    """Return `source` if it is a folder, else download files of the model of that name on the hub -> their folder."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise UserError(f"there is no folder {source}; import takes a Hugging Face folder, or a name on the hub")
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=files))
    except Exception as error:  # the hub's client, its HTTP library and the operating system each raise their own
        reason = f"the hub has no such model, or cannot be reached ({type(error).__name__})"
        raise UserError(f"{source} is no folder, and {reason}") from error


def read_json(path):
    """Read a file with one JSON object. Raises UserError if it is missing or something else."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents, dict):
            raise ValueError
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is damaged: it is no JSON object") from error
    return contents


def read_fields(given, names, allowed, optional):
    """Read the contents of a config.json -> {our name: value} for `names`, {our name: theirs}.

    Raises UserError if RoPE is scaled, if an entry has a value that is not among `allowed`, {their name: values}, of
    which the first is assumed without an entry, or if a field that is not `optional` is missing or of another type.
    """
    ropes = [given.get(name) or {} for name in ("rope_scaling", "rope_parameters")]  # older and newer configs
    for rope in ropes:
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"this model has no RoPE scaling, and config.json has {rope}")
    given = given | ropes[1] | ropes[0]  # newer ones have rope_theta in there; transformers reads the older entry first
    for name, values in allowed.items():
        if (value := given.get(name, values[0])) not in values:
            raise UserError(f"config.json has {name} {value}, and this model does not")
    fields = {ours: given[theirs] for ours, theirs in names.items() if given.get(theirs) is not None}
    for ours, value in fields.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (isinstance(value, bool) if ours == "tie_embeddings" else is_number):
            raise UserError(f"config.json cannot be used: its {names[ours]} is {value!r}")
    if missing := [names[name] for name in names if name not in fields and name not in optional]:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    return fields


def tokenizer_config(bos, eos, length, chat_template):
    """Return the contents of a tokenizer_config.json, for texts of up to `length` tokens between `bos` and `eos`."""
    tokens = dict(bos_token=bos, eos_token=eos, pad_token=bos)
    kind = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    return {**kind, **tokens, "model_max_length": length, "chat_template": chat_template}


@contextlib.contextmanager
def needs_safetensors():
    """Turn an ImportError into a UserError: requirements.txt does not have the package."""
    try:
        yield
    except ImportError as error:
        raise UserError("a model from elsewhere needs two packages: pip install safetensors tokenizers") from error


def read_safetensors(folder):
    """Read model.safetensors, or the shards of model.safetensors.index.json -> {name: float32 tensor}."""
    with needs_safetensors():
        import safetensors.torch
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():  # as in transformers
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(f"{index} is damaged: its weight_map names no files of this folder")
        files = {*names}
    tensors = {}
    for path in (folder / name for name in sorted(files)):
        try:
            loaded = safetensors.torch.load_file(path)
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}") from error
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if quantized := [name for name, tensor in loaded.items() if tensor.dtype not in DTYPES]:
            raise UserError(f"{path} has weights of another type than 16- and 32-bit floats, such as {quantized[0]}")
        tensors |= {name: tensor.float() for name, tensor in loaded.items()}
    return tensors


def read_chat_template(folder):
    """Return the chat template of a model as text, "" if it has none."""
    if (path := folder / "chat_template.jinja").exists():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{path} is not UTF-8 text") from error
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else ""
    if isinstance(template, list):  # several, by name
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def shapes(build):
    """Return {name: shape} of the state_dict of the model that build() makes, without memory for it.

    Raises UserError if config.json has sizes beyond all numbers.
    """
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in build().state_dict().items()}
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"config.json cannot be used: {error}") from error


def tie(tensors, name, like):
    """Return {name: tensor} with `name` as another name of the tensor `like`. Raises UserError if it is another one."""
    if name not in tensors and like in tensors:
        return tensors | {name: tensors[like]}
    if name in tensors and like in tensors and not torch.equal(tensors[name], tensors[like]):
        raise UserError(f"config.json ties {name} to {like}, and the weights have another {name}")
    return tensors


def check_tensors(tensors, shapes):
    """Raise UserError unless {name: tensor} are finite and have just these {name: shape}."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"the weights lack {name}")
        if tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise UserError(f"{name} has the shape {found}, by config.json it should have {tuple(shape)}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{name} is not finite")
    unknown = [name for name in tensors.keys() - shapes.keys() if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise UserError(f"this model has no place for {', '.join(sorted(unknown)[:3])}")


def write_folder(folder, tensors, contents):
    """Write {name: tensor} as safetensors, and {file name: JSON} -> a new folder, which appears when it is complete.

    Raises UserError if it has files already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already, and nothing there is overwritten; name another folder")
    temporary = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with needs_safetensors():
            huggingface_hub.save_torch_state_dict(tensors, temporary)  # beyond 5 GB as shards and their index
        for name, value in contents.items():
            text = json.dumps(value, indent=1, ensure_ascii=False)
            (temporary / name).write_text(text + "\n", encoding="utf-8")
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
