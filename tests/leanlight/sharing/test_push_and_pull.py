"""What is pushed to a hub comes back as it was, with a card that the hub's own library reads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, hub_server, sha

from leanlight.__main__ import main
from leanlight.contracts import BANK_RECORD

library = pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[3]
PLAIN = ["--trainer.accelerator=cpu", "--run.wandb=disabled", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--trainer.max_epochs=1", f"--trainer.default_root_dir={root}", "--run.id=a"]
    assert main(["fit", "--config", "classifier/digits_small", *PLAIN, *words]) == 0
    return root / "classifier" / "digits" / "a"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "runs" / "classifier" / "digits" / "a")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback, which this process takes for the only one, with a token for it."""
    constants = library.constants
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def files(folder):
    """Name → content of what a folder holds, but for what the hub's library notes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def error(capsys):
    """The one line of an error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- there and back ----


def test_what_is_pushed_is_pulled_byte_for_byte(run, tmp_path):
    """Processes of their own, with the settings that the hub's library documents."""
    with hub_server() as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        told = []
        for words in (["push", run, "me/digits"], ["pull", "me/digits", "--output", "back"]):
            command = [sys.executable, "-m", "leanlight", *map(str, words)]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr[-2000:]
            told.append(done.stdout.strip())
        assert told == [f"{hub.url}/me/digits", str(tmp_path / "back")]
        assert files(tmp_path / "back") == files(run / "artifacts" / "export")
        assert {"README.md", "network.pt2", "weights.safetensors", "card.json"} <= files(tmp_path / "back").keys()
        assert len(hub.large) == 2  # network and weights went the way of large files


def test_a_run_that_was_never_exported_is_exported_first(run, hub, capsys):
    shutil.rmtree(run / "artifacts" / "export")
    assert main(["push", str(run), "me/digits", "--private", "--message", "first of all"]) == 0
    (before, pushed) = hub.repos["model", "me/digits"]
    assert before == {}
    assert pushed == files(run / "artifacts" / "export")
    assert hub.made["model", "me/digits"]["visibility"] == "private"
    assert hub.messages == ["first of all"]


def test_a_card_that_people_have_edited_is_pushed_as_it_is_until_the_export_is_newer(run, hub):
    card = run / "artifacts" / "export" / "README.md"
    assert main(["push", str(run), "me/digits"]) == 0
    edited = card.read_text() + "\nMore words.\n"
    card.write_text(edited)
    assert main(["push", str(run), "me/digits"]) == 0
    assert hub.repos["model", "me/digits"][-1]["README.md"] == edited.encode()
    weights = run / "artifacts" / "export" / "weights.safetensors"
    os.utime(weights, ns=(1, card.stat().st_mtime_ns + 1))
    assert main(["push", str(run), "me/digits"]) == 0
    assert b"More words" not in hub.repos["model", "me/digits"][-1]["README.md"]


def test_an_older_commit_is_pulled_by_its_name(run, hub, tmp_path, capsys):
    export = run / "artifacts" / "export"
    assert main(["push", str(run), "me/digits"]) == 0
    first = files(export)
    (export / "card.json").write_text("{}")
    assert main(["push", str(run), "me/digits"]) == 0
    capsys.readouterr()
    for revision, expected in ((sha(first), first), ("main", files(export))):
        assert main(["pull", "me/digits", "--revision", revision]) == 0
        assert files(Path(capsys.readouterr().out.strip())) == expected
    assert first != files(export)


