"""Generating text: the KV cache, the Decoder, sampling, and a model that is prepared for it."""

import copy
import gc
import weakref

import pytest
import torch
from small import HEADS, tiny_model

from engine.generate import Decoder, KVCache, prepare_for_inference, sample_token
from model import ATTENTION

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward_pass(float64, attn, heads, impl):
    model = tiny_model(attn, heads, attn_impl=impl)
    idx = torch.randint(64, (3, 20))
    expected = model.hidden(idx)
    for prompt in (1, 7, 19):
        cache = KVCache(model, 3, 20, torch.float64, "cpu")
        hidden = [model.hidden(idx[:, :prompt], cache, torch.arange(prompt))]
        hidden += [model.hidden(idx[:, t : t + 1], cache, torch.tensor([t])) for t in range(prompt, 20)]
        torch.testing.assert_close(torch.cat(hidden, dim=1), expected)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
@torch.no_grad()
def test_layers_with_shared_keys_read_the_last_token_of_a_prompt(float64, attn, heads):
    """And decoding goes on as in the full forward pass."""
    model, read = tiny_model(attn, heads, n_kv_layers=2), []
    model.layers[2].register_forward_pre_hook(lambda layer, args: read.append(args[0].size(1)))
    idx = torch.randint(64, (3, 20))
    expected = model.hidden(idx)
    for prompt in (1, 2, 7, 19):
        cache = KVCache(model, 3, 20, torch.float64, "cpu")
        assert len(cache.layers) == 2
        read.clear()
        hidden = [model.hidden(idx[:, :prompt], cache, torch.arange(prompt))]
        hidden += [model.hidden(idx[:, t : t + 1], cache, torch.tensor([t])) for t in range(prompt, 20)]
        assert read == [1] * len(hidden)
        torch.testing.assert_close(torch.cat(hidden, dim=1), expected[:, prompt - 1 :])


@pytest.mark.parametrize("attn", ATTENTION)
def test_every_cache_has_the_size_of_the_plain_one(attn):
    model = tiny_model(attn, "grouped")
    cache = KVCache(model, 5, 20, torch.float32, "cpu")
    for k, v in cache.layers:
        assert k.numel() + v.numel() == 2 * model.config.n_kv_head * model.config.head_dim * 5 * 20


# ------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("n_kv_layers", [0, 1])
def test_greedy_generation_takes_the_likeliest_token(n_kv_layers):
    model = tiny_model("v2", n_kv_layers=n_kv_layers)
    idx = torch.randint(64, (2, 5))
    out = model.generate(idx, 40, temperature=0)  # beyond the context of 24
    assert out.shape == (2, 45) and torch.equal(out[:, :5], idx)
    for t in range(5, 45):
        forgotten = 0 if t <= 24 else 13 if t <= 37 else 26  # when 24 are full, all but the last 12
        assert torch.equal(out[:, t], model(out[:, forgotten:t])[0][:, -1].argmax(-1))


def test_a_prompt_longer_than_the_context_is_cut():
    model = tiny_model("v1")
    idx = torch.randint(64, (1, 40))
    out = model.generate(idx, 2, temperature=0)
    assert torch.equal(out[:, :40], idx)
    assert torch.equal(out[:, 40], model(idx[:, -24:])[0][:, -1].argmax(-1))
    assert torch.equal(out[:, 41], model(out[:, 29:41])[0][:, -1].argmax(-1))


def test_the_room_of_a_decoder_is_checked():
    model = tiny_model("v2")
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        Decoder(model, 2, 25)
    decoder = Decoder(model, 2, 6)
    for shape in ((2, 7), (1, 3)):
        with pytest.raises(ValueError, match="no room"):
            decoder.prefill(torch.zeros(shape, dtype=torch.long))
    decoder.prefill(torch.zeros(2, 5, dtype=torch.long))
    decoder.step()
    with pytest.raises(ValueError, match="full"):
        decoder.step()


def test_a_finished_decoder_leaves_no_memory():
    decoder = Decoder(tiny_model("v2"), 2, 6)
    decoder.prefill(torch.zeros(2, 3, dtype=torch.long))
    decoder.step()
    cache = weakref.ref(decoder.cache.layers[0][0])
    gc.disable()
    del decoder
    gc.enable()
    assert cache() is None


# ------------------------------------------------------------------------------------- sampling


def test_generation_never_takes_a_padding_id():
    model = tiny_model("vanilla")
    out = model.generate(torch.zeros(8, 1, dtype=torch.long), 20, temperature=5.0, n_vocab=3)
    assert out.max() <= 2


