"""What a run trains on and is judged by.

Three groups of tasks, whatever the source::

    train     tasks with many examples; episodes are drawn from these
    seen      the same tasks or families, on examples that training never sees
    unseen    target tasks that training never sees

``seen`` and ``unseen`` are few-shot: a handful of shots to put in context or to adapt on, and test examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mamlfast.data.example import Example, Task


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A task as it is met after training: ``shots`` to learn it from, ``test`` to be judged on.

    Raises:
        ValueError: ``shots`` or ``test`` is empty.
    """

    name: str
    shots: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        if not self.shots or not self.test:
            raise ValueError(
                f"task {self.name!r} must have shots and test examples, "
                f"got {len(self.shots)} shots and {len(self.test)} test examples"
            )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Training tasks and the two groups of few-shot tasks that judge the training.

    ``unseen_domain`` names those of the unseen tasks whose domain, too, is new.

    Raises:
        ValueError: a group is empty, or a training task is among the unseen.
    """

    train: tuple[Task, ...]
    seen: tuple[FewShot, ...]
    unseen: tuple[FewShot, ...]
    unseen_domain: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for group in ("train", "seen", "unseen"):
            if not getattr(self, group):
                raise ValueError(f"a suite must have {group} tasks, got none")
        leaked = {task.name for task in self.train} & {task.name for task in self.unseen}
        if leaked:
            raise ValueError(f"training and unseen tasks must be disjoint, both hold {sorted(leaked)}")


def hold_out(task: Task, *, shots: int, test: int) -> tuple[Task, FewShot]:
    """Split a task into what training sees and a few-shot task from its last examples.

    At most half of the examples are held out; shots and test examples then shrink alike.

    Raises:
        ValueError: the task has fewer than four examples.
    """
    if len(task) < 4:
        raise ValueError(f"task {task.name!r} must have at least 4 examples to hold some out, got {len(task)}")
    held = min(shots + test, len(task) // 2)
    num_shots = max(1, held * shots // (shots + test))
    kept, rest = task.examples[:-held], task.examples[-held:]
    few_shot = FewShot(name=task.name, shots=rest[:num_shots], test=rest[num_shots:])
    return Task(name=task.name, examples=kept), few_shot


def group_by_task(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Return the examples of each task, tasks and examples in order of appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.task, []).append(example)
    return groups
