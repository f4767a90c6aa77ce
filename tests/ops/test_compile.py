"""Rules inside ``torch.compile``: first order without a graph break; whatever else is right, or an error."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch import Tensor
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from mamlfast.dual import Dual
from mamlfast.ops import attention_reference, attention_rule, rms_norm
from mamlfast.ops.attention_compiled import _put_together, _take_apart
from tests.modes import (
    CASES,
    SPEC,
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

BACKENDS = ("eager", "aot_eager")  # Dynamo alone; Dynamo and the tracing of the backward
PARTS = ("rms_norm", "layer_norm", "attention-sinks")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f, backend):
    return torch.compile(f, backend=backend, fullgraph=True)


def first_order(f, xs, backend):
    xs = leaves(xs)
    return torch.autograd.grad(compiled(loss_of(f), backend)(*xs), xs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_first_order_compiles_without_a_graph_break(name, backend):
    case = CASES[name]
    xs, v = draw(case)
    close(first_order(case.op, xs, backend), gradient_of(case.oracle, xs, v))


def chain(part, x, w, b):
    """Several Rules in a row, or what they stand for."""
    silu, layer_norm, rms_norm, softmax = (
        getattr(CASES[name], part) for name in ("silu", "layer_norm", "rms_norm", "softmax")
    )
    return softmax(rms_norm(silu(layer_norm(x, w, b)), w))


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # Inductor's own
def test_a_chain_of_rules_compiles_whole(backend):
    xs, v = draw(CASES["layer_norm"])
    want = gradient_of(partial(chain, "oracle"), xs, v)
    close(first_order(partial(chain, "op"), xs, backend), want)
    close(first_order(partial(checkpoint, partial(chain, "op"), use_reentrant=False), xs, backend), want)


def test_a_wrong_compiled_form_is_seen():
    """A test of the test."""
    case = CASES["rms_norm"]
    xs, v = draw(case)
    wrong = replace(rms_norm, compiled=lambda x, w: 0.5 * rms_norm.reference(x, w))
    with pytest.raises(AssertionError, match="not close"):
        close(first_order(wrong, xs, "eager"), gradient_of(case.oracle, xs, v))


@pytest.mark.parametrize("quantity", [gradient_of, directional_of, hvp_of, grad_of_jvp])
@pytest.mark.parametrize("name", PARTS)
def test_torch_func_inside_a_compiled_region_is_right(name, quantity):
    case = CASES[name]
    xs, v = draw(case)
    got = compiled(lambda xs, v: quantity(case.op, xs, v), "aot_eager")(xs, v)
    close(got, (hvp_of if quantity is grad_of_jvp else quantity)(case.oracle, xs, v))


@pytest.mark.parametrize("name", ["rms_norm", "attention"])
def test_double_backward_through_a_compiled_region_is_right_or_an_error(name):
    case = CASES[name]
    xs, v = draw(case)
    close(double_backward(compiled(case.op, "eager"), xs, v), hvp_of(case.oracle, xs, v))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        double_backward(compiled(case.op, "aot_eager"), xs, v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rms_norm", "attention"])
def test_a_transform_around_a_compiled_function_is_right_or_an_error(name, backend):
    """Also where the function was compiled before, for no transform at all."""
    case = CASES[name]
    xs, v = draw(case)
    op = torch.compile(case.op, backend=backend)
    close(op(*xs), case.oracle(*xs))
    for quantity in (gradient_of, directional_of, hvp_of):
        close(quantity(op, xs, v), quantity(case.oracle, xs, v))
    try:
        got = vmap(op)(*(torch.stack([x, 2 * x]) for x in xs))
    except RuntimeError as error:  # Dynamo's errors are RuntimeErrors
        assert type(error).__module__ == "torch._dynamo.exc"
    else:
        close(got, torch.stack([case.oracle(*xs), case.oracle(*(2 * x for x in xs))]))


def test_tangents_are_refused_inside_a_compiled_region():
    xs, v = draw(CASES["rms_norm"])
    with pytest.raises(RuntimeError, match="keep Rule.dual and Dual outside"):
        compiled(lambda xs, v: rms_norm.dual(xs, v), "eager")(xs, v)
    with pytest.raises(RuntimeError, match="Dynamo does not know how to trace"):
        compiled(lambda xs, v: rms_norm(*map(Dual, xs, v)), "eager")(xs, v)


def test_a_derived_rule_is_refused_to_torch_func_inside_a_compiled_region():
    case = CASES["derived"]
    xs, v = draw(case)
    with pytest.raises(RuntimeError, match="torch.func or forward mode met it"):
        compiled(lambda *xs: grad(loss_of(case.op), everything(xs))(*xs), "eager")(*xs)


def test_make_fx_records_the_plain_operations_whatever_the_room(room):
    case = CASES["rms_norm"]
    xs, v = draw(case)
    graph = make_fx(lambda *xs: jvp(case.op, xs, v)[1])(*xs)
    close(graph(*v), jvp(case.oracle, v, v)[1])


# Attention: operators of its own.


def test_no_tensor_of_scores_is_in_the_graph_of_attention():
    xs, _ = draw(CASES["attention"])
    recorded = EagerAndRecordGraphs()
    torch.compile(lambda *xs: attention_rule(*xs, spec=SPEC), backend=recorded, fullgraph=True)(*xs)
    (graph,) = recorded.graphs
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.mamlfast_compiled.attention_forward.default in calls
    assert not any("softmax" in str(call) or "matmul" in str(call) for call in calls)


def test_the_operators_of_attention_pass_the_checks_of_torch_library():
    xs, _ = draw(CASES["attention-sinks"])
    operators, parts, need = torch.ops.mamlfast_compiled, _take_apart(SPEC), [True, False, True, True]
    o, lse = operators.attention_forward(list(xs), *parts)
    torch.library.opcheck(operators.attention_forward.default, (list(leaves(xs)), *parts))
    torch.library.opcheck(
        operators.attention_backward.default, (list(leaves(xs)), o, lse, leaves([o])[0], need, *parts)
    )
    torch.library.opcheck(operators.attention_double_backward.default, (list(xs), list(xs), o, [*need, True], *parts))


def test_attention_compiles_with_constant_operands_and_a_specification_made_inside():
    (q, k, v), _ = draw(CASES["attention"])

    def loss(op, q, v, key_mask):
        return op(q, k, v, spec=AttentionSpec(scale=0.5, window=(2, 1), key_mask=key_mask)).sin().sum()

    def gradient(f):
        xs = leaves((q, v))
        return torch.autograd.grad(f(*xs, SPEC.key_mask), xs)

    want = gradient(lambda *xs: loss(attention_reference, *xs))
    close(gradient(compiled(lambda *xs: loss(attention_rule, *xs), "aot_eager")), want)


def test_a_new_seed_of_dropout_is_not_a_new_graph():
    xs, _ = draw(CASES["attention"])
    counter = CompileCounter()

    def attention(seed, *xs):
        return attention_rule(*xs, spec=replace(SPEC, dropout=0.3, seed=seed))

    f = torch.compile(attention, backend=counter, fullgraph=True)
    for seed in range(5, 9):
        close(f(seed, *xs), attention(seed, *xs))
    assert counter.frame_count <= 2  # the first seed is a constant to Dynamo


def same(a, b):
    return a is b if isinstance(a, Tensor) else a == b


def test_a_specification_is_put_together_as_it_was():
    """Every field, none at its default: one that is forgotten would be dropped in silence."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    spec = AttentionSpec(
        scale=0.25,
        causal=True,
        offset=3,
        window=(4, 5),
        softcap=2.0,
        segments=(ids, ids.clone()),
        key_mask=torch.ones(2, 3, dtype=torch.bool),
        mask=torch.zeros(3, 3),
        dropout=0.5,
        seed=7,
    )
    again, default = _put_together(*_take_apart(spec)), AttentionSpec(scale=1.0)
    for name in (field.name for field in fields(AttentionSpec)):
        value, got = getattr(spec, name), getattr(again, name)
        assert value is not getattr(default, name)
        assert all(map(same, got, value)) if isinstance(value, tuple) else same(got, value)
