"""What is exported loads with transformers and peft alone, and writes and scores as the judge did."""

import copy
import json
import subprocess
import sys

import torch
from PIL import Image
from squares import Square, labelled
from transformers import AutoModelForImageTextToText

from lit_modules.falcon_eye import LoRATuning, Prompt, SafetyEncoder
from lit_modules.falcon_eye.answering import Asking
from lit_modules.falcon_eye.export import export_judge

FORBIDDEN = "leanlight", "lit_modules", "datamodules", "callbacks", "lightning", "pytorch_lightning"
SAMPLE = labelled(3, instruction="Name the shape.", response="It is a square.")


def about(encoder, **more):
    known = {
        "base": {"name": "tiny", "digest": encoder.backbone.digest},
        "data": {"name": "squares", "counts": {"train": 12}, "fingerprint": "f00d"},
        "prompt": {"system": "default", "targets": "all_fields", "order": "judgments_first", "modality": "vqa"},
        "encoding": encoder.settings,
        "max_new_tokens": 5,
        "strict_parser": False,
        "thresholds": {"response": 0.25},
    }
    return {**known, **more}


def run(folder, code):
    """Run code in a process that cannot import the suite; what it prints."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in FORBIDDEN)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{blocked}{code}"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lines_of(card, base=""):
    """The card's own lines, about this test's sample, and the first logits at the end."""
    (code,) = card.split("```python\n")[1:]
    code = code.split("```")[0].replace("FOLDER_OF_THE_BASE", str(base)).replace("INSTRUCTION", SAMPLE.instruction)
    code = code.replace('"RESPONSE"', repr(SAMPLE.response))
    code = code.replace('Image.new("RGB", (224, 224), "white")', 'Image.open("square.png")')
    return code + "\nimport torch\nprint('LOGITS', model(**inputs).logits[0, -1].tolist())\n"


def put_picture(folder):
    pixels = Square(colour=SAMPLE.image.colour).pixels().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / "square.png")


def told(network, encoder):
    """What the judge writes about the sample, and its logits at the first token of that."""
    batch = encoder.encode([SAMPLE], torch.tensor([0]), targets=False)
    with torch.no_grad():
        logits = network(**encoder.batch_inputs(batch)).logits[0, -1]
    asking = Asking(network, encoder, max_new_tokens=5)
    return asking.write(asking.encode([SAMPLE]))[0], logits


def check(printed, network, encoder):
    text, logits = told(network, encoder)
    written, _, rest = printed.partition("\nLOGITS ")
    assert written.strip() == text.strip()
    torch.testing.assert_close(torch.tensor(json.loads(rest)), logits, rtol=1e-4, atol=1e-4)


def test_the_lines_of_the_card_judge_as_the_judge_does(backbone, tmp_path):
    encoder = SafetyEncoder(backbone, Prompt(system="none"), max_pixels=3200)
    prompt = {"system": "none", "targets": "all_fields", "order": "judgments_first", "modality": "vqa"}
    export_judge(backbone.model, encoder, about(encoder, prompt=prompt), tmp_path, whole=True)
    put_picture(tmp_path)
    check(run(tmp_path, lines_of((tmp_path / "README.md").read_text())), backbone.model, encoder)


def adapted(backbone):
    network = LoRATuning(rank=2, alpha=4, dropout=0.0).adapt(copy.deepcopy(backbone.model)).eval()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return network


def test_an_adapter_loads_around_its_base_and_merged_weights_without(backbone, tmp_path):
    encoder = SafetyEncoder(backbone)
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    for folder in (base, adapter, merged):
        folder.mkdir()
        put_picture(folder)
    export_judge(backbone.model, encoder, about(encoder), base, whole=True)
    network = adapted(backbone)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export_judge(network, encoder, about(encoder), adapter, whole=False)
    export_judge(network, encoder, about(encoder), merged, whole=True)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not (adapter / "model.safetensors").exists()
    assert (adapter / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size / 4
    check(run(adapter, lines_of((adapter / "README.md").read_text(), base)), network, encoder)
    whole = AutoModelForImageTextToText.from_pretrained(merged).eval()
    torch.testing.assert_close(told(whole, encoder)[1], told(network, encoder)[1], rtol=1e-4, atol=1e-4)


def test_the_card_names_base_data_and_thresholds(backbone, tmp_path):
    encoder = SafetyEncoder(backbone)
    paths = export_judge(backbone.model, encoder, about(encoder), tmp_path, whole=True)
    card = (tmp_path / "README.md").read_text()
    for words in ("tiny", backbone.digest, "squares: 12 train", "f00d", "| response | 0.2500 |"):
        assert words in card
    facts = json.loads((tmp_path / "judge.json").read_text())
    assert facts["thresholds"] == {"response": 0.25}
    assert {"config.json", "model.safetensors", "tokenizer.json", "judge.json", "README.md"} <= {p.name for p in paths}
