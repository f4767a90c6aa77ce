"""Every Rule, against what autograd makes of its reference; and the glue, against its traps.

Float64 throughout, because the claims are exact.
"""

from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from mamlfast_kernels.attention_spec import AttentionSpec
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vjp

from mamlfast.ops import (
    attention_rule,
    cross_entropy,
    derived_rule,
    elementwise,
    gated,
    layer_norm,
    linear,
    log_softmax,
    softmax,
)
from mamlfast.ops.linear import matmul, mul
from mamlfast.ops.rotary import rotary_rule

SPEC = AttentionSpec
CAUSAL = SPEC(scale=0.3, causal=True)
MASK = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
TARGET = torch.tensor([2, -100, 0, 6])

# Tables whose pairs share neither an angle nor a length.
TABLES = {
    name: torch.linspace(first, last, 30, dtype=torch.float64).cos().view(1, 5, 6)
    for name, first, last in (("cos", 0, 9), ("sin", 1, 7))
}

# rule, shapes of its operands, options
CASES = {
    "linear": (linear, [(2, 3, 5), (4, 5)], {}),
    "linear-bias": (linear, [(3, 5), (4, 5), (4,)], {}),
    "linear-one-row": (linear, [(5,), (1, 5), (1,)], {}),
    "matmul": (matmul, [(2, 3, 5), (2, 5, 4)], {}),
    "matmul-broadcast": (matmul, [(2, 1, 3, 5), (4, 5, 1)], {}),
    "mul": (mul, [(3, 5), (3, 5)], {}),
    "mul-broadcast": (mul, [(2, 3, 1), (3, 5)], {}),
    "softmax": (softmax, [(3, 5)], {}),
    "softmax-first-dim": (softmax, [(3, 5, 2)], {"dim": 0}),
    "log_softmax": (log_softmax, [(3, 5)], {"dim": -1}),
    "layer_norm": (layer_norm, [(3, 7), (7,), (7,)], {"eps": 0.1}),
    "layer_norm-3d": (layer_norm, [(2, 3, 5), (5,), (5,)], {}),
    "cross_entropy": (cross_entropy, [(4, 7)], {"target": TARGET}),
    "cross_entropy-sum": (cross_entropy, [(4, 7)], {"target": TARGET, "reduction": "sum"}),
    "cross_entropy-none": (cross_entropy, [(4, 7)], {"target": TARGET, "reduction": "none"}),
    "cross_entropy-smooth": (cross_entropy, [(4, 7)], {"target": TARGET, "label_smoothing": 0.2}),
    "attention": (attention_rule, [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)], {"spec": SPEC(scale=0.5)}),
    "attention-causal": (attention_rule, [(1, 2, 5, 4)] * 3, {"spec": CAUSAL}),
    "attention-causal-longer": (attention_rule, [(1, 2, 3, 4)] + [(1, 2, 5, 4)] * 2, {"spec": CAUSAL}),
    "attention-grouped": (attention_rule, [(2, 6, 3, 4)] + [(2, 2, 3, 4)] * 2, {"spec": CAUSAL}),
    "attention-empty-row": (
        attention_rule,
        [(1, 2, 3, 4)] + [(1, 2, 5, 4)] * 2,
        {"spec": SPEC(scale=0.5, mask=MASK)},
    ),
    "attention-additive": (
        attention_rule,
        [(2, 2, 3, 4)] + [(2, 1, 5, 4)] * 2,
        {"spec": SPEC(scale=0.5, mask=torch.linspace(-1, 1, 30, dtype=torch.float64).view(2, 1, 3, 5))},
    ),
    "attention-sinks": (attention_rule, [(2, 4, 5, 4)] + [(2, 2, 5, 4)] * 2 + [(4,)], {"spec": CAUSAL}),
    "attention-sinks-empty-row": (
        attention_rule,
        [(1, 2, 3, 4)] + [(1, 2, 5, 4)] * 2 + [(2,)],
        {"spec": SPEC(scale=0.5, mask=MASK)},
    ),
    "attention-everything": (
        attention_rule,
        [(2, 4, 5, 4)] + [(2, 2, 7, 4), (2, 2, 7, 3), (4,)],
        {
            "spec": SPEC(
                scale=0.7,
                causal=True,
                offset=2,
                window=(3, None),
                softcap=1.5,
                segments=(torch.tensor([[0, 0, 1, 1, 1]] * 2), torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)),
                key_mask=torch.tensor([[True] * 7, [True, True, True, False, True, True, True]]),
                mask=torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7),
                dropout=0.4,
                seed=(5 << 32) + 7,
            )
        },
    ),
    **{
        name: (getattr(elementwise, name), [(3, 5)], {})
        for name in ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "exp", "rsqrt", "relu", "relu2")
    },
    **{name: (getattr(gated, name), [(3, 5), (3, 5)], {}) for name in ("swiglu", "geglu", "geglu_tanh", "reglu")},
    "swiglu_packed": (gated.swiglu_packed, [(3, 6)], {}),
    "rotary": (rotary_rule, [(2, 3, 5, 6)], TABLES),
    "rotary-interleaved": (rotary_rule, [(1, 2, 5, 9)], TABLES | {"interleaved": True}),
    "power-2": (elementwise.power, [(3, 5)], {"exponent": 2}),
    "power-3": (elementwise.power, [(3, 5)], {"exponent": 3}),
    # The two for which PyTorch's own forward mode fails, one loudly and one silently.
    "derived-swiglu": (derived_rule("swiglu", lambda a, b: F.silu(a) * b), [(3, 5), (3, 5)], {}),
    "derived-layer_norm": (
        derived_rule("layer_norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b)),
        [(3, 5), (5,), (5,)],
        {},
    ),
}
WRITTEN = [name for name in CASES if not name.startswith("derived")]
# Their second derivatives are zero.
PIECEWISE_LINEAR = ["relu", "rotary", "rotary-interleaved"]


