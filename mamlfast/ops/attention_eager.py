"""Attention in plain PyTorch, a chunk of scores at a time: the room for what no kernel of ours takes.

Grouped queries share their key head by stacking the group's rows, so keys and values are never repeated. Memory
is linear in the sequence lengths; arithmetic is float32, or float64 for float64 inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor

from mamlfast.ops.attention_reference import hidden_pairs, kept_pairs, mask_part

# Scores of one chunk, of which about a dozen such tensors are alive at a time; rows of one head that go together.
CHUNK = 1 << 19
ROWS = 256

# Which of the results for q, k, v somebody wants.
Need = tuple[bool, bool, bool]
ALL = (True, True, True)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Return ``o`` [B, H, T, E] and ``lse`` [B, H, T]."""
    call = _Call((q, k, v), spec)
    o, lse = call.like(q, v.shape[-1]), call.statistic()
    for c in call.chunks():
        S, _ = c.scores()
        lse[c.at] = row_lse = S.logsumexp(-1)
        P = _probabilities(S, row_lse)
        o[c.at] = c.product(c.dropped(P), c.v)
    return o.view(*q.shape[:3], -1).to(q.dtype), lse.view(q.shape[:3])


def attention_fwd_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor, k_dot: Tensor, v_dot: Tensor, *, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``o, o_dot, lse, mu``."""
    call = _Call((q, k, v), spec, (q_dot, k_dot, v_dot))
    (o, o_dot), (lse, mu) = (call.like(q, v.shape[-1]) for _ in "oo"), (call.statistic() for _ in "lm")
    for c in call.chunks():
        S, t = c.scores()
        lse[c.at] = row_lse = S.logsumexp(-1)
        P = _probabilities(S, row_lse)
        S_dot = c.scores_dot(t)
        mu[c.at] = row_mu = (P * S_dot).sum(-1)
        P_dot = c.dropped(P * (S_dot - row_mu[..., None]))
        P = c.dropped(P)
        o[c.at] = c.product(P, c.v)
        o_dot[c.at] = c.product(P_dot, c.v) + c.product(P, c.v_dot)
    shape = q.shape[:3]
    o, o_dot = (x.view(*shape, -1).to(q.dtype) for x in (o, o_dot))
    return o, o_dot, lse.view(shape), mu.view(shape)


def attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, o_bar: Tensor, *, spec: AttentionSpec, need: Need = ALL
) -> tuple[Tensor, ...]:
    """Return ``q_bar, k_bar, v_bar``, all of them whatever is needed."""
    call = _Call((q, k, v), spec, None, o_bar)
    lse, delta = call.rows(lse), call.rows(row_sum(o_bar, o))
    bars = call.gradients(q, k, v)
    for c in call.chunks():
        S, t = c.scores()
        P = _probabilities(S, lse[c.at])
        S_bar = P * (c.dropped(c.pairs(c.o_bar, c.v)) - delta[c.at][..., None])
        c.accumulate(bars, c.z_bar(S_bar, t), c.dropped(P), c.q, c.k, c.o_bar)
    return call.as_inputs(bars, q, k, v)


def attention_bwd_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor, k_dot: Tensor, v_dot: Tensor,
    o: Tensor, o_dot: Tensor, lse: Tensor, mu: Tensor, o_bar: Tensor, o_bar_dot: Tensor,
    *, spec: AttentionSpec, need: Need = ALL, need_dot: Need = ALL,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
    """Return ``(q_bar, k_bar, v_bar)`` and their tangents, all of them whatever is needed."""
    call = _Call((q, k, v), spec, (q_dot, k_dot, v_dot), o_bar, o_bar_dot)
    delta_dot = row_sum(o_bar_dot, o) + row_sum(o_bar, o_dot)
    statistics = [call.rows(x) for x in (lse, mu, row_sum(o_bar, o), delta_dot)]
    bars, bar_dots = call.gradients(q, k, v), call.gradients(q, k, v)
    for c in call.chunks():
        row_lse, row_mu, row_delta, row_delta_dot = (x[c.at][..., None] for x in statistics)
        S, t = c.scores()
        P = _probabilities(S, row_lse[..., 0])
        S_dot = c.scores_dot(t)
        P_dot = P * (S_dot - row_mu)
        centred = c.dropped(c.pairs(c.o_bar, c.v)) - row_delta
        centred_dot = c.dropped(c.pairs(c.o_bar_dot, c.v) + c.pairs(c.o_bar, c.v_dot)) - row_delta_dot
        S_bar, S_bar_dot = P * centred, P_dot * centred + P * centred_dot
        z_bar, z_bar_dot = c.z_bar(S_bar, t), c.z_bar_dot(S_bar_dot, S_bar, S_dot, t)
        P, P_dot = c.dropped(P), c.dropped(P_dot)
        c.accumulate(bars, z_bar, P, c.q, c.k, c.o_bar)
        c.accumulate(bar_dots, z_bar_dot, P_dot, c.q, c.k, c.o_bar)
        c.accumulate(bar_dots, z_bar, P, c.q_dot, c.k_dot, c.o_bar_dot)
    return call.as_inputs(bars, q, k, v), call.as_inputs(bar_dots, q, k, v)


def row_sum(a: Tensor, b: Tensor) -> Tensor:
    """``sum(a b)`` over the last dimension in float32 at least: it is subtracted from every score of its row."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(-1)


