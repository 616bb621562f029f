"""The page of an attribution graph in Debian's Chromium: nothing fetched, clicks, keys and the filter at work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interp.report.graph_page import write_graph_page
from tests.unit.test_graph_page import HOSTILE, PLAIN, made

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests here."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra interp[browser]")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=["plain", "hostile"])
def page(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A page with all nodes; whatever a test does with it, nothing may be fetched or go wrong."""
    graph = made(PLAIN if request.param == "plain" else HOSTILE)
    path = write_graph_page(tmp_path / "g.html", graph, node_share=1.0, edge_share=1.0)
    opened, seen = browser.new_page(viewport={"width": 1200, "height": 800}), []
    for event in ("console", "pageerror", "dialog"):
        opened.on(event, lambda what: seen.append(str(getattr(what, "text", what))))
    opened.on("request", lambda asked: seen.append(asked.url) if asked.url != path.as_uri() else None)
    opened.goto(path.as_uri(), timeout=60_000)
    yield opened
    assert seen == []
    opened.close()


def shown(page: Any) -> int:
    return int(page.locator(".place:not(.off)").count())


def test_a_click_tells_what_goes_in_and_out(page: Any) -> None:
    assert shown(page) == 11 and page.locator("path.link.far").count() == 9
    page.locator('.place[aria-label^="L1 latent 4"]').click()
    pane = page.locator("#node")
    assert pane.locator("h2").inner_text().startswith("L1 latent 4 @3")
    assert [pane.locator("h3").nth(i).inner_text() for i in (0, 1)] == ["In (2)", "Out (1)"]
    first = pane.locator("button").first
    assert first.locator(".what").inner_text().startswith("L0 latent 7 @0")
    assert first.locator(".by").inner_text() == "+3"
    assert page.locator(".graph path.link").count() == 3 and page.locator(".graph path.minus").count() == 1
    # What goes in is a way on.
    first.click()
    assert pane.locator("h2").inner_text().startswith("L0 latent 7 @0")
    assert page.locator(".place.chosen").count() == 1


def test_the_keyboard_is_enough(page: Any) -> None:
    page.locator('.place[tabindex="0"]').focus()
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused).startswith("logit ")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("L1 ")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("L0 ")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("token ")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused).endswith("@2")
    page.keyboard.press("Enter")
    assert page.locator(".place.chosen").get_attribute("aria-pressed") == "true"
    assert page.locator('.place[tabindex="0"]').count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".place.chosen").count() == 0


def test_the_filter_and_the_switch_leave_out_nodes_but_never_tokens_logits_or_the_errors_share(page: Any) -> None:
    page.locator("#errors").uncheck()
    assert shown(page) == 9 and page.locator("#count").inner_text() == "9 of 11 nodes"
    page.locator("#errors").check()
    page.locator("#filter").fill("5")
    assert shown(page) == 6 and page.locator("#held").inner_text() == "5 %"
    assert page.locator(".card").first.inner_text().startswith("Ends in errors")
    page.locator("#filter").fill("100")
    assert shown(page) == 11


@pytest.mark.parametrize("width", [1200, 700, 380])
def test_it_fits_the_window(browser: Any, tmp_path: Path, width: int) -> None:
    path = write_graph_page(tmp_path / "g.html", made())
    opened = browser.new_page(viewport={"width": width, "height": 800})
    opened.goto(path.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()
