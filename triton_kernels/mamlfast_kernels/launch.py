"""What the launchers of several kernels ask before they launch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _nothing_kernel():
    pass


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter and not on a GPU."""
    return not isinstance(_nothing_kernel, triton.JITFunction)


def prepared(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors as kernels read them: contiguous, and None where there is none."""
    # The interpreter computes with the bits of bfloat16 as if they were integers.
    widen = interpreted()
    return tuple(
        None if t is None else (t.float() if widen and t.dtype == torch.bfloat16 else t).contiguous() for t in tensors
    )


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic and of row statistics: float32, or float64 for float64 ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Any:
    """Return that dtype as kernels call it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def row_options(x: Tensor, has_tangent: bool) -> dict[str, Any]:
    """Return the constants of a kernel that holds a row of ``x`` in registers: 16 elements a thread, up to 8192."""
    block_d = triton.next_power_of_2(x.shape[-1])
    return {
        "WIDE": wide(x),
        "HAS_TANGENT": has_tangent,
        "BLOCK_D": block_d,
        "num_warps": min(max(block_d // 512, 1), 16),
    }
