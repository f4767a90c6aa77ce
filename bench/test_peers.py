"""The engine next to MixFlow-MG in JAX: results checked, time taken in turns, memory in fresh processes."""

from dataclasses import asdict, replace
from functools import cache

import pytest

from bench.models import LLAMA_30M, LLAMA_30M_50K, SHAPES, Setting
from bench.peers import JAX, NAMES, NoPeer, jax_python, measured, summary
from bench.timing import Tape

TAPE = Tape()
SHORT = Setting(shape=LLAMA_30M, steps=1, batch=2, tokens=512)
# Each setting and its rounds.
QUICK = ((SHORT, 3),)
FULL = (
    *QUICK,
    (replace(SHORT, steps=3), 3),
    (replace(SHORT, tokens=2048), 3),
    (replace(SHORT, shape=LLAMA_30M_50K), 3),
)


@pytest.fixture(scope="module")
def peer_python(request):
    """An interpreter that has jax, or in words why there is none."""
    try:
        return jax_python(request.config.getoption("jax_python")), None
    except NoPeer as reason:
        return None, str(reason)


@pytest.fixture(scope="module")
def peer_times(report, peer_python):
    @cache
    def found(setting, rounds):
        # Memory is measured in new processes, which know shapes by name.
        times = measured(setting, rounds, python=peer_python[0], memory=setting.shape.name in SHAPES)
        report.peers += times.values()
        report.targets[f"peers: {setting.name}"] = summary(times)
        return times

    return found


@pytest.mark.benchmark(timer=TAPE)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", FULL, ids=[s.name for s, _ in FULL])
def test_peers(benchmark, request, peer_python, peer_times, case, name):
    """No time is asserted; what is asserted is that the result is right, before there is one."""
    full = request.config.getoption("full")
    if case not in QUICK and not full:
        pytest.skip("measured with --full only")
    if (name == JAX or not full) and peer_python[0] is None:
        pytest.skip(peer_python[1])
    time = peer_times(*case)[name]
    benchmark.group = f"peers: {time.setting}"
    benchmark.extra_info |= asdict(time)
    TAPE.rewind(time.seconds)
    benchmark.pedantic(TAPE.play, rounds=len(time.seconds))
