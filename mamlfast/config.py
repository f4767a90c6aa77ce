"""What a training run is: three groups of choices, and the flags of the command line.

Every field is a flag of the same name, with hyphens. Defaults are those of the embedded run, a tiny model from
scratch on the procedural suite; a run on other data or another model starts from ``REAL`` instead.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

Method = Literal["maml", "fomaml", "metaicl"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tasks come from and how they are shown.

    Raises:
        ValueError: a number out of range.
    """

    data: str = _option("procedural", "a MetaICL-layout folder, a hub data set, or the embedded 'procedural' suite")
    setting: str | None = _option(None, "the setting of the data folder, such as class_to_class")
    style: Literal["metaicl", "compact"] = _option("compact", "the strings between the pieces of a prompt")
    shots: int = _option(1, "exemplars in front of every target")
    max_length: int = _option(48, "the most tokens of a prompt")
    max_example_length: int = _option(0, "the most tokens of one example; 0: what lets all exemplars fit, up to 256")
    task_sampling: Literal["proportional", "uniform"] = _option("proportional", "how often a task is drawn")
    eval_tasks: int = _option(28, "the most tasks of each group, seen and unseen, to evaluate on")
    eval_examples: int = _option(16, "the most test examples of each of these")

    def __post_init__(self) -> None:
        _at_least(self, 0, "shots", "max_example_length")
        _at_least(self, 1, "max_length", "eval_tasks", "eval_examples")

    @property
    def example_length(self) -> int:
        """``max_example_length``, or what it stands for."""
        return self.max_example_length or min(256, self.max_length // (self.shots + 1))


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How the parameters are trained.

    Raises:
        ValueError: a number out of range.
    """

    method: Method = _option("maml", "exact second-order MAML, first-order MAML, or MetaICL (no inner loop)")
    max_steps: int = _option(400, "outer steps")
    num_tasks: int = _option(4, "tasks in a meta-batch")
    support_batch: int = _option(8, "support prompts of a task")
    query_batch: int = _option(24, "query prompts of a task")
    inner_steps: int = _option(1, "inner steps on the support")
    inner_lr: float = _option(0.2, "learning rate of the inner SGD")
    outer_lr: float = _option(5e-3, "peak learning rate of the outer AdamW")
    warmup: float = _option(0.05, "part of the run over which the outer learning rate rises, before its decay to 0")
    weight_decay: float = _option(0.0, "weight decay of the outer AdamW")
    clip: float = _option(1.0, "largest norm of the outer gradient")

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_steps", "num_tasks", "support_batch", "query_batch", "inner_steps")
        _at_least(self, 0, "inner_lr", "outer_lr", "warmup", "weight_decay", "clip")
        if self.warmup > 1:
            raise ValueError(f"warmup is a part of the run, at most 1; got {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The model, and where and how the run takes place.

    Raises:
        ValueError: a number out of range.
    """

    model: str = _option("tiny", "a preset (tiny, small), a local folder or a hub model")
    output: str = _option("out/train", "the folder to write; an earlier run's is replaced when this one ends well")
    seed: int = _option(0, "of data, initialisation and dropout; one seed gives one result")
    device: str = _option("cpu", "where to train, such as cpu or cuda")
    dtype: Literal["float32", "float64", "bfloat16"] = _option("float32", "of the parameters")
    threads: int = _option(1, "CPU threads; 0 lets PyTorch choose")

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed", "threads")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All choices of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def flat(self) -> dict[str, Any]:
        """Every choice under its flag's name."""
        groups = (self.data, self.method, self.run)
        return {entry.name: getattr(group, entry.name) for group in groups for entry in fields(group)}

    def replace(self, **choices: Any) -> "TrainConfig":
        """Return the configuration with some choices changed, by the names of their flags."""
        groups = {name: getattr(self, name) for name in ("data", "method", "run")}
        changed = {
            name: replace(group, **{e.name: choices[e.name] for e in fields(group) if e.name in choices})
            for name, group in groups.items()
        }
        return TrainConfig(**changed)


# Sentences of hundreds of tokens, and a model that knows its language: newlines, and fewer and smaller steps.
REAL = {
    "style": "metaicl",
    "shots": 2,
    "max_length": 384,
    "eval_tasks": 8,
    "max_steps": 100,
    "support_batch": 4,
    "query_batch": 8,
    "inner_lr": 0.05,
    "outer_lr": 1e-3,
    "threads": 0,
}

PRESETS = ("tiny", "small")


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """Return the configuration of a command line.

    Raises:
        ValueError: an unknown flag or a bad value, in one sentence.
        SystemExit: after ``--help``.
    """
    given = vars(_parser().parse_args(argv))
    embedded = given.get("data", "procedural") == "procedural" and given.get("model", "tiny") in PRESETS
    return TrainConfig().replace(**({} if embedded else REAL) | given)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours to report."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m mamlfast.train",
        description="Meta-train a causal language model with MAML-en-LLM: exact second-order meta-gradients.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for config in (DataConfig, MethodConfig, RunConfig):
        group, hints = (
            parser.add_argument_group(config.__name__.removesuffix("Config").lower()),
            get_type_hints(config),
        )
        for entry in fields(config):
            default = f"default: {entry.default}"
            if entry.name in REAL:
                default += f", on other data or models {REAL[entry.name]}"
            flag = "--" + entry.name.replace("_", "-")
            group.add_argument(flag, help=f"{entry.metadata['help']} ({default})", **_reading(hints[entry.name]))
    return parser


def _reading(hint: Any) -> dict[str, Any]:
    """Return how argparse reads a field of this type."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": hint if hint in (int, float) else str}


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= least):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be a finite number of at least {least}, got {value}")
