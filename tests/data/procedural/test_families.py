"""The families do what their descriptions say: each kind is checked by undoing or redoing its rule."""

from random import Random

import pytest

from mamlfast.data.example import Example
from mamlfast.data.procedural import FAMILIES
from mamlfast.data.procedural.lexicon import CATEGORY_OF, DAYS, LETTERS, MONTHS

SEEDS = pytest.mark.parametrize("seed", range(3))


def draw(name: str, seed: int) -> tuple[Example, ...]:
    return FAMILIES[name].examples(name, 40, Random(seed))


def pairs(name: str, seed: int) -> list[tuple[list[str], list[str]]]:
    return [(e.input.split(), e.output.split()) for e in draw(name, seed)]


@SEEDS
@pytest.mark.parametrize(
    "name",
    "word_code word_language letter_code symbol_words word_symbols digit_words letter_symbols letter_digits".split(),
)
def test_a_code_is_one_mapping_of_items(name, seed):
    code = {}
    for x, y in pairs(name, seed):
        assert all(code.setdefault(a, b) == b for a, b in zip(x, y, strict=True))
    assert len(set(code.values())) == len(code)


@SEEDS
@pytest.mark.parametrize("name", ["reverse", "rotate", "swap", "sort_words", "sort_numbers", "word_order"])
def test_a_rearrangement_keeps_every_item(name, seed):
    assert all(sorted(x) == sorted(y) for x, y in pairs(name, seed))


@SEEDS
@pytest.mark.parametrize(("name", "place"), [("append", 2), ("prepend", 0), ("between", 1)])
def test_an_insertion_puts_one_hidden_word_at_its_place(name, place, seed):
    words = set()
    for x, y in pairs(name, seed):
        words.add(y.pop(place))
        assert x == y
    assert len(words) == 1


@SEEDS
def test_a_caesar_cipher_shifts_every_letter_alike(seed):
    shifts = {
        (LETTERS.index(b) - LETTERS.index(a)) % 26 for x, y in pairs("caesar", seed) for a, b in zip(x, y, strict=True)
    }
    assert len(shifts) == 1 and 0 not in shifts


@SEEDS
def test_addition_adds_one_constant(seed):
    assert len({int(y[0]) - int(x[0]) for x, y in pairs("add_constant", seed)}) == 1


@SEEDS
def test_parity_labels_tell_even_from_odd(seed):
    by_label = {}
    for x, y in pairs("parity", seed):
        by_label.setdefault(y[0], set()).add(int(x[0]) % 2)
    assert sorted(map(sorted, by_label.values())) == [[0], [1]]


@SEEDS
def test_a_threshold_separates_the_numbers(seed):
    by_label = {}
    for x, y in pairs("threshold", seed):
        by_label.setdefault(y[0], []).append(int(x[0]))
    low, high = sorted(by_label.values())
    assert max(low) < min(high)


@SEEDS
def test_counting_counts_one_hidden_word(seed):
    rows = pairs("count_word", seed)
    words = {word for x, _ in rows for word in x}
    assert any(all(x.count(word) == int(y[0]) for x, y in rows) for word in words)


@SEEDS
@pytest.mark.parametrize("name", ["contains_word", "contains_symbol"])
def test_a_containment_label_follows_one_hidden_item(name, seed):
    rows = pairs(name, seed)
    items = {item for x, _ in rows for item in x}
    assert any(len({(item in x, y[0]) for x, y in rows}) == 2 for item in items)


@SEEDS
def test_word_classes_follow_the_category_of_the_first_word(seed):
    assert len({(CATEGORY_OF[x[0]], y[0]) for x, y in pairs("word_class", seed)}) == 2


@SEEDS
def test_agreement_follows_the_number_of_the_subject(seed):
    rows = pairs("agreement", seed)
    assert len({(x[0] == "1", y[1]) for x, y in rows}) == 2
    assert all(y[0] == x[2] for x, y in rows)


@SEEDS
@pytest.mark.parametrize(("name", "cycle"), [("weekday_shift", DAYS), ("month_shift", MONTHS)])
def test_a_calendar_shift_goes_round_its_cycle(name, cycle, seed):
    shifts = {(cycle.index(y[0]) - cycle.index(x[1])) % len(cycle) for x, y in pairs(name, seed)}
    assert len(shifts) == 1 and 0 not in shifts
