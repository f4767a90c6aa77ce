"""The Triton kernels of the fused linear + cross-entropy, in the interpreter and without mamlfast."""

import pytest
import torch
from torch.func import jvp, vjp

pytest.importorskip("triton")

from mamlfast_kernels import linear_cross_entropy as kernels  # noqa: E402  (Triton has to be there)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Label smoothing, z-loss, soft-cap.
PLAIN, SMOOTH, Z_LOSS, CAPPED, ALL = (0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 4.0), (0.3, 0.1, 4.0)
V = 2 * kernels.INTERPRETED_BLOCK_V + 3
# One column, one row, and more than two blocks.
CASES = [(1, 1, PLAIN), (1, V, ALL), *((3, V, numbers) for numbers in (PLAIN, SMOOTH, Z_LOSS, CAPPED, ALL))]


def _draw(R, V, dtype=torch.float64):
    torch.manual_seed(0)
    z, z_dot = (3 * torch.randn(R, V, dtype=dtype) for _ in range(2))
    return z, z_dot, torch.randint(0, V, (R,)), torch.randn(R, dtype=dtype), torch.randn(R, dtype=dtype)


def _reference(target, smoothing, z_loss, softcap):
    def losses(z):
        s = softcap * torch.tanh(z / softcap) if softcap else z
        lse = torch.logsumexp(s, -1)
        picked = s.gather(-1, target[:, None])[:, 0]
        return lse - (1 - smoothing) * picked - smoothing * s.mean(-1) + z_loss * lse**2

    return losses


def _cotangents(f, z, z_dot, g, g_dot):
    return jvp(lambda z, g: vjp(f, z)[1](g)[0], (z, g), (z_dot, g_dot))


def _bwd(z, z_dot, *rest):
    """The launcher on copies, for it may overwrite what it is given."""
    return kernels.linear_cross_entropy_bwd(z.clone(), None if z_dot is None else z_dot.clone(), *rest)


@pytest.mark.parametrize(("R", "V", "numbers"), CASES)
def test_both_launchers_match_torch_func(R, V, numbers):
    z, z_dot, target, g, g_dot = _draw(R, V)
    f = _reference(target, *numbers)
    lse, mu, loss, loss_dot = kernels.linear_cross_entropy_fwd(z, z_dot, target, *numbers)
    torch.testing.assert_close((loss, loss_dot), jvp(f, (z,), (z_dot,)), **EXACT)
    got = _bwd(z, z_dot, target, lse, mu, g, g_dot, *numbers)
    torch.testing.assert_close(got, _cotangents(f, z, z_dot, g, g_dot), **EXACT)


@pytest.mark.parametrize("numbers", [PLAIN, ALL])
def test_without_tangents_there_are_none_and_the_rest_is_the_same_bits(numbers):
    z, z_dot, target, g, g_dot = _draw(3, V)
    lse, nothing, loss, nothing_either = kernels.linear_cross_entropy_fwd(z, None, target, *numbers)
    z_bar, nor_that = _bwd(z, None, target, lse, None, g, None, *numbers)
    assert nothing is None and nothing_either is None and nor_that is None
    same_lse, mu, same_loss, _ = kernels.linear_cross_entropy_fwd(z, z_dot, target, *numbers)
    assert torch.equal(loss, same_loss) and torch.equal(lse, same_lse)
    assert torch.equal(z_bar, _bwd(z, z_dot, target, lse, mu, g, g_dot, *numbers)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_have_float32_losses_and_half_gradients(dtype):
    z, z_dot, target, g, g_dot = _draw(3, V, dtype)
    lse, mu, loss, loss_dot = kernels.linear_cross_entropy_fwd(z, z_dot, target, *ALL)
    z_bars = _bwd(z, z_dot, target, lse, mu, g, g_dot, *ALL)
    assert {t.dtype for t in (lse, mu, loss, loss_dot)} == {torch.float32}
    assert {t.dtype for t in z_bars} == {dtype}
    torch.testing.assert_close(loss.double(), _reference(target, *ALL)(z.double()), rtol=1e-5, atol=1e-5)


def test_a_first_block_of_nothing_but_minus_infinity_is_not_the_end():
    z, z_dot, target, *_ = _draw(3, V)
    z[:, : kernels.INTERPRETED_BLOCK_V] = -torch.inf
    target[:] = V - 1
    _, _, loss, loss_dot = kernels.linear_cross_entropy_fwd(z, z_dot, target, *PLAIN)
    want = torch.nn.functional.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(loss, want, **EXACT)
    assert loss_dot.isfinite().all()


@pytest.mark.parametrize("label", [V, -7])
def test_a_label_outside_the_vocabulary_is_nan_in_its_row_alone(label):
    z, z_dot, target, *_ = _draw(3, V)
    target[2] = label
    _, _, loss, loss_dot = kernels.linear_cross_entropy_fwd(z, z_dot, target, *SMOOTH)
    assert loss.isnan().tolist() == loss_dot.isnan().tolist() == [False, False, True]


def test_a_wrong_row_statistic_is_noticed():
    """The oracle can fail: another mu is another z_bar_dot."""
    z, z_dot, target, g, g_dot = _draw(3, V)
    lse, *_ = kernels.linear_cross_entropy_fwd(z, z_dot, target, *ALL)
    want = _cotangents(_reference(target, *ALL), z, z_dot, g, g_dot)
    got = _bwd(z, z_dot, target, lse, lse, g, g_dot, *ALL)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(got, want, **EXACT)
