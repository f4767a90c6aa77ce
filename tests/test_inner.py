"""Inner optimizers against torch.optim step by step, and their transposes against autograd."""

import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import mamlfast
from mamlfast.inner import SGD, Adam, AdamW

OPTIMIZERS = {
    "sgd": (SGD(lr=0.1), torch.optim.SGD, {}),
    "sgd decay": (SGD(lr=0.1, weight_decay=0.3), torch.optim.SGD, {"weight_decay": 0.3}),
    "momentum": (
        SGD(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.3),
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3},
    ),
    "nesterov": (
        SGD(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.3),
        torch.optim.SGD,
        {"momentum": 0.7, "nesterov": True, "weight_decay": 0.3},
    ),
    "adam": (
        Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-3),
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "eps": 1e-3},
    ),
    "adam decay": (Adam(lr=0.1, weight_decay=0.3), torch.optim.Adam, {"weight_decay": 0.3}),
    "adamw": (AdamW(lr=0.1), torch.optim.AdamW, {}),
    "adamw decay": (AdamW(lr=0.1, weight_decay=0.3), torch.optim.AdamW, {"weight_decay": 0.3}),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_update_is_that_of_torch_optim_and_changes_nothing_in_place(case, clip, learned):
    inner, kind, options = OPTIMIZERS[case]
    inner = type(inner)(
        **{**vars(inner), "clip": clip, "lr": torch.tensor(0.1, dtype=torch.float64) if learned else 0.1}
    )
    params = {"a": draw(3, 4), "b": draw(5, seed=1)}
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = kind(theirs.values(), lr=0.1, **options)
    state = inner.init(params)
    for k in range(6):
        grads = {"a": draw(3, 4, seed=2 + k), "b": draw(5, seed=20 + k)}
        if k == 2:
            del grads["b"]  # torch.optim leaves a parameter without a gradient alone
        before = [p.clone() for p in params.values()], {n: dict(s) for n, s in state.items()}
        after, after_state = inner.update(params, state, grads)
        assert all(torch.equal(p, q) for p, q in zip(params.values(), before[0], strict=True)) and state == before[1]
        params, state = after, after_state
        for name, p in theirs.items():
            p.grad = grads[name].clone() if name in grads else None
        if clip is not None:
            clip_grad_norm_(theirs.values(), clip)
        optimizer.step()
        for name, p in params.items():
            torch.testing.assert_close(p, theirs[name].detach(), rtol=1e-15, atol=1e-15)


def transposes(inner, lr, *, seed=0, slots=None, g=None):
    """Cotangents of (p, moments, g, lr) by ``pull_back`` and by autograd through ``update_one``."""
    p, g = draw(6, seed=seed), draw(6, seed=seed + 1) if g is None else g
    slots = inner.init_one(p) if slots is None else slots
    moments = [slot for slot in inner.moments if slot in slots]
    p_bar = draw(6, seed=seed + 2)
    bars = {slot: draw(6, seed=seed + 3 + i) for i, slot in enumerate(inner.moments)}
    leaves = [x.clone().requires_grad_() for x in (p, g, *(slots[slot] for slot in moments), lr)]
    inside = {**slots, **dict(zip(moments, leaves[2:], strict=False))}
    after, after_slots = inner.update_one(leaves[0], inside, leaves[1], leaves[-1])
    outputs, cotangents = [after, *(after_slots[s] for s in inner.moments)], [p_bar, *bars.values()]
    want = torch.autograd.grad(outputs, leaves, cotangents)
    g_bar, lr_bar = inner.pull_back(p, slots, g, lr, v := p_bar.clone(), bars)
    lr_bar = lr_bar if lr.ndim else lr_bar.sum()
    return [v, g_bar, *(bars[slot] for slot in moments), lr_bar], list(want)


