"""`Gate`: a condition that the forward itself decides, row by row: whether an edit acts.

A gate reads one site before the edits of that site, scores what it reads, and is open where the score lies above its
threshold. What was decided belongs to the run (`out.gates`, `out.notes`), never to the gate: one gate may serve many
models and runs at once.

Source: conditional activation steering, Lee et al. (2025), "Programming Refusal with Conditional Activation Steering",
arXiv 2409.05907, §3: kind "cast" is sim(h, tanh(P_c h)) of the mean prompt token with P_c = c cᵀ / cᵀc. Up to the tanh,
P_c h is a multiple of c with the sign of c · h, so that this is |cos(h, c)|: it does not tell c from −c, "cosine" does.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ConfigError, ShapeError, SiteError, WhereError
from interp.core.frame import Frame
from interp.core.place import KEY_SITES
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["KINDS_OF_GATE", "REDUCTIONS", "Decision", "Gate"]

KINDS_OF_GATE = ("projection", "cosine", "cast")
"""h · ĉ; cos(h, c); sim(h, tanh(P_c h))."""

REDUCTIONS = ("mean", "max", "last", "each")
"""One score per row: of the mean activation of the prompt's tokens, the largest of their scores, or that of the last
one; or "each": every position has its own."""

_ONCE = ("prompt", "step")


@dataclass
class Decision:
    """What one gate decided in one run.

    Attributes:
        score: each row's score on its prompt (with "each", the largest).
        open: whether the row's score passed.
        positions: which columns of the latest forward are open; None where the prompt decides for all.
        made: the same of every forward in turn, oldest first.
    """

    score: Float[Tensor, " batch"]
    open: Bool[Tensor, " batch"]
    positions: Bool[Tensor, "batch pos"] | None = None
    made: list[Tensor] = field(default_factory=list)
    first: int = 0
    """The column that `positions` begins at."""

    def columns(self) -> Bool[Tensor, "batch pos"] | None:
        """Which columns of the whole run were open; None where the prompt decided for all."""
        return torch.cat(self.made, dim=1) if self.made else None


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition on an activation; `Gated` makes an edit depend on it.

    Args:
        site: where it is read, before the edits of that site. It has to come no later than the edit, unless the prompt
            decides once: then a later site costs one more forward of the prompt, without the gated edits.
        condition: a `Direction` with this site, a vector in the site's features, or a function of activations
            [… *features] that returns scores […].
        threshold: open above it, in units of the score.
        kind: one of `KINDS_OF_GATE`; for vectors.
        reduce: one of `REDUCTIONS`.
        once: "prompt": the prompt decides, and it holds for all that is generated. "step": it decides for the prompt,
            and each generated token for itself.
        where: the tokens of the prompt that are looked at; every non-pad token by default, BOS included.
        above: False opens below the threshold instead.

    Raises:
        ConfigError: an unknown kind, reduction or time, a threshold that is no number, or "each" with once="prompt".
        SiteError: a glob, or a site without one value a position.
        ShapeError: a condition that is none.
        WhereError: a selection of generated tokens, which a prompt has none of.
    """

    site: Site | str
    condition: Any
    threshold: float = 0.0
    kind: str = "projection"
    reduce: str = "mean"
    once: str = "prompt"
    where: Where = field(default_factory=Where)
    above: bool = True

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS_OF_GATE), ("reduce", REDUCTIONS), ("once", _ONCE)):
            if getattr(self, name) not in known:
                raise ConfigError(f"Gate({name}={getattr(self, name)!r}): expected one of {', '.join(known)}")
        if self.reduce == "each" and self.once == "prompt":
            raise ConfigError("Gate(reduce='each') has no one answer for what is generated; give once='step'")
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or math.isnan(self.threshold):
            raise ConfigError(f"Gate(threshold={self.threshold!r}): expected a number, in units of the score")
        site = Site(self.site)
        if site.where is not None:
            raise SiteError(f"Gate({self.site!r}): say which tokens are looked at with where=Where(…), not with .at(…)")
        if site.axes[1] != "pos" or site.kind in KEY_SITES or site.axes[-1] == "d_vocab":
            raise SiteError(f"a gate reads one activation a position; {site.short} is [{' '.join(site.axes)}]")
        if not isinstance(self.where, Where) or self.where.needs_generation:
            raise WhereError(f"Gate(where={self.where!r}): expected a Where that selects tokens of the prompt")
        object.__setattr__(self, "site", site)
        given = self.condition[site] if isinstance(self.condition, Direction) else self.condition
        if isinstance(given, Tensor):
            if given.ndim != len(site.axes) - 2 or not given.is_floating_point() or not bool((given != 0).any()):
                raise ShapeError(f"Gate(condition=…) at {site.short} needs a non-zero vector, got {tuple(given.shape)}")
            if not bool(given.isfinite().all()):
                raise ShapeError(f"Gate(condition=…) at {site.short} holds NaN or infinity, which no score is above")
        elif not callable(given):
            raise ShapeError(f"Gate(condition=…) needs a Direction, a vector or a function, got {type(given).__name__}")
        object.__setattr__(self, "condition", given)

    def scores(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the score of each activation [… *features]."""
        lead = x.shape[: x.ndim - (len(Site(self.site).axes) - 2)]
        if not isinstance(self.condition, Tensor):
            found = self.condition(x)
            if not isinstance(found, Tensor) or found.shape != lead:
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ShapeError(
                    f"the function of the gate at {Site(self.site).short} gave {what}: expected {tuple(lead)}"
                )
            return found.float()
        h, c = x.reshape(*lead, -1).float(), self.condition.to(x.device).reshape(-1).float()
        if h.shape[-1] != c.shape[0]:
            raise ShapeError(f"gate at {Site(self.site).short}: a vector of {c.shape[0]} for features of {h.shape[-1]}")
        along = h @ (c / c.norm())
        if self.kind == "projection":
            return along
        if self.kind == "cosine":
            return along / h.norm(dim=-1).clamp(min=1e-30)
        shadow = (along[..., None] * (c / c.norm())).tanh()
        return torch.nn.functional.cosine_similarity(h, shadow, dim=-1)

    def reduced(self, x: Float[Tensor, "batch pos ..."], chosen: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
        """Return each row's score over its chosen positions; every row has one at least."""
        chosen = chosen.to(x.device)
        shape = (*chosen.shape, *[1] * (x.ndim - 2))
        if self.reduce == "mean":
            kept = torch.where(chosen.reshape(shape), x.float(), torch.zeros((), device=x.device))
            count = chosen.sum(1).reshape(-1, *[1] * (x.ndim - 2))
            return self.scores(kept.sum(1) / count)
        if self.reduce == "last":
            last = chosen.shape[1] - 1 - chosen.int().flip(1).argmax(1)
            return self.scores(x[torch.arange(len(x), device=x.device), last])
        return self.scores(x).masked_fill(~chosen, -torch.inf).amax(1)

    def passes(self, score: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return where a score opens the gate."""
        return score > self.threshold if self.above else score < self.threshold

    def chosen(self, frame: Frame) -> Bool[Tensor, "batch prompt"]:
        """Return which columns of the prompt are looked at.

        Raises:
            WhereError: a row in which none is.
        """
        chosen = self.where.columns(frame)[:, : frame.prompt_length]
        empty = ~chosen.any(1)
        if bool(empty.any()):
            row = int(empty.nonzero()[0, 0]) + frame.row0
            raise WhereError(
                f"the gate at {Site(self.site).short} looks at {self.where!r}, which row {row} has none of"
            )
        return chosen

    def decide(self, x: Float[Tensor, "batch pos ..."], frame: Frame, before: Decision | None) -> Decision:
        """Return what is decided in one forward; what the prompt decided earlier in a generation holds.

        Args:
            x: the activation of the columns that this forward holds.
            frame: which columns those are.
            before: what the same run decided in an earlier forward.
        """
        with torch.no_grad():
            found = before
            if before is None or (frame.offset == 0 and not frame.generating):  # a new prompt
                score = self.reduced(x[:, : frame.prompt_length], self.chosen(frame))
                found = Decision(score, self.passes(score))
            assert found is not None
            if self.once == "step":
                own = self.passes(self.scores(x))
                if self.reduce != "each":
                    prompt = torch.arange(frame.offset, frame.total, device=x.device) < frame.prompt_length
                    own = torch.where(prompt, found.open.to(x.device)[:, None], own)
                found.positions, found.first = own, frame.offset
                found.made = [own] if frame.offset == 0 else [*found.made, own]
        return found
