"""Finding the compiled CPU kernels, once, and saying so once where they are missing.

The extension holds operators and no Python module: loading it registers ``torch.ops.mamlfast.*``. Nothing
happens at import; the library is looked for the first time somebody asks. Its absence is a slower path and
one line in the log, never an error.
"""

import functools
import logging
from pathlib import Path

import torch

_log = logging.getLogger("mamlfast")
_HOW_TO_BUILD = "to build them: pip install --no-build-isolation --editable ."


@functools.cache
def available() -> bool:
    """Return whether the C++ kernels are loaded, loading them at the first call."""
    missing = load(Path(__file__).parent)
    if missing is not None:
        _log.warning("C++ kernels: %s; CPU tensors take the slower eager path (%s)", missing, _HOW_TO_BUILD)
    return missing is None


def load(folder: Path) -> str | None:
    """Load the extension that lies in ``folder``; return None, or in words why there is none."""
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        return f"no _C*.so in {folder}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} could not be loaded ({error})"
    return None
