"""How good a classifier's scores are: every figure from one set of weighted examples, with intervals over groups."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError

__all__ = ["METRICS", "classify_metrics", "group_draws", "group_intervals"]

METRICS = ("accuracy", "balanced_accuracy", "auroc", "average_precision", "f1", "mcc")
"""accuracy: the share that is right. balanced_accuracy: the mean over classes of the share of a class that is right.
auroc: how often an example of the class outranks another. average_precision: the area under precision over recall, in
steps, from scores. f1: 2 · hits / (said + true). mcc: Matthews' correlation of what is said and what is true."""

_DRAWN = 2**22  # numbers of one table that are held at once


def classify_metrics(
    scores: Float[Tensor, "n classes"],
    y: Int[Tensor, " n"],
    *,
    weights: Float[Tensor, "draw n"] | None = None,
) -> Float[Tensor, "draw metric"]:
    """Return `METRICS` of scores under several weightings of the examples at once.

    One column is a score of two classes: class 1 is said above 0, and f1, average precision and auroc are of class 1.
    With several columns the largest says the class, and those three are means over the classes. Equal scores share
    their rank; a precision is taken where a score ends, so that ties do not depend on their order. Memory: a few
    tables of `weights`' size, 2^22 numbers at a time.

    Args:
        scores: one column for two classes, or one for each class.
        y: code of each example's class.
        weights: of each example in each weighting; all 1 by default, one weighting.

    Returns:
        The metrics; NaN where a weighting lacks a class that a metric needs.

    Raises:
        ShapeError: lists that do not line up, or a class without a column.
        DataError: no examples, or scores that are NaN.

    Source: average precision as Σ (R_i − R_{i−1}) P_i; for several classes MCC is R_K of Gorodkin (2004).
    """
    n, columns = scores.shape
    if y.shape != (n,) or (weights is not None and weights.shape[1:] != (n,)):
        given = None if weights is None else tuple(weights.shape)
        raise ShapeError(f"scores {tuple(scores.shape)}, classes {tuple(y.shape)} and weights {given} do not line up")
    if not n or not bool(scores.isfinite().all()):
        raise DataError(f"{n} scores, of which some are NaN or infinite; give finite ones" if n else "no scores given")
    n_classes = max(columns, 2)
    if int(y.max()) >= n_classes or int(y.min()) < 0:
        raise ShapeError(f"classes go from {int(y.min())} to {int(y.max())}, and there are scores for {n_classes}")
    scores, w = scores.detach().double().cpu(), torch.ones(1, n) if weights is None else weights.detach().cpu()
    y = y.cpu()
    said = (scores[:, 0] > 0).long() if columns == 1 else scores.argmax(1)
    tables = [scores[:, 0]] if columns == 1 else list(scores.unbind(1))
    codes = [1] if columns == 1 else list(range(columns))
    step = max(1, _DRAWN // n)
    return torch.cat([_metrics(part.double(), said, y, n_classes, tables, codes) for part in w.split(step)])


def _metrics(
    w: Float[Tensor, "draw n"],
    said: Int[Tensor, " n"],
    y: Int[Tensor, " n"],
    n_classes: int,
    tables: list[Tensor],
    codes: list[int],
) -> Float[Tensor, "draw metric"]:
    cells = torch.zeros(len(w), n_classes * n_classes, dtype=torch.float64).index_add_(1, y * n_classes + said, w)
    confusion = cells.reshape(-1, n_classes, n_classes)  # [draw true said]
    hits, true, told = confusion.diagonal(dim1=1, dim2=2), confusion.sum(2), confusion.sum(1)
    total = true.sum(1)
    f1 = 2 * hits / (true + told)
    square = total.square()
    spread = (square - told.square().sum(1)) * (square - true.square().sum(1))
    agreed = hits.sum(1) * total - (told * true).sum(1)
    # A classifier that says one class always is worth nothing; examples of one class alone say nothing of it.
    one_class = square - true.square().sum(1) <= 1e-9 * square
    mcc = torch.where(spread > 0, agreed / spread.clamp(min=1e-300).sqrt(), 0.0).masked_fill(one_class, torch.nan)
    ranked = [_ranking(table, y == code, w) for table, code in zip(tables, codes, strict=True)]
    auroc, precision = (torch.stack([pair[i] for pair in ranked]).mean(0) for i in (0, 1))
    found = f1[:, 1] if len(codes) == 1 else f1.mean(1)
    return torch.stack([hits.sum(1) / total, (hits / true).mean(1), auroc, precision, found, mcc], 1)


def _ranking(
    score: Float[Tensor, " n"], truth: Bool[Tensor, " n"], w: Float[Tensor, "draw n"]
) -> tuple[Tensor, Tensor]:
    """AUROC and average precision; values of one size are one step."""
    values, at = score.unique(return_inverse=True)
    places = len(values) - 1 - at  # the largest first
    empty = torch.zeros(len(w), len(values), dtype=torch.float64)
    positive = empty.index_add(1, places, w * truth)
    negative = empty.index_add(1, places, w * ~truth)
    below = negative.sum(1, keepdim=True) - negative.cumsum(1)
    n_true, n_false = positive.sum(1), negative.sum(1)
    auroc = (positive * (below + negative / 2)).sum(1) / (n_true * n_false)
    reached, said = positive.cumsum(1), (positive + negative).cumsum(1)
    precision = torch.where(said > 0, reached / said.clamp(min=1e-300), 0.0)
    return auroc, (positive * precision).sum(1) / n_true


def group_draws(group: Int[Tensor, " n"], *, n_bootstrap: int = 500, seed: int = 0) -> Float[Tensor, "draw n"]:
    """Return weights of examples: all 1, then how often a bootstrap over groups draws each example's group.

    Args:
        group: of each example; the examples of a group come and go together.
        n_bootstrap: resamples.
        seed: of the resampling; one seed gives one draw for the same groups.
    """
    known, at = group.cpu().unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(known), (n_bootstrap, len(known)), generator=generator)
    counts = torch.zeros(n_bootstrap, len(known)).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return torch.cat([torch.ones(1, len(at)), counts[:, at]])


def group_intervals(draws: Float[Tensor, "draw *cell"]) -> Float[Tensor, "*cell 3"]:
    """Return the first draw with the 95 % percentile interval of the others; draws that are NaN are left out.

    Args:
        draws: a figure of the data itself, then of each resample, as `group_draws` weighs them.

    Returns:
        Estimate, lower and upper bound in the last axis; NaN bounds where fewer than half of the resamples have one.
    """
    at = torch.tensor([0.025, 0.975], dtype=torch.float64)
    resampled = draws[1:].double()
    if not len(resampled):
        return torch.stack([draws[0].double(), *[torch.full_like(draws[0].double(), torch.nan)] * 2], -1)
    low, high = resampled.nanquantile(at, dim=0)
    few = resampled.isnan().double().mean(0) > 0.5
    return torch.stack([draws[0].double(), low.masked_fill(few, torch.nan), high.masked_fill(few, torch.nan)], -1)
