"""Attention to second order on GPUs: the launchers of its kernels, and what they may be asked.

The mathematics stands in ``mamlfast/ops/attention.py``, in the same names; the kernels in ``attention_fwd.py`` and
``attention_bwd.py``; which keys a query sees, and dropout, in ``attention_masks.py``. Memory is linear in the sequence
lengths. Tensors are read through their strides, as Hugging Face passes them (only a tangent that is not laid out as
its value costs a copy), and results are laid out as their inputs. Another rate of dropout is another kernel to
compile, another seed is not.

Products are formed in the dtype of the tensors (float32 in TF32 where torch allows it to its own products) and
summed in float32, or float64 for float64 inputs, as is everything else. In Triton's interpreter the kernels agree
with torch.func to rounding, and they compile for sm_80, sm_90 and sm_100. No GPU has run them yet.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mamlfast_kernels.attention_bwd import _attention_bwd_kv_kernel, _attention_bwd_q_kernel
from mamlfast_kernels.attention_fwd import _attention_fwd_kernel
from mamlfast_kernels.attention_masks import Segments, reach, segments_of
from mamlfast_kernels.attention_sizes import Tile, tiles_for
from mamlfast_kernels.attention_sizes import Tiles as Tiles
from mamlfast_kernels.attention_spec import AttentionSpec as AttentionSpec
from mamlfast_kernels.launch import interpreted, wide, wide_dtype

Tensors = tuple[Tensor, ...]
Three = tuple[Tensor, Tensor, Tensor]
ALL = (True, True, True)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``o`` [B, H, T, E] and ``lse`` [B, H, T] of q [B, H, T, D], k [B, G, S, D] and v [B, G, S, E].

    G divides H; D and E are 16 to 256. ``lse``, natural, is float32, or float64 for float64 inputs. A query that sees
    no key has o = 0 and lse = -inf. ``tiles`` overrides the table of tile sizes.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, or ``spec`` has a dense mask.
    """
    return _forward((q, k, v), None, spec, tiles)[:2]


