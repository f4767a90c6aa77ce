"""What is wanted: adapted parameters, a meta-gradient, a model that meta-learns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mamlfast.adjoint import Adjoint, MetaResult, Replay
from mamlfast.episode import Episode, batches_for
from mamlfast.hvp import Loss
from mamlfast.inner.loop import InnerLoop, run
from mamlfast.inner.optimizer import Optimizer
from mamlfast.inner.rate import learned
from mamlfast.inner.state import State, differentiated
from mamlfast.model import causal_lm, trainable
from mamlfast.swap import filled, parameter_slots
from mamlfast.tree import Params, accumulate


def adapt(
    loss: Loss,
    params: Params,
    support: Sequence[Any],
    *,
    inner: Optimizer,
    steps: int | None = None,
    state: State | None = None,
) -> Params:
    """Return the parameters after ``steps`` inner updates on ``support``: the inner loop, without a query.

    ``params`` maps names to floating-point tensors and is left alone. ``support`` holds one batch a step, or one for
    all of them; ``steps`` defaults to its length. ``state`` is the optimizer's state before the first step, as
    ``meta_grad`` takes it. Memory: one more copy of the parameters, two of each moment, and one gradient's working
    set. Raises ValueError where steps and support disagree, or an inner step meets a loss or gradient that is not
    finite.
    """
    return run(_loop(loss, params, support, inner, steps, state))[0]


def meta_grad(
    loss: Loss,
    params: Params,
    episode: Episode,
    *,
    inner: Optimizer,
    steps: int | None = None,
    adjoint: Adjoint | None = None,
    state: State | None = None,
) -> MetaResult:
    """Return the query loss after adaptation and its gradient in the unadapted ``params``.

    ::

        params_{k+1} = inner(params_k, grad L(params_k; support[k]))        SGD: params_k - lr grad L
        meta-gradient = d L(params_K; query) / d params_0

    ``loss(params, batch)`` is any scalar function of a dict of tensors; ``adjoint`` says how to differentiate and
    defaults to ``Replay()``, which is exact (MAML: Finn et al., 2017, arXiv:1703.03400; MAML-en-LLM: Sinha et al.,
    2024, arXiv:2405.11446). ``steps`` defaults to the number of support batches. Costs stand with the adjoints.

    ``inner`` is ``SGD``, ``Adam`` or ``AdamW``. Learning rates that are tensors get their gradients in
    ``result.lr_grads``. ``state[name][slot]`` is the optimizer's state before the first step, in torch.optim's names
    (``optimizer_state`` reads an outer optimizer's); what it lacks starts fresh. A tensor in it that requires a
    gradient gets one in ``result.state_grads``, others are constants. No tensor of it is changed.

    Raises ValueError where steps and support disagree or an inner step is not finite, TypeError where an argument is
    of the wrong kind, NotImplementedError where an operation of the model has no exact second order.
    """
    if not isinstance(episode, Episode):
        raise TypeError(f"episode must be a mamlfast.Episode; got {type(episode).__name__}")
    adjoint = Replay() if adjoint is None else adjoint
    return adjoint(_loop(loss, params, episode.support, inner, steps, state), episode.query)


def _loop(loss, params, support, inner, steps, state) -> InnerLoop:
    if not isinstance(inner, Optimizer):
        raise TypeError(f"inner must be a mamlfast.SGD, Adam or AdamW; got {type(inner).__name__}")
    if not isinstance(params, Mapping) or not params:
        raise TypeError(f"params must be a dict of tensors with at least one entry; got {type(params).__name__}")
    for name, p in params.items():
        if not (isinstance(p, Tensor) and p.is_floating_point()):
            kind = str(p.dtype) if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(f"params[{name!r}] must be a floating-point tensor; got {kind}")
    return InnerLoop(loss=loss, params=dict(params), batches=batches_for(support, steps), inner=inner, state=state)


@dataclass(frozen=True, kw_only=True)
class MetaLosses:
    """Losses of a meta-batch: ``query`` [num_tasks] after adaptation, ``support`` [num_tasks, K] before each step."""

    query: Tensor
    support: Tensor


class MetaLearner:
    """A Hugging Face causal LM that learns to adapt.

    ::

        learner = MetaLearner(model, inner=SGD(lr=0.1), steps=2)
        learner.backward(episodes)          # like loss.backward(): adds to p.grad of the model's own parameters
        with learner.adapted(support): ...  # the model runs with adapted weights, and gets its own back

    ``model`` stays the user's: any optimizer steps it, ``save_pretrained`` saves it. ``adjoint`` defaults to
    ``Replay()``; ``recompute`` is that of ``causal_lm``. ``reduction`` over tasks is "mean" or "sum".

    ``inner`` may hold learned rates and ``state`` learned moments: tensors that require a gradient. ``backward`` adds
    theirs to ``.grad`` like any other, through whatever computed the tensor (``lr=log_lr.exp()``), so that the outer
    optimizer can be given them; a tensor that was computed serves one backward, and the next needs a new
    ``learner.inner``. ``state`` may also be a function that returns it, called once for every episode and ``adapted``:
    ``state=lambda: optimizer_state(outer, model)`` starts each inner loop from a copy of the outer moments.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner: Optimizer,
        steps: int | None = None,
        adjoint: Adjoint | None = None,
        reduction: str = "mean",
        recompute: bool = True,
        state: State | Callable[[], State] | None = None,
    ):
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum"; got {reduction!r}')
        self.model, self.inner, self.steps, self.reduction = model, inner, steps, reduction
        self.state = state
        self.adjoint: Adjoint = Replay() if adjoint is None else adjoint
        self.loss, _ = causal_lm(model, recompute=recompute)

    @property
    def params(self) -> Params:
        """The model's trainable parameters as they are now, detached."""
        return {name: p.detach() for name, p in trainable(self.model).items()}

    def backward(self, episodes: Sequence[Episode]) -> MetaLosses:
        """Add the meta-gradient of ``episodes``, reduced over them, to ``p.grad`` of the model's parameters.

        All or nothing: where an episode raises, no ``p.grad`` has changed. Raises ValueError on an empty list, and
        whatever ``meta_grad`` raises.
        """
        if not episodes:
            raise ValueError("episodes must hold at least one Episode; got none")
        total, wanted, query, support = None, [], [], []
        factor = 1 / len(episodes) if self.reduction == "mean" else 1.0
        for episode in episodes:
            state = self._state()
            result = meta_grad(
                self.loss, self.params, episode, inner=self.inner, steps=self.steps, adjoint=self.adjoint, state=state
            )
            query.append(result.query_loss)
            support.append(result.support_losses)
            wanted += _learned_gradients(self.inner, state, result)
            if total is None:
                total = result.grads
            else:
                accumulate(total, result.grads)
        self._deposit(total, factor)
        if wanted:
            tensors, grads = zip(*wanted, strict=True)
            torch.autograd.backward(tensors, [g * factor for g in grads])
        return MetaLosses(query=torch.stack(query), support=torch.stack(support))

    def _state(self):
        return self.state() if callable(self.state) else self.state

    def _deposit(self, total, factor):
        for name, p in trainable(self.model).items():
            grad = total[name] if factor == 1 else total[name].mul_(factor)
            p.grad = grad if p.grad is None else p.grad.add_(grad)

    @contextmanager
    def adapted(self, support: Sequence[Any], *, steps: int | None = None) -> Iterator[nn.Module]:
        """Adapt on ``support`` and run the model with the adapted weights inside the block.

        ``steps`` defaults to the learner's. The model's own weights come back on exit, whatever happens. Raises what
        ``adapt`` raises.
        """
        steps = self.steps if steps is None else steps
        params = adapt(self.loss, self.params, support, inner=self.inner, steps=steps, state=self._state())
        own = {id(p): name for name, p in trainable(self.model).items()}
        slots = [slot for slot in parameter_slots(self.model) if id(slot.tensor) in own]
        with filled(slots, [params[own[id(slot.tensor)]] for slot in slots]):
            yield self.model


def _learned_gradients(inner, state, result) -> list[tuple[Tensor, Tensor]]:
    """The learned tensors that require a gradient, each with its gradient."""
    asked = any(lr.requires_grad for lr in learned(inner.lr).values()), bool(differentiated(state))
    if asked[0] and result.lr_grads is None or asked[1] and result.state_grads is None:
        raise ValueError(
            "learned rates and moments need an exact adjoint, Replay or Unrolled; this one has no gradient"
        )
    found = {} if result.lr_grads is None else learned(result.lr_grads)
    rates = [(lr, found[place]) for place, lr in learned(inner.lr).items() if lr.requires_grad and place in found]
    moments = [
        (state[name][slot], g) for name, slots in (result.state_grads or {}).items() for slot, g in slots.items()
    ]
    return rates + moments


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> State:
    """Return what a ``torch.optim`` optimizer remembers of the model's parameters, as ``meta_grad`` takes it.

    The tensors are the optimizer's own, not copies. Parameters without a state yet have an empty one.
    """
    return {name: dict(optimizer.state.get(p, {})) for name, p in trainable(model).items()}
