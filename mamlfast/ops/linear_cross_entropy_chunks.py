"""The sweep of ``linear_cross_entropy`` over its rows, a chunk of logits at a time; the mathematics stands there.

A sweep makes the logits of a chunk (and their tangents), asks a room for the arithmetic of its rows, and adds what the
cotangents of the logits contribute to those of x, w and b, all before it turns to the next chunk, whose logits take
the same memory. The matrix products are torch's; the rows are eager PyTorch, C++ or Triton.

Half operands are multiplied as they are, as in ``torch.nn.functional.linear``; what follows the logits, and the sums
over chunks, are float32. The C++ rows keep statistics in float64: the same bits on any number of threads, and the same
first-order bits with and without tangents. No GPU has run the Triton kernels yet; its interpreter and compiler have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamlfast.ops.backend import backend_for

# Logits in a chunk, and the rows that it has at least: each chunk reads w and writes w_bar once, and below a few
# hundred rows that traffic shows beside the matrix products. One core, float32, d = 512, V = 50257: a dual pass takes
# 11.2, 9.0, 8.3, 8.2 times a product of all rows with 64, 128, 256, 512 rows in a chunk (limit: 8).
CHUNK, MIN_ROWS = 1 << 20, 256

Wanted = tuple[Sequence[bool], Sequence[bool]]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The options that reach a row: smoothing, the weight of lse^2, and the soft-cap (0.0 where there is none)."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Numbers of the rows, each a tensor [R]: what a backward needs (lse, mu) and, out of a forward, the losses.

    None stands for what was not asked for: ``mu`` and ``loss_dot`` without tangents, the losses in a backward.
    """

    lse: Tensor
    mu: Any = None
    loss: Any = None
    loss_dot: Any = None


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of losses and sums: float32, or float64 for float64 ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def sweep(
    xs: Sequence[Tensor],
    xs_dot: Sequence[Tensor | None] | None,
    target: Tensor,
    constants: Constants,
    *,
    known: Statistics | None = None,
    g: Tensor | None = None,
    g_dot: Tensor | None = None,
    wanted: Wanted = ((), ()),
) -> tuple[Statistics, list[Any], list[Any]]:
    """Visit all rows once; return their statistics and the wanted cotangents of ``xs``, in the wide dtype.

    ``xs`` is x [R, d], w [V, d] and perhaps b [V]; ``xs_dot`` their tangents, each perhaps None, or None altogether.
    Statistics that are ``known`` are not computed again. ``g`` and ``g_dot`` [R] are the cotangents of the losses and
    their tangents; without ``g`` there are no cotangents. ``wanted`` says which, as ``need`` and ``need_dot`` of a
    Rule; the others are None.
    """
    (R, V), room = (xs[0].shape[0], xs[1].shape[0]), _room(xs)
    size = max(1, min(R, max(MIN_ROWS, CHUNK // max(V, 1))))
    scratch = [xs[0].new_empty(size, V, dtype=room.logits(xs[0])) for _ in range(1 if xs_dot is None else 2)]
    bars, bars_dot = ([_like(x, need) for x, need in zip(xs, needs, strict=False)] for needs in wanted)
    parts = []
    for start in range(0, max(R, 1), size):  # one empty chunk where there are no rows
        rows = slice(start, min(start + size, R))
        z, z_dot = _logits(xs, xs_dot, rows, *(s[: rows.stop - start] for s in scratch))
        chunk = target[rows], _at(known, rows), _at(g, rows), _at(g_dot, rows)
        part, z_bar, z_bar_dot = room.rows(z, z_dot, *chunk, constants)
        parts.append(part)
        if g is not None:
            _pull_back(xs, xs_dot, rows, z_bar, z_bar_dot, bars, bars_dot)
    return known or _joined(parts), bars, bars_dot


def _like(x, need):
    return x.new_empty(x.shape, dtype=wide_dtype(x)) if need else None


def _at(values: Any, rows: slice) -> Any:
    if isinstance(values, Statistics):
        return Statistics(lse=values.lse[rows], mu=_at(values.mu, rows))
    return None if values is None else values[rows]


def _joined(parts):
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return Statistics(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _logits(xs, xs_dot, rows, z, z_dot=None):
    """Fill ``z`` with the logits of some rows and ``z_dot`` with their tangents."""
    x, w, *b = xs
    _sum_of_products(z, (x[rows], w.mT))
    if b:
        z.add_(b[0])
    if z_dot is None:
        return z, None
    x_dot, w_dot, *b_dot = xs_dot
    _sum_of_products(z_dot, (_at(x_dot, rows), w.mT), (x[rows], None if w_dot is None else w_dot.mT))
    if b and b_dot[0] is not None:
        z_dot.add_(b_dot[0])
    return z, z_dot


def _pull_back(xs, xs_dot, rows, z_bar, z_bar_dot, bars, bars_dot):
    """Write the rows of x's cotangents, and add to those of w and b what these rows contribute."""
    x, w, *_ = xs
    narrow = z_bar.to(w.dtype)
    _add(bars, rows, ((narrow, w),), ((narrow.mT, x[rows]),), z_bar)
    if z_bar_dot is not None:
        x_dot, w_dot, *_ = xs_dot
        narrow_dot = z_bar_dot.to(w.dtype)
        of_w = (narrow_dot.mT, x[rows]), (narrow.mT, _at(x_dot, rows))
        _add(bars_dot, rows, ((narrow_dot, w), (narrow, w_dot)), of_w, z_bar_dot)


def _add(bars, rows, of_x, of_w, of_b):
    x_bar, w_bar, b_bar, *_ = (*bars, None, None, None)
    if x_bar is not None:
        _sum_of_products(x_bar[rows], *of_x)
    if w_bar is not None:
        _sum_of_products(w_bar, *of_w, add=rows.start > 0)
    if b_bar is not None:
        b_bar.copy_(of_b.sum(0)) if rows.start == 0 else b_bar.add_(of_b.sum(0))


def _sum_of_products(out, *pairs, add=False):
    """Write into ``out``, or add to it, the products of the pairs that are complete."""
    for a, b in pairs:
        if a is None or b is None:
            continue
        if a.dtype != out.dtype:  # a narrow product is added up in the wide dtype
            out.add_(a @ b) if add else out.copy_(a @ b)
        else:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        add = True
    if not add:
        out.zero_()


def _eager_rows(z, z_dot, target, known, g, g_dot, constants):
    """Statistics and cotangents of a chunk; what it is given of logits is its own to overwrite."""
    if constants.softcap:
        z, z_dot = _capped(z, z_dot, constants.softcap)
    if known is None:
        known = _eager_statistics(z, z_dot, target, constants)
    return known, *((None, None) if g is None else _eager_cotangents(z, z_dot, target, known, g, g_dot, constants))


def _capped(z, z_dot, cap):
    t = z.div_(cap).tanh_()
    if z_dot is not None:
        z_dot.mul_(1 - t * t)
    return t.mul_(cap), z_dot


def _eager_statistics(z, z_dot, target, constants):
    lse = torch.logsumexp(z, -1)
    loss = lse - _expected(z, target, constants) + constants.z_loss * lse**2
    if z_dot is None:
        return Statistics(lse=lse, loss=loss)
    mu = (z - lse[:, None]).exp_().mul_(z_dot).sum(-1)
    loss_dot = mu - _expected(z_dot, target, constants) + 2 * constants.z_loss * lse * mu
    return Statistics(lse=lse, mu=mu, loss=loss, loss_dot=loss_dot)


def _expected(z, target, constants):
    picked, smoothing = z.gather(-1, target[:, None])[:, 0], constants.label_smoothing
    return picked if smoothing == 0 else (1 - smoothing) * picked + smoothing * z.mean(-1)


def _eager_cotangents(z, z_dot, target, known, g, g_dot, constants):
    lse, g = (t.to(z.dtype)[:, None] for t in (known.lse, g))
    p, a = (z - lse).exp_(), 1 + 2 * constants.z_loss * lse
    if z_dot is not None:
        mu, g_dot = (t.to(z.dtype)[:, None] for t in (known.mu, g_dot))
        z_bar_dot = ((z_dot - mu) * a).add_(2 * constants.z_loss * mu).mul_(p).mul_(g)
    difference = p.mul_(a).sub_(constants.label_smoothing / z.shape[-1])
    difference.scatter_add_(-1, target[:, None], p.new_full((len(p), 1), constants.label_smoothing - 1))
    if z_dot is not None:
        z_bar_dot.addcmul_(difference, g_dot)
    z_bar = difference.mul_(g)
    if constants.softcap == 0:
        return z_bar, None if z_dot is None else z_bar_dot
    u = 1 - (z / constants.softcap).square_()
    if z_dot is not None:
        z_bar_dot.mul_(u).addcmul_(z.mul_(z_dot), z_bar, value=-2 / constants.softcap**2)
    return z_bar.mul_(u), None if z_dot is None else z_bar_dot


def _native_rows(z, z_dot, target, known, g, g_dot, constants):
    target, g, g_dot = target.contiguous(), _float64(g), _float64(g_dot)
    stats, loss, loss_dot = known, None, None
    if known is None:
        lse, loss = (z.new_empty(len(z), dtype=torch.float64) for _ in range(2))
        mu, loss_dot = (None, None) if z_dot is None else (torch.empty_like(lse), torch.empty_like(lse))
        stats = Statistics(lse=lse, mu=mu, loss=loss, loss_dot=loss_dot)
    torch.ops.mamlfast.linear_cross_entropy_rows(
        z, z_dot, target, _float64(stats.lse), _float64(stats.mu), loss, loss_dot, g, g_dot,
        constants.label_smoothing, constants.z_loss, constants.softcap,
    )  # fmt: skip
    return stats, *((None, None) if g is None else (z, z_dot))


def _float64(t):
    return None if t is None else t.double().contiguous()


def _triton_rows(z, z_dot, target, known, g, g_dot, constants):
    from mamlfast_kernels import linear_cross_entropy as kernels

    numbers = constants.label_smoothing, constants.z_loss, constants.softcap
    if known is None:
        lse, mu, loss, loss_dot = kernels.linear_cross_entropy_fwd(z, z_dot, target, *numbers)
        known = Statistics(lse=lse, mu=mu, loss=loss, loss_dot=loss_dot)
    if g is None:
        return known, None, None
    cotangents = kernels.linear_cross_entropy_bwd(z, z_dot, target, known.lse, known.mu, g, g_dot, *numbers)
    return known, *cotangents


@dataclass(frozen=True)
class _Room:
    """The arithmetic of rows, and the dtype that it wants of the logits."""

    rows: Callable
    logits: Callable[[Tensor], torch.dtype]


_ROOMS = {
    "eager": _Room(_eager_rows, wide_dtype),
    "native": _Room(_native_rows, wide_dtype),
    "triton": _Room(_triton_rows, lambda x: x.dtype),
}


def _room(xs):
    """Return the room that serves these operands; where no label counts there are no rows, and no room is asked."""
    return _ROOMS[backend_for(*xs, rooms=_ROOMS) if len(xs[0]) > 0 else "eager"]
