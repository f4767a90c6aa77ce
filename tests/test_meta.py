"""The public face: adapt, meta_grad, MetaLearner."""

import pytest
import torch

import mamlfast
from mamlfast import SGD, Episode, MetaLearner, Replay
from mamlfast.inner import AdamW
from mamlfast.meta import optimizer_state
from tests.models import LR, double_backward, draw_batch, draw_episode, overall_error, tiny_model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_adapt_is_the_loop_of_meta_grad_and_leaves_the_start_alone():
    loss, params = mamlfast.causal_lm(tiny_model("llama"))
    before = {n: p.clone() for n, p in params.items()}
    episode = draw_episode(2)
    adapted = mamlfast.adapt(loss, params, episode.support, inner=SGD(lr=LR))
    assert equal(adapted, mamlfast.meta_grad(loss, params, episode, inner=SGD(lr=LR)).adapted)
    assert equal(params, before) and not equal(adapted, before)


def test_one_support_batch_is_reused_at_every_step():
    loss, params = mamlfast.causal_lm(tiny_model("llama"))
    batch = draw_batch(1)
    assert equal(
        mamlfast.adapt(loss, params, [batch], inner=SGD(lr=LR), steps=2),
        mamlfast.adapt(loss, params, [batch, batch], inner=SGD(lr=LR)),
    )


def test_backward_fills_the_gradients_of_the_models_own_parameters_with_the_mean_over_tasks():
    model = tiny_model("llama")
    episodes = [draw_episode(2), draw_episode(2, padded="right")]
    before, mode = weights(model), model.training
    losses = MetaLearner(model, inner=SGD(lr=LR), steps=2).backward(episodes)
    want = [double_backward(model, episode) for episode in episodes]
    got = {n: p.grad for n, p in model.named_parameters()}
    assert overall_error(got, {n: (want[0][n] + want[1][n]) / 2 for n in got}) < 1e-6
    assert losses.query.shape == (2,) and losses.support.shape == (2, 2)
    assert equal(weights(model), before) and model.training is mode


def test_backward_adds_to_gradients_that_are_there_and_sums_where_asked():
    model, episodes = tiny_model("gpt2"), [draw_episode(1), draw_episode(1)]
    learner = MetaLearner(model, inner=SGD(lr=LR), reduction="sum")
    learner.backward(episodes)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    learner.backward(episodes)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, {n: 2 * g for n, g in once.items()})


def test_a_failing_episode_leaves_weights_and_gradients_untouched():
    model = tiny_model("gpt2")
    before = weights(model)
    bad = dict(draw_batch(1), labels=torch.full((2, 9), -100))
    learner = MetaLearner(model, inner=SGD(lr=LR))
    with pytest.raises(ValueError, match="all are masked"):
        learner.backward([draw_episode(1), Episode(support=[draw_batch(1)], query=bad)])
    assert all(p.grad is None for p in model.parameters())
    assert equal(weights(model), before)


def test_the_model_runs_adapted_inside_the_block_and_as_before_after_it():
    model = tiny_model("llama").eval()
    episode, before = draw_episode(2), weights(model)
    learner = MetaLearner(model, inner=SGD(lr=LR), steps=2)
    with torch.no_grad():
        unadapted = model(**episode.query).loss
        with pytest.raises(ZeroDivisionError), learner.adapted(episode.support) as adapted:
            assert adapted is model
            assert model.lm_head.weight is model.model.embed_tokens.weight
            inside = model(**episode.query).loss
            raise ZeroDivisionError
        result = mamlfast.meta_grad(learner.loss, learner.params, episode, inner=learner.inner)
        torch.testing.assert_close(inside, result.query_loss)
        assert inside != unadapted == model(**episode.query).loss
    assert equal(weights(model), before)


def test_frozen_weights_stay_out_of_the_inner_loop_and_of_the_meta_gradient():
    model = tiny_model("gpt2", tied=False)
    for p in model.transformer.parameters():
        p.requires_grad_(False)
    episode = draw_episode(1)
    MetaLearner(model, inner=SGD(lr=LR)).backward([episode])
    loss, params = mamlfast.causal_lm(model)
    assert set(params) == {"lm_head.weight"}
    want = mamlfast.meta_grad(loss, params, episode, inner=SGD(lr=LR), adjoint=mamlfast.Unrolled()).grads
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert overall_error(got, want) < 1e-6


