"""Gradient descent with momentum."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mamlfast.inner.optimizer import Optimizer
from mamlfast.inner.rate import Rate, check_number
from mamlfast.inner.state import Slots, zeros


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """``torch.optim.SGD``; plain, it is the inner optimizer of MAML (Finn et al., 2017, arXiv:1703.03400, eq. 1)::

        h = g + weight_decay p
        b' = h at the first step, else momentum b + (1 - dampening) h      (h itself without momentum)
        p' = p - lr (h + momentum b' if nesterov else b')

    Linear in p, b and g: going back reads the gradient only where a learning rate is learned or the norm is clipped.
    State: ``momentum_buffer``, where there is momentum and a step has been taken.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __post_init__(self):
        super().__post_init__()
        check_number(self.momentum, "momentum")
        check_number(self.dampening, "dampening")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and no dampening")

    @property
    def moments(self) -> tuple[str, ...]:
        """The momentum buffer, where there is momentum."""
        return self.slots if self.momentum else ()

    def in_place_factor(self, k: int) -> float | None:
        """See ``Optimizer``: plain descent with one fixed rate at step k."""
        if self.momentum or self.weight_decay or self.needs_gradient:
            return None
        one = self.lr[k] if isinstance(self.lr, (list, tuple)) else self.lr
        return float(one) if isinstance(one, (int, float)) else None

    def init_one(self, p: Tensor) -> Slots:
        """Return no slots: the first step makes the momentum buffer."""
        return {}

    def update_one(
        self, p: Tensor, slots: Slots, g: Tensor, lr: Rate, *, out: Tensor | None = None
    ) -> tuple[Tensor, Slots]:
        """See ``Optimizer``."""
        way, buffer = self._way(p, slots, g)
        after = slots if buffer is None else {"momentum_buffer": buffer}
        if isinstance(lr, Tensor):
            return torch.sub(p, (lr * way).to(p.dtype), out=out), after
        return torch.add(p, way, alpha=-lr, out=out), after

    def _way(self, p, slots, g) -> tuple[Tensor, Tensor | None]:
        """The step without its rate, and the momentum buffer after it."""
        h = g.add(p, alpha=self.weight_decay) if self.weight_decay else g
        if not self.momentum:
            return h, None
        if "momentum_buffer" in slots:
            buffer = slots["momentum_buffer"].mul(self.momentum).add_(h, alpha=1 - self.dampening)
        else:
            buffer = h.clone()
        return (h.add(buffer, alpha=self.momentum) if self.nesterov else buffer), buffer

    def pull_back(
        self, p: Any, slots: Slots, g: Any, lr: Rate, p_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Optimizer``; p, g and the buffer are read only where ``lr`` is a tensor."""
        lr_bar = -(p_bar * self._way(p, slots, g)[0]) if isinstance(lr, Tensor) else None
        way_bar = p_bar.mul(-lr)
        g_bar = self._through_momentum(slots, way_bar, slots_bar) if self.momentum else way_bar
        if self.weight_decay:
            p_bar.add_(g_bar, alpha=self.weight_decay)
        return g_bar, lr_bar

    def _through_momentum(self, slots, way_bar, slots_bar):
        buffer_bar = slots_bar["momentum_buffer"].add(way_bar, alpha=self.momentum if self.nesterov else 1)
        first = "momentum_buffer" not in slots
        g_bar = buffer_bar.mul(1 if first else 1 - self.dampening)
        slots_bar["momentum_buffer"] = zeros(way_bar) if first else buffer_bar.mul_(self.momentum)
        return g_bar.add_(way_bar) if self.nesterov else g_bar
