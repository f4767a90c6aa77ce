"""The meta-gradient of every supported model class, against plain double backward."""

import pytest
import torch

import mamlfast
from tests.models import (
    CONFIGS,
    LR,
    double_backward,
    draw_episode,
    float64_throughout,
    overall_error,
    relative_error,
    tiny_model,
)

# Two float64 summation orders differ by about 1e-13 here; dropping the second-order term costs more than 0.05.
FLOAT64 = 1e-10
# The classes' own casts to float32: two orders of summation differ by a few 1e-7 of the whole.
WITH_CASTS = 1e-6


def engine(model, episode, adjoint):
    loss, params = mamlfast.causal_lm(model)
    return mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=LR), adjoint=adjoint).grads


@pytest.mark.parametrize("padded", ["", "both"], ids=["unpadded", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_replay_is_double_backward_to_float64_rounding_and_first_order_is_not(name, steps, tied, padded):
    model, episode = tiny_model(name, tied=tied), draw_episode(steps, padded=padded)
    with float64_throughout():
        want = double_backward(model, episode)
        assert relative_error(engine(model, episode, mamlfast.Replay()), want) < FLOAT64
        assert relative_error(engine(model, episode, mamlfast.Unrolled()), want) < FLOAT64
        assert relative_error(engine(model, episode, mamlfast.FirstOrder()), want) > 0.05


@pytest.mark.parametrize("attention", ["eager", "sdpa", "mamlfast"])
@pytest.mark.parametrize("name", CONFIGS)
def test_replay_is_double_backward_on_the_models_as_they_are(name, attention):
    if name == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no logit soft-cap in sdpa")
    # A float64 model's additive mask becomes -inf in its own cast to float32: a row that sees nothing is then NaN.
    episode = draw_episode(2, padded="right")
    want = double_backward(tiny_model(name, attention="eager"), episode)
    model = tiny_model(name, attention=attention)
    assert overall_error(engine(model, episode, mamlfast.Replay()), want) < WITH_CASTS
    assert overall_error(engine(model, episode, mamlfast.Unrolled()), want) < WITH_CASTS
    assert overall_error(engine(model, episode, mamlfast.FirstOrder()), want) > 0.05


@pytest.mark.parametrize("attention", ["eager", "sdpa", "mamlfast"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_is_as_close_to_float64_as_double_backward_in_bfloat16(name, attention):
    episode = draw_episode(2, padded="right")
    want = double_backward(tiny_model(name), episode)
    model = tiny_model(name, attention=attention).bfloat16()
    errors = []
    for adjoint in (mamlfast.Unrolled(), mamlfast.Replay()):
        got = engine(model, episode, adjoint)
        assert {g.dtype for g in got.values()} == {torch.bfloat16}
        errors.append(overall_error({n: g.double() for n, g in got.items()}, want))
    assert errors[1] < 1.5 * errors[0] < 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_hessian_of_every_class_is_symmetric_and_the_slope_of_its_gradient(name):
    model, batch = tiny_model(name), draw_episode().query
    loss, params = mamlfast.causal_lm(model)
    generator = torch.Generator().manual_seed(7)
    u, v = ({n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()} for _ in range(2))
    with float64_throughout():
        hu, hv = (mamlfast.hvp(loss, params, direction, batch) for direction in (u, v))
        uhv, vhu = (sum((a[n] * b[n]).sum() for n in params) for a, b in ((u, hv), (v, hu)))
        torch.testing.assert_close(uhv, vhu, rtol=1e-10, atol=0)
        h = 1e-5
        ahead, behind = (
            mamlfast.value_and_grad(loss, {n: p + sign * h * v[n] for n, p in params.items()}, batch)[1]
            for sign in (1, -1)
        )
    slope = {n: (ahead[n] - behind[n]) / (2 * h) for n in params}
    assert relative_error(hv, slope) < 1e-5  # h^2 times a third derivative
