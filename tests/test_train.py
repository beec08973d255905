"""The training loop, and pretraining with it: the recipe, one step, whole runs, and what a fork replaces."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from small import Killed, kill_at, log_of, pretrain, same, tiny_config, weights_of

import train
from engine.log import flops_per_token
from model import ATTENTION, GPT, GPTConfig


@pytest.fixture
def run(small_data, tmp_path):
    """Calls train.py in this process, in a folder of its own."""
    return lambda *flags, out="run", **options: pretrain(small_data, tmp_path / out, *flags, **options)


# ------------------------------------------------------------------------------------- the recipe


def test_defaults_are_the_recipe():
    s, _ = train.choose_settings({"preset": "ldiff"})
    assert (s.learning_rate, s.warmup_steps, s.weight_decay, s.block_size, s.max_steps) == (6e-4, 200, 0.1, 2048, 1000)
    assert (s.dataset, s.n_layer, s.n_embd, s.attn) == ("wikitext2", 12, 768, "v2")
    assert GPTConfig().rope_theta == 10000 and GPTConfig().block_size == 2048


@pytest.mark.parametrize("n_kv_layers", [12, 6])
@pytest.mark.parametrize("attn, attention_products", [("vanilla", 2), ("v1", 3), ("v2", 4)])
def test_parameters_and_flops_of_the_recipe(attn, attention_products, n_kv_layers):
    s, _ = train.choose_settings({"preset": "ldiff", "attn": attn})
    s.n_inner += 256 if n_kv_layers == 6 else 0  # as train.py says beside SHAPES
    shape = {name: getattr(s, name) for name in ("n_layer", "n_embd", "n_head", "head_dim", "n_inner", "block_size")}
    with torch.device("meta"):
        model = GPT(GPTConfig(attn=attn, n_kv_head=s.n_head, n_kv_layers=n_kv_layers, **shape))
    assert model.num_params() / 1e6 == pytest.approx(158.7, abs=0.05)
    q = 2 if attn == "v2" else 1
    per_layer = (q + 1) * 768**2 + 3 * 768 * s.n_inner + (768 * 6 if attn == "v2" else 0)
    products = 12 * per_layer + n_kv_layers * 2 * 768**2 + 768 * 50304  # the embedding is looked up, not multiplied
    scores_and_values = 12 * attention_products * 768 * (2048 / 2)
    assert flops_per_token(model) == 6 * (products + scores_and_values)


def test_learning_rate_schedule():
    s = train.Settings(learning_rate=6e-4, warmup_steps=200, max_steps=1000)
    assert train.lr_at(1, s) == pytest.approx(3e-6)
    assert train.lr_at(100, s) == pytest.approx(3e-4)
    assert train.lr_at(200, s) == pytest.approx(6e-4)
    assert train.lr_at(600, s) == pytest.approx((6e-4 + 6e-5) / 2)  # half way down the cosine
    assert train.lr_at(1000, s) == pytest.approx(6e-5)
    without_warmup = train.Settings(learning_rate=1.0, warmup_steps=0, max_steps=2)
    assert train.lr_at(1, without_warmup) == pytest.approx(0.55)
    only_warmup = train.Settings(learning_rate=1.0, warmup_steps=200, max_steps=100)
    assert train.lr_at(100, only_warmup) == pytest.approx(0.5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attn", ATTENTION)
def test_weight_decay_is_for_matrices_alone(attn, tied):
    model = GPT(tiny_config(attn, n_layer=1, tie_embeddings=tied))
    decayed, spared = train.make_optimizer(model, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    assert decayed["betas"] == spared["betas"] == (0.9, 0.95)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in (decayed, spared))
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert all(name.endswith("_proj.weight") or name == "lm_head.weight" for name in decayed)
    assert ("lm_head.weight" in decayed) != tied
    assert "embed_tokens.weight" in spared
    assert ("layers.0.attn.lambda_proj.weight" in decayed) == (attn == "v2")
    assert ("layers.0.attn.lambda_q1" in spared) == (attn == "v1")


# ------------------------------------------------------------------------------------- one step


def toy_task(loss):
    """What training_step() needs of a task."""
    return SimpleNamespace(loss=loss, device=torch.device("cpu"), graphed=None)


def test_accumulated_gradients_equal_those_of_the_large_batch():
    torch.manual_seed(0)
    batch = torch.randn(12, 5, dtype=torch.double), torch.randn(12, 3, dtype=torch.double)
    results = []
    for micro_batch_size in (12, 4, 1):
        torch.manual_seed(1)
        layer = nn.Linear(5, 3, dtype=torch.double)

        def loss(x, y, layer=layer):  # shares of the mean over all 36 numbers, and of 1
            return {"loss": (layer(x) - y).square().sum() / 36, "one": torch.tensor(len(x) / 12)}

        micro_batches = zip(*(tensor.split(micro_batch_size) for tensor in batch))
        row = train.training_step(toy_task(loss), train.make_optimizer(layer, 0.1), 1e-2, micro_batches, max_norm=0.5)
        assert row["grad_norm"] > 0.5  # so that it is clipped
        results.append((row, layer.weight.detach()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_gradients_are_clipped():
    layer = nn.Linear(4, 1, bias=False)
    before, batch = layer.weight.detach().clone(), (torch.full((2, 4), 100.0),)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    row = train.training_step(toy_task(lambda x: {"loss": layer(x).mean()}), optimizer, 1.0, [batch])
    assert row["grad_norm"].item() == pytest.approx(200.0)
    assert (layer.weight - before).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_all_parameters_have_the_same_learning_rate():
    layer = nn.Linear(4, 1)  # the matrix decays, the bias does not
    optimizer = train.make_optimizer(layer, 0.1)
    for lr in (0.25, 0.125):
        train.training_step(toy_task(lambda x: {"loss": layer(x).mean()}), optimizer, lr, [(torch.ones(2, 4),)])
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]


class Signs(torch.optim.Optimizer):
    """An optimizer that is not PyTorch's own, with a state."""

    def __init__(self, parameters):
        super().__init__(parameters, dict(lr=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("total", torch.zeros_like(p))
                p -= group["lr"] * total.add_(p.grad).sign()


OPTIMIZERS = {
    "ours": lambda parameters: train.make_optimizer(nn.ParameterList(parameters), 0.1),
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "fused SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Signs": Signs,
}
NOT_FINITE = {  # a term of the loss whose value, gradient or both are not finite
    "loss inf": lambda weight: torch.tensor(math.inf),
    "loss nan": lambda weight: torch.tensor(math.nan),
    "gradient inf": lambda weight: (weight - weight.detach()).clamp(min=0).sum().sqrt(),
    "both": lambda weight: weight.sum() * math.nan,
}


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_is_skipped(optimizer, bad):
    """Weights and the optimizer's state stay, and the next step is as if it had not been."""
    states = []
    for terms in ((None, None), (None, bad, None), (bad, None, bad, bad, None)):
        torch.manual_seed(0)
        layer = nn.Linear(2, 1, bias=False)
        ours, remaining = OPTIMIZERS[optimizer](list(layer.parameters())), iter(terms)

        def loss(x, layer=layer, remaining=remaining):
            term = next(remaining)
            return {"loss": layer(x).square().mean() + (NOT_FINITE[term](layer.weight) if term else 0.0)}

        rows = [train.training_step(toy_task(loss), ours, 0.1, [(torch.ones(1, 2),)]) for _ in terms]
        assert [bool(row["skipped"]) for row in rows] == [term is not None for term in terms]
        states.append([layer.weight.detach(), *ours.state[layer.weight].values()])
    for other in states[1:]:
        assert all(map(torch.equal, other, states[0]))


def test_validation_is_the_mean_over_all_tokens_of_the_validation_data(run, small_data):
    done = run("--max_steps", 1)
    task = done.task
    tokens = np.fromfile(small_data / "val.bin", np.uint16)
    inputs, targets = (torch.cat(tensors) for tensors in zip(*task.val_batches))
    assert inputs[0].tolist() == tokens[:16].tolist() and targets[0].tolist() == tokens[1:17].tolist()
    expected = task.model(inputs, targets)[1].item()
    assert task.evaluate()[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert float(log_of(done.folder, "val_loss")[0][0]) == pytest.approx(expected, rel=1e-5)

    task.val_batches = [(inputs[:1], targets[:1]), (inputs[1:4], targets[1:4])]  # not the mean of two means
    assert task.evaluate()[0]["val_loss"] == pytest.approx(task.model(inputs[:4], targets[:4])[1].item(), rel=1e-5)


def test_validation_windows_are_spread_over_the_text():
    for length, count, starts in ((101, 4, [0, 25, 50, 75]), (801, 5, [0, 160, 320, 480, 640]), (17, 9, [0, 8])):
        batches = train.fixed_batches(np.arange(length), 8, 3, count)
        firsts = [row[0].item() for inputs, targets in batches for row in inputs[targets[:, 0] != -100]]
        assert firsts == starts


# ------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("attn", ATTENTION)
def test_training_learns(run, attn, capsys):
    done = run("--attn", attn, "--max_steps", 60, "--learning_rate", 3e-2)
    losses = [float(loss) for (loss,) in log_of(done.folder, "loss")]
    assert losses[0] > 5 and losses[-1] < 2.0
    text = capsys.readouterr().out
    assert "settings: preset=tiny" in text and f"model: {attn}" in text
    assert ("lambda by layer" in text) == hasattr(ATTENTION[attn], "lam")


def test_log_has_a_row_a_step(run):
    folder = run().folder
    assert log_of(folder, "step") == [(str(step),) for step in range(1, 9)]
    assert [step for step, loss in log_of(folder, "step", "val_loss") if loss] == ["4", "8"]
    assert all(float(value) > 0 for row in log_of(folder, "loss", "grad_norm", "lr", "tokens_per_s") for value in row)


def test_seed_decides_everything(run):
    first, again, other = (
        log_of(run("--seed", n, out=out).folder, "loss") for n, out in ((5, "a"), (5, "b"), (6, "c"))
    )
    assert first == again != other


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_resumed_run_equals_uninterrupted_bit_for_bit(run, attn, tmp_path):
    flags = ["--attn", attn, "--micro_batch_size", 2, "--log_interval", 1]
    whole = run(*flags, out="whole").folder

    with pytest.raises(Killed):
        run(*flags, out="cut", on_step=kill_at(8))
    cut = tmp_path / "cut"
    saved = torch.load(cut / "ckpt.pt", weights_only=True)
    assert saved["step"] == 6 and len(log_of(cut, "step")) == 7  # logged beyond the checkpoint
    run("--resume", "--attn", attn, out="cut")

    columns = ("step", "loss", "grad_norm", "lr", "val_loss")
    assert log_of(cut, *columns) == log_of(whole, *columns)
    for name in ("ckpt.pt", "best.pt"):
        assert same(weights_of(cut, name), weights_of(whole, name))


def test_best_checkpoint_is_the_one_with_the_lowest_validation_loss(run):
    folder = run("--learning_rate", 1.0, "--warmup_steps", 8, "--eval_interval", 1).folder  # diverges in the end
    losses = [(float(loss), int(step)) for step, loss in log_of(folder, "step", "val_loss")]
    best = torch.load(folder / "best.pt", weights_only=True)
    assert (best["best_val_loss"], best["step"]) == min(losses)
    assert best["step"] != 8 and "optimizer" not in best
    run("--resume", "--max_steps", 10, "--eval_interval", 1)  # which remembers it
    assert torch.load(folder / "best.pt", weights_only=True)["step"] == best["step"]


# ------------------------------------------------------------------------------------- what a fork replaces


def test_a_callback_sees_every_step_and_its_gradients(run):
    """Here: the gradients' norm, layer by layer, of the whole batch and as clipped."""
    rows, norms = [], []

    def on_step(task, row):
        rows.append(row)
        layers = [task.model.embed_tokens, *task.model.layers, task.model.norm, task.model.lm_head]
        norms.append([nn.utils.get_total_norm([p.grad for p in layer.parameters()]).item() for layer in layers])

    run("--micro_batch_size", 2, on_step=on_step)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8]
    for row, norm in zip(rows, norms, strict=True):
        assert row.keys() >= {"step", "lr", "loss", "grad_norm", "skipped"}
        assert torch.tensor(norm).norm().item() == pytest.approx(min(row["grad_norm"].item(), 1.0), rel=1e-4)


def test_another_optimizer(run, monkeypatch, tmp_path):
    """Any of torch.optim, also resumed."""
    monkeypatch.setattr(train, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), momentum=0.9))
    flags = ["--learning_rate", 0.3, "--max_steps", 20]
    whole = run(*flags, out="whole").folder
    losses = [float(loss) for (loss,) in log_of(whole, "loss")]
    assert losses[-1] < losses[0] - 1
    with pytest.raises(Killed):
        run(*flags, out="cut", on_step=kill_at(17))
    run("--resume", *flags, out="cut")
    assert same(weights_of(tmp_path / "cut"), weights_of(whole))


def test_another_schedule(run, monkeypatch):
    """Warmup, stable, decay."""
    monkeypatch.setattr(train, "lr_at", lambda step, s: s.learning_rate * min(step / 2, 1.0, (9 - step) / 4))
    assert [float(lr) for (lr,) in log_of(run("--learning_rate", 1e-2).folder, "lr")] == pytest.approx(
        [0.005, 0.01, 0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025]
    )
