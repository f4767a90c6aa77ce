"""Families with a small grammar: word order, particles, agreement, brackets."""

from random import Random

from mamlfast.data.procedural.family import Hidden, Items, draw_labels, families, spaced
from mamlfast.data.procedural.lexicon import CATEGORIES, LABELS, NOUNS, SYMBOLS

_VERBS, _ANIMALS = CATEGORIES["verb"], CATEGORIES["animal"]


def _clause(rng: Random) -> Items:
    return [rng.choice(_ANIMALS), rng.choice(_VERBS)]


def word_order(rng: Random) -> Hidden:
    """Subject, verb and object in a hidden order: ``cat eat plum`` -> ``cat plum eat``."""
    order = rng.sample(range(3), 3)
    return Hidden(
        inputs=lambda rng: [*_clause(rng), rng.choice(NOUNS)],
        answer=lambda items: spaced(*(items[place] for place in order)),
    )


def negation(rng: Random) -> Hidden:
    """A hidden particle before or after the verb: ``cat eat`` -> ``cat dax eat``."""
    particle, place = rng.choice(LABELS), rng.choice((1, 2))
    return Hidden(inputs=_clause, answer=lambda items: spaced(*items[:place], particle, *items[place:]))


def question(rng: Random) -> Hidden:
    """The verb comes first and a hidden particle last: ``cat eat`` -> ``eat cat dax``."""
    particle = rng.choice(LABELS)
    return Hidden(inputs=_clause, answer=lambda items: spaced(items[1], items[0], particle))


def article(rng: Random) -> Hidden:
    """A hidden article for animals and another for other nouns: ``2 cat`` -> ``2 dax cat``."""
    living, other = draw_labels(rng, 2)
    return Hidden(
        inputs=lambda rng: [rng.choice("123"), rng.choice((rng.choice(_ANIMALS), rng.choice(NOUNS)))],
        answer=lambda items: spaced(items[0], living if items[1] in _ANIMALS else other, items[1]),
    )


def agreement(rng: Random) -> Hidden:
    """One or many decides the hidden ending of the verb: ``3 cat run`` -> ``run dax``."""
    one, many = draw_labels(rng, 2)
    return Hidden(
        inputs=lambda rng: [rng.choice("111234"), *_clause(rng)],
        answer=lambda items: spaced(items[2], one if items[0] == "1" else many),
    )


def tense(rng: Random) -> Hidden:
    """The hour decides the hidden marker, before noon or after: ``9 cat run`` -> ``cat run dax``."""
    morning, evening = draw_labels(rng, 2)
    return Hidden(
        inputs=lambda rng: [str(rng.randrange(24)), *_clause(rng)],
        answer=lambda items: spaced(*items[1:], morning if int(items[0]) < 12 else evening),
    )


def brackets(rng: Random) -> Hidden:
    """Does the hidden bracket close? ``# cat %`` -> ``dax``."""
    opening, closing = rng.sample(SYMBOLS, 2)
    labels = draw_labels(rng, 2)
    return Hidden(
        inputs=lambda rng: [opening, rng.choice(NOUNS), rng.choice((opening, closing))],
        answer=lambda items: labels[items[2] == closing],
        labels=labels,
    )


FAMILIES = (
    *families("multi-choice", word_order, negation, question, article, agreement, tense),
    *families("classification", brackets),
)
