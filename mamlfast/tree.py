"""Parameters as ``dict[str, Tensor]``, and the arithmetic on them that more than one file needs."""

import torch
from torch import Tensor

Params = dict[str, Tensor]


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
    """Return uninitialised tensors like ``params``.

    What lives long is allocated at once, ahead of the activations: tensors that come one by one, between activations
    that go again, leave holes in the heap, a third of a parameter set for each set.
    """
    return {name: torch.empty_like(p) for name, p in params.items()}


def accumulate(total: Params, addend: Params) -> None:
    """``total += addend``, in place."""
    for name, t in addend.items():
        total[name].add_(t)
