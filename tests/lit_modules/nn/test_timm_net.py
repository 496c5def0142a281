"""Weights of timm's networks from files."""

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.nn import TimmNet

timm = pytest.importorskip("timm", reason="needs the extra vision")
safetensors = pytest.importorskip("safetensors.torch")


def written(path, **options):
    network = timm.create_model("resnet10t", **options)
    state = network.state_dict()
    if path.suffix == ".safetensors":
        safetensors.save_file(state, path)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_gives_every_weight(tmp_path, name, channels, caplog):
    state = written(tmp_path / name, num_classes=7, in_chans=channels)
    got = TimmNet("resnet10t", channels, num_classes=7, weights=tmp_path / name).network.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(value, got[key]) for key, value in state.items())
    assert not caplog.records


def test_the_last_layer_of_other_classes_starts_anew_and_all_else_is_taken(tmp_path):
    state = written(tmp_path / "a.pt", num_classes=1000)
    got = TimmNet("resnet10t", num_classes=7, weights=tmp_path / "a.pt").network.state_dict()
    assert got["fc.weight"].shape == (7, 512)
    assert got["fc.weight"].std() > 0
    assert all(torch.equal(value, got[key]) for key, value in state.items() if not key.startswith("fc."))


def test_open_classes_take_all_but_the_last_layer(tmp_path):
    state = written(tmp_path / "a.pt", num_classes=1000)
    got = TimmNet("resnet10t", num_classes=None, weights=tmp_path / "a.pt").network.state_dict()
    assert got.keys() == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(value, state[key]) for key, value in got.items())


def test_a_first_layer_for_colour_sees_a_grey_image_as_it_saw_the_same_in_colour(tmp_path):
    written(tmp_path / "a.pt", num_classes=7)
    colour = TimmNet("resnet10t", 3, 7, weights=tmp_path / "a.pt").eval()
    grey = TimmNet("resnet10t", 1, 7, weights=tmp_path / "a.pt").eval()
    image = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_an_exported_network_becomes_the_backbone_of_the_next(tmp_path, name):
    from lit_modules.classifier.export import export_network

    torch.manual_seed(0)
    first = TimmNet("test_vit", num_classes=7, options={"img_size": 32}).eval()
    export_network(first, torch.rand(2, 3, 32, 32), tmp_path)
    weights = tmp_path / "weights.safetensors"
    if name == "a.pt":
        torch.save(first.state_dict(), weights := tmp_path / name)
    same = TimmNet("test_vit", num_classes=7, options={"img_size": 32}, weights=weights).eval()
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(same(image), first(image))
    backbone = TimmNet("test_vit", num_classes=None, options={"img_size": 32}, weights=weights).eval()
    assert torch.equal(backbone.forward_features(image), first.forward_features(image))


def test_position_embeddings_follow_the_grid_as_timm_resamples_them(tmp_path, caplog):
    from timm.layers import resample_abs_pos_embed

    state = timm.create_model("test_vit", num_classes=7, img_size=64).state_dict()
    safetensors.save_file(state, tmp_path / "timm.safetensors")
    safetensors.save_file({f"network.{k}": v for k, v in state.items()} | {"normalize.mean": torch.zeros(3, 1, 1)},
                          tmp_path / "ours.safetensors")  # fmt: skip
    for options, grid in (({"img_size": 96}, 6), ({"img_size": 32}, 2), ({"img_size": 96, "patch_size": 8}, 12)):
        for file in ("timm.safetensors", "ours.safetensors"):
            got = TimmNet("test_vit", num_classes=None, options=options, weights=tmp_path / file).network.state_dict()
            wanted = resample_abs_pos_embed(state["pos_embed"], [grid, grid], num_prefix_tokens=1)
            assert torch.equal(got["pos_embed"], wanted)
            assert got["pos_embed"].shape[1] == grid**2 + 1
            assert torch.equal(got["blocks.3.attn.qkv.weight"], state["blocks.3.attn.qkv.weight"])
    got = TimmNet("test_vit", num_classes=None, options={"img_size": 64}, weights=tmp_path / "timm.safetensors")
    assert torch.equal(got.network.pos_embed, state["pos_embed"])


