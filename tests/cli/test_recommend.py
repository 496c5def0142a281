"""`leanlight recommend` answers in original ids, for one session and for a file of many, and refuses in one line."""

import csv
import shutil

import pytest
import torch

import leanlight as suite
from leanlight.__main__ import main
from leanlight.contracts import Catalogue

QUICK = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 3, "trainer.limit_val_batches": 1}
SMALL = {f"data.init_args.planted.{name}": value for name, value in {"intents": 3, "train_sessions": 300}.items()}
SMALL |= {"model.init_args.intents.n": 3, "data.init_args.planted.test_sessions": 50}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on few items."""
    folder = tmp_path_factory.mktemp("run")
    root = {"trainer.default_root_dir": str(folder), "trainer.enable_progress_bar": False}
    trainer, model, data = suite.build("hid/planted_small", QUICK | SMALL | root)
    trainer.fit(model, data)
    return folder / trainer.default_root_dir


@pytest.fixture(scope="module")
def names(run):
    return Catalogue(**torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["catalogue"]).names


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_session_is_answered_in_a_table(run, names, capsys):
    assert main(["recommend", str(run), "--session", f"{names[0]}, {names[3]}", "-k", "4"]) == 0
    shown = capsys.readouterr().out
    (expected,) = suite.load(run).recommend([[names[0], names[3]]], 4)
    found = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit()]
    assert [line[1] for line in found] == [one.item for one in expected]
    assert [line[4] for line in found] == [one.intent for one in expected]
    assert [line[5] for line in found] == ["head" if one.head else "tail" for one in expected]


def test_a_file_of_ten_thousand_sessions_is_answered_as_one_by_one(run, names, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    sessions = {
        f"s{number}": [names[i] for i in torch.randint(0, len(names), (1 + number % 9,), generator=generator).tolist()]
        for number in range(10_000)
    }
    with open(tmp_path / "sessions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["time", "item", "session"])
        rows.writerows([0, item, session] for session, items in sessions.items() for item in items)
    output = tmp_path / "out" / "lists.csv"
    words = ["--input", str(tmp_path / "sessions.csv"), "--output", str(output), "-k", "3", "--exclude-seen"]
    assert main(["recommend", str(run), *words]) == 0
    assert "30,000 recommendations for 10,000 session(s)" in capsys.readouterr().out
    found = rows_of(output)
    assert [row["session"] for row in found] == [session for session in sessions for _ in range(3)]
    assert [row["rank"] for row in found[:6]] == ["1", "2", "3"] * 2
    assert not any(row["item"] in sessions[row["session"]] for row in found)
    model = suite.load(run)
    for number in (0, 17, 9_999):
        (expected,) = model.recommend([sessions[f"s{number}"]], 3, exclude_seen=True)
        assert [row["item"] for row in found[3 * number : 3 * number + 3]] == [one.item for one in expected]


def test_a_category_can_be_asked_for_and_written(run, names, tmp_path):
    output = tmp_path / "lists.csv"
    words = ["--session", names[0], "--category", "1.2", "-k", "5", "--output", str(output)]
    assert main(["recommend", str(run), *words]) == 0
    assert {row["category"] for row in rows_of(output)} == {"1.2"}
    assert all(row["item"].startswith("1.2.") for row in rows_of(output))


@pytest.fixture
def refuse(capsys):
    def check(arguments, *words):
        capsys.readouterr()
        assert main(["recommend", *map(str, arguments)]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line]
        for word in words:
            assert word in error, error

    return check


def test_what_it_cannot_answer_is_one_line(run, names, refuse, tmp_path):
    one = ["--session", names[0]]
    refuse([run, "--session", "9.9.9"], "session: item '9.9.9' is none of the")
    refuse([run, "--session", "1,,2"], "--session", "1,,2")
    refuse([run, *one, "-k", 100_000], "k: expected 1 to", "got 100000")
    refuse([run, *one, "--category", "1.22"], "category", "did you mean '1.2'")
    refuse([run, *one, "--input", "x.csv"], "not allowed with")
    refuse([run], "--session", "--input", "required")
    refuse([run / "nowhere", *one], "no checkpoint")
    refuse([run, "--input", "x.csv"], "--output")
    output = ["--output", tmp_path / "out.csv"]
    refuse([run, "--input", tmp_path / "x.csv", *output], "--input", "x.csv", "No such file")
    for text, *words in (
        ("user,item\n1,a\n", "lacks the column 'session'"),
        ("", "lacks the column 'session'"),
        ("session,item\n", "no session"),
        ("session,item\n1,\n", "line 2"),
        ("session,item\n1\n", "line 2"),
        ("session,item\n1,9.9.9\n", "item '9.9.9' is none of"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        refuse([run, "--input", tmp_path / "bad.csv", *output], *words)
    (tmp_path / "bad.csv").write_bytes(b"session,item\n1,\xff\xfe\n")
    refuse([run, "--input", tmp_path / "bad.csv", *output], "UTF-8")
    assert not (tmp_path / "out.csv").exists()
    (tmp_path / "file").touch()
    refuse([run, *one, "--output", tmp_path / "file" / "out.csv"], "--output", "cannot write")


def test_a_run_that_is_no_recommender_is_one_line(refuse, tmp_path):
    root = {"trainer.default_root_dir": str(tmp_path), "trainer.enable_progress_bar": False}
    trainer, model, data = suite.build("classifier/digits_small", QUICK | root)
    trainer.fit(model, data)
    refuse([trainer.default_root_dir, "--session", "1"], "source", "ImageClassifier", "recommends nothing")
    shutil.rmtree(trainer.default_root_dir)
