"""Rotary position embedding in its three rooms, against torch.func on the reference and Hugging Face's functions."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

from mamlfast.dual import Dual
from mamlfast.ops.backend import use_backend
from mamlfast.ops.rotary import rotary, rotary_reference, rotary_rule
from tests.rooms import EXACT, draw, first_order, mapped, oracle, ours, same_bits

layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def _tables(*shape, dtype=torch.float64):
    """Arbitrary: neither the angles of a pair nor the squares of cos and sin have to agree."""
    torch.manual_seed(1)
    return {"cos": torch.randn(shape, dtype=dtype), "sin": torch.randn(shape, dtype=dtype)}


@layouts
@pytest.mark.parametrize(
    ("x", "table"),
    [
        ((1, 1, 1, 2), (1, 1, 2)),
        ((2, 3, 5, 8), (1, 5, 8)),
        ((2, 3, 5, 8), (2, 5, 8)),
        ((2, 3, 5, 10), (2, 5, 6)),
        ((3, 1, 33, 63), (1, 33, 34)),
        ((1, 2, 7, 80), (1, 7, 32)),
    ],
    ids=str,
)
def test_the_four_functions_match_torch_func_on_the_reference(room, x, table, interleaved):
    options = _tables(*table) | {"interleaved": interleaved}
    drawn = draw(rotary_rule, [x], options)
    y, y_dot, xs_bar, xs_bar_dot = oracle(rotary_rule, *drawn, options)
    xs, _, y_bar, _ = drawn
    torch.testing.assert_close(first_order(rotary_rule, xs, y_bar, options), (y, xs_bar), **EXACT)
    torch.testing.assert_close(ours(rotary_rule, *drawn, options), (y, y_dot, xs_bar, xs_bar_dot), **EXACT)


def _view(t, order, gap):
    """The same numbers with other strides: dimensions in another order, and a gap behind each row."""
    inverse = [order.index(i) for i in range(4)]
    wide = torch.nn.functional.pad(t.permute(order), (0, gap), value=torch.nan)
    return wide[..., : wide.shape[-1] - gap].permute(inverse)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 3, 9))),
    pairs=st.integers(1, 17),
    rest=st.integers(0, 9),
    orders=st.lists(st.permutations(range(4)), min_size=4, max_size=4),
    gap=st.integers(0, 3),
    own_tables=st.booleans(),
    interleaved=st.booleans(),
)
def test_any_shape_with_any_strides_matches_it_too(room, sizes, pairs, rest, orders, gap, own_tables, interleaved):
    B, _, T = sizes
    options = _tables(B if own_tables else 1, T, 2 * pairs) | {"interleaved": interleaved}
    (x,), (x_dot,), y_bar, y_bar_dot = draw(rotary_rule, [(*sizes, 2 * pairs + rest)], options)
    x, x_dot, y_bar, y_bar_dot = map(_view, (x, x_dot, y_bar, y_bar_dot), orders, [gap] * 4)
    strided = (x,), (x_dot,), y_bar, y_bar_dot
    want = oracle(rotary_rule, *mapped(torch.clone, strided), options)
    torch.testing.assert_close(ours(rotary_rule, *strided, options), want, **EXACT)


def _angles(T, pairs, dtype):
    return torch.arange(T, dtype=dtype)[None, :, None] * 100 ** -torch.linspace(0, 1, pairs, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_bits_of_hugging_faces_functions(dtype):
    """Llama, Phi-3 with some of the dimensions, GLM and GPT-J, in float32 and in the rounding of bfloat16."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 7, 3, 16).transpose(1, 2).to(dtype) for _ in range(2))
    for N, theirs in ((16, llama), (8, phi3)):
        angles = _angles(7, N // 2, torch.float32).repeat(2, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        assert same_bits((rotary(q, cos, sin), rotary(k, cos, sin)), theirs(q, k, cos, sin))
    options = {"interleaved": True, "rotary_dims": 8}
    assert same_bits((rotary(q, cos[..., :4], sin[..., :4], **options),), glm(q, k, cos, sin)[:1])
    whole = gptj(q[..., :8].transpose(1, 2), sin[..., :4], cos[..., :4]).transpose(1, 2)
    assert same_bits(rotary(q, cos[..., :4], sin[..., :4], **options)[..., :8], whole)


def test_one_column_a_pair_serves_both_of_its_elements():
    x = torch.randn(1, 2, 5, 8)
    cos, sin = _tables(1, 5, 4, dtype=torch.float32).values()
    one, two = x.chunk(2, -1)
    want = torch.cat((one * cos - two * sin, two * cos + one * sin), -1)  # GPT-OSS
    torch.testing.assert_close(rotary(x, cos, sin, rotary_dims=8), want)
    partly = rotary(x, cos, sin)
    assert torch.equal(partly[..., 4:], x[..., 4:]) and not torch.equal(partly, want)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cpp_kernel_has_the_bits_of_the_reference_and_of_its_backward(in_native, interleaved, dtype):
    options = _tables(2, 9, 34, dtype=dtype) | {"interleaved": interleaved}
    drawn = draw(rotary_rule, [(2, 3, 9, 40)], options, dtype)
    assert same_bits(ours(rotary_rule, *drawn, options), oracle(rotary_rule, *drawn, options))


def test_results_lie_where_attention_and_the_projection_read_them(room):
    options = _tables(1, 5, 8)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2)
    y, y_dot, (x_bar,), (x_bar_dot,) = ours(rotary_rule, (x,), (x,), x.contiguous(), x.contiguous(), options)
    assert y.is_contiguous() and y_dot.is_contiguous()
    assert x_bar.stride() == x_bar_dot.stride() == x.stride()


