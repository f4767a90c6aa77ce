"""A tensor and its tangent, travelling together through modules that know nothing of it.

``Dual(x, x_dot)`` answers every torch function it meets, one of five ways:

* it asks for a shape, a dtype, a comparison, or leaves the graph (``detach``, ``item``): the primal answers;
* it is linear (a view, a cast, a sum): apply it to the primal and to the tangent;
* a Rule answers: the one that was called, or the one that says the same as the torch function;
* it has a short answer of its own (``cat``, ``where``, ``dropout``);
* anything else gets a Rule derived on the spot.

No path drops a tangent: what fits none of these raises. A model run on the dual parameters ``(params, v)``
therefore returns the dual loss ``(L, L_dot)`` with ``L_dot = <grad L, v>``, and since both halves are ordinary
autograd tensors ::

    H v  =  grad L_dot  =  one ordinary backward pass.

What serves first-order training (checkpoints, hooks) therefore serves the second order. Why not
``torch.autograd.forward_ad``: it computes y and y_dot in two separate calls, checkpoints keep its tangents alive,
and several of its formulas cannot be differentiated again. Under ``torch.no_grad`` the results are constants, as
they are to autograd.
"""

import logging
from collections.abc import Callable
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mamlfast.ops.rule import Rule, derived_rule
from mamlfast.ops.torch_functions import ANSWERS

_log = logging.getLogger("mamlfast")

# Names of torch functions and properties, less the underscores that operators carry.
_PRIMAL = set(
    """
    shape dtype device ndim layout requires_grad is_leaf grad_fn names is_cuda is_cpu is_meta is_mps is_xpu is_sparse
    is_quantized is_nested nbytes itemsize size dim ndimension numel nelement len stride is_contiguous storage_offset
    element_size get_device is_floating_point is_complex is_signed result_type
    eq ne lt le gt ge isnan isinf isfinite argmax argmin argsort sign bool int float index item tolist any all allclose
    equal detach data new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like
    rand_like randn_like bernoulli format str
    """.split()
)
# ``float`` is both a cast (``x.float()``) and a conversion (``float(x)``, a dunder); told apart by the underscores.
_LINEAR = set(
    """
    T mT H mH view view_as reshape reshape_as flatten unflatten ravel transpose permute swapaxes movedim moveaxis
    contiguous getitem select narrow chunk split tensor_split unbind squeeze unsqueeze expand expand_as broadcast_to
    repeat tile repeat_interleave flip roll diagonal diag tril triu unfold gather index_select take
    to type type_as double half bfloat16 clone alias neg negative positive sum mean nansum cumsum sum_to_size
    real masked_select cpu cuda
    """.split()
)
_VIEW_CASTS = {"float"}
_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ipow"}
_REFUSED = {"setitem", "numpy", "array", "dlpack", "data_ptr", "storage", "untyped_storage", "share_memory"}
_SUM = {"add", "radd", "sub", "subtract", "rsub"}
_SCALE = {"mul", "multiply", "rmul", "div", "divide", "truediv", "true_divide"}


class Dual(Tensor):
    """The pair of a primal and its tangent; shape, dtype and device are the primal's.

    Raises ValueError where the tangent's shape or dtype is not the primal's.
    """

    primal: Tensor
    tangent: Tensor
    viewed: bool  # whether another Dual may share its memory

    @staticmethod
    def __new__(cls, primal: Tensor, tangent: Tensor) -> "Dual":
        if primal.shape != tangent.shape or primal.dtype != tangent.dtype:
            raise ValueError(
                f"a tangent must have the shape and dtype of its primal, {tuple(primal.shape)} {primal.dtype}; "
                f"got {tuple(tangent.shape)} {tangent.dtype}"
            )
        self = Tensor._make_wrapper_subclass(cls, primal.shape, dtype=primal.dtype, device=primal.device)
        self.primal, self.tangent, self.viewed = primal, tangent, primal.is_leaf and primal.requires_grad
        return self

    def __repr__(self) -> str:
        return f"Dual({self.primal!r}, {self.tangent!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not args and isinstance(kwargs.get("input"), Tensor):
            args, kwargs = (kwargs["input"],), {key: x for key, x in kwargs.items() if key != "input"}
        if not torch.is_grad_enabled():
            return _without_grad(func, args, kwargs)
        if isinstance(func, Rule):
            return _apply(func, args, kwargs)
        return _handler(func)(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} met a Dual below the level of torch functions")


