"""The kernels that are bound by memory, against a copy of the same bytes on the same GPU.

Bytes are those that have to move: in a norm x and y forward, x, y_bar and x_bar backward, and twice as many with
tangents; what is one value a row or a column does not count. ``x copy`` is how many times longer a byte takes than in
the copy, 1 being the limit.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from mamlfast_kernels import cross_entropy, elementwise, layer_norm, rms_norm, softmax
from torch import Tensor

from bench.gpu_gate import Problem, Results, judge, named, results
from bench.gpu_run import Budget, Gate, Row
from bench.gpu_timing import Clock, race

EPS = 1e-5
IGNORED = -100

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation on x [R, D] and what else it takes: the formula, and the kernels that go with it.

    ``forward`` and ``backward`` give calls of the kernels on a problem, with tangents or without; ``tensors`` are how
    many of the size of x each moves without tangents. ``columns`` are those of other inputs.
    """

    name: str
    formula: Callable[..., Tensor]
    run: Callable[[Problem, bool], tuple[Call, Call, Callable[[], Results]]]
    names: tuple[str, ...]
    tensors: tuple[int, int]
    output_is_row: bool = False


def _rms_norm_formula(x, w):
    return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


def _parts(p, tangents):
    return (p.xs_dot, p.y_bar_dot) if tangents else (None, None)


def _norm(forward, backward, **options):
    def run(p, tangents):
        xs_dot, y_bar_dot = _parts(p, tangents)

        def fwd():
            return forward(p.xs, xs_dot, **options)

        def bwd():
            return backward(p.xs, xs_dot, p.y_bar, y_bar_dot, **options)

        return fwd, bwd, lambda: named(p.names, *fwd(), *bwd())

    return run


def _softmax(p, tangents):
    (x,), (x_dot,) = p.xs, p.xs_dot if tangents else (None,)
    y_bar_dot = _parts(p, tangents)[1]
    y, y_dot = softmax.softmax_fwd(x, x_dot, log=False)

    def bwd():
        return softmax.softmax_bwd(y, y_dot, p.y_bar, y_bar_dot, log=False)

    bars = [(bar,) for bar in bwd()]
    return lambda: softmax.softmax_fwd(x, x_dot, log=False), bwd, lambda: named(p.names, y, y_dot, *bars)


def _elementwise(name):
    def run(p, tangents):
        (x,), (x_dot,) = p.xs, p.xs_dot if tangents else (None,)
        y_bar_dot = _parts(p, tangents)[1]

        def fwd():
            return elementwise.elementwise_fwd(name, x, x_dot)

        def bwd():
            return elementwise.elementwise_bwd(name, x, x_dot, p.y_bar, y_bar_dot)

        return fwd, bwd, lambda: named(p.names, *fwd(), *[(bar,) for bar in bwd()])

    return run


def _target(z):
    return torch.arange(len(z), device=z.device) * 7919 % z.shape[1]


def _cross_entropy(p, tangents):
    (z,), (z_dot,) = p.xs, p.xs_dot if tangents else (None,)
    y_bar_dot = _parts(p, tangents)[1]
    target = _target(z)
    _, _, lse, mu = cross_entropy.cross_entropy_fwd(z, z_dot, target, IGNORED, 0.0)

    def fwd():
        return cross_entropy.cross_entropy_fwd(z, z_dot, target, IGNORED, 0.0)

    def bwd():
        g, g_dot = p.y_bar.to(lse.dtype), None if y_bar_dot is None else y_bar_dot.to(lse.dtype)
        return cross_entropy.cross_entropy_bwd(z, z_dot, target, IGNORED, 0.0, lse, mu, g, g_dot)

    return fwd, bwd, lambda: named(p.names, *fwd()[:2], *[(bar,) for bar in bwd()])


def _nll(z):
    return F.cross_entropy(z, _target(z), reduction="none")


