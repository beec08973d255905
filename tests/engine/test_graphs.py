"""Compiled models, and CUDA graphs: the same losses and gradients."""

import contextlib
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small import STAGES, log_of, tiny_model, tune, weights_of, write_tuning_data

import dpo
import engine.graphs
import model as model_module
import sft
import train
from data.write import write_dataset
from engine.attention import gpu_generation
from engine.graphs import bf16_copy, compile_for_tuning, compile_model, compiling_kernels, run_kernels
from lora import apply_lora, disable_lora, lora_state_dict
from model import ATTENTION

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def no_programs():
    """Those of other tests count towards a limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["on", "whole"])
@pytest.mark.parametrize("attn", ATTENTION)
def test_a_compiled_model_has_the_same_loss_and_gradients(attn, mode, monkeypatch):
    """Without code generation, for which not every machine has a compiler. A graph break is an error."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    model, idx, gradients = tiny_model(attn, n_layer=2, n_kv_layers=1), torch.randint(64, (2, 16)), []
    for compile in (False, True):
        module = compile_model(model, mode, torch.device("cpu")) if compile else model
        module(idx, idx)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def programs(monkeypatch):
    """What torch.compile makes, in a list. A graph break is an error."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, dynamic=None, options=None: compile(f, fullgraph=True, dynamic=dynamic, backend=backend),
    )
    return graphs


@pytest.mark.parametrize("mode, count", [("off", 0), ("on", 2), ("whole", 1)])
def test_pretraining_compiles_its_steps_alone(mode, count, programs, tmp_path):
    """Layers share a program, the last norm has another. Validation and samples have none."""
    write_dataset(tmp_path / "text", {"train": ["text" * 99], "val": ["text" * 99]}, "bytes", "a test")
    shape = dict(block_size=16, n_layer=3, n_embd=32, n_head=2, head_dim=16, n_inner=48)
    settings = train.Settings(dataset=f"{tmp_path}/text", batch_size=2, micro_batch_size=2, device="cpu", **shape)
    task = train.Pretraining(replace(settings, compile=mode))
    task.evaluate()
    assert not programs
    _, (tensors,) = task.get_batch(1)
    train.forward_backward(task, tensors)
    task.evaluate()
    task.sample(3)
    assert len(programs) == count


@pytest.mark.parametrize("stage", STAGES)
def test_tuning_validates_uncompiled(stage, programs, tmp_path, monkeypatch):
    home, flags = write_tuning_data(tmp_path), ["--device", "cpu", "--compile", "on", "--max_steps", 3]
    task_class, made = {"sft": sft.SFT, "dpo": dpo.DPO}[stage], []
    evaluate = task_class.evaluate

    def counted(task):
        before = len(programs)
        result = evaluate(task)
        made.append(len(programs) - before)
        return result

    monkeypatch.setattr(task_class, "evaluate", counted)
    tune(stage, home, tmp_path / "run", *flags)
    assert made == [0, 0] and len(programs) == (1 if stage == "sft" else 2)  # DPO's reference has another


def test_an_adapted_model_compiles_into_one_graph():
    model, idx = apply_lora(tiny_model("v2", n_layer=1), rank=4, alpha=8), torch.arange(24).view(2, 12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(idx)[0], model(idx)[0])
    with disable_lora(model):
        torch.testing.assert_close(compiled(idx)[0], tiny_model("v2", n_layer=1)(idx)[0])


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_layers_compile_without_graph_breaks_once_for_all_shapes(attn, programs):
    model = apply_lora(tiny_model(attn, n_layer=2, block_size=96), 4, 8, dropout=0.5)
    compile_for_tuning(model)
    for B, T in ((2, 20), (3, 30), (4, 50), (5, 64)):
        idx, positions = torch.zeros(B, T, dtype=torch.long), torch.arange(T)
        (-sft.token_logps(model, idx, positions, positions % 64).sum()).backward()
    assert len(programs) == 1


def test_layers_with_shared_keys_stay_within_the_limit_of_programs(monkeypatch):
    """Three kinds of layers, in training and validation, with adapters and without, as in DPO, for several shapes."""
    model = apply_lora(tiny_model("v2", n_layer=4, n_kv_layers=2, block_size=96), 4, 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: compile(f, dynamic=dynamic, backend="eager"))
    compile_for_tuning(model)
    for B, T in ((1, 20), (2, 20), (3, 30)):
        idx = torch.zeros(B, T, dtype=torch.long)
        model(idx, idx)[1].backward()
        with torch.no_grad():
            model(idx)
            with disable_lora(model):
                model(idx)


def test_copy_with_frozen_matrices_in_bf16():
    model = apply_lora(tiny_model("v1"), rank=4, alpha=8)
    copied = bf16_copy(model, torch.device("cpu"))
    for (name, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
        half = ours.ndim == 2 and ".lora_" not in name
        assert theirs.dtype == (torch.bfloat16 if half else torch.float32), name
        assert ours is not theirs and ours.requires_grad == theirs.requires_grad and ours.dtype == torch.float32
        assert torch.equal(theirs, ours.to(theirs.dtype))


@pytest.fixture
def stub_kernels(monkeypatch):
    """A GPU's kernels: what they are called with, in a list."""
    calls = []
    stub = SimpleNamespace(
        cross_entropy_=lambda *tensors: calls.append(("loss", *tensors)),
        compile_differential_attention=lambda *tensors: calls.append(("attention", *tensors)),
    )
    monkeypatch.setattr(engine.graphs, "kernels", stub)
    monkeypatch.setattr(engine.graphs, "has_differential_kernel", lambda q, k, v, impl: q.size(1) <= 24)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return calls


