"""What attribution runs on: the run that a patch would act on, what it would put in, and the rows a batch takes.

- "denoise": the corrupted run, with the clean run's activations put in.
- "noise": the clean run, with the corrupted run's.
- "mean": the clean run, with the mean of the clean runs at the same position of the same template.
- "zero": the clean run, with zeros.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError, nearest
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.result import Provenance
from interp.core.run import Run
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

__all__ = ["MODES", "Part", "Sides", "group_means", "runs_at"]

MODES = ("denoise", "noise", "mean", "zero")

# Values and gradients of one batch may take about so many bytes; rows are run in batches that keep to it.
_BYTES = 2**30
# Reads of attribution as multiples of the stream of every layer, values and gradients together.
_READS = 16


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of the pairs, ready to run.

    Args:
        rows: which rows.
        clean, corrupted: their tokens.
        metric: of a run of these rows, one number each.
        groups: the template-and-mask group of each row.
    """

    rows: Int[Tensor, " row"]
    clean: Tokens
    corrupted: Tokens
    metric: Callable[[Run], Float[Tensor, " row"]]
    groups: Int[Tensor, " row"]

    @property
    def mask(self) -> Bool[Tensor, "row pos"]:
        """True at real tokens, on either side."""
        return self.clean.mask

    def side(self, name: str) -> Tokens:
        """Return the tokens of "clean" or "corrupted"."""
        return self.clean if name == "clean" else self.corrupted


