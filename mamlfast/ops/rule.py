"""What an operation promises, and how autograd consumes the promise.

For ``y = f(xs)`` write J for the Jacobian of f at ``xs``, ``_dot`` for a tangent, ``_bar`` for a cotangent. Four
functions hold all the mathematics an operation needs up to second order::

    fwd      (xs)                                                 -> y, saved
    bwd      (xs, saved, y_bar, need)                             -> xs_bar              = J' y_bar
    fwd_jvp  (xs, xs_dot)                                         -> y, y_dot, saved       y_dot = J xs_dot
    bwd_jvp  (xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot) -> xs_bar, xs_bar_dot

``bwd_jvp`` is the tangent of ``bwd``: ``xs_bar_dot = d(J' y_bar)[xs_dot] + J' y_bar_dot``. ``saved`` is what a
forward hands to its own backward (attention: the output and the log-sum-exp, after ``fwd_jvp`` with their
tangents): a tuple of tensors, often empty. It is a function of ``xs`` and gets no cotangent of its own; the
derivatives above are total. ``need`` and ``need_dot`` hold one bool for each x: where ``need`` is False ``x_bar``
may be None, where ``need_dot`` is False ``x_bar_dot`` may be. An operation is free to ignore both.

Every mode follows from the four, because second derivatives commute:

* first order: ``fwd``, then ``bwd``.
* double backward (``create_graph=True``). With u for the cotangent of ``xs_bar``, the scalar
  ``<u, J' y_bar> = <J u, y_bar>`` has the gradient ``J u`` in ``y_bar``, the ``y_dot`` of ``fwd_jvp``, and the
  gradient ``d(J' y_bar)[u]`` in ``xs``, the ``xs_bar_dot`` of ``bwd_jvp`` at ``y_bar_dot = 0``.
* dual backward. The map ``(xs, xs_dot) -> (y, y_dot)`` has the Jacobian [[J, 0], [dJ, J]]; its transpose is
  ``bwd_jvp`` with the cotangent of ``y_dot`` as ``y_bar``, the cotangent of ``y`` as ``y_bar_dot``, and the two
  results exchanged.
* forward mode, ``torch.func`` included: ``fwd_jvp`` and ``bwd_jvp`` as they stand.

Nothing here knows any particular operation, and no operation needs to know any autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

Tensors = tuple[Tensor, ...]
MaybeTensors = tuple[Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One differentiable operation, exact to second order, with its specification.

    ``reference`` is ``(*xs, **options) -> y`` in eager PyTorch. It *is* the specification: the other four are
    tested against what autograd makes of it. Keyword options (``eps=...``) are constants of the operation and
    reach all five functions. Where ``none_tangents`` is set, ``fwd_jvp`` and ``bwd_jvp`` receive None as the
    tangent of a constant and may skip its products; elsewhere they receive zeros.
    """

    name: str
    reference: Callable[..., Tensor]
    fwd: Callable[..., tuple[Tensor, Tensors]]
    bwd: Callable[..., MaybeTensors]
    fwd_jvp: Callable[..., tuple[Tensor, Tensor, Tensors]]
    bwd_jvp: Callable[..., tuple[MaybeTensors, MaybeTensors]]
    none_tangents: bool = False

    def __call__(self, *xs: Tensor, **options) -> Tensor:
        """Apply the operation; autograd may differentiate it twice, in any mixture of modes."""
        for x in xs:
            if type(x) is not Tensor and type(x).__torch_function__ is not _disabled_torch_function_impl:
                # Torch function modes are not asked: what they look for happens inside the rule.
                return type(x).__torch_function__(self, (type(x),), xs, options)
        return _apply(_Primal, self, options, *xs)[0]

    def dual(self, xs: Tensors, xs_dot: MaybeTensors, **options) -> tuple[Tensor, Tensor]:
        """Return ``(y, y_dot)``; autograd may differentiate both, once.

        ``xs_dot[i]`` has the shape and dtype of ``xs[i]``, or is None where ``xs[i]`` is a constant.
        Backpropagating a loss tangent through this is a Hessian-vector product.
        """
        return _apply(_Dual, self, options, len(xs), *xs, *xs_dot)[:2]

    def _tangents(self, xs, xs_dot) -> MaybeTensors:
        if self.none_tangents:
            return tuple(xs_dot)
        return tuple(torch.zeros_like(x) if t is None else t for x, t in zip(xs, xs_dot, strict=True))

    def _fwd_jvp(self, options, xs, xs_dot):
        return self.fwd_jvp(xs, self._tangents(xs, xs_dot), **options)

    def _bwd_jvp(self, options, xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot):
        xs_dot = self._tangents(xs, xs_dot)
        return self.bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options)


