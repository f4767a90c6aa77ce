"""The Triton kernels of attention through their launchers, in the interpreter."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.func import jvp, vjp

from mamlfast.ops.attention_reference import attention_reference, hidden_pairs

pytest.importorskip("triton")

from mamlfast_kernels import attention as kernels  # noqa: E402  (Triton has to be there)
from mamlfast_kernels.attention_sizes import Tile, Tiles, tiles_for  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

# Both sides compute in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SMALL = Tile(queries=16, keys=16)
TILES_OF_16 = Tiles(fwd=SMALL, bwd_q=SMALL, bwd_kv=(SMALL,))


@dataclass(frozen=True, kw_only=True)
class _Case:
    """Sizes of one call and what is asked besides; ``ids`` and ``hidden`` become segments and a mask."""

    B: int = 1
    H: int = 1
    G: int = 1
    T: int
    S: int
    D: int = 16
    E: int = 16
    ids: tuple[list[list[int]], list[list[int]]] | None = None
    hidden: tuple[int, slice] | None = None
    options: dict[str, Any]

    def spec(self):
        segments = None if self.ids is None else tuple(torch.tensor(x) for x in self.ids)
        key_mask = None
        if self.hidden is not None:
            batch, keys = self.hidden
            key_mask = torch.ones(self.B, self.S, dtype=torch.bool)
            key_mask[batch, keys] = False
        return kernels.AttentionSpec(scale=0.3, segments=segments, key_mask=key_mask, **self.options)

    def draw(self, dtype=torch.float64):
        """q, k, v, their tangents, o_bar and its tangent."""
        gen = torch.Generator().manual_seed(0)
        shapes = [(self.B, self.H, self.T, self.D), (self.B, self.G, self.S, self.D), (self.B, self.G, self.S, self.E)]
        shapes = [*shapes, *shapes, *[(self.B, self.H, self.T, self.E)] * 2]
        return [torch.randn(shape, dtype=torch.float64, generator=gen).to(dtype) for shape in shapes]


PACKED = [[4] * 9 + [2] * 17 + [7] * 11]
CASES = {
    "causal": _Case(T=37, S=37, options={"causal": True}),
    "full, T != S": _Case(T=18, S=35, D=24, E=24, options={}),
    "grouped heads": _Case(B=2, H=4, G=2, T=17, S=17, options={"causal": True}),
    "more queries than keys": _Case(T=35, S=18, options={"causal": True}),
    "one query, one key": _Case(T=1, S=1, options={"causal": True}),
    "queries at the end of a cache": _Case(T=5, S=41, options={"causal": True, "offset": 36}),
    "queries before the first key": _Case(T=36, S=20, options={"causal": True, "offset": -18}),
    "sliding window": _Case(T=53, S=53, options={"causal": True, "window": (20, None)}),
    "narrow window": _Case(T=37, S=37, options={"causal": True, "window": (0, None)}),
    "window to both sides": _Case(T=37, S=40, options={"window": (3, 19)}),
    "soft-cap": _Case(T=18, S=18, options={"causal": True, "softcap": 1.5}),
    "packed": _Case(T=37, S=37, ids=(PACKED, PACKED), options={"causal": True}),
    "segments in any order": _Case(
        T=18, S=20, ids=([[3, 0, 3, 1, 9, 9] * 3], [[9, 3, 0, 5] * 5]), options={"window": (None, 9)}
    ),
    "padding to the left": _Case(B=2, T=20, S=20, hidden=(1, slice(0, 5)), options={"causal": True}),
    "padding within": _Case(B=2, T=5, S=36, hidden=(0, slice(3, 34)), options={}),
    "nothing but padding": _Case(B=2, T=17, S=17, hidden=(0, slice(None)), options={}),
    "dropout": _Case(B=2, H=2, G=1, T=9, S=18, E=24, options={"dropout": 0.3, "seed": 7}),
    "dropout of most": _Case(T=35, S=35, options={"causal": True, "dropout": 0.9, "seed": (1 << 63) - 1}),
    "everything": _Case(
        B=2,
        H=2,
        T=19,
        S=19,
        D=20,
        E=36,
        ids=([[0] * 7 + [1] * 12] * 2,) * 2,
        hidden=(1, slice(15, None)),
        options={"causal": True, "window": (5, None), "softcap": 2.0, "dropout": 0.2, "seed": 1 << 33},
    ),
}


def _reference(q, k, v, *sinks, spec):
    """o and lse with every score in memory."""
    k_rows = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = spec.scale * q @ k_rows.mT
    scores = scores if spec.softcap is None else spec.softcap * torch.tanh(scores / spec.softcap)
    parts = [slice(0, n) for n in (len(q), *scores.shape[-2:])]
    hidden = hidden_pairs(spec, *parts, q.device)
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    for sink in sinks:
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    empty = (scores == -torch.inf).all(-1)
    lse = scores.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)
    return attention_reference(q, k, v, *sinks, spec=spec), lse


def _oracle(drawn, spec):
    """(o, lse), their tangents, (q_bar, k_bar, v_bar), their tangents."""
    xs, xs_dot, (o_bar, o_bar_dot) = tuple(drawn[:3]), tuple(drawn[3:6]), drawn[6:]

    def pullback(xs, o_bar):
        return vjp(lambda *xs: _reference(*xs, spec=spec)[0], *xs)[1](o_bar)

    return *jvp(lambda *xs: _reference(*xs, spec=spec), xs, xs_dot), *jvp(pullback, (xs, o_bar), (xs_dot, o_bar_dot))


def _run(drawn, spec, tiles=TILES_OF_16):
    """The same from the kernels."""
    xs, (o_bar, o_bar_dot) = drawn[:6], drawn[6:]
    o, o_dot, lse, mu = kernels.attention_fwd_jvp(*xs, spec=spec, tiles=tiles)
    bars = kernels.attention_bwd_jvp(*xs, o, o_dot, lse, mu, o_bar, o_bar_dot, spec=spec, tiles=tiles)
    return (o, lse), (o_dot, mu), *bars


@pytest.mark.parametrize("name", CASES)
def test_values_and_tangents_of_forward_and_backward_match_torch_func(name):
    case = CASES[name]
    drawn, spec = case.draw(), case.spec()
    torch.testing.assert_close(_run(drawn, spec), _oracle(drawn, spec), **EXACT)


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_first_order_alone_gives_the_same_bits(name):
    case = CASES[name]
    drawn, spec = case.draw(), case.spec()
    (o, lse), _, bars, _ = _run(drawn, spec)
    assert all(map(torch.equal, kernels.attention_fwd(*drawn[:3], spec=spec, tiles=TILES_OF_16), (o, lse)))
    alone = kernels.attention_bwd(*drawn[:3], o, lse, drawn[6], spec=spec, tiles=TILES_OF_16)
    assert all(map(torch.equal, alone, bars))


@pytest.mark.parametrize("name", ["sliding window", "everything"])
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(
            fwd=Tile(queries=32, keys=16),
            bwd_q=Tile(queries=16, keys=32),
            bwd_kv=(Tile(queries=32, keys=16), Tile(queries=16, keys=64)),
        ),
        tiles_for((8, 0), 64, None, True),
    ],
    ids=["unequal", "default"],
)
def test_the_size_of_a_tile_changes_nothing(name, tiles):
    case = CASES[name]
    drawn, spec = case.draw(), case.spec()
    torch.testing.assert_close(_run(drawn, spec, tiles), _oracle(drawn, spec), **EXACT)


def _layouts(x):
    """One tensor as Hugging Face passes it, as a part of a fused projection, and otherwise."""
    B, H, T, D = x.shape
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.cat([x, x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., D : 2 * D]
    yield x.mT.contiguous().mT


@pytest.mark.parametrize("which", range(3))
def test_strides_change_nothing_and_results_are_laid_out_as_their_inputs(which):
    case = _Case(B=2, H=2, G=1, T=9, S=18, options={"causal": True})
    drawn, spec = case.draw(), case.spec()
    strided = [list(_layouts(x))[which] for x in drawn]
    strided[3] = drawn[3]  # a tangent that is not laid out as its value
    got = _run(strided, spec)
    torch.testing.assert_close(got, _run(drawn, spec), rtol=0, atol=0)
    if which < 2:  # heads before rows in memory: what follows is a view and not a copy
        assert all(x.transpose(1, 2).is_contiguous() for x in (got[0][0], got[1][0], *got[2], *got[3]))


def test_views_with_a_contiguous_last_dimension_are_read_in_place(monkeypatch):
    case = _Case(B=2, H=2, G=1, T=9, S=18, options={"causal": True})
    strided = [list(_layouts(x))[1] for x in case.draw()]
    given = {x.data_ptr() for x in strided}
    read = set()
    launch = kernels._launch

    def recording(kernel, owned, tile, arguments):
        read.update(x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor))
        launch(kernel, owned, tile, arguments)

    monkeypatch.setattr(kernels, "_launch", recording)
    _run(strided, case.spec())
    assert given <= read


def test_a_cotangent_that_is_one_number_expanded_is_read_rightly():
    case = CASES["causal"]
    drawn, spec = case.draw(), case.spec()
    want = _oracle([*drawn[:6], torch.ones_like(drawn[6]), drawn[7]], spec)
    drawn[6] = torch.ones((), dtype=torch.float64).expand_as(drawn[6])
    torch.testing.assert_close(_run(drawn, spec), want, **EXACT)


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0), (0, 0)])
def test_no_queries_or_no_keys_give_zeros_or_nothing(T, S):
    case = _Case(T=T, S=S, options={"causal": True})
    (o, lse), (o_dot, mu), bars, bar_dots = _run(case.draw(), case.spec())
    assert lse.shape == mu.shape == (1, 1, T) and bool((lse == -torch.inf).all())
    assert all(not x.any() for x in (o, o_dot, mu, *bars, *bar_dots))


@pytest.mark.parametrize(
    ("options", "unseen"),
    [({"causal": True}, slice(32, None)), ({"causal": True, "window": (3, None), "offset": 40}, slice(0, 32))],
)
def test_tiles_that_no_query_sees_are_not_read(options, unseen):
    case = _Case(T=16, S=64, options=options)
    drawn, spec = case.draw(), case.spec()
    want = _run(drawn, spec)
    for i in (1, 2, 4, 5):
        drawn[i][:, :, unseen] = torch.nan
    got = _run(drawn, spec)
    torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0)
    assert torch.equal(got[2][0], want[2][0]) and torch.equal(got[3][0], want[3][0])


# The programs of the other sequence compute with NaN.
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_a_packed_sequence_does_not_read_the_tiles_of_another():
    ids = ([[0] * 32 + [1] * 32],) * 2
    case = _Case(T=64, S=64, ids=ids, options={"causal": True})
    drawn, spec = case.draw(), case.spec()
    want = _run(drawn, spec)
    for x in drawn:
        x[:, :, 32:] = torch.nan
    for got_group, want_group in zip(_run(drawn, spec), want, strict=True):
        for got, whole in zip(got_group, want_group, strict=True):
            assert torch.equal(got[:, :, :32], whole[:, :, :32])


# Errors relative to the norm: some roundings of the sum's type, or of the factors of its products.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_smaller_types_are_as_exact_as_they_can_be(name, dtype, tolerance):
    case = CASES[name]
    drawn, spec = case.draw(dtype), case.spec()
    got = _run(drawn, spec)
    for group, exact in zip(got, _oracle([x.double() for x in drawn], spec), strict=True):
        for x, y in zip(group, exact, strict=True):
            seen = y != -torch.inf
            assert (x.double() - y)[seen].norm() <= tolerance * y[seen].norm()
    assert {x.dtype for x in (got[0][0], got[1][0], *got[2], *got[3])} == {dtype}
    assert {got[0][1].dtype, got[1][1].dtype} == {torch.float32}


def test_bfloat16_comes_back_as_it_came():
    """Its rounding is for a GPU to show: the interpreter computes in float32."""
    case = CASES["causal"]
    drawn = case.draw(torch.bfloat16)
    got = _run(drawn, case.spec())
    assert {x.dtype for x in (got[0][0], got[1][0], *got[2], *got[3])} == {torch.bfloat16}
    want = _oracle([x.double() for x in drawn], case.spec())
    torch.testing.assert_close(got[3][0].double(), want[3][0], rtol=2e-2, atol=2e-2)


def _dual_transpose(drawn, spec, swap):
    """Cotangents of (xs, xs_dot) given those of (o, o_dot), from ``attention_bwd_jvp`` and from torch.func."""
    xs, (o_cot, o_dot_cot) = drawn[:6], drawn[6:]
    o, o_dot, lse, mu = kernels.attention_fwd_jvp(*xs, spec=spec, tiles=TILES_OF_16)
    bars = (o_dot_cot, o_cot) if swap else (o_cot, o_dot_cot)
    xs_bar, xs_bar_dot = kernels.attention_bwd_jvp(*xs, o, o_dot, lse, mu, *bars, spec=spec, tiles=TILES_OF_16)

    def dual(*xs):
        return jvp(lambda *xs: _reference(*xs, spec=spec)[0], xs[:3], xs[3:])

    return (*xs_bar_dot, *xs_bar), vjp(dual, *xs)[1]((o_cot, o_dot_cot))


def test_the_transpose_of_the_dual_map_is_the_backward_with_cotangents_swapped():
    case = CASES["causal"]
    torch.testing.assert_close(*_dual_transpose(case.draw(), case.spec(), swap=True), **EXACT)


def test_cotangents_that_are_not_swapped_are_noticed():
    case = CASES["causal"]
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(*_dual_transpose(case.draw(), case.spec(), swap=False), **EXACT)


def test_the_backward_of_the_backward_is_made_of_the_same_two_functions():
    """Along u: the inputs' cotangents are ``bwd_jvp(u, o_bar_dot = 0)``, that of o_bar is ``fwd_jvp(u)``."""
    case = CASES["causal"]
    drawn, spec = case.draw(), case.spec()
    drawn[7].zero_()
    _, (o_dot, _), _, xs_bar_dot = _run(drawn, spec)

    def pullback(q, k, v, o_bar):
        return vjp(lambda *xs: _reference(*xs, spec=spec)[0], q, k, v)[1](o_bar)

    want = vjp(pullback, *drawn[:3], drawn[6])[1](tuple(drawn[3:6]))
    torch.testing.assert_close((*xs_bar_dot, o_dot), want, **EXACT)


