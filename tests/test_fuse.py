"""Fused models compute what they computed, in every mode, and are given back as they were."""

import copy
import gc
import inspect
import json
import pickle
import weakref
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import mamlfast
from mamlfast import fused_modules
from mamlfast.fuse import fuse, fused, fusion_report, plan, unfuse
from tests.models import (
    _SIZES,
    CONFIGS,
    LR,
    VOCAB,
    double_backward,
    draw_batch,
    draw_episode,
    float64_throughout,
    overall_error,
    relative_error,
    tiny_model,
)

MORE = {
    # Classes of which fuse knows nothing but what their norms compute.
    "olmo2": partial(transformers.Olmo2Config, **_SIZES, num_key_value_heads=2),
    "stablelm": partial(transformers.StableLmConfig, **_SIZES, num_key_value_heads=2),
}
KNOWN = [*CONFIGS]
# Two float64 summation orders differ by about 1e-13 here; dropping the second-order term costs more than 0.05.
FLOAT64 = 1e-10
# The classes' own casts to float32.
WITH_CASTS = 1e-6


def model_of(name, **options):
    with patch.dict(CONFIGS, MORE):
        return tiny_model(name, **options)


def episode_of(steps, padded):
    """An episode; no token that is padding predicts: what a query that sees nothing attends to is not defined."""
    episode = draw_episode(steps, padded=padded)
    for batch in (*episode.support, episode.query):
        before = batch.get("attention_mask", torch.ones(2, 9)).roll(1, 1)
        batch["labels"][before == 0] = -100
    return episode


def loss_and_gradients(model, batch):
    loss = model(**batch, use_cache=False).loss
    names, params = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def engine_product(model, batch):
    """``H v`` by the engine."""
    loss, params = mamlfast.causal_lm(model)
    return mamlfast.hvp(loss, params, direction(model), batch)


def engine(model, episode, adjoint):
    loss, params = mamlfast.causal_lm(model)
    return mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=LR), adjoint=adjoint).grads


