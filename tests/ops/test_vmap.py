"""``torch.func.vmap`` of every Rule and of its derivatives, against the same thing entry by entry."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from mamlfast.dual import Dual
from mamlfast.ops import attention_reference, attention_rule, cross_entropy, derived_rule, softmax
from tests.modes import (
    CASES,
    SPEC,
    N,
    close,
    directional_of,
    double_backward,
    draw,
    grad_of_jvp,
    gradient_of,
    hvp_of,
)


def entry(tree, dims, i):
    return tuple(x if dim is None else x.select(dim, i) for x, dim in zip(tree, dims, strict=True))


def one_by_one(quantity, f, xs, v, dims):
    results = [quantity(f, entry(xs, dims, i), entry(v, dims, i)) for i in range(N)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(map(torch.stack, zip(*results, strict=True)))


def value_of(f, xs, v):
    return f(*xs)


QUANTITIES = (value_of, gradient_of, directional_of, hvp_of, grad_of_jvp)
LAYOUTS = ("first", "last", "only the first operand")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", CASES)
def test_vmap_of_anything_is_that_thing_entry_by_entry(name, quantity, layout):
    case = CASES[name]
    xs, v = draw(case, mapped=True)
    dims = [0] * len(xs)
    if layout == "last":
        xs, v = (tuple(x.movedim(0, -1) for x in tree) for tree in (xs, v))
        dims = [x.ndim - 1 for x in xs]
    elif layout == "only the first operand":
        xs, v = ((tree[0], *(x[0] for x in tree[1:])) for tree in (xs, v))
        dims = [0] + [None] * (len(xs) - 1)
    got = vmap(partial(quantity, case.op), in_dims=(tuple(dims), tuple(dims)))(xs, v)
    close(got, one_by_one(hvp_of if quantity is grad_of_jvp else quantity, case.oracle, xs, v, dims))


@pytest.mark.parametrize("name", CASES)
def test_vmap_nests_and_can_be_differentiated(name):
    case = CASES[name]
    xs, v = draw(case, mapped=True)
    dims = [0] * len(xs)
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def scaled(scale, f):
        return one_by_one(hvp_of, f, tuple(scale * x for x in xs), v, dims)

    nested = vmap(lambda scale: vmap(lambda xs, v: hvp_of(case.op, xs, v))(tuple(scale * x for x in xs), v))(scales)
    close(nested, tuple(map(torch.stack, zip(*(scaled(s, case.oracle) for s in scales), strict=True))))

    def total(f):
        return lambda *xs: one_by_one(value_of, f, xs, xs, dims)

    close(hvp_of(lambda *xs: vmap(case.op)(*xs), xs, v), hvp_of(total(case.oracle), xs, v))
    close(double_backward(lambda *xs: vmap(case.op)(*xs), xs, v), hvp_of(total(case.oracle), xs, v))


@pytest.mark.parametrize("name", ["softmax", "silu", "layer_norm", "rms_norm", "cross_entropy"])
def test_kernels_that_vmap_cannot_see_into_are_mapped_in_every_room(room, name):
    case = CASES[name]
    xs, v = draw(case, mapped=True)
    got = vmap(partial(hvp_of, case.op))(xs, v)
    close(got, one_by_one(hvp_of, case.oracle, xs, v, [0] * len(xs)))


def test_dual_numbers_can_be_mapped():
    case = CASES["rms_norm"]
    xs, v = draw(case, mapped=True)

    def tangent(f, xs, v):
        return f(*map(Dual, xs, v)).tangent

    want = one_by_one(lambda f, xs, v: jvp(f, xs, v)[1], case.oracle, xs, v, [0, 0])
    close(vmap(partial(tangent, case.op))(xs, v), want)


@pytest.mark.parametrize("quantity", [gradient_of, directional_of, hvp_of])
def test_an_entry_that_is_not_its_own_is_seen(quantity):
    """A test of the test: every entry computed from the first."""
    case = CASES["rms_norm"]
    xs, v = draw(case, mapped=True)
    first = tuple(tuple(x[:1].expand_as(x) for x in tree) for tree in (xs, v))
    with pytest.raises(AssertionError, match="not close"):
        close(vmap(partial(quantity, case.op))(*first), one_by_one(quantity, case.oracle, xs, v, [0, 0]))


def test_a_tensor_among_the_options_is_mapped_with_the_operands():
    z, targets = torch.randn(N, 4, 7, dtype=torch.float64), torch.randint(0, 7, (N, 4))
    got = vmap(lambda z, target: grad(lambda z: cross_entropy(z, target=target).sin())(z))(z, targets)
    want = [grad(lambda z, t=t: F.cross_entropy(z, t).sin())(entry) for entry, t in zip(z, targets, strict=True)]
    close(got, torch.stack(want))


def test_tensors_in_an_attention_specification_are_mapped_with_the_operands():
    """Also where only one of a pair is: the ids of the keys, not those of the queries."""
    (q, k, v), (u, *_) = draw(CASES["attention"], mapped=True)
    masks = torch.rand(N, 2, 5) > 0.3
    query_ids, key_ids = torch.randint(0, 2, (2, 3)), torch.randint(0, 2, (N, 2, 5))

    def hvp(op, q, k, v, u, mask, ids):
        spec = replace(SPEC, key_mask=mask, segments=(query_ids, ids))
        return jvp(grad(lambda q: op(q, k, v, spec=spec).sin().sum()), (q,), (u,))[1]

    operands = q, k, v, u, masks, key_ids
    want = [hvp(attention_reference, *entry) for entry in zip(*operands, strict=True)]
    for rule in (attention_rule, replace(attention_rule, fold=None)):
        close(vmap(partial(hvp, rule))(*operands), torch.stack(want))
    want = grad(lambda q, mask: attention_reference(q, k[0], v[0], spec=replace(SPEC, key_mask=mask)).sin().sum())
    got = grad(lambda q, mask: attention_rule(q, k[0], v[0], spec=replace(SPEC, key_mask=mask)).sin().sum())
    close(got(q[0], masks[0]), want(q[0], masks[0]))


@dataclass(frozen=True)
class Unknown:
    """An option that ``torch.func`` does not look into."""

    mask: Tensor


def test_a_tensor_that_an_option_hides_from_torch_func_is_refused_by_name():
    rule = derived_rule("masked", lambda x, *, hidden: x.square() * hidden.mask)
    x, mask = torch.ones(2, 3), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    for transform in (
        vmap(lambda x, m: rule(x, hidden=Unknown(m))),
        grad(lambda x, m: rule(x, hidden=Unknown(m)).sum()),
    ):
        with pytest.raises(ValueError, match="option hidden of masked is a Unknown"):
            transform(x, mask)
    close(vmap(lambda x: rule(x, hidden=Unknown(mask[0])))(x), mask[0].expand(2, 3))  # a constant may hide


def test_a_mapped_dimension_needs_an_entry():
    with pytest.raises(ValueError, match="softmax cannot be mapped over a dimension of size 0"):
        vmap(softmax)(torch.ones(0, 3))


CALLS_OF_HVP = 5  # fwd, bwd, bwd_jvp, and fwd_jvp for the tangent of either


def count_calls(rule):
    """The rule, and a list that grows at each call of one of its four functions."""
    calls = []

    def counted(name, function):
        def call(*args, **options):
            calls.append(name)
            return function(*args, **options)

        return call

    return calls, replace(rule, **{f: counted(f, getattr(rule, f)) for f in ("fwd", "bwd", "fwd_jvp", "bwd_jvp")})


@pytest.mark.parametrize("name", ["attention", "attention-sinks"])
def test_attention_folds_what_it_can_and_loops_over_the_rest(name):
    case = CASES[name]
    xs, v = draw(case, mapped=True)
    calls, rule = count_calls(attention_rule)
    vmap(lambda xs, v: hvp_of(partial(rule, spec=SPEC), xs, v))(xs, v)
    looped = len(case.shapes) > 3
    assert len(calls) == CALLS_OF_HVP * (N if looped else 1)


def test_a_rule_that_folds_gives_what_the_loop_gives():
    """Softmax over the last of two dimensions, or more: entries of the first share nothing."""
    folds = replace(softmax, fold=lambda xs, options: options if xs[0].ndim > 2 else None)
    x, u = (torch.randn(4, N, 2, 5, dtype=torch.float64) for _ in range(2))
    calls, rule = count_calls(folds)
    for dim in (0, 1, 2):
        axes = {"in_dims": (dim, dim)}
        got, want = (vmap(lambda x, u, f=f: hvp_of(f, (x,), (u,))[0], **axes)(x, u) for f in (rule, softmax))
        close(got, want)
    assert len(calls) == 3 * CALLS_OF_HVP
    close(vmap(vmap(rule))(x), torch.softmax(x, -1))
    close(vmap(vmap(vmap(rule)))(x), torch.softmax(x, -1))  # one row each: not folded