@cache
def _handler(func) -> Callable:
    """Return how a torch function is answered: ``(func, args, kwargs) -> result``."""
    raw = func.__self__.__name__ if func.__name__ in ("__get__", "__set__") else func.__name__
    dunder = raw.startswith("__")
    name = raw.strip("_")
    if func.__name__ == "__set__" or name in _REFUSED:
        return _refuse
    if raw == "requires_grad_":
        return _requires_grad
    if (raw.endswith("_") and not dunder) or (dunder and name in _AUGMENTED):
        return _in_place
    if name in OWN_ANSWERS:
        return OWN_ANSWERS[name]
    if name in _VIEW_CASTS and not dunder:
        return _linear
    for names, handler in ((_PRIMAL, _primal), (_LINEAR, _linear), (_SUM, _sum), (_SCALE, _scale)):
        if name in names:
            return handler
    return _answered if name in ANSWERS else _derived


def _without_grad(func, args, kwargs):
    """Under ``torch.no_grad`` results are constants; inside a foreign ``Function`` a tangent would be lost.

    Only the latter switches forward gradients off too.
    """
    if not torch._C._is_fwd_grad_enabled():
        raise NotImplementedError(
            "a custom torch.autograd.Function met a Dual, and what its backward knows of the second order cannot be "
            "seen from outside; give it a Rule (mamlfast.ops.derived_rule makes one of any eager function)"
        )
    return func(*_primals(args), **_primals(kwargs))


def _refuse(func, args, kwargs):
    raise NotImplementedError(
        f"{func.__name__} of a Dual would lose the tangent or leave a view of it behind; use a pure PyTorch function"
    )


def _requires_grad(func, args, kwargs):
    """Models ask it of their embeddings; the tangent does what the primal does."""
    func(args[0].primal, *args[1:], **kwargs)
    return args[0]


def _in_place(func, args, kwargs):
    """The pure form, its result put into the Dual itself; views of it would not follow, so there must be none."""
    x, *rest = args
    name = func.__name__
    pure = getattr(Tensor, f"__{name[3:]}" if name.startswith("__i") else name[:-1], None)
    if not isinstance(x, Dual) or x.viewed or pure is None:
        return _refuse(func, args, kwargs)
    y = pure(x, *rest, **kwargs)
    if y.shape != x.shape or y.dtype != x.dtype:
        return _refuse(func, args, kwargs)
    x.primal, x.tangent = y.primal, y.tangent
    return x


def _primal(func, args, kwargs):
    return func(*_primals(args), **_primals(kwargs))


def _linear(func, args, kwargs):
    """Linear in the first argument; a Dual elsewhere lends its shape or dtype."""
    y = func(*_primals(args), **_primals(kwargs))
    if not isinstance(args[0], Dual):
        return y
    y_dot = func(*_tangents(args), **_tangents(kwargs))
    if isinstance(y, Tensor):
        return _view_of(args[0], y, y_dot)
    return tree_map(lambda p, t: _view_of(args[0], p, t) if isinstance(p, Tensor) else p, y, y_dot)


def _view_of(x, p, t):
    if not p.is_floating_point():
        return p
    y = Dual(p, t)
    if p is x.primal or p._is_view():
        x.viewed = y.viewed = True
    return y


def _sum(func, args, kwargs):
    """``a + b`` or ``a - b``: linear in the pair; a constant term leaves the other tangent as it is, broadcast."""
    if len(args) != 2:
        return _derived(func, args, kwargs)
    a, b = args
    if isinstance(a, Dual) and isinstance(b, Dual):
        return _linear(func, args, kwargs)
    y = func(*_primals(args), **_primals(kwargs))
    name = func.__name__.strip("_")
    if not kwargs and (name in ("add", "radd") or (name != "rsub" and isinstance(a, Dual))):
        return Dual(y, _like(a.tangent if isinstance(a, Dual) else b.tangent, y))
    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    a_dot, b_dot = (x.tangent if isinstance(x, Dual) else zero for x in (a, b))
    return Dual(y, _like(func(a_dot, b_dot, **kwargs), y))


