"""Families about letters: strings, spelling and ciphers. Letters stand apart, so each is a token."""

from collections.abc import Callable
from random import Random

from mamlfast.data.procedural.family import Hidden, Items, families, spaced
from mamlfast.data.procedural.lexicon import LETTERS, WORDS


def _on_letters(operation: Callable[[Items], Items], *, length: int = 3) -> Hidden:
    """Apply an operation to strings of letters."""
    return Hidden(
        inputs=lambda rng: rng.choices(LETTERS, k=length),
        answer=lambda letters: spaced(*operation(letters)),
    )


def _on_words(operation: Callable[[str], str]) -> Hidden:
    """Apply an operation to single words."""
    return Hidden(inputs=lambda rng: [rng.choice(WORDS)], answer=lambda items: operation(items[0]))


def _shifted(letter: str, by: int) -> str:
    return LETTERS[(LETTERS.index(letter) + by) % 26]


def caesar(rng: Random) -> Hidden:
    """Every letter moved along the alphabet by a hidden amount: ``a z`` -> ``c b``."""
    by = rng.choice((-3, -2, -1, 1, 2, 3))
    return _on_letters(lambda letters: [_shifted(letter, by) for letter in letters], length=2)


def growing_cipher(rng: Random) -> Hidden:
    """A shift that grows with the place: ``a a a`` -> ``b c d``."""
    start = rng.choice((0, 1, 2))
    return _on_letters(lambda letters: [_shifted(letter, start + i) for i, letter in enumerate(letters)])


def mirror_alphabet(rng: Random) -> Hidden:
    """The alphabet backwards, then a hidden shift: ``a b`` -> ``z y``."""
    by = rng.choice((0, 1, 2))
    return _on_letters(lambda letters: [LETTERS[(25 - LETTERS.index(letter) + by) % 26] for letter in letters])


def letter_reverse(rng: Random) -> Hidden:
    """A string backwards, a hidden letter in front: ``a b c`` -> ``q c b a``."""
    mark = rng.choice(LETTERS)
    return _on_letters(lambda letters: [mark, *letters[::-1]])


def first_letters(rng: Random) -> Hidden:
    """The letter of each word at a hidden place: ``cat sun`` -> ``c s``."""
    place = rng.choice((0, 1, -1))
    return Hidden(
        inputs=lambda rng: rng.sample(WORDS, 2),
        answer=lambda words: spaced(*(word[place] for word in words)),
    )


def spell(rng: Random) -> Hidden:
    """A word letter by letter, with a hidden mark after it: ``cat`` -> ``c a t x``."""
    mark = rng.choice(LETTERS)
    return _on_words(lambda word: spaced(*word, mark))


def suffix(rng: Random) -> Hidden:
    """A hidden ending for every word: ``cat`` -> ``cat ko``."""
    ending = rng.choice(LETTERS) + rng.choice("aeiou")
    return _on_words(lambda word: spaced(word, ending))


def letter_wrap(rng: Random) -> Hidden:
    """A hidden letter on either side: ``a b`` -> ``q a b k``."""
    left, right = rng.sample(LETTERS, 2)
    return _on_letters(lambda letters: [left, *letters, right], length=2)


FAMILIES = families(
    "multi-choice",
    caesar, growing_cipher, mirror_alphabet, letter_reverse, first_letters, spell, suffix, letter_wrap,
)  # fmt: skip
