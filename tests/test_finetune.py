"""sft.py and dpo.py: the losses by hand, what a run trains and saves, and whole runs."""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dpo
import sft
import train
from data import UserError
from data.dataset import write_dataset, write_examples
from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import tokenize as tokenize_conversation
from lora import apply_lora, disable_lora, load_lora, lora_state_dict, merge_lora
from model import ATTENTION, GPT, GPTConfig

STAGES = {"sft": (sft, sft.SFT), "dpo": (dpo, dpo.DPO)}
SMALL = ["--max_steps", "8", "--batch_size", "4", "--lora_rank", "4", "--lora_alpha", "8", "--warmup_steps", "2"]
SMALL += ["--eval_interval", "4", "--save_interval", "3", "--log_interval", "2", "--learning_rate", "1e-2"]
SMALL += ["--device", "cpu", "--eval_examples", "5"]
SHAPE = dict(block_size=96, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, n_inner=48, vocab_size=320)


def tiny_model(attn="v2", seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(attn=attn, **SHAPE))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pretrained model for each attention, conversations and pairs, which `run` uses."""
    home = tmp_path_factory.mktemp("home")
    for attn in ATTENTION:
        model = tiny_model(attn)
        train.save_checkpoint(
            home / f"{attn}.pt", model=model.state_dict(), config=train.asdict(model.config), settings={},
            data={"tokenizer": "bytes"}, stage="pretrain", step=7,
        )  # fmt: skip
    questions = [f"{i} and {i % 7}?" for i in range(60)]
    turns = [[("human", q), ("gpt", f"sum {i}" * (1 + i % 3))] for i, q in enumerate(questions)]
    rows = [{"conversations": [dict([("from", role), ("value", text)]) for role, text in row]} for row in turns]
    write_examples(home / "set" / "sft", rows, tokenize_conversation, "bytes", 96, "a test")
    rows = [
        dict(system="", question=q, chosen=f"yes {q}", rejected="no" * (1 + i % 3)) for i, q in enumerate(questions)
    ]
    write_examples(home / "set" / "dpo", rows, tokenize_pair, "bytes", 96, "a test")
    return home


@pytest.fixture
def run(home, tmp_path):
    """Calls sft.py or dpo.py in this process, in a folder of its own, and returns the finished run."""

    def call(stage, *flags, out="run", attn="v2"):
        module, kind = STAGES[stage]
        new = [] if "--resume" in flags else ["--init_from", home / f"{attn}.pt"]
        flags = [*SMALL, "--dataset", home / "set", "--out_dir", tmp_path / out, *new, *flags]
        given = train.parse_flags(module.Settings, "", {}, list(map(str, flags)))
        with train.locked(tmp_path / out):
            finished = kind(*sft.choose_settings(given, module.Settings, module.PRESETS, kind.stage))
            train.carry_out(finished)
        return finished

    return call


def log_of(folder, *columns):
    with open(folder / "log.csv", newline="") as file:
        return [tuple(row[c] for c in columns) for row in csv.DictReader(file)]


def saved(folder, name):
    return torch.load(folder / name, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------- log-probabilities


def naive_logps(model, ids, mask):
    """The sum of the learned tokens' log-probabilities, one token at a time."""
    total = 0.0
    for t in range(1, len(ids)):
        if mask[t]:
            logits = model(torch.tensor([ids[:t]]))[0][0, -1]
            total += logits[ids[t]] - logits.logsumexp(-1)
    return total


@pytest.mark.parametrize("attn", ATTENTION)
def test_log_probabilities_of_sequences(home, attn):
    """In padded micro-batches, as of every sequence by itself."""
    settings = dpo.Settings(dataset=f"{home}/set", device="cpu", batch_size=4, lora_rank=4)
    run = dpo.DPO(settings, train.load_checkpoint(home / f"{attn}.pt"))
    run.model.double()
    numbers = np.array([5, 0, 9])
    ((idx, positions, targets, scale),) = run.micro_batches(run.train_examples, numbers)
    assert scale.item() == pytest.approx(1 / 3)
    logps = run.logps(idx, positions, targets)
    assert logps.shape == idx.shape and (logps != 0).sum() == (targets != -100).sum()
    examples = run.train_examples
    for row, number in enumerate([*2 * numbers, *2 * numbers + 1]):
        a, b = examples.offsets[number], examples.offsets[number + 1]
        expected = naive_logps(run.model, examples.ids[a:b].tolist(), examples.mask[a:b])
        torch.testing.assert_close(logps[row].sum(), expected)


