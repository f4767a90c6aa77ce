"""Gated activations to second order on GPUs; the mathematics stands in ``mamlfast/ops/gated.py``, in the same names.

One kernel per direction for all gates: ``NAME`` chooses the activation when it is compiled, and ``HAS_TANGENT`` adds
the second-order terms and leaves the first-order ones as they are. The tensors are matrices with a row stride each, so
that halves of a fused projection are read where they lie, and their cotangents written as the halves of one tensor.
Arithmetic is ``WIDE``: float32, or float64 for float64 inputs. In Triton's interpreter the kernels agree with
torch.func, and they compile for sm_80, sm_90 and sm_100 without spills. No GPU has run them yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.elementwise import BLOCK, NUM_WARPS, _slopes
from mamlfast_kernels.launch import interpreted, wide

Pair = tuple[Tensor, Tensor]
Maybe = Tensor | None


@triton.jit
def _gated_fwd_kernel(
    a_ptr, b_ptr, y_ptr,  # (R, F), y contiguous
    a_dot_ptr, b_dot_ptr, y_dot_ptr,  # as above; touched only if HAS_TANGENT
    a_r, b_r, a_dot_r, b_dot_r,  # from one row to the next
    F,
    NAME: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    phi, phi_1, _ = _slopes(tl.load(a_ptr + row * a_r + cols, mask, 0.0).to(WIDE), NAME)
    b = tl.load(b_ptr + row * b_r + cols, mask, 0.0).to(WIDE)
    tl.store(y_ptr + row * F + cols, phi.to(y_ptr.dtype.element_ty).to(WIDE) * b, mask)
    if HAS_TANGENT:
        a_dot = tl.load(a_dot_ptr + row * a_dot_r + cols, mask, 0.0).to(WIDE)
        b_dot = tl.load(b_dot_ptr + row * b_dot_r + cols, mask, 0.0).to(WIDE)
        tl.store(y_dot_ptr + row * F + cols, phi_1 * a_dot * b + phi * b_dot, mask)


@triton.jit
def _gated_bwd_kernel(
    a_ptr, b_ptr, y_bar_ptr, a_bar_ptr, b_bar_ptr,  # (R, F)
    a_dot_ptr, b_dot_ptr, y_bar_dot_ptr, a_bar_dot_ptr, b_bar_dot_ptr,  # as above; touched only if HAS_TANGENT
    a_r, b_r, y_bar_r, a_dot_r, b_dot_r, y_bar_dot_r, bar_r,  # from one row to the next, the last of all results
    F,
    NAME: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    phi, phi_1, phi_2 = _slopes(tl.load(a_ptr + row * a_r + cols, mask, 0.0).to(WIDE), NAME)
    b = tl.load(b_ptr + row * b_r + cols, mask, 0.0).to(WIDE)
    y_bar = tl.load(y_bar_ptr + row * y_bar_r + cols, mask, 0.0).to(WIDE)
    g = y_bar * b
    tl.store(a_bar_ptr + row * bar_r + cols, phi_1 * g, mask)
    tl.store(b_bar_ptr + row * bar_r + cols, phi * y_bar, mask)
    if HAS_TANGENT:
        a_dot = tl.load(a_dot_ptr + row * a_dot_r + cols, mask, 0.0).to(WIDE)
        b_dot = tl.load(b_dot_ptr + row * b_dot_r + cols, mask, 0.0).to(WIDE)
        y_bar_dot = tl.load(y_bar_dot_ptr + row * y_bar_dot_r + cols, mask, 0.0).to(WIDE)
        g_dot = y_bar_dot * b + y_bar * b_dot
        tl.store(a_bar_dot_ptr + row * bar_r + cols, phi_2 * (a_dot * g) + phi_1 * g_dot, mask)
        tl.store(b_bar_dot_ptr + row * bar_r + cols, phi_1 * a_dot * y_bar + phi * y_bar_dot, mask)


def gated_fwd(name: str, xs: Pair, xs_dot: Pair | None) -> tuple[Tensor, Maybe]:
    """Return ``y`` and, given tangents, ``y_dot``; ``name`` is the gate's, ``xs = (a, b)`` of one shape, not empty."""
    shape, dtype = xs[0].shape, xs[0].dtype
    a, b, a_dot, b_dot = _matrices(*xs, *(xs_dot or (None, None)))
    y, y_dot = _new(a), _new(a) if xs_dot else None
    grid, options = _launch(name, a, xs_dot)
    with torch.cuda.device_of(a):
        _gated_fwd_kernel[grid](
            a, b, y, a_dot, b_dot, y_dot, **_row_strides(a=a, b=b, a_dot=a_dot, b_dot=b_dot), F=a.shape[1], **options
        )
    return _shaped(y, shape, dtype), _shaped(y_dot, shape, dtype)


