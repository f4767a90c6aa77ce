"""Gradients and Hessian-vector products of ``loss(params, batch)``, handed over as they are computed.

A sweep evaluates the loss once, forward and backward. Without a direction it yields the gradient g; with a direction
v the parameters are duals ``(params, v)``, the loss comes out as ``(L, <g, v>)``, and the backward of the second half
yields ``H v``. Either way each parameter's result reaches ``consume`` the moment it is complete, so that a caller who
uses it at once (an inner update, ``v <- v - lr H v``) holds no second copy of the parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mamlfast.dual import Dual
from mamlfast.ops.torch_functions import sdpa
from mamlfast.tree import Params, check_like

Loss = Callable[[Params, Any], Tensor]
Consume = Callable[[str, Tensor], object]


def sweep(loss: Loss, params: Params, batch: Any, consume: Consume, v: Params | None = None) -> Tensor:
    """Call ``consume(name, g)``, or with a direction ``consume(name, H v)``, for each parameter; return the loss.

    A parameter that the loss does not depend on is not consumed. ``consume`` owns the tensor it is given and may
    change it in place. Cost in units of a linear layer's product: 3, with ``v`` 8; a recomputing loss 4 and 11.
    Raises ValueError where the loss is no scalar, or does not depend on the parameters.
    """
    if v is not None:
        _refuse_autocast(params)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    handles = [
        leaf.register_post_accumulate_grad_hook(partial(_deliver, consume, name)) for name, leaf in leaves.items()
    ]
    try:
        # A mode is asked at every torch function: a loss that needs none says so.
        safe = getattr(loss, "repeats_draws", False)
        with torch.enable_grad(), nullcontext() if safe else deterministic_attention_dropout():
            value = _check(loss(leaves if v is None else _duals(leaves, v), batch), v is not None)
            slope = value.tangent if isinstance(value, Dual) else value
            if slope.requires_grad:
                torch.autograd.backward(slope, inputs=list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()
    return (value.primal if isinstance(value, Dual) else value).detach()


def value_and_grad(loss: Loss, params: Params, batch: Any) -> tuple[Tensor, Params]:
    """Return the loss and its gradient; zeros for a parameter that the loss does not depend on."""
    grads = {name: torch.zeros_like(p) for name, p in params.items()}
    value = sweep(loss, params, batch, lambda name, g: grads[name].copy_(g))
    return value, grads


def hvp(loss: Loss, params: Params, v: Params, batch: Any) -> Params:
    """Return ``H v`` for the Hessian H of ``loss(params, batch)`` in ``params``: the gradient of ``<grad loss, v>``.

    ``loss(params, batch)`` is a scalar computed from ``params`` by PyTorch functions; ``v`` has the names, shapes and
    dtypes of ``params``, and so has the result. Exact: forward over reverse, no finite differences (Pearlmutter,
    1994, doi:10.1162/neco.1994.6.1.147). Memory is that of one gradient with every activation doubled; 8 products a
    linear layer instead of the gradient's 3. Raises ValueError where ``v`` does not match ``params`` or the loss is no
    scalar, NotImplementedError where an operation has no exact second order.
    """
    check_like(params, v, "v")
    products = {name: torch.zeros_like(p) for name, p in params.items()}
    sweep(loss, params, batch, lambda name, hv: products[name].copy_(hv), v)
    return products


def _refuse_autocast(params):
    kinds = {p.device.type for p in params.values()}
    if any(torch.is_autocast_enabled(kind) for kind in kinds):
        raise NotImplementedError(
            "second-order passes do not run under autocast: leave it, and load the model in the dtype to compute in"
        )


def _duals(leaves, v) -> Params:
    return {name: Dual(leaf, v[name].detach()) for name, leaf in leaves.items()}


def _deliver(consume, name, leaf):
    grad, leaf.grad = leaf.grad, None
    consume(name, grad)


def _check(value, dual):
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(params, batch) must return a scalar tensor; got {kind}")
    if dual and not isinstance(value, Dual) or not dual and not value.requires_grad:
        raise ValueError(
            "the loss does not depend on params: compute it from the tensors it is given, by PyTorch functions, "
            "without detach() or no_grad()"
        )
    return value


class _DropoutInAttention(TorchFunctionMode):
    """Answers attention with dropout alike in every sweep; fused kernels draw masks nobody else can repeat."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _dropout_p(*args, **kwargs) > 0:
            answer = sdpa(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        return func(*args, **kwargs)


def _dropout_p(query, key, value, attn_mask=None, dropout_p=0.0, *_, **__):
    return dropout_p


@contextmanager
def deterministic_attention_dropout() -> Iterator[None]:
    """Inside the block the attention dropout of two evaluations on one random state is the same."""
    with _DropoutInAttention():
        yield
