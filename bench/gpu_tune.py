"""Which tiles are fastest on this GPU: every candidate for every kernel, compiled, compared and timed.

The result are rows for the table in ``mamlfast_kernels/attention_sizes.py``. A candidate that does not compile, or
whose results differ from those of the table's tiles by more than rounding, is out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product

import torch
from mamlfast_kernels import attention as kernels
from mamlfast_kernels.attention import Tiles
from mamlfast_kernels.attention_sizes import Tile

from bench.gpu_attention import Shape
from bench.gpu_compile import ahead
from bench.gpu_run import Budget, Row
from bench.gpu_timing import Clock, Timing, race

# Relative, in 2-norm: results of 16-bit products in another order.
SAME = 1e-2
KINDS = ("fwd", "bwd_q", "bwd_kv", "bwd_k", "bwd_v")
SIDES = (16, 32, 64, 128)
Found = dict[Tile, Timing]


def candidates() -> list[Tile]:
    """Tiles of 1024 to 16384 pairs, with four and eight warps, two and three stages."""
    sizes = [(q, k) for q, k in product(SIDES, SIDES) if 1 << 10 <= q * k <= 1 << 14]
    return [Tile(queries=q, keys=k, warps=w, stages=s) for (q, k), w, s in product(sizes, (4, 8), (2, 3))]


def with_tile(tiles: Tiles, kind: str, tile: Tile) -> Tiles:
    """The tiles with this one for a kernel; where it is for one half of the keys' side, for both halves."""
    if kind in ("fwd", "bwd_q"):
        return replace(tiles, **{kind: tile})
    return replace(tiles, bwd_kv=(tile,) if kind == "bwd_kv" else (tile, tile))


class Bench:
    """Calls of one kernel at a time, on one shape and order."""

    def __init__(self, shape: Shape, second_order: bool):
        self.p, self.spec, self.second_order = shape.problem(), shape.spec(), second_order
        self.table = kernels.tiles_of(self.p.xs[0], self.p.xs[2], second_order)
        self.saved = self.forward(self.table)

    def forward(self, tiles: Tiles) -> tuple[torch.Tensor, ...]:
        """The forward, with tangents in the second order."""
        if self.second_order:
            return kernels.attention_fwd_jvp(*self.p.xs, *self.p.xs_dot, spec=self.spec, tiles=tiles)
        return kernels.attention_fwd(*self.p.xs, spec=self.spec, tiles=tiles)

    def call(self, kind: str, tile: Tile) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The kernel of that kind alone; by keys, with the short one for delta."""
        tiles = with_tile(self.table, kind, tile)
        if kind == "fwd":
            return lambda: self.forward(tiles)
        need = {"bwd_q": (True, False, False), "bwd_kv": (False, True, True)}
        need |= {"bwd_k": (False, True, False), "bwd_v": (False, False, True)}
        return lambda: self._backward(tiles, need[kind])

    def _backward(self, tiles, need):
        p, options = self.p, {"spec": self.spec, "tiles": tiles, "need": need}
        if not self.second_order:
            bars = kernels.attention_bwd(*p.xs, *self.saved, p.y_bar, **options)
            return tuple(x for x in bars if x is not None)
        bars, bar_dots = kernels.attention_bwd_jvp(
            *p.xs, *p.xs_dot, *self.saved, p.y_bar, p.y_bar_dot, need_dot=need, **options
        )
        return tuple(x for x in (*bars, *bar_dots) if x is not None)


def same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    """Whether all results agree but for rounding."""
    pairs = zip(got, want, strict=True)
    return all(bool((x.float() - y.float()).norm() <= SAME * y.float().norm()) for x, y in pairs)


def tune(shape: Shape, second_order: bool, clock: Clock, budget: Budget, tiles: Sequence[Tile] = ()) -> Iterator[Row]:
    """Time every candidate of every kernel; yield the five best of each, then the row for the table."""
    tiles = list(tiles) or candidates()
    usable = _usable(shape, second_order, tiles)
    bench, best = Bench(shape, second_order), {}
    for done, kind in enumerate(KINDS):
        share = Budget(seconds=budget.left() / (len(KINDS) - done), clock=budget.clock)
        found = _timed(bench, kind, usable.get(kind, []), clock, share)
        ranked = sorted(found, key=lambda tile: found[tile].ms)
        if ranked:
            best[kind] = (ranked[0], found[ranked[0]].ms)
        listed = [{**asdict(tile), **asdict(found[tile])} for tile in ranked[:5]]
        yield {"kernel": kind, "second_order": second_order, "D": shape.D, "timed": len(found), "best": listed}
    yield {"second_order": second_order, "D": shape.D, "row": table_row(_architecture(), shape.D, best)}


def _usable(shape, second_order, tiles):
    """By kind, the candidates that compile and run; small tensors are enough for that."""
    small = replace(shape, B=1, T=128)
    usable: dict[str, list[Tile]] = {kind: [] for kind in KINDS}
    jobs = [(small, second_order, kind, tile) for kind in KINDS for tile in tiles]
    for (_, _, kind, tile), error in ahead(_call_once, jobs):
        if error is None:
            usable[kind].append(tile)
    return usable


def _call_once(job):
    shape, second_order, kind, tile = job
    Bench(shape, second_order).call(kind, tile)()
    torch.cuda.synchronize()


def _architecture():
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _timed(bench, kind, tiles, clock, budget) -> Found:
    calls = {}
    want = None
    for tile in tiles:
        call = bench.call(kind, tile)
        got = call()
        want = bench.call(kind, _of(bench.table, kind))() if want is None else want
        if same(got, want):
            calls[tile] = call
    return race(calls, clock, budget)


def _of(tiles, kind):
    if kind in ("fwd", "bwd_q"):
        return getattr(tiles, kind)
    return tiles.bwd_kv[-1 if kind == "bwd_v" else 0]


def table_row(arch: int, D: int, best: dict[str, tuple[Tile, float]]) -> str | None:
    """The row of the table that the best tiles make, the keys' side whole or halved, whichever is faster.

    None where some kernel has no tile.
    """
    halves = [best[kind] for kind in ("bwd_k", "bwd_v") if kind in best]
    whole = [best["bwd_kv"]] if "bwd_kv" in best else []
    sides = [side for side, full in ((whole, 1), (halves, 2)) if len(side) == full]
    if not sides or not {"fwd", "bwd_q"} <= set(best):
        return None
    by_keys = min(sides, key=lambda side: sum(ms for _, ms in side))
    tiles = [best["fwd"][0], best["bwd_q"][0], *(tile for tile, _ in by_keys)]
    return f"({arch}, {D}): _tiles({', '.join(map(_written, tiles))}),"


def _written(tile):
    stages = () if tile.stages == Tile.stages else (tile.stages,)
    return str((tile.queries, tile.keys, tile.warps, *stages))
