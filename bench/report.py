"""What one run of the benchmarks found: as tables for the terminal, and as one JSON file for whoever writes of it."""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

import mamlfast
from bench.ops import OpTime
from bench.peak import MB, ROOT, Peak, available_bytes, total_bytes
from bench.peers import PeerTime
from bench.timing import Time

RESULTS = ROOT / "bench" / "results"


@dataclass(kw_only=True)
class Report:
    """Grows while the benchmarks run: gate errors by contender, times, peaks, peers, operations, and the targets."""

    full: bool
    float64_errors: dict[str, float] = field(default_factory=dict)
    times: list[Time] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    peers: list[PeerTime] = field(default_factory=list)
    ops: list[OpTime] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The summary, ready to print; nothing where nothing was measured."""
        return [*_time_lines(self.times), *_peak_lines(self.peaks), *_target_lines(self.targets)]

    def write(self, folder: Path = RESULTS) -> Path:
        """Write ``<date>-<machine>.json`` and return its path; a run of the same day and kind is replaced.

        Raises ValueError where nothing was measured.
        """
        if not (self.times or self.peaks or self.peers or self.ops):
            raise ValueError("there is nothing to record: no benchmark was run")
        name = f"{date.today().isoformat()}-{machine_slug()}{'-full' if self.full else ''}.json"
        content = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), **asdict(self)}
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / (name + ".part")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        return draft.replace(folder / name)


def machine() -> dict[str, object]:
    """The processor, its cores and those used, the memory, and the GPU if there is one."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(total_bytes() / MB / 1000, 1),
        "available_gb": round(available_bytes() / MB / 1000, 1),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def machine_slug() -> str:
    """The machine in a file name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    words = f"{_cpu()} {os.cpu_count()} cores" if gpu is None else gpu
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions() -> dict[str, str]:
    """Python, the libraries under measurement, and the commit of this checkout."""
    libraries = {name: version(name) for name in ("torch", "transformers", "pytest-benchmark")}
    return {"python": platform.python_version(), **libraries, "mamlfast": mamlfast.__version__, "commit": _commit()}


def _commit():
    """The commit, marked where the sources differ from it; results recorded earlier do not count as sources."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = [*git, "status", "--porcelain", "--", ".", ":!bench/results"]
        dirty = subprocess.run(changes, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if dirty else "")


def _cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _time_lines(times):
    for setting in dict.fromkeys(t.setting for t in times):
        yield f"time: {setting}"
        yield f"  {'':32}{'median s':>9}{'range':>15}{'x first order':>15}{'limit':>7}{'x limit':>9}{'error':>10}"
        for t in (t for t in times if t.setting == setting):
            spread = f"{min(t.seconds):.3f}-{max(t.seconds):.3f}"
            yield (
                f"  {_listed(t.contender, t.exact):32}{t.median:9.3f}{spread:>15}{t.ratio:15.2f}{t.limit:7.2f}"
                f"{t.over_limit:9.2f}{t.error:10.1e}"
            )
        yield ""


def _listed(contender, exact):
    return contender if exact else f"{contender} (not exact)"


def _peak_lines(peaks):
    for setting in dict.fromkeys(p.setting for p in peaks):
        here = [p for p in peaks if p.setting == setting]
        yield f"peak memory above a model of {here[0].model_mb:,.0f} MB: {setting}"
        yield from (f"  {p.contender:32}{p.shown:>12}" for p in here)
        yield ""


def _target_lines(targets):
    return [f"{claim}: {found}" for claim, found in targets.items()]
