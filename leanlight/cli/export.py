"""`leanlight export`: write a trained model so that it works without this suite."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from leanlight.cli.arguments import Parser
from leanlight.contracts.errors import UserError


def load_module(checkpoint: Path) -> Any:
    """Rebuild the module a checkpoint was written by, in evaluation mode on the CPU. Raises UserError."""
    import torch

    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{checkpoint}: not a readable checkpoint ({type(error).__name__})") from error
    class_path = saved.get("hyper_parameters", {}).get("_class_path")
    if class_path is None:
        class_path = saved.get("leanlight_class_path")
    if class_path is None:
        raise UserError(f"{checkpoint}: does not say which module wrote it; export it from Python with module.export()")
    package, _, name = class_path.rpartition(".")
    module_class = getattr(import_module(package), name)
    return module_class.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()


def parser() -> Parser:
    """The command's options; a pipeline checks a stage's options with it."""
    parser = Parser(prog="leanlight export", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint file")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which one of a run folder")
    parser.add_argument("--output", type=Path, help="folder to write; by default artifacts/export in the run folder")
    return parser


def main(argv: list[str]) -> int:
    """Export a run's last or best model, or one checkpoint."""
    args = parser().parse_args(argv)
    if args.source.is_dir():
        checkpoint = args.source / "checkpoints" / f"{args.checkpoint}.ckpt"
        output = args.output or args.source / "artifacts" / "export"
    else:
        checkpoint, output = args.source, args.output or args.source.with_suffix("")
    if not checkpoint.is_file():
        raise UserError(f"source: no checkpoint at {checkpoint}")
    module = load_module(checkpoint)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write {output} ({error.strerror})") from error
    for path in module.export(output):
        print(path)
    return 0