@dataclass(frozen=True, eq=False)
class Sides:
    """Both sides of prompt pairs, position by position, and what is done with them.

    Args:
        pairs: the pairs; each has as many tokens on either side, at the same columns.
        metric: the metric; a `Metric` can be taken of some rows at a time.
        mode: "denoise", "noise", "mean" or "zero".
        groups: rows with one number share template and mask, so that their positions correspond.
    """

    pairs: PairTokens
    metric: Any
    mode: str
    groups: Int[Tensor, " pair"]

    @classmethod
    def of(cls, hm: HookManager, pairs: PromptPairs | PairTokens, *, metric: Any, mode: str) -> "Sides":
        """Return the sides of pairs.

        Args:
            hm: the model.
            pairs: the pairs.
            metric: None for their logit difference, a name, a `Metric`, or a function of a run.
            mode: one of `MODES`.

        Raises:
            ConfigError: no such mode.
            DataError: sides whose tokens do not correspond.
        """
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: {nearest(str(mode), MODES) or 'expected one of ' + ', '.join(MODES)}")
        if not isinstance(pairs, PromptPairs | PairTokens):
            raise DataError(f"attribution takes PromptPairs or PairTokens, got {type(pairs).__name__}")
        tokens = pairs.tokens(hm) if isinstance(pairs, PromptPairs) else pairs
        _check_aligned(tokens)
        chosen = tokens.metric(metric or "logit_diff") if metric is None or isinstance(metric, str) else metric
        if not callable(chosen):
            raise DataError(f"metric=… is a name, a Metric or a function of a run, got {type(metric).__name__}")
        if isinstance(chosen, Metric) and chosen.n != len(tokens):
            raise ShapeError(f"the metric is of {chosen.n} pairs and these are {len(tokens)}; make it from these pairs")
        return cls(tokens, chosen, mode, _groups(tokens))

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def patched(self) -> str:
        """The side whose run a patch would act on."""
        return "corrupted" if self.mode == "denoise" else "clean"

    @property
    def inserted(self) -> str | None:
        """The side that is put in, or None where it is no run."""
        return {"denoise": "clean", "noise": "corrupted"}.get(self.mode)

    @property
    def needed(self) -> list[str]:
        """The sides whose values are needed."""
        return [self.patched] if self.inserted is None else [self.patched, self.inserted]

    @property
    def width(self) -> int:
        """Columns of the padded batch."""
        return int(self.pairs.clean.ids.shape[1])

    @property
    def metric_name(self) -> str:
        """What the metric is called."""
        return str(getattr(self.metric, "__name__", self.metric))

    def parts(self, hm: HookManager) -> Iterator[Part]:
        """Yield the rows in batches of about a gibibyte of activations; all at once for a metric of the whole run."""
        n = len(self)
        floats = _READS * hm.n_layers * max(hm.d_model, hm.n_heads * hm.d_head) * self.width
        size = max(1, _BYTES // (4 * floats)) if isinstance(self.metric, Metric) else n
        for start in range(0, n, size):
            rows = torch.arange(start, min(n, start + size))
            clean, corrupted = (_rows(t, rows) for t in (self.pairs.clean, self.pairs.corrupted))
            yield Part(rows, clean, corrupted, metric=_of_rows(self.metric, rows), groups=self.groups[rows])

    def provenance(self, hm: HookManager, settings: Mapping[str, Any]) -> Provenance:
        """Return where a result on these sides comes from."""
        data = [t for side in (self.pairs.clean, self.pairs.corrupted) for t in (side.ids, side.mask)]
        return Provenance.of(hm, settings={**settings, "mode": self.mode, "metric": self.metric_name}, data=data)


def runs_at(sides: Sides, at: str | None, path_kind: str) -> list[tuple[str, float]]:
    """Return the sides that gradients are taken at, with their weights.

    Args:
        sides: the sides.
        at: "clean", "corrupted", "both" (their mean), or None for the run that a patch would act on.
        path_kind: a path begins at that run, whatever is asked.

    Raises:
        ConfigError: another name, or a place beside a path.
    """
    if at is None:
        return [(sides.patched, 1.0)]
    if at not in ("clean", "corrupted", "both"):
        raise ConfigError(f"at={at!r}: expected 'clean', 'corrupted', 'both' or None")
    if path_kind != "none":
        raise ConfigError(
            f"at={at!r} says where one gradient is taken, and path={path_kind!r} takes several; leave one"
        )
    return [("clean", 0.5), ("corrupted", 0.5)] if at == "both" else [(at, 1.0)]


def group_means(
    sides: Sides, values: Iterator[tuple[Part, Mapping[Any, Tensor]]]
) -> Callable[[Part], dict[Any, Tensor]]:
    """Return a function that gives each row the mean of its group's values, position by position.

    Memory: the values of one row per group.

    Args:
        sides: the sides.
        values: for every part, tensors [row …] by any keys.
    """
    n_groups = int(sides.groups.max()) + 1
    sums: dict[Any, Tensor] = {}
    for part, found in values:
        for key, value in found.items():
            if key not in sums:
                sums[key] = torch.zeros(n_groups, *value.shape[1:], dtype=torch.float32, device=value.device)
            sums[key].index_add_(0, part.groups.to(value.device), value.float())
    counts = sides.groups.bincount(minlength=n_groups)

    def mean_of(part: Part) -> dict[Any, Tensor]:
        found = {}
        for key, total in sums.items():
            size = counts.to(total.device).reshape(-1, *[1] * (total.ndim - 1))
            found[key] = (total / size).index_select(0, part.groups.to(total.device))
        return found

    return mean_of


def _rows(tokens: Tokens, rows: Tensor) -> Tokens:
    """Some rows of a batch."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    spans = {name: span[first:last] for name, span in tokens.spans.items()}
    positions = None if tokens.position_ids is None else tokens.position_ids[first:last]
    return replace(
        tokens, ids=tokens.ids[first:last], mask=tokens.mask[first:last], spans=spans, position_ids=positions
    )


def _of_rows(metric: Any, rows: Tensor) -> Callable[[Run], Tensor]:
    return metric.of_rows(rows) if isinstance(metric, Metric) else _checked(metric)


def _checked(metric: Callable[[Run], Tensor]) -> Callable[[Run], Tensor]:
    def of(out: Run) -> Tensor:
        value = metric(out)
        batch = len(out.logits)
        if not isinstance(value, Tensor) or value.shape != (batch,):
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"the metric returned {what}; expected one number per pair [{batch}]")
        return value

    return of


def _groups(pairs: PairTokens) -> Int[Tensor, " pair"]:
    """Rows of one form and one mask."""
    rows = torch.cat([pairs.forms()[:, None], pairs.clean.mask.long()], dim=1)
    return rows.unique(dim=0, return_inverse=True)[1]


def _check_aligned(pairs: PairTokens) -> None:
    """Refuse sides whose columns do not correspond."""
    clean, corrupted = pairs.clean, pairs.corrupted
    same = clean.mask.shape == corrupted.mask.shape
    if same and torch.equal(clean.mask, corrupted.mask):
        return
    lengths = list(zip(clean.lengths.tolist(), corrupted.lengths.tolist(), strict=True))
    row = next((i for i, (a, b) in enumerate(lengths) if a != b), None)
    if row is None:
        raise DataError("the two sides are padded in different ways; pad both on one side, to one width")
    raise DataError(
        f"pair {row} has {lengths[row][0]} clean tokens and {lengths[row][1]} corrupted ones, so positions would not "
        "correspond; reword them to one length"
    )
