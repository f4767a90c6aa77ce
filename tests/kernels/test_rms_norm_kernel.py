"""The Triton kernels of RMSNorm through their launchers, in the interpreter and without mamlfast."""

import pytest
import torch
from torch.func import jvp, vjp

pytest.importorskip("triton")

from mamlfast_kernels import rms_norm as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# More rows than partial sums, so that some program adds up two.
R = kernels.NUM_PARTIALS + 3
CONSTANTS = {"eps": 1e-5, "offset": 1.0}


def _reference(x, w):
    return (1 + w) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def _draw(R, D, dtype=torch.float64):
    torch.manual_seed(0)
    xs, xs_dot = ((torch.randn(R, D, dtype=dtype), torch.randn(D, dtype=dtype)) for _ in range(2))
    return xs, xs_dot, torch.randn(R, D, dtype=dtype), torch.randn(R, D, dtype=dtype)


def _oracle(xs, xs_dot, y_bar, y_bar_dot):
    def pullback(xs, y_bar):
        return vjp(_reference, *xs)[1](y_bar)

    return jvp(_reference, xs, xs_dot), jvp(pullback, (xs, y_bar), (xs_dot, y_bar_dot))


@pytest.mark.parametrize(("rows", "D"), [(1, 1), (1, 64), (R, 63)])
def test_both_launchers_match_torch_func(rows, D):
    xs, xs_dot, y_bar, y_bar_dot = drawn = _draw(rows, D)
    forward, backward = _oracle(*drawn)
    torch.testing.assert_close(kernels.rms_norm_fwd(xs, xs_dot, **CONSTANTS), forward, **EXACT)
    got = kernels.rms_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, **CONSTANTS)
    torch.testing.assert_close(got, backward, **EXACT)


def test_without_tangents_there_are_none_and_the_rest_is_the_same_bits():
    xs, xs_dot, y_bar, y_bar_dot = _draw(R, 63)
    y, nothing = kernels.rms_norm_fwd(xs, None, **CONSTANTS)
    xs_bar, nothing_either = kernels.rms_norm_bwd(xs, None, y_bar, None, **CONSTANTS)
    assert nothing is None and nothing_either is None
    assert torch.equal(y, kernels.rms_norm_fwd(xs, xs_dot, **CONSTANTS)[0])
    with_tangents, _ = kernels.rms_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, **CONSTANTS)
    assert all(map(torch.equal, xs_bar, with_tangents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_come_back_as_they_came(dtype):
    xs, xs_dot, y_bar, y_bar_dot = _draw(3, 63, dtype)
    y, y_dot = kernels.rms_norm_fwd(xs, xs_dot, **CONSTANTS)
    xs_bar, xs_bar_dot = kernels.rms_norm_bwd(xs, xs_dot, y_bar, y_bar_dot, **CONSTANTS)
    assert {t.dtype for t in (y, y_dot, *xs_bar, *xs_bar_dot)} == {dtype}
    want = _reference(*(x.double() for x in xs))
    torch.testing.assert_close(y.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_program_that_keeps_its_partial_sums_to_itself_is_noticed(monkeypatch):
    """The oracle can fail: one row of w_bar's partial sums lost is not within any tolerance."""
    drawn = _draw(R, 63)
    whole = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda t, *a: whole(t[1:] if t.ndim == 2 else t, *a))
    (_, w_bar), _ = kernels.rms_norm_bwd(drawn[0], drawn[1], *drawn[2:], **CONSTANTS)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(w_bar, _oracle(*drawn)[1][0][1], **EXACT)


def test_a_thread_holds_at_most_sixteen_elements_up_to_the_longest_row():
    assert [kernels.num_warps(d) for d in (1, 64, 512, 2048, 4096, 8192)] == [1, 1, 1, 4, 8, 16]
