"""The Triton kernels of the gated activations through their launchers, in the interpreter and without mamlfast."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vjp

pytest.importorskip("triton")

from mamlfast_kernels import gated as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
GATES = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": torch.relu}
every_gate = pytest.mark.parametrize("name", GATES)


def _draw(*shape, dtype=torch.float64):
    """xs, xs_dot, y_bar, y_bar_dot."""
    torch.manual_seed(0)
    a, b, a_dot, b_dot, y_bar, y_bar_dot = (2 * torch.randn(shape, dtype=dtype) for _ in range(6))
    return (a, b), (a_dot, b_dot), y_bar, y_bar_dot


def _oracle(name, xs, xs_dot, y_bar, y_bar_dot):
    def f(a, b):
        return GATES[name](a) * b

    backward = jvp(lambda xs, y_bar: vjp(f, *xs)[1](y_bar), (xs, y_bar), (xs_dot, y_bar_dot))
    return jvp(f, xs, xs_dot), backward


@every_gate
@pytest.mark.parametrize("shape", [(), (3, 5), (kernels.BLOCK + 1,)], ids=str)
def test_both_launchers_match_torch_func(name, shape):
    drawn = _draw(*shape)
    forward, backward = _oracle(name, *drawn)
    torch.testing.assert_close(kernels.gated_fwd(name, *drawn[:2]), forward, **EXACT)
    torch.testing.assert_close(kernels.gated_bwd(name, *drawn), backward, **EXACT)


@pytest.mark.parametrize("width", [1, 7, kernels.BLOCK + 5])
def test_halves_of_one_projection_match_their_copies(width):
    """Every operand is a half with a row stride of its own; a row of the widest takes two programs."""
    xs, xs_dot, y_bar, y_bar_dot = _draw(3, width)
    a, b = torch.cat(xs, -1).chunk(2, -1)
    a_dot, b_dot = torch.cat((*xs_dot, y_bar), -1).tensor_split(3, -1)[:2]
    strided_y_bar = torch.stack((y_bar, y_bar_dot), 1)
    halves = (a, b), (a_dot, b_dot), strided_y_bar[:, 0], strided_y_bar[:, 1]
    forward, backward = _oracle("silu", xs, xs_dot, y_bar, y_bar_dot)
    torch.testing.assert_close(kernels.gated_fwd("silu", *halves[:2]), forward, **EXACT)
    torch.testing.assert_close(kernels.gated_bwd("silu", *halves), backward, **EXACT)
    whole = kernels.gated_bwd("silu", *halves, packed=True)
    torch.testing.assert_close(whole, tuple((torch.cat(pair, -1),) for pair in backward), **EXACT)


@every_gate
def test_without_tangents_there_are_none_and_the_rest_is_the_same_bits(name):
    xs, xs_dot, y_bar, y_bar_dot = _draw(5, 63)
    y, nothing = kernels.gated_fwd(name, xs, None)
    xs_bar, nothings = kernels.gated_bwd(name, xs, None, y_bar, None)
    assert nothing is None and nothings == (None, None)
    assert torch.equal(y, kernels.gated_fwd(name, xs, xs_dot)[0])
    assert all(map(torch.equal, xs_bar, kernels.gated_bwd(name, xs, xs_dot, y_bar, y_bar_dot)[0]))


@every_gate
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_came(name, dtype):
    drawn = _draw(3, 63, dtype=dtype)
    y, y_dot = kernels.gated_fwd(name, *drawn[:2])
    xs_bar, xs_bar_dot = kernels.gated_bwd(name, *drawn)
    assert {t.dtype for t in (y, y_dot, *xs_bar, *xs_bar_dot)} == {dtype}
    a, b = drawn[0]
    torch.testing.assert_close(
        y.double(), GATES[name](a.double()) * b.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4
    )


def test_float16_rounds_the_gate_before_the_product():
    """As a module that computes ``act(gate) * up`` does, to the bit."""
    (a, b), *_ = _draw(16, 63, dtype=torch.float16)
    want = F.silu(a) * b
    assert torch.equal(kernels.gated_fwd("silu", (a, b), None)[0], want)
    assert not torch.equal((F.silu(a.float()) * b.float()).half(), want)


def test_one_gate_is_not_taken_for_another():
    """The oracle can fail: the two GELUs differ by 5e-4 at most."""
    drawn = _draw(3, 5)
    _, backward = _oracle("gelu", *drawn)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(kernels.gated_bwd("gelu_tanh", *drawn), backward, **EXACT)
