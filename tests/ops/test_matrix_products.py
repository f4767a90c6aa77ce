"""Products of both libraries: the same numbers, the choice visible and forced."""

import pytest
import torch

from mamlfast.ops import linear, matrix_products
from mamlfast.ops.matrix_products import LARGE, add_product, product, use_matrix_products

needs_onednn = pytest.mark.skipif(not matrix_products._has_onednn(), reason="this PyTorch has no oneDNN")


def laid_out(rows, columns, transposed):
    x = torch.randn(columns, rows).mT if transposed else torch.randn(rows, columns)
    return x


@needs_onednn
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_both_libraries_give_the_product_for_every_layout(left, right):
    torch.manual_seed(0)
    a, b, out = laid_out(130, 97, left), laid_out(97, 110, right), torch.randn(130, 110)
    assert a.numel() * 110 >= LARGE
    want, added = a.double() @ b.double(), out.double() + a.double() @ b.double()
    for library in matrix_products.LIBRARIES:
        with use_matrix_products(library):
            assert matrix_products.matrix_library() == library
            # Sums of 97 products of order one in float32.
            torch.testing.assert_close(product(a, b).double(), want, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(add_product(out.clone(), a, b).double(), added, rtol=1e-5, atol=1e-4)


@needs_onednn
def test_linear_is_answered_by_the_library_that_is_forced(monkeypatch):
    calls = []
    right = matrix_products._onednn
    monkeypatch.setattr(matrix_products, "_onednn", lambda a, b: calls.append(a.shape) or right(a, b))
    x, w = torch.randn(2, 64, 128), torch.randn(128, 128, requires_grad=True)
    with use_matrix_products("onednn"):
        linear(x, w).sum().backward()
    assert calls == [(128, 128), (128, 128)]  # y and w_bar
    with use_matrix_products("mkl"):
        linear(x, w).sum().backward()
    assert len(calls) == 2


@needs_onednn
def test_float64_and_small_products_never_leave_torch(monkeypatch):
    monkeypatch.setattr(matrix_products, "_onednn", None)
    with use_matrix_products("onednn"):
        product(torch.ones(256, 256).double(), torch.ones(256, 256).double())
        product(torch.ones(3, 3), torch.ones(3, 3))


@needs_onednn
@pytest.mark.parametrize(("ratio", "library"), [(1.1, "mkl"), (1.9, "onednn")])
def test_the_choice_follows_the_measurement(ratio, library, monkeypatch):
    monkeypatch.setattr(matrix_products, "speedup", lambda: ratio)
    matrix_products._faster.cache_clear()
    try:
        assert matrix_products.matrix_library() == library
    finally:
        matrix_products._faster.cache_clear()


def test_another_library_is_refused():
    with pytest.raises(ValueError, match="one of mkl, onednn; got 'blas'"):
        use_matrix_products("blas").__enter__()
