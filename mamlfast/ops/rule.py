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
* ``vmap``, of any of these: one call for each entry of the mapped dimension, the results stacked, or one call in all
  where the rule can fold that dimension into a batch dimension of its own. Exact in every room.
* inside ``torch.compile``, and wherever else PyTorch records operations instead of running them: the reference, or
  what the rule has in its place. The recorders see operations of PyTorch and do with them what they do to any; of an
  ``autograd.Function`` Dynamo drops the forward mode, and under ``torch.func`` the backward, without a word.

Nothing here knows any particular operation, and no operation needs to know any autograd.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl
from torch._C import _get_dispatch_mode as _dispatch_mode
from torch._C._dynamo import eval_frame as _frames
from torch._C._functorch import CInterpreter, peek_interpreter_stack
from torch.autograd import Function, forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
from torch.utils import _python_dispatch as _modes

from mamlfast.ops.mapping import mapped, refuse_hidden_tensors

Tensors = tuple[Tensor, ...]
MaybeTensors = tuple[Tensor | None, ...]

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # make_fx, which does not see a kernel that Triton launches


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One differentiable operation, exact to second order, with its specification.

    ``reference`` is ``(*xs, **options) -> y`` in eager PyTorch. It *is* the specification: the other four are
    tested against what autograd makes of it. Keyword options (``eps=...``) are constants of the operation and
    reach all five functions. Where ``none_tangents`` is set, ``fwd_jvp`` and ``bwd_jvp`` receive None as the
    tangent of a constant and may skip its products; elsewhere they receive zeros. ``compiled`` takes the place of
    ``reference`` inside ``torch.compile``, where that one would be too large, or wrong to second order.

    ``fold`` is for ``vmap``: ``(xs, options) -> options | None`` sees the mapped dimension in front of every operand
    and of every tensor in the options. Options say that the first two dimensions of all operands, of y and of what is
    saved can be flattened into one: a batch dimension, whose entries share nothing. None says no, and they are
    computed one after the other.
    """

    name: str
    reference: Callable[..., Tensor]
    fwd: Callable[..., tuple[Tensor, Tensors]]
    bwd: Callable[..., MaybeTensors]
    fwd_jvp: Callable[..., tuple[Tensor, Tensor, Tensors]]
    bwd_jvp: Callable[..., tuple[MaybeTensors, MaybeTensors]]
    none_tangents: bool = False
    compiled: Callable[..., Tensor] | None = None
    fold: Callable[[Tensors, dict], dict | None] | None = None

    def __call__(self, *xs: Tensor, **options) -> Tensor:
        """Apply the operation; autograd may differentiate it twice, in any mixture of modes.

        ``torch.func.vmap`` costs one call for each entry of the mapped dimension unless the rule folds it. Raises
        ValueError under ``torch.func`` if an option hides a tensor in an object that it does not look into, or if a
        mapped dimension is empty.
        """
        if is_compiling() or _modes._is_in_torch_dispatch_mode and _dispatch_mode(_PROXY):
            return (self.compiled or self.reference)(*xs, **options)
        for x in xs:
            if type(x) is not Tensor and type(x).__torch_function__ is not _disabled_torch_function_impl:
                # Torch function modes are not asked: what they look for happens inside the rule.
                return type(x).__torch_function__(self, (type(x),), xs, options)
        return _apply(_Primal, self, options, *xs)[0]

    def dual(self, xs: Tensors, xs_dot: MaybeTensors, **options) -> tuple[Tensor, Tensor]:
        """Return ``(y, y_dot)``; autograd may differentiate both, once.

        ``xs_dot[i]`` has the shape and dtype of ``xs[i]``, or is None where ``xs[i]`` is a constant.
        Backpropagating a loss tangent through this is a Hessian-vector product. Raises NotImplementedError inside
        ``torch.compile``.
        """
        if is_compiling() or _modes._is_in_torch_dispatch_mode and _dispatch_mode(_PROXY):
            raise NotImplementedError(
                f"the tangent of {self.name} was asked for while PyTorch records operations instead of running them "
                f"(torch.compile, make_fx); compile the model's own code and keep Rule.dual and Dual outside"
            )
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
    one. A tensor that ``reference`` closes over is a constant. Forward mode is never asked for: PyTorch has fewer
    forward formulas than reverse ones, and up to 2.13 not all can be differentiated again (``silu_backward`` has
    none, the reverse of ``layer_norm``'s is silently wrong). For the same reason the rule raises
    NotImplementedError where ``torch.func`` or forward mode meets it inside ``torch.compile``.
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

    def compiled(*xs, **options):
        if transforms_active():
            raise NotImplementedError(
                f"{name} has a derived rule, and torch.func or forward mode met it inside torch.compile: it would "
                f"have PyTorch's own derivatives, of which some are wrong; keep it outside the compiled region"
            )
        return reference(*xs, **options)

    pullback = partial(_pullback, name)
    return Rule(name=name, reference=reference, fwd=fwd, bwd=bwd, fwd_jvp=fwd_jvp, bwd_jvp=bwd_jvp, compiled=compiled)


def _pullback(name, f, xs, y_bar=None):
    """Return ``xs, y_bar, f(xs), J' y_bar`` on a graph of its own.

    The graph is recorded whether or not the caller records, and out of sight of the caller's saved-tensor hooks: a
    surrounding checkpoint must not take it for its own. The hook detaches because one that returns its argument
    closes a reference cycle and leaks every activation. ``torch.func`` forbids hooks, and then there are none.
    """
    allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t.detach(), lambda t: t) if allowed else nullcontext():
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


def is_constant(x: Tensor) -> bool:
    """Whether no derivative is asked of ``x``: what an option has to be, which gets none."""
    return not x.requires_grad and forward_ad.unpack_dual(x).tangent is None


def transforms_active() -> bool:
    """Whether ``torch.func`` or forward mode is at work; put so that Dynamo can answer while it traces."""
    return isinstance(peek_interpreter_stack(), CInterpreter) or forward_ad._current_level >= 0


def _apply(function, *args):
    """``function.apply(*args)``, at the least cost.

    Outside ``torch.func`` without inspecting its signature at every call; where nothing can be differentiated, in a
    first-order backward above all, without recording anything.
    """
    if torch._C._are_functorch_transforms_active():
        rule, options, *_ = args
        refuse_hidden_tensors(rule.name, options)
        return function.apply(*args)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return function.forward(*args)
    return function.record(*args)


def _hide_from_dynamo(function):
    """Run ``function`` and what it calls as they are, where Dynamo meets them after a graph break."""
    code, skip = getattr(function, "__func__", function).__code__, _frames._FrameAction.SKIP
    _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(skip, skip))


class _RuleFunction(Function):
    """What the four below have in common: a cheap ``apply``, and how they are mapped."""

    constants: int  # how many arguments precede the tensors; an int among them is the number of operands

    def __init_subclass__(cls):
        cls.record = super(Function, cls).apply  # pyright: ignore[reportAttributeAccessIssue]
        for entrance in filter(None, (vars(cls).get(name) for name in ("forward", "backward", "jvp"))):
            _hide_from_dynamo(entrance)

    @classmethod
    def vmap(cls, info, in_dims, *args):
        """``in_dims`` has the structure of ``args``, of which the first are constants."""
        return mapped(partial(_apply, cls), info.batch_size, cls.constants, in_dims, args)


for _entrance in (_apply, _RuleFunction.vmap):
    _hide_from_dynamo(_entrance)


class _Primal(_RuleFunction):
    """``xs -> y``. The saved tensors are outputs too, for ``torch.func`` sees nothing else."""

    constants = 2

    @staticmethod
    def forward(rule, options, *xs):
        y, saved = rule.fwd(xs, **options)
        y = _fresh(y, xs)
        return (y, *[s.detach() for s in saved]) if saved else (y,)  # a rule may save y itself

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, ctx.options, *xs = inputs
        saved = output[1:]
        ctx.n, ctx.num_saved = len(xs), len(saved)
        if saved:
            ctx.mark_non_differentiable(*saved)
            ctx.set_materialize_grads(False)  # no zeros for the cotangents that they do not have
        ctx.save_for_backward(*xs, *saved)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx, y_bar, *_):
        if y_bar is None:
            return (None,) * len(ctx.needs_input_grad)
        need = ctx.needs_input_grad[2:]
        return None, None, *_apply(_Backward, ctx.rule, ctx.options, ctx.n, need, *ctx.saved_tensors, y_bar)

    @staticmethod
    def jvp(ctx, _rule, _options, *xs_dot):
        y_dot = _apply(_Dual, ctx.rule, ctx.options, ctx.n, *ctx.saved_tensors[: ctx.n], *xs_dot)[1]
        return y_dot, *(None for _ in range(ctx.num_saved))


class _Backward(_RuleFunction):
    """``(xs, y_bar) -> xs_bar``, a node of its own so that it can be differentiated in turn.

    A backward pass that returns the bare output of a kernel is a constant to autograd: under ``create_graph=True``
    its second-order terms vanish without a word. ``once_differentiable`` does not notice, for it looks at the
    incoming cotangent and never at what was saved.
    """

    constants = 4

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


class _Dual(_RuleFunction):
    """``(xs, xs_dot) -> (y, y_dot)``."""

    constants = 3

    @staticmethod
    def forward(rule, options, n, *duals):
        y, y_dot, saved = rule._fwd_jvp(options, duals[:n], duals[n:])
        y, y_dot = _fresh(y, duals), _fresh(y_dot, duals)
        return (y, y_dot, *[s.detach() for s in saved]) if saved else (y, y_dot)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, ctx.options, ctx.n = inputs[:3]
        saved = output[2:]
        if saved:
            ctx.mark_non_differentiable(*saved)
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[3:], *saved)

    @staticmethod
    def backward(ctx, y_cot, y_dot_cot, *_):
        if y_cot is None and y_dot_cot is None:
            return (None,) * len(ctx.needs_input_grad)
        y_cot = torch.zeros_like(y_dot_cot) if y_cot is None else y_cot
        y_dot_cot = torch.zeros_like(y_cot) if y_dot_cot is None else y_dot_cot
        need = (ctx.needs_input_grad[3 : 3 + ctx.n], ctx.needs_input_grad[3 + ctx.n :])
        tensors = (*ctx.saved_tensors, y_cot, y_dot_cot)
        return None, None, None, *_apply(_Final, ctx.rule, ctx.options, _dual_backward, ctx.n, need, *tensors)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(
            f"forward mode over forward mode of {ctx.rule.name} was requested; "
            f"use reverse mode for one of the two derivatives, as in torch.func.hessian"
        )


class _Final(_RuleFunction):
    """``compute(...)`` on a rule, whose derivative is an error and not, silently, zero."""

    constants = 5

    @staticmethod
    def forward(rule, options, compute, n, need, *tensors):
        return compute(rule, options, need, tensors[:n], tensors[n : 2 * n], *tensors[2 * n :])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx, *_):
        _Final._refuse(ctx)

    @staticmethod
    def jvp(ctx, *_):
        _Final._refuse(ctx)

    @staticmethod
    def _refuse(ctx):
        raise NotImplementedError(
            f"{ctx.name} is differentiable twice and a third derivative was requested; "
            f"the reference of the rule has derivatives of every order (a backward pass inside "
            f"torch.autograd.forward_ad.dual_level has a tangent of its own: leave the level first)"
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
    for x in xs:
        if y is x:
            return y.view_as(y)
    return y
