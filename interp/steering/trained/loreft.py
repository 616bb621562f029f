"""LoReFT: an edit of a low-rank subspace of one site, trained on texts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.direction import Dose
from interp.core.errors import ConfigError, ModelError, ShapeError, SiteError
from interp.core.intervention import Affine, Intervention
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.subspace import random_basis
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.pairs import PromptPairs
from interp.steering.trained.training import Texts, TrainedOptions, mean_loss, one_site, train

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["LoReFT", "fit_loreft"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LoReFT(Result):
    """An edit h + Rᵀ(W h + b − R h), R with orthonormal rows: what lies in the subspace R is set from h.

    Attributes:
        site: Short name of the site.
        basis: R [rank d].
        weight: W [rank d].
        bias: b [rank], in units of the activation.
        losses: Mean loss of each step's texts, in nats.
        stats: Figures of the fit, as for `fit_ssv`.
        name: What the concept is called.
        folded: Whether it was fitted on a folded copy of the model.
        notes: What a user should know.
    """

    title: ClassVar[str] = "LoReFT"
    site: str
    basis: Float[Tensor, "rank d"]
    weight: Float[Tensor, "rank d"]
    bias: Float[Tensor, " rank"]
    losses: Float[Tensor, " step"]
    stats: dict[str, float]
    name: str = "concept"
    folded: bool = False
    notes: tuple[str, ...] = ()

    def as_interventions(self, dose: float | Tensor | Dose = 1.0, *, where: Where | None = None) -> list[Intervention]:
        """Return the edit, as one affine map x A + c; in half precision A is rounded as the model's weights are.

        Args:
            dose: the share of the way, 1 as trained; one number for all rows.
            where: the positions; every non-pad position by default.

        Raises:
            ConfigError: a unit other than raw, or a dose per row.
        """
        given = Dose.of(dose)
        if given.unit != "raw" or isinstance(given.value, Tensor):
            raise ConfigError(f"dose={dose!r}: LoReFT takes one plain number, the share of the edit")
        change = (self.weight - self.basis).T @ self.basis
        matrix = torch.eye(change.shape[0]) + given.value * change
        place = Where() if where is None else where
        return [Affine(self.site, matrix, given.value * (self.bias @ self.basis), where=place)]

    def check(self, hm: HookManager) -> None:
        """Refuse a model that this edit does not belong to.

        Raises:
            ModelError: another configuration, or a folded copy where it was fitted on the raw model.
        """
        own, given = self.provenance.config_hash, Provenance.of(hm).config_hash
        if own != given or self.folded != hm.is_folded:
            raise ModelError(
                f"this edit was fitted on {self.provenance.model!r} (config {own}, folded: {self.folded}), not on "
                f"{hm.name!r} (config {given}, folded: {hm.is_folded}); fit one on it"
            )

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per step."""
        import pandas as pd

        return pd.DataFrame({"step": range(1, len(self.losses) + 1), "loss": self.losses.tolist()})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the loss of each step."""
        from interp.report.figures import Axis, line

        title = f"LoReFT of rank {len(self.basis)} at {self.site}"
        return line({"loss": self.losses}, x=Axis("step"), title=title, value="mean loss of a token, nats")

    def summary(self) -> str:
        """Say what was fitted, and what it did to the loss of its texts."""
        after = self.stats.get("loss_after")
        end = "" if after is None else f" → {after:.4g}"
        first = f"{self.name!r}: rank {len(self.basis)} of {self.basis.shape[1]} at {self.site}"
        return "\n".join([first, f"loss {self.stats['loss_before']:.4g}{end}", *self.notes])


def fit_loreft(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    site: Site | str,
    *,
    rank: int = 4,
    options: TrainedOptions | None = None,
    seed: int = 0,
) -> LoReFT:
    """Fit a low-rank linear subspace edit that makes texts with the concept likely.

    Cost: as for `fit_ssv`, and a QR of [d rank] per step.

    Args:
        hm: The model; its parameters are left as they are and get no gradient.
        data: Positive texts are trained on.
        site: One site with one vector a token, without heads.
        rank: Dimensions of the subspace.
        options: How; by default 24 epochs of 18 texts at 9e-4, the authors' settings in AxBench.
        seed: Of the start and of the order of the texts.

    Raises:
        ShapeError: A rank below 1 or above the site's width.
        DataError, SiteError, ModelError, TrainingError: As for `fit_ssv`.

    Source: Wu et al. (2024), "ReFT", arXiv 2404.03592, §3.2. Departures: one site; W starts as R and b as 0, so that
    the first step sees the model as it is; all tokens after BOS are edited unless `options.where` names some, such as
    the first and last of a prompt.
    """
    chosen = options or TrainedOptions(epochs=24, batch_size=18, lr=9e-4)
    place = one_site(hm, site)
    if len(place.axes) != 3:
        raise SiteError(f"{place.short} has axes {' '.join(place.axes)}; LoReFT needs one vector a token")
    width = int(hm.atlas.shape(place)[-1])
    if type(rank) is not int or not 1 <= rank <= width:
        raise ShapeError(f"rank={rank!r} at {place.short}: expected 1 to {width}, the width there")
    texts = Texts.of(hm, data, chosen)
    rows = texts.positive.nonzero()[:, 0]
    trainee = _LowRank(rank, width, hm.device, seed)
    before = mean_loss(hm, texts, place, None, rows)
    history = train(hm, texts, place, trainee, rows, options=chosen, seed=seed)
    stats = {**history.stats(), "loss_before": before}
    if history.stopped is None:
        stats["loss_after"] = mean_loss(hm, texts, place, trainee, rows)
    tokens = texts.concept.tokens
    settings = {"site": place.short, "rank": rank, **chosen.settings()}
    return LoReFT(
        provenance=Provenance.of(hm, settings=settings, data=(tokens.ids, tokens.mask), seed=seed),
        site=place.short,
        basis=trainee.basis().detach().cpu(),
        weight=trainee.weight.detach().cpu(),
        bias=trainee.bias.detach().cpu(),
        losses=history.losses,
        stats=stats,
        name=texts.concept.name,
        folded=hm.is_folded,
        notes=(*texts.concept.notes, *history.notes(chosen.epochs * history.epoch)),
    )


class _LowRank:
    """h + Rᵀ(W h + b − R h)."""

    def __init__(self, rank: int, width: int, device: torch.device, seed: int) -> None:
        start = random_basis(rank, width, seed=seed)
        self.turn = start.T.contiguous().to(device).requires_grad_(True)
        self.weight = start.to(device, copy=True).requires_grad_(True)
        self.bias = torch.zeros(rank, device=device, requires_grad=True)

    def basis(self) -> Tensor:
        q, r = torch.linalg.qr(self.turn)
        return (q * r.diagonal().sign()).T

    def parameters(self) -> list[Tensor]:
        return [self.turn, self.weight, self.bias]

    def edit(self, x: Tensor, inner: Bool[Tensor, "batch pos"]) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        basis, weight, bias = (v.to(wide) for v in (self.basis(), self.weight, self.bias))
        new = wide + (wide @ (weight - basis).T + bias) @ basis
        return torch.where(inner[..., None], new, wide).to(x.dtype)

    def penalty(self) -> float:
        return 0.0

    def stepping(self, step: Callable[[], object]) -> None:
        step()
