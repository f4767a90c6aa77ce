"""What stands in for the forward of a module of Hugging Face's decoders: the same function, said in Rules.

Each function takes the module first and reads its weights and submodules when it is called, so that swapped weights,
adapters and hooks are seen. A submodule is called as a module (its hooks run, a wrapper around it works) or, where
only its function is wanted, passed over; that is done only if nothing would be missed (``is_plain``).
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.loss.loss_utils import ForCausalLMLoss

from mamlfast.ops import elementwise, gated
from mamlfast.ops.linear_cross_entropy import linear_cross_entropy
from mamlfast.ops.rms_norm import rms_norm
from mamlfast.ops.rotary import rotary
from mamlfast.ops.rule import Rule
from mamlfast.ops.torch_functions import ANSWERS


class Forward:
    """The value of ``module.forward`` while the module is fused: ``function(module, ...)``.

    It holds its module weakly (a cycle would keep a deleted model until the next garbage collection), and copies and
    pickles with it. ``inspect.signature`` shows that of the module's own forward, which ``generate`` and ``Trainer``
    look at.
    """

    def __init__(self, function: Callable, module: nn.Module):
        self.function, self._module = function, weakref.ref(module)

    @property
    def __func__(self) -> Callable:
        """Under the name that a bound method has for it: equal in modules that are fused alike."""
        return self.function

    @property
    def module(self) -> nn.Module:
        """The module that this is the forward of."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module is gone, and this was its forward: keep the module itself")
        return module

    @property
    def __wrapped__(self) -> Callable:
        return own_forward(self.module)

    def __call__(self, *args, **kwargs):
        return self.function(self.module, *args, **kwargs)

    def __reduce__(self):
        return Forward, (self.function, self.module)


def own_forward(module: nn.Module) -> Callable:
    """The forward that the module has from its class."""
    return type(module).forward.__get__(module)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module does what its class's forward (or ours) does, and nothing else."""
    own = module.__dict__
    return isinstance(own.get("forward"), Forward | None) and not any(own[hooks] for hooks in _HOOKS)


# Activations by class, each a function of its input alone. FastGELUActivation has a shorter constant: 1e-11 off.
_ACTIVATIONS: dict[type[nn.Module], Rule] = {
    nn.SiLU: elementwise.silu,
    nn.ReLU: elementwise.relu,
    nn.Tanh: elementwise.tanh,
    nn.Sigmoid: elementwise.sigmoid,
    activations.SiLUActivation: elementwise.silu,
    activations.GELUActivation: elementwise.gelu,
    activations.GELUTanh: elementwise.gelu_tanh,
    activations.NewGELUActivation: elementwise.gelu_tanh,
}


def activation_rule(module: nn.Module) -> Rule | None:
    """The Rule of an activation, None for another module or one that works in place."""
    if type(module) is nn.GELU:
        return elementwise.gelu if module.approximate == "none" else elementwise.gelu_tanh
    return None if getattr(module, "inplace", False) else _ACTIVATIONS.get(type(module))


def activation(module: nn.Module, input: Tensor) -> Tensor:
    """An activation as one Rule."""
    rule = activation_rule(module)
    return own_forward(module)(input) if rule is None else rule(input)


def norm_eps(module: nn.Module) -> float | None:
    """What an RMSNorm of Hugging Face's adds to the mean square; None if it does not say."""
    own = module.__dict__
    return own.get("variance_epsilon", own.get("eps"))


def rms_normalized(module: Any, x: Tensor, *, offset: float) -> Tensor:
    """RMSNorm, its weight as stored (offset 0) or stored as its distance from one (offset 1)."""
    return rms_norm(x, module.weight, eps=norm_eps(module), offset=offset)


def layer_normalized(module: nn.LayerNorm, input: Tensor) -> Tensor:
    """``nn.LayerNorm`` over one dimension, with or without weight and bias."""
    if torch.is_autocast_enabled(input.device.type):
        return own_forward(module)(input)  # autocast has its own idea of the result's dtype
    return ANSWERS["layer_norm"](input, module.normalized_shape, module.weight, module.bias, module.eps)


def torch_rms_normalized(module: nn.RMSNorm, x: Tensor) -> Tensor:
    """``nn.RMSNorm`` over one dimension in the dtypes in which the Rule rounds as it does."""
    if torch.is_autocast_enabled(x.device.type):
        return own_forward(module)(x)
    y = ANSWERS["rms_norm"](x, module.normalized_shape, module.weight, module.eps)
    return own_forward(module)(x) if y is NotImplemented else y


_GATED = {"silu": gated.swiglu, "gelu": gated.geglu, "gelu_tanh": gated.geglu_tanh, "relu": gated.reglu}


def gated_rule(act: nn.Module) -> Rule | None:
    """The Rule of ``act(a) * b``, None where there is none or a hook on ``act`` would be missed."""
    rule = activation_rule(act) if is_plain(act) else None
    return None if rule is None else _GATED.get(rule.name)


