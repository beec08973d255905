"""sft.py and dpo.py: the losses by hand, what a run trains and saves, and how it resumes."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import STAGES, Killed, base_model, kill_at, log_of, same, tune, weights_of, write_tuning_data

import dpo
import sft
import train
from engine.checkpoint import load_checkpoint
from lora import apply_lora, disable_lora, load_lora, merge_lora
from model import ATTENTION


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_tuning_data(tmp_path_factory.mktemp("home"))


@pytest.fixture
def run(home, tmp_path):
    """Calls sft.py or dpo.py in this process, in a folder of its own."""
    return lambda stage, *flags, out="run", **options: tune(stage, home, tmp_path / out, *flags, **options)


def rows_of(examples, *indices):
    """The ids and the loss mask of some rows."""
    bounds = [(examples.offsets[i], examples.offsets[i + 1]) for i in indices]
    return [(examples.ids[a:b].tolist(), examples.mask[a:b]) for a, b in bounds]


def naive_logp(model, ids, mask):
    """The sum of the answer tokens' log-probabilities, one token at a time."""
    total = 0.0
    for t in range(1, len(ids)):
        if mask[t]:
            logits = model(torch.tensor([ids[:t]]))[0][0, -1]
            total += logits[ids[t]] - logits.logsumexp(-1)
    return total


# ------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("attn", ATTENTION)
@torch.no_grad()
def test_log_probabilities_of_sequences(home, attn):
    """In padded micro-batches, as of every sequence by itself."""
    settings = dpo.Settings(dataset=f"{home}/set", device="cpu", batch_size=4, lora_rank=4)
    task = dpo.DPO(settings, load_checkpoint(home / f"{attn}.pt"))
    task.model.double()
    indices = np.array([5, 0, 9])
    ((idx, positions, targets, per_token, per_example),) = task.micro_batches(task.train_examples, indices)
    assert per_example.item() == pytest.approx(1 / 3)
    assert per_token.item() == pytest.approx(1 / (targets != -100).sum().item())
    logps = task.logps(idx, positions, targets)
    assert logps.shape == idx.shape and (logps != 0).sum() == (targets != -100).sum()
    chosen_then_rejected = rows_of(task.train_examples, *2 * indices, *2 * indices + 1)
    for row, (ids, mask) in zip(logps, chosen_then_rejected, strict=True):
        torch.testing.assert_close(row.sum(), naive_logp(task.model, ids, mask))


# ------------------------------------------------------------------------------------- SFT


def test_sft_loss_is_the_mean_over_the_answers_tokens_of_the_whole_batch(run):
    rows = []
    for size in (4, 2, 1):
        done = run("sft", "--max_steps", 1, "--micro_batch_size", size, out=f"micro{size}")
        rows.append([float(value) for value in log_of(done.folder, "loss", "grad_norm")[0]])
    batch = rows_of(done.task.train_examples, *done.task.order[0])
    with torch.no_grad():
        total = sum(naive_logp(base_model(), ids, mask).item() for ids, mask in batch)
    assert rows[0][0] == pytest.approx(-total / sum(mask.sum() for _, mask in batch), rel=1e-5)
    assert rows[1] == pytest.approx(rows[0], rel=1e-4) and rows[2] == pytest.approx(rows[0], rel=1e-4)


def test_sft_gets_better_on_what_is_held_out(run, capsys):
    done = run("sft", "--max_steps", 60, "--eval_interval", 20)
    losses = [float(loss) for (loss,) in log_of(done.folder, "val_loss") if loss]
    first = float(capsys.readouterr().out.split("validation loss ")[1].split(";")[0])
    assert first > 5.5 and losses[-1] < losses[0] < first and losses[-1] < first - 0.3


def test_batches(run):
    """The speed counts tokens without padding; every epoch has another order; dropout is off in validation."""
    task = run("sft", "--max_steps", 1, "--lora_dropout", 0.5).task
    count, micro_batches = task.get_batch(1)
    assert count == sum(len(ids) for ids, _ in rows_of(task.train_examples, *task.order[0]))
    assert count < sum(idx.numel() for idx, *_ in micro_batches)
    first = task.order
    task.get_batch(15)  # of an epoch of 14
    assert not np.array_equal(task.order, first)
    assert task.evaluate() == task.evaluate() and task.model.training
    assert task.loss(*micro_batches[0])["loss"] != task.loss(*micro_batches[0])["loss"]


