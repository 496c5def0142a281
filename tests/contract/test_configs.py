"""Every config of every method is complete: it parses, and its classes can be built without data or weights."""

import pytest
import torch

from leanlight.configs_path import config_names
from leanlight.contracts import MethodData, MethodModule
from leanlight.experiment import LeanlightCLI, expand
from leanlight.registry import METHODS

RUNNABLE = [name for info in METHODS.values() for name in info.configs]
OVERLAYS = [name for name in config_names() if name.split("/")[0] in ("trainer", "logger")]


class BuildOnly(LeanlightCLI):
    """Build model and data of a config on the meta device, then stop."""

    def instantiate_trainer(self, **kwargs):
        return None

    def instantiate_classes(self):
        if not self.parse_only:
            with torch.device("meta"):
                super().instantiate_classes()

    def _run_subcommand(self, subcommand):
        pass


def build(name, *more, parse_only=False):
    arguments, _ = expand(["fit", "--config", name, *more])
    return BuildOnly(arguments, parse_only=parse_only)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_builds_a_module_and_data_that_keep_the_contracts(name):
    cli = build(name)
    assert isinstance(cli.model, MethodModule)
    assert callable(cli.datamodule.ensure_available)
    assert cli.model.primary_metric.name.startswith("val/")
    assert cli.resolved["run"]["method"] in (None, name.split("/")[0]) or name.split("/")[0] in METHODS


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_says_in_its_first_line_what_it_shows(name):
    from leanlight.configs_path import find_config

    assert find_config(name).read_text().startswith("# ")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_composes_with_a_config(overlay):
    name = METHODS["classifier"].smallest
    plain, laid = build(name, parse_only=True), build(name, "--config", overlay, parse_only=True)
    assert laid.resolved["model"] == plain.resolved["model"]
    assert laid.resolved != plain.resolved


def test_the_registry_and_the_folders_agree():
    from leanlight.configs_path import config_root

    folders = {path.name for path in config_root().iterdir() if path.is_dir()}
    assert folders == {*METHODS, "trainer", "logger", "sweeps"}
    for info in METHODS.values():
        assert info.smallest in info.configs


def test_data_protocol_is_kept():
    cli = build(METHODS["classifier"].smallest)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    assert isinstance(cli.datamodule, MethodData)
