"""The run as a whole: its options, what it measures, its report."""

from collections.abc import Callable
from functools import cache

import pytest

from bench import gate
from bench.contenders import CONTENDERS, DOUBLE_BACKWARD, REPLAY, Contender
from bench.models import Setting
from bench.peak import Case, Peak, probe_side_by_side
from bench.report import Report
from bench.sweep import FULL, MEMORY, QUICK, Sweep
from bench.timing import Time, timed

REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mamlfast")
    group.addoption("--full", action="store_true", help="the long sweep over inner steps and sequence lengths")
    group.addoption("--record", action="store_true", help="write bench/results/<date>-<machine>.json")
    group.addoption("--jax-python", help="an interpreter that has jax; default: $MAMLFAST_JAX_PYTHON, or this one")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report(full=config.getoption("full", False))
    if config.getoption("benchmark_columns", ()) is None:
        config.option.benchmark_columns = ["median", "min", "max", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sweep = _sweep(metafunc.config)
    if "rounds" in metafunc.fixturenames:
        metafunc.parametrize("setting, rounds", sweep.times, ids=[s.name for s, _ in sweep.times])
    if "further_peak" in metafunc.fixturenames:
        only_full = pytest.param(None, id="further", marks=pytest.mark.skip(reason="measured with --full only"))
        ids = [f"{c.name} {s.name}" for c, s in sweep.peaks]
        metafunc.parametrize("further_peak", sweep.peaks or [only_full], ids=ids or None)


@pytest.hookimpl(trylast=True)  # after the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    if lines := report.lines():
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(lines))
    if config.getoption("record", False):
        terminalreporter.write_line(_record(report, exitstatus))


def _record(report, exitstatus):
    if exitstatus != 0:
        return "nothing recorded: only a run without failures is"
    try:
        return f"recorded in {report.write()}"
    except ValueError as error:
        return f"nothing recorded: {error}"


def _sweep(config) -> Sweep:
    return FULL if config.getoption("full", False) else QUICK


@pytest.fixture(scope="session")
def sweep(request) -> Sweep:
    return _sweep(request.config)


@pytest.fixture(scope="session")
def report(request) -> Report:
    return request.config.stash[REPORT]


@pytest.fixture(scope="session")
def admit(report) -> Callable[[Contender], None]:
    """Raise gate.WrongResult unless the contender may be measured."""

    def admit(contender):
        report.float64_errors[contender.name] = gate.admit(contender)

    return admit


@pytest.fixture(scope="session")
def times(report) -> Callable[[Setting, int], dict[str, Time]]:
    """Return the times of all admitted contenders in a setting, measured when first asked for."""

    @cache
    def measured(setting, rounds):
        found = timed([c for c in CONTENDERS.values() if _admitted(c)], setting, rounds)
        report.times += found.values()
        return found

    return measured


def _admitted(contender):
    try:
        gate.admit(contender)
    except gate.WrongResult:
        return False
    return True


@pytest.fixture(scope="session")
def target_peaks(report, admit, sweep) -> dict[Case, Peak]:
    """The peaks that the memory targets are about, the longest measurement first."""
    admit(REPLAY)
    admit(DOUBLE_BACKWARD)
    replays = [(REPLAY, setting) for setting in (MEMORY, sweep.many_steps, sweep.few_steps)]
    found = probe_side_by_side([(DOUBLE_BACKWARD, MEMORY), *replays])
    report.peaks += found.values()
    return found
