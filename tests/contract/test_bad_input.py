"""Bad input: exit code 2, one line that names the key, and nothing written."""

import sys
from pathlib import Path

import pytest
import torch

from leanlight.__main__ import main

CONFIG = "classifier/digits_small"
QUICK = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--run.wandb=disabled", "--run.test=none"]


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; assert exit code 2, one line with `words`, and no run left behind."""
    monkeypatch.chdir(tmp_path)

    def check(arguments, *words, leaves_nothing=True):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["leanlight", *map(str, arguments)])
        code = main([str(argument) for argument in arguments])
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leanlight: error:")]
        assert code == 2
        assert len(error) == 1
        for word in words:
            assert word in error[0], error[0]
        if leaves_nothing:
            assert sorted(tmp_path.rglob("*")) == before

    return check


def overlay(tmp_path, text):
    path = tmp_path / "overlay.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("trianer: {max_epochs: 1}", ["trianer", "did you mean 'trainer"]),
        ("trainer: {max_epohcs: 1}", ["trainer.max_epohcs", "did you mean 'trainer.max_epochs'"]),
        (
            "model: {init_args: {network: {init_args: {widht: 3}}}}",
            ["model.init_args.network.init_args.widht", "did you mean 'width'"],
        ),
        ("model: {init_args: {label_smothing: 0.1}}", ["model.init_args.label_smothing", "'label_smoothing'"]),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_one(refuse, tmp_path, yaml, words):
    refuse(["fit", "--config", CONFIG, "--config", overlay(tmp_path, yaml)], *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.max_epochs=many"], ["trainer.max_epochs: expected an integer", "many"]),
        (
            ["--data.init_args.batch_size=big"],
            ["data.init_args.batch_size", "an integer of at least 1", "big"],
        ),
        (["--model.init_args.network.class_path=lit_modules.nn.ConvNte"], ["class_path", "did you mean 'ConvNet'"]),
        (["--trainer.max_epohcs=3"], ["trainer.max_epohcs", "did you mean 'trainer.max_epochs'"]),
        (["--data.init_args.batch_size=-4"], ["batch_size", "-4"]),
        (["--data.init_args.val_fraction=1.5"], ["val_fraction", "1.5"]),
        (["--data.init_args.dataset=fashon_mnist"], ["fashon_mnist", "did you mean 'fashion_mnist'"]),
        (["--trainer.precision=17"], ["trainer.precision"]),
        (["--trainer.accelerator=abacus"], ["abacus"]),
        (["--run.id=../elsewhere"], ["run.id", "../elsewhere"]),
        (["--run.test=first"], ["run.test"]),
        (["--ckpt_path=nowhere.ckpt"], ["ckpt_path", "nowhere.ckpt"]),
        (["--seed_everything=often"], ["seed_everything"]),
        (["surplus"], ["surplus"]),
        (["--ckpt_path=best"], ["ckpt_path", "best", "--resume"]),
        (["--seed_everything=-1"], ["seed_everything", "from 0 to 4294967295", "-1"]),
        (["--trainer.val_check_interval=0"], ["trainer.val_check_interval", "at least 1", "'0'"]),
        (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches", "at least 1", "'0'"]),
        (["--data.init_args.batch_size=null"], ["data.init_args.batch_size", "at least 1", "None"]),
        (
            ["--model.init_args.optimizer.init_args.lr=-1"],
            ["model.init_args.optimizer", "AdamW", "learning rate", "-1"],
        ),
        (
            ["--model.init_args.lr_scheduler=StepLR", "--model.init_args.lr_scheduler.step_size=0"],
            ["model.init_args.lr_scheduler", "StepLR"],
        ),
        (["--model.init_args.network.init_args.norm=bath"], ["network.init_args.norm", "did you mean 'batch'"]),
        (["--model.init_args=3"], ["model: expected class_path and init_args", "'3'"]),
        (["--trainer=3"], ["trainer: expected keys and values", "'3'"]),
        (["--data.init_args.image_size=1000000"], ["data.init_args.image_size", "need 335,276 GiB"]),
        (["--data.init_args.batch_size=1" + "0" * 30], ["data.init_args.batch_size", "that 64 bits can hold"]),
        # 10^15 weights are refused by the allocator at once, whatever the machine has.
        (["--model.init_args.network.init_args.width=1" + "0" * 12], ["not enough memory", "asked for at once"]),
    ],
)
def test_a_wrong_value_is_named(refuse, arguments, words):
    refuse(["fit", "--config", CONFIG, *QUICK, *arguments], *words)


def test_more_time_steps_than_any_simulation_has_are_refused(refuse):
    steps = "--model.init_args.network.init_args.time_steps=1000000000"
    refuse(["fit", "--config", "esvae/digits_small", *QUICK, steps], "time_steps", "to 100000")


def test_memory_that_ends_while_a_batch_is_computed_is_one_line(refuse, monkeypatch):
    def step(self, *arguments):
        return torch.empty(2**50)

    monkeypatch.setattr("lit_modules.classifier.ImageClassifier.training_step", step)
    refuse(["fit", "--config", CONFIG, *QUICK], "not enough memory", "4,194,304.0 GiB", leaves_nothing=False)


def test_a_config_that_is_not_there_is_named_with_the_nearest_one(refuse):
    refuse(["fit", "--config", "classifier/digits_smal"], "classifier/digits_smal", "'classifier/digits_small'")


def test_an_overlay_that_is_not_there_is_named_with_the_nearest_one(refuse):
    refuse(["fit", "--config", CONFIG, "--config", "trainer/dpp"], "trainer/dpp", "'trainer/ddp'")


def test_a_config_that_is_no_yaml_is_named(refuse, tmp_path):
    refuse(["fit", "--config", CONFIG, "--config", overlay(tmp_path, "trainer: [1, 2")], "overlay.yaml", "YAML")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: [1, 2]", ["trainer: expected keys and values", "[1, 2]"]),
        ("trainer: 3", ["trainer: expected keys and values", "got 3"]),
        ("run: {id: a}\nrun: {id: b}", ["key 'run' stands twice", "line 2"]),
        ("1: 2", ["expected keys", "got 1"]),
        ("x: &x {a: *x}", ["not valid YAML", "recursive"]),
    ],
)
def test_a_config_of_another_shape_is_named_with_what_is_wrong(refuse, tmp_path, text, words):
    refuse(["fit", "--config", CONFIG, "--config", overlay(tmp_path, text)], "overlay.yaml", *words)


def test_weights_that_no_run_has_trained_are_measured_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false", "--run.wandb=disabled"]
    assert main(["test", "--config", CONFIG, *few]) == 0
    assert "warning: ckpt_path: none given" in capsys.readouterr().err


def test_an_interpolation_that_leads_nowhere_is_named(refuse, tmp_path):
    text = "trainer: {max_epochs: '${data.init_args.nope}'}"
    refuse(["fit", "--config", CONFIG, "--config", overlay(tmp_path, text)], "data.init_args.nope")


def test_nothing_given_says_how_to_start(refuse):
    refuse(["fit"], "model", "--config")


def test_missing_data_lists_the_places_tried_and_the_command_that_helps(refuse, tmp_path, monkeypatch):
    monkeypatch.setenv("LEANLIGHT_DATA", str(tmp_path / "nowhere"))
    extra = ["--data.init_args.dataset=cifar10", "--data.init_args.download=false"]
    refuse(["fit", "--config", CONFIG, *QUICK, *extra], "nowhere", "leanlight data prepare cifar10")


def test_a_truncated_data_file_is_named(refuse, tmp_path, monkeypatch):
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04 cut short")
    monkeypatch.setenv("LEANLIGHT_DATA", str(tmp_path))
    extra = ["--data.init_args.dataset=mnist", "--data.init_args.download=false"]
    refuse(["fit", "--config", CONFIG, *QUICK, *extra], "mnist.npz")


def test_an_unwritable_output_is_found_before_training(refuse, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refuse(["fit", "--config", CONFIG, *QUICK, "--trainer.default_root_dir=file"], "trainer.default_root_dir", "file")


def test_a_checkpoint_of_another_method_is_refused(refuse, tmp_path):
    torch.save({"hyper_parameters": {"_class_path": "lit_modules.other.OtherModule"}}, tmp_path / "other.ckpt")
    refuse(["fit", "--config", CONFIG, *QUICK, "--ckpt_path=other.ckpt"], "ckpt_path", "OtherModule", "ImageClassifier")


def test_a_file_that_is_no_checkpoint_is_refused(refuse, tmp_path):
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    refuse(["fit", "--config", CONFIG, *QUICK, "--ckpt_path=broken.ckpt"], "broken.ckpt", "not a readable checkpoint")


def test_resuming_without_a_checkpoint_is_refused(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    refuse(["fit", "--resume", "run"], "--resume", "config.yaml")
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "run" / "metrics.csv").write_text("step,progress/step\n0,1\n")
    refuse(["fit", "--resume", "run"], "--resume", "last.ckpt")


def test_selecting_on_test_data_is_refused(refuse):
    extra = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=test/loss"]
    refuse(["fit", "--config", CONFIG, *QUICK, *extra], "monitor", "test/loss", "val/")


def test_a_missing_extra_names_the_command_that_installs_it(refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    network = ["--model.init_args.network.class_path=lit_modules.nn.TimmNet"]
    network += ["--model.init_args.network.init_args.name=resnet18"]
    refuse(["fit", "--config", CONFIG, *QUICK, *network], "timm", "leanlight[vision]")


def test_a_network_of_the_wrong_size_is_found_before_training(refuse):
    refuse(
        ["fit", "--config", CONFIG, *QUICK, "--model.init_args.network.init_args.num_classes=3"], "num_classes", "10"
    )


def test_a_gpu_that_is_not_there_is_named(refuse):
    refuse(["fit", "--config", CONFIG, "--config", "trainer/gpu"], "trainer.accelerator: gpu", "finds none", "use cpu")


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_where(refuse, tmp_path):
    extra = ["--model.init_args.optimizer.init_args.lr=1e30", "--trainer.max_steps=50"]
    refuse(["fit", "--config", CONFIG, *QUICK, *extra], "step", "loss", leaves_nothing=False)


def test_an_existing_run_is_never_overwritten(refuse, tmp_path):
    taken = tmp_path / "runs" / "classifier" / "digits" / "mine"
    taken.mkdir(parents=True)
    refuse(["fit", "--config", CONFIG, *QUICK, "--run.id=mine"], "run.id", "--resume")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt"], ["fitt", "did you mean 'fit'"]),
        (["methods", "clasifier"], ["clasifier", "did you mean 'classifier'"]),
        (["data", "check", "cifr10"], ["cifr10", "did you mean 'cifar10'"]),
        (["run", "nowhere.yaml"], ["nowhere.yaml"]),
        (["reproduce", "nowhere.yaml"], ["nowhere.yaml"]),
        (["export", "nowhere"], ["nowhere"]),
        (["select", "nowhere", "--rule=random", "--keep=1"], ["nowhere", "leanlight predict"]),
        (["select", "nowhere", "--rule=random", "--kepe=1"], ["--kepe", "did you mean '--keep'"]),
        (["test", "--resume", "x"], ["--resume", "fit"]),
        (["benchmark", "clasifier"], ["clasifier", "did you mean 'classifier'"]),
    ],
)
def test_other_commands_refuse_in_one_line_too(refuse, arguments, words):
    refuse(arguments, *words)


def test_no_config_of_the_suite_looks_at_test_data():
    import yaml

    from leanlight.checks import check_monitors
    from leanlight.configs_path import config_names, find_config

    for name in config_names():
        check_monitors(yaml.safe_load(Path(find_config(name)).read_text()), name)