def agree(got, want, tolerance=1e-12):
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("lr", [torch.tensor(0.1, dtype=torch.float64), draw(6, seed=9)], ids=["scalar", "elementwise"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_the_pull_back_is_the_transpose_of_the_update(case, first, lr):
    inner = OPTIMIZERS[case][0]
    later = {"step": 3, "exp_avg": draw(6, seed=7), "exp_avg_sq": draw(6, seed=8) ** 2, "momentum_buffer": draw(6)}
    slots = None if first else {slot: later[slot] for slot in inner.slots}
    assert agree(*transposes(inner, lr, slots=slots))


def test_a_pull_back_without_the_root_of_the_second_moment_is_noticed(monkeypatch):
    monkeypatch.setattr("mamlfast.inner.adam._quotient", lambda m, root: torch.zeros_like(m))
    assert not agree(*transposes(Adam(lr=0.1), torch.tensor(0.1, dtype=torch.float64)), tolerance=1e-3)


@pytest.mark.parametrize("inner", [Adam(lr=0.1, eps=1e-3), AdamW(lr=0.1, eps=1e-3)])
def test_at_a_zero_gradient_adam_has_the_slope_of_its_limit_where_autograd_has_none(inner):
    lr = torch.tensor(0.1, dtype=torch.float64)
    g = torch.tensor([0.0, 1.0, 0.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    got, want = transposes(inner, lr, g=g)
    assert agree(got, want) and all(torch.isfinite(x).all() for x in got)

    p = torch.zeros((), dtype=torch.float64)
    zero = inner.init_one(p)
    bars = {"exp_avg": p, "exp_avg_sq": p}
    slope = float(inner.pull_back(p, zero, p.clone(), 0.1, torch.ones_like(p), bars)[0])
    assert math.isclose(slope, -0.1 / 1e-3)  # the bias correction of the first step cancels 1 - beta1
    h = 1e-9
    ahead, behind = (inner.update_one(p, zero, torch.tensor(x).double(), 0.1)[0] for x in (h, -h))
    assert math.isclose(float(ahead - behind) / (2 * h), slope, rel_tol=1e-4)

    s = torch.zeros((), dtype=torch.float64, requires_grad=True)  # what torch makes of it
    g0 = torch.zeros((), dtype=torch.float64, requires_grad=True)
    naive = 0.1 * g0 / ((0.001 * g0**2 + 0 * s).sqrt() + 1e-3)
    assert torch.autograd.grad(naive, g0)[0].isnan()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Adam(lr=-1.0), ValueError, "lr must be finite and not negative; got -1.0"),
        (lambda: AdamW(lr=float("nan")), ValueError, "lr must be finite"),
        (lambda: SGD(lr=torch.tensor(float("nan"))), ValueError, "lr must be finite"),
        (lambda: SGD(lr=torch.tensor(1)), TypeError, "floating-point"),
        (lambda: SGD(lr={"a": -1.0}), ValueError, r"lr\['a'\] must be"),
        (lambda: SGD(lr=[0.1, {"a": "x"}]), TypeError, r"lr\[1\]\['a'\] must be a number"),
        (lambda: SGD(lr=[]), ValueError, "empty list"),
        (lambda: Adam(lr=0.1, betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be below 1"),
        (lambda: Adam(lr=0.1, betas=(-0.1, 0.9)), ValueError, r"betas\[0\] must be"),
        (lambda: Adam(lr=0.1, betas=(0.9,)), ValueError, "two numbers"),
        (lambda: Adam(lr=0.1, eps=-1.0), ValueError, "eps must be"),
        (lambda: SGD(lr=0.1, momentum=-0.1), ValueError, "momentum must be"),
        (lambda: SGD(lr=0.1, nesterov=True), ValueError, "nesterov needs"),
        (lambda: SGD(lr=0.1, weight_decay=-1), ValueError, "weight_decay must be"),
        (lambda: SGD(lr=0.1, clip=float("inf")), ValueError, "clip must be"),
        (lambda: adapt(SGD(lr={"y": 0.1})), ValueError, r"missing \['x'\], unexpected \['y'\]"),
        (lambda: adapt(SGD(lr=[0.1, 0.1])), ValueError, "each of the 1 inner steps; got 2"),
        (lambda: adapt(SGD(lr={"x": torch.ones(3)})), ValueError, r"lr\['x'\] must be a scalar, or.*\(3,\)"),
        (lambda: adapt(SGD(lr=torch.ones(2))), ValueError, "a dict with a tensor for each parameter"),
        (lambda: adapt(torch.optim.SGD), TypeError, "mamlfast.SGD, Adam or AdamW"),
        (lambda: adapt(Adam(lr=0.1), {"y": {}}), ValueError, r"state\['y'\] has no parameter"),
        (lambda: adapt(Adam(lr=0.1), {"x": {"exp_avg": torch.ones(2)}}), ValueError, "step of its moments"),
        (lambda: adapt(SGD(lr=0.1), {"x": {"exp_avg": torch.ones(2)}}), ValueError, "not of this optimizer"),
        (
            lambda: adapt(Adam(lr=0.1), {"x": {"step": 1, "exp_avg": torch.ones(3)}}),
            ValueError,
            r"\['exp_avg'\] must have the shape",
        ),
        (lambda: adapt(Adam(lr=0.1), {"x": {"step": 0.5}}), ValueError, "whole number"),
        (
            lambda: adapt(Adam(lr=0.1), {"x": {"step": 1, "exp_avg_sq": -torch.ones(2)}}),
            ValueError,
            "must not be negative",
        ),
    ],
)
def test_wrong_choices_are_answered_with_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


def adapt(inner, state=None):
    return mamlfast.adapt(lambda p, _: p["x"].sum(), {"x": torch.ones(2)}, [0], inner=inner, state=state)