@layouts
def test_results_are_the_same_bits_on_any_number_of_threads(in_native, threads, interleaved):
    options = _tables(1, 301, 32, dtype=torch.float32) | {"interleaved": interleaved}
    drawn = draw(rotary_rule, [(2, 3, 301, 40)], options, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ours(rotary_rule, *drawn, options))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_arguments_are_left_as_they_were(room):
    options = _tables(1, 5, 6)
    drawn = draw(rotary_rule, [(2, 3, 5, 8)], options), tuple(options.values())
    before = mapped(torch.clone, drawn)
    ours(rotary_rule, *drawn[0], options)
    assert same_bits(drawn, before)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_what_is_not_needed_is_not_computed_and_changes_nothing(room, need):
    options = _tables(1, 5, 6)
    xs, xs_dot, y_bar, y_bar_dot = draw(rotary_rule, [(2, 3, 5, 8)], options)
    everything = ours(rotary_rule, xs, xs_dot, y_bar, y_bar_dot, options)[2:]
    got = rotary_rule.bwd_jvp(xs, xs_dot, (), y_bar, y_bar_dot, need[:1], need[1:], **options)
    for (value,), wanted, (full,) in zip(got, need, everything, strict=True):
        assert torch.equal(value, full) if wanted else value is None


@layouts
def test_gradcheck_and_gradgradcheck_in_both_modes(room, interleaved):
    options = _tables(1, 1, 2)
    x = torch.randn(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)

    def curved(x):  # gradgradcheck of a linear function alone would compare zeros
        return rotary(x, **options, interleaved=interleaved).sin()

    assert gradcheck(curved, x, check_forward_ad=True)
    assert gradgradcheck(curved, x, check_fwd_over_rev=True)


def test_a_dual_gets_what_the_unfused_function_gives_it():
    (x,), (x_dot,), *_ = draw(rotary_rule, [(2, 3, 5, 8)], _tables(1, 5, 6))
    q = Dual(x, x_dot)
    got, (want, _) = rotary(q, **_tables(1, 5, 6)), phi3(q, q, *_tables(1, 5, 6).values())
    torch.testing.assert_close((got.primal, got.tangent), (want.primal, want.tangent), **EXACT)


