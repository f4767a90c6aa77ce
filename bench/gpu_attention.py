"""Attention on a GPU: the shapes, how much arithmetic they are, and what is checked.

The unit of arithmetic is one product of (visible pairs) x D, ``2 D`` floating-point operations a pair: scores are one
unit, their tangent two, and so on. ``units_done`` counts what the kernels do, which sweep the backward once by queries
and once by keys (and at large D the keys' side in halves); ``LEAST`` what a single sweep would do.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from mamlfast_kernels import attention as kernels
from mamlfast_kernels.attention import AttentionSpec, Tiles

from bench.gpu_gate import Problem, Verdict, judge, named, results
from bench.gpu_run import Gate, Row


def _loaded(path: Path) -> Any:
    """A module by its file: the package round it needs the libraries of Hugging Face, the specification needs none."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OPS = Path(__file__).parents[1] / "mamlfast" / "ops"
attention_reference = _loaded(OPS / "attention_reference.py").attention_reference

LEAST = {"fwd": 2, "bwd": 5, "fwd_jvp": 6, "bwd_jvp": 15}
BY_QUERIES = {"bwd": 3, "bwd_jvp": 9}
BY_KEYS = {"bwd": {(True, True): 4, (True, False): 3, (False, True): 2},
           "bwd_jvp": {(True, True): 12, (True, False): 9, (False, True): 6}}  # fmt: skip
NAMES = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """q [B, H, T, D], k and v [B, G, T, D]; causal unless ``options`` say otherwise, which become the AttentionSpec."""

    B: int
    T: int
    H: int = 12
    G: int | None = None
    D: int = 64
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=lambda: {"causal": True})
    segments: int = 0  # packed sequences per row, of unequal lengths

    @property
    def key_heads(self) -> int:
        """G, or H where none is given."""
        return self.H if self.G is None else self.G

    def spec(self, device: str = "cuda") -> AttentionSpec:
        """What is computed."""
        segments = None
        if self.segments:
            ends = torch.arange(1, self.segments + 1, device=device) ** 2 * self.T // self.segments**2
            ids = torch.searchsorted(ends, torch.arange(self.T, device=device), right=True).expand(self.B, -1)
            segments = (ids, ids)
        return AttentionSpec(scale=self.D**-0.5, segments=segments, **self.options)

    def problem(self, device: str = "cuda", seed: int = 0) -> Problem:
        """Normal inputs, tangents and cotangents, rounded to the dtype."""
        gen = torch.Generator(device).manual_seed(seed)

        def draw(heads):
            shape = (self.B, heads, self.T, self.D)
            return torch.randn(shape, generator=gen, device=device, dtype=torch.float32).to(self.dtype)

        xs, xs_dot = (tuple(draw(n) for n in (self.H, self.key_heads, self.key_heads)) for _ in "xy")
        return Problem(names=NAMES, xs=xs, xs_dot=xs_dot, y_bar=draw(self.H), y_bar_dot=draw(self.H))

    def pairs(self) -> int:
        """Visible pairs of query and key of a causal or full mask, over all heads.

        Raises ValueError for other masks: count them before you time them.
        """
        if self.segments or set(self.options) - {"causal"}:
            raise ValueError(f"pairs are counted for causal and full masks only, got {self.options}")
        return self.B * self.H * (self.T * (self.T + 1) // 2 if self.options.get("causal") else self.T**2)

    def flop(self, units: int) -> int:
        """Floating-point operations of so many units."""
        return 2 * self.D * units * self.pairs()

    def described(self) -> Row:
        """For the record."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {**asdict(self), "G": self.key_heads, "dtype": dtype}


def units_done(name: str, tiles: Tiles) -> int:
    """Units of one of our four functions with these tiles."""
    if name not in BY_QUERIES:
        return LEAST[name]
    return BY_QUERIES[name] + sum(BY_KEYS[name][halves] for _, halves in tiles.key_side())


# What is checked, in order of importance; a timing names the one it relies on.
CAUSAL = {"causal": True}
CHECKED = {
    "causal": Shape(B=2, H=3, T=517, options=CAUSAL),
    "causal D=128": Shape(B=2, H=3, T=517, D=128, options=CAUSAL),
    "full": Shape(B=2, H=3, T=333, options={}),
    "grouped": Shape(B=2, H=8, G=2, T=333, D=128, options=CAUSAL),
    "window": Shape(B=2, H=3, T=517, options=CAUSAL | {"window": (100, None)}),
    "soft-cap": Shape(B=2, H=3, T=333, options=CAUSAL | {"softcap": 5.0}),
    "packed": Shape(B=2, H=3, T=517, options=CAUSAL, segments=4),
    "dropout": Shape(B=2, H=3, T=333, options=CAUSAL | {"dropout": 0.2, "seed": 1 << 40}),
    "D=80": Shape(B=2, H=3, T=200, D=80, options=CAUSAL),
    "D=256": Shape(B=1, H=2, T=200, D=256, options=CAUSAL),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gate_name(name: str, dtype: torch.dtype) -> str:
    """The name under which the gate has the verdict."""
    return f"attention {name} {str(dtype).removeprefix('torch.')}"


def check(
    gate: Gate, names: Sequence[str], dtypes: tuple[torch.dtype, ...] = DTYPES, device: str = "cuda"
) -> Iterator[Row]:
    """Judge each configuration in each dtype, first and second order, and tell the gate."""
    for dtype in dtypes:
        for name in names:
            shape = replace(CHECKED[name], dtype=dtype)
            key = gate_name(name, dtype)
            try:
                verdict = verdict_of(shape.problem(device), shape.spec(device))
            # A kernel that cannot be launched is as wrong as one that computes something else.
            except Exception as error:
                gate.add(key, False)
                yield {"gate": key, "passed": False, "error": f"{type(error).__name__}: {error}"}
                continue
            gate.add(key, verdict.passed)
            yield {"gate": key, **asdict(verdict)}


def verdict_of(problem: Problem, spec: AttentionSpec) -> Verdict:
    """Judge all that the four functions return on one problem: first order alone, and with tangents."""

    def reference(*xs):
        return attention_reference(*xs, spec=spec)

    exact, eager = results(reference, problem.to(torch.float64)), results(reference, problem)
    first, second = kernel_results(problem, spec, False), kernel_results(problem, spec, True)
    alone = {f"{name} alone": x for name, x in first.items()}
    doubled = [group | {f"{name} alone": group[name] for name in first} for group in (eager, exact)]
    return judge(second | alone, *doubled)


def kernel_results(problem: Problem, spec: AttentionSpec, second_order: bool, tiles: Tiles | None = None):
    """The results of the kernels under their names."""
    options = {"spec": spec, "tiles": tiles}
    p = problem
    if not second_order:
        o, lse = kernels.attention_fwd(*p.xs, **options)
        return named(p.names, o, None, kernels.attention_bwd(*p.xs, o, lse, p.y_bar, **options), ())
    o, o_dot, lse, mu = kernels.attention_fwd_jvp(*p.xs, *p.xs_dot, **options)
    saved = (o, o_dot, lse, mu)
    bars, bar_dots = kernels.attention_bwd_jvp(*p.xs, *p.xs_dot, *saved, p.y_bar, p.y_bar_dot, **options)
    return named(p.names, o, o_dot, bars, bar_dots)
