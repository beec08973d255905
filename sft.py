"""Supervised fine-tuning (SFT) with LoRA: teach a pretrained model to answer.

python sft.py                                    # from out/pretrain/best.pt, on the data that fits its tokenizer
python sft.py --dataset mine --source my.jsonl   # your own conversations; docs/data.md shows their form
python sft.py --resume                           # go on after an interruption

Read train.py first: the optimizer, the loop and the flags are there.
"""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

from engine.settings import UserError, flag, parse_flags, run_script  # before torch, for Ctrl-C; isort: skip
import numpy as np
import torch

from data.dataset import bucketed_epoch, collate, open_examples, prepared_directory, read_meta
from data.tokenizer import IM_END, get_tokenizer
from engine import parallel
from engine.attention import check_impl
from engine.checkpoint import Checkpointer, SkipInit, load_init_from, load_weights, resume_settings, run_folder
from engine.device import autocast, choose_device, choose_preset, oom_advice
from engine.generate import Decoder
from engine.graphs import GraphedForwardBackward, bf16_copy, compile_for_tuning, uncompiled, wants_compile
from engine.log import Log, describe, progress, summarize
from engine.loss import token_cross_entropy
from lora import apply_lora, load_lora, lora_state_dict, merge_lora
from model import ATTENTION, GPT, GPTConfig
from train import CommonSettings, fit, make_optimizer

# ---------------------------------------------------------------------------------------------------
# Settings


@dataclass
class TuningSettings(CommonSettings):
    """The settings that SFT and DPO share."""

    preset: str = flag(
        "auto", "auto: tiny for a byte model, else by size", choices=("auto", "tiny", "ldiff", "1b", "10b"), fixed=True
    )
    attn: str = flag("", "attention mechanism; it has to be the checkpoint's", choices=tuple(ATTENTION), fixed=True)
    source: str = flag("", "local JSONL file to prepare the data set from, instead of the hub")
    # The order of the examples depends on these two: with others, a resumed run would repeat some and leave out others.
    seed: int = flag(1, "of adapters and batches", minimum=0, fixed=True)
    batch_size: int = flag(16, "conversations a step", minimum=1, fixed=True)
    warmup_steps: int = flag(50, "steps of linear warmup", minimum=0)
    eval_examples: int = flag(256, "held-out examples to validate on, always the same", minimum=1, fixed=True)
    lora_rank: int = flag(64, "rank of the adapters", minimum=1, fixed=True)
    lora_alpha: float = flag(128.0, "the adapters' output is times lora_alpha / lora_rank", minimum=0, fixed=True)


@dataclass
class Settings(TuningSettings):
    """SFT. The defaults are the preset ldiff."""

    dataset: str = flag("slimorca", "folder in data/, or a path with a slash")
    out_dir: str = flag("out/sft", "where checkpoints and log.csv go")
    init_from: str = flag("out/pretrain/best.pt", "checkpoint of the model to tune", fixed=True)
    learning_rate: float = flag(2e-4, "peak", minimum=0)
    lora_dropout: float = flag(0.0, "share of the adapters' inputs that is dropped", minimum=0, maximum=0.99)


PRESETS = {
    "ldiff": {},
    "tiny": dict(dataset="tiny", max_steps=300, learning_rate=2e-3, warmup_steps=20),
    "1b": dict(micro_batch_size=8),
    "10b": dict(micro_batch_size=2, learning_rate=1e-4, activation_checkpointing=True),
}


def choose_settings(given, settings_class, presets, stage):
    """Choose the settings from the flags that were given, and load the checkpoint to tune or resume.

    Flags override the preset, the preset overrides the defaults. `auto` is the preset that fits the checkpoint's
    tokenizer and size.
    """
    if given.get("resume"):
        return resume_settings(given, settings_class, stage)
    path = given.get("init_from", settings_class.init_from)
    if "init_from" not in given and not Path(path).exists():
        raise UserError(f"there is no {path} yet: train the stage before, or name another checkpoint with --init_from")
    checkpoint = load_init_from(path, given.get("attn"))
    attn = checkpoint["config"].get("attn")
    preset = choose_preset(given.get("preset", "auto"), checkpoint)
    settings = settings_class(**{**presets[preset], **given, "preset": preset, "attn": attn})
    return parallel.fit_micro_batch_size(settings, given), checkpoint


