"""Stands in for `python -m leanlight fit|predict|export|select`: writes a run folder in milliseconds.

Options of the fake model: value and slope make test/accuracy = value + 0.01 * slope * seed, of replicas that of each
and the mean; fail ends with exit code 1, with the value diverged as a run that did;
wait sleeps until interrupted, but not when resumed; files leaves so many in artifacts/bank. A select of --seed 13 ends
with exit code 1 after its first part, once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fake_resolve import options, resolve

from leanlight.runs import config_hash, machine


def main(command: str, words: list[str]) -> int:
    with open(os.environ["FAKE_LOG"], "a") as log:
        env = {"threads": os.environ.get("OMP_NUM_THREADS"), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
        log.write(json.dumps({"argv": [command, *words], **env}) + "\n")
    if command == "export":
        target = Path(words[words.index("--output") + 1])
        target.mkdir(parents=True)
        (target / "weights.bin").write_bytes(b"exported")
        return 0
    return select(words) if command == "select" else fit(command, words)


def select(words: list[str]) -> int:
    target = Path(words[words.index("--output") + 1])
    part = target / ".parts" / "0"
    if "--seed=13" in words and not part.exists():
        part.parent.mkdir(parents=True)
        part.touch()
        return 1
    target.mkdir(parents=True, exist_ok=True)
    record = {"kept": 12, "rho_s": 0.2, "rule": "random", "code_files": ["leanlight/contracts/files.py"]}
    (target / "selection.json").write_text(json.dumps(record))
    (target / "selection.safetensors").write_text(f"{sorted(words[1:-2])} {part.exists()}")
    if part.exists():
        part.unlink()
        part.parent.rmdir()
    return 0


def fit(command: str, words: list[str]) -> int:
    given = options(words)
    if "resume" in given:
        run_dir = Path(given["resume"])
        words = json.loads((run_dir / "words.json").read_text())
        given = options(words) | {"wait": ""}
    else:
        root = Path(given["trainer.default_root_dir"])
        run_dir = root / given["run.method"] / given["run.dataset"] / given["run.id"]
        assert not run_dir.exists(), "a fresh run found its folder taken"
        (run_dir / "checkpoints").mkdir(parents=True)
        (run_dir / "words.json").write_text(json.dumps(words))
    seed = int(given.get("seed_everything", 0))
    summary = {
        "status": "running",
        "method": given["run.method"],
        "dataset": given["run.dataset"],
        "run_id": run_dir.name,
        "command": [command],
        "seed": seed,
        "config_hash": config_hash(resolve(command, words), json.loads(given.get("run.inputs", "{}"))),
        "code_hash": os.environ["FAKE_CODE_HASH"],
        "code_files": ["leanlight/contracts/errors.py"],
        "commit": "c0ffee" * 6,
        "dirty": False,
        "date": "2026-01-02T03:04:05+00:00",
        "data": {"name": "digits", "source": "scikit-learn", "fingerprint": "f" * 64, "counts": {"train": 1}},
        "machine": machine(),
        "wall_s": 2.0,
        "peak_rss_mb": 100.0,
        "peak_cuda_mb": None,
        "samples_seen": 640,
        "metrics": {},
    }
    write(run_dir, summary)
    output = run_dir / ("artifacts/predictions/0.safetensors" if command == "predict" else "checkpoints/last.ckpt")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([given.get("value"), seed]))
    for number in range(int(given.get("files", 0))):
        bank = run_dir / "artifacts" / "bank" / f"{number % 10}"
        bank.mkdir(parents=True, exist_ok=True)
        (bank / f"{number}.txt").write_text(str(number))
    if given.get("fail"):
        print("loading data\nboom: the reason")
        write(run_dir, summary | {"status": "diverged" if given["fail"] == "diverged" else "failed"})
        return 1
    if given.get("wait"):
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            write(run_dir, summary | {"status": "interrupted"})
            return 130
    replicas = int(given.get("model.init_args.replicas", 1))
    values = [
        float(given.get("value", 0.5)) + 0.01 * (seed + i) * float(given.get("slope", 1)) for i in range(replicas)
    ]
    metrics = dict.fromkeys(("test/accuracy", "val/accuracy"), sum(values) / replicas)
    extra = {"replicas": {"test/accuracy": values}} if replicas > 1 else {}
    write(run_dir, summary | {"status": "finished", "metrics": metrics, **extra})
    return 0


def write(run_dir: Path, summary: dict[str, Any]) -> None:
    (run_dir / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
