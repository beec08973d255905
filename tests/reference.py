"""The attention equations in float64, written from the papers with loops over heads and nothing from model.py."""

import math

import torch


def rotate(x, theta):
    """RoPE on x (B, T, D): dimensions i and i + D/2 as a complex number, turned by position * theta^(-2i/D)."""
    T, D = x.shape[1:]
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angle = [[t * theta ** (-2 * i / D) for i in range(D // 2)] for t in range(T)]
    z = z * torch.polar(torch.ones(T, D // 2, dtype=x.dtype), torch.tensor(angle, dtype=x.dtype))
    return torch.cat((z.real, z.imag), dim=-1)


def attention_map(q, k):
    """Causal softmax(q k^T / sqrt(D)) for one head: q and k (B, T, D) -> (B, T, T), row by row."""
    B, T, D = q.shape
    rows = []
    for t in range(T):
        scores = (q[:, t : t + 1] * k[:, : t + 1]).sum(-1) / math.sqrt(D)  # (B, t + 1)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append(torch.cat((weights, weights.new_zeros(B, T - t - 1)), dim=-1))
    return torch.stack(rows, dim=1)


def project(x, weight, width, theta=None):
    """The heads of x W^T as a list of (B, T, width), rotated if theta is given."""
    heads = (x @ weight.T).split(width, dim=-1)
    return [rotate(head, theta) for head in heads] if theta else list(heads)


def vanilla(x, w, n_head, n_kv_head, D, theta, layer, kv_x=None):
    """`kv_x` is read by k_proj and v_proj where these belong to a layer below."""
    kv_x = x if kv_x is None else kv_x
    q, k, v = project(x, w["q_proj"], D, theta), project(kv_x, w["k_proj"], D, theta), project(kv_x, w["v_proj"], D)
    group = n_head // n_kv_head
    out = [attention_map(q[h], k[h // group]) @ v[h // group] for h in range(n_head)]
    return torch.cat(out, dim=-1) @ w["o_proj"].T


def v1(x, w, n_head, n_kv_head, D, theta, layer, kv_x=None):
    kv_x = x if kv_x is None else kv_x
    q, k, v = project(x, w["q_proj"], D, theta), project(kv_x, w["k_proj"], D, theta), project(kv_x, w["v_proj"], 2 * D)
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lam = (w["lambda_q1"] @ w["lambda_k1"]).exp() - (w["lambda_q2"] @ w["lambda_k2"]).exp() + lambda_init
    pairs, groups = n_head // 2, n_kv_head // 2
    out = []
    for i in range(pairs):
        g = i // (pairs // groups)
        maps = [attention_map(q[2 * i + m], k[2 * g + m]) for m in (0, 1)]
        y = (maps[0] - lam * maps[1]) @ v[g]  # (B, T, 2D)
        y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["subln"]
        out.append((1 - lambda_init) * y)
    return torch.cat(out, dim=-1) @ w["o_proj"].T


def v2(x, w, n_head, n_kv_head, D, theta, layer, kv_x=None):
    kv_x = x if kv_x is None else kv_x
    q, k, v = project(x, w["q_proj"], D, theta), project(kv_x, w["k_proj"], D, theta), project(kv_x, w["v_proj"], D)
    lam = 1 / (1 + (-(x @ w["lambda_proj"].T)).exp())  # (B, T, n_head)
    group = 2 * n_head // n_kv_head
    out = []
    for i in range(n_head):
        g = 2 * i // group
        difference = attention_map(q[2 * i], k[g]) - lam[..., i : i + 1] * attention_map(q[2 * i + 1], k[g])
        out.append(difference @ v[g])
    return torch.cat(out, dim=-1) @ w["o_proj"].T


REFERENCE = {"vanilla": vanilla, "v1": v1, "v2": v2}
