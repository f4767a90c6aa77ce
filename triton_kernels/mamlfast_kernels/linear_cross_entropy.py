"""The row arithmetic of the fused linear + cross-entropy to second order on GPUs; the mathematics stands in
``mamlfast/ops/linear_cross_entropy.py``, in the same names.

The logits of a chunk of rows come out of a matrix product, and their cotangents take their place for the next ones. A
program of the forward visits one row, a block of the vocabulary at a time, and rescales its sums when the maximum
grows; one of the backward overwrites one block of one row. No label is ignored: such rows never come here.
``HAS_TANGENT`` adds the second-order terms and leaves the first-order ones as they are. Nothing is added up across
programs.

Arithmetic and row statistics are ``WIDE``: float32, or float64 for float64 logits. In Triton's interpreter the
kernels agree with torch.func, and they compile for sm_80, sm_90 and sm_100 without spills. No GPU has run them yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.launch import interpreted, prepared, wide, wide_dtype

Maybe = Tensor | None

# Logits a program holds at a time; 8 warps then have 8 a thread, and no kernel needs more than 64 registers. A guess
# until a GPU has measured it.
BLOCK_V, NUM_WARPS = 2048, 8
# The interpreter pays for elements, so that odd sizes of a few blocks are cheap only in small ones.
INTERPRETED_BLOCK_V = 32


@triton.jit
def _tanh(x):
    """tanh and its slope, neither from the other: with e = exp(-2 |x|), (1 - e) / (1 + e) and 4 e / (1 + e)^2."""
    e = tl.exp(-2.0 * tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    t = (1.0 - e) * inverse
    return tl.where(x < 0.0, -t, t), 4.0 * e * inverse * inverse


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    z_ptr, z_dot_ptr, target_ptr,  # (R, V), (R, V), (R,); what has a tangent is touched only if HAS_TANGENT
    loss_ptr, lse_ptr, loss_dot_ptr, mu_ptr,  # (R,)
    V,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + pid)
    row = pid * V
    cols = tl.arange(0, BLOCK_V)
    m = tl.full([], float("-inf"), WIDE)
    total = tl.full([], 0.0, WIDE)
    total_dot = tl.full([], 0.0, WIDE)
    # <q, s> and <q, s_dot>. A label outside the vocabulary is NaN.
    known = (label >= 0) & (label < V)
    expected = tl.where(known, tl.full([], 0.0, WIDE), float("nan"))
    expected_dot = expected
    uniform = tl.full([], SMOOTHING, WIDE) / V
    column = label.to(tl.int32)

    first = column * 0
    while first < V:  # the interpreter of Triton 3.6 has no range over run-time bounds
        mask = first + cols < V
        s = tl.load(z_ptr + row + first + cols, mask, float("-inf")).to(WIDE)
        q = tl.where(mask, uniform, 0.0) + (1.0 - SMOOTHING) * (first + cols == column).to(WIDE)
        if HAS_TANGENT:
            s_dot = tl.load(z_dot_ptr + row + first + cols, mask, 0.0).to(WIDE)
        if SOFTCAP != 0.0:
            t, u = _tanh(s / SOFTCAP)
            s = tl.where(mask, SOFTCAP * t, float("-inf"))
            if HAS_TANGENT:
                s_dot = u * s_dot
        m_new = tl.maximum(m, tl.max(s))
        # As long as all logits are -inf any finite number will do.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        e, scale = tl.exp(s - shift), tl.exp(m - shift)
        total = total * scale + tl.sum(e)
        expected += tl.sum(q * tl.where(q != 0.0, s, 0.0))  # zero times -inf would be NaN
        if HAS_TANGENT:
            total_dot = total_dot * scale + tl.sum(e * s_dot)
            expected_dot += tl.sum(q * s_dot)
        m = m_new
        first += BLOCK_V

    lse = m + tl.log(total)
    tl.store(lse_ptr + pid, lse)
    tl.store(loss_ptr + pid, lse - expected + Z_LOSS * lse * lse)
    if HAS_TANGENT:
        mu = total_dot / total
        tl.store(mu_ptr + pid, mu)
        tl.store(loss_dot_ptr + pid, mu - expected_dot + 2.0 * Z_LOSS * lse * mu)


@triton.jit
def _linear_cross_entropy_bwd_kernel(
    z_ptr, z_dot_ptr, target_ptr,  # (R, V), (R, V), (R,); the first two are overwritten
    lse_ptr, mu_ptr, g_ptr, g_dot_ptr,  # (R,)
    V,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + pid)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    row = pid * V
    g, lse = tl.load(g_ptr + pid).to(WIDE), tl.load(lse_ptr + pid).to(WIDE)

    s = tl.load(z_ptr + row + cols, mask, 0.0).to(WIDE)
    if SOFTCAP != 0.0:
        t, u = _tanh(s / SOFTCAP)
        s = SOFTCAP * t
    p = tl.exp(s - lse)
    a = 1.0 + 2.0 * Z_LOSS * lse
    difference = a * p - tl.full([], SMOOTHING, WIDE) / V - (1.0 - SMOOTHING) * (cols == label.to(tl.int32)).to(WIDE)
    s_bar = g * difference
    if HAS_TANGENT:
        s_dot = tl.load(z_dot_ptr + row + cols, mask, 0.0).to(WIDE)
        g_dot, mu = tl.load(g_dot_ptr + pid).to(WIDE), tl.load(mu_ptr + pid).to(WIDE)
        if SOFTCAP != 0.0:
            s_dot = u * s_dot
        s_bar_dot = g_dot * difference + g * (p * (a * (s_dot - mu) + 2.0 * Z_LOSS * mu))
        if SOFTCAP != 0.0:
            s_bar_dot = u * s_bar_dot - 2.0 / SOFTCAP * t * s_dot * s_bar
        tl.store(z_dot_ptr + row + cols, s_bar_dot, mask)
    if SOFTCAP != 0.0:
        s_bar = u * s_bar
    tl.store(z_ptr + row + cols, s_bar, mask)


def linear_cross_entropy_fwd(
    z: Tensor, z_dot: Maybe, target: Tensor, smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """Return lse, mu, loss, loss_dot [R] in the wide dtype; z [R, V] not empty, target int64, ``softcap`` 0.0 for none.

    Without ``z_dot`` there are no tangents. A label outside the vocabulary makes the losses of its row NaN.
    """
    options = _launch_options(z, z_dot)
    z, z_dot, target = prepared(z, z_dot, target)
    loss, lse = (z.new_empty(z.shape[0], dtype=wide_dtype(z)) for _ in range(2))
    loss_dot, mu = (None, None) if z_dot is None else (torch.empty_like(loss), torch.empty_like(loss))
    with torch.cuda.device_of(z):
        _linear_cross_entropy_fwd_kernel[(z.shape[0],)](
            z, z_dot, target, loss, lse, loss_dot, mu, z.shape[1], smoothing, z_loss, softcap, **options
        )
    return lse, mu, loss, loss_dot


def linear_cross_entropy_bwd(
    z: Tensor,
    z_dot: Maybe,
    target: Tensor,
    lse: Tensor,
    mu: Maybe,
    g: Tensor,
    g_dot: Maybe,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Maybe]:
    """Return z_bar and, given tangents, z_bar_dot, which may take the memory of z and z_dot.

    lse, mu, g and g_dot [R] hold one number a row.
    """
    dtype, options = z.dtype, _launch_options(z, z_dot)
    z, z_dot, target = prepared(z, z_dot, target)
    lse, mu, g, g_dot = prepared(lse, mu, g, g_dot)
    grid = (z.shape[0], triton.cdiv(z.shape[1], options["BLOCK_V"]))
    with torch.cuda.device_of(z):
        _linear_cross_entropy_bwd_kernel[grid](
            z, z_dot, target, lse, mu, g, g_dot, z.shape[1], smoothing, z_loss, softcap, **options
        )
    return z.to(dtype), None if z_dot is None else z_dot.to(dtype)


def _launch_options(z, z_dot):
    block = INTERPRETED_BLOCK_V if interpreted() else min(BLOCK_V, triton.next_power_of_2(z.shape[1]))
    return {
        "WIDE": wide(z),
        "HAS_TANGENT": z_dot is not None,
        "BLOCK_V": block,
        "num_warps": max(1, block * NUM_WARPS // BLOCK_V),
    }
