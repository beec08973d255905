"""Wrong input to every script: one line on stderr that says what is wrong, exit code 2, and no traceback."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from engine import files, parallel
from engine.checkpoint import FORMAT
from engine.settings import run_script

MODULES = {name: name for name in ("train", "sft", "dpo", "sample")}
MODULES |= {name: f"data.{name}.prepare" for name in ("wikitext2", "slimorca", "orca_dpo_pairs", "tiny", "fineweb_edu")}
MODULES |= {name: f"bench.{name}" for name in ("attention", "decode", "finetune", "pretrain", "runs", "table2")}
MODULES |= {"checkpoint": "engine.checkpoint"}

# What every command begins with; flags that come later win. The folder `home` has what they name.
SHAPE = "--block_size 96 --n_layer 1 --n_embd 16 --n_head 2 --head_dim 8 --n_inner 16"
TUNING = "--device cpu --dataset ./mine --max_steps 1 --batch_size 4 --lora_rank 4 --eval_examples 2"
FIRST = {
    "train": f"--device cpu --dataset ./mine --max_steps 1 --batch_size 4 --eval_windows 1 {SHAPE}",
    "sft": TUNING,
    "dpo": TUNING,
    "sample": "--device cpu --max_new_tokens 1",
    **dict.fromkeys(("wikitext2", "slimorca", "orca_dpo_pairs"), "--tokenizer bytes --out_dir new"),
}
TALK = '{"conversations": [{"from": "human", "value": "Hi %d"}, {"from": "gpt", "value": "Hello"}]}\n'
PAIR = '{"system": "", "question": "Hi %d", "chosen": "Hello", "rejected": "Go away"}\n'

# ------------------------------------------------------------------------------------- what is set up


def write(path, content):
    """A function that writes text or bytes."""

    def setup():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return setup


def cut(path, change):
    """A function that makes something else of a file's bytes."""
    return lambda: Path(path).write_bytes(change(Path(path).read_bytes()))


def meta(path="mine", **changes):
    """A function that changes entries of a meta.json."""
    path = Path(path) / "meta.json"
    return lambda: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def counts(path, **changes):
    """A function that changes a meta.json's numbers of the training split."""
    path = Path(path) / "meta.json"

    def setup():
        content = json.loads(path.read_text())
        for name, value in changes.items():
            content[name]["train"] = value
        path.write_text(json.dumps(content))

    return setup


def checkpoint(path, part="", to="", **changes):
    """A function that changes entries of a checkpoint, or of the dict `part` in it, and saves it there or as `to`."""

    def setup():
        content = torch.load(path, weights_only=True)
        content.update({part: content[part] | changes} if part else changes)
        Path(to or path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, to or path)

    return setup


def copy(source, target):
    def setup():
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    return setup


def not_finite(path):
    """A function that makes the weights of a checkpoint's model NaN."""

    def setup():
        content = torch.load(path, weights_only=True)
        for weight in content["model"].values():
            weight.fill_(float("nan"))
        torch.save(content, path)

    return setup


def momentum(change):
    """A function that changes the first matrix's momentum in a checkpoint to resume from."""

    def setup():
        content = torch.load("out/pretrain/ckpt.pt", weights_only=True)
        state = content["optimizer"]["state"][0]
        state["exp_avg"] = change(state["exp_avg"])
        torch.save(content, "out/pretrain/ckpt.pt")

    return setup


class Harm:
    """Whoever unpickles it makes a folder."""

    def __reduce__(self):
        return (os.mkdir, ("harm",))


def locked(folder):
    """A function that holds the lock of a run's folder for as long as what it returns is kept."""

    def setup():
        lock = contextlib.ExitStack()
        lock.enter_context(files.locked(Path(folder)))
        return lock

    return setup


# ------------------------------------------------------------------------------------- the table
# What is wrong, what is set up, the command, and the message (a regular expression).