def _like(t, y):
    t = t if t.dtype == y.dtype else t.to(y.dtype)
    return t if t.shape == y.shape else t.expand(y.shape)


def _scale(func, args, kwargs):
    """A product with, or a quotient by, a constant; the rest is a Rule's or derived."""
    if len(args) != 2 or kwargs:
        return _derived(func, args, kwargs)
    a, b = args
    both, divides = isinstance(a, Dual) and isinstance(b, Dual), "div" in func.__name__
    if both or (divides and not isinstance(a, Dual)):
        return _answered(func, args, kwargs)
    return Dual(func(*_primals(args)), func(*_tangents(args)))


def _answered(func, args, kwargs):
    if kwargs.get("inplace"):
        return _in_place_option(func, args, kwargs)
    answer = ANSWERS.get(func.__name__.strip("_"))
    if answer is not None and (not kwargs or _takes(answer, frozenset(kwargs))):
        y = answer(*args, **kwargs)
        if y is not NotImplemented:
            return y
    return _derived(func, args, kwargs)


@cache
def _takes(answer, names):
    """Whether an answer knows all these keywords; torch functions and their nn.functional namesakes differ."""
    return names <= signature(answer).parameters.keys()


def _apply(rule, xs, options):
    """A plain tensor among the operands is a constant."""
    primals = tuple(x.primal if isinstance(x, Dual) else x for x in xs)
    tangents = tuple(x.tangent if isinstance(x, Dual) else None for x in xs)
    return Dual(*rule.dual(primals, tangents, **options))


def _primals(tree):
    return _halves(tree, "primal")


def _tangents(tree):
    return _halves(tree, "tangent")


def _halves(tree, half):
    """Replace each Dual by one half of it, in arguments as torch functions take them: this runs at every call."""
    if isinstance(tree, Dual):
        return getattr(tree, half)
    if type(tree) in (tuple, list):
        return type(tree)([_halves(x, half) for x in tree])
    if type(tree) is dict:
        return {key: _halves(x, half) for key, x in tree.items()}
    return tree


def _join(func, args, kwargs):
    """``cat`` and ``stack``: a plain tensor in the list has the tangent zero."""
    tensors, *rest = args
    y = func(_primals(tensors), *rest, **kwargs)
    tangents = [t.tangent if isinstance(t, Dual) else torch.zeros_like(t) for t in tensors]
    return Dual(y, func([t.to(y.dtype) for t in tangents], *rest, **kwargs))


def _where(func, args, kwargs):
    if func is not torch.where or len(args) != 3 or isinstance(args[0], Dual):
        return _derived(func, args, kwargs)
    y = func(*_primals(args))
    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    branches = (x.tangent.to(y.dtype) if isinstance(x, Dual) else zero for x in args[1:])
    return Dual(y, _like(torch.where(args[0], *branches), y))


def _masked_fill(func, args, kwargs):
    x, mask, value = args if len(args) == 3 else (*args, kwargs["value"])
    if isinstance(mask, Dual) or isinstance(value, Dual) or not isinstance(x, Dual):
        return _derived(func, args, kwargs)
    return Dual(x.primal.masked_fill(mask, value), x.tangent.masked_fill(mask, 0))


def _pad(func, args, kwargs):
    x, pad, mode, value = _pad_arguments(*args, **kwargs)
    if mode != "constant":
        return Dual(func(x.primal, pad, mode, value), func(x.tangent, pad, mode))
    return Dual(func(x.primal, pad, mode, value), func(x.tangent, pad, mode, 0))


def _pad_arguments(input, pad, mode="constant", value=None):
    return input, pad, mode, value


