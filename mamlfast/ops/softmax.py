"""Softmax and log-softmax to second order.

Along one dimension, ``<u, v>`` the sum of products over it, kept::

    softmax       y_dot = y (x_dot - <y, x_dot>)
                  x_bar = y (y_bar - c),           c = <y, y_bar>
                  x_bar_dot = y_dot (y_bar - c) + y (y_bar_dot - c_dot),   c_dot = <y_dot, y_bar> + <y, y_bar_dot>

    log_softmax   p = exp(y), m = <p, x_dot>       y_dot = x_dot - m
                  x_bar = y_bar - p s,             s = sum(y_bar)
                  x_bar_dot = y_bar_dot - p (y_dot s + s_dot)              since p_dot = p y_dot

Neither exponentiates a tangent. Both backwards reuse the outputs and never look at x.
"""

import torch
from torch import Tensor

from mamlfast.ops.rule import Rule


def softmax_reference(x: Tensor, *, dim: int = -1) -> Tensor:
    """``exp(x) / sum(exp(x))`` along ``dim``; any shape and floating dtype."""
    return torch.softmax(x, dim)


def _total(dim, *factors):
    product = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    return product.sum(dim, keepdim=True)


def _softmax_fwd(xs, *, dim=-1):
    y = torch.softmax(xs[0], dim)
    return y, (y,)


def _softmax_bwd(xs, saved, y_bar, need, *, dim=-1):
    (y,) = saved
    return (y * (y_bar - _total(dim, y, y_bar)),)


def _softmax_fwd_jvp(xs, xs_dot, *, dim=-1):
    y = torch.softmax(xs[0], dim)
    y_dot = y * (xs_dot[0] - _total(dim, y, xs_dot[0]))
    return y, y_dot, (y, y_dot)


def _softmax_bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, dim=-1):
    y, y_dot = saved
    centred = y_bar - _total(dim, y, y_bar)
    c_dot = _total(dim, y_dot, y_bar) + _total(dim, y, y_bar_dot)
    return (y * centred,), (torch.addcmul(y_dot * centred, y, y_bar_dot - c_dot),)


softmax = Rule(
    name="softmax",
    reference=softmax_reference,
    fwd=_softmax_fwd,
    bwd=_softmax_bwd,
    fwd_jvp=_softmax_fwd_jvp,
    bwd_jvp=_softmax_bwd_jvp,
)


def log_softmax_reference(x: Tensor, *, dim: int = -1) -> Tensor:
    """``x - logsumexp(x)`` along ``dim``; any shape and floating dtype."""
    return torch.log_softmax(x, dim)


def _log_softmax_fwd(xs, *, dim=-1):
    y = torch.log_softmax(xs[0], dim)
    return y, (y,)


def _log_softmax_bwd(xs, saved, y_bar, need, *, dim=-1):
    (y,) = saved
    return (torch.addcmul(y_bar, y.exp(), _total(dim, y_bar), value=-1),)


def _log_softmax_fwd_jvp(xs, xs_dot, *, dim=-1):
    y = torch.log_softmax(xs[0], dim)
    y_dot = xs_dot[0] - _total(dim, y.exp(), xs_dot[0])
    return y, y_dot, (y, y_dot)


def _log_softmax_bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, dim=-1):
    y, y_dot = saved
    p, s, s_dot = y.exp(), _total(dim, y_bar), _total(dim, y_bar_dot)
    x_bar = torch.addcmul(y_bar, p, s, value=-1)
    return (x_bar,), (torch.addcmul(y_bar_dot, p, y_dot * s + s_dot, value=-1),)


log_softmax = Rule(
    name="log_softmax",
    reference=log_softmax_reference,
    fwd=_log_softmax_fwd,
    bwd=_log_softmax_bwd,
    fwd_jvp=_log_softmax_fwd_jvp,
    bwd_jvp=_log_softmax_bwd_jvp,
)
