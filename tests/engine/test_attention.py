"""The attention function and its kernels: all compute the same, in every dtype and on every device."""

import pytest
import torch
from small import relative_error, tiny_config, tiny_model

import engine.attention
import model as model_module
from engine.attention import attention, decode_attention, paired_attention
from model import ATTENTION

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_flash_attn = pytest.mark.skipif(engine.attention.flash_attn_func is None, reason="needs the flash-attn package")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, S", [(7, 7), (3, 7), (1, 7)])
@pytest.mark.parametrize("H, K, G, Dv", [(4, 4, 4, 8), (4, 2, 2, 8), (8, 4, 2, 16)])
def test_sdpa_equals_naive(float64, H, K, G, Dv, T, S, causal):
    q, k, v = torch.randn(2, T, H, 8), torch.randn(2, S, K, 8), torch.randn(2, S, G, Dv)
    naive = attention(q, k, v, causal=causal, impl="naive")
    assert naive.shape == (2, T, H, Dv)
    torch.testing.assert_close(attention(q, k, v, causal=causal, impl="sdpa"), naive, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
def test_causal_mask_is_aligned_to_the_bottom_right(float64, impl):
    """As in flash-attn: the queries are the last of the keys' positions."""
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    whole = attention(q, k, v, causal=True, impl=impl)
    torch.testing.assert_close(attention(q[:, 4:], k, v, causal=True, impl=impl), whole[:, 4:])


@pytest.mark.parametrize("impl", ["naive", "sdpa"])
def test_softmax_scale(float64, impl):
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 16)
    expected = torch.softmax(torch.einsum("bthd,bshd->bhts", q, k) * 0.7, -1) @ v.transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, softmax_scale=0.7, impl=impl).transpose(1, 2), expected)


def test_flash_attn_asked_for_but_missing(monkeypatch):
    monkeypatch.setattr(model_module, "flash_attn_func", None)
    with pytest.raises(ValueError, match="needs the flash-attn package"):
        tiny_config("v2", attn_impl="flash_attn")


@pytest.mark.parametrize("attn", ATTENTION)
def test_autocast_computes_in_bf16(attn):
    model, idx = tiny_model(attn), torch.randint(64, (2, 20))
    expected = model(idx)[0]
    assert model.embed(idx).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embed(idx).dtype == torch.bfloat16
        logits, loss = model(idx)[0], model(idx, idx)[1]
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert relative_error(logits, expected) < 5e-2


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_the_difference_has_the_dtype_of_the_values(attn, monkeypatch):
    """Lambda, which may be float32, does not widen it: what follows, V1's norm and the last projection, sees bf16."""
    module, seen = tiny_model(attn).layers[1].attn, []
    after = module.subln if attn == "v1" else module.o_proj
    after.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    monkeypatch.setattr(ATTENTION[attn], "lam", lambda self, x, logits=None: torch.ones(2, 20, 1) / 2)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 20, 32).bfloat16(), tiny_model(attn).rope(20))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_the_fused_kernel_is_called_with_what_the_two_lines_read(attn, monkeypatch):
    """Here with plain PyTorch in the kernel's place: the same pairs, groups and lambda, so the same logits."""
    model, idx, calls = tiny_model(attn, "grouped"), torch.randint(64, (2, 20)), []
    expected = model(idx)[0]

    def kernel(q, k, v, lam):
        calls.append(lam.shape)
        y1, y2 = paired_attention(q, k, v)
        return y1 - lam.expand(2, 20, q.size(2) // 2).unsqueeze(-1) * y2

    monkeypatch.setattr(model_module, "has_differential_kernel", lambda q, k, v, cache=None, impl="auto": cache is None)
    monkeypatch.setattr(model_module, "differential_attention", kernel)
    torch.testing.assert_close(model(idx)[0], expected)
    assert calls == [(2, 20, 12) if attn == "v2" else ()] * 3


@pytest.mark.skipif(engine.attention.kernels is None, reason="needs Triton")
def test_heads_that_make_no_pairs_are_refused():
    q, k = torch.zeros(1, 8, 6, 16), torch.zeros(1, 8, 4, 16)
    with pytest.raises(ValueError, match="6 query, 4 key and 4 value heads do not make pairs of maps"):
        engine.attention.differential_attention(q, k, k, torch.zeros(1, 8, 3))


# ------------------------------------------------------------------------------------- on a GPU


@needs_gpu
@pytest.mark.parametrize("impl", ["sdpa", "auto", pytest.param("flash_attn", marks=needs_flash_attn)])
@pytest.mark.parametrize(
    "H, K, G, D, Dv",
    [(6, 6, 6, 64, 64), (12, 6, 6, 128, 128), (12, 12, 6, 64, 128), (12, 4, 2, 64, 128), (6, 6, 3, 128, 256)],
)
def test_gpu_kernels_in_bf16(H, K, G, D, Dv, impl):
    """Forward and backward against float64 on the same bf16 numbers."""
    if impl == "flash_attn" and Dv > 128:
        pytest.skip("not every build of flash-attn has it")
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, 200, heads, width, device="cuda", dtype=torch.bfloat16)
        for heads, width in ((H, D), (K, D), (G, Dv))
    ]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, reference = attention(*inputs, causal=True, impl=impl), attention(*exact, causal=True, impl="naive")
    assert relative_error(ours, reference) < 5e-3
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    reference.backward(upstream.double())
    for x, y in zip(inputs, exact):
        assert relative_error(x.grad, y.grad) < 1e-2


