"""The embedded suite: every family, split into those trained on and those kept unseen.

A task is a family with its hidden particulars drawn, named ``family:number``. Training, seen and unseen tasks
are numbered in ranges of their own, and the families of the unseen tasks train nothing. Everything follows
from the seed.
"""

from random import Random

from mamlfast.data.example import Task
from mamlfast.data.procedural import calendar, grammar, letters, lists, mappings, numbers, rules
from mamlfast.data.procedural.family import Family
from mamlfast.data.tasks import FewShot, Suite

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (mappings, lists, letters, numbers, rules, grammar, calendar)
    for family in module.FAMILIES
}

# Two of each kind of family, so that what is new is the idea and not the kind.
UNSEEN_FAMILIES = frozenset(
    (
        "word_symbols", "letter_digits", "between", "overwrite", "letter_wrap", "suffix", "tens", "count_names",
        "contains_symbol", "arbitrary_topics", "negation", "tense", "opening_hours", "month_shift",
    )
)  # fmt: skip

# The numbers of the few-shot tasks; training tasks count from zero.
_FEW_SHOT = 1_000_000


def procedural_suite(
    seed: int = 0, *, tasks: int = 32, examples: int = 48, few_shot: int = 2, shots: int = 16, test: int = 16
) -> Suite:
    """Generate the suite of a seed.

    Args:
        seed: what everything follows from.
        tasks: training tasks of each training family.
        examples: the most examples of a training task; a few families have fewer distinct inputs.
        few_shot: few-shot tasks of each family, seen and unseen.
        shots: shots of each few-shot task.
        test: test examples of each few-shot task.
    """
    unseen = [name for name in FAMILIES if name in UNSEEN_FAMILIES]
    trained = [name for name in FAMILIES if name not in UNSEEN_FAMILIES]
    held = range(_FEW_SHOT, _FEW_SHOT + few_shot)
    return Suite(
        train=tuple(_task(name, number, examples, seed) for name in trained for number in range(tasks)),
        seen=tuple(_few_shot(name, number, shots, test, seed) for number in held for name in trained),
        unseen=tuple(_few_shot(name, number, shots, test, seed) for number in held for name in unseen),
    )


def family_of(task: str) -> str:
    """Return the family of a task, by its name."""
    return task.rpartition(":")[0]


def _task(family: str, number: int, count: int, seed: int) -> Task:
    name, rng = f"{family}:{number}", Random(f"{seed}/{family}/{number}")
    return Task(name=name, examples=FAMILIES[family].examples(name, count, rng))


def _few_shot(family: str, number: int, shots: int, test: int, seed: int) -> FewShot:
    task = _task(family, number, shots + test, seed)
    return FewShot(name=task.name, shots=task.examples[:shots], test=task.examples[shots:])
