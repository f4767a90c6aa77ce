"""Hugging Face models on attn_implementation="mamlfast" against the same models on eager."""

import copy
import gc
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

import mamlfast
from mamlfast import attention_interface
from mamlfast.attention_interface import attention, mask
from tests.models import (
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

# Two float64 summation orders differ by about 1e-14 here; a wrong key in one softmax costs more than 1e-3.
FLOAT64 = 1e-10

GPT_OSS = partial(
    transformers.GptOssConfig,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=2,
    num_experts_per_tok=1,
    sliding_window=5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    experts_implementation="eager",  # the grouped products of the default take no float64
)
NAMES = [*CONFIGS, "gpt_oss"]
STARTS = [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 0, 1, 2, 3, 4, 5]]  # position_ids of packed rows


@pytest.fixture(autouse=True)
def _one_more_class(monkeypatch):
    monkeypatch.setitem(CONFIGS, "gpt_oss", GPT_OSS)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(attention_interface, "_said", set())


@pytest.fixture
def answers(monkeypatch) -> list:
    """What the mask function answers from here on."""
    given = []

    def listening(*args, **kwargs):
        given.append(mask(*args, **kwargs))
        return given[-1]

    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "mamlfast", listening)
    return given


def logits(model, batch):
    with float64_throughout(), torch.no_grad():
        return model.eval()(**{k: x for k, x in batch.items() if k != "labels"}, use_cache=False).logits


def real(batch):
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def predicted_from_real_tokens(batch):
    """Without the loss on a first token that padding predicts: a query that sees nothing differs by convention."""
    first = real(batch)[:, 1:] & ~real(batch)[:, :-1]
    batch["labels"][:, 1:][first] = -100
    return batch


def episode(padded):
    drawn = draw_episode(1, padded=padded)
    return mamlfast.Episode(
        support=[predicted_from_real_tokens(batch) for batch in drawn.support],
        query=predicted_from_real_tokens(drawn.query),
    )


