"""What a graph was made by: the Rules in it, and other people's ``torch.autograd.Function``.

A Function whose backward launches a bare kernel is a constant to autograd: under ``create_graph=True`` its results
have no graph, and the second order that passes through it vanishes without a word. The same goes for a gradient that
was computed in the forward and kept. Those are the signatures looked for here. ``once_differentiable`` gives the
results a graph that raises when it is used. A Function with none of these may still be wrong; that takes numbers.
"""

import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from mamlfast.checking.differences import Vector
from mamlfast.model import holding
from mamlfast.ops.backend import backend_for
from mamlfast.ops.rule import Rule, derived_rule

Rooms = dict[str, set[str]]

SILENT = "first order only, silently: the results of its backward have no graph"
ONCE = "once differentiable: its backward refuses to be differentiated"
EARLY = "first order only, silently, unless it is linear: its gradient is that of the forward, a constant afterwards"
UNKNOWN = "unknown to the engine, which cannot see what its backward knows of the second order"


@dataclass(frozen=True, order=True)
class ForeignFunction:
    """A ``torch.autograd.Function`` that is not one of ours: its name, where its backward stands, what is wrong."""

    name: str
    place: str
    fault: str = UNKNOWN

    def __str__(self) -> str:
        return f"{self.name}, {self.place}: {self.fault}"


def nodes(outputs: Iterable[Tensor]) -> list[Node]:
    """Every node of the graph behind ``outputs``, once."""
    found: dict[Node, None] = {}
    waiting = [y.grad_fn for y in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting.extend(parent for parent, _ in node.next_functions)
    return list(found)


def rules(outputs: Iterable[Tensor]) -> list[Rule]:
    """The Rules that the graph behind ``outputs`` will ask for its backward."""
    return [rule for node in nodes(outputs) if isinstance(rule := getattr(node, "rule", None), Rule)]


def is_derived(rule: Rule) -> bool:
    """Whether the Rule was derived on the spot."""
    return rule.fwd.__module__ == derived_rule.__module__


def foreign_functions(outputs: Vector, xs: Vector, cotangents: Vector) -> list[ForeignFunction]:
    """Name the foreign Functions between ``xs`` and ``outputs``, each with what backward passes show of it.

    Two are run: one on cotangents that require a gradient, for whatever is linear in them then has a graph, if it has
    a backward at all; one on constant cotangents, where only what depends on the inputs has one.
    """
    found = {node: UNKNOWN for node in nodes(outputs) if _is_foreign(node)}
    for constant in (False, True):
        seeds = [c.detach().requires_grad_(not constant) for c in cotangents]
        handles = [node.register_hook(partial(_see, found, node)) for node, f in found.items() if f == UNKNOWN]
        try:
            if handles:
                torch.autograd.grad(outputs, xs, seeds, create_graph=True, allow_unused=True)
        except (RuntimeError, TypeError, ValueError):
            pass  # a backward that raises speaks for itself in the comparison; the Functions are named all the same
        finally:
            for handle in handles:
                handle.remove()
    return sorted({_named(type(node), fault) for node, fault in found.items()})


def _see(found, node, xs_bar, y_bars):
    """The hook of a node: judge it by the graphs of what its backward took and gave."""
    results = [g for g in xs_bar if g is not None]
    constant = any(not g.requires_grad and bool(g.any()) for g in results)
    if any(g.grad_fn is not None and "Error" in g.grad_fn.name() for g in results):
        found[node] = ONCE
    elif constant:
        found[node] = SILENT if any(c is not None and c.requires_grad for c in y_bars) else EARLY


def _is_foreign(node) -> bool:
    return isinstance(node, BackwardCFunction) and not isinstance(getattr(node, "rule", None), Rule)


def _named(node_class, fault) -> ForeignFunction:
    """A custom operator of ``torch.library`` gets a Function in a file of PyTorch's, with a name from its own."""
    function = node_class._forward_cls
    code = getattr(inspect.unwrap(function.backward), "__code__", None)
    place = f"{_short(code.co_filename)}:{code.co_firstlineno}" if code else f"module {function.__module__}"
    return ForeignFunction(name=node_class.__name__, place=place, fault=fault)


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


@contextmanager
def rooms_seen() -> Iterator[Rooms]:
    """Note inside the block which rooms answer each Rule's forward on duals, by the Rule's name."""
    seen: Rooms = {}
    asking: list[str] = []
    fwd_jvp = Rule._fwd_jvp

    def forward(rule, *args):
        asking.append(rule.name)
        try:
            return fwd_jvp(rule, *args)
        finally:
            asking.pop()

    def room_for(*tensors, **options):
        room = backend_for(*tensors, **options)
        if asking:
            seen.setdefault(asking[-1], set()).add(room)
        return room

    ops = [module for name, module in list(sys.modules.items()) if name.startswith("mamlfast.ops.")]
    asked = [m for m in ops if getattr(m, "backend_for", None) is backend_for and m.__name__ != backend_for.__module__]
    with holding([(Rule, "_fwd_jvp", forward), *((m, "backend_for", room_for) for m in asked)]):
        yield seen


def answers(outputs: Iterable[Tensor], rooms: Rooms) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the written Rules behind ``outputs``, with their rooms, and of the torch functions derived."""
    found = rules(outputs)
    written = {rule.name + _in_rooms(rooms.get(rule.name, ())) for rule in found if not is_derived(rule)}
    return tuple(sorted(written)), tuple(sorted({rule.name for rule in found if is_derived(rule)}))


def _in_rooms(rooms) -> str:
    return f" ({'+'.join(sorted(rooms))})" if rooms else ""
