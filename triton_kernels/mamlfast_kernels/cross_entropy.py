"""Cross-entropy over rows of logits to second order on GPUs; the mathematics stands in
``mamlfast/ops/cross_entropy.py``, in the same names.

A program of the forward visits one row, a block of the vocabulary at a time, and rescales its sums when the maximum
grows; one of the backward writes one block of one row. Ignored rows are never read. ``HAS_TANGENT`` adds the
second-order terms and leaves the first-order ones as they are. Nothing is added up across programs.

Arithmetic and row statistics are ``WIDE``: float32, or float64 for float64 logits. In Triton's interpreter the
kernels agree with torch.func, and they compile for sm_80, sm_90 and sm_100 without spills. No GPU has run them yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.launch import interpreted, prepared, wide, wide_dtype

Maybe = Tensor | None

# Logits a program holds at a time; 8 warps then have 16 a thread. A guess until a GPU has measured it.
BLOCK_V, NUM_WARPS = 4096, 8
# The interpreter pays for elements, so that odd sizes of a few blocks are cheap only in small ones.
INTERPRETED_BLOCK_V = 32


@triton.jit
def _cross_entropy_fwd_kernel(
    z_ptr, z_dot_ptr, target_ptr,  # (R, V), (R, V), (R,); what has a tangent is touched only if HAS_TANGENT
    nll_ptr, lse_ptr, nll_dot_ptr, mu_ptr,  # (R,)
    V,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr,
    WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + pid)
    live = label != IGNORE
    row = pid * V
    end = tl.where(live, V, 0)
    cols = tl.arange(0, BLOCK_V)
    m = tl.full([], float("-inf"), WIDE)
    total = tl.full([], 0.0, WIDE)
    total_dot = tl.full([], 0.0, WIDE)
    sum_z = tl.full([], 0.0, WIDE)
    sum_z_dot = tl.full([], 0.0, WIDE)

    first = end * 0
    while first < end:  # the interpreter of Triton 3.6 has no range over run-time bounds
        mask = first + cols < V
        z = tl.load(z_ptr + row + first + cols, mask, float("-inf")).to(WIDE)
        m_new = tl.maximum(m, tl.max(z))
        # As long as all logits are -inf any finite number will do.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        e, scale = tl.exp(z - shift), tl.exp(m - shift)
        total = total * scale + tl.sum(e)
        if SMOOTHING != 0.0:
            sum_z += tl.sum(tl.where(mask, z, 0.0))
        if HAS_TANGENT:
            z_dot = tl.load(z_dot_ptr + row + first + cols, mask, 0.0).to(WIDE)
            total_dot = total_dot * scale + tl.sum(e * z_dot)
            if SMOOTHING != 0.0:
                sum_z_dot += tl.sum(z_dot)
        m = m_new
        first += BLOCK_V

    total = tl.where(live, total, 1.0)
    lse = m + tl.log(total)
    # A label outside the vocabulary is NaN, and not what lies beside the row.
    known = (label >= 0) & (label < V)
    picked = tl.load(z_ptr + row + label, known, float("nan")).to(WIDE)
    expected = (1.0 - SMOOTHING) * picked + SMOOTHING * (sum_z / V)
    tl.store(lse_ptr + pid, tl.where(live, lse, 0.0))
    tl.store(nll_ptr + pid, tl.where(live, lse - expected, 0.0))
    if HAS_TANGENT:
        mu = total_dot / total
        picked_dot = tl.load(z_dot_ptr + row + label, known, float("nan")).to(WIDE)
        expected_dot = (1.0 - SMOOTHING) * picked_dot + SMOOTHING * (sum_z_dot / V)
        tl.store(mu_ptr + pid, tl.where(live, mu, 0.0))
        tl.store(nll_dot_ptr + pid, tl.where(live, mu - expected_dot, 0.0))


@triton.jit
def _cross_entropy_bwd_kernel(
    z_ptr, z_dot_ptr, target_ptr, z_bar_ptr, z_bar_dot_ptr,  # (R, V), (R, V), (R,), (R, V), (R, V)
    lse_ptr, mu_ptr, g_ptr, g_dot_ptr,  # (R,)
    V,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr,
    WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + pid)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    read = cols < tl.where(label != IGNORE, V, 0)  # nothing of an ignored row
    row = pid * V
    g = tl.load(g_ptr + pid).to(WIDE)

    z = tl.load(z_ptr + row + cols, read, 0.0).to(WIDE)
    p = tl.exp(z - tl.load(lse_ptr + pid).to(WIDE))
    uniform = tl.full([], SMOOTHING, WIDE) / V
    difference = p - uniform - (1.0 - SMOOTHING) * (cols == label).to(WIDE)
    tl.store(z_bar_ptr + row + cols, tl.where(read, g * difference, 0.0), mask)
    if HAS_TANGENT:
        z_dot = tl.load(z_dot_ptr + row + cols, read, 0.0).to(WIDE)
        g_dot, mu = tl.load(g_dot_ptr + pid).to(WIDE), tl.load(mu_ptr + pid).to(WIDE)
        z_bar_dot = g_dot * difference + g * (p * (z_dot - mu))
        tl.store(z_bar_dot_ptr + row + cols, tl.where(read, z_bar_dot, 0.0), mask)


def cross_entropy_fwd(
    z: Tensor, z_dot: Maybe, target: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """Return nll, nll_dot, lse, mu [R], in the wide dtype, zero in ignored rows; z [R, V] not empty, target int64.

    Without ``z_dot`` there are no tangents. A label outside the vocabulary makes the numbers of its row NaN.
    """
    options = _launch_options(z, z_dot)
    z, z_dot, target = prepared(z, z_dot, target)
    nll, lse = (z.new_empty(z.shape[0], dtype=wide_dtype(z)) for _ in range(2))
    nll_dot, mu = (None, None) if z_dot is None else (torch.empty_like(nll), torch.empty_like(nll))
    with torch.cuda.device_of(z):
        _cross_entropy_fwd_kernel[(z.shape[0],)](
            z, z_dot, target, nll, lse, nll_dot, mu, z.shape[1], ignore_index, smoothing, **options
        )
    return nll, nll_dot, lse, mu


def cross_entropy_bwd(
    z: Tensor,
    z_dot: Maybe,
    target: Tensor,
    ignore_index: int,
    smoothing: float,
    lse: Tensor,
    mu: Maybe,
    g: Tensor,
    g_dot: Maybe,
) -> tuple[Tensor, Maybe]:
    """Return z_bar and, given tangents, z_bar_dot; lse, mu, g and g_dot [R] hold one number a row."""
    dtype, options = z.dtype, _launch_options(z, z_dot)
    z, z_dot, target = prepared(z, z_dot, target)
    lse, mu, g, g_dot = prepared(lse, mu, g, g_dot)
    z_bar = torch.empty_like(z)
    z_bar_dot = None if z_dot is None else torch.empty_like(z)
    grid = (z.shape[0], triton.cdiv(z.shape[1], options["BLOCK_V"]))
    with torch.cuda.device_of(z):
        _cross_entropy_bwd_kernel[grid](
            z, z_dot, target, z_bar, z_bar_dot, lse, mu, g, g_dot, z.shape[1], ignore_index, smoothing, **options
        )
    return z_bar.to(dtype), None if z_bar_dot is None else z_bar_dot.to(dtype)


def _launch_options(z, z_dot):
    block = INTERPRETED_BLOCK_V if interpreted() else min(BLOCK_V, triton.next_power_of_2(z.shape[1]))
    return {
        "WIDE": wide(z),
        "HAS_TANGENT": z_dot is not None,
        "BLOCK_V": block,
        "num_warps": max(1, block * NUM_WARPS // BLOCK_V),
    }
