"""What a model and its adapters refuse, and what they do without."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import tiny_model

from lora import apply_lora
from model import GPTConfig


def test_context_too_long_is_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        tiny_model("v2")(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize(
    "changes, message",
    [(dict(attn="v3"), "attn must be one of vanilla, v1, v2, not 'v3'"), (dict(attn_impl="fast"), "attn_impl"),
     (dict(n_head=6, n_kv_head=4), "multiple of n_kv_head"), (dict(attn="v1", n_head=3, n_kv_head=3), "even"),
     (dict(head_dim=7), "even"), (dict(n_layer=0), "n_layer must be at least 1"),
     (dict(n_kv_layers=13), "n_kv_layers 13 is more than n_layer 12"), (dict(n_kv_layers=-1), "at least 1")],
)  # fmt: skip
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_ranks_that_do_not_fit(rank):
    with pytest.raises(ValueError, match=f"rank {rank} does not fit"):
        apply_lora(tiny_model("v2"), rank=rank, alpha=8)


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="no linear layer called c_attn"):
        apply_lora(tiny_model("v2"), rank=4, alpha=8, targets=("q_proj", "c_attn"))


def test_the_model_needs_nothing_else():
    """In a notebook: no script, no data, no tokenizer."""
    code = """
import sys, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(n_layer=1, n_embd=16, head_dim=8, n_inner=16, vocab_size=64, n_head=2, n_kv_head=2))
assert model.generate(torch.zeros(1, 3, dtype=torch.long), 4, temperature=0.8, top_k=50).shape == (1, 7)
assert not {"train", "sft", "dpo", "lora", "data", "tiktoken"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent.parent, check=True)
