"""A module as a function of its parameters, and a Hugging Face causal LM as ``loss(params, batch)``.

The model is the user's own and stays so: for the time of one call its parameters are replaced, its cache and its own
checkpointing are off, its attention is one that can be differentiated twice, its blocks recompute; afterwards
everything is as it was, whatever happened in between.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import checkpoint
from transformers import PreTrainedModel

from mamlfast import attention_interface
from mamlfast.blocks import recomputed
from mamlfast.fuse import Plan, plan
from mamlfast.swap import swapped
from mamlfast.tree import Params

_log = logging.getLogger("mamlfast")

Setting = tuple[Any, str, Any]


def functional(
    module: nn.Module, *, recompute: bool = True, blocks: Sequence[nn.Module] | None = None, fuse: bool = True
) -> tuple[Callable[..., Any], Params]:
    """Return ``call, params`` with ``call(params, *args, **kwargs) == module(*args, **kwargs)`` on ``params``.

    ``params`` maps names to the module's trainable parameters (those that require a gradient), detached, each once
    however often it is tied. ``recompute`` keeps only the inputs of ``blocks`` and recomputes the rest in the
    backward; ``blocks`` defaults to the module's repeated layers, if it has any. ``fuse`` gives those modules one
    Rule each that ``mamlfast.fuse`` knows, inside the call. Buffers keep their values.
    Raises ValueError where nothing is trainable.
    """
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("the module must have a parameter that requires a gradient; all of its parameters are frozen")
    found = list(find_blocks(module) if blocks is None else blocks) if recompute else []
    fusion = plan(module, for_engine=True) if fuse else None

    def call(params: Params, *args, **kwargs):
        world = partial(_world, settings(module), fusion)
        with swapped(module, params), world(), recomputed(found, world):
            return module(*args, **kwargs)

    # Decoders that are known, head and loss included, run attention under transformers' names only.
    call.repeats_draws = fusion is not None and "" in fusion.report.fused  # pyright: ignore[reportFunctionMemberAccess]
    return call, params


@contextmanager
def _world(settings: Iterable[Setting], fusion: Plan | None) -> Iterator[None]:
    with holding(settings), nullcontext() if fusion is None else fusion.held():
        yield


def causal_lm(
    model: nn.Module, *, recompute: bool = True, fuse: bool = True
) -> tuple[Callable[[Params, Mapping[str, Tensor]], Tensor], Params]:
    """Return ``loss, params`` of a Hugging Face causal language model.

    ``loss(params, batch)`` is the model's own loss, a scalar, at ``params``; ``batch`` is a dict of tensors as the
    model takes it: ``input_ids`` [B, T] int64, ``labels`` [B, T] (-100 where there is no loss; the model shifts
    them), optionally ``attention_mask``. With ``recompute`` (the default) each decoder layer keeps its input only:
    one more forward in time, a fraction of the memory. With ``fuse`` (the default) norms, gates, rotary embeddings
    and the loss of known classes run as one operation each, as under ``mamlfast.fuse``, for the time of a call.

    Attention is ``attn_implementation="mamlfast"``, for the time of a call and whatever the model was loaded with:
    memory linear in T, padding and packed sequences (``position_ids`` that restart) included. Two exceptions: a model
    loaded with "eager" keeps it, and with it T x T scores of each head, in the block that is being recomputed; and a
    model whose attention is its own code keeps "sdpa", or gets that in place of what has no second derivative. What
    stands in for another kernel than sdpa is said once.

    Raises TypeError for a model without a configuration or a batch that is not a dict, ValueError for a batch
    without labels, with nothing but masked labels, or longer than the model's positions.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "vocab_size"):
        raise TypeError(
            f"model must be a Hugging Face causal language model; got {type(model).__name__} without a configuration: "
            f"for any other module write loss(params, batch) around mamlfast.functional(model)"
        )
    call, params = functional(model, recompute=recompute, fuse=fuse)

    def loss(params: Params, batch: Mapping[str, Tensor]) -> Tensor:
        check_batch(config, batch)
        return call(params, **batch, use_cache=False).loss

    loss.repeats_draws = call.repeats_draws  # pyright: ignore[reportFunctionMemberAccess]
    return loss, params


