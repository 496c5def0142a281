"""A federation on two processes equals one process, bit for bit: clients are spread, not their batches."""

import pytest
import torch
from short_fit import run

# Eleven candidates do not divide by two; power-of-choice is scored before training; SCAFFOLD has states of clients.
CREDIT = ["--config=sfedca/digits_small", "--trainer.max_epochs=3", "--trainer.callbacks.init_args.candidates=11"]
OTHERS = [
    "--config=sfedca/digits_small",
    "--trainer.max_epochs=3",
    "--trainer.callbacks.init_args.selector=lit_modules.federated.PowerOfChoice",
    "--trainer.callbacks.init_args.participants=5",
    "--model.init_args.objective=lit_modules.federated.Scaffold",
]
# One process trains nobody in a round.
ALONE = [argument.replace("participants=5", "participants=1") for argument in OTHERS]
WIDTHS = [
    "--config=sfedhifi/digits_small",
    "--trainer.max_epochs=3",
    "--trainer.callbacks+=callbacks.PersonalisedEvaluation",
    "--trainer.callbacks.init_args.every_n_epochs=3",
]


@pytest.mark.parametrize(
    "config",
    [CREDIT, OTHERS, ALONE, WIDTHS],
    ids=["credit", "power of choice with scaffold", "one client a round with scaffold", "widths"],
)
def test_a_federation_on_two_processes_equals_one_process(tmp_path, config):
    one, one_metrics = run(tmp_path / "one", *config)
    two, two_metrics = run(tmp_path / "two", *config, "--config=trainer/ddp", "--trainer.devices=2")
    for name, value in one["state_dict"].items():
        assert torch.equal(two["state_dict"][name], value), name
    for name, value in one_metrics.items():
        if name.startswith("train/") or "/personal_" in name:
            assert two_metrics[name] == pytest.approx(value, rel=1e-6), name
    assert ("test/personal_gain" in one_metrics) == ("val/personal_gain" in one_metrics) == (config is WIDTHS)
    for client, control in one["federated"]["client_controls"].items():
        for name, value in control.items():
            assert torch.equal(two["federated"]["client_controls"][client][name], value), (client, name)


# Three participants do not divide by two; without spikes rounding stays rounding. Batch norm has an integer counter.
MEAN = [
    "--config=sfedca/digits_small",
    "--trainer.max_epochs=2",
    "--trainer.callbacks.init_args.selector=lit_modules.federated.RandomClients",
    "--trainer.callbacks.init_args.participants=3",
    "--model.init_args.aggregator=lit_modules.federated.FedAvg",
    "--model.init_args.aggregator.init_args.weighting=items",
    "--model.init_args.network=lit_modules.nn.ConvNet",
    "--model.init_args.network.init_args.in_channels=1",
    "--model.init_args.network.init_args.width=4",
    "--model.init_args.network.init_args.depth=1",
    "--model.init_args.network.init_args.image_size=8",
    "--model.init_args.network.init_args.norm=batch",
    "--model.init_args.optimizer.init_args.lr=0.05",
    "--config=trainer/ddp",
    "--trainer.devices=2",
]


def test_a_sum_over_processes_is_the_mean_of_all_states_up_to_rounding(tmp_path):
    states, metrics = run(tmp_path / "states", *MEAN)
    summed, summed_metrics = run(tmp_path / "sum", *MEAN, "--trainer.callbacks.init_args.exchange=sum")
    counters = [name for name in states["state_dict"] if name.endswith("num_batches_tracked")]
    assert counters
    assert any(not torch.equal(summed["state_dict"][name], value) for name, value in states["state_dict"].items())
    for name, value in states["state_dict"].items():
        torch.testing.assert_close(summed["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        if name.startswith("train/"):
            assert summed_metrics[name] == pytest.approx(value, rel=1e-4), name
