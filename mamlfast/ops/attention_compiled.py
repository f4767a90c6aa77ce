"""Attention as torch.compile sees it: custom operators, so that its memory stays linear in the sequence lengths.

Dynamo drops what an ``autograd.Function`` says of forward mode, and the reference keeps every score. So a compiled
region gets three operators, each with a fake implementation, that call the four functions of the Rule:

    forward          (xs)                ->  o, lse
    backward         (xs, o, lse, o_bar) ->  xs_bar, the derivative of the first
    double_backward  (xs, u, o_bar)      ->  the cotangents of xs and o_bar, the derivative of the second

A custom operator has no forward mode and no place under ``torch.func``; there the reference answers, exact and
quadratic in memory. An operator takes numbers and tensors only, so the specification is taken apart and put together.
"""

from collections.abc import Callable
from typing import Any

import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor
from torch.library import custom_op
from torch.utils._pytree import register_pytree_node, tree_map_only

from mamlfast.ops.rule import Rule, transforms_active

_NAMESPACE = "mamlfast_compiled"
_TENSORS = "Tensor? query_ids, Tensor? key_ids, Tensor? key_mask, Tensor? mask"
_NUMBERS = (
    "float scale, bool causal, SymInt offset, SymInt? left, SymInt? right, float? softcap, float dropout, SymInt seed"
)


def _take_apart(spec: AttentionSpec) -> tuple[Any, ...]:
    query_ids, key_ids = spec.segments or (None, None)
    tensors = query_ids, key_ids, spec.key_mask, spec.mask
    return *tensors, spec.scale, spec.causal, spec.offset, *spec.window, spec.softcap, spec.dropout, spec.seed


def _put_together(*parts: Any) -> AttentionSpec:
    query_ids, key_ids, key_mask, mask, scale, causal, offset, left, right, softcap, dropout, seed = parts
    segments: Any = None if query_ids is None and key_ids is None else (query_ids, key_ids)  # either, in a tree of dims
    return AttentionSpec(
        scale=scale,
        causal=causal,
        offset=offset,
        window=(left, right),
        softcap=softcap,
        segments=segments,
        key_mask=key_mask,
        mask=mask,
        dropout=dropout,
        seed=seed,
    )


def _flatten(spec):
    parts = _take_apart(spec)
    return list(parts[:4]), parts[4:]


# So that ``torch.func`` finds the tensors inside, maps them and unwraps them.
register_pytree_node(AttentionSpec, _flatten, lambda tensors, numbers: _put_together(*tensors, *numbers))


def fold_attention(xs: tuple[Tensor, ...], options: dict[str, Any]) -> dict[str, Any] | None:
    """``Rule.fold`` of attention: [N, B, H, T, D] -> [N B, H, T, D].

    None where the entries share something: sinks, dropout's draws, or a mask that would be copied.
    """
    spec = options["spec"]
    if len(xs) > 3 or spec.dropout or spec.mask is not None:
        return None
    return tree_map_only(Tensor, lambda t: t.flatten(0, 1), options)


def compiled_attention(rule: Rule) -> Callable[..., Tensor]:
    """Return what the attention ``rule`` is inside ``torch.compile``: ``(q, k, v, *sinks, spec=AttentionSpec)``.

    Differentiable to first order where the compiler is, twice where it allows that (``backend="eager"``); no third
    derivative. Time and memory are the rule's, except under ``torch.func`` and forward mode: O(B H T S).
    The rule's ``saved`` must be ``(o, lse)`` after ``fwd``, lse [B, H, T] in float32 at least.
    """
    forward = _operators(rule)

    def attention(*xs: Tensor, spec: AttentionSpec) -> Tensor:
        if transforms_active():
            return rule.reference(*xs, spec=spec)
        return forward(list(xs), *_take_apart(spec))[0]

    return attention