@pytest.mark.parametrize("padded", ["", "right", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_eager_and_no_mask_is_quadratic(name, padded, answers):
    batch = draw_batch(3, padded=padded)
    got, want = (logits(tiny_model(name, attention=kind), batch) for kind in ("mamlfast", "eager"))
    torch.testing.assert_close(got[real(batch)], want[real(batch)], rtol=FLOAT64, atol=FLOAT64)
    assert answers and all(answer is None or answer.shape == batch["input_ids"].shape for answer in answers)


@pytest.mark.parametrize("padded", ["right", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_the_meta_gradient_is_that_of_eager(name, padded):
    with float64_throughout():
        want = double_backward(tiny_model(name), episode(padded))
        model = tiny_model(name, attention="mamlfast")
        assert relative_error(double_backward(model, episode(padded)), want) < FLOAT64
        if name != "gpt_oss":  # whose choice of experts has no tangent
            assert relative_error(engine(model, episode(padded)), want) < FLOAT64


def engine(model, drawn, adjoint=None):
    loss, params = mamlfast.causal_lm(model)
    adjoint = adjoint or mamlfast.Replay()
    return mamlfast.meta_grad(loss, params, drawn, inner=mamlfast.SGD(lr=LR), adjoint=adjoint).grads


def packed_batch(seed=3, ones=False):
    batch = draw_batch(seed) | {"position_ids": torch.tensor(STARTS)}
    return batch | ({"attention_mask": torch.ones_like(batch["input_ids"])} if ones else {})


def apart(model, batch):
    """The logits of each sequence by itself, put together again."""
    rows = []
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        pieces = [ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        rows.append(torch.cat([logits(model, {"input_ids": piece[None]})[0] for piece in pieces]))
    return torch.stack(rows)


@pytest.mark.parametrize("ones", [False, True], ids=["without a mask", "with a mask of ones"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_are_what_they_are_apart(name, ones, answers):
    model, batch = tiny_model(name, attention="mamlfast"), packed_batch(ones=ones)
    got, shapes = logits(model, batch), [answer if answer is None else answer.ndim for answer in answers]
    torch.testing.assert_close(got, apart(model, batch), rtol=FLOAT64, atol=FLOAT64)
    assert set(shapes) <= {None, 2}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_segments_that_are_ignored_are_noticed(name, monkeypatch):
    monkeypatch.setattr(attention_interface, "_packed", lambda visible, *_: visible)
    model, batch = tiny_model(name, attention="mamlfast"), packed_batch(ones=True)
    assert (logits(model, batch) - apart(model, batch)).abs().max() > 0.01
    # As they are by transformers' own functions, once there is a mask.
    assert (logits(tiny_model(name), batch) - apart(model, batch)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_meta_gradient_of_packed_sequences_is_that_of_eager_with_its_dense_mask(name):
    drawn, masked = (
        mamlfast.Episode(support=[packed_batch(1, ones)], query=packed_batch(2, ones)) for ones in (False, True)
    )
    with float64_throughout():
        want = double_backward(tiny_model(name), drawn)
        model = tiny_model(name, attention="mamlfast")
        assert relative_error(engine(model, drawn), want) < FLOAT64
        assert relative_error(engine(model, masked), want) < FLOAT64
        assert relative_error(double_backward(tiny_model(name), masked), want) > 0.01


@pytest.mark.parametrize(
    "kept",
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 1, 1, 1, 0],
        [1, 0, 1, 1, 0, 1, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    ids=str,
)
@pytest.mark.parametrize("filler", [-1, 0, 1, 5])
def test_positions_that_count_past_padding_are_no_packing(kept, filler):
    """As generate() and many collators build them; or a plain range, which goes on in padding."""
    batch = draw_batch(3)
    batch["attention_mask"] = torch.tensor([kept, [1] * 9])
    keep = real(batch)
    counted = (keep.cumsum(1) - 1).masked_fill(~keep, filler)
    for positions in (counted, torch.arange(9)[None]):
        assert attention_interface._segments(positions, keep) is None


def test_packed_sequences_with_padding_between_and_after_them_are_what_they_are_apart():
    ids = draw_batch(3)["input_ids"][:1]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 0, 0, 1, 2, 0]]),
    }
    model = tiny_model("llama", attention="mamlfast")
    want = torch.cat([logits(model, {"input_ids": ids[:, piece]}) for piece in (slice(0, 3), slice(5, 8))], 1)
    torch.testing.assert_close(logits(model, batch)[real(batch)], want[0], rtol=FLOAT64, atol=FLOAT64)


def test_cumulative_lengths_say_the_same_as_positions():
    model, ids = tiny_model("llama", attention="mamlfast"), draw_batch(3)["input_ids"][:1]
    positions, lengths = torch.tensor(STARTS[:1]), torch.tensor([0, 4, 9], dtype=torch.int32)
    # Rotations are relative, so positions may just as well run on.
    got = logits(model, {"input_ids": ids, "cu_seq_lens_q": lengths})
    want = logits(model, {"input_ids": ids, "position_ids": positions})
    torch.testing.assert_close(got, want, rtol=FLOAT64, atol=FLOAT64)
    with pytest.raises(ValueError, match="cuts one row of tokens.*got 2 rows of 9 queries"):
        logits(model, draw_batch(3) | {"cu_seq_lens_q": lengths})


def test_a_batch_is_searched_for_packing_once_and_again_when_it_changes(monkeypatch):
    searches = []
    find = attention_interface._find_segments
    monkeypatch.setattr(attention_interface, "_find_segments", lambda *args: searches.append(1) or find(*args))
    model = tiny_model("llama", attention="mamlfast")
    loss, params = mamlfast.causal_lm(model)
    batch = packed_batch(ones=True)
    before = mamlfast.hvp(loss, params, params, batch)  # two layers, each recomputed
    assert len(searches) == 1
    batch["position_ids"].copy_(torch.arange(9))
    assert overall_error(mamlfast.hvp(loss, params, params, batch), before) > 0.01
    assert len(searches) == 2
    with torch.inference_mode():
        batch = packed_batch(ones=True)
        positions = batch["position_ids"]
        assert attention_interface._segments(positions, None)[:, -1].tolist() == [1, 2]
        positions.copy_(torch.arange(9))
        assert attention_interface._segments(positions, None) is None


def test_nothing_is_kept_when_a_pass_is_over():
    gc.collect()
    before = len(attention_interface._found)
    for padded in ("", "both"):
        engine(tiny_model("gemma2", attention="mamlfast"), draw_episode(2, padded=padded))
    gc.collect()
    assert len(attention_interface._found) <= before


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("attn", ["mamlfast", "eager"])
def test_a_long_row_meets_no_tensor_of_queries_times_keys(kind, attn, monkeypatch):
    T = 1200
    monkeypatch.setattr("tests.models.POSITIONS", T)
    model = tiny_model("mistral", attention=attn).float().eval()
    batch = draw_batch(1, shape=(1, T))
    if kind == "padded":
        batch["attention_mask"] = torch.ones(1, T).long()
        batch["attention_mask"][0, :100] = 0
    else:
        batch["position_ids"] = torch.arange(T)[None] % 500
    with torch.no_grad(), _Largest() as largest:
        model(**batch, use_cache=False)
    assert (largest.elements < T * T / 2) == (attn == "mamlfast")


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_gives_the_tokens_of_the_other_kinds(name, cache):
    batch = draw_batch(5, shape=(3, 6))
    batch["attention_mask"] = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    del batch["labels"]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    other = "eager" if name == "gemma2" else "sdpa"
    with float64_throughout():
        got, want = (
            tiny_model(name, attention=kind).eval().generate(**batch, **options) for kind in ("mamlfast", other)
        )
    assert torch.equal(got.sequences, want.sequences) and got.sequences.shape == (3, 16)
    assert len(set(got.sequences[0].tolist())) > 4  # and not one token all along
    torch.testing.assert_close(got.logits, want.logits, rtol=FLOAT64, atol=FLOAT64)


def window(keys):
    return masking_utils.sliding_window_causal_mask_function(keys)


def packing(function=masking_utils.causal_mask_function):
    positions = torch.tensor(STARTS)
    ids = masking_utils.find_packed_sequence_indices(positions)
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(function, positions, ids)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(ids))


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window of 1": window(1),
    "window of 3": window(3),
    "window of 100": window(100),
    "window to both sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    "window to both sides but for one key": masking_utils.sliding_window_bidirectional_mask_function(7),
    "wide window to both sides": masking_utils.sliding_window_bidirectional_mask_function(20),
    "packed": packing(),
    "packed in a window": packing(window(3)),
}
# q_length, kv_length, q_offset, kv_offset
CACHES = {
    "none": (9, 9, 0, 0),
    "prefill": (3, 9, 6, 0),
    "step": (1, 9, 8, 0),
    "static": (3, 12, 4, 0),
    "empty static": (3, 12, 0, 0),
    "cut": (2, 5, 6, 3),
}
PADDINGS = {
    "none": lambda length: None,
    "ones": lambda length: torch.ones(2, length),
    "left": lambda length: (torch.arange(length) >= torch.tensor([[2], [0]])).long(),
    "right": lambda length: torch.arange(length) < torch.tensor([[length - 2], [length]]),
    "short": lambda length: torch.ones(2, length - 1).bool(),
    "long": lambda length: torch.ones(2, length + 3).bool(),
}


def seen(answer, q_length, kv_length):
    """[B, 1, T, S] from the words of an answer."""
    if answer is None:
        return (torch.arange(kv_length) <= torch.arange(q_length)[:, None] + kv_length - q_length).expand(2, 1, -1, -1)
    if answer.ndim == 4:
        return answer
    words = answer._mamlfast_visible.options()
    place, key = torch.arange(q_length)[:, None] + words["offset"], torch.arange(kv_length)
    (left, right), far = words["window"], 10**6
    shown = (key >= place - (far if left is None else left)) & (key <= place + (far if right is None else right))
    shown = (shown & (key <= place)) if words["causal"] else shown
    shown = shown.expand(2, 1, -1, -1)
    if words["segments"] is not None:
        shown = shown & (words["segments"][:, None, :, None] == words["segments"][:, None, None])
    return shown if words["key_mask"] is None else shown & words["key_mask"][:, None, None]


@pytest.mark.parametrize(
    ("function", "cache"),
    # transformers looks for packed sequences only without a cache
    [(name, cache) for name in FUNCTIONS for cache in CACHES if cache == "none" or not name.startswith("packed")],
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_every_answer_shows_what_the_dense_mask_shows(function, cache, padding):
    q_length, kv_length, q_offset, kv_offset = CACHES[cache]
    padded = PADDINGS[padding](kv_length + kv_offset)
    args = 2, q_length, kv_length, q_offset, kv_offset, FUNCTIONS[function]
    answer = mask(*args, padded, allow_is_bidirectional_skip=True)
    want = masking_utils.sdpa_mask(*args, None if padded is None else padded.bool(), allow_is_causal_skip=False)
    assert answer is None or answer.shape == (2, kv_length)
    assert torch.equal(seen(answer, q_length, kv_length), want)
    if (padding, cache) == ("none", "none"):
        assert (answer is None) == (function == "causal")
    if padding in ("none", "ones", "long") and answer is not None:
        assert answer._mamlfast_visible.key_mask is None


UNKNOWN = {
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2).long()),
    "either": masking_utils.or_masks(masking_utils.causal_mask_function, window(3)),
    "blocks": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(2, 9).long())
    ),
    "two windows": masking_utils.and_masks(window(3), window(5)),
    "of the model's own": lambda b, h, q, k: (k <= q) & (k != 2),
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("function", UNKNOWN)
def test_what_is_not_known_gets_the_dense_mask_and_that_is_said_once(function, padding, caplog):
    padded = PADDINGS[padding](9)
    args = 2, 9, 9, 0, 0, UNKNOWN[function]
    for _ in range(2):
        answer = mask(*args, padded)
    want = masking_utils.sdpa_mask(*args, None if padded is None else padded.bool(), allow_is_causal_skip=False)
    assert answer.shape == (2, 1, 9, 9) and torch.equal(answer, want)
    assert ["quadratic in length" in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"q_offset": torch.tensor(0)}, "static"),
        ({"q_offset": 0, "kv_offset": 2}, "before the first key"),
        ({"allow_is_causal_skip": False}, "asks for the mask itself"),
        ({"attention_mask": torch.ones(1, 9).bool()}, "not one of [batch, keys]"),
        ({"mask_function": packing(), "q_offset": 1}, "packed sequences meet a cache"),
    ],
)
def test_what_cannot_be_said_in_words_gets_the_dense_mask(changed, reason, caplog, monkeypatch):
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *args, allow_is_causal_skip: args)
    arguments = {"q_offset": 0, "kv_offset": 0, "mask_function": window(3), "attention_mask": None} | changed
    switches = {key: arguments.pop(key) for key in changed if key.startswith("allow")}
    assert mask(2, 9, 9, **arguments, **switches) == (2, 9, 9, *arguments.values())
    assert reason in caplog.text


