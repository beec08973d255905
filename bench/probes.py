"""What differential attention does inside a trained model: where its heads look, and how loud its activations are.

probe() measures a model on held-out text, and sentence_maps() reads the maps of one sentence. bench/figures.py draws
both. There are up to three kinds of weights:

    first, second    the two softmax maps
    weights          first - factor * second, which multiply the values; the plain Transformer has only these

Shapes are as in model.py, but H is the number of heads after the subtraction (pairs of V1's heads), and R the number of
query positions that are looked at.
"""

import statistics
from collections import defaultdict

import numpy as np
import torch

from data.dataset import sample_batch
from engine.device import autocast
from engine.loss import token_cross_entropy
from model import at_least_float32

CITIES = (
    "Accra", "Aleppo", "Amman", "Ankara", "Athens", "Bergen", "Berlin", "Bogota", "Boston", "Bremen", "Brno",
    "Busan", "Cairo", "Cork", "Dakar", "Dallas", "Delhi", "Denver", "Dhaka", "Doha", "Dubai", "Dublin", "Durban",
    "Essen", "Geneva", "Genoa", "Ghent", "Graz", "Hanoi", "Harare", "Havana", "Izmir", "Jaipur", "Kabul", "Kano",
    "Kobe", "Krakow", "Kyiv", "Kyoto", "Lagos", "Leeds", "Leon", "Lima", "Lisbon", "London", "Lyon", "Madrid",
    "Malaga", "Manila", "Miami", "Milan", "Minsk", "Mumbai", "Munich", "Nantes", "Naples", "Osaka", "Oslo",
    "Ottawa", "Oxford", "Paris", "Perth", "Porto", "Prague", "Pune", "Quito", "Rabat", "Riga", "Rome", "Seoul",
    "Sofia", "Sydney", "Tokyo", "Tunis", "Turin", "Venice", "Vienna", "Warsaw", "Zagreb", "Zurich",
)  # fmt: skip
QUESTION = " The magic number of {} is"  # a needle goes on with " 1234567."
NEEDLES = ((6, 7), (4, 7), (4, 5), (2, 3))  # (needles in a text, digits of their numbers); the first that fits is used
PARTS = ("answer", "others", "first_token", "rest")  # of a text; others: the numbers of the other needles
LATE = 64  # last positions of a window, where the RMS of what attention reads is measured

# ---------------------------------------------------------------------------------------------------
# Attention maps


def differential_maps(module, x, rope, rows, shared=None):
    """Compute the maps of an attention module that reads x (B, T, C) -> first, second, factor, at least float32.

    The maps are (B, H, R, S), for the queries at `rows`, a slice or a tensor of positions. The factor of the second map
    is (B, H, R, 1). An attention with one map has None for the others. `shared` are the keys and values of a layer
    below, for a module without its own.
    """
    q, k, _, *logits = module.qkv(x, rope, shared)  # V2 adds the logits of lambda
    q, positions = q[:, rows], torch.arange(x.size(1), device=x.device)[rows]
    if not hasattr(module, "lam"):
        return causal_maps(q, k, positions), None, None
    keys = (k[:, :, 0::2], k[:, :, 1::2]) if module.value_width == 2 else (k, k)  # V1 has a key head for each map
    first, second = (causal_maps(q[:, :, m::2], keys[m], positions) for m in (0, 1))
    lam = at_least_float32(module.lam(x, *logits)).expand(*x.shape[:2], first.size(1))  # (B, T, H)
    return first, second, lam[:, rows].transpose(1, 2).unsqueeze(-1)


def causal_maps(q, k, positions):
    """engine.attention.attention_maps() for queries at any `positions` (R,), in float32 even under autocast.

    q (B, R, H, D), k (B, S, K, D) -> (B, H, R, S).
    """
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("brhd,bshd->bhrs", at_least_float32(q), at_least_float32(k)) * q.size(-1) ** -0.5
    future = torch.arange(k.size(1), device=k.device) > positions[:, None]  # (R, S)
    return torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)


def layer_maps(model, idx, rows):
    """Yield {kind of weights: (B, H, R, S)} and the values (B, S, G, Dv) of every layer, as the model reads idx (B, T).

    `rows` are the positions of the queries.
    """
    rope, x, shared = model.rope(idx.size(1)), model.embed(idx), None
    for layer in model.layers:
        attn_input = layer.attn_norm(x)
        first, second, factor = differential_maps(layer.attn, attn_input, rope, rows, shared)
        maps = {"weights": first}
        if second is not None:
            maps = {"weights": first - factor * second, "first": first, "second": second}
        yield maps, layer.attn.qkv(attn_input, rope, shared)[2]
        x, keys_values = layer(x, rope, None, shared)
        shared = keys_values or shared


