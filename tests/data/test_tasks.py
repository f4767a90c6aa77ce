"""What is trained on and what judges it never mix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamlfast.data.example import Example, Task
from mamlfast.data.tasks import FewShot, Suite, group_by_task, hold_out


def numbered(name: str, count: int) -> Task:
    return Task(name=name, examples=tuple(Example(task=name, input=str(i), output="y") for i in range(count)))


def few_shot(name: str) -> FewShot:
    examples = numbered(name, 2).examples
    return FewShot(name=name, shots=examples[:1], test=examples[1:])


@given(size=st.integers(4, 60), shots=st.integers(1, 20), test=st.integers(1, 20))
def test_holding_out_splits_a_task_without_loss_or_overlap(size, shots, test):
    task = numbered("t", size)
    kept, held = hold_out(task, shots=shots, test=test)
    assert kept.examples + held.shots + held.test == task.examples
    assert len(held.shots) <= shots and len(held.test) <= test
    assert 2 * len(kept) >= size


def test_holding_out_gives_what_was_asked_of_a_large_task():
    kept, held = hold_out(numbered("t", 100), shots=16, test=8)
    assert (len(kept), len(held.shots), len(held.test)) == (76, 16, 8)


def test_a_task_too_small_to_hold_anything_out_is_named():
    with pytest.raises(ValueError, match="task 'small' must have at least 4 examples"):
        hold_out(numbered("small", 3), shots=1, test=1)


def test_a_suite_refuses_a_task_both_trained_on_and_unseen():
    with pytest.raises(ValueError, match=r"disjoint, both hold \['a'\]"):
        Suite(train=(numbered("a", 4), numbered("b", 4)), seen=(few_shot("b"),), unseen=(few_shot("a"),))


@pytest.mark.parametrize("empty", ["train", "seen", "unseen"])
def test_a_suite_refuses_an_empty_group(empty):
    groups = {"train": (numbered("a", 4),), "seen": (few_shot("a"),), "unseen": (few_shot("b"),), empty: ()}
    with pytest.raises(ValueError, match=f"must have {empty} tasks"):
        Suite(**groups)


@pytest.mark.parametrize("empty", ["shots", "test"])
def test_a_few_shot_task_needs_both_shots_and_test_examples(empty):
    parts = {"shots": numbered("t", 1).examples, "test": numbered("t", 1).examples, empty: ()}
    with pytest.raises(ValueError, match="task 't' must have shots and test examples"):
        FewShot(name="t", **parts)


def test_grouping_keeps_the_order_of_tasks_and_of_their_examples():
    rows = [Example(task=t, input=str(i), output="y") for i, t in enumerate("bab")]
    groups = group_by_task(rows)
    assert list(groups) == ["b", "a"]
    assert [e.input for e in groups["b"]] == ["0", "2"]
