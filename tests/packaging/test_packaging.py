"""Packaging files agree with each other and with the tree."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from leanlight import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def requirements():
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in found if requirement.name != "leanlight"]


def pins():
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in CONSTRAINTS)}


def test_constraints_are_exact_versions_and_name_no_host():
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_dependency_is_pinned_to_a_version_it_allows(requirement):
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name}: add the tested version to constraints.txt"
    assert requirement.specifier.contains(pinned)


def test_the_extra_all_has_every_extra_of_the_methods():
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = (Requirement(text) for text in extras["all"])
    # robustness brings opencv-python, which writes into the same folder as the headless one of rl; flower brings Ray,
    # and bounds on many packages.
    assert everything.extras == {*extras} - {"all", "dev", "docs", "robustness", "flower"}


def test_both_packages_of_opencv_are_pinned_to_one_version():
    """They share the folder cv2: of one version, it does not matter which was installed last."""
    assert pins()["opencv-python"] == pins()["opencv-python-headless"]


def test_the_wheel_has_every_module_config_and_data_file(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    tops = ("leanlight/", "lit_modules/", "datamodules/", "callbacks/")
    expected = {name for name in tracked if name.startswith(tops)}
    expected |= {f"leanlight/{name}" for name in tracked if name.startswith("configs/")}
    assert expected - held == set()


def test_changelog_and_citation_know_the_version():
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["project"]["license"]["text"])


def test_the_notice_names_the_licence_of_every_data_set_of_the_catalogue():
    from datamodules.images.catalog import CATALOG

    notice = re.sub(r"[^a-z0-9]", "", (ROOT / "NOTICE").read_text().lower())
    for name in CATALOG:
        assert re.sub(r"[^a-z0-9]", "", name.lower()) in notice, f"{name}: state its terms in NOTICE"


def make(*arguments):
    command = ["make", "-C", str(ROOT), "-n", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_make
@pytest.mark.parametrize("target", ["demo", "venv", "test", "test-slow", "lint", "format", "bench", "docs", "clean"])
def test_make_has_the_target(target, tmp_path):
    make(target, f"VENV={tmp_path / 'venv'}")


@needs_make
@pytest.mark.parametrize("target", ["demo", "venv", "test", "test-slow", "lint", "format", "bench", "docs"])
def test_a_fresh_clone_installs_in_one_constrained_command(target, tmp_path):
    plan = make(target, f"VENV={tmp_path / 'venv'}")
    assert plan.count("pip install") == 1
    assert "-c constraints.txt" in plan


@needs_make
def test_a_finished_environment_is_not_installed_again(tmp_path):
    stamp = tmp_path / "venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert "pip install" not in make("test", f"VENV={tmp_path / 'venv'}")


def test_hooks_before_a_commit_are_local():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in repositories} == {"local"}
