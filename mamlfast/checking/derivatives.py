"""One function differentiated in three ways: by the engine, by plain autograd, by central differences.

For ``ys = f(xs)``, tangents v of the xs, cotangents c of the ys that move along c_dot, all three return ::

    y    y_dot = J v    x_bar = J' c    x_bar_dot = d(J' c)[v] + J' c_dot

which is everything that a module inside a model is asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamlfast.checking.differences import Differences, Vector, central_differences, direction, norm
from mamlfast.dual import Dual

# A derivative that is so much smaller than what it is the derivative of, along a step as large as the point, is zero.
SMALL = 1e-3

Function = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Second:
    """The values of the four, each a list of tensors."""

    ys: list[Tensor]
    ys_dot: list[Tensor]
    xs_bar: list[Tensor]
    xs_bar_dot: list[Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A function, where it is differentiated, and along what."""

    f: Function
    xs: list[Tensor]
    seed: int = 0
    still: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def v(self) -> list[Tensor]:
        """Tangents as large as the operands."""
        return direction(self.xs, self.seed, self.still)

    @cached_property
    def c(self) -> list[Tensor]:
        """Cotangents of order one."""
        return direction([torch.ones_like(y) for y in self._plain_ys()], self.seed + 1)

    @cached_property
    def c_dot(self) -> list[Tensor]:
        """Their tangents."""
        return direction(self.c, self.seed + 2)

    def _plain_ys(self):
        return [y.detach() for y in self.f(leaves(self.xs))]

    def to(self, f: Function, dtype: torch.dtype) -> "Point":
        """The same point and directions, rounded to another precision, of ``f`` in that precision."""
        point = Point(f=f, xs=[x.to(dtype) for x in self.xs], seed=self.seed)
        directions = {name: [t.to(dtype) for t in getattr(self, name)] for name in ("v", "c", "c_dot")}
        vars(point).update(directions)
        return point

    def first_order(self, t: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
        """``ys`` and ``J' c``, both ``t`` along the way."""
        xs = leaves([x + t * v for x, v in zip(self.xs, self.v, strict=True)])
        c = [c + t * c_dot for c, c_dot in zip(self.c, self.c_dot, strict=True)]
        with torch.enable_grad():
            ys = self.f([x.clone() for x in xs])
            return [y.detach() for y in ys], vjp(ys, xs, c)

    def by_differences(self) -> tuple[Differences, Differences]:
        """``y_dot`` and ``x_bar_dot``, each with its uncertainty."""
        scales = [SMALL * norm(vector) for vector in self.first_order()]
        y_dot, x_bar_dot = central_differences(self.first_order, self.xs[0].dtype, scales)
        return y_dot, x_bar_dot

    def by_duals(self) -> Second:
        """As the engine does it."""
        xs, v = leaves(self.xs), leaves(self.v)
        with torch.enable_grad():
            tangents, primals = halves(self.f(_duals(xs, v)))
            bars = vjp([*tangents, *primals], [*xs, *v], [*self.c, *self.c_dot])
        return Second(ys=primals, ys_dot=tangents, xs_bar=bars[len(xs) :], xs_bar_dot=bars[: len(xs)])

    def tangents(self) -> list[Tensor]:
        """``y_dot`` as the engine computes it, with its graph."""
        with torch.enable_grad():
            return halves(self.f(_duals(leaves(self.xs), leaves(self.v))))[0]

    def by_autograd(self) -> Second:
        """As ``create_graph=True`` does it: two nested reverse passes."""
        xs, c = leaves(self.xs), leaves(self.c)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            ys = self.f([x.clone() for x in xs])
            xs_bar = vjp(ys, xs, c, create_graph=True)
            second = vjp([*xs_bar, *ys], [*xs, *c], [*self.v, *self.c_dot])
        return Second(ys=ys, ys_dot=second[len(xs) :], xs_bar=xs_bar, xs_bar_dot=second[: len(xs)])


def _duals(xs, v) -> list[Tensor]:
    """Of clones, because a module may change its argument in place, which a leaf does not allow."""
    return [Dual(x.clone(), t.clone()) for x, t in zip(xs, v, strict=True)]


def leaves(tensors: Vector) -> list[Tensor]:
    """The same tensors at the beginning of a new graph."""
    return [t.detach().requires_grad_() for t in tensors]


def halves(ys: Vector) -> tuple[list[Tensor], list[Tensor]]:
    """Tangents and primals; a plain tensor is a constant."""
    tangents = [y.tangent if isinstance(y, Dual) else torch.zeros_like(y) for y in ys]
    return tangents, [y.primal if isinstance(y, Dual) else y for y in ys]


def vjp(outputs: Vector, inputs: Vector, cotangents: Vector, create_graph: bool = False) -> list[Tensor]:
    """Return J' cotangents; zeros where nothing depends on an input."""
    live = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not live:
        return [torch.zeros_like(x) for x in inputs]
    outputs, cotangents = zip(*live, strict=True)
    found = torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return list(found)
