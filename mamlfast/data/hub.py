"""Tasks from a ``datasets`` data set: a hub name, a file or an object in memory.

The rows are MetaICL's: ``task``, ``input``, ``output``, ``options``. Split ``train`` is trained on. Tasks that
only split ``test`` (or ``validation``) holds are the unseen ones; where there is no such task, every fifth
task, in the order of names, is kept from training instead.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mamlfast.data.example import Example, Task
from mamlfast.data.metaicl import example_from
from mamlfast.data.tasks import FewShot, Suite, group_by_task, hold_out

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("task", "input", "output")


def read_dataset(source: "str | Dataset | Mapping[str, Dataset]", *, shots: int = 16, test: int = 16) -> Suite:
    """Return the tasks of a data set.

    Args:
        source: a name for ``datasets.load_dataset`` (only this may use the network), one split, or splits.
        shots: how many rows of each few-shot task are its shots.
        test: the most test rows of each few-shot task.

    Raises:
        ValueError: the data set cannot be loaded, lacks a column, holds a malformed row, or has too few tasks.
    """
    splits = _splits(source)
    if "train" not in splits:
        raise ValueError(f"the data set must have a split named train, got {sorted(splits)}")
    train = group_by_task(_examples(splits["train"], "train"))
    name = "test" if "test" in splits else "validation"
    other = group_by_task(_examples(splits[name], name)) if name in splits else {}
    targets = {task: rows for task, rows in other.items() if task not in train}
    if not targets:
        targets = {task: train.pop(task) for task in sorted(train)[::5]}
    held = [hold_out(Task(name=task, examples=tuple(rows)), shots=shots, test=test) for task, rows in train.items()]
    return Suite(
        train=tuple(task for task, _ in held),
        seen=tuple(few_shot for _, few_shot in held),
        unseen=tuple(
            FewShot(name=task, shots=tuple(rows[:shots]), test=tuple(rows[shots : shots + test]))
            for task, rows in targets.items()
        ),
    )


def _splits(source: "str | Dataset | Mapping[str, Dataset]") -> "Mapping[str, Dataset]":
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str):
        return {"train": source}
    # Imported here: it takes seconds, and only this source needs it.
    from datasets import load_dataset

    try:
        return {str(name): rows for name, rows in load_dataset(source).items()}
    except Exception as error:  # the library raises its own, Hugging Face hub's and operating system errors
        raise ValueError(f"data set {source!r} could not be loaded: {error}") from error


def _examples(rows: "Dataset", split: str) -> list[Example]:
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise ValueError(f"split {split} must have the columns {list(COLUMNS)}, {missing} missing")
    return [_example(row, f"split {split}, row {number}") for number, row in enumerate(rows)]


def _example(row: Any, where: str) -> Example:
    try:
        return example_from(row, row["task"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
