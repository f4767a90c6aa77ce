"""RMSNorm (Zhang & Sennrich, 2019, arXiv:1910.07467) to second order.

For each row ``x`` of length D, with ``<u> = mean(u)`` and W = offset + w::

    s = rsqrt(<x x> + eps)         n = s x               y = W n

    s_dot = -s s <n x_dot>         n_dot = s x_dot + s_dot x
    y_dot = w_dot n + W n_dot

    g = W y_bar                    c = <g n>
    x_bar = s (g - c n)            w_bar = sum_rows y_bar n

    g_dot = w_dot y_bar + W y_bar_dot
    c_dot = <g_dot n + g n_dot>
    x_bar_dot = s_dot (g - c n) + s (g_dot - c_dot n - c n_dot)
    w_bar_dot = sum_rows y_bar_dot n + y_bar n_dot

``offset`` chooses between the two forms of Hugging Face's decoders, which round differently in half types:

* 0, Llama and most others: n is rounded to the dtype of x before w multiplies it, and y has the dtype the two
  promote to;
* 1, Gemma: the weight is stored as its distance from one, ``(1 + w) n`` is formed in float32, and y is
  rounded to the dtype of x.

Arithmetic is float32, or float64 for float64 inputs. The derivatives treat rounding as the identity and are
rounded once, to the dtype of their input. The C++ kernels give the same bits on any number of threads, and
the same first-order bits with and without tangents. No GPU has run the Triton kernels yet; Triton's
interpreter and its compiler have.
"""

from typing import Any

import torch
from torch import Tensor

from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule

# The C++ kernel sums w_bar over pieces of at least MIN_ROWS rows, at most MAX_PARTIALS of them, whatever the
# number of threads: the sums have one order.
MIN_ROWS, MAX_PARTIALS = 8, 64
# The Triton kernels hold a row in registers, of which there are not enough for more.
MAX_TRITON_D = 8192


