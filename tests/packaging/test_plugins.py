"""An installed package adds a method: a real one is built and unpacked; a broken one is a warning, never a failure."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from leanlight import registry
from leanlight.configs_path import config_names, find_configs
from leanlight.contracts import UserError

ROOT = Path(__file__).parents[2]
PROJECT = {
    "pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "smoothing-for-leanlight"
        version = "1.0"
        [project.entry-points."leanlight.methods"]
        smoothing = "smoothing_method.info:INFO"
        [tool.hatch.build.targets.wheel]
        packages = ["smoothing_method"]
    """,
    "smoothing_method/__init__.py": "",
    "smoothing_method/info.py": """
        from pathlib import Path

        from leanlight.registry import Citation, Command, MethodInfo

        INFO = MethodInfo(
            name="smoothing",
            title="Label smoothing",
            module="smoothing_method.module.SmoothedClassifier",
            smallest="smoothing/digits_small",
            citation=Citation(("Ada Example", "Bo Example"), "A Paper on Smoothing", "A Conference", 2025),
            commands=(Command("temperature", "smoothing_method.command", "print how smooth a model is"),),
            configs_folder=Path(__file__).parent / "configs",
        )
    """,
    "smoothing_method/command.py": """
        def main(argv):
            print("temperature of", *argv)
    """,
    "smoothing_method/module.py": """
        from typing import Any

        import torch.nn.functional as F

        from lit_modules.classifier import ImageClassifier


        class SmoothedClassifier(ImageClassifier):
            '''Classifier with smoothed labels.

            Args:
                smoothing: weight of the uniform distribution, in [0, 1).
            '''

            def __init__(self, smoothing: float = 0.1, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.smoothing = smoothing

            def training_step(self, batch, batch_idx):
                return F.cross_entropy(self(batch.image), batch.label, label_smoothing=self.smoothing)
    """,
    "smoothing_method/configs/digits_small.yaml": """
        # Smoothed labels on digits.
        model:
          class_path: smoothing_method.module.SmoothedClassifier
          init_args:
            network:
              class_path: lit_modules.nn.MLP
              init_args: {in_channels: 1, num_classes: 10, image_size: 8, hidden: [16]}
        data:
          class_path: datamodules.ImageDataModule
          init_args: {dataset: digits, batch_size: 64}
        trainer: {max_epochs: 1}
        run: {method: smoothing}
    """,
    "smoothing_method/configs/digits_small__hard.yaml": """
        # Hard labels: the baseline.
        model: {init_args: {smoothing: 0.0}}
    """,
    "smoothing_method/configs/tables/digits.yaml": """
        method: smoothing
        dataset: digits
        scale: small
        title: Smoothing on digits
        seeds: [0]
        metrics: {test/accuracy: {label: Accuracy, higher_is_better: true}}
        rows:
          - {name: smooth, label: Smoothed, config: smoothing/digits_small}
          - {name: hard, label: Hard, config: smoothing/digits_small__hard}
    """,
    "smoothing_method/configs/pipelines/digits.yaml": """
        method: smoothing
        dataset: digits
        stages:
          - {name: only, command: fit, config: smoothing/digits_small}
    """,
}


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        path.write_text("".join(f"{line[margin:]}\n" for line in lines))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for packages with the plug-in in it, built as its maker would."""
    folder = tmp_path_factory.mktemp("plugin")
    write(folder / "project", PROJECT)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=folder / "project", check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def installed(monkeypatch):
    """Make a folder of packages importable and have the registry look again."""

    def install(folder):
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        registry.methods.cache_clear()

    yield install
    monkeypatch.undo()
    registry.methods.cache_clear()


@pytest.fixture
def program(leanlight, site):
    def call(*arguments):
        done = leanlight(*arguments, env={"PYTHONPATH": os.pathsep.join((str(ROOT), str(site)))})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_program_lists_the_method_and_runs_its_command(program):
    assert "smoothing" in program("--help").split("methods:")[1]
    assert "print how smooth a model is" in program("--help")
    assert "Label smoothing" in program("methods")
    shown = program("methods", "smoothing")
    for text in ("Ada Example, Bo Example. A Paper on Smoothing. A Conference 2025", "smoothing/digits_small__hard"):
        assert text in shown
    assert "author = {Ada Example and Bo Example}" in program("methods", "smoothing", "--bibtex")
    assert program("temperature", "room") == "temperature of room\n"


def test_its_configs_tables_and_pipelines_are_found_by_name(site, installed):
    from leanlight.experiment import resolve
    from leanlight.results.pipeline_spec import load_pipeline
    from leanlight.results.table_spec import load_table

    installed(site)
    assert [path.stem for path in find_configs("smoothing/digits_small__hard")] == [
        "digits_small",
        "digits_small__hard",
    ]
    assert {"smoothing/digits_small", "smoothing/tables/digits", "smoothing/pipelines/digits"} <= {*config_names()}
    assert len(load_table("smoothing/tables/digits").rows) == 2
    assert len(load_pipeline("smoothing/pipelines/digits").stages) == 1
    assert resolve("fit", ["--config", "smoothing/digits_small"])["model"]["init_args"]["smoothing"] == 0.1
    assert resolve("fit", ["--config", "smoothing/digits_small__hard"])["model"]["init_args"]["smoothing"] == 0.0


@pytest.mark.slow
def test_a_model_of_it_trains(program, tmp_path):
    program("fit", "--config", "smoothing/digits_small", "--run.id=first", "--run.wandb=disabled")
    summary = json.loads((tmp_path / "runs/smoothing/digits/first/summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["metrics"]["test/accuracy"] > 0.2


def make_package(folder, name, info):
    """An installed package without a build: a module that makes `info`, and the metadata that name it."""
    header = (
        "from pathlib import Path\nfrom leanlight.registry import Command, MethodInfo\nHERE = Path(__file__).parent\n"
    )
    (folder / f"{name}.py").write_text(header + info)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[leanlight.methods]\n{name} = {name}:INFO\n")


METHOD = "INFO = MethodInfo(name={name!r}, title='', module='', smallest='', configs_folder=HERE{more})\n"
BROKEN = {
    "imports_nothing": ("import no_such_package_at_all\n", "no_such_package_at_all"),
    "leaves": ("raise SystemExit(3)\n", "3"),
    "is_no_method": ("INFO = 7\n", "expected a leanlight.registry.MethodInfo, got a int"),
    "has_no_name": ("", "INFO"),
    "takes_a_method": (METHOD.format(name="esvae", more=""), "the name 'esvae' is taken"),
    "takes_a_folder": (METHOD.format(name="trainer", more=""), "the name 'trainer' is taken"),
    "takes_a_command": (METHOD.format(name="new", more=", commands=(Command('play', 'm', ''),)"), "'play' is taken"),
    "has_no_configs": (METHOD.format(name="new", more="").replace("HERE)", "HERE / 'none')"), "no folder at"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_plugin_that_cannot_be_used_is_one_line_on_stderr(name, tmp_path, installed, capsys):
    info, reason = BROKEN[name]
    make_package(tmp_path, name, info)
    installed(tmp_path)
    assert list(registry.methods()) == list(registry.METHODS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"leanlight: warning: plug-in '{name}' ({name}:INFO) is left out: ")
    assert reason in line


def test_of_two_plugins_with_one_name_the_first_is_taken(tmp_path, installed, capsys):
    for name in ("b_second", "a_first"):
        make_package(tmp_path, name, METHOD.format(name="twice", more=""))
    installed(tmp_path)
    assert registry.method("twice")
    (line,) = capsys.readouterr().err.splitlines()
    assert "'b_second'" in line


def test_a_broken_plugin_does_not_hide_the_methods_of_the_suite(tmp_path, installed):
    make_package(tmp_path, "broken", "raise RuntimeError('two\\nlines')\n")
    installed(tmp_path)
    assert registry.method("classifier").title
    with pytest.raises(UserError, match="did you mean 'esvae'"):
        registry.method("esvaa")
