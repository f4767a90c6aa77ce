"""Layer normalisation to second order on GPUs; the mathematics stands in ``mamlfast/ops/layer_norm.py``, in the same
names.

One kernel per direction: ``HAS_TANGENT`` adds the second-order terms and leaves the first-order ones as they are. A
program holds a whole row in registers; the backward visits every P-th row and keeps the sums for ``w_bar`` and
``b_bar`` to itself, so that they are added in one order and without atomics.

Arithmetic is ``WIDE``: float32, or float64 for float64 inputs. In Triton's interpreter the kernels agree with
torch.func, and in bfloat16 they compile for sm_80, sm_90 and sm_100 without spills up to D = 4096; at 8192 the
backward with tangents puts up to 800 bytes a thread on the stack. No GPU has run them yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.launch import prepared, row_options, wide_dtype

Tensors = tuple[Tensor, ...]
Maybe = Tensor | None

# Rows of partial sums where no GPU says how many of its multiprocessors want one.
NUM_PARTIALS = 8


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,  # (R, D), (D,), (D,), (R, D)
    x_dot_ptr, w_dot_ptr, b_dot_ptr, y_dot_ptr,  # as above; touched only if HAS_TANGENT
    D,
    EPS: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    row = tl.program_id(0).to(tl.int64) * D

    x = tl.load(x_ptr + row + cols, mask, 0.0).to(WIDE)
    w = tl.load(w_ptr + cols, mask, 0.0).to(WIDE)
    c = tl.where(mask, x - tl.sum(x) / D, 0.0)
    r = tl.rsqrt(tl.sum(c * c) / D + EPS)
    n = r * c
    tl.store(y_ptr + row + cols, w * n + tl.load(b_ptr + cols, mask, 0.0).to(WIDE), mask)

    if HAS_TANGENT:
        x_dot = tl.load(x_dot_ptr + row + cols, mask, 0.0).to(WIDE)
        w_dot = tl.load(w_dot_ptr + cols, mask, 0.0).to(WIDE)
        b_dot = tl.load(b_dot_ptr + cols, mask, 0.0).to(WIDE)
        n_dot = r * (x_dot - tl.sum(x_dot) / D - n * (tl.sum(n * x_dot) / D))
        tl.store(y_dot_ptr + row + cols, w_dot * n + w * n_dot + b_dot, mask)


@triton.jit
def _layer_norm_bwd_kernel(
    x_ptr, w_ptr, y_bar_ptr, x_bar_ptr, w_bar_ptr, b_bar_ptr,  # w_bar, b_bar: (P, D) partial sums
    x_dot_ptr, w_dot_ptr, y_bar_dot_ptr, x_bar_dot_ptr, w_bar_dot_ptr, b_bar_dot_ptr,
    R, D,
    EPS: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    pid = tl.program_id(0).to(tl.int64)
    w = tl.load(w_ptr + cols, mask, 0.0).to(WIDE)
    w_bar = tl.zeros([BLOCK_D], WIDE)
    b_bar = tl.zeros([BLOCK_D], WIDE)
    if HAS_TANGENT:
        w_dot = tl.load(w_dot_ptr + cols, mask, 0.0).to(WIDE)
        w_bar_dot = tl.zeros([BLOCK_D], WIDE)
        b_bar_dot = tl.zeros([BLOCK_D], WIDE)

    i = pid
    while i < R:  # the interpreter of Triton 3.6 has no range over run-time bounds
        row = i * D
        x = tl.load(x_ptr + row + cols, mask, 0.0).to(WIDE)
        y_bar = tl.load(y_bar_ptr + row + cols, mask, 0.0).to(WIDE)
        c = tl.where(mask, x - tl.sum(x) / D, 0.0)
        r = tl.rsqrt(tl.sum(c * c) / D + EPS)
        n = r * c
        g = w * y_bar
        p, q = tl.sum(g) / D, tl.sum(g * n) / D
        x_bar = r * (g - p - n * q)
        tl.store(x_bar_ptr + row + cols, x_bar, mask)
        w_bar += y_bar * n
        b_bar += y_bar

        if HAS_TANGENT:
            x_dot = tl.load(x_dot_ptr + row + cols, mask, 0.0).to(WIDE)
            y_bar_dot = tl.load(y_bar_dot_ptr + row + cols, mask, 0.0).to(WIDE)
            a = tl.sum(n * x_dot) / D
            n_dot = r * (x_dot - tl.sum(x_dot) / D - n * a)
            g_dot = w_dot * y_bar + w * y_bar_dot
            p_dot, q_dot = tl.sum(g_dot) / D, tl.sum(g_dot * n + g * n_dot) / D
            x_bar_dot = r * (g_dot - p_dot - n_dot * q - n * q_dot - a * x_bar)
            tl.store(x_bar_dot_ptr + row + cols, x_bar_dot, mask)
            w_bar_dot += y_bar_dot * n + y_bar * n_dot
            b_bar_dot += y_bar_dot
        i += tl.num_programs(0)

    tl.store(w_bar_ptr + pid * D + cols, w_bar, mask)
    tl.store(b_bar_ptr + pid * D + cols, b_bar, mask)
    if HAS_TANGENT:
        tl.store(w_bar_dot_ptr + pid * D + cols, w_bar_dot, mask)
        tl.store(b_bar_dot_ptr + pid * D + cols, b_bar_dot, mask)


def layer_norm_fwd(xs: Tensors, xs_dot: Tensors | None, *, eps: float) -> tuple[Tensor, Maybe]:
    """Return ``y`` and, given tangents, ``y_dot``; ``xs = (x, w, b)`` of one dtype, x at least one row."""
    x, w, b, x_dot, w_dot, b_dot = prepared(*xs, *(xs_dot or (None,) * 3))
    y = torch.empty_like(x)
    y_dot = torch.empty_like(x) if xs_dot else None
    D = x.shape[-1]
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(x.numel() // D,)](
            x, w, b, y, x_dot, w_dot, b_dot, y_dot, D, eps, **row_options(x, xs_dot is not None)
        )
    dtype = xs[0].dtype
    return y.to(dtype), None if y_dot is None else y_dot.to(dtype)


def layer_norm_bwd(
    xs: Tensors, xs_dot: Tensors | None, y_bar: Tensor, y_bar_dot: Maybe, *, eps: float
) -> tuple[Tensors, Tensors | None]:
    """Return ``xs_bar`` and, given tangents, ``xs_bar_dot``; all of one dtype, x at least one row."""
    x, w, y_bar, y_bar_dot = prepared(*xs[:2], y_bar, y_bar_dot)
    x_dot, w_dot, _ = prepared(*(xs_dot or (None,) * 3))
    D = x.shape[-1]
    R = x.numel() // D
    P = min(R, _num_partials(x))
    x_bar, w_bar, b_bar = xs_bar = _allocated(x, P)
    x_bar_dot, w_bar_dot, b_bar_dot = xs_bar_dot = _allocated(x, P) if xs_dot else (None,) * 3
    with torch.cuda.device_of(x):
        _layer_norm_bwd_kernel[(P,)](
            x, w, y_bar, x_bar, w_bar, b_bar,
            x_dot, w_dot, y_bar_dot, x_bar_dot, w_bar_dot, b_bar_dot,
            R, D, eps, **row_options(x, xs_dot is not None),
        )  # fmt: skip
    dtype = xs[0].dtype
    return _summed(xs_bar, dtype), _summed(xs_bar_dot, dtype) if xs_dot else None


def _allocated(x, P):
    """Return memory for x_bar and for the partial sums of w_bar and b_bar."""
    return torch.empty_like(x), *(x.new_empty(P, x.shape[-1], dtype=wide_dtype(x)) for _ in range(2))


def _summed(values, dtype):
    x_bar, *partials = values
    return x_bar.to(dtype), *(p.sum(0).to(dtype) for p in partials)


def _num_partials(x: Tensor) -> int:
    # Two programs a multiprocessor hide each other's loads; a guess until a GPU has measured it.
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else NUM_PARTIALS
