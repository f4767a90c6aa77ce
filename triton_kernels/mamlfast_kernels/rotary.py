"""Rotary position embedding and its transpose on GPUs; the mathematics stands in ``mamlfast/ops/rotary.py``, in the
same names.

A program turns BLOCK_T tokens of one head, wherever strides put them. Products and sum are rounded each to the dtype of
x, as eager PyTorch rounds them; a float32 or float64 product may be fused with the sum by the compiler. In Triton's
interpreter the kernel agrees with torch.func, and it compiles for sm_80, sm_90 and sm_100 without spills. No GPU has
run it yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlfast_kernels.launch import interpreted, wide

# Elements of a tile: 8 pairs a thread on 4 warps.
TILE, NUM_WARPS = 2048, 4


@triton.jit
def _rotary_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr,  # (B, H, T, D) twice, (B or 1, T, N) twice
    x_b, x_h, x_t, y_b, y_h, y_t, table_b,  # strides
    H, T,
    N: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    x_at, y_at = x_ptr + b * x_b + h * x_h + t * x_t, y_ptr + b * y_b + h * y_h + t * y_t
    angle = b * table_b + t * N

    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    one = 2 * pair if INTERLEAVED else pair
    two = one + 1 if INTERLEAVED else one + N // 2
    mask = (t < T) & (pair < N // 2)
    half = x_ptr.dtype.element_ty
    x_1 = tl.load(x_at + one, mask, 0.0).to(WIDE)
    x_2 = tl.load(x_at + two, mask, 0.0).to(WIDE)
    cos_1 = tl.load(cos_ptr + angle + one, mask, 0.0).to(WIDE)
    cos_2 = tl.load(cos_ptr + angle + two, mask, 0.0).to(WIDE)
    sin_1 = tl.load(sin_ptr + angle + one, mask, 0.0).to(WIDE)
    sin_2 = tl.load(sin_ptr + angle + two, mask, 0.0).to(WIDE)
    turned_1 = (x_2 * sin_2).to(half).to(WIDE) if TRANSPOSED else -(x_2 * sin_1).to(half).to(WIDE)
    turned_2 = -(x_1 * sin_1).to(half).to(WIDE) if TRANSPOSED else (x_1 * sin_2).to(half).to(WIDE)
    tl.store(y_at + one, (x_1 * cos_1).to(half).to(WIDE) + turned_1, mask)
    tl.store(y_at + two, (x_2 * cos_2).to(half).to(WIDE) + turned_2, mask)

    if N < D:
        rest = N + tl.arange(0, BLOCK_REST)[None, :]
        mask = (t < T) & (rest < D)
        tl.store(y_at + rest, tl.load(x_at + rest, mask, 0.0), mask)


def rotary_rotate(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, transposed: bool) -> None:
    """Write the rotation of x, or its transpose, into y.

    x and y [B, H, T, D], y with the stride 1 along D; cos and sin [B or 1, T, N]; one dtype, nothing empty.
    """
    B, H, T, D = x.shape
    N = cos.shape[-1]
    # The interpreter computes with the bits of bfloat16 as if they were integers.
    narrow = interpreted() and x.dtype == torch.bfloat16
    x, cos, sin = (t.float() if narrow else t for t in (x, cos, sin))
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(y, dtype=torch.float32) if narrow else y
    block_pairs = triton.next_power_of_2(N // 2)
    block_t = max(1, min(TILE // (2 * block_pairs), triton.next_power_of_2(T)))
    sizes = {"table_b": 0 if cos.shape[0] == 1 else T * N, "H": H, "T": T, "N": N, "D": D}
    blocks = {"BLOCK_T": block_t, "BLOCK_PAIRS": block_pairs, "BLOCK_REST": triton.next_power_of_2(max(D - N, 1))}
    with torch.cuda.device_of(x):
        _rotary_kernel[(B * H * triton.cdiv(T, block_t),)](
            x, out, cos.contiguous(), sin.contiguous(),
            **_strides("x", x), **_strides("y", out), **sizes, **blocks,
            INTERLEAVED=interleaved, TRANSPOSED=transposed, **{"WIDE": wide(x), "num_warps": NUM_WARPS},
        )  # fmt: skip
    if narrow:
        y.copy_(out)


def _strides(name: str, t: Tensor) -> dict[str, int]:
    return {f"{name}_{dim}": t.stride(i) for i, dim in enumerate("bht")}
