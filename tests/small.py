"""What the tests share: models so small that a test can compute them by hand, and runs of a few steps."""

import csv
import functools
import json
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

import dpo
import sft
import train
from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import tokenize as tokenize_conversation
from data.tokenizer import CONTROL_TOKENS
from data.write import write_examples
from engine.checkpoint import save_checkpoint
from model import GPT, GPTConfig

# ------------------------------------------------------------------------------------- models

SHAPE = dict(block_size=24, vocab_size=64, n_layer=3, n_embd=32, n_inner=48, head_dim=8)
HEADS = {"multi-head": dict(n_head=4, n_kv_head=4), "grouped": dict(n_head=12, n_kv_head=4)}


def tiny_config(attn, heads="multi-head", **changes):
    return GPTConfig(attn=attn, **{**SHAPE, **HEADS[heads], **changes})


def tiny_model(attn, heads="multi-head", **changes):
    """A model whose weights are large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    model = GPT(tiny_config(attn, heads, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def relative_error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


# ------------------------------------------------------------------------------------- tokenizers

SENTENCES = ["The quick brown fox jumps over the lazy dog. It's 1234 o'clock.\n\n    return x", "user assistant"]
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
LLAMA3_PATTERN += r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = {"chatml": CONTROL_TOKENS, "llama3": ("<|begin_of_text|>", "<|end_of_text|>")}


@functools.cache
def tokenizer_text(kind):
    """A tokenizer.json, a byte-level BPE of some 320 tokens.

    plain        without special tokens
    chatml       with the control tokens
    llama3       with Llama 3's special tokens and words
    words        with added tokens that are not special
    nfc          composes combining marks, as Qwen's
    gaps         plain, whose last ids come after a gap
    added_gaps   plain, and control tokens to which the file gives other ids than the library
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "llama3":
        words = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_alone])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=320, initial_alphabet=alphabet, special_tokens=[*SPECIAL.get(kind, ())])
    if kind == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(show_progress=False, **options))
    if kind == "words":
        tokenizer.add_tokens(["<think>", "    "])
    contents = json.loads(tokenizer.to_str())
    vocabulary = contents["model"]["vocab"]
    if kind == "gaps":
        vocabulary |= {token: index + 10 for token, index in vocabulary.items() if index >= 315}
    if kind == "added_gaps":
        plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        ids = {name: len(vocabulary) + 5 * i for i, name in enumerate(CONTROL_TOKENS[:2], 1)}
        contents["added_tokens"] = [dict(id=index, content=name, **plain) for name, index in ids.items()]
    contents["model"]["ignore_merges"] = kind == "llama3"
    return json.dumps(contents)


def write_tokenizer(folder, kind="chatml"):
    """Write tokenizer.json, and what transformers wants beside it. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_text(kind))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder / "tokenizer.json"


# ------------------------------------------------------------------------------------- runs

RUN = ["--device", "cpu", "--batch_size", 4, "--max_steps", 8, "--eval_interval", 4, "--save_interval", 3]
RUN += ["--log_interval", 2]
PRETRAIN = [*RUN, "--block_size", 16, "--n_layer", 2, "--n_embd", 32, "--n_inner", 48, "--n_head", 2]
PRETRAIN += ["--head_dim", 16, "--warmup_steps", 3]
TUNE = [*RUN, "--lora_rank", 4, "--lora_alpha", 8, "--warmup_steps", 2, "--learning_rate", 1e-2, "--eval_examples", 5]
STAGES = {"sft": sft, "dpo": dpo}


def run_main(script, *flags, on_step=None, sample=False):
    """Run main() of train.py, sft.py or dpo.py in this process -> its task, optimizer and folder.

    on_step(task, row) is called after every step. `sample` asks for the text that a run writes in the end.
    """
    done, train_fit = SimpleNamespace(), train.fit  # which is patched below

    def fit(task, optimizer, *rest):
        done.task, done.optimizer, done.folder = task, optimizer, rest[0].out_dir
        train_fit(task, optimizer, *rest, on_step=on_step and partial(on_step, task))

    patches = {"fit": fit} if sample else {"fit": fit, "summarize": mock.DEFAULT}
    argv = [f"{script.__name__}.py", *map(str, flags)]
    with mock.patch.object(sys, "argv", argv), mock.patch.multiple(script, **patches):
        script.main()
    return done


def pretrain(dataset, folder, *flags, **options):
    preset = [] if "--resume" in flags else ["--preset", "tiny"]
    return run_main(train, *preset, *PRETRAIN, "--dataset", dataset, "--out_dir", folder, *flags, **options)


class Killed(BaseException):
    """What ends a run that kill_at() is the on_step of."""


def kill_at(step):
    def on_step(task, row):
        if row["step"] == step:
            raise Killed

    return on_step


def base_model(attn="v2", seed=0):
    """The model that tune() starts from."""
    torch.manual_seed(seed)
    shape = dict(block_size=96, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, n_inner=48, vocab_size=320)
    return GPT(GPTConfig(attn=attn, **shape))


def save_model(path, model, **changes):
    contents = dict(settings={}, data={"tokenizer": "bytes"}, stage="pretrain", step=7) | changes
    save_checkpoint(path, model=model.state_dict(), config=asdict(model.config), **contents)


def write_tuning_data(home):
    """Write a pretrained model for each attention, and 60 conversations and pairs of several lengths."""
    for attn in train.ATTENTION:
        save_model(home / f"{attn}.pt", base_model(attn))
    questions = [f"{i} and {i % 7}?" for i in range(60)]
    turns = [[("human", q), ("gpt", f"sum {i}" * (1 + i % 3))] for i, q in enumerate(questions)]
    rows = [{"conversations": [dict([("from", role), ("value", text)]) for role, text in row]} for row in turns]
    write_examples(home / "set" / "sft", rows, tokenize_conversation, "bytes", 96, "a test")
    pairs = [
        dict(system="", question=q, chosen=f"yes {q}", rejected="no" * (1 + i % 3)) for i, q in enumerate(questions)
    ]
    write_examples(home / "set" / "dpo", pairs, tokenize_pair, "bytes", 96, "a test")
    return home


def tune(stage, home, folder, *flags, attn="v2", **options):
    start = [] if "--resume" in flags else ["--init_from", home / f"{attn}.pt"]
    flags = [*TUNE, "--dataset", home / "set", "--out_dir", folder, *start, *flags]
    return run_main(STAGES[stage], *flags, **options)


# ------------------------------------------------------------------------------------- hypothesis

CACHES = tempfile.TemporaryDirectory(prefix="hypothesis-")  # not in the repository; deleted at the end


def examples(count):
    """Settings for a test of `count` inputs, the same ones every time."""
    from hypothesis import HealthCheck, configuration, settings

    configuration.set_hypothesis_home_dir(CACHES.name)
    quiet = dict(deadline=None, suppress_health_check=[*HealthCheck])  # how fast it is depends on other work
    return settings(max_examples=count, derandomize=True, database=None, **quiet)


# ------------------------------------------------------------------------------------- what they leave


def log_of(folder, *columns):
    """These columns of log.csv, a tuple of strings a step."""
    with open(folder / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] != "0"]  # which is before the first step
    return [tuple(row[column] for column in columns) for row in rows]


def weights_of(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def same(a, b):
    """True if two state_dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
