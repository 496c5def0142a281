"""From clips to emotions: any network, and what TiCAL says of each modality beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanlight.contracts import EmotionMeta, Modality, UserError, isolated_rng
from leanlight.contracts.ranges import Seed
from lit_modules.nn.checks import device_of, first_line
from lit_modules.tical.anchors import AnchorLists
from lit_modules.tical.assessment import Assessment, ConsistencyAssessment
from lit_modules.tical.encoders import Answer
from lit_modules.tical.hyperbolic import without_autocast
from lit_modules.tical.stages import StagedAnswer, mix

_GAIN = 0.1  # of projections at first: their points lie near the origin, where distances are well conditioned


@dataclass(frozen=True)
class Facts:
    """What a network was made for; a checkpoint holds it.

    Args:
        modalities: by name, in the order in which the network takes them.
        classes: their names.
        score_range: least and greatest score; None where there are classes alone.
        extractors: sha256 of what made the features, by modality, where it is known.
        clips: names of the training clips, by their index; anchors are among them.
    """

    modalities: Mapping[str, Modality]
    classes: tuple[str, ...]
    score_range: tuple[float, float] | None
    extractors: Mapping[str, str]
    clips: tuple[str, ...]

    @classmethod
    def of(cls, meta: EmotionMeta, clips: tuple[str, ...]) -> Facts:
        """Those of a set of clips."""
        return cls(dict(meta.modalities), meta.classes, meta.score_range, dict(meta.extractors), clips)

    @property
    def data(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        modalities = {name: [one.width, one.longest] for name, one in self.modalities.items()}
        return {**vars(self), "modalities": modalities}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Facts:
        """What `data` gave."""
        modalities = {name: Modality(*sizes) for name, sizes in data["modalities"].items()}
        return cls(**{**data, "modalities": modalities})

    def check(self, other: EmotionMeta | Facts) -> None:
        """Raise UserError for clips that the network was not made for: it would answer, and mean nothing.

        Clips without labels have no classes to compare.
        """
        own, new = ({name: one.width for name, one in facts.modalities.items()} for facts in (self, other))
        if list(own.items()) != list(new.items()):
            raise UserError(f"data: expected clips with the modalities {own} (name: width), got {new}")
        if other.classes and (self.classes, self.score_range) != (other.classes, other.score_range):
            wanted, got = (f"{', '.join(facts.classes)}, scores {facts.score_range}" for facts in (self, other))
            raise UserError(f"data: expected clips with the classes {wanted}; got {got}")


@dataclass(frozen=True)
class Verdict:
    """What is said of N clips.

    Args:
        output: (N, C) logits or (N, 1) scores, what is predicted.
        answer: of the network alone.
        points: by modality, (N, d) in the geometry of the assessment; empty without one.
        assessed: pseudo labels, typicality and consistency; None without an assessment, and in its warm-up.
    """

    output: Tensor
    answer: Answer
    points: Mapping[str, Tensor]
    assessed: Assessment | None


class EmotionNetwork(nn.Module):
    """A network of emotions, with a point and a list of anchors for each modality where clips are assessed.

    Args:
        body: from features, lengths and presence to an `Answer`; one that has ``conclude`` answers after the clips'
            vectors were assessed (`SoftStages`).
        facts: what it is for.
        num_outputs: C, classes; 1 for scores.
        assessment: how clips are assessed; None for the network alone.
        seed: of the first projections, drawn apart, so that `body` begins as it does alone.
    """

    def __init__(
        self,
        body: nn.Module,
        facts: Facts,
        num_outputs: int,
        assessment: ConsistencyAssessment | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.body: Any = body
        self.facts, self.num_outputs, self.assessment = facts, num_outputs, assessment
        #: Whether clips are assessed: not without an assessment, and not in its warm-up.
        self.assessing = False
        #: By modality, mean and deviation (D,) by which the features are scaled before they come here; for an export.
        self.scaling: dict[str, tuple[Tensor, Tensor]] = {}
        self.projections = nn.ModuleList()  # in the order of the modalities: any text may be the name of one
        self.lists: AnchorLists | None = None
        answer = self._blank()
        if assessment is None:
            return
        if answer.hidden.keys() != facts.modalities.keys():
            name = type(body).__name__
            raise UserError(f"network: {name} has no vector of each modality to assess; expected assessment to be null")
        with isolated_rng(seed):
            for name in facts.modalities:
                projection = nn.Linear(answer.hidden[name].shape[1], assessment.dim, bias=False)
                nn.init.xavier_uniform_(projection.weight, _GAIN)
                self.projections.append(projection)
        self.lists = assessment.lists(tuple(facts.modalities), len(facts.classes))

    def _blank(self) -> Answer:
        """What the body answers to blank clips; UserError where it cannot."""
        device, training = device_of(self.body), self.body.training
        features, length, present = example(self.facts, 2)
        inputs = [{name: x.to(device) for name, x in each.items()} for each in (features, length, present)]
        with isolated_rng(), torch.no_grad():
            try:
                answer = self.body.eval()(*inputs)
            except (RuntimeError, ValueError, KeyError, AssertionError) as error:
                raise UserError(
                    f"network: {type(self.body).__name__} cannot read clips with {', '.join(features)}: "
                    f"{first_line(error)}"
                ) from error
            finally:
                self.body.train(training)
        if answer.output.shape != (2, self.num_outputs):
            shape = tuple(answer.output.shape[1:])
            raise UserError(f"network: expected {self.num_outputs} outputs a clip, got shape {shape}")
        return answer

    def judge(
        self,
        features: Mapping[str, Tensor],
        length: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        clip: Tensor | None = None,
    ) -> Verdict:
        """Answer clips, and say what their modalities suggest.

        Args:
            features: by modality, (N, D) or (N, L, D).
            length: by modality that is a sequence, (N,) steps.
            present: by modality, (N,) bool.
            clip: (N,) positions of training clips, which are not compared with themselves; None for other clips.
        """
        answer = None
        if hasattr(self.body, "conclude"):
            encoded = self.body.encoders(features, length, present)
        else:
            encoded = answer = self.body(features, length, present)
        points = self._points(encoded.hidden)
        assessed = None
        if self.assessing and self.assessment is not None and self.lists is not None:
            still = {name: point.detach() for name, point in points.items()}
            assessed = self.assessment.assess(still, self.lists, clip, present)
        if answer is None:
            answer = self.body.conclude(encoded, present, assessed)
        output = answer.output
        if assessed is not None and isinstance(answer, StagedAnswer):
            output = mix(answer, assessed.consistency.to(output.dtype))
        return Verdict(output, answer, points, assessed)

    def _points(self, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In float32: near the rim a ball has no room for fewer digits."""
        if self.assessment is None:
            return {}
        points = {}
        for name, projection in zip(self.facts.modalities, self.projections, strict=True):
            with without_autocast(hidden[name].device.type):
                points[name] = self.assessment.geometry.points(projection(hidden[name].float()))
        return points

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What is told of clips, arguments as in `judge`.

        Returns:
            ``probabilities`` (N, C), or ``score`` (N,); where clips are assessed also ``consistency`` (N,) and, each by
            modality, ``says`` and ``anchor`` (N,) int64 and ``typicality`` (N,); else ``says`` where the network has a
            head a modality.
        """
        return self.told(self.judge(features, length, present))

    def told(self, verdict: Verdict) -> dict[str, Any]:
        """See `forward`."""
        told: dict[str, Any] = {}
        if self.num_outputs == 1:
            told["score"] = self.scores(verdict.output)
        else:
            told["probabilities"] = verdict.output.float().softmax(1)
        if says := self.says(verdict):
            told["says"] = says
        if (assessed := verdict.assessed) is not None:
            told["typicality"], told["consistency"] = dict(assessed.typicality), assessed.consistency
            told["anchor"] = dict(assessed.anchor)
        return told

    def says(self, verdict: Verdict) -> dict[str, Tensor]:
        """By modality, (N,) int64 class that it suggests alone: pseudo labels, else what its own head says."""
        if verdict.assessed is not None:
            return dict(verdict.assessed.pseudo)
        return {name: self.classes(output) for name, output in verdict.answer.unimodal.items()}

    def classes(self, output: Tensor) -> Tensor:
        """(N,) int64 classes of outputs (N, C), or of scores (N, 1)."""
        if self.num_outputs > 1:
            return output.argmax(1)
        least, step = self._scale()
        return ((output[:, 0].float() - least) / step).round().clamp(0, len(self.facts.classes) - 1).long()

    def scores(self, output: Tensor) -> Tensor:
        """(N,) scores of outputs (N, 1) or of classes that stand for scores (N, C)."""
        least, step = self._scale()
        return output[:, 0].float() if self.num_outputs == 1 else output.argmax(1) * step + least

    def levels(self) -> Tensor:
        """(C,) scores that the classes stand for."""
        least, step = self._scale()
        return least + step * torch.arange(len(self.facts.classes))

    def _scale(self) -> tuple[float, float]:
        assert self.facts.score_range is not None
        least, greatest = self.facts.score_range
        return least, (greatest - least) / (len(self.facts.classes) - 1)

    def anchoring(self, output: Tensor, label: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which clips become anchors (N,) bool, and how sure the network was (N,).

        Of a score that is 1 less its distance from the true one, in classes.
        """
        assert self.assessment is not None
        if self.num_outputs > 1:
            return self.assessment.chosen(output, label)
        assert score is not None
        confidence = (1 - (self.scores(output) - score).abs() / self._scale()[1]).clamp(min=0)
        return (self.classes(output) == label) & (confidence > self.assessment.theta), confidence


def example(facts: Facts, clips: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Features, lengths and presence of blank clips; sequences of at most 3 steps."""
    steps = {name: min(3, one.longest) for name, one in facts.modalities.items() if one.longest}
    shape = {name: (clips, steps[name]) if name in steps else (clips,) for name in facts.modalities}
    return (
        {name: torch.zeros(*shape[name], one.width) for name, one in facts.modalities.items()},
        {name: torch.full((clips,), most) for name, most in steps.items()},
        {name: torch.ones(clips, dtype=torch.bool) for name in facts.modalities},
    )
