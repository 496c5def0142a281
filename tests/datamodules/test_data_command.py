"""`leanlight data`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import CATALOG, EMOTIONS, SAFETY_SETS, SESSIONS
from datamodules.images import formats
from datamodules.safety import shapes
from datamodules.safety.shapes import Shapes
from leanlight.cli import data
from leanlight.contracts import UserError


def test_list_names_every_set_without_importing_torch() -> None:
    code = "import sys; from leanlight.cli.data import main; main(['list']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in (*CATALOG, *SESSIONS, *EMOTIONS, *SAFETY_SETS, "emotion_planted", "emotion_npz"):
        assert name in done.stdout


def test_check_prints_counts_and_fingerprint(capsys: pytest.CaptureFixture[str]) -> None:
    from datamodules import ImageDataModule

    assert data.main(["check", "fashion_mnist", "--variant", "subset"]) == 0
    printed = capsys.readouterr().out
    module = ImageDataModule(variant="subset")
    module.setup()
    for expected in ("packaged subset", "2,880 train, 320 val, 800 test", "1x28x28", module.meta.fingerprint):
        assert expected in printed


def test_check_of_sessions_prints_items_categories_head_and_cases(capsys: pytest.CaptureFixture[str]) -> None:
    from datamodules import SessionDataModule

    assert data.main(["check", "planted"]) == 0
    printed = capsys.readouterr().out
    module = SessionDataModule("planted")
    module.setup()
    meta, clicks = module.meta, sorted(module.catalogue.clicks.tolist(), reverse=True)
    share = 100 * sum(clicks[: meta.num_head]) / sum(clicks)
    counts = f"{meta.counts['train']:,} train, {meta.counts['val']:,} val, {meta.counts['test']:,} test"
    for expected in (
        f"{meta.num_items:,}, clicked",
        "96",
        f"{meta.num_head} items with {share:.1f}%",
        "2,700 train",
        counts,
        meta.fingerprint,
    ):
        assert expected in printed


def test_prepare_of_sessions_says_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["prepare", "planted"]) == 0
    assert capsys.readouterr().out == "planted: ready, 3,000 train and 500 test sessions from made\n"


def test_check_of_clips_prints_modalities_classes_and_conflicts(capsys: pytest.CaptureFixture[str]) -> None:
    from datamodules import EmotionDataModule

    assert data.main(["check", "emotion_planted"]) == 0
    printed = capsys.readouterr().out
    module = EmotionDataModule("planted")
    module.setup()
    splits = [split for split in (module.train_split, module.val_split, module.test_split) if split is not None]
    batches = [split.batch(torch.arange(len(split))) for split in splits]
    conflicts = sum(int(batch.conflict.sum()) for batch in batches if batch.conflict is not None)
    zeros = int((batches[0].label == 0).sum())
    for expected in (
        "24 wide",
        "900 train, 200 val, 697 test",
        f"10, in training: 0 {zeros},",
        f"{conflicts:,} clips of all parts",
        module.meta.fingerprint,
    ):
        assert expected in printed
    assert data.main(["prepare", "emotion_planted"]) == 0
    assert capsys.readouterr().out == "emotion_planted: ready, 1,797 clips from pictures of scikit-learn\n"


def test_check_of_samples_prints_sizes_labels_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    pictures = [None, "a.png"] * 50
    rows = [
        {"prompt": f"{n}", "answer": "a", "image": image, "response_label": n // 2 % 2}
        for n, image in enumerate(pictures)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    place = ["jsonl", "--path", str(tmp_path / "own.jsonl"), "--images", str(tmp_path)]
    assert data.main(["prepare", *place]) == 0
    assert capsys.readouterr().out == f"jsonl: ready, 100 samples, 50 with a picture, from {tmp_path / 'own.jsonl'}\n"
    assert data.main(["check", *place]) == 0
    printed = capsys.readouterr().out
    counts = re.search(r"response +harmful in (\d+) train, (\d+) val, (\d+) test", printed)
    assert counts is not None
    assert sum(map(int, counts.groups())) == 50
    assert "instruction" not in printed


def test_prepare_of_shapes_writes_files_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "Shapes", lambda: small)
    small = Shapes(train=3, val=1, test=2)
    for expected in ("written to", "already in"):
        assert data.main(["prepare", "shapes", "--root", str(tmp_path)]) == 0
        assert f"ready, 6 samples with pictures {expected} {tmp_path / 'shapes'}" in capsys.readouterr().out
    assert len((tmp_path / "shapes" / "test.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "shapes").rglob("*.png"))) == 6


def test_check_takes_the_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = np.zeros((40, 28, 28), np.uint8), np.arange(40) % 10
    part = formats.as_part(images, labels, "test", 10)
    formats.write_npz(tmp_path / "mnist.npz", {"train": part, "test": part})
    assert data.main(["check", "mnist", "--root", str(tmp_path)]) == 0
    assert str(tmp_path / "mnist.npz") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "mnits"], "did you mean 'mnist'"),
        (["check", "cifar10", "--root", "nowhere"], "tried: nowhere/cifar10/cifar10.npz; .*data prepare cifar10"),
        (["check", "digenetica"], "did you mean 'diginetica'"),
        (
            ["check", "tmall", "--root", "nowhere"],
            "tried: nowhere/sessions/tmall.npz; nowhere/tmall; .*user_log_format1",
        ),
        (["check", "mosi", "--root", "nowhere"], "tried: nowhere/cmu_mosi/mosi_utterances.npz; to get it: put"),
        (["check", "pickles", "--path", "nowhere"], "path: expected the place of pickles data, got 'nowhere'"),
        (["check", "falcon", "--root", "nowhere"], "tried: nowhere/falcon; nowhere/Falcon; to get it: put"),
        (["check", "csv", "--path", "nowhere.csv"], "path: expected the place of csv data, got 'nowhere.csv'"),
        (["prepare", "celeba", "--root", "nowhere"], "nowhere/celeba/img_align_celeba"),
    ],
)
def test_missing_data_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.main(argv)
    assert "\n" not in str(caught.value)


def test_prepare_decodes_sets_of_picture_files_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    base = tmp_path / "tiny-imagenet-200"
    (base / "train" / "n01" / "images").mkdir(parents=True)
    (base / "val" / "images").mkdir(parents=True)
    Image.effect_noise((64, 64), 80).save(base / "train" / "n01" / "images" / "a.png")
    Image.effect_noise((64, 64), 80).save(base / "val" / "images" / "b.png")
    (base / "val" / "val_annotations.txt").write_text("b.png\tn01\n")
    assert data.main(["prepare", "tiny_imagenet", "--root", str(tmp_path)]) == 0
    target = tmp_path / "tiny_imagenet" / "tiny_imagenet.npz"
    assert str(target) in capsys.readouterr().out
    parts, classes = formats.read_npz(target, 200)
    assert classes == ("n01",)
    assert np.array_equal(parts["test"][0][0, 1], np.asarray(Image.open(base / "val" / "images" / "b.png")))
