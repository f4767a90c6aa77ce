"""Parameters as ``dict[str, Tensor]``, and the arithmetic on them that more than one file needs."""

import torch
from torch import Tensor

Params = dict[str, Tensor]

# Elements between the beginnings of neighbours in one allocation: a multiple of every kernel's vector.
_ALIGNED = 128


def check_like(params: Params, other: Params, name: str) -> None:
    """Raise ValueError unless ``other`` has the names, shapes and dtypes of ``params``."""
    if params.keys() != other.keys():
        missing, extra = sorted(params.keys() - other.keys()), sorted(other.keys() - params.keys())
        raise ValueError(f"{name} must have the keys of params; missing {missing}, unexpected {extra}")
    for key, p in params.items():
        t = other[key]
        if t.shape != p.shape or t.dtype != p.dtype:
            raise ValueError(
                f"{name}[{key!r}] must have the shape and dtype of params[{key!r}], {tuple(p.shape)} {p.dtype}; "
                f"got {tuple(t.shape)} {t.dtype}"
            )


def detached(params: Params) -> Params:
    """Return the same tensors, outside any graph."""
    return {name: p.detach() for name, p in params.items()}


def empty_like(params: Params) -> Params:
    """Return uninitialised tensors of the shapes, dtypes and devices of ``params``, in one allocation for each kind.

    A parameter set lives longer than the activations around it: tensors that came one by one would leave holes in
    the heap, up to a third of a set for each set.
    """
    kinds: dict[tuple, list[str]] = {}
    for name, p in params.items():
        kinds.setdefault((p.dtype, p.device), []).append(name)
    found = {}
    for (dtype, device), names in kinds.items():
        sizes = [-(-params[name].numel() // _ALIGNED) * _ALIGNED for name in names]
        parts = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
        found |= {
            name: part[: params[name].numel()].view(params[name].shape) for name, part in zip(names, parts, strict=True)
        }
    return {name: found[name] for name in params}


def accumulate(total: Params, addend: Params) -> None:
    """``total += addend``, in place."""
    for name, t in addend.items():
        total[name].add_(t)
