"""Dual carries a tangent through every torch function, or refuses; it never drops one."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp

from mamlfast import Dual
from mamlfast.dual import OWN_ANSWERS
from mamlfast.ops.torch_functions import ANSWERS


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


C = next(pair(3, 4, seed=9))
IDS = torch.tensor([[0, 2], [2, 1]])
BOOL = C > 0

# What models do to a tensor x [3, 4], by the way Dual answers it.
FUNCTIONS = {
    "views": lambda x: x.T.reshape(2, 6)[:, 1:4].unsqueeze(0).expand(3, 2, 3).contiguous().flatten(),
    "chunks": lambda x: sum(x.chunk(2, dim=-1)) * x.split([1, 3], dim=-1)[0],
    "unbind": lambda x: x.unbind(0)[1] * x[0],
    "casts": lambda x: x.float().to(torch.float64) + x.double().type_as(x),
    "sums": lambda x: x.sum(0) + x.mean() + x.cumsum(0)[1],
    "gather": lambda x: x.gather(1, IDS[:, :1].expand(2, 4) % 2) + x.index_select(0, IDS[0]),
    "plus constants": lambda x: 1 - (2 + x - C) + (C - x) + torch.add(x, C, alpha=2) + torch.sub(C, x, alpha=3),
    "plus broadcast": lambda x: x[:1] + C + (C[:1] - x),
    "add alpha": lambda x: torch.add(C, x, alpha=2) + torch.sub(x, x * 2, alpha=0.5) + torch.rsub(x, C),
    "times constants": lambda x: 2 * x * C / 3 * 0.5 + x.div(C),
    "neg": lambda x: -x + +x * 3,
    "product": lambda x: x * x + x[:1] * x,
    "quotients": lambda x: C / (x * x + 1) + x / (x * x + 2) + 1 / (x.exp() + 1),
    "matmul": lambda x: x @ x.mT @ C,
    "batched": lambda x: torch.bmm(x[None], x.mT[None]) + torch.matmul(x, x[0])[:, None],
    "linear": lambda x: F.linear(x, x, x[:, 0]) + F.linear(C, x) + F.linear(x, C),
    "addmm": lambda x: torch.addmm(x[0, :3], x, x.mT) + torch.addmm(x[:, :3], x, C.mT, beta=0.5, alpha=2),
    "baddbmm": lambda x: torch.baddbmm(C.new_empty(1, 3, 3), x[None], x.mT[None], beta=0, alpha=0.5),
    "baddbmm beta": lambda x: torch.baddbmm(x[None, :, :3], x[None], C.mT[None], beta=2),
    "baddbmm keywords": lambda x: torch.baddbmm(C.new_empty(1, 3, 3), batch1=x[None], batch2=x.mT[None], beta=0),
    "keywords": lambda x: torch.matmul(input=x, other=x.mT) @ torch.add(x, other=C, alpha=2),
    "more keywords": lambda x: torch.mul(x, other=C) + torch.softmax(input=x, dim=-1) + torch.mul(input=x, other=x),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x * C),
    "join": lambda x: torch.cat([x, C, x * x]) * torch.stack([x, C, x])[0].repeat(3, 1),
    "where": lambda x: torch.where(BOOL, x, C) + torch.where(BOOL, 0.0, x * x) + x.where(BOOL, C * x),
    "masked_fill": lambda x: x.masked_fill(BOOL, -1.0) * x,
    "pad": lambda x: F.pad(x, (1, 2), value=3.0) * F.pad(x[None], (1, 2), mode="replicate")[0],
    "embedding": lambda x: F.embedding(IDS, x) ** 2,
    "powers": lambda x: x.pow(2) + x**3 + torch.pow(x, 2.0) + x.square() + (x * x + 1).pow(-0.5),
    "roots": lambda x: (x * x + 1).rsqrt() + (x * x + 1).sqrt() + (x * x + 1).log(),
    "activations": lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.relu(x) + x.tanh(),
    "more activations": lambda x: torch.sigmoid(x) + F.softplus(x) + F.leaky_relu(x) + x.abs() + F.mish(x),
    "softmax": lambda x: x.softmax(-1) + F.softmax(x, dim=0, dtype=torch.float64) + F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (4,), x[0], x[1]) + F.layer_norm(x, (4,)),
    "layer_norm two dims": lambda x: F.layer_norm(x, (3, 4), x, x * x),
    "rms_norm": lambda x: F.rms_norm(x, (4,), x[0], 0.1) + F.rms_norm(x, (4,)),
    "attention": lambda x: F.scaled_dot_product_attention(*(x.view(1, 1, 3, 4),) * 3, is_causal=True),
    "attention mask": lambda x: F.scaled_dot_product_attention(*(x.view(1, 1, 3, 4),) * 3, attn_mask=C[:, :3] > -9),
    "attention 3d": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "cross_entropy": lambda x: F.cross_entropy(x, IDS[:, 0].repeat(2)[:3], ignore_index=2),
    "cross_entropy weighted": lambda x: F.cross_entropy(x, IDS[0].repeat(2)[:3], weight=C[0].abs()),
    "cross_entropy soft": lambda x: F.cross_entropy(x, C.softmax(-1)),
    "mse_loss": lambda x: F.mse_loss(x * x, C),
    "conv": lambda x: F.conv2d(x.view(1, 1, 3, 4), x[:2, :2].reshape(1, 1, 2, 2)),
    "max_pool": lambda x: F.max_pool2d((x * x).view(1, 1, 3, 4), 2),
    "norm": lambda x: x.norm() + x.var() + x.logsumexp(0) + x.amax(),
    "detach": lambda x: x * (x.detach() + x.data) + float(x.detach().sum()) * x,
    "steps": lambda x: torch.floor(x) * x + torch.sign(x),
    "like": lambda x: x * torch.ones_like(x) + x.new_zeros(3, 4) + torch.zeros(3, 4).to(x),
}


def in_place(x):
    y = z = x * 2
    y += x
    y.sub_(1)
    F.relu(y, inplace=True)
    return z * F.silu(x + 1, inplace=True) + F.leaky_relu(x - 1, inplace=True)


FUNCTIONS["in place"] = in_place


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_tangent_and_hessian_vector_product_are_those_of_autograd(name):
    f = FUNCTIONS[name]
    x, v = pair(3, 4)
    want, want_dot = f(x), jvp_by_double_backward(f, x, v)
    y = f(Dual(x, v))
    torch.testing.assert_close((y.primal, y.tangent), (want, want_dot), rtol=1e-11, atol=1e-12)

    def loss(x):
        return f(x).sin().sum()

    leaf = x.clone().requires_grad_()
    (hv,) = torch.autograd.grad(loss(Dual(leaf, v)).tangent, leaf)
    torch.testing.assert_close(hv, hvp_by_double_backward(loss, x, v), rtol=1e-11, atol=1e-11)


def jvp_by_double_backward(f, x, v):
    x = x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = f(x)
    y_bar = torch.zeros_like(y).requires_grad_()
    (x_bar,) = torch.autograd.grad(y, x, y_bar, create_graph=True)
    return torch.autograd.grad(x_bar, y_bar, v)[0]


def hvp_by_double_backward(loss, x, v):
    x = x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (g,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(g, x, v)[0]


def test_the_oracle_of_these_tests_agrees_with_torch_func():
    x, v = pair(3, 4)

    def loss(x):
        return (x.softmax(-1) * C).sin().sum()

    torch.testing.assert_close(hvp_by_double_backward(loss, x, v), jvp(grad(loss), (x,), (v,))[1])


REFUSED = {
    "in place with a view": lambda x: x.view(-1).add_(1),
    "in place under a view": lambda x: (x[0], x.add_(1)),
    "in place, growing": lambda x: (x * 1)[:1].clone().add_(torch.ones(3, 4)),
    "item assignment": lambda x: x.__setitem__(0, 1.0),
    "in-place activation of a view": lambda x: F.relu(x.T, inplace=True),
    "several results": lambda x: x.topk(1),
    "numpy": lambda x: x.numpy(),
    "random": lambda x: F.rrelu(-x, training=True),
    "custom function": lambda x: Cube.apply(x),
    "pointer": lambda x: x.data_ptr(),
}


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, y_bar):
        raise AssertionError("never reached")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_carry_a_tangent_is_refused(name):
    with pytest.raises(NotImplementedError):
        REFUSED[name](Dual(torch.rand(3, 4), torch.rand(3, 4)))


def test_results_under_no_grad_are_constants_as_they_are_to_autograd():
    x, v = pair(3, 4)

    def loss(x):
        with torch.no_grad():
            scale = x.norm()
        return (x**3 / scale).sum()

    leaf = x.clone().requires_grad_()
    (hv,) = torch.autograd.grad(loss(Dual(leaf, v)).tangent, leaf)
    torch.testing.assert_close(hv, hvp_by_double_backward(loss, x, v))


def test_a_padding_row_of_an_embedding_is_a_constant_as_it_is_to_autograd():
    x, v = pair(3, 4)

    def loss(x):
        return (F.embedding(IDS, x, padding_idx=2) * F.embedding(IDS, x)).sin().sum()

    leaf = x.clone().requires_grad_()
    (hv,) = torch.autograd.grad(loss(Dual(leaf, v)).tangent, leaf)
    torch.testing.assert_close(hv, hvp_by_double_backward(loss, x, v))


def test_shapes_and_comparisons_are_those_of_the_primal():
    x = Dual(torch.ones(3, 2), torch.full((3, 2), 2.0))
    assert x.shape == (3, 2) and x.size(0) == len(x) == 3 and x.dtype == torch.float32
    assert not isinstance(x > 0, Dual) and bool((x == 1).all())
    assert torch.equal(torch.zeros(2).to(x), torch.zeros(2))  # a Dual that lends its dtype lends no tangent


def test_a_tangent_has_the_shape_and_dtype_of_its_primal():
    with pytest.raises(ValueError, match="shape and dtype"):
        Dual(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="shape and dtype"):
        Dual(torch.ones(3), torch.ones(3, dtype=torch.float64))


def test_dropout_draws_one_mask_for_primal_and_tangent_and_draws_it_as_the_primal_alone():
    x = Dual(torch.rand(9, 9), torch.rand(9, 9))
    torch.manual_seed(3)
    want, after = F.dropout(x.primal, 0.3), torch.get_rng_state()
    torch.manual_seed(3)
    y = F.dropout(x, 0.3)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(y.primal, want)
    assert torch.equal(y.tangent == 0, want == 0)


def test_every_answer_is_for_a_function_that_pytorch_has():
    for name in (*ANSWERS, *OWN_ANSWERS):
        assert any(hasattr(place, name) for place in (torch, torch.Tensor, F)) or hasattr(torch.Tensor, f"__{name}__")
