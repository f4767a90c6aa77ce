"""One whole second-order pass of attention: forward, backward, and the product of the Hessian with a direction.

    python -m bench.attention "dual" --tokens 4096        # its peak memory, as a line of JSON

The function is ``<attention(q, k, v), c>`` with a constant c; a contender returns its gradient in q, k, v and the
tangent of that gradient. Causal, random q, k, v and directions of order one, batch 1, 8 heads of width 64.

Units of one tokens x tokens x width product, causal or not, and so the limits: a gradient of flash attention takes 7
(forward 2, backward 5); with materialised scores a gradient and the tangent of it take 18; the dual pass takes 21
(6 and 15) and double backward through our kernels 28 (7, and 21 again to differentiate it).
"""

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gate import WrongResult
from bench.peak import LARGE, M_MMAP_THRESHOLD, MB, ROOT, above, environment
from bench.timing import Time, race
from mamlfast.ops import attention, attention_rule

Pass = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
HEADS, WIDTH = 8, 64
# Float32 after sums over thousands of keys; a missing term is off by more than 1e-2.
THRESHOLD = 1e-4


@dataclass(frozen=True, kw_only=True)
class AttentionSetting:
    """Tokens of the one sequence."""

    tokens: int

    @property
    def name(self) -> str:
        """The setting in a table."""
        return f"attention, causal, 1 x {HEADS} x {self.tokens} x {WIDTH}"

    def draw(self, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """q, k, v; their direction; c."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, HEADS, self.tokens, WIDTH)
        *xs, c = (torch.randn(shape, generator=generator).to(dtype) for _ in range(7))
        return tuple(xs[:3]), tuple(xs[3:]), c


@dataclass(frozen=True, kw_only=True)
class AttentionContender:
    """``run(xs, xs_dot, c)`` returns the gradient and its tangent; the floor returns no tangent."""

    name: str
    run: Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Tensor], Pass]
    units: int

    @property
    def exact(self) -> bool:
        """Whether it is to second order."""
        return self.units > FIRST_ORDER_UNITS


FIRST_ORDER_UNITS = 7


def first_order(xs, xs_dot, c) -> Pass:
    """Forward and backward through PyTorch's flash attention."""
    xs = _leaves(xs)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = F.scaled_dot_product_attention(*xs, is_causal=True)
    return torch.autograd.grad(y, xs, c), ()


def double_backward(attend, xs, xs_dot, c) -> Pass:
    """Differentiate the gradient, as any client with ``create_graph=True`` does."""
    xs = _leaves(xs)
    grads = torch.autograd.grad(attend(*xs), xs, c, create_graph=True)
    return grads, torch.autograd.grad(grads, xs, xs_dot)


def _leaves(xs):
    return [x.detach().requires_grad_() for x in xs]


def math_attention(q, k, v):
    """The one kernel of PyTorch with a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dual(xs, xs_dot, c) -> Pass:
    """The engine's way: forward on pairs, backward of the tangent. The cotangents of the tangents are the gradient."""
    xs, xs_dot = _leaves(xs), _leaves(xs_dot)
    spec = AttentionSpec(scale=WIDTH**-0.5, causal=True)
    _, y_dot = attention_rule.dual(tuple(xs), tuple(xs_dot), spec=spec)
    results = torch.autograd.grad(y_dot, [*xs, *xs_dot], c)
    return results[3:], results[:3]


FLOOR = AttentionContender(name="first order, flash", run=first_order, units=FIRST_ORDER_UNITS)
MATH = AttentionContender(
    name="double backward, sdpa math", run=lambda *args: double_backward(math_attention, *args), units=18
)
OURS = AttentionContender(
    name="double backward",
    run=lambda *args: double_backward(lambda q, k, v: attention(q, k, v, causal=True), *args),
    units=28,
)
DUAL = AttentionContender(name="dual", run=dual, units=21)
CONTENDERS = {c.name: c for c in (FLOOR, DUAL, OURS, MATH)}


def timed(setting: AttentionSetting, rounds: int, contenders: Iterable[AttentionContender]) -> dict[str, Time]:
    """Check every contender against double backward in float64, and time them in turn, the first order among them.

    Raises bench.gate.WrongResult where one is wrong.
    """
    contenders = list(contenders)
    drawn = setting.draw()
    errors = {c.name: _checked(c, drawn, setting) for c in contenders}
    seconds = race({c.name: lambda c=c: c.run(*drawn) for c in contenders}, rounds)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    times = {}
    for c in contenders:
        ratio, limit = medians[c.name] / medians[FLOOR.name], c.units / FLOOR.units
        times[c.name] = Time(
            contender=c.name,
            setting=setting.name,
            exact=c.exact,
            error=errors[c.name],
            seconds=tuple(seconds[c.name]),
            median=medians[c.name],
            ratio=ratio,
            limit=limit,
            over_limit=ratio / limit,
        )
    return times


def _checked(contender, drawn, setting):
    """The error of what it returns: at full length against double backward, shorter ones in float64 against it too."""
    wide = AttentionSetting(tokens=65)
    if contender.exact:
        exact = error(contender.run(*wide.draw(torch.float64)), MATH.run(*wide.draw(torch.float64)))
        if exact > 1e-12:
            raise WrongResult(f"{contender.name} must agree with double backward in float64; it is {exact:.1e} off")
    oracle = MATH if setting.tokens <= 1024 else DUAL
    found = 0.0 if contender is oracle else error(contender.run(*drawn), oracle.run(*drawn))
    if found > THRESHOLD:
        raise WrongResult(f"{contender.name} is {found:.1e} off at {setting.name}: it gets no number")
    return found


def error(got: Pass, want: Pass) -> float:
    """The relative error of the worst of the results that ``got`` has, in 2-norms; infinite where one is not finite."""
    pairs = zip((*got[0], *got[1]), (*want[0], *want[1]), strict=False)
    errors = torch.stack([(g.detach() - w.detach()).norm() / w.detach().norm() for g, w in pairs])
    return float(errors.nan_to_num(nan=torch.inf).max())


def peak_mb(contender: AttentionContender, setting: AttentionSetting, limit_mb: float) -> float | None:
    """Measure in this process by how much resident memory rises, in MB; None where ``limit_mb`` is not enough."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    contender.run(*AttentionSetting(tokens=64).draw())
    drawn = setting.draw()
    limit = int(limit_mb * MB) + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        return above(lambda: contender.run(*drawn)) / MB
    except (RuntimeError, MemoryError) as failure:
        if "memory" not in str(failure).lower():
            raise
        return None


def probe(contender: AttentionContender, setting: AttentionSetting, limit_mb: float = 16000) -> float | None:
    """``peak_mb`` in a fresh process. Raises RuntimeError, with what the process said, where it fails."""
    command = [sys.executable, "-m", "bench.attention", contender.name, f"--tokens={setting.tokens}"]
    command.append(f"--limit-mb={limit_mb}")
    done = subprocess.run(command, cwd=ROOT, env=environment(None), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the memory probe of {contender.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description="Peak memory of a whole pass.")
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--limit-mb", type=float, default=16000)
    given = parser.parse_args()
    setting = AttentionSetting(tokens=given.tokens)
    print(json.dumps(asdict(setting) | {"peak_mb": peak_mb(CONTENDERS[given.contender], setting, given.limit_mb)}))


if __name__ == "__main__":
    main()