def _embedding(func, args, kwargs):
    """Linear in the weight, the second argument, save for the padding row: to autograd that one is a constant."""
    ids, weight, padding_idx, max_norm = _embedding_arguments(*args, **kwargs)
    if max_norm is not None:
        raise NotImplementedError("embedding with max_norm changes its weight in place; use max_norm=None")
    y_dot = func(ids, weight.tangent, padding_idx)
    if padding_idx is not None:
        y_dot = y_dot.masked_fill((ids == padding_idx % weight.shape[0])[..., None], 0)
    return Dual(func(ids, weight.primal, padding_idx), y_dot)


def _embedding_arguments(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    if scale_grad_by_freq or sparse:
        raise NotImplementedError("embedding of a Dual needs dense gradients that are not scaled by frequency")
    return input, weight, padding_idx, max_norm


def _dropout(func, args, kwargs):
    """One mask for the primal and the tangent, drawn as dropout on the primal would draw it."""
    x, p, training, inplace = _dropout_arguments(*args, **kwargs)
    if not training or p == 0:
        return x
    mask = func(torch.ones_like(x.primal), p, True)
    return x.mul_(mask) if inplace else x * mask


def _dropout_arguments(input, p=0.5, training=True, inplace=False):
    return input, p, training, inplace


def _baddbmm(func, args, kwargs):
    """``beta input + alpha a b``; with ``beta=0`` the input is not read at all."""
    input, a, b, beta, alpha = _baddbmm_arguments(*args, **kwargs)
    product = torch.bmm(a, b)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (input if beta == 1 else input * beta)


def _baddbmm_arguments(input, batch1, batch2, *, beta=1, alpha=1):
    return input, batch1, batch2, beta, alpha


OWN_ANSWERS: dict[str, Callable] = {
    "cat": _join,
    "concat": _join,
    "concatenate": _join,
    "stack": _join,
    "where": _where,
    "masked_fill": _masked_fill,
    "pad": _pad,
    "embedding": _embedding,
    "dropout": _dropout,
    "baddbmm": _baddbmm,
}


def _in_place_option(func, args, kwargs):
    """``F.relu(x, inplace=True)`` and its like."""
    x, *rest = args
    if not isinstance(x, Dual) or x.viewed:
        return _refuse(func, args, kwargs)
    y = func(x, *rest, **(kwargs | {"inplace": False}))
    x.primal, x.tangent = y.primal, y.tangent
    return x


def _derived(func, args, kwargs):
    """Answer with the rule that autograd derives for this one call."""
    if kwargs.get("inplace"):
        return _in_place_option(func, args, kwargs)
    name: str = func.__name__
    twice: Callable = TWICE_DIFFERENTIABLE.get(func) or func
    leaves, spec = tree_flatten((args, kwargs))
    slots = [i for i, x in enumerate(leaves) if isinstance(x, Dual) or isinstance(x, Tensor) and x.requires_grad]
    duals = [leaves[i] for i in slots]
    for i in slots:
        leaves[i] = None  # ``call`` lives as long as the graph: it must not keep activations

    def call(*xs):
        filled = dict(enumerate(leaves)) | dict(zip(slots, xs, strict=True))
        args, kwargs = tree_unflatten(filled.values(), spec)
        y = twice(*args, **kwargs)
        if not (isinstance(y, Tensor) and y.is_floating_point()):
            raise NotImplementedError(
                f"{name} of a Dual needs a Rule: autograd derives one only where the result is one "
                f"differentiable tensor, and this is {_kind(y)}"
            )
        return y

    before = _random_state(duals)
    y = _apply(derived_rule(name, call), duals, {})
    if not torch.equal(before, _random_state(duals)):
        raise NotImplementedError(
            f"{name} of a Dual needs a Rule: it is random, and the derived one evaluates it a second time, "
            f"on other draws"
        )
    _report(name)
    return y


@cache
def _report(name):
    _log.debug("%s has no Rule; its second order is derived by autograd, exact but slow", name)


def _kind(y):
    return f"a {y.dtype} tensor" if isinstance(y, Tensor) else type(y).__name__


def _random_state(operands):
    device = operands[0].device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _math_attention(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


# Functions whose own backward has no backward, and the form of them that has.
TWICE_DIFFERENTIABLE: dict[Callable, Callable] = {F.scaled_dot_product_attention: _math_attention}
