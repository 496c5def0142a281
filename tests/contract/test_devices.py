"""Every method runs on a GPU, shown without one: `tests/support/mock_gpu` refuses what CUDA refuses and counts.

The device changes the process that registers it, so runs are in one process a method, `tests/support/device_run.py`.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from device_cases import cases
from mock_gpu import why_unavailable

from leanlight.registry import METHODS

SUPPORT = Path(__file__).parents[1] / "support"
#: Of a step by case: kernels, the most of any step that was seen, and waits, none but where the host has to know: the
#: ranks of a low-rank Hessian and the real images of a class, which are sizes; what a client reports and scores; at a
#: round's end, its energy; where pictures lie among tokens, which transformers' Qwen2.5-VL works out on the host.
RECORDED = Path(__file__).with_name("device_kernels.json")

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
FAST = ("classifier", "sfedca")  # one with an optimiser of Lightning's, one with a loop of its own
VARIANTS = [method for method in METHODS if any(name.startswith(f"{method} ") for name in cases())]


def python(folder, *words):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_device_does_what_cuda_does(tmp_path):
    python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", SUPPORT / "mock_gpu" / "checks.py")


def test_noise_on_images_is_that_of_the_cpu_and_waits_for_nothing(tmp_path):
    python(tmp_path, SUPPORT / "noise_run.py")


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_a_method_runs_on_a_device_as_on_the_cpu(tmp_path, method):
    check(tmp_path, [method])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", VARIANTS)
def test_the_variants_of_a_method_run_on_a_device_as_on_the_cpu(tmp_path, method):
    check(tmp_path, [name for name in cases() if name.startswith(f"{method} ")])


def check(folder, names):
    python(folder, SUPPORT / "device_run.py", folder, *names)
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == names
    problems = [f"{name}: {problem}" for name, found in results.items() for problem in problems_of(name, found)]
    assert not problems, "\n".join(problems)


def problems_of(name, found):
    """What a case does wrong on the device; `tests/support/device_run.py` says what it did."""
    if "error" in found:
        yield found["error"][-1500:]
        return
    here, there = found["cpu"], found["device"]
    yield from differences("fit and test", here["metrics"], there["metrics"])
    if here["files"] != there["files"]:
        yield f"files: {sorted(set(here['files']) ^ set(there['files']))} are not written on both"
    if cases()[name].command != "fit":
        return
    if not found["interrupted"]:
        yield "the run was not interrupted, so nothing was resumed"
        return
    if "validated" in found:
        last = {metric: value for metric, value in there["metrics"].items() if metric in found["validated"]}
        yield from differences("validate", last, found["validated"])
        if found["predictions"] == 0:
            yield "nothing is predicted"
    yield from over_budget(name, found["steps"])


def differences(what, expected, got):
    if expected.keys() != got.keys():
        yield f"{what}: only one has {sorted(expected.keys() ^ got.keys())}"
    for metric in expected.keys() & got.keys():
        pair = expected[metric], got[metric]
        if not math.isclose(*pair, rel_tol=1e-5, abs_tol=1e-5) and not all(map(math.isnan, pair)):
            yield f"{what}: {metric} is {pair[1]} on the device, expected {pair[0]}"


def over_budget(name, steps):
    budget = json.loads(RECORDED.read_text()).get(name, {})
    for asked, what in (("copies", "blocking copies to the device"), ("waits", "waits for the device")):
        most = max((step[asked] for step in steps), key=lambda lines: sum(lines.values()))
        if sum(most.values()) > budget.get(asked, 0):
            yield f"{what} in a step: {most}"
    kernels = max(step["kernels"] for step in steps)
    if "kernels" not in budget:
        yield f"{RECORDED.name} has no entry; a step launches {kernels} kernels"
    elif kernels > 1.1 * budget["kernels"]:
        yield f"a step launches {kernels} kernels; {budget['kernels']} are recorded, and a tenth more is allowed"
