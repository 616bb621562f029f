"""Fitting a subspace so that interchange gives what a causal model says: the loop, the split, the controls.

The model is frozen and never trained: each step asks `hm.run` for the gradient of the loss by the patched activation,
and carries it on to the rotation by the chain rule. Memory: that of one forward and backward by one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ModelError
from interp.core.intervention import Add
from interp.core.metrics import answer_logits
from interp.core.reinit import reinitialised
from interp.core.run import Run
from interp.core.subspace import random_basis
from interp.patching.subspaces.interchange import Interchange, Labels, Places

__all__ = ["CONTROLS", "LOSSES", "Boundary", "DASOptions", "Fit", "Rotation", "controlled", "split_rows", "train"]

CONTROLS = ("random", "labels", "reinitialised")
LOSSES = ("cross_entropy", "logit_diff")
_RANDOM = 5


@dataclass(frozen=True, kw_only=True)
class DASOptions:
    """How a subspace is fitted, and against what.

    Args:
        epochs: passes over the training pairs.
        batch_size: pairs per step, and per forward.
        lr: of Adam at the first step; it falls linearly to 0.
        loss: "cross_entropy": −log p of the label; "logit_diff": that of the clean answers over the label.
        controls: "random": subspaces drawn at random, what they move made as long as what the fitted one moves;
            "labels": the same fit to labels given to other pairs; "reinitialised": the same fit on random weights.
        held_out: share of the pairs that no fit sees.
        seed: of the split, the rotation, the batches and the controls.
        progress: show a bar on stderr when it is a terminal.

    Raises:
        ConfigError: a setting that is unknown or out of range.
    """

    epochs: int = 20
    batch_size: int = 32
    lr: float = 1e-2
    loss: str = "cross_entropy"
    controls: tuple[str, ...] = CONTROLS
    held_out: float = 0.25
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "controls", tuple(self.controls))
        unknown = [c for c in self.controls if c not in CONTROLS]
        if unknown:
            raise ConfigError(f"control {unknown[0]!r}: expected some of {', '.join(CONTROLS)}")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r}: expected one of {', '.join(LOSSES)}")
        for name in ("epochs", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a whole number ≥ 1")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr={self.lr!r}: expected a finite number above 0")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out!r}: expected a share between 0 and 1")


class Rotation:
    """k orthonormal rows as the Q of a QR decomposition; starts at random."""

    def __init__(self, k: int, d: int, *, seed: int, device: torch.device) -> None:
        self.weight = random_basis(k, d, seed=seed).T.contiguous().to(device).requires_grad_(True)

    def groups(self, lr: float) -> list[dict[str, object]]:
        """Return the parameter groups of the optimiser."""
        return [{"params": [self.weight], "lr": lr}]

    def rows(self) -> Float[Tensor, "k d"]:
        """Return the orthonormal rows, on the graph."""
        q, r = torch.linalg.qr(self.weight)
        return (q * r.diagonal().sign()).T

    def current(self, done: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return rows, their weights and a penalty, when a share of the training is done."""
        return self.rows(), None, None

    def final(self) -> Float[Tensor, "k d"]:
        """Return what was fitted."""
        return self.rows().detach()


