"""Supervised fine-tuning (SFT) with LoRA: teach a pretrained model to answer.

python sft.py                                    # from out/pretrain/best.pt, on the data that fits its tokenizer
python sft.py --dataset mine --source my.jsonl   # your own conversations; data/slimorca/prepare.py shows their form
python sft.py --resume                           # go on after an interruption
"""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import parallel
import train
from data import UserError, run_script
from data.dataset import bucketed_epoch, collate, open_examples, prepared_directory, read_meta
from data.tokenizer import IM_END, get_tokenizer
from lora import apply_lora, load_lora, lora_state_dict, merge_lora
from model import ATTENTION, GPT, Decoder, cuda_graph, token_cross_entropy

# ---------------------------------------------------------------------------------------------------
# Settings


@dataclass
class TuningSettings(train.CommonSettings):
    """What SFT and DPO have in common."""

    preset: str = train.flag("auto", "defaults; auto: tiny for a model of bytes, else ldiff", train.PRESET_NAMES)
    attn: str = train.flag("", "attention mechanism; only the checkpoint's will do", choices=tuple(ATTENTION))
    source: str = train.flag("", "local JSONL file to prepare the data set from, instead of the hub")
    warmup_steps: int = train.flag(50, "steps of linear warmup, before the cosine", least=0)
    eval_examples: int = train.flag(256, "held-out examples to validate on, always the same", least=1)
    lora_rank: int = train.flag(64, "rank of the adapters", least=1)
    lora_alpha: float = train.flag(128.0, "the adapters' part is multiplied by lora_alpha / lora_rank", least=0)


@dataclass
class Settings(TuningSettings):
    """SFT. The defaults are the ldiff preset."""

    dataset: str = train.flag("slimorca", "folder in data/, or a path with a slash")
    out_dir: str = train.flag("out/sft", "where checkpoints and log.csv go")
    init_from: str = train.flag("out/pretrain/best.pt", "checkpoint of the model to tune")
    learning_rate: float = train.flag(2e-4, "peak", least=0)
    lora_dropout: float = train.flag(0.0, "share of the adapters' inputs that is dropped", least=0, most=0.99)


PRESETS = {
    "ldiff": {},
    "tiny": dict(dataset="tiny", max_steps=300, learning_rate=2e-3, warmup_steps=20),
    "1b": dict(micro_batch_size=8),
    "10b": dict(micro_batch_size=2, learning_rate=1e-4, activation_checkpointing=True),
}


def choose_settings(given, settings_class, presets, stage):
    """The settings, and the checkpoint to start from or to resume. Flags go over the preset, the preset over the
    defaults; the checkpoint's tokenizer decides which preset `auto` is."""
    if given.get("resume"):
        return train.resumed_settings(given, settings_class, stage)
    path = given.get("init_from", settings_class.init_from)
    if "init_from" not in given and not Path(path).exists():
        raise UserError(f"there is no {path} yet: train the stage before, or name another checkpoint with --init_from")
    start = train.load_checkpoint(path)
    tokenizer, attn = start["data"].get("tokenizer"), start["config"].get("attn")
    train.check_attn(given, start, path)
    fitting = "tiny" if tokenizer == "bytes" else "ldiff"
    preset = train.choose_preset(given, fitting, f"{path} has the tokenizer {tokenizer}")
    return settings_class(**{**presets[preset], **given, "preset": preset, "attn": attn}), start


# ---------------------------------------------------------------------------------------------------
# The model's part


def token_logps(model, idx, positions, targets):
    """Log-probabilities of `targets` (M,), the ids that follow `positions` (M,) of the flattened idx (B, T) -> (B, T)
    float32, zero at all other positions and where a target is -100. The head works at `positions` alone."""
    hidden = model.hidden(idx).flatten(0, 1).index_select(0, positions)  # (M, C)
    logps = -token_cross_entropy(hidden, model.lm_head.weight, targets)
    return logps.new_zeros(idx.numel()).index_copy(0, positions, logps).view(idx.shape)


def compile_exactly(model):
    """Compile a model's layers for batches of any shape. Each operation rounds to bf16 as it does uncompiled: DPO's
    policy and reference are different programs, and would otherwise differ a little where they should not."""
    torch._dynamo.config.specialize_float = True  # else LoRA's scale is computed anew, on the CPU
    for layer in model.layers:  # which share a program; one for a whole model of many shapes would take minutes
        layer.compile(dynamic=True, options={"emulate_precision_casts": True})


