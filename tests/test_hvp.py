"""Gradients and Hessian-vector products of any loss, against dense Hessians and plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import mamlfast
from mamlfast.hvp import sweep


def quadratic(params, batch):
    """With A = [[2, 1], [1, 4]]: the gradient is A x, the Hessian A."""
    x = params["x"]
    return x[0] ** 2 + 2 * x[1] ** 2 + x[0] * x[1]


def test_the_hessian_of_a_quadratic_is_its_matrix():
    params = {"x": torch.tensor([3.0, -1.0])}
    value, g = mamlfast.value_and_grad(quadratic, params, None)
    assert value == 8.0
    assert torch.equal(g["x"], torch.tensor([5.0, -1.0]))
    hv = mamlfast.hvp(quadratic, params, {"x": torch.tensor([1.0, 10.0])}, None)
    assert torch.equal(hv["x"], torch.tensor([12.0, 41.0]))


class Convolutional(nn.Module):
    """What a small image classifier is made of, in-place activations and running statistics included."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 5),
            nn.GELU(),
            nn.Linear(5, 4),
        )

    def forward(self, x):
        return self.body(x)


class Perceptron(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(16, 6), nn.Softplus(), nn.Linear(6, 4))


@pytest.mark.parametrize("model", [Perceptron, Convolutional])
@pytest.mark.parametrize("by", ["functional", "torch.func"])
def test_any_module_has_the_hessian_vector_products_of_its_dense_hessian(model, by):
    model = model().double()
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6) % 4
    call, params = mamlfast.functional(model)
    if by == "torch.func":
        call = lambda params, x: functional_call(model, params, x)  # noqa: E731
    v = {n: torch.randn_like(p) for n, p in params.items()}
    hv = mamlfast.hvp(lambda params, x: F.cross_entropy(call(params, x), labels), params, v, x)
    want = _dense(model, params, x, labels) @ parameters_to_vector(v.values())
    torch.testing.assert_close(parameters_to_vector(hv.values()), want, rtol=1e-9, atol=1e-11)


def _dense(model, params, x, labels):
    """Column by column, by double backward."""
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    loss = F.cross_entropy(functional_call(model, leaves, x), labels)
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = (
        torch.autograd.grad(entry, list(leaves.values()), retain_graph=True, materialize_grads=True) for entry in flat
    )
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def test_a_parameter_without_influence_has_zeros():
    params = {"x": torch.ones(2), "unused": torch.ones(3)}
    _, g = mamlfast.value_and_grad(quadratic, params, None)
    hv = mamlfast.hvp(quadratic, params, {n: torch.ones_like(p) for n, p in params.items()}, None)
    assert torch.equal(g["unused"], torch.zeros(3)) and torch.equal(hv["unused"], torch.zeros(3))


def test_each_gradient_is_handed_over_once_and_before_earlier_layers_are_reached():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    call, params = mamlfast.functional(model)
    order = []
    sweep(lambda p, x: call(p, x).sum(), params, torch.ones(2, 3), lambda name, g: order.append(name))
    assert sorted(order) == sorted(params)
    assert [name[0] for name in order] == ["2", "2", "1", "1", "0", "0"]


def test_parameters_of_the_caller_are_left_alone():
    x = torch.tensor([3.0, -1.0], requires_grad=True)
    mamlfast.value_and_grad(quadratic, {"x": x}, None)
    assert x.grad is None and x.requires_grad


def test_autocast_is_refused_in_second_order_passes():
    params = {"x": torch.ones(2)}
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="autocast"):
        mamlfast.hvp(quadratic, params, params, None)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda params, batch: params["x"], "scalar"),
        (lambda params, batch: 3.0, "scalar"),
        (lambda params, batch: params["x"].detach().sum(), "does not depend on params"),
        (lambda params, batch: torch.ones(()), "does not depend on params"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, message):
    params = {"x": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        mamlfast.value_and_grad(loss, params, None)
    with pytest.raises(ValueError, match=message):
        mamlfast.hvp(loss, params, params, None)


@pytest.mark.parametrize(
    "v", [{}, {"x": torch.ones(3)}, {"x": torch.ones(2).double()}, {"x": torch.ones(2), "y": torch.ones(2)}]
)
def test_a_direction_unlike_the_parameters_is_refused(v):
    with pytest.raises(ValueError, match="v"):
        mamlfast.hvp(quadratic, {"x": torch.ones(2)}, v, None)


def test_dropout_in_torchs_attention_is_the_same_with_and_without_a_direction():
    def loss(params, batch):
        x = (batch @ params["w"]).view(1, 1, 6, 4)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5).square().sum()

    generator = torch.Generator().manual_seed(0)
    params, batch = {"w": torch.randn(4, 4, generator=generator)}, torch.randn(6, 4, generator=generator)
    values = []
    for v in (None, {"w": torch.ones(4, 4)}):
        torch.manual_seed(1)
        values.append(sweep(loss, params, batch, lambda name, g: None, v))
    torch.testing.assert_close(*values)
