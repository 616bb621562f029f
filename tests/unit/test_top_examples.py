"""What a latent matches, against counting by hand; the page of latents, as a parser sees it."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.core.errors import ArtifactError, DataError
from interp.core.result import Provenance
from interp.evaluate import matching
from interp.evaluate.baseline import PCA
from interp.evaluate.matching import best_matches
from interp.evaluate.top_examples import TopExamples
from interp.report import dictionary_page as pages
from interp.report.dictionary_page import RunRecord, dictionary_page, framed_page, write_dictionary_page

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style>",
    '"onload=',
    "'><img src=x onerror=alert(1)>",
    "<!--",
    "{{ 7*7 }}",
    "\u202egnp.exe",
    "\u2028",
    "http://example.com/x.js",
    " the",
    "a\nb",
]
VOID = {"meta", "img", "br", "input", "link", "hr", "base"}


# -- matching -------------------------------------------------------------------------------------------------------


def firings(active: Tensor) -> tuple[Tensor, Tensor]:
    """Token and unit of every firing of a table [token unit]."""
    token, unit = active.nonzero().T
    return token, unit


def counted_by_hand(active: Tensor, columns: dict[str, Tensor]) -> list[float]:
    """The best F1 of each unit, with sets."""
    best = []
    for unit in range(active.shape[1]):
        fires = set(active[:, unit].nonzero()[:, 0].tolist())
        scores = [0.0]
        for codes in columns.values():
            for value in set(codes.tolist()) - {-1}:
                has = set((codes == value).nonzero()[:, 0].tolist())
                scores.append(2 * len(fires & has) / (len(fires) + len(has)))
        best.append(max(scores))
    return best


def random_columns(n: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    zipf = 1 / torch.arange(1.0, 200)
    word = torch.multinomial(zipf, n, replacement=True, generator=draw)
    return {"word": word, "kind": word % 3, "rare": torch.where(torch.rand(n, generator=draw) < 0.1, word % 7, -1)}


@pytest.mark.parametrize("table", [1 << 24, 300])
def test_the_best_match_is_the_one_that_counting_by_hand_finds(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_TABLE", table)
    columns = random_columns(400, seed=1)
    rates = torch.tensor([0.0, 0.003, 0.02, 0.1, 0.5, 1.0])
    active = torch.rand(400, 6, generator=torch.Generator().manual_seed(2)) < rates
    active[:, 2] = columns["kind"] == 1
    got = best_matches(*firings(active), columns, n=6, shuffles=3)
    assert got.f1.tolist() == pytest.approx(counted_by_hand(active, columns))
    for unit, (column, value) in enumerate(zip(*got.places(), strict=True)):
        if column < 0:
            assert unit == 0 and value == -1 and not active[:, 0].any()
            continue
        has, fires = list(columns.values())[column] == value, active[:, unit]
        hits = float((has & fires).sum())
        assert float(got.precision[unit]) == pytest.approx(hits / float(fires.sum()))
        assert float(got.recall[unit]) == pytest.approx(hits / float(has.sum()))


def test_a_unit_that_fires_exactly_where_a_label_is_matches_it_and_the_earlier_column_wins_a_tie() -> None:
    columns = random_columns(3000, seed=3)
    columns["again"] = columns["word"]
    active = torch.stack([columns["word"] == 4, columns["rare"] == 2, columns["kind"] == 0], 1)
    got = best_matches(*firings(active), columns, n=3)
    assert got.places() == ([0, 2, 1], [4, 2, 0])
    assert got.f1.tolist() == [1, 1, 1] and bool(got.claimed.all())
    assert float(got.chance.max()) < 0.8


def test_units_that_have_nothing_to_do_with_the_labels_match_none() -> None:
    draw = torch.Generator().manual_seed(4)
    columns = random_columns(2000, seed=5)
    rates = torch.logspace(-3, -0.05, 60)
    active = torch.rand(2000, 60, generator=draw) < rates
    got = best_matches(*firings(active), columns, n=60)
    assert not got.claimed.any()
    # The dense ones have a large F1 with whatever is frequent: it is the shuffles that tell.
    assert float(got.f1.max()) > 0.4
    # And the rule has teeth the other way: half of a label's tokens, and only those, are claimed.
    half = (columns["word"] == 2) & (torch.rand(2000, generator=draw) < 0.5)
    assert bool(best_matches(*firings(half[:, None]), columns, n=1).claimed[0])


def test_one_firing_on_a_token_that_comes_once_proves_nothing() -> None:
    got = best_matches(torch.tensor([7]), torch.tensor([0]), {"word": torch.arange(30)}, n=2)
    assert float(got.f1[0]) == 1 == float(got.chance[0])
    assert got.claimed.tolist() == [False, False]


def test_matching_does_not_depend_on_the_order_of_tokens_or_of_firings() -> None:
    columns = random_columns(500, seed=6)
    active = torch.rand(500, 4, generator=torch.Generator().manual_seed(7)) < 0.1
    order = torch.randperm(500, generator=torch.Generator().manual_seed(8))
    token, unit = firings(active[order])
    mixed = torch.randperm(len(token), generator=torch.Generator().manual_seed(9))
    a = best_matches(*firings(active), columns, n=4)
    b = best_matches(token[mixed], unit[mixed], {name: codes[order] for name, codes in columns.items()}, n=4)
    assert a.places() == b.places() and torch.equal(a.f1, b.f1)


def test_a_pca_projects_onto_its_components_about_its_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q
    pca = PCA(torch.randn(6, generator=draw), basis[:2], torch.ones(6))
    x = torch.randn(3, 5, 6, generator=draw)
    y = pca.decode(pca.encode(x))
    torch.testing.assert_close(pca.decode(pca.encode(y)), y)
    torch.testing.assert_close((x - y) @ basis[:2].T, torch.zeros(3, 5, 2), atol=1e-5, rtol=0)
    assert pca.rank == 2


# -- the page -------------------------------------------------------------------------------------------------------


class Document(HTMLParser):
    """What a browser would make of a page: its elements, and the text inside each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def some_examples(words: list[str], n: int = 3, contexts: int = 2) -> TopExamples:
    """Latents made by hand: each fires on one word, which stands between the others."""
    width, bins = 5, 8
    ids = torch.full((n, contexts, width), -1)
    for i in range(n):
        for e in range(contexts):
            ids[i, e] = torch.tensor([(i + e + step) % len(words) for step in range(width)])
    ids[0, 0, 0] = -1
    activations = torch.rand(n, contexts, width, generator=torch.Generator().manual_seed(0))
    activations[:, :, 2] += 1
    activations[1, 0, 0] = math.nan
    activations[ids < 0] = math.nan
    listed = torch.arange(2).expand(n, 2)
    return TopExamples(
        site="blocks.1.hook_resid_post",
        n_tokens=1000,
        latents=torch.arange(n) * 2,
        firing=torch.arange(2 * n),
        largest=activations.nan_to_num(0).amax((1, 2)),
        mean_activation=torch.tensor([math.nan, *[0.5] * (n - 1)]),
        histogram=torch.ones(n, bins, dtype=torch.long).tril_(3) * torch.arange(n)[:, None],
        edges=torch.exp2(torch.arange(bins + 1.0)),
        ids=ids,
        activations=activations,
        band=torch.tensor([[0] * (contexts - 1) + [1]] * n),
        doc=torch.zeros(n, contexts, dtype=torch.long),
        pos=torch.zeros(n, contexts, dtype=torch.long),
        raised=listed,
        raised_by=torch.tensor([2.0, 1.0]).expand(n, 2),
        lowered=listed,
        lowered_by=torch.tensor([-2.0, -1.0]).expand(n, 2),
        label=[f"token {words[i]!r}" for i in range(n)],
        f1=torch.ones(n),
        precision=torch.ones(n),
        recall=torch.ones(n),
        chance=torch.zeros(n),
        claimed=torch.tensor([False, *[True] * (n - 1)]),
        names=dict(enumerate(words)),
        provenance=Provenance(model="<b>model</b>", settings={"text": "</script>"}),
    )