def test_a_dense_mask_of_the_callers_is_all_there_is():
    model, batch = tiny_model("llama", attention="mamlfast"), draw_batch(3)
    shown = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    shown = shown | torch.eye(9, dtype=torch.bool)
    for given in (shown, torch.zeros(shown.shape, dtype=torch.double).masked_fill(~shown, -torch.inf)):
        batch |= {"attention_mask": given, "position_ids": torch.tensor(STARTS)}
        want = logits(tiny_model("llama", attention="sdpa"), batch)
        torch.testing.assert_close(logits(model, batch), want, rtol=FLOAT64, atol=FLOAT64)


def test_a_chunked_model_runs_on_its_dense_mask(caplog):
    config = transformers.Llama4TextConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        intermediate_size_mlp=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_local_experts=2,
        attention_chunk_size=4,
        pad_token_id=0,
        layer_types=["chunked_attention", "full_attention"],
    )
    models = []
    for kind in ("mamlfast", "eager"):
        torch.manual_seed(0)
        models.append(transformers.Llama4ForCausalLM._from_config(config, attn_implementation=kind).double())
        config = copy.deepcopy(config)
    batch = draw_batch(3, padded="both")
    got, want = (logits(model, batch)[real(batch)] for model in models)
    torch.testing.assert_close(got, want, rtol=FLOAT64, atol=FLOAT64)
    assert "chunked_overlay" in caplog.text


