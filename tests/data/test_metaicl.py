"""A MetaICL-layout folder is read as it lies there, and a fault in it is named with its place."""

import json
from pathlib import Path

import pytest

from mamlfast.data.metaicl import read_examples, read_metaicl, read_setting

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "metaicl"


def row(task: str, number: int, **changes) -> dict:
    return {"task": task, "input": f"input {number}", "output": "yes", "options": ["yes", "no"]} | changes


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Setting ``mini``: two pools of 100 examples, one of them with a colon in its name, and a target."""
    (tmp_path / "config").mkdir()
    lists = {"train": ["unifiedqa:alpha", "beta"], "test": ["target"], "unseen_domain_test": ["target"]}
    (tmp_path / "config" / "mini.json").write_text(json.dumps(lists))
    (tmp_path / "config" / "other.json").write_text(json.dumps(lists | {"train": ["beta", "target"]}))
    for task in lists["train"]:
        write_rows(tmp_path / f"data/{task}/{task}_16384_100_train.jsonl", [row(task, i) for i in range(100)])
    write_rows(tmp_path / "data/target/target_16_100_train.jsonl", [row("target", i) for i in range(16)])
    write_rows(tmp_path / "data/target/target_16_100_test.jsonl", [row("target", i) for i in range(100, 150)])
    return tmp_path


def test_a_setting_gives_its_pools_and_targets(folder):
    suite = read_metaicl(folder, "mini", test=20)
    assert [task.name for task in suite.train] == ["unifiedqa:alpha", "beta"]
    assert [len(task) for task in suite.train] == [64, 64]
    (target,) = suite.unseen
    assert [e.input for e in target.shots] == [f"input {i}" for i in range(16)]
    assert [e.input for e in target.test] == [f"input {i}" for i in range(100, 120)]
    assert target.test[0].options == ("yes", "no")
    assert suite.unseen_domain == {"target"}


def test_seen_tasks_hold_examples_that_training_does_not(folder):
    suite = read_metaicl(folder, "mini", test=16)
    for task, seen in zip(suite.train, suite.seen, strict=True):
        assert not set(task.examples) & {*seen.shots, *seen.test}
        assert (len(seen.shots), len(seen.test)) == (16, 16)


def test_an_unknown_setting_lists_the_known_ones(folder):
    with pytest.raises(ValueError, match=r"unknown setting 'class'; .* has mini, other"):
        read_metaicl(folder, "class")


def test_a_folder_of_another_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold config/ and data/"):
        read_metaicl(tmp_path, "mini")


def test_a_missing_file_is_named(folder):
    missing = folder / "data/target/target_16_100_test.jsonl"
    missing.unlink()
    with pytest.raises(ValueError, match=f"task 'target' need the file {missing}, which is missing"):
        read_metaicl(folder, "mini")


def test_a_task_that_is_also_a_target_is_not_trained_on(folder):
    with pytest.warns(UserWarning, match=r"other lists \['target'\] for training and as targets"):
        suite = read_metaicl(folder, "other")
    assert [task.name for task in suite.train] == ["beta"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("", "got an empty line"),
        ("   ", "got an empty line"),
        ('{"input": "x", "outp', "expected a JSON object"),
        ("[1, 2]", "expected an object with input and output, got list"),
        ('{"input": "x"}', "output must be text, got None"),
        ('{"input": 3, "output": "y"}', "input must be text, got 3"),
        ('{"input": "x", "output": "y", "options": ["z"]}', "output must be one of the options"),
        ('{"input": "x", "output": "y", "options": ["y", 2]}', "options must be text, got 2"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, fault):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(row("t", 0))
    path.write_text(f"{good}\n{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=fault) as raised:
        read_examples(path, "t")
    assert str(raised.value).startswith(f"{path}, line 3: ")


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.touch()
    with pytest.raises(ValueError, match=f"{path} must hold one example a line"):
        read_examples(path, "t")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"input": "\xe9", "output": "y"}\n')
    with pytest.raises(ValueError, match=f"{path} must be UTF-8"):
        read_examples(path, "t")


def test_a_setting_that_is_no_object_of_lists_is_named(folder):
    (folder / "config/mini.json").write_text('["a"]')
    with pytest.raises(ValueError, match="mini.json must be a JSON object"):
        read_setting(folder, "mini")


def test_optional_fields_have_defaults_and_a_list_of_outputs_stands_for_its_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "x", "output": ["first", "second"]}\n')
    (example,) = read_examples(path, "name")
    assert (example.task, example.output, example.options) == ("name", "first", ())


def test_a_unicode_line_separator_within_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a\u2028b", "output": "y"}\n', encoding="utf-8")
    assert read_examples(path, "t")[0].input == "a\u2028b"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared MetaICL data are not here")
@pytest.mark.parametrize("setting", ["class_to_class", "hr_to_lr", "qa_to_qa"])
def test_real_settings_are_read_whole(setting):
    suite = read_metaicl(SHARED, setting, test=4)
    lists = read_setting(SHARED, setting)
    assert [task.name for task in suite.train] == lists["train"]
    assert {task.name for task in suite.unseen} == {*lists["test"], *lists["unseen_domain_test"]}
    assert all(len(task.shots) == 16 for task in suite.unseen)
