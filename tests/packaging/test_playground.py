"""The playground: what its page holds, and that the network in it learns as PyTorch's does."""

from __future__ import annotations

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import said_by_browser
from safetensors.torch import load_file, save_file
from torch import nn

from datamodules import ImageDataModule
from leanlight.contracts import UserError
from leanlight.ops.whitening import apply_zca, fit_zca

FOLDER = Path(__file__).parents[2] / "scripts" / "playground"
SIDE = 8


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "make.py"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in the place of a distilled one: the whitened mean image of each class."""
    folder = tmp_path_factory.mktemp("export")
    data = ImageDataModule("fashion_mnist", variant="subset", image_size=SIDE)
    data.setup()
    images, labels = data.train_split.images.float() / 255, data.train_split.labels
    whitening = fit_zca(images)
    white = apply_zca(images, whitening)
    means = torch.stack([white[labels == label].mean(0) for label in range(10)])
    save_file({"images": means, "labels": torch.eye(10), "whitening": whitening}, folder / "distilled.safetensors")
    card = {
        "classes": list(data.meta.classes),
        "ipc": 1,
        "recipe": {"lr": 0.01},
        "preprocess": "zca",
        "images": [10, 1, 8, 8],
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def held_by(text: str) -> dict[str, Any]:
    """The data of a page."""
    found = re.search(r'<script type="application/json" id="held">(.*?)</script>', text, re.S)
    assert found
    return dict(json.loads(found[1]))


def numbers(held: Any) -> np.ndarray:
    """One of a page's arrays: bytes, or 16-bit integers and what one is worth."""
    if isinstance(held, str):
        return np.frombuffer(base64.b64decode(held), np.uint8)
    return np.frombuffer(base64.b64decode(held["integers"]), np.int16) * held["worth"]


def test_the_page_holds_the_set_within_a_ten_thousandth_and_real_images_unchanged(
    script: dict[str, Any], export: Path
) -> None:
    held = held_by(script["render"](export, "fashion_mnist"))
    tensors = load_file(export / "distilled.safetensors")
    for name in ("images", "labels", "whitening"):
        whole = tensors[name].flatten().numpy()
        assert np.abs(numbers(held[name]) - whole).max() <= 1e-4 * np.abs(whole).max(), name
    data = ImageDataModule("fashion_mnist", variant="subset", image_size=SIDE)
    data.setup()
    test = data.test_split
    count = len(held["test_labels"])
    assert np.array_equal(numbers(held["test"]), test.images[:count].numpy().ravel())
    assert held["test_labels"] == test.labels[:count].tolist()
    assert np.bincount(held["pool_labels"]).tolist() == [30] * 10


@pytest.mark.parametrize("what", ["empty", "standardised", "colour"])
def test_what_the_page_cannot_hold_is_refused_by_name(
    script: dict[str, Any], export: Path, tmp_path: Path, what: str
) -> None:
    if what != "empty":
        tensors = {"images": torch.zeros(10, 3 if what == "colour" else 1, 8, 8), "labels": torch.eye(10)}
        tensors |= {"whitening": torch.eye(192)} if what == "colour" else {"mean": torch.zeros(1, 1, 1)}
        save_file(tensors, tmp_path / "distilled.safetensors")
        (tmp_path / "card.json").write_text((export / "card.json").read_text())
    with pytest.raises(UserError, match=r"^EXPORT: expected"):
        script["render"](tmp_path, "fashion_mnist")


def test_the_script_of_the_page_cannot_be_ended_by_its_data(
    script: dict[str, Any], export: Path, tmp_path: Path
) -> None:
    card = json.loads((export / "card.json").read_text())
    card["classes"][0] = "</script><b>shirt</b>"
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "distilled.safetensors").write_bytes((export / "distilled.safetensors").read_bytes())
    text = script["render"](tmp_path, "fashion_mnist")
    assert "<b>shirt" not in text
    assert held_by(text)["classes"] == card["classes"]


DRIVER = """<pre id="said"></pre><script>%s</script><script>
const given = %s, net = newNetwork(5, 4, 3);
net.parameters = given.parameters.map((values) => Float64Array.from(values));
for (let k = 0; k < 30; k++) trainStep(net, given.rows, given.labels, 0.01);
const white = [...whitened(given.pixels, given.matrix, 5)];
document.getElementById("said").textContent =
  JSON.stringify([net.parameters.map((p) => [...p]), white, accuracy(net, given.rows, [0, 1, 2, 0])]);
</script>"""


@pytest.mark.slow
def test_the_network_of_the_page_learns_as_pytorchs_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    rows, labels = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    pixels, matrix = torch.rand(2, 1, 1, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    first = [parameter.detach().t().flatten().tolist() for parameter in net.parameters()]
    given = {"parameters": first, "rows": rows.flatten().tolist(), "labels": labels.flatten().tolist()}
    given |= {"pixels": pixels.flatten().tolist(), "matrix": matrix.flatten().tolist()}
    trained, white, right = said_by_browser(DRIVER % ((FOLDER / "network.js").read_text(), json.dumps(given)))
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(30):
        adam.zero_grad()
        nn.functional.cross_entropy(net(rows), labels).backward()
        adam.step()
    for found, parameter in zip(trained, net.parameters(), strict=True):
        assert torch.allclose(torch.tensor(found), parameter.detach().t().flatten().float(), atol=1e-6)
    assert np.allclose(white, apply_zca(pixels, matrix).flatten().numpy())
    assert right == float((net(rows).argmax(1) == torch.tensor([0, 1, 2, 0])).double().mean())


CLICKS = """<iframe id="page" src="playground.html"></iframe><pre id="said"></pre><script>
document.getElementById("page").addEventListener("load", async () => {
  const page = document.getElementById("page").contentDocument, said = {};
  for (const kind of ["distilled", "real", "many"]) {
    page.getElementById(`train_${kind}`).click();
    const output = page.getElementById(`said_${kind}`);
    while (!output.dataset.done) await new Promise((onwards) => setTimeout(onwards, 20));
    said[kind] = +output.dataset.done;
  }
  said.strips = ["distilled", "real"].map((id) => page.getElementById(id).childElementCount);
  said.width = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  document.getElementById("said").textContent = JSON.stringify(said);
});
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1000])
def test_clicks_train_networks_and_mean_images_teach_more_than_one_real_image_a_class(
    script: dict[str, Any], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("playground.html").write_text(script["render"](export, "fashion_mnist"))
    said = said_by_browser(CLICKS, width)
    assert said["strips"] == [10, 10]
    assert said["width"] <= 0
    assert said["distilled"] > said["real"] + 0.05
    assert said["many"] > 0.5


def test_the_page_of_the_documentation_is_made_of_the_present_sources() -> None:
    page = (FOLDER.parents[1] / "docs" / "playground.html").read_text()
    for name in ("network.js", "page.js", "page.css"):
        assert (FOLDER / name).read_text() in page, f"{name} has changed: run scripts/playground/make.py again"
