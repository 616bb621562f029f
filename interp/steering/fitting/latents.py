"""Directions of a sparse dictionary: a latent's own, and the latents that tell a concept best."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Direction, SiteScale, measure_scale
from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.fit import auroc
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.separation import separation
from interp.core.site import Site
from interp.core.stats import Estimate
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.data.pairs import PromptPairs
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.processed import check_bound
from interp.steering.fitting.fit import check_method, concept_tokens

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["LatentScores", "best_latent", "latent_direction"]

_AT_ONCE = 256  # examples that are encoded together
_SHARE = 0.3  # of the groups, held out


def latent_direction(
    hm: HookManager,
    dictionary: Dictionary,
    latent: int,
    *,
    site: Site | str | None = None,
    data: Contrast | ConceptTokens | PromptPairs | None = None,
    where: Where | None = None,
    batch_size: int = 32,
) -> Direction:
    """Return what one unit of a latent adds to the activation of the raw model, as a direction.

    A raw dose is in units of the latent's activation. Where the dictionary normalises every token, its decoder is of
    normalised activations: the direction is scaled by the mean of what its tokens were divided by, which needs data.

    Args:
        hm: the model.
        dictionary: an SAE, or a transcoder, whose latents act where it writes.
        latent: which.
        site: where it acts; by default the site that the dictionary was trained to reconstruct.
        data: examples that the scale is measured on. A dose of 1 "largest" is then the latent's largest activation
            (the max-activation of AxBench).
        where: the token rule of the data; every token that is not special by default.
        batch_size: rows per forward.

    Raises:
        ConfigError: no such latent, a dictionary of another model, or one that normalises and no data.
        SiteError: no site is known, or one that the model lacks.
        ShapeError: a dictionary of another width than the site.

    Source: Templeton et al. (2024), "Scaling Monosemanticity", and AxBench, arXiv 2501.17148, for the decoder row.
    """
    check_bound(dictionary, hm)
    if type(latent) is not int or not 0 <= latent < dictionary.cfg.d_sae:
        raise ConfigError(f"latent={latent!r}: this dictionary has latents 0 to {dictionary.cfg.d_sae - 1}")
    place = _site(dictionary, site, written=True)
    row = _row(hm, dictionary, latent, place)
    space = dictionary.target_space
    if space.normalize != "none" and data is None:
        raise ConfigError(
            f"this dictionary sees activations through {space.normalize}, so how far a latent reaches depends on the "
            "token; give data=… to measure it"
        )
    scale: dict[str, SiteScale] = {}
    stats: dict[str, dict[str, float]] = {}
    hashed: tuple[Tensor, ...] = ()
    read_at = ""
    if data is not None:
        rule = Where() if where is None and not isinstance(data, ConceptTokens) else where
        tokens = concept_tokens(hm, data, where=rule)
        read = place if not isinstance(dictionary, Transcoder) else _site(dictionary, None, written=False)
        held = gather(hm, tokens, [read.short, place.short], batch_size=batch_size)
        factor = _mean_factor(dictionary, held[place.short].x)
        row = row * factor
        active = _latents(dictionary, held[read.short])[:, latent]
        measured = measure_scale(held[place.short].x, row, positive=held[place.short].y == 1)
        scale[place.short] = measured._replace(largest=float(active.max()) * float(row.norm()))
        stats[place.short] = {"max_activation": float(active.max()), "frequency": float((active > 0).double().mean())}
        hashed, read_at = (tokens.tokens.ids, tokens.tokens.mask, tokens.labels), repr(rule)
    settings = {"dictionary": repr(dictionary), "latent": latent}
    return Direction(
        vectors={place.short: row},
        method="latent",
        model=Provenance.of(hm, settings=settings, data=hashed),
        read_at=read_at,
        scale=scale,
        stats=stats,
        name=f"latent {latent}",
        folded=hm.is_folded,
    )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LatentScores(Result):
    """Latents that tell a concept best.

    Attributes:
        name: the concept.
        site: what the dictionary reads.
        latents: best first.
        train: AUROC of each on the examples that chose it.
        held: AUROC on held-out groups, with its 95 % interval.
        frequency: share of the training examples on which each is active.
        n_latents: how many were looked at.
        n_held: held-out examples.
    """

    title: ClassVar[str] = "Latents that tell a concept"
    name: str
    site: str
    latents: list[int]
    train: Float[Tensor, " latent"]
    held: Float[Tensor, "latent bound"]
    frequency: Float[Tensor, " latent"]
    n_latents: int
    n_held: int

    @property
    def best(self) -> int:
        """The latent with the highest AUROC on the training examples."""
        return self.latents[0]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per latent, best first."""
        import pandas as pd

        columns = {"latent": self.latents, "auroc_train": self.train.tolist(), "frequency": self.frequency.tolist()}
        held = dict(zip(("auroc", "auroc_low", "auroc_high"), self.held.T.tolist(), strict=True))
        return pd.DataFrame({**columns, **held})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the held-out AUROC of each latent with its interval."""
        from interp.report.figures import Axis
        from interp.report.intervals import interval_bars

        values = [Estimate(*row) for row in self.held.tolist()]
        labels = Axis("latent", [str(i) for i in self.latents])
        return interval_bars(
            values, labels=labels, title=f"Latents that tell {self.name}", value="held-out AUROC", reference=0.5
        )

    def summary(self) -> str:
        """Say which latents were found, and what they reach on held-out examples."""
        lines = [f"{self.name!r} at {self.site}: best of {self.n_latents} latents, on {self.n_held} held-out examples"]
        for i, train, held in zip(self.latents, self.train.tolist(), self.held.tolist(), strict=True):
            lines.append(f"latent {i}: AUROC {Estimate(*held)}, {train:.4g} on the examples that chose it")
        return "\n".join(lines)


def best_latent(
    hm: HookManager,
    dictionary: Dictionary,
    data: Contrast | ConceptTokens | PromptPairs,
    site: Site | str | None = None,
    *,
    n: int = 5,
    where: Where | None = None,
    pool: str = "max",
    seed: int = 0,
) -> LatentScores:
    """Rank latents by how well their activation tells a concept, on some groups, with what they reach on the others.

    Memory: 4 · examples · d_sae bytes; examples are rows where they are pooled, else tokens.

    Args:
        hm: the model.
        dictionary: an SAE or a transcoder.
        data: as for `fit_direction`.
        site: what it reads; by default what it was trained on.
        n: how many latents to return.
        where: the token rule; every token that is not special by default.
        pool: "max" takes a row's largest activation, as AxBench's detection does; "each" takes every token by itself.
        seed: of the split, which holds out 30 % of the groups.

    Raises:
        ConfigError: an unknown pool, no latents asked for, or a dictionary of another model.
        DataError: one class alone, a single group, or rows of several classes under "max".

    Source: AxBench, arXiv 2501.17148, SAE-A.
    """
    if pool not in ("max", "each") or n < 1:
        raise ConfigError(f"pool={pool!r}, n={n}: expected 'max' or 'each', and at least one latent")
    check_bound(dictionary, hm)
    place = _site(dictionary, site, written=False)
    rule = Where() if where is None and not isinstance(data, ConceptTokens) else where
    tokens = concept_tokens(hm, data, where=rule)
    parts = tokens.split(_SHARE, seed=seed)
    found = []
    for part in parts:
        check_method("mean_difference", part)
        held = gather(hm, part, place)[place.short]
        found.append(_pooled(dictionary, held, pool))
    (x, y, _), (new, truth, groups) = found
    scores = auroc(x.T, y)
    order = scores.argsort(descending=True, stable=True)[: min(n, len(scores))]
    judged = [separation(new[:, i], truth, groups=groups, seed=seed).auroc for i in order.tolist()]
    settings = {"dictionary": repr(dictionary), "n": n, "where": repr(where), "pool": pool}
    return LatentScores(
        provenance=Provenance.of(
            hm, settings=settings, data=(tokens.tokens.ids, tokens.tokens.mask, tokens.labels), seed=seed
        ),
        name=tokens.name,
        site=place.short,
        latents=order.tolist(),
        train=scores[order],
        held=torch.tensor([list(e) for e in judged], dtype=torch.float64),
        frequency=(x[:, order] > 0).double().mean(0),
        n_latents=x.shape[1],
        n_held=len(truth),
    )


def _site(dictionary: Dictionary, given: Site | str | None, *, written: bool) -> Site:
    """Where a dictionary reads, or what it reconstructs."""
    about = dictionary.cfg.metadata
    known = given if given is not None else (about.get("hook_name_out") if written else None) or about.get("hook_name")
    if known is None:
        raise SiteError("the dictionary's metadata have no hook_name; give site=…, such as '6.resid_post'")
    return Site(known)


def _row(hm: HookManager, dictionary: Dictionary, latent: int, site: Site) -> Float[Tensor, "*features"]:
    """What a unit of a latent adds in the raw model's activation; before what each token is divided by."""
    hm.atlas.point(site)
    unit = torch.zeros(2, dictionary.cfg.d_sae, dtype=dictionary.W_dec.dtype, device=dictionary.W_dec.device)
    unit[1, latent] = 1.0
    with torch.no_grad():
        made = dictionary.target_space.unfixed(dictionary.decode_own(unit))
    row = (made[1] - made[0]).float().cpu()
    if len(site.axes) == 4:
        heads = hm.n_kv_heads if site.kind in ("k", "v") else hm.n_heads
        if len(row) % heads:
            raise ShapeError(f"{site.short} has {heads} heads, and the dictionary gives {len(row)} dimensions")
        row = row.unflatten(0, (heads, -1))
    elif site.axes[-1] == "d_model" and len(row) != hm.d_model:
        raise ShapeError(f"{site.short} has width {hm.d_model}, and the dictionary gives {len(row)} dimensions")
    return row


