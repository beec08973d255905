"""DIFF V2 taken apart: attentions that differ from it in one choice each. bench.runs trains them.

bench.runs adds them to model.ATTENTION while it trains. They are no choices of --attn.
"""

import torch.nn as nn

from engine.attention import causal_attention
from model import DiffAttnV2, RMSNorm


class Across(DiffAttnV2):
    """Query heads i and i + n_head make head i. They are in different groups, which read different keys."""

    def forward(self, x, rope, cache=None, shared=None):
        q, k, v, logits = self.qkv(x, rope, shared)
        y = causal_attention(q, k, v, cache, self.impl)
        attn1, attn2 = y.chunk(2, dim=2)  # V2 takes the even and the odd heads, which share their keys
        y = (attn1 - self.lam(x, logits).unsqueeze(-1) * attn2).type_as(attn1)
        return self.o_proj(y.flatten(2)), (k, v)


class NoLambda(DiffAttnV2):
    """A1 V - A2 V, without lambda. Its projection is there, so that all draw the same initial weights, but unused."""

    factor = 1.0

    def lam(self, x, logits=None):
        return x.new_full((*x.shape[:2], self.lambda_proj.out_features), self.factor)


class Half(NoLambda):
    """A1 V - A2 V / 2: V2's lambda is 1/2 as well where its projection is zero, and not far from it at the start."""

    factor = 0.5


class NoSigmoid(DiffAttnV2):
    """Lambda without the sigmoid: it may leave 0 to 1, and begins near 0."""

    def lam(self, x, logits=None):
        return self.lambda_proj(x) if logits is None else logits


class NormedLinear(nn.Linear):
    """A linear layer that reads heads after an RMSNorm over each."""

    def __init__(self, in_features, out_features, head_dim, eps):
        super().__init__(in_features, out_features, bias=False)
        self.subln = RMSNorm(head_dim, eps)

    def forward(self, y):
        return super().forward(self.subln(y.unflatten(-1, (-1, len(self.subln.weight)))).flatten(-2))


class Norm(DiffAttnV2):
    """V1's norm over each head, after the subtraction. Its factor 1 - lambda_init has no counterpart in V2."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        # In o_proj, so that DiffAttnV2.forward() stays as it is
        self.o_proj = NormedLinear(config.n_head * config.head_dim, config.n_embd, config.head_dim, config.norm_eps)


DESIGNS = {"across": Across, "no-lambda": NoLambda, "half": Half, "no-sigmoid": NoSigmoid, "norm": Norm}