def test_a_set_goes_into_a_repository_of_data_without_its_drawings(run, hub, tmp_path, capsys):
    chosen = run / "artifacts" / "selection" / "random_0.1_s0"
    (chosen / "media").mkdir(parents=True)
    for name in ("selection.json", "selection.csv", "media/chosen.png", ".parts"):
        (chosen / name).write_text("{}")
    assert main(["push", str(chosen), "me/kept"]) == 0
    ((kind, _),) = hub.repos
    assert kind == "dataset"
    assert capsys.readouterr().out.split() == [f"{hub.url}/datasets/me/kept"]
    assert hub.repos["dataset", "me/kept"][-1].keys() == {"README.md", "selection.json", "selection.csv"}
    assert main(["pull", "me/kept", "--output", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == hub.repos["dataset", "me/kept"][-1]
    library.DatasetCard.load(tmp_path / "back" / "README.md")


def test_files_that_could_run_something_are_neither_pushed_nor_pulled(run, hub, tmp_path):
    assert main(["push", str(run), "me/digits"]) == 0
    harmless = hub.repos["model", "me/digits"][-1]
    hub.put("model", "me/more", {**harmless, "weights.bin": b"x", "deep/model.pt": b"x", "code.py": b"x"})
    assert main(["pull", "me/more", "--output", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == harmless
    (run / "artifacts" / "export" / "notes.pkl").write_bytes(b"x")
    assert main(["push", str(run), "me/again"]) == 0
    assert hub.repos["model", "me/again"][-1].keys() == harmless.keys()


# ---- what is refused ----


def test_a_repository_of_something_else_is_refused_before_it_is_fetched(hub, tmp_path, capsys):
    large = {"big.safetensors": b"0" * 100}
    hub.put("model", "me/bare", large)
    hub.put("model", "me/other", {**large, "README.md": b"---\ntags: [bert]\n---\nwords\n"})
    hub.put("dataset", "me/words", {**large, "README.md": b"no front matter"})
    for name in ("me/bare", "me/other", "me/words"):
        assert main(["pull", name, "--output", str(tmp_path / "back")]) == 2
        assert "no export of Leanlight" in error(capsys)
    assert not [path for path in hub.asked if path.endswith("big.safetensors")]
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pull", "me/nothing"], "has no me/nothing"),
        (["pull", "me/nothing", "--type=dataset"], "has no me/nothing"),
        (["pull", "me"], "USER/NAME"),
        (["pull", "me/../x"], "USER/NAME"),
        (["push", "RUN", "datasets/me/x"], "USER/NAME"),
        (["push", "RUN", "others/x"], "403"),
        (["push", "RUN", "me/x", "--message= "], "--message"),
        (["push", "nowhere", "me/x"], "nowhere"),
        (["push", "RUN/config.yaml", "me/x"], "config.yaml"),
    ],
)
def test_what_cannot_be_is_one_line(words, told, run, hub, capsys):
    assert main([word.replace("RUN", str(run)) for word in words]) == 2
    assert told in error(capsys)
    assert not hub.repos


def test_a_revision_that_is_not_there_is_one_line(run, hub, capsys):
    assert main(["push", str(run), "me/digits"]) == 0
    assert main(["pull", "me/digits", "--revision", "v7"]) == 2
    assert "--revision" in error(capsys)


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "diverged"])
def test_an_unfinished_run_is_not_pushed(status, run, hub, capsys):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "status": status}))
    assert main(["push", str(run), "me/digits"]) == 2
    assert f"has not finished (it is {status})" in error(capsys)
    assert not hub.repos


def test_a_missing_or_wrong_token_is_one_line(run, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(run), "me/digits"]) == 2
    assert "hf auth login" in error(capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(library.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["push", str(run), "me/digits"]) == 2
    assert "no token" in error(capsys)


@pytest.mark.parametrize("words", [["push", "RUN", "me/digits"], ["pull", "me/digits"]])
def test_a_hub_that_is_gone_is_one_line(words, run, hub, capsys, monkeypatch):
    monkeypatch.setattr(library.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main([word.replace("RUN", str(run)) for word in words]) == 2
    assert "http://127.0.0.1:9 cannot be reached" in error(capsys)


def test_without_the_library_the_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["pull", "me/digits"]) == 2
    assert "leanlight[hub]" in error(capsys)


# ---- the card ----


def test_the_card_says_what_the_hub_reads_and_what_the_run_measured(run, capsys):
    assert main(["export", str(run)]) == 0
    path = run / "artifacts" / "export" / "README.md"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    card = library.ModelCard.load(path)
    summary = json.loads((run / "summary.json").read_text())
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["digits"]
    assert card.data.tags == ["leanlight", "pytorch", "classifier"]
    measured = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in measured.items()} == {
        name: value for name, value in summary["metrics"].items() if name.startswith("test/")
    }
    accuracy = measured["test/accuracy"]
    assert (accuracy.dataset_type, accuracy.dataset_split, accuracy.task_type) == (
        "digits",
        "test",
        "image-classification",
    )
    assert accuracy.metric_args == {"seed": 0, "processor": summary["machine"]["cpu"]}
    shown = f"| test/accuracy | {summary['metrics']['test/accuracy'] * 100:.1f} | % |"
    assert shown in card.text
    assert summary["data"]["fingerprint"] in card.text


