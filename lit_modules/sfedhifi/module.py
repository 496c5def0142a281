"""Training glue of federations whose clients train networks of different widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from leanlight.contracts import (
    ClientUpdate,
    FederatedData,
    ImageBatch,
    MediaItem,
    PrimaryMetric,
    Split,
    UserError,
    data_of,
    on_host,
    to_device,
)
from leanlight.contracts.federated import State
from leanlight.contracts.ranges import FiniteFloat, NonNegativeFloat, PositiveInt, PositiveShare, Seed, UnitInterval
from lit_modules.classifier.losses import class_index
from lit_modules.federated import FedAvg, FederatedClassifier, FedNova, LocalObjective, LocalTraining
from lit_modules.history import History
from lit_modules.sfedhifi import pictures
from lit_modules.sfedhifi.decomposition import basis_keys, can_fold, factor_key, factorised_layers, fold_network
from lit_modules.sfedhifi.export import export_widths
from lit_modules.sfedhifi.fusion import HIFI, average_slices, average_widths, share_bases, start_alike, sub_model
from lit_modules.sfedhifi.losses import mask_absent, mean_output_loss, orthogonality, tet_loss
from lit_modules.sfedhifi.networks import ScaledConv2d, WidthNetwork
from lit_modules.sfedhifi.widths import (
    WIDTHS,
    DynamicWidths,
    FixedWidths,
    InformativeLayer,
    InputRates,
    measure_rates,
    percent,
)


class Widths(nn.Module):
    """The global networks of all widths; called, it is the widest.

    Args:
        make: makes the network of a width.
        widths: p in (0, 1], ascending.
    """

    def __init__(self, make: Callable[[float], nn.Module], widths: Sequence[float]) -> None:
        super().__init__()
        if not widths or list(widths) != sorted(set(widths)):
            raise UserError(f"widths: expected different widths, ascending, got {list(widths)}")
        self.models = nn.ModuleDict({percent(width): make(width) for width in widths})

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → (N, K) of the widest."""
        *_, widest = self.models.values()
        return widest(image)


