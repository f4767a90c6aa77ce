"""Padding stands on the right and counts for nothing."""

import pytest
import torch

from mamlfast.data.batch import collate
from mamlfast.data.prompt import IGNORED, Tokens


def test_prompts_are_padded_on_the_right_without_mask_or_label():
    batch = collate([Tokens([5, 6, 7], [IGNORED, 6, 7]), Tokens([8], [8])], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_without_prompts_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        collate([], pad_id=0)
