"""From the features that `leanlight predict` wrote to a selection on disk. Needs torch and safetensors alone."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from inspect import getfile
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from leanlight import runs
from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write, sha256_file
from leanlight.messages import one_line
from leanlight.objects import admitted_object
from leanlight.predictions import describe_predictions, load_predictions
from leanlight.selection_rules import rule as rule_info
from lit_modules.adq import PatchDrop
from lit_modules.selection import Features, Picks, Rule, ScoreRule, Work, class_budget, class_members
from lit_modules.selection.work import Advance, ClassStep

FORMAT = 1
Move = Callable[..., None]  # of a progress bar: steps done, and where the work is
_SHOWN_S = 0.1  # a bar is drawn anew at most so often: some loops pick thousands of items a second


# -- the rule


def build_rule(name: str, settings: Mapping[str, Any], trust: Sequence[str] = ()) -> Rule:
    """A rule by its name in `leanlight.selection_rules`, or an own one by the import path of its class.

    Args:
        name: of the rule.
        settings: fields of the rule's dataclass that shall differ from their defaults.
        trust: packages of own rules.

    Raises:
        UserError: no such rule, or a setting that it does not have or that is of another type.
    """
    target = name if "." in name else rule_info(name).target
    try:
        rule: Rule = admitted_object(Rule, "rule", {"class_path": target, "init_args": settings}, trust)
    except (jsonargparse.ArgumentError, ValueError, TypeError, ImportError) as error:
        raise UserError(_about_options(error, "rule", "--set")) from error
    if not is_dataclass(rule):
        raise UserError(f"--rule: {target} is no dataclass, so its switches cannot be written down")
    return rule


def build_patches(settings: Mapping[str, Any]) -> PatchDrop:
    """What ``--patches`` says. settings: arguments of `PatchDrop`."""
    try:
        named = {"class_path": "lit_modules.adq.PatchDrop", "init_args": settings}
        patches: PatchDrop = admitted_object(PatchDrop, "patches", named, ())
        return patches
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(_about_options(error, "patches", "--patches")) from error


def _about_options(error: Exception, key: str, option: str) -> str:
    """What the parser or the object itself says of a value, by the names that options have here.

    Args:
        error: caught.
        key: what the parser calls the object.
        option: that sets its arguments.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"{option} {cause}"
    text = one_line(str(error), None)
    text = re.sub(r"Does not validate against.*(?:Parser key \"\w+\"|Errors): (?:- )?", "", text)
    text = re.sub(rf"^{key}(\.class_path)?(?=: )", f"--{key}", text)
    return re.sub(rf"^{key}\.(init_args\.)?", f"{option} ", text)


# -- the features


@dataclass(frozen=True)
class Source:
    """What is selected from.

    Args:
        features: of all items of the training part.
        origin: (N,) int64 position of each in the source's own training part.
        facts: fingerprints of ``data``, ``weights`` and of the ``features`` themselves, as far as they are known.
    """

    features: Features
    origin: Tensor
    facts: dict[str, Any]


def read_source(path: Path, rule: Rule, name: str) -> Source:
    """Read what a rule needs of a prediction.

    Args:
        path: a predict run, the folder of its predictions, or one ``.safetensors`` file with the same fields.
        rule: whose `needs` are read.
        name: of the rule, for messages.

    Raises:
        UserError: no features of a whole training part, or not those that the rule needs.
    """
    wanted = ("index", "origin", "label", *rule.needs)
    values, facts = _from_file(path, wanted) if path.is_file() else _from_run(path, wanted)
    if missing := [field for field in rule.needs if field not in values]:
        raise UserError(f"--rule {name}: needs {', '.join(missing)}, which {path} lacks; {_remedy(rule, missing)}")
    for field in ("origin", "label"):
        if field not in values:
            raise UserError(f"features: {path} has no {field}; {_remedy(rule, [])}")
    _check(values, path)
    label, origin = values["label"].long(), values["origin"].long()
    needed = {field: values[field] for field in rule.needs}
    facts |= {"features": _digest({"label": label, "origin": origin, **needed})}
    return Source(Features(label, int(label.max()) + 1, needed), origin, facts)