FLAGS = [
    (
        "unknown flag",
        None,
        "train --learning_rat 1",
        "unrecognized arguments: --learning_rat 1; --help lists the flags",
    ),
    ("unknown flag of sample", None, "sample --x", "unrecognized arguments: --x"),
    ("unknown flag of a prepare.py", None, "tiny --x", "unrecognized arguments: --x"),
    ("unknown flag of a benchmark", None, "attention --x", "unrecognized arguments: --x"),
    ("unknown flag of two lines", None, "train --x='a\nb'", "unrecognized arguments: --x=a b;"),
    ("no flag", None, "sft base.pt", "unrecognized arguments: base.pt"),
    ("flag without its value", None, "train --seed", "argument --seed: expected one argument"),
    ("value for a switch", None, "sample --chat=yes", "argument --chat/--no-chat: ignored explicit argument 'yes'"),
    ("unknown preset", None, "train --preset huge", "argument --preset: invalid choice: 'huge' .*tiny"),
    ("unknown attention", None, "train --attn v3", "argument --attn: invalid choice: 'v3' .*v2"),
    ("unknown kernel", None, "sample --attn_impl fast", "argument --attn_impl: invalid choice: 'fast'"),
    ("unknown tokenizer", None, "train --tokenizer gpt3", "no tokenizer is called 'gpt3'; there are gpt2 and bytes"),
    ("flash_attn without a GPU", None, "train --attn_impl flash_attn", "flash_attn needs a CUDA GPU"),
    ("flash_attn without a GPU to talk", None, "sample --attn_impl flash_attn", "flash_attn needs a CUDA GPU"),
    ("unknown device", None, "train --device gpu9", "--device gpu9 is not available here"),
    ("device that is not there", None, "sample --device cuda:99", "--device cuda:99 is not available here"),
    ("device without values", None, "dpo --device meta", "--device meta is not available here"),
    ("no device", None, "sft --device ''", "--device  is not available here"),
    ("device of two lines", None, "train --device 'a\nb'", "--device a b is not available here"),
    ("batch in unequal parts", None, "train --batch_size 6 --micro_batch_size 4", "6 is not a multiple of .* 4"),
    ("batch of SFT in unequal parts", None, "sft --batch_size 6 --micro_batch_size 4", "6 is not a multiple of .* 4"),
    ("a rate beyond all numbers", None, "train --learning_rate 1e30", "the least is 0, the most 9223372036854775807"),
    ("odd head_dim", None, "train --head_dim 15", "head_dim must be even, not 15"),
    ("key heads that do not fit", None, "train --n_head 3 --n_kv_head 2", "n_head 3 is not a multiple of n_kv_head 2"),
    ("odd heads of V1", None, "train --attn v1 --n_head 3", "n_kv_head must be even, not 3"),
    ("more memory than there is", None, "train --n_inner 9000000000000", "the memory is full"),
    ("a width beyond all numbers", None, "train --n_embd 9000000000000000000", "the memory is full"),
    ("a batch beyond the memory", None, "train --batch_size 9000000000000000000", "the memory is full"),
    ("LoRA rank above the width", None, "sft --lora_rank 17", r"LoRA rank 17 does not fit a matrix of \(\d+, 16\)"),
    ("another attention", None, "sft --attn v1", "the model in out/pretrain/best.pt has the attention v2, not v1"),
    (
        "another attention to pretrain",
        None,
        "train --attn v1 --init_from out/pretrain/best.pt",
        "the model in out/pretrain/best.pt has the attention v2, not v1",
    ),
    (
        "batch larger than the data",
        None,
        "dpo --batch_size 99 --micro_batch_size 99",
        "has 38 examples, fewer than a batch of 99",
    ),
]

