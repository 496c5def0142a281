"""Training glue of simulated federated learning: a batch trains a client, the last one of a round is the server's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    ClientBatch,
    ClientUpdate,
    FederatedData,
    ImageBatch,
    ImageData,
    Measurement,
    Progress,
    TrainingStep,
    UserError,
    data_of,
    derived_seed,
    isolated_rng,
    run_seed,
)
from leanlight.contracts.federated import State
from leanlight.contracts.ranges import PositiveInt, Seed
from lit_modules.classifier.evaluation import ClassifierEvaluation
from lit_modules.classifier.hooks import EvaluatedClassifier
from lit_modules.federated.aggregation import Aggregator, FedAvg
from lit_modules.federated.batched import LinearStack, Stack, find_stack, train_clients
from lit_modules.federated.controls import ControlVariates, sweep
from lit_modules.federated.firing import Reduce, measure
from lit_modules.federated.local import (
    LocalObjective,
    LocalTraining,
    cross_entropy,
    is_plain_sgd,
    make_update,
    train_client,
)
from lit_modules.federated.norms import measure_norms
from lit_modules.federated.privacy import check_private
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import check_classifier, device_of

CONTROLS = "controls"  # folder of a run with SCAFFOLD's controls of clients
_SCORED = (
    "local.privacy: expected a selector without scores, such as RandomClients: scores tell the server what no noise "
    "hides"
)
_NORM_BATCH = 256  # images whose mean and variance batch norms take at a time


class FederatedClassifier(EvaluatedClassifier):
    """Train an image classifier on clients that keep their data (McMahan et al. 2017, arXiv:1602.05629).

    An epoch is a communication round; `callbacks.FederatedRounds` says who takes part, and
    `datamodules.FederatedDataModule` has the clients. Manual optimisation: each batch trains one client from the global
    weights in a working copy of the network, with an optimiser of its own; at the last batch the aggregated weights
    become the global ones by one step of the server's optimiser, which Lightning wraps, so that ``global_step`` counts
    rounds. Memory grows with the clients that are kept until the end of a round, not with their number. What a client
    draws is a function of (seed, round, client). Satisfies `leanlight.contracts.FederatedModule`.

    Subclasses may override `start_round`, `network_of` (which global network a client trains), `local_loss` (what it
    minimises), `aggregate` (what the server makes of the updates), `evaluate` and `end_evaluation` (what is measured).

    Args:
        network: makes the network: float images (N, C, H, W) in [0, 1] → logits (N, K).
        local: epochs E and batch size B of a client's training.
        objective: what local training adds to the loss, e.g. FedProx; nothing by default.
        aggregator: what the server makes of the clients' weights; FedAvg by default.
        optimizer: makes a client's optimiser, anew each round; SGD with lr (η) 0.1 by default.
        lr_scheduler: makes the schedule of the clients' learning rate, a step a round; constant by default.
        server_optimizer: applies the pseudo-gradient, global minus aggregated weights; by default these are taken over.
        buffers: of batch norm: ``average`` them with the weights, ``keep`` the server's, or measure them anew with each
            new weights, on the images of all clients (``static``, HeteroFL).
        rate_reduce: of a client's firing rates over batches: ``mean`` by size, or ``sum``, as SFedCA's published code.
        clients_at_once: clients trained as one batched computation; above 1 without batch norm and dropout only.
        seed: of the clients' data orders and noise; that of ``seed_everything`` by default.
    """

    allows = Allows(precision=("32-true", "bf16-mixed"), why="local training does not scale losses")
    automatic_optimization = False

    def __init__(
        self,
        network: Callable[[], nn.Module],
        local: LocalTraining | None = None,
        objective: LocalObjective | None = None,
        aggregator: Aggregator | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        server_optimizer: OptimizerCallable | None = None,
        buffers: Literal["average", "keep", "static"] = "average",
        rate_reduce: Reduce = "mean",
        clients_at_once: PositiveInt = 1,
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        if clients_at_once < 1:
            raise UserError(f"clients_at_once: expected at least 1, got {clients_at_once}")
        save_hparams(self)
        self.network = network()
        self.make_optimizer = optimizer or _client_sgd
        self.make_scheduler = lr_scheduler
        self.local = local or LocalTraining()
        self.objective = objective or LocalObjective()
        self.aggregator = aggregator or FedAvg()
        self.make_server_optimizer = server_optimizer
        self.buffers_rule, self.rate_reduce = buffers, rate_reduce
        self.seed = run_seed(seed)
        self.clients_at_once = clients_at_once
        self.measures_clients = False
        self.chosen: list[ClientUpdate] = []
        self._updates: list[ClientUpdate] = []
        self._waiting: list[ClientBatch] = []  # clients of a group that is not complete yet
        self._to_train = 0  # clients of this process that are still to come in this round
        self._copies: dict[int, nn.Module] = {}  # in a dict, hidden from nn.Module: they are scratch
        self._stack: Stack = LinearStack  # how several are trained at once; found before the fit
        self._compile: dict[str, Any] | None = None  # options of `torch.compile` for them
        self._lr: list[float] = []  # of this round, by parameter group
        self.controls = ControlVariates()
        self._control_files: dict[int, str] = {}  # of a checkpoint, until training begins
        self.evaluation = ClassifierEvaluation()

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check network, data and what the trainer is asked to do; make metrics for the classes of the data."""
        meta = data_of(self, ImageData).meta
        check_classifier(self.network, meta.shape, meta.num_classes)
        self.evaluation.prepare(meta.shape, meta.classes)
        if stage == "fit":
            self._check_fit()

    def _check_fit(self) -> None:
        self._check_batches_of_one()
        optimizer = self.make_optimizer(self.network.parameters())
        if (self.objective.has_control or self.clients_at_once > 1) and not is_plain_sgd(optimizer):
            needs = "Scaffold" if self.objective.has_control else "clients_at_once above 1"
            raise UserError(f"optimizer: {needs} needs SGD without momentum and weight decay")
        if self.clients_at_once > 1:
            self._stack = find_stack(self.network, self.local, data_of(self, ImageData).meta.shape)
        if self.local.privacy is not None:
            self._check_private()
        if self.make_scheduler is not None and isinstance(self.make_scheduler(optimizer), ReduceLROnPlateau):
            raise UserError("lr_scheduler: expected a function of the round, got ReduceLROnPlateau")

    def _check_batches_of_one(self) -> None:
        """Refuse clients with a last batch of one image where a norm of the network needs more than one value."""
        data, size = data_of(self, FederatedData), self.local.batch_size
        single = [client for client, items in enumerate(data.client_sizes) if items % size == 1 or items == size == 1]
        if not single or not self.local.epochs:
            return
        network = copy.deepcopy(self._largest()).train()
        try:
            with isolated_rng(), torch.no_grad():
                network(torch.zeros(1, *data_of(self, ImageData).meta.shape, device=device_of(network)))
        except ValueError as error:
            client = single[0]
            raise UserError(
                f"local.batch_size: {size} leaves client {client}, of {data.client_sizes[client]} images, and "
                f"{len(single) - 1} others a last batch of one, which this network cannot normalise ({error}); "
                "choose another, or a network with group norm"
            ) from error

    def _check_private(self) -> None:
        """Refuse what `local.privacy` would not cover."""
        if type(self).local_loss is not FederatedClassifier.local_loss:
            raise UserError(f"local.privacy: expected none with {type(self).__name__}, whose loss has other terms")
        if self.clients_at_once > 1:
            raise UserError(f"clients_at_once: expected 1 with local.privacy, got {self.clients_at_once}")
        if self.measures_clients:
            raise UserError(_SCORED)
        network = copy.deepcopy(self.network).train()
        image = torch.zeros(2, *data_of(self, ImageData).meta.shape, device=device_of(network))
        with isolated_rng():
            check_private(network, cross_entropy, image, torch.zeros(2, dtype=torch.int64, device=image.device))

    def compile_networks(self, **options: Any) -> None:
        if self.clients_at_once > 1:
            raise UserError("clients_at_once: expected 1 with compile.backend, which compiles one client's steps")
        if self.local.privacy is not None:
            raise UserError("local.privacy: expected none with compile.backend, which compiles a batch's steps")
        self._compile = options

    def compile_worker(self, worker: nn.Module, **options: Any) -> None:
        """Compile what `local_loss` calls of a working copy."""
        worker.compile(**options)

    def configure_optimizers(self) -> Any:
        make = self.make_server_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        return make(self.network.parameters())

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → (N, K) logits of the global network."""
        return self.network(image)

    def on_fit_start(self) -> None:
        if self._control_files:
            own = Path(self.trainer.default_root_dir)
            run = Path(self.trainer.ckpt_path).parent.parent if self.trainer.ckpt_path else own
            self.controls.read(run / CONTROLS, self._control_files, own=run.resolve() == own.resolve())
            self._control_files = {}

    def on_train_start(self) -> None:
        # Clients that waited when a run was interrupted: checkpoints are read on the CPU.
        self._waiting = [batch.to(self.device) for batch in self._waiting]

    def network_of(self, client: int) -> nn.Module:
        """The global network that a client trains."""
        return self.network

    def _worker(self, network: nn.Module) -> nn.Module:
        """The working copy of a global network, with its weights."""
        if id(network) not in self._copies:
            self._copies[id(network)] = copy.deepcopy(network)
            if self._compile is not None:
                self.compile_worker(self._copies[id(network)], **self._compile)
        worker = self._copies[id(network)]
        _load(worker, network.state_dict())
        return worker

    # ---- a client ----

    def start_round(self, round_number: int, joined: Sequence[int], mine: Sequence[int]) -> None:
        """Make the clients' learning rates of this round. mine: clients that this process is to train."""
        self._to_train = len(mine) - len(self._waiting)
        optimizer = self.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
        if self.make_scheduler is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*")
                scheduler = self.make_scheduler(optimizer)
                for _ in range(round_number):
                    scheduler.step()
        self._lr = [group["lr"] for group in optimizer.param_groups]

    def training_step(self, batch: ClientBatch, batch_idx: int) -> None:
        if batch.last:
            self._server_step()
        elif batch.client >= 0:
            self._waiting.append(batch)
            self._to_train -= 1
            if len(self._waiting) == self.clients_at_once or self._to_train <= 0:
                group, self._waiting = self._waiting, []
                self._updates += [self.train_one(batch)] if self.clients_at_once == 1 else self._train_together(group)

    def client_weights(self, reports: Sequence[ClientUpdate]) -> list[float]:
        """Weights with which `aggregate` is a mean; UserError where it is none."""
        weights = None if self.objective.has_control else self.aggregator.weights(reports)
        if weights is None or type(self).aggregate is not FederatedClassifier.aggregate:
            rule = self.objective if self.objective.has_control else self.aggregator if weights is None else self
            raise UserError(
                f"FederatedRounds: exchange: sum needs a server that takes a mean; {type(rule).__name__} needs what "
                "each client sends; use states"
            )
        return weights

    def privacy_spent(self, steps: Mapping[int, int]) -> dict[str, float]:
        """``privacy_epsilon``, the largest ε of a client, with `local.privacy`; nothing where no noise is added."""
        privacy = self.local.privacy
        if privacy is None or not privacy.noise_multiplier:
            return {}
        sizes = data_of(self, FederatedData).client_sizes
        spent = (
            privacy.epsilon(made, self.local.sampling_rate(sizes[client])) for client, made in steps.items() if made
        )
        return {"privacy_epsilon": max(spent, default=0.0)}

    def take_updates(self) -> list[ClientUpdate]:
        """The updates made since it was last called."""
        updates, self._updates = self._updates, []
        return updates

    def local_loss(self, network: nn.Module, image: Tensor, label: Tensor, client: int) -> Tensor:
        """What a client minimises, before its objective's own term."""
        return cross_entropy(network, image, label)

    def train_one(self, batch: ClientBatch) -> ClientUpdate:
        """Train a copy of the global network on a client's data. batch: on the module's device, of this round."""
        where = batch.round_number, batch.client
        before = self.measure(batch.data, *where) if self.measures_clients else None
        worker, trained = self._train_copy(batch, self.local, self.objective, self._control_gap(batch.client))
        after = self._measure(worker, batch.data, *where) if self.measures_clients else None
        state = {name: value.detach().clone() for name, value in worker.state_dict().items()}
        return self._report(batch, trained, state, before, after)

    def tune(self, batch: ClientBatch, epochs: int) -> nn.Module:
        """A working copy of a client's global network, trained on its data without the objective's term."""
        return self._train_copy(batch, replace(self.local, epochs=epochs, privacy=None), LocalObjective(), [])[0]

    def _train_copy(
        self, batch: ClientBatch, local: LocalTraining, objective: LocalObjective, control: list[Tensor]
    ) -> tuple[nn.Module, tuple[int, int, Tensor]]:
        """The working copy after training on a client's data; and steps, images and mean loss of that."""
        worker = self._worker(self.network_of(batch.client))
        optimizer = self.make_optimizer(worker.parameters())
        for group, lr in zip(optimizer.param_groups, self._lr, strict=False):
            group["lr"] = lr
        loss_of = partial(self.local_loss, client=batch.client)
        with isolated_rng(derived_seed(self.seed, "client", batch.round_number, batch.client)):
            trained = train_client(
                worker, batch.data, local, optimizer, objective, control, self._order(batch), batch.work, loss_of
            )
        return worker, trained

    def _train_together(self, group: Sequence[ClientBatch]) -> list[ClientUpdate]:
        trained, states = train_clients(
            self.network,
            [batch.data for batch in group],
            self.local,
            self._lr[0],
            self.objective,
            [self._control_gap(batch.client) for batch in group],
            [self._order(batch) for batch in group],
            [batch.work for batch in group],
            self._stack,
        )
        updates = []
        for batch, report, state in zip(group, trained, states, strict=True):
            before = after = None
            if self.measures_clients:
                where = batch.round_number, batch.client
                before = self.measure(batch.data, *where)
                worker = self._worker(self.network)
                _load(worker, state)
                after = self._measure(worker, batch.data, *where)
            updates.append(self._report(batch, report, state, before, after))
        return updates

    def _order(self, batch: ClientBatch) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, "order", batch.round_number, batch.client))

    def _report(
        self,
        batch: ClientBatch,
        trained: tuple[int, int, Tensor],
        state: State,
        before: Measurement | None,
        after: Measurement | None,
    ) -> ClientUpdate:
        start = dict(self.network_of(batch.client).named_parameters())
        extras = (
            self.controls.change(start.items(), state, trained[0], self._lr[0]) if self.objective.has_control else {}
        )
        return make_update(batch.client, len(batch.data), trained, start, state, extras, before, after)

    def _control_gap(self, client: int) -> list[Tensor]:
        """SCAFFOLD's ``c - c_k`` by parameter; empty without controls."""
        return self.controls.gap(client, self.network.named_parameters()) if self.objective.has_control else []

    def measure(self, data: ImageBatch, round_number: int, client: int) -> Measurement:
        """Loss and activity of the global network on a client's data; UserError with `local.privacy`."""
        if self.local.privacy is not None:
            raise UserError(_SCORED)
        return self._measure(self.network_of(client), data.to(self.device), round_number, client)

    def _measure(self, network: nn.Module, data: ImageBatch, round_number: int, client: int) -> Measurement:
        # Before and after training the same random numbers, or the credit would measure the input's noise.
        with isolated_rng(derived_seed(self.seed, "measure", round_number, client)):
            return measure(network, data, len(self.evaluation.classes), reduce=self.rate_reduce)

    # ---- the server ----

    @torch.no_grad()
    def _server_step(self) -> None:
        updates = [update.to(self.device) for update in self.chosen]
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
        elif updates and self.buffers_rule == "static":
            self._measure_norms()
        if self.objective.has_control:
            self.controls.update(updates, len(data_of(self, FederatedData).client_sizes))

    def _measure_norms(self) -> None:
        """Batch norms' statistics of the global weights: means over batches of all clients' images."""
        data = data_of(self, FederatedData)
        for network in self._global_networks():
            batches = (
                image.to(self.device)
                for client, items in enumerate(data.client_sizes)
                if items > 1
                for image in data.client_data(client).image.split(_NORM_BATCH)
            )
            measure_norms(network, batches)

    def _global_networks(self) -> Sequence[nn.Module]:
        return [self.network]

    def aggregate(self, updates: Sequence[ClientUpdate]) -> State:
        """The server's new state, before its optimiser; updates: at least one, in the order of client ids."""
        parameters = [name for name, _ in self.network.named_parameters()]
        return self.aggregator(self.network.state_dict(), updates, parameters)

    # ---- evaluation ----

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``index`` (N,) and ``probabilities`` (N, K)."""
        return {"index": batch.index, "probabilities": self(batch.image).softmax(1)}

    # ---- what callbacks and commands ask ----

    def progress(self) -> Progress:
        return Progress("round", self.global_step)

    def training_parts(self, shape: tuple[int, ...]) -> TrainingStep:
        """A client's local step, on a working copy of the global network."""
        network, copies = self._largest(), self.clients_at_once
        optimizer = self.make_optimizer(network.parameters())
        return TrainingStep(network, (copies * self.local.batch_size, *shape[1:]), optimizer, copies)

    def _largest(self) -> nn.Module:
        """The largest network that a client trains."""
        return self.network

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        # A client that diverges is left out by the server, and does not stop the run.
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        files: dict[int, str] = {}
        if self.objective.has_control and self.trainer.is_global_zero:
            run = Path(self.trainer.default_root_dir)
            files = self.controls.write(run / CONTROLS, self.global_step)
            sweep(run / CONTROLS, run / "checkpoints", files.values())
        checkpoint["federated"] = {
            "server_control": self.controls.server,
            "client_controls": files,
            "waiting": [{**vars(batch), "data": vars(batch.data)} for batch in self._waiting],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.controls.server = checkpoint["federated"]["server_control"]
        self._control_files = checkpoint["federated"]["client_controls"]
        self._waiting = [
            ClientBatch(**{**batch, "data": ImageBatch(**batch["data"])})
            for batch in checkpoint["federated"]["waiting"]
        ]


def _client_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@torch.no_grad()
def _load(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` for a network of the same make, without its checks: it runs once a client."""
    own = network.state_dict()
    torch._foreach_copy_([own[name] for name in state], list(state.values()))
