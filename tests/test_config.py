"""A command line becomes a configuration, or one sentence about what is wrong with it."""

from dataclasses import fields

import pytest

from mamlfast.config import LOADED_MODEL, PRESETS, REAL_DATA, TrainConfig, parse_args


def test_no_flags_give_the_embedded_run():
    assert parse_args([]) == TrainConfig()


def test_every_choice_is_a_flag_of_its_name():
    for name, value in TrainConfig().flat.items():
        if value is not None:
            given = parse_args([f"--{name.replace('_', '-')}", str(value)])
            assert given.flat[name] == value


def test_groups_share_no_name_and_every_choice_is_explained():
    config = TrainConfig()
    groups = [fields(config.data), fields(config.method), fields(config.run)]
    assert len(config.flat) == sum(map(len, groups))
    assert all(entry.metadata["help"] for group in groups for entry in group)


def test_other_data_bring_defaults_of_their_own():
    flat = parse_args(["--data", "folder", "--setting", "mini"]).flat
    assert {name: flat[name] for name in REAL_DATA} == REAL_DATA
    assert flat["inner_lr"] == TrainConfig().method.inner_lr


def test_a_loaded_model_brings_defaults_of_its_own_and_a_preset_does_not():
    flat = parse_args(["--model", "gpt2"]).flat
    assert {name: flat[name] for name in LOADED_MODEL} == LOADED_MODEL
    assert [parse_args(["--model", preset]).method for preset in PRESETS] == [TrainConfig().method] * len(PRESETS)


def test_a_flag_outweighs_every_default():
    flat = parse_args("--model gpt2 --data folder --max-length 77 --inner-lr 0.5".split()).flat
    assert (flat["max_length"], flat["inner_lr"]) == (77, 0.5)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--shots -1", "--shots must be a finite number of at least 0, got -1"),
        ("--max-steps 0", "--max-steps must be a finite number of at least 1, got 0"),
        ("--inner-lr nan", "--inner-lr must be a finite number of at least 0, got nan"),
        ("--outer-lr inf", "--outer-lr must be a finite number of at least 0, got inf"),
        ("--num-tasks 1.5", "argument --num-tasks: invalid int value: '1.5'"),
        ("--method reptile", "argument --method: invalid choice: 'reptile'"),
        ("--attn flash_attention_2", "argument --attn: invalid choice: 'flash_attention_2'"),
        ("--warmup 2", "--warmup and --outer-lr must be at most 1, got 2.0 and 0.005"),
        ("--outer-lr 1e38", "--warmup and --outer-lr must be at most 1, got 0.05 and 1e+38"),
        ("--inner-step 2", "unrecognized arguments: --inner-step 2"),
    ],
)
def test_a_bad_flag_is_one_sentence(argv, sentence):
    with pytest.raises(ValueError) as raised:
        parse_args(argv.split())
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(("shots", "length", "given", "expected"), [(1, 48, 0, 24), (0, 512, 0, 256), (3, 48, 20, 20)])
def test_examples_get_an_equal_share_of_the_prompt_unless_told_otherwise(shots, length, given, expected):
    data = TrainConfig().replace(shots=shots, max_length=length, max_example_length=given).data
    assert data.example_length == expected
