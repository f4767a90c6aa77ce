"""The Triton kernels of layer normalisation through their launchers, in the interpreter and without mamlfast."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vjp

pytest.importorskip("triton")

from mamlfast_kernels import layer_norm as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# More rows than partial sums, so that some program adds up two.
R = kernels.NUM_PARTIALS + 3
EPS = 0.1


def _reference(x, w, b):
    return F.layer_norm(x, w.shape, w, b, EPS)


def _draw(R, D, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (R, D), (D,), (D,)
    xs, xs_dot = (tuple(torch.randn(s, dtype=dtype) for s in shapes) for _ in range(2))
    return xs, xs_dot, torch.randn(R, D, dtype=dtype), torch.randn(R, D, dtype=dtype)


def _oracle(xs, xs_dot, y_bar, y_bar_dot):
    def pullback(xs, y_bar):
        return vjp(_reference, *xs)[1](y_bar)

    return jvp(_reference, xs, xs_dot), jvp(pullback, (xs, y_bar), (xs_dot, y_bar_dot))


@pytest.mark.parametrize(("rows", "D"), [(1, 1), (1, 64), (R, 63)])
def test_both_launchers_match_torch_func(rows, D):
    xs, xs_dot, y_bar, y_bar_dot = drawn = _draw(rows, D)
    forward, backward = _oracle(*drawn)
    torch.testing.assert_close(kernels.layer_norm_fwd(xs, xs_dot, eps=EPS), forward, **EXACT)
    torch.testing.assert_close(kernels.layer_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, eps=EPS), backward, **EXACT)


def test_without_tangents_there_are_none_and_the_rest_is_the_same_bits():
    xs, xs_dot, y_bar, y_bar_dot = _draw(R, 63)
    y, nothing = kernels.layer_norm_fwd(xs, None, eps=EPS)
    xs_bar, nothing_either = kernels.layer_norm_bwd(xs, None, y_bar, None, eps=EPS)
    assert nothing is None and nothing_either is None
    assert torch.equal(y, kernels.layer_norm_fwd(xs, xs_dot, eps=EPS)[0])
    with_tangents, _ = kernels.layer_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, eps=EPS)
    assert all(map(torch.equal, xs_bar, with_tangents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_came(dtype):
    xs, xs_dot, y_bar, y_bar_dot = _draw(3, 63, dtype)
    y, y_dot = kernels.layer_norm_fwd(xs, xs_dot, eps=EPS)
    xs_bar, xs_bar_dot = kernels.layer_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, eps=EPS)
    assert {t.dtype for t in (y, y_dot, *xs_bar, *xs_bar_dot)} == {dtype}
    want = _reference(*(x.double() for x in xs))
    torch.testing.assert_close(y.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_a_program_that_keeps_its_partial_sums_to_itself_is_noticed(monkeypatch):
    """The oracle can fail: one row of the partial sums lost is not within any tolerance."""
    drawn = _draw(R, 63)
    whole = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda t, *a: whole(t[1:] if t.ndim == 2 else t, *a))
    (_, w_bar, b_bar), _ = kernels.layer_norm_bwd(*drawn, eps=EPS)
    monkeypatch.undo()
    _, ((_, want_w_bar, want_b_bar), _) = _oracle(*drawn)
    for got, want in ((w_bar, want_w_bar), (b_bar, want_b_bar)):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(got, want, **EXACT)
