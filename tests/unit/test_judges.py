"""Judges: rules by hand, missing scores counted, a cache on disk, an endpoint that a thread of this test serves."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.steering.evaluating.judges import CachedJudge, Judged, Missing, WordJudge, harmonic_mean, judged
from interp.steering.evaluating.openai_judge import OpenAIJudge

ITEMS = [Judged("Say something.", "A good film."), Judged("Say something.", "GOOD, good and lovely."), Judged("", "")]


def test_words_are_found_whole_and_in_any_case() -> None:
    assert WordJudge(["good"], top=1.0)(ITEMS) == [1.0, 1.0, 0.0]
    assert WordJudge(["good", "lovely"], enough=4)(ITEMS) == [0.5, 1.5, 0.0]
    assert WordJudge(["goo"])(ITEMS) == [0.0, 0.0, 0.0]
    assert WordJudge(r"goo\w")(ITEMS) == [2.0, 2.0, 0.0]


def test_the_harmonic_mean_is_zero_for_a_zero_and_missing_for_a_missing_one() -> None:
    nan = math.nan
    scores = torch.tensor([[2.0, 1.0, 0.0, nan, 0.0], [2.0, 2.0, 2.0, 2.0, nan], [2.0, 2.0, 2.0, 2.0, 2.0]])
    mean = harmonic_mean(scores)
    assert mean[:3].tolist() == pytest.approx([2.0, 1.5, 0.0])
    assert mean[3:].isnan().all(), "a score that is not known could have been anything"


def test_missing_scores_are_nan_and_counted_by_reason_never_zero() -> None:
    scores, reasons = judged(lambda items: [1.0, None, Missing("refused")], ITEMS)
    assert scores[0] == 1.0 and scores[1:].isnan().all()
    assert reasons == {"not scored": 1, "refused": 1}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda items: [1.0], "1 scores for 3 texts"),
        (lambda items: [1.0, -1.0, 1.0], "0 or more"),
        (lambda items: [1.0, "high", 1.0], "expected a number"),
    ],
)
def test_a_judge_that_gives_no_scores_is_refused(judge: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        judged(judge, ITEMS)


# -- the cache -----------------------------------------------------------------------------------------------------


class Counting:
    """Scores by length; keeps what it was asked."""

    name = "length"

    def __init__(self) -> None:
        self.asked: list[Judged] = []

    def __call__(self, items: Any) -> list[float | None]:
        self.asked += items
        return [float(len(item.text)) if item.text else None for item in items]


def test_a_cached_judge_asks_once_and_again_only_for_what_is_missing(tmp_path: Path) -> None:
    judge, path = Counting(), tmp_path / "scores.jsonl"
    first = CachedJudge(judge, path)([*ITEMS, ITEMS[0]])
    assert first == [12.0, 22.0, None, 12.0] and len(judge.asked) == 3
    again = Counting()
    assert CachedJudge(again, path)(ITEMS) == [12.0, 22.0, None]
    assert again.asked == [ITEMS[2]], "a missing score is asked for again, a known one is not"
    other = Counting()
    assert CachedJudge(other, path, name="another judge")(ITEMS[:1]) == [12.0]
    assert other.asked == [ITEMS[0]], "scores of one judge are not another's"


def test_a_cache_survives_a_line_that_was_cut_off_and_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    CachedJudge(Counting(), path)(ITEMS[:1])
    with path.open("a") as file:
        file.write('{"key": "12')
    again = Counting()
    assert CachedJudge(again, path)(ITEMS[:2]) == [12.0, 22.0]
    assert again.asked == [ITEMS[1]]
    assert len(CachedJudge(Counting(), path).scores) == 2
    path.write_text("question,score\nx,1\n")
    with pytest.raises(ArtifactError, match="no file of scores"):
        CachedJudge(Counting(), path)
    with pytest.raises(ConfigError, match="no name"):
        CachedJudge(lambda items: [None] * len(items), tmp_path / "x")


# -- an endpoint ---------------------------------------------------------------------------------------------------

Answer = tuple[int, Any, dict[str, str]]


class Endpoint:
    """A server on a thread that answers as a function of the request says, and keeps what it was sent."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]) -> None:
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, body, self.headers.get("Authorization")))
                    status, said, headers = answer(body, len(outer.requests))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    made: list[Endpoint] = []

    def start(answer: Callable[[dict[str, Any], int], Answer]) -> Endpoint:
        made.append(Endpoint(answer))
        return made[-1]

    yield start
    for endpoint in made:
        endpoint.close()


