"""Predictions come in pieces, each item once, and a killed prediction ends as an undisturbed one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from predict_run import Module, predict
from torch.utils.data import DataLoader

from callbacks import PredictionWriter
from datamodules import ImageDataModule
from datamodules.loaders import eval_blocks, remaining_blocks
from leanlight.contracts import ResumablePrediction, SeenItems, UserError
from leanlight.predictions import describe_predictions, load_predictions, read_predictions

SCRIPT = Path(__file__).parent.parent / "support" / "predict_run.py"


def run(folder, *arguments):
    """The script in a process group of its own, since it may kill all of its group."""
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, start_new_session=True, check=False)


def pieces(folder):
    return folder / "artifacts" / "predictions"


def assert_equal(left, right):
    assert set(left) == set(right)
    for field, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[field]), field
            assert value.dtype == right[field].dtype
        else:
            assert value == right[field], field


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert predict(folder) == 45
    return folder


# ---- what is written ----


def test_every_item_is_written_once_with_its_values(undisturbed):
    data = ImageDataModule("digits", download=False)
    data.setup()
    found = load_predictions(undisturbed)
    assert found["index"].tolist() == list(range(360))
    assert torch.equal(found["label"], data.test_split.labels)
    assert torch.equal(found["half"], (data.test_split.images.flatten(1)[:, :2] / 255).bfloat16())
    assert found["text"][7].startswith("7: «")
    assert set(found["split"]) == {"test"}


def test_the_list_tells_part_items_and_fields(undisturbed):
    listed = describe_predictions(undisturbed)
    assert (listed["split"], listed["items"]) == ("test", 360)
    assert listed["fields"]["features"] == {"dtype": "float32", "shape": [64]}
    assert listed["fields"]["half"] == {"dtype": "bfloat16", "shape": [2]}
    assert listed["fields"]["text"]["dtype"] == "text"
    assert [piece["items"] for piece in listed["pieces"]] == [40] * 9


def test_text_lines_carry_their_index(undisturbed):
    first = describe_predictions(undisturbed)["pieces"][0]["name"]
    rows = [json.loads(line) for line in (pieces(undisturbed) / f"{first}.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(40))
    assert rows[3]["text"].startswith("3: ")


def test_pieces_are_read_one_by_one_in_order(undisturbed):
    read = [piece["index"].tolist() for piece in read_predictions(undisturbed)]
    assert read == [list(range(start, start + 40)) for start in range(0, 360, 40)]
    assert_equal(load_predictions(pieces(undisturbed)), load_predictions(undisturbed))


def test_reading_needs_no_lightning(undisturbed):
    code = (
        "import sys; from leanlight.predictions import read_predictions;"
        f"print(sum(len(piece['index']) for piece in read_predictions({str(undisturbed)!r})));"
        "assert not {'lightning', 'callbacks', 'datamodules'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "360"


@pytest.mark.parametrize(("split", "items"), [("train", 1293), ("val", 144)])
def test_any_part_can_be_predicted(tmp_path, split, items):
    predict(tmp_path, split=split, eval_batch_size=200)
    found = load_predictions(tmp_path)
    data = ImageDataModule("digits", download=False)
    data.setup()
    assert describe_predictions(tmp_path)["split"] == split
    assert found["index"].tolist() == list(range(items))
    assert torch.equal(found["label"], getattr(data, f"{split}_split").labels)


def test_a_part_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="predict_split: val, but there is no validation data"):
        predict(tmp_path, split="val", val_fraction=0)


def test_a_new_prediction_replaces_an_old_one(tmp_path):
    predict(tmp_path, split="val")
    assert predict(tmp_path, resume=False) == 45
    assert describe_predictions(tmp_path)["split"] == "test"
    assert len(load_predictions(tmp_path)["index"]) == 360


# ---- resume ----


def test_nothing_is_left_after_a_whole_prediction(tmp_path, undisturbed):
    predict(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in pieces(tmp_path).glob("*_*")}
    assert predict(tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in pieces(tmp_path).glob("*_*")} == before
    assert_equal(load_predictions(tmp_path), load_predictions(undisturbed))


def test_a_killed_prediction_goes_on_and_ends_as_an_undisturbed_one(tmp_path, undisturbed):
    killed = run(tmp_path, "--kill-at", 23)
    assert killed.returncode == -9
    with pytest.raises(UserError, match="leanlight predict --resume"):
        load_predictions(tmp_path)
    assert len(list(pieces(tmp_path).glob("*.safetensors"))) == 4  # 20 batches of 8 in pieces of 40
    assert predict(tmp_path) == 45 - 20
    assert_equal(load_predictions(tmp_path), load_predictions(undisturbed))
    assert describe_predictions(tmp_path)["items"] == 360


def break_cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def break_flip(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 255
    path.write_bytes(content)


def break_empty(path):
    path.write_bytes(b"")


def break_lost(path):
    path.unlink()


@pytest.mark.parametrize(
    ("suffix", "how"),
    [("safetensors", break_cut), ("safetensors", break_flip), ("jsonl", break_empty), ("jsonl", break_lost),
     ("json", break_cut), ("json", break_lost)],
)  # fmt: skip
def test_a_damaged_piece_is_predicted_again(tmp_path, undisturbed, suffix, how):
    predict(tmp_path)
    how(sorted(pieces(tmp_path).glob(f"*_0.{suffix}"))[2])
    if suffix != "json":
        with pytest.raises(UserError, match="missing or damaged"):
            load_predictions(tmp_path)
    (pieces(tmp_path) / ".000000040_0.json.77.part").write_text("half")
    (pieces(tmp_path) / "000000999_0.safetensors").write_text("killed before its json")
    assert predict(tmp_path) == 5
    assert_equal(load_predictions(tmp_path), load_predictions(undisturbed))
    assert not list(pieces(tmp_path).glob(".*"))
    assert len(list(pieces(tmp_path).glob("*.safetensors"))) == 9


def test_other_batches_after_a_kill_leave_no_item_out_or_twice(tmp_path):
    run(tmp_path, "--kill-at", 23)
    predict(tmp_path, eval_batch_size=50)
    assert sum(len(piece["index"]) for piece in read_predictions(tmp_path)) == 360
    assert load_predictions(tmp_path)["index"].tolist() == list(range(360))
    assert [piece["items"] for piece in describe_predictions(tmp_path)["pieces"]][:4] == [40] * 4


def test_data_that_cannot_leave_items_out_goes_through_all_and_says_so(tmp_path, undisturbed):
    run(tmp_path, "--kill-at", 23)
    with pytest.warns(UserWarning, match="Plain has no skip_predicted"):
        assert predict(tmp_path, plain=True) == 45
    assert_equal(load_predictions(tmp_path), load_predictions(undisturbed))
    assert sum(piece["items"] for piece in describe_predictions(tmp_path)["pieces"]) == 360


def test_pieces_of_another_part_or_other_data_are_not_mixed_in(tmp_path):
    predict(tmp_path, split="val")
    with pytest.raises(UserError, match="in a run of its own"):
        predict(tmp_path, split="test")
    with pytest.raises(UserError, match="in a run of its own"):
        predict(tmp_path, split="val", split_seed=7)
    assert describe_predictions(tmp_path)["split"] == "val"


@pytest.mark.slow
def test_two_processes_share_the_items_and_go_on_after_a_kill(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(whole, "--processes", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0: 23 batches" in done.stdout
    assert run(cut, "--processes", 2, "--kill-at", 17, "--kill-rank", 1).returncode != 0
    assert len(list(pieces(cut).glob("*.json"))) >= 3
    shutil.copytree(cut, tmp_path / "alone")
    done = run(cut, "--processes", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal(load_predictions(cut), load_predictions(whole))
    assert sum(piece["items"] for piece in describe_predictions(cut)["pieces"]) == 360
    predict(tmp_path / "alone")  # one process may finish what two began
    assert load_predictions(tmp_path / "alone")["index"].tolist() == list(range(360))


@pytest.mark.parametrize("size", [3, 8, 41, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_what_is_left_is_dealt_out_evenly_in_the_same_batches(size, world, batch_size):
    generator = torch.Generator().manual_seed(size)
    blocks = [block for rank in range(world) for block in eval_blocks(size, batch_size, rank, world)]
    for kept in {*range(0, len(blocks), 1 + len(blocks) // 6), len(blocks)}:
        chosen = torch.randperm(len(blocks), generator=generator)[:kept].tolist()
        left = sorted(chosen)
        parts = [blocks[number] for number in range(len(blocks)) if number not in left]
        done = torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])
        ranks = [remaining_blocks(size, batch_size, done, rank, world) for rank in range(world)]
        assert len({len(own) for own in ranks}) == 1
        seen, new = [SeenItems() for _ in ranks], []
        for items, own in zip(seen, ranks, strict=True):
            if len(done):
                items.add(done)
            new += [block.tolist() for block in own if items.add(block).all()]
        assert sorted(new) == sorted(blocks[number].tolist() for number in left)


# ---- memory ----

MEMORY = """
import resource, sys
import lightning.pytorch as pl, torch
from callbacks import PredictionWriter

