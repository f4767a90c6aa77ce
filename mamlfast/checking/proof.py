"""The check of a model from beginning to end."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mamlfast.checking.claims import claims
from mamlfast.checking.costs import Costs
from mamlfast.checking.differences import direction
from mamlfast.checking.modules import attempt, costs_of, examine, shown
from mamlfast.checking.pieces import HEAD, Piece, capture
from mamlfast.checking.precision import available_bytes, oracle_dtypes
from mamlfast.checking.result import CheckResult, ModuleResult
from mamlfast.checking.whole import Whole
from mamlfast.fuse import plan
from mamlfast.model import causal_lm, find_blocks
from mamlfast.randomness import RandomState

# Parameter sets that live at once around a central difference: parameters, directions, gradients and differences.
_SETS = 12


def check(model: nn.Module, batch: Mapping[str, Tensor], *, seed: int = 0) -> CheckResult:
    """Prove, with numbers, that the second order of this very model is exact, or name what breaks it.

    The Hessian-vector product of ``causal_lm(model)`` on ``batch`` along a random direction is compared with central
    differences of gradients in float64, with double backward, and with itself (H is symmetric and linear); then each
    kind of module with central differences on the inputs that it really has. A ``torch.autograd.Function`` of
    another library that is silently first order is named, with the file it stands in. What answers each module,
    its time and its memory are listed.

    Args:
        model: a Hugging Face causal LM in any floating dtype, on any device. It is left as it is, bit for bit; one
            in training mode is checked with its dropout, every evaluation on the same draws.
        batch: ``input_ids``, ``labels`` [B, T], as ``causal_lm`` takes it. A small one proves as much as a large one.
        seed: of the directions.

    Returns:
        The findings: ``result.ok``, and the table as ``str(result)``.

    About 20 gradients and a dozen Hessian-vector products, and a dozen float64 copies of the trainable parameters at
    the peak. Where those do not fit, or the model does not run in float64, float32 has to do, which resolves less
    (``result.notes`` says so). Where central differences settle nothing, ``ok`` is False. Raises TypeError and
    ValueError where ``causal_lm`` does, NotImplementedError where neither precision serves.
    """
    causal_lm(model)  # refuses what is no causal LM
    draws, notes = RandomState.now(), []
    with draws.again():
        own = Whole(model=model, batch=batch, draws=draws)
        own.gradient(own.params)  # refuses a batch that the model has no loss on
        if own.random:
            notes.append("the model draws random numbers (dropout): every evaluation is on the same draws")
        oracle = _oracle(own, notes)
        modules = tuple(_examined(_pieces(model, batch), oracle.dtype, seed, notes))
        kept_bytes, free = _kept_bytes(model, modules), available_bytes(own.device)
        # The graph of the gradient is about as large again, all of it in the oracle's precision.
        fits = 2 * kept_bytes * oracle.dtype.itemsize / own.dtype.itemsize < free
        if not fits:
            notes.append("there is no memory for double backward of the whole model: take a smaller batch")
        found = tuple(claims(oracle, own, seed, notes, double_backward=fits))
        refused = any(claim.reason for claim in found) or kept_bytes > free
        costs = [None, None] if refused else _costs(own, seed)
        return CheckResult(
            model=_heading(own),
            oracle=_words(oracle),
            own_dtype=shown(own.dtype),
            claims=found,
            modules=modules,
            fusion=str(plan(model, for_engine=True).report),
            costs=costs[0],
            recomputing=costs[1],
            overhead_ms=_overhead(model, batch),
            notes=tuple(notes),
        )


def _oracle(own: Whole, notes: list[str]) -> Whole:
    """The loss in the best precision that it runs in, with transformers' own attention where that is the same."""
    count = sum(p.numel() for p in own.params.values())
    for dtype in oracle_dtypes(own.dtype):
        whole = replace(own, wide=dtype)
        needed, free = _SETS * count * dtype.itemsize, available_bytes(own.device)
        if needed > free:
            notes.append(f"{shown(dtype)} would need {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free")
            continue
        value, reason = attempt(lambda whole=whole: whole.gradient(whole.params)[0])
        if value is not None:
            return _with_eager_attention(whole, notes)
        notes.append(f"the model does not run in {shown(dtype)}: {reason}")
    raise NotImplementedError(f"no precision is left to check the model in; {'; '.join(notes)}")


def _with_eager_attention(whole: Whole, notes: list[str]) -> Whole:
    """An oracle that shares no attention with the engine, except where eager attention is another function.

    That is so for packed sequences, which transformers does not see under an attention mask; for dropout, whose draws
    are its own; and where a padding token has to predict a label, for it sees nothing.
    """
    if whole.random or "position_ids" in whole.batch or _padding_predicts(whole.batch):
        return whole
    eager = replace(whole, eager=True)
    value, reason = attempt(lambda: eager.gradient(eager.params)[0])
    if value is None:
        notes.append(f"transformers' eager attention does not run here: {reason}")
    return whole if value is None else eager


def _padding_predicts(batch: Mapping[str, Tensor]) -> bool:
    mask = batch.get("attention_mask")
    return mask is not None and mask.ndim == 2 and bool(((mask[:, :-1] == 0) & (batch["labels"][:, 1:] != -100)).any())


def _pieces(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Piece]:
    loss, params = causal_lm(model, recompute=False)
    return capture(model, loss, params, batch)


def _examined(pieces, dtype, seed, notes: list[str]) -> Iterator[ModuleResult]:
    for piece in pieces:
        found, reason = attempt(lambda piece=piece: examine(piece, dtype, seed))
        if found is not None:
            yield found
        elif reason:
            notes.append(f"{piece.paths[0]} ({piece.kind}) does not run by itself and was not examined: {reason}")


def _kept_bytes(model: nn.Module, modules: Iterable[ModuleResult]) -> float:
    """What a Hessian-vector product of the whole model keeps without recomputation: its blocks and its head."""
    parts = {HEAD, *(type(block).__name__ for block in find_blocks(model))}
    return sum(1e6 * m.costs.hvp_saved_mb * len(m.paths) for m in modules if m.costs is not None and m.kind in parts)


def _costs(own: Whole, seed: int) -> list[Costs]:
    params = own.params
    v = dict(zip(params, direction(list(params.values()), seed), strict=True))
    return [own.costs(params, v, recompute=recompute) for recompute in (False, True)]


def _overhead(model: nn.Module, batch: Mapping[str, Tensor]) -> float | None:
    """Milliseconds of a block's Hessian-vector product on two tokens, where there is little else than dispatch."""
    blocks = {type(block).__name__ for block in find_blocks(model)}
    ids = batch["input_ids"][:1, :2]
    pieces, _ = attempt(lambda: _pieces(model, {"input_ids": ids, "labels": ids}))
    found, _ = attempt(lambda: [costs_of(piece).hvp_ms for piece in pieces or () if piece.kind in blocks])
    return max(found, default=None) if found else None


def _heading(own: Whole) -> str:
    count = sum(p.numel() for p in own.model.parameters())
    tokens = " x ".join(map(str, own.batch["input_ids"].shape))
    return f"{type(own.model).__name__}, {count:,} parameters, {shown(own.dtype)} on {own.device}, {tokens} tokens"


def _words(oracle: Whole) -> str:
    words = f"in {shown(oracle.dtype)}"
    words += ", its casts to float32 lifted" if oracle.dtype is torch.float64 else ""
    return words + (", against transformers' eager attention" if oracle.eager else "")
