"""What a run leaves behind: a folder that appears whole or not at all, its records, its curve and its table."""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

CONFIG_FILE, METRICS_FILE, CURVE_FILE = "train_config.json", "metrics.jsonl", "learning_curve.png"


class OutputFolder:
    """A folder written beside its final place and moved there at the end.

    ::

        with OutputFolder(path) as folder:      # fails here, before any work, where the place cannot be written
            ...                                 # write into folder.draft
        # moved to path; after an exception removed, and path is as it was

    An earlier run's folder at ``path`` is replaced; anything else there is refused.

    Raises:
        ValueError: ``path`` is a file or holds something else, or its place cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        # Created in the nearest folder that exists: on the same disk, and no parent is made in vain.
        self._place = next(parent for parent in self.path.parents if parent.exists())
        self.draft = self._place / f".{self.path.name}.partial-{uuid4().hex}"

    def __enter__(self) -> "OutputFolder":
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output must be a folder, {self.path} is a file; choose another with --output")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / CONFIG_FILE).is_file():
            raise ValueError(f"output folder {self.path} holds other files; choose another with --output")
        try:
            self.draft.mkdir()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return self

    def require(self, size: int) -> None:
        """Raise ValueError unless ``size`` bytes are free where the folder will be."""
        free = shutil.disk_usage(self._place).free
        if free < size:
            raise ValueError(
                f"output folder {self.path} needs {size / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free; "
                "make room or choose another with --output"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            shutil.rmtree(self.draft, ignore_errors=True)

    def _publish(self) -> None:
        earlier = self.draft.with_name(self.draft.name + "-earlier")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self.path.rename(earlier)
        try:
            self.draft.rename(self.path)
        except OSError:
            with suppress(FileNotFoundError):
                earlier.rename(self.path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"output folder {path} cannot be written ({error.strerror or error}); choose another with --output"
    )


class Metrics:
    """Records of a run, one JSON object a line, written as they come.

    Times are left out: two runs of one seed write the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        self.steps: list[dict[str, Any]] = []

    def step(self, **record: Any) -> None:
        """Record an outer step."""
        self.steps.append(record)
        self._write({"event": "step", **record})

    def evaluation(self, **record: Any) -> None:
        """Record a task's score."""
        self._write({"event": "evaluation", **record})

    def _write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a resolved configuration as JSON."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def draw_curve(path: Path, steps: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw query and support loss against the outer step, with their running means, as a PNG."""
    # Imported here, with a backend that needs no display: it takes a second, once, at the end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="outer step", ylabel="loss, nats a target token", title=title)
    numbers = [record["step"] for record in steps]
    for key, label, colour in (("query_loss", "query", "C0"), ("support_loss", "support, unadapted", "C1")):
        losses = [record[key] for record in steps]
        axes.plot(numbers, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(numbers, running_mean(losses, max(1, len(losses) // 20)), color=colour, label=label)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and up to ``width - 1`` before it."""
    return [fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def table(rows: Mapping[str, Sequence[tuple[float, float]]], columns: Sequence[str]) -> str:
    """Return lines of accuracy and loss, a pair for each column, under a heading."""
    width = max(map(len, rows))
    lines = [
        " " * width + "".join(f"{column:>20}" for column in columns),
        " " * width + f"{'accuracy':>12}{'loss':>8}" * len(columns),
    ]
    for name, pairs in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{accuracy:>12.1%}{loss:>8.3f}" for accuracy, loss in pairs))
    return "\n".join(lines)
