"""Elementwise functions of one tensor: a Rule from phi, phi' and phi''.

For ``y = phi(x)``, elementwise::

    y_dot = phi'(x) x_dot        x_bar = phi'(x) y_bar        x_bar_dot = phi''(x) x_dot y_bar + phi'(x) y_bar_dot

    silu      s = sigmoid(x)           phi' = s (1 + x (1 - s))       phi'' = s (1 - s) (2 + x (1 - 2 s))
    gelu      Phi, N normal cdf, pdf   phi' = Phi + x N               phi'' = N (2 - x^2)
    gelu_tanh t = tanh(u)              phi' = (1 + t)/2 + x t'/2      phi'' = t' + x/2 ((1 - t^2) u'' - 2 t t' u')
              u = k (x + c x^3), k = sqrt(2/pi), c = 0.044715, t' = (1 - t^2) u'

(GELU: Hendrycks & Gimpel, 2016, arXiv:1606.08415; SiLU: Elfwing et al., 2017, arXiv:1702.03118.)
A kink (ReLU at 0) has the derivative PyTorch gives it, and the second derivative zero.

The activations have kernels that make one pass over memory a direction, where the eager formulas make ten or more; in
C++ they are exact to a few units in the last place of phi', phi'' and their largest terms, tails included. Both rooms
give the same first-order bits with and without tangents. No GPU has run the Triton kernels yet; Triton's interpreter
and its compiler have.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule

Elementwise = Callable[..., Tensor]


def elementwise(
    name: str, phi: Elementwise, first: Elementwise, second: Elementwise | None, *, compiled: bool = False
) -> Rule:
    """Return the Rule of ``phi`` from its derivatives, ``(x, **options) -> Tensor`` each; None: phi'' is zero.

    ``compiled`` says that there are kernels of that name, which take no options.
    """
    rooms: dict[str, Any] = {"eager": _eager(phi, first, second)}
    if compiled:
        rooms |= {"native": _native(name), "triton": _triton(name)}

    def room(*tensors):
        x = tensors[0]
        served = x.numel() > 0 and all(t.dtype == x.dtype for t in tensors)
        return rooms[backend_for(*tensors, rooms=rooms if served else ("eager",))]

    def fwd(xs, **options):
        return room(*xs)[0](*xs, None, **options)[0], ()

    def bwd(xs, saved, y_bar, need, **options):
        return room(*xs, y_bar)[1](*xs, None, y_bar, None, (True, False), **options)[:1]

    def fwd_jvp(xs, xs_dot, **options):
        return *room(*xs, *xs_dot)[0](*xs, *xs_dot, **options), ()

    def bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options):
        wanted = need[0], need_dot[0]
        _, backward = room(*xs, *xs_dot, y_bar, y_bar_dot)
        x_bar, x_bar_dot = backward(*xs, *xs_dot, y_bar, y_bar_dot, wanted, **options)
        return (x_bar,), (x_bar_dot,)

    return Rule(name=name, reference=phi, fwd=fwd, bwd=bwd, fwd_jvp=fwd_jvp, bwd_jvp=bwd_jvp)


def _eager(phi, first, second):
    def fwd(x, x_dot, **options):
        return phi(x, **options), None if x_dot is None else first(x, **options) * x_dot

    def bwd(x, x_dot, y_bar, y_bar_dot, wanted, **options):
        slope = first(x, **options)
        x_bar = slope * y_bar if wanted[0] else None
        if x_dot is None:
            return x_bar, None
        x_bar_dot = slope * y_bar_dot
        if second is not None:
            x_bar_dot = torch.addcmul(x_bar_dot, second(x, **options) * y_bar, x_dot)
        return x_bar, x_bar_dot

    return fwd, bwd


def _native(name):
    def fwd(x, x_dot):
        x, x_dot = _contiguous(x, x_dot)
        y, y_dot = torch.empty_like(x), None if x_dot is None else torch.empty_like(x)
        getattr(torch.ops.mamlfast, f"{name}_fwd")(x, x_dot, y, y_dot)
        return y, y_dot

    def bwd(x, x_dot, y_bar, y_bar_dot, wanted):
        x, x_dot, y_bar, y_bar_dot = _contiguous(x, x_dot, y_bar, y_bar_dot)
        x_bar, x_bar_dot = (torch.empty_like(x) if need else None for need in wanted)
        getattr(torch.ops.mamlfast, f"{name}_bwd")(x, x_dot, y_bar, y_bar_dot, x_bar, x_bar_dot)
        return x_bar, x_bar_dot

    return fwd, bwd


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _triton(name):
    def fwd(x, x_dot):
        from mamlfast_kernels.elementwise import elementwise_fwd

        return elementwise_fwd(name, x, x_dot)

    def bwd(x, x_dot, y_bar, y_bar_dot, wanted):
        from mamlfast_kernels.elementwise import elementwise_bwd

        return elementwise_bwd(name, x, x_dot, y_bar, y_bar_dot)

    return fwd, bwd


def silu_reference(x: Tensor) -> Tensor:
    """``x sigmoid(x)``."""
    return F.silu(x)


def _silu_first(x):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_second(x):
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def gelu_reference(x: Tensor) -> Tensor:
    """``x Phi(x)`` with the exact normal cumulative distribution."""
    return F.gelu(x)


def _density(x):
    return torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


def _gelu_first(x):
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * _density(x)


def _gelu_second(x):
    return _density(x) * (2 - x * x)


def gelu_tanh_reference(x: Tensor) -> Tensor:
    """GELU with the tanh approximation; up to 5e-4 away from ``gelu``."""
    return F.gelu(x, approximate="tanh")


_K, _C = (2 / math.pi) ** 0.5, 0.044715


def _tanh_and_slopes(x):
    u_1 = _K * (1 + 3 * _C * x * x)
    t = torch.tanh(_K * (x + _C * x**3))
    return t, (1 - t * t) * u_1, u_1


def _gelu_tanh_first(x):
    t, t_1, _ = _tanh_and_slopes(x)
    return 0.5 * (1 + t) + 0.5 * x * t_1


def _gelu_tanh_second(x):
    t, t_1, u_1 = _tanh_and_slopes(x)
    return t_1 + 0.5 * x * ((1 - t * t) * (6 * _K * _C * x) - 2 * t * t_1 * u_1)


def _tanh_first(x):
    return 1 - torch.tanh(x).square()


def _tanh_second(x):
    t = torch.tanh(x)
    return -2 * t * (1 - t * t)


def _sigmoid_first(x):
    s = torch.sigmoid(x)
    return s * (1 - s)


def _sigmoid_second(x):
    s = torch.sigmoid(x)
    return s * (1 - s) * (1 - 2 * s)


def _positive(x):
    return (x > 0).to(x.dtype)


def relu2_reference(x: Tensor) -> Tensor:
    """``relu(x)^2`` (Primer, So et al., 2021, arXiv:2109.08668)."""
    return torch.relu(x).square()


def power_reference(x: Tensor, *, exponent: int) -> Tensor:
    """``x ** exponent`` for an integer exponent of at least 2."""
    return x**exponent


silu = elementwise("silu", silu_reference, _silu_first, _silu_second, compiled=True)
gelu = elementwise("gelu", gelu_reference, _gelu_first, _gelu_second, compiled=True)
gelu_tanh = elementwise("gelu_tanh", gelu_tanh_reference, _gelu_tanh_first, _gelu_tanh_second, compiled=True)
relu = elementwise("relu", torch.relu, _positive, None, compiled=True)
relu2 = elementwise("relu2", relu2_reference, lambda x: 2 * torch.relu(x), lambda x: 2 * _positive(x), compiled=True)
tanh = elementwise("tanh", torch.tanh, _tanh_first, _tanh_second, compiled=True)
sigmoid = elementwise("sigmoid", torch.sigmoid, _sigmoid_first, _sigmoid_second, compiled=True)
exp = elementwise("exp", torch.exp, torch.exp, torch.exp)
rsqrt = elementwise("rsqrt", torch.rsqrt, lambda x: -0.5 * x**-1.5, lambda x: 0.75 * x**-2.5)
power = elementwise(
    "power",
    power_reference,
    lambda x, exponent: exponent * x ** (exponent - 1),
    lambda x, exponent: exponent * (exponent - 1) * x ** (exponent - 2),
)
