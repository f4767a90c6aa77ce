"""The specification of attention: every score in memory, plain PyTorch, differentiable to any order."""

from functools import reduce
from operator import or_

import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor, spec: AttentionSpec) -> Tensor:
    """Softmax attention [B, H, T, E] of q [B, H, T, D], k [B, G, S, D], v [B, G, S, E], G dividing H.

    Query heads ``h H/G`` to ``(h + 1) H/G - 1`` share key head h. ``sinks`` [H], if given, is a score that each query
    of the head has besides those of its keys, with nothing behind it. A query that sees no key gets zeros.
    Time and memory O(B H T S).
    """
    (B, H, T, _), S = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    everything = slice(0, B), slice(0, T), slice(0, S)
    if spec.mask is not None and spec.mask.dtype != torch.bool:
        scores = scores + spec.mask
    hidden = hidden_pairs(spec, *everything, q.device)
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    for sink in sinks:
        scores = torch.cat([scores, sink[:, None, None].expand(B, H, T, 1)], -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., :S]
    if spec.dropout:
        weights = weights * kept_pairs(spec, slice(0, B * H), *everything[1:], q.device).view(B, H, T, S)
        weights = weights / (1 - spec.dropout)
    return weights @ v


def hidden_pairs(spec: AttentionSpec, batch: slice, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
    """True where a key of ``keys`` is hidden from a query of ``rows``, broadcastable to [b, H, R, C]; None: nowhere."""
    parts = [_out_of_reach(spec, rows, keys, device)]
    if spec.segments is not None:
        query_ids, key_ids = spec.segments
        parts.append((query_ids[batch, rows, None] != key_ids[batch, None, keys])[:, None])
    if spec.key_mask is not None:
        parts.append(~spec.key_mask[batch, None, None, keys])
    if spec.mask is not None:
        part = mask_part(spec.mask, batch, rows, keys)
        parts.append(~part if part.dtype == torch.bool else part == -torch.inf)
    parts = [part for part in parts if part is not None]
    return reduce(or_, parts) if parts else None


def _out_of_reach(spec, rows, keys, device):
    left, right = spec.reach()
    if left is None and right is None:
        return None
    t = torch.arange(rows.start, rows.stop, device=device)[:, None]
    s = torch.arange(keys.start, keys.stop, device=device)
    hidden = torch.zeros((), dtype=torch.bool, device=device)
    if left is not None:
        hidden = s < t - left
    return hidden if right is None else hidden | (s > t + right)


def mask_part(mask: Tensor, batch: slice, rows: slice, keys: slice) -> Tensor:
    """The part of a mask that is broadcastable to [B, H, T, S], itself broadcastable to [b, H, R, C]."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    for dim, part in ((0, batch), (2, rows), (3, keys)):
        if mask.shape[dim] > 1:
            mask = mask.narrow(dim, part.start, part.stop - part.start)
    return mask


def kept_pairs(spec: AttentionSpec, heads: slice, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """True where dropout keeps a pair, [heads, R, C]; ``heads`` counts ``b H + h``."""
    head, t, s = (torch.arange(x.start, x.stop, device=device) for x in (heads, rows, keys))
    return _philox(spec.seed, s, t[:, None], head[:, None, None]) >= spec.keep_from


def _philox(seed: int, *counter: Tensor) -> Tensor:
    """The first word of Philox-4x32-10 at ``(*counter, 0)`` under the 64-bit key ``seed``, as int64."""
    low = 0xFFFFFFFF
    keys = [seed & low, seed >> 32]
    c0, c1, c2 = torch.broadcast_tensors(*counter)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The product of two 32-bit numbers wraps into the sign of an int64; its bits are those of the unsigned one.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & low) ^ c1 ^ keys[0], b & low
        c2, c3 = ((a >> 32) & low) ^ c3 ^ keys[1], a & low
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return c0
