"""LoRA around a base from disk, killed in the middle of an epoch and of its predictions, ends as if undisturbed."""

import json

import pytest
import torch
from kill import finish, kill_when, rows, run_dir, start

TINY = {"hidden": 32, "intermediate": 32, "layers": 1, "heads": 2, "kv_heads": 1, "vision_layers": 1, "vocab_size": 500}
COMMON = [
    *(f"--data.init_args.shapes.{part}={size}" for part, size in (("train", 48), ("val", 8), ("test", 24))),
    *("--data.init_args.batch_size=4", "--model.init_args.max_new_tokens=4", "--data.init_args.eval_batch_size=4"),
    *("--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--exact_resume.every=3", "--run.test=none"),
    *("--trainer.accelerator=cpu", "--run.wandb=disabled", "--run.id=a", "--trainer.enable_progress_bar=false"),
]
QUIET = ["--run.wandb=disabled", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A fit of LoRA with dropout around a base that has been exported."""
    folder = tmp_path_factory.mktemp("base")
    sizes = [f"--model.init_args.backbone.init_args.{name}={value}" for name, value in TINY.items()]
    steps = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]
    finish(start(folder, "fit", "--config=falcon_eye/shapes_small", *COMMON, *sizes, *steps))
    base = {"class_path": "lit_modules.falcon_eye.PretrainedVLM"}
    base["init_args"] = {"path": str(run_dir(folder) / "artifacts" / "export")}
    lora = ["--config=falcon_eye/shapes_small__lora", f"--model.init_args.backbone={json.dumps(base)}"]
    return ["fit", *lora, "--model.init_args.tuning.init_args.dropout=0.2", *COMMON]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_adapter_goes_on_and_so_do_its_predictions(tmp_path, command):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    finish(start(whole, *command))
    kill_when(start(killed, *command), killed, lambda: rows(killed) >= 8)  # of twelve steps of the first epoch
    finish(start(killed, "fit", "--resume", run_dir(killed)))
    expected, found = (torch.load(run_dir(f) / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, killed))
    assert 0 < len(expected["state_dict"]) == len(found["state_dict"])
    assert all("lora_" in name for name in expected["state_dict"])
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    assert (run_dir(killed) / "metrics.csv").read_bytes() == (run_dir(whole) / "metrics.csv").read_bytes()

    verdicts = {}
    for folder in (whole, killed):
        out = run_dir(folder) / "predict"
        process = start(folder, "predict", "--from", run_dir(folder), *QUIET, "--predictions.piece_items=4")
        if folder == killed:
            kill_when(process, folder, lambda out=out: any(out.glob("artifacts/predictions/*_0.json")))
            process = start(folder, "predict", "--resume", out)
        finish(process)
        (file,) = out.rglob("verdicts.jsonl")
        verdicts[folder] = file.read_text().splitlines()
    assert verdicts[killed] == verdicts[whole]
    assert len({json.loads(line)["sample"] for line in verdicts[whole]}) == len(verdicts[whole]) == 24
