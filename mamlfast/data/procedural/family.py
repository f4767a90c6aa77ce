"""A family of tasks: one idea, of which each task hides other particulars.

A family is built round a function of a random generator. It draws what a task hides (which mapping, which
rule, which labels) and returns a ``Hidden``: how inputs are drawn, and the answer to each. MetaICL knows three
types of task, and so do families::

    classification     the hidden task has a label list, the options of every example
    multi-choice       the options are the answers that sister tasks of the family give to the same input
    free-form          no options
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from mamlfast.data.example import Example
from mamlfast.data.procedural.lexicon import LABELS

TaskType = Literal["classification", "multi-choice", "free-form"]
Items = list[str]

# How often an input is drawn for each one wanted, before a task has no more of them.
_ATTEMPTS = 20
# How many sister tasks are asked, to offer at most so many options.
_SISTERS, _OPTIONS = 12, 4


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """One task of a family: ``inputs`` draws the items of an input, ``answer`` knows its output."""

    inputs: Callable[[Random], Items]
    answer: Callable[[Items], str]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """A named idea: ``hide`` draws one of its tasks."""

    hide: Callable[[Random], Hidden]
    type: TaskType

    @property
    def name(self) -> str:
        """The name of the function that hides."""
        return self.hide.__name__

    def examples(self, task: str, count: int, rng: Random) -> tuple[Example, ...]:
        """Draw a task, and of it up to ``count`` examples with distinct inputs."""
        hidden = self.hide(rng)
        sisters = [self.hide(rng) for _ in range(_SISTERS)] if self.type == "multi-choice" else []
        found: dict[str, Example] = {}
        for _ in range(count * _ATTEMPTS):
            if len(found) == count:
                break
            items = hidden.inputs(rng)
            x, y = spaced(*items), hidden.answer(items)
            options = hidden.labels or _options(y, [sister.answer(items) for sister in sisters], rng)
            if sisters and len(options) < 2:
                continue
            found.setdefault(x, Example(task=task, input=x, output=y, options=options))
        return tuple(found.values())


def families(task_type: TaskType, *hides: Callable[[Random], Hidden]) -> tuple[Family, ...]:
    """Return a family of one type for each of the functions."""
    return tuple(Family(hide=hide, type=task_type) for hide in hides)


def draw_labels(rng: Random, count: int) -> tuple[str, ...]:
    """Draw labels for a classification task."""
    return tuple(rng.sample(LABELS, count))


def spaced(*parts: object) -> str:
    """Join the parts with spaces."""
    return " ".join(map(str, parts))


def _options(right: str, others: list[str], rng: Random) -> tuple[str, ...]:
    """Return the right output and a few that differ from it, in random order; none where there is no other."""
    if not others:
        return ()
    distinct = list(dict.fromkeys([right, *others]))[:_OPTIONS]
    rng.shuffle(distinct)
    return tuple(distinct)
