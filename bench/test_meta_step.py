"""How long a meta-gradient takes: every contender in every setting, in turn, against first order and the limit."""

from dataclasses import asdict

import pytest

from bench.contenders import CONTENDERS
from bench.timing import Tape

TAPE = Tape()


@pytest.mark.benchmark(timer=TAPE)
@pytest.mark.parametrize("name", CONTENDERS)
def test_meta_step(benchmark, admit, times, setting, rounds, name):
    """No time is asserted; what is asserted is that the result is right, before there is one."""
    admit(CONTENDERS[name])
    time = times(setting, rounds)[name]
    benchmark.group = f"time: {setting.name}"
    benchmark.extra_info |= asdict(time)
    TAPE.rewind(time.seconds)
    benchmark.pedantic(TAPE.play, rounds=rounds)
