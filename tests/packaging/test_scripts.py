"""Launch scripts, with the programs they start replaced by ones that write down how they were called."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path):
    """Run a script in `tmp_path` with stand-ins (name → shell lines); returns the process and the recorded calls."""

    def call(path, *arguments, stands_in, env=None):
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        for name, lines in stands_in.items():
            record = f'echo "{name} $*" >> "{tmp_path}/calls"'
            (programs / name).write_text(f"#!/bin/bash\n{record}\n{lines}\n")
            (programs / name).chmod(0o755)
        done = subprocess.run(
            ["bash", str(ROOT / path), *arguments],
            cwd=tmp_path,
            env={"PATH": f"{programs}:{os.environ['PATH']}", **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


@pytest.mark.parametrize(
    ("summary", "code"),
    [("12 passed, 3 skipped in 1s", 0), ("3 skipped in 1s", 1), ("10 deselected in 1s", 1), ("0 passed in 1s", 1)],
)
def test_ci_fails_when_no_test_passed(script, summary, code):
    done, calls = script(".ci/run", stands_in={"make": f'[ "$1" = lint ] || echo "{summary}"'})
    assert (done.returncode, calls) == (code, ["make lint", "make test"])
    assert summary in done.stdout


def test_ci_fails_when_tests_fail(script):
    done, _ = script(".ci/run", stands_in={"make": 'if [ "$1" = test ]; then echo "1 failed, 5 passed"; exit 1; fi'})
    assert done.returncode != 0


JOB = {"SLURM_JOB_ID": "7", "RUNS": "runs"}


def test_a_slurm_job_starts_a_run_named_after_itself(script):
    done, (call,) = script("scripts/slurm.sbatch", "--config", "a/b", stands_in={"srun": ""}, env=JOB)
    assert done.returncode == 0, done.stderr
    assert "leanlight fit --config a/b --config trainer/slurm" in call
    assert "--run.id=slurm-7" in call


def test_the_line_of_the_readme_starts_a_job_whose_command_parses(script, tmp_path, monkeypatch):
    (line,) = re.findall(r"^sbatch .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "line.sh").write_text(line)
    # As sbatch does: its own options come first, then the script with its arguments.
    sbatch = 'while [[ "$1" == --* ]]; do shift; done; bash "$@"'
    done, (_, call) = script(tmp_path / "line.sh", stands_in={"sbatch": sbatch, "srun": ""}, env=JOB)
    assert done.returncode == 0, done.stderr
    command = call.partition(" leanlight ")[2].split()
    assert command[:3] == ["fit", "--config", "classifier/cifar10"]
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    from leanlight.experiment import resolve

    resolved = resolve("fit", command[1:])
    assert (resolved["run"]["id"], resolved["trainer"]["num_nodes"]) == ("slurm-7", 2)


def test_a_requeued_slurm_job_goes_on_in_its_folder(script, tmp_path):
    folder = tmp_path / "runs/m/d/slurm-7/checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").touch()
    _, (call,) = script("scripts/slurm.sbatch", "--config", "a/b", stands_in={"srun": ""}, env=JOB)
    assert call.endswith("leanlight fit --resume runs/m/d/slurm-7")


def test_a_slurm_job_that_never_saved_starts_anew_and_keeps_what_it_wrote(script, tmp_path):
    (tmp_path / "runs/m/d/slurm-7").mkdir(parents=True)
    (tmp_path / "runs/m/d/slurm-7/metrics.csv").write_text("old")
    done, (call,) = script("scripts/slurm.sbatch", "--config", "a/b", stands_in={"srun": ""}, env=JOB)
    assert done.returncode == 0, done.stderr
    assert "--run.id=slurm-7" in call
    assert [path.read_text() for path in tmp_path.glob("runs/m/d/slurm-7-*/metrics.csv")] == ["old"]


def test_a_slurm_job_requeues_itself_when_its_time_is_nearly_over(script):
    stands_in = {"srun": "kill -USR1 $PPID; sleep 0.2", "scontrol": ""}
    _, calls = script("scripts/slurm.sbatch", "--config", "a/b", stands_in=stands_in, env=JOB)
    assert calls[-1] == "scontrol requeue 7"


def test_a_failed_training_fails_the_slurm_job(script):
    done, _ = script("scripts/slurm.sbatch", "--config", "a/b", stands_in={"srun": "exit 3"}, env=JOB)
    assert done.returncode == 3


def test_torchrun_starts_as_many_processes_as_the_trainer_expects(script):
    env = {"PROCESSES": "2", "ACCELERATOR": "cpu"}
    _, (call,) = script("scripts/torchrun.sh", "--config", "a/b", stands_in={"torchrun": ""}, env=env)
    assert "--standalone --nproc-per-node 2 -m leanlight fit --config a/b --config trainer/ddp" in call
    assert call.endswith("--trainer.accelerator=cpu --trainer.devices=2 --trainer.num_nodes=1")


def test_torchrun_on_several_nodes_asks_for_the_first_one(script):
    env = {"PROCESSES": "1", "NODES": "2", "NODE_RANK": "1"}
    done, calls = script("scripts/torchrun.sh", stands_in={"torchrun": ""}, env=env)
    assert "MASTER" in done.stderr
    assert not calls
