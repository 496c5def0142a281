"""`leanlight methods`: what the suite holds, from the static registry."""

from __future__ import annotations

from leanlight.cli.arguments import Parser
from leanlight.configs_path import config_names
from leanlight.registry import METHODS, method


def main(argv: list[str]) -> int:
    """List all methods, or one with its configs, tables and pipelines."""
    parser = Parser(prog="leanlight methods", description=__doc__)
    parser.add_argument("name", nargs="?", help="show one method")
    parser.add_argument("--configs", action="store_true", help="list every config by name")
    args = parser.parse_args(argv)
    if args.configs:
        print("\n".join(config_names()))
    elif args.name:
        info = method(args.name)
        print(f"{info.name}: {info.title}")
        for label, value in (("paper", info.paper), ("module", info.module), ("extra", info.extra)):
            if value:
                print(f"  {label:<9} {value}")
        for label in ("configs", "tables", "pipelines"):
            for position, name in enumerate(getattr(info, label)):
                print(f"  {label if position == 0 else '':<9} {name}")
    else:
        width = max(map(len, METHODS))
        for info in METHODS.values():
            print(f"{info.name:<{width}}  {info.title}{f'  [{info.paper}]' if info.paper else ''}")
            print(
                f"{'':<{width}}  {len(info.configs)} configs, {len(info.tables)} tables; leanlight methods {info.name}"
            )
    return 0
