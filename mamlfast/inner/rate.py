"""Learning rates: fixed or learned, one for all or one for each parameter, element or step.

A rate is a float (fixed) or a tensor (learned: its gradient is computed). A learning rate is one rate, or a dict with
one for each parameter, or a list with one of these for each inner step. A tensor is a scalar or has the shape of its
parameter (Meta-SGD: Li et al., 2017, arXiv:1707.09835); a list of dicts of scalars is the per-layer per-step rate of
MAML++ (Antoniou et al., 2019, arXiv:1810.09502).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mamlfast.tree import Params

Rate = float | Tensor
OneStep = Rate | Mapping[str, Rate]
LearningRate = OneStep | list[OneStep] | tuple[OneStep, ...]

# Where a rate stands: its step, if there is a list, and its parameter, if there is a dict.
Place = tuple[int | None, str | None]


def rate_at(lr: LearningRate, k: int, name: str) -> Rate:
    """Return the rate of parameter ``name`` at inner step ``k``."""
    one = lr[k] if isinstance(lr, (list, tuple)) else lr
    return one[name] if isinstance(one, Mapping) else one


def place_at(lr: LearningRate, k: int, name: str) -> Place:
    """Return where that rate stands."""
    listed = isinstance(lr, (list, tuple))
    return k if listed else None, name if isinstance(lr[k] if listed else lr, Mapping) else None


def learned(lr: LearningRate) -> dict[Place, Tensor]:
    """Return the tensors by the place where they stand."""
    found: dict[Place, Tensor] = {}

    def note(place, rate):
        if isinstance(rate, Tensor):
            found[place] = rate
        return rate

    mapped(lr, note)
    return found


def mapped(lr: LearningRate, change: Callable[[Place, Any], Any]) -> Any:
    """Return the learning rate with ``change(place, rate)`` for each of its rates."""
    if isinstance(lr, (list, tuple)):
        return [_mapped_step(one, k, change) for k, one in enumerate(lr)]
    return _mapped_step(lr, None, change)


def _mapped_step(one, k, change):
    if isinstance(one, Mapping):
        return {name: change((k, name), rate) for name, rate in one.items()}
    return change((k, None), one)


def check_rates(lr: LearningRate) -> None:
    """Raise TypeError where a rate is neither number nor tensor, ValueError where it is not finite, or < 0 as a number.

    A learned rate may be negative: Meta-SGD learns the direction of a step too.
    """
    if isinstance(lr, (list, tuple)) and not lr:
        raise ValueError("lr must hold one entry for each inner step; got an empty list")
    mapped(lr, _check_rate)


def _check_rate(place, rate):
    label = _label(place)
    if isinstance(rate, Tensor):
        if not rate.is_floating_point():
            raise TypeError(f"{label} must be a number or a floating-point tensor; got a tensor of {rate.dtype}")
        if not torch.isfinite(rate.detach()).all():
            raise ValueError(f"{label} must be finite; the tensor has entries that are not")
    else:
        check_number(rate, label)


def _label(place):
    return "lr" + "".join(f"[{key!r}]" for key in place if key is not None)


def check_number(x: Any, label: str) -> None:
    """Raise TypeError unless ``x`` is a number, ValueError unless it is finite and not negative."""
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        raise TypeError(f"{label} must be a number; got {type(x).__name__}")
    if not math.isfinite(x) or x < 0:
        raise ValueError(f"{label} must be finite and not negative; got {x}")


def check_rates_for(lr: LearningRate, params: Params, steps: int) -> None:
    """Raise ValueError unless a list has ``steps`` entries and dicts and tensors match the parameters."""
    check_rates(lr)
    if isinstance(lr, (list, tuple)) and len(lr) != steps:
        raise ValueError(f"lr must hold one entry for each of the {steps} inner steps; got {len(lr)}")
    for one in lr if isinstance(lr, (list, tuple)) else [lr]:
        if isinstance(one, Mapping) and one.keys() != params.keys():
            missing, extra = sorted(params.keys() - one.keys()), sorted(one.keys() - params.keys())
            raise ValueError(f"lr must have the keys of params; missing {missing}, unexpected {extra}")
    for place, rate in learned(lr).items():
        if rate.ndim:
            _check_shape(place, rate, params)


def _check_shape(place, rate, params):
    name = place[1]
    if name is None:
        raise ValueError(
            f"{_label(place)} must be a scalar, or a dict with a tensor for each parameter; got {tuple(rate.shape)}"
        )
    p = params[name]
    if rate.shape != p.shape or rate.dtype != p.dtype:
        raise ValueError(
            f"{_label(place)} must be a scalar, or have the shape and dtype of params[{name!r}], {tuple(p.shape)} "
            f"{p.dtype}; got {tuple(rate.shape)} {rate.dtype}"
        )


class RateGradients:
    """The gradients of the learned rates, summed over parameters and steps that share one."""

    def __init__(self, lr: LearningRate):
        self._lr = lr
        self._sums = {place: torch.zeros_like(rate, dtype=_wide(rate)) for place, rate in learned(lr).items()}

    def add(self, k: int, name: str, lr_bar: Tensor | None) -> None:
        """Add the elementwise gradient of the rate of parameter ``name`` at step ``k``."""
        if lr_bar is not None:
            total = self._sums[place_at(self._lr, k, name)]
            total += lr_bar if total.ndim else lr_bar.sum()

    def result(self) -> Any:
        """Return them in the structure of the learning rate, None for a fixed rate; None where all are fixed."""
        if not self._sums:
            return None
        return mapped(self._lr, lambda place, rate: self._sums[place].to(rate.dtype) if place in self._sums else None)


def _wide(t):
    return torch.promote_types(t.dtype, torch.float32)
