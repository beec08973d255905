"""Pretrain a language model, plain or Differential Transformer.

python train.py                              # on a GPU the full recipe, elsewhere a small model on small data
python train.py --attn v1 --max_steps 500    # every setting is a flag
python train.py --resume                     # go on after an interruption, as if there had been none
torchrun --standalone --nproc_per_node=2 train.py    # on two GPUs; see docs/multi-gpu.md

main(), at the end, names the steps of a run one by one. Above it, in order: settings and presets, optimizer and
schedule, the training loop, and pretraining's data, model and loss. sft.py and dpo.py use the same loop.
"""

import math
from dataclasses import dataclass, fields

from engine.settings import UserError, flag, parse_flags, run_script  # before torch, for Ctrl-C; isort: skip
import torch
import torch.nn as nn

from data.dataset import fixed_batches, open_tokens, prefetch, prepared_directory, read_meta, sample_batch
from data.tokenizer import END_OF_TEXT, get_tokenizer
from engine import parallel
from engine.attention import ATTENTION_IMPLS, check_impl
from engine.checkpoint import Checkpointer, check_fit, load_init_from, load_weights, resume_settings, run_folder
from engine.device import autocast, choose_device, choose_preset, oom_advice, step_unless
from engine.graphs import COMPILE_MODES, compile_model, uncompiled
from engine.log import Log, describe, flops_per_token, print_line, progress, summarize
from model import ATTENTION, GPT, GPTConfig, pad_vocab

# ---------------------------------------------------------------------------------------------------
# Settings: every field is a flag. Flags override the preset, the preset overrides the defaults.


