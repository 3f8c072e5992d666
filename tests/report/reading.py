"""A page as a tree, read by html.parser: what a reader without our code sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e\x1b[31m&amp;"
VOID = {"meta", "br", "link", "img", "input", "hr", "col"}


@dataclass
class Element:
    """An element: its name, attributes, and children, elements and text in their order."""

    name: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    def all(self, *names: str) -> Iterator[Element]:
        """Every element below of one of these names; of any where none is given."""
        for child in self.children:
            if isinstance(child, Element):
                if not names or child.name in names:
                    yield child
                yield from child.all(*names)

    def one(self, name: str) -> Element:
        return next(self.all(name))

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def exact(self) -> str:
        """The number that a cell carries for machines, or its text."""
        data = next(self.all("data"), None)
        return self.text if data is None else str(data.attributes["value"])


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag, f"</{tag}> ends another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(text: str) -> Element:
    """Return the root. Every element that is opened must be closed, in order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def tables(page: Element) -> dict[str, list[list[str]]]:
    """Caption -> rows of the body and foot, each cell as exactly as the page has it."""
    found = {}
    for table in page.all("table"):
        rows = [
            [cell.exact for cell in row.all("th", "td")]
            for part in table.all("tbody", "tfoot")
            for row in part.all("tr")
        ]
        caption = table.one("caption").text
        assert caption not in found, f"two tables are called {caption}"
        found[caption] = rows
    return found
