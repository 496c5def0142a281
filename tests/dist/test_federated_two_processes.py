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
WIDTHS = ["--config=sfedhifi/digits_small", "--trainer.max_epochs=3"]


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
        if name.startswith("train/"):
            assert two_metrics[name] == pytest.approx(value, rel=1e-6), name
    for client, control in one["federated"]["client_controls"].items():
        for name, value in control.items():
            assert torch.equal(two["federated"]["client_controls"][client][name], value), (client, name)
