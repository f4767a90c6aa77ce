"""Softmax cross-entropy over rows of logits, to second order, a chunk of rows at a time.

For logits z [R, V] with labels e (one-hot), smoothing s, ``q = (1 - s) e + s / V``, ``p = softmax(z)`` and row
weights om (1/N for the N labelled rows of a mean, 1 for a sum, 0 where the label is ``ignore_index``)::

    nll = logsumexp(z) - <q, z>            loss = sum om nll
    mu  = <p, z_dot>                       loss_dot = sum om (mu - <q, z_dot>)
    z_bar     = g om (p - q)               z_bar_dot = g_dot om (p - q) + g om p (z_dot - mu)

with g, g_dot the cotangent of the loss and its tangent. Besides z and its like in shape (z_dot, z_bar, z_bar_dot)
only one chunk of rows is ever alive. Arithmetic is in the dtype of z.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlfast.ops.rule import Rule

# Elements of a chunk: its temporaries stay in a last-level cache and launch overheads stay small.
CHUNK = 1 << 20


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
        losses = torch.where(self.weights == 0, 0, losses * self.weights)  # an ignored row may hold infinities
        return losses.sum() if self.scalar else losses

    def without_ignored(self, z_bar):
        """Zero the ignored rows outright: zero times an infinite logit would be NaN."""
        return z_bar.masked_fill_((self.weights == 0)[:, None], 0)


def _labels(z, *, target, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    valid = (target != ignore_index).to(z.dtype)
    return _Labels(
        weights=valid / valid.sum() if reduction == "mean" else valid,
        index=target.masked_fill(target == ignore_index, 0),
        smoothing=label_smoothing,
        scalar=reduction != "none",
    )


def _chunks(z) -> Iterator[slice]:
    rows = max(1, CHUNK // z.shape[-1])
    return (slice(start, start + rows) for start in range(0, z.shape[0], rows))


def _fwd(xs, **options):
    (z,), labels = xs, _labels(xs[0], **options)
    lse, nll = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    for rows in _chunks(z):
        torch.logsumexp(z[rows], -1, out=lse[rows])
        torch.sub(lse[rows], labels.expected(z[rows], rows), out=nll[rows])
    return labels.reduced(nll), (lse,)


def _fwd_jvp(xs, xs_dot, **options):
    (z,), (z_dot,), labels = xs, xs_dot, _labels(xs[0], **options)
    y, (lse,) = _fwd(xs, **options)
    mu, nll_dot = torch.empty_like(lse), torch.empty_like(lse)
    for rows in _chunks(z):
        p = (z[rows] - lse[rows, None]).exp_()
        mu[rows] = p.mul_(z_dot[rows]).sum(-1)
        torch.sub(mu[rows], labels.expected(z_dot[rows], rows), out=nll_dot[rows])
    return y, labels.reduced(nll_dot), (lse, mu)


def _bwd(xs, saved, y_bar, need, **options):
    (z,), (lse,), labels = xs, saved, _labels(xs[0], **options)
    g, z_bar = labels.weights * y_bar, torch.empty_like(z)
    for rows in _chunks(z):
        p = torch.sub(z[rows], lse[rows, None], out=z_bar[rows]).exp_()
        labels.subtract_targets(p, rows).mul_(g[rows, None])
    return (labels.without_ignored(z_bar),)


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options):
    (z,), (z_dot,), (lse, mu), labels = xs, xs_dot, saved, _labels(xs[0], **options)
    g, g_dot = labels.weights * y_bar, labels.weights * y_bar_dot
    z_bar, z_bar_dot = torch.empty_like(z), torch.empty_like(z)
    for rows in _chunks(z):
        p = torch.sub(z[rows], lse[rows, None], out=z_bar[rows]).exp_()
        torch.sub(z_dot[rows], mu[rows, None], out=z_bar_dot[rows]).mul_(p).mul_(g[rows, None])
        labels.subtract_targets(p, rows)
        z_bar_dot[rows].addcmul_(p, g_dot[rows, None])
        p.mul_(g[rows, None])
    return (labels.without_ignored(z_bar),), (labels.without_ignored(z_bar_dot),)


cross_entropy = Rule(
    name="cross_entropy",
    reference=cross_entropy_reference,
    fwd=_fwd,
    bwd=_bwd,
    fwd_jvp=_fwd_jvp,
    bwd_jvp=_bwd_jvp,
)
