"""Classes that a run folder or a checkpoint names are neither imported nor built where the place admits none such."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from one_step import one_step_run

import leanlight as suite
from leanlight.__main__ import main
from leanlight.contracts import UserError

PAYLOAD = """
from pathlib import Path
Path({imported!r}).write_text("imported")
import lightning.pytorch as pl
import torch
class Module(pl.LightningModule):
    def __init__(self, **kwargs):
        Path({built!r}).write_text("built")
class Data(pl.LightningDataModule):
    __init__ = Module.__init__
class Net(torch.nn.Module):
    __init__ = Module.__init__
"""
COMMANDS = {
    "fit --resume": ["fit", "--resume", "RUN"],
    "fit --config": ["fit", "--config", "RUN/config.yaml"],
    "validate --from": ["validate", "--from", "RUN"],
    "test --from": ["test", "--from", "RUN"],
    "predict --from": ["predict", "--from", "RUN"],
    "predict --resume": ["predict", "--resume", "RUN/predict"],
    "play": ["play", "RUN"],
    "play of a file": ["play", "RUN/checkpoints/last.ckpt"],
    "recommend": ["recommend", "RUN", "--session=1"],
    "select": ["select", "RUN", "--rule=random", "--keep=1", "--images=pictures"],
    "export": ["export", "RUN"],
    "export of a file": ["export", "FILE"],
}
PLACES = {
    "the model": lambda saved, value: saved["model"].update(value),
    "the data": lambda saved, value: saved["data"].update(value),
    "a network": lambda saved, value: saved["model"]["init_args"].update(network=value),
    "a callback": lambda saved, value: saved["trainer"].update(callbacks=[value]),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A finished run of the classifier, with a predict run inside."""
    run = one_step_run(tmp_path_factory.mktemp("honest"))
    shutil.copytree(run, run / "predict", ignore=shutil.ignore_patterns("predict"))
    (run / "predict" / "summary.json").write_text(json.dumps({"command": ["predict"]}))
    return run


@pytest.fixture
def attack(honest, tmp_path, monkeypatch, capsys):
    """Put a payload into a copy of the run, call a command; nothing of it may be imported, built or executed."""
    run, imported, built = tmp_path / "run", tmp_path / "imported", tmp_path / "built"
    shutil.copytree(honest, run)
    (tmp_path / "payload.py").write_text(PAYLOAD.format(imported=str(imported), built=str(built)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("LEANLIGHT_TRUST", raising=False)

    def call(command, change):
        for config in (run / "config.yaml", run / "predict" / "config.yaml"):
            saved = yaml.safe_load(config.read_text())
            change(saved)
            config.write_text(yaml.safe_dump(saved))
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        whole = {"model": {"init_args": checkpoint["hyper_parameters"]}, "data": {}, "trainer": {}}
        change(whole)
        named = {"_class_path": whole["model"].pop("class_path", checkpoint["hyper_parameters"]["_class_path"])}
        checkpoint["hyper_parameters"] = whole["model"].get("init_args", {}) | named
        torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
        # Whoever changes a checkpoint can change what is noted of it.
        (run / "checkpoints" / "sha256.json").unlink(missing_ok=True)
        shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "alone.ckpt")
        words = [word.replace("RUN", str(run)).replace("FILE", str(tmp_path / "alone.ckpt")) for word in command]
        code = main(words)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leanlight: error:")]
        assert not imported.exists(), "a module was imported"
        assert not built.exists(), "an object was built"
        return code, error

    yield call
    sys.modules.pop("payload", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_from_elsewhere_is_neither_imported_nor_built(attack, command):
    value = {"class_path": "payload.Module", "init_args": {}}
    code, error = attack(COMMANDS[command], lambda saved: PLACES["the model"](saved, value))
    assert code == 2
    assert len(error) == 1


@pytest.mark.parametrize("place", ["the data", "a network", "a callback"])
@pytest.mark.parametrize("command", ["fit --resume", "test --from", "play", "select", "export of a file"])
def test_nothing_else_that_a_run_names_is_imported(attack, place, command):
    value = {"class_path": "payload.Net" if place == "a network" else "payload.Data", "init_args": {}}
    code, error = attack(COMMANDS[command], lambda saved: PLACES[place](saved, value))
    if "export" not in command or place == "a network":  # a checkpoint alone holds neither data nor trainer
        assert code == 2
        assert len(error) == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["the model", "a network"])
def test_an_ordinary_class_that_would_execute_is_not_built(attack, tmp_path, command, place):
    value = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "built")]}}
    code, error = attack(COMMANDS[command], lambda saved: PLACES[place](saved, value))
    assert code == 2
    # Play may find first that this run is no game; selecting reads no model.
    assert "subprocess.Popen" in error[0] or "play" in command or command == "select"
    assert len(error) == 1


def test_a_class_of_the_suite_in_the_wrong_place_is_refused(attack):
    value = {"class_path": "datamodules.ImageDataModule", "init_args": {}}
    code, error = attack(COMMANDS["export"], lambda saved: PLACES["a network"](saved, value))
    assert code == 2
    assert "network" in error[0]


def test_the_error_says_how_to_trust_and_trust_works(honest, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LEANLIGHT_TRUST", raising=False)
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("from lit_modules.classifier import ImageClassifier as Mine\n")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lit_modules.classifier.ImageClassifier", "mine.Mine"))
    assert main(["export", str(run)]) == 2
    assert "--trust mine" in capsys.readouterr().err
    assert main(["export", str(run), "--trust", "mine"]) == 0
    assert suite.load(run, trust=["mine"]).network is not None
    with pytest.raises(UserError, match="--trust mine"):
        suite.load(run)
    sys.modules.pop("mine", None)
