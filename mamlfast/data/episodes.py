"""Draws episodes: support and query prompts of one task, from disjoint examples.

An episode takes two sets of examples of a task that share none. In each set every prompt has an example as
its target and k others of the same set as its exemplars, so a support prompt is never its own exemplar and a
query prompt shows nothing of the support. Draw number i depends on the seed and on i alone: a run can be
repeated, and continued in the middle.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from mamlfast.data.batch import Batch, collate
from mamlfast.data.example import Example, Task
from mamlfast.data.prompt import Prompter, Tokens
from mamlfast.episode import Episode

TaskSampling = Literal["proportional", "uniform"]


@dataclass(frozen=True, kw_only=True)
class EpisodeShape:
    """How many prompts an episode has, and how many exemplars each.

    Attributes:
        shots: exemplars in front of every target (k).
        support: prompts of the support batch.
        query: prompts of the query batch.

    Raises:
        ValueError: negative ``shots``, or a batch without a prompt.
    """

    shots: int
    support: int
    query: int

    def __post_init__(self) -> None:
        if self.shots < 0 or self.support < 1 or self.query < 1:
            raise ValueError(f"an episode must have shots >= 0, support >= 1 and query >= 1, got {self}")

    @property
    def support_examples(self) -> int:
        """The distinct examples that the support takes."""
        return max(self.support, self.shots + 1)

    @property
    def examples(self) -> int:
        """The distinct examples that support and query take together."""
        return self.support_examples + max(self.query, self.shots + 1)


class EpisodeSampler:
    """Draws episodes from tasks.

    Args:
        tasks: what to draw from; those with too few examples for an episode are left out with a warning.
        prompter: turns examples into token ids.
        shape: the size of an episode.
        pad_id: the id to pad with.
        seed: with the number of a draw, all that the draw depends on.
        sampling: tasks in proportion to their examples, or all alike.

    Raises:
        ValueError: no task has enough examples.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        prompter: Prompter,
        *,
        shape: EpisodeShape,
        pad_id: int,
        seed: int = 0,
        sampling: TaskSampling = "proportional",
    ) -> None:
        self.tasks = [task for task in tasks if len(task) >= shape.examples]
        self.prompter, self.shape, self.pad_id, self.seed = prompter, shape, pad_id, seed
        small = [task.name for task in tasks if len(task) < shape.examples]
        if not self.tasks:
            raise ValueError(
                f"an episode takes {shape.examples} examples of a task and no task has as many: "
                "use smaller support and query batches, or fewer shots"
            )
        if small:
            warnings.warn(f"left out, for want of {shape.examples} examples: {', '.join(small)}", stacklevel=2)
        self._weights = [len(task) if sampling == "proportional" else 1 for task in self.tasks]

    def episode(self, number: int) -> Episode:
        """Return draw ``number``; always the same one."""
        _, support, query = self.examples(number)
        return Episode(
            support=[self._batch(support, self.shape.support, Random(f"{self.seed}/{number}/support"))],
            query=self._batch(query, self.shape.query, Random(f"{self.seed}/{number}/query")),
        )

    def examples(self, number: int) -> tuple[Task, list[Example], list[Example]]:
        """Return the task of draw ``number`` and its disjoint support and query examples."""
        rng = Random(f"{self.seed}/{number}/examples")
        (task,) = rng.choices(self.tasks, self._weights)
        drawn = rng.sample(task.examples, self.shape.examples)
        cut = self.shape.support_examples
        return task, drawn[:cut], drawn[cut:]

    def meta_batch(self, step: int, num_tasks: int) -> list[Episode]:
        """Return the ``num_tasks`` episodes of outer step ``step``."""
        return [self.episode(step * num_tasks + i) for i in range(num_tasks)]

    def _batch(self, examples: Sequence[Example], targets: int, rng: Random) -> Batch:
        prompts = leave_one_out(self.prompter, examples, targets=targets, shots=self.shape.shots, rng=rng)
        return collate(prompts, pad_id=self.pad_id)


def leave_one_out(
    prompter: Prompter, examples: Sequence[Example], *, targets: int, shots: int, rng: Random
) -> list[Tokens]:
    """Return a prompt for each of the first ``targets`` examples, with exemplars drawn from the others.

    With fewer than ``shots`` others, all of them are shown.
    """
    prompts = []
    for number, target in enumerate(examples[:targets]):
        others = [*examples[:number], *examples[number + 1 :]]
        prompts.append(prompter.prompt(rng.sample(others, min(shots, len(others))), target))
    return prompts
