"""The page of every method shows its use from Python, and what it shows runs as it stands, in an empty folder."""

import re
from pathlib import Path

import pytest
from run_example import run_example

from leanlight.registry import METHODS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", METHODS)
def test_the_python_example_of_a_method_runs(name, tmp_path):
    page = ROOT / "docs" / "methods" / f"{name}.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    examples = [block for block in blocks if "leanlight.build(" in block]
    assert examples, f"{page.name}: a section 'From Python' with a block that uses leanlight.build"
    for example in examples:
        run_example(example, tmp_path)