def test_log_probabilities_are_float32_sums():
    model = tiny_model().bfloat16().requires_grad_(False)
    idx, positions, targets = torch.zeros(2, 8, dtype=torch.long), torch.tensor([3]), torch.tensor([1])
    logps = sft.token_logps(model, idx, positions, targets)
    assert logps.dtype == torch.float32 and (logps != 0).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("attn", ATTENTION)
def test_layers_compile_without_graph_breaks_once_for_all_shapes(attn, monkeypatch):
    model = apply_lora(tiny_model(attn), 4, 8, dropout=0.5)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile, patch = torch.compile, monkeypatch.setattr
    patch(torch, "compile", lambda f, dynamic, options: compile(f, dynamic=dynamic, fullgraph=True, backend=backend))
    sft.compile_exactly(model)
    for B, T in ((2, 20), (3, 30), (4, 50), (5, 64)):
        idx, positions = torch.zeros(B, T, dtype=torch.long), torch.arange(T)
        (-sft.token_logps(model, idx, positions, positions).sum()).backward()
    assert 1 <= len(graphs) <= 2  # the first layer, whose input has no gradient, and all the others
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- SFT


def test_sft_loss_is_the_mean_over_the_learned_tokens_of_the_whole_batch(run):
    for size in (4, 2, 1):
        finished = run("sft", "--max_steps", 1, "--micro_batch_size", size, out=f"micro{size}")
        losses = log_of(finished.out_dir, "loss", "grad_norm")[0]
        numbers = finished.order[0]
        total = count = 0
        base = tiny_model()
        for number in numbers:
            a, b = finished.train_examples.offsets[number], finished.train_examples.offsets[number + 1]
            ids, mask = finished.train_examples.ids[a:b].tolist(), finished.train_examples.mask[a:b]
            total, count = total - naive_logps(base, ids, mask).item(), count + mask.sum()
        assert float(losses[0]) == pytest.approx(total / count, rel=1e-5)
        if size == 4:
            whole = losses
        assert float(losses[1]) == pytest.approx(float(whole[1]), rel=1e-4)


def test_sft_learns_and_what_is_held_out_gets_better(run, capsys):
    finished = run("sft", "--max_steps", 60, "--eval_interval", 20)
    losses = [float(loss) for (loss,) in log_of(finished.out_dir, "val_loss") if loss]
    first = float(capsys.readouterr().out.split("validation loss ")[1].split(";")[0])
    assert first > 5.5 and losses[-1] < losses[0] < first and losses[-1] < first - 0.3


def test_speed_counts_tokens_without_padding(run):
    finished = run("sft", "--max_steps", 1)
    work, micro_batches = finished.make_batch(1)
    rows = finished.order[0]
    assert work == sum(finished.train_examples.offsets[i + 1] - finished.train_examples.offsets[i] for i in rows)
    assert work < sum(idx.numel() for idx, *_ in micro_batches)


def test_every_epoch_has_another_order(run):
    finished = run("sft", "--max_steps", 1)
    first = finished.order
    finished.make_batch(15)  # of an epoch of 14
    assert finished.epoch == 1 and not np.array_equal(finished.order, first)


def test_dropout_is_off_in_validation(run):
    finished = run("sft", "--lora_dropout", 0.5)
    assert finished.evaluate() == finished.evaluate()
    assert finished.model.training
    tensors = finished.make_batch(1)[1][0]
    assert finished.loss_of(*tensors)["loss"] != finished.loss_of(*tensors)["loss"]


# ------------------------------------------------------------------------------------- DPO


