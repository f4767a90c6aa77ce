"""The benchmarks' own machinery: a gate that lets nothing wrong through, the limits, the clock, the memory probe."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gate, limit, report
from bench.contenders import CONTENDERS, DOUBLE_BACKWARD, FLOOR, REPLAY, REPLAY_KEPT, first_order, replay
from bench.limit import Work
from bench.models import SHAPES, TINY, Setting
from bench.peak import MB, ROOT, above, environment, measure, probe
from bench.timing import Tape, race, timed

SMALL = Setting(shape=TINY, steps=2, batch=1, tokens=16)


def scaled(model, episode, lr):
    return {name: g * (1 + 1e-3) for name, g in replay(model, episode, lr).items()}


def off_in_the_smallest_parameter(model, episode, lr):
    grads = replay(model, episode, lr)
    name = min(grads, key=lambda n: float(grads[n].norm()))
    return grads | {name: grads[name] * (1 + 1e-3)}


def not_finite(model, episode, lr):
    return {name: g * torch.nan for name, g in replay(model, episode, lr).items()}


def without_a_parameter(model, episode, lr):
    return dict(list(replay(model, episode, lr).items())[1:])


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_is_what_it_is_listed_as(name):
    assert (gate.admit(CONTENDERS[name]) <= gate.FLOAT64_THRESHOLD) is CONTENDERS[name].exact


@pytest.mark.parametrize("wrong", [first_order, scaled, off_in_the_smallest_parameter, not_finite, without_a_parameter])
def test_a_wrong_contender_is_caught(wrong):
    with pytest.raises(gate.WrongResult):
        gate.admit(replace(REPLAY, meta_grad=wrong))


def test_a_gate_that_lets_first_order_pass_proves_nothing():
    with pytest.raises(gate.WrongResult, match="proves nothing"):
        gate.examine(replace(FLOOR, meta_grad=replay))


def test_no_time_is_returned_for_a_wrong_contender():
    contenders = [FLOOR, DOUBLE_BACKWARD, replace(REPLAY, meta_grad=scaled)]
    with pytest.raises(gate.WrongResult, match="gets no number"):
        timed(contenders, SMALL, rounds=1)


def test_every_contender_gets_the_same_weights_and_tokens():
    one, other = (TINY.model(attention=attention).state_dict() for attention in ("eager", "sdpa"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for a, b in zip(SMALL.episode().support, SMALL.episode().support, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    assert not torch.equal(SMALL.episode().support[0]["input_ids"], SMALL.episode().query["input_ids"])


@pytest.mark.parametrize("name", SHAPES)
def test_the_counts_of_parameters_are_those_of_the_models(name):
    with torch.device("meta"):
        model = SHAPES[name].model()
    assert SHAPES[name].num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_units_are_those_of_the_formulas(steps):
    assert limit.FIRST_ORDER.units(steps) == 3 * steps + 3
    assert limit.KEPT.units(steps) == 3 * steps + 3 + 8 * steps
    assert limit.RECOMPUTED.units(steps) == 4 * steps + 4 + 11 * steps
    assert limit.limit(limit.FIRST_ORDER, steps) == 1
    assert limit.limit(limit.KEPT, 1) == pytest.approx(14 / 6)


class Products(TorchDispatchMode):
    """Counts the floating-point operations of linear layers; attention's products are batched and another op."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("contender", [FLOOR, REPLAY, REPLAY_KEPT, DOUBLE_BACKWARD], ids=lambda c: c.name)
def test_the_units_are_those_that_a_contender_runs(contender):
    """Counted op by op. The head stands outside the blocks and is not recomputed; the engine leaves out last tokens."""
    setting = replace(SMALL, tokens=40)  # of a head wider than its tokens the logits would be recomputed
    run = contender.prepared(setting)
    with Products() as products:
        run()
    head = limit.KEPT if contender.work == limit.RECOMPUTED else contender.work
    blocks = contender.work.units(setting.steps) * setting.tokens * TINY.block_weights
    labels = setting.tokens - (contender is not DOUBLE_BACKWARD)
    assert products.flops == 2 * setting.batch * (blocks + head.units(setting.steps) * labels * TINY.head_weights)


def test_a_limit_takes_more_work_for_more_steps_only_if_steps_are_differentiated():
    at_two, at_nine = (limit.limit(Work(gradient=3, pull_back=6), steps) for steps in (2, 9))
    assert 1 < at_two < at_nine < 3


def test_a_race_runs_everyone_once_a_round_and_starts_with_another_one_each_time():
    ran = []
    seconds = race({name: lambda name=name: ran.append(name) for name in "ab"}, rounds=3)
    assert "".join(ran) == "abbaab"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}


def test_the_clock_moves_by_the_recorded_times_and_nothing_else():
    tape = Tape()
    tape.rewind([0.5, 0.25])
    readings = [tape(), tape()]
    for _ in range(2):
        tape.play()
        readings.append(tape())
    assert readings == [0, 0, 0.5, 0.75]


def test_a_peak_is_what_was_held_at_once():
    def sixty_four_megabytes_twice():
        for _ in range(2):
            torch.ones(16 * MB)

    assert 60 * MB < above(sixty_four_megabytes_twice) < 80 * MB


def test_a_probe_measures_in_a_process_of_its_own():
    peak = probe(REPLAY, SMALL)
    assert (peak.contender, peak.setting) == (REPLAY.name, SMALL.name)
    assert peak.peak_mb is not None and 0 < peak.peak_mb < 200
    assert peak.model_mb == 4 * TINY.num_parameters / MB


def test_a_probe_that_fails_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named anything >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(RuntimeError, match="ended with 3: no module named anything"):
        probe(REPLAY, SMALL)


def test_a_probe_without_enough_memory_ends_with_that_result():
    script = "from tests.test_bench import without_memory; without_memory()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert done.stdout.strip() == "out of memory at 20 MB", done.stderr


def without_memory():
    """Measure, in a process that is nobody else's, something that needs more than there is."""
    with patch("bench.peak.available_bytes", lambda: 20 * MB):
        print(measure(DOUBLE_BACKWARD, replace(SMALL, tokens=1024)).shown)


def test_a_setting_without_a_step_is_refused():
    with pytest.raises(ValueError, match="K=0"):
        replace(SMALL, steps=0)


def test_a_record_holds_machine_versions_and_numbers_of_the_run(tmp_path):
    run = report.Report(full=False)
    run.times += timed([FLOOR, DOUBLE_BACKWARD], SMALL, rounds=2).values()
    written = json.loads(run.write(tmp_path).read_text())
    assert written["machine"]["cores"] and written["versions"]["torch"] == torch.__version__
    assert written["times"] == json.loads(json.dumps([asdict(t) for t in run.times]))
    assert [p.name for p in tmp_path.iterdir()] == [f"{written['date']}-{report.machine_slug()}.json"]
    shown = "\n".join(run.lines())
    assert f"{FLOOR.name} (not exact)" in shown and DOUBLE_BACKWARD.name in shown


def test_a_run_that_measured_nothing_is_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="nothing to record"):
        report.Report(full=False).write(tmp_path)
    assert not list(tmp_path.iterdir())
