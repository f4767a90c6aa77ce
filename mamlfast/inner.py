"""What an inner step is: an optimizer as a function of parameters and gradient, and its transpose.

An optimizer of the inner loop maps ``(params_k, g_k)`` to ``params_{k+1}`` with ``g_k = grad L(params_k; S_k)``. Going
back through the step needs its transpose, in closed form: from v, the gradient of the outer loss in ``params_{k+1}``,
the part that reaches ``params_k`` directly, and the direction and factor of the Hessian-vector product that brings
the rest.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Plain gradient descent, the inner optimizer of MAML (Finn et al., 2017, arXiv:1703.03400, equation 1)::

        params_{k+1} = params_k - lr g_k        v_k = v_{k+1} - lr H_k v_{k+1}

    ``lr`` is finite and not negative; raises ValueError otherwise.
    """

    lr: float

    def __post_init__(self):
        if not isinstance(self.lr, (int, float)) or isinstance(self.lr, bool):
            raise TypeError(f"lr must be a number; got {type(self.lr).__name__}")
        if not math.isfinite(self.lr) or self.lr < 0:
            raise ValueError(f"lr must be finite and not negative; got {self.lr}")

    def update(self, p: Tensor, g: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the parameter after the step, in ``out`` if given; differentiable without it."""
        return torch.add(p, g, alpha=-self.lr, out=out)

    def pull_back(self, v: Tensor, hv: Tensor) -> None:
        """Turn ``v = v_{k+1}`` into ``v_k`` in place, given ``hv = H_k v``."""
        v.add_(hv, alpha=-self.lr)
