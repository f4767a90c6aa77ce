"""The score-sized arithmetic of attention in both rooms, against torch.func on a plain softmax."""

import pytest
import torch
from torch.func import jvp, vjp

from mamlfast import native
from mamlfast.ops.attention_scores import (
    Visible,
    scores_bwd,
    scores_bwd_jvp,
    softmax_scores,
    softmax_scores_jvp,
)
from mamlfast.ops.backend import use_backend

# Relative to the largest element: float64 rounds at 1e-16, and L loses a digit or two to exp(S - L).
EXACT = 1e-13
# A few units in the last place of float32.
SINGLE = 2e-6
SCALE = 0.3


@pytest.fixture(params=["eager", "native"])
def room(request):
    if request.param == "native" and not native.available():
        pytest.skip("the C++ kernels are not built")
    with use_backend(request.param):
        yield request.param


def _additive(*shape):
    mask = torch.randn(shape, dtype=torch.float64)
    mask[..., ::3] = -torch.inf
    return mask


def _boolean(*shape):
    return torch.rand(shape) > 0.4


def _cases():
    torch.manual_seed(0)
    return {
        "all": ((2, 3, 5), Visible()),
        "one of each": ((1, 1, 1), Visible()),
        "causal": ((4, 7, 63), Visible(causal_offset=50)),
        "causal from the first key": ((2, 9, 9), Visible(causal_offset=0)),
        "causal with empty rows": ((2, 5, 17), Visible(causal_offset=-3)),
        "bool for all heads": ((4, 5, 17), Visible(mask=_boolean(1, 5, 17))),
        "bool for each head": ((4, 5, 17), Visible(mask=_boolean(4, 1, 17))),
        "bool for each batch entry, causal": (
            (6, 5, 33),
            Visible(mask=_boolean(2, 1, 33), repeat=3, causal_offset=20),
        ),
        "bool without any key": ((2, 3, 5), Visible(mask=torch.zeros(1, 3, 5, dtype=torch.bool))),
        "bool, strided": ((4, 5, 17), Visible(mask=_boolean(17, 5).mT[None])),
        "bool, a slice": ((4, 5, 17), Visible(mask=_boolean(4, 9, 40)[:, 2:7, 3:20])),
        "bool, expanded": ((4, 5, 17), Visible(mask=_boolean(4, 5, 1).expand(4, 5, 17))),
        "additive": ((4, 5, 17), Visible(mask=_additive(4, 5, 17))),
        "additive for each batch entry, causal": (
            (4, 5, 17),
            Visible(mask=_additive(2, 5, 17), repeat=2, causal_offset=1),
        ),
        "wide": ((3, 4, 1000), Visible(causal_offset=500)),
    }


CASES = _cases()
every_case = pytest.mark.parametrize("case", CASES)


