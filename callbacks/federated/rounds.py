"""The server's protocol: who takes part in a round, and whose weights count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.common import gather_objects
from callbacks.federated import pictures
from callbacks.federated.costs import Costs, round_energy, summarise
from callbacks.federated.exchange import mean_over_processes
from callbacks.federated.state import Round
from callbacks.media import due, publish
from leanlight.contracts import (
    ClientBatch,
    ClientEngine,
    ClientUpdate,
    FederatedData,
    FederatedModule,
    MethodModule,
    Selector,
    UserError,
    data_of,
    derived_seed,
    on_host,
    run_seed,
    to_device,
)
from leanlight.contracts.ranges import FiniteFloat, NonNegativeInt, PositiveInt, PositiveShare, Seed, UnitInterval


class FederatedRounds(Callback):
    """Runs a communication round an epoch: candidates, local training, scores, selection, aggregation, evaluation.

    A selector without scores draws `participants`. Others draw `candidates` and score them before their training (then
    only the chosen ones train) or after it (then all train, and only the chosen ones send their weights). The updates
    of the chosen go to the module, in the order of client ids, before the last batch of the epoch. Clients that drop
    out or come back with NaN are left out, counted and warned about, and those without data are never drawn; when none
    is left, the round changes nothing. On several processes each trains its share of the clients, and all aggregate the
    same updates in the same order; or, with ``exchange: sum``, all take the mean that one collective gives.

    Logged a round: ``train/loss`` (mean of the chosen clients' local losses), ``train/participants``,
    ``train/dropped_clients``, ``train/failed_clients``, ``train/label_entropy`` (of the labels that the chosen clients
    hold, over log K), ``train/score_mean``, ``train/score_max``, ``train/score_size_correlation``, and sums since the
    first round: ``train/uplink_mb``, ``train/downlink_mb`` (MB of 10**6 bytes), ``train/image_passes`` (images times
    local epochs, of all clients that trained), ``train/energy_mj`` (training as three inferences an image at the
    firing rates of that round, 45 nm estimate), ``train/label_entropy_total`` (over all rounds). With `local.privacy`
    of the module also ``train/privacy_epsilon``, the largest ε of a client so far.

    Logged by the test: ``val/accuracy_last`` (mean of the last ten validations) and, with `target`,
    ``val/target_reached`` (0 or 1), ``val/rounds_to_target``, ``val/passes_to_target``, ``val/uplink_mb_to_target``,
    ``val/energy_mj_to_target``: up to the first validation whose primary metric reaches `target`, or, where none does,
    up to the end of the run, rounds one more.

    Args:
        selector: the rule that chooses clients.
        participants: clients that a round aggregates (m); 10 in SFedCA's paper.
        candidates: clients that a round draws for a selector that scores (d), at least `participants`, its default.
        dropout: probability with which a client does not come back, in [0, 1].
        stragglers: probability with which a client manages only the share `straggler_work` of its steps, in [0, 1].
        straggler_work: share of its local steps that a straggler manages, in (0, 1].
        target: value of the primary metric up to which costs are counted; none by default.
        probe: validation images on which operations are counted each round; 0 counts no energy.
        every_n_epochs: draw pictures after the validations of every n-th round and of the last; 0 draws none of them.
        exchange: what processes send: the chosen clients' ``states``, so that their number changes no bit; or their
            weighted ``sum``, which differs by rounding and is for rules that take a mean: traffic of one state, however
            many clients.
        seed: of draws, drop-outs and stragglers; that of ``seed_everything`` by default, else 0.
    """

    def __init__(
        self,
        selector: Selector,
        participants: PositiveInt = 10,
        candidates: PositiveInt | None = None,
        dropout: UnitInterval = 0.0,
        stragglers: UnitInterval = 0.0,
        straggler_work: PositiveShare = 0.5,
        target: FiniteFloat | None = None,
        probe: NonNegativeInt = 32,
        every_n_epochs: NonNegativeInt = 10,
        exchange: Literal["states", "sum"] = "states",
        seed: Seed | None = None,
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
        if exchange not in ("states", "sum"):
            raise UserError(f"FederatedRounds: exchange: expected states or sum, got {exchange!r}")
        self.selector, self.participants, self.candidates = selector, participants, drawn
        self.exchange = exchange
        self.dropout, self.stragglers, self.straggler_work = dropout, stragglers, straggler_work
        self.target, self.probe, self.every_n_epochs = target, probe, every_n_epochs
        self.seed = run_seed(seed)
        self.round = Round()
        self.history: list[dict[str, Any]] = []
        self._costs = Costs()
        #: Where the clients run, if not in the trainer's processes; set before the fit.
        self.engine: ClientEngine | None = None

    # ---- set-up ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = data_of(pl_module, FederatedData)
        if not isinstance(pl_module, FederatedModule):
            raise UserError(f"FederatedRounds: needs a federated module, got {type(pl_module).__name__}")
        self._fit_limit(trainer)
        holders = sum(size > 0 for size in data.client_sizes)
        if self.candidates > holders:
            raise UserError(
                f"FederatedRounds: {self.candidates} candidates a round, but only {holders} clients have any data; "
                "lower candidates and participants, or raise the number of the data's clients"
            )
        if self.exchange == "sum":
            pl_module.client_weights([ClientUpdate(0, 1, 1, 0.0, 1, {})])  # says now which rules cannot
        trained = self.candidates if self.selector.scored == "after" else self.participants
        data.reserve(1 if self.engine else trained)
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
        here = {} if self.engine else current.work
        data_of(pl_module, FederatedData).schedule(current.number, here)
        mine = list(here)[trainer.global_rank :: trainer.world_size]
        joined = sorted([*current.work, *current.dropped])
        pl_module.start_round(  # type: ignore[operator]
            current.number, joined, [client for client in mine if client not in current.reports]
        )

    def _start_round(self, trainer: Trainer, pl_module: LightningModule, number: int) -> Round:
        data = data_of(pl_module, FederatedData)
        count = self.participants if self.selector.scored == "never" else self.candidates
        drawn = self.selector.candidates(data.client_sizes, count, self._generator("candidates", number))
        current = Round(number, candidates=drawn)
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
        if self.engine is not None:
            return dict(sorted(self.engine.score(number, drawn).items()))
        data, scores = data_of(pl_module, FederatedData), {}
        for client in drawn[trainer.global_rank :: trainer.world_size]:  # this process' share
            measured = pl_module.measure(data.client_data(client), number, client)  # type: ignore[operator]
            scores[client] = self.selector.score(measured, None, None)
        return dict(sorted((client, score) for part in gather_objects(scores) for client, score in part.items()))

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
            if self.engine is not None:
                self._train_elsewhere(self.engine)
            pl_module.chosen = self._end_round(trainer, pl_module)  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for update in pl_module.take_updates():  # type: ignore[operator]
            self._receive(update, self.selector.score_of(update))
        if isinstance(batch, ClientBatch) and batch.last:
            self._account(pl_module)

    def _train_elsewhere(self, engine: ClientEngine) -> None:
        """Let the clients of the round train; those that give no answer count as dropped out."""
        current = self.round
        for update, score in engine.train(current.number, sorted([*current.work, *current.dropped]), current.work):
            self._receive(update, score)
        if lost := sorted(set(current.work) - set(current.reports)):
            rank_zero_warn(f"round {current.number}: no answer from clients {lost}")
            current.dropped = sorted([*current.dropped, *lost])

    def _receive(self, update: ClientUpdate, score: float | None) -> None:
        """Keep an update as long as it can still be chosen."""
        current = self.round
        current.reports[update.client] = dataclasses.replace(update, state={}, extras={})
        if not update.finite:
            current.failed.append(update.client)
            return
        current.updates[update.client] = update
        if score is None:
            return
        current.scores[update.client] = score
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
        returned = sorted(set(current.reports) - set(current.failed))
        if self.selector.scored == "after" and returned:
            returned = self._choose({client: current.scores[client] for client in returned}, current.number)
        updates = {client: current.updates[client] for client in returned if client in current.updates}
        if self.engine is not None:
            updates = self.engine.fetch(current.number, updates)
            returned = sorted(updates)
        current.chosen, current.updates = returned, {}
        if not returned:
            rank_zero_warn(f"round {current.number}: no client came back; the global weights stay")
        if trainer.world_size > 1 and self.exchange == "sum" and returned:
            return [self._sum(trainer, pl_module, updates)]
        if trainer.world_size > 1:
            parts = gather_objects({client: update.to("cpu") for client, update in updates.items()})
            updates = {client: update for part in parts for client, update in part.items()}
        return [updates[client] for client in returned]

    def _sum(self, trainer: Trainer, pl_module: LightningModule, own: Mapping[int, ClientUpdate]) -> ClientUpdate:
        """One update that stands for all chosen clients: its state is their mean."""
        reports = [self.round.reports[client] for client in self.round.chosen]
        weights = pl_module.client_weights(reports)  # type: ignore[operator]
        share = dict(zip(self.round.chosen, weights, strict=True))
        like = pl_module.network_of(reports[0].client).state_dict()  # type: ignore[operator]
        states = [(update.state, share[client]) for client, update in own.items()]
        mean = mean_over_processes(states, like, trainer.strategy.reduce)
        return dataclasses.replace(reports[0], items=sum(report.items for report in reports), state=mean)

    # ---- what it costs and comes to ----

    def _account(self, pl_module: LightningModule) -> None:
        data, scored, current = data_of(pl_module, FederatedData), self.selector.scored, self.round
        energy = 0.0
        if self.probe and data.val_split is not None:
            image = to_device(data.val_split.images[: self.probe], pl_module.device).float() / 255
            assert isinstance(pl_module, FederatedModule)
            energy = round_energy(current, scored, pl_module, image, data.client_sizes)
        values = self._costs.add(current, scored, data, energy)
        values |= pl_module.privacy_spent(self._costs.steps)  # type: ignore[operator]
        named = {f"train/{name}": value for name, value in values.items()}
        pl_module.log_dict(on_host(named), on_step=False, on_epoch=True, batch_size=1)
        self.history.append(
            {
                "round": current.number,
                "chosen": current.chosen,
                "scores": dict(current.scores),
                **self._costs.totals,
            }
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.history or not isinstance(pl_module, MethodModule):
            return
        value = trainer.callback_metrics.get(pl_module.primary_metric.name)
        if value is not None:
            self.history[-1]["val"] = float(value)
        if due(trainer, self.every_n_epochs):
            drawn = pictures.draw(self.history, data_of(pl_module, FederatedData).class_matrix)
            publish(trainer, pl_module, "train", drawn)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if summary := self.summary():
            pl_module.log_dict({f"val/{name}": value for name, value in summary.items()})

    def summary(self) -> dict[str, float]:
        """Figures over all rounds so far, by validation; empty before the first."""
        return summarise(self.history, self.target)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round.state_dict(),
            "history": self.history,
            "totals": self._costs.totals,
            "label_totals": self._costs.label_totals,
            "steps": self._costs.steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.round = Round.from_state_dict(state_dict["round"])
        self.history = [dict(entry) for entry in state_dict["history"]]
        self._costs.totals, self._costs.label_totals = dict(state_dict["totals"]), list(state_dict["label_totals"])
        self._costs.steps = dict(state_dict.get("steps", {}))  # older checkpoints have none
