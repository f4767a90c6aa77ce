"""A name leads to the right source, or to a sentence that says why not."""

import json

import pytest

from mamlfast.data.source import is_path, read_suite


def test_the_embedded_suite_needs_no_data():
    suite = read_suite("procedural", None, seed=0, test=4)
    assert len(suite.unseen[0].test) == 4


def test_a_folder_without_a_setting_lists_its_settings(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mini.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="needs a setting; .* has mini"):
        read_suite(str(tmp_path), None, seed=0, test=4)


def test_a_missing_folder_is_named_without_asking_the_hub(tmp_path):
    with pytest.raises(ValueError, match=f"data folder {tmp_path}/none does not exist"):
        read_suite(f"{tmp_path}/none", None, seed=0, test=4)


def test_a_setting_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="setting 'mini' needs a data folder"):
        read_suite("procedural", "mini", seed=0, test=4)


@pytest.mark.parametrize(
    ("name", "answer"), [("gpt2", False), ("owner/name", False), ("../x", True), ("/x", True), ("a/b/c", True)]
)
def test_names_that_can_only_be_paths_are_told_from_hub_names(name, answer):
    assert is_path(name) == answer
