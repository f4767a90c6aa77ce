"""Recomputed blocks: the same numbers, less memory, in every mode of differentiation."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamlfast import Dual, functional
from mamlfast.blocks import kept, recomputed


class Block(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.inner = shared or nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x, *, shift, dropout=0.0):
        self.runs += 1
        return F.dropout(torch.tanh(self.inner(x)), dropout) * shift + x


class Stack(nn.Module):
    def __init__(self, share=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        shared = nn.Linear(4, 4) if share else None
        self.blocks = nn.ModuleList(Block(shared) for _ in range(3))
        self.shift = nn.Parameter(torch.tensor(0.5))
        self.dropout = dropout

    def forward(self, x):
        for block in self.blocks:
            x = block(x, shift=self.shift, dropout=self.dropout)
        return x.square().sum()


def stack(**options):
    model = Stack(**options).double()
    return model, torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def directions(params):
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in params.items()}


def hvp_by_double_backward(call, params, v, x):
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    g = torch.autograd.grad(call(leaves, x), list(leaves.values()), create_graph=True)
    return torch.autograd.grad(g, list(leaves.values()), list(v.values()))


def hvp_by_duals(call, params, v, x):
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    value = call({n: Dual(p, v[n]) for n, p in leaves.items()}, x)
    return torch.autograd.grad(value.tangent, list(leaves.values()))


@pytest.mark.parametrize("share", [False, True], ids=["own weights", "one weight in every block"])
@pytest.mark.parametrize("hvp", [hvp_by_double_backward, hvp_by_duals])
def test_a_recomputed_stack_has_the_hessian_vector_products_of_a_kept_one(share, hvp):
    model, x = stack(share=share)
    call, params = functional(model)
    v = directions(params)
    with kept():
        want = hvp_by_double_backward(call, params, v, x)
        runs = [block.runs for block in model.blocks]
    torch.testing.assert_close(hvp(call, params, v, x), want, rtol=1e-12, atol=1e-13)
    assert all(block.runs - before > 1 for block, before in zip(model.blocks, runs, strict=True))


def test_recomputation_sees_the_weights_and_the_draws_of_its_own_run():
    """The backward comes after the weights were given back, and after other random draws."""
    model, x = stack(dropout=0.5)
    call, params = functional(model)
    other = {n: (p + 1).requires_grad_() for n, p in params.items()}
    torch.manual_seed(3)
    with kept():
        want = torch.autograd.grad(call(other, x), list(other.values()))
    torch.manual_seed(3)
    value = call(other, x)
    torch.rand(5)
    after = torch.get_rng_state()
    torch.testing.assert_close(torch.autograd.grad(value, list(other.values())), want)
    assert torch.equal(torch.get_rng_state(), after)


def test_only_the_input_of_a_block_outlives_its_forward():
    class Watched(Block):
        def forward(self, x, *, shift):
            hidden = torch.exp(self.inner(x))
            alive.append(weakref.ref(hidden))
            return hidden * shift

    alive: list = []
    model, x = stack()
    model.blocks = nn.ModuleList(Watched().double() for _ in range(2))
    call, params = functional(model)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}

    def forward(x):
        for block in model.blocks:
            x = block(x, shift=leaves["shift"])
        return x

    with recomputed(model.blocks):
        y = forward(x)
        gc.collect()
        assert [ref() for ref in alive] == [None, None] and y.requires_grad
    alive.clear()
    y = forward(x)
    assert all(ref() is not None for ref in alive)


def test_blocks_are_given_back_after_an_error_and_own_forward_attributes_survive():
    model, x = stack()
    own = model.blocks[0].forward
    model.blocks[0].forward = own
    with pytest.raises(ZeroDivisionError), recomputed(model.blocks):
        raise ZeroDivisionError
    assert model.blocks[0].__dict__["forward"] is own
    assert "forward" not in model.blocks[1].__dict__


def test_a_block_that_returns_two_tensors_is_refused():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    block = Two(3, 3)
    with recomputed([block]), pytest.raises(NotImplementedError, match="one tensor"):
        block(torch.ones(2, 3))


def test_a_block_may_return_its_tensor_in_a_tuple():
    class InTuple(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    block = InTuple(3, 3)
    with recomputed([block]):
        y, nothing = block(torch.ones(2, 3))
    assert nothing is None
    torch.testing.assert_close(y, nn.Linear.forward(block, torch.ones(2, 3)))
