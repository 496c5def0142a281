"""The import rules of the suite, and a start-up that loads nothing heavy."""

import ast
import os
import shutil
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("leanlight", "lit_modules", "datamodules", "callbacks")


def imported(path):
    """Absolute names a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(("package", "house"), [("contracts", {"contracts"}), ("ops", {"contracts", "ops"})])
def test_contracts_and_ops_import_only_torch_numpy_and_the_standard_library(package, house):
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "lazy_loader"}
    for path in files(f"leanlight/{package}"):
        for name in imported(path):
            top, *inside = name.split(".")
            assert top in allowed or (top == "leanlight" and inside[0] in house), f"{path.name}: {name}"


@pytest.mark.parametrize("package", ["lit_modules", "datamodules", "callbacks"])
def test_methods_data_and_callbacks_meet_only_in_the_contracts(package):
    for path in files(package):
        for name in imported(path):
            top = name.split(".")[0]
            if top in PACKAGES and top != package:
                allowed = name.startswith(("leanlight.contracts", "leanlight.ops"))
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


# Stages and other modules of their own.
GLUE = ("synthesis.py", "tiny_diffusion.py", "augmentation.py", "judge_evaluation.py")


def test_pure_files_of_a_method_import_neither_lightning_nor_wandb():
    for path in files("lit_modules"):
        if path.name in ("module.py", "hooks.py", "hparams.py", "step_log.py", *GLUE):
            continue
        for name in imported(path):
            assert name.split(".")[0] not in ("lightning", "pytorch_lightning", "wandb"), f"{path}: {name}"


def test_flower_is_imported_by_what_runs_on_it_alone():
    allowed = {ROOT / "leanlight" / "cli" / "flower.py", *files("leanlight/flower")}
    found = {
        path for package in PACKAGES for path in files(package) if "flwr" in {n.split(".")[0] for n in imported(path)}
    }
    assert found <= allowed
    assert found


@cache
def module_graph():
    """Every module of the suite with the modules of the suite that it imports, at any depth of its code."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in files(package)
    }
    graph = {}
    for module, path in paths.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names if alias.name in paths}
            elif isinstance(node, ast.ImportFrom):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= (named & set(paths)) or ({node.module} & set(paths))
    return graph


def circle(graph):
    """A circle in a graph of imports, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return None


def test_a_circle_is_noticed():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_no_module_imports_in_a_circle():
    assert circle(module_graph()) is None


def part(module):
    """leanlight.results for leanlight.results.report; lit_modules for lit_modules.esvae.module."""
    top, *inside = module.split(".")
    return f"{top}.{inside[0]}" if top == "leanlight" and inside else top


def test_no_package_imports_in_a_circle():
    parts = {}
    for module, imports in module_graph().items():
        parts.setdefault(part(module), set()).update({part(name) for name in imports} - {part(module)})
    assert "leanlight.cli" in parts
    assert circle(parts) is None


# Lower storeys know nothing of higher ones; what is not named here (experiment, runs, registry, ...) stands between.
STOREYS = {"contracts": 0, "ops": 0, "results": 2, "benchmarks": 2, "cli": 3, "__main__": 4}


def test_imports_inside_leanlight_lead_down():
    def storey(module):
        return STOREYS.get(part(module).removeprefix("leanlight."), 1)

    for module, imports in module_graph().items():
        if module.startswith("leanlight."):
            above = [name for name in imports if storey(name) > storey(module)]
            assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "classifier"], ["data", "list"], ["fitt"]])
def test_light_commands_load_neither_torch_nor_lightning(arguments):
    code = (
        "import sys; from leanlight.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'wandb', 'matplotlib', 'spikingjelly'} & set(sys.modules);"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_all_packages_are_those_of_the_checkout_that_runs(tmp_path):
    """Also in its own folder, with another one installed: parts of two would be a run that no hash tells."""
    shutil.copytree(ROOT / "leanlight", tmp_path / "leanlight", ignore=shutil.ignore_patterns("__pycache__", "configs"))
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "lit_modules").mkdir()
    (tmp_path / "lit_modules" / "__init__.py").touch()
    code = "from leanlight.__main__ import main; main(['--version']); import lit_modules; print(lit_modules.__file__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines()[-1] == str(tmp_path / "lit_modules" / "__init__.py")
