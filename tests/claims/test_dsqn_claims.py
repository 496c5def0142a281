"""What learns Catch, where chance scores -0.75 and the best policy 1."""

import json

import pytest

NO_NOISE = ["--model.init_args.input_noise=[]", "--model.init_args.weight_noise=[]", "--run.wandb=disabled"]


@pytest.fixture
def play(leanlight, tmp_path):
    """Train a config and return its final metrics."""

    def run(config, *options):
        leanlight("fit", "--config", config, "--run.id=a", *NO_NOISE, *options, check=True, timeout=280)
        return json.loads((tmp_path / "runs/dsqn/catch/a/summary.json").read_text())["metrics"]

    return run


@pytest.mark.slow
def test_the_dqn_learns(play):
    assert play("dsqn/catch_small__dqn")["test/score"] > 0.85


@pytest.mark.slow
def test_the_dsqn_learns_with_eight_time_steps(play):
    metrics = play("dsqn/catch_small")
    assert metrics["test/score"] > 0.6
    assert 0.005 < metrics["test/firing_rate"] < 0.5


@pytest.mark.slow
def test_a_spiking_output_layer_does_not_learn(play):
    options = ["--model.init_args.network.init_args.readout=spike_rate", "--trainer.max_epochs=8"]
    assert play("dsqn/catch_small", *options)["test/score"] < -0.5


@pytest.mark.slow
def test_the_faithful_network_starts_silent_and_learns_to_fire(play, tmp_path):
    play("dsqn/catch_small", "--model.init_args.network.init_args.init_gain=1.0", "--trainer.max_epochs=6")
    lines = (tmp_path / "runs/dsqn/catch/a/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val/firing_rate/network.neurons.1")
    rates = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert rates[0] < rates[-1]
    assert rates[-1] > 0.001
