"""Benchmark of emotion recognition: nearest anchors, lists, what TiCAL costs over attention fusion, MulT, Lightning."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datamodules import EmotionDataModule, PlantedConflicts
from leanlight.benchmarks.core import (
    QUIET,
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    one_thread,
    ratios,
    summarise,
    within,
)
from leanlight.benchmarks.gpu.checks import Check, Found, near
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import Modality, MultimodalBatch
from lit_modules.tical import (
    AnchorLists,
    AttentionFusion,
    ConsistencyAssessment,
    EmotionNetwork,
    EmotionRecognition,
    Encoding,
    Facts,
    Geometry,
    LabelTree,
    LateFusion,
    MulT,
    ThreeStages,
)
from lit_modules.tical.reference import JoinedLists, PublishedMulT, broadcast_nearest, train_step

_WIDTHS = {"text": 768, "audio": 5, "video": 20}  # of MMSA's aligned features of MOSI
_CLASSES = 7


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        queries: points whose nearest anchor is sought (B).
        anchors: of a list (Q).
        dim: d, of points and of the networks' vectors.
        batch: clips of a step (N).
        steps: of a sequence (L), as MOSI's aligned features have.
        mult_dim: d of MulT; 50 is published for MOSI.
        mult_levels: layers of each of its transformers.
        rounds: that count.
        lightning: planted clips for training in the fit.
        fit_steps: of the fit that count.
    """

    queries: int
    anchors: int
    dim: int
    batch: int
    steps: int
    mult_dim: int
    mult_levels: int
    rounds: int
    lightning: int
    fit_steps: int


_FULL = Sizes(256, 2_048, 128, 64, 50, 50, 4, 10, 900, 40)
_QUICK = Sizes(16, 64, 8, 8, 5, 10, 1, 2, 100, 3)


@one_thread()
def run(quick: bool = False) -> Measurement:
    """Measure on one thread of the CPU.

    quick: tiny sizes: figures without meaning.
    """
    sizes = _QUICK if quick else _FULL
    measured = Measurement(settings={**vars(sizes), "widths": _WIDTHS, "threads": 1})
    parts: dict[str, Callable[[Sizes, Measurement], None]] = {
        "nearest anchors": measure_nearest,
        "lists": measure_lists,
        "steps": measure_steps,
        "MulT": measure_mult,
        "Lightning": measure_lightning,
    }
    for name, part in parts.items():
        with Console(stderr=True).status(f"tical: {name}"):
            part(sizes, measured)
    return measured


# -- what is worked on


def facts_of(sequences: bool, steps: int) -> Facts:
    """Modalities of MOSI's widths, as vectors or as sequences."""
    modalities = {name: Modality(width, steps if sequences else 0) for name, width in _WIDTHS.items()}
    return Facts(modalities, tuple(map(str, range(_CLASSES))), None, {}, ())


def batch_of(facts: Facts, clips: int) -> MultimodalBatch:
    """Random features and classes; sequences are full."""
    draws = torch.Generator().manual_seed(0)
    shapes = {name: (clips, one.longest, one.width) if one.longest else (clips, one.width)
              for name, one in facts.modalities.items()}  # fmt: skip
    return MultimodalBatch(
        features={name: torch.randn(shape, generator=draws) for name, shape in shapes.items()},
        length={name: torch.full((clips,), one.longest) for name, one in facts.modalities.items() if one.longest},
        present={name: torch.ones(clips, dtype=torch.bool) for name in facts.modalities},
        label=torch.randint(_CLASSES, (clips,), generator=draws),
        score=None,
        unimodal={},
        conflict=None,
        index=torch.arange(clips),
    )


def points_of(count: int, dim: int, seed: int = 0) -> Tensor:
    """(count, d) points of Poincaré's ball, on their way to its rim."""
    return Geometry().points(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) / dim**0.5)


def fill(lists: AnchorLists, dim: int) -> None:
    """Put an anchor in every place, of clips that no batch has."""
    count = lists.length
    points = {name: points_of(count, dim, seed) for seed, name in enumerate(lists.modalities)}
    label, clip = torch.arange(count) % _CLASSES, torch.arange(count) + 1_000_000
    lists.add(points, label, clip, torch.ones(count, dtype=torch.bool), torch.full((count,), 0.9))


