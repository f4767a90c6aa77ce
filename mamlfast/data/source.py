"""Finds the tasks that a name stands for."""

from pathlib import Path

from mamlfast.data.hub import read_dataset
from mamlfast.data.metaicl import known_settings, read_metaicl
from mamlfast.data.procedural import procedural_suite
from mamlfast.data.tasks import Suite

EMBEDDED = "procedural"


def read_suite(name: str, setting: str | None, *, seed: int, test: int) -> Suite:
    """Return the embedded suite, a setting of a MetaICL-layout folder, or a data set of the hub.

    Args:
        name: ``procedural``, a folder, or a name for ``datasets.load_dataset``.
        setting: which of the folder's settings; nothing else has any.
        seed: of the embedded suite.
        test: the most test examples of each few-shot task.

    Raises:
        ValueError: no such source or setting, or data that cannot be read.
    """
    folder = Path(name)
    if name != EMBEDDED and folder.is_dir():
        if setting is None:
            known = known_settings(folder)
            raise ValueError(f"a data folder needs a setting; {folder} has {known}")
        return read_metaicl(folder, setting, test=test)
    if is_path(name):
        raise ValueError(f"data folder {name} does not exist")
    if setting is not None:
        raise ValueError(f"setting {setting!r} needs a data folder to look it up in, got {name!r}")
    if name == EMBEDDED:
        return procedural_suite(seed, test=test)
    return read_dataset(name, test=test)


def is_path(name: str) -> bool:
    """Whether a name can only be a path, not one of the hub's (``name`` or ``owner/name``)."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
