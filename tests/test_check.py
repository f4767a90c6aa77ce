"""``mamlfast.check``: exact models pass, and whatever breaks the second order of one is caught and named."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import mamlfast
from mamlfast.checking import CheckResult, check, proof
from mamlfast.checking.differences import central_differences, error
from mamlfast.checking.functions import EARLY, ONCE, SILENT
from mamlfast.checking.precision import constants_in
from mamlfast.ops.elementwise import elementwise
from tests.models import draw_batch, tiny_model

EXACT = 1e-8  # what central differences in float64 resolve on these models, a hundred times finer than what is claimed


def _norm(x, w):
    return w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _norm_bwd(x, w, y_bar):
    """A kernel as other libraries launch it: right, and a constant to autograd."""
    with torch.no_grad():
        s = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        n, g = s * x, y_bar * w
        return s * (g - n * (g * n).mean(-1, keepdim=True)), (y_bar * n).flatten(0, -2).sum(0)


class FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return _norm(x, w)

    @staticmethod
    def backward(ctx, y_bar):
        return _norm_bwd(*ctx.saved_tensors, y_bar)


class OnceNorm(FusedNorm):
    @staticmethod
    @once_differentiable
    def backward(ctx, y_bar):
        return _norm_bwd(*ctx.saved_tensors, y_bar)


class EarlySilu(torch.autograd.Function):
    """Keeps its slope from the forward, as fused losses keep their gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(_silu_first(x))
        return F.silu(x)

    @staticmethod
    def backward(ctx, y_bar):
        return ctx.saved_tensors[0] * y_bar


def _silu_first(x):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


@torch.library.custom_op("mamlfast_tests::norm", mutates_args=())
def library_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _norm(x, w)


