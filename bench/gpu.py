"""All measurements that need a GPU, in one command::

    python -m bench.gpu --out results --minutes 8             # check and time
    python -m bench.gpu --out results --minutes 20 --tune     # look for faster tiles instead

Needs torch and triton, no network, and nobody else on the GPU. The most important comes first; every row is in the
record, ``<date>-<GPU>-kernels.json``, as soon as it is known, so a run that is cut off counts as far as it came. What
is wrong gets no time. The exit status is 0, 1 if a kernel was found wrong or a step failed, 2 without a GPU.
"""

import argparse
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("mamlfast_kernels") is None:  # not installed, only checked out
    sys.path.insert(0, str(ROOT / "triton_kernels"))

from bench import gpu_attention, gpu_attention_time, gpu_compile, gpu_rows, gpu_tune  # noqa: E402
from bench.gpu_attention import CHECKED, Shape  # noqa: E402
from bench.gpu_run import Budget, Gate, Record, Row, Step, run  # noqa: E402
from bench.gpu_timing import CudaClock  # noqa: E402

BF16 = torch.bfloat16
# Shape, and the check it relies on: flash-hog's shapes and their like, then others.
FIRST_TIMED = (
    (Shape(B=32, T=8192), "causal"),
    (Shape(B=1, T=8192), "causal"),
    (Shape(B=256, T=1024), "causal"),
    (Shape(B=8, T=8192, D=128), "causal D=128"),
    (Shape(B=1, T=131072), "causal"),
)
LAST_TIMED = (
    (Shape(B=8, T=4096, H=32, G=8, D=128), "grouped"),
    (Shape(B=16, T=4096, options={}), "full"),
    (Shape(B=4, T=2048), "causal"),  # all scores fit, so PyTorch's double backward is there to compare
)
TUNED = ((64, True), (128, True), (64, False), (128, False))
ROWS = ((16384, 4096), (8192, 32000))  # rows and columns; the second for cross-entropy, a vocabulary


def compile_shape(job: tuple[Shape, bool]) -> None:
    """Run all kernels of one order for a shape once."""
    shape, second_order = job
    gpu_attention.kernel_results(shape.problem(), shape.spec(), second_order)
    torch.cuda.synchronize()


def _compiled(shapes: Sequence[Shape]) -> Iterator[Row]:
    jobs = [(shape, second_order) for shape in shapes for second_order in (True, False)]
    errors = [error for _, error in gpu_compile.ahead(compile_shape, jobs) if error]
    yield {"calls": len(jobs), "failed": len(errors), "errors": errors}


def steps(gate: Gate) -> list[Step]:
    """What is measured, in order of importance. Seconds are the most a step may take, not what it needs."""
    first, dtypes = ("causal", "causal D=128"), gpu_attention.DTYPES
    others = [name for name in CHECKED if name not in first]
    small = [replace(shape, B=1, T=128) for shape, _ in (*FIRST_TIMED, *LAST_TIMED)]
    rest = [replace(CHECKED[name], dtype=d) for d in dtypes for name in (others if d == BF16 else CHECKED)]
    return [
        _compiling("compile what is timed", 120, [CHECKED[name] for name in first] + small),
        _checking(gate, "check attention", 60, first, (BF16,)),
        *(_timing(gate, *case) for case in FIRST_TIMED),
        _compiling("compile what is checked", 150, rest),
        _checking(gate, "check attention: the rest", 60, others, (BF16,)),
        *(_timing(gate, *case) for case in LAST_TIMED),
        *(_rows(gate, op) for op in gpu_rows.OPS),
        _checking(gate, "check attention: other dtypes", 120, CHECKED, dtypes[1:]),
    ]


def _compiling(name: str, seconds: float, shapes: Sequence[Shape]) -> Step:
    return Step(name=name, seconds=seconds, rows=lambda budget: _compiled(shapes))


def _checking(gate: Gate, name: str, seconds: float, names: Iterable[str], dtypes: tuple[torch.dtype, ...]) -> Step:
    return Step(name=name, seconds=seconds, rows=lambda budget: gpu_attention.check(gate, list(names), dtypes))


def _timing(gate: Gate, shape: Shape, relies_on: str) -> Step:
    def rows(budget):
        torch.cuda.empty_cache()
        return gpu_attention_time.time_shape(gate, relies_on, shape, CudaClock(), budget)

    heads = f"H={shape.H}" + ("" if shape.G is None else f"/{shape.G}")
    mask = "causal" if shape.options.get("causal") else "full"
    return Step(name=f"time attention: B={shape.B} T={shape.T} {heads} D={shape.D} {mask}", seconds=60, rows=rows)


def _rows(gate: Gate, op: gpu_rows.Op) -> Step:
    R, D = ROWS[op.output_is_row]

    def rows(budget):
        return gpu_rows.time_op(gate, op, R, D, BF16, CudaClock(), budget)

    return Step(name=f"time {op.name}", seconds=20, rows=rows)


def tuning_steps(seconds: float) -> list[Step]:
    """Candidates for each head dimension and order; all share the time equally."""

    def step(D, second_order):
        shape = Shape(B=8, T=4096, D=D)
        return Step(
            name=f"tune D={D} {'second' if second_order else 'first'} order",
            seconds=seconds / len(TUNED),
            rows=lambda budget: gpu_tune.tune(shape, second_order, CudaClock(), budget),
        )

    return [step(D, second_order) for D, second_order in TUNED]


def header() -> Row:
    """When, on what, with which versions and from which sources."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}


def machine() -> Row:
    """The GPU as CUDA and its driver describe it, and the system."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        **_driver(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _driver():
    """Driver, clocks and power limit; empty where nvidia-smi is not there to tell."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in told.split(",")), strict=False))


def versions() -> Row:
    """Python, torch with its CUDA, Triton, and the commit of this checkout, marked where the sources differ from it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "commit": _commit(),
    }


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _commit():
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = [*git, "status", "--porcelain", "--", ".", ":!bench/results"]
        dirty = subprocess.run(changes, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if dirty else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps that the command line asks for and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Check and time the kernels on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the record")
    parser.add_argument("--minutes", type=float, default=8, help="of the whole run (default: 8)")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles instead")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: these measurements need one that CUDA can use", file=sys.stderr)
        return 2
    total = Budget(seconds=60 * options.minutes)
    head = header()
    gpu = re.sub(r"[^a-z0-9]+", "-", head["machine"]["gpu"].lower()).strip("-")
    name = f"{head['date'][:10]}-{gpu}-{'tiles' if options.tune else 'kernels'}.json"
    gate, record = Gate(), Record(options.out / name, head)
    run(tuning_steps(total.seconds) if options.tune else steps(gate), record, total)
    print(f"recorded in {record.path}")
    return 0 if gate.passed and record.clean else 1


if __name__ == "__main__":
    sys.exit(main())
