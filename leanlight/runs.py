"""Run folders: their settings, identity, summary, and the facts of machine and code that go with a result."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from leanlight.contracts.bank import BANK_RECORD
from leanlight.contracts.errors import UserError
from leanlight.contracts.files import DIGESTS, atomic_write, sha256_file

PROJECT = Path(__file__).resolve().parent.parent
_CODE_ROOTS = ("leanlight/contracts/", "leanlight/ops/", "lit_modules/", "datamodules/", "callbacks/")
# Files of these names never decide a number, so that a change in them must not make results look outdated. They draw
# (pictures, media), pack (export) or time (throughput) what has been computed, describe data whose content has a
# fingerprint of its own (catalog), tell of a run (bar, sending), or only list names (__init__: a new method does not
# change the others).
_CODE_THAT_DECIDES_NOTHING = (
    "pictures.py",
    "media.py",
    "export.py",
    "throughput.py",
    "catalog.py",
    "bar.py",
    "sending.py",
    "__init__.py",
)
# Trainer settings that decide numbers. The others (logging, progress bars, folders) do not change a run's identity.
_TRAINER_KEYS = [
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "max_time",
    "fast_dev_run",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "deterministic",
    "benchmark",
    "use_distributed_sampler",
    "sync_batchnorm",
    "callbacks",
    "plugins",
    "reload_dataloaders_every_n_epochs",
]
# Of the trainer: where a run is computed.
_SCALE_KEYS = {"accelerator", "strategy", "devices", "num_nodes", "use_distributed_sampler"}
_CONFIG_KEYS = {"seed": "seed_everything", "test": "run.test", "tf32": "run.tf32", "inputs": "run.inputs"}
_PLACE_KEYS = {"root", "download", "num_workers", "pin_memory"}  # where data lies, not what it is
_SPARE = ("previous.ckpt", DIGESTS)  # beside the checkpoints, in case they are damaged
_MANY_FILES = 1000  # a folder of more artefacts than this is one line of a summary
_PUBLISHED = Path("docs/results")
CARD = "README.md"  # in a folder that is exported, what it holds, for people and the Hugging Face hub
CARD_MARK = "<!-- leanlight: card -->"  # where the suite's own words begin in it
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # in the environment of what torchrun starts


def folder_name(value: str, where: str) -> str:
    """Return `value` if it is a plain folder name, which cannot lead out of the folder it is put in; else UserError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}", value):
        shown = value if len(value) <= 60 else value[:60] + "..."
        raise UserError(f"{where}: {shown!r} is not a folder name (at most 200 letters, digits, '.', '_' and '-')")
    return value


def results_folder(runs_root: Path, publish: bool) -> Path:
    """Folder of result files: published ones belong to the project, others lie with the runs they were made of."""
    return _PUBLISHED if publish else runs_root / "results"


# Arguments that came after results had been published: at their default a run is what it was without them. One whose
# name others had before is that of a class.
_LATER_DEFAULTS = {
    "predict_split": "test",
    "graph": False,
    "exchange": "states",
    "weights": None,
    "input_size": None,
    "leak": 0.0,
    "time_mode": "unrolled",
    "sigma": 0.0,
    "sfl_readout": "rate",
    "levels": 2,
    "train_items": None,
    "classes": None,
    "masked_loss": False,
    "scaler": False,
    "train_corruption": None,
    "pool": "flatten",
    "train_rest": False,
    "epoch_batches": None,
    "replicas": 1,
    "DatasetDistillation.lr_scheduler": None,
    "AdaptiveWindow.min_start": 0,
    "min_stage_epochs": 0,
    "redraw": "epoch",
    "eps_placement": "after",
    "outer_chunk": None,
    "evaluation.steps": None,
    "evaluation.classes_per_batch": None,
    "evaluation.images_per_class": None,
    "ImageAutoencoder.statistics": "eval",
    "feature_weights": None,
    "reference_statistics": None,
    "inception_weights": None,
    "shuffles": 1,
    "DatasetDistillation.init": None,
    "TrajectoryMatching.alignment": None,
    "without_augmentation": False,
    "layer_lag": False,
    "privacy": None,
}


