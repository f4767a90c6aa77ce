"""Gated activations ``y = phi(a) b`` (GLU variants, Shazeer, 2020, arXiv:2002.05202) to second order.

For a gate phi with derivatives phi', phi'' (``mamlfast/ops/elementwise.py`` has them), elementwise::

    phi_dot = phi' a_dot                     y_dot = phi_dot b + phi b_dot

    g     = y_bar b                          a_bar     = phi' g
    g_dot = y_bar_dot b + y_bar b_dot        a_bar_dot = phi'' a_dot g + phi' g_dot
                                             b_bar     = phi y_bar
                                             b_bar_dot = phi_dot y_bar + phi y_bar_dot

    swiglu  silu(a) b        geglu  gelu(a) b (erf)        geglu_tanh  gelu_tanh(a) b        reglu  relu(a) b

``a`` and ``b`` have one shape and dtype. Halves of one fused projection (``gate, up = x.chunk(2, -1)``) are read where
they lie, without a copy, as is any view whose rows are evenly spaced. ``swiglu_packed(x)`` and its like take that
projection whole and write x_bar whole: autograd would join the cotangents of the two halves, which costs about as much
as the rest of the operation.

The kernels make one pass over memory a direction: tensors moved 3 forward, 5 backward, 6 and 10 with tangents. In half
types phi is rounded before b multiplies it, as in Hugging Face's modules; the derivatives treat rounding as the
identity and are rounded once. Each room gives the same first-order bits with and without tangents, the C++ kernels
the same bits on any number of threads. No GPU has run the Triton kernels yet; Triton's interpreter and its compiler
have.
"""

from typing import Any

import torch
from torch import Tensor

from mamlfast.ops import elementwise
from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule


def gated(name: str, gate: Rule, *, packed: bool = False) -> Rule:
    """Return the Rule of ``gate(a) * b`` for a gate of ``elementwise``; there are kernels called ``name``.

    ``packed``: of one x [..., 2 F] whose halves are a and b, in this order.
    """

    def reference(*xs: Tensor) -> Tensor:
        a, b = pair(xs)
        return gate.reference(a) * b

    def pair(xs):
        if not packed:
            return xs
        (x,) = xs
        if x.ndim == 0 or x.shape[-1] % 2:
            raise ValueError(f"{name} expects x [..., 2 F], the gates before what they gate; got {list(x.shape)}")
        return x.chunk(2, -1)

    rooms: dict[str, Any] = {
        "eager": _eager(gate, packed),
        "native": _native(name, packed),
        "triton": _triton(gate.name, packed),
    }

    def room(*tensors):
        return rooms[backend_for(*tensors, rooms=rooms if tensors[0].numel() > 0 else ("eager",))]

    def fwd(xs):
        xs = pair(xs)
        _check(name, *xs)
        return room(*xs)[0](xs, None)[0], ()

    def bwd(xs, saved, y_bar, need):
        xs = pair(xs)
        return room(*xs, y_bar)[1](xs, None, y_bar, None, (True, False))[0]

    def fwd_jvp(xs, xs_dot):
        xs, xs_dot = pair(xs), pair(xs_dot)
        _check(name, *xs)
        return *room(*xs, *xs_dot)[0](xs, xs_dot), ()

    def bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot):
        xs, xs_dot, wanted = pair(xs), pair(xs_dot), (any(need), any(need_dot))
        return room(*xs, *xs_dot, y_bar, y_bar_dot)[1](xs, xs_dot, y_bar, y_bar_dot, wanted)

    return Rule(name=name, reference=reference, fwd=fwd, bwd=bwd, fwd_jvp=fwd_jvp, bwd_jvp=bwd_jvp)


def _check(name, a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"{name} expects a and b of one shape and dtype; got {list(a.shape)} {a.dtype} and "
            f"{list(b.shape)} {b.dtype}: expand or cast one of them"
        )


NOTHING = None, None


