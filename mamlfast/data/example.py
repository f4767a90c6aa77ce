"""One line of a task, and a task: the two nouns of MetaICL's data.

An example is an input, the output wanted for it and, where the output is one of a few, the options. A
classification task repeats its full label list in every example; a multi-choice task gives each example
its own candidates; a free-form task has none.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """An input and its output, with the outputs it was chosen from (empty when free-form).

    Raises:
        ValueError: ``options`` are given and ``output`` is not one of them.
    """

    task: str
    input: str
    output: str
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.options and self.output not in self.options:
            raise ValueError(f"output must be one of the options {list(self.options)}, got {self.output!r}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A name and the examples it was met with, each of them once.

    Repeated examples are dropped: two draws without replacement then share no example.

    Raises:
        ValueError: there is no example.
    """

    name: str
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError(f"task {self.name!r} must have at least one example, got none")
        object.__setattr__(self, "examples", tuple(dict.fromkeys(self.examples)))

    def __len__(self) -> int:
        return len(self.examples)
