"""Examples as token ids: k exemplars, a target, and labels on the target's output only.

MetaICL's direct format. The pieces of a prompt are tokenised one by one and the ids joined::

    x_1  \\ny_1  \\n\\n\\nx_2  \\ny_2  ...  \\n\\n\\nx  \\ny        labels on the last piece, its newline included

An example takes at most ``max_example_length`` ids, for which its input keeps its beginning; a prompt takes
at most ``max_length``, for which it keeps its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mamlfast.data.example import Example

IGNORED = -100  # the label that transformers' losses leave out

# MetaICL keeps room for a beginning and an end token in every example, though it writes neither.
_RESERVED = 2


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """The strings in front of the pieces of a prompt.

    Attributes:
        first: before the input of the first example.
        later: before the input of every later example.
        later_empty: the same where that input is empty.
        output: before every output.
    """

    first: str
    later: str
    later_empty: str
    output: str


METAICL = PromptStyle(first="", later="\n\n\n", later_empty="\n\n", output="\n")

# Few tokens a prompt; a space before every word lets a word have one token wherever it stands.
COMPACT = PromptStyle(first=" ", later="\n ", later_empty="\n ", output=" = ")


class Tokens(NamedTuple):
    """A prompt: its ids, and the labels, equal to the id or ``IGNORED``. Both of one length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Prompter:
    """Turns examples into prompts.

    Attributes:
        encode: text to ids, with no special token added.
        style: the strings between the pieces.
        max_length: the most ids of a prompt.
        max_example_length: the most ids of one example.

    Raises:
        ValueError: no room for an output within ``max_example_length``, or an example exceeds ``max_length``.
    """

    encode: Callable[[str], Sequence[int]]
    style: PromptStyle = METAICL
    max_length: int = 1024
    max_example_length: int = 256

    def __post_init__(self) -> None:
        if not 4 <= self.max_example_length <= self.max_length:
            raise ValueError(
                f"max_example_length must lie between 4 and max_length = {self.max_length}, "
                f"got {self.max_example_length}"
            )

    def prompt(self, exemplars: Sequence[Example], target: Example) -> Tokens:
        """Return the exemplars followed by the target, labels on the target's output."""
        return self._prompts(exemplars, target, (target.output,))[0]

    def candidates(self, exemplars: Sequence[Example], target: Example) -> list[Tokens]:
        """Return one prompt for each of the target's options; they differ in their last piece only."""
        return self._prompts(exemplars, target, target.options)

    def _prompts(self, exemplars: Sequence[Example], target: Example, outputs: Sequence[str]) -> list[Tokens]:
        context: list[int] = []
        for number, example in enumerate(exemplars):
            x, (y,) = self._pieces(example, (example.output,), later=number > 0)
            context += x + y
        x, ys = self._pieces(target, outputs, later=bool(exemplars))
        return [self._join(context + x, y) for y in ys]

    def _pieces(self, example: Example, outputs: Sequence[str], *, later: bool) -> tuple[list[int], list[list[int]]]:
        prefix = self.style.first
        if later:
            prefix = self.style.later if example.input else self.style.later_empty
        room = self.max_example_length - _RESERVED
        ys = [list(self.encode(self.style.output + output))[:room] for output in outputs]
        x = list(self.encode(prefix + example.input))
        return x[: room - max(map(len, ys))], ys

    def _join(self, x: list[int], y: list[int]) -> Tokens:
        input_ids = (x + y)[-self.max_length :]
        return Tokens(input_ids, [IGNORED] * (len(input_ids) - len(y)) + y)
