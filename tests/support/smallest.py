"""The smallest run of a method, with what earlier stages of a pipeline make for it."""

import os
from functools import cache
from pathlib import Path

from leanlight.invocation import option
from leanlight.registry import METHODS
from leanlight.results.pipeline import smallest_overrides

#: Set by ``conftest.py``: a folder that all processes of a test session share.
FOLDER = "LEANLIGHT_TEST_INPUTS"


@cache
def overrides(method: str) -> dict:
    """Keys and values beside the config; made once a session, by the process that asks first."""
    return smallest_overrides(METHODS[method], Path(os.environ[FOLDER]))


def words(method: str) -> list[str]:
    """The config and what it needs, as words of a command line."""
    return ["--config", METHODS[method].smallest, *(option(*pair) for pair in overrides(method).items())]