library_norm.register_autograd(
    lambda ctx, y_bar: _norm_bwd(*ctx.saved_tensors, y_bar),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Planted(nn.Module):
    """Stands in a model for another module, with or without its weight."""

    def __init__(self, f, *params):
        super().__init__()
        self.f = f
        self.params = nn.ParameterList(params)

    def forward(self, x):
        return self.f(x, *self.params)


def with_norm(norm) -> Any:
    """A tiny Llama with one of its five norms replaced."""
    model: Any = tiny_model("llama", attention="sdpa").float()
    layer = model.model.layers[1]
    layer.input_layernorm = Planted(norm, layer.input_layernorm.weight)
    return model


def with_activation(activation) -> Any:
    """A tiny Llama with one of its two activations replaced."""
    model: Any = tiny_model("llama", attention="sdpa").float()
    model.model.layers[1].mlp.act_fn = Planted(activation)
    return model


def named(result: CheckResult) -> list[str]:
    return [path for module in result.culprits for path in module.paths]


def of_kind(result: CheckResult, kind: str):
    return [module for module in result.modules if module.kind == kind]


@pytest.fixture(scope="module")
def fused() -> CheckResult:
    return check(with_norm(FusedNorm.apply), draw_batch(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_exact_model_passes_with_every_module_accounted_for(name):
    model = tiny_model(name, attention="sdpa").float()
    result = check(model, draw_batch(0))
    assert result.ok and result.culprits == () and "exact." in str(result)
    assert all(claim.error < 1e-5 for claim in result.claims) and len(result.claims) == 8
    assert all(module.engine.error < EXACT for module in result.modules)
    blocks = {"llama": "LlamaDecoderLayer", "gpt2": "GPT2Block", "opt": "OPTDecoderLayer"}
    assert [len(m.paths) for m in of_kind(result, blocks[name])] == [2]
    assert len(of_kind(result, "head and loss")) == 1
    assert sum(len(m.paths) for m in of_kind(result, "Linear")) == sum(
        isinstance(m, nn.Linear) for m in model.modules()
    )
    if name == "llama":  # as the engine runs them
        assert all("rms_norm" in m.answered_by for m in of_kind(result, "LlamaRMSNorm"))
        assert "swiglu" in result.fusion and "rms_norm" in str(result)
    assert result.costs.hvp_ms > 0 and result.overhead_ms is not None and result.overhead_ms > 0
    assert 0 < result.recomputing.hvp_saved_mb < result.costs.hvp_saved_mb


def test_a_norm_that_is_silently_first_order_is_caught_and_named(fused):
    assert not fused.ok and named(fused) == ["model.layers.1.input_layernorm"]
    (norm,) = fused.culprits
    (function,) = norm.functions
    assert function.name == "FusedNormBackward" and "test_check.py" in function.place and function.fault == SILENT
    assert norm.engine.error == float("inf") and "Rule" in norm.engine.reason
    assert norm.autograd.error > 0.1  # its double backward: no error, another number
    for said in ("NOT EXACT", "model.layers.1.input_layernorm", "FusedNormBackward", "double backward"):
        assert said in str(fused)


def test_a_block_without_the_planted_norm_stays_exact(fused):
    verdicts = {module.paths: module.ok for module in of_kind(fused, "LlamaDecoderLayer")}
    assert verdicts == {("model.layers.0",): True, ("model.layers.1",): False}


def test_a_once_differentiable_function_is_caught_and_named():
    result = check(with_norm(OnceNorm.apply), draw_batch(0))
    (norm,) = result.culprits
    assert [(f.name, f.fault) for f in norm.functions] == [("OnceNormBackward", ONCE)]


def test_a_gradient_that_was_computed_in_the_forward_is_caught_and_named():
    result = check(with_activation(EarlySilu.apply), draw_batch(0))
    (activation,) = result.culprits
    assert [(f.name, f.fault) for f in activation.functions] == [("EarlySiluBackward", EARLY)]
    assert activation.autograd.error > 0.1 and "without an error" in str(result)


def test_a_custom_operator_with_a_bare_kernel_for_a_backward_is_caught_and_named():
    result = check(with_norm(library_norm), draw_batch(0))
    (norm,) = result.culprits
    assert norm.paths == ("model.layers.1.input_layernorm",)
    assert "mamlfast_tests_norm" in norm.functions[0].name and norm.functions[0].fault == SILENT


def _half_slope(x):
    s = torch.sigmoid(x)
    return s * (1 - s)


WRONG_RULES = {
    "second derivative": elementwise("dropped", F.silu, _silu_first, None),
    # Consistent with itself: symmetric, linear, and the derivative of the gradient it gives.
    "first derivative": elementwise("dropped", F.silu, torch.sigmoid, _half_slope),
}


@pytest.mark.parametrize("dropped", WRONG_RULES)
def test_a_rule_with_a_dropped_term_is_caught_by_central_differences(dropped):
    result = check(with_activation(WRONG_RULES[dropped]), draw_batch(0))
    assert named(result) == ["model.layers.1.mlp.act_fn"]
    assert result.culprits[0].engine.error > 0.1 and not result.culprits[0].engine.reason
    assert result.culprits[0].rules == ("dropped (eager)",)
    failed = [claim.text for claim in result.claims if not claim.ok]
    assert "H v against central differences of gradients" in failed
    assert ("<gradient, v> against central differences" in failed) == (dropped == "first derivative")


def test_the_exact_rule_of_the_same_making_passes():
    def second(x):
        s = torch.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s))

    assert check(with_activation(elementwise("whole", F.silu, _silu_first, second)), draw_batch(0)).ok


def test_a_kernel_that_is_wrong_in_the_precision_of_the_model_alone_is_caught():
    """The oracle never runs it."""

    def second(x):
        s = torch.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s)) * (x.dtype is torch.float64)

    result = check(with_activation(elementwise("narrow", F.silu, _silu_first, second)), draw_batch(0))
    assert named(result) == ["model.layers.1.mlp.act_fn"]
    assert result.culprits[0].engine.ok and not result.culprits[0].own.ok
    assert [claim.text for claim in result.claims if not claim.ok] == ["in float32, H v against that in float64"]


