"""The server: averages by hand, HIFI against higher-order orthogonal iteration in numpy, and its known behaviour."""

import itertools
import random

import numpy as np
import pytest
import torch

from leanlight.contracts import ClientUpdate, UserError
from lit_modules.federated import FedAvg, FedNova
from lit_modules.sfedhifi.decomposition import basis_keys, factor_key, factorised_layers
from lit_modules.sfedhifi.fusion import (
    HIFI,
    average_slices,
    average_widths,
    fuse_factors,
    share_bases,
    start_alike,
    sub_model,
)
from lit_modules.sfedhifi.networks import FactorisedSpikingCNN, FactorisedSpikingResNet18

WIDTHS = (0.25, 0.5, 0.75, 1.0)
OF_CLIENT = dict(enumerate([0.25, 0.5, 0.75, 1.0, 0.25, 1.0, 0.25]))


def network(width, seed, **options):
    torch.manual_seed(seed)
    return FactorisedSpikingCNN(width, image_size=8, channels=(8, 16, 16), basis_fraction=0.25, norm=True, **options)


PARAMETERS = [name for name, _ in network(1.0, 0).named_parameters()]
BASES = basis_keys(network(1.0, 0))
OTHERS = [key for key in network(1.0, 0).state_dict() if key not in BASES]


def upload(client, state, steps=1):
    return ClientUpdate(client, items=10 + 7 * client, steps=steps, loss=0.0, passes=0, state=state)


def states(**options):
    """Models by width, and updates of seven clients with other weights, shuffled."""
    models = {width: network(width, 1, **options).state_dict() for width in WIDTHS}
    updates = []
    for client, width in OF_CLIENT.items():
        state = network(width, 10 + client, **options).state_dict()
        for key, value in state.items():
            if key.endswith("num_batches_tracked"):
                value.fill_(client)
            if key.endswith("running_var"):
                value.fill_(1.0 + client)
        updates.append(upload(client, state, steps=1 + client))
    random.Random(0).shuffle(updates)
    return models, updates


@pytest.mark.parametrize("weighting", ["uniform", "items"])
def test_within_a_width_everything_is_the_mean_of_its_clients_alone(weighting):
    models, updates = states()
    new = average_widths(models, updates, OF_CLIENT, PARAMETERS, FedAvg(weighting))
    for width in WIDTHS:
        group = [update for update in updates if OF_CLIENT[update.client] == width]
        weights = [update.items if weighting == "items" else 1 for update in group]
        for key, value in new[width].items():
            parts = [update.state[key].double() for update in group]
            if key.endswith("num_batches_tracked"):
                assert value == max(parts)
                assert value.dtype == torch.int64
            else:
                expected = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_shared_bases_are_equal_over_widths_and_factors_are_not():
    models, updates = states()
    averaged = average_widths(models, updates, OF_CLIENT, PARAMETERS)
    shared = share_bases(averaged, updates, BASES)
    for key in BASES:
        mean = torch.stack([update.state[key].double() for update in updates]).mean(0)
        for width in WIDTHS:
            torch.testing.assert_close(shared[width][key].double(), mean, rtol=1e-5, atol=1e-6)
            assert torch.equal(shared[width][key], shared[1.0][key])
            assert not torch.equal(averaged[width][key], shared[width][key])
    for width, key in itertools.product(WIDTHS, OTHERS):
        assert torch.equal(shared[width][key], averaged[width][key])
    assert shared[0.25]["conv2.factor"].shape != shared[0.5]["conv2.factor"].shape


