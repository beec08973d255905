"""Generating text: the KV cache, the Decoder that continues texts token by token, and sampling."""

from typing import NamedTuple

import torch

from engine.attention import has_decode_kernel
from engine.graphs import cuda_graph
from engine.linear import fuse_weights


def generate(model, idx, max_new_tokens, **options):
    """Continue idx (B, T) by sampling -> (B, T + max_new_tokens). Decoder explains the options."""
    decoder = Decoder(model, len(idx), min(idx.size(1) + max_new_tokens, model.config.block_size), **options)
    return torch.cat((idx, *decoder.stream(idx, max_new_tokens)), dim=1)


def prepare_for_inference(model):
    """Freeze a model for generation: matrices in bf16 on a GPU, and weights that read the same input joined.

    Merge adapters before, and move or cast the model. Returns the model.
    """
    model.requires_grad_(False).eval()
    if model.rope_cos.is_cuda:
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.bfloat16()  # once, instead of by autocast at every product
    for module in model.modules():
        if hasattr(module, "input_projections"):
            fuse_weights(module.input_projections())
    return model


class LayerCache(NamedTuple):
    """The cache of one layer: keys (B, S, K, D), values (B, S, G, Dv), with room for S tokens.

    `positions` (T,) says where the keys and values of the tokens being read go. `is_written`: a layer below, which
    shares its cache with this one, has put them there.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    is_written: bool


class KVCache:
    """Keys and values of `batch_size` sequences of up to `length` tokens.

    They take 2 * n_kv_head * head_dim numbers for a token and each of n_kv_layers, for every kind of attention.
    """

    def __init__(self, model, batch_size, length, dtype, device):
        config, width = model.config, model.layers[0].attn.value_width
        k_shape = (batch_size, length, config.n_kv_head, config.head_dim)
        v_shape = (batch_size, length, config.n_kv_head // width, width * config.head_dim)
        shapes = [(k_shape, v_shape)] * config.n_kv_layers
        self.layers = [[torch.zeros(shape, dtype=dtype, device=device) for shape in pair] for pair in shapes]

    def at(self, layer, positions):
        """Return a layer's LayerCache for tokens at these positions (T,)."""
        own = min(layer, len(self.layers) - 1)
        return LayerCache(*self.layers[own], positions, is_written=layer > own)


class Decoder:
    """Continues texts: reads the prompt, then produces token by token, as a CUDA graph on a GPU with Triton.

    It has room for `batch_size` texts of `length` tokens. Only ids below n_vocab are produced, since the rest are
    padding; sample_token() explains temperature, top_k and top_p. compile=True takes a while at first, then runs
    faster; layers with keys of their own stay compiled. Reuse a Decoder: its CUDA graph is recorded once.
    """

    def __init__(self, model, batch_size, length, compile=False, n_vocab=None, **options):
        if length > model.config.block_size:
            raise ValueError(f"{length} tokens do not fit the context of {model.config.block_size}")
        self.model, self.length, self.n_vocab, self.options = model, length, n_vocab, options
        device = model.rope_cos.device
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # the latest, not in the cache yet
        self.used = 0  # tokens in the cache
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # the same, where a CUDA graph can read it
        self.cache = KVCache(model, batch_size, length, model.embed(self.token).dtype, device)
        self.hidden = model.hidden
        if compile:
            # To read prompts of any length; they share a program. The layers above read a single token, and compiled
            # for several texts they fail inside inductor (V1, torch 2.11).
            for layer in model.layers[: model.config.n_kv_layers]:
                layer.compile(dynamic=True)
            # The first option makes kernels of products with a single row, which take in what comes before and after
            # them; the second makes one kernel of several that do not depend on each other.
            inductor = {"coordinate_descent_tuning": True, "combo_kernels": True}
            self.hidden = torch.compile(model.hidden, dynamic=False, options=inductor)
        self.replay = None

    @torch.no_grad()
    def prefill(self, idx):
        """Read the prompts idx (B, T) -> the token after them, (B, 1)."""
        if idx.size(1) > self.length or len(idx) != len(self.token):
            raise ValueError(f"there is no room for {tuple(idx.shape)} tokens, but for {len(self.token), self.length}")
        self._sample(self.model.hidden(idx, self.cache, torch.arange(idx.size(1), device=idx.device)))
        self.used = idx.size(1)
        self.position.fill_(self.used)
        return self.token.clone()

    @torch.no_grad()
    def step(self):
        """Produce the next token, (B, 1)."""
        if self.used == self.length:
            raise ValueError(f"the room for {self.length} tokens is full")
        if not has_decode_kernel(self.cache.layers[0][0], self.model.config.attn_impl):
            self._decode()
        else:
            if self.replay is None:
                latest = self.token.clone()
                self.replay = cuda_graph(self._decode)
                self.token.copy_(latest)  # recording has put others there
            self.replay()
        self.used += 1
        self.position += 1
        return self.token.clone()

    def _decode(self):
        self._sample(self.hidden(self.token, self.cache, self.position))

    def _sample(self, hidden):
        logits = self.model.lm_head(hidden[:, -1])
        self.token.copy_(sample_token(logits[:, : self.n_vocab], **self.options))

    def stream(self, idx, max_new_tokens):
        """Continue idx (B, T): yield one column of new ids (B, 1) after another.

        A prompt longer than `length` is cut to its last tokens. When the room is full, the older half is dropped and
        the rest is read again.
        """
        text = [idx[:, -self.length :]]
        for count in range(max_new_tokens):
            if count and self.used < self.length:
                text.append(self.step())
            else:
                if count:
                    text = [torch.cat(text, dim=1)[:, -(self.length // 2 or 1) :]]
                text.append(self.prefill(text[0]))
            yield text[-1]


def sample_token(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw one id from each row of logits (B, vocab) -> (B, 1).

    Temperature 0 takes the likeliest. top_k keeps the k likeliest; top_p keeps, of those, the fewest likeliest whose
    probabilities sum to p (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    if top_k is None and top_p is None:
        return multinomial(((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1))
    logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # likeliest first
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # the sum of all that come before
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    return ids.gather(-1, multinomial(probabilities))


def multinomial(probabilities):
    """Draw one index from each row of probabilities (B, V), which need not sum to 1 -> (B, 1).

    Take the index whose exponential clock rings first, among V. torch.multinomial would make the CPU wait for the GPU,
    which no CUDA graph can record.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1, keepdim=True)