def test_noise_comes_before_resizing_and_normalisation():
    seen = []
    network = TimmNet("test_vit", num_classes=None, mean=0.5, std=0.25, input_size=32, options={"img_size": 32}).eval()
    network.normalize.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    image = torch.zeros(1, 3, 8, 8)
    image[..., 3, 4] = 1.0  # one noisy pixel of the image as it was
    network(image)
    ((before, after),) = seen
    assert before.shape == (1, 3, 32, 32)
    assert (before[0, 0] > 0.1).sum() > 4  # of the resized image: no longer one
    assert torch.equal(after, (before - 0.5) / 0.25)


def no_network(*arguments, **options):
    raise OSError("no way to the hub")


def test_a_file_that_does_not_fit_is_one_line(tmp_path, monkeypatch):
    written(tmp_path / "a.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"x")
    for name, network, words in (
        ("none.pt", "resnet10t", "expected a file of weights"),
        ("damaged.safetensors", "resnet10t", "does not fit resnet10t"),
        ("a.pt", "test_vit", r"does not fit test_vit: missing cls_token, unexpected conv1.0.weight, .* more$"),
        ("a.pt", "resnet18", "does not fit resnet18: missing conv1.weight, unexpected conv1.0.weight, .* more$"),
    ):
        with pytest.raises(UserError, match=rf"^weights: .*{words}") as caught:
            TimmNet(network, weights=tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="weights: expected none with pretrained"):
        TimmNet("resnet10t", pretrained=True, weights=tmp_path / "a.pt")
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match=r"^pretrained: no weights of resnet10t here"):
        TimmNet("resnet10t", pretrained=True)


def test_open_classes_follow_the_data_with_weights_of_the_seed_and_once(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    first, second = TimmNet("resnet10t", num_classes=None).eval(), TimmNet("resnet10t", num_classes=None).eval()
    image = torch.rand(2, 3, 32, 32)
    before = first.forward_head(first.forward_features(image), pre_logits=True)
    torch.rand(7)  # what was drawn in between does not matter
    state = torch.get_rng_state()
    for network in (first, second):
        network.follow_classes(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.network.fc.weight, second.network.fc.weight)
    assert first(image).shape == (2, 5)
    assert torch.equal(first.forward_head(first.forward_features(image), pre_logits=True), before)
    first.follow_classes(6)
    assert first(image).shape == (2, 5)
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    other = TimmNet("resnet10t", num_classes=None)
    other.follow_classes(5)
    assert not torch.equal(first.network.fc.weight, other.network.fc.weight)


def test_given_classes_are_kept():
    network = TimmNet("resnet10t", num_classes=4)
    network.follow_classes(9)
    assert network.network.fc.out_features == 4


def test_images_are_resized_first_where_asked():
    torch.manual_seed(0)
    network = TimmNet("resnet10t", num_classes=4, input_size=64).eval()
    image = torch.rand(2, 3, 32, 32)
    wide = torch.nn.functional.interpolate(image, (64, 64), mode="bilinear", antialias=True)
    assert torch.equal(network(image), network.network(network.normalize(wide)))


def test_a_checkpoint_of_a_classifier_with_open_classes_is_rebuilt(tmp_path):
    from leanlight import build, load

    overrides = {
        "model.init_args.network": {
            "class_path": "lit_modules.nn.TimmNet",
            "init_args": {"name": "resnet10t", "in_channels": 1, "num_classes": None, "input_size": 32},
        },
        "trainer.max_steps": 1,
        "trainer.default_root_dir": str(tmp_path),
        "trainer.enable_progress_bar": False,
    }
    run = build("classifier/digits_small", overrides)
    run.trainer.fit(run.model, run.data)
    again = load(run.trainer.default_root_dir)
    assert torch.equal(again.network.network.fc.weight, run.model.network.network.fc.weight.cpu())
