"""`select_direction`: of some directions, the one whose ablation stops a behaviour and whose addition starts it."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.intervention import Add, Edit, Intervention
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where
from interp.steering.fitting.orthogonal import stream_writers

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["DirectionChoice", "Score", "SelectOptions", "select_direction", "token_log_odds"]

Score = Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, " row"]]
"""How much of a behaviour logits [row d_vocab] at each prompt's end show; the higher, the more."""


@dataclass(frozen=True)
class SelectOptions:
    """What a candidate must meet to be chosen; the defaults are those of Arditi et al.

    Args:
        max_kl: largest mean KL, in nats, that its ablation may cost on prompts without the behaviour.
        min_induce: smallest mean score that its addition must reach on prompts without the behaviour.
        depth: candidates at this share of the depth or beyond are left out: they write the answer itself.
        rows: prompts times candidates that run together.
        chat: whether `fit_refusal` puts instructions into the model's chat template, where there is one.
    """

    max_kl: float = 0.1
    min_induce: float = 0.0
    depth: float = 0.8
    rows: int = 64
    chat: bool = True

    def __post_init__(self) -> None:
        if not (self.max_kl > 0 and 0 < self.depth <= 1 and self.rows > 0 and math.isfinite(self.min_induce)):
            raise ConfigError(f"{self}: expected max_kl > 0, a depth in (0, 1], rows ≥ 1 and a finite min_induce")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DirectionChoice(Result):
    """Candidates with what each does, and which one was chosen.

    Attributes:
        name: the behaviour.
        sites: site of each candidate.
        labels: what each was read at, such as "-1 '\\n'"; empty where that was not given.
        vectors: each candidate's, with its own length.
        bypass: mean score on prompts with the behaviour, the candidate ablated everywhere; low is good.
        induce: mean score on prompts without it, the candidate added once at its site; high is good.
        kl: mean KL (nats) of the plain model's prediction to that under the ablation, on prompts without it.
        base: mean score of the plain model on prompts with the behaviour, and without it.
        allowed: which candidates meet the options.
        chosen: the allowed one with the lowest bypass; -1 where none is allowed.
        writers: where an ablation acts: what is written to the stream.
        limits: max_kl, min_induce and depth.
    """

    title: ClassVar[str] = "Choice of a direction"
    name: str
    sites: list[str]
    labels: list[str]
    vectors: Float[Tensor, "candidate d_model"]
    bypass: Float[Tensor, " candidate"]
    induce: Float[Tensor, " candidate"]
    kl: Float[Tensor, " candidate"]
    base: tuple[float, float]
    allowed: Bool[Tensor, " candidate"]
    chosen: int
    writers: list[str]
    limits: tuple[float, float, float]
    folded: bool

    @property
    def direction(self) -> Direction:
        """The chosen direction at its own site: adding it once brings the behaviour about.

        Raises:
            DataError: no candidate was allowed.
        """
        i = self._chosen()
        return self._made({self.sites[i]: self.vectors[i]}, "add")

    @property
    def ablation(self) -> Direction:
        """The chosen direction wherever something is written to the stream: ablating it there removes it throughout.

        Raises:
            DataError: no candidate was allowed.
        """
        i = self._chosen()
        return self._made(dict.fromkeys(self.writers, self.vectors[i]), "ablate")

    def _chosen(self) -> int:
        if self.chosen < 0:
            raise DataError(f"no candidate for {self.name!r} met the limits; see to_frame(), or loosen SelectOptions")
        return self.chosen

    def _made(self, vectors: dict[str, Tensor], operation: str) -> Direction:
        i = self.chosen
        stats = {"bypass": float(self.bypass[i]), "induce": float(self.induce[i]), "kl": float(self.kl[i])}
        return Direction(
            vectors=vectors,
            method="mean_difference",
            model=self.provenance,
            operation=operation,
            read_at=f"{self.sites[i]} {self.labels[i]}".strip(),
            stats=dict.fromkeys(vectors, stats),
            name=self.name,
            folded=self.folded,
        )

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per candidate."""
        import pandas as pd

        return pd.DataFrame(
            {
                "site": self.sites,
                "read_at": self.labels,
                "bypass": self.bypass.tolist(),
                "induce": self.induce.tolist(),
                "kl": self.kl.tolist(),
                "norm": self.vectors.norm(dim=1).tolist(),
                "allowed": self.allowed.tolist(),
                "chosen": [i == self.chosen for i in range(len(self.sites))],
            }
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw bypass and induce scores and the KL of all candidates, one line per place they were read at."""
        from interp.report.figures import curves

        panels: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        layers = torch.tensor([float(Site(s).layer or 0) for s in self.sites])
        figures = (("score, ablated", self.bypass), ("score, added", self.induce), ("KL of ablation, nats", self.kl))
        for heading, values in figures:
            for label in dict.fromkeys(self.labels):
                rows = torch.tensor([i for i, held in enumerate(self.labels) if held == label])
                panels.setdefault(heading, {})[label or "candidates"] = (layers[rows], values[rows])
        return curves(panels, x="layer", title=f"Candidates for {self.name}")

    def summary(self) -> str:
        """Say which candidate was chosen, and what it does."""
        head = f"{self.name!r}: {int(self.allowed.sum())} of {len(self.sites)} candidates meet the limits"
        if self.chosen < 0:
            return f"{head}, so none was chosen"
        i = self.chosen
        return (
            f"{head}; chosen: {self.sites[i]} {self.labels[i]}\n"
            f"score with the behaviour {self.base[0]:.3g}, ablated {float(self.bypass[i]):.3g}; without it "
            f"{self.base[1]:.3g}, added {float(self.induce[i]):.3g}; KL of the ablation {float(self.kl[i]):.3g} nats"
        )


