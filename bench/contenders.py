"""The ways to compute a meta-gradient, as entries of one table.

All get the same model, episode, dtype and inner SGD, and return the gradient of the query loss in the unadapted
parameters. A contender is what the table says it is in any process: ``peak.py`` runs an entry by its name in one of
its own, and that is where peers belong whose dependencies should not meet.

The baseline is written here, on public PyTorch only: nothing of mamlfast is in it that could be wrong on both sides.
It comes with each attention that PyTorch can differentiate twice. First order is no contender but the floor under
all of them, and the proof that the gate can tell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import mamlfast
from bench import limit
from bench.limit import Work
from bench.models import Setting
from mamlfast import Episode

Gradient = dict[str, Tensor]
MetaGradient = Callable[[nn.Module, Episode, float], Gradient]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """``meta_grad(model, episode, lr)`` on a model with ``attention``; ``exact`` is what the gate holds it to."""

    name: str
    meta_grad: MetaGradient
    attention: str
    work: Work
    exact: bool = True

    def prepared(self, setting: Setting, model: nn.Module | None = None) -> Callable[[], Gradient]:
        """Build what a setting asks for and return the call to be measured; ``model`` defaults to the setting's."""
        model = setting.shape.model(attention=self.attention) if model is None else model
        return partial(self.meta_grad, model, setting.episode(), setting.lr)


def double_backward(model: nn.Module, episode: Episode, lr: float) -> Gradient:
    """Differentiate through the unrolled inner loop: keep the graph of every inner gradient, go back through it."""
    start = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    params = start
    for batch in episode.support:
        grads = torch.autograd.grad(_loss(model, params, batch), list(params.values()), create_graph=True)
        params = {name: p.add(g, alpha=-lr) for (name, p), g in zip(params.items(), grads, strict=True)}
    grads = torch.autograd.grad(_loss(model, params, episode.query), list(start.values()))
    return dict(zip(start, grads, strict=True))


def double_backward_on_math_attention(model: nn.Module, episode: Episode, lr: float) -> Gradient:
    """``double_backward`` on the one kernel of PyTorch's fused attention that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return double_backward(model, episode, lr)


def first_order(model: nn.Module, episode: Episode, lr: float) -> Gradient:
    """The query gradient at the adapted parameters, on flash attention and no other."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _engine(model, episode, lr, adjoint=mamlfast.FirstOrder(), recompute=False)


def replay(model: nn.Module, episode: Episode, lr: float) -> Gradient:
    """The engine as it comes: inner steps replayed, blocks recomputed."""
    return _engine(model, episode, lr, adjoint=mamlfast.Replay(), recompute=True)


def replay_kept(model: nn.Module, episode: Episode, lr: float) -> Gradient:
    """The engine with the activations of one inner step kept instead of recomputed."""
    return _engine(model, episode, lr, adjoint=mamlfast.Replay(), recompute=False)


def _loss(model, params, batch):
    return functional_call(model, params, kwargs={**batch, "use_cache": False}).loss


def _engine(model, episode, lr, *, adjoint, recompute):
    loss, params = mamlfast.causal_lm(model, recompute=recompute)
    return mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=lr), adjoint=adjoint).grads


FLOOR = Contender(
    name="first order, flash", meta_grad=first_order, attention="sdpa", work=limit.FIRST_ORDER, exact=False
)
REPLAY = Contender(name="Replay", meta_grad=replay, attention="sdpa", work=limit.RECOMPUTED)
REPLAY_KEPT = Contender(name="Replay, blocks kept", meta_grad=replay_kept, attention="sdpa", work=limit.KEPT)
DOUBLE_BACKWARD = Contender(
    name="double backward, eager", meta_grad=double_backward, attention="eager", work=limit.DOUBLE_BACKWARD
)
DOUBLE_BACKWARD_MATH = Contender(
    name="double backward, sdpa math",
    meta_grad=double_backward_on_math_attention,
    attention="sdpa",
    work=limit.DOUBLE_BACKWARD,
)

CONTENDERS = {c.name: c for c in (FLOOR, REPLAY, REPLAY_KEPT, DOUBLE_BACKWARD, DOUBLE_BACKWARD_MATH)}
