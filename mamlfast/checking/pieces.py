"""The modules of a model, on the inputs that they really see.

One forward pass shows each module its arguments. Modules of one class, one set of options and one set of shapes,
down to their children, do the same: the first stands for all of them. A ``Piece`` is that module as a function of
its operands: the arguments that carry a derivative, and its parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mamlfast.blocks import kept
from mamlfast.checking.differences import padding_rows
from mamlfast.checking.precision import cast, constants_in, lifted
from mamlfast.fuse import Plan, plan
from mamlfast.hvp import Loss, deterministic_attention_dropout
from mamlfast.model import find_blocks, holding, settings
from mamlfast.randomness import RandomState
from mamlfast.swap import Slot, filled, parameter_slots
from mamlfast.tree import Params

HEAD = "head and loss"


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A module on captured arguments.

    ``paths`` are those of all modules it stands for. ``leaves`` and ``spec`` are its arguments, flat, with None in
    ``places``, where operands stand; ``xs`` are the operands: the arguments of ``places``, then the parameters
    ``names``. ``wide`` is the precision of an oracle, None the module's own.
    """

    kind: str
    paths: list[str]
    call: Any
    module: nn.Module
    root: nn.Module
    leaves: list[Any]
    spec: Any
    places: list[int]
    names: list[str]
    xs: list[Tensor]
    draws: RandomState
    wide: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the first operand."""
        return self.xs[0].dtype

    def __call__(self, xs: list[Tensor]) -> list[Tensor]:
        """Run the module on these operands, plain ones or duals; return the tensors that depend on them."""
        with self.world():
            return self.bare(xs)

    def bare(self, xs: list[Tensor]) -> list[Tensor]:
        """The same for a caller who is in ``world`` already: nothing but the module."""
        ys = self.returned(xs)
        return [ys[i] for i in self.depending]

    def returned(self, xs: list[Tensor]) -> list[Tensor]:
        """Every tensor that the module returns, inside ``world``."""
        inputs, params = xs[: len(self.places)], xs[len(self.places) :]
        leaves = list(self.leaves)
        for place, x in zip(self.places, inputs, strict=True):
            leaves[place] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        slots, numbers = self._slots
        with filled(slots, [params[i] for i in numbers]):
            return _tensors(self.call(*args, **kwargs))

    @cached_property
    def depending(self) -> list[int]:
        """Which of the returned tensors depend on the operands, by number."""
        with torch.enable_grad(), self.world():
            ys = self.returned([x.detach().clone().requires_grad_() * 1 for x in self.xs])
        return [i for i, y in enumerate(ys) if y.requires_grad]

    @cached_property
    def still(self) -> dict[int, int]:
        """Rows of operands that are constants to autograd."""
        return {len(self.places) + i: row for i, row in padding_rows(self.module, self.names).items()}

    @cached_property
    def _slots(self) -> tuple[list[Slot], list[int]]:
        """Where the parameters stand, and the number of the one that stands there."""
        own = dict(self.module.named_parameters())
        numbers = {id(own[name]): i for i, name in enumerate(self.names)}
        slots = [slot for slot in parameter_slots(self.module) if id(slot.tensor) in numbers]
        return slots, [numbers[id(slot.tensor)] for slot in slots]

    @cached_property
    def _fusion(self) -> Plan:
        return plan(self.root, for_engine=True)

    @contextmanager
    def world(self) -> Iterator[None]:
        """What has to hold around the module while it runs, as the engine sees to it in a model."""
        with (
            holding(settings(self.root)),
            self._fusion.held(),
            constants_in(self.module, self.wide),
            lifted(self.wide is torch.float64),
            kept(),
            self.draws.again(),
            deterministic_attention_dropout(),
        ):
            yield

    def to(self, dtype: torch.dtype) -> "Piece":
        """The same piece as an oracle in another precision: operands, constants, in float64 casts to float32 too."""
        leaves = [cast(x, dtype) if isinstance(x, Tensor) else x for x in self.leaves]
        return replace(self, leaves=leaves, xs=[x.to(dtype) for x in self.xs], wide=dtype)


def _tensors(returned) -> list[Tensor]:
    leaves = tree_leaves(dict(returned) if isinstance(returned, Mapping) else returned)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def capture(model: nn.Module, loss: Loss, params: Params, batch: Mapping[str, Tensor]) -> list[Piece]:
    """Run ``loss`` once and return its pieces, in the order in which they ran, the head last.

    Left out are the model itself, whatever holds its blocks, and modules that no derivative reaches.
    """
    found: dict[Any, Piece] = {}
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    returned: dict[nn.Module, Any] = {}

    def see(path, module, args, kwargs):
        key = _structure(module), tuple(_shape(x) for x in tree_leaves((args, kwargs)))
        piece = found.get(key) or _piece(model, module, args, kwargs)
        if piece is not None:
            found[key] = piece
            if path not in piece.paths:
                piece.paths.append(path)

    handles = [
        module.register_forward_pre_hook(partial(_before, see, path), with_kwargs=True)
        for path, module in _inner_modules(model)
    ]
    handles += [m.register_forward_hook(partial(_after, returned)) for m in _trunks(model)]
    try:
        with torch.enable_grad(), kept(), deterministic_attention_dropout():
            loss(leaves, batch)
    finally:
        for handle in handles:
            handle.remove()
    heads = (_head(model, trunk, returned[trunk], batch) for trunk in _trunks(model) if trunk in returned)
    return [*found.values(), *list(filter(None, heads))[:1]]


def _before(see, path, module, args, kwargs):
    see(path, module, args, kwargs)


def _after(returned, module, args, output):
    returned[module] = output


def _trunks(model) -> list[nn.Module]:
    """What holds the blocks, the model itself left out, outermost first."""
    blocks = {id(block) for block in find_blocks(model)}
    return [m for m in model.modules() if m is not model and any(id(x) in blocks for x in m.modules() if x is not m)]


def _inner_modules(model) -> list[tuple[str, nn.Module]]:
    above = {id(m) for m in (model, *_trunks(model))}
    return [(path, m) for path, m in model.named_modules() if id(m) not in above]


def _structure(module) -> tuple:
    """What a module does, as far as its class, code, options, shapes and children say."""
    options = {k: x for k, x in vars(module).items() if isinstance(x, (int, float, str)) and k != "layer_idx"}
    return (
        type(module),
        getattr(module.forward, "__func__", module.forward),
        module.extra_repr(),
        tuple(sorted(options.items())),
        tuple((name, _shape(p)) for name, p in module.named_parameters(recurse=False)),
        tuple((name, _structure(child)) for name, child in module.named_children()),
    )


def _shape(x):
    return (x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else type(x)


def _piece(root, module, args, kwargs) -> Piece | None:
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not (places or params):
        return None
    xs = [leaves[i].detach().clone() for i in places]
    return Piece(
        kind=type(module).__name__,
        paths=[],
        call=module,
        module=module,
        root=root,
        leaves=[None if i in places else x for i, x in enumerate(leaves)],
        spec=spec,
        places=places,
        names=list(params),
        xs=[*xs, *params.values()],
        draws=RandomState.now(),
    )


def _head(root, trunk, output, batch) -> Piece | None:
    """All that the model does after its trunk, loss included, as a function of the last hidden state."""
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or not hidden.requires_grad:
        return None
    below = {id(m) for m in trunk.modules()}
    used = {id(p) for m in root.modules() if id(m) not in below for p in m.parameters(recurse=False)}
    params = {name: p.detach() for name, p in root.named_parameters() if id(p) in used and p.requires_grad}
    leaves, spec = tree_flatten(((None,), {}))
    return Piece(
        kind=HEAD,
        paths=[HEAD],
        call=partial(_run_head, root, trunk, output, batch),
        module=root,
        root=root,
        leaves=leaves,
        spec=spec,
        places=[0],
        names=list(params),
        xs=[hidden.detach(), *params.values()],
        draws=RandomState.now(),
    )


def _run_head(root, trunk, output, batch, hidden):
    stand_in = copy(output)
    stand_in["last_hidden_state"] = hidden
    own = trunk.__dict__.get("forward")
    trunk.forward = lambda *args, **kwargs: stand_in
    try:
        return root(**batch, use_cache=False).loss
    finally:
        del trunk.forward
        if own is not None:
            trunk.forward = own
