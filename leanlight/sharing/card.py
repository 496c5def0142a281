"""The card of what leaves the suite: `README.md` in the format of the Hugging Face hub, beside the files themselves.

Its front matter has licence, data, task and, of a model, the figures of the run (``model-index``); its text says the
same in words, how to load the files without the suite and with it, and what they are not good for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from leanlight import __version__, runs
from leanlight.configs_path import config_root
from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.data_sets import KNOWN, Info, info_of
from leanlight.invocation import read_config
from leanlight.registry import MethodInfo, methods
from leanlight.runs import CARD, CARD_MARK
from leanlight.sharing.kinds import Kind, kind_of
from leanlight.units import show_value, units_of

TAG = "leanlight"
#: Stays where it is: hidden files, and the suite's drawings, which may show the data.
NOT_SHARED = (".*", "*/.*", "media/*", "*/media/*")
#: Keys of the front matter that are always the suite's.
_OURS = ("license", "license_name", "tags", "datasets", "metrics", "model-index")
_FRONT = re.compile(r"---\n(.*?)^---\n(.*)", re.DOTALL | re.MULTILINE)
#: Licences of the catalogues → names of the hub, beside those of Creative Commons, which differ in their hyphens alone.
_LICENCES = {"MIT": "mit", "none needed": "apache-2.0", "that of leanlight": "apache-2.0"}
_UNKNOWN = ("yours", "none stated", "that of each set")


@dataclass(frozen=True)
class Origin:
    """What a card says of where a folder comes from.

    Args:
        summary: ``summary.json`` of the run; empty where it is not known.
        config: ``config.yaml`` of the run.
        checkpoint: of the run's weights, ``last`` or ``best``; of another file its name.
    """

    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = "last"

    @classmethod
    def of(cls, place: Path, checkpoint: str = "last") -> Origin:
        """The run that a file or folder belongs to; an empty origin where it belongs to none."""
        run = runs.run_of(place)
        path = run / "config.yaml"
        return cls(runs.read_summary(run) or {}, read_config(path) if path.is_file() else {}, checkpoint)

    @property
    def method(self) -> str:
        """Its method's name, or an empty one."""
        return str(self.summary.get("method", ""))

    @property
    def info(self) -> MethodInfo | None:
        """What the registry knows of the method."""
        return methods().get(self.method)

    @cached_property
    def data(self) -> Info | None:
        """What the catalogues know of the data."""
        return info_of(self.config["data"]) if self.config.get("data") else KNOWN.get(self.data_name)

    @property
    def data_name(self) -> str:
        """Name of the data, or an empty one."""
        return str((self.summary.get("data") or {}).get("name") or self.summary.get("dataset") or "")

    @property
    def figures(self) -> dict[str, float]:
        """What was measured on test data with these very weights, by logged name."""
        tested = (self.config.get("run") or {}).get("test", "last")
        if self.summary.get("status") != "finished" or self.checkpoint != tested:
            return {}
        metrics: dict[str, float] = self.summary.get("metrics") or {}
        names = [name for name in sorted(metrics) if name.startswith("test/") and name.count("/") == 1]
        return {name: metrics[name] for name in names if math.isfinite(metrics[name])}

    @property
    def processor(self) -> str:
        """What the figures were measured on."""
        machine = self.summary.get("machine") or {}
        trainer = self.config.get("trainer") or {}
        gpus = machine.get("gpus") if trainer.get("accelerator") != "cpu" else None
        return str((gpus or [machine.get("cpu", "")])[0])


def write_card(folder: Path, origin: Origin) -> Path:
    """Write the card of what `folder` holds and return its path.

    A card that the method itself has written stays: its front matter gets what it lacks, its text what follows.
    """
    path, kind = folder / CARD, kind_of(folder)
    theirs, text = _parts(path)
    own = text.partition(CARD_MARK)[0].strip()
    kept = {key: value for key, value in theirs.items() if own and key not in _OURS}
    front = {**_front(kind, origin), **kept}
    front["tags"] = list(dict.fromkeys([*_tags(origin), *(theirs.get("tags", []) if own else [])]))
    if "base_model" in kept:
        front |= {"license": "other", "license_name": "that-of-the-base-and-of-the-data"}
    parts = [] if own else [_what(kind, origin)]
    parts += [_data(origin), _figures(kind, origin), _files(folder)]
    parts += [] if own else [_without(folder, kind)]
    parts += [_with(folder, kind), _limits(kind)]
    body = "\n\n".join(filter(None, [own, CARD_MARK, *parts]))
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    atomic_write(path, f"---\n{header}---\n\n{body}\n")
    return path


def check_card(folder: Path) -> None:
    """UserError where a folder has a README.md that is no card: a user's own words stay."""
    _parts(folder / CARD)


def is_export(folder: Path) -> bool:
    """Whether a folder has a card of the suite."""
    try:
        tags = _parts(folder / CARD)[0].get("tags")
    except UserError:
        return False
    return isinstance(tags, list) and TAG in tags