RUN = RunRecord(
    "<i>run</i>",
    dictionary={"architecture": "topk", "k": 4},
    settings={"data": '"><script>alert(2)</script>'},
    provenance={"tokens": 4000, "status": "stopped"},
    course=[{"tokens": t, "fvu": 3 / t, "l0": 4.0} for t in range(1, 2000)],
    figures={
        "l0": 3.9,
        "fvu": 0.25,
        "ce_recovered": 0.9,
        "kl": 0.1,
        "dead": 0.125,
        "n_tokens": 500,
        "intervals": {"l0": [3.8, 4.0], "fvu": [None, None]},
        "pca_rank": 4,
        "pca_fvu": 0.4,
    },
)


@pytest.fixture(scope="module")
def page() -> str:
    """A page of hostile tokens, with a run of hostile names."""
    return dictionary_page(some_examples(HOSTILE), run=RUN)


def test_the_policy_allows_the_pages_own_style_and_script_by_hash_and_nothing_else(page: str) -> None:
    document = Document(page)
    policies = [m["content"] for m in document.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0] is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'" and rules["form-action"] == "'none'"
    assert "unsafe" not in policies[0] and "http" not in policies[0]
    scripts = list(zip(document.all("script"), document.text["script"], strict=True))
    ours = [text for attributes, text in scripts if attributes.get("type") != "application/json"]
    for name, texts in (("script-src", ours), ("style-src", document.text["style"])):
        assert len(texts) == 1
        digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"


