"""What the documentation site says of the code: hooks of mkdocs, which fill pages from registry, configs and results.

A page in docs/ holds ``<!-- made: NAME -->`` where a function of `PIECES` writes. Pages of methods get their configs,
results and citation; the Python reference has a page for every package with a list of public names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from leanlight.benchmarks.core import read as read_benchmark
from leanlight.benchmarks.overview import SHOWN, parts_table, performance_table, read_rows
from leanlight.configs_path import find_config
from leanlight.glossary import glossary
from leanlight.registry import METHODS, MethodInfo, commands
from leanlight.results.markdown import escape, markdown_table, suite_table
from leanlight.results.report import find_documents
from leanlight.results.table import read_document

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"<!-- made: (\w+) -->")
DRAWN = re.compile(r"!\[[^\]]+\]\((pictures/[^)]+)\)")
#: What `make tutorials` has drawn.
TUTORIALS = ROOT / "site" / "tutorials"


# ---- metrics ----


def metrics_page() -> str:
    """Every logged name with its unit, a table a group."""
    parts = []
    for title, group in glossary()["groups"].items():
        rows = [[f"`{name}`", escape(unit), escape(what)] for name, (unit, what) in group.items()]
        parts += [f"## {title}", markdown_table(["Logged", "Unit", "What"], rows, right=3)]
    return "\n\n".join(parts)


# ---- methods ----


def methods_table() -> str:
    """The methods of the registry, a line each."""
    rows = []
    for info in METHODS.values():
        paper = info.citation
        link = f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper and paper.arxiv else ""
        venue = " ".join(str(part) for part in (paper.venue, paper.year) if part) if paper else ""
        where = ", ".join(filter(None, [venue, link]))
        rows.append([f"[`{info.name}`](methods/{info.name}.md)", escape(info.title), where, f"`{info.smallest}`"])
    return markdown_table(["Method", "What", "Paper", "Smallest config"], rows, right=4)


def header(path: Path) -> str:
    """The comment that a config begins with, as one line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def _cell(text: str) -> str:
    """Own Markdown for a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _configs(info: MethodInfo) -> str:
    parts = []
    for title, names in (("Configs", info.configs), ("Pipelines", info.pipelines), ("Tables", info.tables)):
        if names:
            rows = [[f"`{name}`", _cell(header(find_config(name)))] for name in names]
            parts += [f"## {title}", markdown_table(["Name", "What it is, and what it costs"], rows, right=2)]
    return "\n\n".join(parts)


def _results(info: MethodInfo) -> str:
    folder = ROOT / "docs" / "results" / info.name
    lines = []
    for path in sorted(folder.glob("*.md")):
        title = path.read_text().splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}](../results/{info.name}/{path.name})")
    return "\n".join(["## Measured", "", *lines])


def _citation(info: MethodInfo) -> str:
    assert info.citation is not None
    return f"## How to cite\n\n{info.citation.text}\n\n```bibtex\n{info.citation.bibtex}\n```"


def method_page(info: MethodInfo) -> str:
    """What a method's page gets beside its text: configs with their costs, results, citation."""
    parts = [_configs(info), _results(info), *([_citation(info)] if info.citation else [])]
    return "\n\n".join(parts)


def citations() -> str:
    """All papers, as text and as BibTeX."""
    cited = [info for info in METHODS.values() if info.citation]
    return "\n\n".join(_citation(info).replace("## How to cite", f"## {info.name}") for info in cited)


def results_table() -> str:
    """One line for each published table."""
    documents = [read_document(path) for path in find_documents(ROOT / "docs" / "results")]
    return suite_table(documents, link="results")


def performance() -> str:
    """One line for each benchmark and each page of a GPU."""
    return performance_table(read_rows(ROOT / "docs" / "results"), link="results/")


def time_of(method: str) -> str:
    """What a method's step consists of, and which targets it misses."""
    return parts_table(read_benchmark(ROOT / "docs" / "results" / method / "benchmark.json"))