class Module(pl.LightningModule):
    def predict_step(self, batch, batch_idx):
        return {"index": batch, "wide": torch.rand(len(batch), 200), "text": ["x" * 20] * len(batch)}

def predict(items):
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=f"{sys.argv[1]}/{items}", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[PredictionWriter(2000)])
    trainer.predict(Module(), torch.utils.data.DataLoader(torch.arange(items).split(500), batch_size=None))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

predict(1000)
print(predict(10_000), predict(100_000))
"""


def test_a_hundred_thousand_items_take_no_more_memory_than_ten_thousand(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    few, many = map(float, done.stdout.split())
    assert many - few < 20  # MiB, of 80 MB of outputs
    listed = describe_predictions(tmp_path / "100000")
    assert listed["items"] == 100_000
    assert {piece["items"] for piece in listed["pieces"]} == {2000}


def test_results_do_not_wait_for_a_full_piece_for_ever(tmp_path):
    writer = PredictionWriter(seconds=0)
    trainer(tmp_path, writer).predict(Module(), datamodule=ImageDataModule("digits", eval_batch_size=100))
    assert [piece["items"] for piece in describe_predictions(tmp_path)["pieces"]] == [100, 100, 100, 60]


# ---- wrong input ----


def trainer(folder, writer=None):
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[writer or PredictionWriter()],
    )  # fmt: skip


INDEX = torch.arange(4)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([torch.zeros(4)], "expected a mapping of names .* got a Tensor"),
        ([{"logits": torch.zeros(4)}], r"got the fields \['logits'\]"),
        ([{"index": torch.zeros(4)}], r"`index` \(N,\) int64"),
        ([{"index": INDEX - 2}], r"`index` \(N,\) int64"),
        ([{"index": INDEX, "x": torch.zeros(3, 4)}], r"x: expected a tensor or strings with 4 items, got \(3, 4\)"),
        ([{"index": INDEX, "x": torch.tensor(1.0)}], r"x: .* got \(\)"),
        ([{"index": INDEX, "x": "abcd"}], "x: .* got a str"),
        ([{"index": INDEX, "x": [1, 2, 3, 4]}], "x: .* got a list"),
        ([{"index": INDEX, "x": ["a"]}], "x: .* got a list"),
        ([{"index": INDEX, "x": torch.zeros(4, 2)}, {"index": INDEX + 4, "x": torch.zeros(4, 3)}], "pad them"),
        ([{"index": INDEX, "x": torch.zeros(4)}, {"index": INDEX + 4}], r"expected the fields \['index', 'x'\]"),
    ],
)
def test_outputs_that_cannot_be_written_are_one_line(tmp_path, outputs, message):
    class Wrong(pl.LightningModule):
        def predict_step(self, batch, batch_idx):
            return outputs[batch_idx]

    with pytest.raises(UserError, match=message) as caught:
        trainer(tmp_path).predict(Wrong(), DataLoader(range(len(outputs)), batch_size=None))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Wrong")


def test_too_few_items_are_told(tmp_path):
    class Local(Module):
        def predict_step(self, batch, batch_idx):
            return {"index": torch.arange(len(batch))}

    with pytest.warns(UserWarning, match="100 of 360 items were written"):
        trainer(tmp_path).predict(Local(), datamodule=ImageDataModule("digits", eval_batch_size=100))


def test_a_module_that_predicts_nothing_is_one_line(tmp_path):
    class Mute(Module):
        predict_step = pl.LightningModule.predict_step

        def forward(self, image):
            return image

    with pytest.raises(UserError, match="predict: Mute has nothing to predict of items"):
        trainer(tmp_path).predict(Mute(), datamodule=ImageDataModule("digits"))
    assert not pieces(tmp_path).exists()


@pytest.mark.parametrize("arguments", [{"piece_items": 0}, {"seconds": -1}])
def test_wrong_settings_are_named(arguments):
    with pytest.raises(UserError, match="piece_items"):
        PredictionWriter(**arguments)


def test_image_data_can_leave_items_out():
    assert isinstance(ImageDataModule("digits"), ResumablePrediction)