def naive_difference(q, k, v, lam, keys):
    """A1 V - lambda A2 V, pair by pair. A group of pairs has one value head and `keys` key heads."""
    pairs, N, G = [], q.size(2) // 2, v.size(2)
    for i in range(N):
        g, factor = i // (N // G), lam[..., i : i + 1, None] if lam.ndim and lam.size(-1) > 1 else lam[..., None]
        maps = [(q[:, :, [2 * i + m]], k[:, :, [keys * g + m * (keys - 1)]], v[:, :, [g]]) for m in (0, 1)]
        y1, y2 = (attention(*heads, causal=True, impl="naive") for heads in maps)
        pairs.append(y1 - factor * y2)
    return torch.cat(pairs, dim=2)


DIFFERENCES = [(6, 6, 1, 128, 128), (4, 2, 1, 64, 64), (6, 6, 2, 64, 128), (4, 2, 2, 16, 32)]


def difference_inputs(N, G, keys, D, Dv, T, heads, **like):
    """V2's lambda is of a token and head, or of a token; V1's is one number."""
    torch.manual_seed(0)
    lam = () if keys == 2 else (2, T, heads)
    shapes = [(2, T, 2 * N, D), (2, T, keys * G, D), (2, T, G, Dv), lam]
    return [torch.randn(shape, **like).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("N, G, keys, D, Dv", DIFFERENCES)
def test_pairs_of_maps(float64, N, G, keys, D, Dv):
    q, k, v, lam = difference_inputs(N, G, keys, D, Dv, 7, N)
    y1, y2 = paired_attention(q, k, v)
    torch.testing.assert_close(y1 - lam.unsqueeze(-1) * y2, naive_difference(q, k, v, lam, keys))


@needs_gpu
@pytest.mark.parametrize("T, one_lambda", [(1, False), (64, False), (500, False), (64, True)])
@pytest.mark.parametrize("N, G, keys, D, Dv", DIFFERENCES)
def test_gpu_difference_kernel(N, G, keys, D, Dv, T, one_lambda):
    """Output and gradients against float64."""
    if engine.attention.gpu_generation("cuda") != (9, 0):
        pytest.skip("the kernel is for Hopper")
    inputs = difference_inputs(N, G, keys, D, Dv, T, 1 if one_lambda else N, device="cuda", dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = naive_difference(*exact, keys)
    strided = [x.movedim(1, 0).contiguous().movedim(0, 1) if x.ndim else x for x in inputs]
    ours = engine.attention.differential_attention(*strided)
    assert ours.dtype == torch.bfloat16 and relative_error(ours, reference) < 5e-3
    upstream = torch.randn_like(ours[:, :, :, :1]).expand_as(ours)
    ours.backward(upstream)
    reference.backward(upstream.double())
    for x, y in zip(inputs, exact):
        if T > 1 or x is not inputs[0] and x is not inputs[1]:  # a single key has no gradient
            assert relative_error(x.grad, y.grad) < 1e-2


@needs_gpu
@pytest.mark.parametrize("attn", ["v1", "v2"])
def test_gpu_models_with_and_without_the_difference_kernel(attn, monkeypatch):
    """The same loss and gradients, compiled, with several pairs to a key head and several blocks of queries. A group
    has three pairs: with unbind() in paired_attention(), ptxas 12.8 gets V1's gradient wrong then."""
    if engine.attention.gpu_generation("cuda") != (9, 0):
        pytest.skip("the kernel is for Hopper")
    torch.compiler.reset()  # programs of other tests count towards a limit
    asked, has_kernel, results = [], model_module.has_differential_kernel, []
    for impl in ("auto", "sdpa"):
        model = tiny_model(attn, "grouped", attn_impl=impl, head_dim=32, n_layer=1, block_size=200).cuda()
        idx = torch.randint(64, (4, 200), generator=torch.Generator().manual_seed(1)).cuda()
        with monkeypatch.context() as patched, torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            answer = lambda *x: asked.append(has_kernel(*x)) or asked[-1]  # noqa: E731
            patched.setattr(model_module, "has_differential_kernel", answer)
            model(idx)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.compile(model, fullgraph=True)(idx, idx)[1]
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert asked == [True, False]
    (loss, gradients), (expected, others) = results
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    for name in gradients:
        assert relative_error(gradients[name], others[name]) < 5e-2, name


@needs_gpu
@pytest.mark.parametrize("impl", ["sdpa", pytest.param("flash_attn", marks=needs_flash_attn)])
@pytest.mark.parametrize("attn", ATTENTION)
def test_gpu_model_compiles_into_one_graph(attn, impl):
    torch.compiler.reset()  # programs of other tests count towards a limit
    model = tiny_model(attn, "grouped", attn_impl=impl, head_dim=32).cuda()
    idx = torch.randint(64, (2, 24), device="cuda")
    with torch.no_grad():
        reference = tiny_model(attn, "grouped", attn_impl="naive", head_dim=32).double().cuda()(idx)[0]
    with torch.autocast("cuda", torch.bfloat16):
        _, loss = torch.compile(model, fullgraph=True)(idx, idx)
        logits = torch.compile(model, fullgraph=True)(idx)[0]
    loss.backward()
    assert relative_error(logits, reference) < 3e-2
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_gpu
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("B, S, position", [(1, 700, 699), (1, 30000, 29876), (3, 1000, 130), (70, 90, 0)])
@pytest.mark.parametrize(
    "H, K, G, D, Dv",
    [(6, 6, 6, 64, 64), (12, 6, 6, 128, 128), (12, 12, 6, 64, 128), (12, 4, 2, 24, 48), (6, 6, 3, 128, 256),
     (8, 1, 1, 64, 64), (4, 4, 4, 8, 8)],
)  # fmt: skip
def test_gpu_decode_kernel(H, K, G, D, Dv, B, S, position, dtype, bound):
    check_decode_attention(H, K, G, D, Dv, B, S, position, dtype, bound, "cuda")


@pytest.mark.parametrize("position", [0, 5, 8])
def test_decode_attention_reads_the_cache_up_to_the_position(position):
    check_decode_attention(12, 4, 2, 24, 48, 2, 9, position, torch.float32, 1e-5, "cpu")


def check_decode_attention(H, K, G, D, Dv, B, S, position, dtype, bound, device):
    torch.manual_seed(0)
    shapes = ((B, 1, H, D), (B, S, K, D), (B, S, G, Dv))
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    ours = decode_attention(q, k, v, torch.tensor([position], device=device))
    end = position + 1
    expected = attention(q.double(), k[:, :end].double(), v[:, :end].double(), impl="naive")
    assert ours.dtype == dtype and relative_error(ours, expected) < bound
