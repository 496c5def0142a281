"""SCAFFOLD's control variates (Karimireddy et al. 2020, arXiv:1910.06378; option II)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from leanlight.contracts import ClientUpdate, UserError, atomic_path, to_device
from leanlight.contracts.federated import State

Named = Iterable[tuple[str, Tensor]]


class ControlVariates:
    """The server's control c and those of the clients c_k, by parameter; all are 0 at the start.

    Clients' controls stay on the CPU, since there may be many; those of clients that have not trained yet take no room.
    They are written when they change, many in a file; a checkpoint says which file has which client's.
    """

    def __init__(self) -> None:
        self.server: State = {}
        self.clients: dict[int, State] = {}
        self._files: dict[int, str] = {}
        self._changed: set[int] = set()

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
            self.commit(update.client, update.extras)
            for name, change in update.extras.items():
                # A process that has trained nobody yet has no control of the server's either.
                server = to_device(self.server.get(name, torch.zeros_like(change)), change.device)
                self.server[name] = server + change / clients

    def commit(self, client: int, change: Mapping[str, Tensor]) -> None:
        """Take over the client's own part: ``c_k += Δ_k``."""
        known = self.clients.setdefault(client, {})
        known |= {name: known[name] + part.cpu() if name in known else part.cpu() for name, part in change.items()}
        self._changed.add(client)

    def write(self, folder: Path, step: int) -> dict[int, str]:
        """Write what changed since the last call into a new file; return client → name of the file with its control.

        Args:
            folder: made where it is not there.
            step: for the file's name.
        """
        if self._changed:
            path = next(path for n in count() if not (path := folder / f"{step:08d}-{n}.pt").exists())
            with atomic_path(path) as part:
                torch.save({client: self.clients[client] for client in sorted(self._changed)}, part)
            self._files |= dict.fromkeys(self._changed, path.name)
            self._changed.clear()
        return dict(self._files)

    def read(self, folder: Path, files: Mapping[int, str], own: bool) -> None:
        """Take over what `write` returned.

        Args:
            folder: with the files.
            files: client → name of the file with its control.
            own: whether `write` will go on in the same folder; else it writes all of them anew.

        Raises:
            UserError: a file is missing or damaged.
        """
        for name in sorted(set(files.values())):
            try:
                content = torch.load(folder / name, map_location="cpu", weights_only=True)
            except Exception as error:  # of a file of any content
                raise UserError(
                    f"ckpt_path: {folder / name}, SCAFFOLD's controls of this checkpoint, cannot be read "
                    f"({type(error).__name__}); start the run anew"
                ) from error
            self.clients |= {client: control for client, control in content.items() if files.get(client) == name}
        self._files, self._changed = (dict(files), set()) if own else ({}, set(files))


def sweep(folder: Path, checkpoints: Path, kept: Iterable[str]) -> None:
    """Delete files of controls that no checkpoint needs.

    Args:
        folder: with the files.
        checkpoints: folder of checkpoints that are on the disk.
        kept: names of files that the checkpoint needs which is being written.
    """
    needed = set(kept)
    for path in checkpoints.glob("*.ckpt"):
        with suppress(Exception):  # a damaged checkpoint needs nothing
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            needed |= set(saved["federated"]["client_controls"].values())
    for path in folder.glob("*.pt"):
        if path.name not in needed:
            path.unlink()