def test_torch_functions_that_are_derived_on_the_spot_are_listed():
    result = check(with_activation(F.mish), draw_batch(0))
    (activation,) = of_kind(result, "Planted")
    assert result.ok and activation.derived == ("mish",) and activation.rules == ()
    assert "Planted: derived on the spot: mish" in str(result)


def test_dropout_in_training_mode_is_checked_on_one_set_of_draws():
    model = tiny_model("gpt2", attention="sdpa", dropout=0.2).float()
    state = torch.get_rng_state()
    result = check(model, draw_batch(0))
    assert result.ok and any("same draws" in note for note in result.notes)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_padded_batch_passes_with_a_padding_row_that_autograd_takes_for_a_constant():
    model = tiny_model("llama", attention="sdpa").float()
    assert model.model.embed_tokens.padding_idx == 0
    assert check(model, draw_batch(0, padded="right")).ok
    assert check(model, draw_batch(0, padded="both")).ok


def test_packed_sequences_pass():
    batch = draw_batch(0) | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}
    assert check(tiny_model("llama", attention="mamlfast").float(), batch).ok


def test_a_padded_batch_and_frozen_parameters_in_bfloat16_pass():
    model = tiny_model("llama", attention="sdpa").bfloat16()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    result = check(model, draw_batch(0, padded="both"))
    assert result.ok and "in bfloat16" in str(result)
    paths = {path for module in result.modules for path in module.paths}
    assert "model.layers.1" in paths and not any(path.startswith(("model.layers.0", "model.embed")) for path in paths)


def test_a_model_that_does_not_run_in_float64_is_checked_in_float32_and_says_so():
    def only_float32(x):
        if x.dtype is torch.float64:
            raise TypeError("this kernel has no float64")
        return F.silu(x)

    result = check(with_activation(only_float32), draw_batch(0))
    assert result.ok and "in float32" in result.oracle
    assert any("does not run in float64: this kernel has no float64" in note for note in result.notes)


def test_where_float64_does_not_fit_float32_has_to_do(monkeypatch):
    monkeypatch.setattr(proof, "available_bytes", lambda device: 0.6e6)  # twelve times 10,800 parameters: 1.04 MB
    result = check(tiny_model("llama", attention="sdpa").float(), draw_batch(0))
    assert result.ok and result.oracle.startswith("in float32")
    assert "float64 would need 1.0 MB, and 0.6 MB are free" in result.notes


def test_where_the_graph_does_not_fit_double_backward_is_left_out(monkeypatch):
    monkeypatch.setattr(proof, "available_bytes", lambda device: 1.2e6)
    result = check(tiny_model("llama", attention="sdpa").float(), draw_batch(0, shape=(8, 30)))
    assert result.ok and any("no memory for double backward" in note for note in result.notes)
    assert not any("double backward" in claim.text for claim in result.claims) and result.costs is None


