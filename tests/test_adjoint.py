"""Replay, Unrolled, FirstOrder and Reptile, against closed forms and each other."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamlfast
from mamlfast import SGD, Episode, FirstOrder, Replay, Reptile, Unrolled
from mamlfast.tree import empty_like
from tests.models import draw_episode, overall_error, tiny_model

A = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)


def quadratic(params, shift):
    """Hessian A everywhere, so that K steps of SGD multiply the query gradient by (I - lr A)^K."""
    d = params["x"] - shift
    return 0.5 * d @ A @ d


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("adjoint", [Replay(), Unrolled()])
def test_the_meta_gradient_of_a_quadratic_is_its_closed_form(steps, adjoint):
    x, shift, lr = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64), 0.1
    result = mamlfast.meta_grad(
        quadratic,
        {"x": x},
        Episode(support=[0 * shift], query=shift),
        inner=SGD(lr=lr),
        steps=steps,
        adjoint=adjoint,
    )
    contraction = torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) - lr * A, steps)
    adapted = contraction @ x
    torch.testing.assert_close(result.adapted["x"], adapted)
    torch.testing.assert_close(result.query_loss, quadratic({"x": adapted}, shift))
    torch.testing.assert_close(result.grads["x"], contraction @ A @ (adapted - shift))
    assert result.support_losses.shape == (steps,)
    if steps:
        torch.testing.assert_close(result.support_losses[0], quadratic({"x": x}, 0 * shift))


def test_first_order_leaves_the_contraction_out_and_reptile_is_the_way_back():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    episode = Episode(support=[0 * x], query=torch.ones_like(x))
    first = mamlfast.meta_grad(quadratic, {"x": x}, episode, inner=SGD(lr=0.1), steps=2, adjoint=FirstOrder())
    torch.testing.assert_close(first.grads["x"], A @ (first.adapted["x"] - 1))
    reptile = mamlfast.meta_grad(quadratic, {"x": x}, episode, inner=SGD(lr=0.1), steps=2, adjoint=Reptile())
    torch.testing.assert_close(reptile.grads["x"], x - first.adapted["x"])
    torch.testing.assert_close(reptile.query_loss, first.query_loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("recompute", [True, False])
def test_replay_repeats_the_dropout_of_the_step_it_stands_for(attention, recompute):
    model = tiny_model("gpt2", attention=attention, dropout=0.3)
    episode = draw_episode(3)
    loss, params = mamlfast.causal_lm(model, recompute=recompute)

    def meta_grad(adjoint, seed=5):
        torch.manual_seed(seed)
        return mamlfast.meta_grad(loss, params, episode, inner=SGD(lr=0.1), adjoint=adjoint)

    want, got = meta_grad(Unrolled()), meta_grad(Replay())
    assert overall_error(got.grads, want.grads) < 1e-6
    assert overall_error(meta_grad(FirstOrder()).grads, want.grads) > 0.05
    assert overall_error(meta_grad(Replay(), seed=6).grads, want.grads) > 0.05  # the draws do matter


def test_the_generators_end_where_the_forward_loop_left_them():
    model = tiny_model("gpt2", dropout=0.3)
    loss, params = mamlfast.causal_lm(model)
    states = []
    for adjoint in (FirstOrder(), Replay(), Unrolled()):
        torch.manual_seed(5)
        mamlfast.meta_grad(loss, params, draw_episode(2), inner=SGD(lr=0.1), adjoint=adjoint)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_recomputing_blocks_changes_no_bit_of_the_meta_gradient():
    model = tiny_model("llama")
    episode = draw_episode(2)
    grads = []
    for recompute in (True, False):
        loss, params = mamlfast.causal_lm(model, recompute=recompute)
        grads.append(mamlfast.meta_grad(loss, params, episode, inner=SGD(lr=0.1)).grads)
    assert all(torch.equal(grads[0][name], g) for name, g in grads[1].items())


@pytest.mark.parametrize("adjoint", [Replay(), Unrolled(), FirstOrder()])
def test_an_inner_step_that_is_not_finite_is_named(adjoint):
    def loss(params, batch):
        return (params["x"] * batch).sum()

    nan = torch.tensor(float("nan"))
    episode = Episode(support=[torch.ones(()), nan], query=torch.ones(()))
    with pytest.raises(ValueError, match="inner step 1.*finite loss.*nan"):
        mamlfast.meta_grad(loss, {"x": torch.ones(2)}, episode, inner=SGD(lr=0.1), adjoint=adjoint)

    def cliff(params, batch):
        return params["y"].sum() + (params["x"] - 1).sqrt().sum()  # an infinite slope at a finite value

    start = {"y": torch.ones(2), "x": torch.ones(2)}
    episode = Episode(support=[0], query=0)
    with pytest.raises(ValueError, match="inner step 0.*finite gradients.* x "):
        mamlfast.meta_grad(cliff, start, episode, inner=SGD(lr=0.1), adjoint=adjoint)


class CountParameters:
    """Counts live copies of the parameters by weak references to every set that an inner step makes."""

    def __init__(self, monkeypatch):
        self.alive: list = []
        self.most = 0

        def watched(params):
            after = empty_like(params)
            self.alive += [weakref.ref(p) for p in after.values()]
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            return after

        monkeypatch.setattr("mamlfast.inner.loop.empty_like", watched)


def test_replay_keeps_the_parameters_of_each_step_and_first_order_two_sets(monkeypatch):
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    call, params = mamlfast.functional(model)
    episode = Episode(support=[torch.ones(2, 3)], query=torch.ones(2, 3))
    for adjoint, sets in ((Replay(), 5), (FirstOrder(), 2)):
        count = CountParameters(monkeypatch)
        gc.collect()
        mamlfast.meta_grad(
            lambda p, x: F.mse_loss(call(p, x), 0 * x),
            params,
            episode,
            inner=SGD(lr=0.1),
            steps=5,
            adjoint=adjoint,
        )
        assert count.most == sets * len(params)
        monkeypatch.undo()
