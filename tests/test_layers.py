"""Imports point one way: a module imports only from the layers that stand above its own in ``LAYERS``.

``mamlfast_kernels`` sees nothing of mamlfast, and nothing imports tests or bench. Inside a folder that is one
layer (ops, data) modules may import each other, without cycles.
"""

import ast
import graphlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    "mamlfast_kernels*",
    "mamlfast.native",
    "mamlfast.ops.backend",
    "mamlfast.ops.mapping",
    "mamlfast.ops.rule",
    "mamlfast.ops*",
    "mamlfast.dual",
    "mamlfast.tree",
    "mamlfast.swap",
    "mamlfast.randomness",
    "mamlfast.episode",
    "mamlfast.blocks",
    "mamlfast.attention_interface",
    "mamlfast.fused_modules",
    "mamlfast.fusable",
    "mamlfast.fuse",
    "mamlfast.model",
    "mamlfast.hvp",
    "mamlfast.inner*",
    "mamlfast.replay",
    "mamlfast.adjoint",
    "mamlfast.meta",
    "mamlfast.compat*",
    "mamlfast.data*",
    "mamlfast.evaluation",
    "mamlfast.config",
    "mamlfast.report",
    "mamlfast.checking*",
    "mamlfast",  # the public face gathers what stands above and is what the commands import
    "mamlfast.plan",
    "mamlfast.check",
    "mamlfast.evaluate",
    "mamlfast.train",
]
MAY_IMPORT_TRANSFORMERS = {
    "mamlfast.attention_interface",
    "mamlfast.fused_modules",
    "mamlfast.fusable",
    "mamlfast.fuse",
    "mamlfast.model",
    "mamlfast.data.tokenizer",
    "mamlfast.evaluation",
    "mamlfast.check",
    "mamlfast.evaluate",
    "mamlfast.train",
}


def _modules() -> dict[str, Path]:
    """Every module of the two packages by its import name."""
    found = {}
    for root in (ROOT, ROOT / "triton_kernels"):
        for package in ("mamlfast", "mamlfast_kernels"):
            for path in (root / package).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(name: str, source: str, is_package: bool = False) -> Iterator[str]:
    """Yield what the module ``name`` imports, wherever in its text: ``a.b`` for ``from a import b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".") if is_package else name.split(".")[:-1]
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_of(imported: str, known: set[str]) -> str:
    """Strip from an import what is a name inside a module."""
    while imported not in known and "." in imported:
        imported = imported.rpartition(".")[0]
    return imported


def _layer(name: str) -> int:
    """Return the position of the layer, the first exact one or else the first pattern; -1 without one."""
    if name in LAYERS:
        return LAYERS.index(name)
    return next((i for i, pattern in enumerate(LAYERS) if fnmatchcase(name, pattern)), -1)


def _faults(name: str, source: str, known: set[str], is_package: bool = False) -> list[str]:
    """Return in words what is wrong with the imports of one module."""
    faults = []
    for imported in map(lambda i: _module_of(i, known), _imports(name, source, is_package)):
        top = imported.split(".")[0]
        if top in ("tests", "bench"):
            faults.append(f"{name} imports {imported}: nothing imports tests or bench")
        if top == "transformers" and name not in MAY_IMPORT_TRANSFORMERS:
            faults.append(f"{name} imports transformers: only {', '.join(sorted(MAY_IMPORT_TRANSFORMERS))} may")
        if top == "mamlfast" and name.startswith("mamlfast_kernels"):
            faults.append(f"{name} imports {imported}: kernels cannot see mamlfast")
        if top == "mamlfast" and imported != name and _layer(imported) > _layer(name):
            faults.append(f"{name} imports {imported}, which is in a layer above it")
    return faults


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_below(name):
    path = MODULES[name]
    assert _layer(name) >= 0, f"{name} has no layer yet: give it a line in LAYERS"
    assert not _faults(name, path.read_text(), set(MODULES), path.name == "__init__.py")


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {
        name: {
            _module_of(imported, set(MODULES))
            for imported in _imports(name, path.read_text(), path.name == "__init__.py")
        }
        - {name}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_there_is_no_regular_package_called_triton_kernels():
    """OpenAI's has that name: a folder without ``__init__`` gives way to it."""
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()


KNOWN = {"mamlfast", "mamlfast.ops", "mamlfast.ops.rule", "mamlfast.dual", "mamlfast.meta", "mamlfast.train"}


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        (
            "mamlfast.ops.rule",
            "from mamlfast.dual import Dual",
            "imports mamlfast.dual, which is in a layer above",
        ),
        ("mamlfast.ops.rule", "def f():\n    import mamlfast.meta", "imports mamlfast.meta, which"),
        ("mamlfast.ops.rule", "from mamlfast import dual", "imports mamlfast.dual, which"),
        ("mamlfast.ops.rule", "from .. import dual", "imports mamlfast.dual, which"),
        ("mamlfast.ops.rule", "from ..meta import x", "imports mamlfast.meta, which"),
        ("mamlfast.dual", "from mamlfast import meta_grad", "imports mamlfast, which"),
        ("mamlfast.meta", "from mamlfast.train import main", "imports mamlfast.train, which"),
        ("mamlfast.dual", "import transformers.models", "imports transformers: only"),
        ("mamlfast.dual", "from tests.conftest import shared", "nothing imports tests or bench"),
        ("mamlfast.dual", "import bench", "nothing imports tests or bench"),
        ("mamlfast_kernels.rms_norm", "import mamlfast", "kernels cannot see mamlfast"),
    ],
)
def test_an_import_that_points_upwards_is_noticed(name, source, fault):
    faults = _faults(name, source, KNOWN)
    assert any(fault in f for f in faults), faults


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mamlfast.dual", "from mamlfast.ops.rule import Rule\nimport torch"),
        ("mamlfast.dual", "from .ops import rule"),
        ("mamlfast.train", "import mamlfast\nimport transformers\nfrom mamlfast import MetaLearner"),
        ("mamlfast.ops.rms_norm", "from mamlfast_kernels.rms_norm import rms_norm_fwd"),
    ],
)
def test_an_import_that_points_downwards_is_allowed(name, source):
    assert _faults(name, source, KNOWN) == []