def _gated(act, a, b):
    rule = gated_rule(act)
    return act(a) * b if rule is None or a.dtype != b.dtype else rule(a, b)


def gated_mlp(module: Any, x: Tensor) -> Tensor:
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, the gate one Rule."""
    return module.down_proj(_gated(module.act_fn, module.gate_proj(x), module.up_proj(x)))


def fused_gated_mlp(module: Any, hidden_states: Tensor) -> Tensor:
    """The same with one projection for gate and up, as in Phi-3."""
    a, b = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return module.down_proj(_gated(module.activation_fn, a, b))


ROTARY = "apply_rotary_pos_emb"


def rotated_attention(module: nn.Module, *args, **kwargs) -> Any:
    """An attention whose forward calls ``apply_rotary_pos_emb``, with the rotations as Rules."""
    return _with_rotary(type(module).forward)(module, *args, **kwargs)


@cache
def _with_rotary(forward: FunctionType) -> FunctionType:
    """Return a copy of the function that finds ours under the name of ``apply_rotary_pos_emb``."""
    names = forward.__globals__ | {ROTARY: partial(rotate, forward.__globals__[ROTARY])}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def rotate(original: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """Rotate queries and keys [B, H, T, D]; ``original`` does it where the tables are not constants of their dtype."""
    constants = all(type(t) is Tensor and not t.requires_grad and t.ndim == 3 for t in (cos, sin))
    if not constants or unsqueeze_dim != 1 or {q.dtype, k.dtype} != {cos.dtype} or q.ndim != 4 or k.ndim != 4:
        return original(q, k, cos, sin, unsqueeze_dim)
    return rotary(q, cos, sin), rotary(k, cos, sin)


def causal_lm(module: Any, *args, **kwargs) -> Any:
    """The forward of a causal language model; where labels are given and gradients on, without logits.

    The loss is that of the head and the cross-entropy in one, ``linear_cross_entropy``, and ``logits`` is None. With
    gradients off, without labels, or where ``has_plain_head`` is false it is the model's own forward.
    """
    forward = own_forward(module)
    wanted = kwargs.get("labels") is not None and torch.is_grad_enabled() and _returns_everything(module, kwargs)
    if not wanted or why_no_plain_head(module) is not None:
        return forward(*args, **kwargs)
    with _head_left_out(module) as head:
        outputs = forward(*args, **(kwargs | {"labels": None}))
    if outputs.logits is not head.answer and softcap_of(module) is None:
        raise NotImplementedError(
            f"{type(module).__name__} of this transformers does something to its logits that is not known here; call "
            f"mamlfast.unfuse(model)"
        )
    loss = _shifted_loss(module, head.hidden, **kwargs)
    return type(outputs)(**(dict(outputs) | {"loss": loss, "logits": None}))


def _returns_everything(module, kwargs):
    structured = kwargs.get("return_dict") is not False and getattr(module.config, "return_dict", True)
    keep = kwargs.get("logits_to_keep", 0)
    return structured and isinstance(keep, int) and keep == 0


def why_no_plain_head(module: Any) -> str | None:
    """Why the head's loss cannot be computed from its weight, in words; None where it can."""
    head = module.lm_head
    if type(head) is not nn.Linear or not is_plain(head):
        return "its lm_head is not a plain nn.Linear, or has hooks"
    if head.out_features != module.config.vocab_size:
        return "its lm_head has not the configuration's vocabulary"
    return None if module.loss_function is ForCausalLMLoss else "its loss is not the causal language model's"


def softcap_of(module: Any) -> float | None:
    """The soft-cap on the logits, as Gemma's configurations have it."""
    return getattr(module.config, "final_logit_softcapping", None)


class _LeftOut(nn.Module):
    """Keeps what the head was called with, and answers with no logits at all."""

    def forward(self, hidden):
        self.hidden = hidden
        self.answer = hidden.new_empty(*hidden.shape[:-1], 0)
        return self.answer


@contextmanager
def _head_left_out(module) -> Iterator[_LeftOut]:
    head, stand_in = module._modules["lm_head"], _LeftOut()
    module._modules["lm_head"] = stand_in
    try:
        yield stand_in
    finally:
        module._modules["lm_head"] = head


def _shifted_loss(
    module, hidden, *, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
) -> Tensor:
    """transformers' ``ForCausalLMLoss``: tokens up to n predict n; the mean, or the sum over ``num_items_in_batch``."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    loss = linear_cross_entropy(
        hidden,
        module.lm_head.weight,
        module.lm_head.bias,
        target=shift_labels.to(hidden.device),
        ignore_index=ignore_index,
        normalizer=num_items_in_batch,
        softcap=softcap_of(module),
    )
    return loss.float()  # as there, also for a float64 model
