"""``attn_implementation="mamlfast"``: Hugging Face models on ``mamlfast.ops.attention``.

Importing this module (``import mamlfast`` does) gives transformers two functions under the name "mamlfast". The mask
function is asked once per forward pass which keys each query may see. Where it knows the question (causal, sliding
window, both directions, packed sequences, each with padding) it answers in words: None for plain causal attention,
else the padding mask [B, S] with a ``Visible`` attached, linear in length. To any other question it answers with
transformers' own dense mask [B, 1, T, S] and logs why, once. The attention function of each layer reads the answer.

Packed sequences are found where ``position_ids`` restart, also under an attention mask; transformers' own functions
stop looking for them as soon as a mask is given, even one of ones, and then mix the sequences without a word.
"""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils

from mamlfast import ops

NAME = "mamlfast"
_WORDS = "_mamlfast_visible"  # the attribute of a mask that has its Visible
_log = logging.getLogger("mamlfast")


@dataclass(frozen=True, kw_only=True, eq=False)
class Visible:
    """Which of S keys each of T queries sees; all conditions hold together, None and False are none.

    Query t stands at key ``t + offset``; ``window`` is how many keys it sees to its left and to its right;
    ``segments``, int [B, T], are ids that query and key must share; ``key_mask``, bool [B, S], hides where False.
    """

    queries: int
    keys: int
    causal: bool = False
    offset: int = 0
    window: tuple[int | None, int | None] = (None, None)
    segments: Tensor | None = None
    key_mask: Tensor | None = None

    def options(self) -> dict[str, Any]:
        """The keywords of ``ops.attention``, without conditions that hide nothing: fused kernels take few."""
        behind, ahead = self.offset + self.queries - 1, self.keys - 1 - self.offset  # the farthest keys there are
        left, right = self.window
        left = None if left is None or left >= behind else left
        right = None if right is None or right >= ahead else right
        causal = self.causal and ahead > 0
        used = causal or (left, right) != (None, None)
        return {
            "causal": causal,
            "offset": self.offset if used else 0,
            "window": (left, right),
            "segments": self.segments,
            "key_mask": self.key_mask,
        }


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # an int, or of a static cache a tensor
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest: Any,
) -> Tensor | None:
    """Answer transformers' ``AttentionMaskInterface``: None, [B, S] with a ``Visible``, or dense [B, 1, T, S].

    None says that attention is plainly causal, the last query at the last key, and that no window of a layer's own
    could be mixed up with it. The arguments are those of ``transformers.masking_utils.sdpa_mask``; one look at
    ``attention_mask``, for padding, waits for its device.
    Raises NotImplementedError for a model that would not give the answer to our attention.
    """
    _check_served(type(rest.get("config")))
    shape = batch_size, q_length, kv_length
    try:
        visible = _read(mask_function, shape, q_offset, kv_offset, attention_mask)
        if not (allow_is_causal_skip or allow_is_bidirectional_skip or visible.segments is not None):
            raise _Unknown("the model asks for the mask itself")
    except _Unknown as reason:
        if q_length > 1:
            _say_once(f"attention uses a mask of queries x keys, quadratic in length: {reason}")
        return masking_utils.sdpa_mask(
            *shape, q_offset, kv_offset, mask_function, attention_mask, allow_is_causal_skip=False, **rest
        )
    if _is_plain(visible) and getattr(rest.get("config"), "sliding_window", None) is None:
        return None
    device = rest.get("device", "cpu") if attention_mask is None else attention_mask.device
    # A new view of one element if need be: what it says belongs to this tensor, and not to one of the caller's.
    answer = torch.ones((), dtype=torch.bool, device=device) if visible.key_mask is None else visible.key_mask
    answer = answer.expand(batch_size, kv_length)
    setattr(answer, _WORDS, visible)
    return answer


def _is_plain(visible: Visible) -> bool:
    anywhere = visible.window == (None, None) and visible.segments is None and visible.key_mask is None
    return visible.causal and anywhere and visible.offset == visible.keys - visible.queries


class _Unknown(Exception):
    """Why a mask is not one that ``Visible`` can express."""


