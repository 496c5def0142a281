"""Width draws, firing rates at layer inputs, and the vote with its tie rules."""

from collections import Counter

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.sfedhifi.decomposition import DecomConv
from lit_modules.sfedhifi.networks import FactorisedCNN, FactorisedSpikingCNN
from lit_modules.sfedhifi.widths import (
    DynamicWidths,
    FixedWidths,
    InformativeLayer,
    InputRates,
    Vote,
    elect,
    measure_rates,
    vote,
)

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def test_every_width_occurs_in_every_round_and_one_of_four_widths_twice_among_five_clients():
    joined = [8, 1, 3, 5, 9]
    rounds = [DynamicWidths().draw(joined, 10, seed=0, number=number) for number in range(400)]
    assert all(sorted(drawn) == sorted(joined) and set(drawn.values()) == set(WIDTHS) for drawn in rounds)
    assert all(sorted(Counter(drawn.values()).values()) == [1, 1, 1, 2] for drawn in rounds)
    share = Counter(drawn[8] for drawn in rounds)
    assert all(70 < share[width] < 130 for width in WIDTHS)  # uniform: 100 ± 8.7


def test_draws_follow_from_seed_and_round_alone():
    def draw(seed, number, joined=(0, 1, 2, 3, 4)):
        return DynamicWidths().draw(joined, 10, seed, number)

    assert draw(3, 7) == draw(3, 7) == draw(3, 7, (4, 2, 3, 0, 1))
    assert len({tuple(draw(3, number).values()) for number in range(20)}) > 10
    assert len({tuple(draw(seed, 7).values()) for seed in range(20)}) > 10


def test_fewer_clients_than_widths_all_get_different_ones():
    for number in range(20):
        drawn = DynamicWidths().draw([2, 5, 9], clients=10, seed=0, number=number)
        assert len(set(drawn.values())) == 3


def test_fixed_widths_belong_to_the_client():
    whole = FixedWidths().draw(range(8), 8, 0, 1)
    assert list(whole.values()) == [w for w in WIDTHS for _ in range(2)]
    for number in range(5):
        assert FixedWidths().draw([6, 1, 3], 8, number, number) == {1: 0.25, 3: 0.5, 6: 1.0}


# ---- rates ----


def test_rates_are_the_means_of_what_the_layers_receive():
    torch.manual_seed(0)
    network = FactorisedSpikingCNN(0.5, image_size=8, channels=(8, 16, 16), time_steps=3)
    batches = [torch.rand(4, 1, 8, 8), torch.rand(2, 1, 8, 8)]
    network.train()
    measured = measure_rates(network, batches)
    assert network.training
    assert measured.layers == ("conv1", "conv2")
    assert not any(module._forward_pre_hooks for module in network.modules())
    received = {"conv1": [], "conv2": []}
    for name in received:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: received[name].append(inputs[0])
        )
    for batch, rates in zip(batches, measured.rates, strict=True):
        network(batch)
        for name, rate in zip(measured.layers, rates, strict=True):
            spikes = received[name][-1]
            assert rate.item() == pytest.approx((spikes == 1).sum().item() / spikes.numel())
            assert len(spikes) == 3 * len(batch)
    assert measured.profile()["conv1"] == pytest.approx(measured.rates[:, 0].mean().item())
    assert 0 < measured.profile()["conv1"] < 1


def test_layers_with_real_input_do_not_compete():
    mixed = torch.nn.Sequential(DecomConv(2, 4, 2, 3), torch.nn.Sigmoid(), DecomConv(4, 4, 2, 3))
    assert measure_rates(mixed, [(torch.rand(3, 2, 5, 5) < 0.5).float()]).layers == ("0",)
    nobody = measure_rates(FactorisedCNN(0.25, image_size=8), [torch.rand(3, 1, 8, 8)])
    assert nobody.layers == ()
    with pytest.raises(UserError, match="binary"):
        vote(nobody)


# ---- vote ----


def rates(*rows):
    return InputRates(("a", "b", "c"), torch.tensor(rows, dtype=torch.float64))


def test_a_width_votes_for_the_layer_that_leads_in_most_batches():
    measured = rates([0.2, 0.5, 0.1], [0.3, 0.4, 0.1], [0.9, 0.1, 0.0])
    assert vote(measured) == Vote("b", pytest.approx(0.45))
    assert vote(measured, least=True) == Vote("c", pytest.approx(0.2 / 3))


def test_equally_many_batches_are_decided_by_the_rate_in_them_and_equal_rates_by_order():
    assert vote(rates([0.5, 0.2, 0.1], [0.1, 0.2, 0.6])) == Vote("c", pytest.approx(0.6))
    assert vote(rates([0.5, 0.5, 0.1])) == Vote("a", pytest.approx(0.5))
    assert vote(rates([0.5, 0.1, 0.1], [0.1, 0.5, 0.1])) == Vote("a", pytest.approx(0.5))


def votes(**by_width):
    return {float(width[1:]) / 100: Vote(*each) for width, each in by_width.items()}


def test_widths_elect_the_layer_most_of_them_name():
    assert elect(votes(p25=("a", 0.1), p50=("a", 0.1), p75=("a", 0.1), p100=("a", 0.1))) == "a"
    assert elect(votes(p25=("b", 0.1), p50=("a", 0.9), p75=("b", 0.1), p100=("c", 0.8))) == "b"


def test_without_a_unique_winner_the_greatest_rate_decides():
    tied = votes(p25=("a", 0.1), p50=("a", 0.2), p75=("b", 0.3), p100=("b", 0.15))
    assert elect(tied) == "b"
    assert elect(tied, least=True) == "a"
    assert elect(votes(p25=("a", 0.1), p50=("b", 0.2), p75=("c", 0.4), p100=("d", 0.3))) == "c"
    assert elect(votes(p25=("a", 0.3), p100=("b", 0.3))) == "a"


def test_the_order_of_widths_does_not_matter():
    one = votes(p25=("a", 0.3), p50=("b", 0.3), p75=("a", 0.1), p100=("b", 0.1))
    assert elect(one) == elect(dict(reversed(one.items())))


def test_rules_for_the_informative_layer():
    layers = ["a", "b", "c"]
    measured = {0.25: rates([0.2, 0.5, 0.1]), 1.0: rates([0.1, 0.6, 0.0])}
    assert InformativeLayer().choose(layers, measured, 0, 1) == ["b"]
    assert InformativeLayer("min_rate").choose(layers, measured, 0, 1) == ["c"]
    assert InformativeLayer().choose(layers, {}, 0, 1) == ["c"]  # before the first vote: the last
    assert InformativeLayer("fixed").choose(layers, measured, 0, 1) == ["c"]
    assert InformativeLayer("fixed", "a").choose(layers, measured, 0, 1) == ["a"]
    assert InformativeLayer("all").choose(layers, measured, 0, 1) == layers
    drawn = [InformativeLayer("random").choose(layers, measured, 0, number)[0] for number in range(60)]
    assert set(drawn) == set(layers)
    assert drawn == [InformativeLayer("random").choose(layers, {}, 0, number)[0] for number in range(60)]
    with pytest.raises(UserError, match=r"layer\.name"):
        InformativeLayer("fixed", "z").choose(layers, measured, 0, 1)
