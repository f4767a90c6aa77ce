"""The fastest forward and first backward there is: other people's kernels, where they compute the very same thing.

A fused attention kernel that hands out its log-sum-exp is half a Rule: its forward saves what our second-order
functions need, and its backward is the first backward. The other half is ours, always. Candidates, in order:

* ``flash-attn``: the package of that name (Dao, 2023, arXiv:2307.08691), version 2, on CUDA in 16-bit types.
* ``torch``: PyTorch's own FlashAttention, on CUDA in 16-bit types, and on the CPU where our C++ kernels are not built
  or do not take the dtype.

No GPU has run the two for CUDA from here. Their backward adds in the order of arrival unless
``torch.use_deterministic_algorithms`` asks for a fixed one.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor

from mamlfast import native
from mamlfast.ops.backend import forced_backend, serves_native

Operands = tuple[Tensor, ...]  # q, k, v


@dataclass(frozen=True, kw_only=True)
class FirstOrderKernel:
    """``fwd(q, k, v, spec) -> o, lse``, ``bwd(q, k, v, o, lse, o_bar, spec) -> q_bar, k_bar, v_bar``, and for what.

    ``refuses`` says in words why it cannot serve a call, None where it can.
    """

    name: str
    refuses: Callable[[Operands, AttentionSpec], str | None]
    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., Operands]


_forced: list[str] = []


@contextmanager
def use_first_order_attention(name: str) -> Iterator[None]:
    """Answer forward and first backward of attention from ``name`` inside the block, in all threads.

    ``name`` is "flash-attn", "torch" or "ours". Raises ValueError for another name here, and in the op where that
    kernel cannot serve a call.
    """
    names = ["ours", *dict.fromkeys(kernel.name for kernel in KERNELS)]
    if name not in names:
        raise ValueError(f"the kernel must be one of {', '.join(names)}; got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def kernel_for(xs: Operands, spec: AttentionSpec) -> FirstOrderKernel | None:
    """Return the kernel that serves the call, None for ours. Raises ValueError where the forced one cannot."""
    if _forced:
        return None if _forced[-1] == "ours" else _insisted(_forced[-1], xs, spec)
    if forced_backend() is not None or _has_native(xs):
        return None
    return next((kernel for kernel in KERNELS if kernel.refuses(xs, spec) is None), None)


def _has_native(xs):
    """Our own C++ kernels are faster than PyTorch's in both directions."""
    return serves_native(xs) and native.available()


def _insisted(name, xs, spec):
    reasons = []
    for kernel in KERNELS:
        if kernel.name == name:
            reason = kernel.refuses(xs, spec)
            if reason is None:
                return kernel
            reasons.append(reason)
    raise ValueError(f"{name} cannot serve this attention: {'; '.join(reasons)}; leave the with block or force ours")


def _refuses_but_causal(xs: Operands, spec: AttentionSpec) -> str | None:
    """What neither kernel of PyTorch has."""
    q, k, v = xs
    if spec.segments is not None or spec.key_mask is not None or spec.mask is not None:
        return "it takes no masks or segments"
    if spec.dropout or spec.softcap is not None or spec.window != (None, None):
        return "it has no dropout we could repeat, soft-cap or window"
    if spec.offset or (spec.causal and q.shape[2] != k.shape[2]):
        return "it is causal for as many queries as keys only"
    if 0 in (*q.shape, *k.shape) or spec.scale <= 0 or q.shape[-1] != v.shape[-1]:
        return "it needs tokens, a positive scale and one head dimension"
    return None


def _refuses_cuda(xs: Sequence[Tensor]) -> str | None:
    q = xs[0]
    if not q.is_cuda or torch.version.hip or q.dtype not in (torch.float16, torch.bfloat16):
        return "it needs CUDA tensors of a 16-bit type"
    if torch.cuda.get_device_capability(q.device) < (8, 0) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return "it needs compute capability 8.0 and a head dimension divisible by 8, at most 256"
    return None


