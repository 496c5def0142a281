"""The site of results: groups and their best, dot plots, pictures kept with the results, sorting and filtering."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import said_by_browser
from html_page import Page
from PIL import Image
from scipy.stats import t

from leanlight.cli.report import main
from leanlight.cli.reproduce import main as reproduce
from leanlight.results import pictures
from leanlight.results.dots import all_dots, draw_dots
from leanlight.results.groups import best_row, group_rows, shared_setting
from leanlight.results.pictures import read_media, store_media

RESULTS = Path("runs/results/classifier")
MEDIA = RESULTS / "media"


def a_row(name: str, *values: float, **setting: Any) -> dict[str, Any]:
    metrics = {}
    if values:
        by_seed = {str(seed): value for seed, value in enumerate(values)}
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        metrics["m"] = {"mean": float(np.mean(values)), "std": std, "n": len(values), "by_seed": by_seed}
    return {"name": name, "label": name, "setting": setting, "metrics": metrics, "overrides": {}}


def a_document(*rows: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
    metric = {"label": "M", "unit": "", "higher_is_better": True, "scale": scale, "digits": 1}
    return {"rows": rows, "metrics": {"m": metric, "other": metric}}


def test_rows_are_grouped_by_what_all_set_and_not_all_alike() -> None:
    rows = [a_row("a", ipc=10, seeds=3), a_row("b", ipc=1, seeds=3), a_row("c", ipc=10, seeds=3, T=4)]
    groups = {name: [row["name"] for row in group] for name, group in group_rows(rows).items()}
    assert groups == {"ipc=10": ["a", "c"], "ipc=1": ["b"]}
    assert shared_setting(rows) == {"seeds": 3}  # said once, above the rows
    assert shared_setting(rows[:1]) == {}


@pytest.mark.parametrize("settings", [[{}, {"T": 4}, {"T": 8}], [{"T": 1}, {"T": 4}, {"T": 8}], [{"T": 4}] * 3])
def test_what_some_rows_set_or_each_sets_otherwise_parts_no_groups(settings: list[dict[str, int]]) -> None:
    rows = [a_row(str(number), **setting) for number, setting in enumerate(settings)]
    assert list(group_rows(rows)) == [""]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_is_marked_only_where_its_interval_parts_from_all_others(sign: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = [a_row(str(n), *(sign * draw.gauss(n * 0.9 * (seed % 3), 0.3) for _ in range(4))) for n in range(3)]
    ends = []
    for row in rows:
        values = list(row["metrics"]["m"]["by_seed"].values())
        ends.append(t.interval(0.95, 3, np.mean(values), np.std(values, ddof=1) / 2))
    # An interval lies on the better side of all others, or none does.
    expected = [
        str(a)
        for a in range(3)
        if all((ends[a][0] > ends[b][1]) if sign > 0 else (ends[a][1] < ends[b][0]) for b in range(3) if b != a)
    ]
    assert best_row(rows, "m", sign > 0) == (expected[0] if expected else None)


def test_one_value_or_one_row_is_never_the_best() -> None:
    assert best_row([a_row("a", 9.0), a_row("b", 1.0)], "m", True) is None
    assert best_row([a_row("a", 9.0, 9.1), a_row("b")], "m", True) is None
    assert best_row([a_row("a", 0.0, 0.0), a_row("b", 0.0, 0.0)], "m", False) is None


def test_dots_lie_where_their_values_lie_on_the_axis() -> None:
    document = a_document(a_row("a", 0.80, 0.82, 0.87), a_row("b", 0.70, 0.75, 0.76), scale=100)
    panel = draw_dots(document, "m")
    assert panel is not None
    (x0, text0), (x1, text1) = panel.ticks[0], panel.ticks[-1]
    per_unit = (x1 - x0) / (float(text1) - float(text0))
    for line, values in zip(panel.lines, ([80, 82, 87], [70, 75, 76]), strict=True):
        low, high = t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / 3**0.5)
        drawn = [*line.seeds, line.mean, line.low, line.high]
        read = [float(text0) + (float(x) - x0) / per_unit for x in drawn if x is not None]
        assert read == pytest.approx([*values, np.mean(values), low, high], abs=0.3)  # a tenth of a pixel
    assert float(text0) > 20  # differences are shown, not the way from zero


def test_an_axis_begins_at_zero_only_where_zero_is_near() -> None:
    near, far = (draw_dots(a_document(a_row("a", 1.0, 1.01), a_row("b", high)), "m") for high in (20.0, 1.3))
    assert near is not None
    assert far is not None
    assert "0" in [text for _, text in near.ticks]
    assert "0" not in [text for _, text in far.ticks]


def test_values_over_many_powers_of_ten_have_a_logarithmic_axis() -> None:
    panel = draw_dots(a_document(a_row("a", 1.0), a_row("b", 100.0), a_row("c", 10_000.0), a_row("d")), "m")
    assert panel is not None
    a, b, c = (line.mean or 0.0 for line in panel.lines[:3])
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert panel.lines[3].mean is None


def test_only_metrics_that_a_row_has_are_drawn_and_groups_have_headings() -> None:
    rows = [a_row("a", 1.0, keep=1), a_row("b", 2.0, keep=2), a_row("c", 3.0, keep=2)]
    (panel,) = all_dots(a_document(*rows))
    assert [(line.label, line.heading) for line in panel.lines] == [
        ("keep=1", True),
        ("a", False),
        ("keep=2", True),
        ("b", False),
        ("c", False),
    ]


def add_picture(run: Path, name: str, color: str = "teal", size: tuple[int, int] = (900, 600)) -> Path:
    path = run / "artifacts" / "media" / "test" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def run_of(row: str, seed: int = 0) -> Path:
    (found,) = Path("runs/classifier/digits").glob(f"two-{row}-s{seed}-*")
    return found


def kept() -> set[str]:
    return {path.name for path in MEDIA.glob("*")}


def test_reproduce_keeps_telling_pictures_of_the_first_seed_small_and_shows_them(suite: Any) -> None:
    table = str(suite.reproduced())
    for name in ("images.png", "samples.png", "prompts.png", "losses.png", "batch.png"):
        add_picture(run_of("good"), name, "teal" if name == "images.png" else "navy")
    add_picture(run_of("good", 1), "images.png", "red")
    assert reproduce([table]) == 0
    assert kept() == {"two_good_s0_images.webp", "two_good_s0_samples.webp"}
    with Image.open(MEDIA / "two_good_s0_images.webp") as picture:
        assert max(picture.size) <= 560
        assert picture.convert("RGB").getpixel((5, 5)) == pytest.approx((0, 128, 128), abs=6)
    main(["--all", "--output", "out"])
    for page in ("index.html", "classifier.html"):
        shown = [a["alt"] for tag, a in Page(Path("out", page).read_text()).tags if tag == "img"]
        assert "good: images" in shown
    assert "![good: images](media/two_good_s0_images.webp)" in (RESULTS / "two.md").read_text()


def test_pictures_outlive_their_runs_and_new_runs_replace_them(suite: Any) -> None:
    table = str(suite.reproduced())
    add_picture(run_of("good"), "images.png")
    add_picture(run_of("bad"), "images.png", "navy")
    reproduce([table])
    shutil.rmtree(run_of("bad") / "artifacts" / "media")
    shutil.rmtree(run_of("good"))
    document = json.loads((RESULTS / "two.json").read_text())
    store_media(RESULTS / "two.json", document, Path("runs"))
    assert kept() == {"two_good_s0_images.webp"}  # the run of `good` is gone, that of `bad` has no picture now
    assert list(read_media(RESULTS / "two.json", document)) == ["good"]


def test_pictures_of_a_table_stay_within_their_budget(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = str(suite.reproduced())
    draw = np.random.default_rng(0)
    for row in ("good", "bad"):
        for name in ("images.png", "samples.png"):
            noise = draw.integers(0, 256, (400, 400, 3), dtype=np.uint8)
            Image.fromarray(noise).save(add_picture(run_of(row), name))
    monkeypatch.setattr(pictures, "MEDIA_BYTES", 150_000)
    reproduce([table])
    assert kept() == {"two_good_s0_images.webp"}
    assert sum(path.stat().st_size for path in MEDIA.glob("*")) <= 150_000


def test_a_picture_that_rows_have_in_common_is_kept_once(suite: Any) -> None:
    table = str(suite.reproduced())
    for row, color in (("good", "navy"), ("bad", "teal")):
        add_picture(run_of(row), "images.png", color)
        add_picture(run_of(row), "samples.png", "red")
    reproduce([table])
    assert kept() == {"two_good_s0_images.webp", "two_good_s0_samples.webp", "two_bad_s0_images.webp"}


def test_an_animation_is_kept_small_with_frames_over_all_its_time(suite: Any) -> None:
    table = str(suite.reproduced())
    colors = [(n, 0, 255 - n) for n in range(0, 240, 2)]
    frames = [Image.new("RGB", (320, 320), color) for color in colors]
    path = add_picture(run_of("good"), "play.gif")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    reproduce([table])
    with Image.open(MEDIA / "two_good_s0_play.webp") as moving:
        assert max(moving.size) == 160
        count = getattr(moving, "n_frames", 1)
        assert 20 <= count <= pictures.MAX_FRAMES
        moving.seek(count - 1)
        assert moving.convert("RGB").getpixel((80, 80)) == pytest.approx((236, 0, 19), abs=12)


def test_pictures_come_from_the_stages_that_a_row_was_made_of(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "m" / "d"
    stages = {"bank": "b" * 64, "unused": "c" * 64, "student": "d" * 64}
    for stage, identity in stages.items():
        add_picture(folder / f"p-{stage}-{identity[:8]}", "bank.png" if stage == "bank" else "samples.png")
    student = folder / f"p-student-{'d' * 8}"
    shutil.rmtree(student / "artifacts")
    (student / "config.yaml").write_text(yaml.safe_dump({"run": {"inputs": {"bank.artifacts.export": "x"}}}))
    run = {"run": f"m/d/{student.name}", "seed": 0, "config_hash": "e" * 64, "stages": stages}
    rows = [a_row(name) | {"stage": "student", "runs": [run]} for name in ("base", "method")]
    rows[0]["overrides"] = {"student.model.real_data": True}
    document = {"stem": "t", "rows": rows}
    found = store_media(tmp_path / "t.json", document, tmp_path / "runs")
    # What both rows share belongs to the one that changes nothing of the pipeline.
    assert [path.name for path in found] == ["t_method_s0_bank.webp"]


DRIVER = """<!doctype html><pre id="said"></pre><iframe id="page" src="out/classifier.html"></iframe><script>
document.getElementById("page").addEventListener("load", () => {
  const page = document.getElementById("page").contentDocument;
  const rows = () => [...page.querySelectorAll("tr.row")].filter(row => row.getClientRects().length);
  const names = () => rows().map(row => row.cells[0].textContent.trim().split(/\\s/)[0]);
  const heads = [...page.querySelectorAll("thead button")];
  const input = page.querySelector("input.filter");
  const type = (text) => { input.value = text; input.dispatchEvent(new Event("input")); };
  const said = {first: names()};
  for (const [what, head] of [["accuracy", 1], ["reversed", 1], ["energy", 2], ["label", 0]]) {
    heads[head].click();
    said[what] = names();
  }
  said.sorted = [...page.querySelectorAll("thead th")].map(head => head.getAttribute("aria-sort"));
  type("KEEP=2 r"); said.filtered = names();
  said.count = page.querySelector(".shown").textContent;
  type("nothing"); said.none = names();
  type(""); said.all = names().length;
  const foreign = page.createElement("script");
  foreign.textContent = "document.documentElement.dataset.foreign = 'ran'";
  page.body.append(foreign);
  said.foreign = page.documentElement.dataset.foreign || "blocked";
  said.width = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  document.getElementById("said").textContent = JSON.stringify(said);
});
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_sorts_within_groups_filters_and_runs_no_foreign_script(suite: Any, width: int) -> None:
    values = {"r0": (1, 0.5), "r1": (1, 0.9), "r2": (2, 0.1), "r3": (2, 0.7), "r4": (2, 0.3), "x5": (2, 0.2)}
    rows = [
        {"name": name, "config": "a.yaml", "overrides": {"value": value}, "setting": {"keep": keep}}
        for name, (keep, value) in values.items()
    ]
    reproduce([str(suite.table(rows=rows, claims=[], seeds=[0]))])
    document = json.loads((RESULTS / "two.json").read_text())
    energies = {"r0": 20.0, "r1": 3.0, "r3": 100.0, "r4": 9.0}  # others have none
    for row in document["rows"]:
        row["metrics"].pop("test/energy_pj", None)
        if row["name"] in energies:
            energy = energies[row["name"]]
            row["metrics"]["test/energy_pj"] = {"mean": energy, "std": None, "n": 1, "by_seed": {"0": energy}}
    (RESULTS / "two.json").write_text(json.dumps(document))
    main(["--all", "--output", "out"])
    said = said_by_browser(DRIVER, width)
    assert said["first"] == list(values)
    assert said["accuracy"] == ["r1", "r0", "r3", "r4", "x5", "r2"]  # higher is better
    assert said["reversed"] == ["r0", "r1", "r2", "x5", "r4", "r3"]
    assert said["energy"][:4] == ["r1", "r0", "r4", "r3"]  # lower is better, those without come last
    assert said["label"] == list(values)
    assert said["sorted"] == ["ascending", *[None] * 5]
    assert said["filtered"] == ["r2", "r3", "r4"]
    assert said["count"] == "3 of 6 rows"
    assert said["none"] == []
    assert said["all"] == 6
    assert said["foreign"] == "blocked"
    assert said["width"] == 0


