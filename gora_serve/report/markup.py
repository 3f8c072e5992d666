"""HTML and SVG as values. Every string that is not `Html` already is escaped: no name out of a file becomes markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gora_serve.errors import printable

VOID = frozenset({"meta", "col", "br", "link"})
MISSING = "-"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


EMPTY = Html("")


def escape(value: object) -> Html:
    """Return `value` as text of a page; control characters and the like are spelled out."""
    return value if isinstance(value, Html) else Html(html.escape(printable(value), quote=True))


def join(parts: Iterable[object]) -> Html:
    return Html("".join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element. Attributes: `class_` is class, `aria_label` aria-label; None and False leave one out."""
    spelled = [
        Html(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    ]
    start = Html(f"<{name}{''.join(spelled)}>")
    return start if name in VOID else Html(f"{start}{join(children)}</{name}>")


def exact(value: float | None, shown: str) -> Html:
    """Return a number as people read it, with the file's own digits beside it for machines."""
    return escape(MISSING) if value is None else tag("data", shown, value=repr(value))


def code(value: object) -> Html:
    return tag("code", value)


@dataclass(frozen=True)
class Table:
    """A table of a page. The first cell of a row is its head; `numeric`: the other cells stand to the right."""

    caption: str
    heads: Sequence[object]
    rows: Sequence[Sequence[object]]
    numeric: bool = True
    foot: Sequence[object] = ()

    def html(self) -> Html:
        head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in self.heads)))
        body = tag("tbody", *map(_row, self.rows))
        foot = tag("tfoot", _row(self.foot)) if self.foot else ""
        caption = tag("caption", self.caption)
        table = tag("table", caption, head, body, foot, class_="numbers" if self.numeric else "words")
        return tag("div", table, class_="scroll", role="region", tabindex="0", aria_label=self.caption)


def _row(cells: Sequence[object]) -> Html:
    return tag("tr", tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:]))


def folded(summary: object, *children: object) -> Html:
    return tag("details", tag("summary", summary), *children)


@dataclass(frozen=True)
class Figure:
    """A picture with its text alternative: a sentence, and a table with the numbers of it.

    size: of the drawing, in its own units; text in it is set for about 380 of them across.
    """

    name: str
    title: str
    says: str
    size: tuple[float, float]
    drawing: Html
    table: Table
    legend: Html = EMPTY

    def html(self) -> Html:
        width, height = self.size
        picture = tag(
            "svg",
            tag("title", self.title, id=f"{self.name}-title"),
            tag("desc", self.says, id=f"{self.name}-says"),
            self.drawing,
            viewBox=f"0 0 {width:g} {height:g}",
            role="img",
            aria_labelledby=f"{self.name}-title {self.name}-says",
        )
        caption = tag("figcaption", tag("h3", self.title), tag("p", self.says))
        return tag(
            "figure", caption, self.legend, picture, folded("Numbers of this figure", self.table.html()), id=self.name
        )
