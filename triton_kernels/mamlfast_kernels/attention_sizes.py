"""How large the tiles of attention are on which GPU: data, chosen by what the compiler makes of them.

No GPU has tuned or run these. For causal attention they compile without traps and within shared memory, up to D = 128
with at most 64 bytes a thread on the stack, and in bfloat16 up to 256 with Triton 3.9. Only float32 at D = 256 spills,
and is slow. Found besides:

* On sm_90 at D = 128 with tangents, Triton 3.6 puts 72 bytes on the stack by queries and 80 by keys for ``k_bar`` (88
  with a window); 3.9 needs 56 and 32. Nothing tried is better with 3.6: fewer queries or keys, one stage or four warps
  took 88 to 440.
* In float32 at D = 64, 3.6 needs 240 bytes for ``k_bar`` in tiles of 32 x 32, and in TF32 on sm_80 104 by queries in
  tiles of 64 x 16; those of 16 x 32 and 32 x 32 that are here need none with either version.
* More is spilled, with tangents, for what such tiles were not chosen for (sm_80 and sm_90, Triton 3.9): up to 200 bytes
  with a soft-cap and 320 with dropout. Windows and segments stay within 64.
* All four sums by keys do not fit into registers at D = 128, hence the two halves.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Queries and keys that one program holds at a time, powers of two from 16; warps; stages of the pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self):
        for name, n in (("queries", self.queries), ("keys", self.keys)):
            if n < 16 or n & (n - 1):
                raise ValueError(f"{name} must be a power of two from 16, got {n}")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A tile for each kernel; ``bwd_kv`` is one for ``k_bar`` and ``v_bar`` together, or one for each."""

    fwd: Tile
    bwd_q: Tile
    bwd_kv: tuple[Tile, ...]

    def __post_init__(self):
        if len(self.bwd_kv) not in (1, 2):
            raise ValueError(f"bwd_kv must be one tile or two, got {len(self.bwd_kv)}")

    def key_side(self) -> list[tuple[Tile, tuple[bool, bool]]]:
        """Return the launches by keys: a tile, and whether ``k_bar`` and ``v_bar`` are its business."""
        halves = [(True, True)] if len(self.bwd_kv) == 1 else [(True, False), (False, True)]
        return list(zip(self.bwd_kv, halves, strict=True))


def _tile(queries, keys, warps, stages=2):
    return Tile(queries=queries, keys=keys, warps=warps, stages=stages)


def _tiles(fwd, bwd_q, *bwd_kv):
    return Tiles(fwd=_tile(*fwd), bwd_q=_tile(*bwd_q), bwd_kv=tuple(_tile(*tile) for tile in bwd_kv))


# Per architecture and padded head dimension: (queries, keys, warps[, stages]) forward, backward by queries, by keys.
# 86 stands for the GPUs with 99 KiB of shared memory. From 64 rows on Hopper and Blackwell have matrix instructions of
# their own; with tangents at 256, and in float32 at 128, no tile that large fits into registers.
_FIRST_ORDER = {
    (80, 64): _tiles((128, 64, 4, 3), (128, 64, 8), (64, 128, 8)),
    (80, 128): _tiles((128, 64, 8, 3), (64, 64, 8), (32, 128, 8)),
    (80, 256): _tiles((64, 32, 8), (64, 16, 8), (16, 32, 8)),
    (86, 64): _tiles((128, 64, 4, 3), (128, 64, 8), (64, 128, 8)),
    (86, 128): _tiles((64, 64, 4), (64, 64, 8), (32, 128, 8)),
    (86, 256): _tiles((64, 32, 8), (64, 16, 8), (16, 32, 8)),
    (90, 64): _tiles((128, 128, 8, 3), (128, 64, 8), (64, 128, 8)),
    (90, 128): _tiles((128, 64, 8, 3), (128, 64, 8), (32, 128, 8)),
    (90, 256): _tiles((128, 32, 8), (64, 32, 8), (16, 64, 8)),
    (100, 64): _tiles((128, 64, 8, 3), (128, 64, 8), (64, 128, 8)),
    (100, 128): _tiles((128, 64, 8, 3), (128, 64, 8), (64, 128, 8)),
    (100, 256): _tiles((128, 32, 8), (64, 32, 8), (16, 64, 8)),
}
_SECOND_ORDER = {
    (80, 64): _tiles((128, 64, 8), (128, 32, 8), (64, 32, 8)),
    (80, 128): _tiles((64, 32, 8), (64, 32, 8), (32, 64, 8), (32, 64, 8)),
    (80, 256): _tiles((32, 16, 8), (32, 16, 8), (16, 32, 8), (16, 32, 8)),
    (86, 64): _tiles((128, 64, 8), (128, 32, 8), (64, 32, 8)),
    (86, 128): _tiles((64, 32, 8), (32, 32, 8), (32, 32, 8), (32, 64, 8)),
    (86, 256): _tiles((32, 16, 8), (32, 16, 8), (16, 32, 8), (16, 32, 8)),
    (90, 64): _tiles((128, 64, 8), (128, 64, 8), (32, 128, 8)),
    (90, 128): _tiles((128, 32, 8), (128, 32, 8), (32, 128, 8), (32, 128, 8)),
    (90, 256): _tiles((32, 32, 8), (32, 16, 8), (16, 32, 8), (16, 32, 8)),
    (100, 64): _tiles((128, 64, 8), (128, 32, 8), (32, 64, 8)),
    (100, 128): _tiles((128, 32, 8), (64, 32, 8), (32, 64, 8), (32, 128, 8)),
    (100, 256): _tiles((32, 32, 8), (32, 16, 8), (16, 32, 8), (16, 32, 8)),
}
_SMALL_TF32 = _tiles((32, 16, 8), (16, 16, 8), (16, 16, 8), (16, 32, 8))
_TF32 = {
    (80, 64): _tiles((64, 32, 8), (32, 32, 8), (16, 64, 8), (32, 64, 8)),
    (86, 64): _tiles((64, 32, 8), (32, 32, 8), (16, 64, 8), (32, 64, 8)),
    (90, 64): _tiles((128, 32, 8), (128, 16, 8), (16, 128, 8), (32, 128, 8)),
    (100, 64): _tiles((128, 32, 8), (64, 16, 8), (16, 64, 8), (32, 64, 8)),
    **{(arch, 128): _SMALL_TF32 for arch in (80, 86, 90, 100)},
}
# Without matrix instructions a thread multiplies in its registers.
_WITHOUT_MATRIX_UNITS = {64: _tiles((32, 32, 8), (32, 32, 8), (16, 32, 8), (32, 32, 8))}
_SMALLEST = _tiles((16, 16, 8), (16, 16, 8), (16, 16, 8), (16, 16, 8))


def tiles_for(capability: tuple[int, int], head_dim: int, precision: str | None, has_tangent: bool) -> Tiles:
    """Return the tiles for a GPU of that compute capability and the larger of the head dimensions.

    ``precision`` is that of the products, "tf32" or "ieee", or None for 16-bit types, which have but one.
    """
    arch = {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get(capability, 86)
    padded = max(1 << (head_dim - 1).bit_length(), 64)
    if precision == "ieee":
        return _WITHOUT_MATRIX_UNITS.get(padded, _SMALLEST)
    if precision == "tf32":
        return _TF32.get((arch, padded), _SMALLEST)
    return (_SECOND_ORDER if has_tangent else _FIRST_ORDER)[arch, padded]
