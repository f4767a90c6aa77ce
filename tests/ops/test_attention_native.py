"""Attention in C++ against what torch.func makes of the reference."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mamlfast_kernels.attention_spec import AttentionSpec
from torch.func import jvp, vjp

from mamlfast import native
from mamlfast.ops import attention_native
from mamlfast.ops.attention_native import attention_bwd, attention_bwd_jvp, attention_fwd, attention_fwd_jvp
from mamlfast.ops.attention_reference import attention_reference
from tests.rooms import EXACT, mapped, same_bits

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")


def _ids(B, length, run):
    return (torch.arange(B * length) // run).view(B, length)


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# B, H, G, T, S, D, E, and the options besides the scale. A tile is 64 by 64, a chunk of the backward 256 rows.
CASES = {
    "one query": ((1, 1, 1, 1, 1, 8, 8), {}),
    "one query of many keys": ((2, 2, 1, 1, 130, 16, 24), {"causal": True, "offset": 129}),
    "odd lengths": ((2, 4, 2, 63, 77, 24, 8), {}),
    "no key": ((1, 2, 1, 5, 0, 8, 8), {}),
    "causal": ((1, 4, 2, 130, 130, 64, 100), {"causal": True}),
    "several chunks": ((1, 2, 1, 530, 530, 8, 8), {"causal": True}),
    "several chunks of keys": ((1, 1, 1, 70, 600, 8, 8), {}),
    "more queries than keys": ((1, 2, 1, 150, 70, 100, 24), {"causal": True, "offset": -60}),
    "decoding": ((1, 3, 1, 70, 200, 64, 64), {"causal": True, "offset": 130}),
    "window": ((1, 2, 2, 200, 210, 8, 8), {"window": (20, 7)}),
    "sliding window": ((1, 2, 1, 300, 300, 16, 16), {"window": (40, None), "causal": True}),
    "window past all keys": ((1, 1, 1, 90, 20, 8, 8), {"window": (3, 3)}),
    "soft-cap": ((1, 2, 1, 70, 90, 16, 8), {"softcap": 1.5, "causal": True}),
    "packed": ((2, 2, 1, 100, 100, 8, 8), {"segments": (_ids(2, 100, 23), _ids(2, 100, 23)), "causal": True}),
    "packed in any order": ((1, 2, 2, 70, 90, 8, 8), {"segments": (_ids(1, 70, 9) % 4, _ids(1, 90, 7) % 5)}),
    "padded": ((2, 2, 1, 20, 150, 8, 8), {"key_mask": _random(2, 150) > 0.3}),
    "padded by a tile": ((1, 2, 1, 20, 150, 8, 8), {"key_mask": torch.arange(150)[None] >= 70}),
    "bool mask": ((2, 2, 1, 70, 66, 8, 8), {"mask": _random(70, 66) > 0}),
    "bool mask of heads": ((2, 4, 2, 30, 66, 8, 8), {"mask": _random(4, 1, 66) > 0}),
    "additive mask": ((2, 4, 2, 70, 66, 8, 8), {"mask": _random(2, 1, 70, 66)}),
    "additive mask of keys": ((1, 2, 2, 70, 66, 8, 8), {"mask": _random(66).masked_fill(_random(66) > 0, -torch.inf)}),
    "additive mask of queries": ((1, 2, 2, 70, 66, 8, 8), {"mask": _random(1, 2, 70, 1)}),
    "soft-cap and additive mask": ((1, 2, 1, 20, 66, 8, 8), {"mask": _random(20, 66), "softcap": 2.0}),
    "nothing visible": ((1, 2, 1, 20, 66, 8, 8), {"mask": torch.zeros(20, 66, dtype=torch.bool)}),
    "dropout": ((2, 2, 1, 70, 66, 8, 8), {"dropout": 0.3, "seed": 2**40 + 17}),
    "everything": (
        (2, 4, 2, 150, 170, 24, 8),
        {
            "causal": True, "offset": 20, "window": (90, None), "softcap": 2.0, "dropout": 0.2, "seed": 5,
            "segments": (_ids(2, 150, 70) % 2, _ids(2, 170, 70) % 2), "key_mask": _random(2, 170) > -1,
            "mask": _random(2, 1, 150, 1),
        },
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def _spec(case, **changes):
    shape, options = CASES[case]
    return AttentionSpec(**({"scale": shape[5] ** -0.5} | options | changes))


def _draw(case, dtype=torch.float64):
    """xs, xs_dot, (o_bar, o_bar_dot) of order one, the same at every call."""
    B, H, G, T, S, D, E = CASES[case][0]
    torch.manual_seed(0)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, E)
    xs, xs_dot = (tuple(torch.randn(s, dtype=torch.float64) for s in shapes) for _ in range(2))
    return mapped(lambda t: t.to(dtype), (xs, xs_dot, tuple(_random(2, B, H, T, E))))


def _oracle(drawn, spec):
    """o, o_dot, xs_bar, xs_bar_dot from forward and reverse mode of the reference."""
    xs, xs_dot, (o_bar, o_bar_dot) = drawn
    f = partial(attention_reference, spec=spec)

    def pullback(xs, o_bar):
        return vjp(f, *xs)[1](o_bar)

    return *jvp(f, xs, xs_dot), *jvp(pullback, (xs, o_bar), (xs_dot, o_bar_dot))


def _ours(drawn, spec):
    """The same four from the two functions with tangents."""
    xs, xs_dot, bars = drawn
    o, o_dot, lse, mu = attention_fwd_jvp(*xs, *xs_dot, spec=spec)
    return o, o_dot, *attention_bwd_jvp(*xs, *xs_dot, o, o_dot, lse, mu, *bars, spec=spec)


def _first_order(drawn, spec):
    xs, _, (o_bar, _) = drawn
    o, lse = attention_fwd(*xs, spec=spec)
    return o, attention_bwd(*xs, o, lse, o_bar, spec=spec)


@each_case
def test_the_four_functions_match_torch_func_on_the_reference(case):
    drawn, spec = _draw(case), _spec(case)
    want, ours = _oracle(drawn, spec), _ours(drawn, spec)
    torch.testing.assert_close(ours, want, **EXACT)
    torch.testing.assert_close(_first_order(drawn, spec), (want[0], want[2]), **EXACT)


@each_case
def test_tangents_leave_the_bits_of_the_first_order(case):
    drawn, spec = _draw(case, torch.float32), _spec(case)
    o, _, bars, _ = _ours(drawn, spec)
    assert same_bits(_first_order(drawn, spec), (o, bars))


@each_case
def test_float32_is_as_exact_as_float32_allows(case):
    drawn, spec = _draw(case, torch.float32), _spec(case)
    want = _ours(mapped(torch.Tensor.double, drawn), spec)
    # Some dozen roundings of 6e-8 each, on sums of up to a hundred terms of order ten.
    torch.testing.assert_close(mapped(torch.Tensor.double, _ours(drawn, spec)), want, rtol=2e-5, atol=5e-5)


def test_the_row_statistics_are_the_log_sum_exp_and_its_tangent():
    drawn, spec = _draw("decoding"), _spec("decoding")
    (q, k, v), xs_dot, _ = drawn

    def log_sum_exp(q, k):
        scores = spec.scale * q @ k.mT
        hidden = torch.ones(70, 200).triu(131).bool()
        return scores.masked_fill(hidden, -torch.inf).logsumexp(-1)

    *_, lse, mu = attention_fwd_jvp(q, k, v, *xs_dot, spec=spec)
    torch.testing.assert_close((lse, mu), jvp(log_sum_exp, (q, k), xs_dot[:2]), **EXACT)


def test_the_backward_takes_statistics_that_include_a_sink():
    (q, k, v), _, (o_bar, _) = drawn = _draw("causal")
    sink, spec = torch.randn(4, dtype=torch.float64), _spec("causal")
    o, lse = attention_fwd(q, k, v, spec=spec)
    with_sink = torch.logaddexp(lse, sink[:, None])
    o = o * (lse - with_sink).exp()[..., None]
    want = vjp(lambda *xs: attention_reference(*xs, sink, spec=spec), *drawn[0])
    torch.testing.assert_close(o, want[0], **EXACT)
    torch.testing.assert_close(attention_bwd(q, k, v, o, with_sink, o_bar, spec=spec), want[1](o_bar), **EXACT)


def test_strided_inputs_give_the_bits_of_their_copies():
    """Hugging Face passes [B, T, H, D] transposed; a slice of a projection has no aligned rows."""
    drawn, spec = _draw("causal", torch.float32), _spec("causal")
    transposed = mapped(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), drawn)
    sliced = mapped(lambda t: torch.cat([t, t], -1)[..., 3 : 3 + t.shape[-1]].roll(0), drawn)
    every_other = mapped(lambda t: t.repeat_interleave(2, -1)[..., ::2], drawn)
    want = _ours(drawn, spec)
    assert same_bits(_ours(transposed, spec), want)
    assert same_bits(_ours(every_other, spec), want)
    expanded = mapped(lambda t: t[:, :1].expand_as(t), drawn)
    assert same_bits(_ours(expanded, spec), _ours(mapped(torch.Tensor.contiguous, expanded), spec))
    unaligned = mapped(lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape), drawn)
    assert same_bits(_ours(unaligned, spec), want)
    assert same_bits(_ours(sliced, spec), _ours(mapped(torch.clone, sliced), spec))


@pytest.mark.parametrize("case", ["several chunks", "several chunks of keys", "everything"])
def test_the_bits_do_not_depend_on_the_number_of_threads(case, threads):
    drawn, spec = _draw(case, torch.float32), _spec(case)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append((_ours(drawn, spec), _first_order(drawn, spec)))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("case", ["causal", "everything"])
def test_what_is_not_needed_changes_nothing_that_is(case):
    drawn, spec = _draw(case), _spec(case)
    xs, xs_dot, bars = drawn
    o, o_dot, lse, mu = attention_fwd_jvp(*xs, *xs_dot, spec=spec)
    arguments = *xs, *xs_dot, o, o_dot, lse, mu, *bars
    everything = attention_bwd_jvp(*arguments, spec=spec)
    for need in [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]:
        other = tuple(not n for n in need)
        got = attention_bwd_jvp(*arguments, spec=spec, need=need, need_dot=other)
        for values, wanted, full in zip(got, (need, other), everything, strict=True):
            for value, want, exact in zip(values, wanted, full, strict=True):
                assert torch.equal(value, exact) if want else value is None


@pytest.mark.parametrize("absent", range(4), ids=["q_dot", "k_dot", "v_dot", "o_bar_dot"])
def test_an_absent_tangent_is_zero(absent):
    xs, xs_dot, (o_bar, o_bar_dot) = _draw("causal")
    spec, tangents = _spec("causal"), (*xs_dot, o_bar_dot)
    results = []
    for nothing in (None, torch.zeros_like(tangents[absent])):
        *xs_dot, o_bar_dot = (nothing if i == absent else t for i, t in enumerate(tangents))
        o, o_dot, lse, mu = attention_fwd_jvp(*xs, *xs_dot, spec=spec)
        bars = attention_bwd_jvp(*xs, *xs_dot, o, o_dot, lse, mu, o_bar, o_bar_dot, spec=spec)
        results.append((o, o_dot, lse, mu, *bars))
    torch.testing.assert_close(*results, **EXACT)


def test_arguments_are_left_as_they_were():
    drawn = _draw("everything")
    before = mapped(torch.clone, drawn)
    _ours(drawn, _spec("everything"))
    assert same_bits(drawn, before)


def test_a_query_that_is_nan_makes_its_row_nan_and_no_other():
    (q, k, v), xs_dot, bars = _draw("causal")
    q[0, 1, 100, 3] = torch.nan
    o, o_dot, (q_bar, *_), (q_bar_dot, *_) = _ours(((q, k, v), xs_dot, bars), _spec("causal"))
    for x in (o, o_dot, q_bar, q_bar_dot):
        assert x[0, 1, 100].isnan().all()
        x[0, 1, 100] = 0
        assert x.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("argument", ["k", "v", "k_dot", "v_dot", "q", "o_bar"])
def test_what_is_not_finite_reaches_the_pairs_that_are_visible_and_no_others(argument, bad):
    case, at = "causal", 100
    clean, spec = _draw(case), _spec(case)
    xs, xs_dot, bars = spoiled = mapped(torch.clone, clean)
    named = dict(zip(("q", "k", "v", "q_dot", "k_dot", "v_dot", "o_bar"), (*xs, *xs_dot, *bars), strict=False))
    named[argument][0, 0, at, 2] = bad
    was, now = _ours(clean, spec), _ours(spoiled, spec)
    if argument in ("q", "o_bar"):
        hidden, visible = slice(at + 1, None), slice(at)
        results = ((*xs_bar[1:], *xs_bar_dot[1:]) for _, _, xs_bar, xs_bar_dot in (was, now))
    else:
        hidden, visible = slice(at), slice(at, None)
        results = ((o, o_dot, xs_bar[0], xs_bar_dot[0]) for o, o_dot, xs_bar, xs_bar_dot in (was, now))
    some = False
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after[0, 0, hidden], before[0, 0, hidden], **EXACT)
        some |= not after[0, 0, visible].isfinite().all()
    assert some


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_padding_may_hold_anything(bad):
    clean, spec = _draw("padded"), _spec("padded")
    hidden = ~spec.key_mask[:, None, :, None]
    spoil = tuple(x if i == 0 else x.masked_fill(hidden, bad) for i, x in enumerate(clean[0]))
    o, o_dot, bars, bar_dots = _ours(clean, spec)
    spoilt = _ours((spoil, *clean[1:]), spec)
    torch.testing.assert_close(spoilt, (o, o_dot, bars, bar_dots), **EXACT)


def test_a_value_of_a_pair_that_underflows_is_not_forgotten():
    """0 times NaN is NaN where the pair is visible: only hidden ones are spared."""
    q, k, v = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    k[..., 1, :] = -100
    v[..., 1, 0] = torch.nan
    o, _ = attention_fwd(q, k, v, spec=AttentionSpec(scale=1.0))
    assert o[0, 0, 0, 0].isnan()
    assert torch.equal(o[0, 0, 0, 1:], torch.ones(7))


def test_scores_of_any_size_stay_finite():
    q = torch.zeros(1, 1, 3, 8)
    q[0, 0, :, 0] = torch.tensor([1e30, -1e30, 1.0])
    k = torch.zeros(1, 1, 70, 8)
    k[0, 0, :, 0] = torch.linspace(-200, 200, 70)
    v = torch.arange(70.0)[None, None, :, None].expand(1, 1, 70, 8)
    drawn = (q, k, v), (torch.zeros_like(q), torch.zeros_like(k), torch.ones_like(v)), (torch.ones(1, 1, 3, 8),) * 2
    o, o_dot, bars, _ = _ours(drawn, AttentionSpec(scale=1.0))
    torch.testing.assert_close(o[0, 0, :2, 0], torch.tensor([69.0, 0.0]))
    torch.testing.assert_close(o_dot, torch.ones_like(o))
    assert all(x.isfinite().all() for x in bars)


def test_masks_of_another_dtype_and_of_no_memory_are_taken():
    drawn = _draw("additive mask", torch.float32)
    mask = _random(66).bfloat16()
    whole = mask.float().expand(2, 4, 70, 66).contiguous()
    narrow, wide = (AttentionSpec(scale=0.3, mask=m) for m in (mask, whole))
    assert same_bits(_ours(drawn, narrow), _ours(drawn, wide))


def test_a_width_without_elements_or_rows_is_legal():
    empty = torch.empty(1, 2, 0, 8)
    k = torch.randn(1, 1, 3, 8)
    o, lse = attention_fwd(empty, k, k, spec=AttentionSpec(scale=1.0))
    assert o.shape == (1, 2, 0, 8)
    q_bar, k_bar, v_bar = attention_bwd(empty, k, k, o, lse, o, spec=AttentionSpec(scale=1.0))
    assert q_bar.shape == (1, 2, 0, 8)
    assert not k_bar.any()
    assert not v_bar.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.randn(1, 1, 5, 32)}, r"k: expected \[1, 1, 5, 16\]"),
        ({"v": torch.randn(1, 1, 4, 16)}, r"v: expected \[1, 1, 5, 16\]"),
        ({"k": torch.randn(2, 1, 5, 16)}, r"k: expected \[1, 1, 5, 16\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_are_read(change, message):
    tensors = {"q": torch.randn(1, 2, 3, 16), "k": torch.randn(1, 1, 5, 16), "v": torch.randn(1, 1, 5, 16)}
    with pytest.raises(RuntimeError, match=message):
        attention_fwd(**(tensors | change), spec=AttentionSpec(scale=1.0))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16)])
def test_other_dtypes_are_refused(dtypes):
    q, k = (torch.randn(1, 1, 3, 16).to(dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match="float32 or float64 tensors of one dtype"):
        attention_fwd(q, k, k, spec=AttentionSpec(scale=1.0))


def test_a_dropped_term_is_noticed(monkeypatch):
    """The oracle can fail: with the tangent of v forgotten nothing above would pass."""
    drawn, spec = _draw("odd lengths"), _spec("odd lengths")
    whole = attention_native._bwd

    def mutant(xs, xs_dot, *arguments):
        return whole(xs, (*xs_dot[:2], None), *arguments)

    monkeypatch.setattr(attention_native, "_bwd", mutant)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(_ours(drawn, spec), _oracle(drawn, spec), **EXACT)


def sample(dtype):
    """Every result of every kernel, on the same arguments at every call."""
    return {case: _ours(_draw(case, dtype), _spec(case)) for case in ("odd lengths", "causal", "everything")}


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_computes_the_same(capability, tmp_path):
    code = (
        "import sys, torch; from mamlfast import native; native.available(); "
        "from tests.ops.test_attention_native import sample; "
        "torch.save([sample(torch.float32), sample(torch.float64)], sys.argv[1])"
    )
    root, file = Path(__file__).parents[2], tmp_path / "results"
    path = os.pathsep.join(map(str, (root, root / "triton_kernels")))
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, file], check=True, cwd=root, env=environment)
    single, double = torch.load(file)
    here = sample(torch.float32)
    torch.testing.assert_close(double, sample(torch.float64), **EXACT)
    torch.testing.assert_close(single, here, rtol=2e-5, atol=5e-5)
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    same = all(same_bits(single[case], here[case]) for case in here)
    # Wherever a product and a sum are one instruction, every sum has one order: only the others differ.
    assert same == (not fused or capability == "avx2")
