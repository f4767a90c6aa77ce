"""How fast each fused operation is, and what a call of it costs in Python; nothing but correctness is asserted."""

from dataclasses import asdict

import pytest

from bench.ops import ROWS, block_seconds, call_seconds, cases, measured
from bench.timing import Tape

TAPE = Tape()
NAMES = [case.name for case in cases(2, width=8, ffn=8, vocabulary=8, head=4)]
# Seconds a decoder block on the CPU: the target for what Python adds to it.
BLOCK_TARGET = 0.5e-3


@pytest.mark.benchmark(timer=TAPE)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_op(benchmark, report, name, rows):
    case = next(case for case in cases(rows) if case.name == name)
    found = measured(case)
    report.ops.append(found)
    report.targets[found.op] = found.line
    benchmark.group = f"ops: dual pass, {rows} rows"
    benchmark.extra_info |= asdict(found)
    TAPE.rewind([found.dual_seconds])
    benchmark.pedantic(TAPE.play)


@pytest.mark.benchmark(timer=TAPE, group="ops: Python's share of a dual pass")
@pytest.mark.parametrize("name", NAMES)
def test_op_dispatch(benchmark, report, name):
    case = next(case for case in cases(2, width=8, ffn=8, vocabulary=8, head=4) if case.name == name)
    seconds = call_seconds(case)
    report.targets[f"dispatch of {name}, forward and backward"] = f"{1e6 * seconds:.0f} us"
    TAPE.rewind([seconds])
    benchmark.pedantic(TAPE.play)


@pytest.mark.benchmark(timer=TAPE, group="ops: Python's share of a dual pass")
def test_op_dispatch_of_a_decoder_block(benchmark, report):
    seconds = block_seconds()
    report.targets["dispatch of a decoder block, forward and backward"] = (
        f"{1e3 * seconds:.2f} ms (target {1e3 * BLOCK_TARGET:.1f})"
    )
    TAPE.rewind([seconds])
    benchmark.pedantic(TAPE.play)