def load_config(checkpoint, attn_impl):
    """Return the GPTConfig of a checkpoint's model, and its tokenizer. Raises UserError if they cannot be used."""
    try:
        config = GPTConfig(**{**checkpoint["config"], "attn_impl": attn_impl})
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's config cannot be used: {error}") from error
    encoding = get_tokenizer(checkpoint["data"].get("tokenizer"), checkpoint["path"].parent)
    if config.vocab_size < encoding.n_vocab:
        raise UserError(
            f"the checkpoint's vocabulary of {config.vocab_size} is smaller than its tokenizer's, {encoding.n_vocab}"
        )
    return config, encoding


# ---------------------------------------------------------------------------------------------------
# The loss is computed at the answers' tokens only


def token_logps(model, idx, positions, targets):
    """Compute the log-probabilities of `targets` (M,), the ids after `positions` (M,) of the flattened idx (B, T).

    -> (B, T) float32, zero at all other positions and where a target is -100. The output layer, whose logits would be
    the largest tensor of all, works at `positions` alone.
    """
    hidden = model.hidden(idx).flatten(0, 1).index_select(0, positions)  # (M, C)
    logps = -token_cross_entropy(hidden, model.lm_head.weight, targets)
    return logps.new_zeros(idx.numel()).index_copy(0, positions, logps).view(idx.shape)


# ---------------------------------------------------------------------------------------------------
# The task; train.py says what the loop asks of it


