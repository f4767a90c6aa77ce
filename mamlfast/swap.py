"""Running a module on other tensors than its own, and giving everything back.

Weights that are tied stay tied: a tensor stands in every place where the parameter it replaces stood. Buffers are
copied for the time being, so that running statistics and caches are the same after any number of replays.
"""

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mamlfast.tree import Params


@dataclass(frozen=True)
class Slot:
    """One place in a module tree that holds a tensor: ``registry[key]``, a module's parameters or buffers."""

    registry: MutableMapping[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        """What stands there now."""
        tensor = self.registry[self.key]
        assert tensor is not None
        return tensor


def parameter_slots(module: nn.Module) -> list[Slot]:
    """Every place of every parameter, tied ones more than once."""
    return [
        Slot(owner._parameters, key)
        for owner in module.modules()
        for key, p in owner._parameters.items()
        if p is not None
    ]


def buffer_slots(module: nn.Module) -> list[Slot]:
    """Every place of every buffer."""
    return [
        Slot(owner._buffers, key) for owner in module.modules() for key, b in owner._buffers.items() if b is not None
    ]


@contextmanager
def filled(slots: Iterable[Slot], tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put ``tensors`` into ``slots`` inside the block, and back what stood there, whatever happens."""
    before = [(slot, slot.tensor) for slot in slots]
    try:
        for (slot, _), tensor in zip(before, tensors, strict=True):
            slot.registry[slot.key] = tensor
        yield
    finally:
        for slot, tensor in before:
            slot.registry[slot.key] = tensor


@contextmanager
def swapped(module: nn.Module, params: Params) -> Iterator[None]:
    """Run ``module`` on ``params`` inside the block; parameters that ``params`` lacks stay.

    ``params`` has names of ``module.named_parameters()``. Raises ValueError on any other name, or a wrong shape.
    """
    own = dict(module.named_parameters())
    unknown = sorted(params.keys() - own.keys())
    if unknown:
        raise ValueError(f"params must be named as the module's parameters; unexpected {unknown[:5]}")
    for name, p in params.items():
        if p.shape != own[name].shape:
            raise ValueError(f"params[{name!r}] must have shape {tuple(own[name].shape)}; got {tuple(p.shape)}")
    new = {id(own[name]): p for name, p in params.items()}
    slots = [slot for slot in parameter_slots(module) if id(slot.tensor) in new]
    buffers = buffer_slots(module)
    with (
        filled(slots, [new[id(slot.tensor)] for slot in slots]),
        filled(buffers, [slot.tensor.clone() for slot in buffers]),
    ):
        yield