@pytest.mark.parametrize("dropped", ["mu", "o_dot"])
def test_a_dropped_term_is_noticed(dropped):
    """Without mu the normaliser has no tangent; without o_dot delta_dot loses its second term."""
    case = CASES["causal"]
    drawn, spec = case.draw(), case.spec()
    (o, lse), (o_dot, mu), _, want = _run(drawn, spec)
    o_dot, mu = (torch.zeros_like(x) if name == dropped else x for name, x in (("o_dot", o_dot), ("mu", mu)))
    _, wrong = kernels.attention_bwd_jvp(*drawn[:6], o, o_dot, lse, mu, *drawn[6:], spec=spec, tiles=TILES_OF_16)
    for got, right in list(zip(wrong, want, strict=True))[: 3 if dropped == "mu" else 2]:
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(got, right, **EXACT)


@pytest.mark.parametrize("name", ["queries before the first key", "dropout of most"])
def test_the_backward_takes_a_normaliser_with_a_sink_in_it(name):
    """Given lse, o and their tangents with a further term in them, and rows that see nothing but that."""
    case = CASES[name]
    drawn, spec = case.draw(), case.spec()
    sink, sink_dot = torch.tensor([0.4], dtype=torch.float64), torch.tensor([-0.7], dtype=torch.float64)

    def forward(*xs):
        return _reference(*xs, spec=spec)

    def pullback(xs, sink, o_bar):
        return vjp(lambda *xs: forward(*xs, sink)[0], *xs)[1](o_bar)

    xs, xs_dot, o_bar, o_bar_dot = tuple(drawn[:3]), tuple(drawn[3:6]), *drawn[6:]
    (o, lse), (o_dot, mu) = jvp(forward, (*xs, sink), (*xs_dot, sink_dot))
    want = jvp(pullback, (xs, sink, o_bar), (xs_dot, sink_dot, o_bar_dot))
    got = kernels.attention_bwd_jvp(*xs, *xs_dot, o, o_dot, lse, mu, o_bar, o_bar_dot, spec=spec, tiles=TILES_OF_16)
    torch.testing.assert_close(got, want, **EXACT)
    first = kernels.attention_bwd(*xs, o, lse, o_bar, spec=spec, tiles=TILES_OF_16)
    torch.testing.assert_close(first, want[0], **EXACT)


