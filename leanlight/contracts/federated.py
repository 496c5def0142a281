"""What the server of a simulated federation, its clients' data and the module that trains them ask of one another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from leanlight.contracts.batch import Batch, to_device
from leanlight.contracts.images import ImageBatch, InMemoryImages
from leanlight.contracts.protocols import Split

State = dict[str, Tensor]


@dataclass(frozen=True)
class ClientBatch(Batch):
    """All data of one federated client for one round.

    Args:
        data: its images; empty at a batch without a client.
        client: its id, or -1.
        round_number: of the round, from 0.
        work: share of its local steps that it manages, in (0, 1].
        last: whether the server's step is due; such a batch has no client.
    """

    data: ImageBatch
    client: int
    round_number: int
    work: float = 1.0
    last: bool = False


@dataclass(frozen=True)
class Measurement:
    """What given weights do on a client's data, without training.

    Args:
        loss: mean loss.
        rates: (L, T), mean firing rate (without spikes: mean absolute activation) of each layer and time step.
        class_rates: (K,), mean over a class's samples of their rate over layers and time; 0 for absent classes.
    """

    loss: float
    rates: Tensor
    class_rates: Tensor


@dataclass(frozen=True)
class ClientUpdate:
    """What a client has after its local training.

    Args:
        client: its id.
        items: size of its data.
        steps: local steps made.
        loss: mean loss over them.
        passes: images seen.
        state: parameters and buffers.
        distance: Euclidean distance of its parameters from the received ones.
        extras: whatever else it sends (SCAFFOLD: the change of its control variate).
        before: measurement with the received weights, where the selector asks for it.
        after: measurement with its own weights, where the selector asks for it.
        received_bytes: traffic from the server.
        sent_bytes: traffic to the server, if it is chosen.
        finite: whether nothing of it is NaN or infinite.
    """

    client: int
    items: int
    steps: int
    loss: float
    passes: int
    state: State
    distance: float = 0.0
    extras: State = field(default_factory=dict)
    before: Measurement | None = None
    after: Measurement | None = None
    received_bytes: int = 0
    sent_bytes: int = 0
    finite: bool = True

    def to(self, device: torch.device | str) -> Self:
        """With all that was sent on `device`."""
        state = {name: to_device(value, device) for name, value in self.state.items()}
        return replace(
            self, state=state, extras={name: to_device(value, device) for name, value in self.extras.items()}
        )


class Selector:
    """Chooses the clients of a round; a class of its own for each rule.

    Rules are pure: what they draw comes from `generator`, which is a function of (seed, round).
    """

    #: When a score is taken: never, from the received weights, or from those before and after local training.
    scored: Literal["never", "before", "after"] = "never"

    def candidates(self, sizes: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
        """Draw different clients, ascending.

        Args:
            sizes: items of every client; the empty ones are never drawn.
            count: how many to draw.
            generator: a function of (seed, round).
        """
        eligible = torch.tensor([client for client, size in enumerate(sizes) if size > 0])
        return sorted(eligible[torch.randperm(len(eligible), generator=generator)[:count]].tolist())

    def score(self, before: Measurement, after: Measurement | None, update: ClientUpdate | None) -> float:
        """Score of one candidate; the higher, the sooner it is taken.

        Args:
            before: measurement with the received weights.
            after: measurement with its own weights; None where `scored` is ``before``.
            update: what it sends; None where `scored` is ``before``.
        """
        raise NotImplementedError

    def score_of(self, update: ClientUpdate) -> float | None:
        """Score of a client that has trained; None for one that diverged, and for rules that take none by then."""
        if self.scored != "after" or not update.finite:
            return None
        assert update.before is not None
        return self.score(update.before, update.after, update)

    def choose(self, scores: Mapping[int, float], count: int, generator: torch.Generator) -> list[int]:
        """The clients to take of those that were scored; here the highest, of equals the smaller id.

        Args:
            scores: client → its score.
            count: how many to take.
            generator: a function of (seed, round).
        """
        return sorted(scores, key=lambda client: (-scores[client], client))[:count]

    def may_win(self, scores: Mapping[int, float], count: int) -> Collection[int]:
        """Clients that `choose` could still take when further scores come; updates of others are dropped early."""
        return self.choose(scores, count, torch.Generator())


@runtime_checkable
class FederatedData(InMemoryImages, Protocol):
    """A DataModule of images that hands out clients instead of training batches, as FederatedDataModule does."""

    #: Items of every client.
    client_sizes: Sequence[int]
    #: (clients, classes) int64, how many items of each class a client holds.
    class_matrix: Tensor

    def reserve(self, clients: int) -> None:
        """Say how many clients a round trains at most."""

    def schedule(self, round_number: int, work: Mapping[int, float]) -> None:
        """Clients of the coming round, each with the share of its local steps that it will manage, in (0, 1]."""

    def client_data(self, client: int) -> ImageBatch:
        """All data of a client, images float32 in [0, 1], on the CPU."""

    def as_seen(self, batch: ImageBatch, split: Split) -> ImageBatch:
        """Items of a part as a network sees them: float32 in [0, 1], with noise if there is any."""


@runtime_checkable
class FederatedModule(Protocol):
    """A module that trains one client a batch and makes the server's step at the last batch of a round."""

    #: Whether to measure every client before and after its training.
    measures_clients: bool
    #: The updates that the server's step is to use, set before that batch; in the order of client ids.
    chosen: list[ClientUpdate]

    def start_round(self, round_number: int, joined: Sequence[int], mine: Sequence[int]) -> None:
        """Called on every process before the first batch of a round.

        Args:
            round_number: of the round, from 0.
            joined: clients of the round, those who drop out included.
            mine: those that this process is still to train.
        """

    def network_of(self, client: int) -> nn.Module:
        """The global network that a client trains in this round."""

    def train_one(self, batch: ClientBatch) -> ClientUpdate:
        """Train a copy of the global network on a client's data. batch: on the module's device, of this round."""

    def tune(self, batch: ClientBatch, epochs: int) -> nn.Module:
        """A client's global network after so many epochs on the client's data, for itself alone.

        It is a working copy: it serves until the next client trains. batch: as for `train_one`.
        """

    def measure(self, data: ImageBatch, round_number: int, client: int) -> Measurement:
        """Measure the global weights on a client's data.

        Args:
            data: of the client, images float32 in [0, 1].
            round_number: of the round, from 0.
            client: its id.
        """

    def client_weights(self, reports: Sequence[ClientUpdate]) -> list[float]:
        """Weights, of sum 1, with which the server's rule is the mean of what clients send; UserError for other rules.

        Args:
            reports: of the chosen clients, in the order of their ids; their states may be missing.
        """

    def privacy_spent(self, steps: Mapping[int, int]) -> dict[str, float]:
        """What to log of the privacy that clients have given up, without names of splits; empty where none is kept.

        Args:
            steps: client → local steps that it has made in all rounds.
        """

    def take_updates(self) -> list[ClientUpdate]:
        """The updates made since it was last called."""


class ClientEngine(Protocol):
    """Clients that run elsewhere, such as on the nodes of Flower, and are asked in each round.

    A client that gives no answer is missing in what is returned.
    """

    def score(self, round_number: int, clients: Sequence[int]) -> dict[int, float]:
        """Scores of the received weights on the data of clients that have not trained.

        Args:
            round_number: of the round, from 0.
            clients: whom to ask.
        """

    def train(
        self, round_number: int, joined: Sequence[int], work: Mapping[int, float]
    ) -> Iterable[tuple[ClientUpdate, float | None]]:
        """Let clients train; return what each reports, and its score. Weights may be missing where there are scores.

        Args:
            round_number: of the round, from 0.
            joined: clients of the round, those who drop out included.
            work: client → share of its local steps that it manages.
        """

    def fetch(self, round_number: int, chosen: Mapping[int, ClientUpdate]) -> dict[int, ClientUpdate]:
        """The reports of the chosen with their weights.

        Args:
            round_number: of the round, from 0.
            chosen: client → what `train` returned of it.
        """
