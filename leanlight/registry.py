"""The one list of methods and commands, readable without importing torch; installed packages may add to it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from leanlight.contracts.errors import UserError, nearest
from leanlight.contracts.plugins import METHODS_GROUP


def config_root() -> Path:
    """Folder of the suite's configs: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


@dataclass(frozen=True)
class Citation:
    """A paper, as it wants to be cited.

    Args:
        authors: full names in the paper's order.
        title: as printed.
        venue: conference or journal; empty for a preprint.
        year: year at the venue, where a source states it.
        arxiv: arXiv identifier.
        doi: digital object identifier.
        journal: whether the venue is a journal.
        note: what else a reader of the citation must know.
    """

    authors: tuple[str, ...]
    title: str
    venue: str = ""
    year: int | None = None
    arxiv: str = ""
    doi: str = ""
    journal: bool = False
    note: str = ""

    @property
    def text(self) -> str:
        """The citation as one line."""
        venue = " ".join(str(part) for part in (self.venue, self.year) if part)
        places = [venue, self.arxiv and f"arXiv:{self.arxiv}", self.doi and f"doi:{self.doi}"]
        note = f" ({self.note})" if self.note else ""
        return f"{', '.join(self.authors)}. {self.title}. {', '.join(filter(None, places))}{note}"

    @property
    def bibtex(self) -> str:
        """The citation as a BibTeX entry; the preprint's year where that of the venue is not known."""
        year = self.year or (2000 + int(self.arxiv[:2]) if self.arxiv else "")
        published = bool(self.venue and self.year)
        kind = "misc" if not published else "article" if self.journal else "inproceedings"
        note = "; ".join(filter(None, [self.note, "" if published else self.venue]))
        fields = {
            "author": " and ".join(self.authors),
            "title": f"{{{self.title}}}",  # in double braces: BibTeX styles would change its capitals
            ("journal" if self.journal else "booktitle"): self.venue if published else "",
            "year": str(year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv" if self.arxiv else "",
            "doi": self.doi,
            "note": note,
        }
        key = f"{self.authors[0].split()[-1]}{year}{re.split(r'[^A-Za-z0-9]+', self.title)[0]}".lower()
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@{kind}{{{key},", *lines, "}"])


@dataclass(frozen=True)
class Command:
    """One command of the program.

    Args:
        name: what is typed after `leanlight`.
        module: import path of a module with ``main(arguments) -> exit code``.
        help: one line for `leanlight --help`.
        stage: whether a pipeline may have it as a stage although it is no training; its module then has
            ``parser()``, which knows the options, and ``arguments(words)``, which also checks their values.
        record: JSON file in the stage's output: its ``code_files`` decided it, its numbers are metrics of the stage;
            empty for none.
    """

    name: str
    module: str
    help: str
    stage: bool = False
    record: str = ""


@dataclass(frozen=True)
class MethodInfo:
    """One method.

    Args:
        name: as configs, run folders and results call it.
        title: what it is, in one line.
        module: import path of its main LightningModule.
        smallest: name of the config that runs in seconds; the contract tests run it.
        smallest_inputs: name of the pipeline that has `smallest` as a stage and makes what it needs before; empty where
            it needs nothing.
        citation: its paper; None for the suite's own tools.
        extra: optional dependencies of the suite that it needs, empty for none.
        benchmark: ``module:function`` for `leanlight benchmark`.
        commands: further commands of the program.
        configs_folder: folder of its configs, by default the suite's; a package: ``Path(__file__).parent / "configs"``.
    """

    name: str
    title: str
    module: str
    smallest: str
    citation: Citation | None = None
    extra: str = ""
    benchmark: str = ""
    commands: tuple[Command, ...] = ()
    configs_folder: Path | None = None
    smallest_inputs: str = ""

    @property
    def folder(self) -> Path:
        """Where its configs lie."""
        return self.configs_folder or config_root() / self.name

    def _names(self, folder: str = "") -> list[str]:
        return [
            (Path(self.name) / folder / path.stem).as_posix() for path in sorted((self.folder / folder).glob("*.yaml"))
        ]

    @property
    def configs(self) -> list[str]:
        """Names of its runnable configs."""
        return self._names()

    @property
    def tables(self) -> list[str]:
        """Names of its result tables."""
        return self._names("tables")

    @property
    def pipelines(self) -> list[str]:
        """Names of its pipelines."""
        return self._names("pipelines")


# The commands that belong to no single method, in the order of `leanlight --help`.
COMMANDS = (
    Command("fit", "leanlight.cli.train", "train a model; --resume RUN_DIR goes on with an interrupted run"),
    Command("validate", "leanlight.cli.train", "measure a model on validation data"),
    Command("test", "leanlight.cli.train", "measure a model on test data; --from RUN_DIR takes a finished run's model"),
    Command("predict", "leanlight.cli.train", "write a model's predictions; --from RUN_DIR as for test"),
    Command("run", "leanlight.cli.run", "run a pipeline of stages, reusing those that are finished"),
    Command("reproduce", "leanlight.cli.reproduce", "run what a result table lacks and write its figures and verdicts"),
    Command("sweep", "leanlight.cli.sweep", "search settings on this machine by a W&B sweep file and validation data"),
    Command("report", "leanlight.cli.report", "turn results into Markdown, figures and one HTML page"),
    Command("benchmark", "leanlight.cli.benchmark", "measure speed and memory of methods, compare files or commits"),
    Command("data", "leanlight.cli.data", "list, prepare and check data sets"),
    Command("export", "leanlight.cli.export", "write a trained model so that it works without this suite", stage=True),
    Command("push", "leanlight.cli.push", "share a run's export, with its card, on the Hugging Face hub"),
    Command("pull", "leanlight.cli.pull", "fetch a shared export from the Hugging Face hub"),
    Command(
        "select",
        "leanlight.cli.select",
        "choose the items of a labelled set to keep; --list names the rules",
        stage=True,
        record="selection.json",
    ),
    Command("dashboard", "leanlight.cli.dashboard", "make a method's dashboard at W&B from what its runs log"),
    Command("flower", "leanlight.cli.flower", "run a federation on Flower, simulated or on nodes of its own"),
    Command("methods", "leanlight.cli.methods", "list methods, configs, tables, pipelines and papers"),
)

METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            name="classifier",
            title="Image classifier, ordinary and spiking: the suite's shared tool",
            module="lit_modules.classifier.ImageClassifier",
            smallest="classifier/digits_small",
            benchmark="leanlight.benchmarks.classifier:run",
        ),
        MethodInfo(
            name="esvae",
            title="ESVAE, FSVAE and VAE: spiking variational autoencoders",
            module="lit_modules.esvae.ImageAutoencoder",
            smallest="esvae/digits_small",
            citation=Citation(
                authors=(
                    "Qiugang Zhan",
                    "Ran Tao",
                    "Xiurui Xie",
                    "Guisong Liu",
                    "Malu Zhang",
                    "Huajin Tang",
                    "Yang Yang",
                ),
                title="ESVAE: An Efficient Spiking Variational Autoencoder with Reparameterizable Poisson Spiking "
                "Sampling",
                arxiv="2310.14839",
            ),
            benchmark="leanlight.benchmarks.esvae:run",
        ),
        MethodInfo(
            name="at_bptt",
            title="AT-BPTT, RaT-BPTT, BPTT, DM, DC, DSA, MTT, DATM, SRe2L: dataset distillation",
            module="lit_modules.at_bptt.DatasetDistillation",
            smallest="at_bptt/digits_small",
            citation=Citation(
                authors=(
                    "Muquan Li",
                    "Hang Gou",
                    "Dongyang Zhang",
                    "Shuang Liang",
                    "Xiurui Xie",
                    "Deqiang Ouyang",
                    "Ke Qin",
                ),
                title="Beyond Random: Automatic Inner-loop Optimization in Dataset Distillation",
                venue="NeurIPS",
                year=2025,
                arxiv="2510.04838",
            ),
            benchmark="leanlight.benchmarks.at_bptt:run",
        ),
        MethodInfo(
            name="adq",
            title="ADQ, DQ and coreset rules: which items of a labelled set to keep",
            module="lit_modules.adq.SampleScorer",
            smallest="adq/digits_small",
            citation=Citation(
                authors=("Muquan Li", "Dongyang Zhang", "Qiang Dong", "Xiurui Xie", "Ke Qin"),
                title="Adaptive Dataset Quantization",
                venue="AAAI",
                year=2025,
                arxiv="2412.16895",
            ),
            benchmark="leanlight.benchmarks.adq:run",
        ),
        MethodInfo(
            name="dda",
            title="DDA, CSD, CMI, DeepInversion: distilling a classifier without its data",
            module="lit_modules.dda.DataFreeDistillation",
            smallest="dda/digits_small",
            smallest_inputs="dda/pipelines/digits_small",
            citation=Citation(
                authors=("Muquan Li", "Dongyang Zhang", "Tao He", "Xiurui Xie", "Yuan-Fang Li", "Ke Qin"),
                title="Towards Effective Data-Free Knowledge Distillation via Diverse Diffusion Augmentation",
                venue="ACM MM",
                year=2024,
                arxiv="2410.17606",
                doi="10.1145/3664647.3680711",
            ),
            extra="diffusion",
            benchmark="leanlight.benchmarks.dda:run",
        ),
        MethodInfo(
            name="dsqn",
            title="DSQN, DQN and converted DQN: deep spiking Q-networks on games",
            module="lit_modules.dsqn.DeepQLearning",
            smallest="dsqn/catch_small",
            citation=Citation(
                authors=("Guisong Liu", "Wenjie Deng", "Xiurui Xie", "Li Huang", "Huajin Tang"),
                title="Human-Level Control through Directly-Trained Deep Spiking Q-Networks",
                venue="IEEE Transactions on Cybernetics",
                arxiv="2201.07211",
                journal=True,
            ),
            extra="rl",
            benchmark="leanlight.benchmarks.dsqn:run",
            commands=(Command("play", "leanlight.cli.play", "let a trained agent play: scores and an animation"),),
        ),
        MethodInfo(
            name="sfedca",
            title="SFedCA, FedAvg, FedProx, SCAFFOLD, power-of-choice: choosing clients of spiking federations",
            module="lit_modules.federated.FederatedClassifier",
            smallest="sfedca/digits_small",
            citation=Citation(
                authors=(
                    "Qiugang Zhan",
                    "Jinbo Cao",
                    "Xiurui Xie",
                    "Malu Zhang",
                    "Huajin Tang",
                    "Guisong Liu",
                ),
                title="SFedCA: Credit Assignment-Based Active Client Selection Strategy for Spiking Federated Learning",
                venue="IEEE TNNLS",
                year=2025,
                arxiv="2406.12200",
                journal=True,
                note="authors as on arXiv",
            ),
            benchmark="leanlight.benchmarks.federated:run",
        ),
        MethodInfo(
            name="sfedhifi",
            title="SFedHIFI, FedAvg-het, HeteroFL: federations of spiking networks of different widths",
            module="lit_modules.sfedhifi.WidthFederation",
            smallest="sfedhifi/digits_small",
            citation=Citation(
                authors=("Ran Tao", "Qiugang Zhan", "Shantian Yang", "Xiurui Xie", "Qi Tian", "Guisong Liu"),
                title="SFedHIFI: Fire Rate-Based Heterogeneous Information Fusion for Spiking Federated Learning",
                venue="AAAI",
                year=2026,
                arxiv="2603.14956",
            ),
            benchmark="leanlight.benchmarks.sfedhifi:run",
        ),
        MethodInfo(
            name="spike_nvpt",
            title="Spike-NVPT, VPT, LoRA, BitFit: tuning a frozen vision transformer under noise",
            module="lit_modules.spike_nvpt.TunedClassifier",
            smallest="spike_nvpt/digits_small",
            citation=Citation(
                authors=(
                    "Qiugang Zhan",
                    "Anning Jiang",
                    "Ran Tao",
                    "Ao Ma",
                    "Xiangyu Zhang",
                    "Xiurui Xie",
                    "Guisong Liu",
                ),
                title="Spike-NVPT: Learning Robust Visual Prompts via Bio-Inspired Temporal Filtering and "
                "Discretization",
                arxiv="2604.18284",
            ),
            extra="vision",
            benchmark="leanlight.benchmarks.spike_nvpt:run",
        ),
        MethodInfo(
            name="hid",
            title="HID, LOAM, TailNet, LAP-SR: session recommendation and its long tail",
            module="lit_modules.hid.SessionRecommender",
            smallest="hid/planted_small",
            citation=Citation(
                authors=("Xiao Wang", "Ke Qin", "Dongyang Zhang", "Xiurui Xie", "Shuang Liang"),
                title="Bid Farewell to Seesaw: Towards Accurate Long-tail Session-based Recommendation via Dual "
                "Constraints of Hybrid Intents",
                venue="AAAI",
                year=2026,
                arxiv="2511.08378",
            ),
            commands=(
                Command("recommend", "leanlight.cli.recommend", "recommend items for sessions, in the data's own ids"),
            ),
            benchmark="leanlight.benchmarks.hid:run",
        ),
        MethodInfo(
            name="tical",
            title="TiCAL, MulT, MISA, Self-MM: emotion recognition from text, voice and face that disagree",
            module="lit_modules.tical.EmotionRecognition",
            smallest="tical/planted_small",
            citation=Citation(
                authors=(
                    "Wen Yin",
                    "Siyu Zhan",
                    "Cencen Liu",
                    "Xin Hu",
                    "Guiduo Duan",
                    "Xiurui Xie",
                    "Yuan-Fang Li",
                    "Tao He",
                ),
                title="TiCAL: Typicality-Based Consistency-Aware Learning for Multimodal Emotion Recognition",
                venue="AAAI",
                year=2026,
                arxiv="2511.15085",
            ),
            benchmark="leanlight.benchmarks.tical:run",
        ),
        MethodInfo(
            name="falcon_eye",
            title="FalconEye, other judges of safety, and audits: which answers to people and pictures do harm",
            module="lit_modules.falcon_eye.SafetyJudge",
            smallest="falcon_eye/shapes_small",
            citation=Citation(
                authors=("Qi Xue", "Minrui Jiang", "Runjia Zhang", "Xiurui Xie", "Pei Ke", "Guisong Liu"),
                title="Falcon: A Cross-Modal Evaluation Dataset for Comprehensive Safety Perception",
                arxiv="2509.23783",
            ),
            extra="safety",
            commands=(
                Command("audit", "leanlight.cli.audit", "let judges say which answers do harm: verdicts and a page"),
            ),
            benchmark="leanlight.benchmarks.falcon_eye:run",
        ),
    )
}


