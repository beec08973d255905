"""Retrieval as a task: tune a model to find one of several facts in a text, then measure how well it does.

A text ends with the question for one of the numbers hidden in it. Cities, numbers and places are drawn anew for every
text, and the model is tested on cities that it was never asked for. bench.runs starts the runs. A needle is one of the
facts, " The magic number of Oslo is 4821937."
"""

import itertools
import statistics
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

import train
from bench.probes import layer_maps, share
from data.dataset import sample_batch
from engine.device import autocast
from engine.graphs import uncompiled
from engine.settings import UserError

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
# (needles in a text, digits of their numbers): the first that fits the context
NEEDLES = ((6, 7), (4, 7), (4, 5), (2, 3))
PARTS = ("answer", "others", "first_token", "rest")  # of a text; others: the numbers of the other needles
HELD_OUT = CITIES[::4]  # for the test: 20 of 80
TAUGHT = tuple(city for city in CITIES if city not in HELD_OUT)
COUNTS = (1, 2, 4, 6, 8)  # needles in a text of the test; training has six, or as many as fit
DEPTHS = 5  # equal parts of a text, by the place of the answer
SHARE_TEXTS = 64  # in which attention is measured

# ---------------------------------------------------------------------------------------------------
# Needles: one of several facts has to be found in a long text (arXiv 2410.05258, section 3.4)


def needle_texts(encoding, tokens, length, texts, size, cities):
    """Hide needles in texts of held-out `tokens`, and end each text with the question for one of them.

    `size` is the number of needles and their digits. -> ids (texts, length) int64, and for each text the (start, stop)
    of every needle's number, beginning with the one that is asked for. Raises ValueError if there are too few tokens.
    """
    count, digits = size
    if len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens are too few to cut texts of {length} from")
    rng, filler = np.random.default_rng((1, 2)), sample_batch(tokens, length, texts, seed=1, step=1)[0].tolist()
    numbers = draw_numbers(rng, encoding.encode_ordinary, texts * count, digits)
    hidden = []
    for row, text in enumerate(filler):
        own = numbers[row * count : (row + 1) * count]
        hidden.append(hide_needles(rng, encoding.encode_ordinary, text, own, cities))
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

    All lists have the same length, the commonest among many numbers.
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
    # For the answer at the end, the callers drop as many tokens at the beginning. No needle may begin there.
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


# ---------------------------------------------------------------------------------------------------
# The task