def test_sample_token_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20000, 4)

    def frequency(**options):
        return torch.bincount(sample_token(logits, **options).flatten(), minlength=4) / len(logits)

    torch.testing.assert_close(frequency(), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequency(top_k=2), torch.tensor([0.0, 0.0, 3 / 7, 4 / 7]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequency(top_p=0.6), torch.tensor([0.0, 0.0, 3 / 7, 4 / 7]), atol=0.015, rtol=0)
    squared = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30  # temperature 1/2
    torch.testing.assert_close(frequency(temperature=0.5), squared, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "count, top_p, kept",
    [(4, 0.25, 1), (4, 0.5, 2), (4, 0.75, 3), (8, 0.625, 5),  # a sum that reaches p exactly
     (4, 0.26, 2), (4, 0.49, 2), (4, 0.51, 3), (2, 0.9, 2), (4, 1e-6, 1), (4, 1.0, 4)],
)  # fmt: skip
def test_top_p_keeps_the_fewest_whose_sum_reaches_it(count, top_p, kept):
    """Among `count` tokens of the same probability; alone, and among the likeliest that top_k leaves."""
    torch.manual_seed(0)
    logits = torch.zeros(1000, count)
    assert len(sample_token(logits, top_p=top_p).unique()) == kept
    unlikelier = torch.full((1000, 3), -1.0)
    assert len(sample_token(torch.cat((unlikelier, logits), 1), top_k=count, top_p=top_p).unique()) == kept


@pytest.mark.parametrize("top_p, kept", [(0.3, 1), (0.45, 2), (0.65, 2), (0.75, 3), (0.95, 4)])
def test_top_p_counts_from_the_likeliest(top_p, kept):
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(1000, 4)
    assert {*sample_token(logits, top_p=top_p).flatten().tolist()} == {*[1, 3, 2, 0][:kept]}


@pytest.mark.parametrize("options", [{}, dict(top_k=3), dict(top_p=0.7), dict(top_k=3, top_p=0.7)])
@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_the_temperature_divides_the_logits(options, temperature):
    """Before anything else: what top_p sums are the probabilities at this temperature."""
    logits, draws = torch.randn(500, 7), []
    for factor in (1.0, temperature):  # a power of 2, so that the quotients are the same bit for bit
        torch.manual_seed(0)
        draws.append(sample_token(factor * logits, temperature=factor, **options))
    assert torch.equal(*draws)


# ------------------------------------------------------------------------------------- a prepared model


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attn", ATTENTION)
def test_a_prepared_model_computes_the_same_and_keeps_its_weights(float64, attn, heads):
    """Also if it is prepared twice, copied, or its weights are loaded into another."""
    idx = torch.randint(64, (2, 20))
    model = tiny_model(attn, heads)
    expected, before = model(idx)[0], {name: t.clone() for name, t in model.state_dict().items()}
    for _ in range(2):
        assert prepare_for_inference(model) is model
        torch.testing.assert_close(model(idx)[0], expected)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(copy.deepcopy(model)(idx)[0], expected)
    other = tiny_model(attn, heads)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(idx)[0], expected)


@pytest.mark.parametrize("n_kv_layers, compiled", [(0, [True, True, True]), (1, [True, False, False])])
def test_layers_that_read_a_whole_prompt_are_compiled(n_kv_layers, compiled):
    model = tiny_model("v1", "grouped", n_kv_layers=n_kv_layers)
    Decoder(model, batch_size=2, length=8, compile=True)
    assert [layer._compiled_call_impl is not None for layer in model.layers] == compiled


# ------------------------------------------------------------------------------------- on a GPU


@needs_gpu
@pytest.mark.parametrize("rows", [1, 3])  # products of a single row are compiled to kernels of their own
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("n_kv_layers", [0, 1])
@pytest.mark.parametrize("attn", ATTENTION)
@torch.no_grad()
def test_gpu_generation_replays_a_graph(attn, n_kv_layers, compile, rows):
    """In bf16 the likeliest token may differ where two are close, so every choice has to be nearly the best."""
    shape = dict(head_dim=32, block_size=64, n_kv_layers=n_kv_layers)
    model = tiny_model(attn, "grouped", **shape).cuda()
    exact = tiny_model(attn, "grouped", **shape, attn_impl="naive").double().cuda()
    idx = torch.randint(64, (rows, 5), device="cuda")
    out = prepare_for_inference(model).generate(idx, 50, temperature=0, compile=compile)
    logits = exact(out[:, :-1])[0][:, 4:]
    chosen = logits.gather(-1, out[:, 5:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()


@needs_gpu
def test_gpu_sampling_follows_the_seed_and_fills_the_context():
    model = prepare_for_inference(tiny_model("v2", block_size=64).cuda())
    idx = torch.randint(64, (2, 63), device="cuda")  # the second new token is the last one there is room for

    def text(seed, **options):
        torch.manual_seed(seed)
        return model.generate(idx, 40, **options)

    for options in ({}, dict(top_k=5, top_p=0.9)):
        assert torch.equal(text(1, **options), text(1, **options))
        assert not torch.equal(text(1, **options), text(2, **options))
