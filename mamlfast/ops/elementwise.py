"""Elementwise functions of one tensor: a Rule from phi, phi' and phi''.

For ``y = phi(x)``, elementwise::

    y_dot = phi'(x) x_dot        x_bar = phi'(x) y_bar        x_bar_dot = phi''(x) x_dot y_bar + phi'(x) y_bar_dot

    silu      s = sigmoid(x)           phi' = s (1 + x (1 - s))       phi'' = s (1 - s) (2 + x (1 - 2 s))
    gelu      Phi, N normal cdf, pdf   phi' = Phi + x N               phi'' = N (2 - x^2)
    gelu_tanh t = tanh(u)              phi' = (1 + t)/2 + x t'/2      phi'' = t' + x/2 ((1 - t^2) u'' - 2 t t' u')
              u = k (x + c x^3), k = sqrt(2/pi), c = 0.044715, t' = (1 - t^2) u'

(GELU: Hendrycks & Gimpel, 2016, arXiv:1606.08415; SiLU: Elfwing et al., 2017, arXiv:1702.03118.)
A kink (ReLU at 0) has the derivative PyTorch gives it, and the second derivative zero.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlfast.ops.rule import Rule

Elementwise = Callable[..., Tensor]


def elementwise(name: str, phi: Elementwise, first: Elementwise, second: Elementwise | None) -> Rule:
    """Return the Rule of ``phi`` from its derivatives, ``(x, **options) -> Tensor`` each; None: phi'' is zero."""

    def fwd(xs, **options):
        return phi(*xs, **options), ()

    def bwd(xs, saved, y_bar, need, **options):
        return (first(*xs, **options) * y_bar,)

    def fwd_jvp(xs, xs_dot, **options):
        return phi(*xs, **options), first(*xs, **options) * xs_dot[0], ()

    def bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options):
        slope = first(*xs, **options)
        x_bar_dot = slope * y_bar_dot
        if second is not None:
            x_bar_dot = torch.addcmul(x_bar_dot, second(*xs, **options) * y_bar, xs_dot[0])
        return (slope * y_bar if need[0] else None,), (x_bar_dot,)

    return Rule(name=name, reference=phi, fwd=fwd, bwd=bwd, fwd_jvp=fwd_jvp, bwd_jvp=bwd_jvp)


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


def power_reference(x: Tensor, *, exponent: int) -> Tensor:
    """``x ** exponent`` for an integer exponent of at least 2."""
    return x**exponent


silu = elementwise("silu", silu_reference, _silu_first, _silu_second)
gelu = elementwise("gelu", gelu_reference, _gelu_first, _gelu_second)
gelu_tanh = elementwise("gelu_tanh", gelu_tanh_reference, _gelu_tanh_first, _gelu_tanh_second)
relu = elementwise("relu", torch.relu, _positive, None)
tanh = elementwise("tanh", torch.tanh, _tanh_first, _tanh_second)
sigmoid = elementwise("sigmoid", torch.sigmoid, _sigmoid_first, _sigmoid_second)
exp = elementwise("exp", torch.exp, torch.exp, torch.exp)
rsqrt = elementwise("rsqrt", torch.rsqrt, lambda x: -0.5 * x**-1.5, lambda x: 0.75 * x**-2.5)
power = elementwise(
    "power",
    power_reference,
    lambda x, exponent: exponent * x ** (exponent - 1),
    lambda x, exponent: exponent * (exponent - 1) * x ** (exponent - 2),
)
