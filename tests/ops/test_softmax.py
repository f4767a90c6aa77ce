"""Softmax and log-softmax in their three rooms, against what torch.func makes of the references."""

import pytest
import torch

from mamlfast.ops import log_softmax, softmax
from mamlfast.ops.backend import use_backend
from mamlfast.ops.softmax import _ROOMS
from tests.rooms import EXACT, draw, first_order, mapped, oracle, ours, same_bits

RULES = {"softmax": softmax, "log_softmax": log_softmax}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SHAPES = [(), (1,), (1, 1), (1, 63), (3, 5), (2, 2, 3), (5, 1000)]


@every_rule
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_four_functions_match_torch_func_on_the_reference(room, rule, shape):
    drawn = draw(rule, [shape], {})
    y, y_dot, xs_bar, xs_bar_dot = oracle(rule, *drawn, {})
    xs, _, y_bar, _ = drawn
    torch.testing.assert_close(first_order(rule, xs, y_bar, {}), (y, xs_bar), **EXACT)
    torch.testing.assert_close(ours(rule, *drawn, {}), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)


@every_rule
def test_rows_of_several_blocks_are_added_up_whole(in_native, rule):
    drawn = draw(rule, [(2, 3000)], {})
    torch.testing.assert_close(ours(rule, *drawn, {}), oracle(rule, *drawn, {}), **EXACT)


@every_rule
def test_float32_is_as_exact_as_float32_allows(room, rule):
    drawn = draw(rule, [(7, 63)], {})
    narrow = mapped(torch.Tensor.float, drawn)
    wide = mapped(torch.Tensor.double, narrow)
    # A dozen roundings of 6e-8 each, on numbers up to ten.
    got = mapped(torch.Tensor.double, ours(rule, *narrow, {}))
    torch.testing.assert_close(got, oracle(rule, *wide, {}), rtol=2e-6, atol=4e-6)


@every_rule
def test_a_long_float32_row_loses_no_more_than_a_short_one(in_native, rule):
    narrow = mapped(torch.Tensor.float, draw(rule, [(1, 100_000)], {}))
    want = oracle(rule, *mapped(torch.Tensor.double, narrow), {})
    got = mapped(torch.Tensor.double, ours(rule, *narrow, {}))
    # y_bar of a softmax row of n elements is of order 1/n: relative to the largest element.
    for a, b in zip(mapped(torch.flatten, got), mapped(torch.flatten, want), strict=True):
        a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@every_rule
def test_strided_inputs_give_the_results_of_their_copies(room, rule):
    x, x_dot, y_bar, y_bar_dot = (torch.randn(63, 6, dtype=torch.float64) for _ in range(4))
    strided = (x.mT,), (x_dot.mT,), y_bar.mT, y_bar_dot[:, :1].mT.expand(6, 63)
    copies = mapped(lambda t: t.contiguous().clone(), strided)
    torch.testing.assert_close(ours(rule, *strided, {}), ours(rule, *copies, {}), **EXACT)


@every_rule
def test_tangents_leave_the_first_order_results_bitwise_unchanged(room, rule):
    xs, xs_dot, y_bar, y_bar_dot = draw(rule, [(11, 63)], {}, torch.float32)
    y, _, xs_bar, _ = ours(rule, xs, xs_dot, y_bar, y_bar_dot, {})
    assert same_bits(first_order(rule, xs, y_bar, {}), (y, xs_bar))


@every_rule
def test_results_are_the_same_bits_on_any_number_of_threads(in_native, threads, rule):
    drawn = draw(rule, [(300, 257)], {}, torch.float32)
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
    _, _, saved = rule.fwd_jvp(xs, xs_dot)
    got = rule.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need[:1], need[1:])
    for value, wanted, full in zip(got, need, everything, strict=True):
        assert not wanted or same_bits(tuple(value), full)


@every_rule
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_minus_infinity_is_a_probability_of_zero_and_a_row_of_nothing_else_is_nan(room, rule):
    x = torch.randn(3, 33, dtype=torch.float64)
    x[0, ::2] = -torch.inf
    x[1] = -torch.inf
    x[2, 3] = torch.nan
    torch.testing.assert_close(rule(x), rule.reference(x), **EXACT, equal_nan=True)


@every_rule
def test_another_dimension_or_dtype_takes_the_eager_room_and_a_forced_kernel_refuses_it(rule):
    x = torch.randn(3, 5)
    assert same_bits(rule(x, dim=0), rule.reference(x, dim=0))
    assert rule(x.bfloat16()).dtype == torch.bfloat16
    with use_backend("native"), pytest.raises(ValueError, match="no such kernel"):
        rule(x, dim=0)


@every_rule
def test_nothing_gives_nothing(rule):
    for shape in ((0, 5), (5, 0)):
        x = torch.empty(shape, requires_grad=True)
        assert torch.autograd.grad(rule(x).sum(), x)[0].shape == shape


@pytest.mark.parametrize("name", RULES)
def test_a_dropped_term_is_noticed(monkeypatch, name):
    """The oracle can fail: with the tangent of y forgotten in the backward nothing above would pass."""
    fwd, bwd = _ROOMS[name]["eager"]

    def mutant(y, y_dot, *arguments, **options):
        return bwd(y, torch.zeros_like(y), *arguments, **options)

    monkeypatch.setitem(_ROOMS[name], "eager", (fwd, mutant))
    drawn = draw(RULES[name], [(3, 5)], {})
    with use_backend("eager"), pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(RULES[name], *drawn, {}), oracle(RULES[name], *drawn, {}), **EXACT)
