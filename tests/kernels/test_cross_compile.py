"""The Triton kernels compile for GPUs that are not here, within registers, without spills and traps."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("cross_compile.py")
KERNELS = Path(__file__).parents[2] / "triton_kernels"
ARCHS = [80, 90, 100]
RMS_NORM = {
    "_rms_norm_fwd_kernel": (["D"], ["x_dot_ptr", "w_dot_ptr", "y_dot_ptr"]),
    "_rms_norm_bwd_kernel": (
        ["R", "D"],
        ["x_dot_ptr", "w_dot_ptr", "y_bar_dot_ptr", "x_bar_dot_ptr", "w_bar_dot_ptr"],
    ),
}


def _costs(kernel, has_tangent, D, num_warps, archs):
    integers, tangents = RMS_NORM[kernel]
    request = {
        "module": "mamlfast_kernels.rms_norm",
        "kernel": kernel,
        "constants": {
            "EPS": 1e-6,
            "OFFSET": 0.0,
            "WIDE": "float32",
            "HAS_TANGENT": has_tangent,
            "BLOCK_D": D,
        },
        "integers": integers,
        "absent": [] if has_tangent else tangents,
        "dtype": "bf16",
        "wide": "fp32",
        "wide_pointers": ["w_bar_ptr", "w_bar_dot_ptr"],
        "num_warps": num_warps,
        "archs": archs,
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(KERNELS)
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(request)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Registers a thread as Triton 3.6.0 and 3.7.1 allot them (38, 96, 122, 222 at most), and a tenth more for
# other versions.
@pytest.mark.parametrize(
    ("kernel", "has_tangent", "max_registers"),
    [
        ("_rms_norm_fwd_kernel", False, 42),
        ("_rms_norm_fwd_kernel", True, 106),
        ("_rms_norm_bwd_kernel", False, 134),
        ("_rms_norm_bwd_kernel", True, 244),
    ],
)
def test_rms_norm_of_4096_columns_fits_into_registers_on_three_generations(
    kernel, has_tangent, max_registers
):
    costs = _costs(kernel, has_tangent, D=4096, num_warps=8, archs=ARCHS)
    assert sorted(costs) == sorted(map(str, ARCHS))
    for arch, cost in costs.items():
        assert not cost["trap"], f"sm_{arch}: {cost}"
        assert cost["stack"] == 0, f"sm_{arch} spills: {cost}"
        assert cost["registers"] <= max_registers, f"sm_{arch}: {cost}"
        assert cost["shared"] <= 48 << 10, f"sm_{arch}: {cost}"


def test_spills_are_seen_where_there_are_some():
    """The check above can fail: twice the columns on as many threads do not fit into 255 registers."""
    (cost,) = _costs("_rms_norm_bwd_kernel", True, D=8192, num_warps=8, archs=[90]).values()
    assert cost["stack"] > 0
