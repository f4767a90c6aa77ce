"""The gated activations in their three rooms, against what torch.func makes of the references."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from mamlfast.dual import Dual
from mamlfast.ops import elementwise
from mamlfast.ops import gated as gates
from mamlfast.ops.backend import use_backend
from mamlfast.ops.gated import _matrices, gated, geglu, geglu_tanh, swiglu, swiglu_packed
from tests.rooms import EXACT, draw, first_order, mapped, oracle, ours, same_bits

NAMES = ["swiglu", "geglu", "geglu_tanh", "reglu"]
RULES = {name: getattr(gates, name) for name in (*NAMES, *(f"{name}_packed" for name in NAMES))}
two_operands = pytest.mark.parametrize("rule", [RULES[name] for name in NAMES], ids=NAMES)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 31, 33)], ids=str)
def test_the_four_functions_match_torch_func_on_the_reference(room, rule, shape):
    drawn = draw(rule, _shapes(rule, *shape), {})
    xs, _, y_bar, _ = drawn = mapped(lambda x: 2 * x, drawn)
    y, y_dot, xs_bar, xs_bar_dot = oracle(rule, *drawn, {})
    torch.testing.assert_close(first_order(rule, xs, y_bar, {}), (y, xs_bar), **EXACT)
    torch.testing.assert_close(ours(rule, *drawn, {}), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)


def _shapes(rule, *shape):
    """Of the operands whose result has this shape."""
    return [(*shape[:-1], 2 * shape[-1])] if rule.name.endswith("_packed") else [shape] * 2


def _strided(t, how):
    """The same numbers in another place; "expanded", as the gradient of a sum is, fewer of them."""
    if how == "half":
        return torch.cat((torch.full_like(t, torch.nan), t), -1).chunk(2, -1)[1]
    if how == "rows":
        return torch.stack((t, torch.full_like(t, torch.nan)), 1)[:, 0]
    if how == "transposed":
        return t.mT.contiguous().mT
    return t[..., :1].expand(t.shape) if how == "expanded" else t


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rule=st.sampled_from(list(RULES.values())),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 37)),
    layouts=st.lists(st.sampled_from(["plain", "half", "rows", "transposed", "expanded"]), min_size=6, max_size=6),
)
def test_any_shape_in_any_layout_gives_the_results_of_contiguous_copies(room, rule, shape, layouts):
    xs, xs_dot, *cotangents = draw(rule, _shapes(rule, *shape), {})
    layouts = iter(layouts)
    strided = mapped(lambda t: _strided(t, next(layouts)), (xs, xs_dot, *cotangents))
    got = ours(rule, *strided, {})
    torch.testing.assert_close(got, oracle(rule, *mapped(torch.clone, strided), {}), **EXACT)
    xs, _, y_bar, _ = strided
    assert same_bits(first_order(rule, xs, y_bar, {}), (got[0], got[2]))


@two_operands
def test_a_number_is_a_tensor_too(room, rule):
    drawn = draw(rule, [(), ()], {})
    torch.testing.assert_close(ours(rule, *drawn, {}), oracle(rule, *drawn, {}), **EXACT)


def test_halves_of_a_fused_projection_are_not_copied():
    x = torch.randn(2, 3, 10)
    a, b = x.chunk(2, -1)
    rows = _matrices(a, b, None)
    assert [t.data_ptr() for t in rows[:2]] == [a.data_ptr(), b.data_ptr()]
    assert rows[0].stride() == (10, 1) and rows[2] is None


@every_rule
def test_float32_is_as_exact_as_float32_allows(in_native, rule):
    drawn = mapped(lambda t: 3 * t, draw(rule, _shapes(rule, 40, 63), {}, torch.float32))
    got = mapped(torch.Tensor.double, ours(rule, *drawn, {}))
    # A few units in the last place of terms that are products of up to four numbers around ten.
    torch.testing.assert_close(got, oracle(rule, *mapped(torch.Tensor.double, drawn), {}), rtol=2e-6, atol=1e-4)


@two_operands
@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_gates_are_open_or_shut_and_everything_stays_finite(request, rule, name, dtype):
    if name == "triton":
        pytest.importorskip("triton")
    else:
        request.getfixturevalue("in_native")
    far = 1e30 if name == "native" else 1e4  # Triton's GELU cubes its argument
    a = torch.tensor([far, -far, 1e4, -1e4, 745.0, -745.0, 104.0, -104.0, 88.5, -88.5, 0.0], dtype=dtype)
    one = torch.ones_like(a)
    with use_backend(name):
        y, y_dot, (a_bar, b_bar), (a_bar_dot, b_bar_dot) = ours(rule, (a, one), (one, one), one, one, {})
    assert all(t.isfinite().all() for t in (y, y_dot, a_bar, b_bar, a_bar_dot, b_bar_dot))
    opened, shut = a > 80, a < -80
    for got, want in ((y, a), (b_bar, a), (a_bar, one)):
        torch.testing.assert_close(got[opened], want[opened], rtol=1e-6, atol=0)
        assert got[shut].abs().max() < 1e-30
    torch.testing.assert_close(
        a_bar_dot[opened], 2 * one[opened], rtol=1e-6, atol=0
    )  # phi' (y_bar_dot b + y_bar b_dot)


@every_rule
def test_tangents_leave_the_first_order_results_bitwise_unchanged(room, rule):
    xs, xs_dot, y_bar, y_bar_dot = draw(rule, _shapes(rule, 11, 63), {}, torch.float32)
    y, _, xs_bar, _ = ours(rule, xs, xs_dot, y_bar, y_bar_dot, {})
    assert same_bits(first_order(rule, xs, y_bar, {}), (y, xs_bar))


@every_rule
def test_results_are_the_same_bits_on_any_number_of_threads(in_native, threads, rule):
    """Pieces of the range begin and end within rows."""
    drawn = draw(rule, _shapes(rule, 97, 701), {}, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ours(rule, *drawn, {}))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@every_rule
def test_arguments_are_left_as_they_were(room, rule):
    drawn = draw(rule, _shapes(rule, 3, 5), {})
    before = mapped(torch.clone, drawn)
    ours(rule, *drawn, {})
    assert same_bits(drawn, before)


@two_operands
@pytest.mark.parametrize("need", [(False, False), (True, False), (False, True)])
def test_what_is_not_needed_changes_nothing_that_is(room, rule, need):
    xs, xs_dot, y_bar, y_bar_dot = draw(rule, [(3, 63)] * 2, {})
    everything = ours(rule, xs, xs_dot, y_bar, y_bar_dot, {})[2:]
    for needs in ((need, (True, True)), ((True, True), need)):
        got = rule.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, *needs)
        for values, wanted, full in zip(got, needs, everything, strict=True):
            assert all(torch.equal(v, f) for v, w, f in zip(values, wanted, full, strict=True) if w)


def test_cotangents_that_nobody_wants_are_not_computed(in_native):
    xs, xs_dot, y_bar, y_bar_dot = draw(swiglu, [(3, 63)] * 2, {})
    neither, one = (False, False), (True, False)
    assert swiglu.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, neither, one)[0] == (None, None)
    assert swiglu.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, one, neither)[1] == (None, None)
    xs, xs_dot, y_bar, y_bar_dot = draw(swiglu_packed, [(3, 62)], {})
    assert swiglu_packed.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, (False,), (True,))[0] == (None,)
    assert swiglu_packed.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, (True,), (False,))[1] == (None,)


@pytest.mark.parametrize("rule", [swiglu, swiglu_packed], ids=["swiglu", "swiglu_packed"])
def test_gradcheck_and_gradgradcheck_in_both_modes(room, rule):
    xs = tuple(x.requires_grad_() for x in draw(rule, _shapes(rule, 1, 2), {})[0])
    assert gradcheck(rule, xs, check_forward_ad=True)
    assert gradgradcheck(rule, xs, check_fwd_over_rev=True)


def test_a_dual_gets_what_the_unfused_module_gives_it():
    """``up * act(gate)`` of Phi-3, both halves of one projection."""
    (x,), (x_dot,), *_ = draw(elementwise.silu, [(3, 10)], {})
    gate, up = Dual(x, x_dot).chunk(2, -1)
    want = up * torch.nn.functional.silu(gate)
    for got in (swiglu(gate, up), swiglu_packed(Dual(x, x_dot))):
        torch.testing.assert_close((got.primal, got.tangent), (want.primal, want.tangent), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_rule_has_the_bits_of_the_one_with_two_operands(room, name):
    xs, xs_dot, y_bar, y_bar_dot = draw(RULES[f"{name}_packed"], [(7, 62)], {}, torch.float32)
    y, y_dot, *bars = ours(RULES[f"{name}_packed"], xs, xs_dot, y_bar, y_bar_dot, {})
    pair, pair_dot = xs[0].chunk(2, -1), xs_dot[0].chunk(2, -1)
    want = ours(RULES[name], pair, pair_dot, y_bar, y_bar_dot, {})
    assert same_bits((y, y_dot, *(tuple(x.chunk(2, -1)) for (x,) in bars)), want)


@every_rule
def test_half_types_round_as_the_module_does_and_derivatives_once(rule):
    xs, xs_dot, y_bar, y_bar_dot = draw(rule, _shapes(rule, 8, 63), {}, torch.bfloat16)
    got = ours(rule, xs, xs_dot, y_bar, y_bar_dot, {})
    assert {t.dtype for t in (got[0], got[1], *got[2], *got[3])} == {torch.bfloat16}
    assert same_bits(got[0], rule.reference(*xs))
    wide = oracle(rule, *mapped(torch.Tensor.double, (xs, xs_dot, y_bar, y_bar_dot)), {})
    # Half a unit in the last place of bfloat16, 2^-8, and the float32 arithmetic before it.
    torch.testing.assert_close(mapped(torch.Tensor.double, got[1:]), wide[1:], rtol=2**-8 + 1e-5, atol=1e-5)


@every_rule
def test_nothing_takes_the_eager_room(rule):
    xs = tuple(torch.empty(shape, requires_grad=True) for shape in _shapes(rule, 0, 5))
    assert [g.shape for g in torch.autograd.grad(rule(*xs).sum(), xs)] == [x.shape for x in xs]
    with use_backend("native"), pytest.raises(ValueError, match="no such kernel"):
        rule(*xs)


@pytest.mark.parametrize(
    ("a", "b"),
    [(torch.ones(3, 5), torch.ones(5)), (torch.ones(3, 5), torch.ones(3, 4)), (torch.ones(3), torch.ones(3).double())],
)
def test_bad_arguments_are_named(a, b):
    with pytest.raises(ValueError, match="swiglu expects a and b of one shape and dtype; got"):
        swiglu(a, b)


@pytest.mark.parametrize("shape", [(), (3, 5)])
def test_an_odd_projection_has_no_halves(shape):
    with pytest.raises(ValueError, match=r"swiglu_packed expects x \[\.\.\., 2 F\]"):
        swiglu_packed(torch.ones(shape))


def test_the_kernels_refuse_what_does_not_fit(in_native):
    a, other = torch.ones(3, 4), torch.ones(3, 5)
    with pytest.raises(RuntimeError, match="4 expected in dimension 1, got 5"):
        torch.ops.mamlfast.swiglu_fwd(a, other, None, None, torch.empty_like(a), None)
    with pytest.raises(RuntimeError, match="neighbours along the last dimension"):
        torch.ops.mamlfast.swiglu_fwd(a, torch.ones(4, 3).mT, None, None, torch.empty_like(a), None)
    with pytest.raises(RuntimeError, match="expected together"):
        torch.ops.mamlfast.swiglu_fwd(a, a, a, None, torch.empty_like(a), None)
    with pytest.raises(RuntimeError, match="or all four expected"):
        torch.ops.mamlfast.swiglu_bwd(a, a, a, None, None, None, None, None, None, None)


def test_a_wrong_gate_and_a_dropped_term_are_noticed():
    """The oracle can fail: the two GELUs differ by 5e-4, and a missing tangent of b by more."""
    xs, xs_dot, y_bar, y_bar_dot = drawn = draw(geglu, [(3, 5)] * 2, {})
    want = oracle(geglu, *drawn, {})
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(geglu_tanh, *drawn, {}), want, **EXACT)
    without_b_dot = ours(geglu, xs, (xs_dot[0], torch.zeros_like(xs[1])), y_bar, y_bar_dot, {})
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(without_b_dot[3], want[3], **EXACT)
    curved = gated("geglu", elementwise.gelu)
    straight = elementwise.elementwise("gelu", elementwise.gelu.reference, elementwise._gelu_first, None)
    mutant = gated("geglu", straight)
    with use_backend("eager"):
        torch.testing.assert_close(ours(curved, *drawn, {}), want, **EXACT)
        y, y_dot, xs_bar, xs_bar_dot = ours(mutant, *drawn, {})
        torch.testing.assert_close((y, y_dot, xs_bar, xs_bar_dot[1]), (*want[:3], want[3][1]), **EXACT)
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(xs_bar_dot[0], want[3][0], **EXACT)