@dataclass
class CommonSettings:
    """The flags that mean the same in train.py, sft.py and dpo.py."""

    preset: str = flag(
        "auto", "defaults: tiny, for a CPU; ldiff, 159M parameters, for a GPU; auto, by the machine",
        choices=("auto", "tiny", "ldiff", "1b", "10b"), fixed=True,
    )  # fmt: skip
    attn: str = flag("v2", "attention mechanism", choices=tuple(ATTENTION), fixed=True)
    dataset: str = flag("wikitext2", "folder in data/, or a path with a slash")
    source: str = flag("", "local file to prepare the data set from, instead of the hub")
    out_dir: str = flag("out/pretrain", "where checkpoints and log.csv go")
    init_from: str = flag("", "checkpoint whose weights to start from", fixed=True)
    resume: bool = flag(False, "go on with the run in out_dir, as it was begun; auto: if there is one", word="auto")
    seed: int = flag(1, "of weights and batches", minimum=0)
    max_steps: int = flag(1000, "optimizer steps", minimum=1)
    batch_size: int = flag(16, "sequences a step", minimum=1)
    micro_batch_size: int = flag(16, "sequences in a process's memory; gradients of several add up", minimum=1)
    activation_checkpointing: bool = flag(False, "keep only the layers' inputs, recompute the rest: less memory")
    learning_rate: float = flag(6e-4, "peak, reached at the end of the warmup", minimum=0)
    warmup_steps: int = flag(200, "steps of linear warmup", minimum=0)
    eval_interval: int = flag(100, "steps between validations", minimum=1)
    save_interval: int = flag(250, "steps between checkpoints", minimum=1)
    log_interval: int = flag(10, "steps between lines on the screen", minimum=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    compile: str = flag("auto", "torch.compile; auto: on with CUDA; whole: for long pretraining", choices=COMPILE_MODES)
    attn_impl: str = flag("auto", "attention kernel; naive: plain PyTorch, for reading", choices=ATTENTION_IMPLS)


@dataclass
class Settings(CommonSettings):
    """Pretraining. The defaults are the preset ldiff with DIFF V2."""

    eval_interval: int = flag(200, "steps between validations", minimum=1)
    tokenizer: str = flag("", "of new data: gpt2, bytes, a tokenizer.json; else init_from's or the preset's")
    block_size: int = flag(2048, "context length in tokens", minimum=1, fixed=True)
    n_layer: int = flag(12, "layers", minimum=1)
    n_embd: int = flag(768, "width", minimum=1)
    n_head: int = flag(6, "heads, by --attn; n_head * head_dim is the width of the attention", minimum=1)
    n_kv_head: int = flag(0, "key and value heads; 0: as many as n_head", minimum=0)
    n_kv_layers: int = flag(0, "layers with keys and values; those above read the last one's; 0: all", minimum=0)
    head_dim: int = flag(128, "width of a head, by --attn", minimum=2)
    n_inner: int = flag(1664, "width of the SwiGLU, by --attn", minimum=1)
    tie_embeddings: bool = flag(False, "one matrix for the embedding and the output layer")
    weight_decay: float = flag(0.1, "of AdamW", minimum=0)
    eval_windows: int = flag(64, "sequences to validate on, always the same", minimum=1, fixed=True)


PRESETS = {
    "ldiff": {},
    "tiny": dict(
        dataset="tiny", block_size=256, n_layer=4, n_embd=192, max_steps=800, batch_size=4,
        micro_batch_size=4, learning_rate=3e-3, warmup_steps=50,
    ),
    "1b": dict(
        dataset="fineweb_edu", n_layer=20, n_embd=2048, max_steps=20000, batch_size=512, micro_batch_size=8,
        learning_rate=4e-4, warmup_steps=1000, eval_interval=500, save_interval=1000,
    ),
    "10b": dict(
        dataset="fineweb_edu", n_layer=44, n_embd=4096, max_steps=100000, batch_size=1024, micro_batch_size=8,
        learning_rate=3e-4, warmup_steps=2000, eval_interval=500, save_interval=500, activation_checkpointing=True,
    ),
}  # fmt: skip

# The part of a preset that depends on the attention, at equal parameters: V2 pays for the second half of its queries
# with a narrower SwiGLU. An attention without a line of its own has vanilla's shape. ldiff with n_kv_layers=6 has as
# many parameters if n_inner is 256 more.
SHAPES = {
    "ldiff": {
        "vanilla": dict(n_head=6, head_dim=128, n_inner=1920),
        "v1": dict(n_head=12, head_dim=64, n_inner=1920),
        "v2": dict(n_head=6, head_dim=128, n_inner=1664),
    },
    "tiny": {
        "vanilla": dict(n_head=3, head_dim=64, n_inner=512),
        "v1": dict(n_head=12, head_dim=16, n_inner=512),
        "v2": dict(n_head=3, head_dim=64, n_inner=448),
    },
    "1b": {
        "vanilla": dict(n_head=16, n_kv_head=4, head_dim=128, n_inner=5632),
        "v1": dict(n_head=32, n_kv_head=8, head_dim=64, n_inner=5632),
        "v2": dict(n_head=16, n_kv_head=4, head_dim=128, n_inner=4928),
    },
    "10b": {
        "vanilla": dict(n_head=32, n_kv_head=8, head_dim=128, n_inner=14336),
        "v1": dict(n_head=64, n_kv_head=16, head_dim=64, n_inner=14336),
        "v2": dict(n_head=32, n_kv_head=8, head_dim=128, n_inner=12928),
    },
}

# The settings that are fields of GPTConfig as well, and fixed by the weights of a model: not the kernel
MODEL_FLAGS = {f.name for f in fields(GPTConfig)} & {f.name for f in fields(Settings)} - {"attn_impl"}


def choose_settings(given):
    """Choose the settings from the flags that were given, and load the checkpoint to start from or resume, or None."""
    if given.get("resume"):
        return resume_settings(given, Settings, Pretraining.stage)
    checkpoint = load_init_from(given["init_from"], given.get("attn")) if given.get("init_from") else None
    preset = choose_preset(given.get("preset", "auto"), checkpoint)
    shape = SHAPES[preset].get(given.get("attn", Settings.attn), SHAPES[preset]["vanilla"])
    if checkpoint:
        shape = {name: checkpoint["config"][name] for name in MODEL_FLAGS if name in checkpoint["config"]}
    settings = Settings(**{**PRESETS[preset], **shape, **given, "preset": preset})
    return parallel.fit_micro_batch_size(settings, given), checkpoint


# ---------------------------------------------------------------------------------------------------
# Optimizer and learning rate


def make_optimizer(model, weight_decay):
    """Make AdamW for the parameters that require a gradient. Only the matrices of linear layers decay.

    Norms, V1's lambda vectors and embeddings do not, nor does an output layer that is tied to the embedding. V2's
    lambda_proj is a linear layer and decays, which draws lambda toward 1/2. In SFT and DPO, only LoRA's A and B require
    a gradient.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if p not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def lr_at(step, settings, floor=0.1):
    """Return the learning rate of a step, 1 to max_steps: linear warmup to the peak, a cosine down to floor * peak."""
    peak, warmup, last = settings.learning_rate, settings.warmup_steps, settings.max_steps
    if step <= warmup:
        return peak * step / warmup
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup))))


# ---------------------------------------------------------------------------------------------------
# The training loop, for all stages. A stage is a task: Pretraining below, SFT in sft.py, DPO in dpo.py. It has
#
#   settings, device, model
#   get_batch(step)                    the number of tokens or pairs in a batch, its micro-batches as tuples of tensors
#   loss(*tensors)                     a micro-batch's share of the batch's mean loss: {"loss": scalar, ...metrics}
#   evaluate()                         {"val_loss": float, ...}, and a line for the screen
#   sample()                           some text by the model
#   state_dict(), best_state_dicts()   what ckpt.pt holds of the model; {file name: state_dict} for the next stage
#   stage, unit, metrics, flops_per_unit    for checkpoints and log: names, FLOPs or None
#   meta, encoding                     the data's meta.json, and their tokenizer
#   graphed                            None, or forward_backward() as CUDA graphs


def forward_backward(task, tensors):
    """Add the gradients of one micro-batch to the parameters' .grad -> the values of task.loss, detached."""
    if task.graphed:  # a CUDA graph has recorded the lines below (engine/graphs.py); small batches are faster with it
        return task.graphed(*tensors)
    values = task.loss(*tensors)
    values["loss"].backward()
    return {name: value.detach() for name, value in values.items()}


def training_step(task, optimizer, lr, micro_batches, max_norm=1.0):
    """Take one optimizer step -> {"loss", ...metrics, "grad_norm", "skipped"}, tensors on the device.

    The shares of the micro-batches, and of all processes, add up to the loss and gradient of the whole batch. Gradients
    are clipped to a norm of max_norm; grad_norm is the norm before. They remain in .grad until the next step.
    """
    optimizer.zero_grad()
    row = {}
    for tensors in micro_batches:
        for name, value in forward_backward(task, tensors).items():
            row[name] = row.get(name, 0.0) + value
    row = parallel.all_reduce_sum(row, task.device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.all_reduce_gradients(parameters)
    row["grad_norm"] = parallel.full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))
    row["skipped"] = ~torch.isfinite(row["loss"] + row["grad_norm"])
    for group in optimizer.param_groups:
        group["lr"] = lr
    step_unless(row["skipped"], optimizer)  # if its loss or gradient is not finite, a step changes nothing
    return row