HALVES = Tiles(fwd=SMALL, bwd_q=SMALL, bwd_kv=(SMALL, SMALL))


@pytest.mark.parametrize("tiles", [TILES_OF_16, HALVES], ids=["together", "halves"])
@pytest.mark.parametrize(
    ("need", "kernels_run"),
    [
        ((True, False, False), ["q"]),
        ((False, True, False), ["q", "kv"]),  # the first for delta alone
        ((False, False, True), ["kv"]),
        ((False, False, False), []),
    ],
)
def test_what_nobody_needs_is_not_computed(need, kernels_run, tiles, monkeypatch):
    case = _Case(H=2, T=5, S=7, options={"dropout": 0.5})
    drawn, spec = case.draw(), case.spec()
    (o, lse), (o_dot, mu), *want = _run(drawn, spec)
    launched = []

    def recording(kernel, owned, tile, arguments):
        launched.append("q" if kernel is kernels._attention_bwd_q_kernel else "kv")
        launch(kernel, owned, tile, arguments)

    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", recording)
    options = {"spec": spec, "need": need, "tiles": tiles}
    got = kernels.attention_bwd_jvp(
        *drawn[:6], o, o_dot, lse, mu, *drawn[6:], need_dot=(False, False, False), **options
    )
    first = kernels.attention_bwd(*drawn[:3], o, lse, drawn[6], **options)
    assert launched == kernels_run * 2
    for bars, whole in ((got[0], want[0]), (got[1], want[1]), (first, want[0])):
        assert [x is not None for x in bars] == list(need)
        assert all(torch.equal(x, y) for x, y in zip(bars, whole, strict=True) if x is not None)


