"""Any network of the timm collection behind the suite's interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import (
    MissingExtraError,
    UserError,
    derived_seed,
    isolated_rng,
    nearest,
    run_seed,
    sha256_file,
)
from leanlight.contracts.ranges import PositiveInt
from lit_modules.frozen import load_weights
from lit_modules.nn.checks import device_of, first_line, require_positive
from lit_modules.nn.normalize import Normalize, PixelStatistic


class TimmNet(nn.Module):
    """A timm network by name: (N, in_channels, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        name: of the network in timm, e.g. ``resnet18``.
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output; None: those of the data, by a fresh last layer that the
            module makes with `follow_classes`. Until then outputs are what that layer sees.
        pretrained: load timm's weights, which downloads them.
        weights: file of weights of this network with timm's names, or of a `TimmNet`, as a run's export writes it;
            ``.safetensors`` or a state dict that ``torch.load(weights_only=True)`` reads, in the place of a download.
            As timm does it, a first layer for colour is brought to `in_channels`, position embeddings to the grid of
            patches, and a last layer for another number of classes starts anew. `mean` and `std` stay those given here.
        options: further arguments of ``timm.create_model``, e.g. ``img_size``.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
        input_size: side of the square, in pixels, to which images are resized first; None leaves them as they are.

    Raises:
        MissingExtraError: timm is not installed.
        UserError: timm has no network of that name; weights that cannot be had, or are those of another network.
    """

    def __init__(
        self,
        name: str,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt | None = 10,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
        weights: Path | None = None,
        input_size: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise MissingExtraError("timm", "vision") from error
        if not timm.is_model(name.partition(".")[0]):
            raise UserError(f"name: timm has no network {name!r}{nearest(name, timm.list_models())}")
        if pretrained and weights is not None:
            raise UserError("weights: expected none with pretrained, which loads timm's own")
        for size, value in (("num_classes", num_classes), ("input_size", input_size)):
            if value is not None:
                require_positive(**{size: value})
        self.open_head, self.input_size = num_classes is None, input_size
        self.normalize = Normalize(in_channels, mean, std)
        make = partial(timm.create_model, name, in_chans=in_channels, num_classes=num_classes or 0, **(options or {}))
        try:
            self.network: Any = make(pretrained=pretrained)
        except OSError as error:
            raise UserError(
                f"pretrained: no weights of {name} here, and none could be downloaded; fetch them and name the "
                f"file with weights ({first_line(error)})"
            ) from error
        #: The file of the weights and the digest of what it held; None where there is none.
        self.weights_file: Path | None = None
        self.weights_sha256: str | None = None
        if weights is not None:
            if not Path(weights).is_file():
                raise UserError(
                    f"weights: expected a file of weights, got {weights}; where that of a run has moved, add "
                    "--model.init_args.network.init_args.weights=FILE"
                )
            self.weights_file, self.weights_sha256 = Path(weights), sha256_file(weights)
            self.network = load_weights(partial(_with_weights, make, self.network), weights, name, "weights")

    def follow_classes(self, num_classes: int) -> None:
        """Where `num_classes` was left open, make the last layer, from the run's seed."""
        if self.open_head:
            # Not from the global stream: a resumed prediction and every process must find the same layer.
            with isolated_rng(derived_seed(run_seed(), "last layer")):
                self.network.reset_classifier(num_classes)
            self.network.to(device_of(self.normalize))
            self.open_head = False

    def forward(self, image: Tensor) -> Tensor:
        return self.network(self.prepare(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Images in [0, 1] → timm's features."""
        return self.network.forward_features(self.prepare(image))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's features → logits (N, num_classes), or with `pre_logits` the vectors (N, D) before the last layer."""
        return self.network.forward_head(features, pre_logits=pre_logits)

    def prepare(self, image: Tensor) -> Tensor:
        """Images in [0, 1] → what timm's network takes: resized and normalised."""
        if self.input_size is not None:
            image = F.interpolate(image, (self.input_size, self.input_size), mode="bilinear", antialias=True)
        return self.normalize(image)


def _with_weights(make: Callable[..., Any], fresh: Any, state: dict[str, Any]) -> Any:
    """Make a network with the weights in `state`, by timm's own way, which knows older names and other first layers.

    Args:
        make: `timm.create_model` with all that is said of the network.
        fresh: such a network, whose last layer is taken where that in `state` has another size.
        state: name → tensor.
    """
    own, facts = fresh.state_dict(), fresh.pretrained_cfg
    if "normalize.mean" in state:  # of a TimmNet, around the network
        state = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    heads = facts.get("classifier") or ()
    for name in (heads,) if isinstance(heads, str) else heads:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state and key not in own:  # a network without a last layer, as yet
                del state[key]
            elif key in state and state[key].shape != own[key].shape:
                state[key] = own[key]
    # timm drops the last layer and forgives missing names where it believes in another number of classes.
    overlay = {"state_dict": state, "num_classes": fresh.num_classes, "custom_load": False, "label_offset": 0}
    first = f"{facts.get('first_conv')}.weight"
    if first in own and first in state and state[first].shape == own[first].shape:
        overlay["input_size"] = (own[first].shape[1], *facts["input_size"][1:])  # else timm warns of its channels
    return make(pretrained=True, pretrained_cfg_overlay=overlay)