def said(text: str | None, **message: Any) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text, **message}}]}, {}


def test_an_endpoint_is_asked_as_the_field_does_and_its_rating_read(
    serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint = serve(lambda body, n: said("Rating: 0 at first, but then\n**Rating: [[1.5]]**"))
    judge = OpenAIJudge(endpoint.url, "judge-1", "{prompt} | {text} | {braces}", key_env="JUDGE_KEY", workers=1)
    assert judge([Judged("Q {text}", "A")]) == [1.5], "the last rating counts"
    path, body, key = endpoint.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["messages"] == [{"role": "user", "content": "Q {text} | A | {braces}"}]
    assert body["model"] == "judge-1" and body["temperature"] == 0
    assert "secret" not in repr(judge) + judge.name


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said("I would rather not say."), "not parsed"),
        (said(None, refusal="I cannot help with that."), "refused"),
        (said("Rating: 7"), "out of range"),
        ((200, {"error": "x"}, {}), "not parsed"),
        ((200, {"choices": []}, {}), "not parsed"),
        ((200, b"not json", {}), "no answer"),
        ((503, {}, {}), "no answer"),
    ],
)
def test_what_cannot_be_read_is_missing_with_its_reason(
    serve: Callable[..., Endpoint], answer: Answer, reason: str
) -> None:
    endpoint = serve(lambda body, n: answer)
    scores, reasons = judged(OpenAIJudge(endpoint.url, "m", "{text}", retries=1), ITEMS)
    assert scores.isnan().all() and reasons == {reason: 3}


def test_a_busy_server_is_asked_again_and_scores_keep_their_order(serve: Callable[..., Endpoint]) -> None:
    def answer(body: dict[str, Any], n: int) -> Answer:
        if n <= 3:
            return 429, {}, {"Retry-After": "1"}
        return said(f"score: {len(body['messages'][0]['content']) % 3}")

    endpoint = serve(answer)
    items = [Judged("", "x" * n) for n in range(1, 9)]
    assert OpenAIJudge(endpoint.url, "m", "{text}", workers=3)(items) == [n % 3 for n in range(1, 9)]
    assert len(endpoint.requests) == 11


def test_a_call_that_is_refused_ends_the_evaluation(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(lambda body, n: (401, {"error": "invalid key"}, {}))
    with pytest.raises(DataError, match=r"401.*invalid key"):
        OpenAIJudge(endpoint.url, "m", "{text}", workers=1)(ITEMS)
    assert len(endpoint.requests) < 3, "the calls that waited were not made"


def test_a_redirect_is_not_followed_with_the_key(
    serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    elsewhere = serve(lambda body, n: said("Rating: 1"))
    endpoint = serve(lambda body, n: (302, {}, {"Location": elsewhere.url + "/chat/completions"}))
    with pytest.raises(DataError, match="302"):
        OpenAIJudge(endpoint.url, "m", "{text}")(ITEMS[:1])
    assert not elsewhere.requests


def test_no_server_at_all_is_missing(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(lambda body, n: said("Rating: 1"))
    url = endpoint.url
    endpoint.server.server_close()
    assert OpenAIJudge(url, "m", "{text}", retries=0, timeout=0.2)(ITEMS[:1]) == [Missing("no answer")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "file:///etc/passwd"}, "expected the base"),
        ({"template": "no place"}, "{text}"),
        ({"pattern": r"\d"}, "no group"),
        ({"pattern": "("}, "no regular expression"),
        ({"workers": 0}, "workers"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    usual: dict[str, Any] = {"url": "http://localhost/v1", "model": "m", "template": "{text}"}
    with pytest.raises(ConfigError, match=words):
        OpenAIJudge(**{**usual, **settings})
