"""What of the GPU's benchmarks needs no GPU: order and budgets, the record, the gate, arithmetic, and the oracles."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mamlfast_kernels import attention as kernels  # noqa: E402
from mamlfast_kernels.attention_sizes import Tile, Tiles  # noqa: E402

from bench import gpu, gpu_attention, gpu_attention_time, gpu_compile, gpu_rows, gpu_tune  # noqa: E402  (Triton has to be there)
from bench.gpu_attention import CHECKED, Shape, units_done  # noqa: E402
from bench.gpu_gate import judge  # noqa: E402
from bench.gpu_run import Budget, Gate, OutOfTime, Record, Refused, Step, run  # noqa: E402
from bench.gpu_timing import Timing, race  # noqa: E402

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


class _Time:
    """Seconds that pass only where a call says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class _Clock:
    """Runs a call and claims that it took a time by its name."""

    def __init__(self, time, seconds):
        self.time, self.takes, self.order = time, seconds, []

    def seconds(self, call):
        name = call()
        self.order.append(name)
        self.time.now += self.takes[name]
        return self.takes[name]


def _step(name, rows, seconds=10.0):
    return Step(name=name, seconds=seconds, rows=rows)


def _run(steps, path, total=None):
    record = Record(path, {"date": "today"})
    run(steps, record, total or Budget(seconds=100), say=lambda _: None)
    return json.loads(path.read_text())["steps"]


def test_every_row_is_in_the_record_before_the_next_is_measured(tmp_path):
    path = tmp_path / "deep" / "record.json"
    seen = []

    def rows(_):
        yield {"a": 1}
        seen.append(json.loads(path.read_text()))
        yield {"a": 2}

    (step,) = _run([_step("one", rows)], path)
    assert seen[0]["steps"][0] == {"name": "one", "status": "cut off", "rows": [{"a": 1}]}
    assert seen[0]["date"] == "today"
    assert (step["status"], step["rows"]) == ("done", [{"a": 1}, {"a": 2}])
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_a_step_that_overruns_is_cut_off_keeps_its_rows_and_the_next_runs(tmp_path):
    def slow(_):
        yield {"kept": True}
        time.sleep(30)

    began = time.monotonic()
    steps = _run([_step("slow", slow, 0.2), _step("next", lambda _: iter([{"b": 1}]))], tmp_path / "r.json")
    assert time.monotonic() - began < 20
    assert [(s["status"], s["rows"]) for s in steps] == [("cut off", [{"kept": True}]), ("done", [{"b": 1}])]


def test_no_handler_of_errors_keeps_a_step_beyond_its_time(tmp_path):
    def stubborn(_):
        try:
            time.sleep(30)
        except Exception:
            yield {"kept": False}

    (step,) = _run([_step("stubborn", stubborn, 0.2)], tmp_path / "r.json")
    assert (step["status"], step["rows"]) == ("cut off", [])


def test_what_there_is_no_time_for_is_skipped(tmp_path):
    clock = _Time()

    def spends(budget):
        clock.now += 8
        yield {"had": budget.seconds, "left": budget.left()}

    steps = [_step(name, spends, 9.0) for name in "abc"]
    found = _run(steps, tmp_path / "r.json", Budget(seconds=15, clock=clock))
    assert [(s["status"], s["rows"]) for s in found] == [
        ("done", [{"had": 9.0, "left": 1.0}]),
        ("done", [{"had": 7.0, "left": 0.0}]),
        ("skipped", []),
    ]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [(RuntimeError("broken"), "failed", "RuntimeError: broken"), (Refused("wrong"), "refused", "wrong")],
)
def test_a_step_that_fails_says_why_and_does_not_stop_the_others(error, status, told, tmp_path):
    def fails(_):
        yield {"a": 1}
        raise error

    record = Record(tmp_path / "r.json", {})
    run([_step("bad", fails), _step("good", lambda _: iter([]))], record, Budget(seconds=100), say=lambda _: None)
    bad, good = json.loads(record.path.read_text())["steps"]
    assert (bad["status"], bad["error"], bad["rows"]) == (status, told, [{"a": 1}])
    assert good["status"] == "done" and not record.clean