def fit(task, optimizer, checkpointer, log, on_step=None):
    """Train from the step after checkpointer.step to settings.max_steps.

    on_step(row) is called after every step with its row of log.csv. To read a tensor in it waits for the GPU.
    """
    s, done = task.settings, checkpointer.step
    steps = range(done + 1, s.max_steps + 1)
    with parallel.stop_signals() as signals:
        if done == 0:
            print_line("before the first step:")
            metrics, text = task.evaluate()
            # Training has to improve on a model that it begins with. A new one, of random numbers, is not worth saving.
            best = s.init_from and checkpointer.save_if_best(0, metrics["val_loss"])
            print_line(f"{text}{'; the best so far' if best else ''}")
        log.open(done, None if done else metrics)
        for step, (count, micro_batches) in zip(steps, prefetch(task.get_batch, steps, task.device)):
            lr = lr_at(step, s)
            row = {"step": step, "lr": lr, "count": count} | training_step(task, optimizer, lr, micro_batches)
            last = step == s.max_steps
            # SIGINT or SIGTERM, if any process has received one. A later one waits for the next step.
            stop_signal = parallel.all_reduce_max(signals[0] if signals else 0)
            validating = last or step % s.eval_interval == 0
            saving = last or stop_signal or step % s.save_interval == 0
            if validating:
                with log.paused():
                    metrics, text = task.evaluate()
                    row |= metrics
                    best = checkpointer.save_if_best(step, metrics["val_loss"])
            if on_step:
                on_step(row)
            log.add(row)
            if validating or saving or step == steps[0] or step % s.log_interval == 0:
                log.flush()  # before saving, so that log.csv holds every step that the checkpoint does
            if validating:
                print_line(f"{text}{'; the best so far' if best else ''}")
            if saving:
                with log.paused():
                    checkpointer.save(step)
            if stop_signal:
                print_line(f"stopped after step {step}; --resume --out_dir {s.out_dir} goes on from the checkpoint")
                raise SystemExit(128 + stop_signal)


# ---------------------------------------------------------------------------------------------------
# Pretraining


