"""The C++ kernels of the ops that visit rows or elements, compiled for several instruction sets, computing the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamlfast import native
from mamlfast.ops import cross_entropy, elementwise, gated, layer_norm, log_softmax, softmax
from mamlfast.ops.backend import use_backend
from mamlfast.ops.linear_cross_entropy import token_losses
from tests.rooms import draw, mapped, ours

TARGET = torch.tensor([3, -100, 998, 0])
CASES = {
    "softmax": (softmax, [(4, 999)], {}),
    "log_softmax": (log_softmax, [(4, 999)], {}),
    "layer_norm": (layer_norm, [(40, 99), (99,), (99,)], {}),
    "cross_entropy": (cross_entropy, [(4, 999)], {"target": TARGET, "label_smoothing": 0.1}),
    "linear_cross_entropy": (
        token_losses,
        [(4, 9), (999, 9), (999,)],
        {"target": torch.tensor([3, 0, 998, 7]), "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0},
    ),
    **{
        name: (getattr(elementwise, name), [(999,)], {})
        for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "tanh", "sigmoid")
    },
    **{name: (getattr(gated, name), [(9, 111)] * 2, {}) for name in ("swiglu", "geglu", "geglu_tanh", "reglu")},
}


def sample(dtype):
    """Every result of every kernel, on the same arguments at every call."""
    with use_backend("native"):
        return {
            name: ours(rule, *draw(rule, shapes, options, dtype), options)
            for name, (rule, shapes, options) in CASES.items()
        }


@pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_computes_the_same(capability, tmp_path):
    code = (
        "import sys, torch; from tests.ops.test_instruction_sets import sample; "
        "torch.save([sample(torch.float32), sample(torch.float64)], sys.argv[1])"
    )
    root, file = Path(__file__).parents[2], tmp_path / "results"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, file], check=True, cwd=root, env=environment)
    single, double = torch.load(file)
    here = sample(torch.float32)
    torch.testing.assert_close(double, sample(torch.float64), rtol=1e-13, atol=1e-13)
    # Sums of a thousand terms in another order.
    torch.testing.assert_close(single, here, rtol=1e-5, atol=1e-5)
    if capability.upper() != torch.backends.cpu.get_cpu_capability():
        same = [all(map(torch.equal, _flat(single[name]), _flat(here[name]))) for name in CASES]
        assert not all(same), "the variable had no effect"


def _flat(results):
    flat = []
    mapped(flat.append, results)
    return flat