def direction(model):
    generator = torch.Generator().manual_seed(7)
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def curvature(model, batch):
    """``H v`` by two reverse passes, without the engine."""
    v, params = direction(model), {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(model(**batch, use_cache=False).loss, list(params.values()), create_graph=True)
    slope = sum((g * v[n]).sum() for n, g in zip(params, grads, strict=True))
    return dict(zip(params, torch.autograd.grad(slope, list(params.values())), strict=True))


def dicts(model):
    """What every module and configuration holds."""
    held = {name: dict(vars(module)) for name, module in model.named_modules()}
    configs = {name: dict(vars(module.config)) for name, module in model.named_modules() if hasattr(module, "config")}
    return held, configs


@pytest.mark.parametrize("padded", ["", "both"], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_fused_model_is_the_model_to_float64_rounding_in_every_order(name, padded):
    model, changed = model_of(name), fuse(model_of(name))
    episode = episode_of(2, padded)
    with float64_throughout():
        (loss, grads), (got, got_grads) = (loss_and_gradients(m, episode.query) for m in (model, changed))
        torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
        assert relative_error(got_grads, grads) < FLOAT64
        products = curvature(model, episode.query)
        assert relative_error(engine_product(changed, episode.query), products) < FLOAT64
        assert relative_error(curvature(changed, episode.query), products) < FLOAT64
        want = double_backward(model, episode)
        assert relative_error(engine(changed, episode, mamlfast.Replay()), want) < FLOAT64
        assert relative_error(double_backward(changed, episode), want) < FLOAT64
        with torch.no_grad():
            logits, got_logits = (m(**episode.query).logits for m in (model, changed))
    seen = episode.query.get("attention_mask", torch.ones(2, 9)) == 1
    torch.testing.assert_close(got_logits[seen], logits[seen], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KNOWN)
def test_a_fused_model_is_the_model_to_the_rounding_of_its_own_casts(name):
    model, changed, episode = model_of(name, tied=False), fuse(model_of(name, tied=False)), draw_episode(1)
    (loss, grads), (got, got_grads) = (loss_and_gradients(m, episode.query) for m in (model, changed))
    torch.testing.assert_close(got.double(), loss.double(), rtol=WITH_CASTS, atol=0)
    assert overall_error(got_grads, grads) < WITH_CASTS
    want = double_backward(model, episode)
    assert overall_error(engine(changed, episode, mamlfast.Replay()), want) < WITH_CASTS


@pytest.mark.parametrize("name", KNOWN)
def test_bfloat16_is_as_close_to_float64_as_the_model_is(name):
    episode = draw_episode(1, padded="right")
    want_loss, want = loss_and_gradients(model_of(name), episode.query)
    errors = []
    for model in (model_of(name).bfloat16(), fuse(model_of(name).bfloat16())):
        loss, grads = loss_and_gradients(model, episode.query)
        assert {g.dtype for g in grads.values()} == {torch.bfloat16}
        errors.append(overall_error({n: g.double() for n, g in grads.items()}, want))
        torch.testing.assert_close(loss.double(), want_loss.double(), rtol=0.02, atol=0)
    assert errors[1] < 1.5 * errors[0] < 0.3


@pytest.mark.parametrize("rule", ["rms_norm", "swiglu", "rotary", "linear_cross_entropy"])
def test_a_rule_without_its_tangent_is_caught(monkeypatch, rule):
    """The comparisons above see one operation that is first order only."""
    whole = fused_modules._GATED["silu"] if rule == "swiglu" else getattr(fused_modules, rule)

    def first_order(x, *rest, **options):
        if isinstance(x, mamlfast.Dual):
            x = mamlfast.Dual(x.primal, torch.zeros_like(x.tangent))
        return whole(x, *rest, **options)

    first_order.name = whole.name if rule == "swiglu" else rule
    episode, changed = draw_episode(1), fuse(model_of("llama"))
    if rule == "swiglu":
        monkeypatch.setitem(fused_modules._GATED, "silu", first_order)
    else:
        monkeypatch.setattr(fused_modules, rule, first_order)
    with float64_throughout():
        want = double_backward(model_of("llama"), episode)
        assert relative_error(engine(changed, episode, mamlfast.Replay()), want) > 1e-3


@pytest.mark.parametrize("name", [*KNOWN, "olmo2", "stablelm"])
def test_everything_is_given_back(name):
    model = model_of(name, attention="sdpa" if name != "gemma2" else "eager")
    before = dicts(model)
    state = list(model.state_dict())
    assert fuse(model) is model
    assert dicts(model) != before
    assert list(model.state_dict()) == state
    assert model.config._attn_implementation == "mamlfast"
    once = dicts(model)[0]
    fuse(model)
    assert {n: own.get("forward") for n, own in dicts(model)[0].items()} == {
        n: own.get("forward") for n, own in once.items()
    }
    assert unfuse(model) is model
    assert dicts(model) == before
    with pytest.raises(ZeroDivisionError), fused(model):
        assert dicts(model) != before
        raise ZeroDivisionError
    assert dicts(model) == before


def test_a_fused_model_stays_fused_after_a_block_in_which_it_is():
    model = fuse(model_of("llama"))
    before = dicts(model)
    with fused(model), fused(model):
        pass
    assert dicts(model) == before


def test_an_attention_that_was_chosen_after_fuse_stays():
    model = fuse(model_of("llama"))
    model.set_attn_implementation("sdpa")
    assert unfuse(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", KNOWN)
def test_every_norm_activation_attention_and_loss_of_a_known_class_is_fused(name):
    model = model_of(name)
    found = fusion_report(model)
    assert not found.left
    kinds = {
        n
        for n, m in model.named_modules()
        if type(m).__name__.endswith(("Norm", "Attention", "Activation", "GELUTanh")) or n == ""
    }
    assert kinds <= found.fused.keys()
    assert found == fusion_report(fuse(model)), "the report is the same before and after"


def test_the_report_prints_one_line_a_kind():
    lines = str(fusion_report(model_of("llama"))).splitlines()
    assert any(line.split() == ["model.layers.*.mlp", "2", "swiglu"] for line in lines)
    left = str(fusion_report(model_of("stablelm"))).splitlines()
    assert any("mlp" in line and "left: its class is not known" in line for line in left)


@pytest.mark.parametrize("name", ["olmo2", "stablelm"])
def test_an_unknown_class_gets_what_is_provably_the_same(name):
    model, changed, episode = model_of(name), fuse(model_of(name)), draw_episode(1)
    found = fusion_report(changed)
    assert {"rms_norm", "layer_norm"} & set(found.fused.values())
    assert "its class is not known" in found.left.values()
    with float64_throughout():
        want = double_backward(model, episode)
        assert relative_error(engine(changed, episode, mamlfast.Replay()), want) < FLOAT64


class _Norm(nn.Module):
    """Llama's RMSNorm, with a mistake on demand."""

    mistake = ""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

    def forward(self, x):
        wide = x.float()
        n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps * (self.mistake != "no eps"))
        if self.mistake == "cast late":
            return (self.weight * n).to(x.dtype)
        return self.weight * n.to(x.dtype) + (0.1 if self.mistake == "shifted" else 0)


@pytest.mark.parametrize(
    ("mistake", "dtype", "same"),
    [
        ("", torch.float32, True),
        ("", torch.bfloat16, True),
        ("", torch.float64, True),
        ("cast late", torch.float32, True),
        ("cast late", torch.bfloat16, False),
        ("no eps", torch.float32, False),
        ("shifted", torch.float32, False),
    ],
)
def test_a_norm_is_fused_if_it_computes_one(mistake, dtype, same):
    kind = type("OtherRMSNorm", (_Norm,), {"mistake": mistake, "forward": _Norm.forward})
    module = nn.Sequential(kind()).to(dtype)
    assert ("0" in fusion_report(module).fused) is same
    assert same or "differs" in fusion_report(module).left["0"]


def test_an_rms_norm_with_a_second_input_is_left():
    class GatedRMSNorm(_Norm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    assert "one input" in fusion_report(nn.Sequential(GatedRMSNorm())).left["0"]


def test_an_overridden_forward_is_left_alone_and_reported(monkeypatch):
    model = model_of("llama")
    norm, attention = model.model.norm, model.get_submodule("model.layers.1.self_attn")
    norm.forward = lambda x: x
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    attention.__class__ = type("LlamaAttention", (modeling_llama.LlamaAttention,), {})
    found = fusion_report(fuse(model))
    assert found.left["model.norm"] == "its forward is overridden"
    assert "the forward of its class is from" in found.left["model.layers.0.mlp"]
    assert found.fused["model.layers.1.self_attn"] == "mamlfast"
    assert found.fused["model.layers.0.self_attn"] == "mamlfast, rotary"
    assert model.model.norm(batch := torch.ones(3)) is batch
    unfuse(model)
    assert "forward" in vars(norm), "it was the user's"


def test_activations_that_work_in_place_are_left():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU(), nn.GELU("tanh"), nn.LayerNorm((3, 2)))
    assert fusion_report(module).fused == {"1": "relu", "2": "gelu_tanh"}
    assert fusion_report(module).left == {"3": "it normalizes over more than one dimension"}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_layer_norm_without_bias_or_weight(options):
    module, x = nn.LayerNorm(6, **options).double(), torch.randn(4, 6, dtype=torch.float64)
    want = module(x)
    with fused(module):
        torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)


class _Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as PEFT wraps them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=torch.float64))

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def test_adapters_inside_fused_modules_run_and_are_trained():
    models = []
    for change in (nn.Module.train, fuse):
        model = change(model_of("llama", tied=False).requires_grad_(False))
        torch.manual_seed(1)
        for layer in model.model.layers:
            layer.mlp.up_proj = _Adapted(layer.mlp.up_proj)
            layer.self_attn.q_proj = _Adapted(layer.self_attn.q_proj)
        model.lm_head = _Adapted(model.lm_head)
        models.append(model)
    model, changed = models
    batch = draw_batch(1)
    with float64_throughout():
        assert changed(**batch).logits is not None, "the head is wrapped, so its loss is the model's own"
        got, want = engine_product(changed, batch), curvature(model, batch)
    assert len(got) == 10 and relative_error(got, want) < FLOAT64