RUNS = [
    ("out_dir that is a file", write("file", ""), "train --out_dir file", "cannot write to file: File exists"),
    ("out_dir in a file", write("file", ""), "sft --out_dir file/run", "cannot write to file/run: Not a directory"),
    ("two runs in a folder", locked("out/pretrain"), "train",
     "another run is writing to out/pretrain; --out_dir names"),
    ("two runs of SFT", locked("out/sft"), "sft", "another run is writing to out/sft"),
    ("two resumed runs", locked("out/sft"), "sft --resume --max_steps 9", "another run is writing to out/sft"),
    ("nothing to resume", None, "train --resume --out_dir new", "there is no checkpoint new/ckpt.pt: no such folder"),
    ("a folder without a run to resume", lambda: os.mkdir("new"), "train --resume --out_dir new",
     "there is no checkpoint new/ckpt.pt to resume from"),
    ("nothing to resume in SFT", None, "sft --resume --out_dir new", "no checkpoint new/ckpt.pt: no such folder"),
    ("nothing to resume in DPO", None, "dpo --resume", "there is no checkpoint out/dpo/ckpt.pt: no such folder"),
    ("resume with a preset", None, "train --resume --preset ldiff", "begun with --preset tiny, which --resume cannot"),
    ("resume with a model", None, "sft --resume --init_from x.pt", "begun with --init_from out/pretrain/best"),
    ("resume with another batch", None, "sft --resume --batch_size 2", "begun with --batch_size 4, which --resume"),
    ("resume in another order", None, "sft --resume --seed 2", "begun with --seed 1, which --resume cannot"),
    ("resume of another stage", None, "dpo --resume --out_dir out/sft", "a checkpoint of the stage sft, not dpo"),
    ("resume of the stage before", None, "train --resume --out_dir out/sft", "of the stage sft, not pretrain"),
    ("resume with another rank", None, "sft --resume --lora_rank 8", "begun with --lora_rank 4, which --resume cannot"),
    ("resume with another context", None, "train --resume --block_size 64", "begun with --block_size 96, which"),
    ("resume with other validation", None, "train --resume --eval_windows 2", "begun with --eval_windows 1, which"),
    ("resume with other examples", None, "sft --resume --eval_examples 1", "begun with --eval_examples 2, which"),
    ("resume with another shape", None, "train --resume --n_embd 32", "has n_embd 16, but the settings say 32"),
    ("resume with other data", meta(crc32={}), "train --resume --max_steps 9",
     "the data set is not the one that the run"),
    ("resume from a model", copy("out/pretrain/best.pt", "out/pretrain/ckpt.pt"), "train --resume --max_steps 9",
     "out/pretrain/ckpt.pt is no checkpoint to resume from"),
    ("resume without random numbers", checkpoint("out/pretrain/ckpt.pt", rng={"cpu": torch.zeros(3), "cuda": []}),
     "train --resume --max_steps 9", "out/pretrain/ckpt.pt is no checkpoint to resume from"),
    ("resume with moments in words", checkpoint("out/sft/ckpt.pt", optimizer="fast"),
     "sft --resume --max_steps 9", "out/sft/ckpt.pt is no checkpoint to resume from"),
    ("resume with moments of another shape", momentum(lambda m: m[:2]), "train --resume --max_steps 9",
     "out/pretrain/ckpt.pt is no checkpoint to resume from"),
    ("resume with a moment in words", momentum(lambda m: "fast"), "train --resume --max_steps 9",
     "out/pretrain/ckpt.pt is no checkpoint to resume from"),
    ("resume without moments", checkpoint("out/pretrain/ckpt.pt", "optimizer", state={}),
     "train --resume --max_steps 9", "out/pretrain/ckpt.pt is no checkpoint to resume from"),
    ("resume before the first step", checkpoint("out/pretrain/ckpt.pt", step=-3), "train --resume --max_steps 9",
     "out/pretrain/ckpt.pt is no checkpoint to resume from"),
    ("resume with a batch below nothing", checkpoint("out/sft/ckpt.pt", "settings", batch_size=-4),
     "sft --resume --max_steps 9", "out/sft/ckpt.pt is no checkpoint to resume from: its batch_size cannot be used"),
    ("resume with a batch of yes", checkpoint("out/sft/ckpt.pt", "settings", batch_size=True),
     "sft --resume --max_steps 9", "out/sft/ckpt.pt is no checkpoint to resume from: its batch_size cannot be used"),
    ("resume with no rate", checkpoint("out/pretrain/ckpt.pt", "settings", learning_rate=float("nan")),
     "train --resume --max_steps 9", "is no checkpoint to resume from: its learning_rate cannot be used"),
    ("resume with an unknown preset", checkpoint("out/pretrain/ckpt.pt", "settings", preset="huge"),
     "train --resume --max_steps 9", "is no checkpoint to resume from: its preset cannot be used"),
]  # fmt: skip

