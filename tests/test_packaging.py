"""What an installation brings: two import packages, the sources of the kernels, and no surprises."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["mamlfast", "triton_kernels", "csrc", "tests", "bench", "pyproject.toml", "setup.py"]
SOURCES += ["MANIFEST.in", "README.md", "LICENSE"]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, for a build leaves files behind and takes in those that earlier ones left."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    litter = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=litter)
        elif path.exists():
            shutil.copy(path, copy / name)
    return copy


def _build(checkout, kind, **environment):
    """Build with setuptools itself and return the archive."""
    hook = f"from setuptools.build_meta import build_{kind} as build; build('dist')"
    done = subprocess.run(
        [sys.executable, "-c", hook],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (checkout / "dist").iterdir()
    return archive, done.stdout + done.stderr


def _top_level(names):
    return {name.split("/")[0] for name in names if ".dist-info/" not in name}


def test_the_wheel_holds_the_two_packages_and_nothing_else(checkout):
    wheel, _ = _build(checkout, "wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert _top_level(names) == {"mamlfast", "mamlfast_kernels"}
    assert "mamlfast_kernels/rms_norm.py" in names
    assert "mamlfast/ops/rms_norm.py" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    if shutil.which("g++"):
        assert "mamlfast/_C.abi3.so" in names
        assert "-cp311-abi3-" in wheel.name


def test_without_a_compiler_the_wheel_is_pure_python_and_the_build_says_so(checkout):
    wheel, output = _build(checkout, "wheel", CXX="no-such-compiler", CC="no-such-compiler")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert _top_level(names) == {"mamlfast", "mamlfast_kernels"}
    assert not any(name.endswith(".so") for name in names)
    assert "mamlfast._C" in output


def test_without_torch_the_build_is_pure_python_and_says_so(checkout):
    (checkout / "setup.py").write_text(
        "import importlib.util\nfind_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find_spec(name, *a)\n"
        + (checkout / "setup.py").read_text()
    )
    wheel, output = _build(checkout, "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "building without the C++ kernels" in output


def test_the_source_distribution_holds_what_the_extension_is_built_from(checkout):
    sdist, _ = _build(checkout, "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert "triton_kernels/mamlfast_kernels/rms_norm.py" in names
