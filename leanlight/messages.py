"""Turn jsonargparse's many-line messages into one line: the key, what was expected, the nearest valid name."""

from __future__ import annotations

import errno
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from leanlight.contracts.errors import UserError, nearest

_LIGHTNING = str(Path(find_spec("lightning").origin).parent)  # type: ignore[union-attr,arg-type]  # it is installed
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What safetensors says, and PyTorch, whose writer only notices that a file is shorter than it should be.
_DISK_WORDS = re.compile(r"No space left on device|File too large|inline_container\.cc.*unexpected pos|iostream error")
# Of numpy and of PyTorch, which says the last two where a number of elements has more than 64 bits.
_MEMORY = re.compile(
    r"(?:allocate memory: you tried|Tried|Unable) to allocate ([\d.]+) ?(bytes|[KMGTPEZ]iB)"
    r"|Storage size calculation overflowed|integer multiplication overflow"
)
_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"class_path[= ]'([\w.]+)'")
_RANGE = re.compile(r"Not of type \w+: expected (.+?), got (.+?)(?=\. Got value| - |$)")
_PATH = re.compile(r"Not of type (Path)\b")
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='[\w.]+', val=(?=.*\)$))?(.+?)(?= - |\)?$)")
_TYPE = re.compile(r"Expected (?:a|an) <class '([\w.]+)'>")


def one_line(message: str, parser: Any) -> str:
    """Return `message` of `parser` (or of none) as one line."""
    text = " ".join(message.split())
    if match := re.match(r"unrecognized arguments: (.+)", text):
        options = [word for word in match[1].split() if word.startswith("-")] or match[1].split()
        key = options[0].split("=")[0].lstrip("-")
        return f"{key}: not an option of this command{nearest(key, _keys(parser))}"
    if match := re.search(r"does not accept option '([^']+)'", text):
        return f"{match[1]}: not a key of the configuration{nearest(match[1], _keys(parser))}"
    if match := re.match(r"the following arguments are required: (.+)", text):
        missing = ", ".join(key.strip().split(".", 1)[-1] for key in match[1].split(","))
        return f"{missing}: required, but not given; start from a config: --config classifier/fashion_mnist_small"
    return _value_error(text) if _KEY.search(text) else text


def _value_error(text: str) -> str:
    # The first alternative of a union is the one that was meant; the text of the others only repeats that it failed.
    body = re.split(r" - Expected a <class 'NoneType'>| - Not a valid subclass| Given value type:", text)[0]
    keys = _KEY.findall(body)
    keys = keys[1:] if len(keys) > 1 and keys[0] == keys[1] else keys
    path = ".init_args.".join(keys) if keys[0] in ("model", "data") else ".".join(keys)
    if match := re.search(r"Option '([^']+)' is not accepted", body):
        is_factory = "expects a function or a callable class" in body
        inner = _factory_class(text) if is_factory else _owner(body[: match.start()])
        return f"{path}.init_args.{match[1]}: not an argument of {inner}{nearest(match[1], _arguments(inner))}"
    if match := re.search(r"Importing '([\w.]+)' is not allowed, denied by the '(.+?)' entry", body):
        return f"{path}: {_denied(match[1], match[2])}"
    if match := re.search(r"(?:module|No) '?([\w.]+?)'? (?:has no )?attribute '?(\w+)", body):
        hint = nearest(match[2], _classes(match[1]))
        return f"{path}.class_path: {match[1]} has no class {match[2]!r}{hint}"
    if match := re.search(r"No module named '([\w.]+)'", body):
        return f"{path}.class_path: no module named {match[1]!r}"
    if match := re.search(r"the following arguments are required: ([\w, .]+)", body):
        return f"{path}.init_args.{match[1].strip()}: required by {_owner(body[: match.start()])}, but not given"
    if match := re.search(r"Expected a dot import path string: (\S+)", body):
        return f"{path}: {match[1]!r} is not a known class; give its full path, e.g. lit_modules.nn.ConvNet"
    return f"{path}: {_bad_value(body, text)}"


def _bad_value(body: str, text: str) -> str:
    """What was expected and what came, where a value is of the wrong type or out of range."""
    if ranges := _RANGE.findall(body):
        return f"expected {' or '.join(dict.fromkeys(words for words, _ in ranges))}, got {ranges[0][1]}"
    got = re.search(r"Got value: (.+?)(?=\. Got value| - |$)", body) or _GIVEN.search(text)
    shown = got[1].strip().strip("'") if got else "another value"
    if match := re.search(r"Expected a typing\.Literal\[(.+?)\]", body):
        valid = [word.strip("'") for word in match[1].split(", ")]
        return f"expected one of {', '.join(valid)}, got {shown!r}{nearest(shown, valid)}"
    if expected := dict.fromkeys([*_TYPE.findall(body), *_PATH.findall(body)]):
        return f"expected {' or '.join(expected)}, got {shown!r}"
    if several := re.search(r"Multiple subclasses with name (\w+)\. .+?: ([\w., ]+?)\.?(?= - |$)", body):
        return f"several classes are called {several[1]}; expected one of {several[2]}"
    if given := re.search(r"Unable to load config '(.+?)'", body):
        return f"expected keys and values, got {given[1]!r}"
    if "expects a function or a callable class" in body:
        return f"expected a function or a class, by its path; got {shown[:80]!r}"
    if re.search(r"has no attribute 'keys'|Not a valid subclass|Expected an instantiatable class", text):
        return f"expected class_path and init_args, got {shown[:80]!r}"
    return body.split(": ", 1)[-1]


