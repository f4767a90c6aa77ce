"""The inner loop, one step at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamlfast.hvp import Loss, sweep
from mamlfast.inner.clip import Clipping, clipped, clipping
from mamlfast.inner.optimizer import Optimizer
from mamlfast.inner.rate import check_rates_for, rate_at
from mamlfast.inner.state import Slots, State, joined
from mamlfast.tree import Params, detached, empty_like


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an inner step left: the loss before it, parameters and state after it, and what its transpose may read.

    ``stepped`` are the names that the loss depends on. ``grads`` holds their gradients before clipping where they were
    asked for, else nothing.
    """

    loss: Tensor
    params: Params
    state: State
    stepped: tuple[str, ...]
    grads: Params
    clip: Clipping | None


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """``loss`` descended from ``params`` by ``inner``, one batch a step, from a given ``state`` or the optimizer's own.

    Raises ValueError where learning rates or state do not match parameters and steps.
    """

    loss: Loss
    params: Params
    batches: Sequence[Any]
    inner: Optimizer
    state: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self):
        check_rates_for(self.inner.lr, self.params, len(self.batches))

    def start(self) -> tuple[Params, State]:
        """Return parameters and state before the first step, detached."""
        params = detached(self.params)
        return params, joined(self.state, self.inner.init(params), self.inner.slots, params)

    def advanced(self, p: Tensor, slots: Slots, k: int, name: str, g: Tensor) -> tuple[Tensor, Slots]:
        """Return one parameter and its state after step k with the gradient ``g``, clipped already."""
        return self.inner.update_one(p, slots, g, self.rate(k, name))

    def rate(self, k: int, name: str) -> float | Tensor:
        """Return the learning rate of a parameter at step k, detached."""
        lr = rate_at(self.inner.lr, k, name)
        return lr.detach() if isinstance(lr, Tensor) else lr

    def step(self, params: Params, state: State, k: int, *, keep: bool = False) -> Step:
        """Take inner step k; ``keep`` its gradients, one parameter copy.

        Without that and without clipping there is no gradient buffer: each parameter is updated as its gradient
        appears. Raises ValueError where the loss or a gradient is not finite, naming the step.
        """
        after, after_state, sums = empty_like(params), dict(state), {}
        at_once = self.inner.clip is None
        buffer = empty_like(params) if keep or not at_once else {}

        def update(name, g):
            lr = self.rate(k, name)
            _, after_state[name] = self.inner.update_one(params[name], state[name], g, lr, out=after[name])

        def consume(name, g):
            sums[name] = g.sum(dtype=torch.promote_types(g.dtype, torch.float32))
            if buffer:
                buffer[name].copy_(g)
            if at_once:
                update(name, g)

        value = sweep(self.loss, params, self.batches[k], consume)
        check_finite(k, value, sums)
        grads = {name: g for name, g in buffer.items() if name in sums}
        clip = clipping(grads, self.inner.clip)
        if not at_once:
            for name, g in grads.items():
                update(name, clipped(g, clip))
        after = {name: p if name in sums else params[name] for name, p in after.items()}
        return Step(
            loss=value,
            params=after,
            state=after_state,
            stepped=tuple(sums),
            grads=grads if keep else {},
            clip=clip,
        )


def run(loop: InnerLoop) -> tuple[Params, Tensor]:
    """Return the parameters after the whole loop and the support losses [K], keeping nothing on the way."""
    (params, state), losses = loop.start(), []
    for k in range(len(loop.batches)):
        step = loop.step(params, state, k)
        params, state = step.params, step.state
        losses.append(step.loss)
        del step
    return params, stacked(losses)


def stacked(losses: Sequence[Tensor]) -> Tensor:
    """Return the losses as one tensor [K], which may be empty."""
    return torch.stack(list(losses)) if losses else torch.empty(0)


def check_finite(k: int, value: Tensor, sums: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the loss before step k and the sum of each gradient are finite."""
    if torch.isfinite(torch.stack([value.float(), *(s.float() for s in sums.values())])).all():
        return
    if not torch.isfinite(value):
        raise ValueError(
            f"inner step {k} must start from a finite loss; it is {float(value)}: lower the inner learning rate, "
            f"or look at the model and the batch"
        )
    name = next(name for name, s in sums.items() if not torch.isfinite(s))
    raise ValueError(f"inner step {k} must have finite gradients; that of {name} is not, with a loss of {float(value)}")
