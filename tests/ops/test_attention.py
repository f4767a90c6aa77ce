"""Attention as users call it: what each option means, which kernel answers, how much memory it takes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mamlfast_kernels.attention_spec import AttentionSpec
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mamlfast import native
from mamlfast.dual import Dual
from mamlfast.ops import attention, attention_backend, attention_reference, attention_rule, use_backend
from mamlfast.ops import attention_eager as eager
from mamlfast.ops import attention_first_order as first_order
from tests import rooms

B, H, G, T, D = 2, 4, 2, 7, 8


def draw(shape=(B, H, G, T, T, D), dtype=torch.float64, seed=0):
    """Return q, k, v of B, H, G, T, S, D."""
    b, h, g, t, s, d = shape
    gen = torch.Generator().manual_seed(seed)
    shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, d)]
    return tuple(torch.randn(x, dtype=torch.float64, generator=gen).to(dtype) for x in shapes)


def torch_attention(q, k, v, **options):
    """The one kernel of PyTorch that has a second derivative, quadratic in memory."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def second_order(f, xs):
    """``f(*xs)``, its gradient and the tangent of that, for a fixed scalar of it, by double backward."""
    xs = [x.detach().requires_grad_() for x in xs]
    y = f(*xs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y.sin() * weight).sum(), xs, create_graph=True)
    return y, grads, torch.autograd.grad(sum((g * x.detach().cos()).sum() for g, x in zip(grads, xs, strict=True)), xs)


