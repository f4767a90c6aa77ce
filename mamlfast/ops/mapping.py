"""``torch.func.vmap`` over calls that it cannot look into: Triton, C++ and in-place code run on plain tensors only.

Arguments are ``(rule, options, *constants, *tensors)``; ``in_dims`` has their structure and says of every leaf which
dimension is mapped, None for none.
"""

from collections.abc import Callable
from dataclasses import is_dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def mapped(call: Callable[..., tuple], n: int, constants: int, in_dims: Any, args: tuple) -> tuple[tuple, tuple]:
    """Return the results of ``call``, a dimension of size n in front, and which dimension that is (None has none).

    The first ``constants`` arguments are not tensors to be mapped; an int among them is the number of operands, else
    all tensors are. One call if the rule folds the dimension, else n. Raises ValueError if n is 0.
    """
    if n == 0:
        raise ValueError(f"{args[0].name} cannot be mapped over a dimension of size 0; map over at least one entry")
    results = _folded(call, n, constants, in_dims, args) or _one_by_one(call, n, in_dims, args)
    return results, tuple(None if result is None else 0 for result in results)


def _one_by_one(call, n, in_dims, args):
    leaves, spec = tree_flatten(args)
    columns = [
        repeat(leaf, n) if dim is None else leaf.unbind(dim)
        for leaf, dim in zip(leaves, tree_leaves(in_dims), strict=True)
    ]
    results = [call(*tree_unflatten(entry, spec)) for entry in zip(*columns, strict=False)]
    return tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))


def _folded(call, n, constants, in_dims, args):
    """One call with the mapped dimension folded into the first of every tensor, or None if the rule cannot."""
    rule = args[0]
    if rule.fold is None:
        return None
    leaves, spec = tree_flatten(args)
    leaves = [_in_front(leaf, dim, n) for leaf, dim in zip(leaves, tree_leaves(in_dims), strict=True)]
    _, options, *rest = tree_unflatten(leaves, spec)
    fixed, tensors = rest[: constants - 2], rest[constants - 2 :]
    num_xs = next((value for value in fixed if type(value) is int), len(tensors))
    options = rule.fold(tuple(tensors[:num_xs]), options)
    if options is None:
        return None
    results = call(rule, options, *fixed, *(t if t is None else t.flatten(0, 1) for t in tensors))
    return tuple(r if r is None else r.unflatten(0, (n, -1)) for r in results)


def _in_front(leaf, dim, n):
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.expand(n, *leaf.shape) if dim is None else leaf.movedim(dim, 0)


def refuse_hidden_tensors(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError if an option of the operation ``name`` hides a wrapper of ``torch.func``'s from it.

    ``torch.func`` unwraps tensors in tuples, lists, dicts and registered classes; out of any other dataclass a wrapper
    would reach the kernels.
    """
    for option, value in options.items():
        for leaf in tree_leaves(value):
            if is_dataclass(leaf) and any(map(_wrapped, tree_leaves(vars(leaf)))):
                raise ValueError(
                    f"the option {option} of {name} is a {type(leaf).__name__} and holds a tensor that torch.func "
                    f"transforms, which does not look into it; register the class with torch.utils._pytree"
                )


def _wrapped(x):
    return isinstance(x, Tensor) and is_functorch_wrapped_tensor(x)
