"""What can be claimed of the loss of a whole model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mamlfast.checking.derivatives import SMALL
from mamlfast.checking.differences import Differences, Vector, direction, dot, error, norm, padding_rows
from mamlfast.checking.modules import attempt, rounding_allowed, shown
from mamlfast.checking.result import Claim
from mamlfast.checking.whole import Whole
from mamlfast.tree import Params

# Two exact computations agree so well in these precisions; a missing term is far larger.
AGREE = {torch.float64: 1e-6, torch.float32: 1e-3}


def claims(oracle: Whole, own: Whole, seed: int, notes: list[str], *, double_backward: bool) -> Iterator[Claim]:
    """Yield them all; append to ``notes`` what is worth knowing and no claim about the engine.

    ``double_backward`` says whether there is memory for it.
    """
    still = padding_rows(own.model, list(own.params))
    u_own, v_own = (_along(own.params, seed + i, still) for i in range(2))
    theta, u, v = oracle.params, _in(u_own, oracle.dtype), _in(v_own, oracle.dtype)
    agree = AGREE[oracle.dtype]
    value, g = oracle.gradient(theta)
    slope, hv_by_differences = oracle.by_differences(theta, v)
    along_v, scale = [value.new_tensor(dot(g, list(v.values())))], SMALL * norm(g) * norm(list(v.values()))
    yield _against(slope, along_v, "<gradient, v> against central differences", scale)
    engine = replace(oracle, eager=False)
    found, reason = attempt(lambda: engine.hvp(theta, v))
    if found is None:
        yield Claim(text="H v by the engine", error=float("inf"), at_most=agree, reason=reason)
        if double_backward:
            _compare_double_backward(oracle, theta, v, hv_by_differences, None, notes)
        return
    loss, hv = found
    yield Claim(text="loss on duals against the plain forward", error=_distance(loss, value), at_most=agree)
    yield _against(hv_by_differences, hv, "H v against central differences of gradients", SMALL * norm(g))
    yield _worst_parameter(hv_by_differences, hv, list(theta), SMALL * norm(g))
    if double_backward:
        double = _compare_double_backward(oracle, theta, v, hv_by_differences, hv, notes)
        if double is not None:
            yield Claim(text="H v against double backward", error=double, at_most=agree)
    yield from _itself(engine, theta, u, v, hv, agree)
    yield from _in_own_precision(own, v_own, (value, g, hv), notes)


def _along(params: Params, seed: int, still: Mapping[int, int]) -> Params:
    return dict(zip(params, direction(list(params.values()), seed, still), strict=True))


def _in(params: Params, dtype: torch.dtype) -> Params:
    return {name: t.to(dtype) for name, t in params.items()}


def _distance(a: Tensor, b: Tensor) -> float:
    return error([a.reshape(())], [b.reshape(())])


def _against(want: Differences, got: Vector, text: str, scale: float = 0.0) -> Claim:
    if not want.settled:
        reason = f"central differences do not settle: uncertain by {want.uncertainty:.0%}"
        return Claim(text=text, error=float("inf"), at_most=want.tolerance, reason=reason)
    return Claim(text=text, error=error(got, want.value, scale), at_most=want.tolerance)


def _worst_parameter(want: Differences, got: Vector, names: list[str], floor: float) -> Claim:
    """A parameter's share that is smaller than ``floor`` is known too badly to be told from zero."""
    errors = {n: error([a], [b], floor) for n, a, b in zip(names, got, want.value, strict=True)}
    worst = max(errors, key=errors.__getitem__)
    reason = "" if want.settled else "central differences do not settle"
    return Claim(
        text=f"  of {worst}, the worst",
        error=errors[worst] if want.settled else float("inf"),
        at_most=10 * want.tolerance,
        reason=reason,
    )


def _compare_double_backward(oracle, theta, v, want: Differences, hv, notes) -> float | None:
    """The distance of the engine from double backward, where that is right; a note where it is not."""
    double, reason = attempt(lambda: oracle.double_backward(theta, v))
    if double is None:
        notes.append(f"double backward (create_graph=True) fails on this model: {reason}")
        return None
    wrong = error(double, want.value)
    if want.settled and not wrong <= want.tolerance:
        notes.append(f"double backward (create_graph=True) of this model is wrong by {wrong:.1e}")
        return None
    return None if hv is None else error(hv, double)


def _itself(engine: Whole, theta: Params, u: Params, v: Params, hv: Vector, agree: float) -> Iterator[Claim]:
    """H is symmetric, and linear."""
    us, vs = list(u.values()), list(v.values())
    _, hu = engine.hvp(theta, u)
    asymmetry = abs(dot(us, hv) - dot(vs, hu)) / max(norm(us) * norm(hv), torch.finfo(torch.float64).tiny)
    yield Claim(text="<u, H v> against <v, H u>", error=asymmetry, at_most=agree)
    _, combined = engine.hvp(theta, {name: 2 * u[name] - 3 * v[name] for name in theta})
    want = [2 * a - 3 * b for a, b in zip(hu, hv, strict=True)]
    yield Claim(text="H (2 u - 3 v) against 2 H u - 3 H v", error=error(combined, want), at_most=agree)


def _in_own_precision(own: Whole, v: Params, exact, notes) -> Iterator[Claim]:
    """The engine where it works: in the model's precision, on the kernels of that precision."""
    value, g, hv = exact
    text = f"in {shown(own.dtype)}, H v against that in {shown(hv[0].dtype)}"
    found, reason = attempt(lambda: own.hvp(own.params, v))
    if found is None:
        yield Claim(text=text, error=float("inf"), at_most=0.0, reason=reason)
        return
    first = max(error(own.gradient(own.params)[1], g), _distance(found[0], value))
    if own.random and first > 0.1:
        notes.append(f"dropout draws other masks in {shown(own.dtype)} than in the oracle: not compared in it")
        return
    yield Claim(text=text, error=error(found[1], hv), at_most=rounding_allowed(first, own.dtype))
