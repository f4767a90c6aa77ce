"""What an optimizer remembers of each parameter: ``state[name][slot]``, in torch.optim's names.

So the state of an outer ``torch.optim.AdamW`` can start the inner loop as it is, as MAML-en-LLM shares moments between
the two (Sinha et al., 2024, arXiv:2405.11446). A state tensor that requires a gradient is differentiated; others are
constants.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mamlfast.tree import Params

Slots = dict[str, Any]
State = dict[str, Slots]


def joined(
    given: Mapping[str, Mapping[str, Any]] | None, fresh: State, known: tuple[str, ...], params: Params
) -> State:
    """Return ``fresh`` with what is given in its place, detached; slots that hold None count as not given.

    ``known`` names the optimizer's slots. Raises ValueError, naming the entry, where a parameter or slot is unknown,
    a shape or dtype differs, or moments come without their step.
    """
    state = {name: dict(slots) for name, slots in fresh.items()}
    for name, slots in (given or {}).items():
        if name not in params:
            raise ValueError(f"state[{name!r}] has no parameter of that name; params has {sorted(params)}")
        slots = {slot: x for slot, x in slots.items() if x is not None}
        if slots and "step" in known and "step" not in slots:
            raise ValueError(f"state[{name!r}] must hold the step of its moments; got {sorted(slots)}")
        for slot, x in slots.items():
            if slot not in known:
                raise ValueError(f"state[{name!r}][{slot!r}] is not of this optimizer, whose slots are {known}")
            state[name][slot] = _checked(x, params[name], f"state[{name!r}][{slot!r}]", slot)
    return state


def _checked(x, p, label, slot):
    if slot == "step":
        if int(x) != x or x < 0:
            raise ValueError(f"{label} must be a whole number of steps taken; got {x}")
        return int(x)
    if not isinstance(x, Tensor) or x.shape != p.shape or x.dtype != p.dtype:
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{label} must have the shape and dtype of its parameter, {tuple(p.shape)} {p.dtype}; got {got}"
        )
    if slot == "exp_avg_sq" and bool((x.detach() < 0).any()):
        raise ValueError(f"{label} is an average of squares and must not be negative")
    return x.detach()


def differentiated(given: Mapping[str, Mapping[str, Any]] | None) -> list[tuple[str, str]]:
    """Return (name, slot) of the given state tensors that require a gradient."""
    return [
        (name, slot)
        for name, slots in (given or {}).items()
        for slot, x in slots.items()
        if isinstance(x, Tensor) and x.requires_grad
    ]


def zeros(p: Tensor) -> Tensor:
    """Return zeros in the shape of ``p`` that take no memory; to be read only."""
    return torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