class Boundary(Rotation):
    """A whole rotation, and a boundary b: row i of d counts with σ((b d − i − ½) / τ), where τ falls."""

    def __init__(
        self, d: int, *, seed: int, device: torch.device, temperature: tuple[float, float], lr: float, penalty: float
    ) -> None:
        super().__init__(d, d, seed=seed, device=device)
        self.share = torch.tensor(0.5, device=device, requires_grad=True)
        self.temperature, self.boundary_lr, self.penalty = temperature, lr, penalty
        self.history: list[tuple[float, Tensor]] = []

    def groups(self, lr: float) -> list[dict[str, object]]:
        """Return the parameter groups of the optimiser."""
        return [*super().groups(lr), {"params": [self.share], "lr": self.boundary_lr}]

    def current(self, done: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return all rows, the mask, and the price of the dimensions."""
        with torch.no_grad():
            self.share.clamp_(0.0, 1.0)
        first, last = self.temperature
        tau = first + (last - first) * done
        self.history.append((tau, self.share.detach().clone()))
        return self.rows(), self.mask(tau), self.penalty * self.share

    def mask(self, tau: float) -> Float[Tensor, " d"]:
        """Return how much of each row counts, at a temperature in dimensions."""
        d = len(self.weight)
        places = torch.arange(d, device=self.weight.device, dtype=self.share.dtype) + 0.5
        return torch.sigmoid((self.share * d - places) / tau)

    def final(self) -> Float[Tensor, "k d"]:
        """Return the rows on the inner side of the boundary."""
        k = round(float(self.share.detach().clamp(0.0, 1.0)) * len(self.weight))
        return self.rows().detach()[:k]


@dataclass
class Fit:
    """A fit under way, or ended.

    Args:
        rotation: what is fitted.
        losses: the loss of each step, in nats or logits, penalty left out.
        stopped: whether it was interrupted.
    """

    rotation: Rotation
    losses: list[float] = field(default_factory=list)
    stopped: bool = False


def split_rows(
    n: int, held_out: Sequence[int] | None, options: DASOptions
) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """Return the pairs to fit on and those to measure on.

    Args:
        n: pairs.
        held_out: the pairs to measure on; None draws a share of them.
        options: the share and the seed.

    Raises:
        DataError: pairs that do not exist, or none left on one side.
    """
    if held_out is None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(options.seed))
        test = order[: max(1, round(n * options.held_out))].sort().values
    else:
        test = torch.tensor(sorted({int(i) for i in held_out}), dtype=torch.long)
    if not len(test) or int(test.min()) < 0 or int(test.max()) >= n or len(test) == n:
        raise DataError(f"{len(test)} of {n} pairs held out: some must be left on both sides, numbered 0 to {n - 1}")
    kept = torch.ones(n, dtype=torch.bool)
    kept[test] = False
    return kept.nonzero()[:, 0], test


def train(
    task: Interchange,
    labels: Labels,
    rows: Int[Tensor, " row"],
    rotation: Rotation,
    *,
    options: DASOptions,
    step: Callable[[], object],
) -> Fit:
    """Fit a rotation on some pairs; an interrupt ends the fit with what there is.

    Raises:
        ModelError: the loss is not a number; names the step.
    """
    optimiser = torch.optim.Adam(rotation.groups(options.lr))
    total = options.epochs * len(rows.split(options.batch_size))
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 1 - n / total)
    fit, generator = Fit(rotation), torch.Generator().manual_seed(options.seed)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    try:
        for _ in range(options.epochs):
            for part in rows[torch.randperm(len(rows), generator=generator)].split(options.batch_size):
                number = len(fit.losses)
                value, loss = _surrogate(task, labels, part, rotation.current(number / max(1, total - 1)), options)
                if not value == value or abs(value) == float("inf"):
                    raise ModelError(
                        f"the loss at {task.site.short} is {value} at step {number}; lower lr, or look at x"
                    )
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.grad = g
                optimiser.step()
                falling.step()
                fit.losses.append(value)
                step()
    except KeyboardInterrupt:
        fit.stopped = True
    return fit


def _surrogate(
    task: Interchange,
    labels: Labels,
    rows: Tensor,
    current: tuple[Tensor, Tensor | None, Tensor | None],
    options: DASOptions,
) -> tuple[float, Tensor]:
    """The loss of some pairs, and a tensor whose gradient by the rotation is the loss's."""
    basis, weights, penalty = current
    mine = task.held(rows)
    apart = task.shift[mine.to(task.clean.device)]
    part = apart @ basis.T.to(apart)
    added = (part if weights is None else part * weights.to(apart)) @ basis.to(apart)
    measure = labels.cross_entropy if options.loss == "cross_entropy" else labels.logit_diff

    def loss(out: Run) -> Tensor:
        return measure(answer_logits(out), rows)

    write = Add(task.site, task.placed(added.detach(), rows), where=task.where(rows))
    out = task.hm.run(task.tokens(rows), write=[write], read=[task.site], grad=loss, logits="last")
    slope = task.gathered(out.grad[task.site], rows)
    made = (slope.to(added) * added).sum() / len(rows)
    assert out.metric is not None
    return float(out.metric.mean()), made if penalty is None else made + penalty.to(made)


def controlled(
    task: Interchange,
    labels: Labels,
    make: Callable[[], Rotation],
    rows: tuple[Tensor, Tensor],
    *,
    where: Places,
    options: DASOptions,
) -> tuple[Fit, dict[str, Float[Tensor, " pair"]]]:
    """Fit, measure on the held-out pairs, and do the same for every control.

    Returns:
        The fit, and per name the share of hits of each held-out pair. An interrupted fit has no controls that fit.
    """
    from tqdm import tqdm

    seen, test = rows
    fitted_controls = [c for c in options.controls if c != "random"]
    total = options.epochs * len(seen.split(options.batch_size)) * (1 + len(fitted_controls))
    with tqdm(total=total, desc="fitting", unit="step", disable=None if options.progress else True) as bar:
        fit = train(task, labels, seen, make(), options=options, step=bar.update)
        basis = fit.rotation.final()
        found = {"held out": _hits(task, labels, basis, test), "training pairs": _hits(task, labels, basis, seen)}
        found["no patch"] = task.outcome(None, labels, rows=test).hit.float()
        found["whole site"] = task.outcome(task.whole(), labels, rows=test).hit.float()
        if "random" in options.controls:
            found["random, same size"] = _placebo(task, labels, basis, test, options.seed)
        if "labels" in fitted_controls and not fit.stopped:
            other = labels.shuffled(seed=options.seed)
            control = train(task, other, seen, make(), options=options, step=bar.update)
            found["labels of other pairs"] = _hits(task, other, control.rotation.final(), test)
        if "reinitialised" in fitted_controls and not fit.stopped:
            hm = reinitialised(task.hm, seed=options.seed)
            twin = Interchange.of(hm, task.pairs, task.site, where=where, batch_size=task.batch_size)
            control = train(twin, labels, seen, make(), options=options, step=bar.update)
            found["random weights"] = _hits(twin, labels, control.rotation.final(), test)
    return fit, found


def _hits(task: Interchange, labels: Labels, basis: Tensor, rows: Tensor) -> Float[Tensor, " row"]:
    return task.outcome(task.subspace(basis), labels, rows=rows).hit.float()


def _placebo(task: Interchange, labels: Labels, basis: Tensor, rows: Tensor, seed: int) -> Float[Tensor, " row"]:
    """Mean hits of random subspaces of as many dimensions, what they move made as long as what the fitted one moves."""
    size = (task.shift @ basis.T.to(task.shift)).norm(dim=-1)
    found: list[Bool[Tensor, " row"]] = []
    for n in range(_RANDOM):
        drawn = random_basis(len(basis), task.width, seed=1000 * (seed + 1) + n)
        found.append(task.outcome(task.added(task.same_size(drawn, size)), labels, rows=rows).hit)
    return torch.stack(found).float().mean(0)
