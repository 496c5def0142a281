"""Stands in for `python -m leanlight run`: the real runner, whose stages are stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import fake_resolve

train = ModuleType("leanlight.experiment")
train.resolve = fake_resolve.resolve  # type: ignore[attr-defined]
sys.modules["leanlight.experiment"] = train

from leanlight.cli.run import main  # noqa: E402
from leanlight.results import pipeline  # noqa: E402

fake = str(Path(__file__).with_name("fake_leanlight.py"))
pipeline.command = lambda *arguments: [sys.executable, fake, *arguments]  # type: ignore[assignment]
sys.exit(main(sys.argv[2:]))
