"""What a check found, as data, as a table and as JSON."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import groupby
from operator import add
from typing import Any

from mamlfast.checking.costs import Costs
from mamlfast.checking.functions import ForeignFunction


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement, its relative error, and the most that the error may be.

    Where it could not be computed the error is infinite and ``reason`` says why.
    """

    text: str
    error: float
    at_most: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it holds; NaN never does."""
        return self.error <= self.at_most

    def __str__(self) -> str:
        verdict = "ok" if self.ok else ": ".join(filter(None, ("FAILS", self.reason.partition(";")[0])))
        return f"{self.text:<62}{_number(self.error):>9}  at most {_number(self.at_most)}  {verdict}"


@dataclass(frozen=True, kw_only=True)
class ModuleResult:
    """What was found of all modules of one class, options and shapes, from the first of them.

    ``engine`` and ``autograd`` are the errors of the engine's second order and of double backward against central
    differences, ``own`` is the engine's in the model's own precision against the oracle's. ``rules`` are the Rules
    that answer, with their rooms, ``derived`` the torch functions whose Rule is derived on the spot, ``functions``
    other people's Functions inside.
    """

    kind: str
    paths: tuple[str, ...]
    engine: Claim
    autograd: Claim
    own: Claim | None
    rules: tuple[str, ...]
    derived: tuple[str, ...]
    functions: tuple[ForeignFunction, ...]
    costs: Costs | None

    @property
    def ok(self) -> bool:
        """Whether the engine's second order of it is exact; double backward has no say."""
        return self.engine.ok and (self.own is None or self.own.ok)

    @property
    def answered_by(self) -> str:
        """Which of the ways of ``mamlfast.dual`` its functions take, in words."""
        if self.engine.reason:
            return "refused"
        one = len(self.rules) == 1 and not self.derived
        written = f"{'' if one else 'Rules '}{', '.join(self.rules)}" if self.rules else ""
        derived = f"derived on the spot: {', '.join(self.derived)}" if self.derived else ""
        return (
            "; ".join(filter(None, (written, derived)))
            or "no Rule, for they are linear: applied to value and tangent alike"
        )

    def holds(self, other: "ModuleResult") -> bool:
        """Whether one of the other's modules is inside one of these."""
        return any(inner.startswith(f"{outer}.") for outer in self.paths for inner in other.paths)


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The outcome of ``mamlfast.check``; ``str`` of it is a table.

    ``model`` says in words what was checked, ``oracle`` how. ``claims`` are about the whole model, ``modules`` about
    its parts. ``costs`` are of the whole, everything kept; ``recomputing`` of the same with blocks recomputed, the
    engine's default. ``overhead_ms`` is the Python and dispatch time of a block's Hessian-vector product, at most:
    its whole time on two tokens.
    """

    model: str
    oracle: str
    own_dtype: str
    claims: tuple[Claim, ...]
    modules: tuple[ModuleResult, ...]
    costs: Costs | None
    recomputing: Costs | None
    fusion: str
    overhead_ms: float | None
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the second order of this model is exact: every claim holds, of the whole and of each part."""
        return all(claim.ok for claim in self.claims) and all(module.ok for module in self.modules)

    @property
    def culprits(self) -> tuple[ModuleResult, ...]:
        """The innermost modules that are not exact."""
        wrong = [module for module in self.modules if not module.ok]
        return tuple(m for m in wrong if not any(m.holds(other) for other in wrong if other is not m))

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; an infinite or undefined error is None."""
        verdicts = {"ok": self.ok, "culprits": [path for m in self.culprits for path in m.paths]}
        found = verdicts | asdict(self) | {"modules": [asdict(m) | {"ok": m.ok} for m in self.modules]}
        return {key: _finite(x) for key, x in found.items()}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self):
        yield self.model
        yield f"The second order of this model is {'exact' if self.ok else 'NOT EXACT'}."
        for module in self.culprits:
            yield f"  {_places(module.paths)} ({module.kind}): {_fault(module)}"
            yield from (f"    {function}" for function in module.functions)
        yield from ("", f"The whole model, {self.oracle}:", *(f"  {claim}" for claim in self.claims))
        yield from ("", *_table(self.modules, self.own_dtype, self.costs, self.recomputing))
        yield from (_LEGEND.format(own=self.own_dtype), "", "Answered by:")
        yield from _answers(self.modules)
        yield from ("", "Fused, in the engine:", *(f"  {line}" for line in self.fusion.splitlines()))
        if self.overhead_ms is not None:
            yield f"\nPython and dispatch, a block's H v: at most {self.overhead_ms:.2f} ms (its time on two tokens)."
        yield from (f"Note: {note}." for note in self.notes)


_LEGEND = """\
Errors are relative, the worst of one module of each shape: the engine's and double backward's against central
differences, and the engine's in {own}. Times (CPU time, or wall time on a GPU) and memory (saved for the backward)
are of all of them."""


def _fault(module: ModuleResult) -> str:
    if module.engine.reason:
        silent = math.isfinite(module.autograd.error) and not module.autograd.ok
        double = f"; double backward through it is off by {_number(module.autograd.error)}, without an error"
        return module.engine.reason + (double if silent else "")
    if not module.engine.ok:
        return f"off by {_number(module.engine.error)}, at most {_number(module.engine.at_most)} is rounding"
    assert module.own is not None
    return f"{module.own.text}: off by {_number(module.own.error)}, at most {_number(module.own.at_most)} is rounding"


def _places(paths: tuple[str, ...]) -> str:
    rest = len(paths) - 1
    return paths[0] + (f" and {rest} other{'s' if rest > 1 else ''} like it" if rest else "")


def _table(modules, own_dtype, total, recomputing):
    width = max(map(len, (*(m.kind for m in modules), "whole, recomputing")), default=0) + 2
    errors = ("engine", "autograd", own_dtype)
    yield (f"{'':<{width}}{'':>5}{'relative error of second order':^33}{'time, ms':^30}{'saved, MB':^18}".rstrip())
    yield (
        f"{'module':<{width}}{'count':>5}"
        + "".join(f"{name:>11}" for name in errors)
        + "".join(f"{name:>10}" for name in ("forward", "backward", "H v"))
        + f"{'gradient':>10}{'H v':>8}"
    )
    for kind, group in _by_kind(modules):
        cells = [max(x.error for x in column) if column else math.nan for column in _columns(group)]
        count = sum(len(m.paths) for m in group)
        costs = [m.costs * len(m.paths) for m in group if m.costs is not None]
        yield f"{kind:<{width}}{count:>5}" + "".join(f"{_number(x):>11}" for x in cells) + _cost_cells(costs)
    for name, costs in (("whole", total), ("whole, recomputing", recomputing)):
        if costs is not None:
            yield f"{name:<{width + 5 + 33}}{_cost_cells([costs])}"


def _columns(group):
    return [m.engine for m in group], [m.autograd for m in group], [m.own for m in group if m.own is not None]


def _by_kind(modules: Iterable[ModuleResult]):
    """Groups of one class, in the order of their first modules."""
    order = {kind: i for i, kind in reversed(list(enumerate(m.kind for m in modules)))}
    ordered = sorted(modules, key=lambda m: order[m.kind])
    return [(kind, list(group)) for kind, group in groupby(ordered, key=lambda m: m.kind)]


def _answers(modules):
    for kind, group in _by_kind(modules):
        for text in dict.fromkeys(m.answered_by for m in group):
            yield f"  {kind}: {text}"


def _cost_cells(costs: list[Costs]) -> str:
    if not costs:
        return ""
    total = reduce(add, costs)
    times = "".join(f"{ms:>10.2f}" for ms in (total.forward_ms, total.backward_ms, total.hvp_ms))
    return f"{times}{total.saved_mb:>10.2f}{total.hvp_saved_mb:>8.2f}"


def _number(x: float) -> str:
    if math.isnan(x):
        return "-"
    return f"{x:.1e}" if math.isfinite(x) else "none"


def _finite(tree):
    if isinstance(tree, dict):
        return {key: _finite(x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(x) for x in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