def test_validation_examples_are_spread_over_all_that_are_held_out(run):
    task = run("sft", "--max_steps", 1, "--eval_examples", 2).task
    assert len(task.val_examples) == 3
    expected = sorted(ids for ids, _ in rows_of(task.val_examples, 0, 2))
    found = sorted(row.tolist() for idx, *_ in task.val_batches for row in idx)
    assert [row[: len(ids)] for row, ids in zip(found, expected, strict=True)] == expected


def test_the_sample_ends_where_the_answer_does(run, monkeypatch):
    task = run("sft", "--max_steps", 1).task
    answer = [*b"yes", task.encoding.encode_single_token("<|im_end|>"), *b"no"]
    monkeypatch.setattr(sft.Decoder, "stream", lambda *_: (torch.tensor([[token]]) for token in answer))
    text = task.sample()
    assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\nyes")


# ------------------------------------------------------------------------------------- DPO


def test_dpo_loss_by_hand():
    policy_chosen, policy_rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-12.0, -2.0])
    reference_chosen, reference_rejected = torch.tensor([-11.0, -1.0]), torch.tensor([-11.0, -4.0])
    logps = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    losses, chosen, rejected = dpo.dpo_loss(*logps, beta=0.5)
    assert chosen.tolist() == [0.5, -1.0] and rejected.tolist() == [-0.5, 1.0]
    # -log sigmoid(1) and -log sigmoid(-2)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(2))])
    smoothed, *_ = dpo.dpo_loss(*logps, beta=0.5, label_smoothing=0.25)
    expected = [0.75 * math.log(1 + math.exp(-m)) + 0.25 * math.log(1 + math.exp(m)) for m in (1, -2)]
    assert smoothed.tolist() == pytest.approx(expected)


def test_dpo_gradient_prefers_the_chosen_answer():
    """Equation 7's gradient: beta * sigmoid(rejected reward - chosen reward), up for chosen and down for rejected."""
    logps = [torch.tensor([value], requires_grad=True) for value in (-10.0, -12.0, -11.0, -11.0)]
    losses, chosen, rejected = dpo.dpo_loss(*logps, beta=0.5)
    losses.sum().backward()
    weight = 0.5 / (1 + math.exp(1))
    assert [x.grad.item() for x in logps[:2]] == pytest.approx([-weight, weight])
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("attn", ATTENTION)
def test_dpo_begins_at_exactly_log_2(run, attn):
    """And with the log-probabilities of the model that it begins with."""
    done = run("dpo", "--max_steps", 1, attn=attn)
    row = log_of(done.folder, "loss", "accuracy", "margin", "chosen_reward", "rejected_reward")[0]
    assert row == (str(F.softplus(torch.zeros(())).item()), "0.0", "0.0", "0.0", "0.0")
    logged = [float(value) for value in log_of(done.folder, "chosen_logp", "rejected_logp")[0]]
    for side, mean in enumerate(logged):
        batch = rows_of(done.task.train_examples, *2 * done.task.order[0] + side)
        with torch.no_grad():
            assert mean == pytest.approx(sum(naive_logp(base_model(attn), *row).item() for row in batch) / 4, rel=1e-5)


def test_dpo_has_the_beta_and_label_smoothing_of_its_settings(run):
    task = run("dpo", "--max_steps", 2, "--beta", 0.5, "--label_smoothing", 0.25).task
    _, ((idx, positions, targets, *weights),) = task.get_batch(1)
    policy = task.logps(idx, positions, targets).sum(-1)
    with disable_lora(task.model):
        reference = task.logps(idx, positions, targets).sum(-1)
    losses, chosen, rejected = dpo.dpo_loss(*policy.chunk(2), *reference.chunk(2), beta=0.5, label_smoothing=0.25)
    values = task.loss(idx, positions, targets, *weights)
    expected = losses.mean(), chosen.mean(), rejected.mean()
    torch.testing.assert_close(tuple(values[name] for name in ("loss", "chosen_reward", "rejected_reward")), expected)
    assert chosen.abs().min() > 0


