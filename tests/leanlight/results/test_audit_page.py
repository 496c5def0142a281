"""The page of an audit: hostile answers stay text, nothing is loaded, and what is left out is said."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_cases import ScriptedJudge, says
from html_page import Page
from PIL import Image

from leanlight.contracts import UnreadablePictureError
from leanlight.contracts.safety import SAFETY_FIELDS, SafetySample, Verdict
from leanlight.results import audit_page
from leanlight.results.audit import JudgeFacts, Verdicts, ask, sample_key
from leanlight.results.audit_page import printable, thumbnail, write_page
from leanlight.results.audit_summary import Panel, describe, gate, summarise

FETCH = "fetch('ORIGIN/run')"
HOSTILE = [
    f"<script>{FETCH}</script>",
    f'</div></details></section><img src=ORIGIN/picture onerror="{FETCH}">',
    f'" onload="{FETCH}" autofocus onfocus={FETCH} x="',
    "</style><style>body{background:url(ORIGIN/style)}</style><link rel=stylesheet href=ORIGIN/link>",
    "<svg onload=fetch('ORIGIN/svg')><iframe src=ORIGIN/frame></iframe><base href=ORIGIN/>",
    "<meta http-equiv=refresh content='0;url=ORIGIN/refresh'><form action=ORIGIN/form><button>go</button></form>",
    "{{ 7 * 7 }} {% raw %} javascript:fetch('ORIGIN/scheme') &lt;script&gt; &#x3c;b&#x3e;",
    "\u202eturned\u2066 \x00\x1b[31m \ud83d half of a pair, and a\nsecond line",
]


class DrawnPicture:
    """A picture in memory; one without pixels cannot be read."""

    def __init__(self, name: str, pixels: torch.Tensor | None) -> None:
        self.name, self._pixels = name, pixels
        self.sha256 = name

    def pixels(self) -> torch.Tensor:
        if self._pixels is None:
            raise UnreadablePictureError(f"{self.name}: no picture")
        return self._pixels


def page_of(tmp_path: Path, samples: Sequence[SafetySample], *judges: ScriptedJudge, **limits: float) -> str:
    """The page of an audit of samples."""
    keys, troubles = [], {}
    for row, sample in enumerate(samples):
        key, trouble = sample_key(sample)
        keys.append(key)
        troubles |= {row: trouble} if trouble else {}
    verdicts = Verdicts(tmp_path / "verdicts.jsonl", keys)
    for judge in judges:
        ask(judge, samples, verdicts, verdicts.pending(judge))
    facts = [JudgeFacts(judge.name, judge.name, judge.fields, judge.fingerprint) for judge in judges]
    panel = Panel(samples, facts, [verdicts.of(judge.name, judge.fingerprint) for judge in judges], {})
    summary = describe(HOSTILE[0], None, verdicts, panel) | summarise(panel)
    summary["gate"] = gate(summary, limits)
    write_page(tmp_path / "report.html", panel, verdicts, summary, troubles)
    return (tmp_path / "report.html").read_text()


def hostile_page(tmp_path: Path, origin: str = "https://evil.example") -> tuple[str, list[str]]:
    """A page on which every text that comes from outside is hostile, and these texts."""
    texts = [text.replace("ORIGIN", origin) for text in HOSTILE]
    samples = [
        SafetySample(
            id=f"{text} {number}",
            instruction=text,
            response=text,
            image=DrawnPicture(text, torch.zeros(3, 8, 8, dtype=torch.uint8) if number % 2 else None),
            source=text,
            topic=text,
        )
        for number, text in enumerate(texts)
    ]

    def verdict(sample: SafetySample) -> Verdict:
        failure = sample.response if sample.id.endswith("7") else ""
        labels = dict.fromkeys(SAFETY_FIELDS, None if failure else True)
        return Verdict(labels, explanation=sample.response, text=sample.response, failure=failure)

    judges = ScriptedJudge(texts[1], verdict), ScriptedJudge("plain", says("nothing"), ("response",))
    return page_of(tmp_path, samples, *judges, response=0.1), texts


def test_hostile_text_is_text_and_nothing_else(tmp_path: Path) -> None:
    text, payloads = hostile_page(tmp_path)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "form", "button", "svg", "audio", "video", "a"}
    )
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [a["http-equiv"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a] == [
        "Content-Security-Policy"
    ]
    for payload in payloads[:-1]:
        assert page.text.count(payload) >= 4  # instruction, answer, explanation, text
        assert payload not in text or not set(payload) & set("<>&\"'")
    shown = "\N{REPLACEMENT CHARACTER}turned\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"
    assert shown in page.text
    assert not set(text) & set("\x00\x1b\u202e\u2066\ud83d")


def test_the_page_names_no_place_but_its_own_data(tmp_path: Path) -> None:
    text, _ = hostile_page(tmp_path)
    page = Page(text)
    loads = [
        str(attributes[key])
        for _, attributes in page.tags
        for key in ("src", "srcset", "href", "data", "action", "poster", "background")
        if key in attributes
    ]
    assert loads
    assert all(load.startswith("data:image/jpeg;base64,") for load in loads)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style
    assert "@import" not in style
    styles = [str(attributes["style"]) for _, attributes in page.tags if "style" in attributes]
    assert all(re.fullmatch(r"--share: [\d.]+%", one) for one in styles)
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server and the paths that it has been asked for."""
    asked: list[str] = []

    class Remember(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Remember) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def rendered(page: Path) -> str:
    """The document as Chromium has it after loading and running what it would run."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; the other tests read the page with a parser")
    quiet = ["--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-dev-shm-usage"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [browser, "--headless", "--no-sandbox", *quiet, profile, "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=240, env={**os.environ, "NO_PROXY": "*"}
    )
    assert done.stdout, done.stderr
    return done.stdout


def test_a_browser_loads_nothing_and_runs_nothing_of_the_data(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    origin, asked = server
    control = tmp_path / "control.html"
    control.write_text(f"<body>{HOSTILE[0]}{HOSTILE[1]}".replace("ORIGIN", origin))
    rendered(control)
    assert {"/picture", "/run"} <= set(asked)  # so a page that leaked would be seen
    asked.clear()
    text, _ = hostile_page(tmp_path, origin)
    document = rendered(tmp_path / "report.html")
    assert asked == []
    count = [len(Page(one).tags) for one in (text, document)]
    assert count[0] == count[1]


def disputed(number: int, extra: str = "") -> list[SafetySample]:
    """Samples of which every third is red."""
    return [SafetySample(f"s{n}", f"shape {n}", f"{'red' if n % 3 == 0 else 'green'}{extra}") for n in range(number)]


def shown_rows(text: str) -> list[list[int]]:
    """Numbers of the samples in full, of disagreements and of others."""
    sections = re.split(r"<h2>(?:Disagreements|Other samples)</h2>", text)[1:]
    return [[int(n) for n in re.findall(r'<span class="who">(\d+) ·', section)] for section in sections]


def test_disagreements_come_first_and_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_page, "SHOWN", 4)
    text = page_of(tmp_path, disputed(30), ScriptedJudge("a", says("red")), ScriptedJudge("b", says("nothing")))
    first, others = shown_rows(text)
    assert first == [1, 4, 7, 10]
    assert others == [2, 3, 5, 6]
    words = " ".join(Page(text).text.split())
    assert "10 samples on which judges say opposite things" in words
    assert "The first 4 are here; 6 are left out." in words
    assert "The first 4 are here; 16 are left out." in words
    assert "verdicts.jsonl" in words


def test_the_most_disputed_come_first(tmp_path: Path) -> None:
    wide, narrow, fields = 0.9, 0.55, SAFETY_FIELDS
    samples = [SafetySample(name, "shape", name) for name in ("agreed", "narrow", "wide", "all parts")]

    def one(sample: SafetySample) -> Verdict:
        score = {"agreed": 0.1, "narrow": narrow, "wide": wide, "all parts": narrow}[sample.id]
        parts = fields if sample.id == "all parts" else ("response",)
        return Verdict({f: f in parts and score > 0.5 for f in fields}, {"response": score})

    other = ScriptedJudge("b", lambda sample: Verdict(dict.fromkeys(fields, False), {"response": 0.45}))
    first, others = shown_rows(page_of(tmp_path, samples, ScriptedJudge("a", one), other))
    assert first == [4, 3, 2]
    assert others == [1]


def test_among_the_others_harmful_answers_come_first(tmp_path: Path) -> None:
    (rows,) = shown_rows(page_of(tmp_path, disputed(7), ScriptedJudge("a", says("red"))))
    assert rows == [1, 4, 7, 2, 3, 5, 6]


def test_many_long_samples_fill_the_room_of_the_page_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_page, "PAGE_BYTES", 200_000)
    noise = torch.randint(0, 256, (3, 400, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = [SafetySample(f"s{n}", "x", "<" * 20_000, DrawnPicture(f"p{n}", noise)) for n in range(60)]
    text = page_of(tmp_path, samples, ScriptedJudge("a", says("red")))
    assert 100_000 < len(text) < 230_000
    (rows,) = shown_rows(text)
    assert f"The first {len(rows)} are here; {60 - len(rows)} are left out." in " ".join(Page(text).text.split())
    assert "16,000 more characters are left out" in text


def test_pictures_are_small_jpegs_that_hide_until_a_click(tmp_path: Path) -> None:
    pixels = torch.zeros(3, 500, 1000, dtype=torch.uint8)
    pixels[0] = 200
    sample = SafetySample("s", "shape", "red", DrawnPicture("p", pixels))
    text = page_of(tmp_path, [sample], ScriptedJudge("a", says("red")))
    (image,) = [a for tag, a in Page(text).tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2]))) as decoded:
        assert (decoded.format, decoded.size) == ("JPEG", (320, 160))
        assert decoded.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert abs(decoded.getpixel((100, 100))[0] - 200) < 5  # type: ignore[index]
    order = [tag for tag, a in Page(text).tags if tag in ("label", "input", "img")]
    assert order == ["label", "input", "img"]
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert re.search(r"\.veil img \{ filter: blur", style)
    assert re.search(r"\.veil input:checked \+ img \{ filter: none", style)


def test_a_picture_that_cannot_be_decoded_is_said_in_its_place() -> None:
    assert thumbnail(DrawnPicture("p.png", None)) == {"name": "p.png", "trouble": "p.png: no picture"}


def test_a_gate_that_fails_stands_at_the_top(tmp_path: Path) -> None:
    text = page_of(tmp_path, disputed(3), ScriptedJudge("a", says("red")), response=0.3, image=0.5)
    words = " ".join(Page(text).text.split())
    assert "Failed: 33.3% of all samples have a harmful response; at most 30.0% are allowed." in words
    assert "Passed: 33.3% of all samples have a harmful image; at most 50.0% are allowed." in words


def test_text_is_cut_with_a_count() -> None:
    assert printable("abc", 3) == ("abc", 0)
    assert printable("abcde", 3) == ("abc", 2)
    assert printable("a\u200db\n\tc") == ("a\u200db\n\tc", 0)  # emoji and some scripts need the joiner
