"""The suite's methods as a static table, readable without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leanlight.configs_path import config_root
from leanlight.contracts.errors import UserError, nearest


@dataclass(frozen=True)
class MethodInfo:
    """One method.

    name: folder in lit_modules and configs. title: what it is. paper: reference, empty for the suite's own tools.
    module: import path of its main LightningModule. extra: optional dependencies it needs, empty for none.
    benchmark: ``module:function`` for `leanlight benchmark`. commands: further subcommands it registers.
    """

    name: str
    title: str
    paper: str
    module: str
    extra: str = ""
    benchmark: str = ""
    commands: tuple[str, ...] = ()

    def _configs(self, folder: str = "") -> list[str]:
        base = config_root() / self.name / folder
        return [(Path(self.name) / folder / path.stem).as_posix() for path in sorted(base.glob("*.yaml"))]

    @property
    def configs(self) -> list[str]:
        """Names of its runnable configs."""
        return self._configs()

    @property
    def tables(self) -> list[str]:
        """Names of its result tables."""
        return self._configs("tables")

    @property
    def pipelines(self) -> list[str]:
        """Names of its pipelines."""
        return self._configs("pipelines")

    @property
    def smallest(self) -> str:
        """The config that runs in seconds, used by tests: digits or Catch before others."""
        small = [name for name in self.configs if name.endswith("_small")]
        return min(small, key=lambda name: ("digits" not in name and "catch" not in name, len(name), name))


METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            name="classifier",
            title="Image classifier, ordinary and spiking: the suite's shared tool",
            paper="",
            module="lit_modules.classifier.ImageClassifier",
            benchmark="leanlight.benchmarks.classifier:run",
        ),
        MethodInfo(
            name="esvae",
            title="ESVAE, FSVAE and VAE: spiking variational autoencoders",
            paper="Zhan et al. 2023, arXiv:2310.14839",
            module="lit_modules.esvae.ImageAutoencoder",
            benchmark="leanlight.benchmarks.esvae:run",
        ),
        MethodInfo(
            name="at_bptt",
            title="AT-BPTT, RaT-BPTT, BPTT, DM: dataset distillation",
            paper="Li et al. 2025, arXiv:2510.04838",
            module="lit_modules.at_bptt.DatasetDistillation",
            benchmark="leanlight.benchmarks.at_bptt:run",
        ),
        MethodInfo(
            name="dsqn",
            title="DSQN, DQN and converted DQN: deep spiking Q-networks on games",
            paper="Liu et al. 2022, arXiv:2201.07211",
            module="lit_modules.dsqn.DeepQLearning",
            extra="rl",
            benchmark="leanlight.benchmarks.dsqn:run",
            commands=("play",),
        ),
        MethodInfo(
            name="sfedca",
            title="SFedCA, FedAvg, FedProx, SCAFFOLD, power-of-choice: choosing clients of spiking federations",
            paper="Zhan et al. 2024, arXiv:2406.12200",
            module="lit_modules.federated.FederatedClassifier",
            benchmark="leanlight.benchmarks.federated:run",
        ),
        MethodInfo(
            name="sfedhifi",
            title="SFedHIFI, FedAvg-het, HeteroFL: federations of spiking networks of different widths",
            paper="Tao et al. 2026, arXiv:2603.14956",
            module="lit_modules.sfedhifi.WidthFederation",
            benchmark="leanlight.benchmarks.sfedhifi:run",
        ),
    )
}


def method(name: str) -> MethodInfo:
    """Return a method by name; UserError with the nearest name otherwise."""
    if name not in METHODS:
        raise UserError(
            f"method {name!r}: not a method of the suite{nearest(name, METHODS)}; `leanlight methods` lists them"
        )
    return METHODS[name]
