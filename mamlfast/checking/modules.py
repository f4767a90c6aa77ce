"""What can be said of one module of a model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamlfast.checking.costs import Costs, measure
from mamlfast.checking.derivatives import SMALL, Point, Second, halves, leaves, vjp
from mamlfast.checking.differences import dot, error, norm
from mamlfast.checking.functions import ForeignFunction, answers, foreign_functions, rooms_seen
from mamlfast.checking.pieces import Piece
from mamlfast.checking.result import Claim, ModuleResult
from mamlfast.dual import Dual

# What float64 may differ by from float64.
_ORDER_OF_SUMS = 1e-12
# In its own precision a second derivative may be so many times as far from the oracle's as the first derivative is.
# Measured on seven architectures in float32 and bfloat16: 1 to 5 times.
ROUNDING = 16


def examine(piece: Piece, dtype: torch.dtype, seed: int = 0) -> ModuleResult | None:
    """Compare the second order of a piece, in its own precision and in ``dtype``, with central differences.

    Returns None where it has no derivative.
    """
    if not piece.depending:
        return None
    own = Point(f=piece, xs=piece.xs, seed=seed, still=piece.still)
    point = own.to(piece.to(dtype), dtype)
    oracle = Oracle(point, *point.first_order())
    by_duals, refusal = attempt(point.by_duals)
    by_autograd, fault = attempt(point.by_autograd)
    with rooms_seen() as rooms:
        tangents, _ = attempt(own.tangents)
    rules, derived = answers(tangents or [], rooms)
    return ModuleResult(
        kind=piece.kind,
        paths=tuple(piece.paths),
        engine=oracle.claim("the engine", by_duals, refusal),
        autograd=oracle.claim("double backward", by_autograd, fault),
        own=_own(own, piece.dtype, by_duals) if by_duals else None,
        rules=rules,
        derived=derived,
        functions=tuple(_functions(point)),
        costs=None if refusal else costs_of(piece, seed),
    )


def attempt(f: Callable[[], Any]) -> tuple[Any, str]:
    """Return what ``f`` returns, or None and in one line why it cannot."""
    try:
        return f(), ""
    except (RuntimeError, TypeError, ValueError) as refusal:  # NotImplementedError is a RuntimeError
        return None, " ".join(str(refusal).split())


class Oracle:
    """Central differences of a point, and the claims that they decide."""

    def __init__(self, point: Point, ys: list[Tensor], xs_bar: list[Tensor]):
        self.point, self.ys, self.xs_bar = point, ys, xs_bar
        self.y_dot, self.x_bar_dot = point.by_differences()

    def claim(self, text: str, found: Second | None, reason: str) -> Claim:
        """Say how far ``found`` is from these differences; ``reason`` is why there is nothing found."""
        worst = max(self.y_dot, self.x_bar_dot, key=lambda d: d.uncertainty)
        if found is not None and not worst.settled:
            found, reason = None, f"central differences do not settle: uncertain by {worst.uncertainty:.0%}"
        error = float("inf") if found is None else self._error(found)
        return Claim(text=text, error=error, at_most=worst.tolerance, reason=reason)

    def _error(self, found: Second) -> float:
        point = self.point
        flow = dot(self.y_dot.value, point.c) - dot(found.xs_bar, point.v)  # <J v, c> = <v, J' c>
        return max(
            error(found.ys, self.ys),
            error(found.ys_dot, self.y_dot.value, SMALL * norm(self.ys)),
            error(found.xs_bar, self.xs_bar),
            error(found.xs_bar_dot, self.x_bar_dot.value, SMALL * norm(self.xs_bar)),
            abs(flow) / max(norm(self.xs_bar) * norm(point.v), torch.finfo(torch.float64).tiny),
        )


def _own(own: Point, dtype: torch.dtype, exact: Second) -> Claim:
    """How far the engine is from ``exact`` where it works: in the module's own precision, and its own kernels."""
    found, reason = attempt(own.by_duals)
    text = f"in {shown(dtype)}"
    if found is None:
        return Claim(text=text, error=float("inf"), at_most=0.0, reason=reason)
    first = max(error(found.ys, exact.ys), error(found.xs_bar, exact.xs_bar))
    second = max(
        error(found.ys_dot, exact.ys_dot, SMALL * norm(exact.ys)),
        error(found.xs_bar_dot, exact.xs_bar_dot, SMALL * norm(exact.xs_bar)),
    )
    return Claim(text=text, error=second, at_most=rounding_allowed(first, dtype))


def rounding_allowed(first: float, dtype: torch.dtype) -> float:
    """The error that a second derivative in ``dtype`` may have where the first derivative has the error ``first``."""
    return min(max(ROUNDING * max(first, torch.finfo(dtype).eps), _ORDER_OF_SUMS), 0.5)


def shown(dtype: torch.dtype) -> str:
    """The name of a dtype."""
    return str(dtype).removeprefix("torch.")


def _functions(point: Point) -> list[ForeignFunction]:
    xs = leaves(point.xs)
    with torch.enable_grad():
        return foreign_functions(point.f([x.clone() for x in xs]), xs, point.c)


def costs_of(piece: Piece, seed: int = 0) -> Costs:
    """What a module costs in the midst of a model: tangents of its inputs need a cotangent, those of weights none."""
    point, inputs = Point(f=piece, xs=piece.xs, seed=seed), len(piece.places)
    c, c_dot = point.c, point.c_dot

    def gradient():
        xs = leaves(point.xs)
        return partial(vjp, piece.bare(_results(xs, inputs)), xs, c)

    def hvp():
        xs, v = leaves(point.xs), [*leaves(point.v[:inputs]), *point.v[inputs:]]
        pairs = zip(_results(xs, inputs), _results(v, inputs), strict=True)
        tangents, primals = halves(piece.bare([Dual(x, t) for x, t in pairs]))
        return partial(vjp, [*tangents, *primals], [*xs, *v[:inputs]], [*c, *c_dot])

    with piece.world(), torch.enable_grad():
        return measure(gradient, hvp, [*point.xs, *point.v], point.xs[0].device)


def _results(xs, inputs):
    """The inputs as results of something, as in a model: they count as saved, and may be changed in place."""
    return [x.clone() if i < inputs else x for i, x in enumerate(xs)]
