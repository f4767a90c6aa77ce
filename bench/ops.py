"""Each fused operation at the sizes of a decoder: against the same made of PyTorch's functions, and against the limit.

An operation is run the way the engine runs it: forward on duals, then backward to its operands and to the tangent of
the first one, an activation; tangents of weights are constants. ``composed`` is the operation as a model without a
fused module writes it, on the same duals; ``first_order`` is PyTorch's own function, forward and backward, and the
Rule's. Results are compared before anything is timed.

The limit of an operation that is bound by bandwidth is a copy of a tensor of its size, for the tensors that a fused
kernel has to move: a norm 5 forward and backward (2 + 3), a gated activation 8, a rotation 4, cross-entropy 3, each
twice with tangents. That of a product is the best rate of products of its shape: 3 of them, with tangents 8.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mamlfast
from bench.gate import WrongResult
from bench.models import TINY, Setting, Shape
from bench.timing import race
from mamlfast import Dual, ops
from mamlfast.ops.matrix_products import product
from mamlfast.ops.rotary import rotary_reference

ROWS, WIDTH, FFN, VOCABULARY, HEAD = (1024, 2048), 512, 1376, 4096, 64
# Float32, sums over some thousands of numbers; a missing term is off by more than 1e-2.
THRESHOLD = 1e-4


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """``fused``, ``composed`` and ``plain`` take ``operands``, activations before weights, and compute the same.

    ``moved`` counts the tensors of the first operand's size that a first-order pass moves; 0 where products, three of
    ``operands[0]`` with ``operands[1]``, decide.
    """

    name: str
    fused: Callable[..., Tensor]
    composed: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    moved: int


@dataclass(frozen=True, kw_only=True)
class OpTime:
    """Best seconds of each way, the overhead of one call on tiny tensors, and the fraction of the limit's rate.

    ``rate`` is what the fused dual pass reaches and ``limit`` what can be had: GB/s, or GFLOP/s for products.
    """

    op: str
    dual_seconds: float
    composed_seconds: float
    first_order_seconds: float
    plain_seconds: float
    error: float
    unit: str
    rate: float
    limit: float

    @property
    def line(self) -> str:
        """The result for a table."""
        return (
            f"dual {1e3 * self.dual_seconds:.2f} ms, {self.composed_seconds / self.dual_seconds:.2f}x as fast as "
            f"composed; first order {1e3 * self.first_order_seconds:.2f} ms, "
            f"{self.plain_seconds / self.first_order_seconds:.2f}x as fast as PyTorch's; "
            f"{self.rate:.0f} of {self.limit:.0f} {self.unit} ({self.rate / self.limit:.0%})"
        )


def _rms_norm(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def _layer_norm(x, w, b):
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w + b


def _plain_layer_norm(x, w, b):
    return F.layer_norm(x, w.shape, w, b)


def _softmax(x):
    e = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _gelu(x):
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _silu(x):
    return x * torch.sigmoid(x)


def _cross_entropy(z, *, target):
    return (torch.logsumexp(z, -1) - z.gather(-1, target[:, None])[:, 0]).mean()


def cases(rows: int, width: int = WIDTH, ffn: int = FFN, vocabulary: int = VOCABULARY, head: int = HEAD):
    """Draw every operation, at sizes of a decoder unless told otherwise, as a list of OpCase."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x, a, b, z = draw(rows, width), draw(rows, ffn), draw(rows, ffn), draw(rows, vocabulary)
    w, bias, up, out = draw(width), draw(width), draw(ffn, width) / width**0.5, draw(vocabulary, width) / width**0.5
    q = draw(1, width // head, rows, head)
    angle = draw(1, rows, head // 2).repeat(1, 1, 2)
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    target = torch.randint(vocabulary, (rows,), generator=generator)
    plain_norm = partial(F.rms_norm, normalized_shape=(width,), eps=1e-6)
    rotated = partial(rotary_reference, **tables)

    def case(name, fused, composed, plain, operands, moved):
        return OpCase(name=name, fused=fused, composed=composed, plain=plain, operands=operands, moved=moved)

    return [
        case("rms_norm", ops.rms_norm, _rms_norm, lambda x, w: plain_norm(x, weight=w), (x, w), 5),
        case(
            "layer_norm", ops.layer_norm, _layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), (x, w, bias), 5
        ),
        case("softmax", ops.softmax, _softmax, partial(torch.softmax, dim=-1), (x,), 5),
        case("silu", ops.silu, _silu, F.silu, (a,), 5),
        case("gelu", ops.gelu, _gelu, F.gelu, (a,), 5),
        case("swiglu", ops.swiglu, lambda a, b: F.silu(a) * b, lambda a, b: F.silu(a) * b, (a, b), 8),
        case("geglu", ops.geglu, lambda a, b: F.gelu(a) * b, lambda a, b: F.gelu(a) * b, (a, b), 8),
        case("rotary", partial(ops.rotary, **tables), rotated, rotated, (q,), 4),
        case(
            "cross_entropy",
            partial(ops.cross_entropy, target=target),
            partial(_cross_entropy, target=target),
            partial(F.cross_entropy, target=target),
            (z,),
            3,
        ),
        case(
            "linear_cross_entropy",
            partial(ops.linear_cross_entropy, target=target),
            lambda x, w: F.cross_entropy(F.linear(x, w), target),
            lambda x, w: F.cross_entropy(F.linear(x, w), target),
            (x, out),
            0,
        ),
        case("linear", ops.linear, lambda x, w: x @ w.mT, F.linear, (x, up), 0),
    ]


def _activations(case):
    """How many operands are activations: those of the first one's shape."""
    return sum(x.shape == case.operands[0].shape for x in case.operands)


def dual_pass(f: Callable[..., Tensor], case: OpCase, xs_dot: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """y_dot and the cotangents of the operands and of the activations' tangents."""
    leaves = [x.detach().requires_grad_() for x in case.operands]
    n = _activations(case)
    leaves_dot = [t.detach().requires_grad_(i < n) for i, t in enumerate(xs_dot)]
    y = f(*(Dual(x, t) for x, t in zip(leaves, leaves_dot, strict=True)))
    assert isinstance(y, Dual)
    halves, cotangents = (y.tangent,), (torch.ones_like(y.tangent),)
    if y.ndim > 0:  # only of a loss the engine backpropagates the tangent alone
        halves, cotangents = (y.primal, y.tangent), (y.tangent.detach(), y.primal.detach())
    return y.tangent.detach(), *torch.autograd.grad(halves, [*leaves, *leaves_dot[:n]], cotangents)


def first_order_pass(f: Callable[..., Tensor], case: OpCase) -> tuple[Tensor, ...]:
    """y and the cotangents of the operands."""
    leaves = [x.detach().requires_grad_() for x in case.operands]
    y = f(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, y.detach())


def error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The relative error of the worst result, in 2-norms; infinite where one is not finite."""
    found = torch.stack([(g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)])
    return float(found.nan_to_num(nan=torch.inf).max())


def tangents(case: OpCase) -> tuple[Tensor, ...]:
    """A direction for every operand."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(x.shape, generator=generator) * x.std() for x in case.operands)


def checked(case: OpCase) -> float:
    """The error of the fused operation against the two others. Raises WrongResult where it is no rounding."""
    xs_dot = tangents(case)
    found = max(
        error(dual_pass(case.fused, case, xs_dot), dual_pass(case.composed, case, xs_dot)),
        error(first_order_pass(case.fused, case), first_order_pass(case.plain, case)),
    )
    if found > THRESHOLD:
        raise WrongResult(f"{case.name} is {found:.1e} off what PyTorch's functions give: it gets no number")
    return found


def measured(case: OpCase, rounds: int = 5) -> OpTime:
    """Check and time one operation. Raises WrongResult as ``checked`` does."""
    found, xs_dot = checked(case), tangents(case)
    ways = {
        "dual": lambda: dual_pass(case.fused, case, xs_dot),
        "composed": lambda: dual_pass(case.composed, case, xs_dot),
        "first": lambda: first_order_pass(case.fused, case),
        "plain": lambda: first_order_pass(case.plain, case),
        "limit": _copy(case) if case.moved else _product(case),
    }
    best = {name: min(s) for name, s in raced(ways, rounds).items()}
    x = case.operands[0]
    if case.moved:
        one, of_dual, of_limit = x.numel() * x.element_size(), 2 * case.moved, 2
    else:
        one, of_dual, of_limit = 2 * x.numel() * case.operands[1].shape[0], 8, 1
    return OpTime(
        op=f"{case.name} {'x'.join(map(str, x.shape))}",
        dual_seconds=best["dual"],
        composed_seconds=best["composed"],
        first_order_seconds=best["first"],
        plain_seconds=best["plain"],
        error=found,
        unit="GB/s" if case.moved else "GFLOP/s",
        rate=1e-9 * of_dual * one / best["dual"],
        limit=1e-9 * of_limit * one / best["limit"],
    )


def raced(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """``race`` for runs of milliseconds: its collector leaves out what is there already, all that was imported."""
    gc.collect()
    gc.freeze()
    try:
        return race(ways, rounds)
    finally:
        gc.unfreeze()


def _copy(case):
    into = torch.empty_like(case.operands[0])
    return lambda: into.copy_(case.operands[0])


def _product(case):
    x, w = case.operands
    return lambda: product(x, w.mT)


def call_seconds(case: OpCase, calls: int = 50) -> float:
    """Processor seconds of one dual pass, forward and backward; on tiny operands they are Python's and autograd's."""
    xs_dot = tangents(case)
    return _each(lambda: dual_pass(case.fused, case, xs_dot), calls)


def block_seconds(calls: int = 20) -> float:
    """Processor seconds that a second decoder block adds to a Hessian-vector product of a tiny Llama of one.

    The difference, so that embedding, loss and weight swap are not counted. Nothing is recomputed.
    """
    one, two = (_each(_product_of_a_llama(layers), calls) for layers in (1, 2))
    return two - one


def _product_of_a_llama(layers) -> Callable[[], object]:
    shape = Shape(
        name="llama-tiny", layers=layers, width=TINY.width, ffn=TINY.ffn, heads=TINY.heads, vocabulary=TINY.vocabulary
    )
    loss, params = mamlfast.causal_lm(shape.model(), recompute=False)
    batch = Setting(shape=shape, steps=1, batch=1, tokens=4).episode().query
    v = {name: torch.ones_like(p) for name, p in params.items()}
    return lambda: mamlfast.hvp(loss, params, v, batch)


def _each(run, calls):
    """The best of five series; on tiny tensors nothing but this thread and autograd's works."""
    run()
    best = math.inf
    for _ in range(5):
        begin = time.process_time()
        for _ in range(calls):
            run()
        best = min(best, (time.process_time() - begin) / calls)
    return best
