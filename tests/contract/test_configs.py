"""Every config of every method is complete: it parses, and its classes can be built without data or weights."""

import functools
import re
from functools import cache

import pytest
import torch
from smallest import words

from leanlight.configs_path import config_names, config_root, find_config, find_configs
from leanlight.contracts import DataMeta, MethodData, MethodModule, UserError
from leanlight.experiment import LeanlightCLI, method_of
from leanlight.invocation import expand
from leanlight.registry import METHODS
from lit_modules.nn import TimmNet

RUNNABLE = [name for info in METHODS.values() for name in info.configs]
BASELINES = [name for name in RUNNABLE if "__" in name]
# Of the suite's modules the safety judge alone lets its weights be sharded, by trainer/fsdp (test_allows.py).
OVERLAYS = [name for name in config_names() if name.split("/")[0] in ("trainer", "logger") and name != "trainer/fsdp"]

# What a comparison holds fixed: data, budget, evaluation. A baseline that changes one of these says so in its header.
PROTOCOL = re.compile(
    r"data\.|trainer\.(?!callbacks)|seed_everything|run\.test|model\.init_args\."
    r"(local|evaluation|architectures|compare_with_random|generated|strengths|probe|input_noise|weight_noise)\b"
    r"|trainer\.callbacks\.\d+\.init_args\.(participants|target|dropout|straggl)"
)


class BuildOnly(LeanlightCLI):
    """Build model and data of a config on the meta device, then stop."""

    def instantiate_trainer(self, **kwargs):
        return None

    def instantiate_classes(self):
        if not self.parse_only:
            with torch.device("meta"):
                super().instantiate_classes()


def build(name, *more, parse_only=False):
    return BuildOnly(expand(["fit", "--config", name, *more]), parse_only=parse_only)


@pytest.fixture
def no_downloads(monkeypatch):
    """Networks are made without the weights that a config asks for."""
    timm = pytest.importorskip("timm", reason="needs the extra vision")
    make, init = timm.create_model, TimmNet.__init__
    monkeypatch.setattr(
        timm, "create_model", lambda *names, **options: make(*names, **(options | {"pretrained": False}))
    )
    bare = functools.wraps(init)(lambda net, *names, **options: init(net, *names, **(options | {"weights": None})))
    monkeypatch.setattr(TimmNet, "__init__", bare)


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_builds_a_module_and_data_that_keep_the_contracts(name):
    cli = build(name)
    method = METHODS[name.split("/")[0]]
    stage = cli.resolved["model"]["class_path"] not in {other.module for other in METHODS.values()}
    # A stage on the way to a method's result may have no validation data to be judged by, and nothing to train.
    assert isinstance(cli.model, MethodModule) or (stage and method.smallest_inputs and callable(cli.model.media))
    assert callable(cli.datamodule.ensure_available)
    if (metric := getattr(cli.model, "primary_metric", None)) is not None:
        assert metric.name.startswith("val/")
    run_folder = cli.resolved["run"]["method"] or method_of(cli.resolved["model"]["class_path"])
    assert run_folder == name.split("/")[0]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_says_in_its_first_line_what_it_shows(name):
    assert find_config(name).read_text().startswith("# ")


@cache
def leaves(name):
    """Every value of a resolved config by its dotted key."""

    def walk(value, key):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if not items:
            yield key, value
        for part, item in items:
            yield from walk(item, f"{key}.{part}" if key else str(part))

    return dict(walk(build(name, parse_only=True).resolved, ""))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_keeps_the_protocol_of_its_base_but_for_the_keys_its_header_names(name):
    base, overlay = leaves(name.split("__")[0]), leaves(name)
    changed = {key for key in base.keys() | overlay.keys() if base.get(key) != overlay.get(key)}
    # An argument that the other class does not have is no change of the protocol.
    changed -= {key for key in changed if key.startswith("model.") and not (key in base and key in overlay)}
    changed = {key for key in changed if PROTOCOL.match(key)}
    header = "\n".join(line for line in find_config(name).read_text().splitlines() if line.startswith("#"))
    named = [key for line in re.findall(r"# also changes: (.+)", header) for key in line.split(", ")]
    covers = {key: {full for full in changed if f"{full}.".startswith(f"{key}.")} for key in named}
    assert changed - set().union(*covers.values()) == set(), "name them in a comment: # also changes: key, key"
    assert [key for key, full in covers.items() if not full] == [], "named, but not changed"


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_holds_only_lines_of_its_own(name):
    base, overlay = (path.read_text() for path in find_configs(name))
    assert len(overlay.splitlines()) < len(base.splitlines())


def test_an_overlay_without_its_base_is_refused_in_one_line(tmp_path):
    (tmp_path / "plain__variant.yaml").write_text("# Changes a plain config.\nseed_everything: 1\n")
    with pytest.raises(UserError, match=r"overlay of 'plain' .* no file .*/plain.yaml"):
        find_configs(str(tmp_path / "plain__variant.yaml"))


def test_an_overlay_given_as_a_path_is_laid_over_the_file_beside_it(tmp_path):
    smallest = find_config(METHODS["classifier"].smallest).read_text()
    (tmp_path / "plain.yaml").write_text(smallest)
    (tmp_path / "plain__variant.yaml").write_text("# Another seed.\nseed_everything: 17\n")
    resolved = build(str(tmp_path / "plain__variant.yaml"), parse_only=True).resolved
    assert resolved["seed_everything"] == 17
    assert resolved["model"] == build(METHODS["classifier"].smallest, parse_only=True).resolved["model"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_composes_with_a_config(overlay):
    name = METHODS["classifier"].smallest
    plain, laid = build(name, parse_only=True), build(name, "--config", overlay, parse_only=True)
    assert laid.resolved["model"] == plain.resolved["model"]
    assert laid.resolved != plain.resolved


def test_the_registry_and_the_folders_agree():
    folders = {path.name for path in config_root().iterdir() if path.is_dir()}
    assert folders == {*METHODS, "trainer", "logger", "sweeps"}


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)
def test_the_smallest_config_of_a_method_trains_its_module_on_data_that_keep_the_protocol(info, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, name, *needed = words(info.name)
    cli = build(name, *needed)
    assert cli.resolved["model"]["class_path"] == info.module
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    assert isinstance(cli.datamodule, MethodData)
    assert isinstance(cli.datamodule.meta, DataMeta)