def share(weights, keys):
    """The share of attention that `keys`, a slice or mask of S, get: weights (..., S) -> (...).

    It is sum |w| over the keys / sum |w| over all, since differences may be negative and sum to 1 - factor. For one
    map it is the probability.
    """
    size = weights.abs()
    return size[..., keys].sum(-1) / size.sum(-1)


# ---------------------------------------------------------------------------------------------------
# Needles: one of several facts has to be found in a long text (arXiv 2410.05258, section 3.4)


def needle_texts(encoding, tokens, length, texts, seed=1, size=None, cities=CITIES):
    """Hide needles in texts of held-out `tokens`, and end each text with the question for one of them.

    `size` is the number of needles and their digits; without it, needle_size(). -> ids (texts, length) int64, and for
    each text the (start, stop) of every needle's number, beginning with the one that is asked for. Raises ValueError if
    they do not fit.
    """
    encode, rng = encoding.encode_ordinary, np.random.default_rng((seed, 2))
    count, digits = size or needle_size(encode, length)
    if len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens are too few to cut texts of {length} from")
    filler = sample_batch(tokens, length, texts, seed, step=1)[0].tolist()
    numbers = draw_numbers(rng, encode, texts * count, digits)
    hidden = [
        hide_needles(rng, encode, text, numbers[i * count : (i + 1) * count], cities) for i, text in enumerate(filler)
    ]
    ids, spans = zip(*hidden)
    return torch.tensor(ids), spans


def needle_size(encode, length):
    """The number of needles, and their digits: the first of NEEDLES that fit."""
    for count, digits in NEEDLES:
        if needles_fit(encode, length, count, digits):
            return count, digits
    raise ValueError(f"{length} tokens have no room for needles")


def needles_fit(encode, length, count, digits):
    """Return whether needles and the question, at their longest, take up to 7/8 of the length."""
    question = max(len(encode(QUESTION.format(city))) for city in CITIES)
    return count * (question + digits + 2) + question <= 7 / 8 * length  # a space and a period


def draw_numbers(rng, encode, count, digits):
    """Draw different numbers -> lists of ids, each with a space before the number.

    All lists have the same length, the commonest among many numbers, so that log-probabilities can be compared.
    """
    drawn = rng.integers(10 ** (digits - 1), 10**digits, size=20 * count)
    numbers = [encode(f" {number}") for number in dict.fromkeys(drawn.tolist())]
    width = statistics.mode(map(len, numbers))
    return [number for number in numbers if len(number) == width][:count]


def hide_needles(rng, encode, filler, numbers, cities):
    """Hide needles in `filler`, whose end gives way to them -> ids and spans of one text, as in needle_texts().

    The pieces are encoded one by one. So the spans are exact, and the question has the same ids as the needle.
    """
    questions = [encode(QUESTION.format(city)) for city in rng.choice(cities, len(numbers), replace=False)]
    needles = [question + number + encode(".") for question, number in zip(questions, numbers)]
    asked = rng.integers(len(needles))
    room = len(filler) - len(questions[asked]) - sum(map(len, needles))
    # number_scores() cuts off as many tokens at the beginning as a number has. No needle may begin there.
    depths = np.sort(rng.integers(len(numbers[0]), room + 1, size=len(needles))).tolist()
    ids, spans = [], []
    for start, depth, question, number, needle in zip([0, *depths], depths, questions, numbers, needles):
        ids += filler[start:depth]
        begin = len(ids) + len(question)
        spans.append((begin, begin + len(number)))
        ids += needle
    ids += filler[depths[-1] : room] + questions[asked]
    return ids, [spans.pop(asked), *spans]


def needle_shares(model, ids, spans):
    """Measure where the last position of a needle text ids (T,) looks -> {kind of weights: (n_layer, H, parts)}."""
    part = torch.full_like(ids, PARTS.index("rest"))
    part[0] = PARTS.index("first_token")
    for number, (start, stop) in enumerate(spans):
        part[start:stop] = PARTS.index("others" if number else "answer")
    shares = defaultdict(list)
    for maps, _ in layer_maps(model, ids[None], slice(-1, None)):
        for kind, weights in maps.items():
            shares[kind].append(torch.stack([share(weights[0, :, 0], part == i) for i in range(len(PARTS))], dim=-1))
    return {kind: torch.stack(layers) for kind, layers in shares.items()}