def _torch_cpu_refuses(xs, spec):
    if any(x.device.type != "cpu" for x in xs):
        return "it needs CPU tensors"
    return _refuses_but_causal(xs, spec)


def _torch_cpu_fwd(q, k, v, spec):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, spec.causal, scale=spec.scale)


def _torch_cpu_bwd(q, k, v, o, lse, o_bar, spec):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(o_bar, q, k, v, o, lse, 0.0, spec.causal, scale=spec.scale)


def _torch_cuda_refuses(xs, spec):
    q, k, _ = xs
    if q.shape[1] != k.shape[1]:
        return "it takes as many key heads as query heads"
    return _refuses_cuda(xs) or _refuses_but_causal(xs, spec)


def _torch_cuda_fwd(q, k, v, spec):
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, spec.causal, scale=spec.scale)
    return o, lse


def _torch_cuda_bwd(q, k, v, o, lse, o_bar, spec):
    # The lengths of packed sequences and the state of dropout are of no use to a dense call without it.
    none, state = q.new_empty(0, dtype=torch.int32), q.new_zeros(2, dtype=torch.uint64)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    T, S = q.shape[2], k.shape[2]
    return backward(
        o_bar, q, k, v, o, lse, none, none, T, S, 0.0, spec.causal, state, state.new_empty(0), scale=spec.scale
    )


def _flash_attn_refuses(xs, spec):
    q, k, v = xs
    if not _has_flash_attn():
        return "the package flash-attn is not installed"
    if spec.segments is not None or spec.key_mask is not None or spec.mask is not None or spec.dropout:
        return "masks, segments and dropout that can be repeated are not its own"
    if _is_local(spec) and (spec.offset != k.shape[2] - q.shape[2] or spec.offset < 0):
        return "its queries stand at the end of the keys, which are as many at least"
    if 0 in (*q.shape, *k.shape) or spec.scale <= 0 or q.shape[-1] != v.shape[-1]:
        return "it needs tokens, a positive scale and one head dimension"
    return _refuses_cuda(xs)


def _is_local(spec):
    return spec.causal or spec.window != (None, None)


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash_attn_window(spec):
    left, right = spec.window
    right = 0 if spec.causal else right
    return -1 if left is None else left, -1 if right is None else right


def _flash_attn_fwd(q, k, v, spec):
    from flash_attn.flash_attn_interface import _flash_attn_forward  # pyright: ignore[reportMissingImports]

    left, right = _flash_attn_window(spec)
    o, lse, *_ = _flash_attn_forward(
        *(x.transpose(1, 2) for x in (q, k, v)), 0.0, spec.scale, causal=spec.causal, window_size_left=left,
        window_size_right=right, softcap=spec.softcap or 0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return o.transpose(1, 2), lse


def _flash_attn_bwd(q, k, v, o, lse, o_bar, spec):
    from flash_attn.flash_attn_interface import _flash_attn_backward  # pyright: ignore[reportMissingImports]

    left, right = _flash_attn_window(spec)
    bars = [torch.empty_like(x.transpose(1, 2)) for x in (q, k, v)]
    q, k, v, o, o_bar = (x.transpose(1, 2) for x in (q, k, v, o, o_bar))
    _flash_attn_backward(
        o_bar, q, k, v, o, lse, *bars, 0.0, spec.scale, spec.causal, left, right, spec.softcap or 0.0, None,
        torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in bars)


KERNELS = (
    FirstOrderKernel(name="flash-attn", refuses=_flash_attn_refuses, fwd=_flash_attn_fwd, bwd=_flash_attn_bwd),
    FirstOrderKernel(name="torch", refuses=_torch_cuda_refuses, fwd=_torch_cuda_fwd, bwd=_torch_cuda_bwd),
    FirstOrderKernel(name="torch", refuses=_torch_cpu_refuses, fwd=_torch_cpu_fwd, bwd=_torch_cpu_bwd),
)
