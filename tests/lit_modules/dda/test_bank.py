"""Images that are being made, and the folder they end in, against what other programs read."""

import csv
import hashlib
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from leanlight.contracts import BANK_COLUMNS, UserError
from lit_modules.dda import ImagePool, teacher_digest, write_bank
from lit_modules.dda.bank import originals
from lit_modules.nn import ConvNet

SHAPE = (2, 4, 3)


def pictures(count, seed=0):
    return torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def filled(folder, count=7, capacity=10):
    pool = ImagePool(folder, capacity, SHAPE)
    pool.put(torch.arange(count), pictures(count), torch.arange(count) % 3)
    pool.grow(count)
    return pool


# ---- the pool


def test_images_come_back_from_the_positions_they_were_put_at(tmp_path):
    pool, images = ImagePool(tmp_path, 10, SHAPE), pictures(6)
    pool.put(torch.tensor([4, 5, 1]), images[[4, 5, 1]], torch.tensor([4, 5, 1]), torch.tensor([0, 1, 2]))
    assert len(pool) == 0
    with pytest.raises(RuntimeError, match="image 0 of 6 was never written"):
        pool.grow(6)
    pool.put(torch.tensor([0, 2, 3]), images[[0, 2, 3]], torch.tensor([0, 2, 3]))
    pool.grow(6)
    got, labels = pool.read(torch.tensor([5, 0, 3]))
    assert torch.equal(got, images[[5, 0, 3]])
    assert labels.tolist() == [5, 0, 3]
    assert pool.teacher_labels[:6].tolist() == [-1, 2, -1, -1, 0, 1]
    assert torch.equal(torch.cat(list(pool.chunks())), images)


def test_it_holds_no_more_than_there_is_room_for(tmp_path):
    with pytest.raises(RuntimeError, match="image 10 of 11"):
        filled(tmp_path, 10).grow(11)


def test_another_process_goes_on_where_a_killed_one_was_counted_last(tmp_path):
    """The killed one had written two images more, which did not count yet: they are made again."""
    state = filled(tmp_path / "pool").state_dict()
    program = f"""
        import os, signal, torch
        from pathlib import Path
        from lit_modules.dda import ImagePool
        pool = ImagePool(Path({str(tmp_path / "pool")!r}), 10, {SHAPE})
        pool.load_state_dict({state!r})
        pool.put(torch.tensor([7, 8]), torch.zeros(2, *{SHAPE}, dtype=torch.uint8), torch.tensor([9, 9]))
        pool.grow(9)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == -9
    pool = ImagePool(tmp_path / "pool", 10, SHAPE)
    pool.load_state_dict(state)
    assert len(pool) == 7
    assert torch.equal(pool.read(torch.arange(7))[0], pictures(7))
    assert pool.labels[7:9].tolist() == [9, 9]
    pool.put(torch.tensor([7, 8]), pictures(9)[7:], torch.tensor([1, 2]))
    pool.grow(9)
    assert torch.equal(torch.cat(list(pool.chunks())), torch.cat([pictures(7), pictures(9)[7:]]))


def test_two_that_map_the_same_files_see_what_the_other_writes(tmp_path):
    first = ImagePool(tmp_path, 4, SHAPE)
    second = ImagePool(tmp_path, 4, SHAPE)
    first.put(torch.tensor([0, 2]), pictures(4)[[0, 2]], torch.tensor([0, 2]))
    second.put(torch.tensor([1, 3]), pictures(4)[[1, 3]], torch.tensor([1, 3]))
    for pool in (first, second):
        pool.grow(4)
        assert torch.equal(torch.cat(list(pool.chunks())), pictures(4))


@pytest.mark.parametrize("change", [{"capacity": 11}, {"shape": [1, 4, 3]}, {"size": 8}])
def test_files_that_a_checkpoint_does_not_describe_are_one_line(tmp_path, change):
    pool = filled(tmp_path)
    with pytest.raises(UserError, match=r"the pool of this checkpoint .* is not there .*start the run anew"):
        pool.load_state_dict({**pool.state_dict(), **change})


def test_a_pool_that_is_gone_is_not_made_anew_by_a_reader(tmp_path):
    pool = filled(tmp_path / "pool")
    state = pool.state_dict()
    again = ImagePool.of_state(state)
    assert torch.equal(torch.cat(list(again.chunks())), pictures(7))
    with pytest.raises(ValueError, match="read-only"):
        again.images[0] = 0
    pool.delete()
    with pytest.raises(UserError, match="expected the pool of 10 images"):
        ImagePool.of_state(state)
    assert not (tmp_path / "pool").exists()


# ---- the bank


def test_a_bank_is_read_back_by_safetensors_and_csv(tmp_path):
    images, labels = pictures(2500), np.arange(2500) % 10
    rows = originals(labels, (labels + 1) % 10)
    paths = write_bank(tmp_path / "bank", images, rows, list("abcdefghij"), "1234", {"agreement": 0.5})
    assert [path.name for path in paths] == ["bank.safetensors", "manifest.csv", "bank.json"]
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == sorted(path.name for path in paths)
    assert torch.equal(load_file(paths[0])["images"], images)
    with open(paths[1], newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == BANK_COLUMNS
    assert table[2499] == dict(zip(BANK_COLUMNS, ("2499", "2499", "0", "-1", "1", "1", "9", "0"), strict=True))
    record = json.loads(paths[2].read_text())
    assert record["items"] == 2500
    assert record["shape"] == list(SHAPE)
    assert record["classes"] == list("abcdefghij")
    assert record["teacher"] == "1234"
    assert record["agreement"] == 0.5
    for path, name in zip(paths, ("images_sha256", "manifest_sha256"), strict=False):
        assert record[name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pieces_of_any_size_give_the_same_files(tmp_path):
    images, rows = pictures(11), originals(np.arange(11), np.arange(11))
    whole = write_bank(tmp_path / "whole", images, rows, "ab", None)
    parts = write_bank(tmp_path / "parts", iter(images.split(4)), rows, "ab", None)
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in parts]


def test_scores_come_back_as_the_float32_they_were(tmp_path):
    scores = torch.rand(50, generator=torch.Generator().manual_seed(1))
    rows = {**originals(np.zeros(50), np.zeros(50)), "score": scores}
    _, manifest, _ = write_bank(tmp_path, pictures(50), rows, "a", None)
    with open(manifest, newline="") as file:
        got = torch.tensor([float(row["score"]) for row in csv.DictReader(file)])
    assert torch.equal(got, scores)


def test_a_bank_that_could_not_be_written_whole_has_no_record(tmp_path):
    rows = originals(np.arange(5), np.arange(5))
    write_bank(tmp_path, pictures(5), rows, "a", None)
    with pytest.raises(ValueError, match="expected 5 images"):
        write_bank(tmp_path, pictures(4), rows, "a", None)
    assert not (tmp_path / "bank.json").exists()
    with pytest.raises(ValueError, match="expected columns"):
        write_bank(tmp_path, pictures(4), {"item": np.arange(4)}, "a", None)


def test_a_digest_knows_a_teacher_by_its_state_alone():
    torch.manual_seed(0)
    network = ConvNet(in_channels=1, width=4, depth=1, norm="batch", image_size=4)
    before = teacher_digest(network)
    assert teacher_digest(network.to(memory_format=torch.channels_last).eval()) == before
    with torch.no_grad():
        network.features[0][1].running_mean[2] += 1e-6
    assert teacher_digest(network) != before
