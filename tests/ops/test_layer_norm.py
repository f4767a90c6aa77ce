"""Layer normalisation in its three rooms, against what torch.func makes of the reference."""

import pytest
import torch

from mamlfast.ops.backend import use_backend
from mamlfast.ops.layer_norm import _ROOMS, MAX_PARTIALS, MIN_ROWS, layer_norm, layer_norm_reference
from tests.rooms import EXACT, draw, first_order, mapped, oracle, ours, same_bits

# One column is its own mean: with a small eps the derivatives would be those of 0 / 0.
OPTIONS = {"eps": 0.1}
SHAPES = [(1,), (1, 1), (1, 63), (3, 5), (2, 2, 3), (11, 63), (5, 1000)]


def _draw(shape, dtype=torch.float64):
    return draw(layer_norm, [shape, shape[-1:], shape[-1:]], OPTIONS, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_four_functions_match_torch_func_on_the_reference(room, shape):
    drawn = _draw(shape)
    y, y_dot, xs_bar, xs_bar_dot = oracle(layer_norm, *drawn, OPTIONS)
    xs, _, y_bar, _ = drawn
    torch.testing.assert_close(first_order(layer_norm, xs, y_bar, OPTIONS), (y, xs_bar), **EXACT)
    torch.testing.assert_close(ours(layer_norm, *drawn, OPTIONS), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)


def test_more_rows_than_partial_sums_lose_no_row(in_native):
    drawn = _draw((2 * MIN_ROWS * MAX_PARTIALS + 3, 3))
    got, want = ours(layer_norm, *drawn, OPTIONS), oracle(layer_norm, *drawn, OPTIONS)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_float32_is_as_exact_as_float32_allows(room):
    narrow = mapped(torch.Tensor.float, _draw((7, 63)))
    want = oracle(layer_norm, *mapped(torch.Tensor.double, narrow), OPTIONS)
    got = mapped(torch.Tensor.double, ours(layer_norm, *narrow, OPTIONS))
    # A dozen roundings of 6e-8 each, on sums of 63 terms of order one.
    torch.testing.assert_close(got, want, rtol=2e-6, atol=5e-6)


def test_a_mean_far_from_zero_costs_no_digits(in_native):
    x = torch.randn(5, 63) + 1000
    w, b = torch.ones(63), torch.zeros(63)
    want = layer_norm_reference(x.double(), w.double(), b.double())
    # The mean of 1000 in float32 would be wrong by up to 3e-5.
    torch.testing.assert_close(layer_norm(x, w, b).double(), want, rtol=1e-6, atol=1e-6)


def test_strided_inputs_give_the_results_of_their_copies(room):
    x, y_bar, x_dot, y_bar_dot = (torch.randn(63, 6, dtype=torch.float64) for _ in range(4))
    w, b, w_dot, b_dot = (torch.randn(126, dtype=torch.float64)[::2] for _ in range(4))
    strided = (x.mT, w, b), (x_dot.mT, w_dot, b_dot), y_bar.mT, y_bar_dot[:, :1].mT.expand(6, 63)
    copies = mapped(lambda t: t.contiguous().clone(), strided)
    torch.testing.assert_close(ours(layer_norm, *strided, OPTIONS), ours(layer_norm, *copies, OPTIONS), **EXACT)


def test_tangents_leave_the_first_order_results_bitwise_unchanged(room):
    xs, xs_dot, y_bar, y_bar_dot = _draw((11, 63), torch.float32)
    y, _, xs_bar, _ = ours(layer_norm, xs, xs_dot, y_bar, y_bar_dot, OPTIONS)
    assert same_bits(first_order(layer_norm, xs, y_bar, OPTIONS), (y, xs_bar))


def test_results_are_the_same_bits_on_any_number_of_threads(in_native, threads):
    drawn = _draw((1000, 63), torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ours(layer_norm, *drawn, OPTIONS))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_arguments_are_left_as_they_were(room):
    drawn = _draw((3, 5))
    before = mapped(torch.clone, drawn)
    ours(layer_norm, *drawn, OPTIONS)
    assert same_bits(drawn, before)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_not_needed_changes_nothing_that_is(room, need):
    xs, xs_dot, y_bar, y_bar_dot = _draw((11, 63))
    everything = ours(layer_norm, xs, xs_dot, y_bar, y_bar_dot, OPTIONS)[2:]
    other = tuple(not n for n in need)
    got = layer_norm.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, need, other, **OPTIONS)
    for values, wanted, full in zip(got, (need, other), everything, strict=True):
        for value, want, exact in zip(values, wanted, full, strict=True):
            assert not want or torch.equal(value, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype):
    drawn = _draw((5, 63), dtype)
    want = oracle(layer_norm, *mapped(torch.Tensor.double, drawn), OPTIONS)
    got = ours(layer_norm, *drawn, OPTIONS)
    assert got[0].dtype == got[1].dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mapped(torch.Tensor.double, got), want, rtol=eps, atol=eps)


def test_no_rows_give_no_rows_and_a_zero_weight_gradient():
    x, w, b = torch.empty(0, 5), torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)
    y = layer_norm(x, w, b)
    assert y.shape == (0, 5)
    assert same_bits(torch.autograd.grad(y.sum(), (w, b)), (torch.zeros(5), torch.zeros(5)))


def test_a_dropped_term_is_noticed(monkeypatch):
    """The oracle can fail: without ``w_dot y_bar`` in g_dot nothing above would pass."""
    fwd, bwd = _ROOMS["eager"]

    def mutant(xs, xs_dot, *arguments, **options):
        x_dot, w_dot, b_dot = xs_dot
        return bwd(xs, (x_dot, torch.zeros_like(w_dot), b_dot), *arguments, **options)

    monkeypatch.setitem(_ROOMS, "eager", (fwd, mutant))
    drawn = _draw((3, 5))
    with use_backend("eager"), pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(layer_norm, *drawn, OPTIONS), oracle(layer_norm, *drawn, OPTIONS), **EXACT)


@pytest.mark.parametrize(("x", "w", "b"), [((3, 5), (4,), (5,)), ((3, 5), (5,), (1,)), ((), (1,), (1,))])
def test_bad_shapes_are_named(x, w, b):
    with pytest.raises(ValueError, match=r"one weight and one bias for each element"):
        layer_norm(torch.ones(x), torch.ones(w), torch.ones(b))


def test_mixed_dtypes_take_the_eager_room_and_only_a_forced_kernel_refuses_them():
    x, w, b = torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(5), torch.randn(5)
    torch.testing.assert_close(layer_norm(x, w, b), layer_norm_reference(x, w, b))
    with use_backend("triton"), pytest.raises(ValueError, match="no such kernel"):
        layer_norm(x, w, b)
