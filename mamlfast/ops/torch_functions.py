"""PyTorch's functions, said in Rules.

``ANSWERS[name]`` takes the arguments of the torch function of that name (``torch.name``, ``Tensor.name`` and
``torch.nn.functional.name`` alike) and calls Rules instead, or returns NotImplemented where its options go beyond
them. ``Dual`` consults the table for every torch function it meets, so a module that knows nothing of Rules runs on
them. An operation without an entry is still exact: it gets a derived rule.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamlfast.ops import elementwise
from mamlfast.ops.attention import attention
from mamlfast.ops.cross_entropy import cross_entropy
from mamlfast.ops.layer_norm import layer_norm
from mamlfast.ops.linear import linear, matmul, mul
from mamlfast.ops.rms_norm import rms_norm
from mamlfast.ops.softmax import log_softmax, softmax

Answer = Callable[..., Any]


def _linear(input, weight, bias=None):
    return linear(input, weight) if bias is None else linear(input, weight, bias)


def _matmul(a, b, *, out=None):
    if a.ndim < 2 or b.ndim < 2:
        return NotImplemented
    return matmul(a, b)


def _addmm(input, a, b, *, beta=1, alpha=1):
    if alpha != 1 or beta != 1 or input.ndim != 1:
        return NotImplemented
    return linear(a, b.mT, input)


def _mul(a, b):
    """Only a product of two tensors of one dtype is the Rule's: a number or a promotion is linear or derived."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dtype != b.dtype:
        return NotImplemented
    return mul(a, b)


def _power(base, exponent):
    if isinstance(exponent, (int, float)) and exponent == int(exponent) and exponent >= 2:
        return elementwise.power(base, exponent=int(exponent))
    return NotImplemented


def _square(input):
    return elementwise.power(input, exponent=2)


def _gelu(input, approximate="none"):
    return elementwise.gelu(input) if approximate == "none" else elementwise.gelu_tanh(input)


def _unless_inplace(rule):
    def answer(input, inplace=False):
        return NotImplemented if inplace else rule(input)

    return answer


def _unary(rule):
    def answer(input):
        return rule(input)

    return answer


def _over_dim(rule):
    def answer(input, dim=None, _stacklevel=3, dtype=None):
        if dim is None or isinstance(_stacklevel, torch.dtype):
            return NotImplemented
        return rule(input if dtype is None else input.to(dtype), dim=dim)

    return answer


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    if len(normalized_shape) != 1:
        return NotImplemented
    weight = input.new_ones(normalized_shape) if weight is None else weight
    bias = input.new_zeros(normalized_shape) if bias is None else bias
    return layer_norm(input, weight, bias, eps=eps)


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    """Only where the Rule rounds as PyTorch does: it casts to a half type before the weight, PyTorch after."""
    if len(normalized_shape) != 1 or input.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    weight = input.new_ones(normalized_shape) if weight is None else weight
    return rms_norm(input, weight, eps=torch.finfo(input.dtype).eps if eps is None else eps)


def _cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    legacy = size_average is not None or reduce is not None
    if input.ndim != 2 or target.is_floating_point() or weight is not None or legacy:
        return NotImplemented
    return cross_entropy(
        input, target=target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """``F.scaled_dot_product_attention`` in Rules."""
    plain_mask = attn_mask is None or type(attn_mask) is Tensor and not attn_mask.requires_grad
    if not plain_mask or query.ndim != 4 or key.shape[0] != query.shape[0]:
        return NotImplemented
    if key.shape[1] != query.shape[1] and not enable_gqa:
        return NotImplemented
    return attention(query, key, value, mask=attn_mask, causal=is_causal, scale=scale, dropout=dropout_p)


ANSWERS: dict[str, Answer] = {
    "linear": _linear,
    "matmul": _matmul,
    "rmatmul": lambda a, b: _matmul(b, a),
    "bmm": _matmul,
    "addmm": _addmm,
    "mul": _mul,
    "multiply": _mul,
    "rmul": _mul,
    "pow": _power,
    "square": _square,
    "gelu": _gelu,
    "silu": _unless_inplace(elementwise.silu),
    "relu": _unless_inplace(elementwise.relu),
    "tanh": _unary(elementwise.tanh),
    "sigmoid": _unary(elementwise.sigmoid),
    "exp": _unary(elementwise.exp),
    "rsqrt": _unary(elementwise.rsqrt),
    "softmax": _over_dim(softmax),
    "log_softmax": _over_dim(log_softmax),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "cross_entropy": _cross_entropy,
    "scaled_dot_product_attention": sdpa,
}
