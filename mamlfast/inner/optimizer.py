"""What every inner optimizer is: a pure update, and its transpose a parameter at a time."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mamlfast.inner.clip import clipped, clipping
from mamlfast.inner.rate import LearningRate, Rate, check_number, check_rates, learned, rate_at
from mamlfast.inner.state import Slots, State
from mamlfast.tree import Params


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """An optimizer of the inner loop.

    ``lr`` is a number (fixed), a tensor (learned), a dict with one of these for each parameter, or a list with one of
    these for each inner step; a tensor in a dict is a scalar or has the shape of its parameter. A learned rate may be
    negative. ``clip`` limits the global norm of each step's gradient, as ``torch.nn.utils.clip_grad_norm_`` does; it
    needs all gradients before the first update, a buffer of one parameter copy, and another one on the way back.
    Parameters that a step's loss does not depend on are left alone, state and weight decay included, as torch.optim
    does. Raises TypeError where a number is none, ValueError where it is out of range.
    """

    lr: LearningRate
    weight_decay: float = 0.0
    clip: float | None = None

    slots: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_rates(self.lr)
        check_number(self.weight_decay, "weight_decay")
        if self.clip is not None:
            check_number(self.clip, "clip")

    def init(self, params: Params) -> State:
        """Return the state before the first step: ``state[name][slot]``, in torch.optim's names."""
        return {name: self.init_one(p) for name, p in params.items()}

    def update(self, params: Params, state: State, grads: Params, *, step: int = 0) -> tuple[Params, State]:
        """Return parameters and state after inner step ``step``; pure and differentiable.

        ``step`` picks the rate from a list and has no other effect. Names that ``grads`` lacks stay as they are.
        """
        clip = clipping(grads, self.clip)
        after, after_state = dict(params), dict(state)
        for name, g in grads.items():
            lr = rate_at(self.lr, step, name)
            after[name], after_state[name] = self.update_one(params[name], state[name], clipped(g, clip), lr)
        return after, after_state

    @property
    def needs_gradient(self) -> bool:
        """Whether ``pull_back`` reads the gradient, beyond the cotangents."""
        return self.clip is not None or bool(learned(self.lr))

    @property
    def moments(self) -> tuple[str, ...]:
        """The slots that hold a tensor of the parameter's shape."""
        return tuple(slot for slot in self.slots if slot != "step")

    def in_place_factor(self, k: int) -> float | None:
        """Return a if the transpose of step k is ``v <- v - a H v`` and no more, else None."""
        return None

    @abstractmethod
    def init_one(self, p: Tensor) -> Slots:
        """Return the state of one parameter before the first step."""

    @abstractmethod
    def update_one(
        self, p: Tensor, slots: Slots, g: Tensor, lr: Rate, *, out: Tensor | None = None
    ) -> tuple[Tensor, Slots]:
        """Return one parameter, in ``out`` if given, and its state after a step; differentiable without ``out``."""

    @abstractmethod
    def pull_back(
        self, p: Any, slots: Slots, g: Any, lr: Rate, p_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Tensor | None]:
        """Transpose the update of one parameter: the vector-Jacobian product in closed form, elementwise.

        ``p``, ``slots`` and ``g`` are what went into ``update_one``; ``p_bar`` and ``slots_bar`` the cotangents of
        what came out, replaced in place by those of ``p`` and ``slots``. Returns the cotangent of g and, for a learned
        rate, the elementwise one of the rate.
        """
