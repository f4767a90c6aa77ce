"""What a training run is: three groups of choices, and the flags of the command line.

Every field is a flag of the same name, with hyphens. Defaults are those of the embedded run, a tiny model from
scratch on the procedural suite; a loaded model and other data have some of their own.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

Method = Literal["maml", "fomaml", "metaicl"]
Attention = Literal["mamlfast", "sdpa", "eager"]


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
    max_steps: int = _option(600, "outer steps")
    num_tasks: int = _option(4, "tasks in a meta-batch")
    support_batch: int = _option(8, "support prompts of a task")
    query_batch: int = _option(24, "query prompts of a task")
    inner_steps: int = _option(1, "inner steps on the support")
    inner: Literal["sgd", "adam", "adamw"] = _option("sgd", "inner optimizer")
    inner_lr: float = _option(0.2, "learning rate of the inner optimizer; for adam about a hundredth of sgd's")
    inner_clip: float = _option(0.0, "largest norm of an inner gradient; 0: no limit")
    outer_lr: float = _option(5e-3, "peak learning rate of the outer AdamW")
    warmup: float = _option(0.05, "part of the run over which the outer learning rate rises, before its decay to 0")
    weight_decay: float = _option(0.0, "weight decay of the outer AdamW")
    clip: float = _option(1.0, "largest norm of the outer gradient")

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_steps", "num_tasks", "support_batch", "query_batch", "inner_steps")
        _at_least(self, 0, "inner_lr", "inner_clip", "outer_lr", "warmup", "weight_decay", "clip")
        if self.warmup > 1 or self.outer_lr > 1:
            raise ValueError(f"--warmup and --outer-lr must be at most 1, got {self.warmup} and {self.outer_lr}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The model, and where and how the run takes place.

    Raises:
        ValueError: a number out of range.
    """

    model: str = _option("tiny", "a preset (tiny, small) to build from scratch, a local folder or a hub model")
    output: str = _option("out/train", "the folder to write; an earlier run's is replaced when this one ends well")
    seed: int = _option(0, "of data, initialisation and dropout; one seed gives one result")
    device: str = _option("cpu", "where to train, such as cpu or cuda")
    dtype: Literal["float32", "float64", "bfloat16"] = _option("float32", "of the parameters")
    attn: Attention = _option("mamlfast", "the model's attention; meta-gradients use mamlfast's in place of sdpa too")
    threads: int = _option(0, "CPU threads; 0: one for a model below 5 million parameters, else PyTorch's choice")

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


# What differs for a model that was loaded: it knows newlines, and takes smaller steps.
LOADED_MODEL = {"style": "metaicl", "max_length": 128, "inner_lr": 0.01, "outer_lr": 3e-4}

# What differs for data other than the embedded: texts are long, so prompts and steps are fewer.
REAL_DATA = {
    "style": "metaicl",
    "shots": 2,
    "max_length": 256,
    "eval_tasks": 6,
    "max_steps": 60,
    "support_batch": 4,
    "query_batch": 8,
}

# Llamas to build from scratch. Wide initial weights let a random model already tell inputs apart, which is what its
# first adaptations have to work with.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, intermediate_size=192, initializer_range=0.12),
    "small": dict(hidden_size=128, num_hidden_layers=4, intermediate_size=384, initializer_range=0.09),
}


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """Return the configuration of a command line.

    Raises:
        ValueError: an unknown flag or a bad value, in one sentence.
        SystemExit: after ``--help``.
    """
    given = vars(_parser().parse_args(argv))
    default = TrainConfig()
    if given.get("model", default.run.model) not in PRESETS:
        default = default.replace(**LOADED_MODEL)
    if given.get("data", default.data.data) != default.data.data:
        default = default.replace(**REAL_DATA)
    return default.replace(**given)


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
            default += f"; a loaded model: {LOADED_MODEL[entry.name]}" if entry.name in LOADED_MODEL else ""
            default += f"; other data: {REAL_DATA[entry.name]}" if entry.name in REAL_DATA else ""
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