def test_without_shared_bases_no_width_hears_of_another():
    models, updates = states()
    disturbed = [
        update
        if OF_CLIENT[update.client] == 0.5
        else upload(update.client, {k: v + 1 for k, v in update.state.items()})
        for update in updates
    ]
    one = average_widths(models, updates, OF_CLIENT, PARAMETERS)[0.5]
    other = average_widths(models, disturbed, OF_CLIENT, PARAMETERS)[0.5]
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_width_without_clients_keeps_its_model_but_gets_the_bases():
    models, updates = states()
    some = [update for update in updates if OF_CLIENT[update.client] != 0.75]
    new = share_bases(average_widths(models, some, OF_CLIENT, PARAMETERS), some, BASES)
    assert all(torch.equal(new[0.75][key], models[0.75][key]) for key in OTHERS)
    assert all(torch.equal(new[0.75][key], new[1.0][key]) for key in BASES)


def test_order_of_arrival_changes_no_bit_and_inputs_stay():
    models, updates = states()
    inputs = (*models.values(), *(update.state for update in updates))
    before = [{key: value.clone() for key, value in state.items()} for state in inputs]

    def everything(received):
        return [
            average_widths(models, received, OF_CLIENT, PARAMETERS, FedAvg("items")),
            average_widths(models, received, OF_CLIENT, PARAMETERS, FedNova()),
            share_bases(models, received, BASES, "items"),
            {0: average_slices(models[1.0], received, "items")},
        ]

    for one, other in zip(everything(updates), everything(updates[::-1]), strict=True):
        assert all(torch.equal(one[w][key], other[w][key]) for w in one for key in one[w])
    HIFI(rank_ratio=0.5).fuse(models, ["conv2.factor"])
    start_alike(models, BASES)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(before, inputs, strict=True) for key in a)


def test_all_widths_start_with_the_bases_of_the_smallest():
    models, _ = states()
    models[0.25] = network(0.25, 77).state_dict()
    new = start_alike(models, BASES)
    assert all(torch.equal(new[w][key], models[0.25][key]) for w in WIDTHS for key in BASES)
    assert all(torch.equal(new[w][key], models[w][key]) for w in WIDTHS for key in OTHERS)


def test_fednova_moves_a_width_by_its_mean_step_times_its_mean_number_of_steps():
    models, updates = states()
    new = average_widths(models, updates, OF_CLIENT, PARAMETERS, FedNova())
    group = [update for update in updates if OF_CLIENT[update.client] == 0.25]
    old = models[0.25]["conv1.factor"].double()
    moves = [(update.state["conv1.factor"].double() - old) / update.steps for update in group]
    expected = old + np.mean([update.steps for update in group]) * torch.stack(moves).mean(0)
    torch.testing.assert_close(new[0.25]["conv1.factor"].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new[0.25]["norm1.running_var"], torch.full((4,), np.mean([1, 5, 7]).astype("float32")))


# ---- HeteroFL ----


def ordinary():
    models, updates = states(factorised=False)
    return models[1.0], updates


@pytest.mark.parametrize("make", [FactorisedSpikingCNN, FactorisedSpikingResNet18])
def test_every_width_of_an_ordinary_network_is_cut_out_of_the_widest(make):
    wide = make(1.0, factorised=False).state_dict()
    for width in WIDTHS[:3]:
        narrow = make(width, factorised=False)
        narrow.load_state_dict(sub_model(wide, narrow.state_dict()))


def test_a_sub_model_is_the_first_channels_and_loads():
    wide, _ = ordinary()
    for width in WIDTHS:
        narrow = network(width, 5, factorised=False)
        cut = sub_model(wide, narrow.state_dict())
        narrow.load_state_dict(cut)
        torch.testing.assert_close(cut["conv2.weight"], wide["conv2.weight"][: int(16 * width), : int(16 * width)])
        # the linear layer reads channel by channel, so the first channels are its first columns
        torch.testing.assert_close(cut["head.weight"], wide["head.weight"][:, : int(16 * width) * 4])