@dataclass
class RunSettings:
    """Settings of a run.

    Args:
        method: folder under the runs root; by default the package of the model.
        dataset: folder under the method; by default the data's own name.
        id: name of the run folder; by default date, time and configuration hash.
        tags: W&B tags.
        notes: free text kept with the run.
        wandb: auto logs online when W&B has a key, offline otherwise.
        wandb_project: W&B project, and MLflow's experiment.
        experiment: what runs of one setting have in common, with any seed: the first part of their names in W&B and of
            their artefacts'; by default the config's name.
        tensorboard: also write TensorBoard's files, into the run folder.
        mlflow: also log to MLflow, in the run folder or on the server that MLFLOW_TRACKING_URI names.
        test: which weights to test when `fit` ends.
        tf32: let GPUs multiply float32 numbers with 10 bits of mantissa (TensorFloat-32): faster, but no float32.
        inputs: files and folders of earlier stages this run depends on, by name; their content is part of its identity.
    """

    method: str | None = None
    dataset: str | None = None
    id: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    wandb: Literal["auto", "offline", "online", "disabled"] = "auto"
    wandb_project: str = "leanlight"
    experiment: str | None = None
    tensorboard: bool = False
    mlflow: bool = False
    test: Literal["none", "last", "best"] = "last"
    tf32: bool = False
    inputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("method", "dataset", "id"):
            value = getattr(self, key)
            if value is not None:
                folder_name(value, f"run.{key}")


def content_digest(path: Path | str) -> str:
    """sha256 of a file, or one for all that a folder holds: of relative paths and contents, wherever the folder lies.

    Of a run folder only checkpoints and artefacts count, of any folder no pictures (``media``) and no card: logs,
    drawings and words change without changing what a later stage reads. Raises UserError when there is nothing.
    """
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise UserError(f"run.inputs: nothing at {path}")
    outputs = _outputs(path)
    if not outputs:
        raise UserError(f"run.inputs: {path} holds no file")
    digest = hashlib.sha256()
    for relative in outputs:
        digest.update(f"{sha256_file(os.path.join(path, relative))}  {relative}\n".encode())
    return digest.hexdigest()


def _outputs(folder: Path) -> list[str]:
    """What counts of a folder, as sorted relative paths."""
    parts = ("checkpoints", "artifacts") if (folder / "summary.json").is_file() else ("",)
    relative: list[str] = []
    for part in parts:
        for place, _, names in os.walk(folder / part):  # pathlib takes seconds for 100,000 files
            inside = Path(place).relative_to(folder)
            prefix = "" if inside == Path() else f"{inside.as_posix()}/"
            if "media" not in inside.parts:
                relative += [prefix + name for name in names if part != "checkpoints" or name not in _SPARE]
    return sorted(name for name in relative if not _is_card(folder / name))


def _is_card(path: Path) -> bool:
    return path.name == CARD and CARD_MARK.encode() in path.read_bytes()


