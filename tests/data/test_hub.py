"""A data set with MetaICL's columns becomes a suite, without the network."""

import pytest
from datasets import Dataset

from mamlfast.data.hub import read_dataset


def rows(task: str, count: int = 40) -> list[dict]:
    return [{"task": task, "input": f"{task} {i}", "output": "yes", "options": ["yes", "no"]} for i in range(count)]


def test_tasks_that_only_the_test_split_holds_are_unseen():
    splits = {
        "train": Dataset.from_list(rows("a") + rows("b")),
        "test": Dataset.from_list(rows("b") + rows("c")),
    }
    suite = read_dataset(splits, shots=10, test=5)
    assert [task.name for task in suite.train] == ["a", "b"]
    assert [task.name for task in suite.unseen] == ["c"]
    assert [e.input for e in suite.unseen[0].shots] == [f"c {i}" for i in range(10)]
    assert len(suite.unseen[0].test) == 5


def test_every_fifth_task_of_a_single_split_is_unseen():
    suite = read_dataset(Dataset.from_list([r for name in "gfedcba" for r in rows(name)]))
    assert [task.name for task in suite.unseen] == ["a", "f"]
    assert sorted(task.name for task in suite.train) == ["b", "c", "d", "e", "g"]


def test_free_form_rows_need_no_options_column():
    plain = [{k: v for k, v in r.items() if k != "options"} for name in "abcdef" for r in rows(name)]
    assert read_dataset(Dataset.from_list(plain)).train[0].examples[0].options == ()


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"\['output'\] missing"):
        read_dataset(Dataset.from_list([{"task": "a", "input": "x"}]))


def test_a_malformed_row_is_named_with_its_split_and_number():
    bad = rows("a", 3) + [{"task": "a", "input": "x", "output": "maybe", "options": ["yes", "no"]}]
    with pytest.raises(ValueError, match="split train, row 3: output must be one of the options"):
        read_dataset(Dataset.from_list(bad))


def test_a_data_set_without_a_training_split_is_refused():
    with pytest.raises(ValueError, match=r"a split named train, got \['test'\]"):
        read_dataset({"test": Dataset.from_list(rows("a"))})


def test_a_data_set_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="data set .* could not be loaded"):
        read_dataset(str(tmp_path / "nothing"))
