"""Judges of generated text: rules, a local model, an OpenAI-compatible endpoint, and a cache around any of them.

A judge is a function of texts that returns a score each. What could not be scored (a refusal, an answer that cannot be
read) is missing, never 0.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.disk import digest
from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.core.manager import HookManager
from interp.core.metrics import answer_logits
from interp.core.text import tokenize

__all__ = [
    "CachedJudge",
    "Judge",
    "Judged",
    "LocalJudge",
    "Missing",
    "Verdict",
    "WordJudge",
    "filled",
    "harmonic_mean",
    "judged",
]

_AT_ONCE = 16


class Judged(NamedTuple):
    """A text to judge: the prompt, and what was generated after it."""

    prompt: str
    text: str


class Missing(NamedTuple):
    """A score that there is not, and why, in a word or two; results count the reasons."""

    reason: str


Verdict = float | Missing | None
Judge = Callable[[Sequence[Judged]], Sequence[Verdict]]


@dataclass(frozen=True)
class WordJudge:
    """Scores a text by how often words of a list, or matches of a pattern, come in it.

    Args:
        words: words, found whole and in any case, without spaces around them; or one regular expression.
        enough: so many matches earn the whole score.
        top: the whole score.

    Raises:
        ConfigError: no words, or empty ones, a pattern that is none or matches everything, or numbers that cannot be.
    """

    words: Sequence[str] | str
    enough: int = 1
    top: float = 2.0

    def __post_init__(self) -> None:
        words = [self.words] if isinstance(self.words, str) else list(self.words)
        good = words and all(isinstance(word, str) and word.strip() for word in words)
        numbers = isinstance(self.enough, int) and isinstance(self.top, int | float)
        if not good or not numbers or self.enough < 1 or not 0 < self.top < math.inf:
            raise ConfigError(f"WordJudge needs words that are not empty, enough ≥ 1 and top > 0, got {self!r}")
        try:
            empty = self.pattern.match("") is not None
        except re.error as err:
            raise ConfigError(f"{self.words!r} is no regular expression ({err}); give a list of words") from err
        if empty:
            raise ConfigError(f"{self.words!r} matches the empty text, so every text would earn the whole score")

    @property
    def pattern(self) -> "re.Pattern[str]":
        """What is looked for."""
        given = self.words
        # Not \b: a word may end in a sign, as "C++" does. Tokens come with the space before them.
        text = (
            given
            if isinstance(given, str)
            else r"(?<!\w)(?:" + "|".join(re.escape(w.strip()) for w in given) + r")(?!\w)"
        )
        return re.compile(text, re.IGNORECASE)

    def __call__(self, items: Sequence[Judged]) -> list[Verdict]:
        """Score texts."""
        pattern = self.pattern
        found = [sum(1 for _ in pattern.finditer(item.text)) for item in items]
        return [self.top * min(1.0, n / self.enough) for n in found]


class LocalJudge:
    """Scores a text by the log-odds of two answers of a model: top · p(yes) / (p(yes) + p(no)).

    Args:
        hm: the model that judges.
        template: what it reads, with {prompt} and {text} in it; the answer is its next token.
        yes: answer that earns the whole score, one token, its leading space included.
        no: answer that earns nothing.
        top: the whole score.
        batch_size: texts per forward.

    Raises:
        ConfigError: a template without {text}, or one token for both answers.
        DataError: answers that are not one token each.
    """

    def __init__(
        self,
        hm: HookManager,
        template: str,
        *,
        yes: str = " yes",
        no: str = " no",
        top: float = 2.0,
        batch_size: int = 32,
    ) -> None:
        if "{text}" not in template:
            raise ConfigError(f"template={template!r}: expected '{{text}}' in it, and '{{prompt}}' where it is wanted")
        self.hm, self.template, self.top, self.size = hm, template, top, batch_size
        self.yes, self.no = hm.to_single_token(yes), hm.to_single_token(no)
        if self.yes == self.no:
            raise ConfigError(f"yes={yes!r} and no={no!r} are one token, so every text would have one score")
        self.name = f"local {hm.name} {hm.revision} {template!r} {yes!r} {no!r} {top}"

    def log_odds(self, items: Sequence[Judged]) -> Float[Tensor, " text"]:
        """Return logit(yes) − logit(no) for each text."""
        texts = [filled(self.template, item) for item in items]
        found = []
        for first in range(0, len(texts), self.size):
            tokens = tokenize(self.hm.tokenizer, texts[first : first + self.size])
            logits = answer_logits(self.hm.run(tokens, logits="last"))
            found.append((logits[:, self.yes] - logits[:, self.no]).cpu())
        return torch.cat(found) if found else torch.zeros(0)

    def __call__(self, items: Sequence[Judged]) -> list[Verdict]:
        """Score texts."""
        return [self.top * score for score in self.log_odds(items).sigmoid().tolist()]


class CachedJudge:
    """Asks a judge only for what it has not scored before; the scores are kept in a file of JSON lines.

    Missing scores are not kept, so they are asked for again. A last line that was cut off by a stop is passed over.

    Args:
        judge: the judge.
        path: the file; made at the first score, and added to.
        name: what tells this judge from others in the file; the judge's own `name` by default.

    Raises:
        ConfigError: a judge without a name, and none given.
        ArtifactError: a file that holds something else.
    """

    def __init__(self, judge: Judge, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        own = name if name is not None else getattr(judge, "name", None)
        if not isinstance(own, str) or not own:
            raise ConfigError("this judge has no name, so its scores could be taken for another's; give name=…")
        self.judge, self.path, self.name = judge, Path(path), own
        self.scores: dict[str, float] = _read_scores(self.path)

    def __call__(self, items: Sequence[Judged]) -> list[Verdict]:
        """Score texts, new ones a few at a time, each few kept at once."""
        keys = [digest(self.name, "\0", item.prompt, "\0", item.text) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self.scores}
        found: dict[str, Verdict] = {}
        pending = list(new.items())
        for first in range(0, len(pending), _AT_ONCE):
            part = pending[first : first + _AT_ONCE]
            for (key, _), verdict in zip(part, _verdicts(self.judge, [item for _, item in part]), strict=True):
                found[key] = verdict
                if isinstance(verdict, bool):
                    continue  # no score; `judged` refuses it
                if isinstance(verdict, int | float) and math.isfinite(verdict):
                    self.scores[key] = float(verdict)
            self._add([key for key, _ in part if key in self.scores])
        return [self.scores[key] if key in self.scores else found[key] for key in keys]

    def _add(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # A line that was cut off must not swallow the next one.
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            lines = [json.dumps({"key": key, "score": self.scores[key]}) for key in keys]
            file.write(("\n".join(lines) + "\n").encode())


def judged(judge: Judge, items: Sequence[Judged]) -> tuple[Float[Tensor, " text"], dict[str, int]]:
    """Return a judge's scores, NaN where there is none, and how often each reason for that came.

    Args:
        judge: the judge.
        items: the texts.

    Raises:
        DataError: another number of scores than of texts, a negative score, or something that is no score.
    """
    verdicts = _verdicts(judge, items)
    scores, reasons = [], dict[str, int]()
    for verdict in verdicts:
        if isinstance(verdict, int | float) and not isinstance(verdict, bool) and math.isfinite(verdict):
            if verdict < 0:
                raise DataError(f"the judge gave {verdict}; scores are 0 or more")
            scores.append(float(verdict))
            continue
        if verdict is not None and not isinstance(verdict, Missing) and not isinstance(verdict, float):
            raise DataError(f"the judge gave {verdict!r}; expected a number, Missing(reason) or None")
        reason = verdict.reason if isinstance(verdict, Missing) else "not scored"
        reasons[reason] = reasons.get(reason, 0) + 1
        scores.append(math.nan)
    return torch.tensor(scores), reasons


def _verdicts(judge: Judge, items: Sequence[Judged]) -> list[Verdict]:
    given = judge(items)
    if not isinstance(given, Iterable):
        raise DataError(f"the judge gave {type(given).__name__} for {len(items)} texts; expected a list of scores")
    verdicts = list(given)
    if len(verdicts) != len(items):
        raise DataError(f"the judge gave {len(verdicts)} scores for {len(items)} texts; give one each, None for none")
    return verdicts


def harmonic_mean(scores: Float[Tensor, "aspect *cell"]) -> Float[Tensor, "*cell"]:
    """Return the harmonic mean over the first axis: 0 where any is 0, NaN where any is missing.

    Args:
        scores: each aspect's, 0 or more.

    Source: Wu et al. (2025), "AxBench", arXiv 2501.17148, §4.2: concept, instruction and fluency from 0 to 2.
    """
    kept = torch.where(scores == 0, 1.0, scores)
    mean = len(scores) / kept.reciprocal().sum(0)
    zero = (scores == 0).any(0) & ~scores.isnan().any(0)
    return torch.where(zero, 0.0, mean)


def filled(template: str, item: Judged) -> str:
    """Return a template with its {prompt} and {text} filled in."""
    # Not str.format: braces of a text, or of the template's own, mean nothing here.
    parts = re.split(r"(\{prompt\}|\{text\})", template)
    return "".join({"{prompt}": item.prompt, "{text}": item.text}.get(part, part) for part in parts)


def _read_scores(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; scores are kept in one file: choose a path such as {path}/x.jsonl")
    scores: dict[str, float] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            scores[str(record["key"])] = float(record["score"])
        except (ValueError, KeyError, TypeError) as err:
            # Each stop may have cut off one line; what does not even begin as a record is another file.
            if number == 1 and not line.startswith('{"key"'):
                raise ArtifactError(f"{path} is no file of scores ({err}); choose another path") from err
    return scores
