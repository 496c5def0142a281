"""The server of a simulated federation: who takes part in a round, whose weights count, and what it all costs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.common import gather_objects
from callbacks.energy import count_operations
from callbacks.media import due, publish
from leanlight.contracts import (
    ClientBatch,
    ClientUpdate,
    Curve,
    FederatedData,
    FederatedModule,
    Heatmap,
    MediaItem,
    MethodModule,
    Selector,
    Table,
    UserError,
    derived_seed,
    run_seed,
)

_BACKWARD = 3  # operations of a training step over those of an inference: forward, and twice as many backward
_LAST = 10  # rounds over which the final accuracy is averaged


class FederatedRounds(Callback):
    """Runs a communication round an epoch: candidates, local training, scores, selection, aggregation, evaluation.

    A selector without scores draws `participants`. Others draw `candidates` and score them before their training (then
    only the chosen ones train) or after it (then all train, and only the chosen ones send their weights). The updates
    of the chosen go to the module, in the order of client ids, before the last batch of the epoch. Clients that drop
    out or come back with NaN are left out, counted and warned about, and those without data are never drawn; when none
    is left, the round changes nothing. On several processes each trains its share of the clients, and all aggregate the
    same updates in the same order.

    Logged a round: ``train/loss`` (mean of the chosen clients' local losses), ``train/participants``,
    ``train/dropped_clients``, ``train/failed_clients``, ``train/label_entropy`` (of the labels that the chosen clients
    hold, over log K), ``train/score_mean``, ``train/score_max``, ``train/score_size_correlation``, and sums since the
    first round: ``train/uplink_mb``, ``train/downlink_mb`` (MB of 10**6 bytes), ``train/image_passes`` (images times
    local epochs, of all clients that trained), ``train/energy_mj`` (training as three inferences an image at the
    firing rates of that round, 45 nm estimate), ``train/label_entropy_total`` (over all rounds).

    Logged by the test: ``val/accuracy_last`` (mean of the last ten validations) and, with `target`,
    ``val/target_reached`` (0 or 1), ``val/rounds_to_target``, ``val/passes_to_target``, ``val/uplink_mb_to_target``,
    ``val/energy_mj_to_target``: up to the first validation whose primary metric reaches `target`, or, where none does,
    up to the end of the run, rounds one more.

    Args:
        selector: the rule.
        participants: clients that a round aggregates (m).
        candidates: clients that a round draws for a selector that scores (d), at least `participants`, its default.
        dropout: probability with which a client does not come back.
        stragglers: probability with which a client manages only the share `straggler_work` of its local steps.
        straggler_work: in (0, 1].
        target: of the primary metric.
        probe: validation images on which operations are counted each round; 0 counts no energy.
        every_n_epochs: draw pictures after the validations of every n-th round and of the last; 0 draws none of them.
        seed: of draws, drop-outs and stragglers; default the seed of ``seed_everything``, else 0.
    """

    def __init__(
        self,
        selector: Selector,
        participants: int = 10,
        candidates: int | None = None,
        dropout: float = 0.0,
        stragglers: float = 0.0,
        straggler_work: float = 0.5,
        target: float | None = None,
        probe: int = 32,
        every_n_epochs: int = 10,
        seed: int | None = None,
    ) -> None:
        drawn = participants if candidates is None else candidates
        if participants < 1 or drawn < participants:
            raise UserError(
                f"FederatedRounds: expected 1 <= participants <= candidates, got {participants} and {drawn}"
            )
        for name, value in (("dropout", dropout), ("stragglers", stragglers)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"FederatedRounds: {name}: expected a probability, got {value}")
        if not 0.0 < straggler_work <= 1.0:
            raise UserError(
                f"FederatedRounds: straggler_work: expected a share above 0 and up to 1, got {straggler_work}"
            )
        self.selector, self.participants, self.candidates = selector, participants, drawn
        self.dropout, self.stragglers, self.straggler_work = dropout, stragglers, straggler_work
        self.target, self.probe, self.every_n_epochs = target, probe, every_n_epochs
        self.seed = run_seed(seed)
        self.round = _Round()
        self.history: list[dict[str, Any]] = []
        self._totals: dict[str, float] = {}
        self._label_totals: list[int] = []

    # ---- set-up ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = _data(trainer)
        if not isinstance(pl_module, FederatedModule):
            raise UserError(
                f"trainer.callbacks: FederatedRounds needs a federated module, got {type(pl_module).__name__}"
            )
        self._fit_limit(trainer)
        able = sum(size > 0 for size in data.client_sizes)
        if self.candidates > able:
            raise UserError(
                f"FederatedRounds: {self.candidates} candidates a round, but only {able} clients have any data; "
                "lower candidates and participants, or raise data.init_args.clients"
            )
        data.reserve(self.candidates if self.selector.scored == "after" else self.participants)
        pl_module.measures_clients = self.selector.scored == "after"

    def _fit_limit(self, trainer: Trainer) -> None:
        """Under ``trainer.limit_train_batches`` a round has fewer clients, so that it still ends with the server."""
        limit = trainer.limit_train_batches
        batches = math.ceil(self.candidates / trainer.world_size) + 1
        most = (limit if isinstance(limit, int) else int(limit * batches)) - 1
        if most < 1:
            raise UserError(
                f"trainer.limit_train_batches: expected room for a client and the server's step, 2 batches a round; "
                f"got {limit}"
            )
        self.candidates = min(self.candidates, most * trainer.world_size)
        self.participants = min(self.participants, self.candidates)

    def _generator(self, purpose: str, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, purpose, *numbers))

    # ---- a round ----

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number = trainer.current_epoch
        if self.round.number != number:
            self.round = self._start_round(trainer, pl_module, number)
        self._announce(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.round.number >= 0:  # resumed inside a round
            self._announce(trainer, pl_module)

    def _announce(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell data and module who trains; what was trained before an interruption is not trained again."""
        current = self.round
        _data(trainer).schedule(current.number, current.work)
        mine = list(current.work)[trainer.global_rank :: trainer.world_size]
        joined = sorted([*current.work, *current.dropped])
        pl_module.start_round(  # type: ignore[operator]
            current.number, joined, [client for client in mine if client not in current.reports]
        )

    def _start_round(self, trainer: Trainer, pl_module: LightningModule, number: int) -> _Round:
        data = _data(trainer)
        count = self.participants if self.selector.scored == "never" else self.candidates
        drawn = self.selector.candidates(data.client_sizes, count, self._generator("candidates", number))
        current = _Round(number, candidates=drawn)
        trained = drawn
        if self.selector.scored == "before":
            current.scores = self._score_before(trainer, pl_module, number, drawn)
            trained = self._choose(current.scores, number)
        for client in sorted(trained):
            chances = torch.rand(2, generator=self._generator("absent", number, client)).tolist()
            if chances[0] < self.dropout:
                current.dropped.append(client)
            else:
                current.work[client] = self.straggler_work if chances[1] < self.stragglers else 1.0
        return current

    def _score_before(
        self, trainer: Trainer, pl_module: LightningModule, number: int, drawn: Sequence[int]
    ) -> dict[int, float]:
        data, own = _data(trainer), {}
        mine = drawn[trainer.global_rank :: trainer.world_size]
        for client in mine:
            measured = pl_module.measure(data.client_data(client), number, client)  # type: ignore[operator]
            own[client] = self.selector.score(measured, None, None)
        return dict(sorted((client, score) for part in gather_objects(own) for client, score in part.items()))

    def _choose(self, scores: Mapping[int, float], number: int) -> list[int]:
        """The selector's choice; a random one where no candidate has a score but 0, since ties would let ids decide."""
        generator = self._generator("choice", number)
        if len(scores) > self.participants and not any(scores.values()):
            rank_zero_warn(f"round {number}: every score is 0 (silent neurons?); choosing at random")
            order = torch.randperm(len(scores), generator=generator).tolist()
            return sorted(list(scores)[i] for i in order[: self.participants])
        return sorted(self.selector.choose(scores, self.participants, generator))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, ClientBatch) and batch.last:
            pl_module.chosen = self._end_round(trainer, pl_module)  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for update in pl_module.take_updates():  # type: ignore[operator]
            self._receive(update)
        if isinstance(batch, ClientBatch) and batch.last:
            self._account(trainer, pl_module)

    def _receive(self, update: ClientUpdate) -> None:
        """Keep an update as long as it can still be chosen."""
        current = self.round
        current.reports[update.client] = dataclasses.replace(update, state={}, extras={})
        if not update.finite:
            current.failed.append(update.client)
            return
        current.updates[update.client] = update
        if self.selector.scored != "after":
            return
        assert update.before is not None
        current.scores[update.client] = self.selector.score(update.before, update.after, update)
        if any(current.scores.values()):
            keep = set(self.selector.may_win(current.scores, self.participants))
            current.updates = {client: kept for client, kept in current.updates.items() if client in keep}

    def _end_round(self, trainer: Trainer, pl_module: LightningModule) -> list[ClientUpdate]:
        """Bring all processes' reports together, choose, and return the chosen updates in the order of client ids."""
        current = self.round
        if trainer.world_size > 1:
            for reports, scores, failed in gather_objects((current.reports, current.scores, current.failed)):
                current.reports |= reports
                current.scores |= scores
                current.failed = sorted({*current.failed, *failed})
        if current.failed:
            rank_zero_warn(f"round {current.number}: left out clients {current.failed}, whose training diverged")
        able = sorted(set(current.reports) - set(current.failed))
        if self.selector.scored == "after":
            able = self._choose({client: current.scores[client] for client in able}, current.number) if able else []
        current.chosen = able
        if not able:
            rank_zero_warn(f"round {current.number}: no client came back; the global weights stay")
        own = {client: current.updates[client] for client in able if client in current.updates}
        current.updates = {}
        if trainer.world_size > 1:
            parts = gather_objects({client: update.to("cpu") for client, update in own.items()})
            own = {client: update for part in parts for client, update in part.items()}
        return [own[client] for client in able]

    # ---- what it costs ----

    def _account(self, trainer: Trainer, pl_module: LightningModule) -> None:
        current, data = self.round, _data(trainer)
        chosen = [current.reports[client] for client in current.chosen]
        trained = [current.reports[client] for client in sorted(current.reports)]
        asked = len(current.candidates) if self.selector.scored != "never" else 0
        model_bytes = max((report.received_bytes for report in trained), default=0)
        down = sum(report.received_bytes for report in trained) + len(current.dropped) * model_bytes
        if self.selector.scored == "before":
            down += (asked - len(current.work) - len(current.dropped)) * model_bytes  # those who were only asked
        labels = data.class_matrix[current.chosen].sum(0) if current.chosen else torch.zeros(data.class_matrix.shape[1])
        self._label_totals = (torch.tensor(self._label_totals or [0] * len(labels)) + labels).tolist()
        for name, value in {
            "uplink_mb": (sum(report.sent_bytes for report in chosen) + 4 * asked) / 1e6,
            "downlink_mb": down / 1e6,
            "image_passes": float(sum(report.passes for report in trained)),
            "energy_mj": self._energy(trainer, pl_module) / 1e9,
        }.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        scores = [current.scores[client] for client in sorted(current.scores)]
        values = {
            "loss": sum(report.loss for report in chosen) / len(chosen) if chosen else math.nan,
            "participants": float(len(chosen)),
            "dropped_clients": float(len(current.dropped)),
            "failed_clients": float(len(current.failed)),
            "label_entropy": entropy(labels),
            "label_entropy_total": entropy(torch.tensor(self._label_totals)),
            **self._totals,
        }
        if scores:
            sizes = [data.client_sizes[client] for client in sorted(current.scores)]
            values |= {
                "score_mean": sum(scores) / len(scores),
                "score_max": max(scores),
                "score_size_correlation": correlation(scores, sizes),
            }
        logged = {f"train/{name}": value for name, value in values.items() if not math.isnan(value)}
        pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1)
        self.history.append(
            {"round": current.number, "chosen": current.chosen, "scores": dict(current.scores), **self._totals}
        )

    def _energy(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Picojoules of this round's local training and scoring, at the firing rates of its new global weights."""
        split = getattr(trainer.datamodule, "val_split", None)  # type: ignore[attr-defined]
        if not self.probe or split is None:
            return 0.0
        image = split.images[: self.probe].to(pl_module.device).float() / 255
        inference: dict[int, float] = {}
        data, total = _data(trainer), 0.0
        # Scoring is an inference on the client's data: two where training lies between.
        scorings = {"never": 0, "before": 1, "after": 2}[self.selector.scored]
        for client in sorted({*self.round.reports, *self.round.scores}):
            network = pl_module.network_of(client)  # type: ignore[operator]
            if id(network) not in inference:
                was_training = network.training
                network.eval()
                inference[id(network)] = sum(layer.energy_pj for layer in count_operations(network, image))
                network.train(was_training)
            passes = self.round.reports[client].passes * _BACKWARD if client in self.round.reports else 0
            passes += data.client_sizes[client] * scorings if client in self.round.scores else 0
            total += passes * inference[id(network)]
        return total

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.history or not isinstance(pl_module, MethodModule):
            return
        value = trainer.callback_metrics.get(pl_module.primary_metric.name)
        if value is not None:
            self.history[-1]["val"] = float(value)
        if due(trainer, self.every_n_epochs):
            publish(trainer, pl_module, "train", self.pictures(_data(trainer)))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if summary := self.summary():
            pl_module.log_dict({f"val/{name}": value for name, value in summary.items()})

    def summary(self) -> dict[str, float]:
        """Figures over all rounds so far, by validation; empty before the first."""
        validated = [entry for entry in self.history if "val" in entry]
        if not validated:
            return {}
        last = [entry["val"] for entry in validated[-_LAST:]]
        figures = {"accuracy_last": sum(last) / len(last)}
        if self.target is not None:
            reached = next((entry for entry in validated if entry["val"] >= self.target), None)
            entry = reached or self.history[-1]
            figures |= {
                "target_reached": float(reached is not None),
                "rounds_to_target": float(entry["round"] + (1 if reached else 2)),
                "passes_to_target": entry["image_passes"],
                "uplink_mb_to_target": entry["uplink_mb"],
                "energy_mj_to_target": entry["energy_mj"],
            }
        return figures

    # ---- pictures ----

    def pictures(self, data: FederatedData) -> dict[str, MediaItem]:
        """Who holds what, who was chosen and with which score, and accuracy over rounds, traffic and computing."""
        matrix = data.class_matrix
        times = Counter(client for entry in self.history for client in entry["chosen"])
        rows = [(client, times[client], *counts) for client, counts in enumerate(matrix.tolist())]
        columns = ("client", "times_chosen", *(f"class_{i}" for i in range(matrix.shape[1])))
        items: dict[str, MediaItem] = {
            "clients": Heatmap(matrix.float(), "class", "client"),
            "clients_table": Table(columns, rows),
        }
        rounds, clients = len(self.history), len(data.client_sizes)
        selected, scores = torch.zeros(rounds, clients), torch.full((rounds, clients), math.nan)
        for row, entry in enumerate(self.history):
            selected[row, entry["chosen"]] = 1.0
            for client, score in entry["scores"].items():
                scores[row, client] = score
        items["selected"] = Heatmap(selected, "client", "round")
        if not scores.isnan().all():
            items["scores"] = Heatmap(scores, "client", "round")
        validated = [entry for entry in self.history if "val" in entry]
        if len(validated) > 1:
            accuracy = {"validation": [entry["val"] for entry in validated]}
            axes = {
                "accuracy_over_rounds": ("round", [entry["round"] + 1.0 for entry in validated]),
                "accuracy_over_uplink": ("uplink, MB", [entry["uplink_mb"] for entry in validated]),
                "accuracy_over_computing": ("images trained on", [entry["image_passes"] for entry in validated]),
            }
            for name, (label, x) in axes.items():
                items[name] = Curve(x, accuracy, label, "accuracy")
        return items

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round.state_dict(),
            "history": self.history,
            "totals": self._totals,
            "label_totals": self._label_totals,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.round = _Round.from_state_dict(state_dict["round"])
        self.history = [dict(entry) for entry in state_dict["history"]]
        self._totals, self._label_totals = dict(state_dict["totals"]), list(state_dict["label_totals"])


@dataclasses.dataclass
class _Round:
    """Where a round stands. work: clients to train, with the share of local steps. reports: updates without weights."""

    number: int = -1
    candidates: list[int] = dataclasses.field(default_factory=list)
    work: dict[int, float] = dataclasses.field(default_factory=dict)
    dropped: list[int] = dataclasses.field(default_factory=list)
    failed: list[int] = dataclasses.field(default_factory=list)
    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    reports: dict[int, ClientUpdate] = dataclasses.field(default_factory=dict)
    updates: dict[int, ClientUpdate] = dataclasses.field(default_factory=dict)
    chosen: list[int] = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint that loads with ``weights_only=True``."""
        state = dict(vars(self))
        for name in ("reports", "updates"):
            state[name] = {client: _plain(update) for client, update in state[name].items()}
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> _Round:
        found = dict(state)
        for name in ("reports", "updates"):
            found[name] = {client: ClientUpdate(**update) for client, update in found[name].items()}
        return cls(**found)


def _plain(update: ClientUpdate) -> dict[str, Any]:
    """Without the measurements, which are spent once there is a score."""
    return {**vars(update), "before": None, "after": None}


def _data(trainer: Trainer) -> FederatedData:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, FederatedData):
        got = type(data).__name__ if data else "loaders"
        raise UserError(f"data: FederatedRounds needs datamodules.FederatedDataModule, got {got}")
    return data


def entropy(counts: Tensor) -> float:
    """Entropy of a histogram (K,) over log K, in [0, 1]; 0 for an empty one."""
    share = counts.double() / max(float(counts.sum()), 1.0)
    positive = share[share > 0]
    return abs(float(-(positive * positive.log()).sum())) / math.log(len(counts)) if len(counts) > 1 else 0.0


def correlation(scores: Sequence[float], sizes: Sequence[int]) -> float:
    """Pearson's correlation of scores and client sizes; NaN where one of them does not vary."""
    pair = torch.tensor([list(scores), [float(size) for size in sizes]], dtype=torch.float64)
    if pair.shape[1] < 2 or bool((pair.std(1) == 0).any()):
        return math.nan
    return float(torch.corrcoef(pair)[0, 1])
