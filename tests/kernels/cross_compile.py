"""Compile a Triton kernel for GPUs that are not present and print, as JSON, what it costs on each.

Needs no driver and no CUDA toolkit: ptxas and cuobjdump ship inside Triton. Runs in a process of its own, for
a kernel that was decorated under TRITON_INTERPRET cannot be compiled. Each argument is one JSON object::

    module, kernel    where the kernel is
    constants         values of the constexprs; "fp32" and the like under WIDE name a Triton type
    integers          names of the 32-bit integer arguments
    absent            names of pointers that are None
    dtype, wide       element types of the pointers, and of those named in wide_pointers
    long_pointers     names of the pointers to int64, if any
    types             types of single arguments, where none of the above says it
    num_warps, archs
    num_stages        unless Triton's default will do

For each object and architecture it prints registers and stack bytes a thread (spills live on the stack), shared memory
in bytes, whether the code is a bare trap, which is how a kernel that cannot be served compiles without an
error, and how many matrix instructions there are of each kind. Several objects make a list of results.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


def source_of(request: dict) -> ASTSource:
    """Return the kernel with the types of its arguments."""
    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    constants = dict(request["constants"])
    constants["WIDE"] = getattr(tl, constants["WIDE"])
    constants |= dict.fromkeys(request["absent"])

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in request.get("types", ()):
            return request["types"][name]
        if name in request["integers"]:
            return "i32"
        if name in request.get("long_pointers", ()):
            return "*i64"
        return f"*{request['wide'] if name in request['wide_pointers'] else request['dtype']}"

    signature = {name: kind(name) for name in kernel.arg_names}
    # Torch allocates at multiples of 16 bytes, and row lengths are multiples of 16 in every model.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(kernel.params)
        if signature[parameter.name] != "constexpr" and not parameter.do_not_specialize
    }
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)  # type: ignore[arg-type]


def cost(source: ASTSource, arch: int, options: dict[str, int]) -> dict:
    """Compile for ``sm_<arch>`` and read back what the code uses."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout

    def used(what: str) -> int:
        found = re.search(rf"{what}:(\d+)", usage)
        assert found is not None, usage
        return int(found[1])

    return {
        "registers": used("REG"),
        "stack": used("STACK"),
        "shared": compiled.metadata.shared,
        "trap": re.search(r"\btrap;", compiled.asm["ptx"]) is not None,
        "mma": {kind: compiled.asm["ptx"].count(kind) for kind in MATRIX_INSTRUCTIONS},
    }


def costs_of(request: dict) -> dict[int, dict]:
    """Compile one kernel for each of its architectures."""
    source = source_of(request)
    options = {name: request[name] for name in ("num_warps", "num_stages") if name in request}
    return {arch: cost(source, arch, options) for arch in request["archs"]}


def main() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    costs = [costs_of(json.loads(argument)) for argument in sys.argv[1:]]
    json.dump(costs[0] if len(costs) == 1 else costs, sys.stdout)


if __name__ == "__main__":
    main()
