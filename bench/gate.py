"""No number for a wrong answer: every contender's meta-gradient against plain double backward.

Twice. On a small model in float64, where exact methods agree to rounding; and at each setting that is timed, in the
float32 of the timing, against whatever only shows at full size.

The error of a gradient is that of its worst parameter, ``max_p |g_p - g*_p| / |g*_p|`` in 2-norms, so that no large
parameter hides a small one. First order must fail: a gate that lets it through proves nothing.
"""

from functools import cache

import torch

from bench.contenders import DOUBLE_BACKWARD, FLOOR, Contender, Gradient
from bench.models import TINY, Setting

# Llama casts norms, rotary tables and softmax to float32 even in a float64 model: two exact methods differ by about
# 1e-7 there.
FLOAT64_THRESHOLD = 1e-6
# Rounding through hundreds of operations; first order is off by more than 1e-1.
FLOAT32_THRESHOLD = 1e-3

SETTING = Setting(shape=TINY, steps=2, batch=2, tokens=24)


class WrongResult(AssertionError):
    """A contender's meta-gradient is not what the contender is listed as."""


def error(gradient: Gradient, oracle: Gradient) -> float:
    """The relative error of the worst parameter, infinite where one is not finite.

    Raises WrongResult where names or shapes differ.
    """
    if {n: g.shape for n, g in gradient.items()} != {n: g.shape for n, g in oracle.items()}:
        raise WrongResult(f"a meta-gradient must have the model's parameters; got {sorted(gradient)[:5]} ...")
    errors = torch.stack([(gradient[name] - g).norm() / g.norm() for name, g in oracle.items()])
    return float(errors.nan_to_num(nan=torch.inf).max())


def judge(contender: Contender, found: float, threshold: float) -> float:
    """Return the error ``found`` if it is what the contender is listed as; raise WrongResult if it is not."""
    if contender.exact and found > threshold:
        raise WrongResult(
            f"{contender.name} must agree with double backward to {threshold:g}; it is {found:.1e} off: "
            f"it gets no number"
        )
    if not contender.exact and found <= threshold:
        raise WrongResult(
            f"{contender.name} must be told from an exact meta-gradient; it is only {found:.1e} off: "
            f"this gate proves nothing"
        )
    return found


@cache
def examine(contender: Contender) -> float:
    """Return the contender's error on the small model in float64; raise WrongResult as ``judge`` does."""
    oracle = DOUBLE_BACKWARD.prepared(SETTING, model_of(DOUBLE_BACKWARD))()
    found = error(contender.prepared(SETTING, model_of(contender))(), oracle)
    return judge(contender, found, FLOAT64_THRESHOLD)


def admit(contender: Contender) -> float:
    """Return the error of a contender that may be measured, after first order has shown that the gate can fail."""
    examine(FLOOR)
    return examine(contender)


def model_of(contender: Contender):
    """The small model, in float64, with the contender's attention."""
    return SETTING.shape.model(attention=contender.attention, dtype=torch.float64)