def _remedy(rule: Rule, missing: Sequence[str]) -> str:
    """How to get what the features lack."""
    again = "leanlight predict --from RUN --data.init_args.predict_split=train"
    if any(field.startswith("train_") for field in missing):
        return f"a selector records them as it trains: leanlight fit --config adq/digits_small, then {again}"
    if {"texture", "views"} & set(missing):
        outputs = ",".join(rule.needs)
        return f"lit_modules.adq.SampleScorer gives them: {again} --model.init_args.outputs=[{outputs}]"
    return f"write them with: {again}"


def _from_run(path: Path, wanted: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    described = describe_predictions(path)
    if described.get("split") != "train":
        raise UserError(
            f"features: expected predictions of the training part, {path} holds those of {described.get('split')!r}; "
            "predict again with --data.init_args.predict_split=train"
        )
    data = (runs.read_summary(runs.run_of(path)) or {}).get("data") or {}
    expected = (data.get("counts") or {}).get("train", described["items"])
    if described["items"] != expected:
        raise UserError(
            f"features: cut short, {path} holds {described['items']:,} of {expected:,} items; predict all of them "
            "(trainer.limit_predict_batches)"
        )
    facts = {key: described.get(key) for key in ("data", "weights")}
    return dict(load_predictions(path, wanted)), facts


def _from_file(path: Path, wanted: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.with_suffix(".json").is_file() and (path.parent / "predictions.json").is_file():
        raise UserError(f"features: {path} is one piece of a prediction; give its folder, {path.parent}")
    try:
        with safe_open(path, framework="pt") as file:
            has = set(file.keys())
            values = {field: file.get_tensor(field) for field in wanted if field in has}
    except (SafetensorError, OSError) as error:
        raise UserError(f"features: {path} is no readable .safetensors file ({error})") from error
    if "index" not in values:
        raise UserError(f"features: expected index, label and what the rule needs; {path} holds {sorted(has)}")
    return {"origin": values["index"], **values}, {}


def _check(values: Mapping[str, Any], path: Path) -> None:
    """Refuse what no rule could go by: texts, other lengths, attributes, gaps, numbers that are none."""
    index, label = values["index"], values["label"]
    for field, value in values.items():
        if not isinstance(value, Tensor) or not value.ndim or len(value) != len(index):
            raise UserError(f"features: {field}: expected a tensor with one row for each of {len(index):,} items")
    if not len(index):
        raise UserError(f"features: {path} holds no item")
    if label.ndim != 1 or label.is_floating_point():
        raise UserError(
            f"features: label: expected one class an item, got {label.dtype} of shape {tuple(label.shape)}; "
            "selection goes by class, attributes have none"
        )
    if int(label.min()) < 0:
        raise UserError(f"features: label: expected classes from 0, got {int(label.min())}")
    if path.is_dir() and not torch.equal(index, torch.arange(len(index))):
        raise UserError(f"features: cut short, {path} lacks items of the training part; leanlight predict --resume RUN")
    if len(values["origin"].unique()) < len(index):
        raise UserError(f"features: {path} holds an item more than once")
    for field, value in values.items():
        finite = value.isfinite().view(len(index), -1).all(1)
        if not finite.all():
            raise UserError(f"features: {field} of item {int(index[~finite][0])} is not finite, in {path}")


def _digest(values: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors; the same however a prediction was cut into pieces."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- the work


class KeptWork(Work):
    """Shows a progress bar with the time that is left, and keeps the result of every class as soon as it is there.

    Args:
        folder: where results lie; one that is there is not worked out again.
        title: what the bar says.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title, self._passes = folder, title, 0

    def classes(self, features: Features, step: ClassStep, steps: Sequence[int]) -> list[dict[str, Tensor]]:
        self._passes += 1
        results = []
        with self._bar(sum(steps)) as move:
            for label in range(features.num_classes):
                path, done = self.folder / f"{self._passes}-{label:06}.safetensors", sum(steps[:label])
                move(done, f"class {label + 1} of {features.num_classes}")
                result = load_file(path) if path.is_file() else None
                if result is None:
                    result = self.one(features, label, step, _counter(done, move))
                    # Copies: safetensors takes no two tensors that share memory.
                    atomic_write(path, save({name: value.clone().contiguous() for name, value in result.items()}))
                results.append(result)
            move(sum(steps))
        return results

    @contextmanager
    def _bar(self, total: int) -> Iterator[Move]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(self.title, total=total)

            def move(done: int, where: str | None = None) -> None:
                bar.update(task, completed=done, description=where and f"{self.title}, {where}")

            yield move


def _counter(done: int, move: Move) -> Advance:
    shown = 0.0

    def advance(steps: int) -> None:
        nonlocal done, shown
        done += steps
        if (now := time.monotonic()) - shown > _SHOWN_S:
            move(done)
            shown = now

    return advance


# -- the selection


def select(
    features: Path,
    name: str,
    rule: Rule,
    keep: float,
    seed: int,
    output: Path,
    patches: PatchDrop | None = None,
    images: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Select items by a rule and write them to the folder `output`; return what its ``selection.json`` says.

    Finished classes wait in ``output/.parts`` until the selection is whole, so that the same call goes on where one was
    interrupted.

    Args:
        features: as for `read_source`.
        name: of the rule.
        rule: see `build_rule`.
        keep: share of the items of each class, in (0, 1].
        seed: of whatever the rule draws.
        output: folder for ``selection.safetensors``, ``.csv``, ``.json`` and pictures in ``media``.
        patches: what is left out of the chosen pictures, to be written down.
        images: of items at positions of the features, for a picture of the selection; see `selection_pictures`.

    Raises:
        UserError: bad features, too small a share, an output that cannot be written. Nothing is left behind then.
    """
    begin = time.monotonic()
    source = read_source(features, rule, name)
    budget = class_budget(source.features, keep)
    code_hash, code_files = runs.code_version([*runs.code_version()[1], "leanlight/selection.py"])
    told = {
        "rule": name,
        "class": f"{type(rule).__module__}.{type(rule).__qualname__}",
        "arguments": asdict(rule),
        "keep": keep,
        "seed": seed,
        **source.facts,
    }
    parts = output / ".parts" / _part_key(told, budget, code_hash, rule)
    with _whole_or_nothing(output):
        picks = rule.select(source.features, budget, seed, KeptWork(parts, name))
        _check_picks(picks, source.features, told["class"])
        record = told | {
            "format": FORMAT,
            "split": "train",
            **_shares(len(picks), len(source.features), patches.drop_ratio if patches else 0.0),
            **({"patches": asdict(patches)} if patches else {}),
            "counts": _counts(picks, source.features),
            "details": _plain(picks.details),
            "seconds": round(time.monotonic() - begin, 3),
            "code_hash": code_hash,
            "code_files": code_files,
        }
        record = _write(output, picks, source, record)
    shutil.rmtree(output / ".parts", ignore_errors=True)
    _draw(output / "media", source.features, picks, rule, images, f"{name}, {keep:g} kept")
    return record


def _part_key(told: Mapping[str, Any], budget: Tensor, code_hash: str, rule: Rule) -> str:
    """What the result of a class depends on. An own rule's file counts too: `code_hash` is of the suite alone."""
    parts = [told, budget.tolist(), code_hash, sha256_file(getfile(type(rule)))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[None]:
    """Make the folder before the work; after bad input remove whatever the work made."""
    made = [place for place in (output, *output.parents) if not place.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if isinstance(error, (UserError, OSError)):
            shutil.rmtree(output / ".parts", ignore_errors=True)
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--output: cannot write {output} ({error.strerror or error})") from error
        raise


def _check_picks(picks: Picks, features: Features, rule: str) -> None:
    """A rule of one's own may be wrong."""
    tensors = (picks.index, picks.order, picks.score, picks.weight, picks.bin)
    if len({len(tensor) for tensor in tensors}) > 1:
        raise UserError(f"--rule: {rule} gave columns of different lengths: {[len(tensor) for tensor in tensors]}")
    inside = ((picks.index >= 0) & (picks.index < len(features))).all()
    if not inside or len(picks.index.unique()) < len(picks):
        raise UserError(f"--rule: {rule} gave positions outside of the {len(features):,} items, or one twice")
    if not (picks.weight.isfinite() & (picks.weight >= 0)).all():
        raise UserError(f"--rule: {rule} gave weights that are negative or not finite")


def _shares(kept: int, items: int, dropped: float) -> dict[str, Any]:
    """Share of the items, dropped share of each picture, and their product: what is stored of the data."""
    sampled = kept / items
    return {"items": items, "kept": kept, "rho_s": sampled, "theta": dropped, "rho": sampled * (1 - dropped)}


def _counts(picks: Picks, features: Features) -> list[dict[str, Any]]:
    """Of each class: its items, those kept, and of these how many of each bin."""
    items = features.label.bincount(minlength=features.num_classes).tolist()
    label = features.label[picks.index]
    counts = []
    for value, number in enumerate(items):
        own = picks.bin[label == value]
        bins = own[own >= 0].bincount(minlength=max(0, int(picks.bin.max()) + 1) if len(picks) else 0).tolist()
        counts.append({"label": value, "items": number, "kept": len(own), "bins": bins})
    return counts


def _plain(value: Any) -> Any:
    """As JSON has it: plain numbers, None for those that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(output: Path, picks: Picks, source: Source, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write the three files, the ``selection.json`` that is returned last: without it a folder holds no selection."""
    columns = {
        "index": source.origin[picks.index],
        "label": source.features.label[picks.index],
        "bin": picks.bin.long(),
        "order": picks.order.long(),
        "score": picks.score.float(),
        "weight": picks.weight.float(),
    }
    about = {key: record[key] for key in ("format", "split", "rule", "data", "features") if key in record}
    # One key: the order of several differs from process to process, and so would the file's bytes.
    content = save(columns, {"selection": json.dumps(about, sort_keys=True)})
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(columns)
    table.writerows(zip(*(_texts(column) for column in columns.values()), strict=True))
    described = {**record, "sha256": hashlib.sha256(content).hexdigest()}
    last = output / "selection.json"
    last.unlink(missing_ok=True)
    atomic_write(output / "selection.safetensors", content)
    atomic_write(output / "selection.csv", text.getvalue())
    atomic_write(last, json.dumps(described, indent=2, allow_nan=False) + "\n")
    return described


def _draw(
    folder: Path,
    features: Features,
    picks: Picks,
    rule: Rule,
    images: Callable[[Tensor], Tensor] | None,
    what: str,
) -> None:
    """Write the pictures of a selection, in place of those of an earlier one. what: for their titles."""
    from callbacks.pictures import render
    from lit_modules.adq import selection_pictures

    shutil.rmtree(folder, ignore_errors=True)
    score = None
    if isinstance(rule, ScoreRule):  # some rank an item among those of its class
        members = [class_members(features.label, label) for label in range(features.num_classes)]
        found = torch.cat([rule.score(features.take(own)) for own in members])
        score = torch.empty_like(found).index_copy(0, torch.cat(members), found)
    for picture, item in selection_pictures(features, picks, score, images).items():
        render(item, folder / picture, f"{picture.replace('_', ' ')} ({what})")


def _texts(column: Tensor) -> list[str]:
    """Numbers as text that reads back to the same number."""
    return [f"{value:.9g}" if column.is_floating_point() else str(value) for value in column.tolist()]


def default_output(features: Path, name: str, keep: float, seed: int, settings: Mapping[str, Any]) -> Path:
    """Where a selection goes by default: a folder of its own for every rule, share, seed and settings."""
    where = features.parent if features.is_file() else runs.run_of(features) / "artifacts"
    changed = f"_{hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:6]}"
    return where / "selection" / f"{name.rpartition('.')[2]}_{keep:g}_s{seed}{changed if settings else ''}"