@pytest.mark.parametrize("weighting", ["uniform", "items"])
def test_every_element_is_the_mean_over_the_clients_that_hold_it(weighting):
    wide, updates = ordinary()
    updates = [u for u in updates if OF_CLIENT[u.client] < 1.0]  # some elements are held by nobody
    new = average_slices(wide, updates, weighting)
    for key in ("conv2.weight", "norm1.running_var", "head.weight", "head.bias"):
        for index in itertools.product(*map(range, wide[key].shape)):
            holders = [u for u in updates if all(i < n for i, n in zip(index, u.state[key].shape, strict=True))]
            weights = [u.items if weighting == "items" else 1 for u in holders]
            values = [w * u.state[key][index].item() for w, u in zip(weights, holders, strict=True)]
            expected = sum(values) / sum(weights) if holders else wide[key][index].item()
            assert new[key][index].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert new["norm1.num_batches_tracked"] == max(u.state["norm1.num_batches_tracked"] for u in updates)


def test_rows_of_the_classifier_come_from_clients_that_have_the_class():
    wide, updates = ordinary()
    has = torch.arange(10) % 7 == torch.arange(1 + max(u.client for u in updates))[:, None]
    new = average_slices(wide, updates, head=["head.weight", "head.bias"], classes=has)
    by_client = {u.client: u.state for u in updates}
    for k in range(10):
        torch.testing.assert_close(new["head.bias"][k], by_client[k % 7]["head.bias"][k])
    assert torch.equal(new["conv1.weight"], average_slices(wide, updates)["conv1.weight"])


# ---- HIFI ----


def largest_positive(u):
    return u * np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])


def unfold(tensor, mode):
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def project(tensor, factors, skip=None):
    for mode, factor in enumerate(factors):
        if mode != skip:
            tensor = np.moveaxis(np.tensordot(factor.T, tensor, (1, mode)), 0, mode)
    return tensor


def leading(matrix, rank):
    """Left singular vectors, as many as asked; beyond the rank of the matrix any orthonormal completion."""
    return largest_positive(np.linalg.svd(matrix, full_matrices=True)[0][:, :rank])


def tucker(tensor, ranks, iterations=20):
    """Higher-order orthogonal iteration from the higher-order SVD: core and factors of a tensor of any order."""
    factors = [leading(unfold(tensor, mode), rank) for mode, rank in enumerate(ranks)]
    for _ in range(iterations):
        for mode, rank in enumerate(ranks):
            factors[mode] = leading(unfold(project(tensor, factors, skip=mode), mode), rank)
    return project(tensor, factors), factors


def fused_by_iteration(tensors, ratio):
    ranks = [round(ratio * min(t.shape[mode] for t in tensors)) for mode in (0, 1)] + [1, 1]
    parts = [tucker(t, ranks) for t in tensors]
    core = sum(core for core, _ in parts) / len(parts)
    return [project(core, [factor.T for factor in factors]) for _, factors in parts], parts


def spectra(decay=0.2, seed=0, shapes=((8, 16), (16, 24), (24, 48), (32, 64))):
    """Random matrices (D, n, 1, 1) with singular values exp(-decay i)."""
    torch.manual_seed(seed)
    made = []
    for rows, columns in shapes:
        u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))
        made.append(((u * torch.exp(-decay * torch.arange(rows))) @ v.T).view(rows, columns, 1, 1))
    return made


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shapes", [((8, 16), (16, 24), (32, 64)), ((16, 8), (24, 20))], ids=["wide", "tall"])
def test_naive_cores_are_those_of_orthogonal_iteration(ratio, shapes):
    factors = spectra(shapes=[(min(s), max(s)) for s in shapes])
    if shapes[0][0] > shapes[0][1]:
        factors = [factor.transpose(0, 1).contiguous() for factor in factors]
    expected, parts = fused_by_iteration([factor.numpy() for factor in factors], ratio)
    signs = {float(np.sign(value)) for core, _ in parts for value in np.diag(core[:, :, 0, 0])}
    assert signs == {1.0, -1.0}, "the test needs cores of mixed signs"
    for ours, theirs in zip(fuse_factors(factors, ratio, "naive"), expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-8, atol=1e-10)


