"""Our tokenizer encodes anything and is an ordinary Hugging Face one; others' differences are evened out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from mamlfast.data.tokenizer import END_ID, PAD_ID, padding_id, piece_encoder, train_tokenizer

MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "models"
TEXTS = [" cat sun red", " cat moon red"] * 10
OURS = train_tokenizer(TEXTS)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_its_tokens(text):
    assert OURS.decode(OURS.encode(text), clean_up_tokenization_spaces=False) == text


def test_frequent_words_are_one_token_each():
    assert len(piece_encoder(OURS)(" cat sun red")) == 3


def test_training_twice_gives_the_same_tokenizer():
    assert train_tokenizer(TEXTS).backend_tokenizer.to_str() == OURS.backend_tokenizer.to_str()


def test_it_is_saved_and_loaded_with_its_special_tokens(tmp_path):
    OURS.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(" cat é\n=") == OURS.encode(" cat é\n=")
    assert (loaded.pad_token_id, loaded.eos_token_id) == (PAD_ID, END_ID)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer([], vocab_size=257)


@pytest.mark.skipif(not MODELS.is_dir(), reason="the shared vocabularies are not here")
def test_gpt2_is_padded_with_its_end_token():
    tokenizer = GPT2Tokenizer.from_pretrained(MODELS / "gpt2-bpe")
    assert tokenizer.pad_token is None
    assert padding_id(tokenizer) == tokenizer.eos_token_id == 50256
    assert piece_encoder(tokenizer)("\nyes") == (198, 8505)


@pytest.mark.skipif(not MODELS.is_dir(), reason="the shared models are not here")
def test_a_llama_tokenizer_adds_no_beginning_token_to_a_piece():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "stories260K")
    assert tokenizer.bos_token_id not in piece_encoder(tokenizer)("\nyes")


def test_a_tokenizer_without_padding_and_end_is_refused():
    bare = train_tokenizer([])
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="a padding or an end token"):
        padding_id(bare)


def test_our_padding_token_is_what_we_pad_with():
    assert padding_id(OURS) == PAD_ID