def rms_norm_reference(x: Tensor, w: Tensor, *, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """``(offset + w) x / sqrt(mean(x x) + eps)`` over the last dimension: x [..., D], w [D]; offset 0, 1."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        return w * n.to(x.dtype)
    return (n * (offset + w.to(n.dtype))).to(x.dtype)


def _eager_fwd(xs, xs_dot, *, eps, offset):
    y = rms_norm_reference(*xs, eps=eps, offset=offset)
    if xs_dot is None:
        return y, None
    x, W, x_dot, w_dot = _wide(*xs, *xs_dot, offset=offset)
    s, n = _normalized(x, eps)
    n_dot = s * x_dot - s * s * _mean(n * x_dot) * x
    return y, torch.addcmul(w_dot * n, W, n_dot).to(y.dtype)


def _eager_bwd(xs, xs_dot, y_bar, y_bar_dot, wanted, *, eps, offset):
    x, W, y_bar = _wide(*xs, y_bar, offset=offset)
    s, n = _normalized(x, eps)
    g = W * y_bar
    c = _mean(g * n)
    centred = g - c * n
    xs_bar = _as_inputs(xs, s * centred, _column_sum(y_bar * n))
    if xs_dot is None:
        return xs_bar, None
    x_dot, w_dot, y_bar_dot = (t.to(x.dtype) for t in (*xs_dot, y_bar_dot))
    s_dot = -s * s * _mean(n * x_dot)
    n_dot = s * x_dot + s_dot * x
    g_dot = w_dot * y_bar + W * y_bar_dot
    c_dot = _mean(g_dot * n + g * n_dot)
    x_bar_dot = s_dot * centred + s * (g_dot - c_dot * n - c * n_dot)
    return xs_bar, _as_inputs(xs, x_bar_dot, _column_sum(y_bar_dot * n + y_bar * n_dot))


def _wide(x, w, *rest, offset):
    dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    return x.to(dtype), offset + w.to(dtype), *(t.to(dtype) for t in rest)


def _normalized(x, eps):
    s = torch.rsqrt(_mean(x * x) + eps)
    return s, s * x


def _mean(x):
    return x.mean(-1, keepdim=True)


def _column_sum(x):
    return x.reshape(-1, x.shape[-1]).sum(0)


def _as_inputs(xs, *values):
    return tuple(value.to(x.dtype) for x, value in zip(xs, values, strict=True))


def _native_fwd(xs, xs_dot, *, eps, offset):
    x, w, x_dot, w_dot = _contiguous(*xs, *(xs_dot or (None, None)))
    y = torch.empty_like(x)
    y_dot = torch.empty_like(x) if xs_dot else None
    torch.ops.mamlfast.rms_norm_fwd(x, w, x_dot, w_dot, y, y_dot, eps, offset)
    return y, y_dot


def _native_bwd(xs, xs_dot, y_bar, y_bar_dot, wanted, *, eps, offset):
    x, w, y_bar, y_bar_dot = _contiguous(*xs, y_bar, y_bar_dot)
    x_dot, w_dot = _contiguous(*(xs_dot or (None, None)))
    need, need_dot = wanted
    P = max(1, min(x.numel() // w.numel() // MIN_ROWS, MAX_PARTIALS))
    xs_bar, xs_bar_dot = _allocated(x, need, P), _allocated(x, need_dot, P)
    torch.ops.mamlfast.rms_norm_bwd(x, w, y_bar, x_dot, w_dot, y_bar_dot, *xs_bar, *xs_bar_dot, P, eps, offset)
    return _summed(xs_bar), _summed(xs_bar_dot)


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _allocated(x, need, P):
    """Return memory for x_bar and for the partial sums of w_bar, each only where it is needed."""
    return torch.empty_like(x) if need[0] else None, x.new_empty(P, x.shape[-1]) if need[1] else None


def _summed(values):
    x_bar, partials = values
    return x_bar, None if partials is None else partials.sum(0)


def _triton_fwd(xs, xs_dot, **constants):
    from mamlfast_kernels.rms_norm import rms_norm_fwd

    return rms_norm_fwd(xs, xs_dot, **constants)


def _triton_bwd(xs, xs_dot, y_bar, y_bar_dot, wanted, **constants):
    from mamlfast_kernels.rms_norm import rms_norm_bwd

    return rms_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, **constants)


_ROOMS = {
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


def _check(xs, offset):
    x, w = xs
    if x.ndim == 0 or w.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm expects x [..., D] and w [D]; got x {list(x.shape)} and w {list(w.shape)}: "
            f"give it one weight for each element of the last dimension"
        )
    if offset not in (0.0, 1.0):
        raise ValueError(f"rms_norm expects the offset 0 (Llama) or 1 (Gemma), got {offset}")


def _fwd(xs, *, eps=1e-6, offset=0.0):
    _check(xs, offset)
    fwd, _ = _room(*xs)
    return fwd(xs, None, eps=eps, offset=offset)[0], ()


def _bwd(xs, saved, y_bar, need, *, eps=1e-6, offset=0.0):
    _, bwd = _room(*xs, y_bar)
    return bwd(xs, None, y_bar, None, (need, (False, False)), eps=eps, offset=offset)[0]


def _fwd_jvp(xs, xs_dot, *, eps=1e-6, offset=0.0):
    _check(xs, offset)
    fwd, _ = _room(*xs, *xs_dot)
    return *fwd(xs, xs_dot, eps=eps, offset=offset), ()


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, eps=1e-6, offset=0.0):
    _, bwd = _room(*xs, *xs_dot, y_bar, y_bar_dot)
    return bwd(xs, xs_dot, y_bar, y_bar_dot, (need, need_dot), eps=eps, offset=offset)


rms_norm = Rule(name="rms_norm", reference=rms_norm_reference, fwd=_fwd, bwd=_bwd, fwd_jvp=_fwd_jvp, bwd_jvp=_bwd_jvp)
