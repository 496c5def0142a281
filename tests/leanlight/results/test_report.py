"""`leanlight report`: one safe, self-contained page; Markdown; README tables."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from html_page import Page
from matplotlib.figure import Figure
from PIL import Image

from leanlight.cli.report import main
from leanlight.cli.reproduce import main as reproduce
from leanlight.contracts import UserError
from leanlight.results import figures, pictures, report
from leanlight.results import page as page_module
from leanlight.results.figures import draw_means
from leanlight.results.format import paper_delta, show_measured, show_seconds
from leanlight.results.markdown import BEGIN, END, data_sources
from leanlight.results.pictures import load_picture
from leanlight.results.profile import confidence_band, shares_above

EVIL = (
    "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\" onload='x' $x^2$ | [a](javascript:1)"
)
RESULTS = Path("runs/results/classifier")
PAGES = ("index.html", "classifier.html")


def _evil_table(suite: Any) -> Path:
    content = yaml.safe_load(suite.table().read_text())
    for row in content["rows"]:
        row |= {"label": EVIL, "setting": {"width": EVIL}}
    figure = {"value": 91.2, "setting": {"width": 128}, "source": EVIL}
    content["rows"][0]["paper"] = {"test/accuracy": figure}
    content["metrics"]["test/accuracy"] |= {"label": EVIL, "unit": "<b>"}
    content["claims"][0]["text"] = EVIL
    return suite.table(**{**content, "title": EVIL, "note": EVIL})


def _add_media(row: str, size: tuple[int, int] = (60, 40)) -> Path:
    (run_dir,) = Path("runs/classifier/digits").glob(f"two-{row}-s0-*")
    folder = run_dir / "artifacts" / "media" / "test"
    folder.mkdir(parents=True)
    Image.new("RGB", size, "teal").save(folder / "images.png")
    return folder


def test_hostile_text_stays_text(suite: Any) -> None:
    assert reproduce([str(_evil_table(suite))]) == 0
    assert main(["--all", "--output", "out"]) == 0
    for name in PAGES:
        page = Page(Path("out", name).read_text())
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert EVIL in page.text
    drawing = (RESULTS / "two.svg").read_text()
    ElementTree.fromstring(drawing)
    assert "<script" not in drawing
    assert "<img" not in drawing
    markdown = (RESULTS / "two.md").read_text()
    assert "<script>" not in markdown
    assert "<img" not in markdown
    assert "](javascript" not in markdown.replace("\\]", "")


def test_pages_load_nothing_and_run_their_own_script_alone(suite: Any) -> None:
    reproduce([str(_evil_table(suite))])
    _add_media("good")
    main(["--all", "--output", "out"])
    assert sorted(Path("out").iterdir()) == sorted(Path("out", name) for name in PAGES)
    for name in PAGES:
        text = Path("out", name).read_text()
        page = Page(text)
        loads = [a[key] for _, a in page.tags for key in ("src", "srcset", "data", "action", "poster") if key in a]
        assert any(str(load).startswith("data:image/webp;base64,") for load in loads)
        assert all(str(load).startswith("data:image/") for load in loads)
        links = {str(a["href"]).partition("#")[0] for _, a in page.tags if "href" in a}
        assert {link for link in links if ":" in link} <= {"https://arxiv.org/abs/2310.14839"}
        assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
        (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
        assert "url(" not in style
        assert "@import" not in style
        (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
        hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
        (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
        expected = "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'"
        assert policy == expected.format(*hashes)
        assert not [a for _, a in page.tags if "style" in a]


def test_links_between_pages_lead_to_pages(suite: Any) -> None:
    suite.reproduced()
    main(["--all", "--output", "out"])
    pages = {name: Page(Path("out", name).read_text()) for name in PAGES}
    anchors = {name: {str(a["id"]) for _, a in page.tags if "id" in a} for name, page in pages.items()}
    links = [str(a["href"]) for page in pages.values() for tag, a in page.tags if tag == "a"]
    assert {link.partition("#")[0] for link in links} >= set(PAGES)
    for target, _, anchor in (link.partition("#") for link in links if ".html" in link):
        assert not anchor or anchor in anchors[target]


def test_results_given_by_name_are_one_page(suite: Any) -> None:
    suite.reproduced()
    main([str(RESULTS / "two.json"), "--output", "out"])
    assert list(Path("out").iterdir()) == [Path("out/index.html")]
    text = Path("out/index.html").read_text()
    assert "82.0 ± 2.0" in text
    assert "No results yet" not in text


def test_a_page_links_configs_and_code_of_its_checkout(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("configs/a.yaml", "docs/methods/classifier.md", "lit_modules/classifier/module.py"):
        Path(place).parent.mkdir(parents=True)
        Path(place).write_text("")
    monkeypatch.setattr(page_module, "config_root", lambda: Path("configs"))
    rows = [{"name": "good", "config": "a.yaml"}, {"name": "bad", "config": "b.yaml"}]
    reproduce([str(suite.table(rows=rows, claims=[]))])
    document = json.loads((RESULTS / "two.json").read_text())
    document["rows"][0]["config"], document["rows"][1]["config"] = "a", "../../../etc/passwd"
    (RESULTS / "two.json").write_text(json.dumps(document))
    main(["--all", "--output", "out"])
    links = {str(a["href"]) for tag, a in Page(Path("out/classifier.html").read_text()).tags if tag == "a"}
    assert links >= {"../configs/a.yaml", "../docs/methods/classifier.md", "../lit_modules/classifier"}
    assert all(Path("out", link).exists() for link in links if link.startswith("../"))
    assert not any("passwd" in link for link in links)


def test_figures_verdicts_and_provenance_are_on_the_page(suite: Any) -> None:
    suite.reproduced()
    main(["--all", "--output", "out"])
    text = " ".join(Page(Path("out/classifier.html").read_text()).text.split())
    for expected in (
        "82.0 ± 2.0",
        "61.0 ± 1.0",
        "reproduced",
        "good beats bad",
        "lies above 0.1",
        "c0ffeec0ffee",
        "2026-01-02",
        "leanlight reproduce two.yaml",
        "scikit-learn",
        "Reduced scale: nothing here confirms or refutes a figure of a paper.",
        "--value=0.6",
    ):
        assert expected in text
    markdown = (RESULTS / "two.md").read_text()
    assert "| good | 82.0 ± 2.0 |" in markdown
    assert "| good beats bad | reduced | **reproduced** |" in markdown


def test_the_same_results_give_the_same_files(suite: Any) -> None:
    suite.reproduced()
    main(["--all", "--output", "out"])
    files = [RESULTS / "two.md", RESULTS / "two.svg", *(Path("out", name) for name in PAGES)]
    before = [path.read_bytes() for path in files]
    main(["--all", "--output", "out"])
    assert [path.read_bytes() for path in files] == before


def test_incomplete_stale_and_dirty_are_said(suite: Any, rewrite: Any) -> None:
    suite.reproduced()
    (good,) = Path("runs/classifier/digits").glob("two-good-s1-*")
    rewrite(good, code_hash="older", dirty=True)
    (bad,) = Path("runs/classifier/digits").glob("two-bad-s1-*")
    rewrite(bad, status="diverged")
    reproduce(["two.yaml"])
    main(["--all", "--output", "out"])
    text = Page(Path("out/classifier.html").read_text()).text
    for expected in ("Incomplete", "Stale", "uncommitted changes", "bad, seed 1: diverged"):
        assert expected in text


def test_a_performance_profile_is_drawn_where_a_table_asks_for_it(suite: Any) -> None:
    groups = {"ours": ["good"], "theirs": ["bad"]}
    reproduce([str(suite.table(profile={"metric": "test/accuracy", "groups": groups}))])
    main(["--all", "--output", "out"])
    images = [a for tag, a in Page(Path("out/classifier.html").read_text()).tags if tag == "img"]
    assert "Performance profile over tasks and seeds" in [a["alt"] for a in images]
    with Image.open(RESULTS / "two_profile.png") as figure:
        assert min(figure.size) > 100


def _figures_of(page: Path) -> list[str | None]:
    return [a["alt"] for tag, a in Page(page.read_text()).tags if tag == "img"]


def test_means_over_a_setting_are_drawn_where_a_table_asks_for_it(suite: Any) -> None:
    rows = [
        {"name": name, "config": "a.yaml", "overrides": {"value": value}, "setting": {"keep": keep}}
        for name, value, keep in (("more", 0.8, 0.2), ("less", 0.6, 0.01), ("other", 0.5, 0.01))
    ]
    curve = {"x": "keep", "metric": "test/accuracy", "groups": {"one": ["more", "less"], EVIL: ["other"]}}
    reproduce([str(suite.table(rows=rows, claims=[], curves=[curve])), "--only", "more"])
    results = RESULTS / "two.json"
    main(["--all", "--output", "out"])  # the other rows have no runs yet
    reproduce(["two.yaml"])
    main(["--all", "--output", "out"])
    caption = "Accuracy over keep, mean and 95 % interval"
    markdown = (RESULTS / "two.md").read_text()
    assert f"![{caption}](two_over_1.png)" in markdown
    assert caption in _figures_of(Path("out/classifier.html"))
    with Image.open(RESULTS / "two_over_1.png") as figure:
        assert min(figure.size) > 100
    document = json.loads(results.read_text())
    del document["curves"]
    results.write_text(json.dumps({**document, "curve": curve}))  # as results were written that had one curve at most
    main(["--all", "--output", "out"])
    assert (RESULTS / "two.md").read_text() == markdown


def test_metrics_over_severity_are_drawn_a_line_a_row_and_a_figure_a_curve(
    suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = {0: "test/accuracy", 1: "summary/one", 5: "summary/five"}
    shown = {"label": "Noisy", "higher_is_better": True, "unit": "%", "scale": 100, "optional": True, "column": False}
    metrics = yaml.safe_load(suite.table().read_text())["metrics"] | {"summary/one": shown, "summary/five": shown}
    curves = [{"title": title, "x": "severity", "at": at} for title in ("Gaussian", EVIL)]
    reproduce([str(suite.table(metrics=metrics, curves=curves))])
    results = RESULTS / "two.json"
    document = json.loads(results.read_text())
    document["rows"][0]["metrics"]["summary/five"] = {"mean": 0.3, "std": 0.1, "n": 2, "by_seed": {"0": 0.2, "1": 0.4}}
    results.write_text(json.dumps(document))
    drawn: list[Any] = []
    draw_means = figures.draw_means
    monkeypatch.setattr(report, "draw_means", lambda *args: drawn.append(args[:4]) or draw_means(*args))
    main(["--all", "--output", "out"])
    accuracy = {
        row["name"]: [100 * v for v in row["metrics"]["test/accuracy"]["by_seed"].values()] for row in document["rows"]
    }
    lines = {"good": [(0.0, accuracy["good"]), (5.0, [20.0, 40.0])], "bad": [(0.0, accuracy["bad"])]}
    assert drawn[0] == (lines, "Gaussian", "severity", "%")
    images = _figures_of(Path("out/classifier.html"))
    assert "Gaussian over severity, mean and 95 % interval" in images
    assert f"{EVIL} over severity, mean and 95 % interval" in images
    assert not any("Noisy" in str(image) for image in images)
    markdown = (RESULTS / "two.md").read_text()
    assert "two_over_1.png" in markdown
    assert "two_over_2.png" in markdown
    assert "Noisy" not in markdown
    assert "<img" not in markdown


def test_a_curve_has_means_and_intervals_of_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    figures_drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png", lambda figure: figures_drawn.append(figure) or b"")
    draw_means({"a": [(0.01, [1.0, 2.0, 3.0]), (0.2, [5.0])], "b": [(0.2, [1.0, 2.0, 3.0])]}, "Accuracy", "keep", "%")
    (axes,) = figures_drawn[0].axes
    line, single = axes.containers
    assert line[0].get_xydata().tolist() == [[0.01, 2.0], [0.2, 5.0]]
    half = 4.302652729696142 / 3**0.5  # t of 2 degrees of freedom at 97.5 %, a deviation of 1
    corners = axes.collections[0].get_paths()[0].vertices
    assert sorted({y for x, y in corners if x == 0.01}) == pytest.approx([2 - half, 2 + half])
    assert {y for x, y in corners if x == 0.2} == {5.0}
    (bar,) = single[2][0].get_segments()
    assert bar[:, 1] == pytest.approx((2 - half, 2 + half))
    assert axes.get_xscale() == "log"


def test_shares_of_runs_above_a_threshold_weigh_tasks_alike() -> None:
    scores, thresholds = [[1.0, 3.0], [2.0, 2.0, 5.0, 5.0]], np.array([0.0, 1.0, 2.0, 4.0, 5.0])
    assert shares_above(scores, thresholds).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    low, high = confidence_band(scores, thresholds)
    assert (low <= shares_above(scores, thresholds)).all()
    assert (high >= shares_above(scores, thresholds)).all()
    assert (low[0], high[0], low[-1], high[-1]) == (1.0, 1.0, 0.0, 0.0)
    # Task one has 0, 1 or 2 of 2 above 2 with chances 1/4, 1/2, 1/4; task two 0 to 4 of 4 by a fair coin.
    assert low[2] <= 0.25
    assert high[2] >= 0.75


def test_learning_curves_of_run_folders_are_shown_and_kept(suite: Any) -> None:
    suite.reproduced()
    main(["--all", "--output", "out"])
    assert "on validation data" not in Path("out/classifier.html").read_text()
    assert not (RESULTS / "two_curves.png").exists()
    (run_dir,) = Path("runs/classifier/digits").glob("two-good-s0-*")
    (run_dir / "metrics.csv").write_text("step,progress/step,val/accuracy\n1,1,0.1\n2,2,\n3,3,0.5\n4,4,nan\n5,5,0.7\n")
    main(["--all", "--output", "out"])
    assert "Accuracy (%) on validation data" in _figures_of(Path("out/classifier.html"))
    with Image.open(RESULTS / "two_curves.png") as figure:
        assert min(figure.size) > 100
    # where there are no runs, those drawn are kept
    main([str(RESULTS / "two.json"), "--output", "out", "--runs-root", "elsewhere"])
    assert "two_curves.png" in (RESULTS / "two.md").read_text()
    assert "Learning curves, means over seeds" in _figures_of(Path("out/index.html"))


def test_a_run_outside_the_runs_root_is_never_read(suite: Any) -> None:
    suite.reproduced()
    secret = suite.folder.parent / "secret" / "artifacts" / "media" / "test"
    secret.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(secret / "images_private.png")
    path = RESULTS / "two.json"
    document = json.loads(path.read_text())
    document["rows"][0]["runs"][0]["run"] = "../../secret"
    path.write_text(json.dumps(document))
    main([str(path), "--output", "out"])
    assert "private" not in Path("out/index.html").read_text()


def test_pictures_that_are_too_large_or_none_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "good.png"
    Image.new("L", (20, 10), 7).save(good)
    assert load_picture(good, "c") is not None
    fake = tmp_path / "fake.png"
    fake.write_text("<svg onload='alert(1)'/>")
    assert load_picture(fake, "c") is None
    half = tmp_path / "half.png"
    half.write_bytes(good.read_bytes()[:40])
    assert load_picture(half, "c") is None
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    assert load_picture(good, "c") is None
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    assert load_picture(good, "c") is None


def test_nothing_but_pixels_of_a_picture_reaches_the_page(tmp_path: Path) -> None:
    path = tmp_path / "noted.png"
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("Comment", "from a private machine")
    Image.new("RGB", (8, 8), "red").save(path, pnginfo=note)
    picture = load_picture(path, "c")
    assert picture is not None
    assert b"private" not in base64.b64decode(picture.uri.partition(",")[2])


def test_an_animation_stays_one(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    picture = load_picture(tmp_path / "a.gif", "c")
    assert picture is not None
    with Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))) as decoded:
        assert getattr(decoded, "n_frames", 1) == 3


def test_a_difference_to_the_paper_is_shown_only_where_settings_match() -> None:
    metric = {"scale": 100, "unit": "%", "digits": 1, "label": "A", "higher_is_better": True}
    row = {
        "setting": {"ipc": 1, "epochs": 200},
        "metrics": {"a": {"mean": 0.9, "std": 0.01, "n": 3}},
        "paper": {"a": {"value": 91.2, "setting": {"ipc": 1, "epochs": 200}, "source": "Table 1"}},
    }
    assert paper_delta(row, "a", metric) == pytest.approx(-1.2)
    assert paper_delta({**row, "setting": {"ipc": 1, "epochs": 5}}, "a", metric) is None
    assert paper_delta({**row, "setting": {"ipc": 1}}, "a", metric) is None
    assert paper_delta({**row, "metrics": {}}, "a", metric) is None
    bare = {"value": 91.2, "setting": {}, "source": "Table 1"}
    assert paper_delta({**row, "setting": {}, "paper": {"a": bare}}, "a", metric) is None


def test_numbers_read_as_expected() -> None:
    metric = {"scale": 100, "unit": "%", "digits": 1}
    assert show_measured({"mean": 0.9123, "std": 0.004, "n": 3}, metric) == "91.2 ± 0.4 %"
    assert show_measured({"mean": 0.9123, "std": None, "n": 1}, metric) == "91.2 %"
    assert show_measured(None, metric) == "\N{EN DASH}"
    assert [show_seconds(s) for s in (None, 3.21, 42, 210, 9000)] == [
        "\N{EN DASH}",
        "3.2 s",
        "42 s",
        "3.5 min",
        "2.5 h",
    ]


def test_the_overview_says_what_the_table_names_as_its_headline(suite: Any) -> None:
    content = yaml.safe_load(suite.table().read_text())
    content["headline"] = {"metric": "test/accuracy", "rows": ["bad", "good"]}
    table = Path("headed.yaml")
    table.write_text(yaml.safe_dump(content))
    reproduce([str(table)])
    assert json.loads((RESULTS / "headed.json").read_text())["headline"] == content["headline"]
    assert main(["--all", "--output", "out"]) == 0
    assert "Accuracy: bad 61.0 ± 1.0 %; good 82.0 ± 2.0 %" in Path("out/index.html").read_text()


def test_readme_tables_are_rewritten_between_their_markers(suite: Any) -> None:
    reproduce([str(suite.reproduced()), "--publish"])
    own = Path("lit_modules/classifier/README.md")
    own.parent.mkdir(parents=True)
    for path in (Path("README.md"), own):
        path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--all", "--readme", "--output", "out"]) == 0
    readme, method = Path("README.md").read_text(), own.read_text()
    for text in (readme, method):
        assert text.startswith(f"before\n{BEGIN}\n")
        assert text.endswith(f"\n{END}\nafter\n")
        assert "old" not in text
    assert "[Two rows](docs/results/classifier/two.md) | reduced | Accuracy: good 82.0 ± 2.0 %" in readme
    assert "best of the others: bad 61.0 ± 1.0 % | 1 reproduced |" in readme
    assert "| good | 82.0 ± 2.0 |" in method
    before = readme
    main(["--all", "--readme", "--output", "out"])
    assert Path("README.md").read_text() == before


def test_a_table_of_this_machine_stands_above_the_published_one(suite: Any) -> None:
    published = ["--publish", "--only", "good", "--seed", "0"]
    reproduce([str(suite.reproduced()), *published])
    assert main(["--all", "--output", "out"]) == 0
    assert Path("out/classifier.html").read_text().count('id="table-') == 1
    assert (RESULTS / "two.md").is_file()
    assert not Path("docs/results/classifier/two.md").exists()
    Path("runs/results").rename("aside")
    assert main(["--all", "--output", "out"]) == 0
    assert Path("docs/results/classifier/two.md").is_file()


def test_a_readme_without_markers_is_named_and_none_is_written(suite: Any) -> None:
    reproduce([str(suite.reproduced()), "--publish"])
    Path("README.md").write_text(f"{BEGIN}\nold\n{END}\n")
    with pytest.raises(UserError, match=r"--readme: no file lit_modules/classifier/README.md"):
        main(["--all", "--readme", "--output", "out"])
    assert "old" in Path("README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either result files or --all"),
        (["x.json", "--all"], "expected either result files or --all"),
        (["--all"], "no results in docs/results or runs/results; `leanlight reproduce TABLE` writes them"),
        (["x.json"], "x.json: no such file"),
        (["other.json"], "other.json: not a result table"),
        (["half.json"], "half.json: a table has no 'checkpoint_rule'; write it anew"),
    ],
)
def test_a_wrong_input_is_one_line(suite: Any, arguments: list[str], message: str) -> None:
    Path("other.json").write_text("[1]")
    Path("half.json").write_text(json.dumps({"format": 1, "rows": [], "claims": []}))
    with pytest.raises(UserError, match=re.escape(message)):
        main(arguments)


def test_of_many_data_sets_a_page_names_the_first_and_says_how_many_there_are() -> None:
    made = [{"name": "bank", "source": "a run", "fingerprint": f"{seed:012d}"} for seed in range(7)]
    *named, rest = data_sources({"rows": [{"data": made}, {"data": made}]})
    assert [line.split()[-1] for line in named] == [f"{seed:012d})" for seed in range(5)]
    assert rest == "and 2 more, which the JSON names"
    assert len(data_sources({"rows": [{"data": made[:5]}]})) == 5
