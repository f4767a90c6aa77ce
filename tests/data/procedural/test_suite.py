"""The embedded suite is large, follows from its seed, and keeps its unseen families to itself."""

import subprocess
import sys

import pytest

from mamlfast.data.procedural import FAMILIES, UNSEEN_FAMILIES, family_of, procedural_suite

SUITE = procedural_suite(0, tasks=3)


def test_there_are_dozens_of_families_of_every_type():
    assert len(FAMILIES) - len(UNSEEN_FAMILIES) >= 36
    for group in (UNSEEN_FAMILIES, FAMILIES.keys() - UNSEEN_FAMILIES):
        assert {FAMILIES[name].type for name in group} == {"classification", "multi-choice", "free-form"}


def test_unseen_families_exist_and_train_nothing():
    assert FAMILIES.keys() > UNSEEN_FAMILIES
    trained = {family_of(task.name) for task in SUITE.train}
    assert {family_of(task.name) for task in SUITE.unseen} == UNSEEN_FAMILIES
    assert trained == FAMILIES.keys() - UNSEEN_FAMILIES
    assert {family_of(task.name) for task in SUITE.seen} == trained


def test_no_seen_task_was_trained_on():
    assert not {task.name for task in SUITE.train} & {task.name for task in SUITE.seen}


def test_shots_and_test_examples_share_no_input():
    for task in SUITE.seen + SUITE.unseen:
        assert not {e.input for e in task.shots} & {e.input for e in task.test}


def test_examples_carry_the_name_of_their_task():
    assert all(e.task == task.name for task in SUITE.train for e in task.examples)


def test_another_seed_gives_other_tasks_of_the_same_names():
    other = procedural_suite(1, tasks=3)
    assert [task.name for task in other.train] == [task.name for task in SUITE.train]
    assert other != SUITE


def test_the_suite_is_the_same_in_another_process():
    code = (
        "from mamlfast.data.procedural import procedural_suite as s;"
        "import hashlib; print(hashlib.sha256(repr(s(0, tasks=3)).encode()).hexdigest())"
    )
    import hashlib

    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(repr(SUITE).encode()).hexdigest()


@pytest.mark.parametrize(("name", "family"), [("word_code:7", "word_code"), ("a:b:1", "a:b")])
def test_the_family_is_what_stands_before_the_last_colon(name, family):
    assert family_of(name) == family