def _softmax(s, shape, visible):
    """P by definition: exponentials of the visible scores over their sum, zero where there are none."""
    N, R, C = shape
    S, allowed = SCALE * s, torch.ones(N, R, C, dtype=torch.bool)
    if visible.causal_offset is not None:
        allowed = torch.arange(C) <= torch.arange(R)[:, None] + visible.causal_offset
    if visible.mask is not None:
        heads = [0 if visible.mask.shape[0] == 1 else i // visible.repeat for i in range(N)]
        mask = visible.mask[heads]
        allowed = allowed & (mask if mask.dtype == torch.bool else mask > -torch.inf)
        S = S if mask.dtype == torch.bool else S + mask.clamp(min=-1e9)
    e = torch.exp(S) * allowed
    total = e.sum(-1, keepdim=True)
    return e / (total + (total == 0))


def _draw(case):
    shape, visible = CASES[case]
    torch.manual_seed(0)
    scores = tuple(3 * torch.randn(shape, dtype=torch.float64) for _ in range(4))
    return shape, visible, *scores


def _oracle(case):
    """P, P_dot, scale S_bar and scale S_bar_dot, and the two row sums delta and delta_dot."""
    shape, visible, s, s_dot, p_bar, p_bar_dot = _draw(case)

    def softmax(s):
        return _softmax(s, shape, visible)

    P, P_dot = jvp(softmax, (s,), (s_dot,))

    def pullback(s, p_bar):
        return vjp(softmax, s)[1](p_bar)[0]

    s_bar, s_bar_dot = jvp(pullback, (s, p_bar), (s_dot, p_bar_dot))
    delta, delta_dot = (P * p_bar).sum(-1), (P_dot * p_bar + P * p_bar_dot).sum(-1)
    return (P, P_dot, s_bar, s_bar_dot), (delta, delta_dot)


def _ours(case, dtype=torch.float64):
    """The same four from the forward's own row statistics."""
    _, visible, *scores = _draw(case)
    _, row_sums = _oracle(case)
    s, s_dot, p_bar, p_bar_dot = (x.to(dtype) for x in scores)
    delta, delta_dot = (x.to(dtype) for x in row_sums)
    lse, mu = softmax_scores_jvp(s.clone(), s_dot.clone(), SCALE, visible)
    scores_bwd_jvp(s, s_dot, p_bar, p_bar_dot, lse, mu, delta, delta_dot, SCALE, visible)
    return s, s_dot, p_bar, p_bar_dot


def _assert_close(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).abs().max() <= tolerance * max(1, w.abs().max())


@every_case
def test_the_backward_with_tangents_matches_torch_func(room, case):
    want, _ = _oracle(case)
    _assert_close(_ours(case), want, EXACT)


@every_case
def test_float32_is_within_a_few_units_in_the_last_place(room, case):
    want, _ = _oracle(case)
    _assert_close(_ours(case, torch.float32), want, SINGLE)


@every_case
def test_the_forward_matches_torch_func_with_and_without_tangent(room, case):
    _, visible, s, s_dot, *_ = _draw(case)
    (P, P_dot, *_), _ = _oracle(case)
    alone = s.clone()
    lse = softmax_scores(alone, SCALE, visible)
    lse_too, mu = softmax_scores_jvp(s, s_dot, SCALE, visible)
    _assert_close((alone, s, s_dot), (P, P, P_dot), EXACT)
    assert torch.equal(lse, lse_too)
    assert torch.equal(alone, s)
    assert torch.equal(lse == -torch.inf, (P == 0).all(-1))
    assert torch.equal(mu[lse == -torch.inf], torch.zeros_like(mu[lse == -torch.inf]))


@every_case
def test_mu_is_the_tangent_of_the_log_sum_exp(room, case):
    _, visible, s, s_dot, *_ = _draw(case)
    (P, *_), _ = _oracle(case)
    _, mu = softmax_scores_jvp(s, s_dot.clone(), SCALE, visible)
    _assert_close((mu,), ((P * SCALE * s_dot).sum(-1),), EXACT)


@every_case
def test_the_backward_without_tangents_is_the_first_half_of_the_one_with(room, case):
    _, visible, s, _, p_bar, _ = _draw(case)
    _, (delta, _) = _oracle(case)
    lse = softmax_scores(s.clone(), SCALE, visible)
    with_tangents = _ours(case)
    scores_bwd(s, p_bar, lse, delta, SCALE, visible)
    assert torch.equal(s, with_tangents[0])
    assert torch.equal(p_bar, with_tangents[2])


def test_keys_beyond_the_causal_limit_are_never_read(room):
    visible = Visible(causal_offset=1)
    beyond = torch.ones(5, 17).triu(2).bool()
    clean = [torch.randn(3, 5, 17, dtype=torch.float64).masked_fill(beyond, 0) for _ in range(4)]
    rows = [torch.randn(3, 5, dtype=torch.float64) for _ in range(2)]
    results = []
    for filling in (0.0, torch.nan):
        tensors = [x.masked_fill(beyond, filling) for x in clean]
        lse, mu = softmax_scores_jvp(tensors[0].clone(), tensors[1].clone(), SCALE, visible)
        scores_bwd_jvp(*tensors, lse, mu, *rows, SCALE, visible)
        results.append(torch.stack(tensors))
    assert torch.equal(*results)
    assert not results[0][..., beyond].any()


def test_a_score_that_a_mask_hides_may_be_anything(room):
    mask = _boolean(1, 5, 17)
    s = torch.randn(3, 5, 17, dtype=torch.float64)
    spoiled = s.masked_fill(~mask, torch.nan)
    lse, lse_too = (softmax_scores(x, SCALE, Visible(mask=mask)) for x in (s, spoiled))
    assert torch.equal(lse, lse_too)
    assert torch.equal(s, spoiled)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("keys", [1, 17])
def test_a_score_that_is_not_finite_makes_its_row_nan(room, bad, keys):
    s = torch.randn(1, 2, keys, dtype=torch.float64)
    s[0, 1, 0] = bad
    lse = softmax_scores(s, SCALE, Visible())
    assert s[0, 1].isnan().all()
    assert s[0, 0].isfinite().all()
    assert not lse[0, 1].isfinite()


def test_scores_of_any_size_stay_finite(room):
    s = torch.tensor([[[-1e30, 1e30, 0.0], [-3e38, -3e38, -3e38], [-200.0, 0.0, -88.0]]])
    lse = softmax_scores(s, 1.0, Visible())
    want = torch.tensor([[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(s[0], want)
    torch.testing.assert_close(lse[0], torch.tensor([1e30, -3e38, 0.0]))


def test_the_smallest_additive_mask_hides_keys_as_long_as_others_are_visible(room):
    mask = torch.full((1, 1, 5), torch.finfo(torch.float32).min)
    mask[..., :2] = 0
    s = torch.randn(2, 3, 5)
    want = (SCALE * s[..., :2]).softmax(-1)
    softmax_scores(s, SCALE, Visible(mask=mask))
    torch.testing.assert_close(s[..., :2], want)
    assert not s[..., 2:].any()


@pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float32, 2.0), (torch.float64, 2.0)])
def test_the_vectorised_exponential_is_right_to_two_units_in_the_last_place(dtype, ulps):
    lowest = -87.0 if dtype == torch.float32 else -708.0
    x = torch.linspace(lowest, 0, 100_003, dtype=dtype)
    s, p_bar, nothing = (
        x.clone()[None, None],
        torch.zeros(1, 1, len(x), dtype=dtype),
        torch.zeros(1, 1, dtype=dtype),
    )
    with use_backend("native"):
        scores_bwd(s, p_bar, nothing, nothing, 1.0, Visible())  # with L = 0, P is exp(s)
    want = x.double().exp()
    error = (s[0, 0].double() - want).abs() / want
    assert error.max() <= ulps * torch.finfo(dtype).eps


def test_half_types_keep_their_row_statistics_in_float32():
    s = torch.randn(2, 3, 63).bfloat16()
    want = (SCALE * s.double()).softmax(-1), (SCALE * s.double()).logsumexp(-1)
    lse = softmax_scores(s, SCALE, Visible())
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.double(), want[0], rtol=2**-8, atol=0)


