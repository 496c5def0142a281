"""Where Python looks for modules."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def order_path() -> None:
    """Import a user's own module from the working directory, but let no folder there hide a package of the suite.

    In a checkout all packages come from that one, also where another is installed: a run is of one state of the code,
    which its hash can tell.
    """
    here, home = os.getcwd(), Path(__file__).resolve().parents[1]
    first = [str(home)] if (home / "pyproject.toml").is_file() else []
    sys.path[:] = [*first, *(entry for entry in sys.path if entry not in ("", here, *first)), here]
