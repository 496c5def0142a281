"""Inversion of a classifier: images for given classes that its batch norms take for its training data, in pure PyTorch.

Sources: DeepInversion (Yin et al. 2020), CMI (Fang et al. 2021), CSD (Luo et al. 2023), whose synthesis is DDA's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError, derived_seed, to_device
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from leanlight.ops.differentiable import DIFFERENTIABLE, find_augmentation, flip_then_resized_crop
from lit_modules.dda.contrastive import Contrastive, ContrastiveMemory
from lit_modules.dda.generators import Generator, check_sides
from lit_modules.dda.students import rotation_labels, rotations
from lit_modules.frozen import Frozen
from lit_modules.nn import pooled_features
from lit_modules.nn.batch_statistics import batch_norms, bn_distances, look
from lit_modules.nn.checks import device_of, require_positive

Disagreement = Literal["kl", "kl_agreed", "js"]

# ---- terms beside those of batch norms


def disagreement(kind: Disagreement, teacher: Tensor, student: Tensor) -> Tensor:
    """How much a student's answers differ from its teacher's; a synthesis that is adversarial maximises it.

    Args:
        kind: ``kl``: KL(teacher ‖ student). ``kl_agreed``: that of the items which both give the same class, 0 for the
            others (CMI). ``js``: the Jensen-Shannon divergence at temperature 3 (ADI).
        teacher: (N, K) logits.
        student: (N, K) logits.

    Returns:
        the mean over the items, a scalar.
    """
    if kind == "js":
        p, q = (teacher / 3).log_softmax(1), (student / 3).log_softmax(1)
        middle = torch.logaddexp(p, q) - math.log(2)
        both = [F.kl_div(middle, each, reduction="batchmean", log_target=True) for each in (p, q)]
        return (both[0] + both[1]) / 2
    divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
    if kind == "kl_agreed":
        divergence = divergence * (teacher.argmax(1) == student.argmax(1))
    return divergence.mean()


def total_variation(image: Tensor) -> Tensor:
    """L2 norms of the differences between neighbours in four directions, over a whole batch (N, C, H, W)."""
    centre, right, below = image[..., :-1, :-1], image[..., :-1, 1:], image[..., 1:, :-1]
    pairs = (
        (image[..., :-1], image[..., 1:]),
        (image[..., :-1, :], image[..., 1:, :]),
        (below, right),
        (centre, image[..., 1:, 1:]),
    )
    return torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs]).sum()


@dataclass(frozen=True)
class Adversary:
    """Whom images shall be hard for.

    Args:
        student: images (N, C, H, W) in [0, 1] → logits (N, K).
        head: of the rotation task: features (N, D) of the student → (N, 4K); None without that task.
    """

    student: nn.Module
    head: nn.Module | None = None

    def rotation_loss(self, image: Tensor, label: Tensor) -> Tensor:
        """Cross entropy of the head's answers to images (N, C, S, S) of classes (N,), each in four rotations."""
        assert self.head is not None
        features = pooled_features(self.student, rotations(image))
        return F.cross_entropy(self.head(features), rotation_labels(label))

    @contextmanager
    def held(self) -> Iterator[Adversary]:
        """In evaluation mode and without gradients of its own, as long as the context lasts."""
        parts = [part for part in (self.student, self.head) if part is not None]
        modes = {module: module.training for part in parts for module in part.modules()}
        learning = [p for part in parts for p in part.parameters() if p.requires_grad]
        try:
            for part in parts:
                part.eval()
            for parameter in learning:
                parameter.requires_grad_(False)
            yield self
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter in learning:
                parameter.requires_grad_(True)


# ---- the descent


@dataclass(frozen=True)
class Synthesized:
    """What one call made.

    Args:
        images: (N, C, H, W) in [0, 1], those of the step with the smallest loss, without augmentation.
        first: before the first step, ``loss`` and each of its terms without its factor; scalars.
        best: the same of the step that `images` are from.
        bn_layers: (L,) distance of each batch norm's statistics there; empty without batch norm.
    """

    images: Tensor
    first: dict[str, Tensor]
    best: dict[str, Tensor]
    bn_layers: Tensor


