"""The compiled extension: found, missing, broken, and faithful to torch's threads."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamlfast import native
from mamlfast.ops.backend import use_backend
from mamlfast.ops.rms_norm import rms_norm
from mamlfast.ops.softmax import softmax

needs_native = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")


@pytest.fixture
def fresh(monkeypatch):
    """``available`` as a new process would see it."""
    native.available.cache_clear()
    yield
    native.available.cache_clear()


def test_a_missing_library_is_told_in_one_line_once_and_costs_no_error(fresh, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with caplog.at_level(logging.WARNING, "mamlfast"):
        assert not native.available()
        assert not native.available()
        torch.testing.assert_close(rms_norm(torch.ones(2, 3), torch.ones(3)), torch.ones(2, 3))
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert f"no _C*.so in {tmp_path}" in message
    assert "slower eager path" in message
    assert "pip install --no-build-isolation" in message


def test_a_broken_library_is_told_and_not_raised(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    assert "_C.abi3.so could not be loaded" in str(native.load(tmp_path))


def test_importing_the_package_loads_no_library():
    code = "import torch, mamlfast.native; print(hasattr(torch.ops.mamlfast, 'rms_norm_fwd'))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


@pytest.fixture
def threads():
    """Sets the number of torch's threads and restores it."""
    was = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(was)


@needs_native
def test_results_are_the_same_bits_on_any_number_of_threads(threads):
    torch.manual_seed(0)
    x, y_bar, w = torch.randn(1000, 63), torch.randn(1000, 63), torch.randn(63)
    scores = torch.randn(165, 257)
    results = []
    for count in (1, 2, 3):
        threads(count)
        with use_backend("native"):
            results.append((*rms_norm.bwd((x, w), (), y_bar, (True, True)), softmax.fwd((scores,))[0]))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def _sample(dtype):
    """Results that pass through every kind of loop: sums, exponentials, remainders of odd length."""
    generator = torch.Generator().manual_seed(0)
    x, y_bar = (torch.randn(50, 999, generator=generator, dtype=dtype) for _ in range(2))
    scores = torch.randn(10, 999, generator=generator, dtype=dtype)
    return *rms_norm.bwd((x, y_bar[0]), (), y_bar, (True, True)), softmax.fwd((scores,))[0]


@needs_native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_computes_the_same(capability, tmp_path):
    code = (
        "import runpy, sys, torch; sample = runpy.run_path(sys.argv[1])['_sample']; "
        "torch.save([sample(torch.float32), sample(torch.float64)], sys.argv[2])"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    file = tmp_path / "results"
    subprocess.run([sys.executable, "-c", code, __file__, file], check=True, cwd=root, env=environment)
    single, double = torch.load(file)
    torch.testing.assert_close(double, _sample(torch.float64), rtol=1e-13, atol=1e-13)
    # Sums of 999 terms in another order.
    torch.testing.assert_close(single, _sample(torch.float32), rtol=1e-5, atol=1e-5)
    if capability.upper() != torch.backends.cpu.get_cpu_capability():
        assert not all(map(torch.equal, single, _sample(torch.float32))), "the variable had no effect"


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 5, dtype=torch.float16)}, "float32 or float64 expected"),
        ({"w": torch.ones(5, dtype=torch.float64)}, "w: the dtype of the first argument expected"),
        ({"y": torch.ones(3, 4)}, "y: 15 elements expected, got 12"),
        ({"y": torch.ones(5, 3).mT}, "y: a contiguous CPU tensor expected"),
        ({"x_dot": torch.ones(3, 5)}, "x_dot, w_dot and y_dot expected together"),
    ],
    ids=["dtype", "mixed", "size", "strides", "tangents"],
)
def test_an_operator_called_by_hand_checks_its_tensors(change, message):
    arguments = {
        "x": torch.ones(3, 5),
        "w": torch.ones(5),
        "x_dot": None,
        "w_dot": None,
        "y": torch.ones(3, 5),
        "y_dot": None,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mamlfast.rms_norm_fwd(*(arguments | change).values(), 1e-6, 0.0)
