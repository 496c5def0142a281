"""Facts about the sets of clips, known without loading anything."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.catalog import PlacedSet, entry


@dataclass(frozen=True)
class EmotionSetInfo(PlacedSet):
    """What is known of a set of clips before it is loaded.

    Args:
        score_range: least and greatest score, where it has scores.
        levels: scores at which a class ends and the next begins; none: a class for every whole number.
        level_names: of the classes that `levels` make.
    """

    score_range: tuple[float, float] = (-3.0, 3.0)
    levels: tuple[float, ...] = ()
    level_names: tuple[str, ...] = ()


_SENTIMENT = "text, audio, video; sentiment from -3 to 3, seven classes"
_ALL = [
    EmotionSetInfo(
        name="planted",
        title="Digits cut into three strips, 40 % of them with one strip of another digit: conflicts that are known",
        facts="left, middle, right; ten classes, every strip's own class known",
        licence="that of the digits",
        origin="made by leanlight from scikit-learn's digits or MNIST",
        size_mb=0,
        get="always there with scikit-learn's digits",
    ),
    EmotionSetInfo(
        name="mosi",
        title="CMU-MOSI: one vector a clip and modality, 2,199 clips",
        facts=_SENTIMENT,
        licence="research use",
        origin="Zadeh, Zellers, Pincus and Morency 2016",
        size_mb=4,
        get="put mosi_utterances.npz into ROOT/cmu_mosi; MMSA's pickle of MOSI goes by the name pickle",
        files=("cmu_mosi/mosi_utterances.npz",),
    ),
    EmotionSetInfo(
        name="mosei",
        title="CMU-MOSEI: sequences, a pickle of MMSA, 22,856 clips",
        facts=_SENTIMENT,
        licence="research use",
        origin="Zadeh et al. 2018; features of MMSA (thuiar)",
        size_mb=13000,
        get="get Processed/aligned_50.pkl or unaligned_50.pkl of MOSEI from MMSA's drive, put it into ROOT/mosei",
        files=("mosei/aligned_50.pkl", "mosei/unaligned_50.pkl", "MOSEI/Processed/aligned_50.pkl"),
    ),
    EmotionSetInfo(
        name="sims",
        title="CH-SIMS: sequences, a pickle of MMSA, 2,281 clips with a label of each modality alone",
        facts="text, audio, video; sentiment from -1 to 1, five classes",
        licence="research use",
        origin="Yu et al. 2020; features of MMSA (thuiar)",
        size_mb=1600,
        get="get Processed/unaligned_39.pkl of SIMS from MMSA's drive, put it into ROOT/sims",
        files=("sims/unaligned_39.pkl", "SIMS/Processed/unaligned_39.pkl"),
        score_range=(-1.0, 1.0),
        levels=(-0.7, -0.1, 0.1, 0.7),  # MMSA's, for its accuracy of five classes
        level_names=("negative", "weakly negative", "neutral", "weakly positive", "positive"),
    ),
    EmotionSetInfo(
        name="pickle",
        title="A pickle of MMSA or DMD: PATH with train, valid and test",
        facts="text, audio, video; scores",
        licence="that of each set",
        origin="your file",
        size_mb=0,
        get="--data.path FILE.pkl",
        by_path=True,
    ),
    EmotionSetInfo(
        name="mertools",
        title="A data set of MERTools: PATH with label*.npz and features/<extractor>/<clip>.npy",
        facts="a modality for each folder of features that is named; emotions or scores",
        licence="that of each set",
        origin="your folder",
        size_mb=0,
        get="--data.path DIR --data.folders '{text: EXTRACTOR, audio: EXTRACTOR, video: EXTRACTOR}'",
        by_path=True,
    ),
    EmotionSetInfo(
        name="npz",
        title="Your own features: PATH with id, label or score, and a float array a modality; split, speaker, …",
        facts="any modalities, vectors or sequences; classes or scores",
        licence="yours",
        origin="your file",
        size_mb=0,
        get="--data.path FILE.npz",
        by_path=True,
    ),
    EmotionSetInfo(
        name="safetensors",
        title="The same as safetensors, with texts as JSON in its metadata",
        facts="any modalities, vectors or sequences; classes or scores",
        licence="yours",
        origin="your file",
        size_mb=0,
        get="--data.path FILE.safetensors",
        by_path=True,
    ),
    EmotionSetInfo(
        name="emotion_folder",
        title="Your own clips: PATH with NAME.txt, NAME.wav, frames NAME/*.jpg, and labels.csv (id; label or score)",
        facts="text, audio, video, as far as there are encoders; classes or scores",
        licence="yours",
        origin="your folder",
        size_mb=0,
        get="leanlight data prepare emotion_folder --path PATH --encoder text=DIR --encoder audio=DIR …; "
        "DIR: an encoder of transformers. Frames of a film: ffmpeg -i NAME.mp4 NAME/%04d.jpg",
        by_path=True,
    ),
]

EMOTIONS: dict[str, EmotionSetInfo] = {info.name: info for info in _ALL}


def describe(name: str) -> EmotionSetInfo:
    """The entry called `name`; UserError with the nearest name if there is none."""
    return entry(name, EMOTIONS)