def _snapshot(model):
    return {
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "parameters": [id(p) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "grads": [p.grad for p in model.parameters()],
        "modules": [
            (m.training, m.__dict__.get("forward"), list(m._forward_hooks), list(m._forward_pre_hooks))
            for m in model.modules()
        ],
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
    }


@pytest.mark.parametrize("planted", [False, True], ids=["exact", "refused"])
def test_the_model_is_left_as_it_was(planted):
    model: Any = with_norm(FusedNorm.apply) if planted else tiny_model("llama", attention="sdpa").float()
    seen = []
    model.model.norm.register_forward_hook(lambda *call: seen.append(call))
    model.model.layers[0].eval()
    before = _snapshot(model)
    check(model, draw_batch(0))
    after = _snapshot(model)
    assert seen  # the user's own hook is one of those that stay
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert after == before


def test_what_is_no_causal_lm_or_no_batch_is_refused():
    with pytest.raises(TypeError, match="Hugging Face"):
        check(nn.Linear(2, 2), draw_batch(0))
    with pytest.raises(ValueError, match="labels"):
        check(tiny_model("llama"), {"input_ids": torch.ones(1, 3, dtype=torch.int64)})


def test_the_findings_are_valid_json(fused):
    found = json.loads(json.dumps(fused.to_json(), allow_nan=False))
    assert found["ok"] is False and found["culprits"] == ["model.layers.1.input_layernorm"]
    (norm,) = [m for m in found["modules"] if m["kind"] == "Planted"]
    assert norm["engine"]["error"] is None and norm["functions"][0]["name"] == "FusedNormBackward"


def test_the_model_s_own_precision_is_each_tensor_s_own():
    """Rotary tables and the like stay in float32 in a bfloat16 model; only the oracle casts them."""
    module: Any = nn.Module()
    module.register_buffer("table", torch.rand(3))
    module.frozen = nn.Parameter(torch.rand(2).bfloat16(), requires_grad=False)
    own = module.table
    with constants_in(module, None):
        assert module.table.dtype is torch.float32 and module.frozen.dtype is torch.bfloat16
        module.table.zero_()  # a copy
    with constants_in(module, torch.float64):
        assert module.table.dtype is module.frozen.dtype is torch.float64
    assert module.table is own and own.all()


def test_central_differences_know_what_they_are_worth():
    x = torch.tensor([0.3, 1.2], dtype=torch.float64)

    def differences(f):
        return central_differences(lambda t: ([f(x + t)],), torch.float64, [0.0])[0]

    smooth = differences(torch.sin)
    assert error([x.cos()], smooth.value) < 1e-10 and smooth.uncertainty < 1e-8
    rounded = differences(lambda x: torch.sin(x).half().double())
    assert rounded.tolerance > error([x.cos()], rounded.value) > 1e-4
    constant = differences(torch.ones_like)
    assert error([0 * x], constant.value) == 0 and constant.uncertainty == 0
    assert error([x * torch.nan], [x]) == float("inf")


# The command.


@pytest.fixture(scope="module")
def command():
    """The command's file as a module, which an import does not give."""
    spec = importlib.util.spec_from_file_location("mamlfast.check", Path(mamlfast.__file__).parent / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_name_is_the_function_before_and_after_the_command_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "mamlfast.check", raising=False)
    assert mamlfast.check is check
    assert importlib.import_module("mamlfast.check") is check
    assert mamlfast.check is check


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").float().save_pretrained(folder)
    return str(folder)


def test_the_command_proves_a_checkpoint_and_writes_json(command, checkpoint, tmp_path, capsys):
    file = tmp_path / "findings.json"
    flags = ["--batch", "1", "--tokens", "6", "--attn", "eager", "--dtype", "bfloat16", "--json", str(file)]
    assert command.main(["--model", checkpoint, *flags]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16 on cpu, 1 x 6 tokens" in printed and "The second order of this model is exact." in printed
    assert json.loads(file.read_text())["ok"] is True


def test_the_exit_code_tells_a_model_that_is_not_exact(command, fused, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(command, "check", lambda *_, **__: fused)
    assert command.main(["--model", checkpoint]) == 1
    assert "FusedNormBackward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "./nowhere"], "does not exist"),
        (["--model", "{tmp}"], "could not be loaded as a causal LM"),
        (["--model", "{tmp}", "--device", "warp"], "--device warp cannot be used"),
        (["--model", "{tmp}", "--json", "{tmp}/no/file"], "folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, capsys, flags, said):
    assert command.main([flag.format(tmp=tmp_path) for flag in flags]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("mamlfast.check: ")


@pytest.mark.parametrize("flags", [[], ["--model", "x", "--tokens", "1"], ["--model", "x", "--dtype", "int8"]])
def test_bad_flags_end_with_exit_code_2(command, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        command.main(flags)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_the_module_runs_as_a_command_without_a_traceback(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    command = [sys.executable, "-m", "mamlfast.check", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.startswith("mamlfast.check: model")
