"""Activations to second order on GPUs; the mathematics stands in ``mamlfast/ops/elementwise.py``, in the same names.

One kernel per direction for all of them: ``NAME`` chooses the function when it is compiled, and ``HAS_TANGENT`` adds
the second-order terms and leaves the first-order ones as they are. Arithmetic is ``WIDE``: float32, or float64 for
float64 inputs. In Triton's interpreter the kernels agree with torch.func, and they compile for sm_80, sm_90 and sm_100
without spills. No GPU has run them yet.
"""

# To a type checker the call of one kernel by another never returns.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.launch import prepared, wide

Maybe = Tensor | None

# Elements a program: 8 a thread, so that a half type is loaded 16 bytes at a time.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _sigmoid_pair(x):
    """Return sigmoid(x) and 1 - sigmoid(x), neither from the other."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _slopes(x, NAME: tl.constexpr):
    """Return phi, phi' and phi'' at ``x``."""
    if NAME == "silu":
        s, c = _sigmoid_pair(x)
        return x * s, s * (1.0 + x * c), s * c * (2.0 + x * (c - s))
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        Phi = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))
        return x * Phi, Phi + x * density, density * (2.0 - x * x)
    elif NAME == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(v) with v = 2 u = k (x + a x^3), k = 2 sqrt(2 / pi)
        v_1 = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        v_2 = 0.4281288976356015 * x
        s, c = _sigmoid_pair(1.5957691216057308 * (x + 0.044715 * x * x * x))
        s_1 = s * c * v_1
        s_2 = s * c * ((c - s) * v_1 * v_1 + v_2)
        return x * s, s + x * s_1, 2.0 * s_1 + x * s_2
    elif NAME == "tanh":
        s, c = _sigmoid_pair(2.0 * x)
        t = s - c
        t_1 = 4.0 * s * c
        return t, t_1, -2.0 * t * t_1
    elif NAME == "relu2":
        r = tl.where(x < 0, 0.0, x)
        return r * r, 2.0 * r, tl.where(x > 0, 2.0, 0.0).to(x.dtype)
    elif NAME == "sigmoid":
        s, c = _sigmoid_pair(x)
        return s, s * c, s * c * (c - s)
    else:
        tl.static_assert(NAME == "relu")
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0).to(x.dtype), tl.zeros_like(x)


@triton.jit
def _elementwise_fwd_kernel(
    x_ptr, y_ptr, x_dot_ptr, y_dot_ptr,  # (N,); those with tangents are touched only if HAS_TANGENT
    N,
    NAME: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    phi, phi_1, _ = _slopes(tl.load(x_ptr + at, mask, 0.0).to(WIDE), NAME)
    tl.store(y_ptr + at, phi, mask)
    if HAS_TANGENT:
        x_dot = tl.load(x_dot_ptr + at, mask, 0.0).to(WIDE)
        tl.store(y_dot_ptr + at, phi_1 * x_dot, mask)


@triton.jit
def _elementwise_bwd_kernel(
    x_ptr, y_bar_ptr, x_bar_ptr, x_dot_ptr, y_bar_dot_ptr, x_bar_dot_ptr,  # (N,), as above
    N,
    NAME: tl.constexpr, WIDE: tl.constexpr, HAS_TANGENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    _, phi_1, phi_2 = _slopes(tl.load(x_ptr + at, mask, 0.0).to(WIDE), NAME)
    y_bar = tl.load(y_bar_ptr + at, mask, 0.0).to(WIDE)
    tl.store(x_bar_ptr + at, phi_1 * y_bar, mask)
    if HAS_TANGENT:
        x_dot = tl.load(x_dot_ptr + at, mask, 0.0).to(WIDE)
        y_bar_dot = tl.load(y_bar_dot_ptr + at, mask, 0.0).to(WIDE)
        tl.store(x_bar_dot_ptr + at, phi_2 * (x_dot * y_bar) + phi_1 * y_bar_dot, mask)


def elementwise_fwd(name: str, x: Tensor, x_dot: Maybe) -> tuple[Tensor, Maybe]:
    """Return ``y`` and, given a tangent, ``y_dot``, for the activation ``name``; any shape that is not empty."""
    dtype, options = x.dtype, _launch_options(name, x, x_dot)
    x, x_dot = prepared(x, x_dot)
    y, y_dot = torch.empty_like(x), None if x_dot is None else torch.empty_like(x)
    N = x.numel()
    with torch.cuda.device_of(x):
        _elementwise_fwd_kernel[(triton.cdiv(N, BLOCK),)](x, y, x_dot, y_dot, N, **options)
    return y.to(dtype), None if y_dot is None else y_dot.to(dtype)


def elementwise_bwd(name: str, x: Tensor, x_dot: Maybe, y_bar: Tensor, y_bar_dot: Maybe) -> tuple[Tensor, Maybe]:
    """Return ``x_bar`` and, given tangents, ``x_bar_dot``, for the activation ``name``; one shape for all."""
    dtype, options = x.dtype, _launch_options(name, x, x_dot)
    x, x_dot, y_bar, y_bar_dot = prepared(x, x_dot, y_bar, y_bar_dot)
    x_bar, x_bar_dot = torch.empty_like(x), None if x_dot is None else torch.empty_like(x)
    N = x.numel()
    with torch.cuda.device_of(x):
        _elementwise_bwd_kernel[(triton.cdiv(N, BLOCK),)](x, y_bar, x_bar, x_dot, y_bar_dot, x_bar_dot, N, **options)
    return x_bar.to(dtype), None if x_bar_dot is None else x_bar_dot.to(dtype)


def _launch_options(name, x, x_dot):
    return {"NAME": name, "WIDE": wide(x), "HAS_TANGENT": x_dot is not None, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
