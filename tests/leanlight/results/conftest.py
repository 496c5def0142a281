"""A stand-in for training: a process that writes a run folder as `leanlight fit` does, in milliseconds."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from leanlight.cli.reproduce import main
from leanlight.results import pipeline, table
from leanlight.runs import code_version

SUPPORT = Path(__file__).parents[2] / "support"


class FakeSuite:
    """Configs, tables and pipelines in a folder, and a `leanlight` that only writes summaries."""

    def __init__(self, folder: Path, template: Path | None = None) -> None:
        self.template = template
        self.folder, self.runs_root, self.log = folder, folder / "runs", folder / "commands.jsonl"
        for name in ("a", "b", "c"):
            (folder / f"{name}.yaml").write_text(f"model: {{name: {name}}}\n")

    def write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def table(self, **changes: Any) -> Path:
        """A table of two rows, two metrics, three seeds and one claim, with `changes`."""
        content = {
            "method": "classifier",
            "dataset": "digits",
            "scale": "small",
            "title": "Two rows",
            "seeds": [0, 1, 2],
            "metrics": {
                "test/accuracy": {
                    "label": "Accuracy",
                    "higher_is_better": True,
                    "unit": "%",
                    "scale": 100,
                    "digits": 1,
                },
                "test/energy_pj": {"label": "Energy", "higher_is_better": False, "unit": "pJ", "optional": True},
            },
            "rows": [
                {"name": "good", "config": "a.yaml", "overrides": {"value": 0.8, "slope": 2}},
                {"name": "bad", "config": "b.yaml", "overrides": {"value": 0.6}},
            ],
            "claims": [
                {
                    "id": "better",
                    "text": "good beats bad",
                    "scope": "reduced",
                    "expr": "good['test/accuracy'] - bad['test/accuracy']",
                    "margin": 0.1,
                }
            ],
        }
        return self.write("two.yaml", {**content, **changes})

    def reproduced(self) -> Path:
        """The same table after `leanlight reproduce`: all six runs finished, results written."""
        assert self.template is not None
        shutil.copytree(self.template, self.folder, dirs_exist_ok=True)
        return self.folder / "two.yaml"

    def commands(self) -> list[dict[str, Any]]:
        """What was started so far: argv and environment."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []


@contextmanager
def _stand_ins(folder: Path, template: Path | None = None) -> Iterator[FakeSuite]:
    """Work in `folder` with stand-ins for everything that trains."""
    made = FakeSuite(folder, template)
    train = ModuleType("leanlight.experiment")
    train.resolve = runpy.run_path(str(SUPPORT / "fake_resolve.py"))["resolve"]  # type: ignore[attr-defined]

    def command(*arguments: str) -> list[str]:
        program = "fake_run.py" if arguments[0] == "run" else "fake_leanlight.py"
        return [sys.executable, str(SUPPORT / program), *arguments]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "leanlight.experiment", train)
        patch.setenv("FAKE_CODE_HASH", code_version(["leanlight/contracts/errors.py"])[0])
        patch.setenv("FAKE_LOG", str(made.log))
        patch.chdir(folder)
        patch.setattr(table, "command", command)
        patch.setattr(pipeline, "command", command)
        yield made


@pytest.fixture(scope="session")
def reproduced_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduced")
    with _stand_ins(folder) as made:
        assert main([str(made.table()), "--jobs", "2"]) == 0
    return folder


@pytest.fixture
def suite(tmp_path: Path, reproduced_once: Path) -> Iterator[FakeSuite]:
    with _stand_ins(tmp_path, reproduced_once) as made:
        yield made


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """Change keys of a summary.json."""

    def change(run_dir: Path, **changes: Any) -> None:
        path = run_dir / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change
