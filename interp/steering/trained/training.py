"""Training what edits one site, by the loss of texts under the edit: the options, the texts, the loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError, SiteError, WhereError
from interp.core.intervention import Edit
from interp.core.manager import HookManager
from interp.core.passes import frame_of
from interp.core.site import Site
from interp.core.text import Tokens, special_mask
from interp.core.tuning import frozen, next_token_losses
from interp.core.where import Where
from interp.data.concept_tokens import NOT_READ, ConceptTokens
from interp.data.contrast import Contrast
from interp.data.pairs import PromptPairs
from interp.steering.fitting.fit import concept_tokens
from interp.train.common import TrainingError
from interp.train.signals import StopSignals

__all__ = ["History", "Texts", "TrainedOptions", "Trainee", "mean_loss", "one_site", "train"]

_LOOK = 10  # steps between looks at the losses, each of which makes a GPU's host wait


@dataclass(frozen=True, kw_only=True)
class TrainedOptions:
    """How an edit is trained; the defaults are AxBench's.

    Args:
        epochs: passes over the texts.
        batch_size: texts per step.
        lr: of AdamW at the first step; it falls to 0 in a line.
        weight_decay: of AdamW.
        where: the positions that are edited; by default every real token after the leading special ones (BOS).
        loss: the tokens whose loss counts, such as `Where(name="answer")`; by default every real token after the
            leading special ones.
        topk: ReFT-r1: how many of a text's latents are averaged; all, where a text has fewer tokens.
        l1: ReFT-r1: weight that the other latents' penalty has at the last step; it rises from 0 in a line.
        negatives: ReFT-r1: train on texts without the concept too.
        clip: ReFT-r1: largest norm of a gradient.
        start: ReFT-r1: a direction at the site to start from, such as the difference of means; by default one drawn at
            random. A start along which no token has a positive part learns nothing, and random ones find what is common
            to all texts sooner than a concept.
        progress: show a bar on stderr when it is a terminal.

    Raises:
        ConfigError: a setting out of range.
    """

    epochs: int = 3
    batch_size: int = 6
    lr: float = 0.01
    weight_decay: float = 0.0
    where: Where | None = None
    loss: Where | None = None
    topk: int = 8
    l1: float = 0.005
    negatives: bool = True
    clip: float = 1.0
    start: Direction | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "topk"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a whole number ≥ 1")
        for name in ("lr", "weight_decay", "l1", "clip"):
            value = getattr(self, name)
            least = 0 if name not in ("lr", "clip") else 1e-30
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e38:
                raise ConfigError(
                    f"{name}={value!r}: expected a finite number {'above' if name in ('lr', 'clip') else '≥'} 0"
                )
        if self.start is not None and not isinstance(self.start, Direction):
            raise ConfigError(f"start={self.start!r}: expected a Direction, such as fit_direction gives")

    def settings(self) -> dict[str, object]:
        """Return what a record of the fit keeps."""
        names = ("epochs", "batch_size", "lr", "weight_decay", "topk", "l1", "negatives", "clip")
        return {
            **{n: getattr(self, n) for n in names},
            "where": repr(self.where),
            "loss": repr(self.loss),
            "start": repr(self.start),
        }


@runtime_checkable
class Trainee(Protocol):
    """What is trained at a site."""

    def parameters(self) -> list[Tensor]:
        """Return what the optimiser steps."""
        ...

    def edit(self, x: Float[Tensor, "batch pos *features"], inner: Bool[Tensor, "batch pos"]) -> Tensor:
        """Return the activation edited at `inner`, and keep the penalty of this batch."""
        ...

    def penalty(self) -> Tensor | float:
        """Return what the latest edit costs beside the loss, its weight at the end of the training included."""
        ...

    def stepping(self, step: Callable[[], object]) -> None:
        """Take an optimiser step, with what comes before and after it."""
        ...


@dataclass(frozen=True)
class Texts:
    """Texts to train on.

    Args:
        concept: the rows, every edited token labelled with its row's class.
        counts: True at the tokens whose loss counts.
        positive: rows with the concept.
    """

    concept: ConceptTokens
    counts: Bool[Tensor, "row pos"]
    positive: Bool[Tensor, " row"]

    @classmethod
    def of(cls, hm: HookManager, data: Contrast | ConceptTokens | PromptPairs, options: TrainedOptions) -> "Texts":
        """Return texts with the tokens that are edited and those that count.

        Raises:
            DataError: rows of both classes at once, no text with the concept, or one in which nothing counts.
        """
        given = concept_tokens(hm, data, where=None if isinstance(data, ConceptTokens) else Where())
        tokens, top = given.tokens, given.labels.max(1).values
        if bool((given.read & (given.labels != top[:, None])).any()) or bool((top == NOT_READ).any()):
            raise DataError(f"rows of {given.name!r} hold tokens of several classes, or none; a text has one class")
        if not bool((top == 1).any()):
            raise DataError(f"no text of {given.name!r} is of class {given.classes[1]!r}")
        special = special_mask(tokens.tokenizer or hm.tokenizer, tokens.ids) | ~tokens.mask
        after = tokens.mask & ~special.int().cumprod(1).bool()
        frame = frame_of(tokens, 0, len(tokens))
        for where in (options.where, options.loss):
            if where is not None and where.needs_generation:
                raise WhereError(f"{where!r} selects generated tokens, and these are texts; use a prompt's rule")
        inner = after if options.where is None else options.where.columns(frame)
        counts = after if options.loss is None else options.loss.columns(frame) & tokens.mask
        follows = torch.zeros_like(counts)
        follows[:, 1:] = tokens.mask[:, :-1]
        counts = counts & follows
        for what, chosen in (("is edited", inner), ("has a loss that counts", counts)):
            empty = (~chosen.any(1)).nonzero()[:, 0].tolist()
            if empty:
                raise DataError(f"no token of row {empty[0]} {what}; {len(empty)} of {len(tokens)} rows are so")
        labels = torch.where(inner, top[:, None], NOT_READ)
        return cls(replace(given, labels=labels), counts, top == 1)

    def part(self, rows: Int[Tensor, " n"]) -> tuple[Tokens, Tensor, Tensor]:
        """Return some rows without needless columns: tokens, which are edited, which count."""
        tokens = self.concept.tokens.take(rows)
        used = tokens.mask.any(0).nonzero()[:, 0]
        cut = slice(int(used[0]), int(used[-1]) + 1)
        places = None if tokens.position_ids is None else tokens.position_ids[:, cut]
        kept = replace(tokens, ids=tokens.ids[:, cut], mask=tokens.mask[:, cut], spans={}, position_ids=places)
        return kept, (self.concept.labels[rows] != NOT_READ)[:, cut], self.counts[rows][:, cut]


@dataclass(frozen=True)
class History:
    """How a training went.

    Attributes:
        losses: mean loss of each step's texts, in nats, penalty left out.
        epoch: steps in an epoch.
        stopped: the signal that ended it early, or None.
    """

    losses: Float[Tensor, " step"]
    epoch: int
    stopped: str | None

    def stats(self) -> dict[str, float]:
        """Return figures by name."""
        means = [float(part.mean()) for part in self.losses.split(self.epoch)]
        return {"steps": float(len(self.losses)), **{f"loss_epoch_{n + 1}": v for n, v in enumerate(means)}}

    def notes(self, total: int) -> list[str]:
        """Return what a user must know."""
        return [f"stopped by {self.stopped} after {len(self.losses)} of {total} steps"] if self.stopped else []


def one_site(hm: HookManager, site: Site | str) -> Site:
    """Return the site to train at.

    Raises:
        SiteError: several sites, or one without a vector a token that can be edited.
    """
    found = hm.atlas.expand(site)
    if len(found) != 1 or found[0].where is not None:
        raise SiteError(f"{site!r} stands for {len(found)} places; give one whole site such as '6.resid_post'")
    point = hm.atlas.point(found[0])
    if found[0].axes[1] != "pos" or "src" in found[0].axes or point.read_only:
        why = point.read_only or f"its axes are {' '.join(found[0].axes)}"
        raise SiteError(f"{found[0].short} has no vector a token that can be trained: {why}")
    return found[0]


def train(
    hm: HookManager,
    texts: Texts,
    site: Site,
    trainee: Trainee,
    rows: Int[Tensor, " n"],
    *,
    options: TrainedOptions,
    seed: int,
) -> History:
    """Train on some rows; SIGINT or SIGTERM ends it after the step under way with what there is.

    Raises:
        TrainingError: the loss is not a number; names the step.
    """
    from tqdm.auto import tqdm

    draw = torch.Generator().manual_seed(seed)
    epoch = len(rows.split(options.batch_size))
    total = options.epochs * epoch
    optimiser = torch.optim.AdamW(trainee.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 1 - n / total)
    losses = torch.zeros(total, device=hm.device)
    n = 0
    bar = tqdm(total=total, desc=f"training at {site.short}", unit="step", disable=None if options.progress else True)
    with frozen(hm.model), StopSignals() as stopped, bar:
        for part in _batches(rows, options, draw):
            with torch.enable_grad():
                loss = _losses(hm, texts, site, trainee, part).mean()
                whole = loss + (n / total) * torch.as_tensor(trainee.penalty()).to(loss)
                held = trainee.parameters()
                for p, g in zip(held, torch.autograd.grad(whole, held), strict=True):
                    p.grad = g
            trainee.stepping(optimiser.step)
            falling.step()
            losses[n] = loss.detach()
            n += 1
            bar.update()
            if n % _LOOK == 0 or n == total or stopped():
                _look(losses[:n], site)
            if stopped():
                break
        name = stopped.name if n < total else None
    return History(losses[:n].cpu(), epoch, name)


def mean_loss(hm: HookManager, texts: Texts, site: Site, trainee: Trainee | None, rows: Int[Tensor, " n"]) -> float:
    """Return the mean loss of the tokens that count in some rows, edited or as the model is."""
    total = count = 0.0
    with torch.no_grad():
        for part in rows.split(32):
            found = _losses(hm, texts, site, trainee, part)
            total, count = total + float(found.sum()), count + len(found)
    return total / count


def _losses(hm: HookManager, texts: Texts, site: Site, trainee: Trainee | None, rows: Tensor) -> Tensor:
    tokens, inner, counts = texts.part(rows)
    if trainee is None:
        return next_token_losses(hm, tokens, counts, [])
    return next_token_losses(hm, tokens, counts, [Edit(site, lambda x: trainee.edit(x, inner.to(x.device)))])


def _batches(rows: Tensor, options: TrainedOptions, draw: torch.Generator) -> Iterator[Tensor]:
    for _ in range(options.epochs):
        yield from rows[torch.randperm(len(rows), generator=draw)].split(options.batch_size)


def _look(losses: Tensor, site: Site) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0, 0])
        raise TrainingError(
            f"the loss at {site.short} is {float(losses[step])} at step {step + 1}; lower lr, or look for NaN in the "
            "model's weights"
        )
