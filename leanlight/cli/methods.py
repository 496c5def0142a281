"""`leanlight methods`: what the suite and installed packages hold, from the registry."""

from __future__ import annotations

from leanlight.cli.arguments import Parser
from leanlight.configs_path import config_names
from leanlight.contracts.errors import UserError
from leanlight.registry import MethodInfo, method, methods


def main(argv: list[str]) -> int:
    """List all methods, or one with its paper, configs, tables and pipelines."""
    parser = Parser(prog="leanlight methods", description=__doc__)
    parser.add_argument("name", nargs="?", help="show one method")
    parser.add_argument("--configs", action="store_true", help="list every config by name")
    parser.add_argument("--bibtex", action="store_true", help="print the papers, or that of one method, as BibTeX")
    args = parser.parse_args(argv)
    chosen = [method(args.name)] if args.name else list(methods().values())
    if args.configs:
        print("\n".join(config_names()))
    elif args.bibtex:
        papers = [info.citation for info in chosen if info.citation]
        if not papers:
            raise UserError(f"--bibtex: {args.name} is a tool of the suite and has no paper")
        print("\n\n".join(paper.bibtex for paper in papers))
    elif args.name:
        _show(chosen[0])
    else:
        _list(chosen)
    return 0


def _show(info: MethodInfo) -> None:
    print(f"{info.name}: {info.title}")
    paper = info.citation.text if info.citation else ""
    commands = ", ".join(f"leanlight {command.name}" for command in info.commands)
    shown = {
        "paper": paper,
        "module": info.module,
        "extra": info.extra,
        "commands": commands,
        "smallest": info.smallest,
    }
    for label, value in shown.items():
        if value:
            print(f"  {label:<9} {value}")
    for label, names in (("configs", info.configs), ("tables", info.tables), ("pipelines", info.pipelines)):
        for position, name in enumerate(names):
            print(f"  {label if position == 0 else '':<9} {name}")


def _list(chosen: list[MethodInfo]) -> None:
    width = max(len(info.name) for info in chosen)
    for info in chosen:
        paper = f"  [arXiv:{info.citation.arxiv}]" if info.citation and info.citation.arxiv else ""
        print(f"{info.name:<{width}}  {info.title}{paper}")
        print(f"{'':<{width}}  {len(info.configs)} configs, {len(info.tables)} tables; leanlight methods {info.name}")
