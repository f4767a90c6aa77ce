"""Tokenizers: one of our own, and the differences between other people's evened out.

Ours is byte-level BPE, so that it encodes any text; trained on a suite, it gives the suite's words a token
each. It is an ordinary ``PreTrainedTokenizerFast``: ``save_pretrained`` writes it and ``AutoTokenizer`` reads it.
"""

from collections.abc import Callable, Iterable
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The special tokens of our own tokenizer, and their ids.
PAD, END = "<pad>", "<end>"
PAD_ID, END_ID = 0, 1


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts.

    Args:
        texts: what to find frequent pieces in; with none, every byte is a token.
        vocab_size: the most entries: 2 special tokens, 256 bytes, then merges.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes, padding and end), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: of the padding token or, where there is none (GPT-2, Llama), of the end token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(number, int):
            return number
    raise ValueError("the tokenizer must have a padding or an end token, it has neither")


def piece_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], tuple[int, ...]]:
    """Return ``text -> ids`` for the pieces of a prompt: no beginning or end token, each text encoded once."""

    @cache
    def encode(piece: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(piece, add_special_tokens=False))

    return encode
