"""Networks of sessions against naive ones with the same weights, what they do with padding, and their export."""

import pytest
import torch
from torch import nn

from leanlight.contracts import Catalogue, Sessions, UserError
from lit_modules.hid import GCEGNN, SRGNN, STAMP, GRU4Rec, Scoring
from lit_modules.hid.reference import encode_one

ITEMS = 30


def gcegnn(**settings):
    """A prepared one; items above 20 are in no training session, and some have fewer than the neighbours kept."""
    network = GCEGNN(ITEMS, 8, neighbours=4, **settings)
    generator = torch.Generator().manual_seed(5)
    training = Sessions(torch.randint(1, 21, (60,), generator=generator), torch.arange(0, 61, 4))
    none = torch.zeros(0, dtype=torch.int64)
    clicks = torch.zeros(ITEMS + 1, dtype=torch.int64)
    names = tuple(str(i) for i in range(ITEMS))
    network.prepare(Catalogue(names, (), none, none, clicks, clicks > 0), training)
    return network


NETWORKS = {
    "gru4rec": lambda: GRU4Rec(ITEMS, 8, layers=2),
    "stamp": lambda: STAMP(ITEMS, 8, embedding_std=0.4, weight_std=0.4, max_norm=1.1),
    "stamp, any norm": lambda: STAMP(ITEMS, 8, embedding_std=0.4, weight_std=0.4, max_norm=None),
    "srgnn": lambda: SRGNN(ITEMS, 8),
    "srgnn, 2 steps": lambda: SRGNN(ITEMS, 8, steps=2),
    "gcegnn": gcegnn,
    "gcegnn, 2 hops": lambda: gcegnn(hops=2),
}


def sessions(count=12, longest=9, seed=0):
    """Random sessions with repeated clicks, one of a single click and one of a single item; padded, and as lists."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, longest + 1, (count,), generator=generator)
    length[0], length[1] = 1, longest
    items = torch.randint(17, 26, (count, longest), generator=generator)
    items[1] = 20
    items = items * (torch.arange(longest) < length[:, None])
    return items, length, [row[:n] for row, n in zip(items.tolist(), length.tolist(), strict=True)]


def built(make, dtype=torch.double):
    torch.manual_seed(1)
    return make().to(dtype).eval()


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_batch_is_what_a_naive_network_gives_session_by_session_and_so_are_gradients(make):
    network = built(make)
    items, length, lists = sessions()
    ours = network(items, length)
    theirs = torch.stack([encode_one(network, clicks) for clicks in lists])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    weight = torch.randn(ours.shape, dtype=torch.double)
    used = [p for p in network.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((weight * side).sum(), used) for side in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert all(gradient.any() for gradient in gradients[0]), "a weight takes no part"


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_more_padding_changes_nothing(make):
    network = built(make)
    items, length, _ = sessions()
    wider = nn.functional.pad(items, (0, 5))
    torch.testing.assert_close(network(wider, length), network(items, length), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_training_leaves_padding_at_zero(make):
    network = built(make, torch.float32).train()
    items, length, _ = sessions()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, weight_decay=0.1)
    before = network.item_embedding().detach().clone()
    Scoring().loss(network(items, length), network.item_embedding(), torch.arange(1, 13)).backward()
    optimizer.step()
    assert not network.item_embedding()[0].any()
    assert (network.item_embedding()[1:] != before[1:]).any(1).all()


class Scores(nn.Module):
    """What an export holds: sessions to the scores of all items."""

    def __init__(self, network):
        super().__init__()
        self.network, self.scoring = network, Scoring("cosine")

    def forward(self, items):
        return self.scoring(self.network(items, (items > 0).sum(1)), self.network.item_embedding())


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_an_export_takes_any_number_of_sessions_of_any_length(make, tmp_path):
    network = Scores(built(make, torch.float32)).eval()
    shapes = {"items": {0: torch.export.Dim("N"), 1: torch.export.Dim("L", max=network.network.max_length or 10**6)}}
    program = torch.export.export(network, (sessions()[0],), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for count, longest in ((12, 9), (2, 40), (50, 2), (1, 3), (1, 1)):
        items = sessions(max(count, 2), longest, seed=count)[0][:count]
        torch.testing.assert_close(loaded(items), network(items), rtol=1e-5, atol=1e-6)


def test_first_values_are_those_of_the_authors():
    torch.manual_seed(0)
    stamp = STAMP(2000, 50)
    assert stamp.embedding.weight[1:].detach().std() == pytest.approx(0.002, rel=0.02)
    assert stamp.of_click.weight.detach().std() == pytest.approx(0.05, rel=0.05)
    assert not stamp.of_click.bias.any()
    gru = GRU4Rec(2000, 64)
    assert GRU4Rec(2000, 64, embedding_std=0.5).embedding.weight[1:].detach().std() == pytest.approx(0.5, rel=0.02)
    graphs = SRGNN(2000, 64), GCEGNN(2000, 64)
    for name, weight in [(n, w) for network in (gru, *graphs) for n, w in network.named_parameters()]:
        values = weight[1:] if name == "embedding.weight" else weight
        assert values.abs().max() <= 1 / 8
        assert values.abs().max() > 0.11
    assert not any(network.embedding.weight[0].any() for network in (stamp, gru, *graphs))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: STAMP(0), "num_items"),
        (lambda: STAMP(5, 0), "dim"),
        (lambda: STAMP(5, max_norm=0.0), "max_norm"),
        (lambda: STAMP(5, embedding_std=-1.0), "embedding_std"),
        (lambda: GRU4Rec(5, dropout=1.0), "dropout"),
        (lambda: GRU4Rec(5, layers=0), "layers"),
        (lambda: SRGNN(5, steps=0), "steps"),
        (lambda: GCEGNN(5, hops=0), "hops"),
        (lambda: GCEGNN(5, dropout_gcn=-0.1), "dropout_gcn"),
    ],
)
def test_bad_values_are_one_line(make, name):
    with pytest.raises(UserError, match=f"{name}: expected"):
        make()


def test_positions_are_counted_from_the_last_click_and_too_many_are_one_line():
    network = built(lambda: gcegnn(positions=3))
    items, length = torch.tensor([[3, 4, 5], [4, 5, 0]]), torch.tensor([3, 2])
    before = network(items, length)
    with torch.no_grad():
        network.position.weight[2] += 1
    changed = (network(items, length) != before).any(1)
    assert changed.tolist() == [True, False]
    with pytest.raises(UserError, match="positions: expected at least 4, the clicks of a session, got 3"):
        network(nn.functional.pad(items, (0, 1)), length)


def test_items_without_neighbours_and_unprepared_networks_stay_finite():
    network = GCEGNN(ITEMS, 8, hops=2).train()
    items, length, _ = sessions()
    network(items, length).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters() if weight.grad is not None)


def test_a_checkpoint_holds_the_graph_of_items():
    network, other = gcegnn(), GCEGNN(ITEMS, 8, neighbours=4)
    other.load_state_dict(network.state_dict())
    assert other.neighbour.any()
    items, length, _ = sessions()
    assert torch.equal(other.eval()(items, length), network.eval()(items, length))


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_mixed_precision_stays_near_float32(make):
    network = built(make, torch.float32)
    items, length, _ = sessions()
    full = network(items, length)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(items, length)
    assert (mixed.float() - full).abs().max() <= 0.05 * full.abs().max()
