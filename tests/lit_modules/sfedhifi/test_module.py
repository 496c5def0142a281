"""A federation of widths as a whole: who trains what, what is shared, what is measured; on real digits."""

import functools

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from callbacks import EnergyMeter, FederatedRounds
from callbacks.energy import count_operations
from datamodules import Dirichlet, FederatedDataModule
from leanlight.contracts import UserError
from lit_modules.federated import FedNova, FedProx, LocalTraining, RandomClients, Scaffold
from lit_modules.hparams import rebuild
from lit_modules.sfedhifi import HIFI, FactorisedCNN, FactorisedSpikingCNN, InformativeLayer, WidthFederation
from lit_modules.sfedhifi.decomposition import factorised_layers, fold_network
from lit_modules.sfedhifi.widths import measure_rates

SHAPE = {"image_size": 8, "channels": (8, 16, 16), "norm": True, "inner_neuron": False}
NETWORK = functools.partial(FactorisedSpikingCNN, time_steps=2, output_neuron=False, **SHAPE)
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def federation(network=NETWORK, rounds=2, callbacks=(), server=None, limit_val=0, **model):
    torch.manual_seed(0)
    settings = {"local": LocalTraining(1, 32), "optimizer": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    module = WidthFederation(network, seed=0, **{**settings, **model})
    data = FederatedDataModule(
        dataset="digits", clients=8, partition=Dirichlet(0.5, min_size=2, capped=False), partition_seed=0, seed=0
    )
    options = {"participants": 5, "probe": 4, "every_n_epochs": 0, "seed": 0, **(server or {})}
    rounds_callback = FederatedRounds(RandomClients(), **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds,
        limit_val_batches=limit_val,
        callbacks=[rounds_callback, *callbacks],
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    return module, data, rounds_callback


def factors(module):
    return {
        width: {name: layer.factor.detach().clone() for name, layer in factorised_layers(model).items()}
        for width, model in module.models.items()
    }


def bases(module):
    return {
        width: {name: layer.basis.detach().clone() for name, layer in factorised_layers(model).items()}
        for width, model in module.models.items()
    }


def same_bases(module):
    first, *others = bases(module).values()
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_bases_are_one_for_all_widths_before_and_after_rounds_and_factors_are_not():
    module, _, _ = federation(rounds=0)
    assert same_bases(module)
    module, _, _ = federation(rounds=2)
    assert same_bases(module)
    shapes = {tuple(f["conv2"].shape) for f in factors(module).values()}
    assert len(shapes) == 4


def test_without_sharing_no_width_learns_from_another():
    apart, _, server = federation(rounds=1, sharing="none")
    assert not same_bases(apart)
    # A width that only one client trained holds that client's weights: train it alone and compare.
    counts = [list(apart.width_of.values()).count(width) for width in apart.widths]
    alone = apart.widths[counts.index(1)]
    (client,) = [c for c, width in apart.width_of.items() if width == alone]
    report = server.round.reports[client]
    assert report.received_bytes == sum(v.numel() * v.element_size() for v in apart.models[alone].state_dict().values())


def test_traffic_depends_on_the_width():
    module, _, server = federation(rounds=1)
    sent = {module.width_of[c]: r.sent_bytes for c, r in server.round.reports.items()}
    assert sorted(sent) == [0.25, 0.5, 0.75, 1.0]
    assert list(dict(sorted(sent.items())).values()) == sorted(sent.values())
    found = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert found["train/uplink_mb"] == pytest.approx(sum(r.sent_bytes for r in server.round.reports.values()) / 1e6)
    assert sum(found[f"train/uplink_mb_at_{width}"] for width in module.widths) == pytest.approx(
        found["train/uplink_mb"]
    )


def test_every_width_trains_in_every_round():
    module, _, _ = federation(rounds=3)
    assert set(module.width_of.values()) == set(module.widths)


def test_fixed_budgets_tie_widths_to_clients():
    module, _, _ = federation(rounds=2, budgets="fixed")
    assert all(width == module.widths[client * 4 // 8] for client, width in module.width_of.items())


def test_fusion_changes_one_factor_of_every_width_and_nothing_else():
    layer = InformativeLayer("fixed", "conv1")
    plain, _, _ = federation(rounds=1)
    fused, _, _ = federation(rounds=1, hifi=HIFI(rounds=1, rank_ratio=0.5), layer=layer)
    for width, model in plain.models.items():
        for name, value in model.state_dict().items():
            equal = torch.equal(value, fused.models[width].state_dict()[name])
            assert equal == (name != "conv1.factor"), (width, name)


def test_fusion_ends_with_its_window():
    long = {"layer": InformativeLayer("fixed", "conv2")}
    once, _, _ = federation(rounds=3, hifi=HIFI(rounds=1, rank_ratio=0.5), **long)
    assert once._history["fused_round"] == [1]
    always, _, _ = federation(rounds=3, hifi=HIFI(rounds=3, rank_ratio=0.5), **long)
    assert always._history["fused_round"] == [1, 2, 3]
    never, _, _ = federation(rounds=2, hifi=HIFI(rounds=0))
    plain, _, _ = federation(rounds=2)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, never.network.state_dict()[name])


def test_the_vote_looks_at_held_out_images_and_the_weights_that_clients_received():
    module, data, _ = federation(rounds=2, hifi=HIFI(rounds=9, rank_ratio=0.5), vote_images=64, vote_batch=16)
    assert module._history["fused_layer"][0] == ["conv2"]  # the last layer before the first vote
    assert set(module._profiles) == {"25", "50", "75", "100"}
    before, _, _ = federation(rounds=1, hifi=HIFI(rounds=9, rank_ratio=0.5), vote_images=64, vote_batch=16)
    images = data.val_split.images[:64].float() / 255
    expected = measure_rates(before.models[0.5], images.split(16)).profile()
    assert module._profiles["50"] == pytest.approx(expected)


def test_narrow_networks_of_heterofl_are_slices_of_the_widest():
    module, _, _ = federation(functools.partial(NETWORK, factorised=False), sharing="slices")
    wide = module.models[1.0].state_dict()
    for model in module.models.values():
        for name, value in model.state_dict().items():
            assert torch.equal(value, wide[name][tuple(map(slice, value.shape))]), name


HETEROFL = {"sharing": "slices", "masked_loss": True, "buffers": "static"}


def test_static_norms_are_means_over_all_clients_images_whatever_the_scaler_does():
    module, data, _ = federation(functools.partial(NETWORK, factorised=False, scaler=True), **HETEROFL)
    images = [image for client in range(8) for image in data.client_data(client).image.split(256)]
    for width, model in module.models.items():
        plain = NETWORK(width, factorised=False)
        plain.load_state_dict(model.state_dict())
        torch.optim.swa_utils.update_bn(images, plain)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, msg=name)
        assert model.norm1.momentum == 0.1


def test_a_client_of_heterofl_learns_nothing_of_classes_that_it_lacks():
    module, data, _ = federation(functools.partial(NETWORK, factorised=False), loss="mean_output", **HETEROFL)
    has = data.class_matrix > 0
    client = next(client for client in range(8) if not has[client].all())
    model, batch = module.models[1.0], data.client_data(client)
    model.zero_grad()
    module.local_loss(model, batch.image, batch.label, client).backward()
    assert torch.equal(model.head.bias.grad != 0, has[client])


def test_pieces_of_heterofl_are_refused_where_they_mean_nothing():
    ordinary = functools.partial(NETWORK, factorised=False)
    with pytest.raises(UserError, match="masked_loss: needs sharing: slices"):
        WidthFederation(NETWORK, masked_loss=True)
    with pytest.raises(UserError, match="aggregator: FedNova is not defined for slices"):
        WidthFederation(ordinary, sharing="slices", aggregator=FedNova())
    with pytest.raises(UserError, match="scaler: needs ordinary convolutions"):
        NETWORK(0.5, scaler=True)
    with pytest.raises(UserError, match="set buffers: static"):
        WidthFederation(functools.partial(ordinary, scaler=True), sharing="slices")


@pytest.mark.parametrize("change", [{"objective": FedProx(0.1)}, {"aggregator": FedNova()}])
def test_fedprox_and_fednova_run_within_widths(change):
    module, _, _ = federation(rounds=1, sharing="none", **change)
    plain, _, _ = federation(rounds=1, sharing="none")
    different = [not torch.equal(v, plain.network.state_dict()[n]) for n, v in module.network.state_dict().items()]
    assert any(different)


def test_the_orthogonality_term_holds_the_bases_together():
    def gap(module):
        rows = next(iter(bases(module)[1.0].values())).flatten(1)
        return float((rows @ rows.T - torch.eye(len(rows))).square().mean())

    loose, _, _ = federation(rounds=3, orthogonality_weight=0.0)
    tight, _, _ = federation(rounds=3, orthogonality_weight=10.0)
    assert gap(tight) < 0.5 * gap(loose)


def test_the_twin_without_spikes_trains_on_shared_bases():
    module, _, _ = federation(functools.partial(FactorisedCNN, **SHAPE), loss="mean_output", rounds=1)
    assert same_bases(module)


def test_accuracy_and_energy_are_measured_for_every_width_in_both_conventions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the energy by layer is written below the trainer's folder
    module, data, _ = federation(rounds=1, limit_val=1.0, callbacks=[EnergyMeter(1)])
    found = module.trainer.callback_metrics
    widths = [float(found[f"val/accuracy_at_{width}"]) for width in module.widths]
    assert float(found["val/accuracy_mean"]) == pytest.approx(sum(widths) / 4)
    tested = module.trainer.test(module, datamodule=data, verbose=False)[0]
    for width, model in module.models.items():
        image = data.test_split.images[: data.eval_batch_size].float() / 255
        for name, network in ((f"at_{width}", model), (f"folded_at_{width}", fold_network(model))):
            layers = count_operations(network.eval(), image)
            assert tested[f"test/macs_{name}"] == pytest.approx(sum(layer.macs for layer in layers))
            assert tested[f"test/acs_{name}"] == pytest.approx(sum(layer.acs for layer in layers), rel=1e-5)
        # Folded, everything behind the stem adds; at run time the factors multiply.
        assert tested[f"test/macs_folded_at_{width}"] < tested[f"test/macs_at_{width}"]


def test_a_module_made_in_python_is_rebuilt_from_its_hyperparameters():
    module = WidthFederation(NETWORK, hifi=HIFI(rounds=7, core="naive"), layer=InformativeLayer("all"), seed=1)
    again = rebuild(WidthFederation, dict(module.hparams))
    assert isinstance(again, WidthFederation)
    assert again.hifi == module.hifi
    assert again.layer == module.layer
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in module.state_dict().items()}


class Ordinary(nn.Module):
    """A classifier without widths."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, image):
        return self.head(image.flatten(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": Ordinary}, "factorised convolutions"),
        ({"sharing": "slices"}, "factorised: false"),
        ({"sharing": "none", "hifi": HIFI()}, "needs sharing: basis"),
        ({"objective": Scaffold()}, "control variates"),
        ({"widths": (1.0, 0.5)}, "ascending"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        WidthFederation(**{"network": NETWORK, **change})


def test_weights_of_different_widths_are_not_summed_over_processes():
    with pytest.raises(UserError, match=r"exchange: sum .* WidthFederation needs"):
        federation(server={"exchange": "sum"})
