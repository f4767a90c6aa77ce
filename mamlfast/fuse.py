"""Rules in place of the small operations of Hugging Face's decoders, and back.

A Hugging Face RMSNorm is eight torch functions, and each is an operation of its own to the engine, with a value and a
tangent to read and to write. ``fuse`` makes it one, and so the gate of an MLP, the activation, the rotary embedding,
attention, and the head together with its loss, which then never holds the logits.

A fused module is the module it was: its class, parameters, buffers, hooks, and the names in its ``state_dict``. What
changes is one instance attribute, ``forward``, and ``unfuse`` deletes it. Copying, pickling, ``save_pretrained``,
``generate`` and adapters inside the module go on working. Which modules are fused is decided by ``fusable``: those
that provably compute what the Rule computes. The rest is left alone, and ``fusion_report`` says why.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mamlfast import attention_interface
from mamlfast.fusable import match
from mamlfast.fused_modules import Forward


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """``fused``: what a module runs on; ``left``: why one is (in that respect) as it was; by the module's name."""

    fused: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        """A table with one line for each kind of module, with how many there are of it."""
        lines: dict[tuple[str, str], int] = {}
        for names, mark in ((self.fused, ""), (self.left, "left: ")):
            for name, text in names.items():
                key = re.sub(r"\d+", "*", name) or "(the model)", mark + text
                lines[key] = lines.get(key, 0) + 1
        width = max((len(name) for name, _ in lines), default=0)
        return "\n".join(f"{name:<{width}}  {count:>3}  {text}" for (name, text), count in lines.items())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to fuse one model: forwards of its modules, and (configuration, attribute, value) for its attention."""

    forwards: tuple[Forward, ...]
    attention: tuple[tuple[Any, str, Any], ...]
    report: FusionReport

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block the model is fused, except where a forward has been overridden in the meantime."""
        before = [(config, name, getattr(config, name)) for config, name, _ in self.attention]
        placed = self.placed()
        try:
            for config, name, value in self.attention:
                setattr(config, name, value)
            yield
        finally:
            for config, name, value in before:
                setattr(config, name, value)
            for own, forward in placed:
                if own.get("forward") is forward:
                    del own["forward"]

    def placed(self) -> list[tuple[dict[str, Any], Forward]]:
        """Set the forwards of those modules that have none of their own; return where."""
        places = [(forward.module.__dict__, forward) for forward in self.forwards]
        free = [(own, forward) for own, forward in places if "forward" not in own]
        for own, forward in free:
            own["forward"] = forward
        return free


def plan(model: nn.Module, *, for_engine: bool = False) -> Plan:
    """Return how ``model`` is to be fused, wholly or ``for_engine``: with what the engine does not do by itself.

    The engine chooses the attention, and a module that calls one torch function (``nn.LayerNorm``, ``nn.SiLU``) is on
    its Rule wherever there is a tangent, and on PyTorch's own kernel, the faster one, where there is none.

    A plan holds modules weakly and may be held any number of times, also inside itself.
    """
    served = {} if for_engine else _attention_settings(model)
    forwards: list[Forward] = []
    fused: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not for_engine and type(module).__name__.endswith("Attention") and hasattr(module, "config"):
            if id(module.config) in served:
                fused.setdefault(name, []).append(attention_interface.NAME)
            else:
                left[name] = "its model computes attention itself"
        found = match(module)
        if isinstance(found, str):
            left[name] = found
        elif found is not None and not (for_engine and found.single):
            forwards.append(Forward(found.function, module))
            fused.setdefault(name, []).append(found.name)
    report = FusionReport(fused={name: ", ".join(words) for name, words in fused.items()}, left=left)
    return Plan(forwards=tuple(forwards), attention=tuple(served.values()), report=report)


def fuse(model: nn.Module) -> nn.Module:
    """Put ``model`` on Rules, in place, and return it; ``fusion_report(model)`` says what that means for it.

    Results are the same to rounding, in every order of differentiation up to the second. With labels and gradients on,
    the loss is computed without the logits, and ``logits`` is None in what the model returns; under
    ``torch.no_grad()``, without labels, and in ``generate`` they are there as ever. A query that sees no key at all
    (a padding token on the left) attends to nothing.

    Cast and move the model first: RMSNorms are compared in their dtype. Attention is switched in the model's
    configuration, as by ``set_attn_implementation``, so models that share that object are switched together. Fusing
    twice does no more than once. ``torch.func.vmap`` over the fused loss raises: which labels count decides its shapes.
    """
    prepared = plan(model)
    prepared.placed()
    changed = [(config, name, getattr(config, name), value) for config, name, value in prepared.attention]
    if changed:
        model.__dict__[_ATTENTION] = model.__dict__.get(_ATTENTION, []) + changed
    for config, name, _, value in changed:
        setattr(config, name, value)
    return model


_ATTENTION = "_mamlfast_attention"  # (configuration, attribute, before, after), where ``fuse`` was called


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse`` and return the model: its modules and configurations are exactly what they were.

    An attention implementation that was chosen after ``fuse`` stays.
    """
    for module in model.modules():
        own = module.__dict__
        if isinstance(own.get("forward"), Forward):
            del own["forward"]
        for config, name, before, after in reversed(own.pop(_ATTENTION, [])):
            if getattr(config, name) == after:
                setattr(config, name, before)
    return model


@contextmanager
def fused(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block ``model`` is fused, afterwards it is as before, fused or not.

    Every entry makes a plan, which looks at each module; ``plan(model)`` once and its ``held()`` often is cheaper.
    """
    with plan(model).held():
        yield model


def fusion_report(model: nn.Module) -> FusionReport:
    """Say what ``fuse`` puts on Rules in this model, or has put, and what it leaves alone, for which reason."""
    return plan(model).report


def _attention_settings(model: nn.Module) -> dict[int, tuple[Any, str, Any]]:
    """By the id of a configuration, what puts the models that have it on our attention, if all of them allow it."""
    configs: dict[int, tuple[Any, set[type]]] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs.setdefault(id(module.config), (module.config, set()))[1].add(type(module))
    # The property would also set the configurations of the model's parts, which stand here for themselves.
    name = "_attn_implementation_internal"
    return {
        key: (config, name, attention_interface.NAME)
        for key, (config, owners) in configs.items()
        if hasattr(config, name) and all(map(attention_interface.serves, owners))
    }