def test_weights_that_were_not_tested_have_no_figures(run):
    from leanlight.sharing.card import Origin, write_card

    write_card(run / "artifacts" / "export", Origin.of(run))  # of the last weights, which were
    assert main(["export", str(run), "--checkpoint", "best"]) == 0
    card = library.ModelCard.load(run / "artifacts" / "export" / "README.md")
    assert card.data.eval_results is None
    assert "Nothing was measured on test data" in card.text


def test_a_card_changes_nothing_for_stages_that_read_the_run(run):
    from leanlight.runs import content_digest

    before = content_digest(run), content_digest(run / "artifacts" / "export")
    from leanlight.sharing.card import Origin, write_card

    write_card(run / "artifacts" / "export", Origin.of(run))
    assert (content_digest(run), content_digest(run / "artifacts" / "export")) == before


def test_a_method_s_own_card_keeps_its_words_and_gains_what_it_lacks(run):
    from leanlight.sharing.card import Origin, write_card

    path = run / "artifacts" / "export" / "README.md"
    own = '---\nbase_model: "a/b"\ntags: [safety]\n---\n\n# A judge\n\nIts own words.\n'
    path.write_text(own)
    for _ in range(2):  # a second writing changes nothing
        write_card(path.parent, Origin.of(run))
        card = library.ModelCard.load(path)
        assert card.data.base_model == "a/b"
        assert card.data.license == "other"  # that of the base holds, too
        assert {"leanlight", "safety"} <= set(card.data.tags)
        assert card.text.count("Its own words.") == card.text.count("## Figures") == 1
        assert card.text.strip().startswith("# A judge")


def test_words_of_the_user_in_the_way_are_kept(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("My project.")
    assert main(["export", str(run), "--output", str(tmp_path / "mine")]) == 2
    assert "README.md" in error(capsys)
    assert files(tmp_path / "mine") == {"README.md": b"My project."}


@pytest.mark.parametrize(
    ("dataset", "licence"),
    [
        ("fashion_mnist", {"license": "mit"}),
        ("mnist", {"license": "cc-by-sa-3.0"}),
        ("cifar10", {"license": "unknown"}),
        ("image_folder", {"license": "unknown"}),
        ("svhn", {"license": "other", "license_name": "non-commercial-use"}),
    ],
)
def test_the_licence_is_that_of_the_data_in_the_hub_s_words(dataset, licence, tmp_path):
    from leanlight.sharing.card import Origin, write_card

    data = {"class_path": "datamodules.ImageDataModule", "init_args": {"dataset": dataset}}
    text = write_card(tmp_path, Origin(config={"data": data})).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert {key: value for key, value in front.items() if key.startswith("license")} == licence


def test_a_run_that_began_with_other_weights_has_no_licence_of_the_data_alone(tmp_path):
    from leanlight.sharing.card import Origin, write_card

    data = {"class_path": "datamodules.ImageDataModule", "init_args": {"dataset": "digits"}}
    for network, licence in (({"pretrained": False}, "cc-by-4.0"), ({"pretrained": True}, "unknown")):
        model = {"init_args": {"networks": [{"init_args": network}]}}
        text = write_card(tmp_path, Origin(config={"data": data, "model": model})).read_text()
        assert yaml.safe_load(text.split("---")[1])["license"] == licence


@pytest.mark.parametrize(
    "mark", [BANK_RECORD, "selection.json", "distilled.safetensors", "replica_0/distilled.safetensors"]
)
def test_sets_are_data_and_not_models(mark, tmp_path):
    from safetensors.numpy import save_file

    from leanlight.sharing.card import Origin, write_card
    from leanlight.sharing.kinds import kind_of

    (tmp_path / mark).parent.mkdir(exist_ok=True)
    if mark.endswith(".json"):
        (tmp_path / mark).write_text("{}")
    else:
        save_file({}, tmp_path / mark)
    assert kind_of(tmp_path).repo_type == "dataset"
    card = library.DatasetCard.load(write_card(tmp_path, Origin()))
    assert "library_name" not in card.data.to_dict()
    assert "--type dataset" in card.text
