"""Tutorials work as written: commands and Python run in order, from an empty folder, and draw the pictures shown."""

import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from run_page import ROOT, run_page

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
#: Where `make tutorials` wants the pictures, for the documentation site; empty: nowhere.
PICTURES = os.environ.get("LEANLIGHT_TUTORIAL_PICTURES", "")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_draws_its_pictures(page, tmp_path):
    work, ran = run_page(page, tmp_path, languages=("bash", "python"), timeout=900)
    assert ran >= 3
    shown = {Path(name) for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())}
    assert shown
    for picture in shown:
        with Image.open(work / picture) as drawn:
            assert min(drawn.size) >= 50, picture
        if PICTURES:
            (Path(PICTURES) / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(work / picture, Path(PICTURES) / picture)


def test_every_tutorial_is_short_and_on_the_list():
    listed = re.findall(r"\]\(tutorials/(\w+)\.md\)", (ROOT / "docs" / "tutorials.md").read_text())
    assert sorted(listed) == [page.stem for page in TUTORIALS]
    assert all(len(page.read_text().splitlines()) < 80 for page in TUTORIALS)
