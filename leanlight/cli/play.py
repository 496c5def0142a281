"""`leanlight play`: let a trained agent play episodes; print the scores, write an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanlight.cli.arguments import Parser, add_trust, number, output_file
from leanlight.contracts.errors import UserError
from leanlight.contracts.ranges import PositiveInt, Seed, UnitInterval

if TYPE_CHECKING:
    from leanlight.contracts import GameData


def main(argv: list[str]) -> int:
    """Play with a run's last or best agent, or with one of a checkpoint file."""
    parser = Parser(prog="leanlight play", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint file")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which one of a run folder")
    parser.add_argument(
        "--episodes", type=number(PositiveInt), default=5, help="how many to play (default: %(default)s)"
    )
    parser.add_argument(
        "--epsilon", type=number(UnitInterval), help="probability of a random action (default: as in evaluation)"
    )
    parser.add_argument("--seed", type=number(Seed), default=0, help="of the first episode; the others follow")
    parser.add_argument(
        "--pictures", type=number(PositiveInt), default=1000, help="of the first episode (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=output_file, help="GIF to write; by default artifacts/play.gif in the run folder"
    )
    add_trust(parser)
    args = parser.parse_args(argv)
    run, checkpoint = _locate(args.source, args.checkpoint)
    data = _games(run, args.epsilon, args.trust)

    from leanlight.experiment import load

    agent: Any = load(checkpoint, trust=args.trust)
    if not hasattr(agent, "values"):
        raise UserError(f"source: {checkpoint} holds a {type(agent).__name__}, which plays no games")
    seeds = list(range(args.seed, args.seed + args.episodes))
    episodes = data.play(seeds, agent.values, args.pictures)
    _report(seeds, episodes, data)
    print(_draw(episodes[0], args.output or run / "artifacts" / "play.gif"))
    return 0


def _locate(source: Path, which: str) -> tuple[Path, Path]:
    """The run folder and the checkpoint file."""
    checkpoint = source / "checkpoints" / f"{which}.ckpt" if source.is_dir() else source
    if not checkpoint.is_file():
        raise UserError(f"source: no checkpoint at {checkpoint}")
    run = source if source.is_dir() else source.resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise UserError(f"source: expected a checkpoint inside its run folder, whose config.yaml names the game; {run}")
    return run, checkpoint


def _games(run: Path, epsilon: float | None, trust: Sequence[str]) -> GameData:
    """The DataModule of a run."""
    from leanlight.contracts import GameData
    from leanlight.experiment import load_data

    data = load_data(run, {} if epsilon is None else {"eval_epsilon": epsilon}, trust)
    if not hasattr(data, "play"):
        raise UserError(f"source: {run} was trained on {type(data).__name__}, which is no game")
    data.ensure_available()
    data.setup("test")
    assert isinstance(data, GameData)
    return data


def _report(seeds: list[int], episodes: list[Any], data: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=data.meta.name, title_justify="left")
    for column in ("seed", "score", "decisions", "largest Q"):
        table.add_column(column, justify="right")
    for seed, episode in zip(seeds, episodes, strict=True):
        table.add_row(str(seed), f"{episode.score:g}", str(episode.decisions), f"{episode.max_q:.3f}")
    console = Console(highlight=False)
    console.print(table)
    mean = sum(episode.score for episode in episodes) / len(episodes)
    meta = data.meta
    known = meta.random_score is not None and meta.human_score is not None
    note = f"; random {meta.random_score:g}, human or best {meta.human_score:g}" if known else ""
    console.print(f"mean score {mean:g}{note}")


def _draw(episode: Any, path: Path) -> Path:
    """Write the pictures of an episode as a GIF."""
    from callbacks.pictures import render
    from leanlight.contracts import Animation

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror})") from error
    frames = episode.frames.float() / 255
    return render(Animation(frames, fps=15.0 if len(frames) > 60 else 5.0), path.with_suffix(""), "play")
