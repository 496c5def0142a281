"""Published weights of vision transformers → files for TimmNet, against networks written down here once more."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leanlight.contracts import UserError
from lit_modules.nn import TimmNet

timm = pytest.importorskip("timm", reason="needs the extra vision")
safetensors = pytest.importorskip("safetensors.torch")
WIDTH, HEADS, BLOCKS, HIDDEN = 64, 2, 6, 192  # timm's test_vit
SCALED = {"init_values": 1e-5}


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[3] / "scripts" / "convert_vit_weights.py"
    spec = importlib.util.spec_from_file_location("convert_vit_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dinov2_state(side=2, registers=0):
    """A state dict with the names of transformers' Dinov2Model, at random."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    state = {
        "embeddings.cls_token": some(1, 1, WIDTH),
        "embeddings.mask_token": some(1, WIDTH),
        "embeddings.position_embeddings": some(1, side * side + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": some(WIDTH, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": some(WIDTH),
        "layernorm.weight": some(WIDTH),
        "layernorm.bias": some(WIDTH),
    }
    if registers:
        state["embeddings.register_tokens"] = some(1, registers, WIDTH)
    for number in range(BLOCKS):
        layer = f"encoder.layer.{number}."
        for name in ("norm1", "norm2"):
            state |= {f"{layer}{name}.weight": 1 + some(WIDTH), f"{layer}{name}.bias": some(WIDTH)}
        for name in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            state[layer + name] = some(WIDTH)
        for name, out, given in (
            *((f"attention.attention.{part}", WIDTH, WIDTH) for part in ("query", "key", "value")),
            ("attention.output.dense", WIDTH, WIDTH),
            ("mlp.fc1", HIDDEN, WIDTH),
            ("mlp.fc2", WIDTH, HIDDEN),
        ):
            state |= {f"{layer}{name}.weight": some(out, given), f"{layer}{name}.bias": some(out)}
    return state


def dinov2(state, image):
    """The network of `dinov2_state`, written from its description."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    projection = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(image, state[f"{projection}.weight"], state[f"{projection}.bias"], stride=16)
    tokens = torch.cat([state["embeddings.cls_token"].expand(len(image), 1, -1), patches.flatten(2).mT], 1)
    tokens = tokens + state["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in state:
        registers = state["embeddings.register_tokens"].expand(len(image), -1, -1)
        tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1)
    for number in range(BLOCKS):
        layer = f"encoder.layer.{number}"
        x = norm(f"{layer}.norm1", tokens)
        q, k, v = (
            linear(f"{layer}.attention.attention.{part}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        mixed = linear(f"{layer}.attention.output.dense", mixed.transpose(1, 2).flatten(2))
        tokens = tokens + state[f"{layer}.layer_scale1.lambda1"] * mixed
        x = linear(f"{layer}.mlp.fc2", F.gelu(linear(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", tokens))))
        tokens = tokens + state[f"{layer}.layer_scale2.lambda1"] * x
    return norm("layernorm", tokens)


def features(path, image, name="test_vit", **options):
    """Through TimmNet; timm's norm has the epsilon of DINOv2."""
    network = TimmNet(name, num_classes=None, mean=0.0, std=1.0, weights=path, options=options).eval()
    return network.forward_features(image)


@pytest.mark.parametrize("prefix", ["", "dinov2."])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_transformers(script, tmp_path, prefix, registers):
    state, image = dinov2_state(registers=registers), torch.rand(3, 3, 32, 32)
    written = {prefix + key: value for key, value in state.items()} | {"classifier.weight": torch.rand(3, 2 * WIDTH)}
    safetensors.save_file(written, tmp_path / "a.safetensors")
    options = SCALED | ({"reg_tokens": 4, "no_embed_class": True} if registers else {})
    out = tmp_path / "made" / "b.safetensors"
    assert script.convert(tmp_path / "a.safetensors", out, "test_vit", options) == "test_vit"
    with torch.no_grad():
        got = features(out, image, img_size=32, **options)
        torch.testing.assert_close(got, dinov2(state, image), rtol=1e-4, atol=1e-4)


def field(number, payload):
    """A field of protobuf: an integer, or bytes with their length."""

    def varint(value):
        return bytes([value]) if value < 128 else bytes([value % 128 | 128]) + varint(value // 128)

    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def tensor(name, value, raw=True):
    dims = b"".join(field(1, size) for size in value.shape)
    body = field(9, value.contiguous().numpy().tobytes()) if raw else b""
    return field(5, dims + field(2, 1) + field(8, name.encode()) + body)


def onnx_file(state, raw=True):
    """An ONNX model as torch exports one: linear weights transposed at MatMul nodes, positions without a name."""
    graph = b""
    for number, (key, value) in enumerate(state.items()):
        if value.dim() == 2 and key.endswith(".weight"):
            name = f"onnx::MatMul_{number}"
            graph += tensor(name, value.T, raw)
            node = f"/backbone/{key.removesuffix('.weight').replace('.', '/')}/MatMul"
            graph += field(1, field(1, b"x") + field(1, name.encode()) + field(3, node.encode()) + field(4, b"MatMul"))
        elif key == "embeddings.position_embeddings":
            graph += tensor("onnx::Reshape_1", value[:, 1:], raw) + tensor("onnx::Concat_2", value[:, :1], raw)
        elif key != "embeddings.mask_token":
            graph += tensor(f"backbone.{key}", value, raw)
    graph += tensor("decoder.weight", torch.rand(3), raw)
    graph += field(1, field(1, b"x") + field(1, b"y") + field(3, b"/attention/MatMul") + field(4, b"MatMul"))
    return field(1, 8) + field(7, graph)


def test_dinov2_in_an_onnx_file(script, tmp_path):
    state, image = dinov2_state(), torch.rand(3, 3, 32, 32)
    (tmp_path / "a.onnx").write_bytes(onnx_file(state))
    script.convert(tmp_path / "a.onnx", tmp_path / "b.safetensors", "test_vit", SCALED)
    with torch.no_grad():
        got = features(tmp_path / "b.safetensors", image, img_size=32, **SCALED)
        torch.testing.assert_close(got, dinov2(state, image), rtol=1e-4, atol=1e-4)


def test_files_of_timm_pass_unchanged_with_their_last_layer(script, tmp_path):
    state = timm.create_model("test_vit", num_classes=7, img_size=48).state_dict()
    torch.save(state, tmp_path / "a.pth")
    script.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "test_vit")
    got = safetensors.load_file(tmp_path / "b.safetensors")
    assert got.keys() == state.keys()
    assert all(torch.equal(value, got[key]) for key, value in state.items())


