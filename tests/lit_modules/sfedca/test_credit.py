"""Firing intensity, credit and SFedCA's networks against spikingjelly's monitor, loops and the paper's constants."""

import functools

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, monitor, neuron
from torch import nn

from datamodules import FederatedDataModule, ImageDataModule
from leanlight.contracts import ClientUpdate, ImageBatch, Measurement, UserError
from lit_modules.federated import FederatedClassifier, LocalObjective, LocalTraining
from lit_modules.federated.firing import measure
from lit_modules.federated.local import train_client
from lit_modules.sfedca import CreditSelection, HighFiring, ReLUCNN, SpikingCNN, firing_intensity

NETWORK = functools.partial(SpikingCNN, channels=[4, 6], hidden=[16], time_steps=5, image_size=8)


def some_data(count, seed=0, classes=10):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 1, 8, 8, generator=generator)
    return ImageBatch(image, torch.randint(classes, (count,), generator=generator), torch.arange(count))


# ---- firing intensity


def spikes_of(network, image):
    """Spikes (T, N, ...) of every neuron, by spikingjelly's own monitor."""
    watch = monitor.OutputMonitor(network, instance=neuron.BaseNode)
    with torch.no_grad():
        network.eval()(image)
    watch.remove_hooks()
    return watch.records


def test_intensity_is_the_sum_over_layers_and_steps_of_mean_spikes():
    torch.manual_seed(0)
    network, data = NETWORK(), some_data(30)
    expected = 0.0
    for spikes in spikes_of(network, data.image):
        for step in spikes:
            expected += float(step.double().mean())
    found = measure(network, data, 10)
    assert found.rates.shape == (4, 5)  # two convolutions, a hidden layer, the output
    assert firing_intensity(found.rates) == pytest.approx(expected, rel=1e-5)


def test_layers_of_the_intensity_can_be_chosen():
    rates = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]])
    assert [firing_intensity(rates, layers) for layers in ("all", "first", "middle", "last")] == [255, 3, 60, 192]


def test_rates_by_class_are_means_over_the_samples_of_the_class():
    torch.manual_seed(0)
    network, data = NETWORK(), some_data(30, classes=7)
    layers = spikes_of(network, data.image)
    expected = torch.zeros(10)
    for label in range(10):
        rates = [
            sum(float(spikes[:, i].double().mean()) for spikes in layers) / len(layers)
            for i in range(30)
            if data.label[i] == label
        ]
        expected[label] = sum(rates) / len(rates) if rates else 0.0
    torch.testing.assert_close(measure(network, data, 10).class_rates, expected, rtol=1e-5, atol=1e-7)
    assert expected[7:].abs().sum() == 0


def test_batches_are_averaged_by_size_or_summed_as_the_published_code_does():
    torch.manual_seed(0)
    network, data = NETWORK(), some_data(30)
    whole = measure(network, data, 10)
    mean, total = measure(network, data, 10, batch_size=8), measure(network, data, 10, batch_size=8, reduce="sum")
    torch.testing.assert_close(mean.rates, whole.rates)
    pieces = [measure(network, data.select(index), 10).rates for index in torch.arange(30).split(8)]
    torch.testing.assert_close(total.rates, torch.stack(pieces).sum(0))
    assert mean.loss == pytest.approx(whole.loss, rel=1e-5)
    with torch.no_grad():
        assert whole.loss == pytest.approx(float(F.cross_entropy(network.eval()(data.image), data.label)), rel=1e-5)


def test_measuring_leaves_no_hooks_no_state_and_the_mode_as_it_was():
    network = NETWORK().train()
    measure(network, some_data(5), 10)
    assert network.training
    assert not any(child._forward_hooks for child in network.modules())
    assert all(not isinstance(child.v, torch.Tensor) for child in network.modules() if hasattr(child, "v"))


def test_the_activity_of_an_ordinary_network_is_that_of_its_relus():
    torch.manual_seed(0)
    network, data = ReLUCNN(channels=[4], hidden=[8], image_size=8), some_data(12)
    outputs = []
    handles = [child.register_forward_hook(lambda *a: outputs.append(a[2])) for child in network.activations]
    found = measure(network, data, 10)
    for handle in handles:
        handle.remove()
    assert found.rates.flatten().tolist() == pytest.approx([float(o.mean()) for o in outputs], rel=1e-5)


