"""Every method's benchmark runs at tiny sizes, and its equality checks hold there."""

import json
import math
from importlib.util import find_spec

import pytest

from leanlight.registry import METHODS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, info in METHODS.items() if info.benchmark])
def test_a_quick_benchmark_measures_and_checks(name, leanlight, tmp_path):
    done = leanlight("benchmark", name, "--quick", "--output", tmp_path / "measured.json", timeout=280)
    content = json.loads((tmp_path / "measured.json").read_text())
    assert done.returncode in (0, 1), done.stderr  # 1: a speed target was missed, which means nothing at this size
    assert content["quick"]
    assert content["checks"]
    assert all(content["checks"].values()), content["checks"]
    without_flower = {"mlp_10_clients/flower_over_batched"} if name == "sfedca" and not find_spec("flwr") else set()
    assert set(content["missing"]) == without_flower
    assert content["figures"]
    assert all(math.isfinite(figure["value"]) for figure in content["figures"].values())