def test_a_dropped_term_is_noticed(room):
    """The oracle can fail: a backward that forgets delta_dot is not close to it."""
    _, visible, *scores = _draw("causal")
    want, (delta, delta_dot) = _oracle("causal")
    s, s_dot, *_ = scores
    lse, mu = softmax_scores_jvp(s.clone(), s_dot.clone(), SCALE, visible)
    scores_bwd_jvp(*scores, lse, mu, delta, torch.zeros_like(delta_dot), SCALE, visible)
    with pytest.raises(AssertionError):
        _assert_close(scores, want, EXACT)


def test_a_tensor_that_autograd_watches_is_refused(room):
    s = torch.randn(1, 2, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="call the attention Rule"):
        softmax_scores(s, SCALE, Visible())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": torch.ones(3, 5)}, ValueError, r"\[n, r, C\], got \[3, 5\]"),
        ({"mask": torch.ones(1, 3, 5).long()}, TypeError, "bool or floating, got torch.int64"),
        ({"repeat": 0}, ValueError, "at least 1, got 0"),
    ],
)
def test_a_visible_that_makes_no_sense_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Visible(**arguments)


@pytest.mark.parametrize(("shape", "repeat"), [((3, 1, 5), 1), ((4, 2, 5), 1), ((4, 3, 4), 1), ((2, 1, 5), 3)])
def test_a_mask_that_does_not_fit_the_scores_is_refused(room, shape, repeat):
    visible = Visible(mask=torch.ones(shape, dtype=torch.bool), repeat=repeat)
    with pytest.raises(ValueError, match=r"does not fit scores \[4, 3, 5\]"):
        softmax_scores(torch.randn(4, 3, 5), SCALE, visible)
