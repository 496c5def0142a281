"""Find configs by name: ``classifier/fashion_mnist_small`` or ``trainer/ddp`` instead of a path."""

from __future__ import annotations

from pathlib import Path

from leanlight.contracts.errors import UserError, nearest


def config_root() -> Path:
    """Folder of the suite's configs: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Every config by name, sorted; `defaults` is read always and not named."""
    root = config_root()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml") if path.stem != "defaults"
    )


def find_config(name: str) -> Path:
    """Return the file `name` stands for: a path, or a config's name with or without ``configs/`` and ``.yaml``.

    Raises UserError with the nearest name when there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    found = config_root() / f"{short}.yaml"
    if found.is_file():
        return found
    raise UserError(
        f"config {name!r}: neither a file nor a config of the suite{nearest(short, config_names())}; "
        "`leanlight methods --configs` lists them"
    )
