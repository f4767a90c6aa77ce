"""Attention in C++: fused, blocked and threaded, to second order, on the CPU.

The four functions of the eager room (``attention_eager``) with the same results, for float32 and float64 tensors of
one dtype. No score leaves the caches. Memory beyond the results is each thread's own: some hundred kilobytes, and
where the rows of a head do not lie together, a copy of the keys and values of one head at a time. Tensors may have
any strides: those whose last dimension is not contiguous, or whose width is not a multiple of 64 bytes, are copied as
a whole.

Further than the eager room: a tangent may be None (zero; its products are skipped), ``need`` and ``need_dot`` say
which gradients are wanted (the others are None), and a hidden pair adds nothing even where its key, value or query is
not finite. The bits depend neither on the number of threads nor on whether tangents are computed.

All four raise ValueError for other dtypes and devices, RuntimeError for shapes that do not fit each other.
"""

from typing import Any

import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor
from torch.nn.functional import pad

MaybeTensors = tuple[Tensor | None, ...]

# The kernels work on whole lines of the cache.
LINE = 64
# Farther than any key.
_EVERYTHING = 1 << 40
_ALL = (True, True, True)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Return ``o`` [B, H, T, E] and ``lse`` [B, H, T] of q [B, H, T, D], k [B, G, S, D], v [B, G, S, E]."""
    o, _, lse, _ = _fwd((q, k, v), None, spec)
    return o, lse


def attention_fwd_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    *, spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``o, o_dot, lse, mu``."""
    return _fwd((q, k, v), (q_dot, k_dot, v_dot), spec)


def attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, o_bar: Tensor,
    *, spec: AttentionSpec, need: tuple[bool, ...] = _ALL,
) -> MaybeTensors:  # fmt: skip
    """Return ``q_bar, k_bar, v_bar``, None where not needed."""
    nothing = None, None, None
    return _bwd((q, k, v), nothing, (o, None, lse, None), (o_bar, None), (need, (False,) * 3), spec)[0]


def attention_bwd_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
    o: Tensor, o_dot: Tensor, lse: Tensor, mu: Tensor, o_bar: Tensor, o_bar_dot: Tensor | None,
    *, spec: AttentionSpec, need: tuple[bool, ...] = _ALL, need_dot: tuple[bool, ...] = _ALL,
) -> tuple[MaybeTensors, MaybeTensors]:  # fmt: skip
    """Return ``(q_bar, k_bar, v_bar)`` and their tangents, None where not needed."""
    saved, cotangents = (o, o_dot, lse, mu), (o_bar, o_bar_dot)
    return _bwd((q, k, v), (q_dot, k_dot, v_dot), saved, cotangents, (need, need_dot), spec)


def _fwd(xs, xs_dot, spec) -> Any:
    _check(*xs, *(xs_dot or ()))
    q, _, v = xs
    (B, H, T, _), E = q.shape, v.shape[-1]
    xs, dots = _laid_out(*xs), _laid_out(*(xs_dot or (None, None, None)))
    pairs = (None, None) if xs_dot is None else (q.new_empty(B, H, T, _padded(v)), q.new_empty(B, H, T))
    o, (o_dot, mu) = q.new_empty(B, H, T, _padded(v)), pairs
    lse = q.new_empty(B, H, T)
    torch.ops.mamlfast.attention_fwd(*xs, *dots, o, o_dot, lse, mu, *_options(spec, q, xs[1]))
    return _narrowed(o, E), _narrowed(o_dot, E), lse, mu


def _bwd(xs, xs_dot, saved, cotangents, needs, spec) -> Any:
    _check(*xs, *xs_dot, *saved, *cotangents)
    o, o_dot, lse, mu = saved
    lse, mu = (None if x is None else x.contiguous() for x in (lse, mu))
    o, o_dot, *cotangents = _laid_out(o, o_dot, *cotangents)
    bars, bar_dots = (_zeros(xs, need) for need in needs)
    tensors = (*_laid_out(*xs), *_laid_out(*xs_dot), o, o_dot, lse, mu, *cotangents, *bars, *bar_dots)
    torch.ops.mamlfast.attention_bwd(*tensors, *_options(spec, *xs[:2]))
    return tuple(tuple(_narrowed(g, x.shape[-1]) for g, x in zip(gs, xs, strict=True)) for gs in (bars, bar_dots))


def _check(*tensors: Tensor | None) -> None:
    kinds = {(x.device.type, x.dtype) for x in tensors if x is not None}
    if kinds not in ({("cpu", torch.float32)}, {("cpu", torch.float64)}):
        names = ", ".join(sorted(f"{device} {dtype}" for device, dtype in kinds))
        raise ValueError(f"the C++ attention takes float32 or float64 tensors of one dtype on the CPU, got {names}")


def _padded(x: Tensor) -> int:
    step = LINE // x.element_size()
    return -(-x.shape[-1] // step) * step


def _laid_out(*xs: Tensor | None) -> Any:
    """Pad the last dimension with zeros to whole lines, and make it contiguous."""
    return tuple(None if x is None else _of_lines(x) for x in xs)


def _of_lines(x):
    if _padded(x) != x.shape[-1]:
        return pad(x, (0, _padded(x) - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _narrowed(x: Tensor | None, width: int) -> Tensor | None:
    return x if x is None or x.shape[-1] == width else x[..., :width].contiguous()


def _zeros(xs, need):
    return [x.new_zeros(*x.shape[:3], _padded(x)) if wanted else None for x, wanted in zip(xs, need, strict=True)]


def _options(spec: AttentionSpec, q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """Return the specification as the operators take it."""
    left, right = (_EVERYTHING if side is None else side for side in spec.reach())
    ids = (None, None) if spec.segments is None else (x.to(torch.int64).contiguous() for x in spec.segments)
    key_mask = None if spec.key_mask is None else spec.key_mask.contiguous()
    mask = spec.mask
    if mask is not None:
        # The conversion touches what is stored, the expansion stores nothing.
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        mask = mask.expand(*q.shape[:3], k.shape[2])
    kept = 1 / (1 - spec.dropout) if spec.dropout else 0.0
    return *ids, key_mask, mask, spec.scale, spec.softcap or 0.0, left, right, spec.keep_from, kept, spec.seed