class _Best:
    """Copies of what belongs to the smallest loss so far; finding it reads nothing from a device."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def offer(self, values: Mapping[str, Tensor]) -> None:
        """Values of a step, ``loss`` among them."""
        now = {name: value.detach() for name, value in values.items()}
        if not self.kept:
            # The next step may change in place what is offered: it is copied, here and by `where`.
            self.kept = {name: value.clone() for name, value in now.items()}
            return
        better = (now["loss"] < self.kept["loss"]) | self.kept["loss"].isnan()
        self.kept = {name: torch.where(better, now[name], kept) for name, kept in self.kept.items()}


class Variables(NamedTuple):
    """What a descent moves, and the images (N, C, H, W) in [0, 1] that follow from it."""

    parameters: list[Tensor]
    images: Callable[[], Tensor]


class Inversion:
    """Base of what makes images from a teacher: gradient descent on a loss of the teacher's answers to them.

    A call is a function of teacher, latents, labels, seed and adversary, and with a contrastive term of its memory. It
    leaves the others as they were, but for the memory format of the teacher, and the random states of the process, too.
    """

    steps: int
    lr: float
    betas: tuple[float, float]
    class_weight: float
    bn_weight: float
    adversarial_weight: float
    adversarial: Disagreement
    channels_last: bool
    rotation_weight: float = 0.0
    contrastive: Contrastive | None = None

    def __post_init__(self) -> None:
        require_positive(steps=self.steps)
        if self.adversarial not in get_args(Disagreement):
            raise UserError(f"adversarial: expected one of {', '.join(get_args(Disagreement))}, got {self.adversarial}")
        for name in ("class_weight", "bn_weight", "adversarial_weight", "rotation_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        if self.class_weight == self.bn_weight == 0:
            raise UserError("class_weight: expected a positive number where bn_weight is 0, got 0")

    def factors(self) -> dict[str, float]:
        """Term → its factor in the loss; below 0 where the term is maximised."""
        return {
            "class_prior": self.class_weight,
            "batch_norm": self.bn_weight,
            "adversarial": -self.adversarial_weight,
            "rotation": -self.rotation_weight,
            "contrastive": self.contrastive.weight if self.contrastive is not None else 0.0,
        }

    def check(self, network: nn.Module, shape: Sequence[int], student: bool = False) -> None:
        """Raise UserError where these settings do not fit a teacher or its images.

        Args:
            network: the teacher's.
            shape: (C, H, W) of an image.
            student: whether there is one.
        """
        needs = "contrastive" if self.contrastive is not None else "bn_weight" if self.bn_weight > 0 else ""
        if needs and not batch_norms(network):
            raise UserError(
                f"{needs}: the teacher, a {type(network).__name__}, has no batch norm whose statistics could be met; "
                "what works is bn_weight 0 without contrastive: class_weight, adversarial_weight, rotation_weight"
            )
        for name in ("adversarial_weight", "rotation_weight"):
            if getattr(self, name) > 0 and not student:
                raise UserError(f"{name}: expected 0 where there is no student yet, got {getattr(self, name)}")

    def memory(self, teacher: Frozen[nn.Module], shape: Sequence[int], seed: int) -> ContrastiveMemory | None:
        """What the contrastive term learns and remembers over calls; None without that term.

        Args:
            teacher: on the device where calls will be.
            shape: (C, H, W) of an image.
            seed: of the first weights.
        """
        if self.contrastive is None:
            return None
        channels = [layer.num_features for layer in batch_norms(teacher.network)]
        return ContrastiveMemory(self.contrastive, channels, self.lr, seed, device_of(teacher.network))

    def __call__(
        self,
        teacher: Frozen[nn.Module],
        latent: Tensor,
        labels: Tensor,
        shape: Sequence[int],
        seed: int,
        student: Adversary | None = None,
        memory: ContrastiveMemory | None = None,
    ) -> Synthesized:
        """Make images of given classes.

        Args:
            teacher: images (N, C, H, W) in [0, 1] → logits (N, K), on the device of `latent`.
            latent: (N, Z) standard normal, where the descent begins.
            labels: (N,) int64 classes.
            shape: (C, H, W) of an image.
            seed: of everything that is drawn.
            student: for the terms that ask one.
            memory: of earlier calls, for the contrastive term; None: this call is the first.

        Raises:
            UserError: see `check`.
        """
        self.check(teacher.network, shape, student is not None)
        if self.channels_last:
            teacher.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        start, draws = (torch.Generator().manual_seed(derived_seed(seed, part)) for part in ("start", "draws"))
        variables = self._begin(latent, shape, start)
        if memory is None:
            memory = self.memory(teacher, shape, derived_seed(seed, "memory"))
        optimizers = [torch.optim.Adam(variables.parameters, lr=self.lr, betas=self.betas)]
        optimizers += [memory.optimizer] if memory is not None else []
        best = _Best()
        first: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(student.held() if student is not None else nullcontext())
            ask = functools.partial(self._evaluate, teacher.network, labels, draws, student, memory)
            for _ in range(self.steps):
                terms, facts = ask(variables.images())
                first = first or {name: term.detach() for name, term in terms.items()}
                best.offer(terms | facts)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                terms["loss"].backward()
                for optimizer in optimizers:
                    optimizer.step()
                self._settle(variables)
        if memory is not None:
            memory.remember(*best.kept["features"].chunk(2, 1))
        reached = {name: best.kept[name] for name in first}
        return Synthesized(best.kept["images"], first, reached, best.kept["bn_layers"])

    def _evaluate(
        self,
        network: nn.Module,
        labels: Tensor,
        draws: torch.Generator,
        student: Adversary | None,
        memory: ContrastiveMemory | None,
        images: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss with its terms, and what else is to be known of the best step."""
        view = self._view(images, draws)
        logits, seen = look(network, view)
        facts = {"images": images, "bn_layers": bn_distances(seen) if seen else logits.new_zeros(0)}
        terms = {"class_prior": F.cross_entropy(logits, labels), **self._priors(images)}
        if seen:
            terms["batch_norm"] = facts["bn_layers"].sum()
        if student is not None and self.adversarial_weight > 0:
            terms["adversarial"] = disagreement(self.adversarial, logits, student.student(view))
        if student is not None and self.rotation_weight > 0:
            terms["rotation"] = student.rotation_loss(view, labels)
        if memory is not None:
            whole = memory.features([now.items for now in seen.values()])
            _, seen = look(network, flip_then_resized_crop(images, draws))
            local = memory.features([now.items for now in seen.values()])
            terms["contrastive"] = memory.loss(local, whole, draws)
            facts["features"] = torch.cat([local, whole], 1)
        factors = self.factors()
        used = [factors[name] * term for name, term in terms.items() if factors[name]]
        return {"loss": torch.stack(used).sum(), **terms}, facts

    # ---- what differs

    def _begin(self, latent: Tensor, shape: Sequence[int], draws: torch.Generator) -> Variables:
        """Where a descent begins."""
        raise NotImplementedError

    def _view(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Images as the teacher is shown them in a step."""
        raise NotImplementedError

    def _priors(self, images: Tensor) -> dict[str, Tensor]:
        """Terms of the images alone, with their factors in `factors`."""
        return {}

    def _settle(self, variables: Variables) -> None:
        """Bring the variables back to where they may be, after a step."""


@dataclass(frozen=True)
class GeneratorInversion(Inversion):
    """Inversion through a generator that is new in each call and descends together with its latents (CMI, CSD, DDA).

    Args:
        steps: of a call; 500 for the first bank and 200 for later batches in DDA.
        lr: learning rate of Adam for generator, latents and the contrastive term's projection.
        betas: of Adam for generator and latents.
        class_weight: of cross entropy to the classes asked for (``oh``), 1.
        bn_weight: of the distances to the statistics of the teacher's batch norms (``bn``), 1.
        adversarial_weight: of the student's disagreement, which is maximised (``adv``); 0.5 in CMI.
        adversarial: which disagreement: ``kl``, ``kl_agreed`` (CMI) or ``js`` (ADI).
        rotation_weight: of the rotation head's loss, which is maximised (``dda``); 10 in DDA after the first bank.
        contrastive: CMI's term (``cr``); none by default.
        width: channels of the generator, see `Generator`.
        base: of the generator, see `Generator`.
        augment: what is done to images before the teacher sees them, a differentiable augmentation; null: nothing.
        channels_last: keep generator and teacher in that memory format: faster, equal up to rounding.
    """

    steps: PositiveInt = 500
    lr: PositiveFloat = 1e-3
    betas: tuple[Share, Share] = (0.5, 0.999)
    class_weight: NonNegativeFloat = 1.0
    bn_weight: NonNegativeFloat = 1.0
    adversarial_weight: NonNegativeFloat = 0.0
    adversarial: Disagreement = "kl"
    rotation_weight: NonNegativeFloat = 0.0
    contrastive: Contrastive | None = None
    width: PositiveInt = 64
    base: PositiveInt = 2
    augment: str | None = "flip_then_shift"
    channels_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(width=self.width, base=self.base)
        find_augmentation(self.augment, "augment", DIFFERENTIABLE)

    def check(self, network: nn.Module, shape: Sequence[int], student: bool = False) -> None:
        super().check(network, shape, student)
        check_sides(shape)

    def _begin(self, latent: Tensor, shape: Sequence[int], draws: torch.Generator) -> Variables:
        settings = {"width": self.width, "base": self.base, "channels_last": self.channels_last}
        generator = Generator.fresh(shape, draws, latent.device, latent_size=latent.shape[1], **settings)
        latent = latent.detach().clone().requires_grad_()
        return Variables([*generator.parameters(), latent], lambda: generator(latent))

    def _view(self, images: Tensor, draws: torch.Generator) -> Tensor:
        return images if self.augment is None else DIFFERENTIABLE[self.augment](images, draws)


@dataclass(frozen=True)
class PixelInversion(Inversion):
    """Inversion of pixels: DeepInversion, and with `adversarial_weight` its adaptive form, ADI (Yin et al. 2020).

    Pixels begin as noise; each step shifts and mirrors all images alike. Latents say how many images to make.

    Args:
        steps: of a call; 1,000 in the benchmarks.
        lr: learning rate of Adam, for standardised pixels.
        betas: of Adam.
        class_weight: of cross entropy to the classes asked for, 1.
        bn_weight: of the distances to the statistics of the teacher's batch norms, 10.
        tv_weight: of total variation, for standardised pixels.
        adversarial_weight: of the student's disagreement, which is maximised; 1 in ADI.
        adversarial: which disagreement: ``js`` (ADI), ``kl`` or ``kl_agreed`` (CMI).
        pixel_std: standard deviation of pixels in [0, 1] by which they are standardised around 0.5, positive.
        channels_last: keep pixels and teacher in that memory format: faster, equal up to rounding.
    """

    steps: PositiveInt = 1_000
    lr: PositiveFloat = 0.1
    betas: tuple[Share, Share] = (0.5, 0.99)
    class_weight: NonNegativeFloat = 1.0
    bn_weight: NonNegativeFloat = 10.0
    tv_weight: NonNegativeFloat = 1e-3
    adversarial_weight: NonNegativeFloat = 0.0
    adversarial: Disagreement = "js"
    pixel_std: PositiveFloat = 0.25
    channels_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_std <= 0:
            raise UserError(f"pixel_std: expected a positive number, got {self.pixel_std}")
        if self.tv_weight < 0:
            raise UserError(f"tv_weight: expected a number from 0, got {self.tv_weight}")

    def factors(self) -> dict[str, float]:
        return {**super().factors(), "total_variation": self.tv_weight}

    def _begin(self, latent: Tensor, shape: Sequence[int], draws: torch.Generator) -> Variables:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        pixels = to_device(torch.randn(len(latent), *shape, generator=draws), latent.device)
        pixels = pixels.contiguous(memory_format=memory_format).requires_grad_()
        self._settle(variables := Variables([pixels], lambda: 0.5 + self.pixel_std * pixels))
        return variables

    def _view(self, images: Tensor, draws: torch.Generator) -> Tensor:
        reach = [side // 8 for side in images.shape[2:]]
        shifts = [int(torch.randint(-far, far + 1, (), generator=draws)) for far in reach]
        images = images.roll(shifts, (2, 3))
        return images.flip(-1) if torch.rand((), generator=draws) < 0.5 else images

    def _priors(self, images: Tensor) -> dict[str, Tensor]:
        return {"total_variation": total_variation(images / self.pixel_std)}

    @torch.no_grad()
    def _settle(self, variables: Variables) -> None:
        (pixels,) = variables.parameters
        pixels.clamp_(-0.5 / self.pixel_std, 0.5 / self.pixel_std)
