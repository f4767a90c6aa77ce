"""Meta-trains a causal language model: ``python -m mamlfast.train``.

A step draws a few tasks, adapts to each on its support prompts, and moves the unadapted parameters down the
gradient of the query loss through that adaptation (MAML), or past it (first-order MAML); MetaICL trains on the
same prompts without any adaptation. AdamW outside, linear decay after a short rise, clipping.

Before and after, the model is scored on few-shot tasks of the kinds it trains on and of kinds it does not.
"""

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mamlfast.adjoint import FirstOrder, Replay
from mamlfast.attention_interface import serves
from mamlfast.config import PRESETS, Attention, MethodConfig, TrainConfig, parse_args
from mamlfast.data.episodes import EpisodeSampler, EpisodeShape
from mamlfast.data.prompt import COMPACT, IGNORED, METAICL, Prompter
from mamlfast.data.source import is_path, read_suite
from mamlfast.data.tasks import FewShot, Suite
from mamlfast.data.tokenizer import END_ID, PAD_ID, padding_id, piece_encoder, train_tokenizer
from mamlfast.episode import Episode
from mamlfast.evaluation import Scorer, mean_score, to_device
from mamlfast.inner import SGD, Adam, AdamW
from mamlfast.meta import MetaLearner, MetaLosses
from mamlfast.report import CURVE_FILE, Metrics, OutputFolder, draw_curve, table, write_config

