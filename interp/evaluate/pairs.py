"""How well a model tells answers from foils: accuracy, logit difference and log-probability of prompt pairs."""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.metrics import answer_logits
from interp.core.result import Provenance, Result, token_names
from interp.core.stats import Estimate, bootstrap
from interp.core.text import Tokens, pad_id_of, pad_rows
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["PairScores", "pair_accuracy"]

_SIDES = ("clean", "corrupted")
_FIGURES = ("accuracy", "logit_diff", "log_prob", "top1")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PairScores(Result):
    """How a model answers prompt pairs, per pair, on the clean prompts (row 0) and on the corrupted ones (row 1).

    Attributes:
        data: what the pairs are called.
        logit_diff: mean log-probability of the answers − that of the foils, in nats; for single tokens this is the
            logit difference. NaN where a pair has no foils.
        accuracy: 1 where the best answer beats every foil (a tie does not), else 0; NaN where a pair has no foils.
        top1: 1 where an answer's tokens are what greedy decoding gives (a tie is not), else 0.
        log_prob: log Σ p(answer), in nats.
        chance: accuracy of a guess among a pair's answers and foils; NaN where it has no foils.
        full: whether answers of several tokens were scored whole, or by their first token.
        n_bootstrap: resamples behind the intervals.
        prompts: the texts, clean and corrupted, as the tokens say them.
        meta: facts of each pair.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Prompt pairs"
    data: str
    logit_diff: Float[Tensor, "side pair"]
    accuracy: Float[Tensor, "side pair"]
    top1: Float[Tensor, "side pair"]
    log_prob: Float[Tensor, "side pair"]
    chance: Float[Tensor, " pair"]
    full: bool
    n_bootstrap: int
    prompts: list[list[str]]
    meta: list[dict[str, Any]]
    notes: list[str]

    def estimate(self, figure: str, side: str = "clean") -> Estimate:
        """Return the mean of a figure over pairs, with its interval.

        The same resampled pairs serve every figure and side. Pairs without foils are left out of the figures that
        need them.

        Args:
            figure: "accuracy", "logit_diff", "log_prob" or "top1".
            side: "clean", "corrupted", or "gap" for clean − corrupted within pairs.

        Returns:
            Mean, and the 2.5 % and 97.5 % quantiles of the bootstrap's means; NaN where no pair has the figure.

        Raises:
            ConfigError: another figure or side.
        """
        if figure not in _FIGURES or side not in (*_SIDES, "gap"):
            raise ConfigError(
                f"estimate({figure!r}, {side!r}): expected one of {', '.join(_FIGURES)}, and clean, corrupted or gap"
            )
        values: Tensor = getattr(self, figure)
        row = values[0] - values[1] if side == "gap" else values[_SIDES.index(side)]
        return bootstrap(row, n_bootstrap=self.n_bootstrap, seed=self.provenance.seed or 0)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per pair and side, with the pair's facts as columns."""
        import pandas as pd

        rows = [
            {
                **self.meta[pair],
                "pair": pair,
                "side": side,
                "prompt": self.prompts[s][pair],
                **{figure: float(getattr(self, figure)[s, pair]) for figure in _FIGURES},
                "chance": float(self.chance[pair]),
            }
            for s, side in enumerate(_SIDES)
            for pair in range(len(self.chance))
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw both sides' logit differences, pairs sorted by the clean one; log-probabilities where there are none."""
        figures = importlib.import_module("interp.report.figures")
        compared = bool(self.logit_diff.isfinite().any())
        values = self.logit_diff if compared else self.log_prob
        order = values[0].argsort()
        unit = "logit difference" if compared else "log p(answer), nats"
        x = figures.Axis("pair, sorted by the clean prompt", [str(i) for i in order.tolist()])
        series = {side: values[s][order] for s, side in enumerate(_SIDES)}
        return figures.line(series, x=x, title=f"{self.data}: {unit}", value=unit)

    def summary(self) -> str:
        """Give the means with their intervals, both sides."""
        n, chance = len(self.chance), self.chance[self.chance.isfinite()]
        guess = f", chance {float(chance.mean()):.1%}" if len(chance) else ", no foils"
        scored = "whole answers" if self.full else "first tokens of the answers"
        lines = [f"{self.data}: {n} pairs{guess}; {scored}; 95 % intervals"]
        for side in _SIDES:
            parts = [
                _shown("accuracy", self.estimate("accuracy", side), percent=True),
                _shown("logit difference", self.estimate("logit_diff", side)),
                _shown("top-1", self.estimate("top1", side), percent=True),
                _shown("log p(answer)", self.estimate("log_prob", side)),
            ]
            lines.append(f"{side}: " + ", ".join(p for p in parts if p))
        return "\n".join([*lines, *self.notes])


def pair_accuracy(
    hm: "HookManager",
    pairs: PromptPairs | PairTokens,
    *,
    full: bool = False,
    bos: bool | None = None,
    batch_size: int = 64,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> PairScores:
    """Measure how a model answers prompt pairs, on the clean and on the corrupted prompts.

    Rows are run by length, padded on the left, so that pads are few and only the logits of one position are made.
    Memory: two copies of them, 4 · batch_size · d_vocab bytes each in fp32, plus one forward of batch_size rows.

    Args:
        hm: the model.
        pairs: the pairs; prompts of a pair may differ in length here.
        full: score answers and foils of several tokens whole, by the sum of their tokens' log-probabilities, for one
            forward row more per further token; otherwise by their first token, as the metrics of `PairTokens` do.
        bos: as in `PromptPairs.tokens`; only for `PromptPairs`.
        batch_size: rows per forward.
        n_bootstrap: resamples of the pairs behind the intervals.
        seed: of the resampling.

    Returns:
        Scores per pair and side.

    Raises:
        ConfigError: a batch_size or n_bootstrap below 1.
        DataError: pairs that cannot be used, or a model that gives NaN.

    Source: accuracy and logit difference as in Wang et al. (2022), arXiv 2211.00593, §2; percentile bootstrap over
    pairs as in Efron and Tibshirani (1993), §13.3.
    """
    for name, value in (("batch_size", batch_size), ("n_bootstrap", n_bootstrap)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r}: expected a whole number ≥ 1")
    if isinstance(pairs, PairTokens) and bos is not None:
        raise DataError("bos=… is for PromptPairs; these pairs are tokens already")
    made = pairs if isinstance(pairs, PairTokens) else pairs.tokens(hm, bos=bos, same_length=False)
    if not full:
        made.check_first_tokens()
    sides = (hm.to_tokens(made.clean), hm.to_tokens(made.corrupted))
    rows = [[row[mask].tolist() for row, mask in zip(side.ids, side.mask, strict=True)] for side in sides]
    answers, foils = (_candidates(held, full) for held in (made.answers, made.foils))
    said = _ask(hm, rows, _wanted(answers, foils), batch_size)
    scores = [[_score(said, s, i, answers[i], foils[i]) for i in range(len(made))] for s in range(len(sides))]
    table = torch.tensor(scores, dtype=torch.float32).permute(2, 0, 1)
    chance = [len(a) / (len(a) + len(f)) if f else math.nan for a, f in zip(answers, foils, strict=True)]
    settings = {"data": made.name, "full": full, "bos": bos, "batch_size": batch_size, "n_bootstrap": n_bootstrap}
    inputs = [t for side in sides for t in (side.ids, side.mask)]
    return PairScores(
        provenance=Provenance.of(hm, settings=settings, data=inputs, seed=seed),
        data=made.name,
        accuracy=table[0],
        logit_diff=table[1],
        log_prob=table[2],
        top1=table[3],
        chance=torch.tensor(chance),
        full=full,
        n_bootstrap=n_bootstrap,
        prompts=[["".join(token_names(hm, torch.tensor(row))) for row in held] for held in rows],
        meta=[dict(m) for m in made.meta] or [{} for _ in range(len(made))],
        notes=[*made.notes, *dict.fromkeys(note for side in sides for note in hm.notes_for(side))],
    )


class _Query(NamedTuple):
    """One row to run: a prompt, and the tokens of an answer before the one that is asked for."""

    side: int
    pair: int
    prefix: tuple[int, ...] = ()


class _Said(NamedTuple):
    """What the model gives a token, and whether it gives that much to no other."""

    log_prob: float
    first: bool


_Candidates = list[list[tuple[int, ...]]]


def _candidates(held: Sequence[Sequence[tuple[int, ...]]], full: bool) -> _Candidates:
    """The tokens that are scored of each pair's answers or foils; several that begin alike are one by first tokens."""
    return [list(dict.fromkeys(c if full else c[:1] for c in candidates)) for candidates in held]


def _wanted(answers: _Candidates, foils: _Candidates) -> dict[_Query, list[int]]:
    """The rows to run, and the tokens whose log-probability is asked for after each."""
    wanted: dict[_Query, dict[int, None]] = {}
    for side in range(len(_SIDES)):
        for pair, candidates in enumerate(zip(answers, foils, strict=True)):
            for candidate in (c for held in candidates for c in held):
                for i, token in enumerate(candidate):
                    wanted.setdefault(_Query(side, pair, candidate[:i]), {})[token] = None
    return {query: list(tokens) for query, tokens in wanted.items()}


def _ask(
    hm: "HookManager", rows: Sequence[Sequence[list[int]]], wanted: dict[_Query, list[int]], batch_size: int
) -> dict[_Query, dict[int, _Said]]:
    said: dict[_Query, dict[int, _Said]] = {}
    by_length = sorted(wanted, key=lambda q: len(rows[q.side][q.pair]) + len(q.prefix))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        texts = [[*rows[q.side][q.pair], *q.prefix] for q in batch]
        # On the left: every row then ends in the last column, and the model makes the logits of that one alone.
        tokens = Tokens(*pad_rows(texts, pad_id_of(hm.tokenizer), side="left"), tokenizer=hm.tokenizer)
        out = hm.run(tokens, logits="last")
        found = _log_probs(answer_logits(out), [wanted[q] for q in batch])
        for query, (values, first) in zip(batch, found, strict=True):
            if any(math.isnan(v) for v in values):
                raise DataError(f"the model gives NaN after the {_SIDES[query.side]} prompt of pair {query.pair}")
            both = zip(wanted[query], values, strict=True)
            said[query] = {token: _Said(value, token == first) for token, value in both}
    return said


def _log_probs(
    logits: Float[Tensor, "row d_vocab"], wanted: Sequence[Sequence[int]]
) -> Iterator[tuple[list[float], int | None]]:
    """Yield, for each row, the log-probabilities of some tokens, and the token with the largest logit (None: a tie)."""
    largest = max(max(tokens) for tokens in wanted)
    if largest >= logits.shape[1]:
        raise DataError(f"an answer or foil is token {largest}, outside the vocabulary 0 … {logits.shape[1] - 1}")
    ids, mask = pad_rows(wanted, 0)
    total = logits.logsumexp(-1).double()
    values = logits.gather(1, ids.to(logits.device)).double() - total[:, None]
    best, top = logits.max(-1)
    tied = (logits == best[:, None]).sum(-1) > 1
    columns = (values.cpu(), mask, top.cpu(), tied.cpu())
    for row, kept, token, tie in zip(*columns, strict=True):
        yield row[kept].tolist(), None if tie else int(token)


def _score(
    said: Mapping[_Query, Mapping[int, _Said]],
    side: int,
    pair: int,
    answers: Sequence[tuple[int, ...]],
    foils: Sequence[tuple[int, ...]],
) -> tuple[float, float, float, float]:
    """Accuracy, logit difference, log-probability and top-1 of one pair on one side."""

    def parts(candidate: tuple[int, ...]) -> list[_Said]:
        return [said[_Query(side, pair, candidate[:i])][token] for i, token in enumerate(candidate)]

    right, wrong = ([sum(p.log_prob for p in parts(c)) for c in held] for held in (answers, foils))
    top1 = any(all(p.first for p in parts(c)) for c in answers)
    log_prob = float(torch.tensor(right, dtype=torch.float64).logsumexp(0))
    if not wrong:
        return math.nan, math.nan, log_prob, float(top1)
    return float(max(right) > max(wrong)), fmean(right) - fmean(wrong), log_prob, float(top1)


def _shown(name: str, found: Estimate, *, percent: bool = False) -> str:
    form = ".1%" if percent else "+.3f"
    if math.isnan(found.mean):
        return ""
    return f"{name} {found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"