@pytest.mark.parametrize("block_size", [24, 32])
@pytest.mark.parametrize("attn", ["vanilla", "v1", "v2"])  # another's lam() need not be the kernel's
def test_kernels_run_early_on_tensors_like_those_of_training(attn, block_size, stub_kernels, monkeypatch):
    model, seen = tiny_model(attn, "grouped", block_size=block_size), []
    run_kernels(model, torch.device("cpu"))
    (_, logits, targets), *others = stub_kernels
    assert (logits.shape, logits.dtype, targets.dtype) == ((1, 64), torch.bfloat16, torch.int64)
    if attn == "vanilla" or block_size > 24:  # where there is no kernel
        assert not others
        return
    kernel = lambda q, k, v, lam: seen.extend((q, k, v)) or q.new_zeros(*q.shape[:2], q.size(2) // 2, v.size(3))  # noqa: E731
    monkeypatch.setattr(model_module, "has_differential_kernel", lambda *args: True)
    monkeypatch.setattr(model_module, "differential_attention", kernel)
    model(torch.zeros(1, 4, dtype=torch.long))
    assert [x.shape[2:] for x in others[0][1:]] == [x.shape[2:] for x in seen[:3]]
    assert {x.dtype for x in others[0][1:]} == {torch.bfloat16}


def test_kernels_that_cannot_run_early_stop_nothing(stub_kernels):
    run_kernels(SimpleNamespace(), torch.device("cpu"))  # a fork's model, say
    assert not stub_kernels


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_kernels_run_while_the_compiler_is_imported(error, monkeypatch):
    """The thread has ended when the context does, also by Ctrl-C."""
    steps, imported = [], threading.Event()
    monkeypatch.setattr(engine.graphs, "kernels", object())
    slow = lambda *args: (imported.wait(10), time.sleep(0.3), steps.append("kernels"))  # noqa: E731
    monkeypatch.setattr(engine.graphs, "run_kernels", slow)
    with contextlib.suppress(KeyboardInterrupt), compiling_kernels(None, torch.device("cuda")):
        steps.append("import")
        imported.set()
        if error:
            raise error
    assert steps == ["import", "kernels"]


@needs_gpu
@pytest.mark.parametrize("attn", ATTENTION)
def test_gpu_kernels_are_compiled_before_the_first_step(attn):
    """Then batches of any number of sequences and tokens compile none."""
    from engine import kernels

    if attn != "vanilla" and gpu_generation("cuda") != (9, 0):
        pytest.skip("the other kernels are for Hopper")
    functions = kernels._cross_entropy_kernel, kernels._forward_kernel
    functions += kernels._key_gradient_kernel, kernels._query_gradient_kernel
    for function in functions:
        function.device_caches.clear()  # from other tests
    model = tiny_model(attn, "grouped", head_dim=32, block_size=64).cuda()
    with compiling_kernels(model, torch.device("cuda")):
        pass
    counts = [len(function.device_caches[0][0]) for function in functions]
    assert counts == ([1, 0, 0, 0] if attn == "vanilla" else [1, 1, 1, 1])
    for B, T in ((1, 16), (3, 30), (8, 30)):  # Triton could tell multiples of 16 pairs apart
        idx = torch.randint(64, (B, T), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            model(idx, idx)[1].backward()
    assert [len(function.device_caches[0][0]) for function in functions] == counts


@needs_gpu
@pytest.mark.parametrize("stage", STAGES)
def test_gpu_graphs_do_what_plain_steps_do(stage, tmp_path):
    """Batches of several shapes, in micro-batches, in an epoch and the next.

    In bf16, sums in another order move DPO's gradient, a difference of nearly equal ones, by up to 4 %.
    """
    home, flags = write_tuning_data(tmp_path), ["--device", "cuda", "--micro_batch_size", 2, "--max_steps", 20]
    plain, graphs = (tune(stage, home, tmp_path / mode, *flags, "--compile", mode) for mode in ("off", "on"))
    for column, bound in (("loss", 0.03), ("grad_norm", 0.08 if stage == "dpo" else 0.03)):
        ours, expected = ([float(row[0]) for row in log_of(run.folder, column)] for run in (graphs, plain))
        assert ours == pytest.approx(expected, rel=bound)
    assert graphs.task.graphed and not plain.task.graphed
    ours, expected = (
        torch.cat([t.flatten() for t in lora_state_dict(run.task.model).values()]) for run in (graphs, plain)
    )
    assert (ours - expected).norm() < 0.05 * expected.norm()
    for name in ("ckpt.pt", "best.pt"):
        assert {t.dtype for t in weights_of(graphs.folder, name).values()} == {torch.float32}