def network_of(body: type[nn.Module], sizes: Sizes, sequences: bool, assessed: bool = False) -> EmotionNetwork:
    """A network with the encoders that all have, and full lists where clips are assessed."""
    torch.manual_seed(0)
    facts = facts_of(sequences, sizes.steps)
    assessment = ConsistencyAssessment(dim=sizes.dim, length=sizes.anchors) if assessed else None
    made = body(facts.modalities, _CLASSES, encoding=Encoding(sizes.dim))
    network = EmotionNetwork(made, facts, _CLASSES, assessment).train()
    if network.lists is not None:
        fill(network.lists, sizes.dim)
        network.assessing = True
    return network


def step_of(network: EmotionNetwork, batch: MultimodalBatch) -> Callable[[], None]:
    """A training step with Adam, of TiCAL with its tree and its lists."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    tree = None if network.assessment is None else LabelTree.ordinal(_CLASSES).to(batch.label.device)
    return functools.partial(train_step, network, optimizer, batch, tree)


def mult_of(sizes: Sizes) -> MulT:
    """MulT with its published dropout."""
    torch.manual_seed(0)
    made = {"dim": sizes.mult_dim, "levels": sizes.mult_levels, "memory_levels": sizes.mult_levels}
    return MulT(facts_of(True, sizes.steps).modalities, _CLASSES, **made)


# -- anchors


class _Largest(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that an operation has made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(each.numel() for each in tree_leaves(made) if isinstance(each, Tensor))])
        return made


def measure_nearest(sizes: Sizes, measured: Measurement) -> None:
    """The nearest anchor by a matrix product, beside all differences (B, Q, d)."""
    query, anchors = points_of(sizes.queries, sizes.dim, 1), points_of(sizes.anchors, sizes.dim, 2)
    geometry, allowed = Geometry(), torch.ones(sizes.anchors, dtype=torch.bool)
    ways = {
        "product": functools.partial(geometry.nearest, query, anchors, allowed),
        "broadcast": functools.partial(broadcast_nearest, query, anchors),
    }
    distance, position = ways["product"]()
    expected, place = broadcast_nearest(query.double(), anchors.double())
    measured.checks["nearest anchors: those of all differences in float64"] = torch.equal(position, place)
    text = "nearest anchors: their distances within 1e-5 of the largest"
    measured.checks[text] = within(distance.double(), expected, 1e-5)
    with _Largest() as largest:
        ways["product"]()
    most = max(sizes.queries * sizes.anchors, (sizes.dim + 2) * max(sizes.queries, sizes.anchors))
    measured.checks["nearest anchors: no tensor (B, Q, d) is made"] = largest.entries <= most
    seconds = interleave(ways, sizes.rounds)
    for name, found in seconds.items():
        measured.figures[f"nearest/{name}"] = summarise([1000 * each for each in found], "ms")
    speedup = ratios(seconds["broadcast"], seconds["product"])
    measured.figures["nearest/speedup"] = summarise(speedup, "x", "higher")
    text = "the nearest anchor is found at least 20 times as fast as from all differences"
    measured.targets.append(Target("nearest/speedup", 20.0, text))


def measure_lists(sizes: Sizes, measured: Measurement) -> None:
    """Anchors of a step, written into their places, beside lists that are joined and cut."""
    names = tuple(_WIDTHS)
    ring, joined = AnchorLists(names, _CLASSES, sizes.dim, sizes.anchors), JoinedLists(names, sizes.dim, sizes.anchors)
    points = {name: points_of(sizes.batch, sizes.dim, seed) for seed, name in enumerate(names)}
    draws = torch.Generator().manual_seed(0)
    label, clip = torch.randint(_CLASSES, (sizes.batch,), generator=draws), torch.randperm(sizes.batch, generator=draws)
    chosen, confidence = (torch.rand(sizes.batch, generator=draws) < 0.7), torch.full((sizes.batch,), 0.9)
    ways = {
        "written": functools.partial(ring.add, points, label, clip, chosen, confidence),
        "joined": functools.partial(joined.add, points, label, clip, chosen),
    }
    for _ in range(2 * sizes.anchors // int(chosen.sum())):  # full, and once around
        for way in ways.values():
            way()
    seconds = interleave(ways, 5 * sizes.rounds)
    begin = [int(written) % sizes.anchors for written in ring.written]
    same = all(
        torch.equal(ring.points[m, : sizes.anchors].roll(-begin[m], 0), joined.points[name])
        and torch.equal(ring.label[m, : sizes.anchors].roll(-begin[m]), joined.label[name])
        for m, name in enumerate(names)
    )
    measured.checks["lists: anchors of the joined ones, in their order, bit for bit"] = same
    for name, found in seconds.items():
        measured.figures[f"lists/{name}"] = summarise([1000 * each for each in found], "ms a step")
    measured.figures["lists/speedup"] = summarise(ratios(seconds["joined"], seconds["written"]), "x", "higher")


# -- steps


def measure_steps(sizes: Sizes, measured: Measurement) -> None:
    """A step of TiCAL beside one of attention fusion, of vectors and of sequences, and the assessment's share in it."""
    for kind, sequences in (("vectors", False), ("sequences", True)):
        batch = batch_of(facts_of(sequences, sizes.steps), sizes.batch)
        tical = network_of(ThreeStages, sizes, sequences, assessed=True)
        points = tical.judge(batch.features, batch.length, batch.present, batch.index).points
        points = {name: point.detach() for name, point in points.items()}
        assert tical.assessment is not None
        assert tical.lists is not None
        ways: dict[str, Callable[[], object]] = {
            "tical": step_of(tical, batch),
            "attention": step_of(network_of(AttentionFusion, sizes, sequences), batch),
            "assessment": functools.partial(tical.assessment.assess, points, tical.lists, batch.index, batch.present),
        }
        seconds = interleave(ways, sizes.rounds)
        for name, found in seconds.items():
            measured.figures[f"{kind}/{name}"] = summarise([1000 * each for each in found], "ms")
        over = ratios(seconds["tical"], seconds["attention"])
        measured.figures[f"{kind}/tical_over_attention"] = summarise(over, "x")
        share = [100 * each for each in ratios(seconds["assessment"], seconds["tical"])]
        measured.figures[f"{kind}/assessment_share"] = summarise(share, "%")
        text = f"a step of TiCAL on {kind} takes at most 2.5 times one of attention fusion with the same encoders"
        measured.targets.append(Target(f"{kind}/tical_over_attention", 2.5, text))
        text = f"on {kind} the assessment takes at most 20 % of a step"
        measured.targets.append(Target(f"{kind}/assessment_share", 20.0, text))


