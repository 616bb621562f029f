"""Directions that are trained: supervised steering vectors and ReFT-r1."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.direction import Direction, measure_scale
from interp.core.errors import ShapeError
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.data.pairs import PromptPairs
from interp.steering.trained.training import History, Texts, TrainedOptions, mean_loss, one_site, train

__all__ = ["TrainedOptions", "fit_reft_r1", "fit_ssv", "latent_activation", "top_latents"]


def fit_ssv(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    site: Site | str,
    *,
    options: TrainedOptions | None = None,
    seed: int = 0,
) -> Direction:
    """Fit a supervised steering vector: the v that makes texts with the concept likely under h + v.

    Minimises the language-modelling loss of the positive texts with v added at every token after BOS. Its dose is not
    bounded by what activations have: a raw dose of 1 is the trained vector, `Dose(1, "largest")` the largest projection
    of the texts along it. Cost: epochs · texts forwards, and backwards from the site on. Memory: the graph of one batch
    above the site, its logits in fp32, and 4 · tokens · d bytes on the host for the scale.

    Args:
        hm: The model; its parameters are left as they are and get no gradient.
        data: Positive texts are trained on; negative ones only give the scale its second class.
        site: One site with one vector a token.
        options: How; AxBench's settings by default.
        seed: Of the order of the texts.

    Returns:
        The vector. `stats` holds the mean loss of the positive texts without it and with it ("loss_before",
        "loss_after"), and that of the steps of each epoch. Ctrl-C ends the fit with what there is; `notes` say so.

    Raises:
        DataError: No positive text, or one in which nothing counts.
        SiteError: A site that cannot be trained at.
        ModelError: The model is in train mode.
        TrainingError: The loss is not a number; names the step.

    Source: Wu et al. (2025), "AxBench", arXiv 2501.17148, §4 and the settings of its program (AdamW, 3 epochs, 6
    texts a step, rate 0.01 falling to 0, positive texts alone). Departures: v starts at 0, not at 0.01 in every
    dimension (a shift that LayerNorm takes away); in fp32 whatever the model's dtype; all tokens after BOS count in the
    loss unless `options.loss` names the answer's; pads are known by the mask, so that texts may end in one.
    """
    place, options = one_site(hm, site), options or TrainedOptions()
    texts = Texts.of(hm, data, options)
    seen = gather(hm, texts.concept, place.short)[place.short]
    vector = _Vector(seen.x.shape[1:], hm.device)
    rows = texts.positive.nonzero()[:, 0]
    return _fitted(hm, texts, seen, place, vector, rows, method="ssv", options=options, seed=seed)


def fit_reft_r1(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    site: Site | str,
    *,
    options: TrainedOptions | None = None,
    seed: int = 0,
) -> Direction:
    """Fit a rank-1 representation finetuning: one unit vector w that both detects a concept and steers towards it.

    Training edits every token after BOS to h_i + mean(TopK_j ReLU(h_j · w)) · w, and minimises the language-modelling
    loss plus λ(t) times the mean of the latents that are not among the row's top k, λ rising from 0 to `options.l1`.
    `latent_activation` gives ReLU(h · w) of new activations; `Dose(1, "largest")`, the largest projection over all the
    texts, is factor 1 of AxBench's steering. Cost and memory as for `fit_ssv`.

    Args:
        hm: The model; its parameters are left as they are and get no gradient.
        data: Texts with and without the concept; both are trained on unless `options.negatives` is False.
        site: One site with one vector a token.
        options: How; AxBench's settings by default.
        seed: Of the start and of the order of the texts.

    Returns:
        The unit vector, with the figures of `fit_ssv` ("loss_after" is under the edit of the training).

    Raises:
        DataError, SiteError, ModelError, TrainingError: As for `fit_ssv`.

    Source: Wu et al. (2025), "AxBench", arXiv 2501.17148, §4 and the settings of its program (k = 8, L1 0.005,
    gradients clipped to 1, positive and negative texts). Departures: w is brought back to length 1 after each step,
    where the program divides it before the step, so that what it runs and returns is not of length 1; the part of the
    gradient along w is taken away for that same w; w starts as a random unit vector on the side of the activations'
    mean, not as 0.01 in every dimension, where no latent may be above 0 and nothing learned; pads and BOS are no
    latents, and k is at most the row's length; the scale is of the texts of the fit.
    """
    place, options = one_site(hm, site), options or TrainedOptions()
    texts = Texts.of(hm, data, options)
    seen = gather(hm, texts.concept, place.short)[place.short]
    latent = _Latent(_start(seen, place, options, seed), hm.device, options)
    rows = torch.arange(len(texts.positive)) if options.negatives else texts.positive.nonzero()[:, 0]
    return _fitted(hm, texts, seen, place, latent, rows, method="reft_r1", options=options, seed=seed)


def latent_activation(
    direction: Direction, x: Float[Tensor, "*n d"], *, site: Site | str | None = None
) -> Float[Tensor, "*n"]:
    """Return how much of a concept activations have: ReLU(x · w), w the unit vector; the largest over a text scores it.

    Args:
        direction: A direction at one site, or `site` says which.
        x: Activations there.
        site: One of its sites.

    Raises:
        ShapeError: Activations of another width.
        SiteError: It has no such site.

    Source: Wu et al. (2025), arXiv 2501.17148, §4.
    """
    w = direction.unit(direction.sites[0] if site is None else site).flatten()
    if x.shape[-1] != len(w):
        raise ShapeError(f"activations are of width {x.shape[-1]} and the direction of {len(w)}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide @ w.to(wide)).relu()


class _Vector:
    """h + v."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.v = torch.zeros(shape, device=device, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        return [self.v]

    def edit(self, x: Tensor, inner: Bool[Tensor, "batch pos"]) -> Tensor:
        return _added(x, inner, self.v)

    def penalty(self) -> float:
        return 0.0

    def stepping(self, step: Callable[[], object]) -> None:
        step()

    def final(self) -> Tensor:
        return self.v.detach()