class WidthFederation(FederatedClassifier):
    """SFedHIFI (Tao et al., arXiv:2603.14956) and its rivals: every client trains the width that fits it.

    There is one global network for each of `widths`; ``val/accuracy_mean`` is the mean of their accuracies. Aggregation
    is within each width, and then by `sharing`: ``none`` (FedAvg in a heterogeneous federation), ``basis``, the mean
    of the bases over all widths (FLANC), or ``slices`` (HeteroFL: each element of the widest network is the mean over
    the clients whose part of it was trained). With `hifi` the factor of the most informative layer is fused across
    widths while its window lasts. What a client trains and what the server makes of it are the extension points of
    `FederatedClassifier`.

    Args:
        network: makes a width's `WidthNetwork`: float images (N, C, H, W) in [0, 1] → logits (N, K).
        widths: p, ascending; 0.25, 0.5, 0.75 and 1 in the paper.
        sharing: what widths share: ``none``, ``basis`` (FLANC, SFedHIFI) or ``slices`` (HeteroFL).
        hifi: window and form of the fusion across widths; none by default.
        layer: which factor is fused; the layer with the greatest input firing rate by default, as in the paper.
        budgets: how widths come to clients: drawn each round (``dynamic``, the paper) or tied to them (``fixed``).
        loss: of a client: ``tet`` (the paper's), or ``mean_output``, cross entropy of the mean over time.
        tet_weight: λ of the TET loss, in [0, 1]; 0.001 in the published code.
        tet_target: φ of the TET loss, the level that outputs are pulled to.
        orthogonality_weight: λ_R, of the pull of the bases to orthonormal rows; 10 as published for the ResNet.
        vote_images: held-out validation images on which firing rates are measured before the vote.
        vote_batch: images that cast one vote.
        local: epochs E and batch size B of a client's training; 2 and 32 by default.
        objective: what local training adds to the loss, e.g. FedProx; nothing by default.
        aggregator: FedAvg (default) or FedNova, within each width.
        optimizer: makes a client's optimiser, anew each round; SGD with lr (η) 0.1 by default.
        lr_scheduler: makes the schedule of the clients' learning rate, a step a round; constant by default.
        masked_loss: set outputs of classes that a client lacks to 0 in its loss, and average their rows of the
            classifier over the clients that have them (HeteroFL); with ``slices`` only.
        buffers: of batch norm: ``average`` them with the weights, ``keep`` the server's, or measure them anew with each
            new weights, on the images of all clients (``static``, HeteroFL).
        seed: of widths, data orders and noise; that of ``seed_everything`` by default.
    """

    network: Widths

    def __init__(
        self,
        network: Callable[[float], nn.Module],
        widths: Sequence[PositiveShare] = WIDTHS,
        sharing: Literal["none", "basis", "slices"] = "basis",
        hifi: HIFI | None = None,
        layer: InformativeLayer | None = None,
        budgets: Literal["dynamic", "fixed"] = "dynamic",
        loss: Literal["tet", "mean_output"] = "tet",
        tet_weight: UnitInterval = 1e-3,
        tet_target: FiniteFloat = 1.0,
        orthogonality_weight: NonNegativeFloat = 10.0,
        vote_images: PositiveInt = 256,
        vote_batch: PositiveInt = 32,
        local: LocalTraining | None = None,
        objective: LocalObjective | None = None,
        aggregator: FedAvg | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        masked_loss: bool = False,
        buffers: Literal["average", "keep", "static"] = "average",
        seed: Seed | None = None,
    ) -> None:
        super().__init__(
            network=lambda: Widths(network, widths),
            local=local or LocalTraining(epochs=2, batch_size=32),
            objective=objective,
            aggregator=aggregator,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            buffers=buffers,
            seed=seed,
        )
        self.widths, self.sharing, self.hifi = tuple(widths), sharing, hifi
        self.layer = layer or InformativeLayer()
        self.budgets = DynamicWidths(self.widths) if budgets == "dynamic" else FixedWidths(self.widths)
        self.loss, self.tet_weight, self.tet_target = loss, tet_weight, tet_target
        self.orthogonality_weight, self.masked_loss = orthogonality_weight, masked_loss
        self.vote_images, self.vote_batch = vote_images, vote_batch
        self.width_of: dict[int, float] = {}  # of the clients of this round
        self._owned: Tensor  # (clients, K) bool, the classes that each has
        self._round = 0
        # MB sent since the first round.
        self._traffic: dict[str, float] = {percent(width): 0.0 for width in self.widths}
        self._history = History()
        self._profiles: dict[str, dict[str, float]] = {}
        self._check_rules()
        self._start_alike()
        self.width_metrics = nn.ModuleDict()

    def _check_rules(self) -> None:
        factorised = [bool(factorised_layers(self.models[width])) for width in self.widths]
        if self.sharing == "basis" and not all(factorised):
            raise UserError("sharing: basis needs networks with factorised convolutions")
        if self.sharing == "slices" and any(factorised):
            raise UserError("sharing: slices needs ordinary convolutions; set network factorised: false")
        if self.hifi is not None and self.sharing != "basis":
            raise UserError(f"hifi: needs sharing: basis, got {self.sharing}")
        if self.masked_loss and self.sharing != "slices":
            raise UserError(f"masked_loss: needs sharing: slices, got {self.sharing}")
        if self.sharing == "slices" and isinstance(self.aggregator, FedNova):
            raise UserError("aggregator: FedNova is not defined for slices; use FedAvg")
        layers = list(self._largest().modules())
        if self.buffers_rule != "static" and all(
            any(isinstance(layer, kind) for layer in layers) for kind in (ScaledConv2d, nn.BatchNorm2d)
        ):
            raise UserError("scaler: batch norm's statistics would be those of scaled outputs; set buffers: static")
        if self.objective.has_control:
            raise UserError("objective: control variates are not defined across widths")

    @property
    def models(self) -> dict[float, WidthNetwork]:
        """The global networks by width."""
        return {width: cast(WidthNetwork, self.network.models[percent(width)]) for width in self.widths}

    def _states(self) -> dict[float, State]:
        return {width: model.state_dict() for width, model in self.models.items()}

    @torch.no_grad()
    def _start_alike(self) -> None:
        """All widths begin with one basis, or as slices of the widest."""
        states = self._states()
        if self.sharing == "basis":
            states = start_alike(states, basis_keys(self.models[self.widths[0]]))
        elif self.sharing == "slices":
            widest = states[self.widths[-1]]
            states = {width: sub_model(widest, like) for width, like in states.items()}
        for width, model in self.models.items():
            model.load_state_dict(states[width])

    # ---- a client ----

    def start_round(self, round_number: int, joined: Sequence[int], mine: Sequence[int]) -> None:
        """Draw the widths of all clients that joined, drop-outs included."""
        super().start_round(round_number, joined, mine)
        data = data_of(self, FederatedData)
        clients, self._owned = len(data.client_sizes), to_device(data.class_matrix > 0, self.device)
        self.width_of = self.budgets.draw(joined, clients, self.seed, round_number)
        self._round = round_number

    def network_of(self, client: int) -> nn.Module:
        """The global network of the client's width in this round; UserError for a client that has not joined it."""
        if client not in self.width_of:
            raise UserError(
                "FederatedRounds: selector: a client's width is drawn when it joins a round, so candidates cannot be "
                "scored before; use one that scores after training or not at all"
            )
        return self.models[self.width_of[client]]

    def compile_worker(self, worker: nn.Module, **options: Any) -> None:
        network = cast(WidthNetwork, worker)
        network.forward_steps = torch.compile(network.forward_steps, **options)  # type: ignore[method-assign]

    def local_loss(self, network: nn.Module, image: Tensor, label: Tensor, client: int) -> Tensor:
        """TET or the loss of the mean output, and the pull of the bases to orthonormal rows."""
        outputs = cast(WidthNetwork, network).forward_steps(image)
        if self.masked_loss:
            outputs = mask_absent(outputs, self._owned[client])
        if self.loss == "tet":
            loss = tet_loss(outputs, label, self.tet_weight, self.tet_target)
        else:
            loss = mean_output_loss(outputs, label)
        bases = [layer.basis for layer in factorised_layers(network).values()]
        return loss + self.orthogonality_weight * orthogonality(bases) if self.orthogonality_weight and bases else loss

    # ---- the server ----

    def aggregate(self, updates: Sequence[ClientUpdate]) -> State:
        """The new state of all widths."""
        self._count_traffic(updates)
        states, rule = self._states(), cast(FedAvg, self.aggregator)
        if self.sharing == "slices":
            head = _classifier(self._largest()) if self.masked_loss else []
            wide = average_slices(states[self.widths[-1]], updates, rule.weighting, head, self._owned)
            states = {width: sub_model(wide, like) for width, like in states.items()}
        else:
            parameters = {name for model in self.models.values() for name, _ in model.named_parameters()}
            states = average_widths(states, updates, self.width_of, parameters, rule)
            if self.sharing == "basis":
                states = share_bases(states, updates, basis_keys(self.models[self.widths[0]]), rule.weighting)
            if self.hifi is not None and self.hifi.active(self._round + 1):
                states = self.hifi.fuse(states, [factor_key(layer) for layer in self._informative_layers()])
        return {
            f"models.{percent(width)}.{key}": value for width, state in states.items() for key, value in state.items()
        }

    def _count_traffic(self, updates: Sequence[ClientUpdate]) -> None:
        for update in updates:
            self._traffic[percent(self.width_of[update.client])] += update.sent_bytes / 1e6
        sent = {f"train/uplink_mb_at_{width}": self._traffic[percent(width)] for width in self.widths}
        self.log_dict(on_host(sent), on_step=False, on_epoch=True, batch_size=1)

    def _informative_layers(self) -> list[str]:
        """Layers to fuse, by the firing rates of the weights that the clients received, on held-out images."""
        layers = list(factorised_layers(self.models[self.widths[0]]))
        measured = self._rates() if self._round and self.layer.rule in ("max_rate", "min_rate") else {}
        chosen = self.layer.choose(layers, measured, self.seed, self._round)
        self._history.add(fused_round=self._round + 1, fused_layer=chosen)
        return chosen

    def _rates(self) -> dict[float, InputRates]:
        split = data_of(self, FederatedData).val_split
        if split is None:
            raise UserError("layer: votes need validation images; set the data's val_fraction")
        images = to_device(split.images[: self.vote_images], self.device).float() / 255
        measured = {width: measure_rates(model, images.split(self.vote_batch)) for width, model in self.models.items()}
        self._profiles = {percent(width): rates.profile() for width, rates in measured.items()}
        return measured

    # ---- evaluation ----

    def setup(self, stage: str) -> None:
        """Also make a metric for every width."""
        super().setup(stage)
        classes = len(self.evaluation.classes)
        for split in ("val", "test"):
            if split not in self.width_metrics:
                metrics = {percent(width): MulticlassAccuracy(classes, average="micro") for width in self.widths}
                self.width_metrics[split] = nn.ModuleDict(metrics)

    def evaluate(self, batch: ImageBatch, split: Split) -> None:
        """Measure the widest network as a classifier, and the accuracy of every width."""
        super().evaluate(batch, split)
        label = class_index(batch.label)
        for width, model in self.models.items():
            metric = self._width_metrics(split)[percent(width)]
            metric.update(model(batch.image), label)
            name = f"{split}/accuracy_at_{width}"
            self.log(name, metric, on_epoch=True, on_step=False, batch_size=len(batch))

    def _width_metrics(self, split: Split) -> dict[str, MulticlassAccuracy]:
        return dict(cast(nn.ModuleDict, self.width_metrics[split]).items())  # type: ignore[arg-type]

    def end_evaluation(self, split: Split) -> None:
        """Log the mean over the widths, too."""
        values = [float(metric.compute()) for metric in self._width_metrics(split).values()]
        self.log(f"{split}/accuracy_mean", sum(values) / len(values))
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._history.add(round=self.global_step, accuracy=values)
        super().end_evaluation(split)

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/accuracy_mean", "max")

    # ---- what callbacks and commands ask ----

    def _largest(self) -> nn.Module:
        return self.models[max(self.widths)]

    def _global_networks(self) -> Sequence[nn.Module]:
        return list(self.models.values())

    def variants(self) -> Mapping[str, nn.Module]:
        """Every width as it runs, and with its convolutions folded where that is the same."""
        variants: dict[str, nn.Module] = {}
        for width, model in self.models.items():
            variants[f"at_{width}"] = model
            if can_fold(model):
                variants[f"folded_at_{width}"] = fold_network(model)
        return variants

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """Those of the classifier for the widest, and accuracy by width, fused layers, firing rates, sizes."""
        items = dict(super().media(split))
        if split == "train":
            return items
        history = self._history
        if len(history["round"]) > 1:
            curve = pictures.accuracy_by_width(history["round"], history["accuracy"], self.widths)
            items["accuracy_by_width"] = curve
        if len(history["fused_round"]) > 1:
            layers = list(factorised_layers(self.models[self.widths[0]]))
            items["fused_layer"] = pictures.fused_layers(history["fused_round"], history["fused_layer"], layers)
        return items | pictures.input_rates(self._profiles) | {"widths": pictures.sizes(self.models)}

    def export(self, directory: Path) -> list[Path]:
        """Write the networks of all widths for plain PyTorch: see `lit_modules.sfedhifi.export`."""
        return export_widths(self.models, self.evaluation.example(), Path(directory), self.evaluation.classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["widths"] = {
            "history": self._history.state_dict(),
            "profiles": self._profiles,
            "traffic": self._traffic,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._history.load_state_dict(checkpoint["widths"]["history"])
        self._profiles, self._traffic = dict(checkpoint["widths"]["profiles"]), dict(checkpoint["widths"]["traffic"])


def _classifier(network: nn.Module) -> list[str]:
    """Keys of the last linear layer."""
    *_, name = (name for name, layer in network.named_modules() if isinstance(layer, nn.Linear))
    return [f"{name}.{key}" for key, _ in network.get_submodule(name).named_parameters()]
