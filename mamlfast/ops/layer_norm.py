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
``torch.nn.functional.layer_norm`` itself is wrong under reverse over forward (pytorch#196700). The C++ kernels give
the same bits on any number of threads, and the same first-order bits with and without tangents. No GPU has run the
Triton kernels yet; Triton's interpreter and its compiler have.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule

# The C++ kernel sums w_bar and b_bar over pieces of at least MIN_ROWS rows, at most MAX_PARTIALS of them, whatever
# the number of threads: the sums have one order.
MIN_ROWS, MAX_PARTIALS = 8, 64
# The Triton kernels hold a row in registers, of which there are not enough for more.
MAX_TRITON_D = 8192


def layer_norm_reference(x: Tensor, w: Tensor, b: Tensor, *, eps: float = 1e-5) -> Tensor:
    """``w (x - mean) / sqrt(var + eps) + b`` over the last dimension: x [..., D], w and b [D]."""
    return F.layer_norm(x, w.shape, w, b, eps)


def _layer_norm_compiled(x: Tensor, w: Tensor, b: Tensor, *, eps: float = 1e-5) -> Tensor:
    """The reference in sums and products: PyTorch gets some second derivatives of ``F.layer_norm`` silently wrong."""
    wide, w, b = _wide(x, w, b)
    return (_normalized(wide, eps)[0] * w + b).to(x.dtype)


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


def _as_inputs(xs, *values):
    return tuple(value.to(x.dtype) for x, value in zip(xs, values, strict=True))


def _eager_fwd(xs, xs_dot, *, eps):
    y = layer_norm_reference(*xs, eps=eps)
    if xs_dot is None:
        return y, None
    x, w, x_dot, w_dot, b_dot = _wide(*xs[:2], *xs_dot)
    n, r = _normalized(x, eps)
    n_dot = r * (x_dot - _mean(x_dot) - n * _mean(n * x_dot))
    return y, torch.addcmul(b_dot, w_dot, n).addcmul_(w, n_dot).to(y.dtype)


def _eager_bwd(xs, xs_dot, y_bar, y_bar_dot, wanted, *, eps):
    x, w, y_bar = _wide(*xs[:2], y_bar)
    n, r = _normalized(x, eps)
    g = w * y_bar
    q = _mean(g * n)
    x_bar = r * (g - _mean(g) - n * q)
    xs_bar = _as_inputs(xs, x_bar, _column_sum(y_bar * n), _column_sum(y_bar))
    if xs_dot is None:
        return xs_bar, None
    x_dot, w_dot, y_bar_dot = (t.to(x.dtype) for t in (*xs_dot[:2], y_bar_dot))
    a = _mean(n * x_dot)
    n_dot = r * (x_dot - _mean(x_dot) - n * a)
    g_dot = w_dot * y_bar + w * y_bar_dot
    q_dot = _mean(g_dot * n + g * n_dot)
    x_bar_dot = r * (g_dot - _mean(g_dot) - n_dot * q - n * q_dot - a * x_bar)
    w_bar_dot = _column_sum(y_bar_dot * n + y_bar * n_dot)
    return xs_bar, _as_inputs(xs, x_bar_dot, w_bar_dot, _column_sum(y_bar_dot))


def _native_fwd(xs, xs_dot, *, eps):
    x, w, b = _contiguous(*xs)
    x_dot, w_dot, b_dot = _contiguous(*(xs_dot or (None, None, None)))
    y = torch.empty_like(x)
    y_dot = torch.empty_like(x) if xs_dot else None
    torch.ops.mamlfast.layer_norm_fwd(x, w, b, x_dot, w_dot, b_dot, y, y_dot, eps)
    return y, y_dot


def _native_bwd(xs, xs_dot, y_bar, y_bar_dot, wanted, *, eps):
    x, w, y_bar, y_bar_dot = _contiguous(*xs[:2], y_bar, y_bar_dot)
    x_dot, w_dot, _ = _contiguous(*(xs_dot or (None, None, None)))
    need, need_dot = wanted
    P = max(1, min(x.numel() // w.numel() // MIN_ROWS, MAX_PARTIALS))
    xs_bar, xs_bar_dot = _allocated(x, need, P), _allocated(x, need_dot, P)
    torch.ops.mamlfast.layer_norm_bwd(x, w, y_bar, x_dot, w_dot, y_bar_dot, *xs_bar, *xs_bar_dot, P, eps)
    return _summed(*xs_bar), _summed(*xs_bar_dot)


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _allocated(x, need, P):
    """Return memory for x_bar and for the partial sums of w_bar and b_bar, each only where it is needed."""
    sums = (x.new_empty(P, x.shape[-1]) if wanted else None for wanted in need[1:])
    return torch.empty_like(x) if need[0] else None, *sums


def _summed(x_bar, *partials):
    return x_bar, *(None if p is None else p.sum(0) for p in partials)


def _triton_fwd(xs, xs_dot, *, eps):
    from mamlfast_kernels.layer_norm import layer_norm_fwd

    return layer_norm_fwd(xs, xs_dot, eps=eps)


def _triton_bwd(xs, xs_dot, y_bar, y_bar_dot, wanted, *, eps):
    from mamlfast_kernels.layer_norm import layer_norm_bwd

    return layer_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, eps=eps)


_ROOMS: dict[str, Any] = {
    "eager": (_eager_fwd, _eager_bwd),
    "native": (_native_fwd, _native_bwd),
    "triton": (_triton_fwd, _triton_bwd),
}


def _room(*tensors):
    """Return the room's forward and backward: kernels take one dtype and at least one element."""
    x = tensors[0]
    rooms = {"eager"}
    if x.numel() > 0 and all(t.dtype == x.dtype for t in tensors):
        rooms |= {"native", "triton"} if x.shape[-1] <= MAX_TRITON_D else {"native"}
    return _ROOMS[backend_for(*tensors, rooms=rooms)]


def _check(x, w, b):
    if x.ndim == 0 or not (w.shape == b.shape == x.shape[-1:]):
        raise ValueError(
            f"layer_norm expects x [..., D], w [D] and b [D]; got x {list(x.shape)}, w {list(w.shape)} and b "
            f"{list(b.shape)}: give it one weight and one bias for each element of the last dimension"
        )


def _fwd(xs, *, eps=1e-5):
    _check(*xs)
    fwd, _ = _room(*xs)
    return fwd(xs, None, eps=eps)[0], ()


def _bwd(xs, saved, y_bar, need, *, eps=1e-5):
    _, bwd = _room(*xs, y_bar)
    return bwd(xs, None, y_bar, None, (need, (False,) * 3), eps=eps)[0]


def _fwd_jvp(xs, xs_dot, *, eps=1e-5):
    _check(*xs)
    fwd, _ = _room(*xs, *xs_dot)
    return *fwd(xs, xs_dot, eps=eps), ()


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, eps=1e-5):
    _, bwd = _room(*xs, *xs_dot, y_bar, y_bar_dot)
    return bwd(xs, xs_dot, y_bar, y_bar_dot, (need, need_dot), eps=eps)


layer_norm = Rule(
    name="layer_norm",
    reference=layer_norm_reference,
    fwd=_fwd,
    bwd=_bwd,
    fwd_jvp=_fwd_jvp,
    bwd_jvp=_bwd_jvp,
    compiled=_layer_norm_compiled,
)