def test_dpo_learns_what_is_preferred(run):
    done = run("dpo", "--max_steps", 40, "--eval_interval", 10)
    columns = ("val_loss", "val_accuracy", "val_margin", "val_chosen_reward", "val_rejected_reward")
    values = [[float(value) for value in row] for row in log_of(done.folder, *columns) if row[0]]
    assert values[-1][0] < 0.5 and values[-1][1] == 1.0 and values[-1][2] > values[0][2] > 0
    for _, _, margin, chosen, rejected in values:
        assert margin == pytest.approx(chosen - rejected, rel=1e-4)
    with disable_lora(done.task.model):  # the reference is the model that it began with
        assert torch.equal(done.task.model(torch.arange(20)[None])[0], base_model()(torch.arange(20)[None])[0])


# ------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("stage", STAGES)
def test_trains_adapters_alone_and_saves_them_and_the_merged_model(run, stage):
    done = run(stage, "--save_interval", 4)
    model = done.task.model
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * 2 and all(name.split(".")[-1] in ("lora_A", "lora_B") for name in adapters)
    assert {p for group in done.optimizer.param_groups for p in group["params"]} == {*adapters.values()}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    before, after = base_model().state_dict(), model.state_dict()
    assert all(torch.equal(before[name.replace(".base", "")], after[name]) for name in after if ".lora_" not in name)

    best, adapter = (torch.load(done.folder / name, weights_only=True) for name in ("best.pt", "adapter.pt"))
    assert best["step"] == adapter["step"] == 8 and best["stage"] == stage and "optimizer" not in best
    merged = base_model(seed=5)
    merged.load_state_dict(best["model"])
    by_hand = apply_lora(base_model(), adapter["settings"]["lora_rank"], adapter["settings"]["lora_alpha"])
    load_lora(by_hand, adapter["model"])
    idx = torch.arange(40)[None]
    assert torch.equal(model(idx)[0], by_hand(idx)[0])
    torch.testing.assert_close(model(idx)[0], merged(idx)[0], rtol=1e-5, atol=1e-5)
    assert same(merge_lora(by_hand).state_dict(), best["model"])


@pytest.mark.parametrize("stage, flags", [("sft", ["--lora_dropout", 0.3, "--max_steps", 15]), ("dpo", [])])
def test_resumed_run_equals_uninterrupted_bit_for_bit(run, stage, flags, tmp_path):
    """Also across the end of an epoch, which has 14 steps."""
    whole = run(stage, "--micro_batch_size", 2, *flags, out="whole")
    last = whole.task.settings.max_steps
    with pytest.raises(Killed):
        run(stage, "--micro_batch_size", 2, *flags, out="cut", on_step=kill_at(last - 1))
    cut = run(stage, "--resume", *flags, out="cut")
    columns = (cut.folder / "log.csv").read_text().splitlines()[0].split(",")
    columns = [column for column in columns if not column.endswith("_per_s")]
    assert log_of(cut.folder, *columns) == log_of(whole.folder, *columns)
    for name in ("ckpt.pt", "best.pt", "adapter.pt"):
        assert same(weights_of(cut.folder, name), weights_of(whole.folder, name))


def test_dpo_starts_from_what_sft_saved(run):
    first = run("sft", out="sft")
    second = run("dpo", "--init_from", first.folder / "best.pt", "--max_steps", 1, out="dpo")
    weights = second.task.model.state_dict()
    base = {name.replace(".base", ""): tensor for name, tensor in weights.items() if ".lora_" not in name}
    assert same(base, weights_of(first.folder, "best.pt"))


def test_what_a_resumed_run_cannot_change():
    """The model, the objective, and what the loss of best.pt was measured on."""
    tuning = {"attn", "lora_rank", "lora_alpha", "eval_examples"}
    fixed = {train: {"attn", "block_size", "eval_windows"}, sft: tuning, dpo: tuning | {"beta", "label_smoothing"}}
    for script, names in fixed.items():
        assert {f.name for f in fields(script.Settings) if f.metadata["fixed"]} >= names


def test_recipe():
    s, d = sft.Settings(), dpo.Settings()
    assert (s.learning_rate, s.lora_rank, s.lora_alpha, s.max_steps) == (2e-4, 64, 128, 1000)
    assert (d.learning_rate, d.lora_rank, d.lora_alpha, d.max_steps, d.beta) == (5e-6, 64, 128, 625, 0.1)
    assert (s.dataset, s.init_from) == ("slimorca", "out/pretrain/best.pt")
    assert (d.dataset, d.init_from) == ("orca_dpo_pairs", "out/sft/best.pt")
