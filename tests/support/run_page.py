"""Run what a Markdown page shows, in one folder: files are written, commands and Python blocks run, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_page(page, folder, languages=("bash",), timeout=280):
    """Run the page's blocks of `languages` in ``folder/work``; return that folder and how many blocks ran.

    ``leanlight`` and ``python`` are those of the tests, whatever is installed.
    """
    bin_dir, work = folder / "bin", folder / "work"
    for made in (bin_dir, work):
        made.mkdir()
    (bin_dir / "leanlight").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m leanlight "$@"\n')
    (bin_dir / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for script in bin_dir.iterdir():
        script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{work}"}
    commands = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    ran = 0
    for language, name, text in BLOCK.findall(page.read_text()):
        if name:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
        elif language in languages:
            done = subprocess.run(
                [*commands[language], text], cwd=work, env=environment, capture_output=True, text=True, timeout=timeout
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
            ran += 1
    return work, ran
