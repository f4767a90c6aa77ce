"""Scores are what their definitions say, and scoring leaves the model as it was."""

from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mamlfast.data.batch import collate
from mamlfast.data.example import Example
from mamlfast.data.prompt import IGNORED, Prompter, PromptStyle
from mamlfast.data.tasks import FewShot
from mamlfast.evaluation import Score, Scorer, mean_score
from mamlfast.inner import SGD
from mamlfast.meta import MetaLearner

# Texts are numbers, a number is a token: " 7" separates input from output, " 8" examples.
STYLE = PromptStyle(first="", later=" 8 ", later_empty=" 8 ", output=" 7 ")
PROMPTER = Prompter(encode=lambda text: [int(part) for part in text.split()], style=STYLE)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, max_position_embeddings=64, initializer_range=0.3))


def scorer(shots: int = 1, **choices) -> Scorer:
    return Scorer(prompter=PROMPTER, pad_id=0, shots=shots, **choices)


def example(x: str, y: str, options: Sequence[str] = ()) -> Example:
    return Example(task="t", input=x, output=y, options=tuple(options))


def classification(count: int = 6) -> FewShot:
    """Labels "20" and "21 22" by the parity of a number."""
    labels = ("20", "21 22")
    examples = [example(str(9 + i % 11), labels[i % 2], labels) for i in range(2 * count)]
    return FewShot(name="parity", shots=tuple(examples[:count]), test=tuple(examples[count:]))


def target_loss(model: LlamaForCausalLM, task: FewShot, target: Example, output: str) -> float:
    """The mean loss of one output behind the task's first shot, by the model's own loss."""
    prompt = PROMPTER.prompt(task.shots[:1], example(target.input, output))
    return model(**collate([prompt], pad_id=0)).loss.item()


def test_loss_and_accuracy_are_those_of_candidates_scored_one_by_one(model):
    task = classification()
    score = scorer().score(model, task)
    losses = [{o: target_loss(model, task, e, o) for o in e.options} for e in task.test]
    right = [min(by_option, key=by_option.get) == e.output for by_option, e in zip(losses, task.test, strict=True)]
    expected = [by_option[e.output] for by_option, e in zip(losses, task.test, strict=True)]
    assert score.accuracy == sum(right) / len(right)
    # Padding and batching change float32 sums in their last digits.
    assert score.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_without_options_an_example_counts_if_greedy_decoding_begins_with_its_output(model):
    shot, x = example("9", "20"), "10 11"
    context = torch.tensor([PROMPTER.prompt([shot], example(x, "0")).input_ids[:-1]])
    greedy = model.generate(context, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    decoded = greedy[0, context.shape[1] :].tolist()
    # The separator is the first token of every output; the model did not choose it here.
    labels = torch.tensor([PROMPTER.prompt([shot], example(x, "0")).labels])
    assert labels[0, -2] == 7
    style = PromptStyle(first="", later=" 8 ", later_empty=" 8 ", output=" ")
    bare = Scorer(prompter=Prompter(encode=PROMPTER.encode, style=style), pad_id=0, shots=0)
    prefix = " ".join(map(str, context[0].tolist()))
    right = example(prefix, " ".join(map(str, decoded)))
    wrong = example(prefix, " ".join(map(str, [*decoded[:2], (decoded[2] + 1) % 32])))
    assert [bare.score(model, FewShot(name="t", shots=(shot,), test=(e,))).accuracy for e in (right, wrong)] == [1, 0]


def test_the_size_of_the_batches_changes_no_score(model):
    task = classification()
    one, many = scorer(max_tokens=1).score(model, task), scorer(max_tokens=4096).score(model, task)
    assert one.accuracy == many.accuracy
    assert one.loss == pytest.approx(many.loss, rel=1e-5)


def test_a_task_with_many_options_is_scored_on_fewer_examples(model):
    task = classification()
    fewer = FewShot(name="parity", shots=task.shots, test=task.test[:2])
    assert scorer(max_candidates=4).score(model, task) == scorer().score(model, fewer)


def test_the_batch_to_adapt_on_has_every_shot_as_a_target_once():
    task = classification()
    batch = scorer().support(task)
    targets = [
        tuple(ids[labels != IGNORED].tolist()) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert targets == [tuple(PROMPTER.prompt([], e).input_ids[1:]) for e in task.shots]
    assert torch.equal(batch["input_ids"], scorer().support(task)["input_ids"])


def test_adapting_lowers_the_loss_and_leaves_the_model_as_it_was(model):
    learner = MetaLearner(model, inner=SGD(lr=0.3), steps=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    (score,) = scorer().evaluate(learner, [classification()])
    assert score.adapted.loss < 0.7 * score.in_context.loss
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_training_mode_comes_back_after_an_error(model):
    learner = MetaLearner(model, inner=SGD(lr=1e30), steps=2)
    model.train()
    with pytest.raises(ValueError, match="finite"):
        list(scorer().evaluate(learner, [classification()]))
    assert model.training


def test_every_task_counts_alike_in_a_mean():
    mean = mean_score([Score(loss=1.0, accuracy=0.0), Score(loss=2.0, accuracy=1.0)])
    assert mean == Score(loss=1.5, accuracy=0.5)
