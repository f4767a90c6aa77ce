"""Families about numbers: arithmetic, comparison, counting, sorting and sequences."""

from random import Random

from mamlfast.data.procedural.family import Hidden, Items, draw_labels, families, spaced
from mamlfast.data.procedural.lexicon import WORDS


def _number(below: int, length: int = 1):
    """Draw ``length`` numbers."""
    return lambda rng: [str(rng.randrange(below)) for _ in range(length)]


def add_constant(rng: Random) -> Hidden:
    """A hidden number is added: ``12`` -> ``17``."""
    constant = rng.randint(1, 9)
    return Hidden(inputs=_number(90), answer=lambda items: str(int(items[0]) + constant))


def combine(rng: Random) -> Hidden:
    """A hidden operation on two numbers: ``7 4`` -> ``11``, or 3, 7 or 4."""
    operation = rng.choice((lambda a, b: a + b, lambda a, b: abs(a - b), max, min))
    return Hidden(inputs=_number(10, 2), answer=lambda items: str(operation(*map(int, items))))


def last_digit(rng: Random) -> Hidden:
    """The last digit of a hidden multiple and a hidden number more: ``7`` -> ``5`` for 3 times and 4."""
    factor, constant = rng.choice((1, 2, 3, 4)), rng.randrange(10)
    return Hidden(inputs=_number(100), answer=lambda items: str((int(items[0]) * factor + constant) % 10))


def next_number(rng: Random) -> Hidden:
    """The next of numbers a hidden step apart: ``3 5 7`` -> ``9``."""
    step = rng.randint(1, 5)

    def inputs(rng: Random) -> Items:
        start = rng.randrange(80)
        return [str(start + i * step) for i in range(3)]

    return Hidden(inputs=inputs, answer=lambda items: str(int(items[-1]) + step))


def parity(rng: Random) -> Hidden:
    """Even or odd, under hidden labels: ``14`` -> ``dax``."""
    labels = draw_labels(rng, 2)
    return Hidden(inputs=_number(100), answer=lambda items: labels[int(items[0]) % 2], labels=labels)


def threshold(rng: Random) -> Hidden:
    """Below or above a hidden number: ``14`` -> ``dax``."""
    labels, limit = draw_labels(rng, 2), rng.randint(30, 70)
    return Hidden(inputs=_number(100), answer=lambda items: labels[int(items[0]) >= limit], labels=labels)


def tens(rng: Random) -> Hidden:
    """A hidden label for small, middling and large numbers: ``14`` -> ``dax``."""
    labels = draw_labels(rng, 3)
    return Hidden(inputs=_number(90), answer=lambda items: labels[int(items[0]) // 30], labels=labels)


def compare(rng: Random) -> Hidden:
    """Is the first number the larger? ``7 4`` -> ``dax``."""
    labels = draw_labels(rng, 2)
    return Hidden(inputs=_number(20, 2), answer=lambda items: labels[int(items[0]) > int(items[1])], labels=labels)


def extreme(rng: Random) -> Hidden:
    """The largest or the smallest, whichever is hidden: ``7 4 9`` -> ``9``."""
    choose = rng.choice((max, min))
    return Hidden(inputs=_number(10, 3), answer=lambda items: choose(items, key=int))


def sort_numbers(rng: Random) -> Hidden:
    """Rising or falling, whichever is hidden: ``7 4 9`` -> ``4 7 9``."""
    falling = rng.random() < 0.5
    return Hidden(inputs=_number(10, 3), answer=lambda items: spaced(*sorted(items, reverse=falling)))


def count_word(rng: Random) -> Hidden:
    """How often a hidden word occurs: ``cat sun cat`` -> ``2``."""
    wanted, *others = rng.sample(WORDS, 8)
    return Hidden(
        inputs=lambda rng: [wanted if rng.random() < 0.4 else rng.choice(others) for _ in range(3)],
        answer=lambda items: str(items.count(wanted)),
        labels=("0", "1", "2", "3"),
    )


def count_names(rng: Random) -> Hidden:
    """How many words there are, under hidden names for one to four: ``cat sun`` -> ``wug``."""
    labels = draw_labels(rng, 4)
    return Hidden(
        inputs=lambda rng: rng.choices(WORDS, k=rng.randint(1, 4)),
        answer=lambda items: labels[len(items) - 1],
        labels=labels,
    )


FAMILIES = (
    *families("multi-choice", add_constant, combine, last_digit, next_number, extreme, sort_numbers),
    *families("classification", parity, threshold, tens, compare, count_word, count_names),
)
