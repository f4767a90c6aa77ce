"""Running something random again on the draws of its first run.

A recomputed block and a replayed inner step must see the dropout masks of the step they stand for; otherwise the
meta-gradient is the derivative of something that was never run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of PyTorch's default generators: the CPU's, and the current GPU's where one is in use."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """Return the present state."""
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if in_use else None)

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from this state inside the block; afterwards the generators are where they were before it."""
        before = RandomState.now()
        self.restore()
        try:
            yield
        finally:
            before.restore()
