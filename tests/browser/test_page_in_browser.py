"""The page of a dictionary in Debian's Chromium: nothing fetched, nothing complained about, search and sort at work."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.result import Provenance
from interp.evaluate.top_examples import TopExamples
from interp.report.dictionary_page import RunRecord, framed_page, write_dictionary_page

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</style><style>main{display:none}",
    '" onmouseover="document.title=1',
    "{{ 7*7 }}",
]
PLAIN = [" Mary", " gave", " the", " ball", " to", " John"]

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium (apt-get install chromium)")


def examples(words: list[str], n: int = 8) -> TopExamples:
    """Latents made by hand: latent 10·i fires on word i, on i + 1 in a hundred tokens, with an F1 of 1/(i + 1)."""
    width, many = 7, torch.arange(n)
    ids = (many[:, None, None] + torch.tensor([0, 1])[:, None] * len(words) + torch.arange(-3, 4)) % len(words)
    activations = torch.zeros(n, 2, width)
    activations[:, :, 3] = (many + 1.0)[:, None] * torch.tensor([1.0, 0.5])
    activations[0, 0, 0] = math.nan
    firing = torch.zeros(10 * n, dtype=torch.long)
    firing[10 * many] = 10 * (many + 1)
    listed = torch.arange(3).expand(n, 3)
    share = 1 / (many + 1.0)
    return TopExamples(
        site="blocks.2.hook_resid_post",
        n_tokens=1000,
        latents=10 * many,
        firing=firing,
        largest=many + 1.0,
        mean_activation=many + 0.5,
        histogram=torch.tensor([0, 3, 5, 1]).expand(n, 4).contiguous(),
        edges=torch.exp2(torch.arange(5.0)),
        ids=ids,
        activations=activations,
        band=torch.tensor([0, 1]).expand(n, 2).contiguous(),
        doc=torch.zeros(n, 2, dtype=torch.long),
        pos=torch.zeros(n, 2, dtype=torch.long),
        raised=listed,
        raised_by=torch.tensor([3.0, 2.0, 1.0]) + many[:, None].flip(0),
        lowered=listed,
        lowered_by=-torch.tensor([3.0, 2.0, 1.0]).expand(n, 3),
        label=[f"token {words[i % len(words)]!r}" for i in range(n)],
        f1=share,
        precision=share,
        recall=share,
        chance=torch.zeros(n),
        claimed=many < n - 1,
        names=dict(enumerate(words)),
        provenance=Provenance(model="<b>model</b>"),
    )


RUN = RunRecord(
    "run",
    course=tuple({"tokens": 100 * i, "fvu": 2 / i, "l0": 8.0} for i in range(1, 50)),
    figures={"fvu": 0.1, "l0": 8.0, "pca_rank": 8, "pca_fvu": 0.3, "n_tokens": 1000, "dead": 0.9},
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests here."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra interp[browser]")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page in the browser, and what it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.as_uri()
        self.page.goto(self.address, timeout=60_000)

    def numbers(self) -> list[int]:
        """The latents listed, in order."""
        return [int(text) for text in self.page.locator("#list .id").all_text_contents()]

    def shown(self) -> str:
        """Which latent is open."""
        return str(self.page.locator("#latent h2").text_content())


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opened]:
    """A page of plain words; whatever a test does with it, nothing may be fetched or go wrong."""
    given = Opened(browser, write_dictionary_page(tmp_path / "page.html", examples(PLAIN), run=RUN))
    yield given
    assert given.complaints == []
    assert {address.split("#")[0] for address in given.requests} == {given.address}
    given.context.close()


def test_it_opens_with_the_best_matches_and_shows_the_first(opened: Opened) -> None:
    assert opened.numbers() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert opened.shown() == "Latent 0"
    page = opened.page
    assert page.locator(".card").count() == 3 and page.locator("figure svg").count() == 3
    assert page.locator("#latent .context").count() == 2
    peak = page.locator("#latent .context .token.peak").first
    assert peak.text_content() == PLAIN[0] and "a20" in (peak.get_attribute("class") or "")
    # The weaker context is shaded in proportion to the latent's largest activation.
    assert "a10" in (page.locator("#latent .context .token.peak").nth(1).get_attribute("class") or "")
    assert page.locator("#latent rect.column").count() == 3
    assert page.locator("#latent .writes.down div").count() == 3


def test_every_order_sorts_and_turns_round(opened: Opened) -> None:
    up, down = [0, 10, 20, 30, 40, 50, 60, 70], [70, 60, 50, 40, 30, 20, 10, 0]
    # The last latent's match is no claim: it comes after every claimed one.
    expected = {"id": up, "max": down, "mean": down, "f1": up, "logit": up, "density": down}
    for order, numbers in expected.items():
        opened.page.select_option("#sort", order)
        assert opened.numbers() == numbers, order
        opened.page.click("#turn")
        assert opened.numbers() == numbers[::-1], order
        opened.page.click("#turn")


def test_search_finds_numbers_labels_and_tokens(opened: Opened) -> None:
    search = opened.page.locator("#search")
    for asked, numbers in {
        "30": [30],
        "#30": [30],
        "token ' ball'": [30],
        "mary gave the": [0, 10, 20, 30, 50, 60, 70],
        "nothing like it": [],
        "#3": [],
    }.items():
        search.fill(asked)
        assert opened.numbers() == numbers, asked
    assert opened.page.locator("#list .nothing").count() == 1
    assert opened.page.locator("#count").text_content() == "0 of 8 latents"
    search.fill("#40")
    assert opened.shown() == "Latent 40"
    search.fill("")
    # What was open stays open.
    assert len(opened.numbers()) == 8 and opened.shown() == "Latent 40"


def test_the_keyboard_is_enough(opened: Opened) -> None:
    keyboard = opened.page.keyboard
    keyboard.press("/")
    assert opened.page.evaluate("document.activeElement.id") == "search"
    keyboard.press("ArrowDown")
    keyboard.press("ArrowDown")
    assert opened.shown() == "Latent 10"
    assert opened.page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    keyboard.press("End")
    assert opened.shown() == "Latent 70"
    keyboard.press("Home")
    assert opened.shown() == "Latent 0" and opened.page.url.endswith("#latent-0")


def test_a_link_to_a_latent_opens_it(opened: Opened) -> None:
    opened.page.goto(f"{opened.address}#latent-20")
    opened.page.reload()
    assert opened.shown() == "Latent 20"
    assert opened.page.locator("#list [aria-selected=true] .id").text_content() == "20"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 700, 380])
def test_it_fits_the_window_and_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = write_dictionary_page(tmp_path / "page.html", examples(PLAIN), run=RUN)
    given = Opened(browser, path, width=width, scheme=scheme)
    assert given.page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (
        given.page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
        for name in ("color", "backgroundColor")
    )
    assert abs(sum(ink) - sum(paper)) > 500 and (sum(paper) > sum(ink)) == (scheme == "light")
    assert given.complaints == []
    given.context.close()


def test_hostile_tokens_are_text_and_nothing_else(browser: Any, tmp_path: Path) -> None:
    given = Opened(browser, write_dictionary_page(tmp_path / "page.html", examples(HOSTILE)))
    given.page.mouse.move(700, 500)
    assert "owned" not in given.page.title() and given.page.locator("main").is_visible()
    assert given.page.locator("#latent .token.peak").first.text_content() == HOSTILE[0]
    assert given.page.locator("main img, main script, main style, #latent b script").count() == 0
    for latent in range(0, 80, 10):
        given.page.fill("#search", f"#{latent}")
        assert given.shown() == f"Latent {latent}"
    assert "owned" not in given.page.title() and given.complaints == []
    assert {address.split("#")[0] for address in given.requests} == {given.address}
    given.context.close()


def test_the_policy_stops_what_a_fault_elsewhere_might_let_in(browser: Any, tmp_path: Path) -> None:
    given = Opened(browser, write_dictionary_page(tmp_path / "page.html", examples(PLAIN)))
    refused = given.page.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", event => refused.push(event.effectiveDirective));
          const script = document.createElement("script"), image = new Image();
          try { script.textContent = "document.title = 'owned'"; document.body.append(script); } catch (error) { }
          image.src = "https://example.com/x.png";
          document.body.append(image);
          const sheet = document.createElement("style");
          sheet.textContent = "main { display: none }";
          document.body.append(sheet);
          try { await fetch("https://example.com/"); } catch (error) { }
          await new Promise(done => setTimeout(done, 200));
          return refused;
        }"""
    )
    assert {"require-trusted-types-for", "img-src", "style-src-elem", "connect-src"} <= set(refused)
    assert given.page.title() != "owned" and given.page.locator("main").is_visible()
    given.context.close()


def test_a_frame_in_a_notebook_works_too(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><title>n</title>{framed_page(examples(PLAIN))}", encoding="utf-8")
    given = Opened(browser, path)
    frame = given.page.frame_locator("iframe")
    frame.locator("#list button").nth(2).click()
    assert frame.locator("#latent h2").text_content() == "Latent 20"
    assert given.complaints == []
    given.context.close()
