"""Steps in order of importance, each within its own time, and a record that is whole after every row.

A step is a generator of rows. A machine that is taken away leaves the rows before; a step that overruns is stopped
where it stands, says so in the record, and the next one begins. Nothing here knows of any GPU.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class OutOfTime(BaseException):
    """A step has used its time. No handler of errors is to take it for one."""


class Refused(Exception):
    """A measurement that may not be made: what it would measure is wrong, or was not checked."""


@dataclass(kw_only=True)
class Budget:
    """Seconds from now; ``clock`` is what counts them."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self):
        self.start = self.clock()

    def left(self) -> float:
        """Seconds that remain, at least 0."""
        return max(0.0, self.seconds - self.used())

    def used(self) -> float:
        """Seconds since it was made."""
        return self.clock() - self.start


@dataclass(frozen=True, kw_only=True)
class Step:
    """``rows(budget)`` yields what was measured, in at most ``seconds``; it may look at the budget to do less."""

    name: str
    seconds: float
    rows: Callable[[Budget], Iterator[Row]]


@dataclass
class Gate:
    """What was found right and what wrong; only the former may be timed."""

    verdicts: dict[str, bool] = field(default_factory=dict)

    def add(self, name: str, passed: bool) -> None:
        """Take down a verdict; one that was bad stays bad."""
        self.verdicts[name] = passed and self.verdicts.get(name, True)

    def require(self, name: str) -> None:
        """Raise Refused unless ``name`` was checked and found right."""
        if name not in self.verdicts:
            raise Refused(f"{name} was not checked, so it gets no number")
        if not self.verdicts[name]:
            raise Refused(f"{name} is wrong, so it gets no number")

    @property
    def passed(self) -> bool:
        """Whether nothing that was checked was wrong."""
        return all(self.verdicts.values())


class Record:
    """One JSON file, replaced whole whenever something is added."""

    def __init__(self, path: Path, header: Row):
        self.path = path
        self.content: Row = {**header, "steps": []}

    def begin(self, name: str) -> Row:
        """Add a step and return its entry, to be changed in place before ``write``."""
        entry: Row = {"name": name, "status": "running", "rows": []}
        self.content["steps"].append(entry)
        return entry

    @property
    def clean(self) -> bool:
        """Whether no step failed or was refused; time running out is no fault."""
        return not any(entry["status"] in ("failed", "refused") for entry in self.content["steps"])

    def write(self) -> None:
        """Write what there is; a reader sees the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps(_plain(self.content), indent=1, allow_nan=False) + "\n")
        draft.replace(self.path)


def _plain(x):
    """The same with numbers that JSON does not have as words."""
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def run(steps: Sequence[Step], record: Record, total: Budget, say: Callable[[str], None] = print) -> None:
    """Run the steps until ``total`` is used up. The record tells of each how it ended.

    ``done``, ``cut off`` (its own time or all of it was over), ``refused`` or ``failed`` with the error, or
    ``skipped``. Only what stops the whole run (KeyboardInterrupt) is raised again, after the record was written.
    """
    for step in steps:
        entry = record.begin(step.name)
        budget = Budget(seconds=min(step.seconds, total.left()), clock=total.clock)
        if budget.seconds <= 0:
            entry["status"] = "skipped"
        else:
            say(f"{step.name}: at most {budget.seconds:.0f} s")
            try:
                _run_step(step, budget, entry, record, say)
            finally:
                entry["seconds"] = round(budget.used(), 3)
                record.write()
        record.write()
        say(f"{step.name}: {entry['status']}")


def _run_step(step, budget, entry, record, say):
    entry["status"] = "cut off"  # should nothing be able to say otherwise
    try:
        with _alarm(budget.left()):
            for row in step.rows(budget):
                entry["rows"].append(row)
                record.write()
                say(f"  {line(row)}")
        entry["status"] = "done"
    except OutOfTime:
        pass
    except Refused as error:
        entry["status"], entry["error"] = "refused", str(error)
    # The next step may well work, and whatever went wrong here is in the record.
    except Exception as error:
        entry["status"], entry["error"] = "failed", f"{type(error).__name__}: {error}"


@contextmanager
def _alarm(seconds):
    """Raise OutOfTime in the block after ``seconds``; only a main thread can, elsewhere steps mind their budget."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal, _frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def line(row: Row) -> str:
    """A row for the terminal."""
    return "  ".join(f"{name} {_short(value)}" for name, value in row.items() if not isinstance(value, dict | list))


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
