"""The models that the engine is tested on: one tiny instance of each Hugging Face class, and oracles for them.

Llama-like classes cast norms, rotary tables and softmax to float32 even in a float64 model, and every one of them
computes its loss in float32, which limits any two methods to agree to about 1e-7. ``float64_throughout`` lifts those
casts, so that the claim of exactness can be tested to float64 rounding.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import mamlfast

VOCAB, POSITIONS, LR = 61, 32, 0.1
_SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA_LIKE = _SIZES | {"num_key_value_heads": 2, "head_dim": 6}
_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS = {
    "gpt2": partial(transformers.GPT2Config, n_embd=24, n_layer=2, n_head=4, n_positions=POSITIONS),
    "llama": partial(transformers.LlamaConfig, **_LLAMA_LIKE),
    "qwen2": partial(transformers.Qwen2Config, **_SIZES, num_key_value_heads=2),
    "qwen3": partial(transformers.Qwen3Config, **_LLAMA_LIKE),
    "mistral": partial(transformers.MistralConfig, **_LLAMA_LIKE, sliding_window=5),
    "gemma2": partial(transformers.Gemma2Config, **_LLAMA_LIKE, query_pre_attn_scalar=6, sliding_window=5),
    "gemma3": partial(transformers.Gemma3TextConfig, **_LLAMA_LIKE, query_pre_attn_scalar=6, sliding_window=5),
    "phi3": partial(transformers.Phi3Config, **_SIZES, num_key_value_heads=2),
    "gpt_neox": partial(transformers.GPTNeoXConfig, **_SIZES),
    "opt": partial(
        transformers.OPTConfig,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=24,
    ),
}


def tiny_model(name: str, *, tied: bool = True, attention: str = "eager", dropout: float = 0.0) -> nn.Module:
    """Return a random float64 model of the class, in training mode; equal arguments give equal weights."""
    options = dict(_IDS, tie_word_embeddings=tied, initializer_range=0.2, max_position_embeddings=POSITIONS)
    config = copy.deepcopy(CONFIGS[name](**options))
    if name == "opt":
        config.init_std = 0.2
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout"):
        if hasattr(config, key):
            setattr(config, key, dropout)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.double().train()


def draw_batch(seed: int, *, padded: str = "", shape: tuple[int, int] = (2, 9)) -> dict[str, Tensor]:
    """A batch of random tokens; the first row padded on the "right", the second on the left too for "both"."""
    ids = torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
    if not padded:
        return {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    if padded == "both":
        mask[1, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def draw_episode(steps: int = 1, **options) -> mamlfast.Episode:
    """An episode with one support batch a step."""
    return mamlfast.Episode(support=[draw_batch(k, **options) for k in range(steps)], query=draw_batch(100, **options))


def double_backward(model: nn.Module, episode: mamlfast.Episode, *, lr: float = LR) -> dict[str, Tensor]:
    """The meta-gradient by plain autograd, with nothing of the engine in it."""

    def loss(params, batch):
        return functional_call(model, params, kwargs=dict(batch, use_cache=False)).loss

    start = params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        for batch in episode.support:
            grads = torch.autograd.grad(loss(params, batch), list(params.values()), create_graph=True)
            params = {name: p - lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
        grads = torch.autograd.grad(loss(params, episode.query), list(start.values()))
    return dict(zip(start, grads, strict=True))


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative error of one parameter's gradient.

    A gradient that is zero but for rounding (a key's bias, which shifts every score of a row alike) is measured
    against a millionth of the whole.
    """
    assert got.keys() == want.keys()
    floor = 1e-6 * float(norm(want))
    return max(float((got[n] - w).norm()) / max(float(w.norm()), floor) for n, w in want.items())


def overall_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The relative error of the whole gradient, as one vector."""
    assert got.keys() == want.keys()
    return float(norm({n: got[n] - w for n, w in want.items()}) / norm(want))


def norm(params: dict[str, Tensor]) -> Tensor:
    """The Euclidean norm of all entries."""
    return torch.stack([p.norm() for p in params.values()]).norm()


class _Float64Casts(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Inside the block a model's casts to float32 go to float64."""
    with _Float64Casts():
        yield
