"""Layer normalisation (Ba, Kiros & Hinton, 2016, arXiv:1607.06450) to second order.

For each row ``x`` of length D, with ``<u> = mean(u)``::

    c = x - <x>          r = (<c c> + eps)^(-1/2)         n = c r             y = w n + b

    a = <n x_dot>        n_dot = r (x_dot - <x_dot> - n a)                    y_dot = w_dot n + w n_dot + b_dot

    g = w y_bar          p = <g>, q = <g n>               x_bar = r (g - p - n q)
    g_dot = w_dot y_bar + w y_bar_dot                     p_dot = <g_dot>, q_dot = <g_dot n + g n_dot>
    x_bar_dot = r (g_dot - p_dot - n_dot q - n q_dot) - r a x_bar
    w_bar = sum_rows y_bar n       w_bar_dot = sum_rows y_bar_dot n + y_bar n_dot
    b_bar = sum_rows y_bar         b_bar_dot = sum_rows y_bar_dot

Arithmetic is float32, or float64 for float64 inputs; outputs have the dtypes of their inputs.
``torch.nn.functional.layer_norm`` itself is wrong under reverse over forward (pytorch#196700).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlfast.ops.rule import Rule


def layer_norm_reference(x: Tensor, w: Tensor, b: Tensor, *, eps: float = 1e-5) -> Tensor:
    """``w (x - mean) / sqrt(var + eps) + b`` over the last dimension: x [..., D], w and b [D]."""
    return F.layer_norm(x, w.shape, w, b, eps)


def _wide(*tensors):
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(t.to(dtype) for t in tensors)


def _mean(x):
    return x.mean(-1, keepdim=True)


def _normalized(x, eps):
    """Return n and r, both in the wide dtype."""
    c = x - _mean(x)
    r = torch.rsqrt(_mean(c * c) + eps)
    return c * r, r


def _column_sum(x):
    return x.reshape(-1, x.shape[-1]).sum(0)


def _fwd(xs, *, eps=1e-5):
    return F.layer_norm(xs[0], xs[1].shape, xs[1], xs[2], eps), ()


def _bwd(xs, saved, y_bar, need, *, eps=1e-5):
    x, w, y_bar = _wide(xs[0], xs[1], y_bar)
    n, r = _normalized(x, eps)
    g = w * y_bar
    x_bar = r * (g - _mean(g) - n * _mean(g * n))
    return _as_inputs(xs, (x_bar, _column_sum(y_bar * n), _column_sum(y_bar)))


def _fwd_jvp(xs, xs_dot, *, eps=1e-5):
    x, w, x_dot, w_dot, b_dot = _wide(xs[0], xs[1], *xs_dot)
    n, r = _normalized(x, eps)
    n_dot = r * (x_dot - _mean(x_dot) - n * _mean(n * x_dot))
    y_dot = torch.addcmul(b_dot, w_dot, n).addcmul_(w, n_dot)
    return _fwd(xs, eps=eps)[0], y_dot.to(xs[0].dtype), ()


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, eps=1e-5):
    x, w, x_dot, w_dot, y_bar, y_bar_dot = _wide(xs[0], xs[1], xs_dot[0], xs_dot[1], y_bar, y_bar_dot)
    n, r = _normalized(x, eps)
    a = _mean(n * x_dot)
    n_dot = r * (x_dot - _mean(x_dot) - n * a)
    g, g_dot = w * y_bar, w_dot * y_bar + w * y_bar_dot
    q, q_dot = _mean(g * n), _mean(g_dot * n + g * n_dot)
    x_bar = r * (g - _mean(g) - n * q)
    x_bar_dot = r * (g_dot - _mean(g_dot) - n_dot * q - n * q_dot - a * x_bar)
    xs_bar = x_bar, _column_sum(y_bar * n), _column_sum(y_bar)
    xs_bar_dot = x_bar_dot, _column_sum(y_bar_dot * n + y_bar * n_dot), _column_sum(y_bar_dot)
    return _as_inputs(xs, xs_bar), _as_inputs(xs, xs_bar_dot)


def _as_inputs(xs, values):
    return tuple(value.to(x.dtype) for x, value in zip(xs, values, strict=True))


layer_norm = Rule(
    name="layer_norm", reference=layer_norm_reference, fwd=_fwd, bwd=_bwd, fwd_jvp=_fwd_jvp, bwd_jvp=_bwd_jvp
)
