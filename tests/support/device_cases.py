"""What runs on the device that is not there: every method of the registry, and variants that take other paths."""

from __future__ import annotations

from dataclasses import dataclass

from leanlight.registry import METHODS


@dataclass(frozen=True)
class Case:
    """One run, small enough for a test.

    Args:
        options: of the command line, configs first; ``{source}`` stands for the last checkpoint of `source`.
        source: name of the case whose checkpoint it needs.
        command: ``fit``, which is also interrupted and resumed, or ``test``.
    """

    options: tuple[str, ...]
    source: str = ""
    command: str = "fit"


def _model(**arguments: str) -> tuple[str, ...]:
    return tuple(f"--model.init_args.{name.replace('__', '.')}={value}" for name, value in arguments.items())


def _data(**arguments: int) -> tuple[str, ...]:
    return tuple(f"--data.init_args.{name}={value}" for name, value in arguments.items())


_KEPT_FACTOR = "{rank: 2, oversample: 1, power_iters: 1, drift: 1000.0}"  # past an interruption, too
_ROUNDS = "--trainer.callbacks.init_args"
_NETWORK = "network.class_path"

_TRAJECTORIES = (
    "--config=at_bptt/digits_small",
    *_model(distiller="lit_modules.at_bptt.TrajectoryMatching", distiller__init_args__recipe__epochs="2"),
    *_model(distiller__init_args__experts="2", distiller__init_args__steps="3"),
    *_model(distiller__init_args__expert_epochs="1", distiller__init_args__max_start="1"),
)
_TEACHER = "{class_path: lit_modules.nn.ConvNet, init_args: {in_channels: 1, image_size: 8, depth: 1, norm: batch}}"

# Of deep Q-learning, a step is that of learning alone: at first every decision is a random one.
# What makes the smallest run of a method smaller still; a method without an entry runs as its config says.
SMALLER: dict[str, tuple[str, ...]] = {
    "esvae": _model(generated="16", strengths="[0.1,0.2]", probe_images="64"),
    "at_bptt": _model(evaluation__networks="2", evaluation__epochs="[2,4]"),
    "dsqn": _model(input_noise="[0.1]", weight_noise="[0.1]")
    + _data(replay_start=40, eval_episodes=4, test_episodes=4),
    "falcon_eye": (
        *_model(max_new_tokens="4", backbone__init_args__layers="1", backbone__init_args__vision_layers="1"),
        *("--data.init_args.shapes.train=96", "--data.init_args.shapes.val=16", "--data.init_args.shapes.test=16"),
        "--data.init_args.eval_batch_size=8",
    ),
    "tical": _model(assessment__warmup_epochs="1", assessment__theta="0.2", assessment__length="64"),
}