def test_a_tangent_alone_may_be_needed():
    drawn, spec = (case := _Case(T=5, S=7, options={})).draw(), case.spec()
    (o, lse), (o_dot, mu), _, want = _run(drawn, spec)
    nothing = (False, False, False)
    options = {"spec": spec, "need": nothing, "need_dot": (False, False, True), "tiles": TILES_OF_16}
    _, (q_bar_dot, k_bar_dot, v_bar_dot) = kernels.attention_bwd_jvp(
        *drawn[:6], o, o_dot, lse, mu, *drawn[6:], **options
    )
    assert q_bar_dot is None and k_bar_dot is None and torch.equal(v_bar_dot, want[2])


def test_a_tangent_that_is_none_is_zero():
    drawn, spec = (case := _Case(T=5, S=7, options={"causal": True})).draw(), case.spec()
    absent, zero = list(drawn), list(drawn)
    for i in (4, 5, 7):
        absent[i], zero[i] = None, torch.zeros_like(drawn[i])
    torch.testing.assert_close(_run(absent, spec), _run(zero, spec), rtol=0, atol=0)


def test_two_runs_give_the_same_bits():
    case = CASES["dropout"]
    drawn, spec = case.draw(), case.spec()
    torch.testing.assert_close(_run(drawn, spec), _run(drawn, spec), rtol=0, atol=0)


