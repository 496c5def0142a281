"""Identity of runs and facts of the machine."""

import ast
import getpass
import hashlib
import json
import shutil
import socket
import sys
from importlib import import_module
from pathlib import Path

import pytest
from torch.distributed import HashStore

from leanlight import runs
from leanlight.contracts import UserError
from leanlight.invocation import expand

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


def test_compiling_counts_only_where_it_is_asked_for():
    off = {"backend": None, "mode": None, "dynamic": None, "fullgraph": False}
    assert runs.config_hash({"compile": off}) == runs.config_hash({})
    assert runs.config_hash({"compile": {**off, "backend": "inductor"}}) != runs.config_hash({})


def test_an_argument_that_came_later_counts_only_where_it_is_used():
    data = {"class_path": "D", "init_args": {"batch_size": 4}}
    before = runs.config_hash({"data": data})
    later = {split: {**data, "init_args": {"batch_size": 4, "predict_split": split}} for split in ("test", "val")}
    assert runs.config_hash({"data": later["test"]}) == before
    assert runs.config_hash({"data": later["val"]}) != before
    few = {"train_items": 10, "classes": [1, 2], "train_corruption": {"name": "gaussian", "severity": 1}}
    for name, value in few.items():
        for given in (None, value):
            again = {**data, "init_args": {"batch_size": 4, name: given}}
            assert (runs.config_hash({"data": again}) == before) == (given is None)


def test_a_later_argument_whose_name_others_had_before_is_left_out_of_its_class_alone():
    def window(name, **arguments):
        return runs.config_hash({"model": {"class_path": f"a.b.{name}", "init_args": {"window": 4, **arguments}}})

    assert window("AdaptiveWindow", min_start=0) == window("AdaptiveWindow")
    assert window("AdaptiveWindow", min_start=1) != window("AdaptiveWindow")
    assert window("RandomWindow", min_start=0) != window("RandomWindow")


def test_tensorfloat_counts_only_where_it_is_allowed():
    before = runs.config_hash({"run": {"test": "last"}})
    assert runs.config_hash({"run": {"test": "last", "tf32": False}}) == before
    assert runs.config_hash({"run": {"test": "last", "tf32": True}}) != before


def of_devices(devices, **trainer):
    return runs.config_hash({"trainer": {"accelerator": "auto", "strategy": "auto", "devices": devices, **trainer}})


def test_one_device_counts_as_the_default_did_when_it_was_called_auto():
    published = {"accelerator": "auto", "strategy": "auto", "devices": "auto"}
    content = {key: published.get(key) for key in runs._TRAINER_KEYS}
    identity = {"model": None, "data": None, "trainer": content, "seed": None, "test": None, "inputs": []}
    before = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    assert of_devices(1) == of_devices("1") == before
    assert len({before, of_devices("auto"), of_devices(2), of_devices([1])}) == 4
    assert of_devices("auto") == of_devices(-1)


@pytest.mark.parametrize("named", [{"strategy": "ddp"}, {"accelerator": "cpu"}])
def test_devices_count_as_they_are_where_accelerator_or_strategy_are_named(named):
    assert len({of_devices(devices, **named) for devices in (1, "auto", -1)}) == 3


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


ROOT = Path(runs.__file__).parent.parent


@pytest.fixture(scope="module")
def names():
    """Files of the project that a run of the classifier imports."""
    for name in (
        "datamodules.images.module",
        "lit_modules.classifier.module",
        "callbacks.media",
        "callbacks.throughput",
    ):
        import_module(name)
    return runs.code_version()[1]


@pytest.fixture
def project(names, tmp_path, monkeypatch):
    """A copy of the project's code, which `code_version` then looks at."""
    for package in ("leanlight", "lit_modules", "datamodules", "callbacks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.npz", "__pycache__"))
    monkeypatch.setattr(runs, "PROJECT", tmp_path)
    return tmp_path


def rewritten(path, change):
    """Rewrite a Python file through its syntax tree, so that formatting and comments change as well."""
    tree = ast.parse(path.read_text())
    change(tree)
    path.write_text(f"# {path.name}, written anew\n" + ast.unparse(tree))


def change_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = "Other words."


def test_comments_docstrings_and_formatting_outdate_nothing(project, names):
    assert "lit_modules/classifier/module.py" in names
    before = runs.code_version(names)
    for name in names:
        rewritten(project / name, change_docstrings)
    assert "Other words." in (project / "lit_modules/classifier/module.py").read_text()
    assert runs.code_version(names) == before


def test_code_that_draws_packs_times_or_describes_is_not_looked_at(names):
    assert "datamodules.images.catalog" in sys.modules
    left_out = ("pictures.py", "media.py", "export.py", "throughput.py", "catalog.py", "__init__.py")
    assert not [name for name in names if name.endswith(left_out)]
    assert "lit_modules/classifier/module.py" in names
    assert any(name.startswith("leanlight/ops/") for name in names)


def first(tree, kind, suits=lambda node: True):
    return next(node for node in ast.walk(tree) if isinstance(node, kind) and suits(node))


def change_operation(tree):
    node = first(tree, ast.BinOp, lambda node: not isinstance(node.op, ast.BitOr | ast.Sub))
    node.op = ast.Sub()


def change_default(tree):
    node = first(tree, ast.arguments, lambda node: any(isinstance(d, ast.Constant) for d in node.defaults))
    default = next(d for d in node.defaults if isinstance(d, ast.Constant))
    default.value = "other"


