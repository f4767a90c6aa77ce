"""Softmax attention to second order, a chunk of queries at a time: memory linear in the sequence length.

For one head, s the scale, masked scores excluded, sums over a row run over the visible keys::

    S = s q k'        P = softmax(S)        L = logsumexp(S)        o = P v

    S_dot = s (q_dot k' + q k_dot')          mu = rowsum(P S_dot)             (mu is L_dot)
    P_dot = P (S_dot - mu)                   o_dot = P_dot v + P v_dot

    delta     = rowsum(o_bar o)              P_bar     = o_bar v'
    delta_dot = rowsum(o_bar_dot o + o_bar o_dot)
                                             P_bar_dot = o_bar_dot v' + o_bar v_dot'
    S_bar     = P (P_bar - delta)            S_bar_dot = P_dot (P_bar - delta) + P (P_bar_dot - delta_dot)
    q_bar     = s S_bar k                    q_bar_dot = s (S_bar_dot k + S_bar k_dot)
    k_bar     = s S_bar' q                   k_bar_dot = s (S_bar_dot' q + S_bar' q_dot)
    v_bar     = P' o_bar                     v_bar_dot = P_dot' o_bar + P' o_bar_dot

(FlashAttention's recomputation from L, Dao et al., 2022, arXiv:2205.14135, carried to the tangent.) The saved
tensors are o and L, after ``fwd_jvp`` with their tangents, so no row sum ever needs a second pass. A row with no
visible key gives zeros, in value and in every derivative.

The products are the library's; the arithmetic between them is ``attention_scores``. Grouped queries share their
key head by stacking the group's rows, so keys and values are never repeated.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlfast.ops.attention_scores import (
    Visible,
    scores_bwd,
    scores_bwd_jvp,
    softmax_scores,
    softmax_scores_jvp,
)
from mamlfast.ops.rule import Rule

# Elements of one chunk of scores: a handful of such tensors is alive at a time.
CHUNK = 1 << 20


def attention_weights(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """``softmax(scale q k' + mask)`` [B, H, T, S] for q [B, H, T, D] and k [B, G, S, D], G dividing H.

    ``mask`` is constant: bool (True: visible) or additive, broadcastable to [B, H, T, S]. ``causal`` lets query t
    see keys 0 .. t. ``scale`` defaults to D^-1/2.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """``attention_weights(q, k, **options) v``, every score in memory: v [B, G, S, E] -> [B, H, T, E]."""
    return attention_weights(q, k, **options) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Queries ``rows`` of every head, the keys they may see, and the mask between the two."""

    rows: slice
    keys: slice
    visible: Visible


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one call is cut up: heads share a key head in groups, queries come in chunks."""

    B: int
    H: int
    G: int
    T: int
    S: int
    scale: float
    causal: bool
    mask: Tensor | None

    def chunks(self) -> Iterator[_Chunk]:
        step = max(1, min(self.T, CHUNK // max(1, self.B * self.H * self.S)))
        for start in range(0, self.T, step):
            rows = slice(start, min(start + step, self.T))
            keys = slice(0, min(rows.stop, self.S) if self.causal else self.S)
            yield _Chunk(rows=rows, keys=keys, visible=self._visible(rows, keys))

    def _visible(self, rows, keys):
        offset = rows.start if self.causal else None
        if self.mask is None:
            return Visible(causal_offset=offset)
        m = self.mask[:, :, rows if self.mask.shape[2] > 1 else slice(None)]
        m = m[..., keys] if m.shape[3] > 1 else m.expand(*m.shape[:3], keys.stop)
        if m.shape[1] == 1:  # all heads of a batch entry share it
            return Visible(causal_offset=offset, mask=m[:, 0], repeat=self.H)
        m = m.expand(self.B, self.H, *m.shape[2:]).reshape(-1, *m.shape[2:])
        return Visible(causal_offset=offset, mask=m)

    def queries(self, x, rows):
        """[B, H, T, D] -> the chunk's [B G, (H/G) R, D]: the group's rows stacked under their key head."""
        return x[:, :, rows].reshape(self.B * self.G, -1, x.shape[-1])

    def heads(self, scores):
        """[B G, (H/G) R, S] -> [B H, R, S], the same memory."""
        return scores.view(self.B * self.H, -1, scores.shape[-1])

    def keys(self, x):
        """[B, G, S, D] -> [B G, S, D]."""
        return x.reshape(self.B * self.G, self.S, x.shape[-1])

    def row_statistic(self, x, rows):
        """[B, H, T] -> [B H, R]."""
        return x[:, :, rows].reshape(self.B * self.H, -1)

    def new_statistic(self, x):
        """[B, H, T], float32 at least: a row statistic in half precision would spoil every score of its row."""
        return x.new_empty(self.B, self.H, self.T, dtype=torch.promote_types(x.dtype, torch.float32))

    def put(self, out, rows, value):
        """The inverse of ``queries`` and ``row_statistic``: write a chunk into [B, H, T, ...]."""
        out[:, :, rows] = value.view(self.B, self.H, -1, *out.shape[3:])


def _row_sum(a, b):
    return (a * b).sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))


def _plan(q, k, *, mask=None, causal=False, scale=None):
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return _Plan(B=B, H=H, G=G, T=T, S=S, scale=D**-0.5 if scale is None else scale, causal=causal, mask=mask)


def _fwd(xs, **options):
    q, k, v = xs
    plan = _plan(q, k, **options)
    o, lse = q.new_empty(*q.shape[:3], v.shape[-1]), plan.new_statistic(q)
    k, v = plan.keys(k), plan.keys(v)
    for chunk in plan.chunks():
        s = plan.queries(q, chunk.rows) @ k[:, chunk.keys].mT
        row_lse = softmax_scores(plan.heads(s), plan.scale, chunk.visible)
        plan.put(lse, chunk.rows, row_lse)
        plan.put(o, chunk.rows, s @ v[:, chunk.keys])
    return o, (o, lse)


def _fwd_jvp(xs, xs_dot, **options):
    (q, k, v), (q_dot, k_dot, v_dot) = xs, xs_dot
    plan = _plan(q, k, **options)
    o, o_dot = (q.new_empty(*q.shape[:3], v.shape[-1]) for _ in range(2))
    lse, mu = plan.new_statistic(q), plan.new_statistic(q)
    k, v, k_dot, v_dot = (plan.keys(x) for x in (k, v, k_dot, v_dot))
    for chunk in plan.chunks():
        rows, keys = chunk.rows, chunk.keys
        q_rows, q_dot_rows = plan.queries(q, rows), plan.queries(q_dot, rows)
        s = q_rows @ k[:, keys].mT
        s_dot = torch.bmm(q_dot_rows, k[:, keys].mT).baddbmm_(q_rows, k_dot[:, keys].mT)
        row_lse, row_mu = softmax_scores_jvp(plan.heads(s), plan.heads(s_dot), plan.scale, chunk.visible)
        plan.put(lse, rows, row_lse)
        plan.put(mu, rows, row_mu)
        plan.put(o, rows, s @ v[:, keys])
        plan.put(o_dot, rows, torch.bmm(s_dot, v[:, keys]).baddbmm_(s, v_dot[:, keys]))
    return o, o_dot, (o, o_dot, lse, mu)


def _bwd(xs, saved, y_bar, need, **options):
    (q, k, v), (o, lse) = xs, saved
    plan = _plan(q, k, **options)
    delta = _row_sum(y_bar, o)
    q_bar = torch.empty_like(q)
    k_rows, v_rows = plan.keys(k), plan.keys(v)
    k_bar, v_bar = torch.zeros_like(k_rows), torch.zeros_like(v_rows)
    for chunk in plan.chunks():
        rows, keys = chunk.rows, chunk.keys
        q_rows, o_bar = plan.queries(q, rows), plan.queries(y_bar, rows)
        p, s_bar = q_rows @ k_rows[:, keys].mT, o_bar @ v_rows[:, keys].mT
        lse_r, delta_r = (plan.row_statistic(x, rows) for x in (lse, delta))
        scores_bwd(plan.heads(p), plan.heads(s_bar), lse_r, delta_r, plan.scale, chunk.visible)
        v_bar[:, keys].baddbmm_(p.mT, o_bar)
        k_bar[:, keys].baddbmm_(s_bar.mT, q_rows)
        plan.put(q_bar, rows, s_bar @ k_rows[:, keys])
    return q_bar, k_bar.view(k.shape), v_bar.view(v.shape)


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options):
    (q, k, v), (q_dot, k_dot, v_dot), (o, o_dot, lse, mu) = xs, xs_dot, saved
    plan = _plan(q, k, **options)
    delta, delta_dot = _row_sum(y_bar, o), _row_sum(y_bar_dot, o) + _row_sum(y_bar, o_dot)
    q_bar, q_bar_dot = torch.empty_like(q), torch.empty_like(q)
    k_all, v_all, k_dot_all, v_dot_all = (plan.keys(x) for x in (k, v, k_dot, v_dot))
    k_bar, k_bar_dot = torch.zeros_like(k_all), torch.zeros_like(k_all)
    v_bar, v_bar_dot = torch.zeros_like(v_all), torch.zeros_like(v_all)
    for chunk in plan.chunks():
        rows, keys = chunk.rows, chunk.keys
        q_r, q_dot_r, o_bar, o_bar_dot = (plan.queries(x, rows) for x in (q, q_dot, y_bar, y_bar_dot))
        k_c, v_c, k_dot_c, v_dot_c = (x[:, keys] for x in (k_all, v_all, k_dot_all, v_dot_all))
        p = q_r @ k_c.mT
        p_dot = torch.bmm(q_dot_r, k_c.mT).baddbmm_(q_r, k_dot_c.mT)
        s_bar = o_bar @ v_c.mT
        s_bar_dot = torch.bmm(o_bar_dot, v_c.mT).baddbmm_(o_bar, v_dot_c.mT)
        tiles = [plan.heads(x) for x in (p, p_dot, s_bar, s_bar_dot)]
        statistics = [plan.row_statistic(x, rows) for x in (lse, mu, delta, delta_dot)]
        scores_bwd_jvp(*tiles, *statistics, scale=plan.scale, visible=chunk.visible)
        v_bar[:, keys].baddbmm_(p.mT, o_bar)
        v_bar_dot[:, keys].baddbmm_(p_dot.mT, o_bar).baddbmm_(p.mT, o_bar_dot)
        k_bar[:, keys].baddbmm_(s_bar.mT, q_r)
        k_bar_dot[:, keys].baddbmm_(s_bar_dot.mT, q_r).baddbmm_(s_bar.mT, q_dot_r)
        plan.put(q_bar, rows, s_bar @ k_c)
        plan.put(q_bar_dot, rows, torch.bmm(s_bar_dot, k_c).baddbmm_(s_bar, k_dot_c))
    xs_bar = q_bar, k_bar.view(k.shape), v_bar.view(v.shape)
    return xs_bar, (q_bar_dot, k_bar_dot.view(k.shape), v_bar_dot.view(v.shape))


attention = Rule(
    name="attention",
    reference=attention_reference,
    fwd=_fwd,
    bwd=_bwd,
    fwd_jvp=_fwd_jvp,
    bwd_jvp=_bwd_jvp,
)