def test_nothing_is_fetched_and_no_text_becomes_code(page: str) -> None:
    document = Document(page)
    assert {tag for tag, _ in document.elements}.isdisjoint(
        {"img", "link", "iframe", "object", "base", "form", "b", "i"}
    )
    for _, attributes in document.elements:
        assert {"src", "href", "action", "style", "srcset"}.isdisjoint(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert len(document.all("script")) == 2 and len(document.all("style")) == 1
    urls = re.findall(r"https?://[\w./-]+", page)
    # A name space, and the text of a token: neither is asked for.
    assert set(urls) <= {"http://www.w3.org/2000/svg", "http://example.com/x.js"}
    assert len(page.encode()) < 30 * 2**20


def test_the_pages_data_holds_every_latent_as_it_is(page: str) -> None:
    document, examples = Document(page), some_examples(HOSTILE)
    scripts = zip(document.all("script"), document.text["script"], strict=True)
    data = json.loads(next(text for attributes, text in scripts if attributes.get("type") == "application/json"))
    assert [latent["id"] for latent in data["latents"]] == examples.latents.tolist()
    first, second = data["latents"][:2]
    assert [latent["density"] for latent in data["latents"]] == [0.0, 0.002, 0.004]
    assert first["mean"] is None and not first["claimed"] and second["claimed"]
    context = first["contexts"][0]
    # The place beyond the document is gone, and the peak is still the middle.
    assert len(context["tokens"]) == 4 and context["peak"] == 1
    assert data["tokens"][context["tokens"][context["peak"]]] == HOSTILE[2]
    assert second["contexts"][0]["values"][0] is None
    assert second["contexts"][0]["values"][2] == pytest.approx(float(examples.activations[1, 0, 2]), rel=1e-3)
    # The first latent never fires; empty bins beyond the fullest ends are left out.
    assert (first["counts"], second["counts"], data["latents"][2]["counts"]) == ([], [1] * 5, [2] * 6)
    assert data["bands"] == list(TopExamples.bands)


def test_the_figures_stand_in_cards_with_their_margins_and_the_pca_beside(page: str) -> None:
    text = " ".join(" ".join(parts) for parts in Document(page).text.values())
    assert "0.2500" in text and "PCA of rank 4: 0.4000" in text and "± 0.1" in text and "12.5%" in text
    assert (
        "6 topk latents · k 4" in text
        and "training stopped" in text
        and "FVU in training" in text
        and "1 never did" in text
    )
    assert "nan" not in text.lower().split() and "None" not in text.split()


def test_without_a_run_there_are_no_cards_and_the_same_latents_give_the_same_bytes(tmp_path: Path) -> None:
    examples = some_examples([" a", " b", " c"])
    plain = dictionary_page(examples)
    assert 'class="card"' not in plain and plain == dictionary_page(some_examples([" a", " b", " c"]))
    path = write_dictionary_page(tmp_path / "new" / "page.html", examples)
    assert (
        path.read_text(encoding="utf-8") == plain == examples.to_html(tmp_path / "b.html").read_text(encoding="utf-8")
    )
    loaded = TopExamples.load(examples.save(tmp_path / "saved"))
    assert dictionary_page(loaded) == plain


def test_a_notebook_gets_the_page_in_a_frame_that_can_do_nothing_to_the_notebook() -> None:
    shown = Document(str(framed_page(some_examples(HOSTILE))))
    (frame,) = shown.all("iframe")
    assert frame["sandbox"] == "allow-scripts" and len(shown.elements) == 1
    assert frame["srcdoc"] == dictionary_page(some_examples(HOSTILE), framed=True)


def test_a_page_that_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MOST_BYTES", 10_000)
    with pytest.raises(DataError, match="show fewer latents"):
        dictionary_page(some_examples(HOSTILE))


def test_a_table_a_figure_and_a_summary_come_with_it() -> None:
    examples = some_examples([" a", " b", " c"])
    frame = examples.to_frame()
    assert len(frame) == 6 and set(frame["band"]) == {"strongest", "around the median"}
    assert frame["context"][2] == " b c| a| b c" and frame["token"][2] == " a"
    assert frame["label"].tolist()[:3] == ["", "", "token ' b'"]
    assert sum(examples.plot().data[0].y) == int((examples.firing > 0).sum())
    assert "latent 2: density 0.002" in examples.summary() and "token ' b'" in examples.summary()


def test_a_run_folder_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    assert RunRecord.read(tmp_path).figures == {}
    (tmp_path / "metrics.jsonl").write_text('{"tokens": 1, "fvu": 0.5}\n{"tokens": 2, "fv')
    (tmp_path / "evaluation.json").write_text('{"fvu": 0.5}')
    (tmp_path / "config.yaml").write_text("dictionary: {k: 3}\n")
    record = RunRecord.read(tmp_path)
    assert record.course == ({"tokens": 1, "fvu": 0.5},) and record.settings == {"dictionary": {"k": 3}}
    for name, text in (("evaluation.json", "{"), ("evaluation.json", "[]"), ("config.yaml", "a: [")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ArtifactError, match=name):
            RunRecord.read(tmp_path)
        (tmp_path / name).write_text("{}")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 3.9), (0, 4e6), (1, 2000), (0, 1e-4), (3, 3), (0, 7)], ids=lambda x: f"{x:g}"
)
def test_ticks_are_round_few_and_within(low: float, high: float) -> None:
    ticks = pages._ticks(float(low), float(high))
    assert 2 <= len(ticks) <= 6 or high == low
    assert all(low - 1e-9 <= tick <= max(high, low + 1) + 1e-9 for tick in ticks)
    assert all(
        re.fullmatch(r"[1-9]?[0-9.]*0*|0(\.0*)?[125]0*", f"{tick:.10f}".rstrip("0").rstrip(".")) for tick in ticks
    )


@pytest.mark.parametrize(("low", "high"), [(0.02, 4), (0.15, 0.3), (1e-6, 1e3), (0.1, 0.1)])
def test_log_ticks_surround_their_range(low: float, high: float) -> None:
    ticks = pages._log_ticks(float(low), float(high))
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 9
    assert ticks[0] <= low * 1.0001 and ticks[-1] >= high * 0.9999
