"""What all tests share: an interpreter for Triton, uninitialised memory that shows, shared input."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton reads it when a kernel is decorated, so it stands before any import of one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# Test tensors are tiny: a second thread costs more than it brings, and very much where another process has its core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan() -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def shared() -> Path:
    """The folder of models and data beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared, which is not here")
    return folder