def _operators(rule):
    """Define the three operators and return the first."""
    double_backward = _double_backward_operator(rule)
    backward = _backward_operator(rule, double_backward)
    name = f"{_NAMESPACE}::{rule.name}_forward"

    @custom_op(name, mutates_args=(), schema=f"(Tensor[] xs, {_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)")
    def forward(xs, *parts):
        o, (_, lse) = rule.fwd(tuple(xs), spec=_put_together(*parts))
        return o.contiguous(), lse.contiguous()

    @forward.register_fake
    def _(xs, *parts):
        q, _, v, *_ = xs
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_empty(*q.shape[:3], v.shape[3]), lse

    def setup_context(ctx, inputs, output):
        xs, *parts = inputs
        ctx.n, ctx.numbers = len(xs), parts[4:]
        ctx.save_for_backward(*xs, *output, *parts[:4])

    def derivative(ctx, o_bar, _):
        tensors = ctx.saved_tensors
        xs, (o, lse), parts = list(tensors[: ctx.n]), tensors[ctx.n : -4], (*tensors[-4:], *ctx.numbers)
        need = list(ctx.needs_input_grad[0])
        xs_bar = backward(xs, o, lse, o_bar, need, *parts)
        return _wanted(xs_bar, need), *(None for _ in parts)

    forward.register_autograd(derivative, setup_context=setup_context)
    return forward


def _backward_operator(rule, double_backward):
    name = f"{_NAMESPACE}::{rule.name}_backward"
    schema = f"(Tensor[] xs, Tensor o, Tensor lse, Tensor o_bar, bool[] need, {_TENSORS}, {_NUMBERS}) -> Tensor[]"

    @custom_op(name, mutates_args=(), schema=schema)
    def backward(xs, o, lse, o_bar, need, *parts):
        xs_bar = rule.bwd(tuple(xs), (o, lse), o_bar, tuple(need), spec=_put_together(*parts))
        return _dense(xs_bar, need, xs)

    @backward.register_fake
    def _(xs, o, lse, o_bar, need, *parts):
        return _dense([x.new_empty(x.shape) for x in xs], need, xs)

    def setup_context(ctx, inputs, output):
        xs, _, _, o_bar, need, *parts = inputs
        ctx.n, ctx.numbers = len(xs), parts[4:]
        ctx.save_for_backward(*xs, o_bar, *parts[:4])

    def derivative(ctx, xs_bar_cot):
        xs, (o_bar, *masks) = list(ctx.saved_tensors[: ctx.n]), ctx.saved_tensors[ctx.n :]
        need_xs, _, _, need_o_bar, *_ = ctx.needs_input_grad
        need = [*need_xs, need_o_bar]
        *xs_cot, o_bar_cot = _wanted(double_backward(xs, xs_bar_cot, o_bar, need, *masks, *ctx.numbers), need)
        return xs_cot, None, None, o_bar_cot, None, *(None for _ in (*masks, *ctx.numbers))

    backward.register_autograd(derivative, setup_context=setup_context)
    return backward


def _double_backward_operator(rule):
    name = f"{_NAMESPACE}::{rule.name}_double_backward"
    schema = f"(Tensor[] xs, Tensor?[] u, Tensor o_bar, bool[] need, {_TENSORS}, {_NUMBERS}) -> Tensor[]"

    @custom_op(name, mutates_args=(), schema=schema)
    def double_backward(xs, u, o_bar, need, *parts):
        xs, spec = tuple(xs), _put_together(*parts)
        u = tuple(torch.zeros_like(x) if t is None or t.shape != x.shape else t for x, t in zip(xs, u, strict=True))
        _, o_bar_cot, saved = rule.fwd_jvp(xs, u, spec=spec)
        nothing, zero = (False,) * len(xs), torch.zeros_like(o_bar)
        _, xs_cot = rule.bwd_jvp(xs, u, saved, o_bar, zero, nothing, tuple(need[:-1]), spec=spec)
        return _dense([*xs_cot, o_bar_cot], need, [*xs, o_bar])

    @double_backward.register_fake
    def _(xs, u, o_bar, need, *parts):
        return _dense([x.new_empty(x.shape) for x in (*xs, o_bar)], need, [*xs, o_bar])

    return double_backward


def _dense(values, need, like):
    """What an operator may return: contiguous tensors, of no element where nothing was asked for."""
    return [
        value.contiguous() if wanted else x.new_empty(0) for value, wanted, x in zip(values, need, like, strict=True)
    ]


def _wanted(values, need):
    return [value if wanted else None for value, wanted in zip(values, need, strict=True)]