def test_a_network_without_neurons_or_relus_cannot_be_measured():
    with pytest.raises(UserError, match="spiking neurons or ReLUs"):
        measure(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), some_data(3), 10)


# ---- credit


def measured(rates, classes=(0.0,) * 4):
    return Measurement(1.0, torch.tensor(rates), torch.tensor(classes))


def report(steps=4):
    return ClientUpdate(client=0, items=8, steps=steps, loss=0.0, passes=0, state={})


def test_credit_is_the_change_of_intensity_with_or_without_its_sign():
    before, after = measured([[0.5, 0.5], [0.2, 0.1]]), measured([[0.25, 0.5], [0.2, 0.2]])
    assert CreditSelection().score(before, after, report()) == pytest.approx(0.15)
    assert CreditSelection("signed").score(before, after, report()) == pytest.approx(-0.15)
    assert CreditSelection(layers="last").score(before, after, report()) == pytest.approx(0.1)
    assert CreditSelection(per_step=True).score(before, after, report(5)) == pytest.approx(0.03)


def test_credit_by_class_does_not_let_classes_cancel():
    before, after = measured([[0.5]], (0.2, 0.4, 0.0, 0.0)), measured([[0.5]], (0.3, 0.3, 0.0, 0.0))
    assert CreditSelection().score(before, after, report()) == 0
    assert CreditSelection("class_abs").score(before, after, report()) == pytest.approx(0.2)


def test_high_firing_looks_at_the_received_weights_alone():
    assert HighFiring().score(measured([[0.5, 0.25]]), None, None) == pytest.approx(0.75)
    assert HighFiring().scored == "before"


SCORES = {3: 0.1, 5: 0.9, 7: 0.9, 11: 0.4, 13: 0.2, 17: 0.7}


@pytest.mark.parametrize(
    ("order", "expected"),
    [("top", [5, 7, 17]), ("bottom", [3, 13, 11]), ("skip_top", [7, 17, 11]), ("top_and_bottom", [5, 7, 3])],
)
def test_orders_take_the_ranks_they_name_and_the_smaller_id_of_equals(order, expected):
    assert CreditSelection(order=order).choose(SCORES, 3, torch.Generator()) == expected


def test_the_random_order_takes_different_clients_with_different_generators():
    rule = CreditSelection(order="random")
    draws = {tuple(sorted(rule.choose(SCORES, 3, torch.Generator().manual_seed(seed)))) for seed in range(20)}
    assert len(draws) > 5


@pytest.mark.parametrize("order", ["top", "bottom", "random", "skip_top", "top_and_bottom"])
def test_updates_are_dropped_early_only_when_they_cannot_be_chosen_any_more(order):
    rule, alive, seen = CreditSelection(order=order), set(), {}
    for client, score in SCORES.items():
        seen[client] = score
        alive = (alive | {client}) & set(rule.may_win(seen, 3))
    final = rule.choose(SCORES, 3, torch.Generator().manual_seed(0))
    assert set(final) <= alive
    assert len(alive) == (3 if order in ("top", "bottom") else 6)


def test_layers_and_classes_do_not_go_together():
    with pytest.raises(UserError, match="class_abs"):
        CreditSelection("class_abs", layers="last")


def credit(module, data, rule, epochs=2, client=0):
    """Credit of a client of `module`'s global weights, trained with the same seed for every client."""
    before = measure(module, data, 10)
    torch.manual_seed(0)
    trained = NETWORK()
    trained.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.2)
    generator = torch.Generator().manual_seed(0)
    steps, _, _ = train_client(trained, data, LocalTraining(epochs, 16), optimizer, LocalObjective(), [], generator)
    update = ClientUpdate(client=client, items=len(data), steps=steps, loss=0.0, passes=0, state={})
    return rule.score(before, measure(trained, data, 10), update)


@pytest.mark.parametrize("mode", ["total_abs", "class_abs"])
def test_without_local_training_credit_is_exactly_zero_and_equal_clients_have_equal_credit(mode):
    torch.manual_seed(0)
    network, data, rule = NETWORK(), some_data(40), CreditSelection(mode)
    assert credit(network, data, rule, epochs=0) == 0.0
    assert credit(network, data, rule) == credit(network, data, rule) != 0.0


