"""Benchmark of session recommendation: graphs and metrics against loops, what HID costs, softmax, clusters, sizes."""

from __future__ import annotations

import copy
import functools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor, nn

from datamodules import Planted, SessionDataModule
from leanlight.benchmarks.core import (
    QUIET,
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    one_thread,
    peak_memory_mb,
    ratios,
    summarise,
    within,
)
from leanlight.benchmarks.gpu.checks import Check, Found, near
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import Catalogue, SessionBatch, Sessions
from lit_modules.hid import (
    GCEGNN,
    SRGNN,
    STAMP,
    Backbone,
    GRU4Rec,
    HybridIntents,
    ICLoss,
    Intents,
    Scoring,
    SessionRecommender,
    ranking_metrics,
    session_graph,
    top_k,
)
from lit_modules.hid.reference import encode_one, loop_metrics, loop_session_graphs

_KS = (5, 10, 20)
_FORMS: dict[str, ICLoss | None] = {"without": None, "paper": ICLoss(), "released": ICLoss("released")}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        items: of the catalogue (m), of the published Diginetica.
        dim: d.
        batch: cases of a step (N).
        intents: n.
        cases: that metrics go through.
        catalogues: numbers of items that are compared, the largest last.
        chunk: items of a piece of the softmax.
        rounds: that count.
        clusters: planted sessions whose categories are clustered.
        lightning: planted sessions of the fit.
        steps: of the fit that count.
    """

    items: int
    dim: int
    batch: int
    intents: int
    cases: int
    catalogues: tuple[int, ...]
    chunk: int
    rounds: int
    clusters: Planted
    lightning: Planted
    steps: int


_FULL = Sizes(
    items=43_097,
    dim=100,
    batch=100,
    intents=200,
    cases=1_000,
    catalogues=(10_000, 50_000, 200_000),
    chunk=8_192,
    rounds=10,
    clusters=Planted(intents=157, categories=73, items=5, max_length=12, train_sessions=128_000),
    lightning=Planted(items=200, train_sessions=10_000),
    steps=30,
)
_QUICK = Sizes(
    items=300,
    dim=8,
    batch=10,
    intents=5,
    cases=20,
    catalogues=(100, 200),
    chunk=50,
    rounds=2,
    clusters=Planted(train_sessions=200, test_sessions=20),
    lightning=Planted(train_sessions=100, test_sessions=20),
    steps=3,
)


@one_thread()
def run(quick: bool = False) -> Measurement:
    """Measure on one thread of the CPU.

    quick: tiny sizes: figures without meaning.
    """
    sizes = _QUICK if quick else _FULL
    measured = Measurement(settings={"items": sizes.items, "d": sizes.dim, "batch": sizes.batch, "n": sizes.intents})
    measured.settings |= {"catalogues": list(sizes.catalogues), "chunk": sizes.chunk, "threads": 1}
    measured.settings |= {"cases": sizes.cases, "planted": vars(sizes.lightning)}
    parts: dict[str, Callable[[Sizes, Measurement], None]] = {
        "equality": check_equality,
        "graphs": measure_graphs,
        "metrics": measure_metrics,
        "steps": measure_steps,
        "softmax": measure_softmax,
        "sizes of the catalogue": measure_catalogues,
        "memory": measure_memory,
        "clusters": measure_clusters,
        "Lightning": measure_lightning,
    }
    for name, part in parts.items():
        with Console(stderr=True).status(f"hid: {name}"):
            part(sizes, measured)
    return measured


# -- what is worked on


def batch_of(cases: int, items: int, mean: float = 5.0, longest: int = 70) -> SessionBatch:
    """Cases of random clicks, the first items clicked most; lengths fall off as in published data.

    Args:
        cases: N.
        items: m.
        mean: of the lengths before they are cut.
        longest: clicks of a case at most.
    """
    draws = torch.Generator().manual_seed(0)
    length = (1 - torch.rand(cases, generator=draws)).log().div(-1 / mean).long().clamp(1, longest)
    clicks = 1 + (torch.rand(cases, int(length.max()) + 1, generator=draws) ** 3 * items).long()
    # One click in five comes back to the one before the last.
    again = torch.rand(clicks.shape, generator=draws) < 0.2
    clicks = torch.where(again, clicks.roll(2, 1), clicks)
    known = torch.arange(clicks.shape[1] - 1) < length[:, None]
    target = clicks.gather(1, length[:, None]).squeeze(1)
    return SessionBatch(clicks[:, :-1] * known, length, target, torch.arange(cases))


def catalogue_of(items: int) -> Catalogue:
    """Items without categories; the first fifth is the head."""
    none, clicks = torch.zeros(0, dtype=torch.int64), torch.arange(items + 1, 0, -1)
    clicks[0] = 0
    head = torch.arange(items + 1) <= items // 5
    head[0] = False
    return Catalogue(tuple(map(str, range(1, items + 1))), (), none, none, clicks, head)


def networks(items: int, dim: int) -> dict[str, Callable[[], Backbone]]:
    """What makes each backbone; the graph of items is that of random sessions."""

    def gcegnn() -> Backbone:
        network, batch = GCEGNN(items, dim), batch_of(2_000, items)
        offsets = nn.functional.pad(batch.length.cumsum(0), (1, 0))
        network.prepare(catalogue_of(items), Sessions(batch.items[batch.items > 0], offsets))
        return network

    plain = {"stamp": STAMP, "gru4rec": GRU4Rec, "srgnn": SRGNN}
    return {**{name: functools.partial(kind, items, dim) for name, kind in plain.items()}, "gcegnn": gcegnn}


def intents_of(items: int, count: int) -> Intents:
    """Every item in one of so many intents."""
    return Intents(torch.arange(1, items + 1), torch.arange(items) % count, count, items)


def loss_of(
    network: Backbone, batch: SessionBatch, icloss: ICLoss | None, intents: Intents | None, chunk: int | None = None
) -> Tensor:
    """A step's loss, with ε = 0.2 where there is HID's."""
    session, table = network(batch.items, batch.length), network.item_embedding()
    loss = Scoring(chunk=chunk).loss(session, table, batch.target)
    return loss if icloss is None else loss + 0.2 * icloss(session, batch, table, intents)


def step_of(network: Backbone, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step with Adam."""
    optimizer = torch.optim.Adam(network.train().parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


@torch.no_grad()
def best_of(network: Backbone, batch: SessionBatch) -> Tensor:
    """Items (N, K) of the lists that a network recommends."""
    return top_k(Scoring()(network(batch.items, batch.length), network.item_embedding()), max(_KS))[0]


# -- equality


def check_equality(sizes: Sizes, measured: Measurement) -> None:
    """Networks and the softmax in pieces do what loops and the whole do."""
    batch = batch_of(20, 50, longest=12)
    lists = [row[:n] for row, n in zip(batch.items.tolist(), batch.length.tolist(), strict=True)]
    for name, make in networks(50, 8).items():
        torch.manual_seed(0)
        network = make().double().eval()
        expected = torch.stack([encode_one(network, clicks) for clicks in lists])
        text = f"{name}: vectors of a naive network, session by session, float64, within 1e-9 of the largest"
        measured.checks[text] = within(network(batch.items, batch.length), expected, 1e-9)
    found = [_softmax(_QUICK, chunk, torch.double) for chunk in (None, 7)]
    text = "softmax in pieces: loss and gradients of the whole, float64, within 1e-12 of the largest"
    measured.checks[text] = all(within(piece, whole, 1e-12) for whole, piece in zip(*found, strict=True))


# -- against loops


def measure_graphs(sizes: Sizes, measured: Measurement) -> None:
    """Graphs of a batch of sessions, beside the loop of the published code, at two lengths of sessions."""
    for name, mean, longest in (("diginetica", 5.0, 69), ("tmall", 8.0, 39)):
        items = batch_of(sizes.batch, sizes.items, mean, longest).items
        graph, (nodes, alias, adjacency) = session_graph(items), loop_session_graphs(items.numpy())
        ours = torch.cat([graph.inward, graph.outward], 2)
        same = torch.equal(ours, torch.from_numpy(adjacency).float())
        same &= torch.equal(graph.nodes, torch.from_numpy(nodes)) and torch.equal(graph.alias, torch.from_numpy(alias))
        measured.checks[f"graphs, {name}: nodes, places and adjacency of the loop, bit for bit"] = same
        array = items.numpy()

        def loop(array: Any = array) -> tuple[Tensor, ...]:
            return tuple(torch.from_numpy(each) for each in loop_session_graphs(array))

        seconds = interleave({"ours": functools.partial(session_graph, items), "loop": loop}, sizes.rounds)
        for way, found in seconds.items():
            measured.figures[f"graphs/{name}_{way}"] = summarise([1000 * each for each in found], "ms a batch")
        faster = ratios(seconds["loop"], seconds["ours"])
        measured.figures[f"graphs/{name}_speedup"] = summarise(faster, "x", "higher")
        text = f"graphs of sessions as long as those of {name} at least 12 times as fast as by a loop over sessions"
        measured.targets.append(Target(f"graphs/{name}_speedup", 12.0, text))


def measure_metrics(sizes: Sizes, measured: Measurement) -> None:
    """All metrics of lists, beside loops over cases and beside the scores that the lists come from."""
    torch.manual_seed(0)
    catalogue, batch = catalogue_of(sizes.items), batch_of(sizes.cases, sizes.items)
    session, table = torch.randn(sizes.cases, sizes.dim), torch.randn(sizes.items + 1, sizes.dim)
    recommended, _ = top_k(Scoring()(session, table), max(_KS))
    # Some targets are in their lists.
    target = torch.where(torch.arange(sizes.cases) % 3 == 0, recommended[:, 2], batch.target)
    metrics = ranking_metrics(catalogue, _KS)

    def ours() -> dict[str, Tensor]:
        metrics.reset()
        for part in torch.arange(sizes.cases).split(4 * sizes.batch):
            metrics.update(recommended[part], target[part])
        return metrics.compute()

    def loop() -> dict[str, float]:
        return loop_metrics(recommended.numpy(), target.numpy(), catalogue, _KS)

    def score() -> None:
        for part in torch.arange(sizes.cases).split(4 * sizes.batch):
            top_k(Scoring()(session[part], table), max(_KS))

    found, expected = ours(), loop()
    near = [abs(found[name].item() - value) <= 1e-5 * abs(value) for name, value in expected.items()]
    measured.checks["metrics: all those of loops over cases within 1e-5"] = found.keys() == expected.keys() and all(
        near
    )
    seconds = interleave({"ours": ours, "scoring": score}, sizes.rounds)
    few = interleave({"ours": ours, "loop": loop}, 2, warmup=1)
    for name, times in {**seconds, "loop": few["loop"]}.items():
        measured.figures[f"metrics/{name}"] = summarise([1000 * each for each in times], f"ms for {sizes.cases} cases")
    measured.figures["metrics/speedup"] = summarise(ratios(few["loop"], few["ours"]), "x", "higher")
    share = [100 * each for each in ratios(seconds["ours"], seconds["scoring"])]
    measured.figures["metrics/share_of_scoring"] = summarise(share, "%")
    text = "all metrics at least 100 times as fast as by loops over cases"
    measured.targets.append(Target("metrics/speedup", 100.0, text))
    measured.targets.append(Target("metrics/share_of_scoring", 5.0, "all metrics take at most 5 % of scoring"))


# -- steps


def measure_steps(sizes: Sizes, measured: Measurement) -> None:
    """A step of STAMP with HID's loss and without, and of the other backbones."""
    batch, intents = batch_of(sizes.batch, sizes.items), intents_of(sizes.items, sizes.intents)
    torch.manual_seed(0)
    made = networks(sizes.items, sizes.dim)
    stamp, steps = made["stamp"](), {}
    for name, icloss in _FORMS.items():
        network = copy.deepcopy(stamp)
        steps[name] = step_of(network, functools.partial(loss_of, network, batch, icloss, intents))
    seconds = interleave(steps, sizes.rounds)
    for name, found in seconds.items():
        measured.figures[f"step/stamp_{name}"] = summarise([1000 * each for each in found], "ms")
    for form, bound in (("paper", 1.15), ("released", 1.25)):
        measured.figures[f"step/{form}_over_without"] = summarise(ratios(seconds[form], seconds["without"]), "x")
        text = f"a step of STAMP with HID ({form} form) takes at most {bound} times that of STAMP alone"
        measured.targets.append(Target(f"step/{form}_over_without", bound, text))
    steps = {}
    for name in ("gru4rec", "srgnn", "gcegnn"):
        network = made[name]()
        steps[name] = step_of(network, functools.partial(loss_of, network, batch, None, None))
    for name, found in interleave(steps, max(sizes.rounds // 3, 2), warmup=1).items():
        measured.figures[f"step/{name}"] = summarise([1000 * each for each in found], "ms")


def _softmax_inputs(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Sessions (N, d), the largest catalogue's table (m + 1, d), and targets (N,)."""
    items = sizes.catalogues[-1]
    draws = torch.Generator().manual_seed(0)
    session = torch.randn(sizes.batch, sizes.dim, generator=draws, dtype=dtype).requires_grad_()
    table = torch.randn(items + 1, sizes.dim, generator=draws, dtype=dtype).mul_(0.1).requires_grad_()
    return session, table, torch.randint(1, items + 1, (sizes.batch,), generator=draws)


def _softmax(sizes: Sizes, chunk: int | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Loss over the largest catalogue, and its gradients."""
    session, table, target = _softmax_inputs(sizes, dtype)
    loss = Scoring(chunk=chunk).loss(session, table, target)
    loss.backward()
    assert session.grad is not None
    assert table.grad is not None
    return [loss.detach(), session.grad, table.grad]


def measure_softmax(sizes: Sizes, measured: Measurement) -> None:
    """Loss and gradients over the largest catalogue, at once and in pieces: seconds and memory."""
    session, table, target = _softmax_inputs(sizes)

    def loss(chunk: int | None) -> None:
        session.grad = table.grad = None
        Scoring(chunk=chunk).loss(session, table, target).backward()

    ways = {"whole": functools.partial(loss, None), "pieces": functools.partial(loss, sizes.chunk)}
    seconds = interleave(ways, sizes.rounds, warmup=1)
    for name, found in seconds.items():
        measured.figures[f"softmax/{name}"] = summarise([1000 * each for each in found], "ms")
    measured.figures["softmax/pieces_over_whole"] = summarise(ratios(seconds["pieces"], seconds["whole"]), "x")
    text = f"softmax over {sizes.catalogues[-1]:,} items in pieces takes at most 1.4 times as long"
    measured.targets.append(Target("softmax/pieces_over_whole", 1.4, text))


def measure_catalogues(sizes: Sizes, measured: Measurement) -> None:
    """Cases a second that STAMP with HID trains on and scores, by the number of items."""
    for items in sizes.catalogues:
        batch = batch_of(sizes.batch, items)
        network = STAMP(items, sizes.dim)
        train = step_of(network, functools.partial(loss_of, network, batch, ICLoss(), intents_of(items, sizes.intents)))
        score = functools.partial(best_of, network, batch)
        seconds = interleave({"training": train, "scoring": score}, max(sizes.rounds // 2, 2), warmup=1)
        for name, found in seconds.items():
            speed = [sizes.batch / each for each in found]
            measured.figures[f"{items}_items/{name}"] = summarise(speed, "sessions/s", "higher")


# -- memory, each in a process of its own


def measure_memory(sizes: Sizes, measured: Measurement) -> None:
    """Peak resident memory above that of a process which has imported the same."""
    size, repeats = ("quick", 1) if sizes is _QUICK else ("full", 3)
    floor = statistics.median(_peak("none", 0, size) for _ in range(repeats))
    for items in sizes.catalogues[-1:] if sizes is _QUICK else sizes.catalogues:
        for name in ("training", "scoring"):
            memory = [_peak(name, items, size) - floor]
            measured.figures[f"{items}_items/{name}_memory"] = summarise(memory, "MB above an idle process")
    start = statistics.median(_peak("tables", 0, size) for _ in range(repeats))
    whole, pieces = ([_peak(name, 0, size) - start for _ in range(repeats)] for name in ("whole", "pieces"))
    measured.figures["softmax/whole_memory"] = summarise(whole, "MB above its tables")
    measured.figures["softmax/pieces_memory"] = summarise(pieces, "MB above its tables")
    if all(each > 0 for each in whole):  # at tiny sizes a process differs from the next one by more
        measured.figures["softmax/memory_pieces_over_whole"] = summarise(ratios(pieces, whole), "x")
        text = f"softmax over {sizes.catalogues[-1]:,} items in pieces takes at most a third of the memory"
        measured.targets.append(Target("softmax/memory_pieces_over_whole", 1 / 3, text))


def _peak(name: str, items: int, size: str) -> float:
    command = [sys.executable, "-m", "leanlight.benchmarks.hid", name, str(items), size]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_in_this_process(name: str, items: str, size: str) -> float:
    torch.set_num_threads(1)
    sizes = _QUICK if size == "quick" else _FULL
    if name in ("whole", "pieces"):
        _softmax(sizes, sizes.chunk if name == "pieces" else None)
    elif name == "tables":
        _ = [torch.randn(sizes.catalogues[-1] + 1, sizes.dim), torch.randn(sizes.batch, sizes.dim)]
    elif name != "none":
        network, batch = STAMP(int(items), sizes.dim), batch_of(sizes.batch, int(items))
        intents = intents_of(int(items), sizes.intents)
        step = step_of(network, functools.partial(loss_of, network, batch, ICLoss(), intents))
        work = step if name == "training" else functools.partial(best_of, network, batch)
        for _ in range(2):
            work()
    return peak_memory_mb()


# -- once a run


def measure_clusters(sizes: Sizes, measured: Measurement) -> None:
    """Hybrid intents from planted sessions, from counting on."""
    data = SessionDataModule("planted", planted=sizes.clusters, val_fraction=0.0)
    data.setup()
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        HybridIntents(n=sizes.intents).build(data.catalogue, data.train_sessions)
    seconds = time.perf_counter() - begin
    categories = len(data.catalogue.categories)
    measured.figures["clusters/seconds"] = summarise([seconds], f"s for {categories:,} categories")
    text = f"{categories:,} categories are clustered into {sizes.intents} intents in less than 30 s"
    measured.targets.append(Target("clusters/seconds", 30.0, text))


def measure_lightning(sizes: Sizes, measured: Measurement) -> None:
    """What a step takes more under Lightning than in a plain loop over a copy of the network."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = SessionDataModule("planted", planted=sizes.lightning, batch_size=sizes.batch, seed=0)
    torch.manual_seed(0)
    backbone = functools.partial(STAMP, dim=sizes.dim)
    module = SessionRecommender(backbone, intents=HybridIntents(n=12), icloss=ICLoss())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = Path(folder) / "times.json"
        probe = StepProbe(output, "lit_modules.hid.reference:BareSessionStep", warmup=1)
        limits: dict[str, Any] = {"max_steps": sizes.steps + 2, "limit_val_batches": 0, "default_root_dir": folder}
        pl.Trainer(accelerator="cpu", callbacks=[probe], **limits, **QUIET).fit(module, datamodule=data)
        report = json.loads(output.read_text())
    measured.settings["items_under_lightning"] = data.meta.num_items
    more = [100 * (cycle / bare - 1) for cycle, bare in zip(report["cycle"], report["bare"], strict=True)]
    measured.figures["lightning/more_than_plain_loop"] = summarise(more, "%")
    text = "a step under Lightning takes at most 3 % more than in a plain loop"
    measured.targets.append(Target("lightning/more_than_plain_loop", 3.0, text))
    measured.checks["Lightning: same weights as the plain loop, bit for bit"] = report["equal"]


# -- on a GPU


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """Each backbone alone, and STAMP with both forms of HID, at the size of the published Diginetica."""
    sizes = _QUICK if quick else _FULL

    def make(backbone: str, icloss: ICLoss | None = None) -> PaperStep:
        torch.manual_seed(0)
        batch = batch_of(sizes.batch, sizes.items).to(where)
        network = networks(sizes.items, sizes.dim)[backbone]().to(where)
        intents = intents_of(sizes.items, sizes.intents).to(where)
        return network_step(network, functools.partial(loss_of, network, batch, icloss, intents), sizes.batch)

    steps: dict[str, Callable[[], PaperStep]] = {name: functools.partial(make, name) for name in networks(1, 1)}
    return steps | {f"stamp_{form}": functools.partial(make, "stamp", _FORMS[form]) for form in ("paper", "released")}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    what = "graphs of sessions on the GPU are the CPU's, bit for bit"
    yield Check("hid", "graphs", what, functools.partial(same_graphs, where))
    for name in networks(1, 1):
        what = f"scores of {name} on the GPU are the CPU's within 1e-4 of the largest"
        yield Check("hid", f"scores/{name}", what, functools.partial(same_scores, where, name))
    what = "ten best items on the GPU are the CPU's where scores are equal, too"
    yield Check("hid", "ties", what, functools.partial(same_lists, where))
    what = "softmax in pieces on the GPU: gradients of the whole within 1e-5 of the largest"
    yield Check("hid", "softmax", what, functools.partial(same_softmax, where))


def same_graphs(where: str) -> Found:
    """How many entries of graphs differ."""
    items = batch_of(100, 50).items
    pairs = zip(session_graph(items), session_graph(items.to(where)), strict=True)
    return near(sum(int((here != there.cpu()).sum()) for here, there in pairs), 0, 0)


def same_scores(where: str, name: str) -> Found:
    """The largest difference of scores, divided by the largest score."""
    torch.manual_seed(0)
    batch = batch_of(100, 500)
    network = networks(500, 64)[name]().eval()
    scores = []
    with torch.no_grad():
        for device in ("cpu", where):
            network, own = network.to(device), batch.to(device)
            scores.append(Scoring()(network(own.items, own.length), network.item_embedding()).cpu())
    return near(float((scores[1] - scores[0]).abs().max() / scores[0].abs().max()), 0.0, 1e-4)


def same_lists(where: str) -> Found:
    """How many places of lists differ."""
    scores = torch.randint(20, (200, 1_000), generator=torch.Generator().manual_seed(0)) / 7
    here, there = (top_k(scores.to(device), 10)[0].cpu() for device in ("cpu", where))
    return near(int((here != there).sum()), 0, 0)


def same_softmax(where: str) -> Found:
    """The largest difference of gradients, divided by the largest gradient."""
    batch = batch_of(64, 5_000).to(where)
    torch.manual_seed(0)
    network = STAMP(5_000, 32, embedding_std=0.1).to(where)
    gradients = []
    for chunk in (None, 1_000):
        network.zero_grad()
        loss_of(network, batch, None, None, chunk).backward()
        assert network.embedding.weight.grad is not None
        gradients.append(network.embedding.weight.grad.clone())
    return near(float((gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max()), 0.0, 1e-5)


if __name__ == "__main__":
    print(_peak_in_this_process(*sys.argv[1:]))
