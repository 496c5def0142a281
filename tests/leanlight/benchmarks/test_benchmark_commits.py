"""Two commits side by side: in turn, each by its own code, and the user's checkout as it was."""

import subprocess

import pytest

from leanlight.__main__ import main

# Stands in for the suite: figures of its own commit, whose `jitter` is so wide that nothing can be said of it.
SUITE = """
import json, os, pathlib, sys
words = sys.argv[1:]
assert words[:2] == ["benchmark", "classifier"], words
root = pathlib.Path(__file__).parents[1]
with open(os.environ["STAND_IN_LOG"], "a") as log:
    log.write(f"{STEP} {pathlib.Path.cwd()} {'--quick' in words}\\n")
taken = len(open(os.environ["STAND_IN_LOG"]).readlines())
figures = {
    "step": {"value": STEP + taken / 100, "low": STEP, "high": STEP + 1, "unit": "ms", "better": "lower", "n": 9},
    "jitter": {"value": taken * STEP, "low": 0, "high": 99, "unit": "ms", "better": "lower", "n": 9},
}
document = {"kind": "benchmark", "method": "classifier", "quick": False, "commit": COMMIT, "dirty": False,
            "machine": {}, "settings": {}, "figures": figures, "targets": [], "checks": {}, "missing": {}}
pathlib.Path(words[words.index("--output") + 1]).write_text(json.dumps(document))
"""
NO_BENCHMARK = "import sys\nsys.exit('leanlight: error: method \\'classifier\\': has no benchmark')\n"


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "a")
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of four commits: without a suite, slow, quick, without a benchmark."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    commit(folder, {"README.md": "nothing yet"})
    for step in (20, 10):
        main_file = f"STEP, COMMIT = {step}, 'c{step}'\n{SUITE}"
        commit(folder, {"leanlight/__init__.py": "", "leanlight/__main__.py": main_file})
        git(folder, "tag", {20: "slow", 10: "quick"}[step])
    commit(folder, {"leanlight/__main__.py": NO_BENCHMARK})
    (folder / "leanlight/__main__.py").write_text("not committed, and never measured")
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    monkeypatch.chdir(folder)
    return folder


def measured(checkout):
    log = checkout.parent / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_both_commits_are_measured_in_turn_by_their_own_code(checkout, capfd):
    assert main(["benchmark", "classifier", "--commits", "slow", "quick", "--rounds=2", "--quick"]) == 0
    assert measured(checkout) == [f"{step} {checkout} True" for step in (20, 10, 20, 10)]
    shown = capfd.readouterr().out
    (step,) = [line for line in shown.splitlines() if "│ step" in line]
    (jitter,) = [line for line in shown.splitlines() if "│ jitter" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in (step, jitter)]
    # Medians of two rounds: runs 1 and 3, and 2 and 4.
    assert cells[0] == ["step", "20.02", "20 to 21", "10.03", "10 to 11", "0.501", "ms", "better"]
    assert cells[1] == ["jitter", "40", "0 to 99", "30", "0 to 99", "0.750", "ms", "same"]
    assert "1 of 2 differences exceed the noise: step (better)" in shown


def test_the_user_s_checkout_is_left_as_it_was(checkout):
    before = git(checkout, "status", "--porcelain"), git(checkout, "worktree", "list")
    assert main(["benchmark", "classifier", "--commits", "slow", "HEAD"]) == 2
    assert (git(checkout, "status", "--porcelain"), git(checkout, "worktree", "list")) == before
    assert (checkout / "leanlight/__main__.py").read_text() == "not committed, and never measured"


@pytest.mark.parametrize(
    ("revisions", "message", "runs"),
    [
        (("slow", "main~3"), "main~3", 0),
        (("slow", "quik"), "'quik'", 0),
        (("slow", "main"), "main ({short}): method 'classifier': has no benchmark", 1),
    ],
)
def test_what_cannot_be_measured_is_one_line(revisions, message, runs, checkout, capfd):
    assert main(["benchmark", "classifier", "--commits", *revisions]) == 2
    error = capfd.readouterr().err
    assert error.startswith("leanlight: error: --commits: ")
    assert message.format(short=git(checkout, "rev-parse", "HEAD")[:8]) in error
    assert error.count("\n") == 1
    assert len(measured(checkout)) == runs


def test_outside_of_a_git_checkout_it_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(["benchmark", "classifier", "--commits", "HEAD", "HEAD"]) == 2
    error = capfd.readouterr().err
    assert "--commits: expected two commits of the git checkout" in error
    assert error.count("\n") == 1