# Below so many parameters threads wait for each other longer than they compute, on a busy machine 20 times as long.
SMALL = 5_000_000
_INNER = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
_STYLES = {"metaicl": METAICL, "compact": COMPACT}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 after bad input, 130 after an interrupt."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"mamlfast.train: {message}", file=sys.stderr)
            train(parse_args(argv))
    except KeyboardInterrupt:
        print("mamlfast.train: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, NotImplementedError, OSError, torch.OutOfMemoryError) as error:
        print(f"mamlfast.train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run works with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    suite: Suite
    learner: MetaLearner
    sampler: EpisodeSampler
    scorer: Scorer


def train(config: TrainConfig) -> None:
    """Train, evaluate before and after, write the output folder and print the table.

    Raises:
        ValueError: data, model or output folder cannot be used, or a loss is not finite.
    """
    with OutputFolder(Path(config.run.output)) as folder, reproducibly(config):
        run = prepare(config)
        folder.require(2 * sum(p.numel() * p.element_size() for p in run.model.parameters()))
        metrics = Metrics(folder.draft)
        before = evaluate(run, config, metrics, "before")
        meta_train(run, config, metrics)
        after = evaluate(run, config, metrics, "after")
        save(run, config, metrics, folder.draft)
    rows = {name: (before[name], after[name]) for name in before}
    print(table(rows, ("before training", "after training")))
    print(_LEGEND.format(steps=config.method.inner_steps))
    print(f"Written to {config.run.output}: the checkpoint, metrics.jsonl, train_config.json, learning_curve.png.")


_LEGEND = """\
Loss: nats a target token. Accuracy: of the option with the smallest loss or, without options, of greedy decoding.
Adapted: after {steps} inner step(s) on the task's shots. Unseen: tasks that training had no example of."""


@contextmanager
def reproducibly(config: TrainConfig) -> Iterator[None]:
    """Seed PyTorch and, on a CPU, ask it for deterministic operations; its settings come back on exit."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    try:
        torch.manual_seed(config.run.seed)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        torch.use_deterministic_algorithms(deterministic or config.run.device == "cpu")
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def prepare(config: TrainConfig) -> Run:
    """Read the data, load or build the model, and put the pieces together.

    Raises:
        ValueError: data or model cannot be used, or prompts would not fit the model.
    """
    data, method = config.data, config.method
    suite = read_suite(data.data, data.setting, seed=config.run.seed, test=data.eval_examples)
    if config.run.model in PRESETS:
        tokenizer, model = build_model(config, suite)
    else:
        tokenizer, model = load_model(config.run.model, config.run.attn)
    if not config.run.threads and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    _check_fit(model, tokenizer, data.max_length)
    torch.nn.Module.to(model, device=_device(config.run.device), dtype=getattr(torch, config.run.dtype))
    prompter = Prompter(
        encode=piece_encoder(tokenizer),
        style=_STYLES[data.style],
        max_length=data.max_length,
        max_example_length=data.example_length,
    )
    pad_id = padding_id(tokenizer)
    sampler = EpisodeSampler(
        suite.train,
        prompter,
        shape=EpisodeShape(shots=data.shots, support=method.support_batch, query=method.query_batch),
        pad_id=pad_id,
        seed=config.run.seed,
        sampling=data.task_sampling,
    )
    adjoint = FirstOrder() if method.method == "fomaml" else Replay()
    # Prompts are short: keeping activations costs little and saves a forward.
    inner = _INNER[method.inner](lr=method.inner_lr, clip=method.inner_clip or None)
    learner = MetaLearner(model, inner=inner, steps=method.inner_steps, adjoint=adjoint, recompute=False)
    scorer = Scorer(prompter=prompter, pad_id=pad_id, shots=data.shots)
    return Run(model=model, tokenizer=tokenizer, suite=suite, learner=learner, sampler=sampler, scorer=scorer)


def build_model(config: TrainConfig, suite: Suite) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Train a tokenizer on the training tasks' texts and build a preset's Llama around it, from scratch."""
    style = _STYLES[config.data.style]
    texts = (
        style.later + example.input + style.output + example.output for task in suite.train for example in task.examples
    )
    tokenizer = train_tokenizer(texts)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=max(128, config.data.max_length),
        tie_word_embeddings=True,
        num_attention_heads=4,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=END_ID,
        # Prompts of a few dozen tokens leave a longer rotary period unused.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        **PRESETS[config.run.model],
    )
    model = LlamaForCausalLM(llama)
    model.set_attn_implementation(config.run.attn)
    return tokenizer, model


def load_model(name: str, attn: Attention) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a model and its tokenizer from a local folder or, failing that, the hub.

    Raises:
        ValueError: there is none of that name, or it is no causal LM with a tokenizer, or not one for ``attn``.
    """
    if is_path(name) and not Path(name).is_dir():
        raise ValueError(f"model folder {name} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        padding_id(tokenizer)  # raises where there is nothing to pad with
        # Under our name some models with an attention of their own cannot be built, and others are built wrong.
        first = "eager" if attn == "mamlfast" else attn
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=first)
    except Exception as error:  # transformers, safetensors and the hub each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model {name} could not be loaded as a causal LM with a tokenizer: {reason}") from error
    if attn == "mamlfast":
        if not serves(type(model)):
            raise ValueError(f"model {name} has an attention of its own, which cannot be mamlfast's: try --attn eager")
        model.set_attn_implementation(attn)
    return tokenizer, model


def _check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"--max-length must be at most the model's {positions} positions, got {max_length}")
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries and the model embeds {rows}: they do not match")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error


def save(run: Run, config: TrainConfig, metrics: Metrics, folder: Path) -> None:
    """Write checkpoint, tokenizer, configuration and learning curve.

    Raises:
        ValueError: something could not be written.
    """
    try:
        run.model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        write_config(folder, config.flat | {"versions": {name: version(name) for name in ("torch", "transformers")}})
        draw_curve(folder / CURVE_FILE, metrics.steps, f"{config.method.method} on {Path(config.data.data).name}")
    except Exception as error:  # safetensors and tokenizers report a full disk by exceptions of their own
        raise ValueError(f"output folder {config.run.output} cannot be written ({error})") from error


def evaluate(run: Run, config: TrainConfig, metrics: Metrics, when: str) -> dict[str, tuple[float, float]]:
    """Score the seen and the unseen tasks; return accuracy and loss for each row of the table."""
    rows: dict[str, tuple[float, float]] = {}
    for group, tasks in (("seen", run.suite.seen), ("unseen", run.suite.unseen)):
        chosen = spread(tasks, config.data.eval_tasks)
        scores = run.scorer.evaluate(run.learner, chosen)
        scores = list(tqdm(scores, f"evaluating {when} training, {group}", len(chosen), leave=False))
        for score in scores:
            metrics.evaluation(when=when, group=group, **score.to_json())
        for row, part in (("in context", "in_context"), ("adapted", "adapted")):
            mean = mean_score([getattr(score, part) for score in scores])
            rows[f"{group}, {row}"] = (mean.accuracy, mean.loss)
    return rows


def spread(tasks: Sequence[FewShot], count: int) -> list[FewShot]:
    """Return at most ``count`` of the tasks, evenly spread."""
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


def meta_train(run: Run, config: TrainConfig, metrics: Metrics) -> None:
    """Take the outer steps, each with a record and its losses on the progress bar.

    Raises:
        ValueError: a loss or a gradient is not finite.
    """
    method = config.method
    optimizer = torch.optim.AdamW(
        run.model.parameters(), lr=method.outer_lr, betas=(0.9, 0.99), weight_decay=method.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, method.max_steps, method.warmup))
    run.model.train()
    tokens = 0
    with tqdm(range(method.max_steps), f"{method.method}, {Path(config.run.model).name}", unit="step") as bar:
        for step in bar:
            episodes = [_moved(episode, run.model.device) for episode in run.sampler.meta_batch(step, method.num_tasks)]
            record = backward(run, method, episodes)
            if not all(map(math.isfinite, record.values())):
                raise ValueError(f"outer step {step} met {record}, not finite; lower --outer-lr or --inner-lr")
            metrics.step(step=step, **record, lr=schedule.get_last_lr()[0])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tokens += sum(int(batch["attention_mask"].sum()) for e in episodes for batch in (*e.support, e.query))
            bar.set_postfix_str(_progress(record, tokens / max(bar.format_dict["elapsed"], 1e-9)), refresh=False)


def backward(run: Run, method: MethodConfig, episodes: Sequence[Episode]) -> dict[str, float]:
    """Fill the model's gradients, clipped; return the losses and the gradient's norm before."""
    joint = method.method == "metaicl"
    losses = joint_backward(run.model, episodes) if joint else run.learner.backward(episodes)
    return {
        "query_loss": losses.query.mean().item(),
        "support_loss": losses.support[:, 0].mean().item(),
        "grad_norm": clip_grad_norm_(run.model.parameters(), method.clip or math.inf).item(),
    }


def _progress(record: Mapping[str, float], rate: float) -> str:
    return f"query {record['query_loss']:.3f}, support {record['support_loss']:.3f}, {rate:,.0f} tokens/s"


def joint_backward(model: PreTrainedModel, episodes: Sequence[Episode]) -> MetaLosses:
    """MetaICL: the gradient of one loss over support and query alike, without an inner loop.

    Adds to ``p.grad`` the mean over the episodes; every target token of an episode counts alike.
    """
    query, support = [], []
    for episode in episodes:
        batches = [*episode.support, episode.query]
        weights = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]
        losses = [model(**batch, use_cache=False).loss for batch in batches]
        total = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)
        (total / len(episodes)).backward()
        query.append(losses[-1].detach())
        support.append(torch.stack(losses[:-1]).detach())
    return MetaLosses(query=torch.stack(query), support=torch.stack(support))


def _rate(step: int, steps: int, warmup: float) -> float:
    """Rise linearly over the warm-up, then fall linearly; never 0 before the last step is taken."""
    rising = max(1, round(warmup * steps))
    return (step + 1) / rising if step < rising else (steps - step) / (steps - rising + 1)


def _moved(episode: Episode, device: torch.device) -> Episode:
    return Episode(
        support=[to_device(batch, device) for batch in episode.support],
        query=to_device(episode.query, device),
    )


if __name__ == "__main__":
    sys.exit(main())
