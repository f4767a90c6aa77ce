"""Families that translate: every item of the input stands for a hidden other one."""

from collections.abc import Sequence
from random import Random

from mamlfast.data.procedural.family import Hidden, families, spaced
from mamlfast.data.procedural.lexicon import DIGITS, LABELS, LETTERS, SYMBOLS, WORDS


def _code(rng: Random, sources: Sequence[str], targets: Sequence[str], *, size: int, length: int) -> Hidden:
    """Hide a mapping of ``size`` sources; an input is ``length`` of them."""
    code = dict(zip(rng.sample(sources, size), rng.sample(targets, size), strict=True))
    return Hidden(
        inputs=lambda rng: rng.choices(list(code), k=length),
        answer=lambda items: spaced(*(code[item] for item in items)),
    )


def word_code(rng: Random) -> Hidden:
    """Words for words: ``cat sun`` -> ``nail red``."""
    return _code(rng, WORDS, WORDS, size=8, length=2)


def word_language(rng: Random) -> Hidden:
    """Words of an invented language for words: ``cat sun`` -> ``dax wug``."""
    return _code(rng, WORDS, LABELS, size=8, length=2)


def letter_code(rng: Random) -> Hidden:
    """Letters for letters: ``b a c`` -> ``q x d``."""
    return _code(rng, LETTERS, LETTERS, size=6, length=3)


def symbol_words(rng: Random) -> Hidden:
    """Words for symbols: ``# %`` -> ``cat sun``."""
    return _code(rng, SYMBOLS, WORDS, size=8, length=2)


def word_symbols(rng: Random) -> Hidden:
    """Symbols for words: ``cat sun`` -> ``# %``."""
    return _code(rng, WORDS, SYMBOLS, size=8, length=2)


def digit_words(rng: Random) -> Hidden:
    """Words for digits: ``3 7`` -> ``cat sun``."""
    return _code(rng, DIGITS, WORDS, size=8, length=2)


def letter_symbols(rng: Random) -> Hidden:
    """Symbols for letters: ``b a c`` -> ``# % #``."""
    return _code(rng, LETTERS, SYMBOLS, size=6, length=3)


def letter_digits(rng: Random) -> Hidden:
    """Digits for letters: ``b a c`` -> ``4 1 4``."""
    return _code(rng, LETTERS, DIGITS, size=6, length=3)


FAMILIES = families(
    "free-form",
    word_code, word_language, letter_code, symbol_words, word_symbols, digit_words, letter_symbols, letter_digits,
)  # fmt: skip
