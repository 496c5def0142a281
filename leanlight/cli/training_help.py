"""`leanlight fit --help`: what there is to set, read from source files, since importing Lightning takes seconds."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from docstring_parser import parse

from leanlight.standard import STANDARD_CALLBACKS

_WHAT = {
    "fit": "Train a model, test it, write a run folder.",
    "validate": "Measure a model on validation data.",
    "test": "Measure a model on test data.",
    "predict": "Write a model's predictions.",
}
_RUNS = {
    "fit": [
        ("--resume RUN_DIR", "go on with an interrupted run, in its folder"),
        ("--allow-changes", "go on although keys that decide numbers, or the data, have changed; it is recorded"),
        ("--estimate", "print the memory of one training step, from shapes alone, and stop"),
    ],
    "validate": [("--from RUN_DIR", "take configuration and weights of a run")],
    "test": [("--from RUN_DIR", "take configuration and weights of a run")],
    "predict": [
        ("--from RUN_DIR", "take configuration and weights of a run"),
        ("--resume RUN_DIR", "go on with an interrupted predict"),
    ],
}
_FIRST = [
    ("--config NAME", "a config's name (`leanlight methods --configs`) or file; several compose left to right"),
    ("--KEY=VALUE", "change any key of it, e.g. --trainer.max_epochs=3, --data.init_args.batch_size=64"),
    ("--trust PACKAGE", "let a run folder name classes of this package of yours; may be repeated"),
    ("--seed_everything N", "seed of everything random (0)"),
    ("--print_config", "show the complete configuration and stop"),
    ("--model CLASS", "the LightningModule; --model.init_args.NAME=VALUE sets its arguments"),
    ("--model.help CLASS", "what they are, e.g. --model.help lit_modules.classifier.ImageClassifier"),
    ("--data CLASS", "the LightningDataModule; --data.init_args.NAME=VALUE sets its arguments"),
    ("--data.help CLASS", "what they are, e.g. --data.help datamodules.ImageDataModule"),
]
Row = tuple[str, str]


def training_help(argv: Sequence[str]) -> str:
    """Help of a subcommand of Lightning, argv: it and its options."""
    command = argv[0]
    blocks = [
        f"usage: leanlight {command} --config NAME [--config OVERLAY ...] [--KEY=VALUE ...]\n\n{_WHAT[command]}",
        _block("What you set first", [*_RUNS[command], *_FIRST]),
        _block("The run (--run.NAME)", _arguments(Path(__file__).parents[1] / "runs.py", "RunSettings", "run")),
        _block("Callbacks of every run; those of your own go to --trainer.callbacks+=CLASS", list(_callbacks(command))),
        _block("The trainer (--trainer.NAME)", list(_trainer())),
    ]
    return "\n\n".join(blocks)


def _block(title: str, rows: Sequence[Row]) -> str:
    """A heading, then each row wrapped to the terminal's width."""
    width = max(80, min(120, shutil.get_terminal_size((120, 24)).columns))
    left = max(len(name) for name, _ in rows) + 4
    lines = [textwrap.wrap(f"  {name}".ljust(left) + text, width, subsequent_indent=" " * left) for name, text in rows]
    return "\n".join([f"{title}:", *(line for wrapped in lines for line in wrapped)])


def _callbacks(command: str) -> Iterator[Row]:
    source = find_spec("callbacks")
    assert source is not None
    assert source.submodule_search_locations
    (folder,) = source.submodule_search_locations
    homes = {
        node.name: path
        for path in sorted(Path(folder).rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    for key, name in ({"predictions": "PredictionWriter"} | STANDARD_CALLBACKS).items():
        if key == "predictions" and command != "predict":
            continue
        yield from (row for row in _arguments(homes[name], name, key) if row[0] != "--predictions.resume")


def _trainer() -> Iterator[Row]:
    lightning = find_spec("lightning")
    assert lightning is not None
    assert lightning.submodule_search_locations
    (folder,) = lightning.submodule_search_locations
    for name, text in _arguments(Path(folder) / "pytorch" / "trainer" / "trainer.py", "Trainer", "trainer"):
        if not name.startswith(("--trainer.callbacks", "--trainer.logger", "--trainer.model_registry")):
            yield name, text


def _arguments(path: Path, name: str, key: str) -> list[Row]:
    """Options of a class in a source file, with the first sentence that its docstring says of each, and the default."""
    (found,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
    make = next((n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    defaults = _signature(make) if make else _fields(found)
    documented = [text for text in (ast.get_docstring(found), ast.get_docstring(make) if make else None) if text]
    texts = {p.arg_name: " ".join((p.description or "").split()) for text in documented for p in parse(text).params}
    return [
        (f"--{key}.{argument}", f"{_sentence(texts.get(argument, ''))}{_default(default)}")
        for argument, default in defaults.items()
    ]


def _signature(make: ast.FunctionDef) -> dict[str, ast.expr | None]:
    """Arguments of a function → their defaults."""
    positional = [*make.args.posonlyargs, *make.args.args][1:]
    given = [None] * (len(positional) - len(make.args.defaults)) + list(make.args.defaults)
    named = zip([*positional, *make.args.kwonlyargs], [*given, *make.args.kw_defaults], strict=True)
    return {argument.arg: default for argument, default in named}


def _fields(found: ast.ClassDef) -> dict[str, ast.expr | None]:
    """Fields of a dataclass → their defaults."""
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: node.value for node in fields if isinstance(node.target, ast.Name)}


def _sentence(text: str) -> str:
    """The first sentence, without its end and without markup."""
    plain = re.sub(r":\w+:`~?([^`]+)`|`+", r"\1", text)  # links and code marks of reStructuredText
    return plain.split(". ")[0].split(" Default: ")[0].rstrip(".")


def _default(value: ast.expr | None) -> str:
    if value is None or isinstance(value, ast.Call) or (isinstance(value, ast.Constant) and value.value in (None, "")):
        return ""
    return f" ({ast.unparse(value)})"