class Pretraining:
    """The task of predicting the next token, from a new model or from that of a checkpoint."""

    stage, unit, metrics = "pretrain", "tokens", ()
    graphed = None  # a step takes long enough without CUDA graphs

    def __init__(self, settings, checkpoint=None):
        s = self.settings = settings
        self.device = choose_device(s.device)
        check_impl(s.attn_impl, self.device)
        parallel.check_batch_size(s)

        # Data: a stream of training tokens, and validation windows of which each process has its rows
        with parallel.main_process_first():
            tokenizer = s.tokenizer or ("bytes" if s.preset == "tiny" else "gpt2")
            if checkpoint and s.tokenizer in ("", checkpoint["data"].get("tokenizer")):  # it may be a file beside it
                tokenizer = get_tokenizer(checkpoint["data"].get("tokenizer"), checkpoint["path"].parent).source
            directory = prepared_directory(s.dataset, s.source, tokenizer=tokenizer)
        self.meta = read_meta(directory, s.tokenizer and get_tokenizer(tokenizer).name)
        s.tokenizer = self.meta["tokenizer"]
        self.encoding = get_tokenizer(s.tokenizer, directory)
        self.train_tokens = open_tokens(directory, "train", self.meta, s.block_size)
        val_tokens = open_tokens(directory, "val", self.meta, s.block_size)
        ranks, rows = (parallel.RANK, parallel.WORLD_SIZE), s.micro_batch_size * parallel.WORLD_SIZE
        self.val_batches = list(fixed_batches(val_tokens, s.block_size, rows, s.eval_windows, *ranks))

        # Model
        shape = {name: getattr(s, name) for name in MODEL_FLAGS} | {"n_kv_head": s.n_kv_head or s.n_head}
        given = checkpoint["config"] if checkpoint else {"vocab_size": pad_vocab(self.encoding.n_vocab)}
        try:
            config = GPTConfig(**{**given, **shape, "attn_impl": s.attn_impl})
        except (TypeError, ValueError) as error:
            raise UserError(error) from error
        if checkpoint:
            check_fit(checkpoint, config, self.encoding)
        loads_parts = s.resume and "parts" in checkpoint  # into the sharded model, by the Checkpointer

        def build():
            model = GPT(config)
            if checkpoint and not loads_parts:
                load_weights(model, checkpoint)
            return model.set_activation_checkpointing(s.activation_checkpointing)

        torch.manual_seed(s.seed)
        self.model = parallel.build_on_device(build, self.device)
        self.compiled = compile_model(self.model, s.compile, self.device)
        parallel.sync_grads_on_last_micro_batch(self.model, s)
        self.flops_per_unit = flops_per_token(self.model)

    def get_batch(self, step):
        s, ranks = self.settings, (parallel.RANK, parallel.WORLD_SIZE)
        batch = sample_batch(self.train_tokens, s.block_size, s.batch_size, s.seed, step, *ranks)
        return s.batch_size * s.block_size, list(zip(*(tensor.split(s.micro_batch_size) for tensor in batch)))

    def loss(self, inputs, targets):
        with autocast(self.device):
            _, loss = self.compiled(inputs, targets)
        return {"loss": loss * len(inputs) / self.settings.batch_size}

    @torch.no_grad()
    def evaluate(self):
        """Measure the mean cross-entropy in nats over all target tokens of the validation windows."""
        total, num_tokens = 0.0, 0
        with autocast(self.device), uncompiled():
            for inputs, targets in progress(self.val_batches, "validating"):
                count = (targets != -100).sum().item()
                _, loss = self.model(inputs.to(self.device), targets.to(self.device))
                if count:  # some processes may have filling alone, whose loss is NaN
                    total, num_tokens = total + loss.float() * count, num_tokens + count
            lambdas = self.model.lambdas(self.val_batches[0][0][:1].to(self.device))
        sums = parallel.all_reduce_sum({"total": total, "num_tokens": num_tokens}, self.device)
        loss = (sums["total"] / sums["num_tokens"]).item()
        text = f"    validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"
        if lambdas:
            text += "; lambda by layer " + " ".join(f"{value:.2f}" for value in lambdas)
        return {"val_loss": loss}, text

    def sample(self, max_new_tokens=256):
        """Generate the beginning of a new document."""
        start = torch.tensor([[self.encoding.encode_single_token(END_OF_TEXT)]], device=self.device)
        with autocast(self.device), uncompiled():
            ids = self.model.generate(start, max_new_tokens, temperature=0.8, top_k=50, n_vocab=self.encoding.n_vocab)
        return self.encoding.decode(ids[0, 1:].tolist(), errors="replace")

    def state_dict(self):
        """Return what ckpt.pt holds of the model."""
        return self.model.state_dict()

    def best_state_dicts(self):
        """Return what the next stage starts with, at the lowest validation loss so far."""
        return {"best.pt": parallel.gather(self.model.state_dict())}


def main():
    given = parse_flags(Settings, __doc__, tiny=PRESETS["tiny"] | SHAPES["tiny"][Settings.attn])
    with parallel.process_group(), run_folder(given.get("out_dir", Settings.out_dir), given.get("resume")) as resume:
        settings, checkpoint = choose_settings(given | {"resume": resume})
        task = Pretraining(settings, checkpoint)
        optimizer = make_optimizer(task.model, settings.weight_decay)
        checkpointer = Checkpointer(task, optimizer)
        checkpointer.start(checkpoint)  # go on from it, or move an earlier run's files aside
        log = Log(task)
        describe(task)
        with oom_advice(settings):
            fit(task, optimizer, checkpointer, log)
        summarize(task, checkpointer, log)


if __name__ == "__main__":
    run_script(main)
