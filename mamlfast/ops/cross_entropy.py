"""Softmax cross-entropy over rows of logits, to second order, a chunk of rows at a time.

For logits z [R, V] with labels e (one-hot), smoothing s, ``q = (1 - s) e + s / V``, ``p = softmax(z)`` and row
weights om (1/N for the N labelled rows of a mean, 1 for a sum, 0 where the label is ``ignore_index``)::

    nll = logsumexp(z) - <q, z>            loss = sum om nll
    mu  = <p, z_dot>                       loss_dot = sum om (mu - <q, z_dot>)
    z_bar     = g om (p - q)               z_bar_dot = g_dot om (p - q) + g om p (z_dot - mu)

with g, g_dot the cotangent of the loss and its tangent. An ignored row contributes nothing and receives zeros, even
if all rows are ignored; the mean of no rows is NaN. Besides z and its like in shape (z_dot, z_bar, z_bar_dot) nothing
as wide as the vocabulary is alive: the eager formulas take a chunk of rows at a time, the kernels none.

The eager formulas compute in the dtype of z. The C++ kernels keep row statistics and sum the loss in float64, in the
order of the rows: the same bits on any number of threads, and the same first-order bits with and without tangents.
The Triton kernels compute in float32, or float64 for float64 logits; Triton's interpreter and its compiler have run
them, no GPU has yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule

# Elements of a chunk: its temporaries stay in a last-level cache and launch overheads stay small.
CHUNK = 1 << 20
REDUCTIONS = ("mean", "sum", "none")
_DEFAULTS = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


def cross_entropy_reference(
    z: Tensor,
    *,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of z [R, V] against target [R] int64; a scalar, or [R] with ``reduction="none"``."""
    return F.cross_entropy(z, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """What the options come to: row weights [R], labels [R] that may be gathered, smoothing, and the reduction."""

    weights: Tensor
    ignored: Tensor
    index: Tensor
    smoothing: float
    scalar: bool

    def expected(self, z, rows=slice(None)):
        """``<q, z>``, one number a row."""
        picked = z.gather(-1, self.index[rows, None])[:, 0]
        return picked if self.smoothing == 0 else (1 - self.smoothing) * picked + self.smoothing * z.mean(-1)

    def subtract_targets(self, p, rows):
        """``p - q`` for a chunk, in place."""
        p.scatter_add_(-1, self.index[rows, None], p.new_full((p.shape[0], 1), self.smoothing - 1))
        return p if self.smoothing == 0 else p.sub_(self.smoothing / p.shape[-1])

    def reduced(self, losses):
        losses = losses.masked_fill(self.ignored, 0) * self.weights  # an ignored row may hold infinities
        return losses.sum() if self.scalar else losses

    def without_ignored(self, z_bar):
        """Zero the ignored rows outright: zero times an infinite logit would be NaN."""
        return z_bar.masked_fill_(self.ignored[:, None], 0)


def _labels(dtype, *, target, ignore_index, reduction, label_smoothing):
    ignored = target == ignore_index
    valid = (~ignored).to(dtype)
    return _Labels(
        weights=valid / valid.sum() if reduction == "mean" else valid,
        ignored=ignored,
        index=target.masked_fill(ignored, 0),
        smoothing=label_smoothing,
        scalar=reduction != "none",
    )


def _chunks(z) -> Iterator[slice]:
    rows = max(1, CHUNK // z.shape[-1])
    return (slice(start, start + rows) for start in range(0, z.shape[0], rows))


def _eager_fwd(z, z_dot, **options):
    labels = _labels(z.dtype, **options)
    lse, nll = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    for rows in _chunks(z):
        torch.logsumexp(z[rows], -1, out=lse[rows])
        torch.sub(lse[rows], labels.expected(z[rows], rows), out=nll[rows])
    y = labels.reduced(nll)
    if z_dot is None:
        return y, None, (lse,)
    mu, nll_dot = torch.empty_like(lse), torch.empty_like(lse)
    for rows in _chunks(z):
        p = (z[rows] - lse[rows, None]).exp_()
        mu[rows] = p.mul_(z_dot[rows]).sum(-1)
        torch.sub(mu[rows], labels.expected(z_dot[rows], rows), out=nll_dot[rows])
    return y, labels.reduced(nll_dot), (lse, mu)


def _eager_bwd(z, z_dot, saved, y_bar, y_bar_dot, wanted, **options):
    labels = _labels(z.dtype, **options)
    lse, g, z_bar = saved[0], labels.weights * y_bar, torch.empty_like(z)
    if z_dot is not None:
        mu, g_dot, z_bar_dot = saved[1], labels.weights * y_bar_dot, torch.empty_like(z)
    for rows in _chunks(z):
        p = torch.sub(z[rows], lse[rows, None], out=z_bar[rows]).exp_()
        if z_dot is not None:
            torch.sub(z_dot[rows], mu[rows, None], out=z_bar_dot[rows]).mul_(p).mul_(g[rows, None])
        labels.subtract_targets(p, rows)
        if z_dot is not None:
            z_bar_dot[rows].addcmul_(p, g_dot[rows, None])
        p.mul_(g[rows, None])
    return labels.without_ignored(z_bar), None if z_dot is None else labels.without_ignored(z_bar_dot)


def _native_fwd(z, z_dot, *, target, ignore_index, reduction, label_smoothing):
    z, z_dot, target = _contiguous(z, z_dot, target)
    y = z.new_empty(z.shape[:1] if reduction == "none" else ())
    lse = z.new_empty(z.shape[0], dtype=torch.float64)
    y_dot, mu = (None, None) if z_dot is None else (torch.empty_like(y), torch.empty_like(lse))
    constants = reduction == "mean", ignore_index, label_smoothing
    torch.ops.mamlfast.cross_entropy_fwd(z, z_dot, target, y, y_dot, lse, mu, *constants)
    return y, y_dot, (lse,) if z_dot is None else (lse, mu)


def _native_bwd(z, z_dot, saved, y_bar, y_bar_dot, wanted, *, target, ignore_index, reduction, label_smoothing):
    z, z_dot, target, y_bar, y_bar_dot = _contiguous(z, z_dot, target, y_bar, y_bar_dot)
    lse, mu, *_ = (*(s.double() for s in saved), None)
    z_bar, z_bar_dot = (torch.empty_like(z) if need else None for need in wanted)
    torch.ops.mamlfast.cross_entropy_bwd(
        z, z_dot, target, y_bar, y_bar_dot, lse, mu, z_bar, z_bar_dot,
        reduction == "mean", ignore_index, label_smoothing,
    )  # fmt: skip
    return z_bar, z_bar_dot


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _triton_fwd(z, z_dot, **options):
    from mamlfast_kernels.cross_entropy import cross_entropy_fwd

    nll, nll_dot, lse, mu = cross_entropy_fwd(z, z_dot, *_rows(options))
    labels = _labels(nll.dtype, **options)
    y = labels.reduced(nll).to(z.dtype)
    if z_dot is None:
        return y, None, (lse,)
    return y, labels.reduced(nll_dot).to(z.dtype), (lse, mu)


def _triton_bwd(z, z_dot, saved, y_bar, y_bar_dot, wanted, **options):
    from mamlfast_kernels.cross_entropy import cross_entropy_bwd

    weights = _labels(saved[0].dtype, **options).weights
    lse, mu, *_ = (*saved, None)
    g_dot = None if z_dot is None else weights * y_bar_dot
    return cross_entropy_bwd(z, z_dot, *_rows(options), lse, mu, weights * y_bar, g_dot)


def _rows(options):
    return options["target"], options["ignore_index"], options["label_smoothing"]


_ROOMS: dict[str, Any] = {
    "eager": (_eager_fwd, _eager_bwd),
    "native": (_native_fwd, _native_bwd),
    "triton": (_triton_fwd, _triton_bwd),
}


def _room(*tensors):
    """Return the room's forward and backward: kernels take one dtype and at least one element."""
    z = tensors[0]
    served = z.numel() > 0 and all(t.dtype == z.dtype for t in tensors)
    return _ROOMS[backend_for(*tensors, rooms=_ROOMS if served else ("eager",))]


def _checked(z, options):
    """Return the options complete, or say what is wrong with them."""
    options = _DEFAULTS | options
    target = options["target"]
    if z.ndim != 2 or target.shape != z.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"cross_entropy expects z [R, V] and target [R] int64; got z {list(z.shape)} and target "
            f"{list(target.shape)} {target.dtype}: flatten the logits to rows and give each its label"
        )
    if options["reduction"] not in REDUCTIONS:
        raise ValueError(f"cross_entropy expects a reduction of {REDUCTIONS}, got {options['reduction']!r}")
    return options


def _fwd(xs, **options):
    (z,) = xs
    fwd, _ = _room(z)
    y, _, saved = fwd(z, None, **_checked(z, options))
    return y, saved


def _fwd_jvp(xs, xs_dot, **options):
    (z,), (z_dot,) = xs, xs_dot
    fwd, _ = _room(z, z_dot)
    return fwd(z, z_dot, **_checked(z, options))


def _bwd(xs, saved, y_bar, need, **options):
    (z,) = xs
    _, bwd = _room(z, y_bar)
    return bwd(z, None, saved, y_bar, None, (True, False), **_DEFAULTS | options)[:1]


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options):
    (z,), (z_dot,), wanted = xs, xs_dot, (need[0], need_dot[0])
    _, bwd = _room(z, z_dot, y_bar, y_bar_dot)
    z_bar, z_bar_dot = bwd(z, z_dot, saved, y_bar, y_bar_dot, wanted, **_DEFAULTS | options)
    return (z_bar,), (z_bar_dot,)


cross_entropy = Rule(
    name="cross_entropy",
    reference=cross_entropy_reference,
    fwd=_fwd,
    bwd=_bwd,
    fwd_jvp=_fwd_jvp,
    bwd_jvp=_bwd_jvp,
)