# What each option is in PyTorch's words: a mask, or an argument of its own function.
T_, S_ = torch.arange(T)[:, None], torch.arange(T)
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 9]])
PADDING = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
SAME = {
    "causal": ({"causal": True}, {"is_causal": True}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "offset": ({"causal": True, "offset": 2}, {"attn_mask": S_ <= T_ + 2}),
    "left window": ({"causal": True, "window": (2, None)}, {"attn_mask": (S_ <= T_) & (S_ >= T_ - 2)}),
    "window": ({"window": (1, 3)}, {"attn_mask": (S_ <= T_ + 3) & (S_ >= T_ - 1)}),
    "padding": ({"key_mask": PADDING}, {"attn_mask": PADDING[:, None, None]}),
    "segments": ({"segments": SEGMENTS}, {"attn_mask": (SEGMENTS[:, :, None] == SEGMENTS[:, None])[:, None]}),
    "bool mask": ({"mask": PADDING[:, None, None]}, {"attn_mask": PADDING[:, None, None]}),
    "added mask": ({"mask": (T_ * S_ / 9.0).double()}, {"attn_mask": (T_ * S_ / 9.0).double()}),
}


@pytest.mark.parametrize("name", SAME)
def test_options_mean_what_they_mean_to_torch_to_second_order(name):
    ours, theirs = SAME[name]
    xs = draw()
    close(second_order(partial(attention, **ours), xs), second_order(partial(torch_attention, **theirs), xs))


def test_packed_sequences_are_as_if_alone():
    lengths, cu_seqlens = [3, 1, 5], torch.tensor([0, 3, 4, 9])
    xs = draw((1, H, G, 9, 9, D))
    alone = [attention(*parts, causal=True) for parts in zip(*(x.split(lengths, 2) for x in xs), strict=True)]
    close(attention(*xs, causal=True, cu_seqlens=cu_seqlens), torch.cat(alone, 2))


def test_packed_sequences_may_differ_in_queries_and_keys():
    q, k, v = draw((1, H, G, 4, 9, D))
    got = attention(q, k, v, cu_seqlens=(torch.tensor([0, 3, 4]), torch.tensor([0, 2, 9])))
    parts = [attention(q[:, :, :3], k[:, :, :2], v[:, :, :2]), attention(q[:, :, 3:], k[:, :, 2:], v[:, :, 2:])]
    close(got, torch.cat(parts, 2))


def test_a_sink_is_a_key_whose_value_is_zero():
    q, k, v = draw((1, 2, 2, 5, 5, D))
    sinks = torch.tensor([0.3, -0.7], dtype=torch.float64)
    # A key along a direction of its own, which every query has as much of as the sink weighs.
    width = torch.ones(1, 2, 5, 1, dtype=torch.float64)
    q1, k1 = torch.cat([q, width * sinks.view(1, 2, 1, 1) / D**-0.5], -1), F.pad(k, (0, 1))
    k1 = torch.cat([k1, F.pad(torch.zeros(1, 2, 1, D, dtype=torch.float64), (0, 1), value=1.0)], 2)
    want = attention(q1, k1, F.pad(v, (0, 0, 0, 1)), scale=D**-0.5)
    close(attention(q, k, v, sinks=sinks), want)


def test_every_room_answers_the_rule_in_every_mode(room):
    xs, sinks = draw((B, H, G, 19, 21, 16)), torch.linspace(-1, 1, H, dtype=torch.float64)
    padding = torch.ones(B, 21, dtype=torch.bool)
    padding[1, :6] = False
    options = {"causal": True, "offset": 2, "window": (9, None), "softcap": 2.0, "key_mask": padding}
    options |= {"scale": 0.3, "dropout": 0.3, "seed": 1}
    reference = partial(attention_reference, spec=AttentionSpec(**options))

    def ours(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, **options)

    close(second_order(ours, (*xs, sinks)), second_order(reference, (*xs, sinks)))
    xs_dot = [x.cos() for x in (*xs, sinks)]
    values, tangents = ([x.detach().requires_grad_() for x in half] for half in ((*xs, sinks), xs_dot))
    y = ours(*map(Dual, values, tangents))
    want, want_dot = jvp(reference, tuple(values), tuple(tangents))
    close((y.primal, y.tangent), (want, want_dot))
    leaves = [*values, *tangents]
    weights = want.detach().sin(), want.detach().cos()
    close(
        torch.autograd.grad((y.primal, y.tangent), leaves, weights),
        torch.autograd.grad((want, want_dot), leaves, weights),
    )
    assert attention_backend(*xs, **options)["second order"] == room


def test_dropout_keeps_its_share_and_follows_its_seed():
    q, k, v = draw((1, 2, 2, 64, 64, D))
    ones = torch.ones_like(v)
    share = attention(q * 0, k, ones, dropout=0.25, seed=3).mean()
    assert abs(share - 1) < 0.02  # 8192 draws: a standard deviation of 0.006
    seeded = [attention(q, k, v, dropout=0.25, seed=s) for s in (3, 3, 4, 3 + (1 << 32))]
    assert torch.equal(seeded[0], seeded[1])
    assert not any(torch.equal(seeded[0], other) for other in seeded[2:])


def test_dropout_without_a_seed_draws_from_torch():
    xs = draw((1, 2, 2, 64, 64, D))
    torch.manual_seed(1)
    first, second = (attention(*xs, dropout=0.25) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, attention(*xs, dropout=0.25)) and not torch.equal(first, second)


def test_the_random_numbers_are_those_of_philox():
    """The first words of the known-answer vectors of Random123 (Salmon et al., 2011)."""
    from mamlfast.ops.attention_reference import _philox

    zero = torch.zeros((), dtype=torch.int64)
    assert _philox(0, zero, zero, zero).item() == 0x6627E8D5


def test_a_row_without_keys_is_zero_in_every_derivative():
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[2] = False
    y, grads, hvps = second_order(partial(attention, mask=mask), draw())
    assert y[:, :, 2].count_nonzero() == 0 and y.count_nonzero() > 0
    assert grads[0][:, :, 2].count_nonzero() == 0 and hvps[0][:, :, 2].count_nonzero() == 0
    assert all(x.isfinite().all() for x in (y, *grads, *hvps))


@pytest.mark.parametrize("chunk", [1, 40, 300])
def test_small_chunks_change_nothing(chunk, monkeypatch):
    options = {"causal": True, "window": (4, None), "softcap": 2.0, "key_mask": PADDING, "dropout": 0.3, "seed": 1}
    xs, sinks = draw(), torch.linspace(-1, 1, H, dtype=torch.float64)
    f = partial(attention, **options)
    with use_backend("eager"):
        want = second_order(lambda *xs: f(*xs[:3], sinks=xs[3]), (*xs, sinks))
        monkeypatch.setattr(eager, "CHUNK", chunk)
        close(second_order(lambda *xs: f(*xs[:3], sinks=xs[3]), (*xs, sinks)), want)


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_of_torch_and_ours_agree(causal):
    xs, y_bar = draw(), draw(seed=1)[0]
    spec = {"spec": AttentionSpec(scale=0.4, causal=causal)}
    with first_order.use_first_order_attention("torch"):
        theirs = rooms.first_order(attention_rule, xs, y_bar, spec)
    with first_order.use_first_order_attention("ours"):
        close(rooms.first_order(attention_rule, xs, y_bar, spec), theirs)


def test_the_choice_of_kernels_is_visible_and_can_be_forced():
    xs = draw()
    ours = "native" if native.available() else "eager"
    assert attention_backend(*xs, key_mask=PADDING) == {"first order": ours, "second order": ours}
    assert attention_backend(*xs)["first order"] == ("native" if native.available() else "torch")
    assert attention_backend(*(x.bfloat16() for x in xs)) == {"first order": "torch", "second order": "eager"}
    with first_order.use_first_order_attention("torch"):
        assert attention_backend(*xs)["first order"] == "torch"
    with use_backend("eager"):
        assert attention_backend(*xs) == {"first order": "eager", "second order": "eager"}
    with first_order.use_first_order_attention("ours"):
        assert attention_backend(*xs)["first order"] != "torch"
    with (
        first_order.use_first_order_attention("torch"),
        pytest.raises(ValueError, match="torch cannot serve this attention.*no masks"),
    ):
        attention(*xs, key_mask=PADDING)
    with (
        first_order.use_first_order_attention("flash-attn"),
        pytest.raises(ValueError, match="flash-attn is not installed"),
    ):
        attention(*xs)
    with pytest.raises(ValueError, match="one of ours, flash-attn, torch; got 'fast'"):
        first_order.use_first_order_attention("fast").__enter__()


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        for x in y if isinstance(y, (tuple, list)) else (y,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return y


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 9), "softcap": 3.0}], ids=str)
def test_no_tensor_is_quadratic_in_the_length(options):
    n = 2048
    xs = draw((1, 1, 1, n, n, D), torch.float32)
    with Largest() as largest:
        second_order(partial(attention, **options), xs)
    assert 0 < largest.numel <= max(eager.CHUNK, n * D) < n * n
    with Largest() as largest:
        second_order(partial(torch_attention, attn_mask=torch.ones(n, n, dtype=torch.bool)), xs)
    assert largest.numel >= n * n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_err_no_more_than_torch(dtype):
    xs = draw((2, 4, 2, 65, 65, 16))
    want = second_order(partial(attention_reference, spec=AttentionSpec(scale=0.25)), xs)
    low = [x.to(dtype) for x in xs]
    got = second_order(partial(attention, scale=0.25), low)
    eager_in_low = second_order(partial(attention_reference, spec=AttentionSpec(scale=0.25)), low)

    def errors(result):
        pairs = zip((result[0], *result[1], *result[2]), (want[0], *want[1], *want[2]), strict=True)
        return torch.stack([(x.double() - y).abs().max() / y.abs().max() for x, y in pairs])

    assert (errors(got) <= 2 * errors(eager_in_low) + 4 * torch.finfo(dtype).eps).all()