def test_aligned_cores_are_the_mean_of_the_singular_values():
    factors = [factor * scale for factor, scale in zip(spectra(), (1.0, 2.0, 3.0, 6.0), strict=True)]
    fused = fuse_factors(factors, rank_ratio=0.5)
    expected = 3.0 * torch.exp(-0.2 * torch.arange(4))
    for factor in fused:
        values = torch.linalg.svdvals(factor.flatten(1))
        torch.testing.assert_close(values[:4], expected.double())
        assert values[4:].max() < 1e-12


def test_one_width_is_projected_to_the_rank_once():
    (factor,) = spectra()[-1:]
    for core in ("naive", "sign_aligned"):
        (once,) = fuse_factors([factor], 0.25, core)
        (twice,) = fuse_factors([once], 0.25, core)
        assert torch.linalg.matrix_rank(once.flatten(1)) == 8
        torch.testing.assert_close(once, twice)
        u, s, vh = np.linalg.svd(factor.numpy()[:, :, 0, 0])
        nearest = (u[:, :8] * s[:8]) @ vh[:8]
        torch.testing.assert_close(once.flatten(1), torch.from_numpy(nearest))


def test_equal_leading_values_pass_unchanged_only_when_aligned_and_the_rest_is_kept():
    factors = spectra()
    same = fuse_factors(factors, 0.5, "sign_aligned", "keep")
    torch.testing.assert_close(same, factors)
    for core, residual in (("naive", "keep"), ("naive", "drop"), ("sign_aligned", "drop")):
        changed = fuse_factors(factors, 0.5, core, residual)
        assert any((a - b).norm() > 0.05 * b.norm() for a, b in zip(changed, factors, strict=True))


def test_naive_cores_cancel_where_aligned_ones_keep_the_norm():
    kept = {"naive": [], "sign_aligned": []}
    for seed, core in itertools.product(range(10), kept):
        factors = spectra(seed=seed, shapes=((32, 64), (64, 128), (96, 192), (128, 256)))
        for new, old in zip(fuse_factors(factors, 0.25, core), factors, strict=True):
            kept[core].append((new.norm() / old.norm()).item())
    assert 0.25 < np.mean(kept["naive"]) < 0.65
    assert np.mean(kept["sign_aligned"]) > 0.95


def test_the_ranks_of_the_papers_example():
    factors = [torch.randn(int(512 * p), int(1024 * p), 1, 1) for p in (0.25, 1.0)]
    fused = fuse_factors(factors)
    assert [torch.linalg.matrix_rank(factor.flatten(1)) for factor in fused] == [32, 32]
    assert [factor.dtype for factor in fused] == [torch.float32] * 2


def test_only_the_named_layer_changes():
    models, _ = states()
    layers = list(factorised_layers(network(1.0, 0)))
    assert layers == ["conv1", "conv2"]
    fused = HIFI(rank_ratio=0.5).fuse(models, [factor_key("conv2")])
    for width in WIDTHS:
        changed = [key for key in fused[width] if not torch.equal(fused[width][key], models[width][key])]
        assert changed == ["conv2.factor"]
        network(width, 0).load_state_dict(fused[width])


def test_hifi_works_in_its_window_only():
    assert [number for number in range(1, 12) if HIFI(rounds=9, every=4).active(number)] == [4, 8]
    assert [number for number in range(1, 8) if HIFI(rounds=3).active(number)] == [1, 2, 3]
    assert not any(HIFI(rounds=0).active(number) for number in range(1, 9))


@pytest.mark.parametrize("wrong", [{"rounds": -1}, {"every": 0}, {"rank_ratio": 0.0}, {"rank_ratio": 1.5}])
def test_impossible_windows_and_ranks_are_refused(wrong):
    with pytest.raises(UserError, match="hifi"):
        HIFI(**wrong)


def test_a_rank_of_zero_and_a_kernel_are_refused():
    with pytest.raises(UserError, match="rank_ratio"):
        fuse_factors([torch.randn(4, 8, 1, 1)], 0.1)
    with pytest.raises(UserError, match="factors"):
        fuse_factors([torch.randn(4, 8, 3, 3)])
