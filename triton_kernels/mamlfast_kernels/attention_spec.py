"""What attention computes besides its products, said once for every room; no Triton is needed to say it."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSpec:
    """Scores, which keys a query sees, and dropout, for q [B, H, T, D] and k [B, G, S, D].

    * Scores are ``scale q k'``, or ``softcap tanh(scale q k' / softcap)`` with a soft-cap.
    * Query t stands at key position ``t + offset``. From there it sees ``window = (left, right)`` keys to either side
      besides its own, None meaning all of them, and none to the right if ``causal``.
    * ``segments = (query ids [B, T], key ids [B, S])``, any integers, hides keys of another id, in whatever order
      the ids come: packed sequences.
    * ``key_mask``, bool [B, S], hides the keys where it is False: padding.
    * ``mask``, broadcastable to [B, H, T, S], is bool (False hides) or floating and added to the scores (-inf hides).
      It is the one part that is itself quadratic in length; the kernels for GPUs do not take it.
    * ``dropout`` sets probabilities to zero and divides the others by ``1 - dropout``. The pair of query t and key s
      of head ``h`` is kept if the first word of Philox-4x32-10 (Salmon et al., 2011, doi:10.1145/2063384.2063405) at
      the counter ``(s, t, b H + h, 0)`` and the 64-bit key ``seed`` is at least ``dropout 2^32``: a function of the
      position alone, the same in every room, in every recomputation and in whatever order tiles are visited.

    Only pairs that all of these show are visible. Raises ValueError where a number is out of range.
    """

    scale: float
    causal: bool = False
    offset: int = 0
    window: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    segments: tuple[Tensor, Tensor] | None = None
    key_mask: Tensor | None = None
    mask: Tensor | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be positive and finite, or None, got {self.softcap}")
        if len(self.window) != 2 or any(side is not None and side < 0 for side in self.window):
            raise ValueError(f"window must be (left, right), each None or at least 0, got {self.window}")
        if self.segments is not None and len(self.segments) != 2:
            raise ValueError(f"segments must be (query ids, key ids), got {len(self.segments)} entries")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability below 1, got {self.dropout}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")

    @property
    def keep_from(self) -> int:
        """The smallest 32-bit draw that is kept."""
        return min(round(self.dropout * 2**32), 2**32 - 1)

    def reach(self) -> tuple[int | None, int | None]:
        """Return (left, right) counted from t itself: query t sees keys ``t - left`` to ``t + right``, None: all."""
        left, right = self.window
        right = 0 if self.causal else right
        return None if left is None else left - self.offset, None if right is None else right + self.offset