def test_the_name_is_told_from_the_sizes(script, tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32).state_dict()
    torch.save(state, tmp_path / "a.pth")
    assert script.convert(tmp_path / "a.pth", tmp_path / "b.safetensors") == "vit_tiny_patch16_224"
    for sizes, name in (((384, 14, "dinov2"), "vit_small_patch14_dinov2"), ((768, 32, "224"), "vit_base_patch32_224")):
        assert script.guess(*sizes) == name
        assert timm.is_model(name)


def npz_arrays(state):
    """The layout of Google's checkpoints: kernels are (in, out), heads apart, patches (H, W, in, out)."""
    heads, last = (HEADS, WIDTH // HEADS), f"Transformer/encoderblock_{BLOCKS - 1}/"
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for number in range(BLOCKS):
        theirs, ours = last.replace(str(BLOCKS - 1), str(number)), f"blocks.{number}."
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for norm, layer in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{layer}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}{layer}/bias"] = state[f"{ours}{norm}.bias"]
        weights, biases = state[f"{ours}attn.qkv.weight"].chunk(3), state[f"{ours}attn.qkv.bias"].chunk(3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(WIDTH, *heads)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(*heads, WIDTH)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for dense in (0, 1):
            arrays[f"{theirs}MlpBlock_3/Dense_{dense}/kernel"] = state[f"{ours}mlp.fc{dense + 1}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{dense}/bias"] = state[f"{ours}mlp.fc{dense + 1}.bias"]
    return {key: value.numpy() for key, value in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_a_checkpoint_of_augreg(script, tmp_path, prefix):
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=5, img_size=48).state_dict()
    state = {key: torch.randn_like(value) for key, value in state.items()}
    np.savez(tmp_path / "a.npz", **{prefix + key: value for key, value in npz_arrays(state).items()})
    script.convert(tmp_path / "a.npz", tmp_path / "b.safetensors", "test_vit")
    got = safetensors.load_file(tmp_path / "b.safetensors")
    assert got.keys() == state.keys()
    assert all(torch.equal(value, got[key]) for key, value in state.items())


def test_anything_else_is_one_line(script, tmp_path):
    def write(name, state):
        torch.save(state, tmp_path / name)

    state = timm.create_model("test_vit", num_classes=5).state_dict()
    write("vit.pth", state)
    write("short.pth", {key: value for key, value in state.items() if "blocks.5" not in key})
    write("other.pth", {"weight": torch.zeros(2)})
    write("object.pth", Path("x"))
    (tmp_path / "damaged.onnx").write_bytes(b"\x01\x02")
    (tmp_path / "outside.onnx").write_bytes(onnx_file(dinov2_state(), raw=False))
    (tmp_path / "other.onnx").write_bytes(field(7, tensor("fc.weight", torch.zeros(2, 2))))
    np.savez(tmp_path / "other.npz", weight=np.zeros(2))
    np.savez(tmp_path / "pickled.npz", weight=np.array([Path("x")], dtype=object))
    arrays = npz_arrays(state)
    np.savez(tmp_path / "short.npz", **{key: value for key, value in arrays.items() if "encoderblock_5" not in key})
    for source, name, words in (
        ("none.pth", None, "SOURCE: expected a file of weights"),
        ("vit.pth", None, "--name: width 64 is none of 192"),
        ("vit.pth", "test_vot", "--name: timm has no network 'test_vot'"),
        ("vit.pth", "vit_tiny_patch16_224", "SOURCE: .* does not fit vit_tiny_patch16_224: .*missing blocks.6"),
        ("short.pth", "test_vit", r"missing blocks.5.norm1.weight, missing .*, missing .* and 9 more$"),
        ("other.pth", None, "SOURCE: expected names of timm's .* got weight"),
        ("object.pth", None, "SOURCE: .* does not fit a vision transformer"),
        ("damaged.onnx", None, "SOURCE: .* does not fit a vision transformer"),
        ("outside.onnx", None, "lies elsewhere"),
        ("other.onnx", None, "SOURCE: expected names of transformers' Dinov2Model .* got fc.weight"),
        ("other.npz", None, "SOURCE: expected arrays of a ViT such as embedding/kernel .* got weight"),
        ("pickled.npz", None, "allow_pickle=False"),
        ("short.npz", "test_vit", "--name: test_vit has 6 blocks, .* has 5"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            script.convert(tmp_path / source, tmp_path / "b.safetensors", name)
        assert "\n" not in str(caught.value), source
    with pytest.raises(UserError, match=r"OUT: expected a name that ends in \.safetensors"):
        script.convert(tmp_path / "vit.pth", tmp_path / "b.pth", "test_vit")
    assert not (tmp_path / "b.safetensors").exists()
