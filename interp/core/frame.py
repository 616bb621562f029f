"""`Frame`: which rows and columns of which tokens one forward pass is looking at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import WhereError

__all__ = ["Frame"]


@dataclass
class Frame:
    """The tokens of a run, and the part of them that the current forward pass holds.

    Masks live on the CPU, so that resolving positions never makes a GPU wait.
    `total` columns are known so far: the (padded) prompt and what was generated after it. The current forward
    holds columns `offset` to `offset + length`; keys of attention go back to column 0.
    """

    ids: Int[Tensor, "batch known"] | None
    mask: Bool[Tensor, "batch total"] | None
    batch: int
    length: int
    prompt_length: int
    offset: int = 0
    row0: int = 0
    n_rows: int = 0
    spans: Mapping[str, Bool[Tensor, "rows prompt"]] = field(default_factory=dict)
    generating: bool = False
    shifts: tuple[int, ...] = ()
    """How far each row was moved right when it was padded on the left instead; empty where none was."""
    lazy_mask: Callable[[], Bool[Tensor, "batch total"] | None] | None = None
    """Reads a GPU mask only when positions need it (foreign forwards under `hooked`)."""

    def __post_init__(self) -> None:
        self.n_rows = self.n_rows or self.batch
        self._memo: dict[object, object] = {}

    @property
    def total(self) -> int:
        """How many columns exist up to the end of this forward."""
        return self.offset + self.length

    @property
    def padded(self) -> bool:
        """Whether any known column is a pad."""
        return self.memo("padded", lambda: not bool(self.known_mask().all()))

    def known_mask(self) -> Bool[Tensor, "batch total"]:
        """True where a column holds a real token, for every column up to `total`."""
        return self.memo("known_mask", self._known_mask)

    def _known_mask(self) -> Bool[Tensor, "batch total"]:
        mask = self.mask
        if mask is None and self.lazy_mask is not None:
            mask = self.lazy_mask()
        if mask is None:
            return torch.ones(self.batch, self.total, dtype=torch.bool)
        if mask.shape[1] < self.total:
            tail = torch.ones(self.batch, self.total - mask.shape[1], dtype=torch.bool)
            mask = torch.cat([mask, tail], dim=1)
        return mask[:, : self.total]

    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each row's prompt."""
        return self.memo("lengths", lambda: self.prompt_mask().sum(dim=1))

    def token_columns(self) -> Int[Tensor, "batch prompt"]:
        """Column of each row's k-th real token of the prompt; what follows the last one is meaningless."""
        return self.memo("token_columns", lambda: (~self.prompt_mask()).int().argsort(dim=1, stable=True))

    def moved(self, rows: Tensor) -> Tensor:
        """Move values [batch, prompt, …] of the batch as it was given to where its tokens are now."""
        if not any(self.shifts):
            return rows
        return torch.stack([row.roll(shift, 0) for row, shift in zip(rows, self.shifts, strict=True)])

    def ends(self) -> Int[Tensor, " batch"]:
        """Column of each row's last real token of the prompt."""

        def last() -> Tensor:
            mask = self.prompt_mask()
            return mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)

        return self.memo("ends", last)

    def prompt_mask(self) -> Bool[Tensor, "batch prompt"]:
        """The mask over the prompt's columns."""
        return self.known_mask()[:, : self.prompt_length]

    def known_ids(self) -> Int[Tensor, "batch total"]:
        """The token ids of every column up to `total`; refuses when the forward was given embeddings."""
        if self.ids is None:
            raise WhereError(
                "Where(tokens=…) needs token ids, but this forward was given embeddings; use mask=… instead"
            )
        return self.memo("known_ids", lambda: self.ids.cpu()[:, : self.total])  # type: ignore[union-attr]

    def memo(self, key: object, make: Callable[[], object]):  # type: ignore[no-untyped-def]
        """Compute once per forward."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]
