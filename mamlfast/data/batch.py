"""Prompts of different lengths as one batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mamlfast.data.prompt import IGNORED, Tokens

Batch = dict[str, Tensor]


def collate(prompts: Sequence[Tokens], *, pad_id: int) -> Batch:
    """Pad prompts on the right to the longest.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (B, T) int64; padding has the id ``pad_id``,
        mask 0 and the ignored label.

    Raises:
        ValueError: there is no prompt.
    """
    if not prompts:
        raise ValueError("a batch must have at least one prompt, got none")
    length = max(len(prompt.input_ids) for prompt in prompts)

    def padded(rows: Sequence[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded([prompt.input_ids for prompt in prompts], pad_id),
        "attention_mask": padded([[1] * len(prompt.input_ids) for prompt in prompts], 0),
        "labels": padded([prompt.labels for prompt in prompts], IGNORED),
    }
