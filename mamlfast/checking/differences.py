"""Central differences that know how far they can be trusted.

``D(h) = (f(h) - f(-h)) / 2h`` is off by O(h^2) and by rounding / h. Richardson's ``(4 D(h/2) - D(h)) / 3`` is off by
O(h^4), and the distance between D(h) and D(h/2) bounds what is left of either error: a step too long, a step too
short, or a kink between the points. Steps are tried until that distance is small; the best one counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamlfast.tree import Params

Vector = Sequence[Tensor]

# Relative to the point they start from. Around eps^(1/3) both errors are small; then nearer, for kinks, and farther,
# for what rounds more than its dtype says.
_STEPS = {torch.float64: (1e-5, 1e-6, 1e-4, 1e-3, 1e-2), torch.float32: (1e-2, 3e-3, 3e-2, 1e-1)}
# Differences that agree so well are good enough to stop at; beyond the other bound they prove nothing.
_SETTLED = {torch.float64: 1e-8, torch.float32: 1e-3}
UNSETTLED = 0.03
# What the differences leave open of an error, below which a second order counts as exact: far above rounding at the
# steps taken (eps^(2/3), 4e-11 and 2e-5, times what the model amplifies), far below a missing term.
_FLOOR = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Differences:
    """``value`` is the derivative; ``uncertainty`` its own relative error."""

    value: Vector
    uncertainty: float
    dtype: torch.dtype

    @property
    def settled(self) -> bool:
        """Whether anything can be proved by them."""
        return self.uncertainty < UNSETTLED

    @property
    def tolerance(self) -> float:
        """The relative error within which another derivative agrees with this one."""
        return max(_FLOOR[self.dtype], 10 * self.uncertainty)


def central_differences(
    f: Callable[[float], Sequence[Vector]], dtype: torch.dtype, scales: Sequence[float]
) -> list[Differences]:
    """Return the derivatives at 0 of the vectors that ``f(t)`` returns, computed in ``dtype``, 4 to 20 times.

    A derivative smaller than its scale counts as zero: it is measured against the scale. Memory: six times what
    ``f`` returns.
    """
    best: list[Differences | None] = [None] * len(scales)
    for h in _STEPS[dtype]:
        wide, narrow = _difference(f, h), _difference(f, h / 2)
        for i, (a, b, scale) in enumerate(zip(wide, narrow, scales, strict=True)):
            value = [(4 * y - x) / 3 for x, y in zip(a, b, strict=True)]
            best[i] = _better(best[i], Differences(value=value, uncertainty=error(a, b, scale), dtype=dtype))
        found = [d for d in best if d is not None]
        if all(d.uncertainty < _SETTLED[dtype] and norm(d.value) > 0 for d in found):
            break
    return found


def _better(old: Differences | None, new: Differences) -> Differences:
    """The surer one; but what rounds more than its dtype says stands still on a short step, and proves no zero."""
    if old is None or not norm(old.value) > 0:
        return new
    return new if new.uncertainty < old.uncertainty and norm(new.value) > 0 else old


def _difference(f, h) -> list[list[Tensor]]:
    ahead, behind = f(h), f(-h)
    return [[(a - b) / (2 * h) for a, b in zip(*pair, strict=True)] for pair in zip(ahead, behind, strict=True)]


def error(got: Vector, want: Vector, scale: float = 0.0) -> float:
    """The distance of two vectors relative to the norm of ``want``, or to ``scale`` if that is larger.

    NaN anywhere is an infinite error.
    """
    distance = norm([a.double() - b.double() for a, b in zip(got, want, strict=True)])
    if not distance < float("inf"):
        return float("inf")
    return distance / max(norm(want), scale, torch.finfo(torch.float64).tiny)


def norm(vector: Vector) -> float:
    """The Euclidean norm of all entries."""
    return float(torch.stack([t.detach().double().norm().cpu() for t in vector]).norm()) if vector else 0.0


def dot(a: Vector, b: Vector) -> float:
    """The inner product of two vectors."""
    return sum(float((x.detach().double() * y.detach().double()).sum()) for x, y in zip(a, b, strict=True))


def direction(point: Vector, seed: int, still: Mapping[int, int] | None = None) -> list[Tensor]:
    """A random tangent as large as ``point``, tensor by tensor: a step along it is a relative change.

    Tensors of zeros move as a hundredth of the rest would; ``still`` are rows that do not, by number of the tensor.
    Drawn on the CPU in float64, for every device and dtype the same.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [_rms(p) for p in point]
    floor = 0.01 * max(sizes, default=0.0) or 1.0
    drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in point]
    for number, row in (still or {}).items():
        drawn[number][row] = 0
    return [(t * max(size, floor)).to(p) for p, t, size in zip(point, drawn, sizes, strict=True)]


def padding_rows(module: nn.Module, names: Sequence[str]) -> dict[int, int]:
    """Which row of which of these parameters is a constant to autograd, and to nobody else: an embedding's padding."""
    own = dict(module.named_parameters())
    numbers = {id(own[name]): i for i, name in enumerate(names)}
    embeddings = [(id(m.weight), m.padding_idx) for m in module.modules() if isinstance(m, nn.Embedding)]
    return {numbers[key]: row for key, row in embeddings if row is not None and key in numbers}


def _rms(t: Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0


def moved(params: Params, v: Params, t: float) -> Params:
    """``params + t v``."""
    return {name: p + t * v[name] for name, p in params.items()}
