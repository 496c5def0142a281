"""Every method trains with its networks compiled: one graph each, and the numbers of the networks as written."""

import lightning.pytorch as pl
import pytest
import torch
from smallest import overrides
from torch._dynamo.utils import counters

import leanlight
from callbacks import CompileNetworks
from leanlight.contracts import UserError
from leanlight.registry import METHODS

# Fewer time steps than the smallest configs have: a trace holds every one of them.
SHORTER = {
    "esvae": {
        "model.init_args.network.init_args.time_steps": 2,
        # Adam divides by the gradient's size and blows rounding differences up where it is near zero.
        "model.init_args.optimizer.class_path": "torch.optim.SGD",
        "model.init_args.optimizer.init_args.lr": 0.1,
    },
    "dsqn": {"model.init_args.network.init_args.time_steps": 2, "data.init_args.replay_start": 50},
    "sfedca": {"model.init_args.network.init_args.time_steps": 2},
    "sfedhifi": {"model.init_args.network.init_args.time_steps": 2},
    "at_bptt": {"model.init_args.evaluation.init_args.epochs": [2]},
    "falcon_eye": {
        "model.init_args.backbone.init_args.layers": 1,
        "model.init_args.max_new_tokens": 3,
        "model.init_args.optimizer.class_path": "torch.optim.SGD",
        "data.init_args.shapes": {"train": 32, "val": 8, "test": 8},
        "energy.batches": 1,
    },
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def run(method, folder, **more):
    """Weights and metrics after two training batches, an evaluation and a test."""
    settings = {
        **overrides(method),
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": 1,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "trainer.default_root_dir": str(folder),
        **SHORTER.get(method, {}),
        **more,
    }
    trainer, model, data = leanlight.build(METHODS[method].smallest, settings)
    trainer.fit(model, data)
    metrics = dict(trainer.callback_metrics)
    trainer.test(model, data, verbose=False)
    return model.state_dict(), metrics | trainer.callback_metrics


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m == "classifier" else pytest.mark.slow) for m in METHODS]
)
def test_a_method_trains_the_same_with_its_networks_compiled_into_one_graph_each(method, tmp_path):
    expected, metrics = run(method, tmp_path / "a")
    assert not counters["stats"]
    options = {"compile.backend": "aot_eager", "compile.fullgraph": True}
    got, compiled_metrics = run(method, tmp_path / "b", **options)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    # Energy and firing rates among them, which are counted by hooks inside the networks.
    assert any(name.startswith("test/energy_pj") for name in metrics)
    for name, value in metrics.items():
        if "second" not in name and "time" not in name:
            torch.testing.assert_close(compiled_metrics[name], value, rtol=1e-3, atol=1e-3, equal_nan=True)


class Plain(pl.LightningModule):
    """A module that names no networks."""


def test_what_cannot_be_compiled_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"compile.backend: Plain does not say which networks"):
        CompileNetworks("aot_eager").setup(None, Plain(), "fit")
    with pytest.raises(UserError, match=r"compile.backend: expected one of .*, got 'induktor' .*inductor"):
        CompileNetworks("induktor")
    with pytest.raises(UserError, match=r"compile.mode: expected null"):
        CompileNetworks(mode="reduce-overhead")
