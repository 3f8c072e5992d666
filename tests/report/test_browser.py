"""The page in a real browser: nothing goes wrong, nothing is wider than a phone, a keyboard is enough, it prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browsing, find_browser

from gora_serve.report.page import write_report

pytestmark = pytest.mark.browser
PHONE = 390
WIDER = """
    [...document.querySelectorAll('body *')]
        .filter(one => !one.matches('.skip') && (one.matches('.scroll, pre') || !one.closest('.scroll, pre, svg')))
        .filter(one => one.getBoundingClientRect().right > innerWidth + 0.5)
        .map(one => one.outerHTML.slice(0, 99))
"""
FOCUSED = "document.activeElement.outerHTML.slice(0, 60)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    with browsing(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(params=["compared", "hostile", "deep", "failed"])
def file(request: pytest.FixtureRequest, runs: Path, tmp_path: Path) -> Path:
    """Pages of several kinds of runs."""
    folders = {
        "compared": lambda: [runs / "gora", runs / "lora", runs / "short"],
        "hostile": lambda: [request.getfixturevalue("hostile")],
        "deep": lambda: [request.getfixturevalue("deep"), runs / "lora"],
        "failed": lambda: [request.getfixturevalue("unfinished")],
    }
    write_report(folders[request.param](), tmp_path / "page.html")
    return tmp_path / "page.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, PHONE, 1280])
def test_it_renders_without_errors_and_without_overflow(tab: Page, file: Path, width: int, dark: bool) -> None:
    tab.told.clear()
    tab.open(file, width=width, dark=dark)
    assert tab.ask("document.compatMode") == "CSS1Compat"
    assert tab.ask(WIDER) == []
    assert tab.ask("document.documentElement.scrollWidth") <= width
    sizes = tab.ask("[...document.querySelectorAll('figure > svg')].map(e => e.getBoundingClientRect().width)")
    assert all(0.6 * min(width, 500) < size <= width for size in sizes)
    back = tab.ask("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", back)[0])
    assert red < 60 if dark else red > 200
    assert tab.told == []


def test_the_check_can_fail(tab: Page, tmp_path: Path) -> None:
    tab.told.clear()
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><script>console.error('x'); fetch('http://127.0.0.1:9/')</script><p style='width:999px'>"
    )
    tab.open(bad, width=PHONE)
    assert tab.ask(WIDER) != []
    assert any("console" in one or '"error"' in one for one in tab.told)
    assert "asks for http://127.0.0.1:9/" in tab.told


def test_text_of_figures_is_large_enough_on_a_phone(tab: Page, file: Path) -> None:
    tab.open(file, width=PHONE)
    heights = tab.ask(
        "[...document.querySelectorAll('figure > svg')].filter(e => e.querySelector('text')).map(e => 13 *"
        " e.getBoundingClientRect().width / e.viewBox.baseVal.width)"
    )
    assert all(height >= 10.5 for height in heights), heights


def test_a_keyboard_is_enough(tab: Page, file: Path) -> None:
    """The first stop is the skip link, visible once it has the focus; every fold opens; tables can be scrolled."""
    tab.open(file, width=PHONE)
    tab.press("Tab", 9)
    assert 'href="#main"' in tab.ask(FOCUSED)
    assert tab.ask("document.activeElement.getBoundingClientRect().left") >= 0
    stops = tab.ask("document.querySelectorAll('a, summary, [tabindex]').length")
    seen = set()
    for _ in range(min(stops, 12)):
        tab.press("Tab", 9)
        seen.add(tab.ask(FOCUSED))
    assert len(seen) > 5
    tab.ask("document.querySelector('summary').focus()")
    tab.press("Enter", 13)
    if not tab.ask("document.querySelector('details').open"):  # headless browsers take the key's character
        tab.call("Input.dispatchKeyEvent", type="char", text="\r")
    assert tab.ask("document.querySelector('details').open")


def test_it_prints(tab: Page, file: Path, tmp_path: Path) -> None:
    """On paper it is light, whatever the screen was, and nothing is cut off at the side."""
    tab.open(file, width=720, dark=True)
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert tab.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.ask(WIDER) == []


def test_all_of_it_opened_still_fits(tab: Page, runs: Path, tmp_path: Path, deep: Path) -> None:
    write_report([runs / "gora", deep], tmp_path / "page.html")
    tab.open(tmp_path / "page.html", width=PHONE)
    tab.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.ask(WIDER) == []


def test_without_a_browser_the_search_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_browser() is None
