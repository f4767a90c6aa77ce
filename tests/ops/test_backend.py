"""Who answers an op, and that insisting on somebody who cannot is an error."""

import threading

import pytest
import torch

from mamlfast import native
from mamlfast.ops.backend import BACKENDS, backend_for, use_backend

needs_native = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_tensors_are_served_by_cpp_kernels(dtype):
    assert backend_for(torch.ones(1, dtype=dtype)) == "native"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes_on_the_cpu_are_served_eagerly(dtype):
    assert backend_for(torch.ones(1), torch.ones(1, dtype=dtype)) == "eager"


def test_an_op_without_kernels_for_its_arguments_is_served_eagerly():
    assert backend_for(torch.ones(1), rooms=("eager",)) == "eager"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_forced_backend_answers_and_is_forgotten_after_the_block(name):
    if name == "native" and not native.available():
        pytest.skip("the C++ kernels are not built")
    if name == "triton":
        pytest.importorskip("triton")
    x = torch.ones(1, device="cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    before = backend_for(x)
    with use_backend(name):
        assert backend_for(x) == name
        with use_backend("eager"):
            assert backend_for(x) == "eager"
        assert backend_for(x) == name
    assert backend_for(x) == before


def test_a_forced_backend_is_forgotten_after_an_exception():
    before = backend_for(torch.ones(1))
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert backend_for(torch.ones(1)) == before


def test_a_forced_backend_holds_in_the_threads_of_autograd_too():
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backend_for(torch.ones(1))))
        thread.start()
        thread.join()
    assert seen == ["eager"]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="one of triton, native, eager; got 'cuda'"), use_backend("cuda"):
        pass


def test_a_forced_backend_that_cannot_serve_the_tensors_is_an_error():
    with use_backend("native"):
        with pytest.raises(ValueError, match="cannot serve cpu bfloat16 tensors here: the C\\+\\+ kernels need"):
            backend_for(torch.ones(1, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="no such kernel"):
            backend_for(torch.ones(1), rooms=("eager",))


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1 in the environment"):
        backend_for(torch.ones(1))
