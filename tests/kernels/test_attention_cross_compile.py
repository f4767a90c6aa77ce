"""The Triton kernels of attention, as their launchers ask for them, compile for GPUs that are not here."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from mamlfast_kernels import attention as kernels  # noqa: E402  (Triton has to be there)
from mamlfast_kernels.attention_sizes import tiles_for  # noqa: E402
from triton import language as tl  # noqa: E402

SCRIPT = Path(__file__).with_name("cross_compile.py")
KERNELS_ROOT = Path(__file__).parents[2] / "triton_kernels"
ARCHS = [80, 90, 100]
# Bytes a program may have: the limit of the GPU less the kilobyte that CUDA keeps.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes a thread, on which spilled registers lie. Triton 3.6 needs more than later versions, on Hopper at D = 128.
STACK = 64 if triton.__version__ >= "3.7" else 80
FAST = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
}


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """One launch that a call leads to, ready to be compiled."""

    kernel: str
    rows: int
    request: dict


def _launches(arch, D, dtype=torch.bfloat16, *, second_order, tiles=None, options=None, monkeypatch):
    """The launches of a forward and a backward with 16 heads of 4096 tokens, laid out as Hugging Face does."""
    found = []
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(kernels, "_launch", lambda *call: found.append(_launch(arch, *call)))
    capability = (8, 6) if arch == 86 else divmod(arch, 10)
    precision = None if dtype.itemsize == 2 else kernels._precision(torch.empty(0, dtype=dtype))
    chosen = {
        "spec": kernels.AttentionSpec(scale=D**-0.5, causal=True, **(options or {})),
        "tiles": tiles or tiles_for(capability, D, precision, second_order),
    }

    q, k, v = (torch.empty(2, 4096, 16, D, dtype=dtype, device="meta").transpose(1, 2) for _ in "qkv")
    if second_order:
        o, o_dot, lse, mu = kernels.attention_fwd_jvp(q, k, v, q, k, v, **chosen)
        kernels.attention_bwd_jvp(q, k, v, q, k, v, o, o_dot, lse, mu, o, o_dot, **chosen)
    else:
        o, lse = kernels.attention_fwd(q, k, v, **chosen)
        kernels.attention_bwd(q, k, v, o, lse, o, **chosen)
    return found


def _launch(arch, kernel, owned, tile, arguments):
    arguments = arguments | {"BLOCK_T": tile.queries, "BLOCK_S": tile.keys}
    parameters = inspect.signature(kernel.fn).parameters
    assert set(parameters) == set(arguments)
    constants = {name: x for name, x in arguments.items() if parameters[name].annotation is tl.constexpr}
    constants["WIDE"] = {tl.float32: "float32", tl.float64: "float64"}[constants["WIDE"]]
    pointers = {name: f"*{TYPES[x.dtype]}" for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    absent = [name for name, x in arguments.items() if x is None]
    request = {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "constants": constants,
        "types": pointers | {"seed": "i64"},
        "integers": sorted(set(arguments) - {*constants, *pointers, *absent, "seed"}),
        "absent": absent,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "archs": [arch],
    }
    rows = tile.keys if "kv" in kernel.fn.__name__ else tile.queries
    return _Launch(kernel=kernel.fn.__name__, rows=rows, request=request)


def _costs(launches):
    requests = [json.dumps(launch.request) for launch in launches]
    done = subprocess.run([sys.executable, SCRIPT, *requests], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    return [next(iter(cost.values())) for cost in (costs if len(requests) > 1 else [costs])]


def _environment():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS_ROOT), environment.get("PYTHONPATH", "")])
    return environment


def _check(arch, launch, cost, dtype, stack):
    told = f"{launch.kernel} {launch.request['constants']} on sm_{arch}: {cost}"
    assert not cost["trap"], told
    assert cost["shared"] <= SHARED[arch], told
    assert cost["stack"] <= stack, told
    if dtype.itemsize == 2:
        assert sum(cost["mma"].values()) > 0, told
    # What the table says of itself: 64 rows are enough for the instructions of the generation.
    if dtype.itemsize == 2 and launch.rows >= 64:
        assert cost["mma"][FAST[arch]] > 0, told
        assert FAST[arch] == "mma.sync" or cost["mma"]["mma.sync"] == 0, told


def _check_all(arch, D, dtype=torch.bfloat16, stack=STACK, **how):
    launches = _launches(arch, D, dtype, **how)
    for launch, cost in zip(launches, _costs(launches), strict=True):
        _check(arch, launch, cost, dtype, stack)


# The others take too long for every day. For Blackwell a kernel takes seconds, so the queries' side is left out there.
DAILY = {(80, 64): slice(None), (90, 64): slice(None), (90, 128): slice(None), (100, 64): slice(0, 3, 2)}


@pytest.fixture(scope="module")
def daily():
    """Launches and costs of those, compiled in one process."""
    with pytest.MonkeyPatch.context() as patch:
        found = {case: _launches(*case, second_order=True, monkeypatch=patch)[which] for case, which in DAILY.items()}
    costs = iter(_costs([launch for launches in found.values() for launch in launches]))
    return {case: [(launch, next(costs)) for launch in launches] for case, launches in found.items()}


@pytest.mark.parametrize("case", DAILY, ids=lambda case: "sm_{}, D={}".format(*case))
def test_second_order_fits_on_three_generations(case, daily):
    """Forward, and backward by queries and by keys, causal, in bfloat16; first order is less of the same."""
    assert len(daily[case]) >= 2
    for launch, cost in daily[case]:
        _check(case[0], launch, cost, torch.bfloat16, STACK)


@pytest.mark.slow
@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_every_tile_of_the_table_fits(arch, D, second_order, monkeypatch):
    _check_all(arch, D, second_order=second_order, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_other_types_fit(arch, dtype, monkeypatch):
    _check_all(arch, 64, dtype, second_order=True, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_tf32_fits(arch, monkeypatch):
    monkeypatch.setattr(kernels, "_precision", lambda q: "tf32")
    _check_all(arch, 64, torch.float32, second_order=True, monkeypatch=monkeypatch)


# What is asked besides costs registers, and the tiles are chosen for plain causal attention.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "stack"),
    [
        ({"window": (1024, None)}, STACK + 8),
        ({"segments": (torch.zeros(2, 4096, device="meta", dtype=torch.int64),) * 2}, STACK),
        ({"softcap": 50.0}, 256),
        ({"dropout": 0.1}, 384),
    ],
    ids=["window", "segments", "soft-cap", "dropout"],
)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_asked_besides_fits_too(arch, D, options, stack, monkeypatch):
    _check_all(arch, D, stack=stack, second_order=True, options=options, monkeypatch=monkeypatch)


def test_a_tile_that_is_too_large_is_noticed(monkeypatch):
    """As many pairs as the table has for the forward, on half as many threads."""
    tiles = tiles_for((8, 0), 64, None, True)
    crowded = replace(tiles, fwd=replace(tiles.fwd, warps=tiles.fwd.warps // 2))
    forward, *_ = _launches(80, 64, second_order=True, tiles=crowded, monkeypatch=monkeypatch)
    (cost,) = _costs([forward])
    with pytest.raises(AssertionError, match="'stack'"):
        _check(80, forward, cost, torch.bfloat16, STACK)


SPECIALIZATIONS = """
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from mamlfast_kernels.attention_bwd import _attention_bwd_kv_kernel, _attention_bwd_q_kernel
from mamlfast_kernels.attention_fwd import _attention_fwd_kernel

def variants(kernel, name, values):
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    return len({str(binder(**{p.name: 16 for p in kernel.params} | {name: x})[1]) for x in values})

for kernel in (_attention_fwd_kernel, _attention_bwd_q_kernel, _attention_bwd_kv_kernel):
    print(variants(kernel, "seed", (0, 1, 7, 16, 1 << 31, 1 << 62)), variants(kernel, "T", (7, 16)))
"""


def test_another_seed_is_no_other_kernel():
    """Whatever the size of the seed; the count can tell, for it sees that 16 divides a length."""
    done = subprocess.run([sys.executable, "-c", SPECIALIZATIONS], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["1 2"] * 3
