"""Attention on a GPU, timed: our four functions, PyTorch's flash attention, and its double backward where it fits."""

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from mamlfast_kernels import attention as kernels
from mamlfast_kernels.attention import AttentionSpec
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_attention import (
    CAUSAL,
    LEAST,
    NAMES,
    Shape,
    attention_reference,
    gate_name,
    kernel_results,
    units_done,
)
from bench.gpu_gate import Problem, judge, results
from bench.gpu_run import Budget, Gate, Row
from bench.gpu_timing import Clock, race

FLOOR, SDPA = "first order: fwd + bwd", "SDPA flash: first order"
# Tensors the size of all scores that PyTorch's own double backward is thought to have at once; if it has more, it says
# so itself.
MATH_TENSORS = 16

# Scores that are checked at full size. In float64 a dozen or two of such matrices are needed: some 10 GB.
MOST_SCORES = 8192**2

# kesavanramakrishnan/flash-hog on an H200, H = 12, D = 64, causal: forward, backward and double backward together, in
# milliseconds, as its own README has them for its Pallas and its ThunderKittens kernels. Its times include casts from
# and to float32, ours do not.
FLASH_HOG = {(32, 8192): (281.3, 150.8), (1, 8192): (9.46, 5.56), (1, 131072): (2283.0, 1144.0)}


def time_shape(
    gate: Gate, relies_on: str, shape: Shape, clock: Clock, budget: Budget, device: str = "cuda"
) -> Iterator[Row]:
    """Time our functions and PyTorch's flash attention at one shape, then PyTorch's double backward where it fits.

    Yields one row a contender, each with the ratio to our own first order. Raises Refused unless ``relies_on`` was
    found right.
    """
    gate.require(gate_name(relies_on, shape.dtype))
    problem, spec = shape.problem(device), shape.spec(device)
    yield from _check_at_size(gate, problem, spec, shape)
    ours = _Ours(problem, spec)
    contenders = {
        "hvp: fwd_jvp + bwd_jvp": (ours.hvp, ("fwd_jvp", "bwd_jvp")),
        FLOOR: (ours.first_order, ("fwd", "bwd")),
        "double backward: fwd + bwd + fwd_jvp + bwd_jvp": (ours.double, ("fwd", "bwd", "fwd_jvp", "bwd_jvp")),
        "fwd_jvp": (ours.fwd_jvp, ("fwd_jvp",)),
        "bwd_jvp": (ours.bwd_jvp, ("bwd_jvp",)),
        SDPA: (lambda: _sdpa_first_order(problem, spec), ()),
    }
    try:
        contenders[SDPA][0]()
    except RuntimeError as error:  # PyTorch has flash attention for most GPUs and dtypes, not for all
        del contenders[SDPA]
        yield {"shape": shape.described(), "contender": SDPA, "refused": str(error)[:200]}
    peaks = {name: peak_mb(call) for name, (call, _) in contenders.items()}
    times = race({name: call for name, (call, _) in contenders.items()}, clock, budget)
    for name, timing in times.items():
        parts = contenders[name][1]
        row = {"contender": name, **asdict(timing), **_ratios(timing.ms, times), "peak_mb": peaks[name]}
        arithmetic = _arithmetic(shape, parts, timing.ms, problem.xs[0]) if parts else {}
        yield {"shape": shape.described(), **row, **arithmetic, **_published(shape, name)}
    yield {"shape": shape.described(), **_math(problem, spec, shape, clock, budget, times)}


def _ratios(ms, times):
    floors = {"x first order": FLOOR, "x SDPA flash": SDPA}
    return {column: ms / times[name].ms for column, name in floors.items() if name in times}


def _check_at_size(gate, problem, spec, shape):
    """Judge the last key head with its queries at full size, where its scores in float64 fit; heads do not meet."""
    group = shape.H // shape.key_heads
    if group * shape.T**2 > MOST_SCORES or shape.options.get("dropout"):
        return

    def last(name, x):
        return x[-1:, -1:] if name[0] in "kv" else x[-1:, -group:]

    def reference(*xs):
        return attention_reference(*xs, spec=spec)

    part = Problem(
        names=NAMES,
        xs=tuple(map(last, NAMES, problem.xs)),
        xs_dot=tuple(map(last, NAMES, problem.xs_dot)),
        y_bar=last("y", problem.y_bar),
        y_bar_dot=last("y", problem.y_bar_dot),
    )
    got = {name: last(name, x) for name, x in kernel_results(problem, spec, True).items()}
    verdict = judge(got, results(reference, part), results(reference, part.to(torch.float64)))
    name = f"attention at full size: B={shape.B} T={shape.T} D={shape.D} {shape.described()['dtype']}"
    gate.add(name, verdict.passed)
    yield {"gate": name, **asdict(verdict)}
    gate.require(name)


