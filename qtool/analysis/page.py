"""One self-contained HTML page of findings, figures and tables: no script, nothing loaded from elsewhere.

The page is well-formed XML as well as HTML, so that it can be checked. Everything is built of elements: text is escaped
by construction.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from qtool.analysis.palette import DARK, LIGHT, css, literal
from qtool.analysis.style import FIGURES, PAGE

Figure = tuple[str, Element]
"""A name for files, and an `<svg>`."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; the first `texts` columns are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True)
class Group:
    """Figures side by side under a title: `wide` ones one below the other, `small` ones many in a row; `folded` ones
    are shown when they are asked for."""

    title: str
    note: str
    figures: Sequence[Figure]
    layout: str = "pair"
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A headline that says what was found, what to look for, figures, and tables with the exact numbers."""

    kicker: str
    headline: str
    text: str
    groups: Sequence[Group] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Tile:
    """A number worth a large type, what it is, and a remark."""

    value: str
    label: str
    remark: str


@dataclass(frozen=True)
class Page:
    """`finding` is the page in one paragraph; `facts` say how it was measured, `notes` what words mean."""

    kicker: str
    title: str
    finding: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()

    def figures(self) -> list[Figure]:
        """Every figure of the page, in its order."""
        return [item for section in self.sections for group in section.groups for item in group.figures]


def html(page: Page) -> str:
    """The whole document."""
    root = Element("html", {"lang": "en"})
    _head(root, page)
    body = SubElement(root, "body")
    main = SubElement(body, "main")
    _masthead(main, page)
    for section in page.sections:
        _section(main, section)
    _colophon(main, page)
    indent(root, space=" ")
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode") + "\n"


_MARGIN, _HEADING = 14.0, 26.0


def standalone(figure: Element) -> str:
    """A figure with its title as an SVG file of its own, on light paper, with literal colours: any reader of SVG can
    show it."""
    root = copy.deepcopy(figure)
    _, _, wide, high = map(float, root.get("viewBox", "").split())
    # Small multiples have their title inside.
    above = 0.0 if any(text.get("class") == "panel" for text in root.iter("text")) else _HEADING
    left, top, width, height = -_MARGIN, -_MARGIN - above, wide + 2 * _MARGIN, high + above + 2 * _MARGIN
    for name, value in (("viewBox", f"{left} {top} {width} {height}"), ("width", str(width)), ("height", str(height))):
        root.set(name, value)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    if above:
        heading = SubElement(root, "text", {"x": "0", "y": str(top + _MARGIN + 12), "class": "heading"})
        heading.text = _title(figure)
    paper = {"x": str(left), "y": str(top), "width": str(width), "height": str(height), "fill": LIGHT.named["card"]}
    root.insert(0, Element("rect", paper))
    style = Element("style")
    style.text = literal(LIGHT, css(LIGHT) + FIGURES)
    root.insert(0, style)
    return tostring(root, encoding="unicode") + "\n"


def _head(root: Element, page: Page) -> None:
    head = SubElement(root, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    SubElement(head, "meta", {"name": "color-scheme", "content": "light dark"})
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    SubElement(head, "meta", policy)
    SubElement(head, "title").text = f"{page.title} · {page.kicker}"
    dark = f"@media (prefers-color-scheme: dark){{@media screen{{{css(DARK)}}}}}"
    SubElement(head, "style").text = css(LIGHT) + dark + FIGURES + PAGE


def _masthead(main: Element, page: Page) -> None:
    header = SubElement(main, "header")
    _text(header, "p", page.kicker, "kicker")
    _text(header, "h1", page.title)
    for index, paragraph in enumerate(page.finding):
        _text(header, "p", paragraph, "finding" if not index else "finding more")
    tiles = SubElement(header, "div", {"class": "tiles"})
    for tile in page.tiles:
        box = SubElement(tiles, "div", {"class": "tile"})
        _text(box, "p", tile.label, "label")
        _text(box, "p", tile.value, "value")
        _text(box, "p", tile.remark, "remark")


def _section(main: Element, section: Section) -> None:
    place = SubElement(main, "section")
    _text(place, "p", section.kicker, "kicker")
    _text(place, "h2", section.headline)
    _text(place, "p", section.text, "lead")
    for group in section.groups:
        _group(place, group)
    for table in section.tables:
        _table(place, table)


def _group(place: Element, group: Group) -> None:
    if group.folded:
        place = SubElement(place, "details")
        SubElement(place, "summary").text = group.title
    elif group.title:
        _text(place, "h3", group.title)
    if group.note:
        _text(place, "p", group.note, "note")
    grid = SubElement(place, "div", {"class": f"figures {group.layout}"})
    for _, svg in group.figures:
        box = SubElement(grid, "figure")
        if group.layout != "small":  # small multiples have their title inside
            _text(box, "figcaption", _title(svg))
        box.append(svg)


def _title(svg: Element) -> str:
    title = svg.find("title")
    return (title.text if title is not None else None) or ""


def _table(place: Element, table: Table) -> None:
    details = SubElement(place, "details")
    SubElement(details, "summary").text = f"Table: {table.title}"
    scroll = SubElement(
        details, "div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": table.title}
    )
    body = SubElement(scroll, "table")
    names = SubElement(SubElement(body, "thead"), "tr")
    for index, column in enumerate(table.columns):
        _text(names, "th", column, "text" if index < table.texts else None).set("scope", "col")
    rows = SubElement(body, "tbody")
    for cells in table.rows:
        row = SubElement(rows, "tr")
        for index, cell in enumerate(cells):
            _text(row, "td", cell or "–", "text" if index < table.texts else None)


def _colophon(main: Element, page: Page) -> None:
    footer = SubElement(main, "footer")
    _text(footer, "h2", "How this was measured")
    facts = SubElement(footer, "dl")
    for name, value in page.facts:
        pair = SubElement(facts, "div")
        _text(pair, "dt", name)
        _text(pair, "dd", value or "–")
    for note in page.notes:
        _text(footer, "p", note, "note")


def _text(parent: Element, tag: str, text: str, class_: str | None = None) -> Element:
    child = SubElement(parent, tag, {"class": class_} if class_ else {})
    child.text = text or "\N{NO-BREAK SPACE}"  # an element without content would be open for HTML
    return child
