"""Keep only the input of each block and recompute the rest when it is needed, to second order.

A block is itself an operation with four functions, so it is a Rule::

    fwd      run the block, keep nothing                bwd      run it again, one reverse pass
    fwd_jvp  run it on duals, keep nothing              bwd_jvp  run it again on duals, one reverse pass

and everything that consumes Rules (first order, double backward, the dual backward) gets recomputation that saves
memory in that mode too; ``torch.utils.checkpoint`` saves none at second order (pytorch#129293). The weights travel
as explicit operands: a recomputation that comes after the caller's weight swap has ended still sees the weights of
the step it belongs to. Random draws are repeated.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten

from mamlfast.dual import Dual
from mamlfast.ops.rule import Rule
from mamlfast.randomness import RandomState
from mamlfast.swap import Slot, filled, parameter_slots

_recompute: ContextVar[bool] = ContextVar("recompute", default=True)


@contextmanager
def kept() -> Iterator[None]:
    """Inside this block nothing is recomputed: every activation is kept, as plain autograd does."""
    token = _recompute.set(False)
    try:
        yield
    finally:
        _recompute.reset(token)


@contextmanager
def recomputed(
    blocks: Iterable[nn.Module], world: Callable[[], AbstractContextManager] = nullcontext
) -> Iterator[None]:
    """Run each of ``blocks`` with recomputation inside the ``with``; afterwards they are as they were.

    ``world()`` is a context that the caller runs the blocks in; a recomputation, which comes when the caller has
    left it, enters it again. A block must return one floating-point tensor, alone or in a tuple whose other entries
    are None. Raises NotImplementedError where one returns more.
    """
    blocks = list(blocks)
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(_forward, block, block.forward, world)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _forward(block, forward, world, *args, **kwargs):
    slots = parameter_slots(block)
    leaves, spec = tree_flatten((args, kwargs))
    operands = _operands(leaves, slots)
    if not (operands and _recompute.get() and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    call = _Call(partial(_in_world, world, forward), leaves, spec, slots, operands)
    y = call.rule(type(block).__name__)(*operands.values())
    return call.as_returned(y)


def _in_world(world, forward, *args, **kwargs):
    with world():
        return forward(*args, **kwargs)


def _operands(leaves, slots) -> dict[int, Tensor]:
    """The tensors that carry a derivative, once each, by identity."""
    tensors = (*(x for x in leaves if isinstance(x, Tensor)), *(slot.tensor for slot in slots))
    return {id(x): x for x in tensors if isinstance(x, Dual) or x.requires_grad}


class _Call:
    """One call of one block: all it needs to be run again on other operands."""

    def __init__(self, forward: Callable, leaves: list, spec, slots: list[Slot], operands: dict[int, Tensor]):
        places = {key: i for i, key in enumerate(operands)}
        self._forward, self._spec, self._slots = forward, spec, slots
        # Where an operand goes, by number; a constant is kept as it is. Operands themselves are not: autograd
        # saves them, and lets go of them when it is done.
        self._leaves = [(places.get(id(x)), None if id(x) in places else x) for x in leaves]
        self._weights = [(places.get(id(s.tensor)), None if id(s.tensor) in places else s.tensor) for s in slots]
        self._modes = _get_current_function_mode_stack()
        self._random: RandomState | None = None
        self._returned: tuple | None = None

    def rule(self, name: str) -> Rule:
        """The block as a Rule of its operands."""
        return Rule(
            name=name,
            reference=lambda *xs: self._run(xs),
            fwd=self._fwd,
            bwd=self._bwd,
            fwd_jvp=self._fwd_jvp,
            bwd_jvp=self._bwd_jvp,
            none_tangents=True,
        )

    def as_returned(self, y: Tensor):
        """Put the tensor where the block's own return value has it."""
        assert self._returned is not None
        leaves, spec, place = self._returned
        return tree_unflatten([*leaves[:place], y, *leaves[place + 1 :]], spec)

    def _run(self, xs) -> Tensor:
        leaves = [x if place is None else xs[place] for place, x in self._leaves]
        weights: list[Any] = [x if place is None else xs[place] for place, x in self._weights]
        args, kwargs = tree_unflatten(leaves, self._spec)
        # As outside any Function: there, gradients are off and a no_grad of the model's own could not be told.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), self._modes_on(), filled(self._slots, weights):
            return self._only_tensor(self._on_the_same_draws(args, kwargs))

    @contextmanager
    def _modes_on(self):
        """The torch function modes of the first run, which a backward pass that was called under them leaves off."""
        active = _get_current_function_mode_stack()
        with ExitStack() as stack:
            for mode in self._modes:
                if not any(mode is other for other in active):
                    stack.enter_context(mode)
            yield

    def _on_the_same_draws(self, args, kwargs):
        if self._random is None:
            self._random = RandomState.now()
            return self._forward(*args, **kwargs)
        with self._random.again():
            return self._forward(*args, **kwargs)

    def _only_tensor(self, returned) -> Tensor:
        leaves, spec = tree_flatten(returned)
        places = [i for i, x in enumerate(leaves) if x is not None]
        if len(places) != 1 or not isinstance(leaves[places[0]], Tensor):
            kinds = [type(x).__name__ for x in leaves]
            raise NotImplementedError(
                f"a recomputed block must return one tensor; it returned {kinds}: pass recompute=False"
            )
        y = leaves[places[0]]
        assert isinstance(y, Tensor)
        leaves[places[0]] = None
        self._returned = leaves, spec, places[0]
        return y

    def _fwd(self, xs):
        return self._run([x.detach() for x in xs]).detach(), ()

    def _bwd(self, xs, saved, y_bar, need):
        xs = [x.detach().requires_grad_(n) for x, n in zip(xs, need, strict=True)]
        return _gradients([self._run(xs)], [y_bar], xs)

    def _fwd_jvp(self, xs, xs_dot):
        y = self._run(_pairs([x.detach() for x in xs], [None if t is None else t.detach() for t in xs_dot]))
        y, y_dot = (y.primal, y.tangent) if isinstance(y, Dual) else (y, torch.zeros_like(y))
        return y.detach(), y_dot.detach(), ()

    def _bwd_jvp(self, xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot):
        """The transpose of the dual map, run backwards: the cotangent of y_dot is y_bar, that of y is y_bar_dot."""
        xs = [x.detach().requires_grad_(n) for x, n in zip(xs, need_dot, strict=True)]
        xs_dot = [torch.zeros_like(x) if t is None and n else t for x, t, n in zip(xs, xs_dot, need, strict=True)]
        xs_dot = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(xs_dot, need, strict=True)]
        y = self._run(_pairs(xs, xs_dot))
        outputs = [y.primal, y.tangent] if isinstance(y, Dual) else [y]
        bars = _gradients(outputs, [y_bar_dot, y_bar][: len(outputs)], [*xs, *xs_dot])
        return bars[len(xs) :], bars[: len(xs)]


def _pairs(xs, xs_dot):
    return [x if t is None else Dual(x, t) for x, t in zip(xs, xs_dot, strict=True)]


def _gradients(outputs, cotangents, inputs):
    """Gradients in those inputs that require one, None for the rest."""
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    bars: list[Tensor | None] = [None] * len(inputs)
    if wanted and live:
        outputs, cotangents = zip(*live, strict=True)
        found = torch.autograd.grad(outputs, [inputs[i] for i in wanted], cotangents, allow_unused=True)
        for i, bar in zip(wanted, found, strict=True):
            bars[i] = bar
    return tuple(bars)
