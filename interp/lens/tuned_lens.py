"""The tuned lens: the logit lens after one affine map per layer, fitted to say what the model will say in the end.

Source: Belrose et al. (2023), arXiv 2303.08112, §2.2 and §3: lens(h) = readout(h + h A + b), A and b of each layer
fitted to KL(model's output ‖ lens), identity at the start. Departures: see `interp.lens.tuned_fit`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.disk import weights_digest
from interp.core.errors import DataError, ModelError, SiteError
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.stats import bootstrap
from interp.lens.capture import last_stream, residual_sites
from interp.lens.logit_lens import LogitLensResult, read_early

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["TunedLens", "tuned_lens"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TunedLens(Result):
    """One affine map per residual site, with the record of its fit.

    Attributes:
        sites: Short names of the translated sites.
        weight: A of each: the stream h becomes h + h A + b.
        bias: b of each, in units of the stream.
        final: The last stream, which is read as it is.
        steps: Optimiser steps taken.
        tokens: Tokens that counted in them.
        stopped: Whether the fit was stopped before its last step.
        losses: KL(model ‖ lens) of each step's batch before the step, in nats.
        kl: Mean KL of each held-out row, of every site and of `final`, in nats; no rows where nothing was held out.
        kl_logit_lens: The same for the logit lens.
        model_weights: Digest of the weights of the model that it was fitted on.
        folded: Whether that was a folded copy (`hm.folded()`).
    """

    title: ClassVar[str] = "Tuned lens"
    sites: list[str]
    weight: Float[Tensor, "site d_model d_model"]
    bias: Float[Tensor, "site d_model"]
    final: str
    steps: int
    tokens: int
    stopped: bool
    losses: Float[Tensor, "step site"]
    kl: Float[Tensor, "place row"]
    kl_logit_lens: Float[Tensor, "place row"]
    model_weights: str
    folded: bool

    @classmethod
    def identity(cls, hm: HookManager, sites: Sequence[Site | str] | None = None) -> "TunedLens":
        """Return the lens before any fit: every map is the identity, so it reads as the logit lens does.

        Args:
            hm: the model.
            sites: residual sites or globs; None takes `0.resid_pre` and every `resid_post`. The last one has no map.

        Raises:
            SiteError: no residual stream before the last one.
        """
        final = last_stream(hm)
        names = [site.short for site in residual_sites(hm, sites) if site != final]
        if not names:
            raise SiteError(f"{final.short} is read as it is, so there is nothing to fit; give earlier residual sites")
        n, d = len(names), hm.d_model
        return cls(
            provenance=Provenance.of(hm, settings={"sites": names}),
            sites=names,
            weight=torch.zeros(n, d, d),
            bias=torch.zeros(n, d),
            final=final.short,
            steps=0,
            tokens=0,
            stopped=False,
            losses=torch.zeros(0, n),
            kl=torch.zeros(n + 1, 0),
            kl_logit_lens=torch.zeros(n + 1, 0),
            model_weights=weights_digest(hm.root),
            folded=hm.is_folded,
        )

    @property
    def places(self) -> list[str]:
        """The sites, and the last stream."""
        return [*self.sites, self.final]

    def check(self, hm: HookManager) -> None:
        """Refuse a model that this lens was not fitted on; other weights of the same architecture get a warning.

        Args:
            hm: the model.

        Raises:
            ModelError: another configuration or width, or a folded model where it was not, and the other way.
        """
        own = self.provenance
        d = self.weight.shape[-1]
        if hm.d_model != d:
            raise ModelError(f"this lens is of width {d} and {hm.name or 'the model'} of {hm.d_model}; fit one on it")
        if Provenance.of(hm).config_hash != own.config_hash or self.folded != hm.is_folded:
            kind = "folded" if self.folded else "raw"
            raise ModelError(
                f"this lens was fitted on {own.model!r} ({kind}, config {own.config_hash}), not on {hm.name!r} "
                f"({'folded' if hm.is_folded else 'raw'}, config {Provenance.of(hm).config_hash}); fit one on it"
            )
        if weights_digest(hm.root) != self.model_weights:
            warnings.warn(
                f"this lens was fitted on other weights of the same architecture ({own.model!r}); what it says of "
                f"{hm.name!r} is what that model would have meant",
                stacklevel=3,
            )

    def translate(self, site: Site | str, stream: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Return what a site's stream is read as; the last stream as it is.

        Args:
            site: the site.
            stream: its activations.

        Raises:
            SiteError: a site that this lens has no map of.
        """
        name = Site(site).short
        if name == self.final:
            return stream
        if name not in self.sites:
            raise SiteError(f"this lens has no map of {name}; it has {', '.join(self.sites)}")
        at = self.sites.index(name)
        h = stream.to(torch.promote_types(stream.dtype, torch.float32))
        return (h + h @ self.weight[at].to(h) + self.bias[at].to(h)).to(stream.dtype)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per place: its KL on held-out text, beside the logit lens', with 95 % intervals, in nats."""
        import pandas as pd

        rows = []
        for i, place in enumerate(self.places):
            ours, theirs = bootstrap(self.kl[i]), bootstrap(self.kl_logit_lens[i])
            both = {"tuned_lens": ours, "logit_lens": theirs}
            named = {f"{k}{end}": x for k, e in both.items() for end, x in zip(("", "_low", "_high"), e, strict=True)}
            last = float(self.losses[-1, i]) if len(self.losses) and i < len(self.sites) else 0.0
            rows.append({"site": place, **named, "last_loss": last})
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the held-out KL of both lenses over the places; where nothing was held out, the loss over the steps."""
        from interp.report.figures import Axis, line

        if not self.kl.shape[1]:
            series = {site: self.losses[:, i] for i, site in enumerate(self.sites)}
            return line(series, x=Axis("step"), title="Fit of the tuned lens", value="KL to output, nats")
        series = {"logit lens": self.kl_logit_lens.mean(1), "tuned lens": self.kl.mean(1)}
        title = "How far from the output each layer is read"
        return line(series, x=Axis("read at", self.places), title=title, value="KL to output, nats")

    def summary(self) -> str:
        """Say what was fitted, and the held-out KL of both lenses."""
        head = f"{len(self.sites)} maps, {self.steps} steps on {self.tokens} tokens{', stopped early' * self.stopped}"
        if not self.kl.shape[1]:
            return head + "; nothing was held out, so its KL on new text is not known (evaluate_tuned_lens)"
        lines = [f"{head}; KL to the output on {self.kl.shape[1]} held-out rows, nats"]
        for place, ours, theirs in zip(self.places, self.kl, self.kl_logit_lens, strict=True):
            lines.append(f"{place}: tuned {bootstrap(ours)}, logit lens {bootstrap(theirs)}")
        return "\n".join(lines)


def tuned_lens(
    hm: HookManager,
    text: Any,
    lens: TunedLens,
    *,
    sites: Sequence[Site | str] | None = None,
    top_k: int = 5,
    targets: int | Int[Tensor, "rows columns"] | None = None,
    pos: "int | Sequence[int] | Int[Tensor, 'rows *n'] | None" = None,
) -> LogitLensResult:
    """Read every residual site through a tuned lens: what the model will say, as far as an affine map can tell.

    Args:
        hm: The model that the lens was fitted on.
        text: As for `logit_lens`.
        lens: The lens.
        sites: Those to read; None takes all it has maps of and the last stream.
        top_k, targets, pos: As for `logit_lens`.

    Returns:
        The readings, of the same kind as the logit lens'. A fitted probe can add information: compare with a lens
        fitted on a model without training.

    Raises:
        DataError: No lens.
        ModelError: A lens of another model.
        SiteError: A site that the lens has no map of.

    Source: see the module's text.
    """
    if not isinstance(lens, TunedLens):
        raise DataError(f"lens is a {type(lens).__name__}: expected what fit_tuned_lens returned, or TunedLens.load(…)")
    lens.check(hm)
    chosen = [Site(place) for place in lens.places] if sites is None else residual_sites(hm, sites)
    unknown = [site.short for site in chosen if site.short not in lens.places]
    if unknown:
        raise SiteError(f"this lens has no map of {', '.join(unknown)}; it has {', '.join(lens.sites)}")
    return read_early(
        hm, text, sites=chosen, top_k=top_k, targets=targets, pos=pos, translate=lens.translate, reader="tuned lens"
    )
