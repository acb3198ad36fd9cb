"""The page of a study: well-formed, alone in the world, safe, and with every number."""

import copy
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qtool.analysis.attention_page import cumulative, page_of
from qtool.analysis.page import html, standalone
from qtool.analysis.palette import DARK, LIGHT, contrast, ramp, readable
from qtool.analysis.words import Words
from qtool.errors import UnavailableError

CLOSED = {"meta", "path", "rect", "line", "circle"}
"""What may end in `/>`: void in HTML, or of SVG."""


class Reader(HTMLParser):
    """As a browser reads it: what is open, every attribute, the text outside style."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in CLOSED, f"<{tag} /> is open for HTML"
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def xml(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def test_html_and_xml_mean_the_same(study_body: Any) -> None:
    text = html(page_of(study_body()))
    style = next(element.text for element in xml(text).iter("style"))
    assert style and not {"<", ">", "&"} & set(style)
    plain = "".join(xml(text).itertext()).replace(style, "")
    assert plain.split() == read(text).text.split()


def test_nothing_is_loaded_and_nothing_runs(study_body: Any) -> None:
    text = html(page_of(study_body()))
    reader = read(text)
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    assert "url(" not in text and "@import" not in text and "http" not in re.sub(r"http-equiv", "", text)
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in reader.attributes)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes


def test_text_is_escaped(study_body: Any) -> None:
    name = """models/<script>alert("1")</script>&'x"""
    body = study_body(model=name, data=name, architecture=name)
    body["distribution"]["layers"][0]["module"] = name
    text = html(page_of(body))
    assert "<script" not in text
    assert """alert("1")</script>&'x""" in "".join(xml(text).itertext())
    assert "script" not in read(text).tags


def test_numbers_of_the_json_are_on_the_page(study_body: Any) -> None:
    body = study_body()
    shown = read(html(page_of(body))).text
    found = body["distribution"]
    for item in [found["all"], *(head for layer in found["layers"] for head in [layer["all"], *layer["heads"]])]:
        for count in item["counts"] if item is found["all"] else ():
            assert f"{100 * count / item['pairs']:.2f} %" in shown
        if item is not found["all"]:
            for share in item["sparsity"]:
                assert f"{100 * share:.2f} %" in shown
            for value in (f"{item['half_mean']:.2f}", f"{item['entropy']:.3f}", f"{item['dispersion']:.3f}"):
                assert value in shown
    for point in body["points"]:
        low, high = (f"{end:+.2f}".replace("-", "−") for end in point["interval"])
        for value in (f"{point['score']:.2f}", f"[{low}, {high}]", f"{point['agreement']:.2f} %", f"{point['kl']:.3g}"):
            assert value in shown
        assert f"{100 * point['zeros']:.1f} %" in shown
    for value in ("88.99", "872 examples", "mean length 24.6 tokens", "some-model"):
        assert value in shown


def test_every_figure_says_what_it_shows(study_body: Any) -> None:
    tree = xml(html(page_of(study_body())))
    figures = [svg for svg in tree.iter("svg") if svg.get("role") == "img"]
    names = [name for name, _ in page_of(study_body()).figures()]
    assert len(figures) == len(names) == len(set(names))
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for svg in figures:
        title, described = (svg.get("aria-labelledby") or "").split()
        assert {title, described} <= set(ids)
        assert svg[0].text and svg[1].text and len(svg[1].text) > 20


@pytest.mark.parametrize("shape", [(1, 1), (6, 12), (30, 9), (2, 64)])
def test_figures_stay_inside(study_body: Any, shape: tuple[int, int]) -> None:
    for name, svg in page_of(study_body(*shape)).figures():
        _, _, wide, high = map(float, svg.get("viewBox", "").split())
        for rect in svg.iter("rect"):
            x, y, width, height = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
            assert min(x, y) >= -1 and x + width <= wide + 1 and y + height <= high + 1, name
            assert min(width, height) > 0, name
        for circle in svg.iter("circle"):
            assert 0 <= float(circle.get("cx", 0)) <= wide and 0 <= float(circle.get("cy", 0)) <= high, name