def test_poisson_noise_is_the_same_before_and_after():
    data = FederatedDataModule(dataset="digits", clients=4, partition_seed=0, seed=0)
    data.setup()
    torch.manual_seed(0)
    module = FederatedClassifier(functools.partial(NETWORK, coding="poisson"), seed=0)
    module.evaluation.prepare(data.meta.shape, data.meta.classes)
    first, second = (module.measure(data.client_data(1), 3, 1) for _ in range(2))
    assert torch.equal(first.rates, second.rates)
    assert not torch.equal(first.rates, module.measure(data.client_data(1), 4, 1).rates)


def test_a_client_with_labels_the_global_model_never_saw_has_the_largest_credit():
    data = ImageDataModule(dataset="digits", seed=0)
    data.setup()
    split = data.train_split
    torch.manual_seed(0)
    network = NETWORK()
    known = torch.nonzero(split.labels < 5).flatten()
    new = torch.nonzero(split.labels >= 5).flatten()

    def take(index):
        return ImageBatch(split.images[index].float() / 255, split.labels[index], index)

    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    generator = torch.Generator().manual_seed(0)
    train_client(network, take(known[:500]), LocalTraining(12, 16), optimizer, LocalObjective(), [], generator)
    clients = [take(known[500 + 40 * i : 540 + 40 * i]) for i in range(4)] + [take(new[:40])]
    for mode in ("total_abs", "class_abs"):
        credits = [credit(network, client, CreditSelection(mode)) for client in clients]
        assert max(range(5), key=credits.__getitem__) == 4, (mode, credits)


# ---- networks


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # conv 320 + 18,496, fully connected 1600 -> 128 -> 10 with biases
        ("sfedca/mnist", 320 + 18_496 + 1600 * 128 + 128 + 128 * 10 + 10),
        # two convolutions of 128 channels with batch norm, 6272 -> 2048 -> 10, no biases
        ("sfedca/fashion_mnist", 9 * 128 + 256 + 9 * 128 * 128 + 256 + 6272 * 2048 + 2048 * 10),
        # 64-192-384-256-256, then 1024 -> 4096 -> 4096 -> 10
        (
            "sfedca/cifar10",
            sum(9 * a * b + b for a, b in ((3, 64), (64, 192), (192, 384), (384, 256), (256, 256)))
            + (1024 * 4096 + 4096)
            + (4096 * 4096 + 4096)
            + (4096 * 10 + 10),
        ),
    ],
)
def test_the_networks_of_the_paper_scale_configs_have_the_parameters_of_the_published_code(config, expected):
    import yaml

    from leanlight.configs_path import find_config

    arguments = yaml.safe_load(find_config(config).read_text())["model"]["init_args"]["network"]["init_args"]
    network = SpikingCNN(**arguments)
    assert count(network) == expected
    side = arguments["image_size"]
    assert network(torch.rand(2, arguments["in_channels"], side, side)).shape == (2, 10)


def test_the_network_equals_its_layers_one_time_step_after_another():
    torch.manual_seed(0)
    network = NETWORK(batch_norm=True).eval()
    image = torch.rand(3, 1, 8, 8)
    nodes = [neuron.IFNode(v_threshold=1.0, v_reset=0.0) for _ in network.neurons]
    outputs = []
    with torch.no_grad():
        for _ in range(5):
            x = image
            for layer, node in zip(network.currents, nodes, strict=True):
                x = node(layer(x))
            outputs.append(x)
        torch.testing.assert_close(network(image), torch.stack(outputs).mean(0))
    for node in nodes:
        functional.reset_net(node)


def test_spikes_are_binary_and_poisson_input_has_the_pixels_as_rates():
    torch.manual_seed(0)
    network = NETWORK(coding="poisson", time_steps=400).eval()
    seen = {}
    network.normalize.register_forward_hook(lambda m, i, o: seen.update(input=i[0]))
    image = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        for spikes in spikes_of(network, image):
            assert set(spikes.unique().tolist()) <= {0.0, 1.0}
    shown = seen["input"].unflatten(0, (400, 2))
    assert set(shown.unique().tolist()) == {0.0, 1.0}
    assert (shown.mean(0) - image).abs().max() < 0.12  # 400 draws: a standard deviation of at most .025


def test_the_twin_has_the_same_weights_and_no_time():
    arguments = {"channels": [4, 6], "hidden": [16], "image_size": 8, "batch_norm": True}
    assert count(ReLUCNN(**arguments)) == count(SpikingCNN(**arguments))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="image_size"):
        SpikingCNN(channels=[4, 4, 4, 4], image_size=8)
    with pytest.raises(UserError, match="strides"):
        SpikingCNN(channels=[4, 4], strides=[1])