class Layer(torch.nn.Module):
    """Four heads of width 3 on the interface."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        generator = torch.Generator().manual_seed(0)
        weights = {"q": (4, 3), "k": (2, 3), "v": (2, 3)}
        self.weights = torch.nn.ParameterDict(
            {name: torch.randn(5, *shape, generator=generator).double() for name, shape in weights.items()}
        )
        self.sinks = torch.nn.Parameter(torch.randn(4, generator=generator).double())

    def forward(self, x, answer=None, **options):
        q, k, v = (torch.einsum("btm,mhd->bhtd", x, self.weights[name]) for name in "qkv")
        return attention(self, q, k, v, answer, **(self.options | options))[0]


def test_sinks_are_parameters_to_second_order():
    layer, x = Layer(scaling=0.7), torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1)).double()

    def reference(weights):
        q, k, v = (torch.einsum("btm,mhd->bhtd", x, weights[f"weights.{name}"]) for name in "qkv")
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (0.7 * q @ k.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        sinks = weights["sinks"][None, :, None, None].expand(2, 4, 5, 1)
        return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2).pow(3).sum()

    params = {name: p.detach() for name, p in layer.named_parameters()}
    u = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).double() for name, p in params.items()}

    def loss(p, x):
        return torch.func.functional_call(_WithSinks(layer), {f"layer.{n}": t for n, t in p.items()}, (x,)).pow(3).sum()

    _, want = torch.func.jvp(torch.func.grad(reference), (params,), (u,))
    assert relative_error(mamlfast.hvp(loss, params, u, x), want) < FLOAT64
    assert torch.func.grad(reference)(params)["sinks"].norm() > 0.1


class _WithSinks(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, s_aux=self.layer.sinks)


def test_what_a_layer_says_holds_where_nobody_asked_for_a_mask():
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).double()
    layer = Layer()
    layer.is_causal = False
    assert torch.equal(layer(x), layer(x, is_causal=False))
    assert not torch.allclose(layer(x), layer(x, is_causal=True))
    padding = torch.ones(2, 7).long()
    padding[0, 4:] = 0
    shown = padding.bool()[:, None, None] & torch.ones(7, 7).tril().triu(-2).bool()
    got, want = layer(x, padding, is_causal=True, sliding_window=3), layer(x, shown)
    torch.testing.assert_close(got, want, rtol=FLOAT64, atol=FLOAT64)


def test_dropout_is_for_training_and_repeats_with_the_generator():
    x, layer = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).double(), Layer(dropout=0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(layer(x))
    assert torch.equal(*runs) and not torch.equal(runs[0], layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x, dropout=0.0))


def test_autocast_computes_in_its_own_type():
    """Norms and rotations may leave queries and keys in float32, with values as the product before made them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, generator=generator) for _ in "qkv")
    exact = attention(Layer(), q, k, v, None)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention(Layer(), q, k, v.bfloat16(), None)[0]
    assert rounded.dtype == torch.bfloat16
    assert 1e-5 < (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_without_a_mask_the_last_query_stands_at_the_last_key():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, generator=generator).double() for _ in "qkv")
    want = attention(Layer(), q, k, v, None)[0]
    got = attention(Layer(), q[:, :, 4:], k, v, None)[0]
    torch.testing.assert_close(got, want[:, 4:], rtol=FLOAT64, atol=FLOAT64)


