"""What first and second order cost: time, and memory kept for the backward.

Times are medians of a few runs after one that does not count: CPU time of the process, or wall time on a GPU that
is waited for. Memory is what the graph saves for its backward, parameters left out, each allocation once: the same
on every run, and what peaks when the forward ends.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

RUNS = 3


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Milliseconds of forward, backward and Hessian-vector product; megabytes saved for the gradient and for H v."""

    forward_ms: float
    backward_ms: float
    hvp_ms: float
    saved_mb: float
    hvp_saved_mb: float

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, count: int) -> "Costs":
        return Costs(**{name: value * count for name, value in vars(self).items()})


Pass = Callable[[], Callable[[], object]]


def measure(gradient: Pass, hvp: Pass, apart: list[Tensor], device: torch.device, runs: int = RUNS) -> Costs:
    """Return the costs of two passes; each runs forward when called and returns its backward.

    ``apart`` are tensors that are there anyway, which do not count as saved.
    """
    saved = [_saved(forward, apart) for forward in (gradient, hvp)]
    both: list[list[tuple[float, float]]] = [[], []]
    for _ in range(runs):
        for times, forward in zip(both, (gradient, hvp), strict=True):
            times.append(_timed(forward, device))
    (forward, backward), second = (tuple(map(median, zip(*times, strict=True))) for times in both)
    return Costs(forward_ms=forward, backward_ms=backward, hvp_ms=sum(second), saved_mb=saved[0], hvp_saved_mb=saved[1])


def _timed(forward, device) -> tuple[float, float]:
    begin = _now(device)
    backward = forward()
    middle = _now(device)
    backward()
    return 1e3 * (middle - begin), 1e3 * (_now(device) - middle)


def _now(device):
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _saved(forward, apart) -> float:
    """Megabytes that the graph keeps after the forward; its backward runs too, as a warm-up."""
    there = {t.untyped_storage().data_ptr() for t in apart}
    sizes: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # a hook that returns its argument closes a reference cycle

    with saved_tensors_hooks(pack, lambda t: t):
        backward = forward()
    total = sum(sizes.values())
    backward()
    return total / 1e6