def derived_rule(name: str, reference: Callable[..., Tensor]) -> Rule:
    """Return the rule that two nested reverse passes derive from ``reference``.

    It serves any operation that has no rule of its own: exact, at about twice the time and memory of a written
    one. Forward mode is never asked for: PyTorch has fewer forward formulas than reverse ones, and up to 2.13 not
    all can be differentiated again (``silu_backward`` has none, the reverse of ``layer_norm``'s is silently wrong).
    """

    def fwd(xs, **options):
        return reference(*xs, **options), ()

    def bwd(xs, saved, y_bar, need, **options):
        *_, xs_bar = pullback(partial(reference, **options), xs, y_bar)
        return tuple(x_bar.detach() for x_bar in xs_bar)

    def fwd_jvp(xs, xs_dot, **options):
        _, y_bar, y, xs_bar = pullback(partial(reference, **options), xs)
        (y_dot,) = _vjp(xs_bar, (y_bar,), xs_dot)  # J' is linear in y_bar, so its transpose is J
        return y.detach(), y_dot, ()

    def bwd_jvp(xs, xs_dot, saved, y_bar, y_bar_dot, need, need_dot, **options):
        xs, _, y, xs_bar = pullback(partial(reference, **options), xs, y_bar)
        # The Jacobian of xs_bar in xs is a Hessian, its own transpose; that of y is J.
        xs_bar_dot = _vjp((*xs_bar, y), xs, (*xs_dot, y_bar_dot))
        return tuple(x_bar.detach() for x_bar in xs_bar), xs_bar_dot

    pullback = partial(_pullback, name)
    return Rule(name=name, reference=reference, fwd=fwd, bwd=bwd, fwd_jvp=fwd_jvp, bwd_jvp=bwd_jvp)


def _pullback(name, f, xs, y_bar=None):
    """Return ``xs, y_bar, f(xs), J' y_bar`` on a graph of its own.

    The graph is recorded whether or not the caller records, and out of sight of the caller's saved-tensor hooks: a
    surrounding checkpoint must not take it for its own. The hook detaches because one that returns its argument
    closes a reference cycle and leaks every activation.
    """
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
        xs = tuple(x.detach().requires_grad_() for x in xs)
        y = f(*xs)
        seed = torch.ones_like(y) if y_bar is None else y_bar.detach()
        seed.requires_grad_()
        xs_bar = tuple(torch.zeros_like(x) for x in xs)
        if y.requires_grad:
            xs_bar = torch.autograd.grad(y, xs, seed, create_graph=True, materialize_grads=True)
    if any(not x_bar.requires_grad and x_bar.count_nonzero() for x_bar in xs_bar):
        raise NotImplementedError(
            f"the backward of {name} is a constant to autograd, so its second order would silently be lost; "
            f"give the operation a Rule, or use one whose backward can be differentiated"
        )
    return xs, seed, y, xs_bar


def _vjp(outputs, inputs, cotangents):
    """``torch.autograd.grad`` that takes outputs without a graph for what they are, constants."""
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not live:
        return tuple(torch.zeros_like(x) for x in inputs)
    outputs, cotangents = zip(*live, strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)


