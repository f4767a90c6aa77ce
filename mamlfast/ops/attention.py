"""Softmax attention to second order, in memory linear in the sequence lengths.

For one head, s the scale, masked scores excluded, sums over a row run over the visible keys::

    S = s q k'        P = softmax(S)        L = logsumexp(S)        o = P v

    S_dot = s (q_dot k' + q k_dot')          mu = rowsum(P S_dot)             (mu is L_dot)
    P_dot = P (S_dot - mu)                   o_dot = P_dot v + P v_dot

    delta     = rowsum(o_bar o)              P_bar     = o_bar v'
    delta_dot = rowsum(o_bar_dot o + o_bar o_dot)
                                             P_bar_dot = o_bar_dot v' + o_bar v_dot'
    S_bar     = P (P_bar - delta)            S_bar_dot = P_dot (P_bar - delta) + P (P_bar_dot - delta_dot)
    q_bar     = s S_bar k                    q_bar_dot = s (S_bar_dot k + S_bar k_dot)
    k_bar     = s S_bar' q                   k_bar_dot = s (S_bar_dot' q + S_bar' q_dot)
    v_bar     = P' o_bar                     v_bar_dot = P_dot' o_bar + P' o_bar_dot

(FlashAttention's recomputation from L, Dao et al., 2022, arXiv:2205.14135, carried to the tangent.) The saved
tensors are o and L, after ``fwd_jvp`` with their tangents, so no row sum ever needs a second pass.

* A soft-cap c puts ``S = c tanh(Z / c)``, Z = s q k', between: with u = 1 - (S/c)^2, S_dot = u Z_dot, Z_bar = u S_bar
  and Z_bar_dot = u S_bar_dot - (2/c^2) S S_dot S_bar.
* Dropout multiplies P by a constant Z where it meets v and P_bar; mu and delta stay what they are.
* A sink is one more score a, of a key whose value is zero. It needs no kernel: L' = log(e^L + e^a) and o' = e^(L-L') o
  go the same way through the same backward, and a_bar = -sum(e^(a-L') delta).
* A query that sees no key gives zeros, in value and in every derivative.

Products in units of one T S D matrix product, half of that under a causal mask: forward 2, backward 5, ``fwd_jvp`` 6,
``bwd_jvp`` 15 (Triton 21: it visits the pairs once by queries and once by keys, so that nothing is added atomically).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor

from mamlfast.ops import attention_eager, attention_first_order, attention_native
from mamlfast.ops.attention_compiled import compiled_attention, fold_attention
from mamlfast.ops.attention_eager import row_sum
from mamlfast.ops.attention_reference import attention_reference as attention_reference
from mamlfast.ops.backend import backend_for, forced_backend
from mamlfast.ops.rule import Rule, is_constant

_log = logging.getLogger("mamlfast")

Window = tuple[int | None, int | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    segments: Tensor | tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    window: Window = (None, None),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    offset: int = 0,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """``softmax(scale q k') v`` [B, H, T, E] of q [B, H, T, D], k [B, G, S, D], v [B, G, S, E], G dividing H.

    Differentiable twice in every mode, exactly; strided views are read as they are. Each query head reads the key head
    of its group, h G // H. Query t stands at key position ``t + offset``; which keys it sees:

    * ``causal``: none to its right. ``window = (left, right)``: so many to either side besides its own, None for all.
    * ``key_mask``, bool [B, S]: those that are True (padding).
    * ``segments``: int [B, T], or a pair [B, T], [B, S]: those of its own id (packed sequences). The same thing as
      ``cu_seqlens``, int [N + 1], for B = 1: the boundaries 0, ..., T of N sequences in a row, or a pair for T and S.
    * ``mask``, broadcastable to [B, H, T, S]: those that are True, or, floating, added to the scores. It is the one
      option that is quadratic in length by itself.

    ``scale`` defaults to D^-1/2; ``softcap`` c turns scores into ``c tanh(scores / c)``; ``sinks`` [H] are scores of
    one further key a head whose value is zero. ``dropout`` sets weights to zero with that probability and scales the
    others up; ``seed`` fixes which, and is drawn from torch's default generator where it is None. A query that sees no
    key gives zeros. Masks, segments and the like are constants.

    Raises ValueError where shapes, dtypes, devices or numbers do not fit, TypeError for what is no tensor.
    """
    _check(q, k, v, sinks)
    spec = _specification(
        q, k, causal=causal, mask=mask, key_mask=key_mask, segments=segments, cu_seqlens=cu_seqlens, window=window,
        softcap=softcap, scale=scale, offset=offset, dropout=dropout, seed=seed,
    )  # fmt: skip
    return attention_rule(q, k, v, spec=spec) if sinks is None else attention_rule(q, k, v, sinks, spec=spec)


def attention_backend(
    q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options: Any
) -> dict[str, str]:
    """Return which kernels answer ``attention(q, k, v, **options)``: ``{"first order": ..., "second order": ...}``.

    ``mamlfast.ops.use_backend`` forces a room ("triton", "native", "eager") on both;
    ``mamlfast.ops.use_first_order_attention`` forces the kernel of the first. Raises as ``attention`` does.
    """
    _check(q, k, v, sinks)
    spec = _specification(q, k, **options)
    kernel, room = attention_first_order.kernel_for((q, k, v), spec), _room_name((q, k, v), spec)
    return {"first order": room if kernel is None else kernel.name, "second order": room}


def _specification(q, k, *, segments=None, cu_seqlens=None, scale=None, dropout=0.0, seed=None, **others):
    (B, _, T, D), S = q.shape, k.shape[2]
    if cu_seqlens is not None:
        if segments is not None:
            raise ValueError("give segments or cu_seqlens, not both")
        segments = _segments_of(cu_seqlens, B, T, S, others.get("causal", False))
    if isinstance(segments, Tensor):
        segments = segments, segments
    _check_visibility(q, S, others.get("mask"), others.get("key_mask"), segments)
    scale = D**-0.5 if scale is None else scale
    seed = _draw_seed() if dropout and seed is None else seed or 0
    return AttentionSpec(segments=segments, scale=scale, dropout=dropout, seed=seed, **others)


def _draw_seed() -> int:
    """On the CPU, where it costs no wait for a GPU; checkpoints restore that generator before they recompute."""
    return int(torch.randint(0, 1 << 62, ()).item())


def _segments_of(cu_seqlens, B, T, S, causal) -> Any:
    both = (cu_seqlens, cu_seqlens) if isinstance(cu_seqlens, Tensor) else tuple(cu_seqlens)
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences into a batch of one; q has {B} entries: use segments")
    if causal and both[0] is not both[1] and not torch.equal(*both):
        raise ValueError("causal attention needs the same cu_seqlens for queries and keys; give a mask instead")
    return tuple(_ids_of(cu, n) for cu, n in zip(both, (T, S), strict=True))


def _ids_of(cu, tokens):
    if cu.ndim != 1 or cu.is_floating_point() or len(cu) < 2:
        raise ValueError(f"cu_seqlens must be integers [N + 1], got {cu.dtype} {list(cu.shape)}")
    if cu[0] != 0 or cu[-1] != tokens or (cu.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {cu.tolist()}")
    return torch.bucketize(torch.arange(tokens, device=cu.device), cu[1:], right=True)[None]


def _check(q, k, v, sinks):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have four dimensions, [batch, heads, tokens, width]; got {list(x.shape)}")
    (B, H, _, D), (_, G, S, _) = q.shape, v.shape
    if k.shape != (B, G, S, D) or v.shape[0] != B or G == 0 or H % G or D == 0:
        raise ValueError(
            "q, k, v must be [B, H, T, D], [B, G, S, D], [B, G, S, E] with G dividing H; "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    xs = (q, k, v) if sinks is None else (q, k, v, sinks)
    if not q.is_floating_point() or any(x.dtype != q.dtype for x in xs):
        raise ValueError(f"q, k, v and sinks must share one floating dtype, got {[str(x.dtype) for x in xs]}")
    if any(x.device != q.device for x in xs):
        raise ValueError(f"q, k, v and sinks must be on one device, got {[str(x.device) for x in xs]}")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"sinks must be one score a query head, [{H}]; got {list(sinks.shape)}")


def _check_visibility(q, S, mask, key_mask, segments):
    B, H, T, _ = q.shape
    if mask is not None:
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        if any(n not in (1, m) for n, m in zip(shape, (B, H, T, S), strict=False)) or len(shape) != 4:
            raise ValueError(f"mask must be broadcastable to [B, H, T, S] = {[B, H, T, S]}; got {list(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"mask must be bool (True: visible) or floating (added), got {mask.dtype}")
        if not is_constant(mask):
            raise ValueError("mask must be a constant; it has a gradient or tangent, which attention does not pass on")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (B, S)):
        raise ValueError(f"key_mask must be bool [B, S] = {[B, S]}; got {key_mask.dtype} {list(key_mask.shape)}")
    if segments is not None:
        shapes = [list(ids.shape) for ids in segments]
        if shapes != [[B, T], [B, S]] or any(ids.is_floating_point() for ids in segments):
            raise ValueError(f"segments must be integers [B, T] = {[B, T]} and [B, S] = {[B, S]}; got {shapes}")
    constants = [x for x in (mask, key_mask, *(segments or ())) if x is not None]
    if any(x.device != q.device for x in constants):
        raise ValueError(f"masks and segments must be on {q.device}, as q is")


def _room_name(xs: Sequence[Tensor], spec: AttentionSpec) -> str:
    rooms = {"eager"}
    if all(x.dtype == xs[0].dtype for x in xs):
        rooms.add("native")
        if all(16 <= x.shape[-1] <= 256 for x in xs) and spec.scale > 0 and spec.mask is None:
            rooms.add("triton")
    name = backend_for(*xs, rooms=rooms)
    if name == "eager" and xs[0].is_cuda and forced_backend() is None:
        _tell_of_eager(xs, spec)
    return name


_said: set[str] = set()


def _tell_of_eager(xs, spec):
    """Slower, and with a dense mask quadratic already: say so, once for each reason."""
    reason = "Triton is not installed"
    if spec.mask is not None:
        reason = "a dense mask was given; key_mask, segments and window say the same in linear memory"
    elif spec.scale <= 0 or not all(16 <= x.shape[-1] <= 256 for x in xs):
        reason = "the kernels take a positive scale and head dimensions 16 to 256"
    if reason not in _said:
        _said.add(reason)
        _log.warning("attention on %s runs in eager chunks, without fused kernels: %s", xs[0].device, reason)


def _room(xs: Sequence[Tensor], spec: AttentionSpec) -> ModuleType:
    """The room's four functions, in a module: ``attention_fwd``, ``_bwd``, ``_fwd_jvp``, ``_bwd_jvp``."""
    name = _room_name(xs, spec)
    if name == "triton":
        from mamlfast_kernels import attention as attention_triton

        return attention_triton
    return attention_native if name == "native" else attention_eager


def _fwd(xs, *, spec):
    q, k, v, *sinks = xs
    kernel = attention_first_order.kernel_for((q, k, v), spec)
    o, lse = _room(xs[:3], spec).attention_fwd(q, k, v, spec=spec) if kernel is None else kernel.fwd(q, k, v, spec)
    for sink in sinks:
        lse, p_rest, _ = _with_sink(lse, sink)
        o = _scaled(o, p_rest)
    return o, (o, lse)


def _fwd_jvp(xs, xs_dot, *, spec):
    (q, k, v, *sinks), (q_dot, k_dot, v_dot, *sinks_dot) = xs, xs_dot
    o, o_dot, lse, mu = _room(xs[:3], spec).attention_fwd_jvp(q, k, v, q_dot, k_dot, v_dot, spec=spec)
    for sink, sink_dot in zip(sinks, sinks_dot, strict=True):
        lse, p_rest, p_sink = _with_sink(lse, sink)
        mu_of_keys, mu = mu, p_rest * mu + p_sink * sink_dot[:, None]
        o_dot = _scaled(o_dot, p_rest) + _scaled(o, p_rest * (mu_of_keys - mu))
        o = _scaled(o, p_rest)
    return o, o_dot, (o, o_dot, lse, mu)


def _bwd(xs, saved, y_bar, need, *, spec):
    (q, k, v, *sinks), (o, lse) = xs, saved
    kernel = attention_first_order.kernel_for((q, k, v), spec)
    if kernel is None:
        xs_bar = _room(xs[:3], spec).attention_bwd(q, k, v, o, lse, y_bar, spec=spec, need=need[:3])
    else:
        xs_bar = kernel.bwd(q, k, v, o, lse, y_bar, spec)
    return *xs_bar, *(_over_rows(-_sink_share(lse, sink) * row_sum(y_bar, o), sink) for sink in sinks)


def _bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, *, spec):
    (q, k, v, *sinks), (q_dot, k_dot, v_dot, *sinks_dot), (o, o_dot, lse, mu) = xs, xs_dot, saved
    xs_bar, xs_bar_dot = _room(xs[:3], spec).attention_bwd_jvp(
        q, k, v, q_dot, k_dot, v_dot, o, o_dot, lse, mu, y_bar, y_bar_dot,
        spec=spec, need=need[:3], need_dot=need_dot[:3],
    )  # fmt: skip
    for sink, sink_dot in zip(sinks, sinks_dot, strict=True):
        delta, delta_dot = row_sum(y_bar, o), row_sum(y_bar_dot, o) + row_sum(y_bar, o_dot)
        p_sink = _sink_share(lse, sink)
        p_sink_dot = p_sink * (sink_dot[:, None] - mu)
        xs_bar = *xs_bar, _over_rows(-p_sink * delta, sink)
        xs_bar_dot = *xs_bar_dot, _over_rows(-p_sink_dot * delta - p_sink * delta_dot, sink)
    return xs_bar, xs_bar_dot


def _with_sink(lse, sink):
    """Log-sum-exp with the sink among the scores, and what the keys and the sink have of the weight."""
    total = torch.logaddexp(lse, sink[:, None].to(lse.dtype))
    p_rest = torch.exp(lse - total).masked_fill(lse == -torch.inf, 0)
    return total, p_rest, _sink_share(total, sink)


def _sink_share(lse, sink):
    return torch.exp(sink[:, None].to(lse.dtype) - lse).masked_fill(lse == -torch.inf, 0)


def _scaled(o, rows):
    return (o * rows[..., None]).to(o.dtype)


def _over_rows(x, sink):
    return x.sum((0, 2)).to(sink.dtype)


attention_rule = Rule(
    name="attention",
    reference=attention_reference,
    fwd=_fwd,
    bwd=_bwd,
    fwd_jvp=_fwd_jvp,
    bwd_jvp=_bwd_jvp,
)
attention_rule = replace(attention_rule, compiled=compiled_attention(attention_rule), fold=fold_attention)