def test_another_seed_is_noticed():
    case = CASES["dropout of most"]
    drawn, spec = case.draw(), case.spec()
    want = _oracle(drawn, replace(spec, seed=spec.seed - 1))
    for got, other in zip(_run(drawn, spec), want, strict=True):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(got[0], other[0], **EXACT)


def test_a_dense_mask_is_refused():
    q = torch.zeros(1, 1, 2, 16)
    spec = kernels.AttentionSpec(scale=1.0, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no dense mask"):
        kernels.attention_fwd(q, q, q, spec=spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 4, 16)}, "G dividing H"),
        ({"q": torch.zeros(3, 4, 16)}, "four dimensions, got 3, 4, 4"),
        ({"q": torch.zeros(1, 2, 4, 15), "k": torch.zeros(1, 2, 5, 15)}, "16 to 256, got 15 for q"),
        ({"v": torch.zeros(1, 2, 6, 16)}, "G dividing H"),
        ({"v": torch.zeros(1, 2, 5, 16, dtype=torch.float64)}, "share dtype"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, r"key_mask must be bool \[1, 5\]"),
        ({"key_mask": torch.ones(1, 5)}, "key_mask must be bool"),
        ({"segments": (torch.zeros(1, 5), torch.zeros(1, 5))}, r"segments must be \[1, 4\] and \[1, 5\]"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"window": (-1, None)}, "window must be"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    xs = {name: change.pop(name, torch.zeros(1, 2, n, 16)) for name, n in (("q", 4), ("k", 5), ("v", 5))}
    with pytest.raises(ValueError, match=message):
        kernels.attention_fwd(**xs, spec=kernels.AttentionSpec(**({"scale": 1.0} | change)))
