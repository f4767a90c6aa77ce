"""The benchmarks of peers and of single operations: what is wrong gets no number, and all get the same model."""

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import gate, ops, peers
from bench.contenders import DOUBLE_BACKWARD, FLOOR, REPLAY, first_order
from bench.jax_mixflow import LOOPS, answer, from_hugging_face, to_hugging_face
from bench.models import TINY, Setting

SMALL = Setting(shape=TINY, steps=2, batch=1, tokens=16)
CASES = ops.cases(6, width=16, ffn=12, vocabulary=10, head=4)


@pytest.fixture(scope="module")
def jax_python() -> str:
    try:
        return peers.jax_python()
    except peers.NoPeer as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("loop", LOOPS)
def test_weights_survive_the_way_to_jax_and_back(loop):
    weights = {name: p.detach().numpy() for name, p in TINY.model().named_parameters()}
    tree = from_hugging_face(weights, loop)
    back = to_hugging_face(tree)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_a_tied_head_is_no_parameter_of_its_own():
    weights = {name: p.detach().numpy() for name, p in TINY.model().named_parameters()}
    del weights["lm_head.weight"]
    tree = from_hugging_face(weights, "scan")
    assert "head" not in tree and to_hugging_face(tree).keys() == weights.keys()


@pytest.mark.parametrize("loop", LOOPS)
def test_jax_agrees_with_double_backward_and_first_order_does_not(jax_python, loop):
    oracle = DOUBLE_BACKWARD.prepared(gate.SETTING, gate.model_of(DOUBLE_BACKWARD))()
    with peers.jax_worker(jax_python, gate.SETTING, loop=loop, dtype=torch.float64) as worker:
        assert gate.error(worker.gradient(), oracle) < gate.FLOAT64_THRESHOLD
    assert gate.error(FLOOR.prepared(gate.SETTING, gate.model_of(FLOOR))(), oracle) > 0.1


def test_a_worker_measures_time_and_memory_and_names_its_mistakes(jax_python):
    with peers.jax_worker(jax_python, SMALL) as worker:
        assert worker.ready["compile_seconds"] > 0
        assert worker.ask("go")["seconds"] > 0
        assert 0 <= worker.ask("peak")["peak_bytes"] < 500e6
        with pytest.raises(RuntimeError, match="must be go, peak or write"):
            worker.ask("stop")


def test_a_wrong_peer_gets_no_number():
    class Wrong:
        def gradient(self):
            return first_order(TINY.model(), SMALL.episode(), SMALL.lr)

    with pytest.raises(gate.WrongResult, match="gets no number"):
        peers._measured(SMALL, 1, Wrong(), memory=False)


def test_an_unknown_command_is_refused():
    with pytest.raises(ValueError, match="go, peak or write"):
        answer(lambda: None, "stop")


def test_without_jax_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv(peers.JAX_PYTHON, raising=False)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", os.fspath(python))
    with pytest.raises(peers.NoPeer, match="cannot import jax; name another"):
        peers.jax_python()
    with pytest.raises(peers.NoPeer, match="cannot be run"):
        peers.jax_python(os.fspath(tmp_path / "nothing"))


def test_a_worker_that_does_not_come_up_says_why():
    with (
        pytest.raises(RuntimeError, match="ended with"),
        peers.jax_worker("/bin/false", SMALL),
    ):
        pass


def test_times_come_with_the_products_they_stand_against(monkeypatch, capsys):
    def nobody(given):
        raise peers.NoPeer("no jax here")

    monkeypatch.setattr(peers, "jax_python", nobody)
    peers.main(["--shape=llama-tiny", "--tokens=16", "--rounds=1", "--no-memory"])
    found = json.loads(capsys.readouterr().out)
    assert found["without_jax"] == "no jax here" and len(found["times"]) == len(peers.OURS)
    for time in found["times"]:
        assert time["over_limit"] == pytest.approx(time["median"] / time["gemm_seconds"])


def test_the_operations_are_those_of_the_formulas():
    setting = replace(SMALL, steps=1)
    weights, head = TINY.block_weights, TINY.head_weights
    assert peers.operations(FLOOR.name, setting) == 2 * 16 * 6 * (weights + head)
    assert peers.operations(REPLAY.name, setting) == 2 * 16 * (19 * weights + 14 * head)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operation_agrees_with_its_composition(case):
    assert ops.checked(case) < ops.THRESHOLD


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_operation_gets_no_number(case):
    def wrong(*xs):
        return case.fused(*xs) + 1e-2 * (xs[0] ** 2).mean()

    with pytest.raises(gate.WrongResult, match="gets no number"):
        ops.measured(replace(case, fused=wrong), rounds=1)


def test_an_operation_is_measured_against_a_limit():
    by_name = {case.name: case for case in CASES}
    assert ops.measured(by_name["rms_norm"], rounds=1).unit == "GB/s"
    linear = ops.measured(by_name["linear"], rounds=1)
    assert linear.unit == "GFLOP/s"
    assert linear.rate == pytest.approx(8 * 2 * 6 * 16 * 12 / linear.dual_seconds / 1e9)