def bf16_copy(model, device):
    """A model on `device` whose frozen matrices are bf16, without a second one in float32 on the way."""
    frozen = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad]
    cast = {id(p): nn.Parameter(p.bfloat16().to(device), requires_grad=False) for p in frozen}
    return copy.deepcopy(model, cast).to(device)


class Graphs:
    """train.accumulate as CUDA graphs, one for every shape of a micro-batch: a step on a few thousand tokens has more
    than two thousand kernels, which take longer to launch one by one than to run."""

    def __init__(self, loss_of, parameters):
        self.loss_of, self.parameters = loss_of, [p for p in parameters if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]  # graphs write to a fixed place
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle()

    def accumulate(self, *tensors):
        """Add the gradients, and return the shares, which the next call overwrites."""
        if self.parameters[0].grad is None:  # the first micro-batch of a step
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients):
                parameter.grad = gradient
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(tensors)
        inputs, share, replay = self.recorded[shapes]
        for mine, given in zip(inputs, tensors):
            mine.copy_(given)
        replay()
        return share

    def record(self, tensors):
        """Where the graph takes its inputs from and leaves its results, and the function that runs it."""
        inputs, share = [tensor.clone() for tensor in tensors], {}
        before = [gradient.clone() for gradient in self.gradients]

        def work():
            values = self.loss_of(*inputs)
            torch._foreach_add_(self.gradients, torch.autograd.grad(values["loss"], self.parameters))
            share.update({name: value.detach() for name, value in values.items()})

        replay = cuda_graph(work, self.pool)
        torch._foreach_copy_(self.gradients, before)  # recording has added to them
        return inputs, share, replay


# ---------------------------------------------------------------------------------------------------
# The run


