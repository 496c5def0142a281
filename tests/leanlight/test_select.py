"""`leanlight select`: from features to a selection on disk, all or nothing, and resumable by class."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torchvision.datasets import ImageFolder
from wandb_file import read_wandb

from callbacks import pictures
from datamodules import ImageDataModule, ImageFolderStream, SubsetDataModule
from leanlight import selection
from leanlight.cli.select import main
from leanlight.contracts import UserError
from leanlight.selection_images import PictureFolders, folder_names
from leanlight.selection_rules import RULES
from lit_modules.selection import Features, Moderate, class_budget

ITEMS, CLASSES = 60, 3
DRAW = selection._draw
FILES = ["selection.csv", "selection.json", "selection.safetensors"]
OWN = '''
import os, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from leanlight.contracts import UserError
from lit_modules.selection import ClassRule, class_picks


@dataclass(frozen=True)
class Weighted(ClassRule):
    """Items with the largest first number, weighted; slow where it is asked to be."""

    power: float = 1.0
    bins: int = 2
    sign: Literal["largest", "smallest"] = "largest"
    fails_in: int | None = None
    exact: bool = True

    def __post_init__(self):
        if self.bins < 1:
            raise UserError(f"bins: expected at least 1, got {self.bins}")

    @property
    def needs(self):
        return ("embedding",) if self.exact else ()

    def pick(self, features, count, generator, advance):
        label = int(features.label[0])
        with open(os.environ.get("CALLS", os.devnull), "a") as log:
            log.write(f"{label}\\n")
        if label == self.fails_in:
            raise UserError("kernel: too large for memory")
        if "PAUSE_IN" in os.environ and label == int(os.environ["PAUSE_IN"]):
            Path("reached.part").write_text(str(os.getpid()))
            Path("reached.part").rename("reached")
            time.sleep(60)
        score = features["embedding"][:, 0] ** self.power + torch.rand(len(features), generator=generator) * 1e-6
        index = score.argsort(descending=self.sign == "largest", stable=True)[:count]
        advance(count)
        return class_picks(index, score[index], score[index].abs(), index % self.bins)
'''


def features(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "index": torch.arange(ITEMS),
        "origin": torch.arange(ITEMS) * 2 + 1,
        "label": torch.arange(ITEMS) % CLASSES,
        "embedding": torch.rand(ITEMS, 4, generator=generator),
    }


def predict_run(folder: Path, values: dict[str, torch.Tensor], split: str = "train", items: int = ITEMS) -> Path:
    """A run folder as `leanlight predict` leaves it, in two pieces."""
    place = folder / "artifacts" / "predictions"
    place.mkdir(parents=True)
    pieces = []
    for number, rows in enumerate((slice(0, 25), slice(25, None))):
        content = save({name: value[rows].clone() for name, value in values.items()})
        (place / f"{number}_0.safetensors").write_bytes(content)
        sha256 = {"safetensors": hashlib.sha256(content).hexdigest()}
        pieces.append({"name": f"{number}_0", "items": len(values["index"][rows]), "sha256": sha256})
    described = {"split": split, "data": "d" * 64, "weights": "w" * 64, "items": len(values["index"]), "pieces": pieces}
    (place / "predictions.json").write_text(json.dumps(described))
    summary = {"status": "finished", "command": ["predict"], "data": {"counts": {"train": items}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rule.py").write_text(OWN)
    monkeypatch.setattr(selection, "_draw", lambda *arguments: None)  # takes long, and one test looks at it
    yield tmp_path
    sys.modules.pop("own_rule", None)


@pytest.fixture
def run(place):
    return predict_run(place / "run", features())


def files(folder: Path) -> list[str]:
    """What lies in a folder beside pictures."""
    return sorted(path.name for path in folder.iterdir() if path.name != "media")


def record(folder: Path) -> dict:
    return json.loads((folder / "selection.json").read_text())


def test_a_selection_holds_the_best_items_of_each_class_under_their_origin(run):
    words = ["--rule", "own_rule.Weighted", "--keep", "0.2", "--set", "power=2", "--seed", "3", "--output", "out"]
    assert main([str(run), *words]) == 0
    assert files(Path("out")) == FILES
    chosen, values = load_file("out/selection.safetensors"), features()
    for label in range(CLASSES):
        own = [i for i in range(ITEMS) if i % CLASSES == label]
        best = sorted(own, key=lambda i: -values["embedding"][i, 0])[:4]
        assert chosen["index"][chosen["label"] == label].tolist() == [2 * i + 1 for i in best]
    assert chosen["order"].tolist() == [0, 1, 2, 3] * 3
    assert torch.equal(chosen["weight"], chosen["score"])
    assert chosen["score"].allclose(values["embedding"][chosen["index"] // 2, 0] ** 2, atol=1e-5)
    told = record(Path("out"))
    assert told["class"] == "own_rule.Weighted"
    assert told["arguments"] == {"power": 2.0, "bins": 2, "sign": "largest", "fails_in": None, "exact": True}
    assert (told["data"], told["weights"], told["seed"], told["keep"]) == ("d" * 64, "w" * 64, 3, 0.2)
    assert (told["items"], told["kept"], told["rho_s"], told["theta"], told["rho"]) == (60, 12, 0.2, 0.0, 0.2)
    assert told["sha256"] == hashlib.sha256(Path("out/selection.safetensors").read_bytes()).hexdigest()
    for counts in told["counts"]:
        bins = chosen["bin"][chosen["label"] == counts["label"]].tolist()
        assert counts == {"label": counts["label"], "items": 20, "kept": 4, "bins": [bins.count(0), bins.count(1)]}
    with safe_open("out/selection.safetensors", "pt") as file:
        assert json.loads(file.metadata()["selection"])["data"] == "d" * 64


def test_the_table_of_a_selection_reads_back_to_the_same_numbers(run):
    main([str(run), "--rule=own_rule.Weighted", "--keep=0.5", "--output=out"])
    chosen = load_file("out/selection.safetensors")
    with open("out/selection.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, column in chosen.items():
        assert torch.equal(torch.tensor([float(row[name]) for row in rows]).to(column.dtype), column)


def test_a_run_its_predictions_and_one_file_give_the_same_selection(run, place):
    save_file(features(), place / "features.safetensors")
    outputs = []
    for number, source in enumerate((run, run / "artifacts" / "predictions", place / "features.safetensors")):
        main([str(source), "--rule=own_rule.Weighted", "--keep=0.3", f"--output={number}"])
        outputs.append((record(place / str(number))["features"], load_file(place / f"{number}/selection.safetensors")))
    for digest, chosen in outputs:
        assert digest == outputs[0][0]
        assert all(torch.equal(column, outputs[0][1][name]) for name, column in chosen.items())


def test_without_an_origin_a_file_counts_by_its_index(place):
    values = features()
    del values["origin"]
    save_file({**values, "index": values["index"] + 7}, place / "features.safetensors")
    main(["features.safetensors", "--rule=full", "--keep=1"])
    chosen = load_file("selection/full_1_s0/selection.safetensors")
    assert sorted(chosen["index"].tolist()) == list(range(7, 67))


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--rule=random", "--keep=0.5"], "random_0.5_s0"),
        (["--rule=random", "--keep=0.05", "--seed=4"], "random_0.05_s4"),
    ],
)
def test_by_default_a_selection_lies_in_the_run_of_its_features(run, words, folder):
    main([str(run), *words])
    assert (run / "artifacts" / "selection" / folder / "selection.json").is_file()


def test_other_switches_do_not_overwrite_a_selection(run):
    for power in (1, 2, 2):
        main([str(run), "--rule=own_rule.Weighted", "--keep=0.5", f"--set=power={power}"])
    assert len(list((run / "artifacts" / "selection").iterdir())) == 2


def test_switches_come_as_pairs_as_a_mapping_and_from_a_config(run, place):
    (place / "rule.yaml").write_text("rule: own_rule.Weighted\nkeep: 0.4\nseed: 9\nset: {power: 3, sign: smallest}\n")
    main([str(run), "--config=rule.yaml", "--set", '{"bins": 5, "exact": true}', "--set", "power=2", "--output=out"])
    told = record(place / "out")
    assert told["arguments"] == {"power": 2.0, "bins": 5, "sign": "smallest", "fails_in": None, "exact": True}
    assert (told["rule"], told["keep"], told["seed"]) == ("own_rule.Weighted", 0.4, 9)


def test_a_config_that_came_with_a_run_does_not_decide_which_code_runs(run, place):
    (run / "rule.yaml").write_text("{rule: own_rule.Weighted, keep: 0.5}")
    words = [str(run), f"--config={run / 'rule.yaml'}", "--output=out"]
    with pytest.raises(UserError, match=r"'own_rule.Weighted' is outside of the suite .* add --trust own_rule"):
        main(words)
    assert "own_rule" not in sys.modules
    assert main([*words, "--trust=own_rule"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--rule: expected a rule"),
        (["--rule=randm", "--keep=1"], "rule: 'randm' is none (did you mean 'random'?)"),
        (["--rule=random"], "--keep: expected a share"),
        (["--rule=random", "--keep=0"], "--keep: expected a number in (0, 1], got '0'"),
        (["--rule=random", "--keep=1.5"], "--keep: expected a number in (0, 1], got '1.5'"),
        (["--rule=random", "--keep=nan"], "--keep: expected a number in (0, 1], got 'nan'"),
        (["--rule=random", "--keep=0.02"], "keep: 0.02 of class 0 with 20 items keeps less than one"),
        (["--rule=random", "--keep=1", "--seed=-1"], "--seed: expected an integer from 0 to 4294967295, got '-1'"),
        (
            ["--rule=random", "--keep=1", "--set=alpha=2"],
            "--set alpha: not an argument of lit_modules.select",
        ),
        (
            ["--rule=own_rule.Weighted", "--keep=1", "--set=powr=2"],
            "--set powr: not an argument of own_rule.W",
        ),
        (["--rule=own_rule.Weighted", "--keep=1", "--set=power=high"], "--set power: expected float, got 'high'"),
        (["--rule=own_rule.Weighted", "--keep=1", "--set=bins=2.5"], "--set bins: expected int, got '2.5'"),
        (["--rule=own_rule.Weighted", "--keep=1", "--set=exact=1"], "--set exact: expected bool, got '1'"),
        (
            ["--rule=own_rule.Weighted", "--keep=1", "--set=sign=middle"],
            "--set sign: expected one of largest, smallest, got 'middle'",
        ),
        (
            ["--rule=own_rule.Weighted", "--keep=1", "--set=bins"],
            "--set: expected KEY=VALUE or a JSON mapping",
        ),
        (
            ["--rule=own_rule.Weigthed", "--keep=1"],
            "--rule: own_rule has no class 'Weigthed' (did you",
        ),
        (["--rule=nowhere.Rule", "--keep=1"], "--rule: no module named 'nowhere'"),
        (
            ["--rule=torch.nn.Linear", "--keep=1"],
            "--rule: Import path torch.nn.Linear does not corre",
        ),
        (["--rule=os.system", "--keep=1"], "--rule: 'os.system' is never imported"),
        (["--rule=own_rule.Weighted", "--keep=1", "--set=fails_in=1"], "kernel: too large for memory"),
        (["--rule=own_rule.Weighted", "--keep=1", "--set=bins=0"], "--set bins: expected at least 1, got 0"),
        (["--config=none.yaml"], "--config: nothing at none.yaml"),
        (["--rule=random", "--keep=1", "--output=/proc/none"], "--output: cannot write /proc/none"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, place, words, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError) as error:
        main([str(run), *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts] == before


def spoilt(values, name, position, value):
    values[name][position] = value
    return values


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda v: v, {"split": "test"}, "expected predictions of the training part, .* holds those of 'test'"),
        (lambda v: v, {"items": 70}, "cut short, .* holds 60 of 70 items"),
        (lambda v: {k: x[1:] for k, x in v.items()}, {"items": 59}, "cut short, .* lacks items of the training part"),
        (
            lambda v: {k: x for k, x in v.items() if k != "embedding"},
            {},
            "--rule .* needs embedding, which .* lacks",
        ),
        (
            lambda v: {k: x for k, x in v.items() if k != "origin"},
            {},
            "has no origin; write them with",
        ),
        (lambda v: spoilt(v, "embedding", (7, 1), float("nan")), {}, "embedding of item 7 is not finite"),
        (lambda v: spoilt(v, "origin", 3, 1), {}, "holds an item more than once"),
        (lambda v: v | {"label": torch.rand(ITEMS, 5)}, {}, r"label: expected one class an item, got .* \(60, 5\)"),
        (lambda v: spoilt(v, "label", 3, -1), {}, "expected classes from 0, got -1"),
    ],
)
def test_features_that_no_rule_could_go_by_are_refused(place, change, options, message):
    run = predict_run(place / "run", change(features()), **options)
    with pytest.raises(UserError, match=message) as error:
        main([str(run), "--rule=own_rule.Weighted", "--keep=0.5"])
    assert "\n" not in str(error.value)
    assert not (run / "artifacts" / "selection").exists()


def test_an_unfinished_prediction_and_a_piece_of_one_are_refused(run):
    (run / "artifacts/predictions/0_0.json").write_text("{}")
    with pytest.raises(UserError, match=r"is one piece of a prediction; give its folder"):
        main([str(run / "artifacts/predictions/0_0.safetensors"), "--rule=random", "--keep=1"])
    (run / "artifacts/predictions/1_0.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is missing or damaged"):
        main([str(run), "--rule=random", "--keep=1"])
    (run / "artifacts/predictions/predictions.json").unlink()
    with pytest.raises(UserError, match="go on with: leanlight predict --resume"):
        main([str(run), "--rule=random", "--keep=1"])
    with pytest.raises(UserError, match="no predictions"):
        main(["nowhere", "--rule=random", "--keep=1"])


def test_what_a_rule_needs_may_depend_on_its_switches(place):
    run = predict_run(place / "run", {k: v for k, v in features().items() if k != "embedding"})
    with pytest.raises(UserError, match="the rule needs embedding"):  # read without them, it asks for them all the same
        main([str(run), "--rule=own_rule.Weighted", "--keep=1", "--set=exact=false"])


def started(folder: Path, *words: str, **environ: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "leanlight", "select", "run", "--rule=own_rule.Weighted", "--keep=0.5", *words]
    environ |= {"WANDB_SILENT": "true"}
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environ}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGKILL, -9)]
)
def test_a_class_that_is_done_is_not_worked_out_again(run, place, monkeypatch, number, code):
    main([str(run), "--rule=own_rule.Weighted", "--keep=0.5", "--output=undisturbed"])
    process = started(place, "--output=out", PAUSE_IN="2", CALLS="first")
    while not (place / "reached").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    process.communicate()
    assert [path.name for path in (place / "out").iterdir()] == [".parts"]
    monkeypatch.setenv("CALLS", "second")
    again = started(place, "--output=out", CALLS="second")
    assert again.wait(timeout=60) == 0, again.communicate()
    again.communicate()
    assert (place / "first").read_text().split() == ["0", "1", "2"]
    assert (place / "second").read_text().split() == ["2"]
    assert files(place / "out") == FILES
    for name in ("selection.csv", "selection.safetensors"):
        assert (place / "out" / name).read_bytes() == (place / "undisturbed" / name).read_bytes()
    left, right = record(place / "out"), record(place / "undisturbed")
    assert {key for key in left if left[key] != right[key]} <= {"seconds", "code_hash", "code_files"}


@pytest.mark.slow
def test_a_pipeline_killed_in_a_selection_ends_as_an_undisturbed_one(place):
    save_file(features(), place / "features.safetensors")
    stage = {
        "name": "choose",
        "command": "select",
        "overrides": {"rule": "own_rule.Weighted", "keep": 0.5, "set": {"power": 2}},
        "inputs": {"source": "features.safetensors"},
    }
    (place / "pipe.yaml").write_text(json.dumps({"method": "adq", "dataset": "own", "stages": [stage]}))

    def pipeline(root: str, **environ: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "leanlight", "run", "pipe.yaml", "--seed=4", f"--runs-root={root}"]
        env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{place}", **environ}
        return subprocess.Popen(command, cwd=place, env=env, start_new_session=True, stdout=subprocess.PIPE, text=True)

    process = pipeline("killed", PAUSE_IN="2", CALLS="first")
    while not (place / "reached").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(int((place / "reached").read_text()), signal.SIGKILL)  # the stage is in a group of its own
    process.communicate()
    (folder,) = place.glob("killed/adq/own/*")
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    again, undisturbed = pipeline("killed", CALLS="second"), pipeline("undisturbed")
    out, _ = again.communicate(timeout=120)
    assert (again.returncode, undisturbed.wait(timeout=120)) == (0, 0)
    undisturbed.communicate()
    assert "choose: resume (running, with finished parts)" in out
    assert (place / "second").read_text().split() == ["2"]
    (other,) = place.glob("undisturbed/adq/own/*")
    assert other.name == folder.name
    for name in FILES[::2]:
        left, right = (run / "artifacts" / "select" / name for run in (folder, other))
        assert left.read_bytes() == right.read_bytes()
    assert record(folder / "artifacts" / "select")["seed"] == 4
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["metrics"]["kept"]) == ("finished", 30)


@pytest.mark.parametrize("change", ["--seed=1", "--set=power=2", "--keep=0.25", "features", "own_rule.py"])
def test_parts_of_another_selection_are_not_taken(run, place, monkeypatch, change):
    monkeypatch.setenv("CALLS", str(place / "calls"))
    with pytest.MonkeyPatch.context() as patch:
        import own_rule

        pick = own_rule.Weighted.pick

        def interrupted(self, features, *rest):
            if int(features.label[0]) == 2:
                raise KeyboardInterrupt
            return pick(self, features, *rest)

        patch.setattr(own_rule.Weighted, "pick", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([str(run), "--rule=own_rule.Weighted", "--keep=0.5", "--output=out"])
    (place / "calls").unlink()
    if change == "features":
        run = predict_run(place / "other", features(seed=1))
    elif change == "own_rule.py":
        (place / change).write_text(OWN + "\n\n")
    main([str(run), "--rule=own_rule.Weighted", "--keep=0.5", "--output=out", *[change] * change.startswith("--")])
    assert (place / "calls").read_text().split() == ["0", "1", "2"]
    assert not (place / "out" / ".parts").exists()


def test_a_bad_rule_leaves_an_earlier_selection_as_it_was(run, place):
    main([str(run), "--rule=random", "--keep=0.5", "--output=out"])
    before = {path: path.read_bytes() for path in (place / "out").rglob("*.*")}
    with pytest.raises(UserError, match="kernel"):
        main([str(run), "--rule=own_rule.Weighted", "--keep=0.5", "--set=fails_in=2", "--output=out"])
    assert {path: path.read_bytes() for path in (place / "out").rglob("*.*")} == before


def test_pictures_of_a_selection_lie_beside_it_and_take_the_place_of_earlier_ones(place, monkeypatch):
    monkeypatch.setattr(selection, "_draw", DRAW)
    values = {**features(), "train_error": torch.rand(ITEMS, 3)}
    run = predict_run(place / "run", values)
    main([str(run), "--rule=el2n", "--keep=0.5", "--output=out"])
    assert {path.name for path in Path("out/media").iterdir()} == {"classes.png", "scores.png"}
    main([str(run), "--rule=random", "--keep=0.5", "--output=out"])
    assert {path.name for path in Path("out/media").iterdir()} == {"classes.png"}


def test_the_list_of_rules_says_what_each_needs_without_torch():
    listed = "import sys; from leanlight.cli.select import main; main(['--list']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for name, info in RULES.items():
        assert all(need in lines[name] for need in info.needs)
        assert info.help in lines[name]


def test_selecting_loads_no_lightning(run):
    words = [str(run), "--rule=random", "--keep=0.5"]
    code = f"import sys; from leanlight.cli.select import main; main({words}); assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def predicted(folder: Path, kind: type, **arguments) -> tuple[Path, Any]:
    """A run folder with the predictions of the training part of real data, and the data."""
    data = kind(**arguments)
    data.setup()
    split = data.splits["train"] if kind is ImageFolderStream else data.train_split
    values = {"index": torch.arange(len(split.labels)), "origin": split.origin, "label": split.labels}
    run = predict_run(folder, values, items=len(split.labels))
    described = run / "artifacts/predictions/predictions.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "data": data.meta.fingerprint}))
    config = {"data": {"class_path": f"datamodules.{kind.__name__}", "init_args": arguments}}
    (run / "config.yaml").write_text(json.dumps(config))
    return run, data


DIGITS = {"dataset": "digits", "download": False}


def test_a_selection_is_a_training_set(place):
    run, _ = predicted(place / "digits", ImageDataModule, **DIGITS)
    main([str(run), "--rule=random", "--keep=0.1", "--output=out"])
    chosen = SubsetDataModule("out", dataset="digits", download=False)
    chosen.ensure_available()
    chosen.setup()
    assert torch.equal(chosen.train_split.origin, load_file("out/selection.safetensors")["index"])
    with pytest.raises(UserError, match="other data or another split"):
        SubsetDataModule("out", dataset="digits", download=False, val_fraction=0.2).setup()


def test_pictures_of_a_set_in_memory_are_png_files_that_other_libraries_read(place):
    run, data = predicted(place / "run", ImageDataModule, **DIGITS)
    main([str(run), "--rule=random", "--keep=0.1", "--output=out", "--images=pictures"])
    chosen, split = load_file("out/selection.safetensors"), data.train_split
    folder = ImageFolder("pictures")
    assert folder.classes == list(data.meta.classes)
    labels = dict(zip(chosen["index"].tolist(), chosen["label"].tolist(), strict=True))
    assert len(folder.samples) == len(labels) == record(Path("out"))["kept"]
    for path, label in folder.samples:
        origin = int(Path(path).stem)
        assert labels[origin] == label
        with Image.open(path) as picture:
            item = int((split.origin == origin).nonzero())
            assert np.array_equal(np.array(picture), split.images[item, 0].numpy())


def test_pictures_of_a_streamed_folder_are_copied_as_they_are(place):
    for part in ("train", "val"):
        for label, name in enumerate(("a cat", "dog")):
            (place / "set" / part / name).mkdir(parents=True)
            for number in range(6):
                picture = Image.new("RGB", (9, 8), (100 * label, 10 * number, 0))
                picture.save(place / "set" / part / name / f"{number}.jpg", quality=80)
    arguments = {"path": str(place / "set"), "image_size": 8, "num_workers": 0, "val_fraction": 0.3}
    run, _ = predicted(place / "run", ImageFolderStream, **arguments)
    main([str(run), "--rule=random", "--keep=0.5", "--output=out", "--images=pictures"])
    sources = sorted((place / "set" / "train").rglob("*.jpg"))
    written = {int(path.stem): path for path in Path("pictures").rglob("*.jpg")}
    assert sorted(written) == sorted(load_file("out/selection.safetensors")["index"].tolist())
    for number, path in written.items():
        assert path.read_bytes() == sources[number].read_bytes()
        assert path.parent.name == sources[number].parent.name
    with pytest.raises(UserError, match="--patches: pictures of a streamed folder are copied as they are"):
        main([str(run), "--rule=random", "--keep=0.5", "--output=other", "--images=others", *PATCHES])
    red = PictureFolders(run, place / "others").shown(torch.tensor([6, 0]))[:, 0].mean((1, 2))
    assert (red * 255).tolist() == pytest.approx([100, 0], abs=2)  # a dog, then a cat; JPEG rounds


def test_scores_are_drawn_as_the_rule_ranks_within_classes(place, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "render", lambda item, path, title: drawn.setdefault(path.name, item))
    values = {**features(), "embedding": features()["embedding"] + torch.arange(ITEMS)[:, None] % CLASSES}
    made = Features(values["label"], CLASSES, {"embedding": values["embedding"]})
    picks = Moderate().select(made, class_budget(made, 0.5), 0)
    DRAW(place / "media", made, picks, Moderate(), None, "moderate")
    torch.testing.assert_close(drawn["scores"].series["kept"].float().sort()[0], picks.score.sort()[0])


def test_a_montage_shows_the_chosen_pictures(place, monkeypatch):
    monkeypatch.setattr(selection, "_draw", DRAW)
    run, data = predicted(place / "run", ImageDataModule, **DIGITS)
    main([str(run), "--rule=random", "--keep=0.1", "--output=out", "--images=pictures"])
    assert Path("out/media/montage.png").is_file()
    items = torch.tensor([500, 3, 4])
    shown = PictureFolders(run, place / "others").shown(items)
    torch.testing.assert_close(shown, data.train_split.images[items] / 255)


PATCHES = ["--patches=patch=2", "--patches=patch_select=random"]


def test_patches_are_left_out_of_pictures_and_counted(place):
    run, data = predicted(place / "run", ImageDataModule, **DIGITS)
    words = [str(run), "--rule=random", "--keep=0.1", "--output=out", "--images=pictures", *PATCHES]
    main([*words, "--patches=drop_ratio=0.25"])
    for path in Path("pictures").rglob("*.png"):
        before = data.train_split.images[int((data.train_split.origin == int(path.stem)).nonzero()), 0]
        with Image.open(path) as picture:
            after = torch.from_numpy(np.array(picture))
        different = (before != after).view(4, 2, 4, 2).any(3).any(1)
        assert different.sum() <= 4
        assert after[before != after].unique().numel() <= 1
    written = record(Path("out"))
    assert written["patches"]["patch_select"] == "random"
    assert written["theta"] == 0.25
    assert written["rho"] == pytest.approx(written["rho_s"] * 0.75)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images=pictures", "--patches=drop=0.2"], "--patches .*drop"),
        (
            ["--images=pictures", "--patches=drop_ratio=1"],
            r"--patches drop_ratio: expected a number in \[0, 1\), got 1",
        ),
        (["--images=pictures", *PATCHES, "--patches=patch=3"], "patch: expected a side that divides 8 x 8 pixels"),
        (["--images=pictures", *PATCHES, "--patches=drop_ratio=0.99"], "drop_ratio: 0.99 of 16 patches keeps none"),
        (["--images=pictures", "--patches=patch=2"], "--patches: patch_select gradcam needs the weights"),
        (PATCHES, "--patches: goes with --images DIR"),
    ],
)
def test_patches_that_cannot_be_left_out_are_found_before_anything_is_selected(place, words, message):
    run, _ = predicted(place / "run", ImageDataModule, **DIGITS)
    with pytest.raises(UserError, match=message) as error:
        main([str(run), "--rule=random", "--keep=0.5", "--output=out", *words])
    assert "\n" not in str(error.value)
    assert not (place / "out").exists()
    assert not (place / "pictures").exists()


def test_class_names_that_are_no_folders_become_some():
    names = folder_names(["T-shirt/top", "..", "a/b", "a_b", "fine name", ""])
    assert names == ["T-shirt_top", "__1", "a_b_2", "a_b_3", "fine name", "__5"]


@pytest.mark.parametrize("case", ["taken", "a file of features", "other data", "no pictures"])
def test_pictures_that_cannot_be_written_are_found_before_anything_is_selected(place, case):
    run, _ = predicted(place / "run", ImageDataModule, **DIGITS)
    source = run
    if case == "taken":
        (place / "pictures" / "x").mkdir(parents=True)
    elif case == "a file of features":
        source = place / "features.safetensors"
        save_file(features(), source)
    elif case == "other data":
        named = {"class_path": "datamodules.ImageDataModule", "init_args": {**DIGITS, "val_fraction": 0.3}}
        (run / "config.yaml").write_text(json.dumps({"data": named}))
    else:
        named = {"class_path": "datamodules.GameDataModule", "init_args": {"game": "catch"}}
        (run / "config.yaml").write_text(json.dumps({"data": named}))
    with pytest.raises(UserError, match="--images: ") as error:
        main([str(source), "--rule=random", "--keep=0.5", "--output=out", "--images=pictures"])
    assert "\n" not in str(error.value)
    assert not (place / "out").exists()
    assert len(list(place.glob("pictures/*"))) == (case == "taken")


@pytest.mark.slow
def test_a_selection_is_an_artefact_made_of_its_features(run, place):
    done = started(place, "--wandb=offline", "--output=run/artifacts/chosen")
    assert done.wait(timeout=120) == 0, done.communicate()
    done.communicate()
    (file,) = run.glob("wandb/offline-*/*.wandb")
    found = read_wandb(file)
    assert found["used"][0] == "run-features"
    assert found["artifacts"] == ["run-chosen-selection"]
    told = record(run / "artifacts/chosen")
    for key in ("rule", "keep", "seed", "data", "weights", "features", "rho", "sha256"):
        assert found["config"][key] == told[key]


def test_wandb_is_left_alone_unless_asked(run):
    main([str(run), "--rule=random", "--keep=0.5"])
    assert not (run / "wandb").exists()