def _apply(function, *args):
    """``function.apply(*args)``; outside ``torch.func`` without inspecting its signature at every call."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


class _Primal(Function):
    """``xs -> y``. The saved tensors are outputs too, for ``torch.func`` sees nothing else."""

    @staticmethod
    def forward(rule, options, *xs):
        y, saved = rule.fwd(xs, **options)
        return _fresh(y, xs), *(s.detach() for s in saved)  # a rule may save y itself

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, ctx.options, *xs = inputs
        _, *saved = output
        ctx.n, ctx.num_saved = len(xs), len(saved)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*xs, *saved)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx, y_bar, *_):
        need = ctx.needs_input_grad[2:]
        return None, None, *_apply(_Backward, ctx.rule, ctx.options, ctx.n, need, *ctx.saved_tensors, y_bar)

    @staticmethod
    def jvp(ctx, _rule, _options, *xs_dot):
        y_dot = _apply(_Dual, ctx.rule, ctx.options, ctx.n, *ctx.saved_tensors[: ctx.n], *xs_dot)[1]
        return y_dot, *(None for _ in range(ctx.num_saved))


class _Backward(Function):
    """``(xs, y_bar) -> xs_bar``, a node of its own so that it can be differentiated in turn.

    A backward pass that returns the bare output of a kernel is a constant to autograd: under ``create_graph=True``
    its second-order terms vanish without a word. ``once_differentiable`` does not notice, for it looks at the
    incoming cotangent and never at what was saved.
    """

    @staticmethod
    def forward(rule, options, n, need, *tensors):
        xs, saved, y_bar = tensors[:n], tensors[n:-1], tensors[-1]
        return tuple(_wanted(rule.bwd(xs, saved, y_bar, need, **options), need))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, ctx.options, ctx.n, _, *tensors = inputs
        ctx.num_saved = len(tensors) - ctx.n - 1
        ctx.save_for_backward(*tensors[: ctx.n], tensors[-1])
        ctx.save_for_forward(*tensors[: ctx.n], tensors[-1])
        ctx.set_materialize_grads(False)  # the tangent of an x_bar that nobody used is None, not zeros

    @staticmethod
    def backward(ctx, *xs_bar_cot):
        *xs, y_bar = ctx.saved_tensors
        need = (ctx.needs_input_grad[4 : 4 + ctx.n], ctx.needs_input_grad[-1:])
        *xs_cot, y_bar_cot = _apply(
            _Final, ctx.rule, ctx.options, _double_backward, ctx.n, need, *xs, *xs_bar_cot, y_bar
        )
        return *(None,) * 4, *xs_cot, *(None for _ in range(ctx.num_saved)), y_bar_cot

    @staticmethod
    def jvp(ctx, _rule, _options, _n, _need, *tensors_dot):
        *xs, y_bar = ctx.saved_tensors
        xs_dot, y_bar_dot = tensors_dot[: ctx.n], tensors_dot[-1]
        if y_bar_dot is None:
            y_bar_dot = torch.zeros_like(y_bar)
        need = ((True,) * ctx.n,) * 2
        return _apply(_Final, ctx.rule, ctx.options, _backward_jvp, ctx.n, need, *xs, *xs_dot, y_bar, y_bar_dot)


class _Dual(Function):
    """``(xs, xs_dot) -> (y, y_dot)``."""

    @staticmethod
    def forward(rule, options, n, *duals):
        y, y_dot, saved = rule._fwd_jvp(options, duals[:n], duals[n:])
        return _fresh(y, duals), _fresh(y_dot, duals), *(s.detach() for s in saved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, ctx.options, ctx.n, *duals = inputs
        _, _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*duals, *saved)

    @staticmethod
    def backward(ctx, y_cot, y_dot_cot, *_):
        need = (ctx.needs_input_grad[3 : 3 + ctx.n], ctx.needs_input_grad[3 + ctx.n :])
        tensors = (*ctx.saved_tensors, y_cot, y_dot_cot)
        return None, None, None, *_apply(_Final, ctx.rule, ctx.options, _dual_backward, ctx.n, need, *tensors)


class _Final(Function):
    """``compute(...)`` on a rule, whose derivative is an error and not, silently, zero."""

    @staticmethod
    def forward(rule, options, compute, n, need, *tensors):
        return compute(rule, options, need, tensors[:n], tensors[n : 2 * n], *tensors[2 * n :])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.name} is differentiable twice and a third derivative was requested; "
            f"the reference of the rule has derivatives of every order"
        )


def _double_backward(rule, options, need, xs, xs_bar_cot, y_bar):
    need_xs, need_y_bar = need
    _, y_dot, saved = rule._fwd_jvp(options, xs, xs_bar_cot)
    nothing = (False,) * len(xs)
    _, xs_bar_dot = rule._bwd_jvp(options, xs, xs_bar_cot, saved, y_bar, torch.zeros_like(y_bar), nothing, need_xs)
    return *_wanted(xs_bar_dot, need_xs), *_wanted((y_dot,), need_y_bar)


def _backward_jvp(rule, options, need, xs, xs_dot, y_bar, y_bar_dot):
    _, _, saved = rule._fwd_jvp(options, xs, xs_dot)
    return tuple(rule._bwd_jvp(options, xs, xs_dot, saved, y_bar, y_bar_dot, *need)[1])


def _dual_backward(rule, options, need, xs, xs_dot, *saved_and_cotangents):
    *saved, y_cot, y_dot_cot = saved_and_cotangents
    need_xs, need_xs_dot = need
    xs_bar, xs_bar_dot = rule._bwd_jvp(options, xs, xs_dot, tuple(saved), y_dot_cot, y_cot, need_xs_dot, need_xs)
    return *_wanted(xs_bar_dot, need_xs), *_wanted(xs_bar, need_xs_dot)


def _wanted(values, need):
    """Drop what nobody asked for, so that an operation may ignore ``need``."""
    return (value if wanted else None for value, wanted in zip(values, need, strict=True))


def _fresh(y, xs):
    """An operation may return its input (dropout in eval mode); a ``Function`` may not."""
    return y.view_as(y) if any(y is x for x in xs) else y