def test_a_mean_that_is_dropped_is_noticed(monkeypatch):
    """The negative control of the comparisons above: mu = 0 is a first-order softmax."""
    right = eager.attention_fwd_jvp

    def without_mu(*xs, spec):
        o, o_dot, lse, mu = right(*xs, spec=spec)
        return o, o_dot, lse, torch.zeros_like(mu)

    xs = draw()
    f = partial(attention, causal=True)
    with use_backend("eager"):
        want = second_order(f, xs)
        monkeypatch.setattr(eager, "attention_fwd_jvp", without_mu)
        with pytest.raises(AssertionError):
            close(second_order(f, xs), want)


def test_forward_mode_and_duals_agree_with_double_backward():
    xs, xs_dot = draw(), draw(seed=1)
    sinks, sinks_dot = torch.linspace(-1, 1, H).double(), torch.linspace(2, -1, H).double()

    def loss(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, causal=True, softcap=2.0).square().sum()

    operands, tangents = (*xs, sinks), (*xs_dot, sinks_dot)
    arguments = tuple(range(4))
    _, forward_over_reverse = jvp(grad(loss, arguments), operands, tangents)
    leaves = [x.detach().requires_grad_() for x in operands]
    value = loss(*(Dual(x, t) for x, t in zip(leaves, tangents, strict=True)))
    close(torch.autograd.grad(value.tangent, leaves), forward_over_reverse)
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    close(torch.autograd.grad(gradients, leaves, tangents), forward_over_reverse)


