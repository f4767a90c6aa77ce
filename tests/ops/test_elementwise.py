"""The activations in their three rooms, against what torch.func makes of the references."""

import math

import pytest
import torch

from mamlfast.ops import elementwise
from mamlfast.ops.backend import use_backend
from tests.rooms import EXACT, draw, first_order, mapped, oracle, ours, same_bits

COMPILED = ["silu", "gelu", "gelu_tanh", "relu", "relu2", "tanh", "sigmoid"]
RULES = {name: getattr(elementwise, name) for name in COMPILED}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SHAPES = [(), (1,), (3, 5), (2, 31, 33)]


@every_rule
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_four_functions_match_torch_func_on_the_reference(room, rule, shape):
    xs, *rest = draw(rule, [shape], {})
    drawn = (mapped(lambda x: 3 * x, xs), *rest)
    y, y_dot, xs_bar, xs_bar_dot = oracle(rule, *drawn, {})
    torch.testing.assert_close(first_order(rule, drawn[0], drawn[2], {}), (y, xs_bar), **EXACT)
    torch.testing.assert_close(ours(rule, *drawn, {}), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)


def _grid(dtype):
    return torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-9, 0, 50), -torch.logspace(-9, 0, 50)]).to(dtype)


def _slopes(rule, x):
    """phi, phi' and phi'' at x."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    y, first, _, (second,) = ours(rule, (x,), (one,), one, zero, {})
    return y, first, second[0] if isinstance(second, tuple) else second


@every_rule
def test_float32_is_as_exact_as_float32_allows(in_native, rule):
    x = _grid(torch.float32)
    got = mapped(torch.Tensor.double, _slopes(rule, x))
    with use_backend("eager"):
        want = _slopes(rule, x.double())
    # Three to four units in the last place, of the value or of the terms of order one that it is the sum of.
    torch.testing.assert_close(got, want, rtol=4e-7, atol=4e-7)


@every_rule
def test_the_interpreted_kernels_are_nearly_as_exact(rule):
    pytest.importorskip("triton")
    x = _grid(torch.float32)[::9]
    with use_backend("triton"):
        got = mapped(torch.Tensor.double, _slopes(rule, x))
    with use_backend("eager"):
        want = _slopes(rule, x.double())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 5e-6), (torch.float64, 3e-14)])
def test_tails_are_exact_relative_to_themselves(in_native, dtype, rtol):
    """Where 1 + erf, 1 - t^2 and 1 - s, from which the references start, have lost every digit.

    The exponential grows the rounding of the square of x up to 70-fold: in double in the oracle, in float on processors
    without fused multiply-add.
    """
    x = torch.linspace(4, 12, 101).to(dtype)
    X = x.double()
    want = -X * 0.5 * torch.erfc(X / math.sqrt(2))
    torch.testing.assert_close(elementwise.gelu(-x).double(), want, rtol=rtol, atol=0)
    s = torch.special.expit(-X)
    torch.testing.assert_close(
        _slopes(elementwise.sigmoid, x)[1].double(), s * torch.special.expit(X), rtol=rtol, atol=0
    )
    torch.testing.assert_close(_slopes(elementwise.tanh, x)[1].double(), torch.cosh(X) ** -2, rtol=rtol, atol=0)
    small = torch.logspace(-30, -3, 50).to(dtype)
    torch.testing.assert_close(elementwise.tanh(small), torch.tanh(small), rtol=rtol, atol=0)


@every_rule
def test_extreme_numbers_are_what_the_reference_makes_of_them(in_native, rule):
    x = torch.tensor([1e30, -1e30, 0.0, 1e-40, 87.5, -87.5, 89.0, -89.0, 1e3, -1e3])
    torch.testing.assert_close(rule(x), rule.reference(x), rtol=1e-6, atol=1e-30)
    assert all(slope.isfinite().all() for slope in _slopes(rule, x)[1:])
    assert rule(torch.tensor([torch.nan])).isnan()
    limit = 1.0 if rule in (elementwise.tanh, elementwise.sigmoid) else torch.inf
    assert rule(torch.tensor([torch.inf])) == limit


@every_rule
def test_strided_inputs_give_the_results_of_their_copies(room, rule):
    x, x_dot, y_bar, y_bar_dot = (torch.randn(7, 6, dtype=torch.float64) for _ in range(4))
    strided = (x.mT,), (x_dot.mT,), y_bar.mT, y_bar_dot[:, :1].mT.expand(6, 7)
    copies = mapped(lambda t: t.contiguous().clone(), strided)
    torch.testing.assert_close(ours(rule, *strided, {}), ours(rule, *copies, {}), **EXACT)


@every_rule
def test_tangents_leave_the_first_order_results_bitwise_unchanged(room, rule):
    xs, xs_dot, y_bar, y_bar_dot = draw(rule, [(11, 63)], {}, torch.float32)
    y, _, xs_bar, _ = ours(rule, xs, xs_dot, y_bar, y_bar_dot, {})
    assert same_bits(first_order(rule, xs, y_bar, {}), (y, xs_bar))


@every_rule
def test_results_are_the_same_bits_on_any_number_of_threads(in_native, threads, rule):
    drawn = draw(rule, [(50_001,)], {}, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ours(rule, *drawn, {}))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@every_rule
def test_arguments_are_left_as_they_were(room, rule):
    drawn = draw(rule, [(3, 5)], {})
    before = mapped(torch.clone, drawn)
    ours(rule, *drawn, {})
    assert same_bits(drawn, before)


@every_rule
@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_what_is_not_needed_changes_nothing_that_is(room, rule, need):
    xs, xs_dot, y_bar, y_bar_dot = draw(rule, [(3, 63)], {})
    everything = ours(rule, xs, xs_dot, y_bar, y_bar_dot, {})[2:]
    got = rule.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, need[:1], need[1:])
    for value, wanted, full in zip(got, need, everything, strict=True):
        assert not wanted or same_bits(tuple(value), full)


@every_rule
def test_half_types_and_nothing_take_the_eager_room(rule):
    assert rule(torch.randn(3, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.empty(0, 5, requires_grad=True)
    assert torch.autograd.grad(rule(x).sum(), x)[0].shape == (0, 5)
    with use_backend("native"), pytest.raises(ValueError, match="no such kernel"):
        rule(x)


def test_a_function_without_kernels_has_the_eager_room_alone():
    x = torch.rand(3) + 1
    assert same_bits(elementwise.power(x, exponent=3), x**3)
    with use_backend("native"), pytest.raises(ValueError, match="no such kernel"):
        elementwise.exp(x)


def test_a_wrong_second_derivative_is_noticed():
    """The oracle can fail: the two GELUs differ by 5e-4, and a missing phi'' by more."""
    drawn = draw(elementwise.gelu, [(3, 5)], {})
    want = oracle(elementwise.gelu, *drawn, {})
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(elementwise.gelu_tanh, *drawn, {}), want, **EXACT)
    linear = elementwise.elementwise("gelu", elementwise.gelu.reference, elementwise._gelu_first, None)
    *rest, xs_bar_dot = ours(linear, *drawn, {})
    torch.testing.assert_close(tuple(rest), want[:3], **EXACT)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(xs_bar_dot, want[3], **EXACT)
