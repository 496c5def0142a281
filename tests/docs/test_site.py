"""The documentation site: what code writes into it is complete, it builds without a warning and fetches nothing."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from leanlight.benchmarks.overview import performance_page, read_rows
from leanlight.glossary import glossary, meaning
from leanlight.registry import METHODS, commands
from scripts import docs_pages

ROOT = Path(__file__).parents[2]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


def pages(nav):
    """Paths in a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]


# ---- metrics ----


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/tables/*.yaml")), ids=lambda path: path.stem)
def test_every_metric_of_a_table_is_explained(path):
    names = yaml.safe_load(path.read_text())["metrics"]
    logged = [re.sub(r"^stages/\w+/", "", name) for name in names]
    logged = [name for name in logged if not name.startswith("summary/") and "/" in name]
    assert [name for name in logged if not meaning(name)] == []


def test_a_name_that_nobody_logs_is_not_explained():
    for name in ("test/accuraccy", "test/gaussian_6", "val/hr_x", "accuracy", "test/loss/more"):
        assert not meaning(name)


def test_every_metric_has_a_unit_a_meaning_and_one_place():
    groups = glossary()["groups"].values()
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    for group in groups:
        for name, (unit, what) in group.items():
            assert unit, name
            assert what, name
    used = set(re.findall(r"<(\w+)>", " ".join(names)))
    assert used == set(glossary()["places"])


# ---- methods, commands, packages ----


def test_the_list_of_methods_is_the_registry():
    rows = re.findall(r"^\| \[`(\w+)`\]", docs_pages.methods_table(), re.MULTILINE)
    assert rows == list(METHODS)


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)
def test_a_method_s_page_names_every_config_with_a_header_results_and_citation(info):
    text = docs_pages.method_page(info)
    for name in (*info.configs, *info.pipelines, *info.tables):
        (what,) = re.findall(rf"^\| `{name}` \| (.*) \|$", text, re.MULTILINE)
        assert what.strip(), f"{name}: a comment at its head says what it is"
    for path in re.findall(r"\]\(\.\./(results/[^)]+)\)", text):
        assert (ROOT / "docs" / path).is_file(), path
    assert info.citation is None or info.citation.bibtex in text


def test_every_command_is_listed():
    assert re.findall(r"^\| `leanlight ([\w-]+)`", docs_pages.commands_table(), re.MULTILINE) == list(commands())


def test_the_reference_names_what_python_finds():
    for package, names in docs_pages.packages().items():
        if package in ("leanlight.ops", "leanlight.flower"):  # a list of modules; Flower has an environment of its own
            continue
        for name in names:
            assert hasattr(import_module(package), name.rpartition(".")[2]), name


def test_every_page_is_in_the_navigation():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {*pages(NAV)}


# ---- performance ----


def documents(name):
    """Measured files of that name, by method."""
    return {path.parent.name: json.loads(path.read_text()) for path in (ROOT / "docs/results").glob(f"*/{name}.json")}


def test_the_table_of_performance_has_every_measurement_and_the_verdict_of_every_target():
    rows = {
        re.match(r"\| \[[^\]]+\]\(results/(\w+/\w+)\.md\)", line)[1]: line
        for line in docs_pages.performance().splitlines()[2:]
    }
    assert rows.keys() == {f"{method}/{name}" for name in ("benchmark", "gpu") for method in documents(name)}
    for method, document in documents("benchmark").items():
        line, targets = rows[f"{method}/benchmark"], document["targets"]
        assert f"| {sum(target['met'] for target in targets)} of {len(targets)} |" in line
        for target in targets:
            (value, verdict) = re.search(rf"`{target['figure']}` (-?[\d.,]+).*?\), (met|\*\*missed\*\*)", line).groups()
            measured = document["figures"][target["figure"]]["value"]
            assert float(value.replace(",", "")) == pytest.approx(measured, rel=1e-3)
            assert (verdict == "met") == target["met"], target
        assert document["date"][:10] in line
        assert document["machine"]["cpu"] in line


def test_every_benchmark_has_a_step_and_a_section_that_says_where_its_time_goes():
    sections = (ROOT / "docs/performance.md").read_text().split("\n## ")
    steps = {row.method for row in read_rows(ROOT / "docs/results") if row.page == "benchmark.md" and row.steps}
    assert steps == documents("benchmark").keys()
    for method, document in documents("benchmark").items():
        (section,) = [part for part in sections if part.startswith(f"{method}\n")]
        assert docs_pages.MARKER.findall(section) == [f"time_{method}"]
        made = docs_pages.PIECES[f"time_{method}"]()
        shown = re.findall(r"^\| `([^`]+)` \| (-?[\d.,]+) \|", made, re.MULTILINE)
        assert len(shown) > 3, method
        for name, value in shown:
            measured = document["figures"][name]["value"]
            assert float(value.replace(",", "")) == pytest.approx(measured, rel=1e-3), name
        missed = [target for target in document["targets"] if not target["met"]]
        assert made.count("**missed**") == len(missed)


def test_the_published_page_of_performance_is_that_of_the_measured_files():
    page = (ROOT / "docs/results/performance.md").read_text()
    assert page == performance_page(ROOT / "docs/results"), "leanlight report --all --readme writes it anew"


def test_every_place_for_code_is_known():
    for path in (ROOT / "docs").rglob("*.md"):
        assert {*docs_pages.MARKER.findall(path.read_text())} <= docs_pages.PIECES.keys(), path


# ---- the site itself ----


class Addresses(HTMLParser):
    """What a page fetches by itself: scripts, styles, pictures, frames; not where its links lead."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        fetched = values.get("href") if tag == "link" else values.get("src")
        self.found += [fetched] if fetched else []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        outside = [address for address in Addresses(page.read_text()).found if re.match(r"(\w+:)?//", address)]
        assert outside == [], page
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style
    written = (tmp_path / "site/methods/hid.html").read_text()
    assert METHODS["hid"].citation.title in written
    assert "SessionRecommender" in (tmp_path / "site/reference/lit_modules.hid.html").read_text()