def summarize_shares(texts):
    """Average needle_shares() over texts -> {kind of weights: {part: list by layer, "best_head": ...}}.

    A part has the mean over heads. The best head is the one of all layers with the highest share on the answer.
    """
    summary = {}
    for kind in texts[0]:
        mean = torch.stack([shares[kind] for shares in texts]).mean(0)  # (n_layer, H, parts)
        best, index = mean[..., PARTS.index("answer")].flatten().max(0)
        layer, head = divmod(index.item(), mean.size(1))
        summary[kind] = dict(zip(PARTS, mean.mean(1).T.tolist()))
        summary[kind]["best_head"] = dict(layer=layer, head=head, answer=best.item())
    return summary


def number_scores(model, ids, spans):
    """The mean log-probability, in nats a token, of every needle's number after a text ids (T,) -> (needles,).

    The context may be full, so the text loses as many tokens at its beginning as a number has.
    """
    numbers = torch.stack([ids[start:stop] for start, stop in spans])  # (needles, W)
    W = numbers.size(1)
    texts = torch.cat((ids[W - 1 :].expand(len(numbers), -1), numbers[:, :-1]), dim=1)  # (needles, T)
    hidden = model.hidden(texts)[:, -W:].flatten(0, 1)
    return -token_cross_entropy(hidden, model.lm_head.weight, numbers.flatten()).view(-1, W).mean(1)


def summarize_scores(scores):
    """Average scores (texts, needles), whose first column belongs to the right numbers."""
    right, wrong = scores[:, 0], scores[:, 1:]
    accuracy = (right > wrong.amax(1)).float().mean().item()
    return dict(right=right.mean().item(), wrong=wrong.mean().item(), accuracy=accuracy, chance=1 / scores.size(1))


# ---------------------------------------------------------------------------------------------------
# Plain text: the attention sink, and the RMS of what is read