def change_number(tree):
    node = first(tree, ast.Constant, lambda node: type(node.value) in (int, float))
    node.value += 1


@pytest.mark.parametrize("change", [change_operation, change_default, change_number])
def test_a_changed_loss_default_or_constant_outdates(project, names, change):
    changed = 0
    for name in names:
        before = runs.code_version([name])
        try:
            rewritten(project / name, change)
        except StopIteration:  # nothing of this kind in the file
            continue
        assert runs.code_version([name]) != before, name
        changed += 1
    assert changed > 5


def test_a_changed_loss_shows_and_a_reworded_comment_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PROJECT", tmp_path)
    file = tmp_path / "losses.py"

    def version(text):
        file.write_text(text)
        return runs.code_version(["losses.py"])[0]

    loss = version("def loss(x, y, weight=0.5):\n    return weight * (x - y).square().mean()\n")
    assert (
        version('def loss(x, y, weight=0.5):\n    """New."""\n    return weight * (x - y).square().mean()  # MSE\n')
        == loss
    )
    assert version("def loss(x, y, weight=0.5):\n    return weight * (x - y).abs().mean()\n") != loss
    assert version("def loss(x, y, weight=0.6):\n    return weight * (x - y).square().mean()\n") != loss
    assert version("def loss(x, y, weight=None):\n    return weight * (x - y).square().mean()\n") != loss
    file.unlink()
    assert runs.code_version(["losses.py"])[0] != loss
    assert version("not python (") != version("not python ((")


@pytest.mark.parametrize("count", [3, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_folder_is_one_input_that_counts_by_content_not_by_place(tmp_path, count):
    def identity(bank):
        return runs.config_hash(changed("model", "init_args", "bank", value=f"{bank}/0"), {"bank": str(bank)})

    bank = tmp_path / "a"
    for number in range(count):
        path = bank / str(number % 100) / f"{number}.txt"
        if number < 100:
            path.parent.mkdir(parents=True)
        path.write_text(str(number))
    before = identity(bank)
    moved = bank.rename(tmp_path / "b")
    (moved / "media").mkdir()
    (moved / "media" / "picture.png").touch()
    assert identity(moved) == before
    renamed = (moved / "1" / "1.txt").rename(moved / "1" / "one.txt")
    assert identity(moved) != before
    renamed.rename(moved / "1" / "1.txt").write_text("other")
    assert identity(moved) != before


def test_logs_of_a_run_folder_do_not_count(tmp_path):
    for name in ("checkpoints/last.ckpt", "artifacts/bank/x.txt", "summary.json", "metrics.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = runs.content_digest(tmp_path)
    (tmp_path / "metrics.csv").write_text("other")
    assert runs.content_digest(tmp_path) == before
    (tmp_path / "artifacts/bank/x.txt").write_text("other")
    assert runs.content_digest(tmp_path) != before


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_an_input_that_holds_nothing_is_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"run\.inputs: .*{name}"):
        runs.config_hash(CONFIG, {"bank": str(tmp_path / name)})


def test_very_many_artefacts_are_one_line_of_a_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_MANY_FILES", 3)
    for name in ("checkpoints/last.ckpt", "artifacts/few/0", *(f"artifacts/many/{n}" for n in range(4))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345")
    listed = {item["path"]: item["bytes"] for item in runs.list_artifacts(tmp_path)}
    assert listed == {"checkpoints/last.ckpt": 5, "artifacts/few/0": 5, "artifacts/many": 20}


def test_a_bank_is_one_artefact(tmp_path):
    for name in ("bank.json", "manifest.csv", "bank.safetensors"):
        (tmp_path / "artifacts/bank").mkdir(parents=True, exist_ok=True)
        (tmp_path / "artifacts/bank" / name).write_text("12345")
    digest = runs.content_digest(tmp_path / "artifacts/bank")
    assert runs.list_artifacts(tmp_path) == [{"path": "artifacts/bank", "sha256": digest, "bytes": 15}]


@pytest.mark.parametrize("value", ["../up", "a/b", "", ".hidden", "a b", "a\n", "x" * 5000])
def test_a_run_id_that_is_no_folder_name_is_refused(value):
    with pytest.raises(UserError, match=r"run\.id"):
        runs.RunSettings(id=value)


def test_processes_of_a_torchrun_launch_work_where_the_first_one_chose(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    store = HashStore()
    for first, second in (("a", "b"), ("c", "d")):  # two runs, one after the other
        for rank, chosen in enumerate((first, second)):
            monkeypatch.setattr(runs, "_launch_store", lambda rank=rank: (store, rank))
            assert runs.told_by_rank_zero(Path(chosen)) == Path(first)


def test_a_process_that_is_alone_works_where_it_chose():
    assert runs.told_by_rank_zero(Path("a")) == Path("a")


def test_nodes_that_no_launcher_started_need_a_name(monkeypatch, tmp_path):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"run\.id"):
        runs.new_run_id("a" * 64, tmp_path, nodes=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert runs.new_run_id("a" * 64, tmp_path, nodes=2).endswith("aaaaaa")


def test_tasks_of_slurm_that_start_from_a_run_choose_one_folder(monkeypatch, tmp_path):
    for name in ("config.yaml", "checkpoints/last.ckpt", "predict-slurm-7-1/summary.json"):  # of the first task
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name, value in {"NTASKS": "2", "JOB_ID": "7", "STEP_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert expand(["predict", "--from", str(tmp_path)]).run_dir == tmp_path / "predict-slurm-7-1"