def _denied(name: str, entry: str) -> str:
    """Why a class that a config names is not imported."""
    if entry != "*":
        return f"{name!r} is never imported for a config"
    package = name.split(".")[0]
    return (
        f"{name!r} is outside of the suite and came with a run folder or checkpoint, so it was not imported; "
        f"if you trust it, add --trust {package}"
    )


def _owner(before: str) -> str:
    return (_CLASS.findall(before) or ["the class"])[-1]


def _factory_class(text: str) -> str:
    return (re.findall(r"class_path='([\w.]+)'", text) or ["the class"])[0]


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _arguments(class_path: str) -> list[str]:
    """Names a class accepts, its bases' included where it hands on **kwargs."""
    found = _import(class_path)
    if not isinstance(found, type):
        return []
    names: list[str] = []
    for base in inspect.getmro(found):
        with suppress(ValueError):  # some classes written in C tell no signature
            names += inspect.signature(base).parameters
    return [name for name in names if name not in ("args", "kwargs")]


def _classes(module: str) -> list[str]:
    try:
        found = import_module(module)
    except ImportError:
        return []
    return [name for name in getattr(found, "__all__", dir(found)) if not name.startswith("_")]


def _keys(parser: Any) -> list[str]:
    """Every key of a parser and of its subcommands' parsers."""
    keys: list[str] = []
    for action in getattr(parser, "_actions", []):
        inner = getattr(action, "_name_parser_map", None)
        if inner:
            for sub in inner.values():
                keys += _keys(sub)
        elif action.dest not in ("help", "subcommand"):
            keys.append(action.dest)
    return keys


def disk_problem(error: BaseException) -> str | None:
    """What to say of an error that a full or read-only disk, or a limit on sizes, has caused; None for any other."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _DISK_ERRORS:
            where = f": {link.filename}" if link.filename else ""
            return f"cannot write ({link.strerror}){where}"
        if _DISK_WORDS.search(str(link)):
            return "cannot write (the disk is full, or a limit on sizes is reached)"
        link = link.__cause__ or link.__context__
    return None


@contextmanager
def memory_errors() -> Iterator[None]:
    """An error in the block that more memory would have prevented is the user's, whose sizes ask for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        link: BaseException | None = error
        while link is not None:
            found = _MEMORY.search(str(link))
            if found or isinstance(link, MemoryError):
                asked = _size(found[1], found[2]) if found and found[1] else "more than there is"
                where = " of the GPU" if "CUDA" in str(link) else ""
                raise UserError(
                    f"not enough memory{where}: {asked} asked for at once; lower a size, as of batches or layers"
                ) from error
            link = link.__cause__ or link.__context__
        raise


def _size(number: str, unit: str) -> str:
    if unit != "bytes":
        return f"{number} {unit}"
    return f"{int(number) / 2**30:,.1f} GiB"


def with_prefix(error: BaseException, resolved: Mapping[str, Any]) -> UserError:
    """The error as the command line shows it: an argument that it names gets the path it has in the configuration.

    Classes name their arguments alone (``ipc: expected …``), since from Python there is no configuration.
    """
    text = " ".join(str(error).split())
    name = re.match(r"[a-z_]\w*", text)
    if name is None or not isinstance(error, UserError):
        return UserError(text)
    parts = ["data", "model"] if "datamodules" in _innermost(error.__traceback__) else ["model", "data"]
    for part in parts:
        given = (resolved.get(part) or {}).get("init_args") or {}
        places = dict(_places(given, name[0], f"{part}.init_args"))
        refused = [place for place, value in places.items() if f"got {value!r}" in text]
        paths = sorted(refused or places, key=lambda path: (path.count("."), len(path)))
        if paths and (len(paths) == 1 or paths[0].count(".") < paths[1].count(".")):
            return _like(error, paths[0] + text[len(name[0]) :])
        if paths:
            break
    return _like(error, text)


def _like(error: UserError, text: str) -> UserError:
    """An error of the same kind with another text."""
    again = type(error).__new__(type(error))  # its __init__ may want other arguments
    again.args = (text,)
    return again


def _innermost(traceback: TracebackType | None) -> str:
    """File of the frame that raised."""
    file = ""
    while traceback is not None:
        file, traceback = traceback.tb_frame.f_code.co_filename, traceback.tb_next
    return file


def _places(given: Any, name: str, where: str) -> Iterator[tuple[str, Any]]:
    """Every dotted path in a nested configuration that ends with `name`, with its value."""
    for key, value in given.items() if isinstance(given, Mapping) else ():
        if key == name:
            yield f"{where}.{key}", value
        yield from _places(value, name, f"{where}.{key}")


def quiet_lightning() -> None:
    """Keep Lightning from saying what the suite says itself, or what is as it should be."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    # A pre-trained network stays in evaluation mode while prompts are tuned.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
    # A module that puts images of its own into batches, before the data scales and augments them.
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_showing)


def _worth_showing(record: logging.LogRecord) -> bool:
    """False for what Lightning says by `rank_zero_info`: device lists and advertisements, on every start.

    What modules and callbacks say by it is shown.
    """
    return record.levelno > logging.INFO or not record.pathname.startswith(_LIGHTNING)