def _probabilities(S, lse):
    return torch.exp(S - lse.masked_fill(lse == -torch.inf, 0)[..., None])


class _Call:
    """One call in wide arithmetic: q, o_bar as [B G, H/G, T, ...], k and v as [B G, S, ...], and how it is cut up."""

    def __init__(self, xs, spec, xs_dot=None, o_bar=None, o_bar_dot=None):
        (self.B, self.H, self.T, _), (_, self.G, self.S, _) = xs[0].shape, xs[1].shape
        self.spec, self.device = spec, xs[0].device
        self.dtype = torch.promote_types(xs[0].dtype, torch.float32)
        tensors = {"q": xs[0], "k": xs[1], "v": xs[2], "o_bar": o_bar, "o_bar_dot": o_bar_dot}
        tensors |= dict(zip(("q_dot", "k_dot", "v_dot"), xs_dot or (), strict=False))
        self.tensors = {name: self._laid_out(name, x) for name, x in tensors.items() if x is not None}

    def _laid_out(self, name, x):
        x = x.to(self.dtype)
        shape = (self.S,) if name[0] in "kv" else (self.H // self.G, self.T)
        return x.reshape(self.B * self.G, *shape, x.shape[-1])

    def rows(self, x):
        """[B, H, T] -> [B G, H/G, T]."""
        return x.reshape(self.B * self.G, self.H // self.G, self.T)

    def like(self, x, width):
        return x.new_empty(self.B * self.G, self.H // self.G, self.T, width, dtype=self.dtype)

    def statistic(self):
        return torch.empty(self.B * self.G, self.H // self.G, self.T, dtype=self.dtype, device=self.device)

    def gradients(self, *xs):
        return [torch.zeros_like(self.tensors[name]) for name, _ in zip("qkv", xs, strict=True)]

    def as_inputs(self, gradients, *xs):
        return tuple(g.view(x.shape).to(x.dtype) for g, x in zip(gradients, xs, strict=True))

    def chunks(self) -> Iterator["_Chunk"]:
        """Whole batch entries if they fit, else heads, else fewer rows of one key head."""
        group, (left, right) = self.H // self.G, self.spec.reach()
        step = max(1, min(ROWS, self.T, CHUNK // max(1, group * self.S)))
        heads = max(1, CHUNK // max(1, group * self.S * step))
        heads = heads // self.G * self.G if heads >= self.G else 1
        for n in range(0, self.B * self.G, heads):
            for t in range(0, self.T, step):
                rows = slice(t, min(t + step, self.T))
                keys = _keys_seen(left, right, rows, self.S)
                yield _Chunk(call=self, heads=slice(n, min(n + heads, self.B * self.G)), rows=rows, keys=keys)


def _keys_seen(left, right, rows, S):
    first = 0 if left is None else min(max(rows.start - left, 0), S)
    end = S if right is None else min(max(rows.stop + right, first), S)
    return slice(first, end)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Key heads ``heads``, of their queries ``rows``, and the keys that these may see: [n, H/G, R, C] scores."""

    call: _Call
    heads: slice
    rows: slice
    keys: slice

    def __getattr__(self, name: str) -> Any:
        """The chunk's part of the tensor of that name."""
        x = self.call.tensors[name][self.heads]
        return x[:, self.keys] if x.ndim == 3 else x[:, :, self.rows]

    def pairs(self, a, b):
        """[n, h, R, D] and [n, C, D] -> [n, h, R, C]."""
        return (a.flatten(1, 2) @ b.mT).view(*a.shape[:3], -1)

    def product(self, p, b):
        """[n, h, R, C] and [n, C, D] -> [n, h, R, D]."""
        return (p.flatten(1, 2) @ b).view(*p.shape[:3], -1)

    @property
    def at(self):
        """Where the chunk's rows are in [B G, H/G, T, ...]."""
        return self.heads, slice(None), self.rows

    def scores(self):
        """Scores, -inf where hidden, and with a soft-cap t = tanh(scale q k' / softcap)."""
        spec, S, t = self.call.spec, self.pairs(self.q, self.k) * self.call.spec.scale, None
        if spec.softcap is not None:
            t = torch.tanh(S / spec.softcap)
            S = spec.softcap * t
        if spec.mask is not None and spec.mask.dtype != torch.bool:
            S = S + self._per_head(lambda b: mask_part(spec.mask, b, self.rows, self.keys).to(S.dtype))
        hidden = self._per_head(lambda b: hidden_pairs(spec, b, self.rows, self.keys, S.device))
        return S if hidden is None else S.masked_fill(hidden, -torch.inf), t

    def _per_head(self, part):
        """What ``part`` says of the batch entries that the chunk touches, broadcastable to its scores."""
        G, group = self.call.G, self.call.H // self.call.G
        batch = slice(self.heads.start // G, (self.heads.stop - 1) // G + 1)
        x = part(batch)
        if x is None or x.ndim < 4 or x.shape[:2] == (1, 1):
            return x
        x = x.expand(batch.stop - batch.start, self.call.H, *x.shape[2:]).unflatten(1, (G, group)).flatten(0, 1)
        first = self.heads.start - batch.start * G
        return x[first : first + self.heads.stop - self.heads.start]

    def scores_dot(self, t):
        S_dot = (self.pairs(self.q_dot, self.k) + self.pairs(self.q, self.k_dot)) * self.call.spec.scale
        return S_dot if t is None else S_dot * (1 - t * t)

    def z_bar(self, S_bar, t):
        """The cotangent of ``q k'``."""
        return self.call.spec.scale * (S_bar if t is None else (1 - t * t) * S_bar)

    def z_bar_dot(self, S_bar_dot, S_bar, S_dot, t):
        if t is None:
            return self.call.spec.scale * S_bar_dot
        return self.call.spec.scale * ((1 - t * t) * S_bar_dot - (2 / self.call.spec.softcap) * t * S_dot * S_bar)

    def dropped(self, P):
        spec, group = self.call.spec, self.call.H // self.call.G
        if not spec.dropout:
            return P
        heads = slice(self.heads.start * group, self.heads.stop * group)
        kept = kept_pairs(spec, heads, self.rows, self.keys, P.device).view(P.shape)
        return P * kept / (1 - spec.dropout)

    def accumulate(self, gradients, z_bar, P, q, k, o_bar):
        q_bar, k_bar, v_bar = gradients
        q_bar[self.at] += self.product(z_bar, k)
        k_bar[self.heads, self.keys].baddbmm_(z_bar.flatten(1, 2).mT, q.flatten(1, 2))
        v_bar[self.heads, self.keys].baddbmm_(P.flatten(1, 2).mT, o_bar.flatten(1, 2))
