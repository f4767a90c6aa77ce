"""Which keys a query sees: said once for a whole call, then per tile, then per pair.

Nothing here is T x S. Query t sees the keys j with t - left <= j <= t + right (a side may be unlimited), and of
those the ones with its own segment id. Causal masks, sliding windows and an offset of the queries among the keys
are a choice of (left, right); packed sequences and padding are segment ids.

A tile of rows (queries, or in the key-side backward keys) sweeps over the other side twice: over the tiles that
``left``, ``right`` or the end cut through, and over those between where every pair is visible and nothing has to be
compared. Tiles beyond are never visited. With segment ids every pair is compared, from the first partner of any row
of the tile to the last.

Which visible pairs dropout keeps is a function of their position and the seed, computed where it is needed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.attention_spec import AttentionSpec
from mamlfast_kernels.launch import interpreted


class Segments(NamedTuple):
    """Ids (int32) of both sides, and for each row the first of its partners and one past the last."""

    query_ids: Tensor  # [B, T], never negative
    key_ids: Tensor  # [B, S], negative: hidden
    key_first: Tensor  # [B, T]
    key_end: Tensor
    query_first: Tensor  # [B, S]
    query_end: Tensor


def reach(spec: AttentionSpec, T: int, S: int) -> tuple[int | None, int | None]:
    """Return (left, right) counted from t itself, None where every key is within reach."""
    left, right = spec.reach()
    return (
        None if left is None or left >= T - 1 else max(left, -S),
        None if right is None or right >= S - 1 else max(right, -T),
    )


def segments_of(spec: AttentionSpec, B: int, T: int, S: int, device: torch.device) -> Segments | None:
    """Return the segment ids that ``spec.segments`` and ``spec.key_mask`` amount to, None without either."""
    if spec.segments is None and spec.key_mask is None:
        return None
    if spec.segments is None:
        query_ids, key_ids = (torch.zeros(B, n, dtype=torch.int32, device=device) for n in (T, S))
    else:
        query_ids, key_ids = (ids.to(torch.int32) for ids in spec.segments)
    query_ids = query_ids.clamp(min=0)
    if spec.key_mask is not None:
        key_ids = key_ids.masked_fill(~spec.key_mask, -1)
    key_range, query_range = _partners(query_ids, key_ids), _partners(key_ids, query_ids)
    return Segments(*(x.contiguous() for x in (query_ids, key_ids, *key_range, *query_range)))


def _partners(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each of ``ids`` [B, N], the first and one past the last position of it in ``others`` [B, M]."""
    M = others.shape[1]
    ordered, position = others.sort(dim=1, stable=True)
    low, high = (torch.searchsorted(ordered, ids.contiguous(), right=right) for right in (False, True))
    position = torch.cat([position, position.new_full((len(ids), 1), M)], 1)
    first = position.gather(1, low).masked_fill(low == high, M)
    end = (position.gather(1, (high - 1).clamp(min=0)) + 1).masked_fill(low == high, 0)
    return first.int(), end.int()


@triton.jit
def row_range(first_ptr, end_ptr, rows, N, M):
    """The first and one past the last partner, of M, of any of the ``rows`` that are below N."""
    inside = rows < N
    return tl.min(tl.load(first_ptr + rows, inside, M)), tl.max(tl.load(end_ptr + rows, inside, 0))


@triton.jit
def sweep(
    first, ROWS: tl.constexpr, N, left, right, low, high,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What rows [first, first + ROWS) visit of [low, high) and N, in steps of BLOCK: begin, end, full, full_end.

    Tiles in [begin, end) may have visible pairs; those in [full, full_end) have no other, and lie below N. Without a
    left edge, begin = full; with segments no tile counts as full.
    """
    begin, end = low, tl.minimum(high, N)
    if HAS_LEFT:
        begin = tl.maximum(begin, first - left)
    begin = tl.maximum(begin, 0) // BLOCK * BLOCK
    if HAS_RIGHT:
        end = tl.minimum(end, first + ROWS + right)
    full, full_end = begin, N // BLOCK * BLOCK
    if HAS_LEFT:
        full = tl.maximum(begin, tl.cdiv(tl.maximum(first + ROWS - 1 - left, 0), BLOCK) * BLOCK)
    if HAS_RIGHT:
        full_end = tl.minimum(full_end, tl.maximum(first + right + 1, 0) // BLOCK * BLOCK)
    if HAS_SEGMENTS:
        full_end = full
    return begin, end, full, tl.maximum(full, full_end)


def _number(x):
    return x.handle.data.item() if isinstance(x, tl.tensor) else x


@triton.jit
def _itself(x):
    return x


# An end of a ``range``: in the interpreter that is Python's, which Triton 3.6 gives an array that NumPy 2.4 refuses.
bound = _number if interpreted() else _itself


@triton.jit
def tile_at(step, full, full_end, FULL: tl.constexpr):
    """Where the tile of a step begins: the steps outside the full tiles are counted without them."""
    if FULL:
        return step
    else:
        return tl.where(step < full, step, step + (full_end - full))


@triton.jit
def visible(
    queries, keys, S, left, right, query_ids, key_ids,  # two of a kind broadcast against the other two
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile count; keys beyond S do not, queries beyond T are left to the caller."""
    keep = keys < S
    if HAS_LEFT:
        keep = keep & (keys >= queries - left)
    if HAS_RIGHT:
        keep = keep & (keys <= queries + right)
    if HAS_SEGMENTS:
        keep = keep & (query_ids == key_ids)
    return keep


@triton.jit
def kept(seed, queries, keys, head, KEEP_FROM: tl.constexpr):
    """Which pairs of a tile dropout keeps, as ``AttentionSpec`` says it; ``head`` is ``b H + h``."""
    word, _, _, _ = tl.philox(seed, keys, queries, head.to(tl.int32), 0)
    return word >= KEEP_FROM