def _arithmetic(shape, parts, ms, x):
    first, second = (kernels.tiles_of(x, x, has_tangent=tangent) for tangent in (False, True))
    done = sum(units_done(part, second if "jvp" in part else first) for part in parts)
    least = sum(LEAST[part] for part in parts)
    tflops = {f"tflop_per_s_{kind}": shape.flop(n) / ms / 1e9 for kind, n in (("done", done), ("least", least))}
    return {"units_done": done, "units_least": least, **tflops}


def _published(shape, name):
    """What flash-hog says of the same shape, beside what is comparable to it, and only on its GPU."""
    numbers = FLASH_HOG.get((shape.B, shape.T))
    same = (shape.H, shape.D, shape.key_heads, shape.options) == (12, 64, 12, CAUSAL)
    if numbers is None or not same or not name.startswith(("hvp", "double")):
        return {}
    if "H200" not in torch.cuda.get_device_name():
        return {}
    return dict(zip(("flash_hog_pallas_ms", "flash_hog_tk_ms"), numbers, strict=True))


class _Ours:
    """The four functions on one problem; what a backward is given is computed once."""

    def __init__(self, problem: Problem, spec: AttentionSpec):
        self.p, self.spec = problem, spec
        self.saved = kernels.attention_fwd_jvp(*problem.xs, *problem.xs_dot, spec=spec)
        self.zero = torch.zeros_like(problem.y_bar)

    def fwd_jvp(self):
        return kernels.attention_fwd_jvp(*self.p.xs, *self.p.xs_dot, spec=self.spec)

    def bwd_jvp(self, saved=None, y_bar_dot=None):
        y_bar_dot = self.p.y_bar_dot if y_bar_dot is None else y_bar_dot
        saved = saved or self.saved
        return kernels.attention_bwd_jvp(*self.p.xs, *self.p.xs_dot, *saved, self.p.y_bar, y_bar_dot, spec=self.spec)

    def hvp(self):
        return self.bwd_jvp(self.fwd_jvp())

    def first_order(self):
        o, lse = kernels.attention_fwd(*self.p.xs, spec=self.spec)
        return kernels.attention_bwd(*self.p.xs, o, lse, self.p.y_bar, spec=self.spec)

    def double(self):
        self.first_order()
        return self.bwd_jvp(self.fwd_jvp(), self.zero)


def _sdpa(xs, spec):
    grouped = xs[0].shape[1] != xs[1].shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        *xs, is_causal=spec.causal, scale=spec.scale, enable_gqa=grouped
    )


def _sdpa_first_order(problem, spec):
    xs = [x.detach().requires_grad_() for x in problem.xs]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.autograd.grad(_sdpa(xs, spec), xs, problem.y_bar)


def sdpa_double_backward(problem: Problem, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """The Hessian product along xs_dot by PyTorch alone: its mathematical attention, differentiated twice."""
    xs = [x.detach().requires_grad_() for x in problem.xs]
    with sdpa_kernel(SDPBackend.MATH):
        bars = torch.autograd.grad(_sdpa(xs, spec), xs, problem.y_bar, create_graph=True)
        return torch.autograd.grad(bars, xs, problem.xs_dot)


def _math(problem, spec, shape, clock, budget, times):
    name = "SDPA math: double backward"
    needed = MATH_TENSORS * shape.B * shape.H * shape.T**2 * problem.y_bar.element_size()
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        return {"contender": name, "refused": f"needs about {needed >> 30} GiB for its scores, {free >> 30} are free"}

    def call():
        return sdpa_double_backward(problem, spec)

    try:
        peak = peak_mb(call)
        timing = race({name: call}, clock, budget)[name]
    except torch.OutOfMemoryError:
        return {"contender": name, "refused": "does not fit into the memory of this GPU"}
    return {"contender": name, **asdict(timing), **_ratios(timing.ms, times), "peak_mb": peak}


def peak_mb(call: Callable[[], object]) -> float:
    """The highest memory of one call above what was there before, in megabytes (10^6)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