class SFT:
    """LoRA tuning of the model in `checkpoint` on conversations, or `checkpoint` itself resumed.

    The loss is the mean cross-entropy in nats over the answers' tokens of a batch.
    """

    stage, unit, metrics = "sft", "tokens", ()
    rows_per_example = 1
    flops_per_unit = None  # depends on the lengths of the examples

    def __init__(self, settings, checkpoint):
        s = self.settings = settings
        self.device = choose_device(s.device)
        check_impl(s.attn_impl, self.device)
        parallel.check_batch_size(s)
        config, self.encoding = load_config(checkpoint, s.attn_impl)
        self.block_size = config.block_size

        # Data
        with parallel.main_process_first():
            options = dict(tokenizer=self.encoding.source, block_size=self.block_size)
            directory = prepared_directory(s.dataset, s.source, self.stage, **options)
        self.meta = read_meta(directory, self.encoding.name)
        self.train_examples, self.val_examples = (
            open_examples(directory, split, self.meta, self.rows_per_example, self.block_size)
            for split in ("train", "val")
        )
        self.epoch, self.order = None, None  # the pass over the examples that get_batch() is in, and its batches
        self.lengths, count = self.train_examples.lengths(), len(self.train_examples)
        if count < s.batch_size:
            raise UserError(
                f"{directory} has {count} examples, fewer than a batch of {s.batch_size}; lower --batch_size"
            )
        # Validation examples are spread over all that are held out. Sorted by length, they need little padding.
        spread = np.linspace(0, len(self.val_examples) - 1, min(s.eval_examples, len(self.val_examples))).astype(int)
        indices = spread[np.argsort(self.val_examples.lengths()[spread], kind="stable")]
        self.val_batches = self.micro_batches(self.val_examples, indices)

        # Model: the frozen one with adapters. On a GPU, a copy whose frozen matrices are bf16 trains.
        torch.manual_seed(s.seed)
        with SkipInit():  # the checkpoint has all weights
            model = GPT(config).set_activation_checkpointing(s.activation_checkpointing)
        if not s.resume:
            load_weights(model, checkpoint)
        try:
            apply_lora(model, s.lora_rank, s.lora_alpha, getattr(s, "lora_dropout", 0.0))  # DPO has no dropout
        except ValueError as error:
            raise UserError(error) from error
        if s.resume:  # the checkpoint has adapters
            load_weights(model, checkpoint)
        self.float32_model = model
        self.model = bf16_copy(model, self.device) if self.device.type == "cuda" else model.to(self.device)
        if parallel.RANK:
            self.float32_model = None  # process 0 alone saves

        self.graphed = None
        if wants_compile(s.compile, self.device):
            compile_for_tuning(self.model)
            # Activation checkpointing reads random states, which no graph can record; it is for models so large that
            # launching their kernels takes no time.
            if self.device.type == "cuda" and not s.activation_checkpointing:
                self.graphed = GraphedForwardBackward(self.loss, self.model.parameters())

    def get_batch(self, step):
        """Return a step's batch, of examples of similar lengths. Only one thread may call it: it keeps self.order."""
        s = self.settings
        epoch, index = divmod(step - 1, len(self.train_examples) // s.batch_size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, bucketed_epoch(self.lengths, s.batch_size, s.seed, epoch)
        indices = self.order[index]
        count = len(indices) if self.unit == "pairs" else int(self.lengths[indices].sum())  # without padding
        return count, self.micro_batches(self.train_examples, indices)

    def micro_batches(self, examples, indices):
        """Return this process's micro-batches: tuples (idx, positions, targets, per_token, per_example).

        A sum over a micro-batch times a weight is its share of a mean over the whole batch. SFT's weight is per_token,
        1 / answer tokens in the batch; DPO's is per_example, 1 / pairs. As tensors, they travel with the others.
        """
        size = self.settings.micro_batch_size
        starts = range(0, len(indices), size)
        batches = [collate(examples, indices[start : start + size], self.block_size) for start in starts]
        num_tokens = sum((targets != -100).sum().item() for _, _, targets in batches)
        weights = torch.tensor(1 / num_tokens), torch.tensor(1 / len(indices))
        return [(*batch, *weights) for batch in batches[parallel.RANK :: parallel.WORLD_SIZE]]

    def loss(self, idx, positions, targets, per_token, per_example):
        """Return a micro-batch's share of the batch's mean loss. No .item() in here: a CUDA graph may record it."""
        return {"loss": -self.logps(idx, positions, targets).sum() * per_token}

    def logps(self, idx, positions, targets):
        """Compute token_logps() with the tuned model, in bf16 on a GPU."""
        with autocast(self.device):
            return token_logps(self.model, idx, positions, targets)

    @torch.no_grad()
    def evaluate(self):
        """Measure the loss and the metrics on the validation examples."""
        self.model.eval()  # dropout off
        total = dict.fromkeys(("loss", *self.metrics), torch.zeros((), device=self.device))
        for tensors in progress(self.val_batches, "validating"):
            with uncompiled():
                values = self.loss(*(tensor.to(self.device) for tensor in tensors))
            total = {name: total[name] + value for name, value in values.items()}
        self.model.train()
        total = parallel.all_reduce_sum(total, self.device)
        values = {name: value.item() for name, value in total.items()}
        text = f"    validation loss {values['loss']:.4f}"
        text += "".join(f", {name} {values[name]:.3f}" for name in self.metrics[:2])
        return {f"val_{name}": value for name, value in values.items()}, text

    def sample(self, max_new_tokens=200):
        """Return the first held-out prompt and the model's answer."""
        self.model.eval()  # dropout off
        end = self.encoding.encode_single_token(IM_END)
        prompt = self.val_examples.ids[: self.val_examples.mask.argmax()].astype(np.int64)  # up to the first answer
        idx = torch.from_numpy(prompt)[None].to(self.device)
        options = dict(temperature=0.8, top_k=50, n_vocab=self.encoding.n_vocab)
        with autocast(self.device), uncompiled():
            stream = Decoder(self.model, 1, self.block_size, **options).stream(idx, max_new_tokens)
            answer = list(itertools.takewhile(lambda token: token != end, (token.item() for token in stream)))
        return self.encoding.decode([*prompt, *answer], errors="replace")

    def state_dict(self):
        """Return the adapted model in float32, for ckpt.pt. It gets the adapters of the model that trains first."""
        load_lora(self.float32_model, lora_state_dict(self.model))
        return self.float32_model.state_dict()

    def best_state_dicts(self):
        """Return the adapters alone, and for the next stage the model with its adapters merged in."""
        if parallel.RANK:
            return {}
        load_lora(self.float32_model, lora_state_dict(self.model))
        merged = merge_lora(copy.deepcopy(self.float32_model)).state_dict()
        return {"adapter.pt": lora_state_dict(self.model), "best.pt": merged}


def main():
    given = parse_flags(Settings, __doc__, tiny=PRESETS["tiny"])
    with parallel.process_group(), run_folder(given.get("out_dir", Settings.out_dir), given.get("resume")) as resume:
        settings, checkpoint = choose_settings(given | {"resume": resume}, Settings, PRESETS, SFT.stage)
        task = SFT(settings, checkpoint)
        optimizer = make_optimizer(task.model, weight_decay=0.0)
        checkpointer = Checkpointer(task, optimizer)
        checkpointer.start(checkpoint)
        log = Log(task)
        describe(task)
        with oom_advice(settings):
            fit(task, optimizer, checkpointer, log)
        summarize(task, checkpointer, log)


if __name__ == "__main__":
    run_script(main)
