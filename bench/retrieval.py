"""Retrieval as a task: tune a model to find one of several facts in a text, then measure how well it does.

A text ends with the question for one of the numbers hidden in it, as in bench.probes. Cities, numbers and places are
drawn anew for every text, and the model is tested on cities that it was never asked for. bench.runs starts the runs.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

import train
from bench.probes import (
    CITIES,
    QUESTION,
    draw_numbers,
    head_maps,
    hide_needles,
    layer_maps,
    needle_shares,
    needle_size,
    needle_texts,
    needles_fit,
    summarize_shares,
)
from engine.device import autocast
from engine.graphs import uncompiled

HELD_OUT = CITIES[::4]  # for the test: 20 of 80
TAUGHT = tuple(city for city in CITIES if city not in HELD_OUT)
COUNTS = (1, 2, 4, 6, 8)  # needles in a text of the test; training has six, or as many as fit
DEPTHS = 5  # equal parts of a text, by the place of the answer
SHARE_TEXTS = 64  # in which attention is measured


class Retrieval(train.Pretraining):
    """Every second micro-batch has needle texts, the others ordinary windows.

    So the loss is half the mean cross-entropy of all tokens of the windows, and half that of the answers' tokens. Both
    halves are drawn from (seed, step) alone.
    """

    def __init__(self, settings, checkpoint=None):
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
        """needle_texts() about held-out cities, of `size`."""
        options = dict(size=size, cities=HELD_OUT)
        return needle_texts(self.encoding, self.val_tokens, self.settings.block_size, texts, **options)

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
        looks, as in probe(), and recall has the maps of the head that looks at the answer most.
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
