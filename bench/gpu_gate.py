"""No number for a wrong answer: kernels against float64, next to plain PyTorch in the precision of the kernels.

A result is right if its error, the largest and the mean one, is at most twice that of the same formula in PyTorch at
the same dtype, plus one rounding of the result; and if it is finite wherever the exact result is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp

Function = Callable[..., Tensor]
Results = dict[str, Tensor]

FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A function, the names of its inputs, these, their tangents, the cotangent of its output and its tangent."""

    names: tuple[str, ...]
    xs: tuple[Tensor, ...]
    xs_dot: tuple[Tensor, ...]
    y_bar: Tensor
    y_bar_dot: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same in another precision."""
        xs, xs_dot = (tuple(x.to(dtype) for x in group) for group in (self.xs, self.xs_dot))
        return Problem(
            names=self.names, xs=xs, xs_dot=xs_dot, y_bar=self.y_bar.to(dtype), y_bar_dot=self.y_bar_dot.to(dtype)
        )


def results(f: Function, problem: Problem) -> Results:
    """``y``, ``y_dot``, and ``x_bar``, ``x_bar_dot`` for each input x, by forward mode over reverse mode."""

    def pullback(xs, y_bar):
        return vjp(f, *xs)[1](y_bar)

    p = problem
    y, y_dot, *_ = jvp(f, p.xs, p.xs_dot)
    bars, bar_dots, *_ = jvp(pullback, (p.xs, p.y_bar), (p.xs_dot, p.y_bar_dot))
    return named(p.names, y, y_dot, bars, bar_dots)


def named(names: tuple[str, ...], y: Tensor, y_dot: Tensor | None, bars, bar_dots) -> Results:
    """Results under their names; without tangents those with a tangent are left out."""
    found = {"y": y} | {f"{name}_bar": bar for name, bar in zip(names, bars, strict=True)}
    if y_dot is not None:
        found |= {"y_dot": y_dot} | {f"{name}_bar_dot": bar for name, bar in zip(names, bar_dots, strict=True)}
    return found


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result that came closest to its limit: error over limit, and what was found."""

    passed: bool
    worst: str
    share: float
    errors: dict[str, list[float]]  # by result: largest and mean error of the kernels, then of PyTorch


def judge(got: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Verdict:
    """Compare what kernels and PyTorch made of one problem with the exact results. Those in ``got`` count.

    Raises ValueError where there is nothing to compare, or a shape is another.
    """
    if not got:
        raise ValueError("there is nothing to compare: the kernels gave no results")
    errors, shares = {}, {}
    for name, x in got.items():
        if x.shape != exact[name].shape:
            raise ValueError(f"{name} must have the shape {tuple(exact[name].shape)}, got {tuple(x.shape)}")
        allowance = torch.finfo(x.dtype).eps * exact[name].abs()
        ours, theirs = _errors(x, exact[name]), _errors(eager[name], exact[name])
        rounding = (float(allowance.max()), float(allowance.mean()))
        limits = [FACTOR * e + r for e, r in zip(theirs, rounding, strict=True)]
        shares[name] = max(_share(e, limit) for e, limit in zip(ours, limits, strict=True))
        errors[name] = [*ours, *theirs]
    worst = max(shares, key=lambda name: shares[name])
    return Verdict(passed=shares[worst] <= 1.0, worst=worst, share=shares[worst], errors=errors)


def _errors(x, exact):
    error = (x.double() - exact.double()).abs().nan_to_num(nan=torch.inf)
    return float(error.max()), float(error.mean())


def _share(error, limit):
    """Error over limit; infinite where PyTorch itself is not finite, for then nothing is known."""
    if not limit < float("inf"):
        return float("inf")
    return error / limit if limit > 0 else (0.0 if error == 0 else float("inf"))
