"""The way back through inner steps that are replayed: what a stretch of them keeps, and the transpose of each."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamlfast.hvp import sweep
from mamlfast.inner.clip import Clipping, clipped, pull_back_clip
from mamlfast.inner.loop import InnerLoop
from mamlfast.inner.rate import RateGradients
from mamlfast.inner.state import Slots, State, differentiated, zeros
from mamlfast.tree import Params


def segment_length(checkpoint: str | int, loop: InnerLoop) -> int:
    """Return after how many steps parameters and state are kept; at least 1."""
    steps = max(len(loop.batches), 1)
    if checkpoint == "all":
        return steps
    if checkpoint == "sqrt":
        return math.ceil(math.sqrt(steps * (1 + len(loop.inner.moments))))
    return int(checkpoint)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one step keeps: its gradients, or the parameters before it and the names of the slots there were.

    One of the two is empty. The slots hold None: who keeps no gradients reads no moments.
    """

    stepped: frozenset[str]
    grads: Params
    clip: Clipping | None
    params: Params
    slots: State


class Segment:
    """Inner steps from ``first`` on, one parameter copy each."""

    def __init__(self, loop: InnerLoop, first: int, params: Params, state: State):
        self.loop, self.first = loop, first
        self._keep_grads = loop.inner.needs_gradient
        self._params, self._state = (params, state) if self._keep_grads else ({}, {})
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    def advance(self, params: Params, state: State) -> tuple[Tensor, Params, State]:
        """Take the next step; return the loss before it, parameters and state after it."""
        step = self.loop.step(params, state, self.first + len(self), keep=self._keep_grads)
        names = {name: dict.fromkeys(slots) for name, slots in state.items()}
        self._kept.append(
            Kept(
                stepped=frozenset(step.stepped),
                grads=step.grads,
                clip=step.clip,
                params={} if self._keep_grads else params,
                slots={} if self._keep_grads else names,
            )
        )
        return step.loss, step.params, step.state

    def pop(self) -> tuple[int, Kept]:
        """Return the number of the last step and what it kept, and forget it."""
        kept = self._kept.pop()
        return self.first + len(self), kept

    def before(self, kept: Kept, name: str) -> tuple[Tensor, Slots]:
        """Return a parameter and its state before the step just popped: kept, or made again from the gradients."""
        if kept.params:
            return kept.params[name], kept.slots[name]
        p, slots = self._params[name], self._state[name]
        for k, earlier in enumerate(self._kept, self.first):
            if name in earlier.stepped:
                p, slots = self.loop.advanced(p, slots, k, name, clipped(earlier.grads[name], earlier.clip))
        return p, slots


class Backward:
    """The recursion: v and u at the step reached, and the gradients of learned rates so far. ``v`` changes in place."""

    def __init__(self, loop: InnerLoop, v: Params):
        self._loop, self._v = loop, v
        self._u: State = {name: {slot: zeros(p) for slot in loop.inner.moments} for name, p in v.items()}
        self._rates = RateGradients(loop.inner.lr)

    def step(self, segment: Segment) -> None:
        """Go back through the last step of the segment."""
        k, kept = segment.pop()
        factor = self._loop.inner.in_place_factor(k)
        if factor is not None:
            self._sweep(k, kept.params, self._v, -factor)
            return
        params, direction = {}, {}
        for name, v in self._v.items():
            params[name], direction[name] = self._through_update(segment, k, kept, name, v)
        if kept.clip is not None:
            pull_back_clip(kept.grads, direction, kept.clip)
        self._sweep(k, params, direction, 1)

    def _through_update(self, segment, k, kept, name, v) -> tuple[Tensor, Tensor]:
        """The parameter before the step, and the cotangent of its gradient; v and u lose the step's update."""
        p, slots = segment.before(kept, name)
        if name not in kept.stepped:
            return p, torch.zeros_like(p)
        g, lr = kept.grads.get(name), self._loop.rate(k, name)
        used = None if g is None else clipped(g, kept.clip)
        g_bar, lr_bar = self._loop.inner.pull_back(p, slots, used, lr, v, self._u[name])
        self._rates.add(k, name, lr_bar)
        # The gradient is read no more, except by the transpose of the clipping: its memory serves.
        return p, g_bar if g is None or kept.clip is not None else g.copy_(g_bar)

    def _sweep(self, k, params, direction, factor):
        loop, v = self._loop, self._v
        sweep(loop.loss, params, loop.batches[k], lambda name, hv: v[name].add_(hv, alpha=factor), direction)

    def lr_grads(self) -> Any:
        """Return the gradients of the learned rates, in their structure."""
        return self._rates.result()

    def state_grads(self) -> State | None:
        """Return the gradients of the given state tensors that require one."""
        found: State = {}
        for name, slot in differentiated(self._loop.state):
            found.setdefault(name, {})[slot] = self._u[name][slot].clone()
        return found or None