def _read(mask_function, shape, q_offset, kv_offset, attention_mask) -> Visible:
    batch_size, q_length, kv_length = shape
    if not isinstance(q_offset, int) or not isinstance(kv_offset, int):
        raise _Unknown("the cache is static, and keeps its length on the device")
    if q_offset < kv_offset:
        raise _Unknown("queries stand before the first key")
    visible = Visible(queries=q_length, keys=kv_length, offset=q_offset - kv_offset)
    for term in _terms(mask_function):
        visible = _restricted(visible, term)
    alone = kv_length == q_length and not visible.offset
    if visible.segments is not None and not (alone and visible.segments.shape == (batch_size, q_length)):
        raise _Unknown("packed sequences meet a cache")
    return replace(visible, key_mask=_key_mask(attention_mask, batch_size, kv_length, kv_offset))


def _key_mask(attention_mask, batch_size, kv_length, kv_offset) -> Tensor | None:
    """Bool [B, S], or None where nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size:
        raise _Unknown("attention_mask is not one of [batch, keys]")
    padded = masking_utils.prepare_padding_mask(attention_mask.bool(), kv_length, kv_offset)
    assert padded is not None
    padded = padded[:, kv_offset : kv_offset + kv_length]
    return None if not torch.compiler.is_compiling() and padded.all() else padded


# The functions that transformers builds have the code of the factory they come from, and its arguments in closure.
_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_BOTH_SIDES = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
# Younger than transformers 5.17: the mask function in positions that count from each sequence's start. Under the
# condition that both are in one sequence, which it comes with, that is the same function of differences.
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_REMAPPED = None if _remap is None else _remap(masking_utils.causal_mask_function, torch.empty(0)).__code__


def _terms(function: Callable) -> Iterator[Callable]:
    """Take a conjunction apart."""
    if _code(function) is not _AND:
        yield function
        return
    terms = _closure(function)["mask_functions"]
    packed = any(_code(term) is _PACKED for term in terms)
    for term in terms:
        remapped = packed and _REMAPPED is not None and _code(term) is _REMAPPED
        yield from _terms(_closure(term)["mask_function"] if remapped else term)


def _restricted(visible: Visible, term: Callable) -> Visible:
    if term is masking_utils.causal_mask_function:
        return replace(visible, causal=True)
    if term is masking_utils.bidirectional_mask_function:
        return visible
    code, closure = _code(term), _closure(term)
    if code is _WINDOW and visible.window == (None, None):
        return replace(visible, window=(closure["sliding_window"] - 1, None))
    if code is _BOTH_SIDES and visible.window == (None, None):
        return replace(visible, window=(closure["sliding_window"],) * 2)
    if code is _PACKED and visible.segments is None:
        return replace(visible, segments=closure["packed_sequence_mask"])
    raise _Unknown(f"{getattr(term, '__qualname__', term)} is no pattern that is known here")


def _code(function):
    return getattr(function, "__code__", None)


def _closure(function) -> dict[str, Any]:
    names = getattr(_code(function), "co_freevars", ())
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)) if names else {}


# What some models hand to their attention that ours has no place for, and must not pass over.
UNSERVED = ("position_bias", "sinks", "indices", "block_indices", "head_mask", "cache")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Answer transformers' ``AttentionInterface``: [B, T, H, E], and no attention weights, which nobody computes.

    ``query`` [B, H, T, D], ``key`` and ``value`` [B, G, S, ...]. A mask with four dimensions is all there is to say of
    what is visible. One of two has a ``Visible`` with it; without one (or None) it hides padding, the layer's own
    ``is_causal`` and ``sliding_window`` hold, and the last query stands at the last key. To both comes packing,
    where there are as many queries as keys: by ``cu_seq_lens_q``, or else by ``position_ids``, whose sequences break
    where a token's position follows neither that of its neighbour nor that of the last token before it that is no
    padding. Dropout is for training only. Differentiable twice.

    Raises NotImplementedError for what ``UNSERVED`` names, ValueError where mask and tensors do not fit.
    """
    unserved = [name for name in UNSERVED if rest.get(name) is not None]
    if unserved:
        raise NotImplementedError(
            f"{type(module).__name__} gives its attention {unserved[0]}, which {NAME} attention does not have: "
            'load the model with attn_implementation="eager"'
        )
    if rest.get("output_attentions"):
        _say_once(f'{NAME} attention has no weights to return: for output_attentions use attn_implementation="eager"')
    query, key, value = _as_autocast(query, key, value)
    if attention_mask is not None and attention_mask.ndim != 2:
        options: dict[str, Any] = {"mask": attention_mask}
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        visible = _visible(attention_mask, query.shape[2], key.shape[2], causal, sliding_window)
        options = _packed(visible, query.shape[0], position_ids, cu_seq_lens_q).options()
    out = ops.attention(
        query,
        key,
        value,
        **options,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        scale=scaling,
        dropout=dropout if module.training else 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast would for a matrix product: rotary embeddings leave queries in float32, values are not."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _visible(attention_mask, T, S, causal, sliding_window) -> Visible:
    """What the mask function said or, where its answer is None or was copied on the way, what the layer says."""
    visible = getattr(attention_mask, _WORDS, None)
    if visible is None:
        left = None if sliding_window is None else sliding_window - 1
        window = (left, None if causal else left)
        key_mask = None if attention_mask is None else attention_mask.bool()
        return Visible(
            queries=T, keys=S, causal=causal, offset=S - T if causal else 0, window=window, key_mask=key_mask
        )
    if (visible.queries, visible.keys) != (T, S):
        raise ValueError(
            f"the mask was made for {visible.queries} queries and {visible.keys} keys; the layer has {T} and {S}: use "
            'attn_implementation="eager"'
        )
    return visible


def _packed(visible: Visible, batch_size, position_ids, cu_seq_lens) -> Visible:
    if visible.segments is not None:
        return visible
    T = visible.queries
    alone = visible.keys == T and not visible.offset
    if cu_seq_lens is not None:
        if not (alone and batch_size == 1):
            raise ValueError(
                f"cu_seq_lens_q cuts one row of tokens, without a cache; got {batch_size} rows of {T} queries and "
                f"{visible.keys} keys"
            )
        ids = torch.bucketize(torch.arange(T, device=cu_seq_lens.device), cu_seq_lens[1:], right=True)[None]
        return replace(visible, segments=ids)
    if position_ids is None or not alone or T == 1 or position_ids.shape not in ((1, T), (batch_size, T)):
        return visible
    ids = _segments(position_ids, visible.key_mask)
    return visible if ids is None else replace(visible, segments=ids.expand(batch_size, T))


# position_ids -> padding mask (or position_ids again, for none) -> versions of both and what was found: once per
# batch, and not per layer, for the answer "not packed" waits for the device. Nothing here keeps a tensor alive.
_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _segments(position_ids: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """Return the ids of the sequences, int [1 or B, T], or None where no row has more than one."""
    inner = position_ids if key_mask is None else key_mask
    if position_ids.is_inference() or inner.is_inference():  # these have no version to notice a change by
        return _find_segments(position_ids, key_mask)
    if position_ids not in _found:
        _found[position_ids] = WeakTensorKeyDictionary()
    masks = _found[position_ids]
    versions = position_ids._version, inner._version
    if inner not in masks or masks[inner][0] != versions:
        masks[inner] = versions, _find_segments(position_ids, key_mask)
    return masks[inner][1]


def _find_segments(position_ids, key_mask):
    starts = position_ids.diff(dim=1) != 1
    if key_mask is not None:
        # The position of the last token before each that is no padding; before the first one, anything will do.
        places = torch.arange(key_mask.shape[1], device=key_mask.device).masked_fill(~key_mask, 0).cummax(1).values
        before = position_ids.expand(key_mask.shape[0], -1).gather(1, places)[:, :-1]
        starts = starts & (position_ids[:, 1:] - before != 1) & key_mask[:, 1:] & (key_mask.cumsum(1)[:, :-1] > 0)
    return nn.functional.pad(starts.cumsum(1), (1, 0)) if starts.any() else None


@cache
def serves(model_class: type) -> bool:
    """Whether a ``PreTrainedModel`` class calls its attention through the interface, with nothing ``UNSERVED``.

    It reads the class's source, as transformers does to tell whether ``set_attn_implementation`` may be used.
    """
    if not model_class._can_set_attn_implementation():
        return False
    source = inspect.getsource(sys.modules[model_class.__module__])
    return re.search(rf"^\s+({'|'.join(UNSERVED)})=", source, re.MULTILINE) is None


@cache
def _check_served(config_class: type) -> None:
    """Refuse models with an attention of their own, which transformers loads under any registered name.

    To most of them None means that everything is visible.
    """
    models = [cls for cls in _subclasses(PreTrainedModel) if getattr(cls, "config_class", None) is config_class]
    if models and not any(map(serves, models)):
        raise NotImplementedError(
            f"{models[0].__name__} does not compute its attention through transformers' interface, or with options "
            f'that {NAME} attention does not have: load it with attn_implementation="eager"'
        )


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


_said: set[str] = set()

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
