"""The training loop and train.py's command line."""

import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import train
from data import UserError
from data.dataset import write_dataset
from model import ATTENTION, GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SMALL = ["--block_size", "16", "--n_layer", "2", "--n_embd", "32", "--n_inner", "48"]
SMALL += ["--n_head", "2", "--head_dim", "16", "--batch_size", "4", "--max_steps", "8", "--device", "cpu"]
SMALL += ["--eval_interval", "4", "--save_interval", "3", "--log_interval", "2", "--warmup_steps", "3"]


def settings_of(*flags):
    """The settings that these flags amount to, and the checkpoint to start from."""
    return train.choose_settings(train.parse_flags(train.Settings, "", {}, [str(flag) for flag in flags]))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    text = "".join(f"{i} bottles of beer on the wall\n" for i in range(100))
    write_dataset(folder, {"train": [text], "val": [text[1000:1400]]}, "bytes", "a test")
    return folder


@pytest.fixture
def run(dataset, tmp_path):
    """Calls train.py in this process, in a folder of its own."""

    def call(*flags, out="run"):
        preset = [] if "--resume" in flags else ["--preset", "tiny"]
        arguments = [*preset, *SMALL, "--dataset", dataset, "--out_dir", tmp_path / out, *flags]
        given = train.parse_flags(train.Settings, "", {}, list(map(str, arguments)))
        with train.locked(given["out_dir"]):
            train.carry_out(train.Pretraining(*train.choose_settings(given)))
        return tmp_path / out

    return call


def log_of(folder, *columns):
    with open(folder / "log.csv", newline="") as file:
        return [tuple(row[c] for c in columns) for row in csv.DictReader(file)]


def weights_of(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


# ------------------------------------------------------------------------------------- the recipe's pieces


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
    shape = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=8, head_dim=4, n_inner=8, vocab_size=64)
    model = GPT(GPTConfig(attn=attn, tie_embeddings=tied, **shape))
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


