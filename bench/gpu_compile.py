"""Fill Triton's cache from many processes before anything is checked or timed: compilers use one core each."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Job = TypeVar("Job")

# Each has a context of its own on the GPU, of some hundred megabytes.
MOST_PROCESSES = 16
# A process that the compiler takes down with it never answers: when for so long none does, they are given up.
PATIENCE_S = 60.0


def ahead(function: Callable[[Job], object], jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
    """Call ``function``, one of a module, on each job in other processes.

    Yields each job, in order, with what went wrong, None if nothing did. The processes end with the iteration.
    """
    if not jobs:
        return
    processes = min(len(jobs), os.cpu_count() or 1, MOST_PROCESSES)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = [pool.apply_async(_tried, ((function, job),)) for job in jobs]
        answered = -1
        for job, result in zip(jobs, results, strict=True):
            while not result.ready() and answered < (now := sum(r.ready() for r in results)):
                answered = now
                result.wait(PATIENCE_S)
            yield job, result.get() if result.ready() else "no answer"


def _tried(task):
    function, job = task
    try:
        function(job)
    # A kernel that does not fit is an answer, and the caller's to judge.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return None