def test_hooks_still_see_everything():
    model = fuse(model_of("llama"))
    seen = []
    hooked = ["lm_head", "model.norm", "model.layers.0.mlp", "model.layers.0.mlp.act_fn", "model.layers.0.self_attn"]
    for name in hooked:
        model.get_submodule(name).register_forward_hook(lambda m, inputs, output, name=name: seen.append(name))
    outputs = model(**draw_batch(1))
    assert sorted(seen) == sorted(hooked)
    assert outputs.logits.shape == (2, 9, VOCAB)


def test_the_loss_leaves_out_the_logits_only_where_a_gradient_is_wanted():
    model, batch = fuse(model_of("gemma2")), draw_batch(1)
    assert model(**batch).logits is None
    with torch.no_grad():
        assert model(**batch).logits.shape == (2, 9, VOCAB)
    assert model(input_ids=batch["input_ids"]).logits.shape == (2, 9, VOCAB)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, 9, VOCAB)
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_the_losses_of_every_option_are_the_models_own(name):
    model, changed, batch = model_of(name), fuse(model_of(name)), draw_batch(1, padded="right")
    shifted = F.pad(batch["labels"], (0, 1), value=7)[:, 1:].contiguous()
    for options in (
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": 7},
        {"shift_labels": shifted},
    ):
        given = batch | ({"labels": batch["labels"].clamp(min=7)} if "ignore_index" in options else {})
        with float64_throughout():
            want, got = (m(**given, **options) for m in (model, changed))
        assert got.logits is None
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)


