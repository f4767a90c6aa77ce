"""RMSNorm to second order on GPUs; the mathematics stands in ``mamlfast/ops/rms_norm.py``, in the same names.

One kernel per direction: ``HAS_TANGENT`` adds the second-order terms and leaves the first-order ones as they
are. A program holds a whole row in registers; the backward visits every P-th row and keeps the sums for
``w_bar`` to itself, so that they are added in one order and without atomics.

Arithmetic is ``WIDE``: float32, or float64 for float64 inputs. In bfloat16 the kernels compile for sm_80,
sm_90 and sm_100 without spills up to D = 4096; at 8192 the backward with tangents puts 256 bytes a thread on
the stack. In Triton's interpreter they agree with the reference. No GPU has run them yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Tensors = tuple[Tensor, ...]
Maybe = Tensor | None

# Rows of partial sums where no GPU says how many of its multiprocessors want one.
NUM_PARTIALS = 8


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr,  # (R, D), (D,), (R, D)
    x_dot_ptr, w_dot_ptr, y_dot_ptr,  # as above; touched only if HAS_TANGENT
    D,
    EPS: tl.constexpr, OFFSET: tl.constexpr,
    WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    row = tl.program_id(0).to(tl.int64) * D

    x = tl.load(x_ptr + row + cols, mask, 0.0).to(WIDE)
    w = tl.load(w_ptr + cols, mask, 0.0).to(WIDE)
    W = w if OFFSET == 0.0 else OFFSET + w
    s = tl.rsqrt(tl.sum(x * x) / D + EPS)
    n = s * x
    # Llama rounds n before the weight multiplies it, Gemma does not.
    rounded = n.to(x_ptr.dtype.element_ty).to(WIDE) if OFFSET == 0.0 else n
    tl.store(y_ptr + row + cols, W * rounded, mask)

    if HAS_TANGENT:
        x_dot = tl.load(x_dot_ptr + row + cols, mask, 0.0).to(WIDE)
        w_dot = tl.load(w_dot_ptr + cols, mask, 0.0).to(WIDE)
        n_dot = s * x_dot - s * s * (tl.sum(n * x_dot) / D) * x
        tl.store(y_dot_ptr + row + cols, w_dot * n + W * n_dot, mask)


@triton.jit
def _rms_norm_bwd_kernel(
    x_ptr, w_ptr, y_bar_ptr, x_bar_ptr, w_bar_ptr,  # w_bar: (P, D) partial sums
    x_dot_ptr, w_dot_ptr, y_bar_dot_ptr, x_bar_dot_ptr, w_bar_dot_ptr,
    R, D,
    EPS: tl.constexpr, OFFSET: tl.constexpr,
    WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    pid = tl.program_id(0).to(tl.int64)
    w = tl.load(w_ptr + cols, mask, 0.0).to(WIDE)
    W = w if OFFSET == 0.0 else OFFSET + w
    w_bar = tl.zeros([BLOCK_D], WIDE)
    if HAS_TANGENT:
        w_dot = tl.load(w_dot_ptr + cols, mask, 0.0).to(WIDE)
        w_bar_dot = tl.zeros([BLOCK_D], WIDE)

    r = pid
    while r < R:  # the interpreter of Triton 3.6 has no range over run-time bounds
        row = r * D
        x = tl.load(x_ptr + row + cols, mask, 0.0).to(WIDE)
        y_bar = tl.load(y_bar_ptr + row + cols, mask, 0.0).to(WIDE)
        s = tl.rsqrt(tl.sum(x * x) / D + EPS)
        n = s * x
        g = W * y_bar
        c = tl.sum(g * n) / D
        tl.store(x_bar_ptr + row + cols, s * (g - c * n), mask)
        w_bar += y_bar * n

        if HAS_TANGENT:
            x_dot = tl.load(x_dot_ptr + row + cols, mask, 0.0).to(WIDE)
            y_bar_dot = tl.load(y_bar_dot_ptr + row + cols, mask, 0.0).to(WIDE)
            s_dot = -s * s * (tl.sum(n * x_dot) / D)
            n_dot = s * x_dot + s_dot * x
            g_dot = w_dot * y_bar + W * y_bar_dot
            c_dot = tl.sum(g_dot * n + g * n_dot) / D
            x_bar_dot = s_dot * (g - c * n) + s * (g_dot - c_dot * n - c * n_dot)
            tl.store(x_bar_dot_ptr + row + cols, x_bar_dot, mask)
            w_bar_dot += y_bar_dot * n + y_bar * n_dot
        r += tl.num_programs(0)

    tl.store(w_bar_ptr + pid * D + cols, w_bar, mask)
    if HAS_TANGENT:
        tl.store(w_bar_dot_ptr + pid * D + cols, w_bar_dot, mask)


def rms_norm_fwd(xs: Tensors, xs_dot: Tensors | None, *, eps: float, offset: float) -> tuple[Tensor, Maybe]:
    """Return ``y`` and, given tangents, ``y_dot``; ``xs = (x, w)`` of one dtype, x at least one row."""
    x, w, x_dot, w_dot = _prepared(xs, xs_dot)
    y = torch.empty_like(x)
    y_dot = torch.empty_like(x) if xs_dot else None
    D = x.shape[-1]
    with torch.cuda.device_of(x):
        _rms_norm_fwd_kernel[(x.numel() // D,)](
            x, w, y, x_dot, w_dot, y_dot, D, eps, offset, **_launch_options(x, xs_dot)
        )
    dtype = xs[0].dtype
    return y.to(dtype), None if y_dot is None else y_dot.to(dtype)


def rms_norm_bwd(
    xs: Tensors, xs_dot: Tensors | None, y_bar: Tensor, y_bar_dot: Maybe, *, eps: float, offset: float
) -> tuple[Tensors, Tensors | None]:
    """Return ``xs_bar`` and, given tangents, ``xs_bar_dot``; all of one dtype, x at least one row."""
    x, w, x_dot, w_dot = _prepared(xs, xs_dot)
    y_bar, y_bar_dot, *_ = _prepared((y_bar, y_bar_dot), None)
    D = x.shape[-1]
    R = x.numel() // D
    P = min(R, _num_partials(x))
    wide = torch.promote_types(x.dtype, torch.float32)
    x_bar, w_bar = torch.empty_like(x), torch.empty(P, D, device=x.device, dtype=wide)
    x_bar_dot, w_bar_dot = (torch.empty_like(x_bar), torch.empty_like(w_bar)) if xs_dot else (None, None)
    with torch.cuda.device_of(x):
        _rms_norm_bwd_kernel[(P,)](
            x, w, y_bar, x_bar, w_bar,
            x_dot, w_dot, y_bar_dot, x_bar_dot, w_bar_dot,
            R, D, eps, offset, **_launch_options(x, xs_dot),
        )  # fmt: skip
    dtype = xs[0].dtype
    xs_bar = x_bar.to(dtype), w_bar.sum(0).to(dtype)
    if x_bar_dot is None or w_bar_dot is None:
        return xs_bar, None
    return xs_bar, (x_bar_dot.to(dtype), w_bar_dot.sum(0).to(dtype))


def num_warps(block_d: int) -> int:
    """Return how many warps hold a row of ``block_d``: 16 elements a thread, which just fits up to 4096."""
    return min(max(block_d // 512, 1), 16)


def _prepared(xs: tuple[Any, ...], xs_dot: Tensors | None) -> tuple[Any, ...]:
    """Lay the tensors out as the kernels read them."""
    xs = (*xs, *(xs_dot or (None, None)))
    # The interpreter computes with the bits of bfloat16 as if they were integers.
    if _interpreted() and xs[0].dtype == torch.bfloat16:
        xs = tuple(None if x is None else x.float() for x in xs)
    return tuple(None if x is None else x.contiguous() for x in xs)


def _interpreted() -> bool:
    return not isinstance(_rms_norm_fwd_kernel, triton.JITFunction)


def _num_partials(x: Tensor) -> int:
    # Two programs a multiprocessor hide each other's loads; a guess until a GPU has measured it.
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else NUM_PARTIALS


def _launch_options(x: Tensor, xs_dot: Tensors | None) -> dict[str, Any]:
    block_d = triton.next_power_of_2(x.shape[-1])
    return {
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "HAS_TANGENT": xs_dot is not None,
        "BLOCK_D": block_d,
        "num_warps": num_warps(block_d),
    }
