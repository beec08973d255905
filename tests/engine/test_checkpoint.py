"""Loading checkpoints. Whole runs that resume are in tests/test_train.py and tests/robustness/."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from small import base_model, save_model, tiny_model

from data.tokenizer import get_tokenizer
from engine.checkpoint import FORMAT, check_fit, load_checkpoint, load_weights
from engine.settings import UserError
from sample import load_model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_number_that_is_not_finite_is_refused(value):
    """In any tensor, at its beginning or end."""
    model = tiny_model("v1", n_layer=1)
    for name, tensor in model.state_dict().items():
        for index in (0, -1):
            bad = tensor.clone()
            bad.view(-1)[index] = value
            with pytest.raises(UserError, match="weights are not all finite"):
                load_weights(tiny_model("v1", n_layer=1), {"model": model.state_dict() | {name: bad}})
    load_weights(model, {"model": model.state_dict()})


@pytest.mark.parametrize("number", [FORMAT + 1, 0, "1", None])
def test_other_formats_are_refused(tmp_path, number):
    save_model(tmp_path / "model.pt", base_model())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert load_checkpoint(tmp_path / "model.pt")["format"] == content["format"] == FORMAT
    torch.save(content | {"format": number}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="written by a newer version"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("attn", ["vanilla", "v2"])
def test_a_model_that_is_loaded_draws_no_weights(tmp_path, attn):
    model = base_model(attn)
    save_model(tmp_path / "best.pt", model)
    before = torch.get_rng_state()
    loaded, _, _ = load_model(tmp_path / "best.pt", torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert torch.equal(loaded.rope_cos, model.rope_cos)


def test_an_older_checkpoint_fits_what_its_model_was():
    """It lacks n_kv_layers, and every layer of it has keys."""
    encoding = get_tokenizer("bytes")
    config = base_model().config
    older = {name: value for name, value in asdict(config).items() if name != "n_kv_layers"}
    checkpoint = {"config": older, "data": {"tokenizer": encoding.name}}
    check_fit(checkpoint, config, encoding)
    with pytest.raises(UserError, match="the checkpoint's model has n_kv_layers 2, but the settings say 1"):
        check_fit(checkpoint, replace(config, n_kv_layers=1), encoding)
