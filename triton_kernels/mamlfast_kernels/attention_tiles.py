"""What the kernels of attention do with one tile, and how large a tile is on which GPU."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    base, first, N, stride: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) of an (N, COLS) matrix with zeros around it; FULL: all of them are below N."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK_COLS)
    ptrs = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if FULL and COLS == BLOCK_COLS:
        return tl.load(ptrs)
    elif FULL:
        return tl.load(ptrs, cols[None, :] < COLS, 0.0)
    elif COLS == BLOCK_COLS:
        return tl.load(ptrs, first + rows[:, None] < N, 0.0)
    else:
        return tl.load(ptrs, (first + rows[:, None] < N) & (cols[None, :] < COLS), 0.0)


@triton.jit
def store_tile(
    base, x, first, N, stride: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK_COLS)
    ptrs = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.store(ptrs, x.to(base.dtype.element_ty), (first + rows[:, None] < N) & (cols[None, :] < COLS))


@triton.jit
def dot(a, b, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def dot_dot(a, a_dot, b, b_dot, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """The tangent of the product ``a b``."""
    tangent = tl.dot(a_dot, b, input_precision=PRECISION, out_dtype=WIDE)
    return tl.dot(a, b_dot, tangent, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def capped(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """t, of which the scores are SCALE times as much, or SOFTCAP times if there is one."""
    if SOFTCAP == 0.0:
        return z
    else:  # tanh, which Triton has only in a library of the GPU
        e = tl.exp2(tl.abs(z) * (-2.0 * SCALE / SOFTCAP * LOG2E))
        return tl.where(z < 0, e - 1.0, 1.0 - e) / (1.0 + e)


@triton.jit
def capped_dot(t, z_dot, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """The tangent of the scores."""
    if SOFTCAP == 0.0:
        return SCALE * z_dot
    else:
        return (1.0 - t * t) * (SCALE * z_dot)


@triton.jit
def capped_bar(t, s_bar, SOFTCAP: tl.constexpr):
    """The cotangent of the scaled product, given that of the scores."""
    if SOFTCAP == 0.0:
        return s_bar
    else:
        return (1.0 - t * t) * s_bar


@triton.jit
def capped_bar_dot(t, s_dot, s_bar, s_bar_dot, SOFTCAP: tl.constexpr):
    """Its tangent."""
    if SOFTCAP == 0.0:
        return s_bar_dot
    else:
        return (1.0 - t * t) * s_bar_dot - (2.0 / SOFTCAP) * t * s_dot * s_bar


@triton.jit
def load_lse2(base, rows, N):
    """The log-sum-exp of rows in units of log 2; of those without a visible key +inf, which makes every p zero."""
    lse = tl.load(base + rows, rows < N, 0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