def attention_fwd_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    *, spec: AttentionSpec, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``o, o_dot, lse, mu``: as ``attention_fwd``, with the tangents of o and lse. One sweep over the keys.

    A tangent that is None is zero: a tensor of zeros is read for it, no time is saved.
    """
    o, lse, o_dot, mu = _forward((q, k, v), _filled((q_dot, k_dot, v_dot), (q, k, v)), spec, tiles)
    return o, o_dot, lse, mu


def attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, o_bar: Tensor,
    *, spec: AttentionSpec, need: Sequence[bool] = ALL, tiles: Tiles | None = None,
) -> Three:  # fmt: skip
    """Return ``q_bar, k_bar, v_bar`` from the results of ``attention_fwd`` and the cotangent of o.

    ``lse`` may have more terms than those of the keys (an attention sink) if o is normalised by the same. ``need``, a
    bool for each of q, k, v, says which results are wanted: the sweep of those that are not is left out, and None
    stands in their place.
    """
    return _backward((q, k, v), None, (o, lse, o_bar), None, spec, tuple(need), tiles)[0]


def attention_bwd_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    o: Tensor, o_dot: Tensor, lse: Tensor, mu: Tensor, o_bar: Tensor, o_bar_dot: Tensor | None,
    *, spec: AttentionSpec, need: Sequence[bool] = ALL, need_dot: Sequence[bool] = ALL, tiles: Tiles | None = None,
) -> tuple[Three, Three]:  # fmt: skip
    """Return ``(q_bar, k_bar, v_bar)`` and their tangents from the results of ``attention_fwd_jvp``.

    As ``attention_bwd``, and mu has to be the tangent of ``lse``. Where ``need`` and ``need_dot`` want neither a
    cotangent nor its tangent both are None, otherwise both are there. A tangent that is None is zero.
    """
    xs, tangents = (q, k, v, o_bar), (q_dot, k_dot, v_dot, o_bar_dot)
    *xs_dot, o_bar_dot = _filled(tangents, xs)
    wanted = tuple(map(any, zip(need, need_dot, strict=True)))
    return _backward((q, k, v), tuple(xs_dot), (o, lse, o_bar), (o_dot, mu, o_bar_dot), spec, wanted, tiles)


def _filled(xs_dot: Sequence[Tensor | None], xs: Tensors) -> Tensors:
    return tuple(torch.zeros_like(x) if x_dot is None else x_dot for x_dot, x in zip(xs_dot, xs, strict=True))


def _forward(xs: Three, xs_dot: Tensors | None, spec: AttentionSpec, tiles: Tiles | None) -> tuple[Any, ...]:
    """Return o, lse and, given tangents, o_dot, mu (otherwise None)."""
    _check(*xs, spec)
    dtype = xs[0].dtype
    (q, q_dot), (k, k_dot), (v, v_dot) = _laid_out(xs, xs_dot)
    o, lse = _empty(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))
    o_dot, mu = (torch.empty_like(o), torch.empty_like(lse)) if xs_dot else (None, None)
    common, segments = _common(q, k, v, spec, has_tangent=xs_dot is not None)
    pointers = _pointers(q=q, k=k, v=v, o=o, lse=lse, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot, o_dot=o_dot, mu=mu)
    own = pointers | _strides(q=q, k=k, v=v, o=o) | _pointers_of_ids(segments, "key")
    tiles = tiles or tiles_of(q, v, xs_dot is not None)
    _launch(_attention_fwd_kernel, q, tiles.fwd, common | own)
    return o.to(dtype), lse, None if o_dot is None else o_dot.to(dtype), mu


def _backward(
    xs: Three, xs_dot: Tensors | None, results: Three, results_dot: Three | None,
    spec: AttentionSpec, wanted: tuple[bool, ...], tiles: Tiles | None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return the cotangents of xs and, given tangents, theirs; ``results`` are o, lse and o_bar."""
    _check(*xs, spec)
    dtype, has_tangent = xs[0].dtype, xs_dot is not None
    o, lse, o_bar = results
    o_dot, mu, o_bar_dot = results_dot or (None, None, None)
    (q, q_dot), (k, k_dot), (v, v_dot), (o, o_dot), (o_bar, o_bar_dot) = _laid_out(
        (*xs, o, o_bar), None if xs_dot is None else (*xs_dot, o_dot, o_bar_dot)
    )
    bars = [_empty(x, x.shape[-1]) if want else None for x, want in zip((q, k, v), wanted, strict=True)]
    bar_dots = [None if x is None or not has_tangent else torch.empty_like(x) for x in bars]
    lse, mu = lse.contiguous(), None if mu is None else mu.contiguous()
    delta, delta_dot = torch.empty_like(lse), torch.empty_like(lse) if has_tangent else None

    common, segments = _common(q, k, v, spec, has_tangent)
    common |= _strides(q=q, k=k, v=v, o_bar=o_bar) | _pointers(
        q=q, k=k, v=v, o_bar=o_bar, lse=lse, delta=delta,
        q_dot=q_dot, k_dot=k_dot, v_dot=v_dot, o_bar_dot=o_bar_dot, mu=mu, delta_dot=delta_dot,
    )  # fmt: skip
    tiles = tiles or tiles_of(q, v, has_tangent)
    with_q, with_k, with_v = wanted
    if with_q or with_k:  # k_bar needs the delta that comes with q_bar
        own = _pointers(o=o, o_dot=o_dot, q_bar=bars[0], q_bar_dot=bar_dots[0]) | _strides(o=o, q_bar=bars[0])
        own |= _pointers_of_ids(segments, "key") | {"WITH_Q": with_q}
        _launch(_attention_bwd_q_kernel, q, tiles.bwd_q, common | own)
    own = _pointers(k_bar=bars[1], v_bar=bars[2], k_bar_dot=bar_dots[1], v_bar_dot=bar_dots[2])
    own |= _strides(k_bar=bars[1], v_bar=bars[2]) | _pointers_of_ids(segments, "query")
    for tile, (holds_k, holds_v) in tiles.key_side():
        halves = {"WITH_K": holds_k and with_k, "WITH_V": holds_v and with_v}
        if any(halves.values()):
            _launch(_attention_bwd_kv_kernel, k, tile, common | own | halves)
    return _cast(bars, dtype), _cast(bar_dots, dtype) if has_tangent else None


def _cast(xs: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(dtype) for x in xs)


def _laid_out(xs: Tensors, xs_dot: Tensors | None) -> list[Any]:
    """Pairs of value and tangent (or None) with equal strides, the last of them 1."""
    # The interpreter computes with the bits of bfloat16 as if they were integers.
    if interpreted() and xs[0].dtype == torch.bfloat16:
        xs, xs_dot = tuple(x.float() for x in xs), xs_dot and tuple(x.float() for x in xs_dot)
    return [_pair(x, x_dot) for x, x_dot in zip(xs, xs_dot or [None] * len(xs), strict=True)]


