"""The example of the README runs and checks itself."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "assert" in example
    torch.manual_seed(0)
    exec(compile(example, str(README), "exec"), {})


def test_the_readme_has_no_more_than_150_lines():
    assert len(README.read_text().splitlines()) <= 150