def test_a_loss_of_the_users_own_is_kept():
    model = model_of("llama")
    model.loss_function = lambda logits, **_: logits.sum()
    assert "its loss" in fusion_report(model).left[""]
    outputs = fuse(model)(**draw_batch(1))
    torch.testing.assert_close(outputs.loss, outputs.logits.sum())


@pytest.mark.parametrize("name", KNOWN)
def test_generate_gives_the_same_tokens(name):
    ids = draw_batch(3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model, changed = model_of(name).float().eval(), fuse(model_of(name).float().eval())
    assert torch.equal(changed.generate(ids, **options), model.generate(ids, **options))


def test_a_fused_model_is_saved_and_loaded_as_the_model(tmp_path):
    model = model_of("llama").float().eval()
    batch = draw_batch(1)
    with torch.no_grad():
        want = model(**batch).logits
        fuse(model).save_pretrained(tmp_path)
        assert "mamlfast" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert not any("forward" in vars(m) for m in loaded.modules())
        torch.testing.assert_close(loaded(**batch).logits, want)
        assert torch.equal(fuse(loaded)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_fused_model_is_fused_on_its_own(copied):
    model = fuse(model_of("llama"))
    twin = copied(model)
    assert fusion_report(twin) == fusion_report(model)
    for module in twin.modules():
        forward = vars(module).get("forward")
        assert forward is None or forward.module is module
    unfuse(twin)
    assert not any("forward" in vars(m) for m in twin.modules())
    assert twin.config._attn_implementation == "eager" and model.config._attn_implementation == "mamlfast"
    assert "forward" in vars(model.model.norm)


def test_a_fused_model_is_freed_when_its_last_reference_goes():
    model = fuse(model_of("llama"))
    gone = weakref.ref(model.model.norm)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_signatures_are_those_of_the_class():
    model = model_of("llama")
    want = inspect.signature(model.forward)
    assert inspect.signature(fuse(model).forward) == want


def test_a_plan_is_held_and_left_as_often_as_wanted():
    model, episode = model_of("llama"), draw_episode(1)
    prepared, before = plan(model, for_engine=True), dicts(model)
    with float64_throughout():
        want = double_backward(model, episode)
        for _ in range(2):
            with prepared.held():
                assert model.config._attn_implementation == "eager"
                got = engine(model, episode, mamlfast.Replay())
            assert relative_error(got, want) < FLOAT64
            assert dicts(model) == before


def test_forward_mode_over_a_fused_model_is_right_where_pytorch_is_silently_wrong():
    """Reverse over forward through layer_norm: pytorch#196700."""
    model = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 1)).double()
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    params = {n: p.detach() for n, p in model.named_parameters()}
    v = {n: torch.randn_like(p) for n, p in params.items()}

    def loss(params):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    def slope(params):
        return torch.func.jvp(loss, (params,), (v,))[1]

    want = torch.func.vjp(torch.func.grad(loss), params)[1](v)[0]
    with fused(model):
        got = torch.func.grad(slope)(params)
    assert relative_error(got, want) < FLOAT64
