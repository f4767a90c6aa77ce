"""Matrix products on the CPU, from whichever of PyTorch's libraries is the faster one on this machine.

PyTorch's wheels hold two for x86: MKL, behind ``@``, and oneDNN, behind an operator of its own. On Intel processors
they are equal within a few percent; on AMD's MKL takes slower paths, and oneDNN was measured up to twice as fast in
float32. The first large product measures both, once in a process, and oneDNN is taken where it is faster by a quarter:
a margin that noise does not cross, so that runs on one machine agree bit by bit. The operator has no derivative, which
suits the inside of a Rule.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_log = logging.getLogger("mamlfast")

LIBRARIES = ("mkl", "onednn")
# Multiplications below which the choice does not matter, and is not made.
LARGE = 1 << 20
MARGIN = 1.25
_forced: list[str] = []


@contextmanager
def use_matrix_products(library: str) -> Iterator[None]:
    """Take float32 products of Rules on the CPU from ``library``, "mkl" or "onednn", inside the block, in all threads.

    Raises ValueError for another name, or where this PyTorch has no oneDNN.
    """
    if library not in LIBRARIES:
        raise ValueError(f"the library must be one of {', '.join(LIBRARIES)}; got {library!r}")
    if library == "onednn" and not _has_onednn():
        raise ValueError("this PyTorch was built without oneDNN; use mkl")
    _forced.append(library)
    try:
        yield
    finally:
        _forced.pop()


def matrix_library() -> str:
    """Return the library in use for large float32 products on the CPU, after measuring it at the first call."""
    return _forced[-1] if _forced else _faster()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` [N, M] of matrices a [N, K] and b [K, M], each contiguous or the transpose of one that is."""
    return _onednn(a, b) if _suits(a, b) else a @ b


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out + a b``; ``out`` may be overwritten."""
    if not _suits(a, b):
        return out.addmm_(a, b)
    return torch.ops.mkldnn._linear_pointwise.binary(a, out, b.mT, None, "add")


def _onednn(a, b):
    return torch.ops.mkldnn._linear_pointwise.default(a, b.mT, None, "none", [], "")


def _suits(a, b):
    plain = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and a.ndim == b.ndim == 2
    return plain and a.numel() * b.shape[1] >= LARGE and matrix_library() == "onednn"


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _faster() -> str:
    if not _has_onednn():
        return "mkl"
    ratio = speedup()
    library = "onednn" if ratio >= MARGIN else "mkl"
    _log.debug("matrix products: %s (oneDNN is %.2f times as fast as MKL here)", library, ratio)
    return library


def speedup(size: int = 512, rounds: int = 5) -> float:
    """Return how many times as fast oneDNN multiplies [size, size] matrices as MKL does: of each its best round."""
    with torch.no_grad():
        a, b = torch.ones(size, size), torch.ones(size, size)
        runs: list[Callable[[], Tensor]] = [lambda: a @ b.mT, lambda: _onednn(a, b.mT)]
        best = [float("inf")] * 2
        for _ in range(rounds + 1):  # the best round is not the first, which sets things up
            for i, run in enumerate(runs):
                begin = time.perf_counter()
                run()
                best[i] = min(best[i], time.perf_counter() - begin)
    return best[0] / best[1]
