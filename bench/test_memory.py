"""How much memory a meta-gradient takes; unlike time it is not noisy, so its targets are asserted.

pytest-benchmark shows the one cold run of each measuring process, some of them side by side: no time to quote. The
peaks stand in the summary.
"""

from dataclasses import asdict

import pytest

from bench.contenders import DOUBLE_BACKWARD, REPLAY
from bench.peak import probe
from bench.sweep import MEMORY
from bench.timing import Tape

TAPE = Tape()

pytestmark = pytest.mark.benchmark(timer=TAPE, group="memory: cold runs, no times to quote")

# Replay's peak in units of double backward's, at three inner steps.
SHARE = 0.35
# In MB, for small tensors that share a heap: 3 were seen. Of a copy of the parameters, 118, it is a tenth; keeping
# the input of each block over an inner step would cost 21 and more.
ALLOCATOR_NOISE = 12


def test_replay_takes_at_most_a_third_of_the_memory_of_double_backward(benchmark, target_peaks, report):
    replay, double = (target_peaks[c, MEMORY] for c in (REPLAY, DOUBLE_BACKWARD))
    show(benchmark, replay, replay=asdict(replay), double_backward=asdict(double))
    assert replay.peak_mb is not None
    if double.peak_mb is None:
        pytest.skip(f"double backward is {double.shown}: there is no ratio")
    share = replay.peak_mb / double.peak_mb
    report.targets[f"Replay's peak over double backward's, {MEMORY.name}"] = f"{share:.3f} (at most {SHARE})"
    assert share <= SHARE


def test_replay_grows_with_the_inner_steps_by_the_stored_parameters_only(benchmark, target_peaks, report, sweep):
    low, high = (target_peaks[REPLAY, setting] for setting in (sweep.few_steps, sweep.many_steps))
    show(benchmark, high, few_steps=asdict(low), many_steps=asdict(high))
    assert low.peak_mb is not None and high.peak_mb is not None
    steps = sweep.many_steps.steps - sweep.few_steps.steps
    growth, copies = high.peak_mb - low.peak_mb, steps * low.model_mb
    report.targets[f"Replay's growth from {low.setting} to {high.setting}"] = (
        f"{growth:.0f} MB ({steps} copies of the parameters are {copies:.0f})"
    )
    assert growth <= copies + ALLOCATOR_NOISE


def test_further_peaks(benchmark, admit, report, further_peak):
    contender, setting = further_peak
    admit(contender)
    peak = probe(contender, setting)
    report.peaks.append(peak)
    show(benchmark, peak, **asdict(peak))


def show(benchmark, peak, **extra):
    """Hand pytest-benchmark the one time there is, and all the rest beside it."""
    benchmark.extra_info |= extra
    TAPE.rewind([peak.seconds])
    benchmark.pedantic(TAPE.play)
