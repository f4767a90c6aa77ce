"""A run's folder appears whole or not at all, and what is in it can be read."""

import json
from pathlib import Path

import pytest

from mamlfast.report import CONFIG_FILE, Metrics, OutputFolder, draw_curve, running_mean, table, write_config


def write_run(path: Path, text: str) -> None:
    with OutputFolder(path) as folder:
        write_config(folder.draft, {})
        (folder.draft / "model").write_text(text)


def test_a_folder_appears_with_its_parents_and_nothing_else(tmp_path):
    write_run(tmp_path / "a" / "b", "weights")
    assert (tmp_path / "a" / "b" / "model").read_text() == "weights"
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b", *(p.name for p in (tmp_path / "a" / "b").iterdir())]


def test_nothing_is_there_before_the_end(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        (folder.draft / "model").write_text("half")
        assert not folder.path.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_has_changed(tmp_path, error):
    write_run(tmp_path / "out", "old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error), OutputFolder(tmp_path / "out") as folder:
        (folder.draft / "model").write_text("half")
        raise error
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "out" / "model").read_text() == "old"


def test_an_earlier_run_is_replaced_whole(tmp_path):
    write_run(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").touch()
    write_run(tmp_path / "out", "new")
    assert (tmp_path / "out" / "model").read_text() == "new"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model", CONFIG_FILE}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files; choose another"):
        write_run(tmp_path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="must be a folder, .*out is a file"):
        write_run(tmp_path / "out", "new")
    with pytest.raises(ValueError, match="cannot be written"):
        write_run(tmp_path / "out" / "deeper", "new")


def test_a_place_that_takes_no_folder_is_refused_before_any_work():
    with pytest.raises(ValueError, match="output folder /proc/run cannot be written"), OutputFolder(Path("/proc/run")):
        pytest.fail("the body ran")


def test_a_disk_without_room_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs .* MB and its disk has .* MB free"), OutputFolder(tmp_path / "o") as o:
        o.require(10**18)
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_one_json_object_a_line_from_the_first_on(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.step(step=0, query_loss=2.5)
    assert json.loads(metrics.path.read_text()) == {"event": "step", "step": 0, "query_loss": 2.5}
    metrics.evaluation(task="t")
    assert [json.loads(line)["event"] for line in metrics.path.read_text().splitlines()] == ["step", "evaluation"]
    assert metrics.steps == [{"step": 0, "query_loss": 2.5}]


def test_the_curve_is_a_png(tmp_path):
    draw_curve(tmp_path / "curve.png", [{"step": i, "query_loss": 1.0, "support_loss": 2.0} for i in range(3)], "t")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_running_mean_looks_back_only():
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_the_table_has_a_line_a_row_in_even_columns():
    lines = table({"seen": ((0.5, 1.25), (1.0, 0.5)), "unseen": ((0.0, 10.0), (0.25, 2.0))}, ("before", "after"))
    assert "before" in lines and "after" in lines
    rows = lines.splitlines()
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    assert rows[2].split() == ["seen", "50.0%", "1.250", "100.0%", "0.500"]
