"""Stands in for `leanlight sweep`: the real sweep, whose trials are stand-ins that take milliseconds.

Options of the fake model: val/accuracy is `value` at the first epoch and grows by 0.01 an epoch; `epochs` of them, each
of `wait` seconds; `fail` ends with exit code 1 in the first attempt, `diverge` as a run that diverged. A resumed trial
goes on behind its rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from fake_resolve import options

from leanlight.contracts.errors import UserError
from leanlight.runs import code_version, config_hash

CODE = ["leanlight/contracts/errors.py"]


def resolve(subcommand: str, words: list[str]) -> dict[str, Any]:
    found = options(words)
    if "unknown" in found or found.get("value") == "wrong":
        raise UserError(f"{'unknown' if 'unknown' in found else 'value'}: not what the model takes")
    model = {"class_path": "lit_modules.fake.Fake", **{k: v for k, v in found.items() if "." not in k}}
    run = {"wandb": found.get("run.wandb", "auto"), "inputs": None, "method": None, "dataset": "made"}
    return {"model": model, "data": {"class_path": "Made"}, "run": run}


def trial(words: list[str]) -> int:
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps(words) + "\n")
    given = options(words)
    if "resume" in given:
        folder = Path(given["resume"])
        given = options(words := json.loads((folder / "words.json").read_text()))
        again = True
    else:
        folder = Path(given["trainer.default_root_dir"]) / "fake" / "made" / given["run.id"]
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "words.json").write_text(json.dumps(words))
        (folder / "metrics.csv").write_text("epoch,val/accuracy,val/loss\n")
        (folder / "checkpoints" / "last.ckpt").touch()
        again = False
    asked = [word for word in words if not word.startswith(("--run.id", "--trainer.default_root_dir"))]
    summary = {"command": ["fit"], "code_files": CODE, "code_hash": code_version(CODE)[0], "wall_s": 1.0, "metrics": {}}
    summary |= {"config_hash": config_hash(resolve("fit", asked)), "metrics": {"val/accuracy": 0, "val/loss": 0}}

    def end(status: str, code: int, error: str | None = None) -> int:
        (folder / "summary.json").write_text(json.dumps({**summary, "status": status, "error": error}))
        return code

    end("running", 0)
    try:
        with open(folder / "metrics.csv", "a") as file:
            for epoch in range((folder / "metrics.csv").read_text().count("\n") - 1, int(given.get("epochs", 1))):
                value = float(given["value"]) + 0.01 * epoch
                file.write(f"{epoch},{value},{1 - value}\n")
                file.flush()
                time.sleep(float(given.get("wait", 0)))
    except KeyboardInterrupt:
        return end("interrupted", 130)
    if given.get("diverge") == given["value"]:
        return end("diverged", 2, "loss is NaN in step 3")
    if given.get("fail") == given["value"] and not again:
        print("boom: the reason")
        return end("failed", 1)
    return end("finished", 0)


def stand_in(set_attribute: Any) -> None:
    """Let trials of this process be stand-ins."""
    from leanlight.results import sweep

    set_attribute(sweep, "resolve", resolve)
    set_attribute(sweep, "command", lambda *words: [sys.executable, __file__, *words])


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        sys.exit(trial(sys.argv[2:]))
    experiment = ModuleType("leanlight.experiment")  # without Lightning, whose import takes longer than all trials
    experiment.resolve = resolve  # type: ignore[attr-defined]
    experiment.method_of = lambda path: "fake"  # type: ignore[attr-defined]
    experiment.dataset_of = lambda data: "made"  # type: ignore[attr-defined]
    sys.modules["leanlight.experiment"] = experiment
    stand_in(setattr)
    from leanlight.__main__ import main

    sys.exit(main(sys.argv[1:]))
