"""How good a model is on few-shot tasks, before and after it adapts to them.

A test example stands behind the task's first shots, as it does in training. Where it has options, the option
with the smallest mean loss over its tokens is the prediction. Where it has none, the prediction counts if
greedy decoding would begin with the output, which one forward pass tells: every output token is the model's
first choice given those before it. The target loss is the mean over the tokens of the right output, in nats.

Adapting means the inner loop on all shots, each of them once the target behind others, never its own exemplar.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from statistics import fmean
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from mamlfast.data.batch import Batch, collate
from mamlfast.data.episodes import leave_one_out
from mamlfast.data.example import Example
from mamlfast.data.prompt import IGNORED, Prompter, Tokens
from mamlfast.data.tasks import FewShot
from mamlfast.meta import MetaLearner


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over examples: ``loss`` in nats a target token, ``accuracy`` in [0, 1]."""

    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task's score in context, and in context with adapted parameters."""

    task: str
    in_context: Score
    adapted: Score

    def to_json(self) -> dict[str, Any]:
        """Return the score as nested dictionaries."""
        return asdict(self)


def mean_score(scores: Sequence[Score]) -> Score:
    """Return the mean over tasks, every task counting alike."""
    return Score(loss=fmean(s.loss for s in scores), accuracy=fmean(s.accuracy for s in scores))


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores a causal LM on few-shot tasks.

    Attributes:
        prompter: turns examples into token ids.
        pad_id: the id to pad with.
        shots: exemplars in front of every target.
        max_tokens: the most padded tokens in a batch; what bounds the memory of the logits.
        max_candidates: the most prompts of a task; one with many options is scored on fewer examples.
    """

    prompter: Prompter
    pad_id: int
    shots: int
    max_tokens: int = 4096
    max_candidates: int = 64

    def evaluate(self, learner: MetaLearner, tasks: Sequence[FewShot]) -> Iterator[TaskScore]:
        """Score each task in context, then again with the learner's parameters adapted to its shots."""
        model = cast(PreTrainedModel, learner.model)
        training = model.training
        model.eval()
        try:
            for task in tasks:
                in_context = self.score(model, task)
                with learner.adapted([to_device(self.support(task), model.device)]):
                    adapted = self.score(model, task)
                yield TaskScore(task=task.name, in_context=in_context, adapted=adapted)
        finally:
            model.train(training)

    def support(self, task: FewShot) -> Batch:
        """Return the batch to adapt on: every shot a target, behind exemplars from the others."""
        rng = Random(task.name)
        prompts = leave_one_out(self.prompter, task.shots, targets=len(task.shots), shots=self.shots, rng=rng)
        return collate(prompts, pad_id=self.pad_id)

    def score(self, model: PreTrainedModel, task: FewShot) -> Score:
        """Score the model as it is on the task's test examples."""
        exemplars = task.shots[: self.shots]
        options = max(1, max(len(example.options) for example in task.test))
        test = task.test[: max(1, self.max_candidates // options)]
        choices = [self._choices(exemplars, example) for example in test]
        losses, exact = self._read(model, [prompt for prompts in choices for prompt in prompts])
        results, start = [], 0
        for example, prompts in zip(test, choices, strict=True):
            own = slice(start, start + len(prompts))
            results.append(_judge(example, losses[own], exact[own]))
            start = own.stop
        return mean_score(results)

    def _choices(self, exemplars: Sequence[Example], example: Example) -> list[Tokens]:
        """Return a prompt for each option, or the one with the output where there is no option."""
        if example.options:
            return self.prompter.candidates(exemplars, example)
        return [self.prompter.prompt(exemplars, example)]

    @torch.no_grad()
    def _read(self, model: PreTrainedModel, prompts: Sequence[Tokens]) -> tuple[list[float], list[bool]]:
        """Return the mean loss of each prompt's labels, and whether each label is the first choice."""
        losses, exact = [0.0] * len(prompts), [False] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids), reverse=True)
        while order:
            size = max(1, self.max_tokens // len(prompts[order[0]].input_ids))
            chosen, order = order[:size], order[size:]
            batch = to_device(collate([prompts[i] for i in chosen], pad_id=self.pad_id), model.device)
            for i, loss, right in zip(chosen, *_target_losses(model, batch), strict=True):
                losses[i], exact[i] = loss, right
        return losses, exact


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _judge(example: Example, losses: list[float], exact: list[bool]) -> Score:
    if not example.options:
        return Score(loss=losses[0], accuracy=float(exact[0]))
    right = example.options.index(example.output)
    return Score(loss=losses[right], accuracy=float(losses.index(min(losses)) == right))


def _target_losses(model: PreTrainedModel, batch: Batch) -> tuple[list[float], list[bool]]:
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits = logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    targets = labels != IGNORED
    exact = ((logits.argmax(-1) == labels) | ~targets).all(-1)
    return (losses.sum(-1) / targets.sum(-1).clamp(min=1)).tolist(), exact.tolist()