@pytest.mark.parametrize("differentiate", [lambda f, m: jvp(f, (m,), (m,)), lambda f, m: grad(f)(m)])
def test_a_mask_with_a_derivative_is_refused_and_not_a_silent_zero(differentiate):
    xs = draw()
    with pytest.raises(ValueError, match="mask must be a constant"):
        differentiate(lambda mask: attention(*xs, mask=mask).square().sum(), torch.zeros(T, T, dtype=torch.float64))


OTHER = torch.zeros(1)
BAD = {
    "q must have four dimensions": lambda q, k, v: attention(q[0], k, v),
    "k must be a tensor": lambda q, k, v: attention(q, None, v),
    "G dividing H": lambda q, k, v: attention(q[:, :3], k, v),
    "got .*8.*8.*5": lambda q, k, v: attention(q, k, v[:, :, :5]),
    "one floating dtype": lambda q, k, v: attention(q, k.float(), v),
    "one score a query head": lambda q, k, v: attention(q, k, v, sinks=torch.zeros(3).double()),
    "broadcastable to": lambda q, k, v: attention(q, k, v, mask=torch.ones(3, 5, dtype=torch.bool)),
    "bool .True: visible. or floating": lambda q, k, v: attention(q, k, v, mask=torch.ones(T, T, dtype=torch.long)),
    "must be a constant": lambda q, k, v: attention(q, k, v, mask=torch.ones(T, T, requires_grad=True)),
    "key_mask must be bool": lambda q, k, v: attention(q, k, v, key_mask=PADDING[:1]),
    "segments must be integers": lambda q, k, v: attention(q, k, v, segments=SEGMENTS[:, :4]),
    "not both": lambda q, k, v: attention(q, k, v, segments=SEGMENTS, cu_seqlens=OTHER),
    "batch of one": lambda q, k, v: attention(q, k, v, cu_seqlens=torch.tensor([0, 7])),
    "rise from 0 to the number of tokens, 7; got .0, 3, 6.": lambda q, k, v: attention(
        q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 3, 6])
    ),
    "the same cu_seqlens": lambda q, k, v: attention(
        q[:1], k[:1], v[:1], causal=True, cu_seqlens=(torch.tensor([0, 7]), torch.tensor([0, 3, 7]))
    ),
    "softcap must be positive": lambda q, k, v: attention(q, k, v, softcap=0.0),
    "scale must be finite": lambda q, k, v: attention(q, k, v, scale=float("nan")),
    "probability below 1": lambda q, k, v: attention(q, k, v, dropout=1.0),
    "window must be": lambda q, k, v: attention(q, k, v, window=(-1, 0)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused_by_name(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message](*draw())
