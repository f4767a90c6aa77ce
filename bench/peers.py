"""The engine next to peers that live in interpreters of their own: MixFlow-MG in JAX, the strongest exact one on a CPU.

    python -m bench.peers --shape llama-30m --steps 1 --batch 2 --tokens 512 --jax-python /path/to/python

prints one line of JSON. Weights and tokens travel as .npz; the peer's process compiles, runs once, and then waits for
the word, so that it takes its turns with ours, round by round, on as many threads. Every meta-gradient is compared
with the engine's own in float64, which ``gate.py`` has compared with double backward, in the round before the clock
starts: who is wrong gets no number.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bench import gate, limit
from bench.contenders import FLOOR, REPLAY, REPLAY_KEPT, Gradient
from bench.limit import Work
from bench.models import SHAPES, Setting
from bench.ops import raced
from bench.peak import MB, ROOT, probe
from bench.timing import race
from mamlfast.ops import use_matrix_products
from mamlfast.ops.matrix_products import LIBRARIES, product

JAX_PYTHON = "MAMLFAST_JAX_PYTHON"
JAX = "JAX MixFlow"
OURS = (FLOOR, REPLAY, REPLAY_KEPT)
NAMES = (*(c.name for c in OURS), JAX)
ANSWER_SECONDS = 1800


class NoPeer(RuntimeError):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class PeerTime:
    """A contender in one setting.

    ``error`` is against the engine in float64, at full size. ``peak_mb`` is resident memory above the model in place;
    None where it ran out or was not asked for. ``gemm_seconds`` is what the matrix products of its linear layers take
    at ``gflops``, the best rate of products of these shapes here; ``over_limit`` is the median over it.
    """

    contender: str
    setting: str
    exact: bool
    error: float
    seconds: tuple[float, ...]
    median: float
    peak_mb: float | None
    gflops: float
    gemm_seconds: float
    over_limit: float


def jax_python(given: str | None = None) -> str:
    """Return an interpreter that has jax: the one given, ``$MAMLFAST_JAX_PYTHON``, or this one.

    Raises NoPeer where it has none; one that was named is not replaced by another.
    """
    named = given or os.environ.get(JAX_PYTHON)
    found = named or sys.executable
    try:
        done = subprocess.run([found, "-c", "import jax"], capture_output=True, text=True, timeout=120)
    except OSError as error:
        raise NoPeer(f"{found} cannot be run ({error}): name a Python that has jax") from error
    if done.returncode != 0:
        advice = "" if named else f"; name another with --jax-python or ${JAX_PYTHON}"
        raise NoPeer(f"{found} cannot import jax{advice}")
    return found


def export(setting: Setting, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights, tokens and numbers of a setting for a process that has no torch."""
    model, episode = setting.shape.model(dtype=dtype), setting.episode()
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    arrays["support"] = np.stack([batch["input_ids"].numpy() for batch in episode.support])
    arrays["query"] = episode.query["input_ids"].numpy()
    arrays["inv_freq"] = model.model.rotary_emb.inv_freq.numpy()
    np.savez(file, **arrays, heads=setting.shape.heads, eps=model.config.rms_norm_eps, lr=setting.lr)


class Worker:
    """A process with one compiled meta-gradient that runs when it is told to."""

    def __init__(self, process: subprocess.Popen[str], log: Path, folder: Path):
        self._process, self._log, self._folder = process, log, folder
        self.ready = self._answer()

    def ask(self, command: str) -> dict:
        """Send a line and return the answer. Raises RuntimeError, with what the process said, where it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(self._ended()) from error
        return self._answer()

    def gradient(self) -> Gradient:
        """Run once more and return the result."""
        file = self._folder / "gradient.npz"
        self.ask(f"write {file}")
        with np.load(file) as written:
            return {name: torch.from_numpy(a) for name, a in written.items()}

    def _answer(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._ended())
        return json.loads(line)

    def _ended(self):
        self._process.wait()
        said = self._log.read_text()[-2000:]
        return f"the process of {JAX} ended with {self._process.returncode}: {said}"


@contextmanager
def jax_worker(
    python: str, setting: Setting, *, loop: str = "scan", dtype: torch.dtype = torch.float32
) -> Iterator[Worker]:
    """A JAX process for a setting, on as many threads as torch has here; it ends with the block.

    Raises RuntimeError, with what the process said, where it does not come up.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, log = Path(folder, "input.npz"), Path(folder, "log")
        export(setting, given, dtype)
        command = [python, "-m", "bench.jax_mixflow", str(given), f"--loop={loop}"]
        # XLA starts a thread for each of what it takes to be the cores.
        threads = str(torch.get_num_threads())
        env = os.environ | {"PYTHONPATH": str(ROOT), "NPROC": threads, "PJRT_NPROC": threads, "JAX_PLATFORMS": "cpu"}
        with (
            log.open("w") as said,
            subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
            ) as process,
        ):
            try:
                yield Worker(process, log, Path(folder))
            finally:
                process.kill()


@cache
def admit_jax(python: str) -> float:
    """Return JAX's error against double backward on the gate's small model in float64, which rules out luck.

    Raises gate.WrongResult where it is too large.
    """
    gate.examine(FLOOR)
    oracle = gate.DOUBLE_BACKWARD.prepared(gate.SETTING, gate.model_of(gate.DOUBLE_BACKWARD))()
    with jax_worker(python, gate.SETTING, dtype=torch.float64) as worker:
        return _judged(JAX, gate.error(worker.gradient(), oracle), gate.FLOAT64_THRESHOLD)