class FineTuning(train.Run):
    """LoRA on the model of the checkpoint `start`, or `start` itself resumed. SFT and DPO add to what Run asks for

    loss_of(*tensors, scale)    where `scale` times a sum over the micro-batch is its share of the mean over the batch
    denominator(parts)          what that is a mean over, the number of answer tokens or of pairs in the micro-batches
    work(numbers)               the work in the examples with these numbers, in `unit`

    Compiled on a GPU, loss_of is recorded, once for every shape of its tensors: it may not look at a value (.item()),
    nor depend on anything else that changes.
    """

    counted = "examples"
    rows_per_example = 1
    graphs = None
    epoch = None  # the pass over the examples whose order make_batch keeps

    def __init__(self, settings, start, lora_dropout=0.0):
        super().__init__(settings)
        self.config = train.saved_config(start, settings.attn_impl)
        self.load_data(start["data"].get("tokenizer"))
        torch.manual_seed(settings.seed)
        self.model = self.float32_model = self.load_model(start, lora_dropout)
        if self.device.type == "cuda":
            self.model = bf16_copy(self.model, self.device)
        if train.wants_compile(settings.compile, self.device):
            compile_exactly(self.model)
            # Recomputing looks at random states, which no graph can record; it is for models whose kernels take longer.
            if self.device.type == "cuda" and not settings.activation_checkpointing:
                self.graphs = Graphs(self.loss_of, self.model.parameters())
        self.optimizer = train.make_optimizer(self.model, weight_decay=0.0)
        if settings.resume:
            self.restore(start)
        if parallel.RANK:
            self.float32_model = None  # process 0 alone saves
            torch.manual_seed(settings.seed + 1000 * self.done + parallel.RANK)  # other dropout than process 0's

    def load_data(self, tokenizer):
        s, block_size = self.settings, self.config.block_size
        self.encoding = get_tokenizer(tokenizer)
        with parallel.in_turn():
            directory = prepared_directory(s.dataset, s.source, self.stage, tokenizer=tokenizer, block_size=block_size)
        self.meta = read_meta(directory, tokenizer)
        self.train_examples, self.val_examples = (
            open_examples(directory, split, self.meta, self.rows_per_example, block_size) for split in ("train", "val")
        )
        self.lengths, count = self.train_examples.lengths(), len(self.train_examples)
        if count < s.batch_size:
            raise UserError(
                f"{directory} has {count} examples, fewer than a batch of {s.batch_size}; lower --batch_size"
            )
        self.val_batches = self.micro_batches(self.val_examples, self.validated())

    def validated(self):
        """The numbers of the held-out examples to validate on: spread over all, the shorter ones first."""
        total = len(self.val_examples)
        spread = np.linspace(0, total - 1, min(self.settings.eval_examples, total)).astype(int)
        return spread[np.argsort(self.val_examples.lengths()[spread], kind="stable")]

    def load_model(self, start, lora_dropout):
        s, model = self.settings, GPT(self.config)
        if not s.resume:
            train.load_weights(model, start)
        try:
            apply_lora(model, s.lora_rank, s.lora_alpha, lora_dropout)
        except ValueError as error:
            raise UserError(error) from error
        if s.activation_checkpointing:
            model.checkpoint_activations()
        return train.load_weights(model, start) if s.resume else model

    def make_batch(self, step):
        """See Run. Only prefetch's one thread calls it, so it may keep the order of the current epoch."""
        batch_size = self.settings.batch_size
        epoch, index = divmod(step - 1, len(self.train_examples) // batch_size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, bucketed_epoch(self.lengths, batch_size, self.settings.seed, epoch)
        numbers = self.order[index]
        return self.work(numbers), self.micro_batches(self.train_examples, numbers)

    def micro_batches(self, examples, numbers):
        """This process's part of the examples, in micro-batches; each has, beside its tensors, what a sum over it is
        multiplied with to make it its share of the mean over all."""
        size = self.settings.micro_batch_size
        parts = [collate(examples, numbers[i : i + size], self.config.block_size) for i in range(0, len(numbers), size)]
        scale = torch.tensor(1 / self.denominator(parts))  # a tensor, to travel with the others
        return [(*part, scale) for part in parts[parallel.RANK :: parallel.PROCESSES]]

    def accumulate(self, *tensors):
        return self.graphs.accumulate(*tensors) if self.graphs else super().accumulate(*tensors)

    def logps(self, idx, positions, targets):
        with train.autocast(self.device):
            return token_logps(self.model, idx, positions, targets)

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()  # dropout off
        total = dict.fromkeys(("loss", *self.metrics), torch.zeros((), device=self.device))
        for tensors in self.val_batches:
            total = train.add_share(total, self.loss_of(*(tensor.to(self.device) for tensor in tensors)))
        self.model.train()
        total = parallel.add_up(total, self.device)
        values = {name: value.item() for name, value in total.items()}
        line = f"    validation loss {values['loss']:.4f}"
        line += "".join(f", {name} {values[name]:.3f}" for name in self.metrics[:2])
        return {f"val_{name}": value for name, value in values.items()}, line

    def in_float32(self):
        """The adapted model as it is saved; on a GPU, the one that trains has its frozen matrices in bf16."""
        load_lora(self.float32_model, lora_state_dict(self.model))
        return self.float32_model

    def weights(self):
        return self.in_float32().state_dict()

    def save_best(self, step):
        """best.pt, the model with its adapters merged in, and adapter.pt, the adapters alone."""
        if parallel.RANK:
            return
        self.write("adapter.pt", step, lora_state_dict(self.model))
        self.write("best.pt", step, merge_lora(copy.deepcopy(self.in_float32())).state_dict())

    def sample(self, max_new_tokens=200):
        """The first held-out prompt, and the model's answer to it."""
        self.model.eval()  # dropout off
        end = self.encoding.encode_single_token(IM_END)
        prompt = self.val_examples.ids[: self.val_examples.mask.argmax()].astype(np.int64)
        start = torch.from_numpy(prompt)[None].to(self.device)
        with train.autocast(self.device), torch.compiler.set_stance("force_eager"):  # no program for every new length
            options = dict(temperature=0.8, top_k=50, n_vocab=self.encoding.n_vocab)
            stream = Decoder(self.model, 1, self.config.block_size, **options).stream(start, max_new_tokens)
            answer = list(itertools.takewhile(lambda token: token != end, (token.item() for token in stream)))
        return self.encoding.decode([*prompt, *answer], errors="replace")


class SFT(FineTuning):
    """The loss is the mean cross-entropy in nats over the answers' tokens of a batch."""

    stage = "sft"

    def __init__(self, settings, start):
        super().__init__(settings, start, settings.lora_dropout)

    def work(self, numbers):
        return int(self.lengths[numbers].sum())  # tokens, padding not counted

    def denominator(self, parts):
        return sum((targets != -100).sum().item() for _, _, targets in parts)

    def loss_of(self, idx, positions, targets, scale):
        return {"loss": -self.logps(idx, positions, targets).sum() * scale}


def main():
    given = train.parse_flags(Settings, __doc__, PRESETS["tiny"])
    with parallel.started(), train.locked(given.get("out_dir", Settings.out_dir), make=not given.get("resume")):
        train.carry_out(SFT(*choose_settings(given, Settings, PRESETS, SFT.stage)))


if __name__ == "__main__":
    run_script(main)
