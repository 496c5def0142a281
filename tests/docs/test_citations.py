"""Pages cite a method's paper as the registry does: no initial is guessed, no author left out."""

import re
from pathlib import Path

import pytest
import yaml

from leanlight.registry import METHODS

ROOT = Path(__file__).parents[2]
CITED = [info for info in METHODS.values() if info.citation]
EVERYWHERE = [*ROOT.glob("*.md"), ROOT / "NOTICE", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/methods").glob("*.md")]
EVERYWHERE += [*(ROOT / "lit_modules").glob("*/README.md")]
AUTHOR = r"(?:[A-Z]\. ?)+[A-Z][\w-]+"  # X. Y. Name


def plain(text):
    """Text without Markdown's emphasis and line breaks."""
    return " ".join(re.sub(r"[*_`]", "", text).split())


def invented(text, papers):
    """Who stands in a list of initials and surnames without being so called in the paper (a tuple of authors) meant."""
    people = [{(author[0], author.split()[-1]) for author in authors} for authors in papers]
    wrong = []
    for written in re.findall(rf"{AUTHOR}(?:, (?:and )?{AUTHOR})+", plain(text)):
        names = [(name[0], name.split()[-1].split(".")[-1]) for name in re.findall(AUTHOR, written)]
        shared = [len({name[1] for name in names} & {person[1] for person in paper}) for paper in people]
        if 2 * max(shared) > len(names):  # the list of a paper that the registry knows
            paper = people[shared.index(max(shared))]
            wrong += [f"{initial}. {surname}" for initial, surname in names if (initial, surname) not in paper]
    return wrong


@pytest.mark.parametrize("info", CITED, ids=lambda info: info.name)
@pytest.mark.parametrize("place", ["docs/methods/{}.md", "lit_modules/{}/README.md"])
def test_a_page_cites_the_paper_as_the_registry_does(info, place):
    text = plain((ROOT / place.format(info.name)).read_text())
    paper = info.citation
    for part in (", ".join(paper.authors), paper.title, f"arXiv:{paper.arxiv}"):
        assert plain(part) in text, f"`leanlight methods {info.name}` shows the citation: {paper.text}"


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_list_of_authors_has_an_initial_that_is_not_theirs(path):
    assert invented(path.read_text(), [info.citation.authors for info in CITED]) == []


def test_an_invented_initial_is_found():
    papers = [info.citation.authors for info in CITED]
    assert invented("M. Li, J. Gou, D. Zhang, *S. Liang*", papers) == ["J. Gou"]
    assert (
        invented("M. Li, H. Gou, D. Zhang; Q. Zhan, R. Tao, X. Xie, G. Liu, M. Zhang, H. Tang, Y. Yang", papers) == []
    )
    assert invented("Z. Li, A. Other, B. Other", papers) == []


@pytest.mark.parametrize("info", CITED, ids=lambda info: info.name)
def test_the_notice_names_the_paper(info):
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    assert info.citation.text in notice


@pytest.mark.parametrize("info", CITED, ids=lambda info: info.name)
def test_the_citation_file_refers_to_the_paper(info):
    paper = info.citation
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert len(references) == len(CITED)
    (found,) = [each for each in references if each["title"] == paper.title]
    people = [f"{each['given-names']} {each['family-names']}" for each in found["authors"]]
    assert people == list(paper.authors)
    assert found["identifiers"] == [{"type": "other", "value": f"arXiv:{paper.arxiv}"}]
    assert found["url"] == f"https://arxiv.org/abs/{paper.arxiv}"
    assert found.get("doi", "") == paper.doi
    assert str(found["year"]) in paper.bibtex
    assert found.get("journal", found.get("conference", {}).get("name", "")) == paper.venue
    assert found.get("notes", "") == paper.note
