"""Families that rearrange, cut or extend a list of words."""

from collections.abc import Callable
from random import Random

from mamlfast.data.procedural.family import Hidden, Items, families, spaced
from mamlfast.data.procedural.lexicon import WORDS


def _on_lists(rng: Random, operation: Callable[[Items], Items], *, length: int = 3) -> Hidden:
    """Apply an operation to lists over sixteen words that the task favours."""
    words = rng.sample(WORDS, 16)
    return Hidden(
        inputs=lambda rng: rng.sample(words, length),
        answer=lambda items: spaced(*operation(items)),
    )


def reverse(rng: Random) -> Hidden:
    """The list backwards: ``cat sun red`` -> ``red sun cat``."""
    return _on_lists(rng, lambda items: items[::-1])


def rotate(rng: Random) -> Hidden:
    """The list turned by a hidden amount: ``cat sun red`` -> ``sun red cat``."""
    by = rng.choice((1, 2))
    return _on_lists(rng, lambda items: items[by:] + items[:by])


def pick(rng: Random) -> Hidden:
    """The word at a hidden place: ``cat sun red`` -> ``sun``."""
    place = rng.randrange(3)
    return _on_lists(rng, lambda items: items[place : place + 1])


def drop(rng: Random) -> Hidden:
    """The list without a hidden place: ``cat sun red`` -> ``cat red``."""
    place = rng.randrange(3)
    return _on_lists(rng, lambda items: items[:place] + items[place + 1 :])


def repeat(rng: Random) -> Hidden:
    """Every word twice or three times: ``cat sun`` -> ``cat cat sun sun``."""
    times = rng.choice((2, 3))
    return _on_lists(rng, lambda items: [item for item in items for _ in range(times)], length=2)


def swap(rng: Random) -> Hidden:
    """Two hidden places exchanged: ``cat sun red`` -> ``sun cat red``."""
    order = list(range(3))
    i, j = rng.sample(range(3), 2)
    order[i], order[j] = order[j], order[i]
    return _on_lists(rng, lambda items: [items[place] for place in order])


def append(rng: Random) -> Hidden:
    """The list and then a hidden word: ``cat sun`` -> ``cat sun moon``."""
    last = rng.choice(WORDS)
    return _on_lists(rng, lambda items: [*items, last], length=2)


def prepend(rng: Random) -> Hidden:
    """A hidden word and then the list: ``cat sun`` -> ``moon cat sun``."""
    first = rng.choice(WORDS)
    return _on_lists(rng, lambda items: [first, *items], length=2)


def between(rng: Random) -> Hidden:
    """A hidden word between two: ``cat sun`` -> ``cat moon sun``."""
    middle = rng.choice(WORDS)
    return _on_lists(rng, lambda items: [items[0], middle, items[1]], length=2)


def overwrite(rng: Random) -> Hidden:
    """A hidden place gets a hidden word: ``cat sun red`` -> ``cat moon red``."""
    place, word = rng.randrange(3), rng.choice(WORDS)
    return _on_lists(rng, lambda items: items[:place] + [word] + items[place + 1 :])


def palindrome(rng: Random) -> Hidden:
    """The list and back again, the last word once or twice: ``cat sun`` -> ``cat sun sun cat``."""
    skip = rng.choice((0, 1))
    return _on_lists(rng, lambda items: items + items[::-1][skip:], length=2)


def sort_words(rng: Random) -> Hidden:
    """Words in a hidden order: ``cat sun red`` -> ``sun red cat``."""
    order = rng.sample(WORDS, 8)
    return Hidden(
        inputs=lambda rng: rng.sample(order, 3),
        answer=lambda items: spaced(*sorted(items, key=order.index)),
    )


FAMILIES = (
    *families("free-form", reverse, sort_words),
    *families(
        "multi-choice", rotate, pick, drop, repeat, swap, append, prepend, between, overwrite, palindrome
    ),
)  # fmt: skip
