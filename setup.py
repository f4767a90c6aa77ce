"""The compiled extension, and nothing else: everything static stands in pyproject.toml.

``mamlfast._C`` is written against libtorch's stable ABI, so one build serves every supported Python and
torch. It needs an importable torch for its headers, that is ``pip install --no-build-isolation``; without
one, or without a working compiler, the package is pure Python and says so when the kernels are first wanted.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup

FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Sums may be reordered where a loop says so (``omp simd``) and nowhere else; no OpenMP runtime is linked:
    # threads come from torch's own pool. Products and sums are never contracted behind our back, so that
    # results with and without tangents are the same bits.
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # The oldest torch the binary loads into is 2.10; anything that is not ABI stable fails to compile.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
]


def extension() -> dict:
    """Return the arguments of ``setup`` that build the extension, or none where torch is not importable."""
    if importlib.util.find_spec("torch") is None:
        sys.stderr.write(
            "mamlfast: torch is not importable here, building without the C++ kernels; "
            "for them run: pip install --no-build-isolation .\n"
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    module = CppExtension(
        "mamlfast._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
