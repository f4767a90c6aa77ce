"""The loss of a whole model, differentiated in every way and precision, and what can be claimed of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamlfast import attention_interface
from mamlfast.blocks import kept
from mamlfast.checking.costs import Costs, measure
from mamlfast.checking.derivatives import SMALL, halves, leaves, vjp
from mamlfast.checking.differences import Differences, central_differences, moved, norm
from mamlfast.checking.precision import cast, constants_in, lifted
from mamlfast.dual import Dual
from mamlfast.hvp import Loss, deterministic_attention_dropout, sweep, value_and_grad
from mamlfast.model import Setting, causal_lm, holding, settings
from mamlfast.randomness import RandomState
from mamlfast.tree import Params


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole:
    """A model on a batch in one precision; every evaluation is on the same random draws.

    ``wide`` is the precision of an oracle, None the model's own; float64 takes its casts to float32 along. An oracle's
    gradients and double backward are of the modules as they are, not fused. ``eager`` puts transformers' eager
    attention, which has nothing of ours in it, where the engine would put its own.
    """

    model: nn.Module
    batch: Mapping[str, Tensor]
    draws: RandomState
    wide: torch.dtype | None = None
    eager: bool = False

    @property
    def params(self) -> Params:
        """The trainable parameters in this precision."""
        return {n: cast(p.detach(), self.wide) for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def dtype(self) -> torch.dtype:
        """The precision: of a model of several, that of the first trainable parameter."""
        return self.wide or next(p.dtype for p in self.model.parameters() if p.requires_grad)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    def gradient(self, params: Params) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient, in the order of the parameters."""
        with self._world():
            value, grads = value_and_grad(self._loss(fuse=self.wide is None), params, self._batch())
        return value, list(grads.values())

    def hvp(self, params: Params, v: Params) -> tuple[Tensor, list[Tensor]]:
        """The loss of the duals and ``H v``, by the engine, blocks recomputed."""
        products = {name: torch.zeros_like(p) for name, p in params.items()}
        with self._world():
            value = sweep(self._loss(), params, self._batch(), lambda n, hv: products[n].copy_(hv), v)
        return value, list(products.values())

    def double_backward(self, params: Params, v: Params) -> list[Tensor]:
        """``H v`` by ``create_graph=True``: plain autograd, every activation kept."""
        xs = leaves(list(params.values()))
        with self._world(), kept(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            value = self._loss(fuse=False)(dict(zip(params, xs, strict=True)), self._batch())
            grads = vjp([value], xs, [torch.ones_like(value)], create_graph=True)
            return vjp(grads, xs, list(v.values()))

    @cached_property
    def random(self) -> bool:
        """Whether the loss draws random numbers."""
        with self._world():
            before = RandomState.now()
            with torch.no_grad():
                self._loss()(self.params, self._batch())
            after = RandomState.now()
        return not all(map(_same, (before.cpu, before.cuda), (after.cpu, after.cuda)))

    def costs(self, params: Params, v: Params, *, recompute: bool) -> Costs:
        """What a gradient and a Hessian-vector product cost."""

        def gradient():
            xs = leaves(list(params.values()))
            y = loss(dict(zip(params, xs, strict=True)), batch)
            return partial(vjp, [y], xs, [torch.ones_like(y)])

        def hvp():
            xs = leaves(list(params.values()))
            y = loss({name: Dual(x, v[name]) for name, x in zip(params, xs, strict=True)}, batch)
            slope, _ = halves([y])
            return partial(vjp, slope, xs, [torch.ones_like(y)])

        apart = [*params.values(), *v.values()]
        with self._world(), torch.enable_grad():
            loss, batch = self._loss(recompute=recompute), self._batch()
            return measure(gradient, hvp, apart, apart[0].device)

    def by_differences(self, params: Params, v: Params) -> tuple[Differences, Differences]:
        """``<grad L, v>`` and ``H v``, from losses and gradients at both sides of ``params``."""

        def at(t):
            value, grads = self.gradient(moved(params, v, t))
            return [value], grads

        scale = SMALL * norm(at(0.0)[1])
        slope, hv = central_differences(at, self.dtype, [scale * norm(list(v.values())), scale])
        return slope, hv

    @contextmanager
    def _world(self) -> Iterator[None]:
        attention = _eager_attention(self.model) if self.eager else []
        with (
            holding(attention),
            constants_in(self.model, self.wide),
            lifted(self.wide is torch.float64),
            self.draws.again(),
            deterministic_attention_dropout(),
        ):
            yield

    def _loss(self, *, recompute: bool = True, fuse: bool = True) -> Loss:
        return causal_lm(self.model, recompute=recompute, fuse=fuse)[0]

    def _batch(self):
        return {name: cast(t, self.wide) if isinstance(t, Tensor) else t for name, t in self.batch.items()}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _eager_attention(model) -> list[Setting]:
    """The settings that put transformers' eager attention where the engine would put its own."""
    return [(owner, name, "eager") for owner, name, value in settings(model) if value == attention_interface.NAME]
