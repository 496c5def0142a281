"""Training glue of simulated federated learning: a batch trains a client, the last one of a round is the server's."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn

from leanlight.contracts import (
    ClientBatch,
    ClientUpdate,
    ImageBatch,
    Measurement,
    Progress,
    UserError,
    derived_seed,
    isolated_rng,
)
from leanlight.contracts.federated import State
from lit_modules.classifier import ImageClassifier
from lit_modules.federated.aggregation import FedAvg
from lit_modules.federated.firing import Reduce, measure
from lit_modules.federated.local import LocalObjective, LocalTraining, train_client


class FederatedClassifier(ImageClassifier):
    """Train an image classifier on clients that keep their data (McMahan et al. 2017).

    An epoch is a communication round; `callbacks.FederatedRounds` says who takes part, and
    `datamodules.FederatedDataModule` has the clients. Manual optimisation: each batch trains one client from the global
    weights in a working copy of the network, with an optimiser of its own; at the last batch the aggregated weights
    become the global ones by one step of the server's optimiser, which Lightning wraps, so that ``global_step`` counts
    rounds. Memory grows with the clients that are kept until the end of a round, not with their number. What a client
    draws is a function of (seed, round, client). Satisfies `leanlight.contracts.FederatedModule`.

    network: makes the network, images (N, C, H, W) in [0, 1] → logits (N, K). local: epochs and batches of a client.
    objective: what local training adds to the loss. aggregator: what the server makes of the clients' weights.
    optimizer: of a client, made anew each round; SGD with lr 0.1 by default. lr_scheduler: of the clients' learning
    rate, a step a round. server_optimizer: applies the pseudo-gradient (global minus aggregated weights); by default
    the server takes the aggregated weights as they are. buffers: of batch norm, ``average`` them with the weights or
    ``keep`` the server's as they are (what libraries do that send parameters only). rate_reduce: see
    `lit_modules.federated.firing.measure`. seed: that of ``seed_everything`` by default.
    """

    automatic_optimization = False

    def __init__(
        self,
        network: Callable[[], nn.Module],
        local: LocalTraining | None = None,
        objective: LocalObjective | None = None,
        aggregator: FedAvg | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        server_optimizer: OptimizerCallable | None = None,
        buffers: Literal["average", "keep"] = "average",
        rate_reduce: Reduce = "mean",
        seed: int | None = None,
    ) -> None:
        super().__init__(network=network, optimizer=optimizer or _client_sgd, lr_scheduler=lr_scheduler)
        self.local = local or LocalTraining()
        self.objective = objective or LocalObjective()
        self.aggregator = aggregator or FedAvg()
        self.make_server_optimizer = server_optimizer
        self.buffers_rule, self.rate_reduce = buffers, rate_reduce
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.measures_clients = False
        self.chosen: list[ClientUpdate] = []
        self._update: ClientUpdate | None = None
        self._copy: tuple[nn.Module, ...] = ()  # in a tuple, hidden from nn.Module: it is scratch
        self._lr: tuple[int, list[float]] = (-1, [])  # round, learning rate of each parameter group
        self._server_control: State = {}
        self._client_controls: dict[int, State] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check network, data and what the trainer is asked to do."""
        super().setup(stage)
        if stage != "fit":
            return
        if self.trainer.precision == "16-mixed":
            raise UserError(
                "trainer.precision: 16-mixed scales losses, which local training does not; use bf16-mixed or 32-true"
            )
        optimizer = self.make_optimizer(self.network.parameters())
        if self.objective.has_control and not _is_plain_sgd(optimizer):
            raise UserError("model.init_args.optimizer: expected SGD without momentum and weight decay for Scaffold")
        if self.make_scheduler is not None and isinstance(self.make_scheduler(optimizer), ReduceLROnPlateau):
            raise UserError("model.init_args.lr_scheduler: expected a function of the round, got ReduceLROnPlateau")

    def configure_optimizers(self) -> Any:
        make = self.make_server_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        return make(self.network.parameters())

    def _worker(self) -> nn.Module:
        """The working copy, with the global weights."""
        if not self._copy:
            self._copy = (copy.deepcopy(self.network),)
        (worker,) = self._copy
        _load(worker, self.network.state_dict())
        return worker

    # ---- a client ----

    def start_round(self, round_number: int, clients: Sequence[int]) -> None:
        """Make the clients' learning rates of this round."""
        optimizer = self.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
        if self.make_scheduler is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*")
                scheduler = self.make_scheduler(optimizer)
                for _ in range(round_number):
                    scheduler.step()
        self._lr = round_number, [group["lr"] for group in optimizer.param_groups]

    def training_step(self, batch: ClientBatch, batch_idx: int) -> None:  # type: ignore[override]
        if batch.last:
            self._server_step()
        elif batch.client >= 0:
            self._update = self._train(batch)

    def take_update(self) -> ClientUpdate | None:
        """The update of the batch that was trained last, once."""
        update, self._update = self._update, None
        return update

    def local_loss(self, network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        """What a client minimises, before its objective's own term."""
        return torch.nn.functional.cross_entropy(network(image), label)

    def _train(self, batch: ClientBatch) -> ClientUpdate:
        where = batch.round_number, batch.client
        before = self.measure(batch.data, *where) if self.measures_clients else None
        worker = self._worker()
        optimizer = self.make_optimizer(worker.parameters())
        for group, lr in zip(optimizer.param_groups, self._lr[1], strict=False):
            group["lr"] = lr
        control = self._control_gap(batch.client)
        order = torch.Generator().manual_seed(derived_seed(self.seed, "order", *where))
        with isolated_rng(derived_seed(self.seed, "client", *where)):
            steps, passes, loss = train_client(
                worker, batch.data, self.local, optimizer, self.objective, control, order, batch.work, self.local_loss
            )
        after = self._measure(worker, batch.data, *where) if self.measures_clients else None
        extras = self._control_change(worker, steps) if self.objective.has_control else {}
        state = {name: value.detach().clone() for name, value in worker.state_dict().items()}
        finite = torch.stack([value.isfinite().all() for value in [loss, *state.values()]]).all()
        traffic = _bytes(state) + _bytes(extras)
        return ClientUpdate(
            client=batch.client,
            items=len(batch.data),
            steps=steps,
            loss=float(loss),
            passes=passes,
            state=state,
            extras=extras,
            before=before,
            after=after,
            received_bytes=traffic,
            sent_bytes=traffic,
            finite=bool(finite),
        )

    def measure(self, data: ImageBatch, round_number: int, client: int) -> Measurement:
        """Loss and activity of the global network on a client's data."""
        return self._measure(self.network, data.to(self.device), round_number, client)

    def _measure(self, network: nn.Module, data: ImageBatch, round_number: int, client: int) -> Measurement:
        # Before and after training the same random numbers, or the credit would measure the input's noise.
        with isolated_rng(derived_seed(self.seed, "measure", round_number, client)):
            return measure(network, data, len(self.classes), reduce=self.rate_reduce)

    # ---- SCAFFOLD's control variates ----

    def _control_gap(self, client: int) -> list[Tensor]:
        """Server's minus client's control variate, by parameter; empty without controls."""
        if not self.objective.has_control:
            return []
        own, gap = self._client_controls.get(client, {}), []
        for name, parameter in self.network.named_parameters():
            server = self._server_control.setdefault(name, torch.zeros_like(parameter)).to(self.device)
            gap.append(server - own[name].to(self.device) if name in own else server.clone())
        return gap

    def _control_change(self, worker: nn.Module, steps: int) -> State:
        """``c_k' - c_k = (w_r - w_k) / (K lr) - c``."""
        factor = 1.0 / (max(steps, 1) * self._lr[1][0])
        trained = dict(worker.named_parameters())
        return {
            name: ((start - trained[name]) * factor).detach() - self._server_control[name].to(self.device)
            for name, start in self.network.named_parameters()
        }

    def _update_controls(self, updates: Sequence[ClientUpdate]) -> None:
        clients = len(self.trainer.datamodule.client_sizes)  # type: ignore[attr-defined]
        for update in updates:
            own = self._client_controls.setdefault(update.client, {})
            for name, change in update.extras.items():
                own[name] = own[name] + change.cpu() if name in own else change.cpu()
                self._server_control[name] = self._server_control[name].to(change.device) + change / clients

    # ---- the server ----

    @torch.no_grad()
    def _server_step(self) -> None:
        updates = [_moved(update, self.device) for update in self.chosen]
        self.chosen = []
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        parameters = dict(self.network.named_parameters())
        state = self.aggregate(updates) if updates else {}
        for name, parameter in parameters.items():
            if name in state:
                parameter.grad = parameter - state[name]
        optimizer.step()  # without gradients it moves nothing, and counts the round
        if updates and self.make_server_optimizer is None:
            for name, parameter in parameters.items():
                parameter.copy_(state[name])  # w - (w - mean) is the mean up to rounding only
        if self.buffers_rule == "average":
            for name, buffer in self.network.named_buffers():
                if name in state:
                    buffer.copy_(state[name])
        if self.objective.has_control:
            self._update_controls(updates)

    def aggregate(self, updates: Sequence[ClientUpdate]) -> State:
        """The server's new state, before its optimiser; updates: at least one, in the order of client ids."""
        parameters = [name for name, _ in self.network.named_parameters()]
        return self.aggregator(self.network.state_dict(), updates, parameters)

    # ---- what callbacks and commands ask ----

    def progress(self) -> Progress:
        return Progress("round", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        # A client that diverges is left out by the server, and does not stop the run.
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["federated"] = {"server_control": self._server_control, "client_controls": self._client_controls}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._server_control = checkpoint["federated"]["server_control"]
        self._client_controls = checkpoint["federated"]["client_controls"]


def _client_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    options = optimizer.defaults
    return isinstance(optimizer, torch.optim.SGD) and not options["momentum"] and not options["weight_decay"]


@torch.no_grad()
def _load(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` for a network of the same make, without its checks: it runs once a client."""
    own = network.state_dict()
    torch._foreach_copy_([own[name] for name in state], list(state.values()))


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _moved(update: ClientUpdate, device: torch.device) -> ClientUpdate:
    state = {name: value.to(device) for name, value in update.state.items()}
    extras = {name: value.to(device) for name, value in update.extras.items()}
    return dataclasses.replace(update, state=state, extras=extras)
