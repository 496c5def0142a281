"""The import rules of the suite, and a start-up that loads nothing heavy."""

import ast
import subprocess
import sys
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


def test_pure_files_of_a_method_import_neither_lightning_nor_wandb():
    for path in files("lit_modules"):
        if path.name in ("module.py", "hparams.py"):
            continue
        for name in imported(path):
            assert name.split(".")[0] not in ("lightning", "pytorch_lightning", "wandb"), f"{path}: {name}"


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "classifier"], ["data", "list"], ["fitt"]])
def test_light_commands_load_neither_torch_nor_lightning(arguments):
    code = (
        "import sys; from leanlight.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'wandb', 'matplotlib', 'spikingjelly'} & set(sys.modules);"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
