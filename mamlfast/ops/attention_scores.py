"""The score-sized arithmetic of attention, between the matrix products: one pass over a chunk, in place.

For N heads, R queries and C keys, scores ``s`` [N, R, C] as ``q k'`` leaves them, ``scale`` the softmax
scale, M the additive mask (zero without one), sums over a row run over the visible keys only::

    S = scale s + M          L = logsumexp(S)             P = exp(S - L)
    S_dot = scale s_dot      mu = rowsum(P S_dot)         P_dot = P (S_dot - mu)

    S_bar     = P (P_bar - delta)
    S_bar_dot = P_dot (P_bar - delta) + P (P_bar_dot - delta_dot)

``delta`` and ``delta_dot`` are the row sums that the caller knows from the output. The factor ``scale`` that
the chain rule puts on ``S_bar`` is folded in here, so that ``q_bar = S_bar k`` needs no further pass.

These are raw kernels for use inside a Rule: they overwrite their arguments and autograd does not see them. A
key that is not visible ends as zero in every tensor. Keys beyond the causal limit of a row are not even read;
where a mask hides a key, its score may be anything, its tangent and cotangents must be finite. A row with no
visible key is zero throughout, with L = -inf and mu = 0. A NaN or +inf among the visible scores makes its row
NaN.

Row statistics are float32, or float64 for float64 scores. The C++ kernels visit each row once while it is in
cache; their eager twins make about a dozen passes over memory. Exponentials below the smallest normal number
are zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mamlfast.ops.backend import backend_for


@dataclass(frozen=True, kw_only=True)
class Visible:
    """Which keys a chunk of queries may see, without a tensor of that size where that is possible.

    Key c is visible to row r if ``c <= r + causal_offset`` (None: no such limit) and if ``mask`` allows it:
    bool, True where visible, or floating and added to the scaled scores, -inf where not visible. ``mask`` is
    [n, r, C] with r = 1 or R and n = 1 or ``n * repeat == N``: head i uses ``mask[i // repeat]``, so that the
    H heads of a batch entry can share one mask with ``repeat=H``. Raises ``ValueError`` or ``TypeError`` for
    anything else.
    """

    causal_offset: int | None = None
    mask: Tensor | None = None
    repeat: int = 1

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {self.repeat}")
        if self.mask is None:
            return
        if self.mask.ndim != 3:
            raise ValueError(f"mask must be [n, r, C], got {list(self.mask.shape)}; add the missing dimensions")
        if self.mask.dtype != torch.bool and not self.mask.is_floating_point():
            raise TypeError(f"mask must be bool or floating, got {self.mask.dtype}; compare it with zero first")

    def fit(self, s: Tensor) -> None:
        """Raise ``ValueError`` unless the mask fits scores ``s`` [N, R, C]."""
        if self.mask is None:
            return
        (N, R, C), (n, r, c) = s.shape, self.mask.shape
        if n not in (1, N / self.repeat) or r not in (1, R) or c != C:
            raise ValueError(
                f"mask {list(self.mask.shape)}, repeat={self.repeat}, does not fit scores {list(s.shape)}; "
                f"expected [1 or {N / self.repeat:g}, 1 or {R}, {C}]"
            )


def softmax_scores(s: Tensor, scale: float, visible: Visible) -> Tensor:
    """Turn ``s`` [N, R, C] into P in place and return L [N, R]."""
    if _native(visible, s):
        lse = s.new_empty(s.shape[:2])
        torch.ops.mamlfast.softmax_scores(s, lse, scale, *_mask_of(visible, s))
        return lse
    _, lse = _softmax(s, scale, visible)
    return lse


def softmax_scores_jvp(s: Tensor, s_dot: Tensor, scale: float, visible: Visible) -> tuple[Tensor, Tensor]:
    """Turn ``s`` into P and ``s_dot`` into P_dot in place, both [N, R, C]; return L and mu [N, R]."""
    if _native(visible, s, s_dot):
        lse, mu = s.new_empty(s.shape[:2]), s.new_empty(s.shape[:2])
        torch.ops.mamlfast.softmax_scores_jvp(s, s_dot, lse, mu, scale, *_mask_of(visible, s))
        return lse, mu
    P, lse = _softmax(s, scale, visible)
    S_dot = _where_visible(s_dot, visible) * scale
    mu = (P * S_dot).sum(-1)
    s_dot.copy_(P * (S_dot - mu[..., None]))
    return lse, mu


def scores_bwd(s: Tensor, p_bar: Tensor, lse: Tensor, delta: Tensor, scale: float, visible: Visible) -> None:
    """Turn ``s`` into P and ``p_bar`` into ``scale * S_bar`` in place, both [N, R, C].

    The row statistics ``lse`` and ``delta`` are [N, R].
    """
    if _native(visible, s, p_bar, lse, delta):
        torch.ops.mamlfast.scores_bwd(s, p_bar, *_rows(lse, delta), scale, *_mask_of(visible, s))
        return
    P = _probabilities(s, lse, scale, visible)
    p_bar.copy_(scale * P * (_where_visible(p_bar, visible) - delta[..., None]))


def scores_bwd_jvp(
    s: Tensor,
    s_dot: Tensor,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    lse: Tensor,
    mu: Tensor,
    delta: Tensor,
    delta_dot: Tensor,
    scale: float,
    visible: Visible,
) -> None:
    """Turn four [N, R, C] tensors in place into P, P_dot, ``scale * S_bar`` and ``scale * S_bar_dot``.

    The row statistics ``lse``, ``mu``, ``delta``, ``delta_dot`` are [N, R].
    """
    if _native(visible, s, s_dot, p_bar, p_bar_dot, lse, mu, delta, delta_dot):
        rows = _rows(lse, mu, delta, delta_dot)
        torch.ops.mamlfast.scores_bwd_jvp(s, s_dot, p_bar, p_bar_dot, *rows, scale, *_mask_of(visible, s))
        return
    P = _probabilities(s, lse, scale, visible)
    P_dot = P * (_where_visible(s_dot, visible) * scale - mu[..., None])
    centred = _where_visible(p_bar, visible) - delta[..., None]
    centred_dot = _where_visible(p_bar_dot, visible) - delta_dot[..., None]
    s_dot.copy_(P_dot)
    p_bar.copy_(scale * P * centred)
    p_bar_dot.copy_(scale * (P_dot * centred + P * centred_dot))


def _native(visible: Visible, s: Tensor, *others: Tensor) -> bool:
    """Validate the arguments and return whether the C++ kernels serve them."""
    visible.fit(s)
    tensors = (s, *others)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise NotImplementedError("attention_scores has no derivative of its own; call the attention Rule")
    one_dtype = s.numel() > 0 and all(t.dtype == s.dtype for t in others)
    return backend_for(*tensors, rooms=("native", "eager") if one_dtype else ("eager",)) == "native"


def _mask_of(visible: Visible, s: Tensor) -> tuple[int, Tensor | None, int]:
    """Return causal offset, mask and repeat as the C++ kernels take them."""
    offset = s.shape[-1] if visible.causal_offset is None else visible.causal_offset
    mask = visible.mask
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(s.dtype)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return offset, mask, visible.repeat


def _rows(*statistics: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in statistics)


def _softmax(s: Tensor, scale: float, visible: Visible) -> tuple[Tensor, Tensor]:
    """Write P into ``s``; return it and L in the wide dtype."""
    S = _masked_scores(s, scale, visible)
    lse = S.logsumexp(-1)
    P = S.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0)
    s.copy_(P)
    return P, lse


def _probabilities(s: Tensor, lse: Tensor, scale: float, visible: Visible) -> Tensor:
    S = _masked_scores(s, scale, visible)
    P = torch.exp(S - lse[..., None]).masked_fill((lse == -torch.inf)[..., None], 0)
    s.copy_(P)
    return P


def _masked_scores(s: Tensor, scale: float, visible: Visible) -> Tensor:
    S = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
    if visible.mask is not None and visible.mask.dtype != torch.bool:
        S = S + _per_head(visible, s).to(S.dtype)
    hidden = _hidden(visible, s)
    return S if hidden is None else S.masked_fill(hidden, -torch.inf)


def _where_visible(x: Tensor, visible: Visible) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    hidden = _hidden(visible, x)
    return wide if hidden is None else wide.masked_fill(hidden, 0)


def _hidden(visible: Visible, s: Tensor) -> Tensor | None:
    """Return True where a key is not visible, broadcastable to ``s``, or None where all are."""
    hidden = None
    if visible.causal_offset is not None:
        rows, keys = (torch.arange(size, device=s.device) for size in s.shape[1:])
        hidden = keys > rows[:, None] + visible.causal_offset
    if visible.mask is not None:
        mask = _per_head(visible, s)
        masked = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        hidden = masked if hidden is None else hidden | masked
    return hidden


def _per_head(visible: Visible, s: Tensor) -> Tensor:
    mask = visible.mask
    assert mask is not None
    return mask if mask.shape[0] in (1, s.shape[0]) else mask.repeat_interleave(visible.repeat, 0)