def gated_bwd(
    name: str, xs: Pair, xs_dot: Pair | None, y_bar: Tensor, y_bar_dot: Maybe, *, packed: bool = False
) -> tuple[Any, Any]:
    """Return ``(a_bar, b_bar)`` and, given tangents, theirs (otherwise two times None); one shape for all.

    ``packed``: in place of each pair the one tensor whose halves they are.
    """
    shape, dtype = (*xs[0].shape[:-1], -1) if packed else xs[0].shape, xs[0].dtype
    a, b, y_bar, a_dot, b_dot, y_bar_dot = _matrices(*xs, y_bar, *(xs_dot or (None, None)), y_bar_dot)
    xs_bar, (a_bar, b_bar) = _results(a, packed)
    xs_bar_dot, (a_bar_dot, b_bar_dot) = _results(a, packed) if xs_dot else ((None, None),) * 2
    grid, options = _launch(name, a, xs_dot)
    with torch.cuda.device_of(a):
        _gated_bwd_kernel[grid](
            a, b, y_bar, a_bar, b_bar,
            a_dot, b_dot, y_bar_dot, a_bar_dot, b_bar_dot,
            **_row_strides(a=a, b=b, y_bar=y_bar, a_dot=a_dot, b_dot=b_dot, y_bar_dot=y_bar_dot, bar=a_bar),
            F=a.shape[1], **options,
        )  # fmt: skip
    return tuple(_shaped(x, shape, dtype) for x in xs_bar), tuple(_shaped(x, shape, dtype) for x in xs_bar_dot)


def _results(a: Tensor, packed: bool) -> tuple[Any, Any]:
    """Return memory for results, and the two matrices that are written."""
    if not packed:
        pair = _new(a), _new(a)
        return pair, pair
    both = a.new_empty(a.shape[0], 2 * a.shape[1])
    return (both,), both.chunk(2, -1)


def _matrices(*tensors: Maybe) -> tuple[Any, ...]:
    """Return the tensors as matrices with neighbours along the rows: one row if all are contiguous."""
    given = [t for t in tensors if t is not None]
    # The interpreter computes with the bits of bfloat16 as if they were integers.
    widen = interpreted() and given[0].dtype == torch.bfloat16
    flat = all(t.is_contiguous() for t in given)
    width = given[0].numel() if flat else given[0].shape[-1]
    return tuple(None if t is None else _rows(t.float() if widen else t, width) for t in tensors)


def _rows(t: Tensor, width: int) -> Tensor:
    t = t.reshape(-1, width)  # a view where there is one
    return t if t.stride(-1) == 1 or width == 1 else t.contiguous()


def _row_strides(**matrices: Maybe) -> dict[str, int]:
    return {f"{name}_r": 0 if t is None else t.stride(0) for name, t in matrices.items()}


def _new(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _shaped(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return None if value is None else value.view(shape).to(dtype)


def _launch(name: str, a: Tensor, xs_dot: Pair | None) -> tuple[tuple[int], dict[str, Any]]:
    grid = (a.shape[0] * triton.cdiv(a.shape[1], BLOCK),)
    has_tangent = xs_dot is not None
    return grid, {"NAME": name, "WIDE": wide(a), "HAS_TANGENT": has_tangent, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
