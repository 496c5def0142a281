"""Judges by the names that a command line gives them. Nothing is loaded before a judge is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from leanlight.contracts.errors import UserError, nearest

if TYPE_CHECKING:
    from leanlight.contracts.safety import Judge, SafetySample

MakeJudge = Callable[[Sequence["SafetySample"]], "Judge"]

#: What can be said, for help and errors.
NAMES = {
    "majority": "the more frequent label of each part, a floor",
    "keyword": "an answer is harmful unless it refuses, a floor",
    "features:FOLDER": "a saved regression on frozen features of text",
    "outputs:FORMAT:FILE": "answers of llama_guard, llava_guard or guard_reasoner_vl",
    "http:URL#MODEL": "an endpoint with OpenAI's interface; its key is OPENAI_API_KEY in the environment; "
    "behind MODEL perhaps ,concurrency=8,timeout=60,requests=1000,tokens=200000: requests at a time, seconds, and "
    "what a command may spend",
    "PATH": "a run folder, a checkpoint, or a folder of a vision-language model",
}


def judge_maker(name: str) -> MakeJudge:
    """What makes the judge of that name, given the samples of the audit.

    Raises:
        UserError: no such judge. What needs a look at files or packages shows when the judge is made.
    """
    kind, colon, rest = name.partition(":")
    if kind in _KINDS:
        pattern = next(known for known in NAMES if known.partition(":")[0] == kind)
        if bool(rest) != (":" in pattern) or bool(colon) != bool(rest):
            raise UserError(f"--judge: expected {pattern}, got {without_keys(name)!r}")
        if kind == "http":  # a wrong address shows before other judges are asked
            endpoint = _http(rest, ())
            return lambda samples: endpoint
        return lambda samples: _KINDS[kind](rest, samples)
    if Path(name).exists():
        return lambda samples: _network(Path(name), samples)
    expected = f"one of {', '.join(NAMES)}"
    raise UserError(f"--judge: expected {expected}; nothing is at {without_keys(name)!r}{nearest(kind, _KINDS)}")


def without_keys(name: str) -> str:
    """A judge's name without user, password and query of an address, where keys may be."""
    kind, colon, rest = name.partition(":")
    if "//" not in rest:
        return name
    url = urlsplit(rest)
    return f"{kind}{colon}{url._replace(netloc=url.netloc.rpartition('@')[2], query='').geturl()}"


def _majority(rest: str, samples: Sequence[SafetySample]) -> Judge:
    from lit_modules.falcon_eye.judges import MajorityJudge

    return MajorityJudge.fit(samples)


def _keyword(rest: str, samples: Sequence[SafetySample]) -> Judge:
    from lit_modules.falcon_eye.judges import KeywordJudge

    return KeywordJudge()


def _features(folder: str, samples: Sequence[SafetySample]) -> Judge:
    from lit_modules.falcon_eye.judges import FeatureJudge

    return FeatureJudge.load(folder)


def _outputs(rest: str, samples: Sequence[SafetySample]) -> Judge:
    from lit_modules.falcon_eye.guards import OutputsJudge

    layout, _, path = rest.partition(":")
    return OutputsJudge(cast(Any, layout), path)  # it checks the name


def _http(rest: str, samples: Sequence[SafetySample]) -> Judge:
    from lit_modules.falcon_eye.http_judge import HttpJudge
    from lit_modules.falcon_eye.parsing import parse
    from lit_modules.falcon_eye.prompt import Prompt

    url, _, named = rest.rpartition("#")
    model, *settings = named.split(",")
    if not (url and model):
        raise UserError(f"--judge: expected http:URL#MODEL, got {without_keys(f'http:{rest}')!r}")
    limits = dict(map(_limit, settings))
    return HttpJudge(url, model, Prompt().text, lambda text: parse(text, strict=False), **limits)


#: Of an endpoint, by the name that a command line has for it, an argument of `HttpJudge` and its kind.
_LIMITS: dict[str, tuple[str, type]] = {
    "concurrency": ("concurrency", int),
    "timeout": ("timeout", float),
    "requests": ("max_requests", int),
    "tokens": ("max_tokens", int),
}


def _limit(text: str) -> tuple[str, Any]:
    """An argument and its value of ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not equals or name not in _LIMITS:
        expected = ", ".join(f"{known}=…" for known in _LIMITS)
        raise UserError(f"--judge http: expected {expected} behind the model, got {text!r}{nearest(name, _LIMITS)}")
    argument, kind = _LIMITS[name]
    try:
        return argument, kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "seconds"
        raise UserError(f"--judge http: {name}: expected {what}, got {value!r}") from None


def _network(path: Path, samples: Sequence[SafetySample]) -> Judge:
    from lit_modules.falcon_eye.vlm_judge import VLMJudge

    judge = VLMJudge.from_source(path)
    judge.asking.encoder.prompt.require_shown(judge.fields, samples)
    return judge


_KINDS: dict[str, Callable[[str, Sequence[SafetySample]], Judge]] = {
    "majority": _majority,
    "keyword": _keyword,
    "features": _features,
    "outputs": _outputs,
    "http": _http,
}
