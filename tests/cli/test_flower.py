"""`leanlight flower`: what it refuses in one line, and the app that it hands to a SuperLink."""

import ast
import importlib.util
import tomllib
from importlib.util import find_spec

import pytest

from leanlight.__main__ import main

needs_flower = pytest.mark.skipif(find_spec("flwr") is None, reason="extra flower")


def refused(capsys, *words):
    assert main(["flower", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_missing_extra_is_named(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("leanlight.cli.flower.find_spec", lambda name: None if name == "flwr" else real(name))
    assert "pip install 'leanlight[flower]'" in refused(capsys, "sfedca/digits_small")


@needs_flower
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["classifier/digits_small"], "config: expected a federation"),
        (["sfedca/digits_smal"], "digits_small"),
        (["sfedca/digits_small", "--trainer.max_epoch=1"], "max_epoch"),
        (["sfedca/digits_small", "--resume=there"], "--resume: a federation on Flower starts anew"),
        (["sfedca/digits_small", "--timeout=0"], "--timeout: expected"),
        (["sfedhifi/digits_small", "--model.buffers=static", "--app=there"], "model.buffers: static reads"),
        (["sfedca/digits_small", "--trainer.devices=2", "--trainer.accelerator=cpu"], "trainer.devices: expected 1"),
        ([], "leanlight flower: the following arguments are required: CONFIG"),
    ],
    ids=["no federation", "unknown config", "unknown key", "resume", "timeout", "static norms", "devices", "nothing"],
)
def test_bad_input_is_one_line(capsys, words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@needs_flower
def test_the_app_is_one_that_flower_accepts_and_holds_the_whole_config(tmp_path, monkeypatch):
    from flwr.cli.config_utils import load_and_validate

    from leanlight.flower import build

    assert main(["flower", "sfedca/digits_small", "--model.local.epochs=7", f"--app={tmp_path}"]) == 0
    _, warnings = load_and_validate(tmp_path / "pyproject.toml")
    assert warnings == []
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["dependencies"] == []
    nodes = ast.parse((tmp_path / "federation_client.py").read_text()).body
    (config,) = [ast.literal_eval(n.value) for n in nodes if isinstance(n, ast.Assign) and n.targets[0].id == "CONFIG"]
    monkeypatch.setenv("LEANLIGHT_DATA", str(tmp_path / "of_this_node"))
    cli = build(config)
    assert cli.model.local.epochs == 7
    assert str(cli.datamodule.root) == str(tmp_path / "of_this_node")
