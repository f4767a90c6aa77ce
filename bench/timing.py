"""Time contenders in turn, so that whatever slows the machine down meets all of them alike.

pytest-benchmark times one function per test, all its rounds in a row. Here all contenders of a setting run round by
round first, and each test then plays its contender's times back to pytest-benchmark, against a clock that nothing
else moves. Its table and its JSON are thereby those of the interleaved rounds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench import gate
from bench.contenders import DOUBLE_BACKWARD, FLOOR, Contender
from bench.limit import limit
from bench.models import Setting


@dataclass(frozen=True, kw_only=True)
class Time:
    """What a contender's meta-gradient took in each round of a setting, and what it is to be compared with.

    ``ratio`` is its median over first order's, ``limit`` what that ratio is if matrix products were all that takes
    time, ``over_limit`` the first over the second. ``error`` is against double backward, in the dtype of the timing.
    """

    contender: str
    setting: str
    exact: bool
    error: float
    seconds: tuple[float, ...]
    median: float
    ratio: float
    limit: float
    over_limit: float


def timed(contenders: Iterable[Contender], setting: Setting, rounds: int) -> dict[str, Time]:
    """Check and time contenders, first order among them, in one setting.

    The round that is checked is the warm-up. Raises gate.WrongResult where one is not what it is listed as.
    """
    contenders = list(contenders)
    runs = {c.name: c.prepared(setting) for c in contenders}
    errors = _checked(contenders, runs)
    seconds = race(runs, rounds)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    times = {}
    for c in contenders:
        ratio, least = medians[c.name] / medians[FLOOR.name], limit(c.work, setting.steps)
        times[c.name] = Time(
            contender=c.name,
            setting=setting.name,
            exact=c.exact,
            error=errors[c.name],
            seconds=tuple(seconds[c.name]),
            median=medians[c.name],
            ratio=ratio,
            limit=least,
            over_limit=ratio / least,
        )
    return times


def _checked(contenders, runs):
    oracle = runs[DOUBLE_BACKWARD.name]()
    errors = {}
    for c in contenders:
        gradient = oracle if c.name == DOUBLE_BACKWARD.name else runs[c.name]()
        errors[c.name] = gate.judge(c, gate.error(gradient, oracle), gate.FLOAT32_THRESHOLD)
    return errors


def race(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round. Every round starts with another one than the last.

    Nothing is warmed up: that is up to the caller. Results are dropped, and garbage is collected, off the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in _rotated(list(runs), turn):
            gc.collect()
            begin = time.perf_counter()
            result = runs[name]()
            seconds[name].append(time.perf_counter() - begin)
            del result
    return seconds


def _rotated(names, turn):
    start = turn % len(names)
    return names[start:] + names[:start]


class Tape:
    """A clock for recorded times: ``play`` moves it by the next of those given to ``rewind``, and nothing else does."""

    __name__ = "recorded"

    def __init__(self):
        self._now = 0.0
        self._seconds: list[float] = []

    def __call__(self) -> float:
        return self._now

    def rewind(self, seconds: Sequence[float]) -> None:
        """Put recorded times in, the first to be played first."""
        self._seconds = list(seconds)

    def play(self) -> None:
        """Let the next recorded time pass. Raises IndexError where all have been played."""
        self._now += self._seconds.pop(0)