def draw(name, requires_grad=False):
    """Return the rule with its options bound, its operands and a tangent for each."""
    rule, shapes, options = CASES[name]
    torch.manual_seed(0)
    xs = tuple(torch.randn(s, dtype=torch.float64) for s in shapes)
    xs = tuple(x.abs() + 0.5 if name in ("rsqrt",) else x for x in xs)
    return bound(rule, options), tuple(x.requires_grad_(requires_grad) for x in xs), tangents(shapes)


def tangents(shapes):
    return tuple(torch.randn(s, dtype=torch.float64) for s in shapes)


def bound(rule, options):
    functions = ("reference", "fwd", "bwd", "fwd_jvp", "bwd_jvp")
    return replace(rule, **{f: partial(getattr(rule, f), **options) for f in functions})


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def all_needed(xs):
    return (True,) * len(xs)


def specification(rule, xs, xs_dot):
    """What autograd makes of the reference: y, y_dot, and a backward with its tangent."""
    y, y_dot = jvp(rule.reference, xs, xs_dot)
    y_bar, y_bar_dot = torch.randn_like(y), torch.randn_like(y)

    def backward(xs, y_bar):
        return vjp(rule.reference, *xs)[1](y_bar)

    xs_bar, xs_bar_dot = jvp(backward, (xs, y_bar), (xs_dot, y_bar_dot))
    return y, y_dot, y_bar, y_bar_dot, xs_bar, xs_bar_dot


@pytest.mark.parametrize("name", CASES)
def test_the_four_functions_match_torch_func_on_the_reference(name):
    rule, xs, xs_dot = draw(name)
    y, y_dot, y_bar, y_bar_dot, xs_bar, xs_bar_dot = specification(rule, xs, xs_dot)
    need = all_needed(xs)

    got, saved = rule.fwd(xs)
    close(got, y)
    close(rule.bwd(xs, saved, y_bar, need), xs_bar)
    got, got_dot, saved = rule.fwd_jvp(xs, xs_dot)
    close((got, got_dot), (y, y_dot))
    close(rule.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need), (xs_bar, xs_bar_dot))


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in PIECEWISE_LINEAR])
def test_a_dropped_term_in_the_tangent_of_the_backward_is_caught(name):
    """A test of the test: the four functions with the tangents of the operands left out of ``bwd_jvp``."""
    rule, xs, xs_dot = draw(name)
    *_, y_bar, y_bar_dot, xs_bar, xs_bar_dot = specification(rule, xs, xs_dot)
    nothing = tuple(torch.zeros_like(x) for x in xs)
    _, _, saved = rule.fwd_jvp(xs, nothing)
    need = all_needed(xs)
    with pytest.raises(AssertionError):
        close(rule.bwd_jvp(xs, nothing, saved, y_bar, y_bar_dot, need, need)[1], xs_bar_dot)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_not_needed_may_be_left_out_and_changes_nothing_else(name):
    rule, xs, xs_dot = draw(name)
    *_, y_bar, y_bar_dot, xs_bar, xs_bar_dot = specification(rule, xs, xs_dot)
    _, _, saved = rule.fwd_jvp(xs, xs_dot)
    for only in range(len(xs)):
        need = tuple(i == only for i in range(len(xs)))
        got_bar, got_bar_dot = rule.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need)
        close(got_bar[only], xs_bar[only])
        close(got_bar_dot[only], xs_bar_dot[only])


@pytest.mark.parametrize("name", [name for name in WRITTEN if len(CASES[name][1]) > 1])
def test_a_constant_operand_is_a_zero_tangent(name):
    rule, xs, xs_dot = draw(name)
    for constant in range(len(xs)):
        absent = tuple(None if i == constant else t for i, t in enumerate(xs_dot))
        zero = tuple(torch.zeros_like(t) if i == constant else t for i, t in enumerate(xs_dot))
        got, want = rule.dual(xs, absent), rule.dual(xs, zero)
        close(got, want)