def test_an_outer_optimizer_that_follows_the_meta_gradient_lowers_the_adapted_loss():
    model = tiny_model("llama")
    episodes = [draw_episode(2)]
    learner = MetaLearner(model, inner=SGD(lr=LR), steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        seen.append(float(learner.backward(episodes).query.mean()))
        optimizer.step()
    assert seen == sorted(seen, reverse=True) and seen[-1] < seen[0] - 0.05


def test_backward_gives_learned_rates_their_gradient_through_what_computed_them():
    model, episodes = tiny_model("gpt2"), [draw_episode(2), draw_episode(2, padded="right")]
    log_lr = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(0.05, dtype=torch.float64)
    learner = MetaLearner(model, inner=SGD(lr=[log_lr.exp(), fixed]))
    learner.backward(episodes)
    results = [mamlfast.meta_grad(learner.loss, learner.params, e, inner=learner.inner) for e in episodes]
    want = sum(r.lr_grads[0] for r in results) / 2 * log_lr.detach().exp()
    torch.testing.assert_close(log_lr.grad, want)
    assert want != 0 and fixed.grad is None


def test_the_inner_loop_starts_from_the_moments_of_the_outer_optimizer_and_leaves_them_alone():
    model, episodes = tiny_model("gpt2"), [draw_episode(2)]
    outer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inner = AdamW(lr=1e-3, eps=1e-4)
    learner = MetaLearner(model, inner=inner, state=lambda: optimizer_state(outer, model))
    fresh = mamlfast.meta_grad(learner.loss, learner.params, episodes[0], inner=inner)
    assert torch.equal(learner.backward(episodes).query[0], fresh.query_loss)  # nothing to share yet
    outer.step()
    moments = {n: {k: x.clone() for k, x in slots.items()} for n, slots in learner._state().items()}
    outer.zero_grad()
    shared = learner.backward(episodes)
    want = mamlfast.meta_grad(
        learner.loss, learner.params, episodes[0], inner=inner, state=moments, adjoint=mamlfast.Unrolled()
    )
    assert overall_error({n: p.grad for n, p in model.named_parameters()}, want.grads) < 1e-6
    fresh = mamlfast.meta_grad(learner.loss, learner.params, episodes[0], inner=inner)
    assert abs(shared.query[0] - fresh.query_loss) > 1e-5
    assert all(equal(slots, moments[name]) for name, slots in learner._state().items())
    with learner.adapted(episodes[0].support):
        assert overall_error(weights(model), want.adapted) < 1e-12


def test_a_learned_rate_without_an_exact_adjoint_raises_and_leaves_every_gradient_alone():
    model, lr = tiny_model("gpt2"), torch.tensor(LR, requires_grad=True)
    with pytest.raises(ValueError, match="Replay or Unrolled"):
        MetaLearner(model, inner=SGD(lr=lr), adjoint=mamlfast.FirstOrder()).backward([draw_episode(1)])
    assert lr.grad is None and all(p.grad is None for p in model.parameters())


def test_learned_initial_moments_get_their_gradient():
    model = tiny_model("gpt2")
    loss, params = mamlfast.causal_lm(model)
    state = {n: {"momentum_buffer": torch.full_like(p, 0.01).requires_grad_()} for n, p in params.items()}
    MetaLearner(model, inner=SGD(lr=LR, momentum=0.9), state=state).backward([draw_episode(2)])
    want = mamlfast.meta_grad(
        loss, params, draw_episode(2), inner=SGD(lr=LR, momentum=0.9), state=state, adjoint=mamlfast.Unrolled()
    ).state_grads
    got = {n: slots["momentum_buffer"].grad for n, slots in state.items()}
    assert overall_error(got, {n: slots["momentum_buffer"] for n, slots in want.items()}) < 1e-6


BATCH = {"input_ids": torch.ones(2, 4, dtype=torch.long)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Episode(support=[], query=BATCH), ValueError, "at least one batch"),
        (lambda: Episode(support=[BATCH], query=None), ValueError, "query must be"),
        (lambda: Episode(support=[BATCH], query={}), ValueError, "query must be"),
        (lambda: Episode(support=BATCH, query=BATCH), TypeError, r"support=\[batch\]"),
        (lambda: SGD(lr=-1.0), ValueError, "not negative"),
        (lambda: SGD(lr=float("nan")), ValueError, "finite"),
        (lambda: SGD(lr="fast"), TypeError, "number"),
        (
            lambda: MetaLearner(tiny_model("gpt2"), inner=SGD(lr=0.1), reduction="max"),
            ValueError,
            "reduction",
        ),
        (lambda: MetaLearner(torch.nn.Linear(2, 2), inner=SGD(lr=0.1)), TypeError, "Hugging Face"),
        (
            lambda: MetaLearner(tiny_model("gpt2"), inner=SGD(lr=0.1)).backward([]),
            ValueError,
            "at least one Episode",
        ),
        (
            lambda: mamlfast.meta_grad(None, {"x": torch.ones(1)}, BATCH, inner=SGD(lr=1.0)),
            TypeError,
            "Episode",
        ),
        (lambda: mamlfast.adapt(None, {}, [BATCH], inner=SGD(lr=1.0)), TypeError, "at least one entry"),
        (
            lambda: mamlfast.adapt(None, {"x": torch.ones(1).long()}, [BATCH], inner=SGD(lr=1.0)),
            TypeError,
            "floating-point",
        ),
        (
            lambda: mamlfast.adapt(None, {"x": torch.ones(1)}, [BATCH, BATCH], inner=SGD(lr=1.0), steps=3),
            ValueError,
            "each of the 3 inner steps.*got 2",
        ),
        (
            lambda: mamlfast.adapt(None, {"x": torch.ones(1)}, [BATCH], inner=SGD(lr=1.0), steps=-1),
            ValueError,
            "-1",
        ),
    ],
)
def test_wrong_arguments_are_answered_with_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_replay_is_the_default():
    assert isinstance(MetaLearner(tiny_model("gpt2"), inner=SGD(lr=0.1)).adjoint, Replay)
