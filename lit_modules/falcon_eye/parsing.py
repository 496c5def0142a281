"""From what a judge wrote to its verdict: as the authors of FalconEye read it, or with patience."""

from __future__ import annotations

import json
import re
from typing import Any

from leanlight.contracts import HARM_CATEGORIES, Verdict
from lit_modules.falcon_eye.prompt import CATEGORY_KEY, EXPLANATION_KEY, JUDGMENT_KEYS, WORDS

KEYS = (*JUDGMENT_KEYS.values(), CATEGORY_KEY, EXPLANATION_KEY)
_LABELS = {word: label for label, word in WORDS.items()}
_CATEGORIES = {name.casefold(): name for name in HARM_CATEGORIES}


def parse(text: str, strict: bool = False) -> Verdict:
    """The verdict in the answer of a judge; never an error.

    Args:
        text: what the judge wrote.
        strict: read as the authors' evaluation does: keys as they are, and nothing but ``Harmful`` and ``Benign``.
            Otherwise case, code fences, quotation marks, bullets and full stops do not matter, ``Judgement`` is
            ``Judgment``, and JSON is read as such.

    Returns:
        `labels` of all fields, None where the answer does not say, or says both; `categories` that are known, once
        each; `text` unchanged.
    """
    values = answer_values(text, strict)
    read = _LABELS.get if strict else _patient_label
    return Verdict(
        labels={field: read(values.get(key, "")) for field, key in JUDGMENT_KEYS.items()},
        categories=_categories(values.get(CATEGORY_KEY, ""), strict),
        explanation=values.get(EXPLANATION_KEY, ""),
        text=text,
    )


def answer_values(text: str, strict: bool = False) -> dict[str, str]:
    """By key of `KEYS`, the value in an answer as text, items of a list joined by a comma; absent where it is missing.

    Args:
        text: what the judge wrote.
        strict: see `parse`.
    """
    if strict:
        return {key: value for key in KEYS if (value := _strict_value(text, key)) is not None}
    return _from_json(text) or _from_lines(text)


def _strict_value(text: str, key: str) -> str | None:
    """Quoted text, else the quoted items of a list, else whatever stands before the next comma or line."""
    start = rf'"{key}"\s*:\s*'
    if found := re.search(start + r'"([^"]*)"', text):
        return found[1]
    if found := re.search(start + r"\[([^\]]*)\]", text):
        return ", ".join(re.findall(r'"([^"]*)"', found[1]))
    if found := re.search(start + r"([^,\n]*)", text):
        return found[1].strip()
    return None


# A judgement in either spelling.
_KEY = re.compile(r"(instruction|image|response)\s+judge?ment|harmful\s+categor(?:y|ies)|explanation", re.IGNORECASE)
# Lengths are bounded where a hostile answer could make the search start over again and again.
_PAIR = re.compile(
    rf"""(?:^|[{{,])[-*+>\#"'`_\s\d.]{{0,40}}?        # the start of a line or of a pair, a bullet, a quotation mark
    (?P<key>{_KEY.pattern})["'`*_]*\s*[:=][\s*_`]*
    (?:"(?P<quoted>(?:[^"\\]|\\.)*)"\s*?(?=[,}}\n]|\Z) # no end but a mark that ends the pair: others lie inside
    |'(?P<single>[^'\n]*)'\s*?(?=[,}}\n]|\Z)
    |\[(?P<items>[^\]]{{0,2000}})\]
    |(?P<bare>(?:(?!,[\s"'*_`]*(?:{_KEY.pattern}))[^\n])*))""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE | re.DOTALL,
)
_FENCE = re.compile(r"\A\s*```\w*|```\s*\Z")
_MARKS = " \t\r\n\"'`*_.,;{}[]()"


def _canonical(key: str) -> str | None:
    """The key of `KEYS` that is meant."""
    if not (found := _KEY.fullmatch(key.strip())):
        return None
    if found[1]:
        return JUDGMENT_KEYS[found[1].lower()]
    return EXPLANATION_KEY if found[0].lower() == EXPLANATION_KEY.lower() else CATEGORY_KEY


def _from_json(text: str) -> dict[str, str]:
    """Values of an answer that is a JSON object, stands inside one, or lacks its braces alone; else nothing."""
    body = _FENCE.sub("", text).strip()
    for candidate in (body[body.find("{") : body.rfind("}") + 1], "{" + body.rstrip(",") + "}"):
        try:
            # Of a key that comes twice the first counts, as everywhere else.
            read = json.loads(candidate, strict=False, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
        except (ValueError, RecursionError):
            continue
        values = {known: _as_text(value) for key, value in read.items() if (known := _canonical(key))}
        if values:
            return values
    return {}


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _from_lines(text: str) -> dict[str, str]:
    """Values of keys that begin a line or a pair; what stands inside a quoted value is no key."""
    values: dict[str, str] = {}
    for found in _PAIR.finditer(text):
        key = _canonical(found["key"])
        if key is None or key in values:
            continue
        if found["items"] is not None:
            values[key] = ", ".join(item.strip(_MARKS) for item in found["items"].split(","))
        elif found["quoted"] is not None:
            values[key] = _unescaped(found["quoted"]).strip()
        else:
            values[key] = (found["single"] or found["bare"] or "").strip().rstrip(",").strip(" \t\"'`*_")
    return values


def _unescaped(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text


def _patient_label(value: str) -> bool | None:
    """Of a value that begins with one of the two words and does not hold the other."""
    words = re.findall(r"harmful\b|benign\b", value.casefold())
    if len(set(words)) != 1 or not value.strip(_MARKS).casefold().startswith(words[0]):
        return None
    return _LABELS[words[0].capitalize()]


def _categories(value: str, strict: bool) -> tuple[str, ...]:
    """The known names in a list, once each, in its order."""
    if strict:
        names = [name for name in (part.strip() for part in value.split(",")) if name in HARM_CATEGORIES]
    else:
        parts = (" ".join(part.replace("&", " and ").split()) for part in re.split(r"[,;|/\n]", value))
        names = [known for part in parts if (known := _CATEGORIES.get(part.strip(_MARKS).casefold()))]
    return tuple(dict.fromkeys(names))
