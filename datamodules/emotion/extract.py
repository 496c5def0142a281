"""From clips to features: transcripts, sound and frames through encoders of transformers that lie on this machine.

Every clip goes through its encoder alone, so that its features depend on no other clip; what is done is kept beside
the result, so that a run that was stopped, or a folder that has grown, goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from datamodules.emotion.clips import Array
from datamodules.emotion.readers import padded
from datamodules.images.formats import NO_ARRAY, PICTURE_SUFFIXES, open_picture
from leanlight.contracts import MissingExtraError, UserError, atomic_path, nearest, sha256_file

MODALITIES = ("text", "audio", "video")
_PARTS = ".features"
_MAY_LACK = re.compile(r"pooler|masked_spec_embed|position_ids|mask_token")  # nothing here comes from these weights
_SHORTEST = 0.1  # seconds: encoders of sound fold several samples into a step


@dataclass(frozen=True)
class Clip:
    """What a clip is made of; what it lacks is empty.

    Args:
        name: of the clip.
        text: what is said.
        audio: a wav file.
        video: pictures in order.
    """

    name: str
    text: str = ""
    audio: Path | None = None
    video: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Extraction:
    """What is taken of a clip; it is part of the features' fingerprint.

    Args:
        steps: keep a vector a token, a step of sound or a frame, instead of their mean.
        frames: pictures a clip, evenly over them, at most.
        seconds: of sound, from its start, at most.
        tokens: of text at most, where the encoder takes as many.
    """

    steps: bool = False
    frames: int = 16
    seconds: float = 30.0
    tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("frames", "seconds", "tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: expected more than 0, got {getattr(self, name)}")


def find_clips(folder: Path) -> list[Clip]:
    """The clips of a folder, by name: ``NAME.txt``, ``NAME.wav``, and pictures.

    Pictures of a clip are a folder ``NAME/``, ``NAME.jpg``, or ``NAME_0001.jpg`` and so on. Clips may lie in folders;
    their names are paths then, without suffix.
    """
    if not folder.is_dir():
        raise UserError(f"path: expected a folder of clips, got {folder}")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "/." not in f"/{p.relative_to(folder).as_posix()}"]
    texts, sounds = ({_name(folder, p): p for p in files if p.suffix.lower() == kind} for kind in (".txt", ".wav"))
    known = {**texts, **sounds}
    holds_clips = {path.parent for path in known.values()} | {folder}
    pictures: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            own = path.parent.relative_to(folder).as_posix()
            name = own if own in known or path.parent not in holds_clips else _name(folder, path)
            name = name if name in known or name == own else re.sub(r"[_.-]?\d+$", "", name) or name
            pictures.setdefault(name, []).append(path)
    names = sorted({*known, *pictures})
    if not names:
        raise UserError(f"path: {folder} holds no clip: NAME.txt, NAME.wav, or pictures {', '.join(PICTURE_SUFFIXES)}")
    return [Clip(n, _read(texts.get(n)), sounds.get(n), tuple(pictures.get(n, ()))) for n in names]


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _read(path: Path | None) -> str:
    try:
        return "" if path is None else path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error})") from error


def read_wav(path: Path, rate: int, seconds: float) -> Array:
    """(samples,) float32 from -1 to 1, the mean of all channels, at `rate` samples a second."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        own, sound = wavfile.read(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a wav file of plain samples ({error})") from error
    sound = sound[: int(seconds * own)]
    if sound.dtype == np.uint8:
        samples = (sound.astype(np.float32) - 128) / 128
    elif sound.dtype.kind == "i":
        samples = sound.astype(np.float32) / float(2 ** (8 * sound.dtype.itemsize - 1))
    else:
        samples = sound.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if len(samples) and own != rate:
        shared = int(np.gcd(own, rate))
        samples = resample_poly(samples, rate // shared, own // shared).astype(np.float32)
    return samples


class Encoder:
    """An encoder of one modality, loaded when it is first needed.

    Args:
        modality: ``text``, ``audio`` or ``video``.
        path: folder of the encoder, as transformers' ``save_pretrained`` writes it, with its tokenizer or processor.
        extraction: what is taken of a clip.
        device: where it runs.
    """

    def __init__(self, modality: str, path: Path, extraction: Extraction, device: str = "cpu") -> None:
        if modality not in MODALITIES:
            raise UserError(
                f"encoder: expected one of {', '.join(MODALITIES)}, got {modality!r}{nearest(modality, MODALITIES)}"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"encoder: expected a folder with an encoder of transformers for {modality}, got {path}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # what torch raises where it was built without that kind
            raise UserError(f"device: expected cpu, or a GPU that is there, such as cuda:0, got {device!r}") from error
        self.modality, self.path, self.extraction, self.device = modality, path, extraction, device
        self._loaded: tuple[nn.Module, Any] | None = None
        self.fingerprint = self._digest()

    def _digest(self) -> str:
        """sha256 of weights, configuration and settings, wherever they lie."""
        settings: dict[str, Any] = {"steps": self.extraction.steps, "modality": self.modality}
        limit = {"text": "tokens", "audio": "seconds", "video": "frames"}[self.modality]
        settings[limit] = getattr(self.extraction, limit)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for file in sorted(p for p in self.path.iterdir() if p.is_file()):
            if not file.name.startswith((".", "README")):
                digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        return digest.hexdigest()

    def has(self, clip: Clip) -> bool:
        """Whether a clip has this modality."""
        return bool(getattr(clip, self.modality))

    def content(self, clip: Clip) -> str:
        """sha256 of what is encoded of a clip."""
        if self.modality == "text":
            return hashlib.sha256(clip.text.encode()).hexdigest()
        files = [clip.audio] if self.modality == "audio" else clip.video
        return hashlib.sha256("".join(sha256_file(file) for file in files if file is not None).encode()).hexdigest()

    def __call__(self, clip: Clip) -> Array:
        """(L, D) float32: a vector a token, step or frame, or their mean alone; no rows where there is no sound."""
        if self._loaded is None:
            self._loaded = self._load()
        with torch.inference_mode():
            steps = {"text": self._text, "audio": self._audio, "video": self._video}[self.modality](clip)
        if not torch.isfinite(steps).all():
            raise UserError(f"encoder: {self.path} gives NaN or infinity for the {self.modality} of clip {clip.name!r}")
        steps = steps.float().cpu()
        return (steps if self.extraction.steps or not len(steps) else steps.mean(0, keepdim=True)).numpy()

    def _load(self) -> tuple[nn.Module, Any]:
        """The network and its tokenizer or processor."""
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise MissingExtraError("transformers", "emotion") from error
        kinds: dict[str, Any] = {
            "text": transformers.AutoTokenizer,
            "audio": transformers.AutoFeatureExtractor,
            "video": transformers.AutoImageProcessor,
        }
        from transformers.utils import logging

        # Its table of weights that are missing or not needed looks like an alarm; what matters is an error below.
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            prepare = kinds[self.modality].from_pretrained(self.path, local_files_only=True)
            model, report = transformers.AutoModel.from_pretrained(
                self.path, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"encoder: {self.path} cannot be loaded for {self.modality} ({reason})") from error
        finally:
            logging.set_verbosity(before)
        if missing := sorted(name for name in report["missing_keys"] if not _MAY_LACK.search(name)):
            raise UserError(f"encoder: {self.path} lacks the weights {missing[0]}, and {len(missing) - 1} more")
        # Networks of text with pictures or sound have a part for each; speech recognisers encode and decode.
        part = {"text": "text_model", "audio": "audio_model", "video": "vision_model"}[self.modality]
        model = getattr(model, part, model)
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        return model.to(self.device).eval(), prepare

    def _hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        assert self._loaded is not None
        model = self._loaded[0]
        return model(**{name: x.to(self.device) for name, x in inputs.items()}).last_hidden_state

    def _text(self, clip: Clip) -> Tensor:
        assert self._loaded is not None
        model, tokenizer = self._loaded
        most = [self.extraction.tokens, tokenizer.model_max_length]
        most.append(getattr(model.config, "max_position_embeddings", 0) or self.extraction.tokens)
        return self._hidden(tokenizer(clip.text, truncation=True, max_length=min(most), return_tensors="pt"))[0]

    def _audio(self, clip: Clip) -> Tensor:
        assert self._loaded is not None
        assert clip.audio is not None
        extractor = self._loaded[1]
        rate = extractor.sampling_rate
        samples = read_wav(clip.audio, rate, self.extraction.seconds)
        if not len(samples):
            return torch.zeros(0, 1)
        samples = np.pad(samples, (0, max(0, round(_SHORTEST * rate) - len(samples))))
        return self._hidden(extractor(samples, sampling_rate=rate, return_tensors="pt"))[0]

    def _video(self, clip: Clip) -> Tensor:
        assert self._loaded is not None
        processor, count = self._loaded[1], len(clip.video)
        chosen = np.unique(np.linspace(0, count - 1, min(count, self.extraction.frames)).round().astype(int))
        frames = []
        for place in chosen:
            with open_picture(clip.video[place]) as picture:
                hidden = self._hidden(processor(images=picture, return_tensors="pt"))
            # (1, tokens, D) of a transformer, (1, D, H, W) of a convolutional network.
            frames.append(hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2))
        return torch.cat(frames)


def encode(
    clips: Sequence[Clip], encoders: Mapping[str, Encoder], kept: Path, show: bool = True
) -> dict[str, list[Array]]:
    """Features (L, D) of every clip by modality, no rows where it lacks it.

    Args:
        clips: in order.
        encoders: by modality.
        kept: folder of what is done: a file a clip, by encoder and by what was encoded.
        show: a progress bar.
    """
    done: dict[str, list[Array]] = {}
    for modality, encoder in encoders.items():
        folder = kept / f"{modality}-{encoder.fingerprint[:16]}"
        each: Iterable[Clip] = track(clips, modality) if show else clips
        arrays = [_kept(folder / f"{encoder.content(c)}.npy", encoder, c) if encoder.has(c) else None for c in each]
        widths = {array.shape[1] for array in arrays if array is not None and len(array)}
        if not widths:
            raise UserError(f"encoder: none of {len(clips):,} clips has {modality}")
        none = np.zeros((0, widths.pop()), np.float32)
        done[modality] = [none if array is None or not len(array) else array for array in arrays]
    return done


def _kept(path: Path, encoder: Encoder, clip: Clip) -> Array:
    """What the file holds, or what the encoder gives, which is then kept in the file."""
    if path.is_file():
        with suppress(*NO_ARRAY):  # a damaged one is made again
            return np.load(path, allow_pickle=False)
    array = encoder(clip)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
    return array


def write_features(
    path: Path,
    names: Sequence[str],
    features: Mapping[str, Sequence[Array]],
    extractors: Mapping[str, str],
    steps: bool,
) -> None:
    """Write features for `readers.read_arrays`, whole or not at all.

    Args:
        path: a safetensors file.
        names: of the clips.
        features: by modality, (L, D) a clip; no rows where it lacks it.
        extractors: fingerprint by modality.
        steps: whether they are sequences; else each has a row at most.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, Array] = {}
    for name, parts in features.items():
        whole, length = padded(parts)
        if steps:
            arrays |= {name: whole, f"{name}_length": length}
        else:
            arrays |= {name: np.ascontiguousarray(whole[:, 0]), f"{name}_present": length.astype(bool)}
    texts = {"id": json.dumps(list(names)), "extractors": json.dumps(dict(extractors), sort_keys=True)}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, texts)


def prepare(
    clips: Sequence[Clip], output: Path, encoders: Mapping[str, Encoder], steps: bool, show: bool = True
) -> str:
    """Encode clips into a file; says what is in it.

    Args:
        clips: as `find_clips` gives them, or with transcripts alone.
        output: a safetensors file; what is done is kept in ``.features`` beside it.
        encoders: by modality.
        steps: whether features are sequences.
        show: a progress bar a modality.
    """
    if not encoders:
        raise UserError(f"encoder: expected one or more of {', '.join(f'{m}=DIR' for m in MODALITIES)}, got none")
    features = encode(clips, encoders, output.parent / _PARTS, show)
    extractors = {name: encoder.fingerprint for name, encoder in encoders.items()}
    write_features(output, [clip.name for clip in clips], features, extractors, steps)
    counts = ", ".join(f"{sum(len(one) > 0 for one in each):,} with {name}" for name, each in features.items())
    return f"{len(clips):,} clips, {counts}, in {output}"
