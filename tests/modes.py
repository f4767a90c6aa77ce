"""What the tests of modes share: operations with the plain ones they stand for, and the derivatives asked of them.

The losses have a second path to the inputs, where a first-order backward is wrong in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor
from torch.func import grad, jvp

from mamlfast.ops import attention_rule, cross_entropy, derived_rule, layer_norm, linear, rms_norm, silu, softmax
from mamlfast.ops.linear import matmul, mul

TARGET = torch.tensor([2, -100, 0, 6])
KEY_MASK = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])
SPEC = AttentionSpec(scale=0.5, causal=True, offset=2, softcap=3.0, key_mask=KEY_MASK)


@dataclass(frozen=True)
class Case:
    """An operation, what it should be, and the shapes of its operands."""

    op: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]


def plain_layer_norm(x, w, b):
    """``torch.func.hessian`` and two other modes get ``F.layer_norm`` wrong, so it is no oracle."""
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-5) * w + b


def plain_swiglu(a, b):
    return a * torch.sigmoid(a) * b


def of_rule(rule, shapes, oracle=None, **options):
    return Case(partial(rule, **options), partial(oracle or rule.reference, **options), shapes)


SWIGLU = derived_rule("swiglu", lambda a, b: F.silu(a) * b)
Q, K, V = (2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 3)
CASES = {
    "linear": of_rule(linear, [(3, 5), (4, 5), (4,)]),
    "matmul": of_rule(matmul, [(2, 3, 5), (2, 5, 4)]),
    "mul": of_rule(mul, [(3, 1), (3, 5)]),
    "softmax": of_rule(softmax, [(3, 5)]),
    "silu": of_rule(silu, [(3, 5)], oracle=lambda x: x * torch.sigmoid(x)),
    "layer_norm": of_rule(layer_norm, [(3, 5), (5,), (5,)], oracle=plain_layer_norm),
    "rms_norm": of_rule(rms_norm, [(3, 5), (5,)]),
    "cross_entropy": of_rule(cross_entropy, [(4, 7)], target=TARGET),
    "attention": of_rule(attention_rule, [Q, K, V], spec=SPEC),
    "attention-sinks": of_rule(attention_rule, [Q, K, V, (4,)], spec=SPEC),
    "derived": of_rule(SWIGLU, [(3, 5), (3, 5)], oracle=plain_swiglu),
}
N = 3


def draw(case, mapped=False):
    """Return the operands and a tangent for each, with a dimension of size N in front if they are to be mapped."""
    torch.manual_seed(0)
    shapes = [(N, *shape) if mapped else shape for shape in case.shapes]
    return tuple(tuple(torch.randn(s, dtype=torch.float64) for s in shapes) for _ in range(2))


def loss_of(f):
    return lambda *xs: f(*xs).sin().sum() + sum(x.pow(3).sum() for x in xs)


def everything(xs):
    return tuple(range(len(xs)))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def gradient_of(f, xs, v):
    return grad(loss_of(f), everything(xs))(*xs)


def directional_of(f, xs, v):
    return jvp(loss_of(f), xs, v)[1]


def hvp_of(f, xs, v):
    return jvp(grad(loss_of(f), everything(xs)), xs, v)[1]


def leaves(xs):
    return tuple(x.clone().requires_grad_() for x in xs)


def double_backward(f, xs, v):
    xs = leaves(xs)
    g = torch.autograd.grad(loss_of(f)(*xs), xs, create_graph=True)
    return torch.autograd.grad(g, xs, v)


def grad_of_jvp(f, xs, v):
    return grad(lambda *xs: jvp(loss_of(f), xs, v)[1], everything(xs))(*xs)
