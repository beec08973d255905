"""lora.py: what an adapter computes, and what apply, disable, merge, save and load leave unchanged."""

import pytest
import torch
import torch.nn as nn

from lora import TARGETS, LoRALinear, apply_lora, disable_lora, load_lora, lora_state_dict, merge_lora
from model import ATTENTION, GPT, GPTConfig

SHAPE = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, n_inner=64)
IDX = torch.arange(24).view(2, 12)


def tiny_model(attn="v2"):
    torch.manual_seed(0)
    model = GPT(GPTConfig(attn=attn, **SHAPE))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def train_adapters(model):
    """Give B something to do; it starts at zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_adapter_follows_the_formula():
    """W x + (alpha / r) B A x, by hand, which is also what PEFT defines."""
    base = nn.Linear(3, 2, bias=False)
    base.weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]])
    layer = LoRALinear(base, rank=2, alpha=3)
    layer.lora_A.data = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]])
    layer.lora_B.data = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    x = torch.tensor([1.0, 2.0, 4.0])
    # W x = (17, 2), A x = (-3, 4), B A x = (-7, 6.5), alpha / r = 1.5
    assert layer(x).tolist() == [17 - 10.5, 2 + 9.75]


def test_initial_values():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 300, bias=False), rank=64, alpha=128)
    bound = 400**-0.5  # Kaiming-uniform with a = sqrt(5)
    assert 0.99 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert (layer.lora_B == 0).all() and layer.lora_A.shape == (64, 400) and layer.lora_B.shape == (300, 64)


@pytest.mark.parametrize("attn", ATTENTION)
def test_starts_as_the_model_it_adapts(attn):
    expected = tiny_model(attn)(IDX)[0]
    model = apply_lora(tiny_model(attn), rank=4, alpha=8)
    assert torch.equal(model(IDX)[0], expected)
    adapted = {name.split(".")[-2] for name in lora_state_dict(model)}
    assert adapted == set(TARGETS)


@pytest.mark.parametrize("attn", ATTENTION)
def test_disabled_equals_the_base_exactly(attn):
    expected = tiny_model(attn)(IDX)[0]
    model = train_adapters(apply_lora(tiny_model(attn), rank=4, alpha=8))
    assert not torch.allclose(model(IDX)[0], expected, atol=1e-2)
    with disable_lora(model):
        assert torch.equal(model(IDX)[0], expected)
    assert not torch.allclose(model(IDX)[0], expected, atol=1e-2)


def test_disable_within_disable():
    model = train_adapters(apply_lora(tiny_model(), rank=4, alpha=8))
    with disable_lora(model):
        expected = model(IDX)[0]
        with disable_lora(model):
            pass
        assert torch.equal(model(IDX)[0], expected)


def test_disable_ends_with_an_error_too():
    model = train_adapters(apply_lora(tiny_model(), rank=4, alpha=8))
    expected = model(IDX)[0]
    with pytest.raises(RuntimeError), disable_lora(model):
        raise RuntimeError
    assert torch.equal(model(IDX)[0], expected)


@pytest.mark.parametrize("attn", ATTENTION)
def test_merged_equals_unmerged(attn):
    model = train_adapters(apply_lora(tiny_model(attn), rank=4, alpha=8))
    expected = model(IDX)[0]
    with torch.autocast("cpu", torch.bfloat16):  # which does not touch the sum
        merged = merge_lora(model)
    torch.testing.assert_close(merged(IDX)[0], expected, rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == tiny_model(attn).state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_merging_rounds_once():
    base = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(base, rank=8, alpha=16)
    nn.init.normal_(layer.lora_B, std=1e-3)
    exact = base.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    merged = layer.merged().weight
    assert merged.dtype == torch.bfloat16
    assert (merged != exact.bfloat16()).float().mean() < 0.01  # where float32 and float64 round to different sides


def test_only_adapters_train():
    model = apply_lora(tiny_model(), rank=4, alpha=8)
    model(IDX, IDX)[1].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == lora_state_dict(model).keys()
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_save_and_load(tmp_path):
    model = train_adapters(apply_lora(tiny_model(), rank=4, alpha=8))
    torch.save(lora_state_dict(model), tmp_path / "adapter.pt")
    other = apply_lora(tiny_model(), rank=4, alpha=8)
    load_lora(other, torch.load(tmp_path / "adapter.pt", weights_only=True))
    assert torch.equal(other(IDX)[0], model(IDX)[0])
    for wrong in (apply_lora(tiny_model(), rank=8, alpha=8), apply_lora(tiny_model(), 4, 8, targets=("q_proj",))):
        with pytest.raises(ValueError, match="another model, rank or choice of layers"):
            load_lora(wrong, lora_state_dict(model))


def test_dropout_is_for_training_alone():
    layer = LoRALinear(nn.Linear(8, 8, bias=False), rank=4, alpha=4, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.ones(1, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), x @ layer.base.weight.T + x @ layer.lora_A.T @ layer.lora_B.T)


def test_adapters_are_float32_and_compute_in_bf16():
    base = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(base, rank=4, alpha=4)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    y = layer(torch.ones(1, 8, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_B.grad.dtype == torch.float32


def test_compiles_into_one_graph():
    model = train_adapters(apply_lora(tiny_model(), rank=4, alpha=8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDX)[0], model(IDX)[0])
    with disable_lora(model):
        torch.testing.assert_close(compiled(IDX)[0], tiny_model()(IDX)[0])


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_ranks_that_do_not_fit(rank):
    with pytest.raises(ValueError, match=f"rank {rank} does not fit"):
        apply_lora(tiny_model(), rank=rank, alpha=8)


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="no linear layer called c_attn"):
        apply_lora(tiny_model(), rank=4, alpha=8, targets=("q_proj", "c_attn"))
