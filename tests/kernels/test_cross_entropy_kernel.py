"""The Triton kernels of cross-entropy through their launchers, in the interpreter and without mamlfast."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vjp

pytest.importorskip("triton")

from mamlfast_kernels import cross_entropy as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# One column, one row, and more than two blocks.
V = 2 * kernels.INTERPRETED_BLOCK_V + 3
CASES = [(1, 1, 0.0), (1, V, 0.0), (4, V, 0.0), (4, V, 0.3), (4, kernels.INTERPRETED_BLOCK_V, 0.3)]
IGNORE = -1


def _draw(R, V, dtype=torch.float64):
    torch.manual_seed(0)
    z, z_dot = (3 * torch.randn(R, V, dtype=dtype) for _ in range(2))
    target = torch.randint(0, V, (R,))
    target[1:2] = IGNORE
    return z, z_dot, target, torch.randn(R, dtype=dtype), torch.randn(R, dtype=dtype)


def _reference(target, smoothing):
    return lambda z: F.cross_entropy(z, target, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize(("R", "V", "smoothing"), CASES)
def test_both_launchers_match_torch_func(R, V, smoothing):
    z, z_dot, target, g, g_dot = _draw(R, V)
    f = _reference(target, smoothing)
    nll, nll_dot, lse, mu = kernels.cross_entropy_fwd(z, z_dot, target, IGNORE, smoothing)
    torch.testing.assert_close((nll, nll_dot), jvp(f, (z,), (z_dot,)), **EXACT)
    want = jvp(lambda z, g: vjp(f, z)[1](g)[0], (z, g), (z_dot, g_dot))
    got = kernels.cross_entropy_bwd(z, z_dot, target, IGNORE, smoothing, lse, mu, g, g_dot)
    torch.testing.assert_close(got, want, **EXACT)


def test_without_tangents_there_are_none_and_the_rest_is_the_same_bits():
    z, z_dot, target, g, g_dot = _draw(4, V)
    nll, nothing, lse, nothing_either = kernels.cross_entropy_fwd(z, None, target, IGNORE, 0.1)
    z_bar, nor_that = kernels.cross_entropy_bwd(z, None, target, IGNORE, 0.1, lse, None, g, None)
    assert nothing is None and nothing_either is None and nor_that is None
    same_nll, _, same_lse, mu = kernels.cross_entropy_fwd(z, z_dot, target, IGNORE, 0.1)
    assert torch.equal(nll, same_nll) and torch.equal(lse, same_lse)
    assert torch.equal(z_bar, kernels.cross_entropy_bwd(z, z_dot, target, IGNORE, 0.1, lse, mu, g, g_dot)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_have_float32_losses_and_half_gradients(dtype):
    z, z_dot, target, g, g_dot = _draw(4, V, dtype)
    nll, nll_dot, lse, mu = kernels.cross_entropy_fwd(z, z_dot, target, IGNORE, 0.0)
    z_bars = kernels.cross_entropy_bwd(z, z_dot, target, IGNORE, 0.0, lse, mu, g, g_dot)
    assert {t.dtype for t in (nll, nll_dot, lse, mu)} == {torch.float32}
    assert {t.dtype for t in z_bars} == {dtype}
    torch.testing.assert_close(nll.double(), _reference(target, 0.0)(z.double()), rtol=1e-5, atol=1e-5)


def test_a_first_block_of_nothing_but_minus_infinity_is_not_the_end():
    z, z_dot, target, *_ = _draw(4, V)
    z[:, : kernels.INTERPRETED_BLOCK_V] = -torch.inf
    target[:] = V - 1
    nll, nll_dot, _, _ = kernels.cross_entropy_fwd(z, z_dot, target, IGNORE, 0.0)
    torch.testing.assert_close(nll, _reference(target, 0.0)(z), **EXACT)
    assert nll_dot.isfinite().all()


@pytest.mark.parametrize("label", [V, -7])
def test_a_label_outside_the_vocabulary_is_nan_in_its_row_alone(label):
    z, z_dot, target, *_ = _draw(4, V)
    target[2] = label
    nll, nll_dot, _, _ = kernels.cross_entropy_fwd(z, z_dot, target, IGNORE, 0.0)
    assert nll.isnan().tolist() == nll_dot.isnan().tolist() == [False, False, True, False]


def test_a_wrong_row_statistic_is_noticed():
    """The oracle can fail: another mu is another z_bar_dot."""
    z, z_dot, target, g, g_dot = _draw(4, V)
    f = _reference(target, 0.0)
    _, _, lse, _ = kernels.cross_entropy_fwd(z, z_dot, target, IGNORE, 0.0)
    want = jvp(lambda z, g: vjp(f, z)[1](g)[0], (z, g), (z_dot, g_dot))
    got = kernels.cross_entropy_bwd(z, z_dot, target, IGNORE, 0.0, lse, lse, g, g_dot)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(got, want, **EXACT)