def select_direction(
    hm: HookManager,
    candidates: Sequence[Direction],
    score: Score,
    present: Tokens,
    absent: Tokens,
    *,
    labels: Sequence[str] = (),
    options: SelectOptions | None = None,
) -> DirectionChoice:
    """Choose the direction whose ablation removes a behaviour most, among those whose addition brings it about.

    Every candidate is ablated at every layer and position on prompts that show the behaviour (bypass) and on prompts
    that do not (KL), and added once, at its own site and every position, on prompts that do not (induce). Several
    candidates run as rows of one batch. Memory: that of a forward of `options.rows` rows, and 4 · prompts · d_vocab
    bytes.

    Args:
        hm: the model.
        candidates: each with one vector at one site of the residual stream.
        score: the behaviour in logits, such as `token_log_odds` of the tokens that an answer with it begins with.
        present: prompts that show the behaviour.
        absent: prompts that do not.
        labels: what each candidate was read at; for tables alone.
        options: the limits.

    Warns:
        UserWarning: no candidate meets the limits.

    Raises:
        DataError: no candidates, or a score that is NaN.
        SiteError: a candidate at several sites, or outside the residual stream.
        ShapeError: a score that is not one number per row.

    Source: Arditi et al., arXiv 2406.11717, §2.3 and appendix C. Departure: ablations act where the stream is written,
        which removes the direction from it at every layer too.
    """
    how = SelectOptions() if options is None else options
    sites, vectors = _candidates(hm, candidates)
    if labels and len(labels) != len(candidates):
        raise ShapeError(f"{len(labels)} labels for {len(candidates)} candidates; give one each")
    plain_logits = hm.run(absent, logits="last").logits[:, 0]
    with_it, without = _scored(score, hm.run(present, logits="last").logits[:, 0]), _scored(score, plain_logits)
    base = plain_logits.float().log_softmax(-1)
    bypass, induce, kl = [], [], []
    per = max(1, how.rows // max(len(present), len(absent)))
    from tqdm.auto import tqdm

    for part in tqdm(range(0, len(vectors), per), desc="candidates", unit="batch", disable=None):
        some, where = vectors[part : part + per], sites[part : part + per]
        bypass.append(_scored(score, _run(hm, present, _ablating(hm, some, len(present)), len(some))))
        ablated = _run(hm, absent, _ablating(hm, some, len(absent)), len(some)).float().log_softmax(-1)
        plain = base.repeat(len(some), 1)
        kl.append((plain.exp() * (plain - ablated)).sum(-1))
        induce.append(_scored(score, _run(hm, absent, _adding(where, some, len(absent)), len(some))))
    figures = [torch.cat(held).double().cpu().reshape(len(vectors), -1).mean(1) for held in (bypass, induce, kl)]
    allowed, chosen = _chosen(hm, sites, figures, how, candidates[0].name)
    settings = {"sites": sites, "labels": list(labels), "options": repr(how)}
    hashed = [t for tokens in (present, absent) for t in (tokens.ids, tokens.mask)]
    return DirectionChoice(
        provenance=Provenance.of(hm, settings=settings, data=hashed),
        name=candidates[0].name,
        sites=sites,
        labels=list(labels) or [""] * len(sites),
        vectors=vectors,
        bypass=figures[0],
        induce=figures[1],
        kl=figures[2],
        base=(float(with_it.mean()), float(without.mean())),
        allowed=allowed,
        chosen=chosen,
        writers=stream_writers(hm),
        limits=(how.max_kl, how.min_induce, how.depth),
        folded=hm.is_folded,
    )


def _chosen(
    hm: HookManager, sites: list[str], figures: Sequence[Tensor], how: SelectOptions, name: str
) -> tuple[Bool[Tensor, " candidate"], int]:
    """Which candidates meet the limits, and the one of them with the lowest bypass score."""
    last = how.depth * hm.n_layers
    early = torch.tensor([(Site(s).layer or 0) < last for s in sites])
    allowed = early & (figures[1] > how.min_induce) & (figures[2] < how.max_kl)
    if bool(allowed.any()):
        return allowed, int(figures[0].masked_fill(~allowed, math.inf).argmin())
    warnings.warn(
        f"none of {len(sites)} candidates for {name!r} has an induce score above {how.min_induce}, a KL below "
        f"{how.max_kl} and a layer below {last:.3g}; nothing was chosen",
        stacklevel=3,
    )
    return allowed, -1


def token_log_odds(tokens: Sequence[int]) -> Score:
    """Return the score log p / (1 − p), with p the probability that the next token is one of some.

    Args:
        tokens: their ids.

    Raises:
        DataError: no tokens.
    """
    ids = torch.tensor(sorted(set(tokens)))
    if not len(ids):
        raise DataError("token_log_odds was given no tokens; give the ids that answers with the behaviour begin with")
    if ids.is_floating_point() or ids.dtype == torch.bool or int(ids[0]) < 0:
        raise DataError(f"token_log_odds({list(tokens)!r}): expected ids of tokens, whole numbers ≥ 0")

    def score(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
        if int(ids[-1]) >= logits.shape[-1]:
            raise DataError(f"token {int(ids[-1])} is not in this vocabulary of {logits.shape[-1]} tokens")
        inside = torch.zeros(logits.shape[-1], dtype=torch.bool)
        inside[ids] = True
        inside, wide = inside.to(logits.device), logits.double()
        one, rest = wide.masked_fill(~inside, -math.inf), wide.masked_fill(inside, -math.inf)
        return one.logsumexp(-1) - rest.logsumexp(-1)

    return score


def _candidates(
    hm: HookManager, candidates: Sequence[Direction]
) -> tuple[list[str], Float[Tensor, "candidate d_model"]]:
    if not candidates:
        raise DataError("no candidates were given; fit some with fit_direction, site by site")
    for one in candidates:
        one.check(hm)
        if len(one.sites) != 1 or Site(one.sites[0]).kind not in ("resid_pre", "resid_mid", "resid_post"):
            raise SiteError(f"a candidate has one vector in the residual stream; {one!r} is another kind")
    return [one.sites[0] for one in candidates], torch.stack([one[one.sites[0]] for one in candidates])


def _scored(score: Score, logits: Tensor) -> Float[Tensor, " row"]:
    values = score(logits)
    if values.shape != logits.shape[:1]:
        raise ShapeError(f"the score gave {tuple(values.shape)} for {len(logits)} rows; expected one number per row")
    if bool(values.isnan().any()):
        raise DataError("the score is NaN on some prompt; look at the tokens that it is about")
    return values


def _run(hm: HookManager, tokens: Tokens, write: list[Intervention], times: int) -> Float[Tensor, "row d_vocab"]:
    """Last logits of the batch, once per candidate, candidate by candidate."""
    rows = torch.arange(len(tokens)).repeat(times)
    return hm.run(tokens.take(rows), write=write, logits="last").logits[:, 0]


def _ablating(hm: HookManager, vectors: Tensor, n: int) -> list[Intervention]:
    """Each candidate projected out of its own rows, wherever the stream is written."""
    rows = (vectors / vectors.norm(dim=1, keepdim=True)).repeat_interleave(n, 0)

    def project(x: Tensor) -> Tensor:
        u = rows.to(x.device, x.dtype)[:, None]
        return x - (x * u).sum(-1, keepdim=True) * u

    return [Edit(site, project) for site in stream_writers(hm)]


def _adding(sites: Sequence[str], vectors: Tensor, n: int) -> list[Intervention]:
    """Each candidate added at its own site, in its own rows."""
    return [
        Add(site, v, where=Where(rows=slice(i * n, (i + 1) * n)))
        for i, (site, v) in enumerate(zip(sites, vectors, strict=True))
    ]
