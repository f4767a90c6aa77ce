"""The fused linear + cross-entropy in its three rooms, against what torch.func and autograd make of the reference."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp
from torch.utils._python_dispatch import TorchDispatchMode

from mamlfast.dual import Dual
from mamlfast.ops import linear_cross_entropy_chunks as chunks
from mamlfast.ops.backend import use_backend
from mamlfast.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    summed_losses,
    token_losses,
)
from tests.rooms import EXACT, draw, first_order, mapped, oracle, ours, same_bits

# An attribute of the package may be the function of that name, so the module is fetched by its own.
module = import_module("mamlfast.ops.linear_cross_entropy")

CONSTANTS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.1},
    "capped": {"softcap": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0},
}
every_constant = pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
# R, d, V: one of each, and more than a block of either kernel and than three chunks.
SIZES = [(1, 1, 1), (7, 3, 70)]
IGNORED = -100


@pytest.fixture(autouse=True)
def three_rows_in_a_chunk(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 1)
    monkeypatch.setattr(chunks, "MIN_ROWS", 3)


def _labels(R, V):
    return torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(1))


def _shapes(R, d, V, bias=True):
    return [(R, d), (V, d), *([(V,)] if bias else [])]


def _randn(*shapes, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


@every_constant
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_four_functions_of_the_tokens_losses_match_torch_func(room, size, bias, constants):
    options = {"target": _labels(size[0], size[2])} | constants
    drawn = draw(token_losses, _shapes(*size, bias), options)
    y, y_dot, xs_bar, xs_bar_dot = oracle(token_losses, *drawn, options)
    torch.testing.assert_close(ours(token_losses, *drawn, options), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)
    torch.testing.assert_close(first_order(token_losses, drawn[0], drawn[2], options), (y, xs_bar), **EXACT)


# What the forward formed: nothing, everything, all that a Hessian-vector product needs, something else.
FORMED = {
    "backward": None,
    "forward": ((True,) * 3, (True,) * 3),
    "hvp": ((True, False, False), (True,) * 3),
    "odd": ((False, True, False), (True, False, False)),
}


@pytest.mark.parametrize("formed", FORMED.values(), ids=FORMED)
@pytest.mark.parametrize("constants", [CONSTANTS["plain"], CONSTANTS["all"]], ids=["plain", "all"])
def test_the_four_functions_of_the_summed_losses_match_torch_func_wherever_gradients_are_formed(
    room, formed, constants
):
    options = {"target": _labels(7, 70), "formed": formed} | constants
    drawn = draw(summed_losses, [*_shapes(7, 3, 70), (7,)], options)
    y, y_dot, xs_bar, xs_bar_dot = oracle(summed_losses, *drawn, options)
    torch.testing.assert_close(ours(summed_losses, *drawn, options), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)
    torch.testing.assert_close(first_order(summed_losses, drawn[0], drawn[2], options), (y, xs_bar), **EXACT)


@pytest.mark.parametrize("formed", FORMED.values(), ids=FORMED)
def test_without_a_cotangent_of_the_loss_nothing_is_missing_from_that_of_its_tangent(formed):
    """The Hessian-vector product proper: here a gradient that the forward did not form may stay away."""
    options = {"target": _labels(7, 5), "formed": formed}
    xs, xs_dot, y_bar, _ = draw(summed_losses, [*_shapes(7, 3, 5), (7,)], options)
    drawn = xs, xs_dot, y_bar, torch.zeros_like(y_bar)
    *_, xs_bar, xs_bar_dot = oracle(summed_losses, *drawn, options)
    _, _, saved = summed_losses.fwd_jvp(xs, xs_dot, **options)
    need, need_dot = (True, False, False, True), (True,) * 4
    got, got_dot = summed_losses.bwd_jvp(xs, xs_dot, saved, *drawn[2:], need, need_dot, **options)
    torch.testing.assert_close(got_dot, xs_bar_dot, **EXACT)
    torch.testing.assert_close((got[0], got[3]), (xs_bar[0], xs_bar[3]), **EXACT)


@pytest.mark.parametrize("rule", [token_losses, summed_losses], ids=lambda rule: rule.name)
@pytest.mark.parametrize("constant", [0, 1, 2, (0, 1), (0, 1, 2)], ids=str)
def test_the_tangent_of_a_constant_may_be_none(room, rule, constant):
    options = {"target": _labels(5, 6)}
    xs, xs_dot, *cotangents = draw(rule, [*_shapes(5, 3, 6), *([(5,)] if rule is summed_losses else [])], options)
    constant = constant if isinstance(constant, tuple) else (constant,)
    zeros = tuple(torch.zeros_like(t) if i in constant else t for i, t in enumerate(xs_dot))
    nothing = tuple(None if i in constant else t for i, t in enumerate(xs_dot))
    want = oracle(rule, xs, zeros, *cotangents, options)
    torch.testing.assert_close(ours(rule, xs, nothing, *cotangents, options), want, **EXACT)
    forward = ((True,) * 3,) * 2
    if rule is summed_losses:
        got = ours(rule, xs, nothing, *cotangents, options | {"formed": forward})
        torch.testing.assert_close(got, want, **EXACT)


def _batch(reduction, constants):
    """Operands of two sequences, directions, and a target with ignored labels."""
    xs, vs = (tuple(_randn((2, 5, 3), (6, 3), (6,), (2, 5), seed=seed)) for seed in (0, 1))
    target = _labels(10, 6).view(2, 5)
    target[0, 3] = target[1, :2] = IGNORED
    return xs, vs, {"target": target, "reduction": reduction} | constants


def _losses(f, options, **more):
    """A scalar of f with a second path to the operands, so that a loss constant to autograd would show."""

    def loss(x, w, b, om):
        return (f(x, w, b, weights=om, **options, **more) ** 2).sum() + (x * x).sum() * (w * w).sum()

    return loss


def _by_double_backward(loss, xs, vs):
    leaves = [x.clone().requires_grad_() for x in xs]
    g = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return *g, *torch.autograd.grad(g, leaves, vs)


CASES = {
    "mean": ("mean", {}),
    "sum": ("sum", CONSTANTS["all"]),
    "none": ("none", CONSTANTS["z-loss"]),
    "normalizer": ("mean", {"normalizer": 3.5} | CONSTANTS["capped"]),
}


@pytest.mark.parametrize(("reduction", "constants"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_every_mode_gives_the_hessian_vector_product_of_the_reference(reduction, constants, gradients):
    xs, vs, options = _batch(reduction, constants)
    want = _by_double_backward(_losses(linear_cross_entropy_reference, options), xs, vs)
    loss = _losses(linear_cross_entropy, options, gradients=gradients)
    torch.testing.assert_close(_by_double_backward(loss, xs, vs), want, **EXACT)
    argnums = tuple(range(len(xs)))
    gradient, product = jvp(grad(loss, argnums), xs, vs)
    torch.testing.assert_close((*gradient, *product), want, **EXACT)
    product = grad(lambda *xs: jvp(loss, xs, vs)[1], argnums)(*xs)
    torch.testing.assert_close(product, want[len(xs) :], **EXACT)
    leaves = [x.clone().requires_grad_() for x in xs]
    pair = loss(*(Dual(x, v) for x, v in zip(leaves, vs, strict=True)))
    total = torch.autograd.grad((pair.primal, pair.tangent), leaves)  # the product and the gradient at once
    torch.testing.assert_close(total, tuple(g + h for g, h in zip(want[:4], want[4:], strict=True)), **EXACT)


def test_gradgradcheck_in_both_modes(room):
    if room == "triton":
        pytest.skip("thousands of programs")
    x, w = (t.requires_grad_() for t in _randn((4, 2), (5, 2)))
    target = torch.tensor([0, 4, IGNORED, 2])

    def loss(x, w):
        return linear_cross_entropy(x, w, target=target, softcap=3.0, gradients="forward")

    torch.autograd.gradcheck(loss, (x, w), check_forward_ad=True)
    torch.autograd.gradgradcheck(loss, (x, w), check_fwd_over_rev=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_matches_the_reference(data):
    B, T, d, V = (data.draw(st.integers(1, high), label=name) for name, high in zip("BTdV", (3, 5, 6, 9), strict=True))
    ignored = data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T), label="ignored")
    options = {
        "reduction": data.draw(st.sampled_from(["sum", "none"]), label="reduction"),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.3])),
        "z_loss": data.draw(st.sampled_from([0.0, 0.3])),
        "softcap": data.draw(st.sampled_from([None, 1.5])),
        "target": _labels(B * T, V).masked_fill(torch.tensor(ignored), IGNORED).view(B, T),
    }
    (x, w, b, om), vs = (_randn((B, T, d), (V, d), (V,), (B, T), seed=seed) for seed in (0, 1))
    want = _by_double_backward(_losses(linear_cross_entropy_reference, options), (x, w, b, om), vs)
    got = _by_double_backward(_losses(linear_cross_entropy, options), (x, w, b, om), vs)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}], ids=str
)
def test_what_pytorch_has_is_what_pytorch_computes(room, options):
    x, w, b = _randn((7, 3), (6, 3), (6,))
    target = _labels(7, 6)
    target[2] = IGNORED
    want = F.cross_entropy(F.linear(x, w, b), target, **options)
    torch.testing.assert_close(linear_cross_entropy(x, w, b, target=target, **options), want, **EXACT)


def test_a_mean_with_weights_divides_by_their_sum_over_the_tokens_that_count():
    x, w = _randn((5, 3), (6, 3))
    om, target = torch.tensor([1.0, 0.0, 2.0, 5.0, 0.5], dtype=torch.float64), _labels(5, 6)
    target[3] = IGNORED
    losses = F.cross_entropy(x @ w.mT, target, reduction="none")
    got = linear_cross_entropy(x, w, target=target, weights=om)
    torch.testing.assert_close(got, (om * losses).sum() / 3.5, **EXACT)


@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_the_mean_of_no_tokens_is_nan_and_its_gradients_are_zero(room, gradients):
    x, w = (t.requires_grad_() for t in _randn((3, 2), (5, 2)))
    target = torch.full((3,), IGNORED)
    loss = linear_cross_entropy(x, w, target=target, gradients=gradients)
    assert loss.isnan()
    assert not any(t.any() for t in torch.autograd.grad(loss, (x, w)))
    assert linear_cross_entropy(x, w, target=target, reduction="sum") == 0
    assert linear_cross_entropy(x, w, target=target, reduction="none").tolist() == [0.0] * 3
    pair = linear_cross_entropy(Dual(x, torch.ones_like(x)), w, target=target, gradients=gradients)
    assert not any(t.any() for t in torch.autograd.grad(pair.tangent, (x, w)))


def test_what_an_ignored_row_holds_is_never_seen(room):
    (x, w, b, _), _, options = _batch("mean", {})
    hole = options["target"] == IGNORED

    def loss_and_gradients(x):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = linear_cross_entropy(*leaves, **options)
        return loss, *torch.autograd.grad(loss, leaves)

    clean, dirty = loss_and_gradients(x), loss_and_gradients(x.masked_fill(hole[..., None], torch.nan))
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert not dirty[1][hole].any()


def test_another_ignore_index_may_be_a_word_of_the_vocabulary():
    x, w = _randn((4, 3), (7, 3))
    target = torch.tensor([0, 3, 3, 6])
    want = F.cross_entropy(x @ w.mT, target, ignore_index=3)
    torch.testing.assert_close(linear_cross_entropy(x, w, target=target, ignore_index=3), want, **EXACT)


def test_strided_operands_give_the_results_of_their_copies(room):
    x, x_dot = (t.mT for t in _randn((3, 7), (3, 7)))
    w, w_dot = (t[:, ::2] for t in _randn((6, 6), (6, 6)))
    target = _labels(14, 6)[::2]
    y_bar, y_bar_dot = _randn((), seed=2)[0].expand(7), _randn((14,))[0][::2]
    strided = (x, w), (x_dot, w_dot), y_bar, y_bar_dot
    copies = mapped(lambda t: t.contiguous().clone(), strided)
    got = ours(token_losses, *strided, {"target": target})
    torch.testing.assert_close(got, ours(token_losses, *copies, {"target": target.clone()}), **EXACT)


@every_constant
def test_float32_is_as_exact_as_float32_allows(room, constants):
    options = {"target": _labels(7, 70)} | constants
    narrow = mapped(torch.Tensor.float, draw(token_losses, _shapes(7, 3, 70), options))
    want = oracle(token_losses, *mapped(torch.Tensor.double, narrow), options)
    got = mapped(torch.Tensor.double, ours(token_losses, *narrow, options))
    # Some dozen roundings of 6e-8 each, on numbers up to ten, seven to seventy of them added up.
    torch.testing.assert_close(got, want, rtol=4e-6, atol=2e-5)


@pytest.mark.parametrize("constants", [CONSTANTS["plain"], CONSTANTS["all"]], ids=["plain", "all"])
def test_tangents_leave_the_first_order_results_bitwise_unchanged(room, constants):
    options = {"target": _labels(7, 70)} | constants
    xs, xs_dot, y_bar, y_bar_dot = draw(token_losses, _shapes(7, 3, 70), options, torch.float32)
    y, _, xs_bar, _ = ours(token_losses, xs, xs_dot, y_bar, y_bar_dot, options)
    assert same_bits(first_order(token_losses, xs, y_bar, options), (y, xs_bar))


def test_rows_are_the_same_bits_on_any_number_of_threads(in_native, threads):
    z, z_dot, g, g_dot = (t.float() for t in _randn((301, 257), (301, 257), (301,), (301,)))
    constants, target = chunks.Constants(**CONSTANTS["all"]), _labels(301, 257)
    results = []
    for count in (1, 2, 3):
        threads(count)
        stats, *bars = chunks._native_rows(z.clone(), z_dot.clone(), target, None, g, g_dot, constants)
        results.append((stats.lse, stats.mu, stats.loss, stats.loss_dot, *bars))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_arguments_are_left_as_they_were(room):
    options = {"target": _labels(7, 6), "formed": FORMED["forward"]}
    drawn = draw(summed_losses, [*_shapes(7, 3, 6), (7,)], options)
    before = mapped(torch.clone, drawn)
    ours(summed_losses, *drawn, options)
    assert same_bits(drawn, before)


def test_a_backward_may_run_twice(room):
    """What the forward formed is still there, and still the same, the second time."""
    x, w = (t.requires_grad_() for t in _randn((4, 2), (5, 2)))
    loss = linear_cross_entropy(x, w, target=_labels(4, 5), gradients="forward")
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    once = mapped(lambda t: t.clone(), once)
    assert same_bits(torch.autograd.grad(loss, (x, w)), once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_have_a_float32_loss_and_gradients_as_good_as_their_dtype(dtype):
    options = {"target": _labels(7, 70), "formed": FORMED["forward"]}
    drawn = draw(summed_losses, [*_shapes(7, 3, 70), (7,)], options)
    xs, xs_dot = (tuple(t.to(dtype) for t in ts[:-1]) + (ts[-1].float(),) for ts in drawn[:2])
    narrow = xs, xs_dot, *(t.float() for t in drawn[2:])
    got = ours(summed_losses, *narrow, options)
    assert got[0].dtype == torch.float32 and got[2][0].dtype == got[3][1].dtype == dtype
    want = oracle(summed_losses, *mapped(torch.Tensor.double, narrow), options)
    # Logits of order three are rounded to a few hundredths.
    torch.testing.assert_close(mapped(torch.Tensor.double, got), want, rtol=5e-2, atol=2e-1)


def test_bfloat16_through_the_interpreter_is_the_eager_result():
    pytest.importorskip("triton")
    options = {"target": _labels(5, 40)}
    narrow = draw(token_losses, _shapes(5, 3, 40), options, torch.bfloat16)
    narrow = *narrow[:2], *(t.float() for t in narrow[2:])
    with use_backend("triton"):
        got = ours(token_losses, *narrow, options)
    with use_backend("eager"):
        want = ours(token_losses, *narrow, options)
    assert [t.dtype for t in got[2]] == [torch.bfloat16] * 3
    # The eager logits have float32 biases and tangents, those of the kernels are rounded after each sum.
    torch.testing.assert_close(got, want, rtol=5e-2, atol=1e-1)


def test_autocast_is_that_of_a_linear_layer():
    x, w = (t.float().requires_grad_() for t in _randn((7, 8), (9, 8)))
    target = _labels(7, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss, want = linear_cross_entropy(x, w, target=target), F.cross_entropy(F.linear(x, w).float(), target)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(want, (x, w)), rtol=2e-2, atol=2e-3
    )


def test_a_tied_embedding_receives_both_its_contributions():
    (w, v), ids = _randn((9, 4), (9, 4)), _labels(6, 9)
    target = ids.roll(-1)

    def loss(head):
        return lambda w: head(torch.tanh(F.embedding(ids, w)), w)

    def whole(x, w):
        return F.cross_entropy(x @ w.mT, target)

    def ours(x, w):
        return linear_cross_entropy(x, w, target=target)

    leaf = w.clone().requires_grad_()
    want = _by_double_backward(loss(whole), (w,), (v,))[1]
    (hv,) = torch.autograd.grad(loss(ours)(Dual(leaf, v)).tangent, leaf)
    torch.testing.assert_close(hv, want, **EXACT)


class _Watch(TorchDispatchMode):
    """The largest tensor that is created, and the multiplications in matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if isinstance(y, torch.Tensor):
            self.largest = max(self.largest, y.untyped_storage().nbytes() // y.itemsize)
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return y


R, D, V = 60, 7, 50


def _watched(gradients, order):
    """Return the largest tensor and the products of R x d x V in a gradient or a Hessian-vector product."""
    x, w, vx, vw = _randn((R, D), (V, D), (R, D), (V, D))
    x, w, vx = (t.requires_grad_() for t in (x, w, vx))
    with _Watch() as watch:
        if order == 1:
            loss = linear_cross_entropy(x, w, target=_labels(R, V), gradients=gradients)
            torch.autograd.grad(loss, (x, w))
        else:
            pair = linear_cross_entropy(Dual(x, vx), Dual(w, vw), target=_labels(R, V), gradients=gradients)
            torch.autograd.grad(pair.tangent, (x, w, vx))
    return watch.largest, watch.multiplications / (R * D * V)


@pytest.mark.parametrize(
    ("gradients", "order", "products"),
    [("forward", 1, 3), ("backward", 1, 4), ("auto", 2, 8), ("forward", 2, 8), ("backward", 2, 11)],
)
def test_no_tensor_has_the_size_of_the_logits_and_no_product_is_done_for_nothing(room, gradients, order, products):
    if room == "triton":
        pytest.skip("many programs, and the sweep is the same")
    largest, done = _watched(gradients, order)
    assert largest == max(R * D, V * D) < R * V / 6
    assert done == products


def test_a_tensor_of_the_size_of_the_logits_would_be_seen(monkeypatch):
    monkeypatch.setattr(chunks, "MIN_ROWS", R)
    assert _watched("forward", 1)[0] == R * V


def test_nothing_is_formed_for_a_backward_that_will_not_come():
    x, w = _randn((R, D), (V, D))
    w.requires_grad_()
    with torch.no_grad(), _Watch() as watch:
        linear_cross_entropy(x, w, target=_labels(R, V), gradients="forward")
    assert watch.multiplications == R * D * V
    with _Watch() as watch:  # x is a constant
        linear_cross_entropy(x, w, target=_labels(R, V), gradients="forward").backward()
    assert watch.multiplications == 2 * R * D * V


def test_float16_gradients_wait_for_the_scale_of_the_loss():
    """Formed for y_bar = 1 they would underflow."""
    x, w = (t.half().requires_grad_() for t in _randn((R, D), (V, D)))
    loss = linear_cross_entropy(1e-3 * x, w, target=_labels(R, V), normalizer=1e8)
    scaled = torch.autograd.grad(1e8 * loss, (x, w))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want = torch.autograd.grad(
        linear_cross_entropy_reference(1e-3 * wide[0], wide[1], target=_labels(R, V), reduction="sum"), wide
    )
    torch.testing.assert_close(mapped(torch.Tensor.double, scaled), want, rtol=2e-2, atol=2e-3)


def test_rows_that_are_ignored_are_not_multiplied():
    x, w = _randn((R, D), (V, D))
    target = _labels(R, V)
    target[: R // 2] = IGNORED
    with _Watch() as watch:
        linear_cross_entropy(x, w, target=target)
    assert watch.multiplications == R * D * V // 2


def test_forming_only_the_gradient_in_the_forward_is_noticed(monkeypatch):
    """The oracle can fail: a loss that stores X1 alone, as first-order losses do, has the wrong second order."""
    combined = module._combined

    def first_order_only(y_bar, x_bar_dot, y_bar_dot, x_bar):
        return combined(y_bar, torch.zeros_like(x_bar_dot), y_bar_dot, x_bar)

    monkeypatch.setattr(module, "_combined", first_order_only)
    xs, vs, options = _batch("mean", {})
    want = _by_double_backward(_losses(linear_cross_entropy_reference, options), xs, vs)
    got = _by_double_backward(_losses(linear_cross_entropy, options, gradients="forward"), xs, vs)
    torch.testing.assert_close(got[:4], want[:4], **EXACT)  # the gradient shows nothing
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(got[4:], want[4:], **EXACT)


@pytest.mark.parametrize("dropped", ["g_dot", "mu"])
def test_a_dropped_term_is_noticed(monkeypatch, dropped):
    rows = chunks._eager_cotangents

    def mutant(z, z_dot, target, known, g, g_dot, constants):
        if dropped == "mu":
            known = chunks.Statistics(lse=known.lse, mu=torch.zeros_like(known.mu))
        return rows(z, z_dot, target, known, g, g_dot * (dropped != "g_dot"), constants)

    monkeypatch.setattr(chunks, "_eager_cotangents", mutant)
    options = {"target": _labels(4, 5)}
    drawn = draw(token_losses, _shapes(4, 3, 5), options)
    with use_backend("eager"), pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(token_losses, *drawn, options), oracle(token_losses, *drawn, options), **EXACT)


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_outside_the_vocabulary_is_an_error(room, label):
    if room == "triton":
        pytest.skip("a kernel cannot raise: the loss is NaN, as the kernel's own tests say")
    x, w = _randn((2, 3), (7, 3))
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(x, w, target=torch.tensor([0, label]))


ERRORS = {
    "width": ({"w": torch.ones(5, 4)}, r"w \[V, d\], x \[..., d\]"),
    "rows": ({"target": torch.zeros(2, dtype=torch.int64)}, "each row of x needs a label"),
    "labels": ({"target": torch.zeros(4)}, "int64 labels, got torch.float32"),
    "bias": ({"bias": torch.ones(3)}, r"a bias \[5\]"),
    "weights": ({"weights": torch.ones(3)}, r"weights \[4\], got \[3\]"),
    "reduction": ({"reduction": "max"}, "got 'max'"),
    "gradients": ({"gradients": "never"}, "'never'"),
    "normalizer": ({"normalizer": 2.0, "reduction": "sum"}, "normalizer replaces the divisor"),
    "softcap": ({"softcap": -1.0}, "softcap must be positive"),
    "dtypes": ({"w": torch.ones(5, 3, dtype=torch.float64)}, "of one dtype"),
}


@pytest.mark.parametrize(("wrong", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_named(wrong, message):
    arguments = {"x": torch.ones(4, 3), "w": torch.ones(5, 3), "target": torch.zeros(4, dtype=torch.int64)} | wrong
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
