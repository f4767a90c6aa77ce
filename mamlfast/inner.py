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

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        """Return the parameter after the step; differentiable, and nothing is changed in place."""
        return torch.add(p, g, alpha=-self.lr)

    def pullback(self, v: Tensor, hv: Tensor) -> Tensor:
        """Return ``v_k`` from ``v = v_{k+1}`` and ``hv = H_k v``; takes over the memory of ``hv``."""
        return hv.mul_(-self.lr).add_(v)
