"""The Triton kernel of rotary position embedding through its launcher, in the interpreter and without mamlfast."""

import pytest
import torch
from torch.func import vjp

pytest.importorskip("triton")

from mamlfast_kernels import rotary as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def _reference(x, cos, sin, interleaved):
    cos, sin, N = cos[:, None], sin[:, None], cos.shape[-1]
    turned, rest = x[..., :N], x[..., N:]
    if interleaved:
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        half = torch.cat((-turned[..., N // 2 :], turned[..., : N // 2]), -1)
    return torch.cat((turned * cos + half * sin, rest), -1)


def _draw(B, H, T, D, N, tables, dtype=torch.float64):
    """x (as a projection leaves it, tokens before heads), y_bar, cos, sin."""
    torch.manual_seed(0)
    x = torch.randn(B, T, H, D).transpose(1, 2)
    shapes = (B, H, T, D), (tables, T, N), (tables, T, N)
    return [t.to(dtype) for t in (x, *(torch.randn(shape) for shape in shapes))]


def _rotate(x, cos, sin, interleaved, transposed=False):
    y = torch.empty_like(x)
    kernels.rotary_rotate(x, y, cos, sin, interleaved=interleaved, transposed=transposed)
    return y


@layouts
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 2, 2, 1), (2, 3, 5, 16, 16, 1), (2, 3, 5, 13, 6, 2), (1, 2, 3 * kernels.TILE // 64 + 1, 40, 34, 1)],
    ids=str,
)
def test_the_kernel_and_its_transpose_match_torch_func(interleaved, sizes):
    x, y_bar, cos, sin = _draw(*sizes)
    y, pullback = vjp(lambda x: _reference(x, cos, sin, interleaved), x)
    torch.testing.assert_close(_rotate(x, cos, sin, interleaved), y, **EXACT)
    torch.testing.assert_close(_rotate(y_bar, cos, sin, interleaved, True), *pullback(y_bar), **EXACT)


@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_came(interleaved, dtype):
    x, _, cos, sin = _draw(2, 3, 5, 12, 8, 1, dtype=dtype)
    y = _rotate(x, cos, sin, interleaved)
    assert y.dtype == dtype
    want = _reference(*(t.double() for t in (x, cos, sin)), interleaved)
    # Three roundings, of terms up to ten.
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=10 * torch.finfo(dtype).eps)


@layouts
def test_float16_rounds_products_and_sum_as_eager_pytorch_does(interleaved):
    x, y_bar, cos, sin = _draw(2, 3, 9, 20, 16, 2, dtype=torch.float16)
    y, pullback = vjp(lambda x: _reference(x, cos, sin, interleaved), x)
    assert torch.equal(_rotate(x, cos, sin, interleaved), y)
    assert torch.equal(_rotate(y_bar, cos, sin, interleaved, True), *pullback(y_bar))


def test_a_rotation_is_not_taken_for_its_transpose_nor_one_layout_for_the_other():
    x, _, cos, sin = _draw(2, 3, 5, 8, 8, 1)
    want = _reference(x, cos, sin, False)
    for wrong in (_rotate(x, cos, sin, False, True), _rotate(x, cos, sin, True)):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(wrong, want, **EXACT)
