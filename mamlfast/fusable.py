"""Which modules can be fused: what stands in for the forward of one, or why nothing does.

* By exact type: ``nn.LayerNorm``, ``nn.RMSNorm``, activations that are a function of their input alone.
* By what it computes: any class called ...RMSNorm with one weight, an eps and one input that agrees with one of the
  two forms of ``ops.rms_norm`` on random input in its dtype, in half types to the last bit.
* By its full name: the gated MLPs, rotary embeddings and losses of the classes in ``_KNOWN``, as long as their
  forward is transformers' own.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from transformers.activations import NewGELUActivation

from mamlfast import fused_modules
from mamlfast.fused_modules import Forward
from mamlfast.ops.rms_norm import rms_norm_reference
from mamlfast.ops.rotary import rotary_reference


@dataclass(frozen=True)
class Match:
    """``function(module, ...)`` stands in for the module's forward; ``name`` says what it runs on.

    ``single`` is a module that calls one torch function: a ``Dual`` answers that with the same Rule.
    """

    name: str
    function: Callable
    single: bool = False


def match(module: nn.Module) -> Match | str | None:
    """Return what stands in for a module's forward, in words why nothing does, or None where none is looked for."""
    for recognize in (_activation, _torch_norm, _rms_norm, _known):
        found = recognize(module)
        if found is not None:
            own = module.__dict__.get("forward")
            return found if own is None or isinstance(own, Forward) else "its forward is overridden"
    return "its class is not known" if _might_be_fused(module) else None


def _might_be_fused(module):
    gated = any(name.startswith("gate") for name in module._modules)
    return gated or type(module).__name__.endswith(("Norm", "ForCausalLM", "LMHeadModel", "Activation"))


def _activation(module):
    rule = fused_modules.activation_rule(module)
    single = type(module) is not NewGELUActivation
    return None if rule is None else Match(rule.name, fused_modules.activation, single)


def _torch_norm(module):
    if type(module) not in (nn.LayerNorm, nn.RMSNorm):
        return None
    if len(module.normalized_shape) != 1:
        return "it normalizes over more than one dimension"
    if type(module) is nn.LayerNorm:
        return Match("layer_norm", fused_modules.layer_normalized, single=True)
    return Match("rms_norm", fused_modules.torch_rms_normalized, single=True)


def _rms_norm(module):
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight = module._parameters.get("weight")
    bare = set(module._parameters) == {"weight"} and not module._buffers and not module._modules
    eps = fused_modules.norm_eps(module)
    inputs = len(inspect.signature(type(module).forward).parameters) - 1
    if not bare or weight is None or weight.ndim != 1 or inputs != 1 or eps is None:
        return "it has not the weight, the eps and the one input of an RMSNorm"
    settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "forward"}
    key = type(module), type(module).forward, weight.dtype, len(weight), repr(sorted(settings.items()))
    if key not in _offsets:
        _offsets[key] = _offset(module, weight, eps)
    offset = _offsets[key]
    return "on random input it differs from the RMSNorms that are known" if offset is None else _RMS_NORMS[offset]


_RMS_NORMS = {
    0.0: Match("rms_norm", partial(fused_modules.rms_normalized, offset=0.0)),
    1.0: Match("rms_norm, 1 + w", partial(fused_modules.rms_normalized, offset=1.0)),
}
_offsets: dict[tuple, float | None] = {}


@torch.no_grad()
def _offset(module, weight, eps) -> float | None:
    """Which of the two forms a copy of the module with a random weight computes; None for neither."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, len(weight), generator=generator) for shape in ((3,), ()))
    x = (x * torch.tensor([[1.0], [1e-3], [10.0]])).to(weight.dtype)  # one row at which eps matters
    probe = object.__new__(type(module))
    probe.__dict__.update(vars(module) | {"_parameters": {"weight": w.to(weight.dtype)}})
    y = type(module).forward(probe, x)
    half = torch.finfo(weight.dtype).bits < 32
    for offset in (0.0, 1.0):
        want = rms_norm_reference(x, probe.weight, eps=eps, offset=offset)
        if y.dtype == want.dtype and (torch.equal(y, want) if half else torch.allclose(y, want, rtol=1e-5, atol=1e-6)):
            return offset
    return None


def _known(module):
    kind = type(module)
    recognize = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    if recognize is None:
        return None
    author = inspect.unwrap(kind.forward).__module__
    return recognize(module) if author == kind.__module__ else f"the forward of its class is from {author}"


def _gated_mlp(module):
    return _gated(module.act_fn, fused_modules.gated_mlp)


def _fused_gated_mlp(module):
    return _gated(module.activation_fn, fused_modules.fused_gated_mlp)


def _gated(act, function):
    rule = fused_modules.gated_rule(act)
    return "its activation has no gated Rule, or has hooks" if rule is None else Match(rule.name, function)


def _rotary(module):
    if not _calls_rotary(type(module).forward):
        return "its rotary embedding is not the one that is known"
    return Match("rotary", fused_modules.rotated_attention)


@cache
def _calls_rotary(forward) -> bool:
    """Whether a plain function calls a global ``apply_rotary_pos_emb`` that does what ours does."""
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    if code is None or fused_modules.ROTARY not in code.co_names or fused_modules.ROTARY not in names:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    turned = names[fused_modules.ROTARY](q, k, cos, sin)
    pairs = zip((q, k), turned, strict=True)
    return all(torch.allclose(y, rotary_reference(x, cos=cos, sin=sin), atol=1e-5) for x, y in pairs)


def _loss(module):
    return fused_modules.why_no_plain_head(module) or Match("linear_cross_entropy", fused_modules.causal_lm)


_CLASSES: dict[Callable, str] = {
    _gated_mlp: "llama.LlamaMLP qwen2.Qwen2MLP qwen3.Qwen3MLP mistral.MistralMLP gemma2.Gemma2MLP gemma3.Gemma3MLP",
    _fused_gated_mlp: "phi3.Phi3MLP",
    _rotary: """
        llama.LlamaAttention qwen2.Qwen2Attention qwen3.Qwen3Attention mistral.MistralAttention
        gemma2.Gemma2Attention gemma3.Gemma3Attention phi3.Phi3Attention gpt_neox.GPTNeoXAttention
    """,
    _loss: """
        llama.LlamaForCausalLM qwen2.Qwen2ForCausalLM qwen3.Qwen3ForCausalLM mistral.MistralForCausalLM
        gemma2.Gemma2ForCausalLM gemma3.Gemma3ForCausalLM phi3.Phi3ForCausalLM gpt2.GPT2LMHeadModel
        gpt_neox.GPTNeoXForCausalLM opt.OPTForCausalLM
    """,
}
_KNOWN: dict[str, Callable] = {
    "transformers.models.{0}.modeling_{0}.{1}".format(*name.split(".")): recognize
    for recognize, names in _CLASSES.items()
    for name in names.split()
}
