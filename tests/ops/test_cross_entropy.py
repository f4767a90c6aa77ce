"""Cross-entropy in its three rooms, against what torch.func makes of the reference."""

import pytest
import torch

from mamlfast.ops import cross_entropy
from mamlfast.ops.backend import use_backend
from mamlfast.ops.cross_entropy import _ROOMS
from tests.rooms import EXACT, draw, first_order, mapped, oracle, ours, same_bits

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smooth": {"label_smoothing": 0.2},
    "smooth none": {"label_smoothing": 0.2, "reduction": "none"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# One column, and more than a block of either kernel.
SHAPES = [(1, 1), (1, 63), (5, 7), (4, 2100)]


def _with_target(shape, options, ignored=(1,)):
    R, V = shape
    target = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(1))
    for row in ignored:
        target[row:][:1] = -100
    return {"target": target} | options


def _draw(shape, options, dtype=torch.float64):
    """Logits of order three: some probabilities are near one, most near zero."""
    xs, *rest = draw(cross_entropy, [shape], options, dtype)
    return mapped(lambda x: 3 * x, xs), *rest


@every_option
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_four_functions_match_torch_func_on_the_reference(room, shape, options):
    if room == "triton" and shape[1] > 1000:
        shape = shape[0], 70  # three of its blocks; it pays for every one
    options = _with_target(shape, options)
    drawn = _draw(shape, options)
    y, y_dot, xs_bar, xs_bar_dot = oracle(cross_entropy, *drawn, options)
    xs, _, y_bar, _ = drawn
    torch.testing.assert_close(first_order(cross_entropy, xs, y_bar, options), (y, xs_bar), **EXACT)
    torch.testing.assert_close(ours(cross_entropy, *drawn, options), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)


@every_option
def test_float32_is_as_exact_as_float32_allows(room, options):
    options = _with_target((7, 63), options)
    narrow = mapped(torch.Tensor.float, _draw((7, 63), options))
    want = oracle(cross_entropy, *mapped(torch.Tensor.double, narrow), options)
    got = mapped(torch.Tensor.double, ours(cross_entropy, *narrow, options))
    # A dozen roundings of 6e-8 each, on numbers up to ten.
    torch.testing.assert_close(got, want, rtol=2e-6, atol=4e-6)


def test_a_vocabulary_of_a_hundred_thousand_costs_float32_no_digits(in_native):
    options = _with_target((3, 100_003), {})
    narrow = mapped(torch.Tensor.float, _draw((3, 100_003), options))
    y, y_dot, (z_bar,), (z_bar_dot,) = oracle(cross_entropy, *mapped(torch.Tensor.double, narrow), options)
    got_y, got_y_dot, (got_bar,), (got_bar_dot,) = ours(cross_entropy, *narrow, options)
    torch.testing.assert_close(got_y.double(), y, rtol=2e-7, atol=0)
    torch.testing.assert_close(got_y_dot.double(), y_dot, rtol=2e-6, atol=2e-6)
    # Relative to each element, though they span ten orders of magnitude; z_bar_dot has a zero where z_dot = mu.
    torch.testing.assert_close(got_bar.double(), z_bar, rtol=2e-6, atol=0)
    torch.testing.assert_close(got_bar_dot.double(), z_bar_dot, rtol=2e-6, atol=1e-6 * z_bar_dot.abs().max().item())


def test_strided_inputs_give_the_results_of_their_copies(room):
    z, z_dot = (torch.randn(9, 6, dtype=torch.float64) for _ in range(2))
    target = torch.tensor([1, 0, -100, 0, 8, 0, 3, 0, 2, 0, 1, 0])[::2]
    y_bar, y_bar_dot = torch.randn((), dtype=torch.float64).expand(6), torch.randn(12, dtype=torch.float64)[::2]
    strided = (z.mT,), (z_dot.mT,), y_bar, y_bar_dot
    copies = mapped(lambda t: t.contiguous().clone(), strided)
    options = {"target": target, "reduction": "none"}
    got, want = ours(cross_entropy, *strided, options), ours(cross_entropy, *copies, options)
    torch.testing.assert_close(got, want, **EXACT)


@every_option
def test_tangents_leave_the_first_order_results_bitwise_unchanged(room, options):
    options = _with_target((5, 77), options)
    xs, xs_dot, y_bar, y_bar_dot = _draw((5, 77), options, torch.float32)
    y, _, xs_bar, _ = ours(cross_entropy, xs, xs_dot, y_bar, y_bar_dot, options)
    assert same_bits(first_order(cross_entropy, xs, y_bar, options), (y, xs_bar))


@every_option
def test_results_are_the_same_bits_on_any_number_of_threads(in_native, threads, options):
    options = _with_target((301, 257), options)
    drawn = _draw((301, 257), options, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ours(cross_entropy, *drawn, options))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_arguments_are_left_as_they_were(room):
    options = _with_target((3, 5), {})
    drawn = _draw((3, 5), options)
    before = mapped(torch.clone, (*drawn, options["target"]))
    ours(cross_entropy, *drawn, options)
    assert same_bits((*drawn, options["target"]), before)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_what_is_not_needed_changes_nothing_that_is(room, need):
    options = _with_target((3, 63), {"label_smoothing": 0.1})
    xs, xs_dot, y_bar, y_bar_dot = _draw((3, 63), options)
    everything = ours(cross_entropy, xs, xs_dot, y_bar, y_bar_dot, options)[2:]
    _, _, saved = cross_entropy.fwd_jvp(xs, xs_dot, **options)
    got = cross_entropy.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need[:1], need[1:], **options)
    for value, wanted, full in zip(got, need, everything, strict=True):
        assert not wanted or same_bits(tuple(value), full)