CHECKPOINTS = [
    ("no model in out/", lambda: shutil.rmtree("out"), "sample",
     "there is no model in out/ yet; python train.py makes"),
    ("no stage before", lambda: shutil.rmtree("out"), "dpo", "there is no out/sft/best.pt yet: train the stage before"),
    ("no such checkpoint", None, "train --init_from nosuch.pt", "there is no checkpoint nosuch.pt"),
    ("checkpoint with no name", None, "sft --init_from ''", "there is no checkpoint"),
    ("checkpoint that is a folder", None, "sample --init_from out", "there is no checkpoint out/best.pt"),
    ("empty checkpoint", write("bad.pt", ""), "train --init_from bad.pt", "bad.pt is damaged, or not a checkpoint"),
    ("text as a checkpoint", write("bad.pt", "text"), "sft --init_from bad.pt", "bad.pt is damaged, or not a check"),
    ("half a checkpoint", cut("out/sft/best.pt", lambda b: b[: len(b) // 2]), "dpo", "out/sft/best.pt is damaged"),
    ("checkpoint with a wrong byte", cut("out/sft/best.pt", lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]),
     "sample", "out/sft/best.pt is damaged"),
    ("damaged checkpoint to resume", write("out/sft/ckpt.pt", "x"), "sft --resume",
     r"sft/ckpt.pt is damaged.* and there is no checkpoint out/sft/ckpt-previous.pt; --init_from best.pt"),
    (
        "damaged checkpoints to resume",
        lambda: (write("out/sft/ckpt.pt", "x")(), write("out/sft/ckpt-previous.pt", "")()),
        "sft --resume",
        r"sft/ckpt.pt is damaged.* and out/sft/ckpt-previous.pt is damaged.*; --init_from best.pt",
    ),
    ("weights that are no numbers", not_finite("out/sft/best.pt"), "dpo", "weights are not all finite"),
    ("weights that are no numbers to train on", not_finite("out/pretrain/best.pt"),
     "train --init_from out/pretrain/best.pt", "weights are not all finite"),
    ("checkpoint without its parts", checkpoint("out/sft/best.pt", parts="parts-8"), "sample",
     "out/sft/best.pt needs the folder parts-8 beside it"),
    ("malicious pickle", lambda: torch.save(Harm(), "bad.pt"), "sample --init_from bad.pt", r"bad.pt .*\(Unpickling"),
    ("malicious pickle in a checkpoint", checkpoint("out/sft/best.pt", stage=Harm()), "sample", "best.pt is damaged"),
    ("malicious pickle of old", lambda: torch.save(Harm(), "bad.pt", _use_new_zipfile_serialization=False),
     "train --init_from bad.pt", "bad.pt is damaged, or not a checkpoint"),
    ("list as a checkpoint", lambda: torch.save([1], "bad.pt"), "sft --init_from bad.pt",
     "bad.pt is damaged, or not a"),
    ("weights alone", lambda: torch.save({"model": {}}, "bad.pt"), "dpo --init_from bad.pt",
     "bad.pt is no checkpoint of this project: it lacks config, settings, data, step, stage"),
    ("checkpoint of a newer version", checkpoint("out/sft/best.pt", format=FORMAT + 1), "sample",
     "out/sft/best.pt was written by a newer version"),
    ("checkpoint of a version in words", checkpoint("out/sft/best.pt", format="new"), "sample", "written by a newer"),
    ("step in words", checkpoint("out/pretrain/ckpt.pt", step="ten"), "train --resume", "it lacks step"),
    ("stage in numbers", checkpoint("out/sft/best.pt", stage=3), "sample", "it lacks stage"),
    ("config of a newer version", checkpoint("out/sft/best.pt", "config", n_experts=8), "sample",
     "the checkpoint's config cannot be used: .*n_experts"),
    ("config in words", checkpoint("out/sft/best.pt", "config", n_layer="one"), "dpo",
     "the checkpoint's config cannot be used: n_layer must be at least 1 and whole, not 'one'"),
    ("config in fractions", checkpoint("out/sft/best.pt", "config", n_layer=1.5), "sample", "n_layer must be .* 1.5"),
    ("config with no number", checkpoint("out/sft/best.pt", "config", rope_theta=float("nan")), "sample",
     "rope_theta must be a number above 0, not nan"),
    ("attention in a list", checkpoint("out/sft/best.pt", "config", attn=[]), "sample", "attn must be one of .* not"),
    ("pretraining from a config in words", checkpoint("out/pretrain/best.pt", "config", "b.pt", n_inner="one"),
     "train --init_from b.pt --n_inner 16", "checkpoint's config cannot be used: n_inner must be at least 1 and whole"),
    ("pretraining from heads in words", checkpoint("out/pretrain/best.pt", "config", "b.pt", n_kv_head="one"),
     "train --init_from b.pt", "n_kv_head must be at least 1 and whole, not 'one'"),
    ("model of another shape", None, "train --init_from out/pretrain/best.pt --n_layer 2",
     "the checkpoint's model has n_layer 1, but the settings say 2"),
    ("weights of another shape", checkpoint("out/sft/best.pt", "config", n_inner=24), "sample",
     "the checkpoint's weights do not fit"),
    ("weights that are none", checkpoint("out/sft/best.pt", model={3: 4}), "dpo",
     "the checkpoint's weights do not fit"),
    ("a vocabulary too small", checkpoint("out/sft/best.pt", "config", vocab_size=64), "sample",
     "the checkpoint's vocabulary of 64 is smaller than its tokenizer's, 259"),
    ("tokenizer of the future", checkpoint("out/sft/best.pt", data={"tokenizer": "gpt9"}), "dpo",
     "no tokenizer is called 'gpt9'; there are gpt2 and bytes"),
    ("tokenizer in a list", checkpoint("out/sft/best.pt", data={"tokenizer": []}), "dpo", "no tokenizer is called"),
    ("another tokenizer", checkpoint("out/pretrain/best.pt", "data", tokenizer="gpt2"),
     "train --init_from out/pretrain/best.pt", "the checkpoint's tokenizer is gpt2, the data's bytes"),
    ("adapters as a model", None, "sample --init_from out/sft/adapter.pt",
     "do not fit: its adapters are apart, but best"),
    ("adapters as a model to tune", None, "dpo --init_from out/sft/adapter.pt", "do not fit: its adapters are apart"),
    ("model with adapters as a model", None, "dpo --init_from out/sft/ckpt.pt", "do not fit: its adapters are apart"),
    ("adapters of another model", checkpoint("out/sft/ckpt.pt", "config", n_embd=32), "sft --resume --max_steps 9",
     "the checkpoint's weights do not fit"),
]  # fmt: skip

SAMPLING = [
    ("prompt beyond the context", None, f"sample --prompt {'a' * 97} --init_from out/pretrain/best.pt",
     "the prompt's 97 tokens exceed the context of 96"),
    ("chat with a model that cannot", None, "sample --chat --init_from out/pretrain/best.pt",
     "has not learned to chat"),
]  # fmt: skip

DATA_SETS = [
    ("unknown data set", None, "train --dataset nosuch", "there is no data set nosuch; --dataset nosuch --source FILE"),
    ("folder that is not there", None, "sft --dataset ./no", "there is no data set ./no; .* from a JSONL file"),
    ("data set with no name", write("my.txt", "text"), "train --dataset '' --source my.txt", "--dataset needs a name"),
    ("data set beside all others", write("my.txt", "t"), "train --dataset .. --source my.txt",
     "--dataset needs a name"),
    ("data set of another stage", None, "sft --dataset wikitext2", "wikitext2 is not for sft; slimorca and tiny are"),
    ("conversations to pretrain on", None, "train --dataset slimorca", "is not for pretraining; wikitext2 and tiny"),
    ("data of another tokenizer", None, "train --tokenizer gpt2", "not gpt2; delete mine/meta.json to"),
    ("context longer than the data", None, "train --block_size 9999", r"has [\d,]+ tokens: too few for .* of 9999"),
    ("examples for another context", meta("mine/sft", block_size=64), "sft",
     "was made for a context of 64, and the model has one of 96; delete mine/sft/meta.json to"),
    ("empty .bin", write("mine/train.bin", ""), "train", "cannot read mine/train.bin: "),
    ("truncated .bin", cut("mine/train.bin", lambda b: b[:100]), "train",
     r"has 50 entries, by meta.json it .* \d+: dam"),
    ("odd-sized .bin", cut("mine/val.bin", lambda b: b[:-1]), "train", "cannot read mine/val.bin: "),
    ("no .bin", lambda: os.unlink("mine/sft/val.bin"), "sft", "cannot read mine/sft/val.bin: .*No such file"),
    (".bin that is a folder", lambda: (os.unlink("mine/val.bin"), os.mkdir("mine/val.bin")), "train", "cannot read"),
    ("id outside the vocabulary", cut("mine/train.bin", lambda b: b[:-2] + b"\3\1"), "train",
     "mine/train.bin holds token id 259, outside the vocabulary of 259"),
    ("id of an example outside it", cut("mine/sft/train.bin", lambda b: b[:-2] + b"\3\1"), "sft",
     "token id 259, outside"),
    ("truncated offsets", cut("mine/dpo/train.offsets.bin", lambda b: b[:-8]), "dpo", "offsets.bin has 76 entries, by"),
    ("disordered offsets", cut("mine/sft/train.offsets.bin", lambda b: b[:8] + b[16:24] + b[8:16] + b[24:]), "sft",
     "mine/sft/train.offsets.bin is damaged"),
    ("truncated mask", cut("mine/sft/val.mask.bin", lambda b: b[1:]), "sft",
     "val.mask.bin has .* entries, by meta.json"),
    ("mask of other numbers", cut("mine/sft/train.mask.bin", lambda b: b"\2" + b[1:]), "sft", "mask.bin is damaged"),
    ("mask without an answer", cut("mine/dpo/val.mask.bin", lambda b: bytes(len(b))), "dpo", "mask.bin is damaged"),
    ("mask without the last answer", cut("mine/sft/train.mask.bin", lambda b: b[:-20] + bytes(20)), "sft",
     "is damaged"),
    ("no meta.json", lambda: os.unlink("mine/meta.json"), "train", "there is no data set ./mine"),
    ("meta.json that is a folder", lambda: (os.unlink("mine/meta.json"), os.mkdir("mine/meta.json")), "train",
     "mine is not a prepared data set: mine/meta.json cannot be read"),
    ("meta.json in Latin-1", write("mine/meta.json", b'{"source": "\xe4"}'), "train",
     "mine/meta.json is damaged; delete"),
    ("half a meta.json", cut("mine/meta.json", lambda b: b[:40]), "train", "mine/meta.json is damaged; delete it to"),
    ("meta.json of brackets", write("mine/meta.json", "[" * 10**5), "train", "mine/meta.json is damaged"),
    ("list as meta.json", write("mine/meta.json", "[1, 2]"), "train", "mine/meta.json is damaged"),
    ("number as meta.json", write("mine/sft/meta.json", "3"), "sft", "mine/sft/meta.json is damaged"),
    ("vocabulary in words", meta(vocab_size="259"), "train", "mine/meta.json is damaged"),
    ("another vocabulary", meta(vocab_size=70_000), "train", "mine/meta.json is damaged: its tokenizer has another"),
    ("tokenizer in a list", meta(tokenizer=["bytes"]), "train", "mine/meta.json is damaged"),
    ("tokenizer that is unknown", meta(tokenizer="gpt9"), "train", "no tokenizer is called 'gpt9'"),
    ("source in a number", meta(source=5), "train", "mine/meta.json is damaged"),
    ("counts in a list", meta(tokens=[9, 9]), "train", "mine/meta.json is damaged"),
    ("counts in words", counts("mine", tokens="many"), "train", "mine/meta.json is damaged"),
    ("another count in words", meta(tokens={"train": 7, "test": "7"}), "train", "mine/meta.json is damaged"),
    ("examples in a list", meta("mine/sft", examples=[9]), "sft", "mine/sft/meta.json is damaged"),
    ("examples in words", counts("mine/dpo", examples="many"), "dpo", "mine/dpo/meta.json is damaged"),
    ("context in words", meta("mine/sft", block_size="96"), "sft", "mine/sft/meta.json is damaged"),
    ("no examples", lambda: (counts("mine/sft", examples=0)(), write("mine/sft/train.offsets.bin", bytes(8))()), "sft",
     "mine/sft/train.offsets.bin is damaged"),
]  # fmt: skip

SOURCES = [
    ("no such text", None, "train --dataset ./new --source no.txt", "cannot read no.txt: No such file or directory"),
    ("folder as text", None, "train --dataset ./new --source mine", "mine is a folder; python -m data.fineweb_edu"),
    ("empty text", write("my.txt", " \n"), "train --dataset ./new --source my.txt", "my.txt has no text in it"),
    ("text in Latin-1", write("my.txt", "hällo".encode("latin-1")),
     "train --dataset ./new --source my.txt --tokenizer bytes",
     r"my.txt is not UTF-8 text \(byte 1\)"),
    ("text in UTF-16", write("my.txt", "hello".encode("utf-16")), "wikitext2 --source my.txt",
     "my.txt is not UTF-8 text"),
    ("too little text", write("my.txt", "hello"), "train --dataset ./new --source my.txt --tokenizer bytes",
     "train.bin has 5 tokens: too few for a block_size of 96; give it more text, or lower --block_size"),
    ("validation text alone", None, "wikitext2 --val my.txt", "--val goes with --source"),
    ("no such validation text", write("my.txt", "text"), "wikitext2 --source my.txt --val no.txt",
     "cannot read no.txt"),
    ("folder that is a file", write("my.txt", "text"), "wikitext2 --source my.txt --out_dir my.txt",
     "my.txt: File exists"),
    ("source for tiny", write("my.txt", "text"), "train --dataset tiny --source my.txt",
     "tiny is made of Python's own"),
    ("no such conversations", None, "sft --dataset ./new --source no.jsonl", "cannot read no.jsonl: No such file"),
    ("folder as pairs", None, "dpo --dataset ./new --source mine", "cannot read mine: Is a directory"),
    ("folder in a file", write("t.jsonl", TALK), "sft --dataset ./t.jsonl/new --source t.jsonl",
     "t.jsonl/new/sft: Not a directory"),
    ("no room for an answer", write("p.jsonl", PAIR), "orca_dpo_pairs --source p.jsonl --block_size 1",
     "no room for an"),
    ("context in words", None, "slimorca --block_size ten", "argument --block_size: invalid int value: 'ten'"),
]  # fmt: skip

# JSONL of which no two rows can be used: how many can, and why not the others.
JSONL = [
    ("nothing", "sft", "", 0, "0 rows, 0 cut"),
    ("one row", "sft", TALK, 1, "1 rows, 0 cut"),
    ("broken lines", "sft", TALK[:40] + "\n" + TALK[50:] + "\0\n" + "{" * 5000, 0, "4 malformed"),
    ("a list of one in JSON", "dpo", f"[{PAIR.strip()}]\n", 1, "1 rows, 0 cut"),
    ("other columns", "dpo", '{"ask": "Hi", "chosen": "a"}\n', 0,
     "1 malformed.; the first row has the keys ask, chosen; the forms that are read have the keys question, chosen, r"),
    ("columns of the other stage", "sft", PAIR * 3, 0, "3 malformed"),
    ("conversations as pairs", "dpo", TALK * 3, 0, "3 malformed"),
    ("null", "dpo", "null\n", 0, "1 malformed"),
    ("nulls in a pair", "dpo", PAIR.replace('"Hi %d"', "null"), 0, "1 with an empty text"),
    ("nulls in a conversation", "sft", TALK.replace('"Hi %d"', "null"), 0, "1 malformed"),
    ("numbers in place of text", "dpo", PAIR.replace('"Hello"', "5"), 0, "1 malformed"),
    ("roles in a list", "sft", TALK.replace('"human"', "[1]"), 0, "1 malformed"),
    ("questions alone", "sft", TALK.replace("gpt", "human"), 0, "1 without an answer"),
    ("an answer first", "sft", TALK.replace("human", "gpt"), 0, "1 that begin with an answer"),
    ("answers that are the same", "dpo", PAIR.replace("Go away", "Hello"), 0, "1 whose answers are the same"),
    ("a row of five megabytes", "dpo", PAIR.replace("Hi", "Hi " * 1_700_000), 0, "1 whose prompt leaves no room"),
    ("a turn of five megabytes", "sft", TALK.replace("Hi", "Hi" * 2_500_000), 0, "1 whose answers begin beyond the"),
    ("Latin-1", "sft", TALK.replace("Hi", "Hä").encode("latin-1") * 3, 0, "3 malformed"),
    ("UTF-16", "dpo", (PAIR * 3).encode("utf-16"), 0, "malformed"),
]  # fmt: skip

BENCHMARKS = [
    ("length of nothing", None, "attention --length 0", "argument --length: 0 is not a whole number from 1 on"),
    ("length below nothing", None, "pretrain --length=-5", "argument --length: -5 is not a whole number from 1 on"),
    ("tokens in words", None, "table2 --tokens many", "argument --tokens: many is not a whole number from 1 on"),
    ("tokens that do not fit", None, "pretrain --tokens 100 --length 64 --device cpu",
     "--tokens 100 is not a multiple of --length 64"),
    ("unknown implementation", None, "attention --impl fast", "argument --impl: invalid choice: 'fast'"),
    ("implementation without a GPU", None, "attention --impl fused --device cpu",
     "no implementation is left to measure"),
    ("kernel without a GPU", None, "pretrain --smoke --attn_impl flash_attn --device cpu", "needs a CUDA GPU"),
    ("unknown stage", None, "finetune --stage rl", "argument --stage: invalid choice: 'rl'"),
    ("unknown device", None, "decode --device gpu9", "--device gpu9 is not available here"),
    ("context too short to time", None, "decode --context 5 --device cpu", "--context 5 is shorter than the 32 tokens"),
    ("kernels of a CPU", None, "pretrain --profile 5 --device cpu", "--profile lists the kernels of a GPU"),
    ("folder that is a file", write("file", ""), "finetune --smoke --device cpu --out file", "file: File exists"),
    ("unknown run", None, "runs nosuch", "there is no run called nosuch; --list lists them"),
]  # fmt: skip

CASES = [*FLAGS, *RUNS, *CHECKPOINTS, *SAMPLING, *DATA_SETS, *SOURCES, *BENCHMARKS]
CASES += [
    (f"JSONL: {name}", write("my.jsonl", content), f"{stage} --dataset ./new --source my.jsonl",
     f"my.jsonl has too few usable examples, {usable}; the least is 2 .*{why}")
    for name, stage, content, usable, why in JSONL
]  # fmt: skip


# ------------------------------------------------------------------------------------- the tests


def call(command):
    """Run a script as `python train.py ...` does, but in this process."""
    name, *flags = shlex.split(command)
    sys.argv = [f"{name}.py", *FIRST.get(name, "").split(), *flags]
    run_script(importlib.import_module(MODULES[name]).main)


@pytest.fixture(scope="module")
def user(tmp_path_factory, no_pool):
    """The folder of a user who has run train.py and sft.py, with data of their own for all stages in `mine`."""
    user = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(user)
        patch.setattr("sys.argv", [])
        Path("my.txt").write_text("some lines of text\n" * 100)
        Path("talks.jsonl").write_text("".join(TALK % n for n in range(40)))
        Path("pairs.jsonl").write_text("".join(PAIR % n for n in range(40)))
        call("train --source my.txt --tokenizer bytes")
        call("sft --source talks.jsonl")
        call("orca_dpo_pairs --source pairs.jsonl --out_dir mine --block_size 96")
    return user


def refusal(command, capsys):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call(command)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("setup, command, message", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_wrong_input(user, tmp_path, monkeypatch, capsys, setup, command, message):
    monkeypatch.chdir(shutil.copytree(user, tmp_path / "user"))
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    kept = setup and setup()
    line = refusal(command, capsys)
    assert re.search(message, line), line
    assert not Path("harm").exists()
    del kept


@pytest.mark.parametrize("name", ["train", "sft", "dpo", "sample"])
def test_wrong_numbers(name, tmp_path, monkeypatch, capsys):
    """For every numeric flag: what is no number, too small, too large, not finite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [])
    for f in fields(importlib.import_module(name).Settings):
        minimum, maximum = f.metadata["minimum"], f.metadata["maximum"]
        if f.type is int:
            no_numbers, out_of_range = ["ten", "1.5", "nan", ""], [minimum - 1, maximum + 1]
        elif f.type is float:
            no_numbers, out_of_range = ["ten", ""], [minimum - 1, "nan", "inf", "-inf"]
            out_of_range += [maximum + 1] * (maximum < 2**63 - 1)
        else:
            continue
        for value in no_numbers:
            line = refusal(f"{name} --{f.name}='{value}'", capsys)
            wrong = f"argument --{f.name}: invalid {f.type.__name__} value: '{value}'"
            assert line == f"error: {wrong}; --help lists the flags"
        for value in out_of_range:
            line = refusal(f"{name} --{f.name}={value}", capsys)
            assert re.search(rf"--{f.name} \S+ is out of range; the least is {minimum}", line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["sample", "decode", "finetune", "runs", "checkpoint"])
def test_several_processes_of_a_script_for_one(script, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "WORLD_SIZE", 2)
    monkeypatch.setattr("sys.argv", [])
    assert "this runs as one process, without torchrun" in refusal(f"{script} --help", capsys)  # or the help is printed


@pytest.mark.parametrize(
    "words, advice",
    [
        ("InvalidCxxCompiler: No working C++ compiler found", "do without --compile, or with --compile off"),
        ("Failed to find C compiler. Please specify via CC", "Triton finds no C compiler; install gcc"),
    ],
)
def test_no_compiler(words, advice, capsys):
    """What torch.compile and Triton raise on a machine without one."""

    def compile():
        raise RuntimeError(words)

    with pytest.raises(SystemExit) as exit:
        run_script(compile)
    assert exit.value.code == 2 and advice in capsys.readouterr().err


def test_several_processes_may_be_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parallel, "WORLD_SIZE", 2)
    monkeypatch.setattr(parallel, "process_group", contextlib.nullcontext)
    monkeypatch.setattr("sys.argv", [])
    line = refusal(f"pretrain --tokens 64 --length 64 --device cpu --out {tmp_path}", capsys)
    assert "--tokens 64 is not a multiple of --length 64 times 2 processes" in line


def test_pictures_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("bench.figures", "bench.logs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("bench.figures")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: the pictures need matplotlib: pip install -r requirements-dev.txt\n"
