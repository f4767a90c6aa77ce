"""Every Rule in every mode of PyTorch, against plain operations of PyTorch; float64, because the claims are exact.

What a mode should give is always computed in one way, by ``torch.func`` on the oracle.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp
from torch.utils.checkpoint import checkpoint

from mamlfast.dual import Dual
from mamlfast.ops import rms_norm, softmax
from tests.modes import (
    CASES,
    close,
    directional_of,
    double_backward,
    draw,
    everything,
    grad_of_jvp,
    gradient_of,
    hvp_of,
    leaves,
    loss_of,
)


def autograd(f, xs, v):
    xs = leaves(xs)
    return torch.autograd.grad(loss_of(f)(*xs), xs)


def func_vjp(f, xs, v):
    y, pullback = vjp(loss_of(f), *xs)
    return pullback(torch.ones_like(y))  # after the transform has ended


def vjp_of_grad(f, xs, v):
    return vjp(grad(loss_of(f), everything(xs)), *xs)[1](v)


def in_forward_mode(g, xs, v):
    with forward_ad.dual_level():
        return g(*(forward_ad.make_dual(x, t) for x, t in zip(xs, v, strict=True)))


def tangents_of(values):
    return tuple(forward_ad.unpack_dual(x).tangent for x in values)


def forward_mode(f, xs, v):
    return in_forward_mode(lambda *xs: forward_ad.unpack_dual(loss_of(f)(*xs)).tangent, xs, v)


def reverse_over_forward(f, xs, v):
    xs = leaves(xs)
    return torch.autograd.grad(forward_mode(f, xs, v), xs)


def forward_over_reverse(f, xs, v):
    def gradient(*xs):
        return tangents_of(torch.autograd.grad(loss_of(f)(*xs), xs, create_graph=True))

    return in_forward_mode(gradient, leaves(xs), v)


def through_dual(f, xs, v):
    xs = leaves(xs)
    return torch.autograd.grad(loss_of(f)(*map(Dual, xs, v)).tangent, xs)


def dual_in_a_checkpoint(f, xs, v):
    xs = leaves(xs)

    def tangent(*xs):
        return loss_of(f)(*map(Dual, xs, v)).tangent

    return torch.autograd.grad(checkpoint(tangent, *xs, use_reentrant=False), xs)


def checkpointed(f, xs, v):
    return autograd(partial(checkpoint, f, use_reentrant=False), xs, v)


def checkpointed_twice(f, xs, v):
    return double_backward(partial(checkpoint, f, use_reentrant=False), xs, v)


def checkpointed_reentrant(f, xs, v):
    xs = leaves(xs)
    loss_of(partial(checkpoint, f, use_reentrant=True))(*xs).backward()
    return tuple(x.grad for x in xs)


FIRST = (autograd, gradient_of, func_vjp, checkpointed, checkpointed_reentrant)
FORWARD = (directional_of, forward_mode)
SECOND = (
    double_backward,
    hvp_of,
    grad_of_jvp,
    vjp_of_grad,
    reverse_over_forward,
    forward_over_reverse,
    through_dual,
    dual_in_a_checkpoint,
    checkpointed_twice,
)
MODES = [(m, want) for ms, want in ((FIRST, gradient_of), (FORWARD, directional_of), (SECOND, hvp_of)) for m in ms]


@pytest.mark.parametrize(("mode", "want"), MODES, ids=[m.__name__ for m, _ in MODES])
@pytest.mark.parametrize("name", CASES)
def test_every_mode_gives_the_derivative_of_the_plain_operations(name, mode, want):
    case = CASES[name]
    xs, v = draw(case)
    close(mode(case.op, xs, v), want(case.oracle, xs, v))


@pytest.mark.parametrize("name", ["linear", "softmax", "cross_entropy", "attention"])
def test_torch_func_hessian_is_the_hessian(name):
    case = CASES[name]
    xs, _ = draw(case)
    f, oracle = (lambda x, op=op: op(x, *xs[1:]).sin().sum() for op in (case.op, case.oracle))
    close(torch.func.hessian(f)(xs[0]), torch.autograd.functional.hessian(oracle, xs[0]))


# A test of the tests: a term dropped from each of the functions that carry a mode.


def broken(rule, **options):
    def bwd(xs, saved, y_bar, need, **options):
        return tuple(x_bar if x_bar is None else 0.5 * x_bar for x_bar in rule.bwd(xs, saved, y_bar, need, **options))

    def fwd_jvp(xs, xs_dot, **options):
        y, y_dot, saved = rule.fwd_jvp(xs, xs_dot, **options)
        return y, 0.5 * y_dot, saved

    def bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options):
        nothing = tuple(torch.zeros_like(x) for x in xs)
        return rule.bwd_jvp(xs, nothing, saved, y_bar, y_bar_dot, need, need_dot, **options)

    wrong = {gradient_of: {"bwd": bwd}, directional_of: {"fwd_jvp": fwd_jvp}, hvp_of: {"bwd_jvp": bwd_jvp}}
    return {want: partial(replace(rule, **functions), **options) for want, functions in wrong.items()}


@pytest.mark.parametrize(("mode", "want"), MODES, ids=[m.__name__ for m, _ in MODES])
def test_a_term_that_a_rule_drops_is_seen_in_every_mode(mode, want):
    case = CASES["rms_norm"]
    xs, v = draw(case)
    with pytest.raises(AssertionError, match="not close"):
        close(mode(broken(rms_norm)[want], xs, v), want(case.oracle, xs, v))


def test_derivatives_that_a_rule_does_not_have_are_errors():
    x = torch.randn(3, 5, dtype=torch.float64)

    def f(x):
        return softmax(x).sin().sum()

    with pytest.raises(NotImplementedError, match="forward mode over forward mode of softmax"):
        jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,))
    by_reverse = grad(lambda x: hvp_of(softmax, (x,), (x,))[0].sum())
    by_forward = partial(jvp, lambda x: vjp_of_grad(softmax, (x,), (x,))[0], tangents=(x,))
    for third in (by_reverse, lambda x: by_forward((x,))):
        with pytest.raises(NotImplementedError, match="third derivative"):
            third(x)