def test_a_card_draws_the_largest_group_or_that_of_the_headline_and_says_what_it_leaves_out(suite: Any) -> None:
    keeps = {"only": 1, **{f"row{number}": 2 for number in range(18)}}
    rows = [
        {"name": name, "config": "a.yaml", "overrides": {"value": 0.5}, "setting": {"keep": keep}}
        for name, keep in keeps.items()
    ]
    reproduce([str(suite.table(rows=rows, claims=[], seeds=[0])), "--only", "only"])
    document = json.loads((RESULTS / "two.json").read_text())
    measured = document["rows"][0]["metrics"]
    document["rows"] = [row | {"metrics": measured} for row in document["rows"]]
    (RESULTS / "two.json").write_text(json.dumps(document))
    main(["--all", "--output", "out"])
    text = " ".join(Page(Path("out/index.html").read_text()).text.split())
    assert "keep=2; 16 of 18 rows" in text
    assert "row15" in text
    assert "row16" not in text
    document["headline"] = {"metric": "test/accuracy", "rows": ["only"]}
    (RESULTS / "two.json").write_text(json.dumps(document))
    main(["--all", "--output", "out"])
    text = " ".join(Page(Path("out/index.html").read_text()).text.split())
    assert "keep=1" in text
    assert "row15" not in text
