"""The peak memory of one meta-gradient, in a process of its own.

    python -m bench.peak "Replay" --shape llama-30m --steps 3 --batch 2 --tokens 1024

prints one line of JSON. What counts is the process's resident memory at its highest, above what it was with the
model, its batches and all libraries in place. A meta-gradient of the same model on a few tokens comes first, so that
what is loaded and cached once is not counted; freed memory goes back to the system; then the kernel's high-water
mark starts over (Linux with glibc only).

Large tensors are mappings of their own here, so that freed is free: the peak is what the method holds at once. In
glibc's default they share a heap; what its holes cost depends on the order of sizes, a fifth to a half on top, for
every contender.

A process that would need more than the machine has ends with a clear result instead of the out-of-memory killer's
attention: its data are limited to the memory that was available when it started.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.contenders import CONTENDERS, Contender
from bench.models import SHAPES, Setting

ROOT = Path(__file__).parents[1]
Case = tuple[Contender, Setting]

MB = 1_000_000  # as parameters are counted: 30M of them in float32 are 118 MB
WARM_UP_TOKENS = 8
M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 128 * 1024


@dataclass(frozen=True, kw_only=True)
class Peak:
    """``peak_mb`` above a model of ``model_mb``; None: memory ran out at ``limit_mb``. ``seconds`` of a cold run."""

    contender: str
    setting: str
    peak_mb: float | None
    model_mb: float
    limit_mb: float
    seconds: float

    @property
    def shown(self) -> str:
        """The peak for a table."""
        if self.peak_mb is None:
            return f"out of memory at {self.limit_mb:,.0f} MB"
        return f"{self.peak_mb:,.0f} MB"


def measure(contender: Contender, setting: Setting) -> Peak:
    """Measure in this process. Raises OSError where the system cannot start its high-water mark over."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    limit = available_bytes()
    model = setting.shape.model(attention=contender.attention)
    contender.prepared(replace(setting, tokens=WARM_UP_TOKENS), model)()
    run = contender.prepared(setting, model)
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + limit, resource.RLIM_INFINITY))
    begin = time.perf_counter()
    try:
        peak = above(run) / MB
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower():
            raise
        peak = None
    return Peak(
        contender=contender.name,
        setting=setting.name,
        peak_mb=peak,
        model_mb=4 * setting.shape.num_parameters / MB,
        limit_mb=limit / MB,
        seconds=time.perf_counter() - begin,
    )


def above(run: Callable[[], object]) -> int:
    """Return by how many bytes resident memory rises while ``run`` runs, at its highest; its result counts."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before


def probe(contender: Contender, setting: Setting, threads: int | None = None) -> Peak:
    """Measure in a fresh process, on ``threads`` threads (default: all cores, or ``OMP_NUM_THREADS``).

    Raises RuntimeError, with what the process said, where it fails.
    """
    sizes = {"shape": setting.shape.name, "steps": setting.steps, "batch": setting.batch, "tokens": setting.tokens}
    command = [sys.executable, "-m", "bench.peak", contender.name, *(f"--{k}={v}" for k, v in sizes.items())]
    done = subprocess.run(command, cwd=ROOT, env=environment(threads), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the memory probe of {contender.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def probe_side_by_side(cases: Sequence[Case]) -> dict[Case, Peak]:
    """Probe as many cases at once as there are cores, in their order; together they must fit into memory.

    A process on one core and one thread loses nothing to waiting for other threads, and peaks do not mind company.
    """
    at_once = min(len(cases), _cores())
    with ThreadPoolExecutor(at_once) as pool:
        peaks = pool.map(lambda case: probe(*case, threads=_cores() // at_once), cases)
        return dict(zip(cases, peaks, strict=True))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.peak", description="Peak memory of one meta-gradient.")
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--shape", choices=SHAPES, default="llama-30m")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    setting = Setting(shape=SHAPES[given.shape], steps=given.steps, batch=given.batch, tokens=given.tokens)
    print(json.dumps(asdict(measure(CONTENDERS[given.contender], setting))))


def _cores():
    return len(os.sched_getaffinity(0))


def environment(threads: int | None) -> dict[str, str]:
    """The environment in which a new interpreter finds the packages of this checkout."""
    paths = [str(ROOT), str(ROOT / "triton_kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = str(threads or os.environ.get("OMP_NUM_THREADS") or _cores())
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": chosen}


def total_bytes() -> int:
    """Memory of this machine."""
    return _kilobytes("/proc/meminfo", "MemTotal")


def available_bytes() -> int:
    """Memory that can be had now without swapping."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _status(field):
    return _kilobytes("/proc/self/status", field)


def _kilobytes(file, field):
    """The bytes of a field that is given in kB."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
