"""Rotary position embedding (RoFormer, Su et al., 2021, arXiv:2104.09864) to second order.

The first N of the D elements of a head come in pairs (x_1, x_2), which a token's tables turn; the rest passes through::

    y_1 = x_1 cos_1 - x_2 sin_1              y_2 = x_2 cos_2 + x_1 sin_2

Pair i is the elements (i, i + N/2) as in Llama, or, ``interleaved``, (2 i, 2 i + 1) as in GPT-J and GLM. The tables are
constants, so the operation is linear: y_dot is the same of x_dot, and both cotangents go through the transpose ::

    x_bar_1 = y_bar_1 cos_1 + y_bar_2 sin_2              x_bar_2 = y_bar_2 cos_2 - y_bar_1 sin_1

which is a rotation back only where the two elements of a pair share their angle; here they need not.

x is read where its strides put it, y is contiguous, and x_bar lies as x does: neither the attention behind nor the
projection before has anything to copy. Products and sum are rounded each to the dtype of x, as by Hugging Face's
``x * cos + rotate_half(x) * sin``; in C++ the results have the bits of that expression and of its derivatives, on any
number of threads. No GPU has run the Triton kernel yet; Triton's interpreter and its compiler have.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl

from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule, is_constant


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dims: int | None = None) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` over the first N dimensions of each head, the others as they are.

    Args:
        x: [B, H, T, D], any strides; differentiable twice in every mode.
        cos, sin: [B, T, N] or [1, T, N], of the dtype of x, N even and at most D: constants, applied as they are,
            scaled or not.
        interleaved: pairs are neighbours (GPT-J, GLM) and not half a rotary width apart (Llama and most others).
        rotary_dims: N, where the tables have one column a pair, [B or 1, T, N/2] (GPT-J, GPT-OSS).

    Returns:
        y [B, H, T, D], contiguous, of the dtype of x. One read and one write of x; the backward the same.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a table carries a derivative, which would be lost.
    """
    _check_constant("cos", cos)
    _check_constant("sin", sin)
    _check(x, cos, sin, cos.shape[-1] if rotary_dims is None else rotary_dims)
    if rotary_dims is not None and rotary_dims != cos.shape[-1]:
        cos, sin = _twice(cos, interleaved), _twice(sin, interleaved)
    return rotary_rule(x, cos=cos, sin=sin, interleaved=interleaved)


def _check_constant(name, table):
    """Refuse a table that any mode of differentiation looks at: an option's derivative would silently be zero."""
    if type(table) is not Tensor and type(table).__torch_function__ is not _disabled_torch_function_impl:
        raise ValueError(f"{name} must be a plain tensor, a constant; got a {type(table).__name__}")
    if not is_constant(table):
        raise ValueError(
            f"{name} must be a constant; its derivative is wanted, which rotary does not give it: detach it"
        )


def _check(x, cos, sin, N):
    if x.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape:
        raise ValueError(
            f"rotary expects x [B, H, T, D] and cos, sin [B or 1, T, N]; got {list(x.shape)}, {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    B, _, T, D = x.shape
    if cos.shape[0] not in (1, B) or cos.shape[1] != T:
        raise ValueError(f"cos and sin must be [{B} or 1, {T}, N] for x {list(x.shape)}; got {list(cos.shape)}")
    columns = cos.shape[-1]
    if N % 2 or not 0 < N <= D or N not in (columns, 2 * columns):
        raise ValueError(
            f"the rotary dimensions must be even, at most D = {D}, and one or two for each column of cos; got {N} "
            f"for {columns} columns"
        )
    if {cos.dtype, sin.dtype} != {x.dtype} or {cos.device, sin.device} != {x.device}:
        raise ValueError(
            f"cos and sin must have the dtype and device of x, {x.dtype} on {x.device}; got {cos.dtype} on "
            f"{cos.device} and {sin.dtype} on {sin.device}: cast them"
        )


def _twice(table, interleaved):
    """Give both elements of a pair its column."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def rotary_reference(x: Tensor, *, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """As Hugging Face's models write it: x [B, H, T, D], cos and sin [B or 1, T, N]."""
    N = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = x[..., :N] * cos + _rotate_half(x[..., :N], interleaved) * sin
    return torch.cat((turned, x[..., N:]), -1)


def _rotate_half(x, interleaved):
    """(-x_2, x_1); its transpose is its negative."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _eager(x, like, cos, sin, interleaved):
    if like is None:
        return rotary_reference(x, cos=cos, sin=sin, interleaved=interleaved)
    N = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty_like(like)
    out[..., :N] = x[..., :N] * cos - _rotate_half(x[..., :N] * sin, interleaved)
    out[..., N:] = x[..., N:]
    return out


def _native(x, like, cos, sin, interleaved):
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(x.shape) if like is None else _laid_out_as(like)
    torch.ops.mamlfast.rotary(x, cos.contiguous(), sin.contiguous(), out, interleaved, like is not None)
    return out


def _triton(x, like, cos, sin, interleaved):
    from mamlfast_kernels.rotary import rotary_rotate

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if like is None else _laid_out_as(like)
    rotary_rotate(x, out, cos, sin, interleaved=interleaved, transposed=like is not None)
    return out


def _laid_out_as(like):
    out = torch.empty_like(like)
    return out if out.stride(-1) == 1 else torch.empty_like(like, memory_format=torch.contiguous_format)


_ROOMS: dict[str, Any] = {"eager": _eager, "native": _native, "triton": _triton}


def _rotated(x, like, cos, sin, interleaved):
    """The operation on x, or, given a tensor ``like`` which the result shall lie, its transpose."""
    served = x.numel() > 0 and all(t.dtype == x.dtype for t in (cos, sin))
    return _ROOMS[backend_for(x, cos, sin, rooms=_ROOMS if served else ("eager",))](x, like, cos, sin, interleaved)


def _fwd(xs, *, cos, sin, interleaved=False):
    return _rotated(xs[0], None, cos, sin, interleaved), ()


def _bwd(xs, saved, y_bar, need, *, cos, sin, interleaved=False):
    return (_rotated(y_bar, xs[0], cos, sin, interleaved),)


def _fwd_jvp(xs, xs_dot, *, cos, sin, interleaved=False):
    y, y_dot = (_rotated(x, None, cos, sin, interleaved) for x in (xs[0], xs_dot[0]))
    return y, y_dot, ()


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, cos, sin, interleaved=False):
    def transposed(wanted, cotangent):
        return _rotated(cotangent, xs[0], cos, sin, interleaved) if wanted[0] else None

    return (transposed(need, y_bar),), (transposed(need_dot, y_bar_dot),)


rotary_rule = Rule(name="rotary", reference=rotary_reference, fwd=_fwd, bwd=_bwd, fwd_jvp=_fwd_jvp, bwd_jvp=_bwd_jvp)