# Variants by method, beside its smallest config. A new method needs none.
VARIANTS: dict[str, dict[str, Case]] = {
    "classifier": {
        "spiking": Case(("--config=classifier/digits_small", *_model(network="lit_modules.nn.SpikingConvNet"))),
        "teacher": Case(
            ("--config=classifier/digits_small", *_model(teacher_checkpoint="{source}", distill_weight="0.5")),
            source="classifier",
        ),
        "noise": Case(
            (
                "--config=classifier/digits_small",
                "--robustness.corruptions=[gaussian,shot,impulse,speckle]",
                "--robustness.severities=[2,5]",
            )
        ),
    },
    "esvae": {
        "vae": Case(("--config=esvae/digits_small", *_model(network="lit_modules.esvae.VAE"))),
        "fsvae": Case(("--config=esvae/digits_small", *_model(network="lit_modules.esvae.FSVAE"))),
    },
    "at_bptt": {
        "lowrank": Case(
            (
                "--config=at_bptt/digits_small",
                *_model(distiller__init_args__engine__init_args__hessian="lowrank"),
                *_model(distiller__init_args__engine__init_args__low_rank=_KEPT_FACTOR),
            )
        ),
        "unrolled": Case(
            ("--config=at_bptt/digits_small", *_model(distiller__init_args__engine="lit_modules.at_bptt.Unrolled"))
        ),
        "replicas": Case(("--config=at_bptt/digits_small", *_model(replicas="3"))),
        "matching": Case(
            (
                "--config=at_bptt/digits_small",
                *_model(distiller="lit_modules.at_bptt.DistributionMatching", learn_labels="false"),
            )
        ),
        "gradients": Case(
            (
                "--config=at_bptt/digits_small",
                *_model(distiller="lit_modules.at_bptt.GradientMatching", learn_labels="false"),
                *_model(distiller__init_args__inner_loop="2", distiller__init_args__augment="true"),
            )
        ),
        "trajectories": Case(_TRAJECTORIES),
        "trajectories_by_difficulty": Case(
            (*_TRAJECTORIES, *_model(learn_labels="false", distiller__init_args__alignment__first_max_start="0"))
        ),
        "statistics": Case(
            (
                "--config=at_bptt/digits_small",
                *_model(distiller="lit_modules.at_bptt.SqueezeRecoverRelabel", learn_labels="false"),
                *_model(distiller__init_args__teacher=_TEACHER, distiller__init_args__recipe__epochs="1"),
            )
        ),
    },
    "dsqn": {
        "dqn": Case(("--config=dsqn/catch_small__dqn",)),
        **{
            readout: Case(("--config=dsqn/catch_small", *_model(network__init_args__readout=readout)))
            for readout in ("spike_rate", "max_mem", "last_mem", "mean_mem")
        },
        "converted": Case(
            (
                "--config=dsqn/catch_small__converted",
                *_model(source_checkpoint="{source}", time_steps="10", states="20"),
            ),
            source="dsqn dqn",
            command="test",
        ),
    },
    "sfedca": {
        "scaffold": Case(
            (
                "--config=sfedca/digits_small",
                *_model(objective="lit_modules.federated.Scaffold"),
                f"{_ROUNDS}.selector=lit_modules.federated.RandomClients",
            )
        ),
        "two at once": Case(
            (
                "--config=sfedca/digits_small",
                *_model(network="lit_modules.sfedca.ReLUCNN", clients_at_once="2"),
            )
        ),
        "high firing": Case(("--config=sfedca/digits_small", f"{_ROUNDS}.selector=lit_modules.sfedca.HighFiring")),
        "by class": Case(("--config=sfedca/digits_small", f"{_ROUNDS}.selector.init_args.mode=class_abs")),
        "power of choice": Case(
            ("--config=sfedca/digits_small", f"{_ROUNDS}.selector=lit_modules.federated.PowerOfChoice")
        ),
    },
    "sfedhifi": {
        "slices": Case(
            (
                "--config=sfedhifi/digits_small",
                *_model(network__init_args__factorised="false", sharing="slices", hifi="null"),
            )
        ),
    },
    "spike_nvpt": {
        "probe": Case(("--config=spike_nvpt/digits_small", *_model(tuning="lit_modules.spike_nvpt.LinearProbe"))),
        "last": Case(
            (
                "--config=spike_nvpt/digits_small",
                *_model(tuning__init_args__depth="last", tuning__init_args__blocks="2"),
            )
        ),
    },
    "hid": {
        name: Case((f"--config=hid/planted_small__{name}",))
        for name in (
            "hid_released",
            "wo_hi",
            "loam",
            "tailnet",
            "lapsr",
            "cosine",
            "srgnn",
            "gcegnn",
            "gru4rec",
            "itemknn",
        )
    },
}


def cases() -> dict[str, Case]:
    """All cases by name: that of a method, and "method variant"."""
    found = {}
    for name, info in METHODS.items():
        smaller = SMALLER.get(name, ())
        found[name] = Case((f"--config={info.smallest}", *smaller))
        for variant, case in VARIANTS.get(name, {}).items():
            found[f"{name} {variant}"] = Case(
                (*case.options[:1], *smaller, *case.options[1:]), case.source, case.command
            )
    return found
