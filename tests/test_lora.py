"""lora.py: what an adapter computes, and what apply, disable, merge, save and load leave unchanged."""

import pytest
import torch
import torch.nn as nn
from small import tiny_model

from lora import TARGETS, LoRALinear, apply_lora, disable_lora, load_lora, lora_state_dict, merge_lora
from model import ATTENTION

IDX = torch.arange(24).view(2, 12)


def adapted_model(attn="v2", rank=4, changes={}, **options):  # noqa: B006
    """With adapters that do something; B starts at zero. The model may have `changes`."""
    model = apply_lora(tiny_model(attn, **changes), rank, alpha=8, **options)
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
    model = apply_lora(tiny_model(attn), rank=4, alpha=8)
    assert torch.equal(model(IDX)[0], tiny_model(attn)(IDX)[0])
    assert {name.split(".")[-2] for name in lora_state_dict(model)} == set(TARGETS)


@pytest.mark.parametrize("attn", ATTENTION)
def test_disabled_equals_the_base_exactly(attn):
    """Also in a block within a block, and after one that ends with an error."""
    expected, model = tiny_model(attn)(IDX)[0], adapted_model(attn)
    adapted = model(IDX)[0]
    assert not torch.allclose(adapted, expected, atol=1e-2)
    with pytest.raises(RuntimeError), disable_lora(model):
        assert torch.equal(model(IDX)[0], expected)
        with disable_lora(model):
            pass
        assert torch.equal(model(IDX)[0], expected)
        raise RuntimeError
    assert torch.equal(model(IDX)[0], adapted)


@pytest.mark.parametrize("changes", [{}, dict(n_kv_layers=1)])
@pytest.mark.parametrize("attn", ATTENTION)
def test_merged_equals_unmerged(attn, changes):
    model = adapted_model(attn, changes=changes)
    expected = model(IDX)[0]
    with torch.autocast("cpu", torch.bfloat16):  # which does not touch the sum
        merged = merge_lora(model)
    torch.testing.assert_close(merged(IDX)[0], expected, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == tiny_model(attn, **changes).state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_merging_asks_no_float64_of_a_gpu(monkeypatch):
    """A Mac's has none. Here, what has not passed through .cpu() is taken to be on one."""
    model, moved, cpu, double = adapted_model("v2"), [], torch.Tensor.cpu, torch.Tensor.double
    expected = model(IDX)[0]

    def move(tensor):
        moved.append(cpu(tensor).clone())
        return moved[-1]

    def cast(tensor):
        assert any(tensor is known for known in moved)
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", move)
    monkeypatch.setattr(torch.Tensor, "double", cast)
    torch.testing.assert_close(merge_lora(model)(IDX)[0], expected, rtol=1e-4, atol=1e-4)
    assert moved


def test_merging_leaves_a_tied_embedding_as_it_is():
    """The adapter is the output layer's alone."""
    model = apply_lora(tiny_model("v2", tie_embeddings=True), rank=4, alpha=8, targets=("q_proj", "lm_head"))
    nn.init.normal_(model.lm_head.lora_B, std=0.1)
    expected, embedding = model(IDX)[0], model.embed_tokens.weight.clone()
    torch.testing.assert_close(merge_lora(model)(IDX)[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.embed_tokens.weight, embedding) and not torch.equal(model.lm_head.weight, embedding)


def test_only_adapters_train():
    model = adapted_model()
    model(IDX, IDX)[1].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == lora_state_dict(model).keys()
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_save_and_load(tmp_path):
    model = adapted_model()
    torch.save(lora_state_dict(model), tmp_path / "adapter.pt")
    other = apply_lora(tiny_model("v2"), rank=4, alpha=8)
    load_lora(other, torch.load(tmp_path / "adapter.pt", weights_only=True))
    assert torch.equal(other(IDX)[0], model(IDX)[0])
    for wrong in (adapted_model(rank=8), adapted_model(targets=("q_proj",))):
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