def test_studies_without_scores_or_numbers(study_body: Any) -> None:
    """No sweep; a model that gave NaN; a task without agreement; perplexities that explode."""
    assert "Pruning" not in [section.kicker for section in page_of(study_body(points=[])).sections]
    broken = study_body()
    for point in broken["points"][:4]:
        point.update(score=None, drop=None, interval=[None, None], agreement=None, kl=None)
    assert "– unchanged" not in html(page_of(broken))
    xml(html(page_of(broken)))
    wild = study_body(metric="perplexity")
    wild["points"][-1].update(score=1.3e6, drop=1.2e6, interval=[1e6, 2e6], kl=None)
    assert "1,300,000.00" in html(page_of(wild))
    single = study_body()
    single["points"] = [copy.deepcopy(single["points"][1])]
    xml(html(page_of(single)))


def test_cumulative_shares(study_body: Any) -> None:
    found = study_body()["distribution"]["all"]
    curve = cumulative(found)
    assert curve[0] == 7 / found["pairs"] and curve[-1] == pytest.approx(1.0)
    assert curve[3] == pytest.approx((7 + sum(found["counts"][:3])) / found["pairs"])


def test_words_say_what_points_say(study_body: Any) -> None:
    body = study_body()
    drops = {
        ("log", 2): 5.0,
        ("log", 3): 0.4,
        ("log", 8): -0.2,
        ("linear", 2): 0.1,
        ("linear", 3): 3.0,
        ("linear", 8): 2.0,
    }
    for point in body["points"]:
        if point["bits"] is not None and point["threshold"] is not None:
            point["drop"] = drops[point["mapping"], point["bits"]]
    words = Words(body)
    # 2 linear bits are luck: more bits lose more.
    assert words.codes_headline(1e-3) == (
        "3 log bits keep accuracy within 1\N{NO-BREAK SPACE}point of float; no linear code that was tried does"
    )
    for point, drop in zip(words.pruning, (0.0, 0.9, 1.1), strict=True):
        point["drop"], point["zeros"] = drop, 0.48
    assert "Up to a threshold of 0.001, which makes 48\N{NO-BREAK SPACE}% of" in words.pruning_headline()
    assert "Unfinished: 5 of 20" in " ".join(Words({**body, "complete": False, "planned": 20}).finding())


def test_text_can_be_read_on_every_colour() -> None:
    for theme in (LIGHT, DARK):
        for colour in (*ramp(theme.sequential), *ramp(theme.diverging)):
            assert contrast(colour, readable(colour)) >= 4.5
        for name in ("ink", "soft", "log", "linear", "prune", "best"):
            assert min(contrast(theme.named[name], theme.named[on]) for on in ("paper", "card")) >= 4.5, name
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)


def test_ramps_begin_and_end_at_their_anchors() -> None:
    found = ramp(["#102030", "#ffffff", "#0a6b78"], 5)
    assert (found[0], found[2], found[4]) == ("#102030", "#ffffff", "#0a6b78")


def test_a_figure_alone_needs_no_page(study_body: Any) -> None:
    for _, figure in page_of(study_body()).figures():
        text = standalone(figure)
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text


def test_pictures(study_body: Any, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="pip install 'qtool[report]'")
    from qtool.analysis.picture import ZOOM, write_png

    figure = dict(page_of(study_body()).figures())["sparsity"]
    write_png(standalone(figure), tmp_path / "figure.png")
    picture = (tmp_path / "figure.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    wide, high = struct.unpack(">II", picture[16:24])
    _, _, own, other = map(float, figure.get("viewBox", "").split())
    assert (wide, high) == pytest.approx((ZOOM * (own + 28), ZOOM * (other + 54)), abs=1.5)  # margins and a title


def test_pictures_without_the_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.analysis import picture

    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip install 'qtool\[report\]'"):
        picture.require_renderer()


def test_a_page_that_is_passed_on_names_no_folders(study_body: Any) -> None:
    body = study_body() | {"model": "/home/somebody/some-model", "data": "/home/somebody/validation.jsonl"}
    text = html(page_of(body))
    assert "some-model" in text and "validation.jsonl" in text and "somebody" not in text
