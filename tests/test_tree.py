"""Parameter sets: alike, and in one piece."""

import pytest
import torch

from mamlfast.tree import accumulate, check_like, empty_like


def test_a_like_set_has_the_names_shapes_and_dtypes_in_order_and_one_allocation_a_kind():
    params = {"a": torch.ones(3, 5), "b": torch.ones(()).double(), "c": torch.ones(2), "d": torch.ones(0, 4)}
    like = empty_like(params)
    assert list(like) == list(params)
    check_like(params, like, "like")
    storages = {name: t.untyped_storage().data_ptr() for name, t in like.items()}
    assert storages["a"] == storages["c"] == storages["d"] != storages["b"]
    for value, t in enumerate(like.values()):
        t.fill_(value)
    assert [t.unique().tolist() for t in like.values()] == [[0], [1], [2], []]  # nobody overlaps a neighbour
    assert all(t.data_ptr() % 64 == 0 for t in like.values() if t.numel())


def test_a_set_unlike_another_is_named():
    with pytest.raises(ValueError, match=r"v must have the keys of params; missing \['a'\], unexpected \['b'\]"):
        check_like({"a": torch.ones(1)}, {"b": torch.ones(1)}, "v")
    with pytest.raises(ValueError, match=r"v\['a'\] must have the shape"):
        check_like({"a": torch.ones(1)}, {"a": torch.ones(2)}, "v")


def test_accumulation_is_in_place():
    total = {"a": torch.ones(2)}
    a = total["a"]
    accumulate(total, {"a": torch.full((2,), 2.0)})
    assert a is total["a"] and a.tolist() == [3.0, 3.0]
