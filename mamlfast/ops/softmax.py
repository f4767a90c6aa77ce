"""Softmax and log-softmax to second order.

Along one dimension, ``<u, v>`` the sum of products over it, kept::

    softmax       y_dot = y (x_dot - <y, x_dot>)
                  x_bar = y (y_bar - c),           c = <y, y_bar>
                  x_bar_dot = y_dot (y_bar - c) + y (y_bar_dot - c_dot),   c_dot = <y_dot, y_bar> + <y, y_bar_dot>

    log_softmax   p = exp(y), m = <p, x_dot>       y_dot = x_dot - m
                  x_bar = y_bar - p s,             s = sum(y_bar)
                  x_bar_dot = y_bar_dot - p (y_dot s + s_dot)              since p_dot = p y_dot

Neither exponentiates a tangent. Both backwards reuse the outputs and never look at x.

The kernels serve the last dimension. The C++ ones add up long rows in float64 and give the same bits on any number of
threads, and the same first-order bits with and without tangents. No GPU has run the Triton kernels yet; Triton's
interpreter and its compiler have.
"""

from typing import Any

import torch
from torch import Tensor

from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule

# The Triton kernels hold a row in registers, of which there are not enough for more.
MAX_TRITON_D = 8192


def softmax_reference(x: Tensor, *, dim: int = -1) -> Tensor:
    """``exp(x) / sum(exp(x))`` along ``dim``; any shape and floating dtype."""
    return torch.softmax(x, dim)


def log_softmax_reference(x: Tensor, *, dim: int = -1) -> Tensor:
    """``x - logsumexp(x)`` along ``dim``; any shape and floating dtype."""
    return torch.log_softmax(x, dim)


def _total(dim, *factors):
    product = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    return product.sum(dim, keepdim=True)


def _eager_softmax_fwd(x, x_dot, *, dim):
    y = torch.softmax(x, dim)
    return y, None if x_dot is None else y * (x_dot - _total(dim, y, x_dot))


def _eager_softmax_bwd(y, y_dot, y_bar, y_bar_dot, wanted, *, dim):
    centred = y_bar - _total(dim, y, y_bar)
    if y_dot is None:
        return y * centred, None
    c_dot = _total(dim, y_dot, y_bar) + _total(dim, y, y_bar_dot)
    return y * centred, torch.addcmul(y_dot * centred, y, y_bar_dot - c_dot)


def _eager_log_softmax_fwd(x, x_dot, *, dim):
    y = torch.log_softmax(x, dim)
    return y, None if x_dot is None else x_dot - _total(dim, y.exp(), x_dot)


def _eager_log_softmax_bwd(y, y_dot, y_bar, y_bar_dot, wanted, *, dim):
    p, s = y.exp(), _total(dim, y_bar)
    x_bar = torch.addcmul(y_bar, p, s, value=-1)
    if y_dot is None:
        return x_bar, None
    return x_bar, torch.addcmul(y_bar_dot, p, y_dot * s + _total(dim, y_bar_dot), value=-1)


def _native(name):
    def fwd(x, x_dot, *, dim):
        x, x_dot = _contiguous(x, x_dot)
        y, y_dot = torch.empty_like(x), None if x_dot is None else torch.empty_like(x)
        getattr(torch.ops.mamlfast, f"{name}_fwd")(x, x_dot, y, y_dot)
        return y, y_dot

    def bwd(y, y_dot, y_bar, y_bar_dot, wanted, *, dim):
        y, y_dot, y_bar, y_bar_dot = _contiguous(y, y_dot, y_bar, y_bar_dot)
        x_bar, x_bar_dot = (torch.empty_like(y) if need else None for need in wanted)
        getattr(torch.ops.mamlfast, f"{name}_bwd")(y, y_dot, y_bar, y_bar_dot, x_bar, x_bar_dot)
        return x_bar, x_bar_dot

    return fwd, bwd


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _triton(log):
    def fwd(x, x_dot, *, dim):
        from mamlfast_kernels.softmax import softmax_fwd

        return softmax_fwd(x, x_dot, log=log)

    def bwd(y, y_dot, y_bar, y_bar_dot, wanted, *, dim):
        from mamlfast_kernels.softmax import softmax_bwd

        return softmax_bwd(y, y_dot, y_bar, y_bar_dot, log=log)

    return fwd, bwd


_ROOMS: dict[str, dict[str, Any]] = {
    "softmax": {
        "eager": (_eager_softmax_fwd, _eager_softmax_bwd),
        "native": _native("softmax"),
        "triton": _triton(log=False),
    },
    "log_softmax": {
        "eager": (_eager_log_softmax_fwd, _eager_log_softmax_bwd),
        "native": _native("log_softmax"),
        "triton": _triton(log=True),
    },
}


def _room(name, dim, *tensors):
    """Return the room's forward and backward: kernels take the last dimension, one dtype, at least one element."""
    x = tensors[0]
    rooms = {"eager"}
    if x.numel() > 0 and dim in (-1, x.ndim - 1) and all(t.dtype == x.dtype for t in tensors):
        rooms |= {"native", "triton"} if x.ndim == 0 or x.shape[-1] <= MAX_TRITON_D else {"native"}
    return _ROOMS[name][backend_for(*tensors, rooms=rooms)]


def _rule(name, reference):
    def fwd(xs, *, dim=-1):
        forward, _ = _room(name, dim, *xs)
        y, _ = forward(*xs, None, dim=dim)
        return y, (y,)

    def bwd(xs, saved, y_bar, need, *, dim=-1):
        _, backward = _room(name, dim, *xs, y_bar)
        return backward(*saved, None, y_bar, None, (True, False), dim=dim)[:1]

    def fwd_jvp(xs, xs_dot, *, dim=-1):
        forward, _ = _room(name, dim, *xs, *xs_dot)
        y, y_dot = forward(*xs, *xs_dot, dim=dim)
        return y, y_dot, (y, y_dot)

    def bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, dim=-1):
        _, backward = _room(name, dim, *xs, *xs_dot, y_bar, y_bar_dot)
        x_bar, x_bar_dot = backward(*saved, y_bar, y_bar_dot, (need[0], need_dot[0]), dim=dim)
        return (x_bar,), (x_bar_dot,)

    return Rule(name=name, reference=reference, fwd=fwd, bwd=bwd, fwd_jvp=fwd_jvp, bwd_jvp=bwd_jvp)


softmax = _rule("softmax", softmax_reference)
log_softmax = _rule("log_softmax", log_softmax_reference)
