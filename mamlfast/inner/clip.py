"""Clipping by the global norm, as ``torch.nn.utils.clip_grad_norm_`` does it, and its transpose.

::

    n = |g|,  c = min(1, clip / (n + 1e-6)),  h = c g          g_bar = c h_bar + c' <h_bar, g> g / n

with ``c' = -clip / (n + 1e-6)^2`` where c < 1, else 0. At g = 0 the second term is 0, the limit of its formula.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mamlfast.tree import Params

_EPS = 1e-6


@dataclass(frozen=True)
class Clipping:
    """The clipping of one step: its ``limit``, the global ``norm`` n and the ``factor`` c."""

    limit: float
    norm: Tensor
    factor: Tensor


def clipping(grads: Params, limit: float | None) -> Clipping | None:
    """Return how ``grads`` are clipped; None without a limit or gradients.

    Differentiable, at 0 too, where PyTorch gives a norm the slope 0.
    """
    if limit is None or not grads:
        return None
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(_wide(g)) for g in grads.values()]))
    return Clipping(limit, norm, torch.clamp(limit / (norm + _EPS), max=1.0))


def clipped(g: Tensor, clip: Clipping | None) -> Tensor:
    """Return ``c g`` in the dtype of g; ``g`` itself without clipping."""
    return g if clip is None else g * clip.factor.to(g.dtype)


def pull_back_clip(grads: Params, bars: Params, clip: Clipping) -> None:
    """Turn ``bars``, the cotangents of the clipped gradients, into those of ``grads``, in place."""
    wide = {name: (_wide(g), _wide(bars[name])) for name, g in grads.items()}
    dot = torch.stack([(h_bar * g).sum() for g, h_bar in wide.values()]).sum()
    norm, limit = clip.norm, clip.limit
    active = (limit / (norm + _EPS) < 1) & (norm > 0)
    slope = torch.where(active, -limit * dot / ((norm + _EPS) ** 2 * norm), 0.0)
    for name, (g, h_bar) in wide.items():
        bars[name].copy_(clip.factor * h_bar + slope * g)


def _wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))
