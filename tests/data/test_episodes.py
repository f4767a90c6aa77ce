"""Episodes are of one task, from disjoint examples, and depend on seed and number alone."""

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamlfast.data.episodes import EpisodeSampler, EpisodeShape, leave_one_out
from mamlfast.data.example import Example, Task
from mamlfast.data.prompt import Prompter

PROMPTER = Prompter(encode=lambda text: [ord(c) for c in text])
SHAPE = EpisodeShape(shots=2, support=3, query=4)


def numbered(name: str, count: int = 20) -> Task:
    return Task(name=name, examples=tuple(Example(task=name, input=f"{name}{i}", output=f"{i}") for i in range(count)))


def sampler(*tasks: Task, shape: EpisodeShape = SHAPE, **choices) -> EpisodeSampler:
    return EpisodeSampler(tasks or (numbered("a"), numbered("b")), PROMPTER, shape=shape, pad_id=0, **choices)


def equal(a: object, b: object) -> bool:
    flat = [[*e.support[0].values(), *e.query.values()] for e in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


@settings(max_examples=40)
@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_support_and_query_are_disjoint_and_of_one_task(shots, support, query, number):
    drawn = sampler(shape=EpisodeShape(shots=shots, support=support, query=query)).examples(number)
    task, support_examples, query_examples = drawn
    assert not set(support_examples) & set(query_examples)
    assert {e.task for e in support_examples + query_examples} == {task.name}


def test_an_episode_has_the_batches_of_its_shape():
    episode = sampler().episode(0)
    assert len(episode.support) == 1
    assert len(episode.support[0]["input_ids"]) == 3
    assert len(episode.query["input_ids"]) == 4


def test_no_prompt_of_the_query_shows_an_example_of_the_support():
    draws = sampler()
    _, support, _ = draws.examples(7)
    text = "".join(map(chr, draws.episode(7).query["input_ids"].flatten().tolist()))
    assert not any(f"{e.input}\n" in text for e in support)


def test_a_draw_depends_on_seed_and_number_alone():
    first, second, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    for number in range(3):
        second.episode(number)
    assert equal(first.episode(5), second.episode(5))
    assert not equal(first.episode(5), other.episode(5))


def test_a_run_continued_in_the_middle_meets_the_same_meta_batches():
    draws = sampler()
    later = draws.meta_batch(3, 2)
    assert equal(later[0], draws.episode(6)) and equal(later[1], draws.episode(7))


def test_an_exemplar_is_never_the_target_itself():
    examples = numbered("a", 5).examples
    for target, prompt in zip(
        examples, leave_one_out(PROMPTER, examples, targets=5, shots=4, rng=Random(0)), strict=True
    ):
        text = "".join(map(chr, prompt.input_ids))
        assert text.count(f"{target.input}\n") == 1
        assert all(text.count(f"{e.input}\n") == 1 for e in examples)


def test_fewer_others_than_shots_are_all_shown():
    (prompt,) = leave_one_out(PROMPTER, numbered("a", 2).examples, targets=1, shots=5, rng=Random(0))
    assert "".join(map(chr, prompt.input_ids)) == "a1\n1\n\n\na0\n0"


def test_tasks_are_drawn_in_proportion_to_their_size_or_all_alike():
    tasks = (numbered("small", 10), numbered("large", 90))
    share = {
        kind: Counter(sampler(*tasks, sampling=kind).examples(i)[0].name for i in range(2000))["small"] / 2000
        for kind in ("proportional", "uniform")
    }
    # Four standard deviations of 2,000 draws are below 0.05.
    assert abs(share["proportional"] - 0.1) < 0.05
    assert abs(share["uniform"] - 0.5) < 0.05


def test_tasks_too_small_for_an_episode_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="left out, for want of 7 examples: small"):
        draws = sampler(numbered("small", 6), numbered("large", 7))
    assert {draws.examples(i)[0].name for i in range(20)} == {"large"}


def test_no_task_large_enough_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="takes 7 examples of a task and no task has as many: use smaller"):
        sampler(numbered("small", 6))


@pytest.mark.parametrize("change", [{"shots": -1}, {"support": 0}, {"query": 0}])
def test_a_shape_without_prompts_is_refused(change):
    with pytest.raises(ValueError, match="shots >= 0, support >= 1 and query >= 1"):
        EpisodeShape(**({"shots": 1, "support": 1, "query": 1} | change))