def test_a_mask_without_a_window_outweighs_the_layers_own():
    """Some models make the plain causal mask and give every layer ``config.sliding_window`` all the same."""
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).double()
    answer = mask(2, 7, 7, config=SimpleNamespace(sliding_window=3))
    assert torch.equal(Layer()(x, answer, sliding_window=3), Layer()(x))
    assert mask(2, 7, 7, config=SimpleNamespace(sliding_window=None)) is None


@pytest.mark.parametrize("name", attention_interface.UNSERVED)
def test_an_option_that_attention_does_not_have_is_refused(name):
    with pytest.raises(NotImplementedError, match=f'Layer gives its attention {name}.*"eager"'):
        Layer()(torch.ones(1, 2, 5).double(), **{name: torch.ones(1)})


@pytest.mark.parametrize("config", [transformers.BloomConfig, transformers.MptConfig, transformers.T5Config])
def test_a_model_with_an_attention_of_its_own_is_refused(config):
    """Loaded under our name it would take None for a mask that shows everything."""
    small = {"n_layer": 1, "n_layers": 1, "num_layers": 1, "hidden_size": 8, "d_model": 8, "n_heads": 2, "num_heads": 2}
    model = transformers.AutoModel.from_config(config(vocab_size=9, **small), attn_implementation="mamlfast")
    ids = torch.ones(1, 3).long()
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    name = config.__name__.removesuffix("Config")
    with pytest.raises(NotImplementedError, match=f'{name}.*through transformers.*attn_implementation="eager"'):
        model(input_ids=ids, **decoder)


def test_a_mask_of_other_lengths_is_refused():
    with pytest.raises(ValueError, match="made for 3 queries and 4 keys; the layer has 2 and 2"):
        Layer()(torch.ones(1, 2, 5).double(), mask(1, 3, 4, 1, 0, window(2)))


def test_weights_that_are_asked_for_are_not_there_and_that_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "mamlfast"):
        for _ in range(2):
            Layer()(torch.ones(1, 2, 5).double(), output_attentions=True)
    assert [r.message.partition(" has")[0] for r in caplog.records] == ["mamlfast attention"]