@cache
def methods() -> dict[str, MethodInfo]:
    """The suite's methods and those of installed packages; one that cannot be used is a warning line on stderr."""
    known = dict(METHODS)
    for point in sorted(entry_points(group=METHODS_GROUP), key=lambda point: point.name):
        try:
            info = point.load()
            _check_plugin(info, known)
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever goes wrong in a stranger's package must not stop the program
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"leanlight: warning: plug-in {point.name!r} ({point.value}) is left out: {reason}", file=sys.stderr)
        else:
            known[info.name] = info
    return known


def _check_plugin(info: object, known: dict[str, MethodInfo]) -> None:
    if not isinstance(info, MethodInfo):
        raise UserError(f"expected a leanlight.registry.MethodInfo, got a {type(info).__name__}")
    if info.name in known or (config_root() / info.name).exists():
        raise UserError(f"the name {info.name!r} is taken")
    if info.configs_folder is None or not info.configs_folder.is_dir():
        raise UserError(f"configs_folder: no folder at {info.configs_folder}")
    if clash := {command.name for command in info.commands} & _commands(known).keys():
        raise UserError(f"the command {min(clash)!r} is taken")


def _commands(known: dict[str, MethodInfo]) -> dict[str, Command]:
    return {command.name: command for command in (*COMMANDS, *(c for info in known.values() for c in info.commands))}


def commands() -> dict[str, Command]:
    """Every command by name: the suite's own, then those of the methods."""
    return _commands(methods())


def method(name: str) -> MethodInfo:
    """Return a method by name; UserError with the nearest name otherwise."""
    if name not in methods():
        raise UserError(
            f"method {name!r}: not a method of the suite{nearest(name, methods())}; `leanlight methods` lists them"
        )
    return methods()[name]