def test_dpo_loss_by_hand():
    policy_chosen, policy_rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-12.0, -2.0])
    reference_chosen, reference_rejected = torch.tensor([-11.0, -1.0]), torch.tensor([-11.0, -4.0])
    losses, chosen, rejected = dpo.dpo_loss(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.5
    )
    assert chosen.tolist() == [0.5, -1.0] and rejected.tolist() == [-0.5, 1.0]
    # -log sigmoid(1) and -log sigmoid(-2)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(2))])
    smoothed, *_ = dpo.dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, 0.5, 0.25)
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
    finished = run("dpo", "--max_steps", 1, attn=attn)
    row = log_of(finished.out_dir, "loss", "accuracy", "margin", "chosen_reward", "rejected_reward")[0]
    assert row == (str(F.softplus(torch.zeros(())).item()), "0.0", "0.0", "0.0", "0.0")


def test_dpo_reference_is_the_model_that_it_began_with(run):
    finished = run("dpo", "--max_steps", 30)
    with disable_lora(finished.model):
        expected = tiny_model()(torch.arange(20)[None])[0]
        assert torch.equal(finished.model(torch.arange(20)[None])[0], expected)


def test_dpo_learns_what_is_preferred(run):
    finished = run("dpo", "--max_steps", 40, "--eval_interval", 10)
    rows = log_of(
        finished.out_dir, "val_loss", "val_accuracy", "val_margin", "val_chosen_reward", "val_rejected_reward"
    )
    values = [list(map(float, row)) for row in rows if row[0]]
    assert values[-1][0] < 0.5 and values[-1][1] == 1.0 and values[-1][2] > values[0][2] > 0
    for _, _, margin, chosen, rejected in values:
        assert margin == pytest.approx(chosen - rejected, rel=1e-4)


def test_dpo_log_probabilities_are_those_of_the_policy(run):
    finished = run("dpo", "--max_steps", 1)
    chosen, rejected = map(float, log_of(finished.out_dir, "chosen_logp", "rejected_logp")[0])
    sums = [0.0, 0.0]
    for number in finished.order[0]:
        for side in (0, 1):
            a, b = (
                finished.train_examples.offsets[2 * number + side],
                finished.train_examples.offsets[2 * number + side + 1],
            )
            sums[side] += naive_logps(
                tiny_model(), finished.train_examples.ids[a:b].tolist(), finished.train_examples.mask[a:b]
            ).item()
    assert [chosen, rejected] == pytest.approx([sums[0] / 4, sums[1] / 4], rel=1e-5)


# ------------------------------------------------------------------------------------- whole runs, of both


