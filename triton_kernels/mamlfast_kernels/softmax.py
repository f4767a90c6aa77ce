"""Softmax and log-softmax of rows to second order on GPUs; the mathematics stands in ``mamlfast/ops/softmax.py``, in
the same names.

A program holds a row in registers. ``LOG`` chooses the function when it is compiled; ``HAS_TANGENT`` adds the
second-order terms and leaves the first-order ones as they are. Arithmetic is ``WIDE``: float32, or float64 for float64
inputs. In Triton's interpreter the kernels agree with torch.func, and they compile for sm_80, sm_90 and sm_100 without
spills. No GPU has run them yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.launch import prepared, row_options

Maybe = Tensor | None


@triton.jit
def _softmax_fwd_kernel(
    x_ptr, y_ptr, x_dot_ptr, y_dot_ptr,  # (R, D); those with tangents are touched only if HAS_TANGENT
    D,
    LOG: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    row = tl.program_id(0).to(tl.int64) * D

    x = tl.load(x_ptr + row + cols, mask, float("-inf")).to(WIDE)
    shifted = x - tl.max(x)
    e = tl.exp(shifted)
    total = tl.sum(e)
    p = e / total
    y = shifted - tl.log(total) if LOG else p
    tl.store(y_ptr + row + cols, y, mask)

    if HAS_TANGENT:
        x_dot = tl.load(x_dot_ptr + row + cols, mask, 0.0).to(WIDE)
        centred = x_dot - tl.sum(p * x_dot)
        y_dot = centred if LOG else p * centred
        tl.store(y_dot_ptr + row + cols, y_dot, mask)


@triton.jit
def _softmax_bwd_kernel(
    y_ptr, y_bar_ptr, x_bar_ptr, y_dot_ptr, y_bar_dot_ptr, x_bar_dot_ptr,  # (R, D), as above
    D,
    LOG: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    row = tl.program_id(0).to(tl.int64) * D

    y = tl.load(y_ptr + row + cols, mask, 0.0).to(WIDE)
    y_bar = tl.load(y_bar_ptr + row + cols, mask, 0.0).to(WIDE)
    if LOG:
        p, s = tl.exp(y), tl.sum(y_bar)
        tl.store(x_bar_ptr + row + cols, y_bar - p * s, mask)
    else:
        centred = y_bar - tl.sum(y * y_bar)
        tl.store(x_bar_ptr + row + cols, y * centred, mask)

    if HAS_TANGENT:
        y_dot = tl.load(y_dot_ptr + row + cols, mask, 0.0).to(WIDE)
        y_bar_dot = tl.load(y_bar_dot_ptr + row + cols, mask, 0.0).to(WIDE)
        if LOG:
            x_bar_dot = y_bar_dot - p * (y_dot * s + tl.sum(y_bar_dot))
        else:
            x_bar_dot = y_dot * centred + y * (y_bar_dot - tl.sum(y_dot * y_bar + y * y_bar_dot))
        tl.store(x_bar_dot_ptr + row + cols, x_bar_dot, mask)


def softmax_fwd(x: Tensor, x_dot: Maybe, *, log: bool) -> tuple[Tensor, Maybe]:
    """Return ``y`` and, given a tangent, ``y_dot``, along the last dimension of ``x``, which is not empty."""
    dtype, options = x.dtype, _launch_options(x, x_dot)
    x, x_dot = prepared(x, x_dot)
    y, y_dot = torch.empty_like(x), None if x_dot is None else torch.empty_like(x)
    R, D = _rows(x)
    with torch.cuda.device_of(x):
        _softmax_fwd_kernel[(R,)](x, y, x_dot, y_dot, D, log, **options)
    return y.to(dtype), None if y_dot is None else y_dot.to(dtype)


def softmax_bwd(y: Tensor, y_dot: Maybe, y_bar: Tensor, y_bar_dot: Maybe, *, log: bool) -> tuple[Tensor, Maybe]:
    """Return ``x_bar`` and, given tangents, ``x_bar_dot``, from the outputs of the forward; one shape for all."""
    dtype, options = y.dtype, _launch_options(y, y_dot)
    y, y_dot, y_bar, y_bar_dot = prepared(y, y_dot, y_bar, y_bar_dot)
    x_bar, x_bar_dot = torch.empty_like(y), None if y_dot is None else torch.empty_like(y)
    R, D = _rows(y)
    with torch.cuda.device_of(y):
        _softmax_bwd_kernel[(R,)](y, y_bar, x_bar, y_dot, y_bar_dot, x_bar_dot, D, log, **options)
    return x_bar.to(dtype), None if x_bar_dot is None else x_bar_dot.to(dtype)


def _rows(x):
    D = x.shape[-1] if x.ndim else 1
    return x.numel() // D, D


def _launch_options(x, x_dot):
    return row_options(x.view(1) if x.ndim == 0 else x, x_dot is not None)