def test_what_an_ignored_row_holds_is_never_seen(room):
    options = _with_target((4, 9), {})
    (z,), (z_dot,), *_ = drawn = _draw((4, 9), options)
    clean = ours(cross_entropy, *drawn, options)
    z[1, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    z_dot[1] = torch.nan
    got = ours(cross_entropy, *drawn, options)
    torch.testing.assert_close(got, clean, rtol=0, atol=0)
    assert not got[2][0][1].any() and not got[3][0][1].any()


def test_a_mean_of_no_rows_is_nan_and_its_gradient_zero(room):
    z = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(z, target=torch.full((3,), -100))
    assert loss.isnan()
    assert not torch.autograd.grad(loss, z)[0].any()


def test_masked_logits_have_no_probability_and_no_gradient(room):
    z = torch.randn(3, 40, dtype=torch.float64)
    z[:, 5:38] = -torch.inf
    options = {"target": torch.tensor([0, 2, 39])}
    z_dot, one = torch.randn_like(z), torch.ones((), dtype=torch.float64)
    y, _, (z_bar,), (z_bar_dot,) = ours(cross_entropy, (z,), (z_dot,), one, one, options)
    torch.testing.assert_close(y, cross_entropy.reference(z, **options), **EXACT)
    assert not z_bar[:, 5:38].any() and not z_bar_dot[:, 5:38].any()


def test_another_ignore_index_may_be_a_word_of_the_vocabulary(room):
    z, target = torch.randn(4, 7, dtype=torch.float64), torch.tensor([0, 3, 3, 6])
    want = cross_entropy.reference(z, target=target, ignore_index=3)
    torch.testing.assert_close(cross_entropy(z, target=target, ignore_index=3), want, **EXACT)


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_outside_the_vocabulary_is_an_error(in_native, label):
    z, target = torch.randn(2, 7), torch.tensor([0, label])
    with pytest.raises(RuntimeError, match=f"the label {label} of row 1 is out of bounds; labels from 0 to 6"):
        cross_entropy(z, target=target)


def test_the_rooms_agree_on_what_a_forward_saves(in_native):
    """A backward may run in another room than its forward: only what they share may be asked of ``saved``."""
    options = _with_target((5, 77), {})
    xs, xs_dot, y_bar, y_bar_dot = drawn = _draw((5, 77), options, torch.float32)
    want = ours(cross_entropy, *drawn, options)[2:]
    _, _, saved = cross_entropy.fwd_jvp(xs, xs_dot, **options)
    both = (True,), (True,)
    with use_backend("eager"):
        got = cross_entropy.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, *both, **options)
        _, _, saved = cross_entropy.fwd_jvp(xs, xs_dot, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got = cross_entropy.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, *both, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_half_types_take_the_eager_room_on_a_cpu():
    z, target = torch.randn(3, 5, dtype=torch.bfloat16), torch.tensor([0, 1, 2])
    assert cross_entropy(z, target=target).dtype == torch.bfloat16
    with use_backend("native"), pytest.raises(ValueError, match="cannot serve"):
        cross_entropy(z, target=target)


def test_bfloat16_through_the_interpreter_is_computed_in_float32():
    pytest.importorskip("triton")
    options = _with_target((5, 77), {})
    drawn = _draw((5, 77), options, torch.bfloat16)
    with use_backend("triton"):
        got = ours(cross_entropy, *drawn, options)
    assert got[0].dtype == got[2][0].dtype == torch.bfloat16
    want = oracle(cross_entropy, *mapped(torch.Tensor.double, drawn), options)
    torch.testing.assert_close(mapped(torch.Tensor.double, got), want, rtol=1e-2, atol=1e-2)


def test_a_dropped_term_is_noticed(monkeypatch):
    """The oracle can fail: without ``g_dot om (p - q)`` nothing above would pass."""
    fwd, bwd = _ROOMS["eager"]

    def mutant(z, z_dot, saved, y_bar, y_bar_dot, *arguments, **options):
        return bwd(z, z_dot, saved, y_bar, torch.zeros_like(y_bar_dot), *arguments, **options)

    monkeypatch.setitem(_ROOMS, "eager", (fwd, mutant))
    options = _with_target((3, 5), {})
    drawn = _draw((3, 5), options)
    want = oracle(cross_entropy, *drawn, options)
    with use_backend("eager"), pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(cross_entropy, *drawn, options), want, **EXACT)


@pytest.mark.parametrize(
    ("z", "target", "options", "message"),
    [
        ((3, 5), torch.zeros(4, dtype=torch.int64), {}, r"z \[3, 5\] and target \[4\]"),
        ((3, 5, 2), torch.zeros(3, dtype=torch.int64), {}, r"flatten the logits"),
        ((3, 5), torch.zeros(3), {}, r"target \[3\] torch.float32"),
        ((3, 5), torch.zeros(3, dtype=torch.int64), {"reduction": "max"}, r"got 'max'"),
    ],
    ids=["rows", "dimensions", "dtype", "reduction"],
)
def test_bad_arguments_are_named(z, target, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.ones(z), target=target, **options)