def config_hash(resolved: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> str:
    """Hash of the identity of a run, 64 hex digits.

    Args:
        resolved: the configuration as `leanlight.experiment.resolve` gives it.
        inputs: name → file or folder of the stage inputs; each counts by the sha256 of its content, wherever its path,
            or a path inside it, stands in the configuration.
    """
    return identity_hash(identity(resolved, {str(path): content_digest(path) for path in (inputs or {}).values()}))


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Hash of what `identity` gives, 64 hex digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def identity(resolved: Mapping[str, Any], digests: Mapping[str, str], whole: bool = False) -> dict[str, Any]:
    """What decides a run's numbers, and nothing else.

    Args:
        resolved: the configuration as `leanlight.experiment.resolve` gives it.
        digests: path of a stage input → sha256 of its content.
        whole: also what is off or at a default that came after results had been published; for comparisons.
    """
    folders = sorted(digests, key=len, reverse=True)  # the innermost of nested folders first

    def without_place(text: str) -> str:
        for folder in folders:
            if text == folder or text.startswith(f"{folder}/"):
                return digests[folder] + text.removeprefix(folder)
        return text

    def clean(value: Any, of: str = "") -> Any:
        if isinstance(value, Mapping):
            defaults = {k.removeprefix(f"{of}."): v for k, v in _LATER_DEFAULTS.items()}
            later = {k for k, v in defaults.items() if value.get(k) == v and not whole}
            name = str(value.get("class_path", "")).rpartition(".")[2]
            return {str(k): clean(v, name or str(k)) for k, v in value.items() if k not in _PLACE_KEYS | later}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return without_place(str(value)) if isinstance(value, (str, Path)) else value

    trainer = resolved.get("trainer") or {}
    settings = resolved.get("run") or {}
    decides = {
        "model": resolved.get("model"),
        "data": resolved.get("data"),
        "trainer": {**{key: trainer.get(key) for key in _TRAINER_KEYS}, "devices": _devices(trainer)},
        "seed": resolved.get("seed_everything"),
        "test": settings.get("test"),
        "inputs": sorted(digests.values()),
    } | ({"tf32": settings.get("tf32")} if whole or settings.get("tf32") else {})
    compiled = resolved.get("compile") or {}
    if whole or compiled.get("backend") is not None:
        decides["compile"] = compiled
    robustness = resolved.get("robustness") or {}
    if whole or robustness.get("corruptions"):
        decides["robustness"] = robustness
    return dict(clean(decides))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Key of the configuration → [value before, value after] where two whole identities differ.

    A key that only one of them has does not count: arguments come and go with versions of the suite, and where one
    object took the place of another its ``class_path`` tells.
    """
    found = _differences(before, after)
    return {_CONFIG_KEYS.get(re.split(r"[.\[]", key)[0], key): found[key] for key in sorted(found)}


def computed_elsewhere(key: str) -> bool:
    """Whether a key that changed only says where a run is computed: it goes on there, as exactly as that allows."""
    return key.removeprefix("trainer.") in _SCALE_KEYS


def _differences(before: Any, after: Any, key: str = "") -> dict[str, list[Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        parts = [(f"{key}.{name}".lstrip("."), before[name], after[name]) for name in before if name in after]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        parts = [(f"{key}[{number}]", *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    else:
        return {} if before == after else {key: [before, after]}
    return {name: values for name, old, new in parts for name, values in _differences(old, new, name).items()}


def _devices(trainer: Mapping[str, Any]) -> Any:
    """Devices as they count for a run's identity.

    A run that names neither accelerator nor strategy takes one device. When results were published that default was
    called ``auto``, and by that name it still counts; whoever asks for ``auto`` today means all devices, -1.
    """
    devices = trainer.get("devices")
    if (trainer.get("accelerator"), trainer.get("strategy")) != ("auto", "auto"):
        return devices
    return "auto" if devices in (1, "1") else -1 if devices == "auto" else devices


def code_version(files: Iterable[str] | None = None) -> tuple[str, list[str]]:
    """Hash of the project's code that decides numbers: comments, docstrings and formatting are not in it.

    files: paths relative to the project; by default those imported so far. Returns (64 hex digits, the files). A file
    that is gone counts as empty, so that a removed file shows as a change.
    """
    if files is None:
        loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        ours = (name for name in loaded if name and any(root in name for root in _CODE_ROOTS))  # resolving all is slow
        paths = {Path(name).resolve() for name in ours}
        relative = (path.relative_to(PROJECT).as_posix() for path in paths if path.is_relative_to(PROJECT))
        files = [name for name in relative if name.startswith(_CODE_ROOTS) and _decides(name)]
    names = sorted(files)
    digest = hashlib.sha256()
    for name in names:
        path = PROJECT / name
        meaning = _meaning(path.read_bytes()) if path.is_file() else ""
        digest.update(f"{name}:{meaning}\n".encode())
    return digest.hexdigest(), names


def _decides(name: str) -> bool:
    return name.rpartition("/")[2] not in _CODE_THAT_DECIDES_NOTHING


@cache
def _meaning(source: bytes) -> str:
    """Hash of a Python file's syntax tree; of its bytes when it does not parse. A file is parsed once a process."""
    try:
        return hashlib.sha256(_text(ast.parse(source)).encode()).hexdigest()
    except (SyntaxError, ValueError):
        return hashlib.sha256(source).hexdigest()


def _text(node: Any) -> str:
    """A syntax tree as the text of nested tuples, without positions, texts that are statements (docstrings) and empty
    fields.

    All other constants stay, texts too: a string may be a key or a mode. Empty fields go because each Python version
    adds some, and an upgrade of Python must not outdate results. Written at once, for each run hashes its code.
    """
    if isinstance(node, list):
        parts = [_text(item) for item in node if not (isinstance(item, ast.Expr) and _is_text(item.value))]
        return f"[{', '.join(parts)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, getattr(node, name, None)) for name in node._fields]
    parts = [f"('{name}', {_text(value)})" for name, value in fields if value is not None and value != []]
    return f"('{type(node).__name__}', {', '.join(parts)})" if parts else f"('{type(node).__name__}',)"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _git(*arguments: str) -> str:
    # Without the lock that `status` takes to refresh the index: one that is cut off by the timeout leaves it behind.
    command = ["git", "--no-optional-locks", "-C", str(PROJECT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@cache
def commit() -> tuple[str, bool]:
    """Commit of the project and whether tracked files differ from it; ("", False) outside a git checkout."""
    return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--untracked-files=no"))


@cache
def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, memory, GPUs, versions. Never host, user or path."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    facts: dict[str, Any] = {
        "cpu": names[0].strip() if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "gpus": [],
    }
    for package in ("torch", "lightning", "torchmetrics", "spikingjelly"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def new_run_id(identity: str, place: Path, nodes: int = 1) -> str:
    """Name of a run folder inside `place` that is not there yet; under SLURM that of the job, on every process."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm-{job}"
    if nodes > 1 and _TORCHRUN not in os.environ:
        raise UserError("run.id: several nodes need torchrun, SLURM or --run.id NAME, so that all share one folder")
    name = f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{identity[:6]}"
    taken = 1  # two starts in a second, or a clock that was set back
    while (place / (name if taken == 1 else f"{name}-{taken}")).exists():
        taken += 1
    return name if taken == 1 else f"{name}-{taken}"


def told_by_rank_zero(folder: Path) -> Path:
    """The folder that the first process of a launch by torchrun chose, on all of its processes; else `folder`."""
    if _TORCHRUN not in os.environ:
        return folder
    store, rank = _launch_store()
    begun = f"leanlight {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # one store may serve a launch that restarts
    key = f"{begun} folder {store.add(f'{begun} rank {rank}', 1)}"  # of a process's first run, its second, ...
    if rank == 0:
        store.set(key, str(folder))
    return Path(store.get(key).decode())


@cache  # the process that serves it must keep it
def _launch_store() -> tuple[Any, int]:
    """Where processes of a torchrun launch tell one another before they are a process group, and this one's rank."""
    from torch.distributed import rendezvous

    store, rank, _ = next(iter(rendezvous("env://")))
    return store, rank


def read_summary(run_dir: Path | str) -> dict[str, Any] | None:
    """Return a run's summary.json, or None when there is none."""
    path = Path(run_dir) / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def run_of(path: Path) -> Path:
    """The run folder that a file or folder belongs to, or `path` itself where it belongs to none."""
    return next((place for place in (path, *path.parents) if (place / "summary.json").is_file()), path)


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json atomically; on a full disk at least what became of the run, into the space of the old one."""
    path = run_dir / "summary.json"
    try:
        atomic_write(path, json.dumps(summary, indent=2, default=str) + "\n")
    except OSError:
        before = read_summary(run_dir)
        if before is None or summary["status"] in ("running", "finished"):
            raise
        # Shorter than the old one, so that it needs no new block: a resumed run lists its code again.
        short = {**before, "status": summary["status"], "error": str(summary["error"])[:200], "code_files": []}
        with open(path, "r+") as file:
            file.write(json.dumps(short, indent=2) + "\n")
            file.truncate()


def find_runs(root: Path | str) -> list[Path]:
    """Every run folder under `root` (``<method>/<dataset>/<run id>``), sorted."""
    return sorted(path.parent for path in Path(root).glob("*/*/*/summary.json"))


def list_artifacts(run_dir: Path) -> list[dict[str, Any]]:
    """Checkpoints and artefacts of a run with size and sha256, pictures left out; a folder that is a bank, or of very
    many files, as one."""
    files = [*run_dir.glob("checkpoints/*.ckpt"), *run_dir.glob("artifacts/**/*")]
    places: dict[Path, list[Path]] = {}
    for path in files:
        if path.is_file() and path.name not in _SPARE and "media" not in path.relative_to(run_dir).parts:
            top = run_dir.joinpath(*path.relative_to(run_dir).parts[:2])  # checkpoints/last.ckpt, artifacts/export
            places.setdefault(top, []).append(path)
    whole = {top for top, inside in places.items() if len(inside) > _MANY_FILES or (top / BANK_RECORD).is_file()}
    listed = [item for top, inside in places.items() for item in ([top] if top in whole else inside)]
    sizes = {top: sum(path.stat().st_size for path in inside) for top, inside in places.items()}
    return [
        {
            "path": path.relative_to(run_dir).as_posix(),
            "sha256": content_digest(path),
            "bytes": path.stat().st_size if path.is_file() else sizes[path],
        }
        for path in sorted(listed)
    ]