def _judged(name, found, threshold):
    if found > threshold:
        raise gate.WrongResult(f"{name} must agree to {threshold:g}; it is {found:.1e} off: it gets no number")
    return found


def measured(
    setting: Setting, rounds: int, *, python: str | None, memory: bool = True, loop: str = "scan"
) -> dict[str, PeerTime]:
    """Check and time the engine's contenders, and JAX's where ``python`` is an interpreter that has it.

    The round that is checked is the warm-up. Raises gate.WrongResult where one is not what it is listed as.
    """
    for contender in OURS:
        gate.admit(contender)
    if python is None:
        return _measured(setting, rounds, None, memory)
    admit_jax(python)
    with jax_worker(python, setting, loop=loop) as worker:
        return _measured(setting, rounds, worker, memory)


def _measured(setting, rounds, worker, memory):
    oracle = {n: g.float() for n, g in _float64(REPLAY, setting).items()}
    runs = {c.name: c.prepared(setting) for c in OURS}
    errors = {c.name: gate.judge(c, gate.error(runs[c.name](), oracle), gate.FLOAT32_THRESHOLD) for c in OURS}
    if worker is not None:
        errors[JAX] = _judged(JAX, gate.error(worker.gradient(), oracle), gate.FLOAT32_THRESHOLD)
        runs[JAX] = lambda: worker.ask("go")
    del oracle
    gflops = product_rate(setting)
    seconds = race(runs, rounds)
    peaks = {c.name: probe(c, setting, torch.get_num_threads()).peak_mb for c in OURS} if memory else {}
    if memory and worker is not None:
        peaks[JAX] = worker.ask("peak")["peak_bytes"] / MB
    return {name: _time(name, setting, errors[name], seconds[name], peaks.get(name), gflops) for name in runs}


def _float64(contender, setting):
    model = setting.shape.model(attention=contender.attention, dtype=torch.float64)
    return contender.prepared(setting, model)()


WORK: dict[str, Work] = {c.name: c.work for c in OURS} | {JAX: limit.RECOMPUTED}


def _time(name, setting, error, seconds, peak, gflops):
    median, least = statistics.median(seconds), operations(name, setting) / gflops / 1e9
    return PeerTime(
        contender=name,
        setting=setting.name,
        exact=name != FLOOR.name,
        error=error,
        seconds=tuple(seconds),
        median=median,
        peak_mb=peak,
        gflops=gflops,
        gemm_seconds=least,
        over_limit=median / least,
    )


def operations(name: str, setting: Setting) -> float:
    """Floating-point operations of a contender's linear layers; the output projection is never recomputed."""
    work, shape = WORK[name], setting.shape
    head = limit.KEPT if work == limit.RECOMPUTED else work
    weights = work.units(setting.steps) * shape.block_weights + head.units(setting.steps) * shape.head_weights
    return 2.0 * setting.batch * setting.tokens * weights


def product_rate(setting: Setting, repetitions: int = 5) -> float:
    """The best rate, in GFLOP/s, of the products that the setting's linear layers consist of, in either library."""
    rows, d = setting.batch * setting.tokens, setting.shape.width
    best = 0.0
    for out in (d, setting.shape.ffn, setting.shape.vocabulary):
        x, w, y_bar = torch.randn(rows, d), torch.randn(out, d), torch.randn(rows, out)
        factors = {"y": (x, w.mT), "x_bar": (y_bar, w), "w_bar": (y_bar.mT, x)}
        with torch.no_grad():
            for library in LIBRARIES:
                found = _product_seconds(library, factors, repetitions)
                best = max([best, *(2e-9 * rows * d * out / s for s in found)])
    return best


def _product_seconds(library, factors, repetitions) -> list[float]:
    """The best time of each product; nothing where this PyTorch lacks the library."""
    try:
        with use_matrix_products(library):
            found = raced({name: lambda f=f: product(*f) for name, f in factors.items()}, repetitions)
    except ValueError:
        return []
    return [min(s) for s in found.values()]


def summary(times: dict[str, PeerTime]) -> str:
    """A line for a setting: ours over JAX in time and memory, and how far each is from its arithmetic."""
    ours = times[REPLAY.name]
    parts = [f"{t.contender} {t.median:.2f} s, {t.over_limit:.2f} x its products" for t in times.values()]
    if JAX in times:
        jax = times[JAX]
        parts.append(f"ours / JAX: time {ours.median / jax.median:.2f}{_memory_ratio(ours, jax)}")
    return "; ".join(parts) + f" (at {ours.gflops:.0f} GFLOP/s)"


def _memory_ratio(ours, jax):
    if ours.peak_mb is None or jax.peak_mb is None:
        return ""
    return f", memory {ours.peak_mb / jax.peak_mb:.2f} ({ours.peak_mb:,.0f} and {jax.peak_mb:,.0f} MB)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="The engine next to MixFlow-MG in JAX.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-30m")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", choices=("scan", "unrolled"), default="scan", help="JAX's, over the layers")
    parser.add_argument("--jax-python", help=f"an interpreter that has jax; default: ${JAX_PYTHON}, or this one")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    given = parser.parse_args(arguments)
    setting = Setting(shape=SHAPES[given.shape], steps=given.steps, batch=given.batch, tokens=given.tokens)
    try:
        python, without = jax_python(given.jax_python), None
    except NoPeer as reason:
        python, without = None, str(reason)
    times = measured(setting, given.rounds, python=python, memory=not given.no_memory, loop=given.loop)
    found = {"summary": summary(times), "times": [asdict(t) for t in times.values()], "without_jax": without}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