def test_a_table_with_a_derivative_is_refused_in_every_mode():
    x, table = torch.randn(1, 1, 5, 4), torch.randn(1, 5, 4)
    for cos, sin in ((table.clone().requires_grad_(), table), (table, torch.nn.Parameter(table.clone()))):
        with pytest.raises(ValueError, match="must be a constant"):
            rotary(x, cos, sin)
    with pytest.raises(ValueError, match="cos must be a plain tensor, a constant; got a Dual"):
        rotary(x, Dual(table, table), table)
    with pytest.raises(ValueError, match="sin must be a constant"):
        grad(lambda s: rotary(x, table, s).sum())(table)
    with pytest.raises(ValueError, match="cos must be a constant"):
        jvp(lambda c: rotary(x, c, table), (table,), (table,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="cos must be a constant"):
        rotary(x, forward_ad.make_dual(table, table), table)


def test_half_types_round_as_the_eager_expression():
    options = _tables(1, 5, 6, dtype=torch.bfloat16)
    drawn = draw(rotary_rule, [(2, 3, 5, 8)], options, torch.bfloat16)
    assert same_bits(ours(rotary_rule, *drawn, options), oracle(rotary_rule, *drawn, options))


def test_nothing_takes_the_eager_room():
    x, table = torch.empty(2, 3, 0, 8, requires_grad=True), torch.empty(1, 0, 8)
    assert torch.autograd.grad(rotary(x, table, table).sum(), x)[0].shape == x.shape
    with use_backend("native"), pytest.raises(ValueError, match="no such kernel"):
        rotary(x, table, table)


@pytest.mark.parametrize(
    ("x", "cos", "options", "message"),
    [
        ((2, 5, 8), (1, 5, 8), {}, r"x \[B, H, T, D\] and cos, sin"),
        ((2, 3, 5, 8), (5, 8), {}, r"x \[B, H, T, D\] and cos, sin"),
        ((2, 3, 5, 8), (1, 4, 8), {}, r"\[2 or 1, 5, N\]"),
        ((2, 3, 5, 8), (3, 5, 8), {}, r"\[2 or 1, 5, N\]"),
        ((2, 3, 5, 8), (1, 5, 7), {}, "must be even"),
        ((2, 3, 5, 8), (1, 5, 10), {}, "at most D = 8"),
        ((2, 3, 5, 8), (1, 5, 4), {"rotary_dims": 6}, "got 6 for 4 columns"),
    ],
)
def test_bad_shapes_are_named(x, cos, options, message):
    with pytest.raises(ValueError, match=message):
        rotary(torch.ones(x), torch.ones(cos), torch.ones(cos), **options)


def test_another_dtype_is_not_promoted_in_silence():
    with pytest.raises(ValueError, match="must have the dtype and device of x, torch.bfloat16"):
        rotary(torch.ones(1, 1, 5, 4).bfloat16(), torch.ones(1, 5, 4), torch.ones(1, 5, 4))


def test_a_sine_that_is_merely_negated_is_noticed():
    """The oracle can fail: the rotation back is the transpose only where a pair shares its angle."""
    options = _tables(1, 5, 8)
    drawn = draw(rotary_rule, [(2, 3, 5, 8)], options)
    _, _, y_bar, _ = drawn
    back = rotary_reference(y_bar, cos=options["cos"], sin=-options["sin"])
    want = oracle(rotary_rule, *drawn, options)[2][0]
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(back, want, **EXACT)
    shared = {name: table[..., :4].repeat(1, 1, 2) for name, table in options.items()}
    back = rotary_reference(y_bar, cos=shared["cos"], sin=-shared["sin"])
    torch.testing.assert_close(back, oracle(rotary_rule, *drawn, shared)[2][0], **EXACT)
    one, other = (ours(rotary_rule, *drawn, options | {"interleaved": i})[0] for i in (False, True))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(one, other, **EXACT)
