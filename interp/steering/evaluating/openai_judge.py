"""`OpenAIJudge`: a model behind an OpenAI-compatible endpoint as a judge, over the standard library's HTTP."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from interp.core.errors import ConfigError, DataError
from interp.steering.evaluating.judges import Judged, Missing, Verdict, filled

__all__ = ["OpenAIJudge"]

_AGAIN = (408, 409, 425, 429)
_LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class OpenAIJudge:
    """Asks a chat model for a rating of each text.

    The key is read from the environment at each call, sent to `url` alone, and kept nowhere. Redirects are not
    followed. A server that fails or is busy is asked again; then the score is missing. A call that it refuses (a wrong
    key, an unknown model) ends the evaluation.

    Args:
        url: the endpoint's base, such as "http://localhost:8000/v1"; "/chat/completions" is added.
        model: name of the model there.
        template: the question, with {prompt} and {text} in it.
        pattern: regular expression whose first group is the score; its last match in the answer counts.
        top: largest score that the question allows; larger ones are missing, as are negative ones.
        key_env: environment variable that holds the key; a local server may need none.
        timeout: seconds per call.
        retries: calls after the first.
        workers: calls at once.
        max_tokens: of each answer.

    Raises:
        ConfigError: a URL that is not http, a template without {text}, or a pattern without a group.
    """

    url: str
    model: str
    template: str
    pattern: str = r"(?i)(?:rating|score)\W*(\d+(?:\.\d+)?)"
    top: float = 2.0
    key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 3
    workers: int = 4
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.url):
            raise ConfigError(f"url={self.url!r}: expected the base of an endpoint, as 'http://localhost:8000/v1'")
        if "{text}" not in self.template:
            raise ConfigError(f"template={self.template!r}: expected '{{text}}' in it, and '{{prompt}}' where wanted")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as err:
            raise ConfigError(f"pattern={self.pattern!r} is no regular expression: {err}") from err
        if groups < 1:
            raise ConfigError(f"pattern={self.pattern!r} has no group; put the score in (…)")
        if self.timeout <= 0 or self.retries < 0 or self.workers < 1 or self.max_tokens < 1:
            raise ConfigError("expected timeout > 0, retries ≥ 0, workers ≥ 1 and max_tokens ≥ 1")

    @property
    def name(self) -> str:
        """What tells this judge from others in a cache."""
        return json.dumps([self.url, self.model, self.template, self.pattern, self.top, self.max_tokens])

    def __call__(self, items: Sequence[Judged]) -> list[Verdict]:
        """Score texts, several at once.

        Raises:
            DataError: the endpoint refuses the calls; says with what words.
        """
        if not items:
            return []
        pool = ThreadPoolExecutor(min(self.workers, len(items)))
        try:
            return list(pool.map(self._ask, items))
        finally:
            # After a refusal, or Ctrl-C, the calls that wait are not made.
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, item: Judged) -> Verdict:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": filled(self.template, item)}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        wait = 0.5
        for attempt in range(self.retries + 1):
            try:
                return self._read(self._post(body))
            except urllib.error.HTTPError as err:
                if err.code not in _AGAIN and err.code < 500:
                    words = err.read(300).decode("utf-8", "replace")
                    raise DataError(
                        f"{self.url} refuses the call with {err.code}: {words}; check url, model and ${self.key_env}"
                    ) from None
                again = err.headers.get("Retry-After", "")
                wait = float(again) if again.isdigit() else wait
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError):
                pass  # no connection, none in time, or an answer that is no JSON
            if attempt < self.retries:
                time.sleep(min(wait, _LONGEST_WAIT))
                wait *= 2
        return Missing("no answer")

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
            return json.loads(answer.read())

    def _read(self, answer: Any) -> Verdict:
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            if not isinstance(text, str):
                text = "".join(str(part.get("text", "")) for part in text)  # some endpoints answer in parts
        except (KeyError, IndexError, TypeError, AttributeError):
            return Missing("not parsed")
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            return Missing("refused")
        found = re.findall(self.pattern, text)
        last = found[-1] if found else ""
        try:
            score = float(last[0] if isinstance(last, tuple) else last)
        except ValueError:
            return Missing("not parsed")
        return score if 0 <= score <= self.top else Missing("out of range")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place."""

    def redirect_request(self, *args: Any) -> None:
        """Follow none."""
