"""Find configs by name: ``classifier/fashion_mnist_small`` or ``trainer/ddp`` instead of a path."""

from __future__ import annotations

from pathlib import Path

from leanlight.contracts.errors import UserError, nearest
from leanlight.registry import METHODS, config_root, methods

_PARTS = ("pipelines", "tables")  # folders whose files are complete, whatever their names


def config_names() -> list[str]:
    """Every config by name, those of installed packages too, sorted; `defaults` is read always and not named."""
    root = config_root()
    names = {path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")} - {"defaults"}
    for name, info in methods().items():
        if name not in METHODS:
            names.update([*info.configs, *info.tables, *info.pipelines])
    return sorted(names)


def find_config(name: str) -> Path:
    """Return the file `name` stands for: a path, or a config's name with or without ``configs/`` and ``.yaml``.

    Raises UserError with the nearest name when there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if (found := config_root() / f"{short}.yaml").is_file():
        return found
    head, _, rest = short.partition("/")
    if head in methods() and (found := methods()[head].folder / f"{rest}.yaml").is_file():
        return found
    raise UserError(
        f"config {name!r}: neither a file nor a config of the suite{nearest(short, config_names())}; "
        "`leanlight methods --configs` lists them"
    )


def find_configs(name: str) -> list[Path]:
    """Return the files that make up the config `name`, each laid over those before it.

    ``a__b`` is an overlay: it holds only what it changes of ``a``, which lies beside it. Any other config is one file.
    """
    path = find_config(name)
    base, overlay, _ = path.stem.partition("__")
    if not base or not overlay or path.parent.name in _PARTS:
        return [path]
    below = path.with_name(f"{base}.yaml")
    if not below.is_file():
        raise UserError(f"config {name!r}: an overlay of {base!r} by its name, but there is no file {below}")
    return [below, path]