def window_measures(model, ids):
    """Measure the attention sink and the RMS of what is read in a window ids (T,) -> sink, rms.

    sink is {kind of weights: (n_layer,)}, the first token's share in the second half of the window. rms is
    {kind: (n_layer, H * R)}, the L2 norms of the weights at the LATE last positions, and as "output" output_rms().
    """
    sink, rms = defaultdict(list), defaultdict(list)
    for maps, values in layer_maps(model, ids[None], slice(len(ids) // 2, None)):
        for kind, weights in maps.items():
            sink[kind].append(share(weights, slice(1)).mean())
            rms[kind].append(weights[:, :, -LATE:].norm(dim=-1).flatten())
        rms["output"].append(output_rms(maps["weights"][:, :, -LATE:], values).flatten())
    return [{kind: torch.stack(layers) for kind, layers in measured.items()} for measured in (sink, rms)]


def output_rms(weights, values):
    """The RMS of a head's output, before any norm, over the RMS of its values.

    weights (B, H, R, S), values (B, S, G, Dv) -> (B, H, R). For uncorrelated values it is the L2 norm of the weights.
    """
    values = at_least_float32(values).transpose(1, 2).repeat_interleave(weights.size(1) // values.size(2), dim=1)
    with torch.autocast(weights.device.type, enabled=False):
        output = weights @ values  # (B, H, R, Dv)
    return (output.square().mean(-1) / values.square().mean((-2, -1)).unsqueeze(-1)).sqrt()


def summarize_windows(windows):
    """Summarize window_measures() of many windows -> sink and norms, {kind: ...} with lists by layer.

    The sink is the mean over windows. The norms have statistics over windows, heads and positions.
    """
    sink = {kind: torch.stack([sink[kind] for sink, _ in windows]).mean(0).tolist() for kind in windows[0][0]}
    norms = {}
    for kind in windows[0][1]:
        samples = torch.cat([rms[kind] for _, rms in windows], dim=1)  # (n_layer, windows * H * R)
        measured = dict(mean=samples.mean(1), minimum=samples.amin(1), percentile_1=samples.quantile(0.01, dim=1))
        norms[kind] = {name: values.tolist() for name, values in measured.items()}
    return sink, norms


# ---------------------------------------------------------------------------------------------------
# Outliers: few entries that are much larger than the others


def activation_moments(model, ids):
    """Run the model on a window ids (T,) -> {kind: (n_layer, 6)} in float64.

    Kinds are "residual", the residual stream after the layer, "attention", what its attention adds to the stream, and
    "heads", what o_proj reads. Of all T * width entries, the six numbers are the largest absolute value, the count, and
    the sums of the first four powers.
    """
    moments = defaultdict(list)

    def add(kind, x):
        x = x.double()
        moments[kind].append(torch.stack([x.abs().amax(), *((x**power).sum() for power in range(5))]))

    readers = [*(layer.attn_norm for layer in model.layers[1:]), model.norm]  # of the stream after each layer
    hooks = [norm.register_forward_pre_hook(lambda _, args: add("residual", args[0])) for norm in readers]
    for layer in model.layers:
        o_proj = layer.attn.o_proj
        hooks.append(o_proj.register_forward_hook(lambda _, args, output: add("attention", output)))
        hooks.append(o_proj.register_forward_pre_hook(lambda _, args: add("heads", args[0])))
    try:
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return {kind: torch.stack(layers) for kind, layers in moments.items()}


def summarize_moments(windows):
    """Summarize activation_moments() of many windows -> {kind: {"largest": list by layer, "kurtosis": ...}}.

    The kurtosis is the fourth standardized moment mean((x - mean)^4) / variance^2 over the entries of all windows: 3
    for a normal distribution, higher with outliers.
    """
    summary = {}
    for kind in windows[0]:
        moments = torch.stack([window[kind] for window in windows])  # (windows, n_layer, 6)
        count, *sums = moments[..., 1:].sum(0).unbind(-1)
        mean, second, third, fourth = (total / count for total in sums)
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        kurtosis = central / (second - mean**2).square()
        summary[kind] = dict(largest=moments[..., 0].amax(0).tolist(), kurtosis=kurtosis.tolist())
    return summary


# ---------------------------------------------------------------------------------------------------
# What figures are drawn from


@torch.no_grad()
def probe(model, encoding, tokens, length, texts, seed=1):
    """Measure a model at a context of `length` -> a dict for JSON.

    It reads `texts` needle texts and as many windows of the held-out `tokens` (N,), one at a time. "bound" is
    1 / sqrt(n): weights that are positive and sum to 1 over n tokens have no smaller L2 norm. Differences can have one,
    which is an argument for DIFF V2 (Microsoft, January 2026).
    """
    device = model.rope_cos.device
    ids, spans = needle_texts(encoding, tokens, length, texts, seed)
    windows = sample_batch(tokens, length, texts, seed, step=0)[0]
    with autocast(device):
        shares = [needle_shares(model, *text) for text in zip(ids.to(device), spans)]
        scores = torch.stack([number_scores(model, *text) for text in zip(ids.to(device), spans)])
        sink, norms = summarize_windows([window_measures(model, window) for window in windows.to(device)])
        outliers = summarize_moments([activation_moments(model, window) for window in windows.to(device)])
    answer_tokens = statistics.mean(stop - start for (start, stop), *_ in spans)
    return dict(
        attn=model.config.attn, length=length, texts=texts, seed=seed, answer_tokens=answer_tokens,
        needle=summarize_shares(shares), retrieval=summarize_scores(scores), sink=sink,
        context_rms={"bound": length**-0.5, **norms}, outliers=outliers,
    )  # fmt: skip


@torch.no_grad()
def sentence_maps(model, encoding, text, heads=3):
    """Read the maps of the `heads` in which the subtraction removes most -> the text's tokens and these heads' maps.

    What it removes is min(first, factor * second), summed over all tokens but the first, where many heads rest, and
    averaged over queries. The head that removes most comes first. Plain attention has none.
    """
    ids, device = encoding.encode_ordinary(text), model.rope_cos.device
    with autocast(device):
        layers = [maps for maps, _ in layer_maps(model, torch.tensor([ids], device=device), slice(None))]
    removed = []
    for layer, maps in enumerate(layers if "first" in layers[0] else []):
        common = maps["first"] - maps["weights"].clamp(min=0)  # min(a, b) = a - max(a - b, 0)
        removed += [(amount, layer, head) for head, amount in enumerate(common[0, :, :, 1:].sum(-1).mean(-1).tolist())]
    chosen = [(layer, head) for _, layer, head in sorted(removed, reverse=True)[:heads]]
    found = [dict(layer=layer, head=head) | head_maps(layers[layer], head) for layer, head in chosen]
    return dict(tokens=[encoding.decode([token]) for token in ids], heads=found)


def head_maps(maps, head):
    """One head of a layer's maps (1, H, T, T) as nested lists, and the factor of the last token.

    Keys are factor, first, second and difference; plain attention has first alone.
    """
    if "first" not in maps:
        maps, found = {"first": maps["weights"]}, {}
    else:
        found = {"factor": 1 - maps["weights"][0, head, -1].sum().item()}  # since both maps sum to 1
    for kind, name in (("first", "first"), ("second", "second"), ("weights", "difference")):
        if kind in maps:
            found[name] = [[round(weight, 4) for weight in row] for row in maps[kind][0, head].tolist()]
    return found