def commands_table() -> str:
    """The commands of the program, a line each."""
    rows = [[f"`leanlight {name}`", escape(command.help)] for name, command in commands().items()]
    return markdown_table(["Command", "What"], rows, right=2)


# ---- the Python reference ----


def packages() -> dict[str, list[str]]:
    """Packages with a list of public names, and where each of these is defined: ``lit_modules.hid.losses.ICLoss``."""
    found: dict[str, list[str]] = {"leanlight": ["leanlight.experiment.build", "leanlight.sharing.reading.load"]}
    for top in ("leanlight", "lit_modules", "datamodules", "callbacks"):
        for stub in sorted((ROOT / top).rglob("__init__.pyi")):
            package = ".".join(stub.parent.relative_to(ROOT).parts)
            found[package] = list(_names(stub, package))
    found["leanlight.ops"] = [
        f"leanlight.ops.{path.stem}" for path in sorted((ROOT / "leanlight" / "ops").glob("[a-z]*.py"))
    ]
    return dict(sorted(found.items()))


def _names(stub: Path, package: str) -> Iterator[str]:
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            constants = _constants(stub.parent / f"{node.module.replace('.', '/')}.py")
            yield from (f"{package}.{node.module}.{alias.name}" for alias in node.names if alias.name not in constants)


def _constants(module: Path) -> set[str]:
    """Names that a module assigns values to: a list of data sets is no reading for a reference."""
    if not module.is_file():
        return set()
    assigned = [node for node in ast.parse(module.read_text()).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return {name.id for node in assigned for name in ast.walk(node) if isinstance(name, ast.Name) and name.id.isupper()}


def reference_page(package: str, names: list[str]) -> str:
    """A page for mkdocstrings: every public name of a package."""
    return "\n\n".join([f"# `{package}`", *(f"::: {name}" for name in names)])


def reference_index() -> str:
    """Links to the pages of the packages."""
    rows = [[f"[`{name}`](reference/{name}.md)", str(len(names))] for name, names in packages().items()]
    return markdown_table(["Package", "Names"], rows)


PIECES: dict[str, Callable[[], str]] = {
    "citations": citations,
    "commands": commands_table,
    "methods": methods_table,
    "metrics": metrics_page,
    "performance": performance,
    "reference": reference_index,
    "results": results_table,
    **{f"time_{method}": partial(time_of, method) for method in SHOWN},
}


# ---- hooks of mkdocs ----


def on_config(config: MkDocsConfig) -> None:
    """Put the pages of methods and packages into the navigation."""
    assert isinstance(config.nav, list)
    for entry in config.nav:
        if "Methods" in entry:
            shared = [{"Federations": "methods/federated.md"}]
            entry["Methods"] += [{info.name: f"methods/{info.name}.md"} for info in METHODS.values()] + shared
        if "Python reference" in entry:
            entry["Python reference"] += [{name: f"reference/{name}.md"} for name in packages()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of the reference, and the pictures of tutorials."""
    from mkdocs.structure.files import File

    for package, names in packages().items():
        files.append(File.generated(config, f"reference/{package}.md", content=reference_page(package, names)))
    for path in sorted(TUTORIALS.rglob("pictures/*")):
        place = f"tutorials/{path.relative_to(TUTORIALS).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the places of a page that code writes."""
    markdown = MARKER.sub(lambda match: PIECES[match[1]](), markdown)
    place = Path(page.file.src_uri)
    if place.parent.name == "tutorials":  # pictures that `make tutorials` has not drawn are left out
        markdown = DRAWN.sub(lambda match: match[0] if (TUTORIALS / match[1]).is_file() else "", markdown)
    if place.parent.name == "methods" and place.stem in METHODS:
        markdown += f"\n\n{method_page(METHODS[place.stem])}\n"
    return markdown