def measure_mult(sizes: Sizes, measured: Measurement) -> None:
    """A step of MulT, beside its layers in the order of the published code."""
    batch = batch_of(facts_of(True, sizes.steps), sizes.batch)
    network = mult_of(sizes)
    published = PublishedMulT(network)
    exact, other = network.double().eval(), PublishedMulT(network).double().eval()
    features = {name: x.double() for name, x in batch.features.items()}
    found = exact(features, batch.length, batch.present).output
    text = "MulT: outputs of the published order of its layers, float64, within 1e-6 of the largest"
    measured.checks[text] = within(found, other(features), 1e-6)
    network.float().train()

    def ours() -> Tensor:
        return F.cross_entropy(network(batch.features, batch.length, batch.present).output, batch.label)

    def theirs() -> Tensor:
        return F.cross_entropy(published(batch.features), batch.label)

    ways = {
        "ours": network_step(network, ours, sizes.batch).run,
        "published": network_step(published, theirs, sizes.batch).run,
    }
    seconds = interleave(ways, max(sizes.rounds // 2, 2), warmup=1)
    for name, times in seconds.items():
        measured.figures[f"mult/{name}"] = summarise([1000 * each for each in times], "ms")
    measured.figures["mult/ours_over_published"] = summarise(ratios(seconds["ours"], seconds["published"]), "x")
    text = "a step of MulT takes no longer than in the order of the published code"
    measured.targets.append(Target("mult/ours_over_published", 1.0, text))


def measure_lightning(sizes: Sizes, measured: Measurement) -> None:
    """What a step takes more under Lightning than in a plain loop over a copy of the network."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    planted = PlantedConflicts(train=sizes.lightning)
    data = EmotionDataModule("planted", planted=planted, batch_size=sizes.batch, seed=0)
    torch.manual_seed(0)
    # Without dropout, so that both draw alike: nothing.
    network = functools.partial(ThreeStages, encoding=Encoding(sizes.dim, dropout=0.0))
    assessment = ConsistencyAssessment(dim=sizes.dim, length=sizes.anchors, warmup_epochs=0)
    module = EmotionRecognition(network, assessment, class_weights=False, seed=0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = Path(folder) / "times.json"
        probe = StepProbe(output, "lit_modules.tical.reference:BareEmotionStep", warmup=1)
        limits: dict[str, Any] = {"max_steps": sizes.fit_steps + 2, "limit_val_batches": 0, "default_root_dir": folder}
        pl.Trainer(accelerator="cpu", callbacks=[probe], **limits, **QUIET).fit(module, datamodule=data)
        report = json.loads(output.read_text())
    more = [100 * (cycle / bare - 1) for cycle, bare in zip(report["cycle"], report["bare"], strict=True)]
    measured.figures["lightning/more_than_plain_loop"] = summarise(more, "%")
    text = "a step under Lightning takes at most 3 % more than in a plain loop"
    measured.targets.append(Target("lightning/more_than_plain_loop", 3.0, text))
    measured.checks["Lightning: same weights as the plain loop, bit for bit"] = report["equal"]


# -- on a GPU


def paper_steps(where: str, quick: bool = False) -> Mapping[str, Callable[[], PaperStep]]:
    """TiCAL, attention and late fusion, and MulT, on sequences as long as MOSI's."""
    sizes = _QUICK if quick else _FULL
    batch = batch_of(facts_of(True, sizes.steps), sizes.batch)

    def tical() -> PaperStep:
        network = network_of(ThreeStages, sizes, True, assessed=True).to(where)
        return PaperStep(step_of(network, batch.to(where)), sizes.batch, network.body.compile)

    def other(make: Callable[[], nn.Module]) -> PaperStep:
        network, moved = make().to(where), batch.to(where)

        def loss() -> Tensor:
            return F.cross_entropy(network(moved.features, moved.length, moved.present).output, moved.label)

        return network_step(network, loss, sizes.batch)

    bodies = {"attention": AttentionFusion, "lf_dnn": LateFusion}
    makers = {name: lambda body=body: network_of(body, sizes, True).body for name, body in bodies.items()}
    makers["mult"] = functools.partial(mult_of, sizes)
    return {"tical": tical} | {name: functools.partial(other, make) for name, make in makers.items()}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    what = "nearest anchors on the GPU are the CPU's"
    yield Check("tical", "nearest", what, functools.partial(same_nearest, where))
    what = "lists of anchors on the GPU are the CPU's, bit for bit"
    yield Check("tical", "lists", what, functools.partial(same_lists, where))
    what = "consistency on the GPU is the CPU's within 1e-4"
    yield Check("tical", "consistency", what, functools.partial(same_consistency, where))


def same_nearest(where: str) -> Found:
    """How many points have another nearest anchor."""
    query, anchors, allowed = points_of(200, 32, 1), points_of(500, 32, 2), torch.ones(500, dtype=torch.bool)
    here, there = (
        Geometry().nearest(query.to(device), anchors.to(device), allowed.to(device))[1].cpu()
        for device in ("cpu", where)
    )
    return near(int((here != there).sum()), 0, 0)


def same_lists(where: str) -> Found:
    """How many entries of lists differ after steps that fill them twice."""
    kept = []
    for device in ("cpu", where):
        lists = AnchorLists(("text", "audio"), _CLASSES, 16, 100).to(device)
        for seed in range(10):
            points = {name: points_of(40, 16, seed).to(device) for name in lists.modalities}
            label, clip = (torch.arange(40) % _CLASSES).to(device), torch.arange(40).flip(0).to(device)
            lists.add(points, label, clip, clip % 3 > 0, clip / 40)
        kept.append([lists.points.cpu(), lists.label.cpu(), lists.clip.cpu()])
    return near(sum(int((here != there).sum()) for here, there in zip(*kept, strict=True)), 0, 0)


def same_consistency(where: str) -> Found:
    """The largest difference of κ."""
    network = network_of(ThreeStages, _QUICK, True, assessed=True).eval()
    batch, found = batch_of(network.facts, 64), []
    with torch.no_grad():
        for device in ("cpu", where):
            network, own = network.to(device), batch.to(device)
            found.append(network(own.features, own.length, own.present)["consistency"].cpu())
    return near(float((found[1] - found[0]).abs().max()), 0.0, 1e-4)