def _mean_factor(dictionary: Dictionary, x: Tensor) -> float:
    """Mean of what normalised tokens are multiplied by on the way back; 1 without normalisation."""
    space = dictionary.target_space
    if space.normalize == "none":
        return 1.0
    with torch.no_grad():
        context = space.own(x.to(dictionary.W_dec))[1]
    return 1.0 if context.factor is None else float(context.factor.double().mean())


def _latents(dictionary: Dictionary, held: Gathered) -> Float[Tensor, "n d_sae"]:
    """Latents of each example, in fp32 on the CPU."""
    like = dictionary.W_dec
    with torch.no_grad():
        parts = [dictionary.encode(x.to(like)).float().cpu() for x in held.x.split(_AT_ONCE)]
    made = torch.cat(parts)
    if not bool(made.isfinite().all()):
        raise DataError("latents hold NaN or infinity; look at the dictionary's dtype and at what it reads")
    return made


def _pooled(dictionary: Dictionary, held: Gathered, pool: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [example d_sae], class and group of each example."""
    made = _latents(dictionary, held)
    if pool == "each":
        return made, held.y == 1, held.group
    rows, at = held.row.unique(return_inverse=True)
    top = torch.full((len(rows), made.shape[1]), -math.inf)
    top.scatter_reduce_(0, at[:, None].expand_as(made), made, "amax")
    label, group = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long)
    label[at], group[at] = held.y, held.group
    if not bool((label[at] == held.y).all()):
        raise DataError("rows hold tokens of several classes, so a row has no class of its own; use pool='each'")
    return top, label == 1, group
