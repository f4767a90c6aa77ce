"""Weights are lent to a module and always come back."""

import pytest
import torch
from torch import nn

from mamlfast.swap import swapped


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, ids):
        return self.norm(self.head(self.embed(ids)))


def test_tied_weights_stay_tied_and_come_back():
    model = Tied()
    own = model.embed.weight
    new = torch.ones(3, 2)
    with swapped(model, {"embed.weight": new}):
        assert model.embed.weight is model.head.weight is new
    assert model.embed.weight is model.head.weight is own


def test_weights_come_back_after_an_error():
    model = Tied()
    before = dict(model.named_parameters())
    with pytest.raises(IndexError), swapped(model, {"embed.weight": torch.ones(3, 2)}):
        model(torch.tensor([7]))
    assert all(p is before[name] for name, p in model.named_parameters())


def test_running_statistics_are_the_same_after_a_run():
    model = Tied().train()
    before = model.norm.running_mean.clone()
    with swapped(model, {}):
        model(torch.tensor([0, 1]))
        assert not torch.equal(model.norm.running_mean, before)
    assert torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"head.bias": torch.ones(3)}, r"unexpected \['head.bias'\]"),
        ({"embed.weight": torch.ones(2)}, "shape"),
    ],
)
def test_params_that_do_not_fit_are_named(params, message):
    with pytest.raises(ValueError, match=message), swapped(Tied(), params):
        pass
