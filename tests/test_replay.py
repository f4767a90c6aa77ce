"""Replay of every inner optimizer, against autograd through the unrolled loop."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mamlfast
from mamlfast import Episode, FirstOrder, Replay, Reptile, Unrolled
from mamlfast.inner import SGD, Adam, AdamW
from tests.models import draw_episode, overall_error, tiny_model

OPTIMIZERS = {
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.1, momentum=0.9, dampening=0.2),
    "nesterov": SGD(lr=0.1, momentum=0.7, nesterov=True),
    "adam": Adam(lr=0.05, betas=(0.8, 0.9), eps=0.05),
    "adamw": AdamW(lr=0.05, betas=(0.8, 0.9), eps=0.05),
}


class Net(nn.Module):
    """Its row 3 of the embedding is never used, and ``unused`` neither."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(4, 5), nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, ids):
        return self.last(torch.tanh(self.embed(ids))).logsumexp(-1)


torch.manual_seed(0)
CALL, PARAMS = mamlfast.functional(Net().double())
EPISODE = Episode(support=[torch.tensor([0, 1, 2])], query=torch.tensor([2, 0]))


def loss(params, ids):
    return (CALL(params, ids) * (1 + ids)).pow(2).sum()


def rates(kind, steps):
    if kind == "fixed":
        return 0.1
    if kind == "scalar":
        return torch.tensor(0.1, dtype=torch.float64)
    if kind == "elementwise":
        return {name: torch.full_like(p, 0.1).add(0.01 * p) for name, p in PARAMS.items()}
    return [{n: torch.tensor(0.1 + 0.02 * k).double() if n > "f" else 0.07 for n in PARAMS} for k in range(steps)]


