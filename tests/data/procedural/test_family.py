"""A family's examples are distinct, and its options are what its type says."""

from random import Random

import pytest

from mamlfast.data.procedural import FAMILIES
from mamlfast.data.procedural.family import Family, Hidden

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def draw(family: Family, seed: int, count: int = 48):
    return family.examples("t", count, Random(seed))


@ALL
def test_inputs_are_distinct_and_there_are_enough(family):
    examples = draw(family, 0)
    assert len({e.input for e in examples}) == len(examples) == 48


@ALL
def test_options_are_those_of_the_type(family):
    for seed in range(4):
        examples = draw(family, seed)
        options = {e.options for e in examples}
        if family.type == "free-form":
            assert options == {()}
        elif family.type == "classification":
            assert len(options) == 1 and len(examples[0].options) >= 2
        else:
            assert all(2 <= len(e.options) == len(set(e.options)) <= 4 for e in examples)


@ALL
def test_one_seed_gives_one_task_and_another_seed_another(family):
    assert draw(family, 3) == draw(family, 3)
    assert draw(family, 3) != draw(family, 4)


@ALL
def test_a_classification_task_uses_more_than_one_of_its_labels(family):
    if family.type == "classification":
        assert all(len({e.output for e in draw(family, seed)}) > 1 for seed in range(8))


def test_a_family_that_runs_out_of_inputs_returns_what_it_has():
    def hide(rng: Random) -> Hidden:
        return Hidden(inputs=lambda rng: [rng.choice("ab")], answer=lambda items: items[0])

    assert len(draw(Family(hide=hide, type="free-form"), 0)) == 2


def test_the_wrong_options_of_a_multiple_choice_are_sisters_answers():
    def hide(rng: Random) -> Hidden:
        mark = rng.choice("pqr")
        return Hidden(inputs=lambda rng: [str(rng.randrange(99))], answer=lambda items: items[0] + mark)

    for e in draw(Family(hide=hide, type="multi-choice"), 0, 5):
        assert {option[-1] for option in e.options} <= set("pqr") and len(e.options) == 3
        assert {option[:-1] for option in e.options} == {e.input}
