"""A page in headless Chromium, and what a script beside it finds there."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def said_by_browser(driver: str, width: int = 1000) -> Any:
    """What `driver` writes as JSON into its ``<pre id="said">``; the test is skipped where there is no Chromium.

    The working folder is served, since a page may look into a frame of its own origin alone.

    Args:
        driver: HTML; its frames get the width.
        width: in pixels.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; the other tests read the pages with a parser")
    Path("driver.html").write_text(driver.replace("<iframe", f'<iframe style="width: {width}px; height: 900px"'))
    quiet = ["--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-dev-shm-usage"]
    profile = f"--user-data-dir={Path('profile').resolve()}"
    command = [browser, "--headless", "--no-sandbox", *quiet, profile, "--virtual-time-budget=20000", "--dump-dom"]
    handler = functools.partial(_Silent, directory=os.getcwd())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{listening.server_port}/driver.html"],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "NO_PROXY": "*"},
        )
        listening.shutdown()
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    return json.loads(found[1])
