"""How an adapted model is differentiated in its initialisation: exactly, by replay or by brute force, or not quite.

For inner steps ``(params_{k+1}, state_{k+1}) = Phi(params_k, state_k, g_k)`` and the query loss at ``params_K``, the
meta-gradient is v_0 of::

    v_K = grad L(params_K; Q),  u_K = 0
    (p_bar, s_bar, g_bar) = transpose of Phi' on (v_{k+1}, u_{k+1})        v_k = p_bar + H_k g_bar,  u_k = s_bar

and for plain descent ``v_k = v_{k+1} - lr H_k v_{k+1}``.

* ``Replay`` is that recursion, one inner step at a time. Exact.
* ``Unrolled`` keeps the graph of the whole loop and lets autograd find its way. Exact; the oracle.
* ``FirstOrder`` leaves every H out: ``v_0 = v_K`` (FOMAML, Finn et al., 2017, arXiv:1703.03400, section 5.2).
* ``Reptile`` asks for no query gradient: ``v_0 = params_0 - params_K`` (Nichol et al., 2018, arXiv:1803.02999).

An adjoint is called with an ``InnerLoop`` and a query batch and returns a ``MetaResult``.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamlfast.blocks import kept
from mamlfast.hvp import deterministic_attention_dropout, value_and_grad
from mamlfast.inner.loop import InnerLoop, check_finite, run, stacked
from mamlfast.inner.rate import learned, mapped
from mamlfast.inner.state import State, differentiated
from mamlfast.randomness import RandomState
from mamlfast.replay import Backward, Segment, segment_length
from mamlfast.tree import Params, detached


@dataclass(frozen=True, kw_only=True)
class MetaResult:
    """What ``meta_grad`` returns.

    ``query_loss`` is the scalar loss of the adapted parameters on the query, ``support_losses`` [K] the support loss
    before each inner step, ``grads`` the meta-gradient by parameter name, ``adapted`` the parameters after the loop.
    ``lr_grads`` has the structure of the optimizer's ``lr``, with a gradient for each tensor and None for each number;
    ``state_grads`` has ``[name][slot]`` for each tensor of the given state that requires a gradient. Both are None
    where nothing of the kind is learned, and from ``FirstOrder`` and ``Reptile``.
    """

    query_loss: Tensor
    support_losses: Tensor
    grads: Params
    adapted: Params
    lr_grads: Any = None
    state_grads: State | None = None


class Adjoint(Protocol):
    """A way to differentiate the query loss of an inner loop in the loop's initial parameters."""

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult: ...


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Exact, one inner step at a time.

    Every inner step keeps one parameter copy. Where the transpose of a step does not depend on its gradient (SGD with
    fixed rates and no clipping) that is ``params_k``; otherwise it is the gradient, and ``params_k`` and ``state_k``
    are made again from those before it by elementwise updates, bit for bit, at most K^2 / 2 of them and no product.
    On top come v, the working set of one loss evaluation on duals (with a recomputing loss: two tensors a block
    boundary and one block) and, except for plain SGD, one cotangent for each moment and one copy for ``params_k`` or
    the direction; clipping needs one more. Time: 8 products a linear layer and inner step on top of the first-order
    3 (11 on top of 4 with recomputation).

    ``checkpoint`` bounds what grows: with an int m, parameters and moments are kept at every m-th step only, and m
    steps at a time are taken again from there, one more gradient (3 or 4 products) for each. ``"sqrt"`` takes the m
    that needs least memory, the root of K times the copies at a checkpoint; ``"all"`` takes no step again. All give
    the same bits.

    Random draws of a step are repeated in its replay, and the generators end where the forward loop left them. Raises
    ValueError on another ``checkpoint``.
    """

    checkpoint: str | int = "all"

    def __post_init__(self):
        m = self.checkpoint
        if m not in ("all", "sqrt") and (not isinstance(m, int) or isinstance(m, bool) or m < 1):
            raise ValueError(f'checkpoint must be "all", "sqrt" or a positive number of steps; got {m!r}')

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult:
        steps, length = len(loop.batches), segment_length(self.checkpoint, loop)
        (params, state), random, losses, starts, segment = loop.start(), [], [], [], None
        for first in range(0, steps, length):
            segment = Segment(loop, first, params, state)
            starts.append((first, params, state))
            for _ in range(first, min(first + length, steps)):
                random.append(RandomState.now())
                value, params, state = segment.advance(params, state)
                losses.append(value)
        del state
        query_loss, v = value_and_grad(loop.loss, params, query)
        backward = Backward(loop, v)
        while starts:
            first, *point = starts.pop()
            segment = segment or _again(loop, first, point, random)
            del point
            while len(segment):
                with random.pop().again():
                    backward.step(segment)
            segment = None
        return MetaResult(
            query_loss=query_loss,
            support_losses=stacked(losses),
            grads=v,
            adapted=params,
            lr_grads=backward.lr_grads(),
            state_grads=backward.state_grads(),
        )


def _again(loop, first, point, random):
    """The segment that starts at step ``first``, and ends where the random states do."""
    params, state = point
    segment = Segment(loop, first, params, state)
    for k in range(first, len(random)):
        with random[k].again():
            _, params, state = segment.advance(params, state)
    return segment


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Exact, by plain autograd through the whole loop (double backward): the oracle of all the others.

    Keeps every activation of every inner step and the graphs of their gradients. Attention that PyTorch cannot
    differentiate twice runs in its mathematical form.
    """

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult:
        params, state = loop.start()
        start = params = {name: p.requires_grad_() for name, p in params.items()}
        places = differentiated(loop.state)
        for name, slot in places:
            state[name][slot].requires_grad_()
        moments = [state[name][slot] for name, slot in places]
        rates = {place: lr.detach().requires_grad_() for place, lr in learned(loop.inner.lr).items()}
        inner = (
            replace(loop.inner, lr=mapped(loop.inner.lr, lambda place, lr: rates.get(place, lr)))
            if rates
            else loop.inner
        )
        losses = []
        with torch.enable_grad(), kept(), sdpa_kernel(SDPBackend.MATH), deterministic_attention_dropout():
            for k, batch in enumerate(loop.batches):
                value = loop.loss(params, batch)
                grads = torch.autograd.grad(value, list(params.values()), create_graph=True, allow_unused=True)
                grads = {name: g for name, g in zip(params, grads, strict=True) if g is not None}
                check_finite(k, value.detach(), {name: g.detach().sum() for name, g in grads.items()})
                params, state = inner.update(params, state, grads, step=k)
                losses.append(value.detach())
            query_loss = loop.loss(params, query)
            wanted = [*start.values(), *rates.values(), *moments]
            grads = iter(torch.autograd.grad(query_loss, wanted, materialize_grads=True))
        return MetaResult(
            query_loss=query_loss.detach(),
            support_losses=stacked(losses),
            grads={name: next(grads) for name in start},
            adapted=detached(params),
            lr_grads=_rate_grads(loop.inner.lr, {place: next(grads) for place in rates}),
            state_grads=_state_grads(places, list(grads)),
        )


def _rate_grads(lr, found):
    return mapped(lr, lambda place, _: found.get(place)) if found else None


def _state_grads(places, grads):
    found: State = {}
    for (name, slot), g in zip(places, grads, strict=True):
        found.setdefault(name, {})[slot] = g
    return found or None


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """The query gradient at the adapted parameters, taken for the meta-gradient: every Hessian is left out."""

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult:
        adapted, losses = run(loop)
        query_loss, grads = value_and_grad(loop.loss, adapted, query)
        return MetaResult(query_loss=query_loss, support_losses=losses, grads=grads, adapted=adapted)


@dataclass(frozen=True, kw_only=True)
class Reptile:
    """The way the inner loop went, reversed: ``params_0 - params_K``. The query is only looked at for its loss."""

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult:
        adapted, losses = run(loop)
        with torch.no_grad(), deterministic_attention_dropout():
            query_loss = loop.loss(adapted, query)
        grads = {name: p.detach() - adapted[name] for name, p in loop.params.items()}
        return MetaResult(query_loss=query_loss, support_losses=losses, grads=grads, adapted=adapted)
