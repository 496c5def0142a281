"""Convert a published CIFAR ResNet to a file that `lit_modules.nn.CifarResNet` takes as weights, such as a teacher's.

SOURCE is a state dict, alone or as ``state_dict`` of a checkpoint, with the names of Y. Idelbayev's
pytorch_resnet_cifar10 (conv1, bn1, layer1.0.conv1, …, linear, each also below ``module.``), whose shortcuts have no
weights (option A): resnet20-12fca82f.th, resnet56-4bfd9763.th and their like, 91.7 and 93.4 % on CIFAR-10. Nothing is
unpickled but tensors. OUT ends in .safetensors; the mean and standard deviation of ImageNet, by which these networks
were trained, go along, so that the network takes images in [0, 1].

    python scripts/convert_cifar_resnet.py SOURCE OUT
    leanlight fit --config dda/cifar10 --model.init_args.teacher.weights=OUT
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from leanlight.contracts import UserError, atomic_path
from lit_modules.frozen import load_weights
from lit_modules.nn import CifarResNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convert(source: Path, out: Path) -> CifarResNet:
    """Write the weights in `source` to `out`, and return their network.

    Args:
        source: see above.
        out: file to write, ``.safetensors``.

    Raises:
        UserError: a source that cannot be read or is no such network.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"OUT: expected a name that ends in .safetensors, got {out}")
    network = load_weights(from_state, source, "a CIFAR ResNet", "SOURCE")
    with atomic_path(out) as part:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, part)
    return network


def from_state(content: dict) -> CifarResNet:
    """The network that a state dict belongs to, with its weights."""
    state: dict[str, Tensor] = {
        name.removeprefix("module."): value for name, value in content.get("state_dict", content).items()
    }
    blocks = [
        len([name for name in state if re.fullmatch(rf"layer{stage}\.\d+\.conv1\.weight", name)]) for stage in (1, 2, 3)
    ]
    if not {"conv1.weight", "linear.weight"} <= state.keys() or len(set(blocks)) > 1 or not blocks[0]:
        some = ", ".join([*state][:3])
        raise UserError(f"SOURCE: expected conv1, as many blocks in layer1, layer2 and layer3, and linear; got {some}")
    if weighted := [name for name in state if re.search("shortcut|downsample", name)]:
        raise UserError(f"SOURCE: expected shortcuts without weights (option A), got {weighted[0]}")
    (width, channels), classes = state["conv1.weight"].shape[:2], state["linear.weight"].shape[0]
    network = CifarResNet(channels, classes, 6 * blocks[0] + 2, width, mean=MEAN, std=STD)
    statistics = {name: value for name, value in network.state_dict().items() if name.startswith("normalize.")}
    network.load_state_dict({renamed(name, blocks[0]): value for name, value in state.items()} | statistics)
    return network


def renamed(name: str, blocks: int) -> str:
    """Our name of one of theirs; blocks: of a stage."""
    if stem := re.fullmatch(r"(conv1|bn1)\.(.*)", name):
        return f"features.{('conv1', 'bn1').index(stem[1])}.{stem[2]}"
    if inside := re.fullmatch(r"layer([123])\.(\d+)\.(.*)", name):
        first = 3 + (int(inside[1]) - 1) * blocks  # after convolution, norm and ReLU
        return f"features.{first + int(inside[2])}.{inside[3]}"
    return name.replace("linear.", "head.")


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    arguments = parser.parse_args()
    network = convert(arguments.source, arguments.out)
    depth = sum(name.endswith(("conv1.weight", "conv2.weight")) for name in network.state_dict()) + 2
    print(f"{arguments.out}: weights of CifarResNet(depth={depth}, num_classes={network.head.out_features})")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
