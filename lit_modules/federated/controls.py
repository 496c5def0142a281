"""SCAFFOLD's control variates (Karimireddy et al. 2020, arXiv:1910.06378; option II)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from leanlight.contracts import ClientUpdate, to_device
from leanlight.contracts.federated import State

Named = Iterable[tuple[str, Tensor]]


class ControlVariates:
    """The server's control c and those of the clients c_k, by parameter; all are 0 at the start.

    Clients' controls stay on the CPU, since there may be many; those of clients that have not trained yet take no room.
    """

    def __init__(self) -> None:
        self.server: State = {}
        self.clients: dict[int, State] = {}

    def gap(self, client: int, parameters: Named) -> list[Tensor]:
        """``c - c_k`` for each of the global network's `parameters` (name, value), on their device."""
        known, gap = self.clients.get(client, {}), []
        for name, parameter in parameters:
            server = to_device(self.server.setdefault(name, torch.zeros_like(parameter)), parameter.device)
            gap.append(server - to_device(known[name], parameter.device) if name in known else server.clone())
        return gap

    def change(self, start: Named, trained: Mapping[str, Tensor], steps: int, lr: float) -> State:
        """``c_k' - c_k = (w_r - w_k) / (K η) - c`` of a client after its training.

        Args:
            start: the received parameters w_r, (name, value).
            trained: the client's state with its trained parameters w_k.
            steps: its local steps K.
            lr: their learning rate η.
        """
        factor = 1.0 / (max(steps, 1) * lr)
        return {
            name: ((value.detach() - trained[name]) * factor) - to_device(self.server[name], value.device)
            for name, value in start
        }

    def update(self, updates: Sequence[ClientUpdate], clients: int) -> None:
        """Take over the changes that the chosen clients sent: ``c_k += Δ_k`` and ``c += Σ Δ_k / N``.

        updates: with the changes as `extras`. clients: N, of the whole federation.
        """
        for update in updates:
            known = self.clients.setdefault(update.client, {})
            for name, change in update.extras.items():
                known[name] = known[name] + change.cpu() if name in known else change.cpu()
                # A process that has trained nobody yet has no control of the server's either.
                server = to_device(self.server.get(name, torch.zeros_like(change)), change.device)
                self.server[name] = server + change / clients