@pytest.mark.parametrize("stage", STAGES)
def test_only_adapters_are_trained(run, stage):
    finished = run(stage)
    adapters = {name for name, p in finished.model.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * 2 and all(name.split(".")[-1] in ("lora_A", "lora_B") for name in adapters)
    assert all(p.grad is None for p in finished.model.parameters() if not p.requires_grad)
    state = finished.optimizer.state_dict()["state"]
    numbers = sum(p.numel() for p in finished.model.parameters() if p.requires_grad)
    assert sum(moment.numel() for s in state.values() for moment in s.values() if moment.dim()) == 2 * numbers
    before = tiny_model().state_dict()
    after = finished.model.state_dict()
    assert all(torch.equal(before[name.replace(".base", "")], after[name]) for name in after if ".lora_" not in name)


@pytest.mark.parametrize("stage", STAGES)
def test_saves_the_adapter_and_the_merged_model(run, stage):
    finished = run(stage, "--save_interval", 4)
    best, adapter = saved(finished.out_dir, "best.pt"), saved(finished.out_dir, "adapter.pt")
    assert best["step"] == adapter["step"] == 8 and best["stage"] == stage and "optimizer" not in best
    merged = tiny_model(seed=5)
    merged.load_state_dict(best["model"])
    by_hand = apply_lora(tiny_model(), adapter["settings"]["lora_rank"], adapter["settings"]["lora_alpha"])
    load_lora(by_hand, adapter["model"])
    idx = torch.arange(40)[None]
    torch.testing.assert_close(finished.model(idx)[0], by_hand(idx)[0], rtol=0, atol=0)
    torch.testing.assert_close(finished.model(idx)[0], merged(idx)[0], rtol=1e-5, atol=1e-5)
    assert same(merge_lora(by_hand).state_dict(), best["model"])


@pytest.mark.parametrize("stage, flags", [("sft", ["--lora_dropout", 0.3]), ("dpo", []), ("sft", ["--max_steps", 30])])
def test_resumed_run_equals_uninterrupted_bit_for_bit(run, stage, flags, monkeypatch):
    """Also across an epoch, which has 14 steps."""
    flags = ["--micro_batch_size", 2, *flags]
    whole = run(stage, *flags, out="whole")
    last, step, calls = whole.settings.max_steps, train.optimizer_step, []

    class Killed(BaseException):
        pass

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == last - 1:
            raise Killed
        return step(*args, **options)

    monkeypatch.setattr(train, "optimizer_step", killed)
    with pytest.raises(Killed):
        run(stage, *flags, out="cut")
    monkeypatch.setattr(train, "optimizer_step", step)
    cut = run(stage, "--resume", *flags, out="cut")
    columns = [column for column in cut_columns(cut.out_dir) if not column.endswith("_per_s")]
    assert log_of(cut.out_dir, *columns) == log_of(whole.out_dir, *columns)
    for name in ("ckpt.pt", "best.pt", "adapter.pt"):
        assert same(saved(cut.out_dir, name)["model"], saved(whole.out_dir, name)["model"])


def cut_columns(folder):
    return (folder / "log.csv").read_text().splitlines()[0].split(",")


@pytest.mark.parametrize("attn", ATTENTION)
def test_every_attention_can_be_tuned(run, attn, capsys):
    for stage in STAGES:
        run(stage, attn=attn, out=stage)
    text = capsys.readouterr().out
    assert f"model: {attn}" in text and "of them trained" in text and "<|im_start|>assistant" in text


def test_dpo_starts_from_what_sft_saved(run):
    first = run("sft", out="sft")
    second = run("dpo", "--init_from", first.out_dir / "best.pt", "--max_steps", 1, out="dpo")
    with disable_lora(second.model):
        base = {name.replace(".base", ""): t for name, t in second.model.state_dict().items() if ".lora_" not in name}
    assert same(base, saved(first.out_dir, "best.pt")["model"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", STAGES)
def test_gpu_graphs_do_what_plain_steps_do(run, stage):
    """Batches of several shapes, in micro-batches, in an epoch and the next."""
    flags = ["--device", "cuda", "--micro_batch_size", 2, "--max_steps", 20]
    plain, graphs = (run(stage, *flags, "--compile", mode, out=mode) for mode in ("off", "on"))
    logs = [log_of(run.out_dir, "loss", "grad_norm") for run in (graphs, plain)]
    for ours, expected in zip(*logs, strict=True):
        assert [float(x) for x in ours] == pytest.approx([float(x) for x in expected], rel=3e-2)
    ours, expected = (torch.cat([t.flatten() for t in lora_state_dict(run.model).values()]) for run in (graphs, plain))
    assert (ours - expected).norm() < 0.05 * expected.norm()
    for name in ("ckpt.pt", "best.pt"):
        assert {t.dtype for t in saved(graphs.out_dir, name)["model"].values()} == {torch.float32}


def test_recipe():
    s, d = sft.Settings(), dpo.Settings()
    assert (s.learning_rate, s.lora_rank, s.lora_alpha, s.max_steps, s.init_from) == (
        2e-4, 64, 128, 1000, "out/pretrain/best.pt",
    )  # fmt: skip
    assert (d.learning_rate, d.lora_rank, d.lora_alpha, d.max_steps, d.beta, d.init_from) == (
        5e-6, 64, 128, 625, 0.1, "out/sft/best.pt",
    )  # fmt: skip
    assert s.dataset == "slimorca" and d.dataset == "orca_dpo_pairs"


@pytest.mark.parametrize(
    "stage, flags, message",
    [("sft", ["--init_from", "nosuch.pt"], "there is no checkpoint nosuch.pt"),
     ("sft", ["--attn", "v1"], "has the attention v2, not v1"),
     ("sft", ["--lora_rank", "64"], "LoRA rank 64 does not fit a matrix of"),
     ("sft", ["--batch_size", "64"], "has 57 examples, fewer than a batch of 64"),
     ("sft", ["--dataset", "nosuch"], "there is no data set nosuch"),
     ("dpo", ["--dataset", "slimorca"], "the data set slimorca is not for dpo; orca_dpo_pairs and tiny are"),
     ("sft", ["--resume"], "there is no checkpoint"),
     ("dpo", ["--batch_size", "6", "--micro_batch_size", "4"], "not a multiple"),
     ("dpo", ["--source", "nosuch.jsonl", "--dataset", "./nosuch"], "cannot read nosuch.jsonl")],
)  # fmt: skip
def test_impossible_settings(run, stage, flags, message):
    with pytest.raises(UserError, match=message):
        run(stage, *flags)


def test_a_stage_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module, path in ((sft, "out/pretrain/best.pt"), (dpo, "out/sft/best.pt")):
        with pytest.raises(UserError, match=f"there is no {path} yet: train the stage before"):
            sft.choose_settings({}, module.Settings, module.PRESETS, "")


def test_checkpoints_that_do_not_fit(run, home, tmp_path):
    finished = run("sft")
    for flags, message in (
        (["--init_from", finished.out_dir / "ckpt.pt"], "best.pt beside it holds the whole model"),
        (["--init_from", finished.out_dir / "adapter.pt"], "best.pt beside it"),
    ):
        with pytest.raises(UserError, match=message):
            run("sft", *flags, out="other")
    with pytest.raises(UserError, match="a checkpoint of the stage sft, not dpo"):
        run("dpo", "--resume")
    for flag in (["--lora_rank", 8], ["--lora_alpha", 9], ["--attn", "v1"]):
        with pytest.raises(UserError, match=f"begun with {flag[0]} .*, which --resume cannot change"):
            run("sft", "--resume", *flag)
    good = train.load_checkpoint(home / "v2.pt")
    for change, message in (
        (dict(config=good["config"] | {"of_a_later_version": 1}), "config cannot be used"),
        (dict(data={}), "no tokenizer is called None"),
    ):
        torch.save(good | change, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=message):
            run("sft", "--init_from", tmp_path / "odd.pt", out="odd")


def test_preset_follows_the_tokenizer(home, capsys):
    given = {"init_from": str(home / "v2.pt")}
    settings, start = sft.choose_settings(given, sft.Settings, sft.PRESETS, "sft")
    assert (settings.preset, settings.dataset, settings.attn) == ("tiny", "tiny", "v2") and start["step"] == 7
    assert "has the tokenizer bytes" in capsys.readouterr().out
    settings, _ = sft.choose_settings(given | {"preset": "ldiff"}, sft.Settings, sft.PRESETS, "sft")
    assert settings.dataset == "slimorca"


def test_pretraining_can_go_on_from_a_tuned_model(run, home, tmp_path):
    finished = run("sft")
    text = "some lines of text\n" * 50
    write_dataset(tmp_path / "text", {"train": [text], "val": [text]}, "bytes", "a test")
    flags = ["--init_from", finished.out_dir / "best.pt", "--dataset", tmp_path / "text", "--max_steps", 1]
    flags += ["--preset", "tiny", "--out_dir", tmp_path / "again", "--device", "cpu", "--eval_windows", 2]
    again = train.Pretraining(*train.choose_settings(train.parse_flags(train.Settings, "", {}, list(map(str, flags)))))
    assert same(again.model.state_dict(), saved(finished.out_dir, "best.pt")["model"])
    assert isinstance(again.model.layers[0].attn.q_proj, nn.Linear)