def _pair(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x_dot is None or x_dot.stride() == x.stride():
        return x, x_dot
    dense = torch.empty_like(x)  # strides of x unless x leaves gaps or overlaps itself
    x = x if x.stride() == dense.stride() else dense.copy_(x)
    return x, torch.empty_like(x).copy_(x_dot)


def _empty(like: Tensor, width: int) -> Tensor:
    """A new [B, H, T, width] whose heads and rows are in the order of ``like``."""
    B, H, T, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, T, H, width).transpose(1, 2)
    return like.new_empty(B, H, T, width)


def _common(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, has_tangent: bool
) -> tuple[dict[str, Any], Segments | None]:
    """What all kernels are told, and segments, of which each is told its part."""
    (B, H, T, D), (_, G, S, E) = q.shape, v.shape
    left, right = reach(spec, T, S)
    segments = segments_of(spec, B, T, S, q.device)
    return {
        "H": H, "T": T, "S": S, "left": left or 0, "right": right or 0, "seed": spec.seed,
        "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None, "HAS_SEGMENTS": segments is not None,
        "GROUP": H // G, "D": D, "E": E, "SCALE": spec.scale, "SOFTCAP": spec.softcap or 0.0,
        "DROPOUT": spec.dropout, "KEEP_FROM": spec.keep_from,
        "WIDE": wide(q), "PRECISION": _precision(q), "HAS_TANGENT": has_tangent,
        "BLOCK_D": triton.next_power_of_2(D), "BLOCK_E": triton.next_power_of_2(E),
    }, segments  # fmt: skip


def _pointers(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": x for name, x in tensors.items()}


def _pointers_of_ids(segments: Segments | None, partner: str) -> dict[str, Tensor | None]:
    names = ("query_ids", "key_ids", f"{partner}_first", f"{partner}_end")
    return {f"{name}_ptr": None if segments is None else getattr(segments, name) for name in names}


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    return {
        f"{name}_{dim}": 0 if x is None else x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bht")
    }


def _launch(kernel: Any, owned: Tensor, tile: Tile, arguments: dict[str, Any]) -> None:
    """Run a program for each tile of ``owned``, the tensor [B, heads, rows, D] whose rows a program owns."""
    B, heads, rows, _ = owned.shape
    block = tile.keys if kernel is _attention_bwd_kv_kernel else tile.queries
    programs = B * heads * triton.cdiv(rows, block)
    if programs == 0:
        return
    with torch.cuda.device_of(owned):
        kernel[(programs,)](
            **arguments, BLOCK_T=tile.queries, BLOCK_S=tile.keys, num_warps=tile.warps, num_stages=tile.stages
        )


def tiles_of(q: Tensor, v: Tensor, has_tangent: bool) -> Tiles:
    """Return the tiles for tensors like these on their device, of first or of second order."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    precision = None if q.element_size() == 2 else _precision(q)
    return tiles_for(capability, max(q.shape[-1], v.shape[-1]), precision, has_tangent)


def _precision(q: Tensor) -> str:
    tf32 = q.dtype != torch.float64 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _check(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
    if not spec.scale > 0:  # the kernels take the maximum of unscaled scores
        raise ValueError(f"scale must be positive, got {spec.scale}")
    if spec.mask is not None:
        raise ValueError("these kernels take no dense mask; pass segments and key_mask, or use another backend")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k, v must have four dimensions, got {q.ndim}, {k.ndim}, {v.ndim}")
    (B, H, T, D), (_, G, S, E) = q.shape, v.shape
    if k.shape != (B, G, S, D) or v.shape[0] != B or H % G:
        raise ValueError(
            "q, k, v must be [B, H, T, D], [B, G, S, D], [B, G, S, E] with G dividing H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (16 <= D <= 256 and 16 <= E <= 256):
        raise ValueError(f"head dimensions must be 16 to 256, got {D} for q and k, {E} for v")
    if {x.dtype for x in (k, v)} != {q.dtype} or {x.device for x in (k, v)} != {q.device}:
        raise ValueError(f"q, k, v must share dtype and device, got {[(x.dtype, x.device) for x in (q, k, v)]}")
    if spec.key_mask is not None and (spec.key_mask.shape != (B, S) or spec.key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool {[B, S]}, got {spec.key_mask.dtype} {list(spec.key_mask.shape)}")
    if spec.segments is not None and tuple(ids.shape for ids in spec.segments) != ((B, T), (B, S)):
        raise ValueError(f"segments must be {[B, T]} and {[B, S]}, got {[list(ids.shape) for ids in spec.segments]}")
