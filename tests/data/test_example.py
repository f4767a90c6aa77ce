"""Examples and tasks refuse what would make them meaningless."""

import pytest

from mamlfast.data.example import Example, Task


def example(x: str, y: str = "yes", options: tuple[str, ...] = ("yes", "no")) -> Example:
    return Example(task="t", input=x, output=y, options=options)


def test_an_output_outside_its_options_is_refused():
    with pytest.raises(ValueError, match=r"one of the options \['yes', 'no'\], got 'maybe'"):
        example("x", "maybe")


def test_a_free_form_example_takes_any_output():
    assert example("x", "anything", ()).options == ()


def test_a_task_keeps_the_first_of_repeated_examples_in_order():
    task = Task(name="t", examples=(example("b"), example("a"), example("b")))
    assert [e.input for e in task.examples] == ["b", "a"]
    assert len(task) == 2


def test_a_task_without_examples_is_refused():
    with pytest.raises(ValueError, match="task 't' must have at least one example"):
        Task(name="t", examples=())
