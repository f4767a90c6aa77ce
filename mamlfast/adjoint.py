"""How an adapted model is differentiated in its initialisation: exactly, by replay or by brute force, or not quite.

For inner steps ``params_{k+1} = params_k - lr g_k`` and the query loss at ``params_K``, the meta-gradient is v_0 of::

    v_K = grad L(params_K; Q)            v_k = v_{k+1} - lr H_k v_{k+1}            k = K-1 .. 0

* ``Replay`` is that recursion: the forward loop keeps ``params_k`` and nothing else, the backward loop visits one
  inner step at a time. Exact.
* ``Unrolled`` keeps the graph of the whole loop and lets autograd find its way. Exact; the oracle.
* ``FirstOrder`` leaves every H out: ``v_0 = v_K`` (FOMAML, Finn et al., 2017, arXiv:1703.03400, section 5.2).
* ``Reptile`` asks for no query gradient: ``v_0 = params_0 - params_K`` (Nichol et al., 2018, arXiv:1803.02999).

An adjoint is called with an ``InnerLoop`` and a query batch and returns a ``MetaResult``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamlfast.blocks import kept
from mamlfast.hvp import Loss, deterministic_attention_dropout, sweep, value_and_grad
from mamlfast.inner import SGD
from mamlfast.randomness import RandomState
from mamlfast.tree import Params, detached, empty_like


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """``loss`` descended from ``params`` by ``inner``, one batch a step."""

    loss: Loss
    params: Params
    batches: Sequence[Any]
    inner: SGD

    def step(self, params: Params, k: int) -> tuple[Params, Tensor]:
        """Return the parameters after inner step k and the support loss before it.

        Each parameter is updated as its gradient appears: there is no gradient buffer. Raises ValueError where the
        loss or a gradient is not finite, naming the step.
        """
        after, sums = empty_like(params), {}

        def consume(name, g):
            sums[name] = g.sum(dtype=torch.promote_types(g.dtype, torch.float32))
            self.inner.update(params[name], g, out=after[name])

        value = sweep(self.loss, params, self.batches[k], consume)
        _check_finite(k, value, sums)
        return {name: p if name in sums else params[name] for name, p in after.items()}, value


@dataclass(frozen=True, kw_only=True)
class MetaResult:
    """What ``meta_grad`` returns.

    ``query_loss`` is the scalar loss of the adapted parameters on the query, ``support_losses`` [K] the support loss
    before each inner step, ``grads`` the meta-gradient by parameter name, ``adapted`` the parameters after the loop.
    """

    query_loss: Tensor
    support_losses: Tensor
    grads: Params
    adapted: Params


class Adjoint(Protocol):
    """A way to differentiate the query loss of an inner loop in the loop's initial parameters."""

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult: ...


def run(loop: InnerLoop) -> tuple[Params, Tensor]:
    """Return the parameters after the whole loop and the support losses [K], keeping nothing on the way."""
    params, losses = detached(loop.params), []
    for k in range(len(loop.batches)):
        params, value = loop.step(params, k)
        losses.append(value)
    return params, _stacked(losses)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Exact, one inner step at a time.

    Memory at its peak: the K + 1 parameter sets, v, and the working set of one loss evaluation on duals (with a
    recomputing loss: two tensors a block boundary and one block). Time: 8 products a linear layer and inner step on
    top of the first-order 3 (11 on top of 4 with recomputation). Random draws of a step are repeated in its replay,
    and the generators end where the forward loop left them.
    """

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult:
        visited, states, losses = [detached(loop.params)], [], []
        for k in range(len(loop.batches)):
            states.append(RandomState.now())
            params, value = loop.step(visited[-1], k)
            visited.append(params)
            losses.append(value)
        adapted = visited.pop()
        query_loss, v = value_and_grad(loop.loss, adapted, query)
        while visited:
            params, batch = visited.pop(), loop.batches[len(visited)]
            with states.pop().again():
                _pull_back(loop, params, batch, v)
        return MetaResult(query_loss=query_loss, support_losses=_stacked(losses), grads=v, adapted=adapted)


def _pull_back(loop, params, batch, v):
    """``v <- v - lr H v``, a parameter at a time, as its product appears."""

    sweep(loop.loss, params, batch, lambda name, hv: loop.inner.pull_back(v[name], hv), v)


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Exact, by plain autograd through the whole loop (double backward): the oracle of all the others.

    Keeps every activation of every inner step and the graphs of their gradients. Attention that PyTorch cannot
    differentiate twice runs in its mathematical form.
    """

    def __call__(self, loop: InnerLoop, query: Any) -> MetaResult:
        start = {name: p.detach().requires_grad_() for name, p in loop.params.items()}
        params, losses = start, []
        with torch.enable_grad(), kept(), sdpa_kernel(SDPBackend.MATH), deterministic_attention_dropout():
            for k, batch in enumerate(loop.batches):
                value = loop.loss(params, batch)
                grads = torch.autograd.grad(value, list(params.values()), create_graph=True, materialize_grads=True)
                _check_finite(k, value.detach(), {n: g.detach().sum() for n, g in zip(params, grads, strict=True)})
                params = {n: loop.inner.update(p, g) for (n, p), g in zip(params.items(), grads, strict=True)}
                losses.append(value.detach())
            query_loss = loop.loss(params, query)
            grads = torch.autograd.grad(query_loss, list(start.values()), materialize_grads=True)
        return MetaResult(
            query_loss=query_loss.detach(),
            support_losses=_stacked(losses),
            grads=dict(zip(start, grads, strict=True)),
            adapted=detached(params),
        )


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


def _stacked(losses):
    return torch.stack(losses) if losses else torch.empty(0)


def _check_finite(k, value, sums):
    if torch.isfinite(torch.stack([value.float(), *(s.float() for s in sums.values())])).all():
        return
    if not torch.isfinite(value):
        raise ValueError(
            f"inner step {k} must start from a finite loss; it is {float(value)}: lower the inner learning rate, "
            f"or look at the model and the batch"
        )
    name = next(name for name, s in sums.items() if not torch.isfinite(s))
    raise ValueError(f"inner step {k} must have finite gradients; that of {name} is not, with a loss of {float(value)}")
