"""The Triton kernels of softmax and log-softmax through their launchers, in the interpreter and without mamlfast."""

import pytest
import torch
from torch.func import jvp, vjp

pytest.importorskip("triton")

from mamlfast_kernels import softmax as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
both = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])


def _reference(log):
    return lambda x: torch.log_softmax(x, -1) if log else torch.softmax(x, -1)


def _draw(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=dtype) for _ in range(4))


@both
@pytest.mark.parametrize("shape", [(), (1,), (1, 64), (2, 3, 63)], ids=str)
def test_both_launchers_match_torch_func(shape, log):
    x, x_dot, y_bar, y_bar_dot = _draw(*shape)
    f = _reference(log)
    want = jvp(f, (x,), (x_dot,))
    y, y_dot = got = kernels.softmax_fwd(x, x_dot, log=log)
    torch.testing.assert_close(got, want, **EXACT)
    want = jvp(lambda x, y_bar: vjp(f, x)[1](y_bar)[0], (x, y_bar), (x_dot, y_bar_dot))
    got = kernels.softmax_bwd(y, y_dot, y_bar, y_bar_dot, log=log)
    torch.testing.assert_close(got, want, **EXACT)


@both
def test_without_tangents_there_are_none_and_the_rest_is_the_same_bits(log):
    x, x_dot, y_bar, y_bar_dot = _draw(5, 63)
    y, nothing = kernels.softmax_fwd(x, None, log=log)
    x_bar, nothing_either = kernels.softmax_bwd(y, None, y_bar, None, log=log)
    assert nothing is None and nothing_either is None
    same_y, y_dot = kernels.softmax_fwd(x, x_dot, log=log)
    assert torch.equal(y, same_y)
    assert torch.equal(x_bar, kernels.softmax_bwd(y, y_dot, y_bar, y_bar_dot, log=log)[0])


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_came(dtype, log):
    x, x_dot, y_bar, y_bar_dot = _draw(3, 63, dtype=dtype)
    y, y_dot = kernels.softmax_fwd(x, x_dot, log=log)
    x_bars = kernels.softmax_bwd(y, y_dot, y_bar, y_bar_dot, log=log)
    assert {t.dtype for t in (y, y_dot, *x_bars)} == {dtype}
    torch.testing.assert_close(y.double(), _reference(log)(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_one_function_is_not_taken_for_the_other():
    x, x_dot, *_ = _draw(3, 5)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(kernels.softmax_fwd(x, x_dot, log=True)[0], torch.softmax(x, -1), **EXACT)