class Retrieval(train.Pretraining):
    """Every second micro-batch has needle texts, the others ordinary windows.

    So the loss is half the mean cross-entropy of all tokens of the windows, and half that of the answers' tokens. Both
    halves are drawn from (seed, step) alone.
    """

    def __init__(self, settings, checkpoint=None):
        if settings.batch_size // settings.micro_batch_size % 2:
            raise UserError("retrieval needs an even number of micro-batches")
        super().__init__(settings, checkpoint)
        self.size = needle_size(self.encoding.encode_ordinary, settings.block_size)
        self.val_tokens = torch.cat([inputs.flatten() for inputs, _ in self.val_batches]).numpy()
        self.val_texts = self.held_out_texts(self.size, settings.eval_windows)

    def get_batch(self, step):
        count, micro_batches = super().get_batch(step)
        rng = np.random.default_rng((self.settings.seed, step, 2))
        micro_batches[1::2] = [self.hide(rng, inputs) for inputs, _ in micro_batches[1::2]]
        return count, micro_batches

    def hide(self, rng, windows):
        """Hide needles in windows (B, T), and let the answers follow -> inputs and targets (B, T), -100 elsewhere."""
        (count, digits), encode, texts = self.size, self.encoding.encode_ordinary, []
        numbers = draw_numbers(rng, encode, len(windows) * count, digits)
        for row, window in enumerate(windows.tolist()):
            own = numbers[row * count : (row + 1) * count]
            ids, ((start, stop), *_) = hide_needles(rng, encode, window, own, TAUGHT)
            texts.append(ids + ids[start:stop])
        width, texts = len(numbers[0]), torch.tensor(texts)[:, len(numbers[0]) - 1 :]  # no needle begins before
        targets = texts[:, 1:].clone()
        targets[:, :-width] = -100
        return texts[:, :-1].contiguous(), targets

    def held_out_texts(self, size, texts):
        """needle_texts() about held-out cities."""
        return needle_texts(self.encoding, self.val_tokens, self.settings.block_size, texts, size, HELD_OUT)

    @torch.no_grad()
    def evaluate(self):
        """Measure the counterpart of the training loss, and the share of held-out texts that are answered right."""
        metrics, text = super().evaluate()
        right, loss = self.answers(*self.val_texts)
        val_loss, accuracy = (metrics["val_loss"] + loss) / 2, right.float().mean().item()
        text += f"; answers: loss {loss:.4f}, right {accuracy:.3f}"
        return {"val_loss": val_loss, "val_accuracy": accuracy}, text

    def answers(self, ids, spans):
        """Return which texts (N, T) are answered right (N,), and the mean cross-entropy of the answers' tokens.

        The model reads the answer up to its last token but one. If every token is the likeliest after those before, it
        is what greedy decoding gives.
        """
        answers = torch.stack([text[slice(*span)] for text, (span, *_) in zip(ids, spans)])  # (N, W)
        W = answers.size(1)
        texts = torch.cat((ids[:, W - 1 :], answers[:, :-1]), dim=1)  # T tokens: no needle begins before W
        right, losses = [], []
        for rows in torch.arange(len(ids)).split(self.settings.micro_batch_size):
            answer = answers[rows].to(self.device)
            with autocast(self.device), uncompiled():
                logits = self.model.lm_head(self.model.hidden(texts[rows].to(self.device))[:, -W:])
            right.append((logits.argmax(-1) == answer).all(-1))
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), answer.flatten(), reduction="none"))
        return torch.cat(right).cpu(), torch.cat(losses).mean().item()

    @torch.no_grad()
    def measure(self, texts):
        """Test the trained model on held-out cities, with so many texts for each of COUNTS -> a dict for JSON.

        accuracy has {needles in a text: {"right": by depth, "texts": by depth}}; needle is where the last position
        looks, and recall has the maps of the head that looks at the answer most.
        """
        count, digits = self.size
        accuracy, length = {}, self.settings.block_size
        for needles in COUNTS:
            if needles_fit(self.encoding.encode_ordinary, length, needles, digits):
                ids, spans = self.held_out_texts((needles, digits), texts)
                depths = torch.tensor([start for (start, _), *_ in spans]) * DEPTHS // ids.size(1)
                right = self.answers(ids, spans)[0]
                tested = {"right": depths[right], "texts": depths}
                accuracy[str(needles)] = {n: torch.bincount(d, minlength=DEPTHS).tolist() for n, d in tested.items()}
        ids, spans = self.held_out_texts(self.size, min(texts, SHARE_TEXTS))
        with autocast(self.device):
            shares = [needle_shares(self.model, *text) for text in zip(ids.to(self.device), spans)]
            needle = summarize_shares(shares)
            recall = self.recall_maps(**needle["weights"]["best_head"])
        attn = self.model.config.attn
        return dict(attn=attn, length=length, needles=count, accuracy=accuracy, needle=needle, recall=recall)

    def recall_maps(self, layer, head, answer):
        """Read the maps of a head in a few facts and the question for the second -> a dict for JSON.

        `answer` is the share that the answer got from the head in longer texts, on average. The span is the first and
        the end position of the answer in the short one.
        """
        encode, (count, digits) = self.encoding.encode_ordinary, self.size
        questions = [encode(QUESTION.format(city)) for city in HELD_OUT[: min(3, count)]]
        numbers = draw_numbers(np.random.default_rng(1), encode, len(questions), digits)
        needles = [question + number + encode(".") for question, number in zip(questions, numbers)]
        start = len(needles[0]) + len(questions[1])
        ids = [*itertools.chain(*needles), *questions[1]]
        maps = list(layer_maps(self.model, torch.tensor([ids], device=self.device), slice(None)))[layer][0]
        tokens = [self.encoding.decode([token]) for token in ids]
        span = [start, start + len(numbers[1])]
        return dict(layer=layer, head=head, answer=answer, tokens=tokens, span=span) | head_maps(maps, head)


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