def flat(tree):
    """All tensors of a structure by their path."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {f"{key}/{path}": t for key, x in items for path, t in flat(x).items()}


def meta_grad(inner, steps, adjoint, **options):
    return mamlfast.meta_grad(loss, PARAMS, EPISODE, inner=inner, steps=steps, adjoint=adjoint, **options)


@pytest.mark.parametrize("rate", ["fixed", "scalar", "elementwise", "per step"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [None, 1.0, 1e9])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_replay_equals_the_unrolled_loop(case, steps, clip, decay, rate):
    inner = replace(OPTIMIZERS[case], clip=clip, weight_decay=decay, lr=rates(rate, steps))
    want, got = meta_grad(inner, steps, Unrolled()), meta_grad(inner, steps, Replay())
    assert overall_error(got.grads, want.grads) < 1e-10
    assert overall_error(got.adapted, want.adapted) < 1e-14
    assert overall_error(meta_grad(inner, steps, FirstOrder()).grads, want.grads) > 1e-3  # there is something to see
    if rate == "fixed":
        assert got.lr_grads is None and want.lr_grads is None
    else:
        assert overall_error(flat(got.lr_grads), flat(want.lr_grads)) < 1e-10
        assert type(got.lr_grads) is type(inner.lr)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_first_order_and_reptile_walk_the_same_way(case):
    inner = OPTIMIZERS[case]
    exact, first, reptile = (meta_grad(inner, 3, adjoint) for adjoint in (Replay(), FirstOrder(), Reptile()))
    for name, p in PARAMS.items():
        assert torch.equal(exact.adapted[name], first.adapted[name])
        assert torch.equal(reptile.grads[name], p - first.adapted[name])
    assert torch.equal(first.grads["unused"], torch.zeros_like(PARAMS["unused"]))


@pytest.mark.parametrize("inner", [SGD(lr=0.02, momentum=0.9), AdamW(lr=0.05, clip=1.0)])
def test_a_given_state_is_where_the_loop_starts_and_is_differentiated_where_it_asks(inner):
    moments = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.linspace(-1, 1, 15).view(3, 5).double().requires_grad_(),
        "exp_avg_sq": torch.linspace(0.1, 1, 15).view(3, 5).double(),
        "momentum_buffer": torch.linspace(-1, 1, 15).view(3, 5).double().requires_grad_(),
    }
    state = {"last.weight": {slot: moments[slot] for slot in inner.slots}}
    want, got = (meta_grad(inner, 2, adjoint, state=state) for adjoint in (Unrolled(), Replay()))
    assert overall_error(got.grads, want.grads) < 1e-10
    learned = inner.moments[0]
    assert flat(got.state_grads).keys() == flat(want.state_grads).keys() == {f"last.weight/{learned}/"}
    assert overall_error(flat(got.state_grads), flat(want.state_grads)) < 1e-10
    assert overall_error(got.adapted, meta_grad(inner, 2, Replay()).adapted) > 1e-3
    assert meta_grad(inner, 2, Replay()).state_grads is None


def test_a_pull_back_without_one_term_is_noticed(monkeypatch):
    monkeypatch.setattr("mamlfast.inner.adam._quotient", lambda m, root: torch.zeros_like(m))
    inner = OPTIMIZERS["adam"]
    assert overall_error(meta_grad(inner, 3, Replay()).grads, meta_grad(inner, 3, Unrolled()).grads) > 1e-3


def test_clipping_differentiated_as_a_constant_is_noticed(monkeypatch):
    def constant(grads, bars, clip):
        for bar in bars.values():
            bar.mul_(clip.factor)

    monkeypatch.setattr("mamlfast.replay.pull_back_clip", constant)
    inner = SGD(lr=0.1, clip=1.0)
    assert overall_error(meta_grad(inner, 3, Replay()).grads, meta_grad(inner, 3, Unrolled()).grads) > 1e-3


@pytest.mark.parametrize("checkpoint", ["sqrt", 1, 7, 100])
@pytest.mark.parametrize(
    "inner",
    [
        SGD(lr=0.01),
        SGD(lr=0.01, momentum=0.9),
        Adam(lr=0.01),
        AdamW(lr=torch.tensor(0.01), clip=1.0),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_steps_taken_again_from_checkpoints_give_the_same_bits(inner, checkpoint):
    dropping = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
    call, params = mamlfast.functional(dropping)

    def loss(params, x):
        return call(params, x).pow(2).mean()

    episode = Episode(support=[torch.ones(3, 4)], query=-torch.ones(3, 4))
    results = []
    for adjoint in (Replay(), Replay(checkpoint=checkpoint)):
        torch.manual_seed(1)
        results.append(mamlfast.meta_grad(loss, params, episode, inner=inner, steps=20, adjoint=adjoint))
    want, got = ({"grads": r.grads, "lr": r.lr_grads, "losses": r.support_losses} for r in results)
    assert flat(want).keys() == flat(got).keys()
    assert all(torch.equal(t, flat(got)[path]) for path, t in flat(want).items())


def test_a_language_model_under_adamw_recomputed_and_with_dropout_equals_the_unrolled_loop():
    model = tiny_model("gpt2", dropout=0.2)
    call, params = mamlfast.causal_lm(model)
    grads = []
    for adjoint in (Replay(checkpoint=2), Unrolled()):
        torch.manual_seed(3)
        inner = AdamW(lr=0.01, eps=1e-3, clip=1.0)
        grads.append(mamlfast.meta_grad(call, params, draw_episode(3), inner=inner, adjoint=adjoint).grads)
    assert overall_error(*grads) < 1e-6


@pytest.mark.parametrize("checkpoint", [0, -1, "root", 1.5, True])
def test_a_checkpoint_that_means_nothing_raises(checkpoint):
    with pytest.raises(ValueError, match="checkpoint must be"):
        Replay(checkpoint=checkpoint)


class Alive(TorchDispatchMode):
    """Counts the storages of at least so many bytes that were made inside the block and are alive."""

    def __init__(self, nbytes):
        super().__init__()
        self._nbytes, self._refs, self.most = nbytes, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self._nbytes:
                ref = StorageWeakRef(t.untyped_storage())
                self._refs[ref.cdata] = ref
        self._refs = {cdata: ref for cdata, ref in self._refs.items() if not ref.expired()}
        self.most = max(self.most, len(self._refs))
        return made


def most_copies(inner, steps, adjoint):
    """The most tensors of the parameter's size alive at a time, everything that the loss makes included."""
    x = torch.linspace(-1, 1, 1013)

    def loss(params, batch):
        return (params["x"] - batch).pow(4).sum()

    episode = Episode(support=[torch.zeros(())], query=torch.ones(()))
    with Alive(x.nbytes) as alive:
        mamlfast.meta_grad(loss, {"x": x}, episode, inner=inner, steps=steps, adjoint=adjoint)
    return alive.most


@pytest.mark.parametrize(
    "inner",
    [
        SGD(lr=0.01),
        SGD(lr=0.01, momentum=0.9),
        SGD(lr=torch.tensor(0.01)),
        Adam(lr=0.01),
        AdamW(lr=0.01, clip=1.0),
    ],
)
def test_each_further_step_costs_one_parameter_copy_whatever_the_optimizer(inner):
    eight, sixteen = (most_copies(inner, steps, Replay()) for steps in (8, 16))
    assert sixteen - eight == 8


def test_first_order_memory_does_not_grow_with_the_steps():
    assert most_copies(Adam(lr=0.01), 8, FirstOrder()) == most_copies(Adam(lr=0.01), 4, FirstOrder())


@pytest.mark.parametrize(("inner", "checkpoint_copies"), [(SGD(lr=0.01), 1), (Adam(lr=0.001), 3)])
def test_with_checkpoints_memory_grows_like_the_root_of_the_steps(inner, checkpoint_copies):
    quarter, whole = (most_copies(inner, steps, Replay(checkpoint="sqrt")) for steps in (16, 64))
    assert most_copies(inner, 64, Replay()) > 64
    # m = sqrt(K c) steps at one copy and K / m checkpoints at c of them: twice as much at four times K.
    assert whole - quarter <= 2 * (math.sqrt(64 * checkpoint_copies) - math.sqrt(16 * checkpoint_copies)) + 1
