"""The checks of `make gpu`, run with the CPU in the GPU's place, and seen to fail where they must."""

import functools
import importlib
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from leanlight.benchmarks.core import PaperStep
from leanlight.benchmarks.gpu import neurons, speed, training
from leanlight.benchmarks.gpu.checks import NotRun, outcome
from leanlight.benchmarks.gpu.suite import GROUPS, checks
from leanlight.contracts import UserError
from leanlight.registry import METHODS
from lit_modules.nn import integrate_and_fire, lif

SHORT_GAMES = ["decisions_per_epoch=80", "replay_start=80", "eval_episodes=10", "test_episodes=10"]
SHORT_GAMES = [f"--data.init_args.{setting}" for setting in SHORT_GAMES]
QUICK = [check for check in neurons.checks("cpu") if check.name.startswith("scan/")]


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.name)
def test_the_fused_neuron_agrees_with_itself(check):
    line = outcome(check)
    assert line["verdict"] == "passed", line
    assert 0.02 < line["figures"]["firing rate"] < 0.5  # neither silent nor saturated: there is something to compare
    assert line["figures"]["neurons"] > 10_000


@pytest.mark.parametrize(
    "other", [{"v_threshold": 0.21}, {"tau": 0.3}, {"surrogate_gradient": "atan"}, {"detach_reset": True}], ids=str
)
def test_another_neuron_is_told_apart(other):
    made = iter([lif(), lif(), lif(**other)])  # for the currents, for the CPU, for the device
    assert not neurons.against_cpu(lambda: next(made), "cpu").passed


@pytest.mark.parametrize(
    "make", [lif, functools.partial(lif, decay_input=True), integrate_and_fire], ids=["lif", "decay_input", "if"]
)
def test_plain_is_spikingjellys_own_neuron_with_the_same_constants(make):
    node = make(surrogate_gradient="sigmoid")
    current = neurons.separated_currents(node)
    found = []
    for each in (node, neurons.plain(node)):
        x = current.clone().requires_grad_()
        spikes = each(x)
        (spikes * current).sum().backward()
        found.append((spikes.detach(), x.grad))
    assert type(neurons.plain(node)) is not type(node)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


def test_currents_are_exact_in_bf16():
    current = neurons.separated_currents(lif())
    assert torch.equal(current, current.bfloat16().float())


def test_every_method_has_its_checks_under_names_of_their_own(tmp_path):
    for group in GROUPS:
        names = [check.name for check in checks(group, tmp_path, "cpu")]
        assert len(names) == len(set(names)) >= 8, group


@pytest.mark.parametrize("name", [name for name, info in METHODS.items() if info.benchmark])
def test_every_benchmark_offers_steps_at_the_papers_shapes(name):
    module = importlib.import_module(METHODS[name].benchmark.partition(":")[0])
    makers = module.paper_steps("cpu", quick=True)
    assert makers
    for make in makers.values():
        step = make()
        step.run()
        assert step.samples > 0


def test_speed_is_measured_and_compared():
    steps = []
    step = PaperStep(lambda: steps.append(torch.is_autocast_enabled("cpu")), samples=32)
    found = speed.plain(lambda: step)
    assert found.passed
    assert found.figures["samples/s"] == pytest.approx(32 * found.figures["steps/s"])
    assert math.isfinite(found.figures["steps/s"])
    steps.clear()
    speed.mixed(lambda: step, "cpu")
    assert set(steps) == {True, False}
    for measure in (
        lambda: speed.compiled(lambda: step),
        lambda: speed.mixed(lambda: PaperStep(print, 1, mixed=False), ""),
    ):
        with pytest.raises(NotRun):
            measure()


class Waiting(BoringModel):
    """Waits for a GPU, as PyTorch reports it, twice in every training step, and after every epoch."""

    def training_step(self, batch, batch_idx):
        warnings.warn("called a synchronizing CUDA operation (of a test)", stacklevel=2)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        warnings.warn("called a synchronizing CUDA operation (of a test)", stacklevel=2)

    def on_train_epoch_end(self):
        warnings.warn("called a synchronizing CUDA operation (of a test)", stacklevel=2)


@pytest.mark.parametrize(("model", "waits"), [(Waiting, 12), (BoringModel, 0)])
def test_waiting_in_a_step_is_seen_and_only_there(tmp_path, model, waits):
    watch = training.SyncWatch(steps=6, warmup=3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"max_epochs": 10, "limit_train_batches": 4, "limit_val_batches": 1, "default_root_dir": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(accelerator="cpu", callbacks=[watch], **limits, **quiet).fit(model())
    assert watch.seen == 9  # and then it stops
    assert len(watch.waits) == waits
    assert all("test_gpu_checks.py" in place for place in watch.waits)


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """Runs of which the one on the device has another seed."""
    folder = tmp_path_factory.mktemp("seeds")
    made = training.Runs(["classifier/digits_small"], folder, "cpu", epochs=1)
    made._made["device"] = training.run_here([*made.fit_options("device", "cpu", 1), "--seed_everything=1"])
    return made


@pytest.mark.slow
def test_another_first_loss_fails(two_seeds):
    found = training.first_loss(two_seeds)
    assert not found.passed
    assert found.value > 1e-3


def test_a_deterministic_run_leaves_the_process_as_it_was(tmp_path):
    made = training.Runs(["classifier/digits_small"], tmp_path, "cpu")
    with pytest.raises(UserError):
        training.run_here([*made.fit_options("a", "cpu", 1), "--trainer.deterministic=true", "--run.id=/"])
    limits = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--run.test=none"]
    training.run_here([*made.fit_options("b", "cpu", 1), *limits, "--trainer.deterministic=true"])
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_that_failed_fails_again_without_a_second_try(tmp_path, monkeypatch):
    tried, run_here = [], training.run_here
    monkeypatch.setattr(training, "run_here", lambda words: tried.append(words) or run_here(words))
    made = training.Runs(["classifier/digits_small"], tmp_path, "cpu", more=["--data.init_args.batch_size=-1"])
    errors = [outcome(training.Check("m", "n", "w", functools.partial(training.first_loss, made))) for _ in range(2)]
    assert all("batch_size" in line["why"] for line in errors)
    assert len(tried) == 1


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_all_checks_that_compare_pass_when_the_cpu_is_compared_with_itself(group, tmp_path, monkeypatch):
    whole = training.Runs.fit_options

    def shorter(made, name, device, epochs=0):
        return [*whole(made, name, device, epochs), *(SHORT_GAMES if made.config[0].startswith("dsqn") else ())]

    monkeypatch.setattr(training.Runs, "fit_options", shorter)
    monkeypatch.setattr(training, "_EPOCHS", 1)
    others = ("kill", "two_gpus", "two_as_one")  # in processes of their own: one method shows that they work
    lines = [
        outcome(check)
        for check in checks(group, tmp_path, "cpu")
        if not check.alone and (check.name not in others or group == "classifier")
    ]
    bad = {line["name"]: line["why"] or line["value"] for line in lines if line["verdict"] == "failed"}
    bad.pop("metric_bf16", None)  # after one epoch it says nothing
    assert not bad
    assert sum(line["verdict"] == "passed" for line in lines) > len(lines) / 2
