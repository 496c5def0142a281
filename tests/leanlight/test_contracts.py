"""Batches of every kind move, select and count; what is none is refused; DataModules are what the protocols say."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from datamodules import (
    DistilledDataModule,
    FederatedDataModule,
    GameDataModule,
    ImageDataModule,
    ImageFolderStream,
    SubsetDataModule,
)
from leanlight.contracts import (
    Batch,
    ClientBatch,
    FederatedData,
    GameData,
    ImageBatch,
    ImageData,
    InMemoryImages,
    MethodData,
    Transition,
    to_device,
)


@dataclass(frozen=True)
class Questions(Batch):
    """As a vision-language model would want it: text, and pictures of any number of patches."""

    patches: tuple[Tensor, ...]
    question: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    index: Tensor


@dataclass(frozen=True)
class Sessions(Batch):
    """As a recommender would want it: sequences of any length, features by name, facts of all."""

    items: tuple[Tensor, ...]
    features: dict[str, Any]
    target: Tensor
    longest: int
    temperature: float | None = None


@dataclass(frozen=True)
class Anything(Batch):
    field: Any
    index: Tensor | None = None


def questions() -> Questions:
    patches = tuple(torch.full((size, 3), float(size)) for size in (4, 1, 2))
    return Questions(patches, ("a?", "b?", "c?"), (("x",), (), ("y", "z")), torch.arange(3))


def sessions() -> Sessions:
    items = tuple(torch.arange(size) for size in (3, 0, 5))
    features = {"text": ("p", "q", "r"), "inner": {"dense": torch.eye(3), "weight": 0.5, "none": None}}
    return Sessions(items, features, torch.tensor([7, 8, 9]), 5)


def images(count: int = 4) -> ImageBatch:
    return ImageBatch(torch.rand(count, 1, 2, 2), torch.arange(count), 10 + torch.arange(count))


# ---- Batch ----


@pytest.mark.parametrize("batch", [questions(), sessions(), images(3)])
def test_items_are_counted_whatever_the_fields_hold(batch):
    assert len(batch) == 3


def test_facts_alone_make_no_items():
    assert len(Anything(3)) == len(Anything(None)) == len(Anything({"share": 0.5, "flag": True})) == 0


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), torch.tensor([-1, -3])])
def test_positions_take_the_same_items_of_every_field_in_their_order(index):
    taken = questions().select(index)
    assert taken.question == ("c?", "a?")
    assert taken.answers == (("y", "z"), ("x",))
    assert [len(patches) for patches in taken.patches] == [2, 4]
    assert taken.index.tolist() == [2, 0]


def test_a_mask_takes_the_same_items_as_its_positions():
    mask = torch.tensor([True, False, True])
    taken, expected = sessions().select(mask), sessions().select(torch.tensor([0, 2]))
    assert [items.tolist() for items in taken.items] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert taken.features["text"] == ("p", "r") == expected.features["text"]
    assert torch.equal(taken.features["inner"]["dense"], torch.eye(3)[[0, 2]])
    assert taken.target.tolist() == [7, 9] == expected.target.tolist()
    assert (taken.longest, taken.features["inner"]["weight"], taken.features["inner"]["none"]) == (5, 0.5, None)


def test_items_may_be_taken_twice():
    assert questions().select(torch.tensor([1, 1])).question == ("b?", "b?")


@pytest.mark.parametrize(
    "nothing", [torch.tensor([]), torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)]
)
@pytest.mark.parametrize("batch", [questions(), sessions(), images(3)])
def test_nothing_can_be_taken(batch, nothing):
    assert len(batch.select(nothing)) == 0
    assert type(batch.select(nothing)) is type(batch)


@pytest.mark.parametrize("batch", [questions(), images(3)])
def test_what_is_not_there_cannot_be_taken(batch):
    with pytest.raises(IndexError):
        batch.select(torch.tensor([3]))
    with pytest.raises(IndexError, match="2 entries"):
        batch.select(torch.tensor([True, False]))


def test_a_batch_in_a_batch_is_selected_with_it():
    @dataclass(frozen=True)
    class Pair(Batch):
        left: ImageBatch
        text: tuple[str, ...]

    taken = Pair(images(3), ("a", "b", "c")).select(torch.tensor([2]))
    assert isinstance(taken.left, ImageBatch)
    assert (taken.left.index.tolist(), taken.text) == ([12], ("c",))
    assert ClientBatch(images(3), client=7, round_number=2).select(torch.tensor([0])).client == 7


def test_moving_reaches_every_tensor_and_nothing_else():
    """The device `meta` holds no values: what is on it was moved."""
    batch = questions().to("meta")
    assert {patches.device.type for patches in batch.patches} == {batch.index.device.type} == {"meta"}
    assert (batch.question, batch.answers) == (questions().question, questions().answers)
    other = sessions().to(torch.device("meta"))
    moved = [*other.items, other.features["inner"]["dense"], other.target]
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert (other.longest, other.features["text"]) == (5, ("p", "q", "r"))
    inner = ClientBatch(images(2), 1, 0).to("meta").data
    assert {value.device.type for value in (inner.image, inner.label, inner.index)} == {"meta"}
    weighted = replace(images(2), weight=torch.ones(2))
    assert weighted.to("meta").weight.device.type == "meta"
    assert weighted.select(torch.tensor([1])).weight.tolist() == [1.0]


def test_the_original_stays_as_it_was():
    batch = sessions()
    batch.select(torch.tensor([0]))
    batch.to("meta")
    assert len(batch) == 3
    assert batch.target.device.type == "cpu"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (["a", "b"], "got a list"),
        ("a question", "got a str"),
        (object(), "got a object"),
        (np.zeros(2), "got a ndarray"),
        ({1, 2}, "got a set"),
        (torch.tensor(1.0), "tensor without dimensions"),
        ({"inner": {"deep": ["a"]}}, r"Anything.field\['inner'\]\['deep'\]: .*got a list"),
        ({"text": "one string"}, r"Anything.field\['text'\]: .*got a str"),
        ((torch.zeros(2), ["a"]), "got a list"),
        (({"deep": object()},), "got a object"),
    ],
)
def test_what_is_no_field_is_refused_by_name(value, named):
    with pytest.raises(TypeError, match=named) as caught:
        Anything(value)
    assert str(caught.value).startswith("Anything.field")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Anything(("a", "b"), torch.arange(3)),
        lambda: Anything(torch.zeros(2, 5), torch.arange(3)),
        lambda: Anything({"a": torch.zeros(3), "b": ("x",)}),
        lambda: Anything(images(2), torch.arange(3)),
        lambda: replace(questions(), question=("a?",)),
    ],
)
def test_fields_of_different_numbers_of_items_are_refused(wrong):
    with pytest.raises(ValueError, match=r"one entry an item; got items: .* 3"):
        wrong()


def test_transitions_select_all_their_fields():
    batch = Transition(
        torch.zeros(3, 2, 4, 4, dtype=torch.uint8), torch.arange(3), torch.arange(3.0), torch.ones(3, 2, 4, 4),
        torch.tensor([True, False, True]), torch.full((3,), 0.9),
    )  # fmt: skip
    taken = batch.select(batch.terminal)
    assert (len(taken), taken.action.tolist(), taken.reward.tolist()) == (2, [0, 2], [0.0, 2.0])


# ---- protocols ----


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (base / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(base / part / name / f"{number}.png")
    return base


def test_data_modules_are_what_the_protocols_say_after_setup(pictures, tmp_path):
    in_memory = ImageDataModule("digits")
    assert not isinstance(in_memory, InMemoryImages)  # nothing is loaded yet
    stream = ImageFolderStream(pictures, image_size=8, num_workers=0, val_fraction=0.25)
    clients, game = FederatedDataModule(clients=4, dataset="digits"), GameDataModule("catch")
    chosen = tmp_path / "chosen.json"
    chosen.write_text("[0, 1, 2]")
    subset = SubsetDataModule(chosen, dataset="digits")
    expected = {
        in_memory: {MethodData, ImageData, InMemoryImages},
        subset: {MethodData, ImageData, InMemoryImages},
        stream: {MethodData, ImageData},
        clients: {MethodData, ImageData, InMemoryImages, FederatedData},
    }
    for data, kinds in expected.items():
        data.setup()
        all_kinds = (MethodData, ImageData, InMemoryImages, FederatedData, GameData)
        assert {kind for kind in all_kinds if isinstance(data, kind)} == kinds, type(data).__name__
    game.setup()
    assert isinstance(game, GameData)
    assert isinstance(game, MethodData)
    assert not isinstance(game, (InMemoryImages, FederatedData))
    assert issubclass(DistilledDataModule, ImageDataModule)


class Copies(TorchFunctionMode):
    """Notes copies to a device that need not be there; tensors on `meta` stand for those of an accelerator."""

    def __init__(self):
        super().__init__()
        self.pinned, self.copied = set(), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            self.pinned.add(id(args[0]))
            return args[0]
        if func is torch.Tensor.to:
            self.copied.append((args[0].shape, str(args[1]), (kwargs or {}).get("non_blocking", False)))
            return args[0]
        return func(*args, **(kwargs or {}))


def test_copies_to_a_gpu_do_not_block_and_large_ones_go_through_page_locked_memory():
    frames, small = torch.zeros(32, 4, 84, 84, dtype=torch.uint8), torch.zeros(32)
    batch = Transition(frames, small.long(), small, frames.clone(), small.bool(), small)
    with Copies() as seen:
        batch.to("cuda:0")
    assert [(device, freely) for _, device, freely in seen.copied] == [("cuda:0", True)] * 6
    assert seen.pinned == {id(batch.state), id(batch.next_state)}
    with Copies() as seen:
        ClientBatch(images(3), client=7, round_number=2).to(torch.device("cuda", 1))
    assert [freely for *_, freely in seen.copied] == [True] * 3


@pytest.mark.parametrize(("source", "target"), [("meta", "cpu"), ("cpu", "cpu"), ("cpu", "mps")])
def test_copies_whose_numbers_are_read_right_away_block(source, target):
    with Copies() as seen:
        to_device(torch.zeros(2**20, device=source), target)
    assert (seen.copied[-1][1:], seen.pinned) == ((target, False), set())
