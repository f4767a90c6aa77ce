"""The command trains, writes a checkpoint that loads, repeats itself to the bit, and fails in one sentence."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import mamlfast.train
from mamlfast.config import parse_args
from mamlfast.data.batch import collate
from mamlfast.data.prompt import IGNORED, Tokens
from mamlfast.data.tokenizer import train_tokenizer
from mamlfast.episode import Episode
from mamlfast.inner import SGD, Adam, AdamW
from mamlfast.train import backward, joint_backward, main, prepare, reproducibly, spread
from tests.models import float64_throughout, overall_error, relative_error

FILES = {"config.json", "model.safetensors", "tokenizer.json", "train_config.json", "metrics.jsonl"}
QUICK = "--max-steps 3 --num-tasks 2 --support-batch 3 --query-batch 3 --eval-tasks 2 --eval-examples 2".split()


def embedded(output: Path, *flags: str) -> int:
    """Run the command on the embedded suite."""
    return main([*QUICK, "--output", str(output), *flags])


def mini_data(folder: Path, *, lines: Sequence[str] = (), train: Sequence[str] = ("pool",)) -> Path:
    """Write a MetaICL-layout folder with one pool and one target; ``lines`` stand for the pool's."""
    rows = [
        json.dumps({"input": f"text {i}", "output": ("good", "bad")[i % 2], "options": ["good", "bad"]})
        for i in range(80)
    ]
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "mini.json").write_text(json.dumps({"train": train, "test": ["target"]}))
    files = {"pool_16384_100_train": lines or rows, "target_16_100_train": rows[:16], "target_16_100_test": rows[16:]}
    for name, content in files.items():
        path = folder / "data" / name.partition("_")[0] / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(content) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small folder of data."""
    return mini_data(tmp_path_factory.mktemp("data") / "mini")


@pytest.fixture
def run(data) -> Callable[..., int]:
    """Run the command on a small folder of data: ``run(output, *flags)``."""
    return lambda output, *flags: embedded(output, "--data", str(data), "--setting", "mini", *flags)


def records(output: Path, event: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> dict[str, Path]:
    """The output folder of a quick run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("maml", "fomaml", "metaicl"):
        flags = ["--data", str(data), "--setting", "mini", "--method", method]
        assert embedded(folder / method, *flags) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["maml", "fomaml", "metaicl"])
def test_a_run_leaves_a_checkpoint_its_records_and_its_curve(finished, method):
    output = finished[method]
    assert {path.name for path in output.iterdir()} >= FILES | {"learning_curve.png"}
    assert json.loads((output / "train_config.json").read_text())["method"] == method
    assert [record["step"] for record in records(output, "step")] == [0, 1, 2]
    assert all(math.isfinite(record["query_loss"]) for record in records(output, "step"))
    evaluations = records(output, "evaluation")
    assert {(r["when"], r["group"]) for r in evaluations} == {
        (when, group) for when in ("before", "after") for group in ("seen", "unseen")
    }


def test_the_checkpoint_is_the_trained_model_with_its_tokenizer(finished):
    model = AutoModelForCausalLM.from_pretrained(finished["maml"])
    tokenizer = AutoTokenizer.from_pretrained(finished["maml"])
    assert model.config.vocab_size == len(tokenizer)
    logits = model(torch.tensor([tokenizer.encode(" cat sun = ")])).logits
    assert logits.isfinite().all()


def test_the_methods_start_alike_and_end_apart(finished):
    before = [
        [r["in_context"] for r in records(output, "evaluation") if r["when"] == "before"]
        for output in finished.values()
    ]
    assert before[0] == before[1] == before[2]
    weights = [AutoModelForCausalLM.from_pretrained(output).lm_head.weight for output in finished.values()]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_one_seed_gives_the_same_bytes_and_another_seed_does_not(finished, run, tmp_path):
    assert run(tmp_path / "again") == 0
    for name in ("model.safetensors", "metrics.jsonl", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished["maml"] / name).read_bytes(), name
    assert run(tmp_path / "other", "--seed", "1") == 0
    other = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert other != (finished["maml"] / "model.safetensors").read_bytes()


def adapted_loss(output: Path, when: str) -> float:
    """The mean loss on unseen tasks, adapted."""
    losses = [
        r["adapted"]["loss"] for r in records(output, "evaluation") if (r["when"], r["group"]) == (when, "unseen")
    ]
    return sum(losses) / len(losses)