class _Latent:
    """h + mean(TopK ReLU(h · w)) w, w of length 1."""

    def __init__(self, start: Tensor, device: torch.device, options: TrainedOptions) -> None:
        self.w = (start / start.norm()).to(device).requires_grad_(True)
        self.k, self.l1, self.clip = options.topk, options.l1, options.clip
        self.idle: Tensor | float = 0.0

    def parameters(self) -> list[Tensor]:
        return [self.w]

    def edit(self, x: Tensor, inner: Bool[Tensor, "batch pos"]) -> Tensor:
        mean, self.idle = top_latents(x.flatten(2).float() @ self.w.flatten().to(x.device), inner, self.k)
        return _added(x, inner, mean.reshape(-1, *[1] * (x.ndim - 1)) * self.w.to(x.device))

    def penalty(self) -> Tensor | float:
        return self.l1 * self.idle

    def stepping(self, step: Callable[[], object]) -> None:
        g = self.w.grad
        assert g is not None
        with torch.no_grad():
            g -= (g * self.w).sum() * self.w
            g /= (g.norm() / self.clip).clamp(min=1.0)
        step()
        with torch.no_grad():
            self.w /= self.w.norm()

    def final(self) -> Tensor:
        return self.w.detach()


def top_latents(
    along: Float[Tensor, "batch pos"], inner: Bool[Tensor, "batch pos"], k: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""]]:
    """Return each row's mean of its k largest latents, and the mean over rows of the other latents' mean share.

    Args:
        along: h · w.
        inner: which tokens have a latent; each row has one at least.
        k: at most so many.
    """
    latent = along.relu().masked_fill(~inner, 0.0)
    n = inner.sum(1)
    top = latent.topk(min(k, latent.shape[1]), dim=1).values.sum(1)  # others are 0, and change no sum
    return top / n.clamp(max=k), ((latent.sum(1) - top) / n).mean()


def _start(seen: Gathered, site: Site, options: TrainedOptions, seed: int) -> Tensor:
    """The given direction, or a random one."""
    mean = seen.x.mean(0)
    if options.start is not None:
        given = options.start[site]
        if given.shape != mean.shape:
            raise ShapeError(f"start has shape {tuple(given.shape)} at {site.short}; expected {tuple(mean.shape)}")
        return given
    drawn = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    # Activations share a mean that is longer than they spread: on its far side no latent would ever be above 0.
    return drawn if float((drawn * mean).sum()) >= 0 else -drawn


def _added(x: Tensor, inner: Bool[Tensor, "batch pos"], what: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mask = inner.reshape(*inner.shape, *[1] * (x.ndim - 2))
    return torch.where(mask, wide + what.to(wide), wide).to(x.dtype)


def _fitted(
    hm: HookManager,
    texts: Texts,
    seen: Gathered,
    site: Site,
    trainee: "_Vector | _Latent",
    rows: Tensor,
    *,
    method: str,
    options: TrainedOptions,
    seed: int,
) -> Direction:
    positive = texts.positive.nonzero()[:, 0]
    before = mean_loss(hm, texts, site, None, positive)
    history = train(hm, texts, site, trainee, rows, options=options, seed=seed)
    vector, short = trainee.final().cpu(), site.short
    stats = {**history.stats(), "loss_before": before}
    if history.stopped is None:
        stats["loss_after"] = mean_loss(hm, texts, site, trainee, positive)
    scale = measure_scale(seen.x, vector, positive=seen.y == 1)
    return Direction(
        vectors={short: vector},
        method=method,
        model=_provenance(hm, texts, short, method, options, seed),
        read_at="every token after the leading special ones" if options.where is None else repr(options.where),
        scale={short: scale},
        stats={short: stats},
        name=texts.concept.name,
        folded=hm.is_folded,
        notes=_notes(texts, history, options.epochs * history.epoch, scale.largest),
    )


def _provenance(
    hm: HookManager, texts: Texts, site: str, method: str, options: TrainedOptions, seed: int
) -> Provenance:
    tokens = texts.concept.tokens
    settings = {"method": method, "site": site, **options.settings()}
    return Provenance.of(hm, settings=settings, data=(tokens.ids, tokens.mask, texts.concept.labels), seed=seed)


def _notes(texts: Texts, history: History, total: int, largest: float) -> tuple[str, ...]:
    notes = [*texts.concept.notes, *history.notes(total)]
    if not largest > 0:
        notes.append('no token has a positive part along it, so a dose in "largest" would turn it round')
    return tuple(notes)
