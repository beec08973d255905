"""Runs of sft.py and dpo.py: which models they take, and what takes theirs."""

import pytest
import torch.nn as nn
from small import STAGES, base_model, pretrain, same, save_model, tune, weights_of, write_tuning_data

import sft
from engine.settings import UserError
from model import ATTENTION


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tuning_data(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("attn", ATTENTION)
def test_every_attention_can_be_tuned(models, tmp_path, attn, capsys):
    for stage in STAGES:
        tune(stage, models, tmp_path / stage, "--max_steps", 4, attn=attn, sample=stage == "dpo")
        text = capsys.readouterr().out
        assert f"model: {attn}" in text and "of them trained" in text
    assert "<|im_start|>assistant" in text  # in the sample


def test_preset_follows_the_tokenizer(models, tmp_path, capsys):
    given = {"init_from": str(models / "v2.pt")}
    settings, checkpoint = sft.choose_settings(given, sft.Settings, sft.PRESETS, "sft")
    assert (settings.preset, settings.dataset, settings.attn) == ("tiny", "tiny", "v2") and checkpoint["step"] == 7
    assert "has the tokenizer bytes" in capsys.readouterr().out
    settings, _ = sft.choose_settings(given | {"preset": "ldiff"}, sft.Settings, sft.PRESETS, "sft")
    assert settings.dataset == "slimorca"
    save_model(tmp_path / "gpt2.pt", base_model(), data={"tokenizer": "gpt2"})
    settings, _ = sft.choose_settings({"init_from": str(tmp_path / "gpt2.pt")}, sft.Settings, sft.PRESETS, "sft")
    assert (settings.preset, settings.dataset) == ("ldiff", "slimorca")


def test_pretraining_can_go_on_from_a_tuned_model(models, small_data, tmp_path):
    best = tune("sft", models, tmp_path / "sft", "--max_steps", 4).folder / "best.pt"
    flags = ["--init_from", best, "--max_steps", 1, "--learning_rate", 0]
    shape = base_model().config
    for name in ("block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_inner"):
        flags += [f"--{name}", getattr(shape, name)]
    task = pretrain(small_data, tmp_path / "again", *flags).task
    assert same(task.model.state_dict(), weights_of(tmp_path / "sft", "best.pt"))
    assert isinstance(task.model.layers[0].attn.q_proj, nn.Linear)


def test_the_scale_of_the_adapters_cannot_change(models, tmp_path):
    tune("sft", models, tmp_path / "run", "--max_steps", 1)
    with pytest.raises(UserError, match="begun with --lora_alpha .*, which --resume cannot change"):
        tune("sft", models, tmp_path / "run", "--resume", "--lora_alpha", 9)
