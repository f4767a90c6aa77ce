"""Proves the second order of a model: ``python -m mamlfast.check --model PATH_OR_HUB_NAME``.

Prints the table of ``mamlfast.check(model, batch)`` on a batch of random tokens. The exit code is 0 where the second
order is exact, 1 where it is not, 2 after bad input.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mamlfast.checking import CheckResult, check
from mamlfast.data.source import is_path

# Below so many parameters threads wait for each other longer than they compute.
SMALL = 5_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 exact, 1 not exact, 2 after bad input, 130 after an interrupt."""
    given = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"mamlfast.check: {message}", file=sys.stderr)
            result = run(given)
            print(result)
            if given.json is not None:
                given.json.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print("mamlfast.check: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, NotImplementedError, OSError, torch.OutOfMemoryError) as error:
        print(f"mamlfast.check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if result.ok else 1


def run(given: argparse.Namespace) -> CheckResult:
    """Load the model, draw the batch, check.

    Raises:
        ValueError: model, device or batch cannot be used.
    """
    device = _device(given.device)
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise ValueError(f"--json {given.json} cannot be written: its folder does not exist")
    model = load_model(given.model, given.dtype, given.attn)
    torch.nn.Module.to(model, device=device)
    threads = torch.get_num_threads()
    try:
        if model.num_parameters() < SMALL:
            torch.set_num_threads(1)
        return check(model, random_batch(model, given.batch, given.tokens, given.seed), seed=given.seed)
    finally:
        torch.set_num_threads(threads)


def load_model(name: str, dtype: str, attn: str | None) -> PreTrainedModel:
    """Load a model from a local folder or, failing that, the hub; ``dtype`` "auto" is that of the checkpoint.

    Raises:
        ValueError: there is none of that name, or it is no causal LM.
    """
    if is_path(name) and not Path(name).is_dir():
        raise ValueError(f"model folder {name} does not exist")
    options = {} if attn is None else {"attn_implementation": attn}
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except Exception as error:  # transformers, safetensors and the hub each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model {name} could not be loaded as a causal LM: {reason}") from error


def random_batch(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Tokens drawn alike from the whole vocabulary, [batch, tokens], which are their own labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, tokens), generator=generator)
    return {"input_ids": ids.to(model.device), "labels": ids.to(model.device)}


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamlfast.check",
        description="Prove that the second order of a causal language model is exact, or name what breaks it.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a local folder or a hub model")
    parser.add_argument("--batch", type=_count(1), default=2, help="sequences (default: 2)")
    parser.add_argument("--tokens", type=_count(2), default=32, help="tokens of each (default: 32)")
    parser.add_argument("--seed", type=_count(0), default=0, help="of tokens and directions (default: 0)")
    dtypes = ("auto", "float32", "float64", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument("--attn", help="the attention to load the model with, such as eager, sdpa, mamlfast")
    parser.add_argument("--device", default="cpu", help="where to check, such as cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    return parser


def _count(least: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
# Who imports this file, in whatever order, gets the function of the same name: an import would otherwise put the
# module in its place in the package, and mamlfast.check(model, batch) would fail from there on.
sys.modules[__name__] = check  # pyright: ignore[reportArgumentType]