def is_current(folder: Path) -> bool:
    """Whether a folder has a card of the suite that is as new as what it describes; one that people edited stays so."""
    if not is_export(folder):
        return False
    written = (folder / CARD).stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= written for path in shared_files(folder))


def _parts(path: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card; neither where there is none. Raises UserError where it is no card."""
    if not path.is_file():
        return {}, ""
    try:
        match = _FRONT.match(path.read_text(encoding="utf-8"))
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        front = None
    if match is None or not isinstance(front, dict):
        raise UserError(f"{path}: expected a card with YAML between two lines of ---; choose another folder")
    return front, match[2]


# ---- front matter ----


def _front(kind: Kind, origin: Origin) -> dict[str, Any]:
    front: dict[str, Any] = _licence(origin)
    front["tags"] = []
    if kind.repo_type == "dataset":
        front |= {"pretty_name": _title(kind, origin)}
        front |= {"task_categories": [kind.task]} if kind.task else {}
        if kind.mark.endswith("distilled.safetensors"):  # the hub shows its pictures
            pictures = (Path(kind.mark).parent / "dataset").as_posix()
            front["configs"] = [{"config_name": "default", "data_dir": pictures}]
        return front
    front["library_name"] = kind.library or TAG
    if kind.task:
        front["pipeline_tag"] = kind.task
    if origin.data_name:
        front["datasets"] = [origin.data_name]
    if figures := origin.figures:
        front["metrics"] = [name.partition("/")[2] for name in _shown(origin)]
        front["model-index"] = [{"name": _title(kind, origin), "results": [_result(kind, origin, figures)]}]
    return front


def _shown(origin: Origin) -> list[str]:
    """Of the figures those that the method's tables show, too; all where these have none of them."""
    units = units_of(origin.method, origin.data_name)
    return [name for name in origin.figures if name.partition("/")[2] in units] or list(origin.figures)


def _result(kind: Kind, origin: Origin, figures: Mapping[str, float]) -> dict[str, Any]:
    """Figures as the hub reads them: raw values, and what they were measured with."""
    data = {"name": origin.data.title if origin.data else origin.data_name, "type": origin.data_name, "split": "test"}
    metrics = [
        {
            "name": name,
            "type": name.partition("/")[2],
            "value": value,
            "args": {"seed": origin.summary.get("seed"), "processor": origin.processor},
        }
        for name, value in figures.items()
    ]
    return {"task": {"type": kind.task or "other"}, "dataset": data, "metrics": metrics}


def _licence(origin: Origin) -> dict[str, str]:
    """The terms of the data, in the hub's words; unknown where weights of others, with theirs, may be part of it."""
    terms = origin.data.licence if origin.data else ""
    if not terms or terms in _UNKNOWN or _names_weights(origin.config.get("model")):
        return {"license": "unknown"}
    if terms in _LICENCES or terms.startswith("CC "):
        return {"license": _LICENCES.get(terms) or terms.lower().replace(" ", "-")}
    return {"license": "other", "license_name": "-".join(re.findall(r"[a-z0-9]+", terms.lower()))}


def _names_weights(config: Any) -> bool:
    """Whether a model's configuration reads weights that were trained before."""
    if isinstance(config, Mapping):
        return any(
            (key in ("weights", "pretrained") and value) or _names_weights(value) for key, value in config.items()
        )
    return isinstance(config, list) and any(map(_names_weights, config))


def _tags(origin: Origin) -> list[str]:
    return list(filter(None, [TAG, "pytorch", origin.method.replace("_", "-")]))


def _title(kind: Kind, origin: Origin) -> str:
    """``classifier on digits``."""
    return f"{origin.method or TAG}{f' on {origin.data_name}' if origin.data_name else f': {kind.what}'}"


# ---- text ----


def _what(kind: Kind, origin: Origin) -> str:
    model = str((origin.config.get("model") or {}).get("class_path", ""))
    lines = [f"# {_title(kind, origin)}", "", f"A{'n' if kind.what[0] in 'aeiou' else ''} {kind.what}."]
    if origin.info:
        lines[-1] += f" Method: {origin.info.title}."
    lines[-1] += f" Made with Leanlight {__version__}" + (f", `{model}`." if model else ".")
    if origin.info and origin.info.citation:
        lines += ["", f"Paper: {origin.info.citation.text}", "", f"```bibtex\n{origin.info.citation.bibtex}\n```", ""]
        lines += ["The suite is an independent implementation: the paper's authors have no part in it."]
    return "\n".join(lines)


def _data(origin: Origin) -> str:
    facts = origin.summary.get("data") or {}
    if not origin.data_name:
        return ""
    if origin.data:
        text = f"{origin.data.title} ({origin.data.origin}). Licence: {origin.data.licence}."
    else:
        text = f"{origin.data_name}, whose own terms hold: `leanlight data list` does not have it, see `NOTICE` there."
    if counts := facts.get("counts"):
        text += " Items: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()) + "."
    if facts.get("fingerprint"):
        text += f"\n\nFingerprint of the data: `{facts['fingerprint']}`."
    return f"## Data\n\n{text}"


def _figures(kind: Kind, origin: Origin) -> str:
    """The run's own figures, and where there are more of them."""
    seed, units = origin.summary.get("seed"), units_of(origin.method, origin.data_name)
    about = f"seed {seed}" if seed is not None else "one run"
    if origin.figures:
        said = f"Of this run alone ({about}, on {origin.processor or 'a processor that is not known'}), on test data:"
        shown = {name: show_value(name, origin.figures[name], units) for name in _shown(origin)}
        rows = [f"| {name} | {number} | {unit} |" for name, (number, unit) in shown.items()]
        text = "\n".join([said, "", "| metric | value | unit |", "|---|---:|---|", *rows])
    elif kind.repo_type == "model":
        text = "Nothing was measured on test data with these weights."
    else:
        text = f"How it was made is in its files ({about})."
    return f"## Figures\n\n{text}{_tables(origin)}"


def _tables(origin: Origin) -> str:
    """The method's tables on these data, where it is compared with others over seeds."""
    names = [Path(name).name for name in origin.info.tables] if origin.info else []
    lines = []
    for stem in names:
        if origin.data_name and stem.startswith(origin.data_name):
            published = (config_root().parent / "docs" / "results" / origin.method / f"{stem}.md").is_file()
            where = f"; what it gave is published in `docs/results/{origin.method}/{stem}.md` of Leanlight"
            lines.append(f"- `leanlight reproduce {origin.method}/tables/{stem}`{where if published else ''}")
    return "\n\nMethod and baselines over several seeds, under one protocol:\n\n" + "\n".join(lines) if lines else ""


def _files(folder: Path) -> str:
    """Files with their sizes, those of a folder inside in one line, and the tensors in files of safetensors."""
    lines = []
    for path in sorted(shared_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name != CARD and "/" not in name:
            tensors = _tensors(path) if path.suffix == ".safetensors" else ""
            lines.append(f"- `{name}`, {path.stat().st_size:,} bytes{tensors}")
    inside: dict[str, int] = {}
    for path in shared_files(folder):
        parts = path.relative_to(folder).parts
        if len(parts) > 1:
            inside[parts[0]] = inside.get(parts[0], 0) + 1
    lines += [f"- `{name}/`, {count:,} file{'s' * (count > 1)}" for name, count in sorted(inside.items())]
    return "## Files\n\n" + "\n".join(lines)


def shared_files(folder: Path) -> Iterator[Path]:
    """Files of a folder but those of `NOT_SHARED`."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in NOT_SHARED):
            yield path


def _tensors(path: Path) -> str:
    """Names and shapes of a few tensors, or how many there are."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    if len(shapes) > 6:
        return f": {len(shapes):,} tensors"
    return ": " + ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _without(folder: Path, kind: Kind) -> str:
    """How to load it with PyTorch, NumPy or the library that it is for."""
    path = folder / "card.json"
    card = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    use, said = card.get("use", ""), ""
    if kind.use:
        lines, said = kind.use, f"\n\n{use[0].upper()}{use[1:]}." if use else ""
    elif isinstance(use, list):
        lines = "\n".join(use)
    elif (match := re.search(r"module\(\)\((\w+)\)", use)) and "input" in card:
        shape = ", ".join(str(2 if size == "N" else size) for size in card["input"]["shape"])
        lines = f"import torch\n\n{match[1]} = torch.zeros({shape})  # yours\nprint({use})"
    else:
        return ""
    return f"## Use it without Leanlight\n\nIn this folder:\n\n```python\n{lines}\n```{said}"


def _with(folder: Path, kind: Kind) -> str:
    option = " --type dataset" if kind.repo_type == "dataset" else ""
    lines = ["import leanlight", "", 'tensors = leanlight.load("export")  # by name']
    if any(folder.glob("*.pt2")):
        lines.append('network = leanlight.load("export", program=True)  # may run code: only of who you trust')
    code = "\n".join(lines)
    return (
        f"## Use it with Leanlight\n\n`leanlight pull USER/NAME{option} --output export` fetches it.\n\n"
        f"```python\n{code}\n```"
    )


def _limits(kind: Kind) -> str:
    lines = ["It was made for research, of the data above, and is not known to be good for any other."]
    if kind.repo_type == "model":
        lines.append("Its figures are those of one run with one seed: they are no comparison with another method.")
    lines.append(
        "The licence above is that of the data, whose terms may bind what is made of them, and may forbid to pass it "
        "on; who publishes this decides. Leanlight's own code is under Apache-2.0. Weights of others that it began "
        "with keep their own terms (`NOTICE` of Leanlight lists them)."
    )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
