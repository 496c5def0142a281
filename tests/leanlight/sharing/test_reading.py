"""`leanlight.load` gives what files hold, and runs nothing of what it was not asked to."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import leanlight
from leanlight.contracts import UserError
from lit_modules.export import write_program, write_weights
from lit_modules.nn import ConvNet


@pytest.fixture
def export(tmp_path):
    """Folder and network of an export."""
    network = torch.nn.Linear(3, 2).eval()
    write_program(network, torch.zeros(2, 3), tmp_path / "network.pt2")
    write_weights(network, tmp_path / "weights.safetensors")
    return tmp_path, network


def test_an_export_is_its_tensors_by_name(export):
    folder, network = export
    loaded = leanlight.load(folder)
    assert loaded.keys() == {"weight", "bias"}
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_files_of_one_name_keep_apart(tmp_path):
    for replica in range(2):
        (tmp_path / f"replica_{replica}").mkdir()
        save_file(
            {"images": torch.full((2,), float(replica))}, tmp_path / f"replica_{replica}" / "distilled.safetensors"
        )
    loaded = leanlight.load(str(tmp_path))
    assert loaded.keys() == {"replica_0/distilled/images", "replica_1/distilled/images"}
    assert loaded["replica_1/distilled/images"].tolist() == [1.0, 1.0]


def test_the_network_comes_when_it_is_asked_for(export):
    folder, network = export
    x = torch.randn(5, 3)
    loaded = leanlight.load(folder, program=True)
    assert isinstance(loaded, torch.nn.Module)
    torch.testing.assert_close(loaded(x), network(x))


def test_a_program_is_not_even_opened_unless_it_is_asked_for(export):
    folder, _ = export
    (folder / "network.pt2").write_bytes(b"whatever")
    assert leanlight.load(folder).keys() == {"weight", "bias"}
    with pytest.raises(UserError, match=r"network\.pt2 is not a readable program"):
        leanlight.load(folder, program=True)


def test_what_holds_nothing_is_one_line(export):
    folder, _ = export
    (folder / "weights.safetensors").write_bytes(b"whatever")
    with pytest.raises(UserError, match=r"weights\.safetensors is not a readable file of tensors"):
        leanlight.load(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="program=True reads its network"):
        leanlight.load(folder)
    (folder / "network.pt2").unlink()
    for options in ({}, {"program": True}):
        with pytest.raises(UserError, match="source: "):
            leanlight.load(folder, **options)
    with pytest.raises(UserError, match="no checkpoint at"):
        leanlight.load(folder / "nowhere")


def test_the_paths_of_this_machine_do_not_leave_it(tmp_path):
    network = ConvNet(1, 10, width=2, depth=1, image_size=8).eval()
    write_program(network, torch.zeros(2, 1, 8, 8), tmp_path / "network.pt2")
    with zipfile.ZipFile(tmp_path / "network.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    for folder in (Path(__file__).parents[3], Path(torch.__file__).parent):
        assert not [content for content in contents if str(folder).encode() in content]