def _eager(gate, packed):
    """The gate's own Rule and the product rule."""

    def fwd(xs, xs_dot):
        a, b = xs
        y = gate.reference(a) * b
        if xs_dot is None:
            return y, None
        a, b, a_dot, b_dot = _wide(*xs, *xs_dot)
        phi, phi_dot, _ = gate.fwd_jvp((a,), (a_dot,))
        return y, torch.addcmul(phi_dot * b, phi, b_dot).to(y.dtype)

    def bwd(xs, xs_dot, y_bar, y_bar_dot, wanted):
        dtype = y_bar.dtype
        a, b, y_bar = _wide(*xs, y_bar)
        g = y_bar * b
        if xs_dot is None:
            (phi, _), (a_bar,) = gate.fwd((a,)), gate.bwd((a,), (), g, (True,))
            return results(dtype, a_bar, phi * y_bar), NOTHING
        a_dot, b_dot, y_bar_dot = _wide(*xs_dot, y_bar_dot)
        g_dot = torch.addcmul(y_bar_dot * b, y_bar, b_dot)
        phi, phi_dot, _ = gate.fwd_jvp((a,), (a_dot,))
        (a_bar,), (a_bar_dot,) = gate.bwd_jvp((a,), (a_dot,), (), g, g_dot, (True,), (True,))
        b_bar_dot = torch.addcmul(phi_dot * y_bar, phi, y_bar_dot)
        return results(dtype, a_bar, phi * y_bar), results(dtype, a_bar_dot, b_bar_dot)

    def results(dtype, *halves):
        return (torch.cat(halves, -1).to(dtype),) if packed else tuple(half.to(dtype) for half in halves)

    return fwd, bwd


def _wide(*tensors):
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(t.to(dtype) for t in tensors)


def _native(name, packed):
    def fwd(xs, xs_dot):
        a, b, a_dot, b_dot = _matrices(*xs, *(xs_dot or NOTHING))
        y, y_dot = _new(a), None if xs_dot is None else _new(a)
        getattr(torch.ops.mamlfast, f"{kernels}_fwd")(a, b, a_dot, b_dot, y, y_dot)
        return y.view(xs[0].shape), None if y_dot is None else y_dot.view(xs[0].shape)

    def bwd(xs, xs_dot, y_bar, y_bar_dot, wanted):
        a, b, a_dot, b_dot, y_bar, y_bar_dot = _matrices(*xs, *(xs_dot or NOTHING), y_bar, y_bar_dot)
        (xs_bar, pair), (xs_bar_dot, pair_dot) = (results(a) if need else (absent, NOTHING) for need in wanted)
        getattr(torch.ops.mamlfast, f"{kernels}_bwd")(a, b, y_bar, a_dot, b_dot, y_bar_dot, *pair, *pair_dot)
        shape = (*xs[0].shape[:-1], -1) if packed else xs[0].shape
        return _shaped(xs_bar, shape), _shaped(xs_bar_dot, shape)

    def results(a):
        """Return memory for results, and the two matrices that are written."""
        if not packed:
            pair = _new(a), _new(a)
            return pair, pair
        both = a.new_empty(a.shape[0], 2 * a.shape[1])
        return (both,), both.chunk(2, -1)

    kernels, absent = name.removesuffix("_packed"), (None,) if packed else NOTHING
    return fwd, bwd


def _matrices(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors as matrices with neighbours along the rows: one row if all are contiguous."""
    given = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in given):
        return tuple(None if t is None else t.view(1, -1) for t in tensors)
    width = given[0].shape[-1]
    return tuple(None if t is None else _rows(t, width) for t in tensors)


def _rows(t, width):
    t = t.reshape(-1, width)  # a view where there is one
    return t if t.stride(-1) == 1 or width == 1 else t.contiguous()


def _new(like):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _shaped(values, shape):
    return tuple(None if value is None else value.view(shape) for value in values)


def _triton(gate_name, packed):
    def fwd(xs, xs_dot):
        from mamlfast_kernels.gated import gated_fwd

        return gated_fwd(gate_name, xs, xs_dot)

    def bwd(xs, xs_dot, y_bar, y_bar_dot, wanted):
        from mamlfast_kernels.gated import gated_bwd

        return gated_bwd(gate_name, xs, xs_dot, y_bar, y_bar_dot, packed=packed)

    return fwd, bwd


swiglu = gated("swiglu", elementwise.silu)
geglu = gated("geglu", elementwise.gelu)
geglu_tanh = gated("geglu_tanh", elementwise.gelu_tanh)
reglu = gated("reglu", elementwise.relu)
swiglu_packed = gated("swiglu_packed", elementwise.silu, packed=True)
geglu_packed = gated("geglu_packed", elementwise.gelu, packed=True)
geglu_tanh_packed = gated("geglu_tanh_packed", elementwise.gelu_tanh, packed=True)
reglu_packed = gated("reglu_packed", elementwise.relu, packed=True)
