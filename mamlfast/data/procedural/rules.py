"""Families that classify by a hidden rule, under labels that mean nothing."""

from collections.abc import Callable, Sequence
from random import Random

from mamlfast.data.procedural.family import Hidden, Items, draw_labels, families
from mamlfast.data.procedural.lexicon import CATEGORIES, CATEGORY_OF, NOUNS, SYMBOLS, WORDS


def _classes(rng: Random, count: int, inputs: Callable[[Random], Items], rule: Callable[[Items], int]) -> Hidden:
    """Label an input with the one of ``count`` hidden labels whose number the rule returns."""
    labels = draw_labels(rng, count)
    return Hidden(inputs=inputs, answer=lambda items: labels[rule(items)], labels=labels)


def _with_or_without(wanted: str, others: Sequence[str]) -> Callable[[Random], Items]:
    """Draw three words; half of the time a wanted one is among them, anywhere."""

    def inputs(rng: Random) -> Items:
        words: Items = rng.sample(others, 3)
        if rng.random() < 0.5:
            words[rng.randrange(3)] = wanted
        return words

    return inputs


def contains_word(rng: Random) -> Hidden:
    """Does a hidden word occur? ``cat sun red`` -> ``dax``."""
    wanted, *others = rng.sample(WORDS, 9)
    return _classes(rng, 2, _with_or_without(wanted, others), lambda items: wanted in items)


def contains_symbol(rng: Random) -> Hidden:
    """Does a hidden symbol occur? ``# % @`` -> ``dax``."""
    wanted, *others = rng.sample(SYMBOLS, 8)
    return _classes(rng, 2, _with_or_without(wanted, others), lambda items: wanted in items)


def key_word(rng: Random) -> Hidden:
    """One of three hidden words decides, among words that do not: ``cat sun`` -> ``dax``."""
    words = rng.sample(WORDS, 11)
    keys, others = words[:3], words[3:]

    def inputs(rng: Random) -> Items:
        items = [rng.choice(keys), rng.choice(others)]
        rng.shuffle(items)
        return items

    return _classes(rng, 3, inputs, lambda items: next(keys.index(item) for item in items if item in keys))


def first_word(rng: Random) -> Hidden:
    """The first word decides, the second does not: ``cat sun`` -> ``dax``."""
    words, others = rng.sample(WORDS, 6), rng.sample(WORDS, 12)
    return _classes(
        rng, 2, lambda rng: [rng.choice(words), rng.choice(others)], lambda items: words.index(items[0]) % 2
    )


def last_word(rng: Random) -> Hidden:
    """The last word decides, those before do not: ``cat sun red`` -> ``dax``."""
    words, others = rng.sample(WORDS, 4), rng.sample(WORDS, 12)
    return _classes(
        rng,
        2,
        lambda rng: [*rng.sample(others, 2), rng.choice(words)],
        lambda items: words.index(items[-1]) % 2,
    )


def word_class(rng: Random) -> Hidden:
    """Two hidden categories, of which the first word shows one: ``cat sun`` -> ``dax``."""
    first, second = rng.sample(sorted(CATEGORIES), 2)
    words = (*CATEGORIES[first], *CATEGORIES[second])
    return _classes(rng, 2, lambda rng: rng.choices(words, k=2), lambda items: CATEGORY_OF[items[0]] == second)


def arbitrary_class(rng: Random) -> Hidden:
    """Two hidden groups of words, an input is of one: ``cat sun`` -> ``dax``."""
    words = rng.sample(WORDS, 12)
    groups = (words[:6], words[6:])
    return _classes(rng, 2, lambda rng: rng.sample(rng.choice(groups), 2), lambda items: items[0] in groups[1])


def arbitrary_topics(rng: Random) -> Hidden:
    """Three hidden groups of nouns, an input is of one: ``cat sun`` -> ``dax``."""
    words = rng.sample(NOUNS, 15)
    return _classes(
        rng,
        3,
        lambda rng: rng.sample(rng.choice((words[:5], words[5:10], words[10:])), 2),
        lambda items: words.index(items[0]) // 5,
    )


def same_or_different(rng: Random) -> Hidden:
    """Are the two words the same? ``cat cat`` -> ``dax``."""
    words = rng.sample(WORDS, 32)

    def inputs(rng: Random) -> Items:
        word = rng.choice(words)
        return [word, word if rng.random() < 0.5 else rng.choice(words)]

    return _classes(rng, 2, inputs, lambda items: items[0] == items[1])


def same_category(rng: Random) -> Hidden:
    """Are the two words of one category? ``cat dog`` -> ``dax``."""

    def inputs(rng: Random) -> Items:
        word = rng.choice(WORDS)
        return [word, rng.choice(CATEGORIES[CATEGORY_OF[word]] if rng.random() < 0.5 else WORDS)]

    return _classes(rng, 2, inputs, lambda items: CATEGORY_OF[items[0]] == CATEGORY_OF[items[1]])


def list_length(rng: Random) -> Hidden:
    """Short or long, with a hidden limit: ``cat sun red`` -> ``dax``."""
    words, limit = rng.sample(WORDS, 8), rng.choice((2, 3))
    return _classes(rng, 2, lambda rng: rng.choices(words, k=rng.randint(1, 4)), lambda items: len(items) >= limit)


def word_position(rng: Random) -> Hidden:
    """Where is the hidden word? ``cat sun red`` -> ``dax``."""
    wanted, *others = rng.sample(WORDS, 9)

    def inputs(rng: Random) -> Items:
        words = rng.sample(others, 3)
        words[rng.randrange(3)] = wanted
        return words

    return _classes(rng, 3, inputs, lambda items: items.index(wanted))


FAMILIES = families(
    "classification",
    contains_word, contains_symbol, key_word, first_word, last_word, word_class, arbitrary_class, arbitrary_topics,
    same_or_different, same_category, list_length, word_position,
)  # fmt: skip
