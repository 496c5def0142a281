"""Take a judge out of the suite: a folder that transformers and peft load, with a card."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanlight.contracts import atomic_write
from lit_modules.falcon_eye.backbone import Quiet
from lit_modules.falcon_eye.encoding import SafetyEncoder

FACTS = "judge.json"


def export_judge(
    network: Any, encoder: SafetyEncoder, about: Mapping[str, Any], directory: Path, whole: bool
) -> list[Path]:
    """Write a judge for transformers; return the paths.

    The folder has the model (``config.json``, ``model.safetensors``), or of LoRA without `whole` the adapter in peft's
    layout (``adapter_config.json``, ``adapter_model.safetensors``); the processor with its tokenizer and chat template;
    ``judge.json``, what the judge is beside its weights; and ``README.md``, a card with lines that judge a sample.
    What stands in the folder under other names stays.

    Args:
        network: as it was trained; it stays as it is.
        encoder: of its samples.
        about: facts of the judge, of `SafetyJudge.about`.
        directory: where to; it exists.
        whole: whether low-rank changes are added to a copy of the base.
    """
    adapter = hasattr(network, "merge_and_unload") and not whole
    written = _merged(network) if hasattr(network, "merge_and_unload") and whole else network
    with Quiet():
        written.save_pretrained(directory)
        encoder.backbone.processor.save_pretrained(directory)
    facts = {**about, "adapter": adapter, "question": encoder.question()}
    atomic_write(directory / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    atomic_write(directory / "README.md", card(about, adapter))
    return sorted(path for path in directory.iterdir() if path.is_file())


def _merged(network: Any) -> Any:
    """A copy of the base with the low-rank changes added; the base itself stays bit for bit."""
    return copy.deepcopy(network).merge_and_unload()


def card(about: Mapping[str, Any], adapter: bool) -> str:
    """The text of the model card."""
    base, data, thresholds = about["base"], about["data"], about["thresholds"]
    counts = ", ".join(f"{number:,} {part}" for part, number in data.get("counts", {}).items()) or "unknown"
    shown = "\n".join(f"| {field} | {value:.4f} |" for field, value in thresholds.items()) or "| none chosen | |"
    what = "An adapter: it is of use with its base alone." if adapter else "A whole model."
    return f"""---
base_model: {json.dumps(base["name"])}
pipeline_tag: image-text-to-text
tags: [safety, moderation]
---

# A judge of answers to people and pictures

It judges whether an instruction, a picture and a model's answer do harm, names the kind of harm and says why. {what}

| | |
|---|---|
| base | {base["name"]} |
| digest of the base | `{base["digest"]}` |
| data | {data.get("name", "unknown")}: {counts} |
| fingerprint of the data | `{data.get("fingerprint", "unknown")}` |
| question | {json.dumps(about["prompt"])} |
| sizes | {json.dumps(about["encoding"])} |

Thresholds of P(harmful) that were best on validation data (balanced accuracy):

| field | threshold |
|---|---|
{shown}

It knows the harm of its data and no other; its verdicts are no ruling. Terms of the base and of the data apply.

## Use

```python
{_use(about, adapter)}
```
"""


def _use(about: Mapping[str, Any], adapter: bool) -> str:
    """Lines that judge one sample, with transformers alone."""
    shown = about["prompt"]["modality"] != "text_only"
    sizes = {"shortest_edge": about["encoding"]["min_pixels"], "longest_edge": about["encoding"]["max_pixels"]}
    imports, load = ["import json"], ['model = AutoModelForImageTextToText.from_pretrained(".").eval()']
    if adapter:
        imports.append("from peft import PeftModel")
        load = [
            'base = AutoModelForImageTextToText.from_pretrained("FOLDER_OF_THE_BASE")',
            'model = PeftModel.from_pretrained(base, ".").eval()',
        ]
    pictures = f"images=[picture], images_kwargs={{'size': {sizes}}}, " if shown else ""
    return "\n".join(
        [
            *imports,
            "from PIL import Image",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            'processor = AutoProcessor.from_pretrained(".")',
            *load,
            f'question = json.load(open("{FACTS}", encoding="utf-8"))["question"]',
            'instruction, response = "INSTRUCTION", "RESPONSE"  # yours, without special tokens in them',
            'picture = Image.new("RGB", (224, 224), "white")  # yours',
            'text = question.replace("{instruction}", instruction).replace("{response}", response)',
            f'inputs = processor(text=[text], {pictures}return_tensors="pt")',
            f"written = model.generate(**inputs, max_new_tokens={about['max_new_tokens']}, do_sample=False)",
            'print(processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])',
        ]
    )