@pytest.mark.parametrize("name", WRITTEN)
def test_tangents_leave_the_primal_results_unchanged(name):
    rule, xs, xs_dot = draw(name)
    y, saved = rule.fwd(xs)
    y_bar, y_bar_dot = torch.randn_like(y), torch.randn_like(y)
    same_y, _, dual_saved = rule.fwd_jvp(xs, xs_dot)
    need = all_needed(xs)
    close(same_y, y)
    close(
        rule.bwd_jvp(xs, xs_dot, dual_saved, y_bar, y_bar_dot, need, need)[0],
        tuple(rule.bwd(xs, saved, y_bar, need)),
    )


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_gradgradcheck_in_reverse_and_forward_mode(name):
    rule, xs, _ = draw(name, requires_grad=True)
    assert gradcheck(rule, xs, check_forward_ad=True)
    assert gradgradcheck(rule, xs, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_the_dual(name):
    rule, xs, xs_dot = draw(name, requires_grad=True)
    duals = (*xs, *(t.requires_grad_() for t in xs_dot))
    assert gradcheck(lambda *d: rule.dual(d[: len(xs)], d[len(xs) :]), duals)


def with_second_path(f):
    """A loss with another path to the inputs: there, a first-order backward is wrong in silence."""
    return lambda *xs: f(*xs).sin().sum() + sum(x.pow(3).sum() for x in xs)


@pytest.mark.parametrize("name", CASES)
def test_double_backward_and_dual_backward_are_the_same_hvp(name):
    rule, plain, v = draw(name)
    want = jvp(grad(with_second_path(rule.reference), tuple(range(len(v)))), plain, v)[1]

    _, xs, _ = draw(name, requires_grad=True)
    g = torch.autograd.grad(with_second_path(rule)(*xs), xs, create_graph=True)
    close(torch.autograd.grad(g, xs, v), want)

    y, y_dot = rule.dual(xs, v)
    loss_dot = (y.cos() * y_dot).sum() + sum((3 * x**2 * t).sum() for x, t in zip(xs, v, strict=True))
    close(torch.autograd.grad(loss_dot, xs), want)


@pytest.mark.parametrize("name", CASES)
def test_torch_func_finds_that_hvp_in_its_three_mixed_modes(name):
    rule, xs, v = draw(name)
    argnums = tuple(range(len(v)))
    want = jvp(grad(with_second_path(rule.reference), argnums), xs, v)[1]
    loss = with_second_path(rule)
    close(jvp(grad(loss, argnums), xs, v)[1], want)
    close(vjp(grad(loss, argnums), *xs)[1](v), want)
    close(grad(lambda *xs: jvp(loss, xs, v)[1], argnums)(*xs), want)


@pytest.mark.parametrize("name", ["linear-bias", "attention-causal", "derived-swiglu"])
def test_a_third_derivative_is_an_error(name):
    rule, xs, v = draw(name, requires_grad=True)
    g = torch.autograd.grad(rule(*xs).square().sum(), xs, create_graph=True)
    h = torch.autograd.grad(g, xs, v, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(h, xs, v)
    h = torch.autograd.grad(rule.dual(xs, v)[1].square().sum(), xs, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(h, xs, v)


class BareKernel(torch.autograd.Function):
    """A cube whose backward is a constant to autograd, as one that launches a kernel is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, y_bar):
        (x,) = ctx.saved_tensors
        return y_bar.detach() * 3 * x.detach() ** 2


def test_a_bare_kernel_in_a_backward_is_silently_first_order_to_autograd_and_refused_by_a_derived_rule():
    x = torch.tensor(2.0, requires_grad=True)
    (g,) = torch.autograd.grad(BareKernel.apply(x) + x**2, x, create_graph=True)
    (h,) = torch.autograd.grad(g, x)
    assert h == 2.0  # the second derivative is 14

    rule = derived_rule("cube", BareKernel.apply)
    with pytest.raises(NotImplementedError, match="constant to autograd"):
        rule.dual((x.detach(),), (torch.ones(()),))


def test_a_derived_rule_of_a_step_function_has_derivatives_of_zero():
    rule = derived_rule("floor", torch.floor)
    x = torch.tensor([0.5, 1.5], requires_grad=True)
    y, y_dot = rule.dual((x,), (torch.ones(2),))
    assert torch.equal(y, torch.tensor([0.0, 1.0]))
    assert torch.equal(y_dot, torch.zeros(2))


def test_long_rows_of_logits_and_queries_are_cut_into_chunks_without_a_trace(monkeypatch):
    """The same numbers whatever the chunk; the chunk of one row is the hardest."""
    for module, name in (("cross_entropy", "cross_entropy-smooth"), ("attention_eager", "attention-grouped")):
        rule, xs, xs_dot = draw(name)
        whole = rule.dual(xs, xs_dot)
        for chunk in (1, 40):
            # The attribute of the package is the Rule of that name, so the module is fetched by its own.
            monkeypatch.setattr(import_module(f"mamlfast.ops.{module}"), "CHUNK", chunk)
            close(rule.dual(xs, xs_dot), whole)
            leaves = tuple(x.requires_grad_() for x in draw(name)[1])
            g = torch.autograd.grad(rule.dual(leaves, xs_dot)[1].sum(), leaves)
            monkeypatch.undo()
            leaves = tuple(x.requires_grad_() for x in draw(name)[1])
            close(g, torch.autograd.grad(rule.dual(leaves, xs_dot)[1].sum(), leaves))
