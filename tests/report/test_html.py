"""The page is self-contained, escaped, and says what is due."""

import re
from html.parser import HTMLParser

import pytest

from invrecon.errors import InputError
from invrecon.metrics import summarise, summarise_by
from invrecon.report.html import Comparison, Figure, write_report

PNG = b"\x89PNG\r\n\x1a\nnot really"
HOSTILE = "<script>alert('1')</script>\"onload=x ${title} $sections"


class Page(HTMLParser):
    """Collects tags and attributes, and checks that what opens closes."""

    VOID = frozenset({"meta", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def make_rows(**extra) -> list[dict]:
    return [
        {"case": "lung", "slice": i, "patient": "p", "method": m, "psnr": p + i, "seconds": 1.0, **extra}
        for m, p in (("FBP", 20.0), ("TV", 30.0))
        for i in range(3)
    ]


def write(tmp_path, **changes) -> str:
    rows = changes.pop("rows", make_rows())
    options = {
        "facts": {"Data": "lung.h5", "Seed": 0, "Versions": {"torch": "2"}, "Nothing": None},
        "summary": summarise_by(rows),
        "rows": rows,
        "figures": [Figure(PNG, "the lung")],
        "config_text": "a: 1",
        **changes,
    }
    return write_report(tmp_path / "report.html", **options).read_text(encoding="utf-8")


def test_the_page_is_complete_and_self_contained(tmp_path):
    text = write(
        tmp_path,
        title="A lung",
        command="invrecon test",
        comparisons=[Comparison({"Reference": PNG, "FBP": PNG, "Ours": PNG}, "slide")],
    )
    page = Page(text)
    words = " ".join(page.texts)
    for expected in (
        "A lung",
        "lung.h5",
        "torch 2",
        "21.00",
        "PSNR [dB]",
        "the lung",
        "a: 1",
        "invrecon test",
    ):
        assert expected in words
    assert "Nothing" not in words and "inverse crime" in words and "one patient" in words
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_hostile_names_are_escaped(tmp_path):
    text = write(
        tmp_path,
        rows=make_rows(case=HOSTILE, note=HOSTILE),
        facts={HOSTILE: HOSTILE, "x": {HOSTILE: HOSTILE}},
        figures=[Figure(PNG, HOSTILE)],
        config_text=HOSTILE,
        title=HOSTILE,
        subtitle=HOSTILE,
        command=HOSTILE,
        notes=[HOSTILE],
        summary={HOSTILE: {HOSTILE: summarise(make_rows())}},
        comparisons=[Comparison({HOSTILE: PNG, "b": PNG}, HOSTILE)],
    )
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [attrs for _, attrs in page.tags if "onload" in attrs]
    assert "".join(page.texts).count(HOSTILE) >= 12


def test_the_best_of_each_group_is_bold(tmp_path):
    groups = {"20 views": summarise_by(make_rows()), "60 views": summarise_by(make_rows())}
    assert re.findall(r"<b>([^<]*)</b>", write(tmp_path, summary=groups)) == ["31.00", "31.00"]
    assert "<b>" not in write(tmp_path, summary=summarise(make_rows()))


def test_without_a_reference_the_notes_say_so(tmp_path):
    rows = [{"case": "scan", "slice": 0, "relative_residual": 0.01}]
    text = write(tmp_path, rows=rows, summary=None)
    assert "no reference" in text and "inverse crime" not in text
    Page(write(tmp_path, rows=[], summary=None, figures=[], facts={}))


def test_a_figure_that_is_gone_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Cannot read the figure .*gone\.png"):
        write(tmp_path, figures=[tmp_path / "gone.png"])
    assert not (tmp_path / "report.html").exists()