def test_accumulated_gradients_equal_those_of_the_large_batch():
    torch.manual_seed(0)
    batch = torch.randn(12, 5, dtype=torch.double), torch.randn(12, 3, dtype=torch.double)
    results = []
    for micro_batch_size in (12, 4, 1):
        torch.manual_seed(1)
        layer = nn.Linear(5, 3, dtype=torch.double)
        optimizer = train.make_optimizer(layer, 0.1)

        def loss_of(x, y, layer=layer):  # shares of the mean over all 36 numbers, and of 1
            return {"loss": (layer(x) - y).square().sum() / 36, "one": torch.tensor(len(x) / 12)}

        micro_batches = zip(*(tensor.split(micro_batch_size) for tensor in batch))
        measured = train.optimizer_step(optimizer, 1e-2, partial(train.accumulate, loss_of), micro_batches, clip=0.5)
        assert measured["grad_norm"] > 0.5  # so that it is clipped
        results.append((measured, layer.weight.detach()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_gradients_are_clipped():
    layer = nn.Linear(4, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    batch = (torch.full((2, 4), 100.0),)
    accumulate = partial(train.accumulate, lambda x: {"loss": layer(x).mean()})
    measured = train.optimizer_step(optimizer, 1.0, accumulate, [batch])
    assert measured["grad_norm"].item() == pytest.approx(200.0)
    assert (layer.weight - before).norm().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("attn", ATTENTION)
def test_a_compiled_model_has_the_same_loss_and_gradients(attn, monkeypatch):
    """Without code generation, for which not every machine has a compiler; whole, so that a graph break is an error."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    shape = dict(block_size=16, n_layer=2, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_inner=48, vocab_size=64)
    model, idx = GPT(GPTConfig(attn=attn, **shape)), torch.randint(64, (2, 16))
    compiled, gradients = train.compile_model(model), []
    for module in (model, compiled):
        module(idx, idx)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch._dynamo.reset()


def test_peak_of_the_gpu_by_its_name(monkeypatch):
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A6000", 155e12),
                       ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A10G", 70e12), ("NVIDIA RTX A4000", None),
                       ("NVIDIA GB200", None), ("NVIDIA RTX 4090 Laptop GPU", None), ("Some GPU", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert train.peak_flops(torch.device("cuda")) == peak
    assert train.peak_flops(torch.device("cpu")) is None


def test_defaults_are_the_recipe():
    s, _ = settings_of("--preset", "ldiff")
    assert (s.learning_rate, s.warmup_steps, s.weight_decay, s.block_size, s.max_steps) == (6e-4, 200, 0.1, 2048, 1000)
    assert (s.dataset, s.n_layer, s.n_embd) == ("wikitext2", 12, 768)
    assert GPTConfig().rope_theta == 10000 and GPTConfig().block_size == 2048


@pytest.mark.parametrize("attn", ATTENTION)
def test_recipe_has_159_million_parameters(attn):
    s, _ = settings_of("--preset", "ldiff", "--attn", attn)
    with torch.device("meta"):
        model = GPT(train.build_config(s, vocab_size=50259))
    assert model.config.vocab_size == 50304
    assert model.num_params() / 1e6 == pytest.approx(158.7, abs=0.05)


def test_validation_loss_weighs_batches_by_their_tokens():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=8, head_dim=4, n_inner=8, vocab_size=64))
    torch.nn.init.normal_(model.lm_head.weight)
    inputs, targets = torch.randint(64, (5, 6)), torch.randint(64, (5, 6))
    cut = targets.clone()
    cut[3:] = -100
    cut = [(inputs[:2], cut[:2]), (inputs[2:], cut[2:])]  # 12 tokens, then 6
    expected = model(inputs[:3], targets[:3])[1].item()
    assert train.validation_loss(model, cut, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)


def test_validation_is_on_validation_data(run):
    out = run("--max_steps", 1)
    settings, start = settings_of("--resume", "--out_dir", out)
    settings.eval_windows = 3
    torch.manual_seed(1234)
    again = train.Pretraining(settings, start)
    assert torch.equal(torch.get_rng_state(), start["rng"]["cpu"])
    assert sum((targets[:, 0] != -100).sum() for _, targets in again.val_batches) == 3
    settings.eval_windows = 64
    again = train.Pretraining(settings, start)
    tokens = np.fromfile(Path(settings.dataset) / "val.bin", np.uint16)
    first = torch.cat([inputs for inputs, _ in again.val_batches])[0]
    assert first.tolist() == tokens[:16].tolist()
    work, ((inputs, targets),) = again.make_batch(3)
    assert work == 64 and inputs.shape == targets.shape == (4, 16)
    assert float(log_of(out, "val_loss")[0][0]) == pytest.approx(
        train.validation_loss(again.model, again.val_batches, again.device), rel=1e-6
    )


def test_the_clock_leaves_out_what_is_paused(tmp_path):
    settings = train.Settings(out_dir=tmp_path, device="cpu", max_steps=1)
    log = train.Log(train.Run(settings))
    log.open(0)
    with log.paused():
        time.sleep(0.5)
    log.rows.append(dict(step=1, work=1000, loss=1.0, grad_norm=1.0, skipped=False, lr=1.0))
    log.flush()
    assert float(log_of(tmp_path, "tokens_per_s")[0][0]) > 1000 / 0.4


# ------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("attn", ATTENTION)
def test_training_learns(run, attn, capsys):
    out = run("--attn", attn, "--max_steps", 60, "--learning_rate", 3e-2)
    losses = [float(loss) for (loss,) in log_of(out, "loss")]
    assert losses[0] > 5 and losses[-1] < 2.0
    text = capsys.readouterr().out
    assert "settings: preset=tiny" in text and f"model: {attn}" in text and "sample:" in text
    assert ("lambda by layer" in text) == hasattr(ATTENTION[attn], "lam")


def test_log_has_a_row_a_step(run):
    out = run()
    assert log_of(out, "step") == [(str(step),) for step in range(1, 9)]
    validated = [step for step, loss in log_of(out, "step", "val_loss") if loss]
    assert validated == ["4", "8"]
    assert all(float(value) > 0 for row in log_of(out, "loss", "grad_norm", "lr", "tokens_per_s") for value in row)


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_resumed_run_equals_uninterrupted_bit_for_bit(run, attn, monkeypatch):
    whole = run("--attn", attn, "--micro_batch_size", 2, out="whole")

    class Killed(BaseException):
        pass

    step, calls = train.optimizer_step, []

    def killed_at_step_8(*args, **options):
        calls.append(1)
        if len(calls) == 8:
            raise Killed
        return step(*args, **options)

    monkeypatch.setattr(train, "optimizer_step", killed_at_step_8)
    with pytest.raises(Killed):
        run("--attn", attn, "--micro_batch_size", 2, "--log_interval", 1, out="cut")
    monkeypatch.setattr(train, "optimizer_step", step)
    cut = whole.parent / "cut"
    saved = torch.load(cut / "ckpt.pt", weights_only=True)
    assert saved["step"] == 6 and saved["best_val_loss"] == float(log_of(whole, "val_loss")[3][0])
    assert len(log_of(cut, "step")) == 7  # logged beyond the checkpoint
    settings, start = settings_of("--resume", "--out_dir", cut)
    assert settings.attn == attn and settings.n_embd == 32  # as in the run
    train.carry_out(train.Pretraining(settings, start))

    columns = ("step", "loss", "grad_norm", "lr", "val_loss")
    assert log_of(cut, *columns) == log_of(whole, *columns)
    for name in ("ckpt.pt", "best.pt"):
        a, b = weights_of(cut, name), weights_of(whole, name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_seed_decides_everything(run):
    first, again, other = run("--seed", 5, out="a"), run("--seed", 5, out="b"), run("--seed", 6, out="c")
    assert log_of(first, "loss") == log_of(again, "loss") != log_of(other, "loss")


def test_best_checkpoint_is_the_one_with_the_lowest_validation_loss(run):
    out = run("--learning_rate", 1.0, "--warmup_steps", 8, "--eval_interval", 1)  # diverges in the end
    losses = [(float(loss), int(step)) for step, loss in log_of(out, "step", "val_loss")]
    best = torch.load(out / "best.pt", weights_only=True)
    assert (best["best_val_loss"], best["step"]) == min(losses)
    assert best["step"] != 8 and "optimizer" not in best


def test_resumed_run_remembers_the_best_validation_loss(run):
    out = run()
    before = torch.load(out / "best.pt", weights_only=True)["step"]
    run("--resume", "--max_steps", 10, "--learning_rate", 10)  # which only makes it worse
    assert torch.load(out / "best.pt", weights_only=True)["step"] == before


def test_init_from_a_checkpoint(run):
    first = run()
    second = run("--init_from", first / "ckpt.pt", "--max_steps", 1, "--learning_rate", 0, out="second")
    a, b = weights_of(first), weights_of(second)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_init_from_takes_the_shape_of_the_checkpoint(run):
    first = run("--attn", "v1")
    settings, _ = settings_of("--preset", "tiny", "--attn", "v1", "--init_from", first / "best.pt")
    assert (settings.n_embd, settings.n_layer, settings.block_size) == (32, 2, 16)


def test_an_earlier_run_moves_aside(run, capsys):
    out = run("--max_steps", 2)
    (out / "notes.txt").write_text("mine")
    for steps in (3, 4):
        run("--max_steps", steps)
    assert [len(log_of(folder, "step")) for folder in (out / "earlier-1", out / "earlier-2", out)] == [2, 3, 4]
    assert sorted(path.name for path in (out / "earlier-1").iterdir()) == ["best.pt", "ckpt.pt", "log.csv"]
    assert (out / "notes.txt").exists() and "is now in" in capsys.readouterr().out


@pytest.mark.parametrize("row", ["²,1,1,0,1,1,,", '2,"1,1,0,1,1,,', f"{'9' * 5000},1,1,0,1,1,,", f"2,{'1' * 200000}"])
def test_a_damaged_row_of_the_log_is_left_out_alone(run, row):
    out = run("--max_steps", 3)
    lines = (out / "log.csv").read_text().splitlines()
    (out / "log.csv").write_text("\n".join([*lines[:2], row, lines[3], ""]))
    run("--resume", "--max_steps", 5)
    steps = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()]
    assert [step for step in steps if step != "2"] == ["step", "1", "3", "4", "5"]


def test_torn_last_row_of_the_log(run):
    out = run("--max_steps", 3)
    with open(out / "log.csv", "ab") as file:
        file.write(b"4,1.2\x00\xff\n\x00\x00")
    run("--resume", "--max_steps", 5)
    assert log_of(out, "step") == [(str(step),) for step in range(1, 6)]


def test_resume_does_without_the_source(run, tmp_path):
    (tmp_path / "my.txt").write_text("some lines of text\n" * 100)
    own = ["--dataset", tmp_path / "own"]
    out = run(*own, "--source", tmp_path / "my.txt")
    (tmp_path / "my.txt").unlink()
    run("--resume", *own, "--max_steps", 9)
    assert len(log_of(out, "step")) == 9


def test_resume_refuses_other_data(run, tmp_path):
    text, own = tmp_path / "my.txt", ["--dataset", tmp_path / "own"]
    text.write_text("some lines of text\n" * 100)
    run(*own, "--source", text)
    text.write_text("same lines of text\n" * 100)
    with pytest.raises(UserError, match="not the one that the run began with"):
        run("--resume", *own, "--source", text, "--max_steps", 9)


def test_resume_of_a_finished_run_says_so(run, capsys):
    run()
    run("--resume")
    assert "has 8 steps already; a higher --max_steps adds to it" in capsys.readouterr().out
    out = run("--resume", "--max_steps", 10)
    assert len(log_of(out, "step")) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave(dataset, tmp_path, number):
    command = [
        sys.executable,
        "train.py",
        "--preset",
        "tiny",
        *SMALL,
        "--dataset",
        str(dataset),
        "--out_dir",
        str(tmp_path),
    ]
    process = subprocess.Popen([*command, "--max_steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step    20" in line:
            break
    process.send_signal(number)
    started, rest = time.time(), process.stdout.read()
    assert process.wait(timeout=20) == 128 + number and time.time() - started < 20
    assert "saving after this step" in rest and f"--resume --out_dir {tmp_path}" in rest
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert log_of(tmp_path, "step")[-1] == (str(saved),)


def test_second_signal_ends_the_program_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with train.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # which the next one meets
    assert signal.getsignal(signal.SIGINT) == before
    assert "once more quits at once" in capfd.readouterr().out


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, message",
    [(["--learning_rat", "1"], "unrecognized arguments: --learning_rat"),
     (["--max_steps", "0"], "--max_steps 0 is out of range; the least is 1"),
     (["--max_steps", "ten"], "argument --max_steps: invalid int value: 'ten'"),
     (["--learning_rate", "nan"], "--learning_rate nan is out of range"),
     (["--learning_rate", "-1"], "--learning_rate -1.0 is out of range; the least is 0"),
     (["--weight_decay", "inf"], "--weight_decay inf is out of range"),
     (["--attn", "v3"], "argument --attn: invalid choice: 'v3'"),
     (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
     (["extra"], "unrecognized arguments: extra")],
)  # fmt: skip
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train.parse_flags(train.Settings, "", {}, flags)
    output = capsys.readouterr()
    assert exit.value.code == 2 and message in output.err and output.err.count("\n") == 1 and not output.out


@pytest.mark.parametrize(
    "flags, message",
    [(["--batch_size", "6", "--micro_batch_size", "4"], "batch_size 6 is not a multiple of micro_batch_size 4"),
     (["--n_head", "3", "--n_kv_head", "2"], "n_head 3 is not a multiple of n_kv_head 2"),
     (["--attn", "v1", "--n_head", "3"], "must be even"),
     (["--head_dim", "15"], "head_dim must be even"),
     (["--block_size", "100000"], "too few for a block_size of 100000"),
     (["--device", "gpu9"], "--device gpu9 is not available"),
     (["--device", "cuda:99"], "--device cuda:99 is not available"),
     (["--dataset", "nosuch"], "there is no data set nosuch"),
     (["--tokenizer", "gpt2"], "was prepared with --tokenizer bytes, not gpt2"),
     (["--out_dir", "/dev/null/run"], "cannot write to /dev/null/run: Not a directory"),
     (["--dataset", "/no/such"], "there is no data set /no/such"),
     (["--resume", "--init_from", "x"], "--resume goes on with a run as it was begun"),
     (["--device", "meta"], "--device meta is not available"),
     (["--source", __file__, "--dataset", "/dev/null/own"], "Not a directory"),
     (["--init_from", "nosuch.pt"], "there is no checkpoint nosuch.pt"),
     (["--resume"], "there is no checkpoint"),
     (["--attn_impl", "flash_attn"], "flash_attn needs a CUDA GPU")],
)  # fmt: skip
def test_impossible_settings(run, flags, message):
    with pytest.raises((UserError, OSError), match=message):
        run(*flags)


def test_checkpoints_that_are_none(run, tmp_path):
    class Unpickled:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    good = run()
    whole = (good / "ckpt.pt").read_bytes()
    path = tmp_path / "bad.pt"
    for content in (b"", b"text", whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged, or not a checkpoint"):
            train.load_checkpoint(path)
    torch.save(Unpickled(), path)
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        train.load_checkpoint(path)
    assert not (tmp_path / "harm").exists()
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="no checkpoint of this project"):
        train.load_checkpoint(path)


def test_checkpoint_of_another_tokenizer(run):
    good = run()
    checkpoint = torch.load(good / "best.pt", weights_only=True)
    torch.save(checkpoint | {"data": {"tokenizer": "gpt2"}}, good / "other.pt")
    with pytest.raises(UserError, match="the checkpoint's tokenizer is gpt2, the data's bytes"):
        run("--init_from", good / "other.pt", out="other")


def test_checkpoints_of_another_shape(run):
    good = run()
    for flags, message in (
        (["--n_embd", 64], "n_embd 32, but the settings say 64"),
        (["--attn", "vanilla"], "has the attention v2, not vanilla"),
    ):
        with pytest.raises(UserError, match=message):
            run("--init_from", good / "ckpt.pt", *flags, out="other")
        with pytest.raises(UserError, match=f"({message}|begun with --attn v2, which --resume cannot change)"):
            run("--resume", *flags)


def test_checkpoints_that_cannot_be_resumed(run, dataset, tmp_path):
    out = run()
    good = torch.load(out / "ckpt.pt", weights_only=True)
    assert good["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    for change, message in (
        (dict(optimizer={}), "no checkpoint to resume from"),
        (dict(optimizer=None), "no checkpoint to resume from"),
        (dict(rng=None), "no checkpoint to resume from"),
        (dict(settings=3), "it lacks settings"),
        (dict(settings=good["settings"] | {"batch_size": "four"}), "its batch_size cannot be used"),
        (dict(data={}), "the checkpoint's tokenizer is None"),
        (dict(data=good["data"] | {"crc32": {}}), "not the one that the run began with"),
    ):
        torch.save(good | change, out / "ckpt.pt")
        with pytest.raises(UserError, match=message):
            run("--resume", "--max_steps", 10)
    torch.save(good | {"settings": good["settings"] | {"of_a_later_version": 1}}, out / "ckpt.pt")
    run("--resume", "--max_steps", 9, "--weight_decay", 0.5)
    assert torch.load(out / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_mistake_is_one_line_and_exit_code_2():
    for command in (
        "train.py --init_from nosuch.pt",
        "-m data.wikitext2.prepare --source nosuch.txt",
        "-m data.wikitext2.prepare --val nosuch.txt",
        "-m data.tiny.prepare --x",
    ):
        result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("steps, at", [(1, 1), (8, 4)])
def test_a_validation_that_is_not_finite_stops_the_run(run, steps, at):
    with pytest.raises(UserError, match=f"the validation after step {at} is not finite; .* lower --learning_rate"):
        run("--learning_rate", 1e18, "--warmup_steps", 0, "--max_steps", steps)


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        train.parse_flags(train.Settings, train.__doc__, {"n_layer": 4}, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in train.Settings.__dataclass_fields__)
