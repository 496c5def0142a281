"""A folder of pictures nobody prepared becomes a network trained on a part of them, in three commands."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

NETWORK = "--model.init_args.network.init_args.name=test_byobnet"
SMALL = ["--data.init_args.image_size=32", "--data.init_args.num_workers=0", "--run.wandb=disabled"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    digits = load_digits()
    for name in ("zero", "one", "seven"):
        (folder / "pictures" / name).mkdir(parents=True)
        images = digits.images[digits.target == {"zero": 0, "one": 1, "seven": 7}[name]][:30]
        for number, image in enumerate(images):
            pixels = (image * 15).astype("uint8").repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{name} {number:02}.png")
    return folder


def leanlight(project, *words):
    done = subprocess.run([sys.executable, "-m", "leanlight", *words], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_three_commands_lead_from_pictures_to_a_network_trained_on_some_of_them(project):
    data = ["--config=adq/image_folder", "--data.init_args.path=pictures", NETWORK, *SMALL]
    leanlight(project, "predict", *data, "--run.id=features")
    run = project / "runs" / "adq" / "image_folder" / "features"
    said = leanlight(project, "select", str(run), "--rule=adq", "--keep=0.5", "--set=num_bins=3", "--output=kept",
                     "--images=kept pictures")  # fmt: skip
    record = json.loads((project / "kept" / "selection.json").read_text())
    chosen = load_file(project / "kept" / "selection.safetensors")
    kept = record["kept"]
    assert f"{kept} of {record['items']} items" in said
    for counts in record["counts"]:
        assert counts["kept"] == (counts["items"] + 1) // 2

    written = ImageFolder(project / "kept pictures")
    assert written.classes == ["one", "seven", "zero"]
    assert sorted(written.targets) == sorted(chosen["label"].tolist())
    originals = {path.read_bytes() for path in (project / "pictures").rglob("*.png")}
    for path, _ in written.samples:
        with open(path, "rb") as file:
            assert file.read() in originals

    config = ["--config=adq/image_folder", "--data=datamodules.SubsetStream", "--data.init_args.path=pictures"]
    config += ["--data.init_args.subset=kept", "--model=lit_modules.classifier.ImageClassifier", NETWORK, *SMALL]
    leanlight(project, "fit", *config, "--run.id=trained", "--trainer.max_epochs=1", "--data.init_args.batch_size=8")
    summary = json.loads((project / "runs" / "adq" / "image_folder" / "trained" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["data"]["counts"]["train"] == kept
    assert summary["data"]["fingerprint"].startswith(record["data"])
    assert 0 <= summary["metrics"]["test/accuracy"] <= 1
