"""Fixtures of the tests of ops: one room after the other, and torch's threads."""

from collections.abc import Callable, Iterator

import pytest
import torch

from mamlfast import native
from mamlfast.ops.backend import use_backend


def _skip_unless_served(name: str) -> None:
    if name == "native" and not native.available():
        pytest.skip("the C++ kernels are not built")
    if name == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter stands in for the GPU only where there is none")


@pytest.fixture(params=["eager", "native", "triton"])
def room(request) -> Iterator[str]:
    """Each room in turn, and nothing but it."""
    _skip_unless_served(request.param)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def in_native() -> Iterator[None]:
    """Nothing but the C++ kernels."""
    _skip_unless_served("native")
    with use_backend("native"):
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads and restores it."""
    was = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(was)