OPS = (
    Op(name="rms_norm", formula=_rms_norm_formula, names=("x", "w"), tensors=(2, 3),
       run=_norm(rms_norm.rms_norm_fwd, rms_norm.rms_norm_bwd, eps=EPS, offset=0.0)),
    Op(name="cross_entropy", formula=_nll, names=("z",), tensors=(1, 2), run=_cross_entropy, output_is_row=True),
    Op(name="silu", formula=F.silu, names=("x",), tensors=(2, 3), run=_elementwise("silu")),
    Op(name="layer_norm", formula=lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS), names=("x", "w", "b"),
       tensors=(2, 3), run=_norm(layer_norm.layer_norm_fwd, layer_norm.layer_norm_bwd, eps=EPS)),
    Op(name="softmax", formula=lambda x: x.softmax(-1), names=("x",), tensors=(2, 3), run=_softmax),
    Op(name="gelu", formula=F.gelu, names=("x",), tensors=(2, 3), run=_elementwise("gelu")),
)  # fmt: skip


def problem(op: Op, R: int, D: int, dtype: torch.dtype, device: str = "cuda") -> Problem:
    """Normal inputs, tangents and cotangents: the first input [R, D], the others [D], the output [R, D] or [R]."""
    gen = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=gen, device=device, dtype=torch.float32).to(dtype)

    xs, xs_dot = (tuple(draw(R, D) if i == 0 else draw(D) for i, _ in enumerate(op.names)) for _ in "xy")
    out = (R,) if op.output_is_row else (R, D)
    return Problem(names=op.names, xs=xs, xs_dot=xs_dot, y_bar=draw(*out), y_bar_dot=draw(*out))


def check(gate: Gate, op: Op, R: int, D: int, dtype: torch.dtype, device: str = "cuda") -> Row:
    """Judge one operation, first and second order, and tell the gate."""
    p = problem(op, R, D, dtype, device)
    second = op.run(p, True)[2]()
    alone = {f"{name} alone": x for name, x in op.run(p, False)[2]().items()}
    exact, eager = results(op.formula, p.to(torch.float64)), results(op.formula, p)
    doubled = [group | {f"{name} alone": x for name, x in group.items()} for group in (eager, exact)]
    verdict = judge(second | alone, *doubled)
    name = f"{op.name} {str(dtype).removeprefix('torch.')}"
    gate.add(name, verdict.passed)
    return {"gate": name, **asdict(verdict)}


def time_op(gate: Gate, op: Op, R: int, D: int, dtype: torch.dtype, clock: Clock, budget: Budget) -> Iterator[Row]:
    """Check an operation on fewer rows, then time its four functions and a copy of one tensor of its size."""
    row = check(gate, op, min(R, 512), D, dtype)
    yield row
    gate.require(row["gate"])
    p = problem(op, R, D, dtype)
    destination = torch.empty_like(p.xs[0])
    runs: dict[str, Call] = {"copy": lambda: destination.copy_(p.xs[0])}
    moved = {"copy": 2}
    for tangents in (False, True):
        for kind, call, n in zip(("fwd", "bwd"), op.run(p, tangents)[:2], op.tensors, strict=True):
            name = f"{kind}_jvp" if tangents else kind
            runs[name], moved[name] = call, n * (1 + tangents)
    times = race(runs, clock, budget)
    for name, timing in times.items():
        yield row_of(op.name, name, timing, moved[name] * p.xs[0].nbytes, times["copy"].ms, 2 * p.xs[0].nbytes) | {
            "R": R, "D": D, "dtype": str(dtype).removeprefix("torch.")
        }  # fmt: skip


def row_of(op: str, name: str, timing, nbytes: int, copy_ms: float, copy_bytes: int) -> Row:
    """One function's time, its bandwidth, and the time of a byte over that of the copy."""
    against = (timing.ms / nbytes) / (copy_ms / copy_bytes)
    return {"op": op, "function": name, **asdict(timing), "gb_per_s": nbytes / timing.ms / 1e6, "x copy": against}
