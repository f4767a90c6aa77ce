"""Times of code on a GPU: contenders in turn, the cache emptied before each, the median and the spread.

The clock is a parameter, so that all but ``CudaClock`` works without a GPU.
"""

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from bench.gpu_run import Budget

Name = TypeVar("Name")

WARM_UPS = 10
REPETITIONS = 30
LEAST_REPETITIONS = 3
# Repetitions go on for at least so long, if the budget allows it: clocks settle.
LEAST_SECONDS = 1.0


class Clock(Protocol):
    """Measures one call."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Run ``call`` once and return how long it took."""
        ...


class CudaClock:
    """CUDA events round the call, with the second-level cache written over before."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self._cache = torch.empty(max(4 * size, 1 << 26), dtype=torch.int8, device="cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        """Run ``call`` once and return its time on the GPU."""
        self._cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of the repetitions of one contender: median, and what 10 % and 90 % of them stay below."""

    ms: float
    p10: float
    p90: float
    repetitions: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summarise at least one repetition."""
        ms = sorted(1e3 * s for s in seconds)
        return cls(ms=statistics.median(ms), p10=_at(ms, 0.1), p90=_at(ms, 0.9), repetitions=len(ms))


def _at(ordered, share):
    return ordered[round(share * (len(ordered) - 1))]


def race(runs: Mapping[Name, Callable[[], object]], clock: Clock, budget: Budget) -> dict[Name, Timing]:
    """Time each run, taking turns, within the budget: repetitions until there are enough of them, or time is up.

    At least three repetitions of each after one warm-up, whatever they take; an empty mapping gives an empty one.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    once = sum(clock.seconds(call) for call in runs.values())
    for _ in range(_warm_ups(once, budget)):
        for call in runs.values():
            clock.seconds(call)
    gc.collect()
    spent = 0.0
    while runs and (len(next(iter(seconds.values()))) < LEAST_REPETITIONS or _goes_on(seconds, spent, once, budget)):
        for name, call in runs.items():
            seconds[name].append(clock.seconds(call))
            spent += seconds[name][-1]
    return {name: Timing.of(found) for name, found in seconds.items()}


def _warm_ups(once, budget):
    """One is done; the others are worth a tenth of the time."""
    return min(WARM_UPS - 1, int(0.1 * budget.left() / max(once, 1e-9)))


def _goes_on(seconds, spent, once, budget):
    done = len(next(iter(seconds.values())))
    wanted = done < REPETITIONS or spent < LEAST_SECONDS * len(seconds)
    return wanted and budget.left() > 2 * once
