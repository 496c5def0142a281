"""Every data set that the suite knows, by the name that `leanlight data list` shows; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.emotion.catalog import EMOTIONS, EmotionSetInfo
from datamodules.images.catalog import CATALOG, DatasetInfo
from datamodules.safety.catalog import SAFETY_SETS, SafetySetInfo
from datamodules.sessions.catalog import SESSIONS, SessionSetInfo

Info = DatasetInfo | SessionSetInfo | EmotionSetInfo | SafetySetInfo
KNOWN: dict[str, Info] = {**CATALOG, **SESSIONS}
# Where sessions have a set of the same name, too, the one of clips is told by its kind.
KNOWN |= {f"emotion_{name}" if name in KNOWN else name: info for name, info in EMOTIONS.items()}
KNOWN |= SAFETY_SETS


def info_of(data: Mapping[str, Any]) -> Info | None:
    """The set that a configuration's ``data`` reads, or None for one that the suite does not know."""
    arguments = data.get("init_args")
    module, name = str(data.get("class_path")), arguments.get("dataset") if isinstance(arguments, Mapping) else None
    if not module.startswith("datamodules."):
        return None
    return (EMOTIONS if module.endswith(".EmotionDataModule") else KNOWN).get(str(name))
