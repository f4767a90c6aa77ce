"""RMSNorm in its three rooms, against what torch.func makes of the reference."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vjp

from mamlfast import native
from mamlfast.ops.backend import use_backend
from mamlfast.ops.rms_norm import _ROOMS, MAX_PARTIALS, MIN_ROWS, rms_norm, rms_norm_reference

# Both sides compute in float64 and add at most a few thousand terms.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

ROOMS = ["eager", "native", "triton"]
# The last has more rows than either kernel has partial sums.
SHAPES = [(1, 1), (1, 63), (3, 5), (2, 2, 3), (11, 63), (5, 1000)]
LLAMA, GEMMA = {"eps": 1e-6, "offset": 0.0}, {"eps": 0.5, "offset": 1.0}


@pytest.fixture(params=ROOMS)
def room(request):
    if request.param == "native" and not native.available():
        pytest.skip("the C++ kernels are not built")
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter stands in for the GPU only where there is none")
    with use_backend(request.param):
        yield request.param


def _draw(shape, dtype=torch.float64, requires_grad=False):
    torch.manual_seed(0)
    shapes = shape, shape[-1:]
    xs = tuple(torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes)
    xs_dot = tuple(torch.randn(s, dtype=dtype) for s in shapes)
    y_bar, y_bar_dot = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return xs, xs_dot, y_bar, y_bar_dot


def _map(f, tree):
    return tuple(_map(f, t) for t in tree) if isinstance(tree, tuple) else f(tree)


def _oracle(xs, xs_dot, y_bar, y_bar_dot, options):
    """y, y_dot, xs_bar, xs_bar_dot from forward and reverse mode of the reference."""
    f = partial(rms_norm_reference, **options)

    def pullback(xs, y_bar):
        return vjp(f, *xs)[1](y_bar)

    return *jvp(f, xs, xs_dot), *jvp(pullback, (xs, y_bar), (xs_dot, y_bar_dot))


def _ours(xs, xs_dot, y_bar, y_bar_dot, options):
    both = True, True
    y, y_dot, saved = rms_norm.fwd_jvp(xs, xs_dot, **options)
    return y, y_dot, *rms_norm.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, both, both, **options)


@pytest.mark.parametrize("options", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_four_functions_match_torch_func_on_the_reference(room, shape, options):
    drawn = _draw(shape)
    xs, _, y_bar, _ = drawn
    y, y_dot, xs_bar, xs_bar_dot = _oracle(*drawn, options)
    got_y, saved = rms_norm.fwd(xs, **options)
    torch.testing.assert_close(got_y, y, **EXACT)
    torch.testing.assert_close(rms_norm.bwd(xs, saved, y_bar, (True, True), **options), xs_bar, **EXACT)
    torch.testing.assert_close(_ours(*drawn, options), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)


def test_more_rows_than_partial_sums_lose_no_row():
    rows = 2 * MIN_ROWS * MAX_PARTIALS + 3
    drawn = _draw((rows, 3))
    torch.testing.assert_close(_ours(*drawn, LLAMA), _oracle(*drawn, LLAMA), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_float32_is_as_exact_as_float32_allows(room, options):
    drawn = _draw((7, 63))
    narrow = _map(torch.Tensor.float, drawn)
    # A dozen roundings of 6e-8 each, on sums of 63 terms of order one.
    torch.testing.assert_close(
        _map(torch.Tensor.double, _ours(*narrow, options)), _oracle(*drawn, options), rtol=2e-6, atol=5e-6
    )


@pytest.mark.parametrize("options", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_where_the_reference_rounds(dtype, options):
    (x, w), xs_dot, *_ = _draw((5, 63), dtype)
    with use_backend("eager"):
        y, y_dot, _ = rms_norm.fwd_jvp((x, w), xs_dot, **options)
    assert torch.equal(y, rms_norm_reference(x, w, **options))
    assert y_dot.dtype == dtype


def test_the_weight_of_gemma_multiplies_before_rounding_and_that_of_llama_after():
    (x, w), *_ = _draw((5, 63), torch.bfloat16)
    n = rms_norm_reference(x.float(), torch.ones(63))
    assert torch.equal(rms_norm(x, w), w * n.bfloat16())
    assert torch.equal(rms_norm(x, w, offset=1.0), ((1 + w.float()) * n).bfloat16())
    assert rms_norm(x, w.float()).dtype == torch.float32
    assert rms_norm(x, w.float(), offset=1.0).dtype == torch.bfloat16


def test_bfloat16_through_the_interpreter_is_computed_in_float32():
    pytest.importorskip("triton")
    drawn = _draw((5, 63), torch.bfloat16)
    with use_backend("triton"):
        got = _ours(*drawn, LLAMA)
    want = _oracle(*_map(torch.Tensor.double, drawn), LLAMA)
    torch.testing.assert_close(_map(torch.Tensor.double, got), want, rtol=2e-2, atol=5e-2)


def test_strided_inputs_give_the_results_of_their_copies(room):
    x, y_bar, x_dot, y_bar_dot = (torch.randn(63, 6, dtype=torch.float64) for _ in range(4))
    w, w_dot = (torch.randn(126, dtype=torch.float64)[::2] for _ in range(2))
    strided = (x.mT, w), (x_dot.mT, w_dot), y_bar.mT, y_bar_dot[:, :1].mT.expand(6, 63)
    copies = _map(lambda t: t.contiguous().clone(), strided)
    torch.testing.assert_close(_ours(*strided, LLAMA), _ours(*copies, LLAMA), **EXACT)


def test_tangents_leave_the_first_order_results_bitwise_unchanged(room):
    xs, xs_dot, y_bar, y_bar_dot = _draw((11, 63), torch.float32)
    y, saved = rms_norm.fwd(xs)
    same_y, _, same_xs_bar, _ = _ours(xs, xs_dot, y_bar, y_bar_dot, {})
    assert torch.equal(y, same_y)
    assert all(map(torch.equal, rms_norm.bwd(xs, saved, y_bar, (True, True)), same_xs_bar))


def test_arguments_are_left_as_they_were(room):
    drawn = _draw((3, 5))
    before = _map(torch.clone, drawn)
    _ours(*drawn, LLAMA)
    torch.testing.assert_close(drawn, before, rtol=0, atol=0)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_what_is_not_needed_changes_nothing_that_is(room, need):
    xs, xs_dot, y_bar, y_bar_dot = _draw((11, 63))
    everything = _ours(xs, xs_dot, y_bar, y_bar_dot, {})[2:]
    other = tuple(not n for n in need)
    got = rms_norm.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, need, other)
    for values, wanted, full in zip(got, (need, other), everything, strict=True):
        for value, want, exact in zip(values, wanted, full, strict=True):
            assert not want or torch.equal(value, exact)


def test_no_rows_give_no_rows_and_a_zero_weight_gradient():
    x, w = torch.empty(0, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    y = rms_norm(x, w)
    assert y.shape == (0, 5)
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], torch.zeros(5))


@pytest.mark.parametrize("options", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_gradcheck_and_gradgradcheck_in_both_modes(room, options):
    xs, *_ = _draw((2, 2), requires_grad=True)  # the interpreter takes milliseconds a row
    rule = partial(rms_norm, **options)
    assert gradcheck(rule, xs, check_forward_ad=True)
    assert gradgradcheck(rule, xs, check_fwd_over_rev=True)


def _with_second_path(f):
    """A loss with another path to the inputs: there, a first-order backward is wrong in silence."""
    return lambda *xs: f(*xs).sin().sum() + sum(x.pow(3).sum() for x in xs)


def test_double_backward_and_dual_backward_are_one_hessian_vector_product(room):
    plain, v, *_ = _draw((11, 63))
    want = jvp(grad(_with_second_path(rms_norm_reference), (0, 1)), plain, v)[1]
    xs, *_ = _draw((11, 63), requires_grad=True)
    g = torch.autograd.grad(_with_second_path(rms_norm)(*xs), xs, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g, xs, v), want, **EXACT)
    y, y_dot = rms_norm.dual(xs, v)
    loss_dot = (y.cos() * y_dot).sum() + sum((3 * x**2 * t).sum() for x, t in zip(xs, v, strict=True))
    torch.testing.assert_close(torch.autograd.grad(loss_dot, xs), want, **EXACT)


def test_a_dropped_term_is_noticed(monkeypatch):
    """The oracle can fail: without ``w_dot y_bar`` in g_dot nothing above would pass."""
    fwd, bwd = _ROOMS["eager"]

    def mutant(xs, xs_dot, *arguments, **constants):
        x_dot, w_dot = xs_dot
        return bwd(xs, (x_dot, torch.zeros_like(w_dot)), *arguments, **constants)

    monkeypatch.setitem(_ROOMS, "eager", (fwd, mutant))
    drawn = _draw((3, 5))
    with use_backend("eager"), pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(_ours(*drawn, LLAMA), _oracle(*drawn, LLAMA), **EXACT)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ((3, 5), (4,), {}, r"x \[\.\.\., D\] and w \[D\]; got x \[3, 5\] and w \[4\]"),
        ((3, 5), (1,), {}, r"one weight for each element"),
        ((), (1,), {}, r"got x \[\]"),
        ((3, 5), (5,), {"offset": 0.5}, r"the offset 0 \(Llama\) or 1 \(Gemma\), got 0\.5"),
    ],
)
def test_bad_arguments_are_named(x, w, options, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(x), torch.ones(w), **options)


def test_mixed_dtypes_take_the_eager_room_and_only_a_forced_kernel_refuses_them():
    x, w = torch.randn(3, 5), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, w), rms_norm_reference(x, w))
    with use_backend("native"), pytest.raises(ValueError, match="no such kernel"):
        rms_norm(x, w)
