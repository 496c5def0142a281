"""Facts about the sets of samples, known without loading anything."""

from __future__ import annotations

from datamodules.catalog import PlacedSet, entry


class SafetySetInfo(PlacedSet):
    """What is known of a set of samples before it is loaded."""


def _own(name: str, title: str) -> SafetySetInfo:
    return SafetySetInfo(
        name=name,
        title=title,
        facts="instruction, response, image; any labels, categories, explanation, group, topic, split",
        licence="yours",
        origin="your file",
        size_mb=0,
        get="--data.path PATH, --data.images DIR; other names of columns: --data.columns '{instruction: NAME, …}'",
        by_path=True,
    )


_ALL = [
    SafetySetInfo(
        name="shapes",
        title="Made pictures of red and green shapes with words about them; no real harm",
        facts="pictures; instruction, image and response labelled; four categories",
        licence="that of leanlight",
        origin="made by leanlight",
        size_mb=0,
        get="always there; leanlight data prepare shapes writes them as files to ROOT/shapes, to audit",
    ),
    SafetySetInfo(
        name="xstest",
        title="XSTest: answers of five models to 450 prompts that seem harmful or are",
        facts="2,250 samples; instruction and response labelled by people; prompts printed as pictures on demand",
        licence="CC BY 4.0",
        origin="Röttger et al. 2023",
        size_mb=2,
        get="put xstest_v2_completions_*.csv into ROOT/xstest",
        files=("xstest",),
    ),
    SafetySetInfo(
        name="figstep",
        title="FigStep (SafeBench): 500 requests printed as pictures, on ten topics",
        facts="pictures; instruction and image labelled; no answers",
        licence="MIT",
        origin="Gong et al. 2023",
        size_mb=5,
        get="put safebench.csv and the folder safebench with the pictures into ROOT/figstep",
        files=("figstep",),
    ),
    SafetySetInfo(
        name="falcon",
        title="Falcon: questions about pictures with answers",
        facts="57,515 samples; instruction, image and response labelled, with categories and explanations",
        licence="CC BY 4.0",
        origin="Xue et al. 2025",
        size_mb=0,
        get="put the CSV files with their pictures, or the parquet files of zhangrjjj/Falcon, into ROOT/falcon",
        files=("falcon", "Falcon"),
    ),
    SafetySetInfo(
        name="vlguard",
        title="VLGuard: safe pictures with safe and unsafe instructions, unsafe pictures",
        facts="pictures; instruction and image labelled, all answers are safe; 1,558 samples in the test part",
        licence="CC BY-NC 4.0",
        origin="Zong et al. 2024",
        size_mb=0,
        get="put train.json, test.json and the folders train and test of ys-zong/VLGuard into ROOT/vlguard",
        files=("vlguard", "VLGuard"),
    ),
    SafetySetInfo(
        name="beavertails_v",
        title="BeaverTails-V: questions about pictures with answers, by kind of harm",
        facts="pictures; image and response labelled",
        licence="CC BY-NC 4.0",
        origin="PKU-Alignment 2025",
        size_mb=0,
        get="put the parquet files of PKU-Alignment/BeaverTails-V into ROOT/beavertails_v",
        files=("beavertails_v", "BeaverTails-V"),
    ),
    SafetySetInfo(
        name="spa_vl",
        title="SPA-VL: questions about pictures, each with a chosen and a rejected answer",
        facts="pictures; no labels of harm, so for predict alone",
        licence="CC BY 4.0",
        origin="Zhang et al. 2024",
        size_mb=4100,
        get="put the parquet files of sqrti/SPA-VL into ROOT/spa_vl",
        files=("spa_vl", "SPA-VL"),
    ),
    _own("jsonl", "Your own samples as JSONL, or a JSON list: PATH"),
    _own("csv", "Your own samples as CSV or TSV: PATH"),
    _own("parquet", "Your own samples as parquet: PATH"),
]

SAFETY_SETS: dict[str, SafetySetInfo] = {info.name: info for info in _ALL}


def describe(name: str) -> SafetySetInfo:
    """The entry called `name`; UserError with the nearest name if there is none."""
    return entry(name, SAFETY_SETS)
