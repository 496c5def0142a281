import torch

from callbacks.pictures import render
from leanlight.contracts import Curve, Histogram, ImageGrid
from lit_modules.adq import selection_pictures
from lit_modules.selection import Features, Picks

LABEL = torch.tensor([0, 1, 2]).repeat_interleave(20)
DETAILS = {"bins": {"size": [30, 30], "texture": [0.2, 0.3], "share": [0.75, 0.25], "drawn": [3, 1], "diversity": []}}


def picks(index, bin=-1, details=DETAILS):
    index = torch.tensor(index)
    zeros = torch.zeros(len(index))
    return Picks(index, zeros.long(), zeros, zeros + 1, zeros.long() + torch.tensor(bin), details)


def images(position):
    """Each image is the number of its item."""
    return (position / 100).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def test_every_picture_of_a_selection_can_be_drawn(tmp_path):
    drawn = selection_pictures(Features(LABEL, 3), picks([0, 1, 20, 41], [0, 0, 0, 1]), torch.rand(60), images)
    assert {*drawn} == {"classes", "bin_texture", "bin_share", "scores", "montage"}
    for name, item in drawn.items():
        assert render(item, tmp_path / name, name).stat().st_size > 1000


def test_a_rule_without_scores_bins_and_images_has_the_classes_alone():
    assert {*selection_pictures(Features(LABEL, 3), picks([0, 20], details={}))} == {"classes"}


def test_shares_stand_beside_those_of_the_sizes():
    curve = selection_pictures(Features(LABEL, 3), picks([0]))["bin_share"]
    assert isinstance(curve, Curve)
    assert {*map(tuple, curve.series.values())} == {(0.75, 0.25), (0.5, 0.5)}
    assert list(curve.x) == [0, 1]


def test_scores_are_parted_into_kept_and_dropped():
    drawn = selection_pictures(Features(LABEL, 3), picks([3, 59]), torch.arange(60.0))["scores"]
    assert isinstance(drawn, Histogram)
    assert drawn.series["kept"].tolist() == [3, 59]
    assert sorted(drawn.series["kept"].tolist() + drawn.series["dropped"].tolist()) == list(range(60))


def test_a_montage_has_a_row_a_bin_and_asks_for_shown_images_alone():
    asked = []

    def counted(position):
        asked.extend(position.tolist())
        return images(position)

    index = list(range(40))
    grid = selection_pictures(Features(LABEL, 3), picks(index, [0] * 35 + [4] * 5), images=counted)["montage"]
    assert isinstance(grid, ImageGrid)
    assert len(asked) == 15
    first, second = grid.images[:, 0, 0, 0].split(10)
    assert torch.equal(first[[0, -1]], torch.tensor([0.0, 0.34]))  # from the first to the last of the bin
    assert torch.equal(second, torch.tensor([0.35, 0.36, 0.37, 0.38, 0.39] + [1.0] * 5))
    assert [text for text in grid.captions if text] == ["bin 0", "bin 4"]


def test_without_bins_a_montage_has_a_row_a_class():
    grid = selection_pictures(Features(LABEL, 3), picks([0, 41, 42]), images=images)["montage"]
    assert [text for text in grid.captions if text] == ["class 0", "class 2"]
