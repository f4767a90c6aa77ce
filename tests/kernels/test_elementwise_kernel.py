"""The Triton kernels of the activations through their launchers, in the interpreter and without mamlfast."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vjp

pytest.importorskip("triton")

from mamlfast_kernels import elementwise as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
REFERENCES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
every_name = pytest.mark.parametrize("name", REFERENCES)


def _draw(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(3 * torch.randn(shape, dtype=dtype) for _ in range(4))


def _oracle(name, x, x_dot, y_bar, y_bar_dot):
    f = REFERENCES[name]
    backward = jvp(lambda x, y_bar: vjp(f, x)[1](y_bar)[0], (x, y_bar), (x_dot, y_bar_dot))
    return jvp(f, (x,), (x_dot,)), backward


@every_name
@pytest.mark.parametrize("shape", [(), (3, 5), (kernels.BLOCK + 1,)], ids=str)
def test_both_launchers_match_torch_func(name, shape):
    x, x_dot, y_bar, y_bar_dot = drawn = _draw(*shape)
    forward, backward = _oracle(name, *drawn)
    torch.testing.assert_close(kernels.elementwise_fwd(name, x, x_dot), forward, **EXACT)
    torch.testing.assert_close(kernels.elementwise_bwd(name, x, x_dot, y_bar, y_bar_dot), backward, **EXACT)


@every_name
def test_without_tangents_there_are_none_and_the_rest_is_the_same_bits(name):
    x, x_dot, y_bar, y_bar_dot = _draw(5, 63)
    y, nothing = kernels.elementwise_fwd(name, x, None)
    x_bar, nothing_either = kernels.elementwise_bwd(name, x, None, y_bar, None)
    assert nothing is None and nothing_either is None
    assert torch.equal(y, kernels.elementwise_fwd(name, x, x_dot)[0])
    assert torch.equal(x_bar, kernels.elementwise_bwd(name, x, x_dot, y_bar, y_bar_dot)[0])


@every_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_came(name, dtype):
    x, x_dot, y_bar, y_bar_dot = _draw(3, 63, dtype=dtype)
    results = *kernels.elementwise_fwd(name, x, x_dot), *kernels.elementwise_bwd(name, x, x_dot, y_bar, y_bar_dot)
    assert {t.dtype for t in results} == {dtype}
    want = REFERENCES[name](x.double())
    torch.testing.assert_close(results[0].double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_one_function_is_not_taken_for_another():
    """The oracle can fail: the two GELUs differ by 5e-4 at most."""
    drawn = _draw(3, 5)
    _, backward = _oracle("gelu", *drawn)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(kernels.elementwise_bwd("gelu_tanh", *drawn), backward, **EXACT)