def test_an_interrupted_run_leaves_its_record(tmp_path):
    def interrupted(_):
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run([_step("x", interrupted)], tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["steps"][0]["rows"] == [{"a": 1}]


def test_only_what_was_found_right_may_be_timed():
    gate = Gate()
    with pytest.raises(Refused, match="x was not checked"):
        gate.require("x")
    gate.add("x", True)
    gate.require("x")
    gate.add("x", False)
    gate.add("x", True)  # a later check does not make it good
    with pytest.raises(Refused, match="x is wrong"):
        gate.require("x")
    assert not gate.passed


def test_contenders_take_turns_until_there_are_thirty_and_a_second_of_each():
    now = _Time()
    clock = _Clock(now, {"a": 0.1, "b": 0.01})
    times = race({name: lambda name=name: name for name in "ab"}, clock, Budget(seconds=60, clock=now))
    assert clock.order == list("ab") * (10 + 30)
    assert times["a"] == Timing(ms=pytest.approx(100), p10=pytest.approx(100), p90=pytest.approx(100), repetitions=30)
    clock.order.clear()
    race({"b": lambda: "b"}, clock, Budget(seconds=60, clock=now))
    assert len(clock.order) == pytest.approx(10 + 100, abs=1)


def test_a_short_budget_leaves_three_repetitions_and_no_more():
    now = _Time()
    times = race({"a": lambda: "a"}, _Clock(now, {"a": 2.0}), Budget(seconds=1, clock=now))
    assert times["a"].repetitions == 3 and now.now == 8.0


def test_the_spread_is_that_of_the_middle_eighty_percent():
    timing = Timing.of([s / 1000 for s in (9, 1, 2, 3, 4, 5, 6, 7, 8, 10, 100)])
    assert (timing.ms, timing.p10, timing.p90) == pytest.approx((6.0, 2.0, 10.0))


def _judged(ours, theirs):
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    got, eager = (exact.float() * (1 + error) for error in (ours, theirs))
    return judge({"y": got}, {"y": eager}, {"y": exact})


def test_twice_the_error_of_pytorch_passes_and_more_does_not():
    assert _judged(1.9e-3, 1e-3).passed
    verdict = _judged(2.1e-3, 1e-3)
    assert not verdict.passed and verdict.worst == "y" and verdict.share == pytest.approx(1.05, rel=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_never_passes_whatever_pytorch_makes_of_it(bad):
    assert not _judged(bad, 1e-3).passed
    assert not _judged(0.0, bad).passed


def test_a_mean_error_counts_where_the_largest_is_hidden():
    exact = torch.ones(100, dtype=torch.float64)
    eager = exact.float()
    eager[0] += 1e-2
    assert judge({"y": exact.float()}, {"y": eager}, {"y": exact}).passed
    assert not judge({"y": exact.float() + 5e-3}, {"y": eager}, {"y": exact}).passed


def test_nothing_and_other_shapes_are_refused():
    y = {"y": torch.ones(2)}
    with pytest.raises(ValueError, match="nothing to compare"):
        judge({}, y, y)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(1,\)"):
        judge({"y": torch.ones(1)}, y, y)


@needs_no_gpu
@pytest.mark.parametrize("name", CHECKED)
def test_each_configuration_of_the_check_is_a_case_that_the_kernels_pass(name):
    """In the interpreter and in small: that the two sides are asked the same, and all twelve results compared."""
    shape = replace(CHECKED[name], B=1, T=18, D=16, dtype=torch.float32)
    shape = replace(shape, H=2, G=1) if shape.G else replace(shape, H=1)
    gate = Gate()
    problem = shape.problem("cpu")
    verdict = gpu_attention.verdict_of(problem, shape.spec("cpu"))
    assert verdict.passed, verdict
    assert len(verdict.errors) == 8 + 4
    gate.add(name, verdict.passed)


@needs_no_gpu
def test_a_kernel_that_drops_a_term_does_not_pass(monkeypatch):
    right = kernels.attention_fwd_jvp
    monkeypatch.setattr(kernels, "attention_fwd_jvp", lambda *xs, **o: (*right(*xs, **o)[:3], right(*xs, **o)[3] * 0))
    monkeypatch.setitem(CHECKED, "small", Shape(B=1, T=18, H=1, D=16))
    gate = Gate()
    (row,) = gpu_attention.check(gate, ["small"], (torch.float32,), "cpu")
    assert not row["passed"] and row["worst"].endswith("_bar_dot") and not gate.passed


def test_a_kernel_that_cannot_be_launched_does_not_pass_and_does_not_stop_the_check(monkeypatch):
    def out_of_resources(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gpu_attention, "verdict_of", out_of_resources)
    gate = Gate()
    rows = list(gpu_attention.check(gate, ["causal", "D=80"], (torch.float32,), "cpu"))
    assert [row["error"] for row in rows] == ["RuntimeError: out of resource: shared memory"] * 2
    with pytest.raises(Refused, match="attention causal float32 is wrong"):
        gate.require("attention causal float32")


SHARED, HALVES = ((Tile(queries=16, keys=16),) * n for n in (1, 2))


@pytest.mark.parametrize(
    ("name", "whole", "halved"), [("fwd", 2, 2), ("bwd", 7, 8), ("fwd_jvp", 6, 6), ("bwd_jvp", 21, 24)]
)
def test_units_are_products_of_all_sweeps(name, whole, halved):
    tile = Tile(queries=16, keys=16)
    for side, units in ((SHARED, whole), (HALVES, halved)):
        assert units_done(name, Tiles(fwd=tile, bwd_q=tile, bwd_kv=side)) == units


def test_operations_are_those_of_the_visible_pairs():
    shape = Shape(B=32, T=8192)
    assert shape.flop(1) == pytest.approx(1.65e12, rel=1e-2)
    assert replace(shape, options={}).flop(1) == pytest.approx(2 * shape.flop(1), rel=1e-3)
    with pytest.raises(ValueError, match="causal and full masks only"):
        replace(shape, options={"window": (3, None)}).flop(1)


@needs_no_gpu
def test_a_shape_is_timed_with_ratios_arithmetic_and_baselines(monkeypatch):
    monkeypatch.setattr(gpu_attention_time, "peak_mb", lambda call: 1.5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    now = _Time()

    class Clock:
        def seconds(self, call):
            call()
            now.now += 1.0
            return 1.0

    gate, shape = Gate(), Shape(B=1, T=18, H=1, D=16, dtype=torch.float32)
    with pytest.raises(Refused):
        list(gpu_attention_time.time_shape(gate, "causal", shape, Clock(), Budget(seconds=1, clock=now), "cpu"))
    gate.add("attention causal float32", True)
    rows = list(gpu_attention_time.time_shape(gate, "causal", shape, Clock(), Budget(seconds=0, clock=now), "cpu"))
    assert rows[0]["passed"] and rows[0]["gate"].startswith("attention at full size: B=1 T=18")
    assert [row["contender"] for row in rows[1:]] == [
        "hvp: fwd_jvp + bwd_jvp",
        "first order: fwd + bwd",
        "double backward: fwd + bwd + fwd_jvp + bwd_jvp",
        "fwd_jvp",
        "bwd_jvp",
        "SDPA flash: first order",
        "SDPA math: double backward",
    ]
    assert rows[1]["units_done"] == 6 + 24 and rows[1]["units_least"] == 21
    assert rows[1]["tflop_per_s_least"] == pytest.approx(21 * 2 * 16 * (18 * 19 / 2) / 1e12)
    assert all(row["x first order"] == row["x SDPA flash"] == 1.0 and row["peak_mb"] == 1.5 for row in rows[1:])
    json.dumps(rows)


def test_the_baseline_is_the_double_backward_that_the_kernels_compute():
    shape = Shape(B=1, T=7, H=2, D=16, dtype=torch.float64)
    problem, spec = shape.problem("cpu"), shape.spec("cpu")
    problem = replace(problem.to(torch.float64), y_bar_dot=torch.zeros_like(problem.y_bar))
    got = gpu_attention_time.sdpa_double_backward(problem, spec)
    want = gpu_attention_time.results(lambda *xs: gpu_attention_time.attention_reference(*xs, spec=spec), problem)
    for name, x in zip("qkv", got, strict=True):
        torch.testing.assert_close(x, want[f"{name}_bar_dot"], rtol=1e-12, atol=1e-12)


def test_double_backward_that_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    shape = Shape(B=1, T=16, H=1, D=16)
    row = gpu_attention_time._math(shape.problem("cpu"), None, replace(shape, T=1 << 17), None, None, {})
    assert row["refused"].startswith("needs about")


@needs_no_gpu
@pytest.mark.parametrize("op", gpu_rows.OPS, ids=lambda op: op.name)
def test_each_operation_is_compared_with_its_own_formula(op):
    gate = Gate()
    row = gpu_rows.check(gate, op, 3, 17, torch.float32, "cpu")
    assert row["passed"], row
    assert set(row["errors"]) >= {"y", "y_dot", "y alone", f"{op.names[0]}_bar_dot", f"{op.names[-1]}_bar alone"}
    wrong = replace(op, formula=lambda *xs: 1.01 * op.formula(*xs))
    assert not gpu_rows.check(gate, wrong, 3, 17, torch.float32, "cpu")["passed"]


def test_a_byte_is_compared_with_one_of_the_copy():
    timing = Timing(ms=3.0, p10=3.0, p90=3.0, repetitions=3)
    row = gpu_rows.row_of("op", "bwd", timing, nbytes=6_000_000, copy_ms=0.5, copy_bytes=2_000_000)
    assert row["x copy"] == pytest.approx(2.0) and row["gb_per_s"] == pytest.approx(2.0)


def _tile(*numbers):
    queries, keys, warps, stages = numbers
    return Tile(queries=queries, keys=keys, warps=warps, stages=stages)


def test_the_best_tiles_make_a_row_of_the_table():
    best = {
        "fwd": (_tile(128, 64, 8, 3), 1.0),
        "bwd_q": (_tile(64, 32, 4, 2), 1.0),
        "bwd_kv": (_tile(32, 128, 8, 2), 5.0),
        "bwd_k": (_tile(16, 64, 8, 2), 2.0),
        "bwd_v": (_tile(32, 64, 8, 2), 2.0),
    }
    halves = "(90, 64): _tiles((128, 64, 8, 3), (64, 32, 4), (16, 64, 8), (32, 64, 8)),"
    assert gpu_tune.table_row(90, 64, best) == halves
    del best["bwd_v"]
    assert gpu_tune.table_row(90, 64, best) == "(90, 64): _tiles((128, 64, 8, 3), (64, 32, 4), (32, 128, 8)),"
    del best["bwd_q"]
    assert gpu_tune.table_row(90, 64, best) is None


@needs_no_gpu
def test_tuning_times_what_compiles_and_is_the_same(monkeypatch):
    """One candidate does not compile as one kernel, another computes something else there; both are out there only."""
    small, large, wrong = _tile(16, 16, 4, 2), _tile(32, 16, 4, 2), _tile(16, 32, 4, 2)
    shape = Shape(B=1, T=5, H=1, D=16, dtype=torch.float32)
    problem, spec = shape.problem("cpu"), shape.spec("cpu")
    monkeypatch.setattr(Shape, "problem", lambda self: problem)
    monkeypatch.setattr(Shape, "spec", lambda self: spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        gpu_tune,
        "ahead",
        lambda _, jobs: [(job, "OutOfResources" if job[2:] == ("fwd", large) else None) for job in jobs],
    )
    call = gpu_tune.Bench.call

    def broken(self, kind, tile):
        run = call(self, kind, tile)
        return (lambda: tuple(2 * x for x in run())) if (kind, tile) == ("bwd_v", wrong) else run

    monkeypatch.setattr(gpu_tune.Bench, "call", broken)
    now = _Time()

    class Clock:
        def seconds(self, run):
            run()
            now.now += 1.0
            return 1.0

    *rows, last = gpu_tune.tune(shape, True, Clock(), Budget(seconds=0, clock=now), [small, large, wrong])
    timed = {row["kernel"]: row["timed"] for row in rows}
    assert timed == {"fwd": 2, "bwd_q": 3, "bwd_kv": 3, "bwd_k": 3, "bwd_v": 2}
    assert last["row"].startswith("(90, 16): _tiles((")
    json.dumps([*rows, last])


def test_jobs_come_back_in_order_with_what_went_wrong():
    found = list(gpu_compile.ahead(_square_root, [4, -1]))
    assert found == [(4, None), (-1, "ValueError: no root of -1")]
    assert list(gpu_compile.ahead(_square_root, [])) == []


def _square_root(x):
    if x < 0:
        raise ValueError(f"no root of {x}")


def test_checks_come_before_the_timings_that_rely_on_them():
    steps = gpu.steps(Gate())
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names.index("check attention") < names.index("time attention: B=32 T=8192 H=12 D=64 causal")
    rest = names.index("check attention: the rest")
    assert all(names.index(name) > rest for name in names if name.startswith("time attention") and "full" in name)
    for shape, relies_on in (*gpu.FIRST_TIMED, *gpu.LAST_TIMED):
        assert relies_on in CHECKED and CHECKED[relies_on].options == shape.options
    assert sum(step.seconds for step in gpu.tuning_steps(100)) == pytest.approx(100)


WITHOUT_THE_REST = """
import runpy, sys
sys.modules |= dict.fromkeys(("mamlfast", "transformers", "datasets", "safetensors", "matplotlib", "tqdm", "pytest"))
sys.argv = ["gpu", "--out", sys.argv[1]]
runpy.run_module("bench.gpu", run_name="__main__")
"""


@needs_no_gpu
def test_without_a_gpu_there_is_one_line_and_status_two(tmp_path):
    """And what it imports before is torch and Triton."""
    command = [sys.executable, "-c", WITHOUT_THE_REST, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("no GPU") and done.stderr.count("\n") == 1 and not done.stdout
    assert not (tmp_path / "out").exists()


def test_numbers_that_json_lacks_are_words_in_the_record(tmp_path):
    (step,) = _run([_step("a", lambda _: iter([{"error": torch.inf, "of": [float("nan")]}]))], tmp_path / "r.json")
    assert step["rows"] == [{"error": "inf", "of": ["nan"]}]


def test_out_of_time_is_no_error():
    assert not issubclass(OutOfTime, Exception)
