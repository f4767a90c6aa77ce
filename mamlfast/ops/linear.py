"""Products: ``linear`` (x W' + b), ``matmul`` and the elementwise ``mul``, to second order.

All three are bilinear, so their tangents are the product rule and nothing else::

    y = x W' + b       y_dot = x_dot W' + x W_dot' + b_dot
    x_bar = y_bar W              x_bar_dot = y_bar_dot W + y_bar W_dot
    W_bar = y_bar' x             W_bar_dot = y_bar_dot' x + y_bar' x_dot
    b_bar = sum_rows y_bar       b_bar_dot = sum_rows y_bar_dot

Each sum of two products accumulates in the product's own buffer, without a separate addition; ``matrix_products``
says whose products they are. A constant (its tangent is None, its cotangent not needed) costs no product: a frozen
weight takes 4 units instead of 8. W has ``torch.nn.Linear``'s layout, [out, in].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlfast.ops.matrix_products import add_product, product
from mamlfast.ops.rule import Rule


def linear_reference(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """``x w' + b``: x [..., I], w [O, I], b [O] -> [..., O]."""
    return F.linear(x, w, b)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _affine(x, w, b=None):
    """``x w' + b``; small and foreign operands are PyTorch's own business."""
    y = product(_rows(x), w.mT).view(*x.shape[:-1], w.shape[0])
    return y if b is None else y.add_(b)


def _linear_fwd(xs):
    return _affine(*xs), ()


def _linear_bwd(xs, saved, y_bar, need):
    x, w, *b = xs
    x_bar = product(_rows(y_bar), w).view(x.shape) if need[0] else None
    w_bar = product(_rows(y_bar).mT, _rows(x)) if need[1] else None
    return x_bar, w_bar, *(_rows(y_bar).sum(0) if need[2] else None for _ in b)


def _linear_fwd_jvp(xs, xs_dot):
    x, w, *b = xs
    x_dot, w_dot, *b_dot = xs_dot
    y = _affine(*xs)
    rows = _sum_of_products((_rows(x_dot) if x_dot is not None else None, w.mT), (_rows(x), _mT(w_dot)))
    y_dot = torch.zeros_like(y) if rows is None else rows.view(y.shape)
    if b and b_dot[0] is not None:
        y_dot += b_dot[0]
    return y, y_dot, ()


def _linear_bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot):
    x, w, *b = xs
    x_dot, w_dot, *_ = xs_dot
    rows, rows_dot = _rows(y_bar), _rows(y_bar_dot)
    x_dot_rows = None if x_dot is None else _rows(x_dot)
    x_bar_dot = w_bar_dot = None
    if need_dot[0]:
        x_bar_dot = _sum_of_products((rows_dot, w), (rows, w_dot)).reshape(x.shape)
    if need_dot[1]:
        w_bar_dot = _sum_of_products((rows_dot.mT, _rows(x)), (rows.mT, x_dot_rows))
    b_bar_dot = (rows_dot.sum(0) if need_dot[2] else None for _ in b)
    return _linear_bwd(xs, saved, y_bar, need), (x_bar_dot, w_bar_dot, *b_bar_dot)


def _sum_of_products(*pairs) -> Any:
    """Sum of the matrix products whose factors are both there; None where there is none."""
    out = None
    for a, b in pairs:
        if a is not None and b is not None:
            out = product(a, b) if out is None else add_product(out, a, b)
    return out


def _mT(w):
    return None if w is None else w.mT


linear = Rule(
    name="linear",
    reference=linear_reference,
    fwd=_linear_fwd,
    bwd=_linear_bwd,
    fwd_jvp=_linear_fwd_jvp,
    bwd_jvp=_linear_bwd_jvp,
    none_tangents=True,
)


def _bilinear(name, product, left, right):
    """Rule of ``y = product(a, b)``; ``left(y_bar, b)`` is a_bar and ``right(a, y_bar)`` is b_bar, unreduced."""

    def fwd(xs):
        return product(*xs), ()

    def fwd_jvp(xs, xs_dot):
        (a, b), (a_dot, b_dot) = xs, xs_dot
        y = product(a, b)
        y_dot = _sum_of(product, (a_dot, b), (a, b_dot))
        return y, torch.zeros_like(y) if y_dot is None else y_dot, ()

    def bwd(xs, saved, y_bar, need):
        a, b = xs
        a_bar = left(y_bar, b).sum_to_size(a.shape) if need[0] else None
        return a_bar, right(a, y_bar).sum_to_size(b.shape) if need[1] else None

    def bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot):
        (a, b), (a_dot, b_dot) = xs, xs_dot
        a_bar_dot = b_bar_dot = None
        if need_dot[0]:
            a_bar_dot = _sum_of(left, (y_bar_dot, b), (y_bar, b_dot)).sum_to_size(a.shape)
        if need_dot[1]:
            b_bar_dot = _sum_of(right, (a, y_bar_dot), (a_dot, y_bar)).sum_to_size(b.shape)
        return bwd(xs, saved, y_bar, need), (a_bar_dot, b_bar_dot)

    return Rule(
        name=name,
        reference=product,
        fwd=fwd,
        bwd=bwd,
        fwd_jvp=fwd_jvp,
        bwd_jvp=bwd_jvp,
        none_tangents=True,
    )


def _sum_of(product, *pairs) -> Any:
    terms = [product(a, b) for a, b in pairs if a is not None and b is not None]
    return sum(terms[1:], start=terms[0]) if terms else None


def matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` over the last two dimensions, leading ones broadcast; both operands have at least two."""
    return torch.matmul(a, b)


matmul = _bilinear(
    "matmul",
    matmul_reference,
    left=lambda y_bar, b: y_bar @ b.mT,
    right=lambda a, y_bar: a.mT @ y_bar,
)


def mul_reference(a: Tensor, b: Tensor) -> Tensor:
    """``a * b``, broadcast."""
    return a * b


mul = _bilinear("mul", mul_reference, left=torch.mul, right=torch.mul)
