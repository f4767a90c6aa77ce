"""A Hugging Face model as a loss: what is checked, what is routed, what is given back."""

import logging

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import mamlfast
from mamlfast.model import find_blocks, holding, settings
from tests.models import LR, double_backward, draw_batch, draw_episode, overall_error, tiny_model


def test_the_loss_is_the_models_own_and_tied_weights_appear_once():
    model = tiny_model("llama")
    loss, params = mamlfast.causal_lm(model)
    batch = draw_batch(1, padded="right")
    torch.testing.assert_close(loss(params, batch), model(**batch).loss)
    assert "lm_head.weight" not in params and len(params) == len(list(model.parameters()))
    assert not any(p.requires_grad for p in params.values())


@pytest.mark.parametrize("attention", ["flex_attention"])
def test_attention_without_a_second_derivative_is_replaced_and_that_is_said_once(attention, caplog):
    model, episode = tiny_model("llama", attention=attention), draw_episode(2)
    want = double_backward(tiny_model("llama"), episode)
    loss, params = mamlfast.causal_lm(model)
    with caplog.at_level(logging.WARNING, "mamlfast"):
        for _ in range(2):
            got = mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=LR)).grads
    assert overall_error(got, want) < 1e-6
    assert model.config._attn_implementation == attention
    assert [r.message.split()[0] for r in caplog.records].count(attention) == 1


@pytest.mark.parametrize(
    ("name", "loaded", "used"),
    [
        ("llama", "sdpa", "mamlfast"),
        ("llama", "mamlfast", "mamlfast"),
        ("llama", "eager", "eager"),
        ("gemma2", "flash_attention_2", "mamlfast"),  # with a soft-cap
    ],
)
def test_the_models_attention_is_ours_for_a_call_unless_it_is_eager(name, loaded, used):
    model = tiny_model(name)
    model.config._attn_implementation = loaded
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    loss, params = mamlfast.causal_lm(model)
    mamlfast.hvp(loss, params, params, draw_batch(1))
    assert seen == [used] and model.config._attn_implementation == loaded


def test_an_attention_of_the_models_own_keeps_sdpa():
    config = transformers.FalconConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.FalconForCausalLM._from_config(config, attn_implementation="sdpa").double()
    with holding(settings(model)):
        assert config._attn_implementation == "sdpa"
    config._attn_implementation = "flash_attention_2"
    with holding(settings(model)):
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "flash_attention_2"


def test_each_part_of_a_model_keeps_the_attention_that_was_chosen_for_it():
    text = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, num_attention_heads=2),
        vision_config=transformers.CLIPVisionConfig(**vision, num_attention_heads=2),
    )
    kinds = {"text_config": "sdpa", "vision_config": "eager"}
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=kinds)
    parts = model.config.text_config, model.config.vision_config
    before = [part._attn_implementation for part in parts]
    with holding(settings(model)):
        assert [part._attn_implementation for part in parts] == ["mamlfast", "eager"]
    assert [part._attn_implementation for part in parts] == before == ["sdpa", "eager"]


def test_gradient_checkpointing_of_the_models_own_is_taken_over_and_given_back():
    """Left on, its recomputation would come after the swap of the weights and use the wrong ones."""
    model, episode = tiny_model("llama"), draw_episode(2)
    want = double_backward(model, episode)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda *_: pytest.fail("the model's own checkpointing ran")
    loss, params = mamlfast.causal_lm(model)
    for adjoint in (mamlfast.Replay(), mamlfast.Unrolled()):
        got = mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=LR), adjoint=adjoint).grads
        assert overall_error(got, want) < 1e-6
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_any_other_checkpointing_inside_a_module_is_refused_and_works_again_outside(reentrant):
    class Checkpointed(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    module = Checkpointed(3, 3)
    call, params = mamlfast.functional(module)
    with pytest.raises(NotImplementedError, match="uses torch.utils.checkpoint itself"):
        mamlfast.value_and_grad(lambda p, x: call(p, x).sum(), params, torch.ones(2, 3))
    module(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert module.weight.grad is not None


def test_the_longest_list_of_like_modules_is_the_blocks():
    model = tiny_model("gpt2")
    assert find_blocks(model) == list(model.transformer.h)
    assert find_blocks(nn.Sequential(nn.Linear(2, 2))) == []


def test_a_functional_module_is_the_module():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    call, params = mamlfast.functional(model)
    x = torch.randn(4, 3)
    other = {n: p + 1 for n, p in params.items()}
    assert torch.equal(call(params, x), model(x))
    assert torch.equal(call(other, x), functional_call(model, other, x))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([1, 2], TypeError, "dict of tensors"),
        ({"input_ids": draw_batch(1)["input_ids"]}, ValueError, "labels is missing"),
        (
            dict(draw_batch(1), labels=torch.ones(2, 4).long()),
            ValueError,
            r"same shape.*\(2, 9\) and \(2, 4\)",
        ),
        (dict(draw_batch(1), labels=torch.full((2, 9), -100)), ValueError, "all are masked"),
        (draw_batch(1, shape=(1, 33)), ValueError, "32 positions; got 33"),
    ],
)
def test_a_batch_without_a_loss_is_refused(batch, error, message):
    model = tiny_model("gpt2")
    before = [p.clone() for p in model.parameters()]
    loss, params = mamlfast.causal_lm(model)
    episode = mamlfast.Episode(support=[draw_batch(1)], query=batch)
    with pytest.raises(error, match=message):
        mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=LR))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_model_that_is_wholly_frozen_is_refused():
    with pytest.raises(ValueError, match="all of its parameters are frozen"):
        mamlfast.functional(nn.Linear(2, 2).requires_grad_(False))


class FusedCube(torch.autograd.Function):
    """A kernel of somebody else's: right to first order, a constant to the second."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, y_bar):
        return y_bar * 3 * ctx.saved_tensors[0].detach() ** 2


def test_a_model_with_a_once_differentiable_kernel_is_refused_and_not_silently_first_order():
    class Cubed(nn.Linear):
        def forward(self, x):
            return FusedCube.apply(super().forward(x))

    call, params = mamlfast.functional(Cubed(3, 2))
    episode = mamlfast.Episode(support=[torch.ones(1, 3)], query=torch.ones(1, 3))
    with pytest.raises(NotImplementedError, match="custom torch.autograd.Function"):
        mamlfast.meta_grad(lambda p, x: call(p, x).sum(), params, episode, inner=mamlfast.SGD(lr=LR))


def test_a_real_checkpoint_adapts_to_a_sentence(shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time, there was a cat.", return_tensors="pt").input_ids
    batch = {"input_ids": ids, "labels": ids}
    loss, params = mamlfast.causal_lm(model)
    episode = mamlfast.Episode(support=[batch], query=batch)
    got = mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=0.01), steps=3)
    want = mamlfast.meta_grad(loss, params, episode, inner=mamlfast.SGD(lr=0.01), steps=3, adjoint=mamlfast.Unrolled())
    assert overall_error(got.grads, want.grads) < 1e-4  # float32
    assert got.query_loss < got.support_losses[0]