def check_batch(config: Any, batch: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError unless ``batch`` is one that a causal LM of ``config`` has a loss on."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a dict of tensors with input_ids and labels; got {type(batch).__name__}")
    missing = [key for key in ("input_ids", "labels") if batch.get(key) is None]
    if missing:
        raise ValueError(f"a batch must have input_ids and labels; {missing[0]} is missing, got {sorted(batch)}")
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.ndim != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"input_ids must be [batch, tokens] and labels of the same shape; "
            f"got {tuple(ids.shape)} and {tuple(labels.shape)}"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(
            f"a sequence must fit the model's {longest} positions; got {ids.shape[1]} tokens: truncate the batch"
        )
    if not (labels[:, 1:] != -100).any():
        raise ValueError("a batch must have at least one label that is not -100 after its first token; all are masked")


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the layers that repeat: the longest ``ModuleList`` of two or more modules of one class, or none."""
    best: list[nn.Module] = []
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len({type(m) for m in child}) == 1 and len(child) > max(1, len(best)):
            best = list(child)
    return best


def settings(module: nn.Module) -> list[Setting]:
    """What a model's own settings have to be while the engine runs it, as (object, attribute, value).

    Gradient checkpointing of its own would recompute after the weights were given back and silently use the wrong
    ones: Hugging Face's is off, and any other is refused. Its attention is one that has a second derivative: ours
    where it calls its attention through transformers' interface, unless it was loaded with "eager".
    """
    found: list[Setting] = [(checkpoint, name, _RefusedCheckpoint) for name in _CHECKPOINTS]
    configs: dict[int, Any] = {}
    owners: dict[int, set[type]] = {}
    for m in module.modules():
        if getattr(m, "gradient_checkpointing", False) is True:
            found.append((m, "gradient_checkpointing", False))
        config = getattr(m, "config", None)
        if config is not None:
            configs[id(config)] = config
            owners.setdefault(id(config), set()).update({type(m)} if isinstance(m, PreTrainedModel) else ())
    for key, config in configs.items():
        found.extend(_attention_settings(config, owners[key]))
    return found


# What ``torch.utils.checkpoint.checkpoint`` looks up when it is called, however it was imported.
_CHECKPOINTS = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")


class _RefusedCheckpoint:
    """Stands in for both."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError(
            "the module uses torch.utils.checkpoint itself, which would recompute on other weights than it ran on; "
            "switch that off: the engine recomputes the module's blocks (recompute=True)"
        )

    apply = __init__


def _attention_settings(config, owners: set[type]) -> list[Setting]:
    """What stands in for the attention of ``owners``, the models of this configuration."""
    loaded = getattr(config, "_attn_implementation", None)
    served = bool(owners) and all(map(attention_interface.serves, owners))
    if loaded in (None, "eager", attention_interface.NAME) or (loaded == "sdpa" and not served):
        return []
    # sdpa has no logit soft-cap.
    fallback = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    replacement = attention_interface.NAME if served else fallback
    if loaded != "sdpa" and loaded not in _said:
        _said.add(loaded)
        _log.warning(
            "%s attention cannot be differentiated twice; %s is used where second derivatives are taken",
            loaded,
            replacement,
        )
    # Of a Hugging Face configuration the property would also set those of the model's parts, which have their own.
    internal = "_attn_implementation_internal"
    return [(config, internal if hasattr(config, internal) else "_attn_implementation", replacement)]


@contextmanager
def holding(settings: Iterable[Setting]) -> Iterator[None]:
    """Hold each attribute at its value inside the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_said: set[str] = set()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters that require a gradient, by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
