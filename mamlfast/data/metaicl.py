"""Reads a folder laid out as MetaICL's data are.

::

    config/SETTING.json                    {"train": [task], "test": [task], "unseen_domain_test": [task]}
    data/TASK/TASK_16384_100_train.jsonl   the pool of a training task
    data/TASK/TASK_16_SEED_train.jsonl     the 16 shots of a target task, and beside it its _test.jsonl

A line is ``{"task", "input", "output", "options"}``; a task's name may hold a colon and is also the name of
its folder. Whatever is missing or malformed is reported with its file and, for a line, its number.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from mamlfast.data.example import Example, Task
from mamlfast.data.tasks import FewShot, Suite, hold_out

POOL = "16384_100_train"
_SETTING_KEYS = ("train", "test", "unseen_domain_test")


def read_metaicl(folder: Path, setting: str, *, shots: int = 16, test: int = 16, seed: int = 100) -> Suite:
    """Read a setting: its training pools, and its targets at one few-shot seed.

    The last examples of every pool are not trained on and become the seen tasks. A task listed both for training
    and as a target is dropped from training, with a warning (MetaICL's own ``non_nli_to_nli`` lists one).

    Args:
        folder: the folder that holds ``config/`` and ``data/``.
        setting: the name of a file in ``config/``.
        shots: the number of shots in the few-shot files' names, and of the seen tasks.
        test: the most test examples of each few-shot task.
        seed: the few-shot seed in those names: 100, 13, 21, 42 or 87.

    Raises:
        ValueError: an unknown setting, a missing file, or a line that is no example.
    """
    lists = read_setting(folder, setting)
    targets = list(dict.fromkeys(lists["test"] + lists["unseen_domain_test"]))
    leaked = sorted(set(lists["train"]) & set(targets))
    if leaked:
        warnings.warn(f"{setting} lists {leaked} for training and as targets: not trained on", stacklevel=2)
    names = [name for name in lists["train"] if name not in leaked]
    split = [hold_out(read_pool(folder, name), shots=shots, test=test) for name in names]
    return Suite(
        train=tuple(task for task, _ in split),
        seen=tuple(few_shot for _, few_shot in split),
        unseen=tuple(read_few_shot(folder, name, shots=shots, test=test, seed=seed) for name in targets),
        unseen_domain=frozenset(lists["unseen_domain_test"]),
    )


def read_setting(folder: Path, setting: str) -> dict[str, list[str]]:
    """Return the ``train``, ``test`` and ``unseen_domain_test`` task names of a setting.

    Raises:
        ValueError: no such folder or setting, or a file that is not a setting.
    """
    if not (folder / "config").is_dir() or not (folder / "data").is_dir():
        raise ValueError(f"data folder must hold config/ and data/ as MetaICL's does, {folder} does not")
    path = folder / "config" / f"{setting}.json"
    if not path.is_file():
        raise ValueError(f"unknown setting {setting!r}; {folder} has {known_settings(folder)}")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        return {key: [str(name) for name in lists.get(key, [])] for key in _SETTING_KEYS}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON object of task name lists: {error}") from None


def known_settings(folder: Path) -> str:
    """Return the names of a folder's settings, to be read in a sentence."""
    return ", ".join(sorted(path.stem for path in (folder / "config").glob("*.json"))) or "none"


def read_pool(folder: Path, name: str) -> Task:
    """Read a task's large training file."""
    return Task(name=name, examples=read_examples(_path(folder, name, POOL), name))


def read_few_shot(folder: Path, name: str, *, shots: int, test: int, seed: int) -> FewShot:
    """Read a target task at one seed, its shots in file order and its first ``test`` test examples."""
    parts = [read_examples(_path(folder, name, f"{shots}_{seed}_{part}"), name) for part in ("train", "test")]
    return FewShot(name=name, shots=parts[0], test=parts[1][:test])


def read_examples(path: Path, task: str) -> tuple[Example, ...]:
    """Read a jsonl file, an example a line; ``task`` names those lines that do not name theirs.

    Raises:
        ValueError: the file is missing or empty, or a line is empty or no example; with file and line.
    """
    if not path.is_file():
        raise ValueError(f"the data of task {task!r} need the file {path}, which is missing")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"{path} must hold one example a line, it is empty")
    # Not splitlines(): JSON text may hold the other characters that it takes for line ends.
    lines = text.removesuffix("\n").split("\n")
    return tuple(_parse(line, task, f"{path}, line {number}") for number, line in enumerate(lines, start=1))


def _path(folder: Path, name: str, part: str) -> Path:
    return folder / "data" / name / f"{name}_{part}.jsonl"


def _parse(line: str, task: str, where: str) -> Example:
    if not line.strip():
        raise ValueError(f"{where}: expected an example, got an empty line; remove it")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r} ({error})") from None
    try:
        return example_from(row, task)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def example_from(row: Any, task: str) -> Example:
    """Return the example of a row; a list of acceptable outputs stands for its first.

    Raises:
        TypeError: the row or one of its fields has the wrong type, or ``input`` or ``output`` is missing.
        ValueError: the output is not among the options.
    """
    if not isinstance(row, dict):
        raise TypeError(f"expected an object with input and output, got {type(row).__name__}")
    output, options = row.get("output"), row.get("options") or []
    if isinstance(output, list) and output:
        output = output[0]
    return Example(
        task=_text(row.get("task") or task, "task"),
        input=_text(row.get("input"), "input"),
        output=_text(output, "output"),
        options=tuple(_text(option, "options") for option in options),
    )


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{field} must be text, got {value!r}")
    return value
