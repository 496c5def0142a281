"""Identity of runs and facts of the machine."""

import getpass
import json
import socket
from pathlib import Path

import pytest

from leanlight import runs
from leanlight.contracts import UserError

CONFIG = {
    "model": {"class_path": "x.M", "init_args": {"lr": 0.1}},
    "data": {"class_path": "x.D", "init_args": {"root": "/a", "batch_size": 3}},
    "trainer": {"max_epochs": 2, "log_every_n_steps": 10, "default_root_dir": "runs"},
    "seed_everything": 0,
    "run": {"id": "a", "test": "last"},
}


def changed(*keys, value):
    config = json.loads(json.dumps(CONFIG))
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return config


@pytest.mark.parametrize(
    "keys",
    [("trainer", "log_every_n_steps"), ("trainer", "default_root_dir"), ("run", "id"), ("data", "init_args", "root")],
)
def test_where_and_how_often_to_write_is_not_identity(keys):
    assert runs.config_hash(changed(*keys, value="other")) == runs.config_hash(CONFIG)


@pytest.mark.parametrize(
    "keys", [("model", "init_args", "lr"), ("trainer", "max_epochs"), ("seed_everything",), ("run", "test")]
)
def test_what_decides_numbers_is_identity(keys):
    assert runs.config_hash(changed(*keys, value=7)) != runs.config_hash(CONFIG)


def test_an_argument_that_came_later_counts_only_where_it_is_used():
    data = {"class_path": "D", "init_args": {"batch_size": 4}}
    before = runs.config_hash({"data": data})
    later = {split: {**data, "init_args": {"batch_size": 4, "predict_split": split}} for split in ("test", "val")}
    assert runs.config_hash({"data": later["test"]}) == before
    assert runs.config_hash({"data": later["val"]}) != before


def test_a_stage_input_counts_by_content_not_by_path(tmp_path):
    hashes = []
    for name, content in (("a", b"same"), ("b", b"same"), ("c", b"other")):
        path = tmp_path / name
        path.write_bytes(content)
        config = changed("model", "init_args", "teacher", value=str(path))
        hashes.append(runs.config_hash(config, {"teacher": str(path)}))
    assert hashes[0] == hashes[1] != hashes[2]


def test_machine_names_no_host_user_or_path():
    text = json.dumps(runs.machine())
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert getpass.getuser() not in text.split('"')


def test_code_version_changes_when_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PROJECT", tmp_path)
    (tmp_path / "lit_modules").mkdir()
    file = tmp_path / "lit_modules" / "a.py"
    file.write_text("x = 1")
    before, names = runs.code_version(["lit_modules/a.py"])
    file.write_text("x = 2")
    assert runs.code_version(names)[0] != before


@pytest.mark.parametrize("value", ["../up", "a/b", "", ".hidden"])
def test_a_run_id_that_is_no_folder_name_is_refused(value):
    with pytest.raises(UserError, match=r"run\.id"):
        runs.RunSettings(id=value)


def test_runs_of_one_torchrun_launch_share_a_name(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert runs.new_run_id("a" * 64) == runs.new_run_id("b" * 64)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"run\.id"):
        runs.new_run_id("a" * 64)
