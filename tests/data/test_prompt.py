"""Prompts read as MetaICL's do, and only the target's output carries labels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamlfast.data.example import Example
from mamlfast.data.prompt import COMPACT, IGNORED, METAICL, Prompter

# A character is a token: what a prompt holds can be read off it.
BY_CHARACTER = Prompter(encode=lambda text: [ord(c) for c in text])


def example(x: str, y: str, options: tuple[str, ...] = ()) -> Example:
    return Example(task="t", input=x, output=y, options=options)


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def labelled(labels: list[int]) -> str:
    return text([label for label in labels if label != IGNORED])


def test_a_prompt_joins_exemplars_and_target_with_metaicl_newlines():
    prompt = BY_CHARACTER.prompt([example("x1", "y1"), example("x2", "y2")], example("x", "y"))
    assert text(prompt.input_ids) == "x1\ny1\n\n\nx2\ny2\n\n\nx\ny"


def test_only_the_output_of_the_target_has_labels_its_newline_included():
    prompt = BY_CHARACTER.prompt([example("x1", "y1")], example("x", "answer"))
    assert labelled(prompt.labels) == "\nanswer"
    assert prompt.labels[-7:] == prompt.input_ids[-7:]


def test_without_exemplars_the_target_is_the_first_example():
    assert text(BY_CHARACTER.prompt([], example("x", "y")).input_ids) == "x\ny"


def test_an_empty_input_has_two_newlines_in_front():
    prompt = BY_CHARACTER.prompt([example("x1", "y1")], example("", "y"))
    assert text(prompt.input_ids) == "x1\ny1\n\n\ny"


def test_the_compact_style_puts_a_space_before_every_word():
    prompter = Prompter(encode=BY_CHARACTER.encode, style=COMPACT)
    prompt = prompter.prompt([example("a b", "c")], example("d e", "f"))
    assert text(prompt.input_ids) == " a b = c\n d e = f"
    assert labelled(prompt.labels) == " = f"


def test_pieces_are_tokenised_one_by_one():
    pieces = []

    def encode(piece: str) -> list[int]:
        pieces.append(piece)
        return [0]

    Prompter(encode=encode).prompt([example("x1", "y1")], example("x", "y"))
    assert sorted(pieces) == sorted(["x1", "\ny1", "\n\n\nx", "\ny"])


def test_a_long_input_keeps_its_beginning_and_the_output_stays_whole():
    prompter = Prompter(encode=BY_CHARACTER.encode, max_length=20, max_example_length=10)
    # Of the 10, two are reserved and 3 go to the output: 5 are left for the input.
    assert text(prompter.prompt([], example("abcdefgh", "yy")).input_ids) == "abcde\nyy"


def test_an_output_longer_than_an_example_is_cut_to_fit():
    prompter = Prompter(encode=BY_CHARACTER.encode, max_length=20, max_example_length=10)
    assert text(prompter.prompt([], example("abc", "y" * 30)).input_ids) == "\n" + "y" * 7


def test_a_long_prompt_keeps_its_end():
    prompter = Prompter(encode=BY_CHARACTER.encode, max_length=8, max_example_length=8)
    assert text(prompter.prompt([example("x1", "y1")], example("x", "y")).input_ids) == "y1\n\n\nx\ny"


def test_candidates_differ_in_their_last_piece_only_and_share_the_input_of_the_longest():
    prompter = Prompter(encode=BY_CHARACTER.encode, max_length=20, max_example_length=12)
    options = ("no", "perhaps")
    short, long = prompter.candidates([], example("abcdef", "no", options))
    assert text(short.input_ids) == "ab\nno" and text(long.input_ids) == "ab\nperhaps"
    assert [labelled(p.labels) for p in (short, long)] == ["\nno", "\nperhaps"]


@pytest.mark.parametrize(("example_length", "length"), [(3, 10), (11, 10)])
def test_lengths_that_leave_no_room_are_refused(example_length, length):
    with pytest.raises(ValueError, match="max_example_length must lie between 4 and max_length = 10"):
        Prompter(encode=BY_CHARACTER.encode, max_length=length, max_example_length=example_length)


TEXT = st.text(alphabet="ab\n é", max_size=30)


@given(
    pairs=st.lists(st.tuples(TEXT, TEXT), max_size=4),
    target=st.tuples(TEXT, TEXT),
    max_length=st.integers(4, 80),
    example_length=st.integers(4, 40),
    style=st.sampled_from((METAICL, COMPACT)),
)
def test_every_prompt_fits_and_ends_in_its_labelled_output(pairs, target, max_length, example_length, style):
    example_length = min(example_length, max_length)
    prompter = Prompter(
        encode=BY_CHARACTER.encode, style=style, max_length=max_length, max_example_length=example_length
    )
    ids, labels = prompter.prompt([example(*pair) for pair in pairs], example(*target))
    output = (style.output + target[1])[: example_length - 2]
    assert len(ids) == len(labels) <= max_length
    assert text(ids).endswith(output)
    assert labels == [IGNORED] * (len(ids) - len(output)) + ids[len(ids) - len(output) :]
