"""One task's share of a meta-batch: what to adapt on, and what to be judged on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A batch is whatever the loss takes: for a causal LM a dict of tensors, labels included.
Batch = Any


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Support batches for the inner loop and one query batch for the outer loss, drawn from one task.

    ``support[k]`` is used at inner step k; a single support batch is reused at every step. Raises ValueError where
    the support is empty or the query is missing, TypeError where the support is not a sequence of batches.
    """

    support: Sequence[Batch]
    query: Batch

    def __post_init__(self):
        if not isinstance(self.support, (list, tuple)):
            raise TypeError(
                f"support must be a list of batches, one for each inner step (or one for all of them); "
                f"got {type(self.support).__name__}: write support=[batch]"
            )
        if not self.support:
            raise ValueError("support must hold at least one batch; got an empty list")
        if self.query is None or (isinstance(self.query, (Mapping, list, tuple)) and not self.query):
            raise ValueError("query must be a batch of the same task as the support; got none")


def batches_for(support: Sequence[Batch], steps: int | None) -> tuple[Batch, ...]:
    """Return the support batch of each inner step; ``steps`` defaults to the number of batches.

    Raises ValueError where ``steps`` is negative, or the support holds neither one batch nor ``steps`` of them.
    """
    steps = len(support) if steps is None else steps
    if steps < 0:
        raise ValueError(f"steps must not be negative; got {steps}")
    if len(support) not in (1, steps):
        raise ValueError(f"support must hold one batch, or one for each of the {steps} inner steps; got {len(support)}")
    return tuple(support) if len(support) == steps else (support[0],) * steps
