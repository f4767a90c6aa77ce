"""Which room of an op answers: its Triton kernels, its C++ kernels, or its eager formulas.

Every op has eager formulas. Triton serves CUDA tensors, C++ ("native") serves float32 and float64 tensors on
the CPU, and an op says which of the two it has for the arguments at hand. Left alone, the fastest of these
answers; ``use_backend`` insists on one, and then anything that this one cannot serve is an error, so that a
measurement or a test never runs on something else.
"""

import functools
import importlib.util
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mamlfast import native

BACKENDS = ("triton", "native", "eager")

# One for the whole process and not one a thread or context: autograd runs the backward pass of a CUDA graph
# on threads of its own, which inherit neither.
_forced: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every op answer from the room ``name`` inside the ``with`` block, in all threads.

    ``name`` is "triton" (on CPU tensors only under ``TRITON_INTERPRET=1``), "native" or "eager".
    Raises ``ValueError`` for another name here, and in the op when the room cannot serve its tensors.
    """
    if name not in BACKENDS:
        raise ValueError(f"the backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """Return the room that ``use_backend`` insists on, None if it does not."""
    return _forced[-1] if _forced else None


def backend_for(*tensors: Tensor, rooms: Collection[str] = BACKENDS) -> str:
    """Return the room that serves an op on these tensors: "triton", "native" or "eager".

    ``rooms`` are those in which the op has kernels for these very arguments; "eager" it always has.
    Raises ``ValueError`` if ``use_backend`` insists on a room that cannot serve them.
    """
    if _forced:
        _refuse_unless_served(_forced[-1], tensors, rooms)
        return _forced[-1]
    if "triton" in rooms and all(t.is_cuda for t in tensors) and _has_triton():
        return "triton"
    if "native" in rooms and serves_native(tensors) and native.available():
        return "native"
    return "eager"


def _refuse_unless_served(name: str, tensors: tuple[Tensor, ...], rooms: Collection[str]) -> None:
    if name == "eager":
        return
    reason = None
    if name not in rooms:
        reason = "the op has no such kernel for these shapes and dtypes"
    elif name == "triton" and not _has_triton():
        reason = "Triton is not installed"
    elif name == "triton" and not _interpreting() and not all(t.is_cuda for t in tensors):
        reason = "Triton needs CUDA tensors, or TRITON_INTERPRET=1 in the environment before it is imported"
    elif name == "native" and not serves_native(tensors):
        reason = "the C++ kernels need float32 or float64 tensors on the CPU"
    elif name == "native" and not native.available():
        reason = "the C++ kernels are not built"
    if reason is not None:
        kinds = sorted({f"{t.device.type} {str(t.dtype).removeprefix('torch.')}" for t in tensors})
        raise ValueError(
            f"use_backend({name!r}) cannot serve {', '.join(kinds)} tensors here: {reason}; "
            f"leave the with block, or force another of {', '.join(BACKENDS)}"
        )


def serves_native(tensors: Sequence[Tensor]) -> bool:
    """Return whether the C++ kernels take tensors of this kind: float32 or float64, on the CPU."""
    return all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) for t in tensors)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