def test_the_embedded_run_lowers_the_loss_on_unseen_families(tmp_path):
    assert embedded(tmp_path / "out", "--max-steps", "25", "--eval-tasks", "8") == 0
    assert adapted_loss(tmp_path / "out", "after") < 0.8 * adapted_loss(tmp_path / "out", "before")


def test_the_table_shows_every_group_in_context_and_adapted(run, tmp_path, capsys):
    assert run(tmp_path / "out", "--max-steps", "1") == 0
    out = capsys.readouterr().out
    for row in ("seen, in context", "seen, adapted", "unseen, in context", "unseen, adapted"):
        assert row in out
    assert "before training" in out and "after training" in out


def test_the_state_of_pytorch_comes_back(run, tmp_path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert run(tmp_path / "out", "--max-steps", "1", "--threads", "2") == 0
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_a_warning_is_one_line_of_the_command(tmp_path, capsys):
    data = mini_data(tmp_path / "data", train=["pool", "target"])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert embedded(tmp_path / "out", "--data", str(data), "--setting", "mini", "--max-steps", "1") == 0
    warned = "mamlfast.train: mini lists ['target'] for training and as targets: not trained on"
    assert warned in capsys.readouterr().err.splitlines()


def test_a_preset_trains_on_a_folder_of_data(finished):
    assert {r["task"] for r in records(finished["maml"], "evaluation")} == {"pool", "target"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Path:
    """A model folder with 40 positions."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=40)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_model_trains_and_its_folder_stays_as_it_was(loaded, run, tmp_path):
    before = {path.name: path.read_bytes() for path in loaded.iterdir()}
    assert run(tmp_path / "out", "--model", str(loaded), "--max-length", "40") == 0
    assert {path.name: path.read_bytes() for path in loaded.iterdir()} == before
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before["model.safetensors"]


@pytest.fixture(scope="module")
def own_attention(tmp_path_factory) -> Path:
    """A folder with a model that does not call its attention through transformers' interface."""
    folder, tokenizer = tmp_path_factory.mktemp("gptj"), train_tokenizer([])
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 40}
    GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_an_attention_of_its_own_trains_on_eager(own_attention, run, tmp_path):
    flags = ["--max-steps", "1", "--max-length", "40", "--attn", "eager"]
    assert run(tmp_path / "out", "--model", str(own_attention), *flags) == 0


@pytest.mark.parametrize("attn", ["mamlfast", "sdpa"])
def test_an_attention_gives_the_meta_gradient_of_eager(attn, data):
    assert relative_error(meta_gradient(data, attn), meta_gradient(data, "eager")) < 1e-10


def test_a_first_order_meta_gradient_is_another(data):
    exact, first = (meta_gradient(data, "eager", "--method", method) for method in ("maml", "fomaml"))
    assert overall_error(first, exact) > 1e-3


def meta_gradient(data: Path, attn: str, *flags: str) -> dict[str, torch.Tensor]:
    """The first step's, in float64."""
    choices = ["--data", str(data), "--setting", "mini", "--dtype", "float64", "--clip", "0", "--attn", attn, *flags]
    config = parse_args([*QUICK, *choices])
    with reproducibly(config), float64_throughout():
        run = prepare(config)
        assert run.model.config._attn_implementation == attn
        backward(run, config.method, run.sampler.meta_batch(0, 2))
    return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


def test_the_checkpoint_does_not_insist_on_the_attention_of_its_training(finished):
    assert "mamlfast" not in (finished["maml"] / "config.json").read_text()


BAD_INPUT = {
    "flag": (["--max-steps", "none"], "argument --max-steps: invalid int value"),
    "range": (["--inner-lr", "-1"], "--inner-lr must be a finite number of at least 0, got -1"),
    "model": (["--model", "{tmp}/none"], "model folder {tmp}/none does not exist"),
    "no model": (["--model", "{tmp}"], "model {tmp} could not be loaded as a causal LM with a tokenizer"),
    "attention": (["--model", "{own}"], "has an attention of its own, which cannot be mamlfast's: try --attn eager"),
    "data": (["--data", "{tmp}/none"], "data folder {tmp}/none does not exist"),
    "setting": (["--setting", "maxi"], "unknown setting 'maxi'; {data} has mini"),
    "corrupt": (
        ["--data", "{bad}"],
        "{bad}/data/pool/pool_16384_100_train.jsonl, line 2: expected",
    ),
    "positions": (
        ["--model", "{model}", "--max-length", "41"],
        "--max-length must be at most the model's 40 positions",
    ),
    "device": (["--device", "abacus"], "--device abacus cannot be used"),
    "small tasks": (["--support-batch", "1000"], "an episode takes 1003 examples of a task and no task has as many"),
    "lengths": (["--max-length", "3"], "max_example_length must lie between 4 and max_length = 3"),
    "nan": (["--inner-lr", "1e38"], "finite"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(case, data, loaded, own_attention, run, tmp_path, capsys):
    bad = mini_data(tmp_path / "bad", lines=['{"input": "x", "output": "y"}', "{broken"])
    places = {"tmp": tmp_path, "data": data, "model": loaded, "own": own_attention, "bad": bad}
    before = sorted(tmp_path.rglob("*"))
    flags, sentence = BAD_INPUT[case]
    assert run(tmp_path / "out", *(flag.format(**places) for flag in flags)) == 2
    said = [line for line in capsys.readouterr().err.split("\n") if line.startswith("mamlfast.train: ")]
    assert len(said) == 1
    assert sentence.format(**places) in said[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_folder_without_a_setting_is_refused(data, tmp_path, capsys):
    assert embedded(tmp_path / "out", "--data", str(data)) == 2
    assert capsys.readouterr().err == f"mamlfast.train: a data folder needs a setting; {data} has mini\n"


def test_an_outer_step_that_is_not_finite_says_what_to_lower(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mamlfast.train, "backward", lambda *_: {"query_loss": math.nan})
    assert run(tmp_path / "out") == 2
    assert "outer step 0 met {'query_loss': nan}, not finite; lower --outer-lr" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_said_before_training(run, capsys, monkeypatch):
    monkeypatch.setattr(mamlfast.train, "meta_train", lambda *_: pytest.fail("it trained"))
    assert run(Path("/proc/run")) == 2
    assert capsys.readouterr().err.startswith("mamlfast.train: output folder /proc/run cannot be written")


def test_a_disk_that_fills_up_at_the_end_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    assert run(tmp_path / "out", "--max-steps", "1") == 2
    sentence = f"mamlfast.train: output folder {tmp_path}/out cannot be written (I/O error: No space left on device)"
    assert sentence in capsys.readouterr().err.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_with_a_line_and_no_folder(tmp_path):
    command = [sys.executable, "-m", "mamlfast.train", "--max-steps", "100000", "--eval-tasks", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell lets its background jobs ignore interrupts, and so would the child of tests that run as one.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            while not (drafts := list(tmp_path.glob(".out.partial-*/metrics.jsonl"))) and process.poll() is None:
                time.sleep(0.1)
            assert drafts
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "mamlfast.train: interrupted; nothing was written" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_metaicl_counts_every_target_token_of_support_and_query_alike():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    short, long = Tokens([3, 4, 5], [IGNORED, IGNORED, 5]), Tokens([6, 7, 8], [IGNORED, 7, 8])
    joint_backward(model, [Episode(support=[collate([short], pad_id=0)], query=collate([long, long], pad_id=0))])
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(**collate([short, long, long], pad_id=0)).loss.backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        # Two sums of float32 in another order.
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_tasks_are_spread_evenly():
    assert spread(list("abcdef"), 3) == ["a", "c", "e"]
    assert spread(list("ab"), 5) == ["a", "b"]


def test_a_real_checkpoint_trains_on_real_tasks(shared, tmp_path):
    flags = ["--model", str(shared / "models/stories260K"), "--data", str(shared / "data/metaicl")]
    quick = "--setting class_to_class --max-steps 6 --eval-tasks 1 --max-length 96 --num-tasks 2".split()
    assert embedded(tmp_path / "out", *flags, *quick) == 0
    assert adapted_loss(tmp_path / "out", "after") < adapted_loss(tmp_path / "out", "before")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 512


@pytest.mark.parametrize(("name", "kind"), [("sgd", SGD), ("adam", Adam), ("adamw", AdamW)])
def test_the_inner_optimizer_is_the_one_that_was_asked_for(name, kind):
    run = prepare(parse_args([*QUICK, "--inner", name, "--inner-lr", "0.01", "--inner-clip", "2.0"]))
    assert run.learner.inner == kind(lr=0.01, clip=2.0)
    assert prepare(parse_args([*QUICK])).learner.inner.clip is None
